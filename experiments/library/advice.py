"""`fixedgrad.recommend` chooses, on five problems, a solver and an estimator near the fastest ones.

LR, KRR, BR and HR by gradient descent, and an equilibrium model with a matrix that is not symmetric.
Every alternative that `recommend` offers is compiled and timed at w(λ), and every way to w(λ) from w₀;
each counts as usable where its hypergradient is within 1 % of the exact one (of `dense` for the
equilibrium model).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

import fixedgrad as fg

from ..benchmark.timing import seconds_of
from ..problems import families, synthetic
from ..tools import report

FLOAT64 = True
_USABLE = 1e-2  # The relative error up to which an estimator counts.
_HEADER = ("problem", "recommended", "its time", "its error", "fastest", "its time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""
    del parser


def main(options: argparse.Namespace) -> int:
    """Times every alternative on every problem."""
    rows, seconds, errors = [], {}, {}
    lower: dict[str, Any] = {}
    for name, outer, phi, w0, lam in _problems(options):
        advice = fg.recommend(outer, phi, w0, lam, rtol=1e-3)
        solver = fg.picard(phi, max_steps=200_000, rtol=1e-12)
        w = jax.jit(solver)(w0, lam)
        found = {a.name: _measure(a.estimator, outer, phi, w, lam) for a in advice.alternatives}
        exact = found["aid(dense())"][0]
        error = {
            k: float(np.linalg.norm(g - exact) / np.linalg.norm(exact))
            for k, (g, _) in found.items()
        }
        usable = {k: t for k, (_, t) in found.items() if error[k] <= _USABLE and k != "itd()"}
        best = min(usable, key=lambda k: usable[k])
        rows.append(
            (name, advice.name, found[advice.name][1], error[advice.name], best, usable[best])
        )
        lower[name] = {
            "chosen": advice.solver_name,
            "ways": {
                x.name: _measure_way(x.solver, outer, phi, w0, lam, exact) for x in advice.ways
            },
        }
        seconds[name] = {k: t for k, (_, t) in found.items()}
        errors[name] = error
        print(f"\n{name}\n{advice}", flush=True)
    shown = [
        (a, _short(b), f"{1e6 * c:.0f} µs", f"{d:.0e}", _short(e), f"{1e6 * f:.0f} µs")
        for a, b, c, d, e, f in rows
    ]
    text = report.table(_HEADER, shown)
    print(f"\n{text}\n")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    recommended = {row[0]: row[1] for row in rows}
    _draw(options.out / "advice.png", seconds, errors, recommended)
    claims = report.Claims()
    for name, chosen, taken, error, best, least in rows:
        right = f"{name}: `{_short(chosen)}` is right within 1 %"
        claims.check(right, error <= _USABLE, f"{error:.1e}")
        # Times of microseconds on a shared machine: reported, not required.
        claims.check(
            f"{name}: and takes at most twice the time of the fastest, `{_short(best)}`",
            taken <= 2 * least,
            f"{taken / least:.2f}",
            required=False,
        )
    for name, of in lower.items():
        missed, taken = of["ways"][of["chosen"]]
        times = [t for e, t in of["ways"].values() if e <= _USABLE]
        kind = of["chosen"].partition("(")[0]
        claims.check(
            f"{name}: the hypergradient at the w of `{kind}` is right within 1 %",
            missed <= _USABLE,
            f"{missed:.1e}",
        )
        claims.check(
            f"{name}: and `{kind}` takes at most 1.2 times the time of the fastest",
            taken <= 1.2 * min(times, default=0.0),
            f"{taken / min(times, default=taken):.2f}",
            required=False,
        )
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "full": options.full},
        results={"chosen": recommended},
        volatile={"seconds": seconds, "errors": errors, "lower": lower},
    )
    return claims.exit_code


def _problems(options: argparse.Namespace) -> Any:
    key, scale = jax.random.key(options.seed), 4 if options.full else 1
    settings = (
        synthetic.logistic_regression(key, synthetic.Sizes(100 * scale, 50 * scale)),
        synthetic.kernel_ridge_regression(key, synthetic.Sizes(40 * scale, 10)),
        synthetic.biased_regularization(key, synthetic.Sizes(100 * scale, 50 * scale)),
        synthetic.hyper_representation(key, synthetic.Sizes(100 * scale, 40), 20),
    )
    for setting in settings[2:3] if options.quick else settings:
        lam = setting.sample(jax.random.fold_in(key, 1))
        step, _ = fg.optimal_step_size(*setting.curvature(lam))
        phi = fg.gradient_descent(setting.loss, step_size=step)
        yield setting.short, setting.outer, phi, jnp.zeros(setting.dimension), lam
    family = next(f for f in families.FAMILIES if f.name == "tanh equilibrium")
    w0, lam, data = family.make(key)
    yield (
        "equilibrium",
        lambda w, lam: family.outer(w, lam, data),
        lambda w, lam: family.phi(w, lam, data),
        w0,
        lam,
    )


def _measure(
    estimator: fg.Estimator, outer: Any, phi: Any, w: Any, lam: Any
) -> tuple[np.ndarray, float]:
    """The hypergradient at w, flat, and the least time of some runs."""
    solve = fg.fixed_point(phi, estimator)(lambda w0, *_: w0)
    gradient = jax.jit(jax.grad(lambda lam, w: outer(solve(w, lam), lam)))
    result = np.asarray(ravel_pytree(gradient(lam, w))[0])
    return result, _least_time(lambda: gradient(lam, w))


def _measure_way(
    solver: fg.Solver, outer: Any, phi: Any, w0: Any, lam: Any, exact: np.ndarray
) -> tuple[float, float]:
    """The relative error of the exact linear solve's hypergradient at its w, and its least time."""
    run = jax.jit(solver)
    gradient, _ = _measure(fg.aid(fg.dense()), outer, phi, run(w0, lam), lam)
    error = float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
    return error, _least_time(lambda: run(w0, lam))


