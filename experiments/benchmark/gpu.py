"""gpu: the same tables on an accelerator, and what share of its bandwidth a product takes.

One script for a machine that is at hand for minutes: it starts no measurement after `--limit` seconds,
and writes its results after each. Parts: `roofline` (one product beside a plain pass over the same
data), `hypergradient`, `accuracy`, `outer`, `batch`, with a choice of settings. On a CPU at a tiny size
it is its own test.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..tools import report
from . import accuracy, batch, hypergradient, instances, outer
from .contestants import DEFAULTS, OURS
from .timing import interleaved

_SETTINGS = {
    "newton(cg) + cg",
    "newton(dense) + dense",
    "anderson + cg",
    "lbfgs + cg",
    "picard + bicgstab",
    DEFAULTS,
    "LBFGS + cg",
    "LBFGS, defaults",
    "Newton + direct",
    "Newton, defaults",
    "FixedPointIteration + bicgstab",
    "FixedPointIteration, defaults",
}
"""Of `accuracy`: each compiles for seconds, and the machine is lent for minutes."""

_OUTER_SETTINGS = {
    "newton + cg, inverse kept, extrapolated()",
    "anderson + cg, extrapolated()",
    DEFAULTS,
    "LBFGS + cg",
    "Newton + direct",
    "Chord + direct",
}
"""The same of `outer`."""

Measurement = Callable[[], tuple[dict[str, Any], dict[str, float]]]


def main(options: argparse.Namespace) -> report.Claims:
    """Runs one measurement after the other until the time is up, and writes what there is each time."""
    end = time.perf_counter() + options.limit
    claims, found, ratios, late = report.Claims(), {}, {}, []
    for name, measurement in _measurements(options).items():
        if time.perf_counter() > end:
            late.append(name)
            continue
        start = time.perf_counter()
        found[name], shown = measurement()
        ratios |= {f"{name}{key}": value for key, value in shown.items()}
        for key, value in shown.items():
            print(f"  {name}{key}: {value:.3g}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        _write(options, claims, found, ratios, late)
    claims.check(
        f"All is measured within {options.limit} s", not late, ", ".join(late) or "nothing left out"
    )
    shares = [value for name, value in ratios.items() if name.startswith("roofline")]
    claims.check(
        "A product takes at most 1.5 times a pass over its data, twice",
        max(shares, default=0.0) <= 1.5,
        ", ".join(f"{x:.2f}" for x in shares),
        required=False,  # On a CPU, where the data fits the cache, a pass costs next to nothing.
    )
    _draw(options, ratios)
    _write(options, claims, found, ratios, late)
    return claims


def _measurements(options: argparse.Namespace) -> dict[str, Measurement]:
    """By name; each gives what it measured, and the ratios to be shown."""
    tiny, rounds = options.quick, options.rounds or (2 if options.quick else 9)
    shape = (200, 50) if tiny else (16_384, 4_096)
    whole = (200, 50) if tiny else (8_192, 1_024)
    solved: list[instances.Instance] = [instances.logistic_regression(60, 10, 1e2)]
    if not tiny:
        solved = [
            instances.logistic_regression(8_000, 1_000, 1e2),
            instances.logistic_regression(2_000, 500, 1e4),
            instances.tanh_equilibrium(1_000, 0.99),
        ]
    found: dict[str, Measurement] = {
        f"roofline, {dtype}": lambda d=dtype: _roofline(options.seed, *shape, d, rounds)
        for dtype in ("float32", "float64")
    }
    found["hypergradient"] = lambda: _whole(options.seed, whole, rounds)
    for instance in solved:
        for single in (True, False):
            name = f"accuracy, {instance.name}" + ", float32" * single
            found[name] = lambda i=instance, s=single: _accuracy(i, rounds, single=s)
    found["outer"] = lambda: _outer(solved[-2 if not tiny else 0], 5 if tiny else 100)
    found["batch"] = lambda: _batch(options.seed, 8 if tiny else 64, rounds)
    return found


def _roofline(
    seed: int, n: int, d: int, dtype: str, rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """U ↦ Xᵀ(s ∘ Xu) in a loop, beside two passes over X that only add it up."""
    repeats = 20
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.normal(size=(n, d)) / np.sqrt(n + d), dtype)
        s, u = jnp.ones(n, dtype), jnp.asarray(rng.normal(size=d), dtype)

        @jax.jit
        def products(x: jax.Array, s: jax.Array, u: jax.Array) -> jax.Array:
            def product(_: jax.Array, u: jax.Array) -> jax.Array:
                xu = jnp.matmul(x, u, precision="highest")
                return jnp.matmul(s * xu, x, precision="highest")

            return lax.fori_loop(0, repeats, product, u)

        @jax.jit
        def passes(x: jax.Array, u: jax.Array) -> jax.Array:
            def twice(_: jax.Array, c: jax.Array) -> jax.Array:  # Depends on c: it is not hoisted.
                for _again in range(2):
                    c = c + jnp.sum(jnp.maximum(x, c)) * 1e-30
                return c

            return lax.fori_loop(0, repeats, twice, u[0] * 0)

        runs = {
            "product": lambda: jax.block_until_ready(products(x, s, u)),
            "passes": lambda: jax.block_until_ready(passes(x, u)),
        }
        seconds = {k: float(np.median(v)) / repeats for k, v in interleaved(runs, rounds).items()}
    moved = 2 * n * d * x.dtype.itemsize
    measured = {
        "n, d": [n, d],
        "seconds": seconds,
        "bytes_per_second": {name: moved / taken for name, taken in seconds.items()},
    }
    return measured, {", product over two passes": seconds["product"] / seconds["passes"]}


def _whole(
    seed: int, shape: tuple[int, int], rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    rows = hypergradient.measure_whole(seed, shape, rounds)
    ours = rows["CG k = 20"]["seconds"]
    return rows, {
        f", over {name}": ours / row["seconds"]
        for name, row in rows.items()
        if name.startswith(("by hand", "jaxopt", "optimistix"))
    }


def _accuracy(
    instance: instances.Instance, rounds: int, *, single: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    goals = [1e-3] if single else [1e-3, 1e-6]
    rows = accuracy.measure(instance, goals, rounds, single=single, among=_SETTINGS)
    summaries = accuracy.summarised(instance.name, rows["rows"])
    return rows, {
        f", {s.goal:.0e}: {label}": s.ratio(row)
        for s in summaries
        for label, row in (("ours / peer", s.ours), ("adaptive / peer", s.adaptive))
    }


def _outer(instance: instances.Instance, steps: int) -> tuple[dict[str, Any], dict[str, float]]:
    with jax.enable_x64(True):
        rows = outer.measure(instance, steps, 0.1, 3, among=_OUTER_SETTINGS)
    peers = [r["seconds"] for r in rows if r["library"] != OURS]
    ours = [r["seconds"] for r in rows if r["library"] == OURS]
    shown = {": ours / peer": min(ours) / min(peers)} if ours and peers else {}
    return {"rows": rows}, shown


def _batch(seed: int, size: int, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        conditions = np.geomspace(10, 100, 32)
        systems = batch.systems(rng, conditions, size)
        rows = batch.measure(systems, rng.permutation(32), [4, 32], rounds)
    ours = {key: s for key, s in rows["seconds"].items() if key.startswith(OURS)}
    vmapped = ours[f"{OURS}, by difficulty, 32"]
    return rows, {": chunks of 4 / vmap": ours[f"{OURS}, by difficulty, 4"] / vmapped}


def _write(
    options: argparse.Namespace,
    claims: report.Claims,
    found: dict[str, Any],
    ratios: dict[str, float],
    late: list[str],
) -> None:
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "limit": options.limit},
        results={},
        volatile={"ratios": ratios, "measured": found, "left_out": late},
    )


def _draw(options: argparse.Namespace, ratios: dict[str, float]) -> None:
    kept = {name: x for name, x in ratios.items() if np.isfinite(x)}
    size = 7.5, 1.2 + 0.2 * len(kept)
    with report.figure(options.out / "gpu.png", size=size) as (_, axes):
        panel = axes[0][0]
        panel.plot(list(kept.values()), list(kept), "o", color="#007a55")
        panel.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
        panel.set(xscale="log", xlabel=f"time over the other's, {jax.devices()[0].device_kind}")
        panel.tick_params(axis="y", labelsize=7)
        panel.invert_yaxis()
