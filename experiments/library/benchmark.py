"""A backward pass costs its products and nothing else: at most 1.15 times the bare operator's time.

The linear system (I − Jᵀ) v = b of logistic regression with one ℓ₂ regulariser for each feature, and Φ
gradient descent. Two tables:

- the *kernel overhead*, T / (products × time of the bare operator), where the bare operator is
  u − α ((s ∘ Xu)ᵀX + Λu) written out by hand, in a jitted loop, on the same data;
- the *whole backward pass* from a given w(λ), beside the same of jaxopt and optimistix where these are
  installed: time, error of the gradient, temporary memory, compile time, traces of Φ.

Times are medians over rounds in which all competitors take turns. Compare them within one run only.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fixedgrad as fg

from ..tools import report

FLOAT64 = True

Compiled = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--rounds", type=int, help="how often all competitors are timed in turn")


class Problem(NamedTuple):
    """Logistic regression at its solution w(λ), and what is needed around it."""

    x: jax.Array
    labels: jax.Array
    step_size: float
    lam: jax.Array
    w: jax.Array
    b: jax.Array

    def loss(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        fit = jnp.mean(jnp.logaddexp(0.0, -self.labels * (self.x @ w)))
        return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def phi(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        return w - self.step_size * jax.grad(self.loss)(w, lam)

    def outer(self, w: jax.Array) -> jax.Array:
        return jnp.vdot(self.b, w)


class Measured(NamedTuple):
    """What one compiled function is and takes, apart from its running time."""

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int


def main(options: argparse.Namespace) -> int:
    """Measures both tables, and checks the claims."""
    # (n, d), steps. A product takes 1 ms or more in the last one of the larger two lists.
    shapes = [((100, 20), 2000), ((500, 50), 400), ((2000, 500), 40), ((4000, 1500), 20)]
    shapes = [((60, 20), 20), ((200, 50), 10)] if options.quick else shapes
    rounds = options.rounds or (3 if options.quick else 60 if options.full else 20)
    problems = {shape: _problem(options.seed, *shape) for shape, _ in shapes}
    whole = [(200, 50)] if options.quick else [(500, 50), (2000, 500)]
    bar = report.progress(len(shapes) + len(whole))
    kernels, passes = {}, {}
    for shape, steps in shapes:
        bar.set_description_str(f"kernels, {shape[0]} × {shape[1]}")
        kernels[shape] = _kernels(problems[shape], steps, rounds)
        bar.update()
    for shape in whole:
        bar.set_description_str(f"backward passes, {shape[0]} × {shape[1]}")
        passes[shape] = _backward_passes(problems[shape], rounds)
        bar.update()
    bar.close()

    print(_kernel_table(kernels))
    for shape, rows in passes.items():
        print(f"\nThe whole backward pass, n, d = {shape[0]}, {shape[1]}")
        print(_pass_table(rows))
    claims = _checked(kernels, passes, timed=not options.quick)
    _draw(options, kernels, passes)
    plain = ("error", "temporary_bytes", "traces")
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "shapes": [s for s, _ in shapes]},
        results={
            "backward_passes": {
                str(shape): {name: {k: row[k] for k in plain} for name, row in rows.items()}
                for shape, rows in passes.items()
            }
        },
        volatile={
            "kernels": {str(shape): rows for shape, rows in kernels.items()},
            "seconds": {
                str(shape): {
                    name: {k: row[k] for k in ("seconds", "compile_seconds")}
                    for name, row in rows.items()
                }
                for shape, rows in passes.items()
            },
        },
    )
    return claims.exit_code


def _problem(seed: int, n: int, d: int) -> Problem:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.geomspace(1.0, 0.1, d)  # κ of a few hundred.
    labels = np.sign(x @ rng.normal(size=d) + rng.normal(size=n))
    lam = np.log(rng.uniform(0.5e-3, 1.5e-3, size=d))
    curvature = np.linalg.norm(x, 2) ** 2 / (4 * n) + np.exp(lam.max())
    arrays = [jnp.asarray(a) for a in (x, labels, lam, rng.normal(size=d))]
    problem = Problem(arrays[0], arrays[1], 1 / curvature, arrays[2], jnp.zeros(d), arrays[3])

    @jax.jit
    def newton(lam: jax.Array) -> jax.Array:
        def step(_: jax.Array, w: jax.Array) -> jax.Array:
            return w - jnp.linalg.solve(
                jax.hessian(problem.loss)(w, lam), jax.grad(problem.loss)(w, lam)
            )

        return lax.fori_loop(0, 15, step, jnp.zeros(d))

    return problem._replace(w=newton(problem.lam))


def _compiled(function: Callable[..., Any], *args: Any) -> Measured:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    temporary = 0 if analysis is None else int(analysis.temp_size_in_bytes)
    return Measured(lambda: jax.block_until_ready(compiled(*args)), seconds, temporary)


def _interleaved(runs: dict[str, Measured], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each function in each round."""
    for measured in runs.values():
        measured.run()
    seconds = {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        for name, measured in runs.items():
            start = time.perf_counter()
            measured.run()
            seconds[name][i] = time.perf_counter() - start
    return seconds


def _kernels(problem: Problem, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds a product, overhead and extra seconds a step: the bare operator, FP and CG."""

    def bare(x: jax.Array, labels: jax.Array, w: jax.Array, lam: jax.Array, b: jax.Array) -> Any:
        margins = labels * (x @ w)
        s = jax.nn.sigmoid(margins) * jax.nn.sigmoid(-margins) / x.shape[0]
        ridge = jnp.exp(lam)

        def product(_: jax.Array, u: jax.Array) -> jax.Array:
            return u - problem.step_size * ((s * (x @ u)) @ x + ridge * u)

        return lax.fori_loop(0, steps, product, b)

    def solved(linear_solver: fg.LinearSolver) -> Callable[..., Any]:
        def solve(x: Any, labels: Any, w: Any, lam: Any, b: Any) -> Any:
            at = problem._replace(x=x, labels=labels)
            _, vjp = jax.vjp(lambda w: at.phi(w, lam), w)
            return linear_solver(lambda u: vjp(u)[0], b)[0]

        return solve

    # All compute two products' worth of linearisation besides; FP's first product is free.
    functions = {
        "bare": (bare, steps),
        "fp": (solved(fg.fp(num_steps=steps + 1)), steps),
        "cg": (solved(fg.cg(num_steps=steps)), steps),
    }
    args = problem.x, problem.labels, problem.w, problem.lam, problem.b
    runs = {name: _compiled(function, *args) for name, (function, _) in functions.items()}
    seconds = _interleaved(runs, rounds)
    products = {name: count for name, (_, count) in functions.items()}
    a_step = {name: times / products[name] for name, times in seconds.items()}
    return {
        name: {
            "seconds_per_step": float(np.median(a_step[name])),
            # Differences and ratios within a round first: load comes and goes between rounds.
            "overhead": float(np.median(a_step[name] / a_step["bare"])),
            "extra_seconds": float(np.median(a_step[name] - a_step["bare"])),
        }
        for name in functions
    }


class _Counted:
    """Φ, and how often Python ran it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.traces = 0

    def __call__(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        self.traces += 1
        return self.problem.phi(w, lam)


Solve = Callable[[jax.Array], jax.Array]


def _ours(linear_solver: fg.LinearSolver) -> Callable[[_Counted, jax.Array], Solve]:
    def solve_with(phi: _Counted, w: jax.Array) -> Solve:
        solve = fg.fixed_point(phi, fg.aid(linear_solver))(lambda w0, lam: w0 + 0 * lam)
        return lambda lam: solve(w, lam)

    return solve_with


def _jaxopt(linear_solve: Callable[..., Any]) -> Callable[[_Counted, jax.Array], Solve]:
    from jaxopt import implicit_diff  # pyright: ignore[reportMissingImports]

    def solve_with(phi: _Counted, w: jax.Array) -> Solve:
        @implicit_diff.custom_fixed_point(phi, solve=linear_solve)
        def solve(w0: jax.Array, lam: jax.Array) -> jax.Array:
            return w0 + 0 * lam

        return lambda lam: solve(w, lam)

    return solve_with


def _optimistix(adjoint: Any, tags: frozenset) -> Callable[[_Counted, jax.Array], Solve]:
    import optimistix as optx  # pyright: ignore[reportMissingImports]

    def solve_with(phi: _Counted, w: jax.Array) -> Solve:
        solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)  # w is the solution: one step.
        return lambda lam: (
            optx.fixed_point(phi, solver, w, lam, adjoint=adjoint, tags=tags).value  # pyright: ignore
        )

    return solve_with


def _competitors() -> dict[str, Callable[[_Counted, jax.Array], Solve]]:
    found = {
        "CG, rtol 1e-5": _ours(fg.cg(max_steps=2000, rtol=1e-5)),
        "CG, rtol 1e-8": _ours(fg.cg(max_steps=2000, rtol=1e-8)),
        "FP, rtol 1e-5": _ours(fg.fp(max_steps=20000, rtol=1e-5)),
        "dense": _ours(fg.dense()),
    }
    if importlib.util.find_spec("jaxopt"):
        with warnings.catch_warnings():  # It warns that it is no longer maintained.
            warnings.simplefilter("ignore", DeprecationWarning)
            from jaxopt import linear_solve  # pyright: ignore[reportMissingImports]
        found["jaxopt, default"] = _jaxopt(linear_solve.solve_normal_cg)
        best = partial(linear_solve.solve_cg, tol=1e-5, maxiter=2000)
        found["jaxopt, solve_cg 1e-5"] = _jaxopt(best)
    if importlib.util.find_spec("optimistix"):
        import lineax as lx
        import optimistix as optx  # pyright: ignore[reportMissingImports]

        found["optimistix, default"] = _optimistix(optx.ImplicitAdjoint(), frozenset())
        found["optimistix, CG 1e-5"] = _optimistix(
            optx.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-5, atol=0.0)),
            frozenset({lx.negative_semidefinite_tag}),
        )
    return found


