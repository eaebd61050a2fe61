"""The steps wᵢ₊₁ = Φ(wᵢ) in reverse, from a few checkpoints: where these lie, and the loop.

Both are the same whether the number of steps was known before (`exactly`) or a tolerance ended them
(`until`). One program for all steps: Φ stands in it once on the way forward, and on the way back once
as it is and once linearised.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ..failure import Policy, enforce, zero_where
from ..iteration import Measured, Stopping, iterate, iterate_keeping
from ..leaves import closure_converted, is_inexact, partition, within_shard_map
from ..mapped_axes import casts, largest, steady, varying_axes
from ..real_form import Space, of_iterate
from ..types import OnFailure, PyTree, SolveInfo, Status, solve_info, status_where
from .solver import Lower

Step = Callable[[PyTree], PyTree]

_STAGE = "derivative through the steps of `picard`"
_MOST = 1 / 2  # Of the cotangent may be left over, however loose the tolerance.
_FIRST = jnp.iinfo(jnp.int32).max  # The level of w₀, which no other reaches.


class Slots(NamedTuple):
    """Iterates that are kept.

    Attributes:
        at: For each slot the i of the wᵢ in it; −1 where there is none.
        held: The iterates, stacked; one row more than slots, to write what has no slot.
    """

    at: jax.Array
    held: PyTree

    def put(self, slot: jax.Array, i: jax.Array, w: PyTree) -> "Slots":
        """wᵢ in a slot; in none where `slot` is their number."""
        write = lambda row, x: lax.dynamic_update_index_in_dim(row, x, slot, 0)  # noqa: E731
        at = jnp.where(jnp.arange(self.at.size, dtype=jnp.int32) == slot, i, self.at)
        return Slots(at, jax.tree.map(write, self.held, w))

    def last_before(self, i: jax.Array) -> tuple[jax.Array, PyTree]:
        """The last iterate before wᵢ that is kept, and its index."""
        live = jnp.where(self.at < i, self.at, -1)
        row = jnp.argmax(live)
        read = lambda row_of: lax.dynamic_index_in_dim(row_of, row, 0, keepdims=False)  # noqa: E731
        return live[row], jax.tree.map(read, self.held)


def first_slots(num_checkpoints: int, w0: PyTree) -> Slots:
    """w₀ in the first of that many slots."""
    at = jnp.where(jnp.arange(num_checkpoints) == 0, 0, -1).astype(jnp.int32)
    rows = num_checkpoints + 1
    return Slots(at, jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), w0))


def binomial_slots(num_steps: int) -> int:
    """The fewest slots with which no step runs more than twice before it is reversed: about √(2t)."""
    slots = 1
    while (slots + 1) * (slots + 2) // 2 < num_steps:
        slots += 1
    return slots


def binomial_stride(length: jax.Array, free: jax.Array) -> jax.Array:
    """How far behind a checkpoint the next one lies, where `length` steps behind it are to be reversed.

    c slots, of which the checkpoint has one and `free` are free, reverse β(c, r) = C(c + r, c) steps
    so that none runs more than r times before. Of `length` steps the first m are reversed last, from
    the checkpoint and with all c slots, and the others with c − 1. The total is least for m between
    β(c, r − 2) and β(c, r − 1) with `length` − m between β(c − 1, r − 1) and β(c − 1, r), where r is
    the least with β(c, r) ≥ `length`. m = min(β(c, r − 1), `length` − β(c − 1, r − 1)) meets all four.
    """
    # In float32, as β overflows int32 before it is compared. A rounded one costs a few more steps.
    c, wanted = free.astype(jnp.float32) + 1, length.astype(jnp.float32)

    def more(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        r, _, beta = carry
        return r + 1, beta, beta * (c + r + 1) / (r + 1)

    one = jnp.ones_like(c)
    r, before, _ = lax.while_loop(lambda carry: carry[2] < wanted, more, (one, one, c + 1))
    # β(c − 1, r − 1) = β(c, r − 1) c / (c + r − 1).
    m = jnp.minimum(before, wanted - jnp.round(before * c / (c + r - 1)))
    m = jnp.clip(m.astype(jnp.int32), 1, jnp.maximum(length - 1, 1))
    return jnp.where(free > 0, m, length - 1)


def advanced(
    step: Step, slots: Slots, j: jax.Array, w: PyTree, i: jax.Array
) -> tuple[Slots, PyTree]:
    """From wⱼ to wᵢ₋₁, with checkpoints on the way in the slots that hold nothing before wᵢ."""

    def place(carry: tuple[Slots, jax.Array, PyTree]) -> tuple[Slots, jax.Array, PyTree]:
        slots, j, w = carry
        idle = (slots.at < 0) | (slots.at >= i)
        free = jnp.sum(idle, dtype=jnp.int32)
        m = binomial_stride(i - j, free)
        w = lax.fori_loop(jnp.zeros_like(m), m, lambda _, w: step(w), w)
        slot = jnp.where(free > 0, jnp.argmax(idle).astype(jnp.int32), slots.at.size)
        return slots.put(slot, j + m, w), j + m, w

    body, start = steady(place, (slots, j, w))
    slots, _, w = lax.while_loop(lambda carry: carry[1] < i - 1, body, start)
    return slots, w


class Online(NamedTuple):
    """Slots for steps whose number is not known yet.

    A slot that a later one of a higher level has made superfluous is `spare`. The next iterate takes
    a spare slot, at level 0; where there is none it takes that of the last, at one level more. So the
    slots thin out where they have become too dense for the number of steps, and after n ≤ β(c, r)
    steps none has to run more than r times before it is reversed, give or take a few at the end.
    """

    slots: Slots
    level: jax.Array
    spare: jax.Array

    @classmethod
    def first(cls, num_checkpoints: int, w0: PyTree) -> "Online":
        """w₀ in a slot for good."""
        slots = first_slots(num_checkpoints, w0)
        taken = slots.at == 0
        return cls(slots, jnp.where(taken, _FIRST, 0).astype(jnp.int32), ~taken)

    def record(self, i: jax.Array, w: PyTree) -> "Online":
        """The slots after wᵢ; with one slot it is that of w₀ still."""
        size = self.spare.size
        found = jnp.any(self.spare)
        last = jnp.argmax(self.slots.at).astype(jnp.int32)
        slot = jnp.where(found, jnp.argmax(self.spare).astype(jnp.int32), last)
        slot = jnp.where(self.level[slot] == _FIRST, size, slot)
        here = jnp.arange(size, dtype=jnp.int32) == slot
        level = jnp.where(here, jnp.where(found, 0, self.level + 1), self.level)
        raised = jnp.max(jnp.where(here, level, 0))
        spare = (self.spare | (level < raised)) & ~here
        return Online(self.slots.put(slot, i, w), level, spare)


class Forward(NamedTuple):
    """What the steps of a solver computed.

    Attributes:
        w: The last iterate.
        info: What the solver says of it.
        num_steps: How many steps led to it.
        slots: The iterates that were kept.
    """

    w: PyTree
    info: Any
    num_steps: jax.Array
    slots: Slots


def exactly(num_checkpoints: int | None, phi: Step, w0: PyTree, num_steps: int) -> PyTree:
    """`num_steps` steps of Φ, with reverse mode from checkpoints."""
    # With E, the objective behind them, t + 1 steps are to be reversed; E is not run again.
    slots = num_checkpoints or binomial_slots(num_steps + 1)

    def run(step: Step, w0: PyTree) -> tuple[PyTree, tuple]:
        step, w0 = steady(step, w0)
        return lax.fori_loop(0, num_steps, lambda _, w: step(w), w0), ()

    def kept(step: Step, w0: PyTree) -> Forward:
        start, t = first_slots(slots, w0), jnp.int32(num_steps)
        held, w = advanced(step, start, jnp.int32(0), w0, t + 1)
        return Forward(w, (), t, held)

    return _with_reverse(phi, w0, run, kept, _as_asked)[0]


def _as_asked(done: "Forward", w_bar: PyTree, left: PyTree, bars: PyTree) -> PyTree:
    del done, w_bar, left
    return bars


def until(
    num_checkpoints: int | None, lower: Lower, stop: Stopping, on_failure: OnFailure
) -> tuple[PyTree, SolveInfo]:
    """Steps of Φ until a tolerance, with reverse mode through as many as these were."""
    slots = num_checkpoints or binomial_slots(stop.max_steps + 1) + 1
    # What measures w closes over the start and maybe a tolerance; none of it moves with λ.
    measured = closure_converted(functools.partial(lower.measured, stop), lower.w0, lower.w0)
    held = lax.stop_gradient(measured.values)

    def start(step: Step, w0: PyTree, held: list[Any]) -> tuple[PyTree, Callable[..., Measured]]:
        return step(w0), lambda w, image: measured.function(w, image, *held)

    def run(step: Step, w0: PyTree, *held: Any) -> tuple[PyTree, SolveInfo]:
        image, measure = start(step, w0, list(held))
        w, _, info = iterate(step, w0, image, measure, stop.max_steps)
        return w, info

    def kept(step: Step, w0: PyTree, *held: Any) -> Forward:
        image, measure = start(step, w0, list(held))
        first = Online.first(slots, w0)
        c, info = iterate_keeping(step, w0, image, measure, stop.max_steps, first, Online.record)
        return Forward(c.w, info, info.num_steps, c.kept.slots)

    def judged(done: Forward, w_bar: PyTree, left: PyTree, bars: PyTree) -> PyTree:
        info = agreed(enough_steps(lower.space, done, w_bar, left), bars)
        return enforce(Policy(on_failure), _STAGE, info, bars)

    return _with_reverse(lower.phi, lower.w0, run, kept, judged, held)


def enough_steps(space: Space, done: Forward, w_bar: PyTree, left: PyTree) -> SolveInfo:
    """Whether the steps that w needed are enough for its derivative.

    (Jᵀ)ⁿ w̄, the cotangent left over, is the residual of v = Σ_{i<n} (Jᵀ)ⁱ w̄ in (I − Jᵀ) v = w̄, as
    Jⁿ (w₁ − w₀) is that of w_n in w = Φ(w). From a start with ‖w₁ − w₀‖ ≥ √rtol ‖w‖ the n steps that
    ended at rtol ‖w‖ have reduced a residual by √rtol or more, and they reduce the cotangent about as
    much. From a start that is nearer they need not: n = 0 leaves all of w̄, and a derivative of 0.
    """
    wanted, leaves = jax.tree.leaves(w_bar), jax.tree.leaves(left)
    ends = [x for x in jax.tree.leaves(done.w) if is_inexact(x)]
    size, residual = space.size_of(wanted), space.size_of(leaves)
    eps = np.array([float(jnp.finfo(x.dtype).eps) for x in ends])
    # A tolerance below rounding, or none, is what was reached.
    reached = jnp.maximum(done.info.tolerance, done.info.residual)
    scale = space.size_of(ends)
    relative = jnp.where(reached < scale, reached / jnp.where(scale > 0, scale, 1.0), 1.0)
    relative = jnp.maximum(relative, of_iterate(eps).max(initial=0).astype(relative.dtype))
    tolerance = (jnp.minimum(jnp.sqrt(relative), _MOST) * size).astype(residual.dtype)
    status = status_where(residual > tolerance, Status.TOO_FEW_STEPS, Status.CONVERGED)
    return solve_info(done.num_steps, residual, status, tolerance)


def agreed(info: SolveInfo, bars: PyTree) -> SolveInfo:
    """The worst info along the axes over which a cotangent is a sum of all devices."""
    if not within_shard_map():
        return info
    spread = varying_axes(info)
    summed = frozenset[str]().union(*(spread - varying_axes(x) for x in jax.tree.leaves(bars)))
    fields = info.num_steps, info.residual, info.status, info.tolerance
    return solve_info(*(largest(x, tuple(sorted(summed))) for x in fields))


def _with_reverse(
    phi: Step,
    w0: PyTree,
    run: Callable[..., tuple[PyTree, Any]],
    kept: Callable[..., Forward],
    judged: Callable[[Forward, PyTree, PyTree, PyTree], PyTree],
    held: list[Any] | None = None,
) -> tuple[PyTree, Any]:
    """(w, info) as `run` computes them, with the reverse rule of the steps behind them.

    Args:
        phi: Φ of w alone.
        w0: The start.
        run: `(step, w0, *held) -> (w, info)`, for who asks for no derivative.
        kept: The same as a `Forward`.
        judged: `(forward, w_bar, left, bars)`: the cotangents `bars`, as what is left over of w̄ has it.
        held: What `run` and `kept` depend on beside Φ, constants.
    """
    # A rule runs when JAX comes to it, maybe after the trace that Φ closes over has ended.
    _, w0 = steady(phi, w0)
    converted = closure_converted(phi, w0)

    def step_at(values: list[Any]) -> Step:
        return lambda w: converted.function(w, *values)

    @jax.custom_vjp
    def solve(w0: PyTree, values: list[Any], held: list[Any]) -> tuple[PyTree, Any]:
        return run(step_at(values), w0, *held)

    def forward(w0: PyTree, values: list[Any], held: list[Any]) -> Any:
        w0, constants, held = jax.tree.map(lambda x: x.value, (w0, values, held))
        done = kept(step_at(constants), w0, *held)
        # Only what is differentiated gets a cotangent: that of the data would cost as much as Φ.
        moves = [x.perturbed and is_inexact(x.value) for x in values]
        moving = [x if m else None for x, m in zip(constants, moves, strict=True)]
        still = [None if m else x for x, m in zip(constants, moves, strict=True)]
        return (done.w, done.info), (done, moving, still)

    def backward(saved: tuple[Forward, list[Any], list[Any]], bars: Any) -> Any:
        done, moving, still = saved

        def values_at(moving: list[Any]) -> list[Any]:
            return [s if m is None else m for m, s in zip(moving, still, strict=True)]

        def pull_back(carry: Any) -> Any:
            k, w_bar, x_bar, slots = carry
            i = jnp.minimum(k, done.num_steps)
            j, w = slots.last_before(i)
            slots, w = advanced(step_at(values_at(moving)), slots, j, w, i)
            w_x, w_rest, join = partition(w)

            def image(w_x: PyTree, moving: list[Any]) -> PyTree:
                return partition(step_at(values_at(moving))(join(w_x, w_rest)))[0]

            _, pull = jax.vjp(image, w_x, moving)
            ours = k <= done.num_steps
            pulled, more = pull(zero_where(~ours, w_bar))
            w_bar = jax.tree.map(lambda new, old: jnp.where(ours, new, old), pulled, w_bar)
            return k - 1, w_bar, jax.tree.map(jnp.add, x_bar, more), slots

        w_bar = jax.tree.map(_cotangent, partition(done.w)[0], bars[0], is_leaf=_is_none)
        x_bar = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), x.dtype), moving)
        carry = in_step(done.num_steps, done.w, moving), w_bar, x_bar, done.slots
        body, carry = steady(pull_back, carry)
        _, left, x_bar, _ = lax.while_loop(lambda carry: carry[0] > 0, body, carry)
        left, x_bar = judged(done, w_bar, left, (left, x_bar))
        return left, x_bar, None

    solve.defvjp(forward, backward, symbolic_zeros=True)
    return solve(w0, converted.values, held or [])


def in_step(num_steps: jax.Array, w: PyTree, moving: PyTree) -> jax.Array:
    """Over how many steps the devices of a `shard_map` go backward together.

    JAX sums a cotangent over an axis, step by step, where its primal does not vary along it. Devices
    that leave the loop after other numbers of steps would wait for one another for ever. So the early
    ones stay, and add zeros.
    """
    if not within_shard_map():
        return num_steps
    summed = frozenset[str]().union(
        *(varying_axes(w) - varying_axes(x) for x in jax.tree.leaves(moving))
    )
    # A counter is typed as the same on all devices, whatever the condition of its loop is.
    return largest(casts(num_steps, summed).varying(num_steps), tuple(sorted(summed)))


def _is_none(x: Any) -> bool:
    return x is None


def _cotangent(x: Any, bar: Any) -> Any:
    """The cotangent of an inexact leaf, also where JAX knows that it is zero; none of another leaf."""
    if x is None:
        return None
    return jnp.zeros(x.shape, x.dtype) if isinstance(bar, SymbolicZero) else bar
