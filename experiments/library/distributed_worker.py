"""One process of `distributed`: its rows of the data, the whole optimisation, one line of JSON."""

import argparse
import functools
import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fixedgrad as fg

from ..tools.checkpointing import LongRun, long_run
from ..tools.collectives import collectives, executed

STEP_SIZE, RATE, MOMENTUM = 1.0, 20.0, 0.5
RTOL = 1e-10  # Of the lower level, and of the linear system.
_BLOCK = 64  # Rows that one seed makes.


class Size(NamedTuple):
    """How large a run is: rows of training data, and of validation data; features; outer steps."""

    rows: int
    features: int
    num_steps: int
    chunk: int


def size_of(options: argparse.Namespace) -> Size:
    """What `--quick` and `--full` ask for."""
    if options.quick:
        return Size(rows=512, features=20, num_steps=6, chunk=2)
    return Size(rows=65536 if options.full else 8192, features=200, num_steps=20, chunk=5)


def main(options: argparse.Namespace) -> int:
    """Runs this process's part, and prints what every process comes to."""
    _connect(options)
    size = size_of(options)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    data = tuple(_sharded(options.seed, size, mesh, i) for i in range(2))
    lam = jax.device_put(np.full(size.features, -3.0), everywhere)
    w0 = jax.device_put(np.zeros(size.features), everywhere)
    loop = fg.bilevel(_hypergradient(), optax.sgd(RATE, momentum=MOMENTUM))
    state = loop.init(w0, lam, *data)
    # A program at hand, so that what is counted is what ran.
    chunk = jax.jit(functools.partial(loop.run, num_steps=size.chunk)).lower(state, *data).compile()
    run = long_run(
        loop._replace(run=_halting(chunk, options.halt_after)),
        state,
        *data,
        num_steps=size.num_steps,
        chunk=size.chunk,
        directory=options.checkpoints,
        save_seconds=0.0,
    )
    found = _outcome(run)
    if options.check:
        gradient = jax.jit(jax.grad(_objective(), argnums=1))(w0, lam, *data)
        found |= {"gradient": np.asarray(gradient), "collectives": _counted(chunk, state, data)}
    print(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}))
    return 0


def _connect(options: argparse.Namespace) -> None:
    """Joins the other processes; a process that is all alone has nobody to join."""
    if options.pod:
        jax.distributed.initialize(heartbeat_timeout_seconds=options.heartbeat)
    elif options.coordinator is not None:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            heartbeat_timeout_seconds=options.heartbeat,
        )


def _outcome(run: LongRun) -> dict[str, Any]:
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "resumed_at": run.resumed_at,
        "lam": np.asarray(run.state.lam),
        "values": run.history.value,
        "gradient_norms": run.history.gradient_norm,
        "lower_steps": run.history.lower_steps,
        "linear_steps": run.history.linear_steps,
        "seconds_per_step": run.seconds_per_step,
    }


# --- the problem


def _sharded(seed: int, size: Size, mesh: jax.sharding.Mesh, which: int) -> jax.Array:
    """Rows yᵢxᵢ of the training data (0) or the validation data (1), each made where it is kept."""
    relevant = np.arange(size.features) < size.features // 4
    w = np.random.default_rng([seed, 2]).normal(size=size.features) * relevant

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(size.rows)
        blocks = range(start // _BLOCK, -(-stop // _BLOCK))
        made = np.concatenate([block(i) for i in blocks])
        return made[start - blocks.start * _BLOCK :][: stop - start]

    def block(i: int) -> np.ndarray:
        rng = np.random.default_rng([seed, which, i])
        x = rng.normal(size=(_BLOCK, size.features))
        return np.sign(x @ w + rng.normal(size=_BLOCK))[:, None] * x

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback((size.rows, size.features), sharding, rows)


def _fit(w: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.softplus(-(rows @ w)))


def _loss(w: jax.Array, lam: jax.Array, train: jax.Array, validation: jax.Array) -> jax.Array:
    del validation
    return _fit(w, train) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def _outer(w: jax.Array, lam: jax.Array, train: jax.Array, validation: jax.Array) -> jax.Array:
    del lam, train
    return _fit(w, validation)


_PHI = fg.gradient_descent(_loss, step_size=STEP_SIZE)
_SOLVER = fg.anderson(_PHI, max_steps=500, rtol=RTOL)
_ESTIMATOR = fg.aid(fg.cg(max_steps=500, rtol=RTOL))


def _hypergradient() -> fg.Hypergradient:
    return fg.hypergradient(_outer, _PHI, _SOLVER, _ESTIMATOR, start=fg.warm())


def _objective() -> Callable[..., jax.Array]:
    """f(w₀, λ, data) by the decorated solver."""
    solve = fg.fixed_point(_PHI, _ESTIMATOR)(_SOLVER)
    return lambda w0, lam, *data: _outer(solve(w0, lam, *data), lam, *data)


# --- what the experiment asks of a process


def _halting(chunk: jax.stages.Compiled, step: int | None) -> Callable[..., Any]:
    """The compiled `run` of some steps, which waits for a signal once `step` of all are taken."""

    def run(state: fg.BilevelState, *args: jax.Array, num_steps: int) -> Any:
        del num_steps  # That of the program.
        if int(state.num_steps) == step:
            print("halted", flush=True)
            signal.pause()
        return chunk(state, *args)

    return run


def _counted(
    chunk: jax.stages.Compiled, state: fg.BilevelState, data: tuple[jax.Array, ...]
) -> list[dict[str, Any]]:
    """The collectives of a program, and how often each ran on a device in the first steps."""
    found = collectives(chunk.as_text() or "")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(chunk(state, *data))
        times = executed(Path(folder), found)
    devices = jax.local_device_count()
    return [c._asdict() | {"executed": times[c.name] / devices} for c in found]
