"""The matrix transformation × solver × estimator, every cell against a closed form.

`python tests/matrix.py` computes all of it and prints it as Markdown; `--quick` takes the
transformations under `jit` of `vmap` only, `--estimator NAME` one row, `--solver NAME` one table.
"""

import argparse
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np

import fixedgrad as fg

# w = R √(Rᵀλ) for a rotation R: J is symmetric and not diagonal, and no derivative vanishes.
_R = np.array([[0.8, -0.6], [0.6, 0.8]])
_DIRECTION = np.array([0.3, -0.7])
START = _R @ np.array([1.0, 1.4])
POINT = _R @ np.array([1.1, 2.3])
BATCH = np.stack([POINT, _R @ np.array([1.6, 1.3])])


def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
    return w - 0.3 * (_R @ ((_R.T @ w) ** 2 - _R.T @ lam))


def solution(lam: jax.Array) -> jax.Array:
    return _R @ jnp.sqrt(_R.T @ lam)


def objective(w: jax.Array, lam: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(w)) + jnp.sum(w**2 * lam)


def _fori_loop(w0: jax.Array, lam: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 70, lambda _, w: phi(w, lam), w0)


def _scan(w0: jax.Array, lam: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda w, _: (phi(w, lam), None), w0, None, length=70)[0]