def _backward_passes(problem: Problem, rounds: int) -> dict[str, dict[str, float]]:
    def gradient(solve: Solve) -> Callable[[jax.Array], jax.Array]:
        return jax.grad(lambda lam: problem.outer(solve(lam)))

    hessian = jax.hessian(problem.loss)(problem.w, problem.lam)
    exact = -jnp.exp(problem.lam) * problem.w * jnp.linalg.solve(hessian, problem.b)
    runs, traces, errors = {}, {}, {}
    for name, solve_with in _competitors().items():
        phi = _Counted(problem)
        runs[name] = _compiled(gradient(solve_with(phi, problem.w)), problem.lam)
        traces[name] = phi.traces
        error = jnp.linalg.norm(runs[name].run() - exact) / jnp.linalg.norm(exact)
        errors[name] = float(error)
    seconds = _interleaved(runs, rounds)
    return {
        name: {
            "seconds": float(np.median(seconds[name])),
            "error": errors[name],
            "temporary_bytes": runs[name].temporary_bytes,
            "compile_seconds": runs[name].compile_seconds,
            "traces": traces[name],
        }
        for name in runs
    }


def _checked(kernels: dict, passes: dict, *, timed: bool) -> report.Claims:
    claims = report.Claims()
    for (n, d), rows in kernels.items():
        long = rows["bare"]["seconds_per_step"] >= 1e-3
        for name in ("fp", "cg"):
            if long:
                claims.check(
                    f"{name.upper()}, n, d = {n}, {d}: kernel overhead at most 1.15",
                    rows[name]["overhead"] <= 1.15,
                    f"{rows[name]['overhead']:.3f}",
                    required=timed,
                )
            if d == 20:
                extra = 1e6 * rows[name]["extra_seconds"]
                claims.check(
                    f"{name.upper()}, n, d = {n}, {d}: at most 2 µs more a step than the product",
                    extra <= 2,
                    f"{extra:.2f} µs",
                    required=timed,
                )
    for (n, d), rows in passes.items():
        for name, bound in (("CG, rtol 1e-5", 1e-3), ("CG, rtol 1e-8", 1e-6), ("dense", 1e-9)):
            claims.check(
                f"{name}, n, d = {n}, {d}: error of the gradient below {bound:.0e}",
                rows[name]["error"] < bound,
                f"{rows[name]['error']:.1e}",
            )
        vectors = rows["CG, rtol 1e-5"]["temporary_bytes"] / (8 * d)
        claims.check(
            f"CG, n, d = {n}, {d}: temporary memory of at most 12 w and 6 vectors of length n",
            vectors <= 12 + 6 * n / d,
            f"{vectors:.1f} w",
        )
    return claims


