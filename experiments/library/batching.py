"""Under `vmap` every system runs as long as the slowest; chunks of like difficulty save most of it.

Many lower levels of very different difficulty (condition numbers from 10 up), each solved to a
tolerance, with a hypergradient each. `jax.vmap` runs every lane until the slowest has converged;
`jax.lax.map(..., batch_size=c)` runs chunks of c lanes one after another, c = 1 being one lane at a
time. The fewer lanes in a chunk, the fewer steps in vain, and the less work for the machine at once.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fixedgrad as fg

from ..tools import report

FLOAT64 = True


class System(NamedTuple):
    """Lower levels min over w of ½⟨w, Hw⟩ − ⟨y + λ, w⟩, along a first axis.

    Attributes:
        hessian: H, with eigenvalues from 1/κ to 1.
        y: The linear term.
        target: Of the outer objective ½‖w − target‖².
    """

    hessian: Any
    y: Any
    target: Any


class Lane(NamedTuple):
    """What a lane gives: its hypergradient, and the steps of its lower-level solve."""

    gradient: Any
    steps: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--num-systems", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--size", nargs="+", type=int, help="unknowns in a system, one or more")


def main(options: argparse.Namespace) -> int:
    """Measures every chunk size in both orders, and checks the claims."""
    number = options.num_systems
    hardest = 100.0 if options.quick else 10_000.0 if options.full else 1_000.0
    sizes = options.size or ([8] if options.quick else [8, 64])
    chunks = [c for c in (1, 2, 4, 8, 16, 32, 64) if c <= number]
    claims, found, rows = report.Claims(), {}, []
    for size in sizes:
        conditions = np.geomspace(10.0, hardest, number)
        by_difficulty = systems(np.random.default_rng(options.seed), conditions, size)
        order = np.random.default_rng(options.seed + 1).permutation(number)
        mixed = jax.tree.map(lambda x, order=order: x[order], by_difficulty)
        for name, batch in (("mixed", mixed), ("by difficulty", by_difficulty)):
            exact = jax.vmap(closed_form)(batch)
            for chunk in chunks:
                lanes, seconds = measure(chunked(chunk), batch, 1 if options.quick else 3)
                run = steps_run(np.asarray(lanes.steps), chunk)
                error = np.max(np.abs(lanes.gradient - exact)) / np.max(np.abs(exact))
                at = {"lane_steps": run, "error": float(error), "seconds": seconds}
                found[f"{size}, {name}, {chunk}"] = at
                at["steps_needed"] = int(np.sum(lanes.steps))
                shown = f"{run:,}", f"{run / at['steps_needed']:.2f}", f"{1e3 * seconds:.0f} ms"
                rows.append([f"{size}", name, f"{chunk}", *shown, f"{error:.0e}"])
    header = ["unknowns", "order", "chunk", "steps run", "of those needed", "time", "error"]
    print(report.table(header, rows))
    check(claims, found, sizes, chunks)
    draw(options, found, sizes, chunks)
    times = {key: at.pop("seconds") for key, at in found.items()}
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "num_systems": number, "sizes": sizes, "hardest": hardest},
        results=found,
        volatile={"seconds": times},
    )
    return claims.exit_code


def systems(rng: np.random.Generator, conditions: np.ndarray, size: int) -> System:
    """One random system for each condition number."""
    bases = np.linalg.qr(rng.normal(size=(len(conditions), size, size)))[0]
    eigenvalues = np.stack([np.geomspace(1 / c, 1.0, size) for c in conditions])
    hessian = np.einsum("nij,nj,nkj->nik", bases, eigenvalues, bases)
    y, target = rng.normal(size=(2, len(conditions), size))
    return System(*map(jnp.asarray, (hessian, y, target)))


def loss(w: jax.Array, lam: jax.Array, system: System) -> jax.Array:
    """The lower-level objective."""
    return 0.5 * jnp.vdot(w, system.hessian @ w) - jnp.vdot(system.y + lam, w)


def outer(w: jax.Array, lam: jax.Array, system: System) -> jax.Array:
    """The upper-level objective."""
    del lam
    return 0.5 * jnp.sum((w - system.target) ** 2)


_PHI = fg.gradient_descent(loss, step_size=1.0)
_HYPERGRAD = fg.hypergradient(
    outer,
    _PHI,
    fg.picard(_PHI, max_steps=1_000_000, rtol=1e-10),
    fg.aid(fg.cg(max_steps=10_000, rtol=1e-10)),
)


def lane(system: System) -> Lane:
    """The hypergradient at λ = 0 of one system."""
    zero = jnp.zeros_like(system.y)
    gradient, state = _HYPERGRAD.update(_HYPERGRAD.init(zero, zero, system), zero, system)
    return Lane(gradient, state.info.lower.num_steps)


def closed_form(system: System) -> jax.Array:
    """∇f = H⁻¹ (w − target) with w = H⁻¹ y."""
    w = jnp.linalg.solve(system.hessian, system.y)
    return jnp.linalg.solve(system.hessian, w - system.target)


def chunked(size: int) -> Callable[[System], Lane]:
    """All lanes, `size` at a time; the largest size is `jax.vmap`."""
    return jax.jit(lambda batch: jax.lax.map(lane, batch, batch_size=size))


def measure(run: Callable[[System], Lane], batch: System, repeats: int) -> tuple[Lane, float]:
    """What a compiled function gives, and its shortest time in seconds."""
    lanes = jax.block_until_ready(run(batch))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(batch))
        times.append(time.perf_counter() - start)
    return lanes, min(times)


def steps_run(steps: np.ndarray, chunk: int) -> int:
    """Lane steps that are computed: in each chunk, every lane as many as the slowest needs."""
    groups = [steps[i : i + chunk] for i in range(0, len(steps), chunk)]
    return int(sum(len(group) * group.max() for group in groups))


def check(claims: report.Claims, found: dict, sizes: list[int], chunks: list[int]) -> None:
    """The claims: the same gradients, steps in vain under `vmap`, few of them in sorted chunks."""
    worst = max(at["error"] for at in found.values())
    claims.check("every chunk size gives ∇f, to 1e-4", worst < 1e-4, f"largest error {worst:.0e}")
    for size in sizes:
        at = {c: found[f"{size}, by difficulty, {c}"] for c in chunks}
        needed, vmapped = at[1]["steps_needed"], at[chunks[-1]]["lane_steps"]
        claims.check(
            f"{size} unknowns: `vmap` runs more than twice the steps that are needed",
            vmapped > 2 * needed,
            f"{vmapped / needed:.1f} times",
        )
        quarter = chunks[-3] if len(chunks) > 2 else 1
        claims.check(
            f"{size} unknowns: chunks of {quarter} of like difficulty save a third of these steps",
            at[quarter]["lane_steps"] < vmapped / 1.5,
            f"{vmapped / at[quarter]['lane_steps']:.1f} times fewer",
        )
        fastest = min(chunks, key=lambda c, at=at: at[c]["seconds"])
        ratio = at[chunks[-1]]["seconds"] / at[fastest]["seconds"]
        claims.check(
            f"{size} unknowns: some chunk of like difficulty is faster than `vmap`",
            ratio > 1,
            f"chunks of {fastest}, {ratio:.1f} times",
            required=False,
        )


def draw(options: argparse.Namespace, found: dict, sizes: list[int], chunks: list[int]) -> None:
    """Time against the size of a chunk."""
    with report.figure(options.out / "batching.png", size=(5.2, 3.9)) as (fig, axes):
        ax = axes[0][0]
        for size, color in zip(sizes, ("#0072b2", "#d55e00", "#007a55", "#b58900"), strict=False):
            for order, style in (("mixed", "--"), ("by difficulty", "-")):
                times = [found[f"{size}, {order}, {c}"]["seconds"] for c in chunks]
                ax.plot(chunks, times, style, color=color, marker="o", label=f"d = {size}, {order}")
        ax.set(xscale="log", yscale="log", xlabel="lanes in a chunk", ylabel="seconds")
        ax.set_xticks(chunks, [*map(str, chunks[:-1]), f"{chunks[-1]}\n(vmap)"])
        fig.legend(loc="outside upper center", ncols=2)
