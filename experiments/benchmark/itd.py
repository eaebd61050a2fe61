"""itd: no scheme of a peer keeps less in less time: reverse mode through t steps.

Gradient descent on logistic regression, exactly t steps and through a tolerance that is never met. For
each scheme of `picard(..., checkpoints=...)` and for optimistix's `RecursiveCheckpointAdjoint` the time
of a gradient over that of the t steps alone, and the temporary memory.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fixedgrad as fg

from ..tools import report
from .glm import AtSolution, at_solution
from .timing import compiled, interleaved

_FORWARD = "t steps alone"
_PEER = "optimistix, recursive"
_MARKERS = (
    ("o", "#0072b2"),
    ("^", "#56b4e9"),
    ("D", "#b58900"),
    ("o", "#007a55"),
    ("x", "#007a55"),
    ("s", "#d55e00"),
)


def main(options: argparse.Namespace) -> report.Claims:
    """Measures every scheme at every t, and checks the claims."""
    cases = [((500, 50), 64), ((500, 50), 1024), ((2000, 500), 64), ((2000, 500), 256)]
    if options.quick:
        cases = [((60, 20), 32)]
    if options.full:
        cases += [((500, 50), 4096), ((500, 50), 16384), ((2000, 500), 1024)]
    rounds = options.rounds or (2 if options.quick else 7)
    found = {
        f"{n} × {d}, t = {t}": _measured(at_solution(options.seed, n, d), t, rounds)
        for (n, d), t in cases
    }
    print(_table(found))
    claims = _checked(found)
    _draw(options, found)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "cases": cases},
        results={
            "bytes": {
                case: {k: r["bytes"] for k, r in rows.items()} for case, rows in found.items()
            }
        },
        volatile={
            "over_forward": {
                case: {k: r["over_forward"] for k, r in rows.items()}
                for case, rows in found.items()
            }
        },
    )
    return claims


def _schemes() -> dict[str, fg.Checkpoints]:
    return {
        "every iterate": fg.every_iterate(),
        "rematerialised": fg.rematerialised(),
        "nested": fg.nested(),
        "recursive": fg.recursive(),
    }


def _measured(problem: AtSolution, t: int, rounds: int) -> dict[str, dict[str, float]]:
    w0 = jnp.zeros_like(problem.w)

    def gradient(solver: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        solve = fg.fixed_point(problem.phi, fg.itd(), on_failure="ignore")(
            solver
        )  # No tolerance met.
        return jax.grad(lambda lam: problem.outer(solve(w0, lam)))

    functions: dict[str, Callable[..., Any]] = {
        _FORWARD: lambda lam: fg.picard(problem.phi, num_steps=t)(w0, lam)
    }
    for name, scheme in _schemes().items():
        functions[name] = gradient(fg.picard(problem.phi, num_steps=t, checkpoints=scheme))
    until = fg.picard(
        problem.phi, max_steps=t, atol=1e-30, checkpoints=fg.recursive(), on_failure="ignore"
    )
    functions["recursive, to a tolerance"] = gradient(until)
    if importlib.util.find_spec("optimistix"):
        import optimistix as optx  # pyright: ignore[reportMissingImports]

        def peer(lam: jax.Array) -> jax.Array:
            adjoint = optx.RecursiveCheckpointAdjoint()
            solver = optx.FixedPointIteration(rtol=0.0, atol=0.0)
            options = {"max_steps": t, "throw": False, "adjoint": adjoint}
            solution = optx.fixed_point(problem.phi, solver, w0, lam, **options)  # pyright: ignore
            return problem.outer(solution.value)

        functions[_PEER] = jax.grad(peer)
    runs = {name: compiled(function, problem.lam) for name, function in functions.items()}
    want = runs["every iterate"].run()
    for name, run in runs.items():
        if name != _FORWARD:
            np.testing.assert_allclose(run.run(), want, rtol=1e-8, err_msg=name)
    seconds = interleaved({name: m.run for name, m in runs.items()}, rounds)
    return {
        name: {
            "over_forward": float(np.median(seconds[name] / seconds[_FORWARD])),
            "bytes": runs[name].temporary_bytes,
        }
        for name in runs
        if name != _FORWARD
    }


def _table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    names = list(next(iter(found.values())))
    rows = [
        [case, *(f"{r['over_forward']:.2f}, {r['bytes'] / 1e3:.0f}" for r in rows.values())]
        for case, rows in found.items()
    ]
    return report.table(["time over t steps, temporary kB", *names], rows)


def _checked(found: dict[str, dict[str, dict[str, float]]]) -> report.Claims:
    claims = report.Claims()
    for case, rows in found.items():
        nested, plain = rows["nested"], rows["every iterate"]
        share = plain["bytes"] / nested["bytes"]
        if int(case.rpartition("= ")[2]) >= 256:
            claims.check(
                f"{case}: `nested` keeps at most 1/20 of what every iterate takes",
                share >= 20,
                f"1/{share:.0f}",
            )
        claims.check(
            f"{case}: `nested` takes at most 3 times the steps alone, but for noise",
            nested["over_forward"] <= 3.15,
            f"{nested['over_forward']:.2f}",
            required=False,
        )
        if _PEER in rows:
            peer = rows[_PEER]
            better = [
                name
                for name in (*_schemes(), "recursive, to a tolerance")
                if rows[name]["bytes"] <= peer["bytes"]
                and rows[name]["over_forward"] <= peer["over_forward"]
            ]
            claims.check(
                f"{case}: a scheme of ours takes no more time and no more memory than optimistix's",
                bool(better),
                ", ".join(better) or "none",
                required=False,
            )
    return claims


def _draw(options: argparse.Namespace, found: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = len(found)
    size = 2.6 * columns + 0.6, 3.9
    with report.figure(options.out / "itd.png", columns=columns, size=size) as (fig, axes):
        for panel, (case, rows) in zip(axes[0], found.items(), strict=True):
            for (name, r), (marker, color) in zip(rows.items(), _MARKERS, strict=False):
                at = r["bytes"] / 1e3, r["over_forward"]
                panel.plot(*at, marker, color=color, label=name, fillstyle="none", markersize=8)
            panel.set_title(case, fontsize=9)
            panel.set(xscale="log", xlabel="temporary memory (kB)")
            panel.margins(0.15, 0.15)
        axes[0][0].set_ylabel("time over the t steps")
        handles, labels = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
