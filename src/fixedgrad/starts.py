"""How the solves of an update start: `cold`, `warm`, `extrapolated`, or each in its own way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .errors import check_number, show
from .leaves import is_inexact
from .printing import printed
from .types import PyTree


class Start(NamedTuple):
    """Where the two solves of an update start, as three pure functions.

    Attributes:
        init: `init(w0, v_zero) -> memory`; `v_zero` is `None` where the estimator has no v.
        propose: `propose(memory) -> (w, v)`; `None` for v starts at zero.
        record: `record(memory, w, v) -> memory`, called with results of solves that succeeded.
        name: How it prints: as the call that made it.
    """

    init: Callable[[PyTree, PyTree], PyTree]
    propose: Callable[[PyTree], tuple[PyTree, PyTree | None]]
    record: Callable[[PyTree, PyTree, PyTree], PyTree]
    name: str = "Start(...)"

    def __repr__(self) -> str:
        return self.name


@printed
def cold() -> Start:
    """Every update starts at w₀ and at v = 0, as in the paper's analysis.

    When not to use it: in an outer loop with small steps and a tolerance, where `warm` takes fewer
    steps.

    Returns:
        A `Start` that remembers w₀, as `init` was given it, and nothing else.

    >>> cold().propose(cold().init(1.0, 0.0))
    (1.0, None)
    """
    return Start(lambda w0, _: w0, lambda memory: (memory, None), lambda memory, *_: memory)


COLD = cold()


@printed
def warm() -> Start:
    """Every update starts at the w and v of the last one that succeeded.

    With a tolerance both solves then need fewer steps; with exact `num_steps` they come closer. The
    error bounds of the paper hold with ‖w₀ − w(λ)‖ in place of ‖w(λ)‖, so they depend on how fast λ
    moves.

    Cost: one more product with Jᵀ, for the residual of the start. Memory: w and v.
    When not to use it: where the error bound of each update shall not depend on the updates before.

    Returns:
        A `Start` that remembers w and v.

    >>> warm().propose(warm().record(warm().init(1.0, 0.0), 2.0, 3.0))
    (2.0, 3.0)
    """

    def record(memory: PyTree, w: PyTree, v: PyTree) -> PyTree:
        return w, memory[1] if v is None else v

    return Start(lambda w0, v: (w0, v), lambda memory: memory, record)


WARM = warm()


class _Past(NamedTuple):
    """The last solutions, the latest first, and how many there are."""

    w: tuple[PyTree, ...]
    v: tuple[PyTree, ...]
    filled: jax.Array


@printed
def extrapolated(*, order: int = 1) -> Start:
    """Every update starts where the last ones lead: the polynomial through the last w and v, one on.

        order 1    2 w₋₁ − w₋₂,        order 2    3 w₋₁ − 3 w₋₂ + w₋₃,

    and the same of v. Before there are enough, as `warm`. While the outer loop moves λ evenly, the
    start errs by the square (the cube) of its step, where `warm` errs by the step itself.

    Cost: as `warm`. Memory: `order` + 1 times w and v.
    When not to use it: with tolerances that are not much below the change of w from update to update:
    what the solves left open is amplified by 3 (by 7). With steps of λ that change from one update to
    the next, as of a noisy optimiser, `warm` is better. Nor where w must stay in a set, such as that of
    positive numbers: it may lead out.

    Args:
        order: 0 is `warm`; 1 goes on along a line, 2 along a parabola.

    Returns:
        A `Start` that remembers the last `order` + 1 solutions of solves that succeeded.

    Raises:
        ValueError: `order` is not 0, 1 or 2.

    >>> start = extrapolated()
    >>> memory = start.record(start.record(start.init(1.0, 0.0), 2.0, 5.0), 4.0, 6.0)
    >>> [float(x) for x in start.propose(memory)]
    [6.0, 7.0]
    """
    check_number("extrapolated", "order", order, lambda x: x in (0, 1, 2), "0, 1 or 2")
    weights = ((1,), (2, -1), (3, -3, 1))[order]

    def propose(past: _Past) -> tuple[PyTree, PyTree | None]:
        enough = past.filled > order

        def onward(*last: Any) -> Any:
            if not is_inexact(last[0]):
                return last[0]
            sum_ = sum(weight * x for weight, x in zip(weights, last, strict=True))
            return jnp.where(enough, sum_, last[0])

        w, v = (jax.tree.map(onward, *solutions) for solutions in (past.w, past.v))
        return w, v

    def record(past: _Past, w: PyTree, v: PyTree) -> _Past:
        v = past.v[0] if v is None else v
        return _Past((w, *past.w[:-1]), (v, *past.v[:-1]), past.filled + 1)

    def init(w0: PyTree, v: PyTree) -> _Past:
        return _Past((w0,) * (order + 1), (v,) * (order + 1), jnp.int32(0))

    return Start(init, propose, record)


@printed
def separately(*, w: Start, v: Start) -> Start:
    """W starts as one `Start` says, and v as another.

    The paper's experiments start w at the last iterate and v at zero: `separately(w=warm(), v=cold())`.
    v from zero keeps the error bounds of exactly k steps, whatever λ does.

    Memory: that of both.
    When not to use it: with a tolerance, where a warm v costs fewer steps and changes no guarantee.

    Args:
        w: The start of the lower-level solve.
        v: The start of the linear solve.

    Returns:
        A `Start`.

    >>> start = separately(w=warm(), v=cold())
    >>> start.propose(start.record(start.init(1.0, 0.0), 2.0, 3.0))
    (2.0, None)
    """
    for name, start in (("w", w), ("v", v)):
        check_start(f"`{name}` of `separately`", start)

    def propose(memory: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree | None]:
        return w.propose(memory[0])[0], v.propose(memory[1])[1]

    def record(memory: tuple[PyTree, PyTree], *solved: PyTree) -> tuple[PyTree, PyTree]:
        return w.record(memory[0], *solved), v.record(memory[1], *solved)

    return Start(lambda *first: (w.init(*first), v.init(*first)), propose, record)


def check_start(where: str, start: object) -> None:
    """Raises `TypeError` unless `start` is a `Start`."""
    if not isinstance(start, Start):
        raise TypeError(
            f"{where} must be a `Start`, got {show(start)}; call a factory, as in `warm()`."
        )
