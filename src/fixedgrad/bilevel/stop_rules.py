"""Rules for the end of the outer loop: `StopRule`, `patience`, and a plain function of the info."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..errors import check_count, check_number, hint, show
from ..printing import (
    printed,
)
from ..types import PyTree
from .records import BilevelInfo


class StopRule(NamedTuple):
    """A rule for the end of the outer loop that remembers: a pair of pure functions.

    What it remembers is carried in the state of the loop, from chunk to chunk and through checkpoints.

    Attributes:
        init: `init() -> memory`, a pytree of arrays.
        update: `update(memory, info) -> (memory, stop)`: the `BilevelInfo` of a step, and a boolean.
        name: How it prints: as the call that made it.
    """

    init: Callable[[], PyTree]
    update: Callable[[PyTree, BilevelInfo], tuple[PyTree, jax.Array]]
    name: str = "StopRule(...)"

    def __repr__(self) -> str:
        return self.name


@printed
def patience(*, num_steps: int, rtol: float = 0.0, atol: float = 0.0) -> StopRule:
    """Ends the outer loop where f has not improved for `num_steps` steps.

    An improvement is a value below the best so far by more than max(rtol · |best|, atol).

    Cost: two numbers in the state of the loop.
    When not to use it: where f is noisy (`batches`) and one lucky batch may set the best value.

    Args:
        num_steps: So many steps in a row without an improvement end the loop.
        rtol: What counts as an improvement, relative to the best value.
        atol: What counts as an improvement.

    Returns:
        A `StopRule`, for `stop` of a loop's `run`; the same one for the same numbers.

    Raises:
        ValueError: `num_steps` is not a positive integer, `rtol` not in [0, 1), `atol` negative.

    >>> rule = patience(num_steps=2)
    >>> memory, stops = rule.init(), []
    >>> for value in (3.0, 2.0, 2.5, 2.0):
    ...     memory, stop = rule.update(memory, BilevelInfo(value, *range(9)))
    ...     stops.append(bool(stop))
    >>> stops
    [False, False, False, True]

    References:
        Prechelt, Early Stopping — But When?, in Neural Networks: Tricks of the Trade, 1998.
    """
    check_count("patience", "num_steps", num_steps)
    check_number("patience", "rtol", rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check_number("patience", "atol", atol, lambda x: 0 <= x < jnp.inf, "a finite number >= 0")
    return _patience(int(num_steps), float(rtol), float(atol))


@functools.lru_cache  # Of numbers alone: a rule made anew for each call does not compile anew.
def _patience(num_steps: int, rtol: float, atol: float) -> StopRule:
    def init() -> PyTree:
        return jnp.asarray(jnp.inf, float), jnp.int32(0)

    def update(memory: PyTree, info: BilevelInfo) -> tuple[PyTree, jax.Array]:
        best, waited = memory
        value = jnp.asarray(info.value, best.dtype)
        scale = jnp.abs(jnp.where(jnp.isfinite(best), best, 0.0))
        better = value < best - jnp.maximum(rtol * scale, atol)
        waited = jnp.where(better, 0, waited + 1).astype(jnp.int32)
        return (jnp.where(better, value, best), waited), waited >= num_steps

    return StopRule(init, update)


class OfInfoAlone(NamedTuple):
    """A function `stop(info)` in the shape of `StopRule.update`; equal where the functions are."""

    stop: Callable[[BilevelInfo], jax.Array]

    def __call__(self, memory: PyTree, info: BilevelInfo) -> tuple[PyTree, jax.Array]:
        with hint(jax.errors.UnexpectedTracerError, text=lambda: _TRACED_ONCE):
            # Each time by another name, or JAX would remember the first trace.
            traces = [str(jax.make_jaxpr(lambda x: self.stop(x))(info)) for _ in range(2)]
            now = self.stop(info)
        # A closure that counts calls, or keeps a best value, is not the same function the second time.
        if traces[0] != traces[1] or isinstance(now, bool):
            raise TypeError(
                f"`stop` of `run` must compute its answer from `info` alone, got {show(self.stop)}, "
                f"which does not. {_TRACED_ONCE}"
            )
        return memory, now


_TRACED_ONCE = (
    "`run` traces `stop`, as `jit` does: Python variables that it changes do not change from step to "
    "step. Let it remember in the state: `patience(...)`, or a `StopRule(init, update)` of your own."
)
