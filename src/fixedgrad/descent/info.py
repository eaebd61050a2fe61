"""What a step of `descent` shows: `DescentInfo`."""

from typing import Any, NamedTuple

import jax

from ..bilevel import BilevelInfo
from ..printing import shapes_in
from ..types import PyTree


class DescentInfo(NamedTuple):
    """What one step of `descent` shows; `run` stacks these to a history.

    The first ten are those of a `BilevelInfo`, at the λ before the step.

    Attributes:
        value: f, corrected to second order.
        gradient_norm: ‖g(λ)‖, of the corrected hypergradient (before the projection).
        lower_residual: ‖Φ(w) − w‖.
        linear_residual: ‖∇₁E − (I − Jᵀ)v‖.
        lower_steps: Evaluations of Φ and products with J, of all trials of the step.
        linear_steps: Products with Jᵀ, of all trials of the step.
        lower_status: The `Status` of the hypergradient's request, int32.
        linear_status: The same.
        taken: Whether the step was taken: false for the one that ended the loop, and after it.
        reason: A `StopReason`, int32: why the loop ended, with this step or before it.
        value_error: What `value` may err by.
        gradient_error: What the hypergradient may err by (a norm).
        projected_norm: ‖λ − P(λ − g)‖, which is to become small.
        rtol: The smallest relative error of a hypergradient that the step asked for.
        trials: Evaluations of f and its gradient, int32.
        metrics: What `metrics` of `run` gave; `()` without it.
    """

    value: jax.Array
    gradient_norm: jax.Array
    lower_residual: jax.Array
    linear_residual: jax.Array
    lower_steps: jax.Array
    linear_steps: jax.Array
    lower_status: jax.Array
    linear_status: jax.Array
    taken: jax.Array
    reason: jax.Array
    value_error: jax.Array
    gradient_error: jax.Array
    projected_norm: jax.Array
    rtol: jax.Array
    trials: jax.Array
    metrics: PyTree = ()

    @property
    def products(self) -> jax.Array:
        """Evaluations of Φ and products with its derivatives, of all trials of the step."""
        return self.lower_steps + self.linear_steps

    @property
    def as_bilevel(self) -> BilevelInfo:
        """The part that a `BilevelInfo` has."""
        return BilevelInfo(*self[:10], self.metrics)

    def __repr__(self) -> str:
        text = repr(self.as_bilevel)
        name = BilevelInfo.__name__
        return (
            text.replace(name, type(self).__name__, 1) if text.startswith(name) else shapes_in(self)
        )

    def _repr_html_(self) -> str:
        return self.as_bilevel._repr_html_()

    def plot(self, axes: Any = None) -> Any:
        """Draws the history; see `BilevelInfo.plot`."""
        return self.as_bilevel.plot(axes)