def _kernel_table(kernels: dict) -> str:
    header = ["n, d", "bare operator", "FP", "CG", "FP, extra a step", "CG, extra a step"]
    rows = [
        [
            f"{n}, {d}",
            f"{1e6 * row['bare']['seconds_per_step']:.2f} µs",
            *(f"× {row[name]['overhead']:.3f}" for name in ("fp", "cg")),
            *(f"{1e6 * row[name]['extra_seconds']:.2f} µs" for name in ("fp", "cg")),
        ]
        for (n, d), row in kernels.items()
    ]
    return report.table(header, rows)


def _pass_table(rows: dict) -> str:
    header = ["", "time", "error", "temp. memory", "compile", "traces of Φ"]
    return report.table(
        header,
        [
            [
                name,
                f"{1e3 * row['seconds']:.3f} ms",
                f"{row['error']:.0e}",
                f"{row['temporary_bytes'] / 1024:.0f} KiB",
                f"{row['compile_seconds']:.2f} s",
                str(row["traces"]),
            ]
            for name, row in rows.items()
        ],
    )


def _draw(options: argparse.Namespace, kernels: dict, passes: dict) -> None:
    with report.figure(options.out / "benchmark.png", columns=2, size=(9.5, 3.6)) as (_, axes):
        left, right = axes[0]
        size = [n * d for n, d in kernels]
        for name, label, color in (("fp", "FP", "#0072b2"), ("cg", "CG", "#007a55")):
            overheads = [rows[name]["overhead"] for rows in kernels.values()]
            left.plot(size, overheads, marker="o", label=label, color=color)
        left.axhline(1.15, color="0.4", linewidth=1, linestyle=":")
        left.set(xscale="log", yscale="log", xlabel="n d", ylabel="time over the bare operator's")
        left.set_yticks([1, 1.15, 2, 4], ["1", "1.15", "2", "4"])
        left.minorticks_off()
        left.legend()
        (n, d), rows = list(passes.items())[-1]
        ours = [not name.startswith(("jaxopt", "optimistix")) for name in rows]
        right.barh(
            list(rows),
            [1e3 * row["seconds"] for row in rows.values()],
            color=["#007a55" if mine else "0.6" for mine in ours],
        )
        right.invert_yaxis()
        right.set(xscale="log", xlabel=f"backward pass, n, d = {n}, {d} (ms)")
        right.grid(visible=False, axis="y")