def _least_time(run: Callable[[], Any]) -> float:
    """Of twenty runs, in seconds."""
    return min(seconds_of(lambda: jax.block_until_ready(run())) for _ in range(20))


def _short(name: str) -> str:
    """The linear solver alone: `cg` of `aid(cg(max_steps=5000, rtol=0.001))`."""
    return name.removeprefix("aid(").partition("(")[0]


def _draw(
    path: Path,
    seconds: dict[str, dict[str, float]],
    errors: dict[str, dict[str, float]],
    recommended: dict[str, str],
) -> None:
    """One panel a problem: what each alternative took, and what of it is usable and recommended."""
    with report.figure(path, columns=len(seconds), size=(13, 2.8)) as (fig, axes):
        for panel, (problem, taken) in zip(axes[0], seconds.items(), strict=True):
            # ITD differentiates the solver, which a given w has not.
            names = [name for name in taken if name != "itd()"][::-1]
            for row, name in enumerate(names):
                usable, best = errors[problem][name] <= _USABLE, name == recommended[problem]
                panel.plot(1e6 * taken[name], row, **_marker(best, usable))
            panel.set_yticks(range(len(names)), [_short(name) for name in names])
            panel.set(xscale="log", xlabel="time at w(λ), µs", title=problem)
            panel.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.margins(x=0.2, y=0.15)
        handles = [
            Line2D([], [], label=label, **_marker(best, usable))
            for best, usable, label in (
                (True, True, "recommended"),
                (False, True, "alternative"),
                (False, False, f"error above {_USABLE:.0%}"),
            )
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=3)


def _marker(best: bool, usable: bool) -> dict[str, Any]:
    """How an alternative is drawn, in the panels and in the legend."""
    return {
        "marker": "*" if best else "o",
        "markersize": 14 if best else 8,
        "color": "#007a55" if best else "#555555",
        "fillstyle": "full" if usable else "none",
        "linestyle": "none",
    }
