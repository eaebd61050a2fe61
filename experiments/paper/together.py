"""The rows of Table 1 on one data set in one loop: one pass over the data serves all methods."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import fixedgrad as fg

from ..problems.task import Task
from ..tools.checkpointing import LongRun
from .methods import method


def run_together(
    task: Task,
    loops: Mapping[tuple[int, str], fg.Bilevel],
    *,
    k: int,
    rate: float,
    num_steps: int,
    chunk: int,
) -> dict[tuple[int, str], LongRun]:
    """`num_steps` steps of gradient descent on λ, for every row at the same step size.

    E is evaluated at the w_t of all rows at once: X' W with W as wide as all of them is one product of
    matrices, where a row by itself reads X' for ten columns. With w̄ = ∇₁E at hand, the hypergradient
    of a row is that of the linear ⟨w, w̄⟩ in the place of E.

    Assumed, not checked: cold starts, λ and w single arrays, no momentum, E without λ.

    Args:
        task: The problem.
        loops: The rows by t and the name of their method, each the loop that it would run in by
            itself.
        k: Linear steps of the methods with a fixed number.
        rate: Outer step size.
        num_steps: Outer steps.
        chunk: Outer steps in one compiled scan, a divisor of `num_steps`.

    Returns:
        A `LongRun` for each row, its history with the values only.
    """
    linear = task._replace(outer=lambda w, _, *data: jnp.vdot(w, data[-1]))
    parts = [method(linear, name, t, k).hypergrad for t, name in loops]

    def solved(t: int, lam: jax.Array, data: Any) -> jax.Array:
        return fg.picard(task.solver_map, num_steps=t)(task.w, *task.prepare(lam, *data))

    def row(part: fg.Hypergradient, lam: jax.Array, w_bar: jax.Array, data: Any) -> jax.Array:
        state = part.init(task.w, lam, *data, w_bar)
        return part.update(state, lam, *data, w_bar)[0]

    def step(lams: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
        ws = jnp.stack([solved(t, lam, data) for (t, _), lam in zip(loops, lams, strict=True)])
        outer = jax.value_and_grad(lambda w: task.outer(w, (), *data))
        values, w_bars = jax.vmap(outer)(ws)
        grads = [row(*args, data) for args in zip(parts, lams, w_bars, strict=True)]
        return lams - rate * jnp.stack(grads), values

    @jax.jit
    def run(lams: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(lambda lams, _: step(lams, data), lams, length=chunk)

    lams = jnp.stack([task.lam] * len(loops))
    curves, seconds = [], []
    with tqdm(total=num_steps, desc=f"{len(loops)} rows") as bar:
        for _ in range(num_steps // chunk):
            start = time.perf_counter()
            lams, values = jax.block_until_ready(run(lams, task.data))
            seconds.append((time.perf_counter() - start) / len(loops))
            curves.append(np.asarray(values))
            bar.set_postfix(objective=np.array2string(curves[-1][-1], precision=4), refresh=False)
            bar.update(chunk)
    log = [{"step": (i + 1) * chunk, "seconds": s} for i, s in enumerate(seconds)]
    runs = {}
    for i, (key, loop) in enumerate(loops.items()):
        curve = np.concatenate(curves)[:, i]
        state = loop.init(task.w, task.lam, *task.data)
        bad = not np.isfinite(curve).all()
        reason = fg.StopReason.NON_FINITE if bad else fg.StopReason.RUNNING
        state = state._replace(lam=lams[i], reason=jnp.asarray(reason, jnp.int32))
        empty = fg.BilevelInfo(*[jnp.zeros(0)] * len(fg.BilevelInfo._fields))
        runs[key] = LongRun(state, empty._replace(value=jnp.asarray(curve)), log)
    return runs
