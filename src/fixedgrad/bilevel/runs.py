"""Many steps of an outer loop in one compiled scan: the `run` of `bilevel` and `descent`."""

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from ..errors import check_callable, check_count, shapes_of, show
from ..leaves import blank, strongly_typed
from ..types import PyTree
from .records import BilevelState, StopReason
from .stop_rules import OfInfoAlone, StopRule

Info = TypeVar("Info")

_ROWS = 64  # The shortest history that `run` compiles for.


class LoopStoppedWarning(UserWarning):
    """`run` was given the state of a loop that has ended: no step was taken."""


def run_of(
    step: Callable[..., tuple[BilevelState, Info]],
) -> Callable[..., tuple[BilevelState, Info]]:
    """The `run` of a loop with this `step`."""
    # A program of its own for each loop, not of the module: it is to go when the loop goes.
    scan = jax.jit(functools.partial(_scan, step), static_argnums=(0, 1, 2))

    def run(
        state: BilevelState,
        /,
        *args: PyTree,
        num_steps: int,
        stop: Callable[[Any], jax.Array] | StopRule | None = None,
        metrics: Callable[[BilevelState], PyTree] | None = None,
        batches: PyTree = None,
        **kwargs: PyTree,
    ) -> tuple[BilevelState, Any]:
        """`num_steps` outer steps in one compiled scan, with their history: see `bilevel`."""
        check_count("run", "num_steps", num_steps)
        if metrics is not None:
            check_callable("run", "metrics", metrics, "metrics(state) -> pytree of arrays")
        for x in jax.tree.leaves(batches):
            if jnp.shape(x)[:1] != (num_steps,):
                raise TypeError(
                    f"`batches` of `run` must have a leading axis of length `num_steps`={num_steps} in "
                    f"every leaf, got {shapes_of(batches)}; data for all steps go into `*args`."
                )
        _warn_if_ended(state)
        memory: PyTree = ()
        rule = None
        if isinstance(stop, StopRule):
            memory, rule = strongly_typed(stop.init()), stop.update
        elif stop is not None:
            check_callable("run", "stop", stop, "stop(info) -> bool array")
            rule = OfInfoAlone(stop)
        if shapes_of(state.memory) != shapes_of(memory):  # Another rule, or the first run.
            state = state._replace(memory=memory)
        # So that one program serves all runs of up to so many steps, of a power of two or the shortest.
        rows = num_steps if batches is not None else max(_ROWS, 1 << (num_steps - 1).bit_length())
        state, history = scan(rule, metrics, rows, num_steps, state, batches, args, kwargs)
        return state, history if rows == num_steps else _first_rows(history, num_steps)

    return run


def _warn_if_ended(state: BilevelState) -> None:
    """Warns, where numbers can be looked at, that no step will be taken; `TypeError` for no state."""
    if not isinstance(state, BilevelState):
        raise TypeError(
            f"`state` of `run` must be what `init` or the last `run` returned, got {show(state)}."
        )
    looked_at = not isinstance(state.reason, Tracer) and jnp.ndim(state.reason) == 0
    if not looked_at or int(state.reason) == StopReason.RUNNING:
        return
    reason = StopReason(int(state.reason))
    warnings.warn(
        f"`run` was given a loop that has ended ({reason.name}, after {int(state.num_steps)} steps): "
        "no step is taken. Go on from its λ with a new state, `init(w0, state.lam)`, or despite all "
        "with `state._replace(reason=jax.numpy.int32(0))`.",
        LoopStoppedWarning,
        stacklevel=3,
    )


@functools.partial(jax.jit, static_argnums=1)
def _first_rows(history: PyTree, num_steps: int) -> PyTree:
    return jax.tree.map(lambda x: x[:num_steps], history)


def _scan(
    step: Callable[..., tuple[BilevelState, Any]],
    stop: Callable[[PyTree, Any], tuple[PyTree, jax.Array]] | None,
    metrics: Callable[[BilevelState], PyTree] | None,
    rows: int,
    num_steps: jax.Array,
    state: BilevelState,
    batches: PyTree,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[BilevelState, Any]:
    def take(state: BilevelState, batch: PyTree) -> tuple[BilevelState, Any]:
        data = args if batches is None else (batch, *args)
        state, info = step(state, *data, **kwargs)
        if metrics is not None:
            info = info._replace(metrics=jax.tree.map(jnp.asarray, metrics(state)))
        if stop is not None:
            memory, now = stop(state.memory, info)
            now = jnp.asarray(now)
            if now.shape != () or now.dtype != jnp.bool_:
                raise TypeError(
                    f"`stop` of `run` must return one boolean, got {shapes_of(now)}; compare, as in "
                    "`info.value < 1e-6`."
                )
            going = state.reason == int(StopReason.RUNNING)
            reason = jnp.where(going & now, jnp.int32(StopReason.RULE), state.reason)
            state = state._replace(reason=reason, memory=memory)
            info = info._replace(reason=reason)
        return state, info

    first = jax.tree.map(operator.itemgetter(0), batches)
    _, info_like = jax.eval_shape(take, state, first)

    def skip(state: BilevelState, _: PyTree) -> tuple[BilevelState, Any]:
        return state, blank(info_like)._replace(reason=state.reason)

    def body(state: BilevelState, row: tuple[jax.Array, PyTree]) -> tuple[BilevelState, Any]:
        i, batch = row
        # Two conditions: the first stays one under `vmap`, where a stopped loop waits.
        return lax.cond(
            i < num_steps, lambda *x: lax.cond(state.stopped, skip, take, *x), skip, state, batch
        )

    return lax.scan(body, state, (jnp.arange(rows), batches))
