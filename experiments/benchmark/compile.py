"""compile: the first call of a gradient, traced and compiled, beside the peers'.

Logistic regression; a fresh function each time, so that no cache has it. Times for tracing with
lowering, then for XLA.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fixedgrad as fg

from ..tools import report
from .contestants import import_jaxopt
from .glm import AtSolution, at_solution


def main(options: argparse.Namespace) -> report.Claims:
    """Measures the table, and checks the claim."""
    problem = at_solution(options.seed, 60, 20)
    rounds = options.rounds or (1 if options.quick else 3)
    rows: dict[str, dict[str, float]] = {}
    bar = report.progress(rounds)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, make in _functions(problem).items():
            seconds.setdefault(name, []).append(_first_call(make(), problem))
        bar.update()
    bar.close()
    for name, pairs in seconds.items():
        traced, compiled = np.median(np.array(pairs), axis=0)
        rows[name] = {"trace": float(traced), "compile": float(compiled)}
    print(
        report.table(
            ["", "trace", "XLA", "both"],
            [
                [n, *(f"{x:.2f} s" for x in (r["trace"], r["compile"], r["trace"] + r["compile"]))]
                for n, r in rows.items()
            ],
        )
    )
    claims = report.Claims()
    own = sum(rows["picard + cg"].values())
    others = {n: sum(r.values()) for n, r in rows.items() if n.startswith(("jaxopt", "optimistix"))}
    for name, other in others.items():
        claims.check(
            f"The first gradient with `cg` takes no longer than that of {name}",
            own <= other,
            f"{own:.2f}, {other:.2f} s",
            required=False,
        )
    claims.check("Every gradient compiles", len(rows) >= 5, f"{len(rows)}")
    with report.figure(options.out / "compile.png", size=(6.0, 3.2)) as (_, axes):
        panel, names = axes[0][0], list(rows)
        traced = [rows[n]["trace"] for n in names]
        panel.barh(names, traced, color="#56b4e9", label="trace")
        panel.barh(
            names, [rows[n]["compile"] for n in names], left=traced, color="#007a55", label="XLA"
        )
        panel.invert_yaxis()
        panel.set(xlabel="first call (s)")
        panel.grid(visible=False, axis="y")
        panel.legend()
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds},
        results={},
        volatile={"seconds": rows},
    )
    return claims


def _first_call(function: Callable[..., Any], problem: AtSolution) -> tuple[float, float]:
    start = time.perf_counter()
    lowered = jax.jit(function).lower(problem.lam)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def _functions(problem: AtSolution) -> dict[str, Callable[[], Callable[..., Any]]]:
    w0 = jnp.zeros_like(problem.w)

    def fresh() -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        return (lambda w, lam: problem.outer(w, lam)), (lambda w, lam: problem.phi(w, lam))

    def decorated(solver: Callable[..., Any], linear: fg.LinearSolver) -> Callable[..., Any]:
        outer, phi = fresh()
        solve = fg.fixed_point(phi, fg.aid(linear))(solver(phi))
        return jax.grad(lambda lam: outer(solve(w0, lam), lam))

    picard = partial(fg.picard, max_steps=1000, rtol=1e-6)
    newton = partial(fg.newton, max_steps=30, rtol=1e-6, linear_solver=fg.dense())

    def adaptive() -> Callable[..., Any]:
        hypergrad = fg.adaptive_hypergradient(*fresh(), rtol=1e-3)
        return lambda lam: hypergrad.update(hypergrad.init(w0, lam), lam)[0]

    found = {
        "picard + cg": lambda: decorated(picard, fg.cg(max_steps=100, rtol=1e-6)),
        "picard + gmres": lambda: decorated(picard, fg.gmres(max_steps=100, rtol=1e-6)),
        "newton + dense": lambda: decorated(newton, fg.dense()),
        "certify": lambda: lambda lam: fg.certify(*fresh(), problem.w, None, lam).error,
        "adaptive": adaptive,
    }
    if importlib.util.find_spec("jaxopt"):
        jaxopt = import_jaxopt()

        def by_jaxopt() -> Callable[..., Any]:
            outer, phi = fresh()
            cg = partial(jaxopt.linear_solve.solve_cg, tol=1e-6, maxiter=100)
            solver = jaxopt.FixedPointIteration(phi, maxiter=1000, tol=1e-6, implicit_diff_solve=cg)
            return jax.grad(lambda lam: outer(solver.run(w0, lam).params, lam))

        found["jaxopt, iteration + cg"] = by_jaxopt
    if importlib.util.find_spec("optimistix"):
        import lineax as lx
        import optimistix as optx  # pyright: ignore[reportMissingImports]

        def by_optimistix() -> Callable[..., Any]:
            outer, phi = fresh()
            linear = lx.CG(rtol=1e-6, atol=0.0, max_steps=100)
            options: dict[str, Any] = {
                "max_steps": 1000,
                "throw": False,
                "adjoint": optx.ImplicitAdjoint(linear_solver=linear),
                "tags": frozenset({lx.negative_semidefinite_tag}),
            }
            solver = optx.FixedPointIteration(rtol=1e-6, atol=1e-6)
            return jax.grad(
                lambda lam: outer(optx.fixed_point(phi, solver, w0, lam, **options).value, lam)
            )

        found["optimistix, iteration + CG"] = by_optimistix
    return found
