"""kernel: a linear solve costs its products and nothing else, 1.15 times them at most.

The linear system (I − Jᵀ) v = b of logistic regression with one ℓ₂ regulariser for each feature, and Φ
gradient descent. The *kernel overhead* is T / (products × time of the bare operator), where the bare
operator is u − α ((s ∘ Xu)ᵀX + Λu) written out by hand, in a jitted loop, on the same data.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fixedgrad as fg

from ..tools import report
from .glm import AtSolution, at_solution
from .timing import compiled, interleaved


def main(options: argparse.Namespace) -> report.Claims:
    """Measures the table, and checks the claims."""
    # (n, d), steps. A product takes 1 ms or more in the last one of the larger two lists.
    shapes = [((100, 20), 2000), ((500, 50), 400), ((2000, 500), 40), ((4000, 1500), 20)]
    shapes = [((60, 20), 20), ((200, 50), 10)] if options.quick else shapes
    rounds = options.rounds or (3 if options.quick else 60 if options.full else 20)
    kernels = {
        shape: _kernels(at_solution(options.seed, *shape), steps, rounds) for shape, steps in shapes
    }
    print(_kernel_table(kernels))
    claims = _checked(kernels, timed=not options.quick)
    _draw(options, kernels)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "shapes": [s for s, _ in shapes]},
        results={},
        volatile={"kernels": {str(shape): rows for shape, rows in kernels.items()}},
    )
    return claims


def _kernels(problem: AtSolution, steps: int, rounds: int) -> dict[str, dict[str, float]]:
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
    runs = {name: compiled(function, *args).run for name, (function, _) in functions.items()}
    seconds = interleaved(runs, rounds)
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


def _checked(kernels: dict, *, timed: bool) -> report.Claims:
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


def _draw(options: argparse.Namespace, kernels: dict) -> None:
    with report.figure(options.out / "kernel.png", size=(5.0, 3.6)) as (_, axes):
        panel = axes[0][0]
        size = [n * d for n, d in kernels]
        for name, label, color in (("fp", "FP", "#0072b2"), ("cg", "CG", "#007a55")):
            overheads = [rows[name]["overhead"] for rows in kernels.values()]
            panel.plot(size, overheads, marker="o", label=label, color=color)
        panel.axhline(1.15, color="0.4", linewidth=1, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="n d", ylabel="time over the bare operator's")
        panel.set_yticks([1, 1.15, 2, 4], ["1", "1.15", "2", "4"])
        panel.minorticks_off()
        panel.legend()
