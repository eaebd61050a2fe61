"""Compiled functions and their times: all contestants take turns, so that load hits them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

_SETTLING = 0.04  # Seconds of calls in a turn that are not counted, one at least.
_CALLS = 3  # In a turn that are, if they are fast.


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
    """Seconds of each function in each round, the order drawn anew in each.

    LAPACK's threads go on spinning for some 30 ms after a call, and slow down whoever comes next on two
    cores; the caches are those of the last one, too. So a turn begins with calls that do not count.
    """
    names, rng = list(runs), np.random.default_rng(0)
    taken: dict[Any, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            settled, counted = 0.0, []
            while settled < _SETTLING:
                settled += seconds_of(runs[names[i]])
            while sum(counted) < _SETTLING and len(counted) < _CALLS:
                counted.append(seconds_of(runs[names[i]]))
            taken[names[i]].append(float(np.median(counted)))
    return {name: np.array(seconds) for name, seconds in taken.items()}
