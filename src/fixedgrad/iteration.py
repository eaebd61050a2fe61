"""Until a tolerance: when an iteration w ← Φ(w) has met it, when it gets no further, how it ended.

The tolerance is met when every leaf of w meets it on its own scale: one over all leaves would be
that of the largest leaf alone. And the floor of the dtype is observed, not predicted: an iteration is
at rounding when its residual is small and has not shrunk for a while.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .errors import check_count, check_number
from .mapped_axes import steady
from .types import PyTree, Scalar, SolveInfo, Status, solve_info, status_where

_PATIENCE = 10  # Steps without a smaller residual before a small one counts as rounding, at least.


class Stopping(NamedTuple):
    """Exactly `num_steps`; or, where that is `None`, at most `max_steps` with a tolerance."""

    num_steps: int | None
    max_steps: int
    rtol: Scalar
    atol: Scalar

    def tolerance(self, scale: jax.Array) -> jax.Array:
        """The residual norm to reach: max(rtol · scale, atol)."""
        rtol, atol = (jnp.asarray(x, scale.dtype) for x in (self.rtol, self.atol))
        return jnp.maximum(rtol * scale, atol)


def stopping(
    where: str, num_steps: int | None, max_steps: int | None, rtol: Scalar, atol: Scalar
) -> Stopping:
    """Checks the stopping rule of the factory `where`.

    Raises:
        ValueError: None or both of `num_steps` and `max_steps`, a count that is not a positive
            integer, a tolerance together with `num_steps`, `rtol` outside [0, 1), a negative or
            infinite `atol`.
    """
    if (num_steps is None) == (max_steps is None):
        raise ValueError(
            f"`{where}` needs exactly one of `num_steps` (that many steps) and `max_steps` (at most "
            f"that many, with `rtol`, `atol`), got num_steps={num_steps!r}, max_steps={max_steps!r}."
        )
    for name, count in (("num_steps", num_steps), ("max_steps", max_steps)):
        if count is not None:
            check_count(where, name, count)
    # With a relative tolerance of 1 or more, zero would solve every system.
    check_number(where, "rtol", rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check_number(where, "atol", atol, lambda x: 0 <= x < jnp.inf, "a finite number >= 0")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        concrete = not isinstance(tolerance, Tracer)
        if num_steps is not None and not (concrete and float(tolerance) == 0):
            raise ValueError(
                f"`{where}` with `num_steps` takes exactly that many steps and has no tolerance, "
                f"got {name}={tolerance!r}; use `max_steps` for early stopping."
            )
    # A tolerance that depends on λ is no way in which the solution does.
    rtol, atol = (lax.stop_gradient(x) if isinstance(x, Tracer) else x for x in (rtol, atol))
    return Stopping(num_steps, max_steps or 0, rtol, atol)


class Measured(NamedTuple):
    """The residual r of an iterate.

    Attributes:
        norm: ‖r‖ over all leaves.
        tolerance: What ‖r‖ is to fall below for every leaf to meet its own tolerance, should all leaves
            shrink alike.
        floor: What of ‖r‖ may be rounding, generously.
        rounded: Whether the residual of every leaf is rounding on the scale of that leaf.
    """

    norm: jax.Array
    tolerance: jax.Array
    floor: jax.Array
    rounded: jax.Array

    @property
    def met(self) -> jax.Array:
        return self.norm <= self.tolerance

    @property
    def sizes(self) -> jax.Array:
        """What has to shrink for the iteration to get on: ‖r‖, and what it exceeds the tolerance by."""
        excess = self.norm / jnp.where(self.tolerance > 0, self.tolerance, 1.0)
        return jnp.stack([self.norm, excess])


def joint_tolerance(
    stop: Stopping, norm: jax.Array, scale: jax.Array, sizes: jax.Array, scales: jax.Array
) -> jax.Array:
    """What ‖r‖ is to fall below, by what `stop` asks for of r as a whole and of each leaf.

    Args:
        stop: The tolerances.
        norm: ‖r‖.
        scale: What `rtol` is relative to.
        sizes: The largest entry of each leaf of r.
        scales: What `rtol` is relative to in each leaf.
    """
    tolerance = stop.tolerance(scale)
    if sizes.size <= 1:
        return tolerance
    of_leaves = stop.tolerance(scales)
    shares = jnp.where(sizes > 0, of_leaves / jnp.where(sizes > 0, sizes, 1.0), jnp.inf)
    share = jnp.min(shares)
    return jnp.minimum(tolerance, jnp.where(jnp.isfinite(share), share * norm, tolerance))


class Progress(NamedTuple):
    """The smallest `Measured.sizes` so far, and the step that brought the last smaller one."""

    least: jax.Array
    step: jax.Array

    def after(self, step: jax.Array, measured: Measured) -> "Progress":
        sizes = measured.sizes
        better = jnp.any(sizes < self.least)
        return Progress(jnp.fmin(sizes, self.least), jnp.where(better, step, self.step))

    def settled(self, step: jax.Array, measured: Measured) -> jax.Array:
        """Whether the residual is small, and has not shrunk for a while."""
        waited = step - self.step > _PATIENCE + self.step // 8
        return waited & (measured.norm <= measured.floor)


def first_progress(measured: Measured) -> Progress:
    """At the start."""
    return Progress(measured.sizes, jnp.int32(0))


def goes_on(
    max_steps: int, num_steps: jax.Array, measured: Measured, progress: Progress
) -> jax.Array:
    """Whether an iteration has steps left, is finite, and has neither met its tolerance nor settled."""
    unsettled = ~progress.settled(num_steps, measured)
    return (num_steps < max_steps) & ~measured.met & jnp.isfinite(measured.norm) & unsettled


class Iterated(NamedTuple):
    """An iterate w, Φ(w), the residual Φ(w) − w, how the iteration came to it, what it kept."""

    num_steps: jax.Array
    w: PyTree
    image: PyTree
    measured: Measured
    progress: Progress
    kept: PyTree = ()


def iterate(
    phi: Callable[[PyTree], PyTree],
    w0: PyTree,
    image: PyTree,
    measure: Callable[[PyTree, PyTree], Measured],
    max_steps: int,
    max_growth: float = jnp.inf,
) -> tuple[PyTree, PyTree, SolveInfo]:
    """Iterates w ← Φ(w) until `measure(w, Φ(w))` is met, gets no further, or grows by `max_growth`.

    Args:
        phi: Φ.
        w0: The start.
        image: Φ(w0).
        measure: The residual of w, from w and Φ(w).
        max_steps: At most that many steps.
        max_growth: Of the norm of the residual.

    Returns:
        w, Φ(w), and the verdict.
    """
    c, info = iterate_keeping(phi, w0, image, measure, max_steps, (), _nothing, max_growth)
    return c.w, c.image, info


def _nothing(kept: PyTree, i: jax.Array, w: PyTree) -> PyTree:
    del i, w
    return kept


def iterate_keeping(
    phi: Callable[[PyTree], PyTree],
    w0: PyTree,
    image: PyTree,
    measure: Callable[[PyTree, PyTree], Measured],
    max_steps: int,
    kept: PyTree,
    keep: Callable[[PyTree, jax.Array, PyTree], PyTree],
    max_growth: float = jnp.inf,
) -> tuple[Iterated, SolveInfo]:
    """`iterate`, with `kept = keep(kept, i, wᵢ)` after step i: the last state, and the verdict."""

    def unfinished(c: Iterated) -> jax.Array:
        grown = c.measured.norm > max_growth * start.norm
        return goes_on(max_steps, c.num_steps, c.measured, c.progress) & ~grown

    def step(c: Iterated) -> Iterated:
        image = phi(c.image)
        measured, i = measure(c.image, image), c.num_steps + 1
        progress, kept = c.progress.after(i, measured), keep(c.kept, i, c.image)
        return Iterated(i, c.image, image, measured, progress, kept)

    start = measure(w0, image)
    carry = Iterated(jnp.int32(0), w0, image, start, first_progress(start), kept)
    c = lax.while_loop(unfinished, *steady(step, carry))
    return c, verdict(c.num_steps, c.measured, start.norm, c.progress)


def verdict(
    num_steps: Scalar, measured: Measured, start: jax.Array, progress: Progress | None = None
) -> SolveInfo:
    """How a solve with a tolerance ended; `start` is the norm of its first residual."""
    missed = status_where(measured.norm > start, Status.DIVERGED, Status.MAX_STEPS)
    at_floor = measured.rounded
    if progress is not None:
        at_floor |= progress.settled(jnp.asarray(num_steps), measured)
    status = status_where(at_floor, Status.AT_FLOOR, missed)
    status = status_where(measured.met, Status.CONVERGED, status)
    status = status_where(jnp.isfinite(measured.norm), status, Status.NON_FINITE)
    return solve_info(num_steps, measured.norm, status, measured.tolerance)
