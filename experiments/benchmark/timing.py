"""Compiled functions and their times: all contestants take turns, so that load hits them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Measured(NamedTuple):
    """What one compiled function is and takes, apart from its running time."""

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int


def compiled(function: Callable[..., Any], *args: Any) -> Measured:
    """The function compiled for these arguments; `run()` calls it and waits."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    analysis = program.memory_analysis()
    temporary = 0 if analysis is None else int(analysis.temp_size_in_bytes)
    return Measured(lambda: jax.block_until_ready(program(*args)), seconds, temporary)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """Seconds of each function in each round."""
    for run in runs.values():
        run()
    taken = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: np.array([r[name] for r in taken]) for name in runs}
