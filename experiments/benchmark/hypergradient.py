"""hypergradient: t steps and k products cost what loops written out by hand do.

Logistic regression with one ℓ₂ regulariser for each feature. Two tables:

- the *whole* hypergradient from w₀ = 0 with exactly t = 100 steps of gradient descent and k = 20 of CG,
  beside the same loops by hand, beside each peer with the same t and k, and with its defaults;
- the *backward pass* alone from a given w(λ), to a tolerance: time, error of the gradient, temporary
  memory, compile time, traces of Φ.
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fixedgrad as fg

from ..tools import report
from .contestants import import_jaxopt
from .glm import AtSolution, at_solution
from .timing import compiled, interleaved

T, K = 100, 20

Solve = Callable[[jax.Array], jax.Array]


class Counted:
    """Φ, and how often Python ran it."""

    def __init__(self, problem: AtSolution) -> None:
        self.problem = problem
        self.traces = 0

    def __call__(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        self.traces += 1
        return self.problem.phi(w, lam)


def main(options: argparse.Namespace) -> report.Claims:
    """Measures both tables, and checks the claims."""
    shapes = [(200, 50)] if options.quick else [(500, 50), (2000, 500)]
    rounds = options.rounds or (3 if options.quick else 60 if options.full else 20)
    claims = report.Claims()
    passes, whole = {}, {}
    for shape in shapes:
        problem = at_solution(options.seed, *shape)
        whole[shape] = measure_whole(options.seed, shape, rounds)
        passes[shape] = _measured(problem, _passes(), rounds, exact=problem.w)
        for name, rows in (
            ("whole hypergradient, t = 100, k = 20", whole),
            ("backward pass", passes),
        ):
            print(f"\nThe {name}, n, d = {shape[0]}, {shape[1]}")
            print(_table(rows[shape]))
        _check(claims, shape, whole[shape], passes[shape], timed=not options.quick)
    _draw(options, whole)
    tables = {"whole": whole, "backward_pass": passes}
    plain, volatile = ("error", "temporary_bytes", "traces"), ("seconds", "compile_seconds")

    def of(keys: tuple[str, ...]) -> dict[str, Any]:
        return {
            table: {
                str(shape): {name: {k: row[k] for k in keys} for name, row in rows.items()}
                for shape, rows in shapes.items()
            }
            for table, shapes in tables.items()
        }

    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "shapes": shapes, "t": T, "k": K},
        results=of(plain),
        volatile=of(volatile),
    )
    return claims


def _measured(
    problem: AtSolution,
    contestants: dict[str, Callable[[Counted, jax.Array], Solve]],
    rounds: int,
    exact: jax.Array | None,
) -> dict[str, dict[str, float]]:
    """Time, error, memory, compile time and traces of each; from w₀ = `exact`, or from zero."""
    hessian = jax.hessian(problem.loss)(problem.w, problem.lam)
    truth = -jnp.exp(problem.lam) * problem.w * jnp.linalg.solve(hessian, problem.b)
    w0 = jnp.zeros_like(problem.w) if exact is None else exact
    runs, traces, errors = {}, {}, {}
    for name, solve_with in contestants.items():
        phi = Counted(problem)

        def gradient(lam: jax.Array, w0: jax.Array, solve_with: Any = solve_with, phi: Any = phi):
            solve = solve_with(phi, w0)
            return jax.grad(lambda lam: problem.outer(solve(lam)))(lam)

        runs[name] = compiled(gradient, problem.lam, w0)
        traces[name] = phi.traces
        error = jnp.linalg.norm(runs[name].run() - truth) / jnp.linalg.norm(truth)
        errors[name] = float(error)
    seconds = interleaved({name: m.run for name, m in runs.items()}, rounds)
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


# --- the whole hypergradient, exact t and k


def measure_whole(seed: int, shape: tuple[int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Every contestant from w₀ = 0: seconds, error, temporary bytes, compile seconds, traces of Φ."""
    return _measured(at_solution(seed, *shape), _whole(), rounds, exact=None)