def _while_loop(w0: jax.Array, lam: jax.Array) -> jax.Array:
    def unfinished(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.max(jnp.abs(pair[1] - pair[0])) > 1e-15

    return jax.lax.while_loop(unfinished, lambda pair: (pair[1], phi(pair[1], lam)), (w0 + 1, w0))[
        1
    ]


def _numpy(w0: np.ndarray, lam: np.ndarray) -> np.ndarray:
    del w0
    return _R @ np.sqrt(_R.T @ lam)


SOLVERS: dict[str, fg.Solver] = {
    "fori_loop": _fori_loop,
    "scan": _scan,
    "while_loop": _while_loop,
    "pure_callback": fg.from_host(_numpy),
}

_LINEAR_SOLVERS = {
    "fp": fg.fp(num_steps=70),
    "cg": fg.cg(max_steps=6, rtol=1e-12),
    "normal_cg": fg.normal_cg(max_steps=8, rtol=1e-12),
    "gmres": fg.gmres(num_steps=2),
    "bicgstab": fg.bicgstab(num_steps=4),
    "dense": fg.dense(),
    "from_lineax": fg.from_lineax(lineax.CG(rtol=1e-13, atol=1e-13)),
}
_REVERSE = {
    "truncated_itd": fg.truncated_itd(num_steps=70),
    **{f"aid({name})": fg.aid(solver) for name, solver in _LINEAR_SOLVERS.items()},
}
ESTIMATORS: dict[str, fg.Estimator] = {
    "itd": fg.itd(),
    **_REVERSE,
    **{f"forward({name})": fg.forward(estimator) for name, estimator in _REVERSE.items()},
}

Solve = Callable[[jax.Array], jax.Array]
"""λ ↦ w."""


def _f(solve: Solve) -> Solve:
    return lambda lam: objective(solve(lam), lam)


def _along(g: Solve) -> Solve:
    """The derivative of a scalar function along a fixed direction, in reverse mode."""
    return lambda lam: jnp.vdot(_DIRECTION, jax.grad(g)(lam))


TRANSFORMATIONS: dict[str, Callable[[Solve], Solve]] = {
    "grad": lambda solve: jax.grad(_f(solve)),
    "vjp": lambda solve: lambda lam: jax.vjp(solve, lam)[1](jnp.asarray(_DIRECTION))[0],
    "jacrev": lambda solve: jax.jacrev(solve),
    "grad(grad)": lambda solve: jax.grad(_along(_f(solve))),
    "hessian": lambda solve: jax.hessian(_f(solve)),
    "jacfwd(jacrev)": lambda solve: jax.jacfwd(jax.jacrev(solve)),
    "grad(grad(grad))": lambda solve: jax.grad(_along(_along(_f(solve)))),
    "jvp": lambda solve: lambda lam: jax.jvp(solve, (lam,), (jnp.asarray(_DIRECTION),))[1],
    "jacfwd": lambda solve: jax.jacfwd(solve),
    "linearize": lambda solve: lambda lam: jax.linearize(solve, lam)[1](jnp.asarray(_DIRECTION)),
    "jacfwd(jacfwd)": lambda solve: jax.jacfwd(jax.jacfwd(solve)),
}

VARIANTS: dict[str, Callable[[Solve], jax.Array]] = {
    "plain": lambda g: g(jnp.asarray(POINT)),
    "jit": lambda g: jax.jit(g)(jnp.asarray(POINT)),
    "vmap": lambda g: jax.jit(jax.vmap(g))(jnp.asarray(BATCH)),
}

_REFUSALS = {
    "forward-mode autodiff (jvp) to a custom_vjp": "needs `forward`",
    "Reverse-mode differentiation does not work for lax.while_loop": "no reverse mode of a `while`",
    "is not JAX and cannot be differentiated": "the solver is not JAX",
}


class Cell(NamedTuple):
    """`verdict` is "ok", "refused" or "WRONG"; `detail` says why."""

    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        return self.verdict if self.verdict == "ok" else f"{self.verdict}: {self.detail}"


def cell(estimator: str, solver: str, transformation: str, variants: Any = tuple(VARIANTS)) -> Cell:
    """One cell: the transformation of a decorated solver, against that of the closed form."""
    decorated = fg.fixed_point(phi, ESTIMATORS[estimator])(SOLVERS[solver])
    transform = TRANSFORMATIONS[transformation]
    got = transform(lambda lam: decorated(jnp.asarray(START), lam))
    for variant in variants:
        try:
            value = VARIANTS[variant](got)
        except (TypeError, ValueError) as error:
            reasons = [why for text, why in _REFUSALS.items() if text in str(error)]
            return Cell("refused", reasons[0]) if reasons else Cell("WRONG", repr(error))
        wanted = VARIANTS[variant](transform(solution))
        error = float(jnp.max(jnp.abs(value - wanted)) / jnp.max(jnp.abs(wanted)))
        if not error < 1e-9:
            return Cell("WRONG", f"relative error {error:.1e} under {variant}")
    return Cell("ok")


def row(estimator: str, solver: str, variants: Any) -> list[Cell]:
    """All transformations of one decorated solver."""
    jax.config.update("jax_enable_x64", True)
    cells = [cell(estimator, solver, name, variants) for name in TRANSFORMATIONS]
    jax.clear_caches()  # Hundreds of compiled programs would fill the memory.
    return cells


def table(solver: str, rows: dict[str, list[Cell]]) -> str:
    """The rows of one solver as Markdown; estimators with the same cells share a row."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows.items():
        shared.setdefault(tuple(map(str, cells)), []).append(f"`{name}`")
    lines = [
        f"| solver: `{solver}` | " + " | ".join(f"`{name}`" for name in TRANSFORMATIONS) + " |",
        "|" + " --- |" * (len(TRANSFORMATIONS) + 1),
    ]
    lines += [
        f"| {', '.join(names)} | " + " | ".join(cells) + " |" for cells, names in shared.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the matrix; 1 where a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only under `jit` of `vmap`")
    parser.add_argument("--estimator", choices=ESTIMATORS, help="only this one")
    parser.add_argument("--solver", choices=SOLVERS, help="only this one")
    parser.add_argument("--processes", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args(arguments)
    variants = ("vmap",) if options.quick else tuple(VARIANTS)
    names = [options.estimator] if options.estimator else list(ESTIMATORS)
    wrong = counted = 0
    # Not `ProcessPoolExecutor`, whose `max_tasks_per_child` can hang in Python 3.11.
    with get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        for solver in [options.solver] if options.solver else SOLVERS:
            tasks = {name: pool.apply_async(row, (name, solver, variants)) for name in names}
            rows = {name: task.get() for name, task in tasks.items()}
            print(table(solver, rows), end="\n\n", flush=True)
            counted += sum(map(len, rows.values()))
            wrong += sum(c.verdict == "WRONG" for cells in rows.values() for c in cells)
    print(f"{counted} cells, {' and '.join(variants)} of each; {wrong} wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
