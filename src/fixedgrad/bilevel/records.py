"""What the outer loop carries and tells: `BilevelState`, `BilevelInfo`, `StopReason`."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import shapes_of
from ..hypergradient import HypergradientState
from ..printing import (
    count,
    html,
    html_table,
    member,
    number,
    record,
    shapes_in,
    tally,
    values_of,
)
from ..types import PyTree, Status

_SHOWN = 3  # Steps of a history that a notebook shows, from its beginning and from its end.
_COLUMNS = "step", "f(λ)", "‖g(λ)‖", "‖Φ(w) − w‖", "‖r_v‖", "lower steps", "linear steps"


class StopReason(enum.IntEnum):
    """Why an outer loop ended. An array of it is int32; `StopReason(int(state.reason))` names it.

    - `RUNNING`: It has not ended.
    - `RULE`: The rule `stop` of `run` said so.
    - `LOWER_FAILED`: The hypergradient is not finite, since the lower-level solve failed.
    - `LINEAR_FAILED`: The hypergradient is not finite, since the linear solve failed.
    - `NON_FINITE`: The hypergradient is not finite although no solve failed: E or a derivative is not.
    - `OVERFLOW`: The step would have made λ infinite or NaN.
    - `CONVERGED`: `descent` has found λ stationary, to its tolerance.
    - `NO_DECREASE`: `descent` found no step for which f descends by more than values may err.
    """

    RUNNING = 0
    RULE = 1
    LOWER_FAILED = 2
    LINEAR_FAILED = 3
    NON_FINITE = 4
    OVERFLOW = 5
    CONVERGED = 6
    NO_DECREASE = 7


class BilevelState(NamedTuple):
    """Everything the outer loop needs to go on: a pytree of arrays, for any checkpoint library.

    Attributes:
        lam: The outer variable λ.
        hypergrad: The state of the hypergradient; its w, v, value and info are of the λ before `lam`,
            or of `lam` where the last step failed.
        optimizer: The state of the optax optimiser.
        num_steps: Outer steps taken, int32.
        reason: A `StopReason`, int32: why the loop ended; `RUNNING` where it has not.
        memory: What the `StopRule` of `run` remembers; `()` without one.
    """

    lam: PyTree
    hypergrad: HypergradientState
    optimizer: PyTree
    num_steps: jax.Array
    reason: jax.Array
    memory: PyTree = ()

    @property
    def stopped(self) -> jax.Array:
        """Whether the loop has ended; `reason` says why."""
        return jnp.asarray(self.reason) != int(StopReason.RUNNING)

    def __repr__(self) -> str:
        info = getattr(self.hypergrad, "info", ())
        solves = [getattr(x, "status", 0) for x in info] if isinstance(info, tuple) else []
        known = values_of(self.num_steps, self.reason, *solves)
        if known is None:
            return shapes_in(self)
        num_steps, reason, *solves = known
        lam = f"lam {shapes_of(self.lam)}"
        if reason.ndim:
            return record(self, tally("loop", (member(StopReason, r) for r in reason.ravel())), lam)
        return record(self, count(num_steps, "step"), lam, *_ending(reason, solves))

    def _repr_html_(self) -> str:
        shown = {"num_steps": self.num_steps, "reason": self.reason, "lam": self.lam}
        shown |= {"f": getattr(self.hypergrad, "value", None), "hypergradient": self.hypergrad}
        return html(type(self).__name__, shown, reason=StopReason)


class BilevelInfo(NamedTuple):
    """What one outer step shows; `run` stacks these to a history.

    Attributes:
        value: f = E(w, λ) at the λ before the step.
        gradient_norm: ‖g(λ)‖, the norm of the hypergradient (before the projection).
        lower_residual: ‖Φ(w) − w‖.
        linear_residual: ‖∇₁E − (I − Jᵀ)v‖; infinite for an estimator without a linear system.
        lower_steps: Steps of the lower-level solver.
        linear_steps: Steps of the linear solver; 0 without one.
        lower_status: The `Status` of the lower-level solve, int32.
        linear_status: The `Status` of the linear solve, int32; `NOT_RUN` without one.
        taken: Whether the step was taken: false for one that failed, and in rows after the end.
        reason: A `StopReason`, int32: why the loop ended, with this step or before it.
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
    metrics: PyTree = ()

    def __repr__(self) -> str:
        known = values_of(*self[:-1])
        if known is None:
            return shapes_in(self)
        rows: Any = BilevelInfo(*known)  # pyright: ignore[reportArgumentType]
        if rows.value.ndim > 1:
            last = rows.reason[..., -1].ravel()
            return record(self, tally("loop", (member(StopReason, r) for r in last)))
        value, taken, reason = (np.atleast_1d(x) for x in (rows.value, rows.taken, rows.reason))
        shown = value[taken]
        # The first row that has a reason is that of the step that ended the loop, if it is here.
        end = int(np.argmax(reason > 0)) if np.any(reason > 0) else -1
        solves = (np.atleast_1d(x)[end] for x in (rows.lower_status, rows.linear_status))
        cells = [count(len(shown), "step")]
        if len(shown):
            cells.append(f"f {' -> '.join(number(x) for x in dict.fromkeys(shown[[0, -1]]))}")
        return record(self, *cells, *_ending(reason[end], [*solves]))

    def _repr_html_(self) -> str:
        """The first and the last steps of a history, a row each."""
        known = values_of(*self[:-1])
        if known is None or known[0].ndim != 1:
            return html_table(repr(self), (), ())
        rows = BilevelInfo(*known)  # pyright: ignore[reportArgumentType]
        steps = np.flatnonzero(rows.taken)
        numbers = [rows.value, rows.gradient_norm, rows.lower_residual, rows.linear_residual]
        counts = [rows.lower_steps, rows.linear_steps]

        def row(i: int) -> list[str]:
            return [f"{i}", *(number(x[i]) for x in numbers), *(f"{x[i]}" for x in counts)]

        shown = [row(int(i)) for i in steps]
        if len(shown) > 2 * _SHOWN:
            shown = [*shown[:_SHOWN], ["…"] * len(_COLUMNS), *shown[-_SHOWN:]]
        return html_table(repr(self), _COLUMNS, shown)

    def plot(self, axes: Any = None) -> Any:
        """Draws the history: objective, gradient norm and residuals, steps of both solves.

        Needs matplotlib, which the extra `notebook` installs.

        Args:
            axes: Three axes of matplotlib; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: This is one step, not a history of `run`.
        """
        from .plotting import draw  # Which needs matplotlib.

        return draw(self, axes)


def _ending(reason: Any, solves: list[Any]) -> tuple[str, ...]:
    """What ended a loop, in words; the stage that failed by its own status where that is known."""
    if reason == StopReason.RUNNING:
        return ()
    failures = StopReason.LOWER_FAILED, StopReason.LINEAR_FAILED
    for failure, stage, status in zip(failures, ("lower-level", "linear"), solves, strict=False):
        if reason == failure and status:
            return (f"ended: {member(Status, status)} in the {stage} solve",)
    return (f"ended: {member(StopReason, reason)}",)
