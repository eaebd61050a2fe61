"""What a person sees while a program runs: a `monitor` gets the stage and the info of every solve.

A solve within a derivative has nowhere to put its info; a monitor is called where the solve ends, in
the backward pass too, under every transformation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .errors import check_callable
from .printing import number
from .types import PyTree

Monitor = Callable[[str, Any], None]
"""`monitor(stage, info)`, on the host; the leaves of `info` are NumPy arrays."""


class Unordered(NamedTuple):
    """A monitor whose calls may come in any order: see `unordered`."""

    monitor: Monitor

    def __call__(self, stage: str, info: Any) -> None:
        self.monitor(stage, info)


def unordered(monitor: Monitor) -> Unordered:
    """The monitor for a program on several devices: its calls may come in any order.

    Elsewhere the calls of a monitor come in the order of the solves. On several devices JAX knows no
    order, and refuses a monitor that has one; each device calls for what it computes by itself.

    Args:
        monitor: `monitor(stage, info)`.

    Returns:
        A monitor.

    Raises:
        TypeError: `monitor` is not callable.

    >>> import jax, fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, monitor=unordered(print_info))(fg.picard(phi, num_steps=9))
    """
    check_callable("unordered", "monitor", monitor, "monitor(stage, info)")
    return Unordered(monitor)


def print_info(stage: str, info: Any) -> None:
    """A monitor that prints a line for each solve.

    Args:
        stage: Which solve.
        info: Its `SolveInfo`; of an outer step its `BilevelInfo`.

    >>> import jax, fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, monitor=print_info)(fg.picard(phi, max_steps=99, rtol=1e-6))
    >>> grad = jax.grad(lambda lam: solve(0.0, lam))(1.0)
    lower-level solve: SolveInfo(CONVERGED after 19 steps, residual 1.91e-06 <= 2e-06)
    linear solve of the derivative: SolveInfo(CONVERGED after 1 step, residual 0)
    """
    print(f"{stage}: {info!r}")


@functools.cache
def progress_bar(total: int) -> Monitor:
    """A monitor of `bilevel` that draws a bar: objective, gradient norm, time left; by tqdm.

    It counts outer steps, through several calls of `run`, and begins anew after `total` of them or
    where a loop ends before. Other stages are passed over.

    Args:
        total: The number of outer steps, of all runs that the bar is to cover.

    Returns:
        A monitor; the same one for the same `total`, so that nothing is compiled again.

    Raises:
        ImportError: Where tqdm is not installed; the extra `notebook` installs it.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> hypergrad = fg.hypergradient(lambda w, lam: (w - 3.0) ** 2, phi)
    >>> loop = fg.bilevel(hypergrad, monitor=progress_bar(20))
    """
    from tqdm.auto import tqdm  # An optional package, needed by nobody else.

    bars: list[Any] = []

    def draw(stage: str, info: Any) -> None:
        if stage != OUTER_STEP:
            return
        if not bars:
            bars.append(tqdm(total=total, unit="step"))
        bar = bars[0]
        bar.set_postfix_str(
            f"f {number(info.value)}, |∇f| {number(info.gradient_norm)}", refresh=False
        )
        bar.update(int(info.taken))
        if bar.n >= total or info.reason:
            bars.pop().close()

    return draw


OUTER_STEP = "outer step"


def emit(monitor: Monitor | None, stage: str, info: PyTree) -> None:
    """Has the monitor called when the info is there."""
    if monitor is None or info is None:
        return
    see = monitor

    def call(info: PyTree) -> None:
        see(stage, jax.tree.map(np.asarray, info))

    jax.debug.callback(call, jax.lax.stop_gradient(info), ordered=not isinstance(see, Unordered))


def check_monitor(where: str, monitor: object) -> None:
    """Raises `TypeError` unless `monitor` is `None` or a function."""
    if monitor is not None:
        check_callable(where, "monitor", monitor, "monitor(stage, info)")
