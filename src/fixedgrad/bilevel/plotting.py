"""What a history of the outer loop looks like."""

from typing import Any

import numpy as np

from ..errors import shapes_of
from .records import BilevelInfo


def draw(history: BilevelInfo, axes: Any) -> Any:
    """Three panels over the outer steps; a line for each loop where several ran under `vmap`."""
    import matplotlib.pyplot as plt  # An optional package, needed by nobody else.

    rows: Any = BilevelInfo(*map(np.asarray, history[:-1]))  # pyright: ignore[reportArgumentType]
    if not rows.value.ndim:
        raise TypeError(
            f"`plot` draws the history that `run` returns, got one step: {shapes_of(rows.value)}."
        )
    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    taken = rows.taken.reshape(-1, rows.taken.shape[-1])
    step = np.arange(taken.shape[-1])

    def line(ax: Any, values: np.ndarray, color: str, label: str = "") -> None:
        for i, (row, known) in enumerate(zip(values.reshape(taken.shape), taken, strict=True)):
            shown = known & np.isfinite(row) & ((row > 0) | (ax is not residuals))  # A log scale.
            ax.plot(step[shown], row[shown], color=color, label=label if i == 0 else None)

    objective, residuals, steps = axes
    line(objective, rows.value, "C0")
    objective.set_ylabel("objective f(λ)")
    line(residuals, rows.gradient_norm, "C0", "gradient ‖g(λ)‖")
    line(residuals, rows.lower_residual, "C1", "lower level ‖Φ(w) − w‖")
    line(residuals, rows.linear_residual, "C2", "linear system ‖∇₁E − (I − Jᵀ)v‖")
    residuals.set_yscale("log")
    residuals.set_ylabel("norm")
    line(steps, rows.lower_steps, "C1", "lower level")
    line(steps, rows.linear_steps, "C2", "linear system")
    steps.set_ylabel("steps of the solvers")
    for ax in (residuals, steps):
        ax.legend()
    for ax in axes:
        ax.set_xlabel("outer step")
    return axes