def _whole() -> dict[str, Callable[[Counted, jax.Array], Solve]]:
    found = {
        "by hand": _by_hand,
        "CG k = 20": _whole_ours(fg.aid(fg.cg(num_steps=K))),
        "FP k = 100": _whole_ours(fg.aid(fg.fp(num_steps=T))),
        "ITD": _whole_ours(fg.itd()),
    }
    if importlib.util.find_spec("jaxopt"):
        jaxopt = import_jaxopt()
        cg = partial(jaxopt.linear_solve.solve_cg, tol=0.0, maxiter=K)
        found["jaxopt, CG k = 20"] = _jaxopt_iteration({"implicit_diff_solve": cg, "tol": 0.0})
        found["jaxopt, defaults"] = _jaxopt_iteration({"tol": 0.0})
        found["jaxopt, unrolled"] = _jaxopt_iteration({"implicit_diff": False, "tol": 0.0})
    if importlib.util.find_spec("optimistix"):
        import lineax as lx
        import optimistix as optx  # pyright: ignore[reportMissingImports]

        cg = optx.ImplicitAdjoint(linear_solver=lx.CG(rtol=0.0, atol=0.0, max_steps=K))
        tags = frozenset({lx.negative_semidefinite_tag})
        found["optimistix, CG k = 20"] = _optimistix(cg, tags, T)
        found["optimistix, defaults"] = _optimistix(optx.ImplicitAdjoint(), frozenset(), T)
        found["optimistix, checkpointed"] = _optimistix(
            optx.RecursiveCheckpointAdjoint(), frozenset(), T
        )
    return found


def _by_hand(phi: Counted, w0: jax.Array) -> Solve:
    """Loops that do the least: no guards, no verdict, no norms but CG's own."""

    @jax.custom_vjp
    def solve(lam: jax.Array) -> jax.Array:
        return lax.fori_loop(0, T, lambda _, w: phi(w, lam), w0)

    def forward(lam: jax.Array) -> tuple[jax.Array, Any]:
        w = solve(lam)
        return w, (w, lam)

    def backward(residuals: Any, b: jax.Array) -> tuple[jax.Array]:
        _, pull = jax.vjp(phi, *residuals)

        def step(_: Any, carry: Any) -> Any:
            x, r, p, rr = carry
            ap = p - pull(p)[0]
            alpha = rr / jnp.vdot(p, ap)
            x, r = x + alpha * p, r - alpha * ap
            new = jnp.vdot(r, r)
            return x, r, r + (new / rr) * p, new

        v, *_ = lax.fori_loop(0, K, step, (jnp.zeros_like(b), b, b, jnp.vdot(b, b)))
        return (pull(v)[1],)

    solve.defvjp(forward, backward)
    return solve


def _whole_ours(estimator: fg.Estimator) -> Callable[[Counted, jax.Array], Solve]:
    def solve_with(phi: Counted, w0: jax.Array) -> Solve:
        solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=T))
        return lambda lam: solve(w0, lam)

    return solve_with


def _jaxopt_iteration(options: dict[str, Any]) -> Callable[[Counted, jax.Array], Solve]:
    jaxopt = import_jaxopt()

    def solve_with(phi: Counted, w0: jax.Array) -> Solve:
        solver = jaxopt.FixedPointIteration(phi, maxiter=T, **options)
        return lambda lam: solver.run(w0, lam).params

    return solve_with


# --- the backward pass alone, from w(λ)


def _passes() -> dict[str, Callable[[Counted, jax.Array], Solve]]:
    found = {
        "CG, rtol 1e-5": _pass_ours(fg.cg(max_steps=2000, rtol=1e-5)),
        "CG, rtol 1e-8": _pass_ours(fg.cg(max_steps=2000, rtol=1e-8)),
        "FP, rtol 1e-5": _pass_ours(fg.fp(max_steps=20000, rtol=1e-5)),
        "dense": _pass_ours(fg.dense()),
    }
    if importlib.util.find_spec("jaxopt"):
        linear_solve = import_jaxopt().linear_solve
        found["jaxopt, defaults"] = _pass_jaxopt(linear_solve.solve_normal_cg)
        best = partial(linear_solve.solve_cg, tol=1e-5, maxiter=2000)
        found["jaxopt, solve_cg 1e-5"] = _pass_jaxopt(best)
    if importlib.util.find_spec("optimistix"):
        import lineax as lx
        import optimistix as optx  # pyright: ignore[reportMissingImports]

        found["optimistix, defaults"] = _optimistix(optx.ImplicitAdjoint(), frozenset())
        found["optimistix, CG 1e-5"] = _optimistix(
            optx.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-5, atol=0.0)),
            frozenset({lx.negative_semidefinite_tag}),
        )
    return found


def _pass_ours(linear_solver: fg.LinearSolver) -> Callable[[Counted, jax.Array], Solve]:
    def solve_with(phi: Counted, w: jax.Array) -> Solve:
        solve = fg.fixed_point(phi, fg.aid(linear_solver))(lambda w0, lam: w0 + 0 * lam)
        return lambda lam: solve(w, lam)

    return solve_with


def _pass_jaxopt(linear_solve: Callable[..., Any]) -> Callable[[Counted, jax.Array], Solve]:
    implicit_diff = import_jaxopt().implicit_diff

    def solve_with(phi: Counted, w: jax.Array) -> Solve:
        @implicit_diff.custom_fixed_point(phi, solve=linear_solve)
        def solve(w0: jax.Array, lam: jax.Array) -> jax.Array:
            return w0 + 0 * lam

        return lambda lam: solve(w, lam)

    return solve_with


def _optimistix(
    adjoint: Any, tags: frozenset, steps: int | None = None
) -> Callable[[Counted, jax.Array], Solve]:
    """Exactly `steps` steps; or one, from a w that is the solution."""
    import optimistix as optx  # pyright: ignore[reportMissingImports]

    tol, options = (1e-6, {}) if steps is None else (0.0, {"max_steps": steps, "throw": False})

    def solve_with(phi: Counted, w: jax.Array) -> Solve:
        solver = optx.FixedPointIteration(rtol=tol, atol=tol)
        return lambda lam: (
            optx.fixed_point(phi, solver, w, lam, adjoint=adjoint, tags=tags, **options).value  # pyright: ignore
        )

    return solve_with


# --- what is claimed and shown


def _check(
    claims: report.Claims, shape: tuple[int, int], whole: dict, passes: dict, *, timed: bool
) -> None:
    n, d = shape
    for name, bound in (("CG, rtol 1e-5", 1e-3), ("CG, rtol 1e-8", 1e-6), ("dense", 1e-9)):
        claims.check(
            f"{name}, n, d = {n}, {d}: error of the gradient below {bound:.0e}",
            passes[name]["error"] < bound,
            f"{passes[name]['error']:.1e}",
        )
    vectors = passes["CG, rtol 1e-5"]["temporary_bytes"] / (8 * d)
    claims.check(
        f"CG, n, d = {n}, {d}: temporary memory of at most 12 w and 6 vectors of length n",
        vectors <= 12 + 6 * n / d,
        f"{vectors:.1f} w",
    )
    ours = whole["CG k = 20"]["seconds"]
    claims.check(
        f"CG k = 20, n, d = {n}, {d}: the error of the loops by hand",
        abs(whole["CG k = 20"]["error"] - whole["by hand"]["error"]) < 1e-6,
        f"{whole['CG k = 20']['error']:.6g}, {whole['by hand']['error']:.6g}",
    )
    for name, bound in (
        ("by hand", 1.05),
        ("jaxopt, CG k = 20", 1.0),
        ("optimistix, CG k = 20", 1.0),
    ):
        if name in whole:
            ratio = ours / whole[name]["seconds"]
            claims.check(
                f"CG k = 20, n, d = {n}, {d}: at most {bound} times {name}",
                ratio <= bound + (0.0 if bound > 1 else 0.05),
                f"{ratio:.2f}",
                required=timed and name == "by hand",
            )


def _table(rows: dict) -> str:
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


def _draw(options: argparse.Namespace, whole: dict) -> None:
    with report.figure(options.out / "hypergradient.png", size=(6.0, 3.6)) as (_, axes):
        panel, ((n, d), rows) = axes[0][0], list(whole.items())[-1]
        ours = [not name.startswith(("jaxopt", "optimistix")) for name in rows]
        panel.barh(
            list(rows),
            [1e3 * row["seconds"] for row in rows.values()],
            color=["#007a55" if mine else "0.6" for mine in ours],
        )
        panel.invert_yaxis()
        panel.set(xscale="log", xlabel=f"whole hypergradient, n, d = {n}, {d} (ms)")
        panel.grid(visible=False, axis="y")
