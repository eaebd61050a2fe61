"""What reverse mode keeps of steps: `every_iterate`, `rematerialised`, `nested`, `recursive`.

A value each, for `picard(phi, checkpoints=...)`; none changes what is computed, but for rounding. With
t steps, and a tape that holds what one linearised step needs beside its iterate:

    value            memory                time over forward    modes
    every_iterate    t (w + tape)          2                    all
    rematerialised   t w + tape            2.5                  all
    nested           2 √(t · w · tape)     3                    all
    recursive        √(2t) w + tape        3.5                  reverse, and through a tolerance too

The times are of steps that consist of products with a matrix, such as gradient descent.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import check_count, show
from ..iteration import Stopping, iterate
from ..leaves import stopped_by_residual
from ..mapped_axes import steady
from ..printing import printed
from ..types import OnFailure, PyTree, SolveInfo
from . import reversal
from .solver import Lower

Step = Callable[[PyTree], PyTree]

_WASTE = 1.25  # By so much segments of equal length may need more memory than the best.


class Exactly(Protocol):
    """`num_steps` steps of Φ from w₀."""

    def __call__(self, phi: Step, w0: PyTree, num_steps: int) -> PyTree: ...


class Until(Protocol):
    """Steps of Φ until a tolerance."""

    def __call__(
        self, lower: Lower, stop: Stopping, on_failure: OnFailure
    ) -> tuple[PyTree, SolveInfo]: ...


class Checkpoints(NamedTuple):
    """How `picard` runs its steps, hence what reverse mode keeps of them.

    Attributes:
        exactly: With `num_steps`.
        until: With `max_steps` and a tolerance.
        reverse_only: What is said where JAX is asked for forward mode and has none.
        name: How it prints: as the call that made it.
    """

    exactly: Exactly
    until: Until
    reverse_only: str = ""
    name: str = "Checkpoints(...)"

    def __repr__(self) -> str:
        return self.name


@printed
def every_iterate() -> Checkpoints:
    """All iterates and the tapes of all steps: JAX's own reverse mode of a loop.

    Cost: reverse about as much as forward. Memory: t iterates and t tapes, of what each linearised step
    needs.
    When not to use it: where that is too much memory; with a tolerance, which it refuses to
    differentiate.

    Returns:
        A `Checkpoints`.

    >>> import fixedgrad as fg
    >>> fg.picard(lambda w: 0.5 * w, num_steps=3, checkpoints=fg.every_iterate())
    picard(<lambda>, num_steps=3)

    References:
        Grazzi et al., ICML 2020, Algorithm 1.
    """
    return Checkpoints(_every_iterate, _refused)


@printed
def rematerialised() -> Checkpoints:
    """All iterates; each step runs once more when it is reversed, and its tape lives as long.

    Cost: reverse one Φ a step more than `every_iterate`. Memory: t iterates and one tape.
    When not to use it: where the tape is small beside w, as then little is saved, or t iterates are
    too much; with a tolerance, which it refuses to differentiate.

    Returns:
        A `Checkpoints`.

    >>> import fixedgrad as fg
    >>> solve = fg.picard(lambda w, lam: 0.5 * w + lam, num_steps=3, checkpoints=fg.rematerialised())
    >>> float(jax.grad(lambda lam: solve(0.0, lam))(1.0))
    1.75

    References:
        Griewank and Walther, Evaluating Derivatives, 2nd edition, 2008, chapter 12.
    """
    return Checkpoints(_rematerialised, _refused)


@printed
def nested() -> Checkpoints:
    """One iterate in s; a segment of s steps runs once more, with its tapes, when it is reversed.

        s = √(t · w / tape),    where w and tape stand for their bytes,

    so that the iterates and the tapes of a segment take as much memory. A length near s that divides t
    is taken where there is one.

    Cost: reverse one Φ a step more than `every_iterate`. Memory: about 2 √(t · w · tape).
    When not to use it: where memory is not short; with a tolerance, which it refuses to differentiate.

    Returns:
        A `Checkpoints`.

    >>> import fixedgrad as fg
    >>> solve = fg.picard(lambda w, lam: 0.5 * w + lam, num_steps=3, checkpoints=fg.nested())
    >>> float(jax.grad(lambda lam: solve(0.0, lam))(1.0))
    1.75

    References:
        Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, section 4.
    """
    return Checkpoints(_nested, _refused)


@printed
def recursive(*, num_checkpoints: int | None = None) -> Checkpoints:
    """The least recomputation with c iterates in memory: binomial checkpoints.

    c iterates reverse β(c, r) = C(c + r, c) steps such that none runs more than r times before. Reverse
    mode runs t steps as r (t + 1) − β(c + 1, r − 1) evaluations of Φ, with the least r that has
    β(c, r) ≥ t + 1, those of the forward pass among them, and linearises each step once.

    Reverse mode through a tolerance too: checkpoints are placed and thinned out while the number n of
    steps is not known, and exactly n steps are reversed. The derivative is that of these n steps, and
    its own residual (Jᵀ)ⁿ w̄ is known at the end. Where it exceeds √rtol ‖w̄‖, as from a warm start, the
    steps are too few for the derivative (`TOO_FEW_STEPS`): `on_failure` of `picard` decides what
    becomes of it, and makes it NaN by default.

    Reverse mode has `vmap`, and forward mode over it: `hessian` is right. Forward mode by itself, and
    reverse mode over reverse mode, JAX refuses.

    Cost: reverse about one Φ a step more than `rematerialised`, with the default c. Memory: c iterates
    and one tape.
    When not to use it: where `nested` has memory enough, which is faster; where Φ holds a collective
    over an axis of a `vmap`.

    Args:
        num_checkpoints: c; by default the least with r = 2, about √(2t). Fewer cost more steps: with
            c = log₂ t about log₂ t / 2 evaluations of Φ a step.

    Returns:
        A `Checkpoints`.

    Raises:
        ValueError: `num_checkpoints` is neither `None` nor a positive integer.

    >>> import fixedgrad as fg
    >>> solver = fg.picard(
    ...     lambda w, lam: 0.5 * w + lam, max_steps=99, rtol=1e-6, checkpoints=fg.recursive())
    >>> round(float(jax.grad(lambda lam: solver(0.0, lam))(1.0)), 5)
    2.0

    References:
        Griewank and Walther, Algorithm 799: revolve, ACM TOMS 2000, for a known number of steps;
        Wang, Moin, Iaccarino, Minimal repetition dynamic checkpointing algorithm for unsteady adjoint
        calculation, SIAM J. Sci. Comput. 2009, for an unknown one.
    """
    if num_checkpoints is not None:
        check_count("recursive", "num_checkpoints", num_checkpoints)
    return Checkpoints(
        functools.partial(reversal.exactly, num_checkpoints),
        functools.partial(reversal.until, num_checkpoints),
        "`picard` with `checkpoints=recursive()` has reverse mode alone, and forward mode over it: for "
        "`jvp`, `jacfwd` and `linearize` give it `fixedgrad.nested()` and `num_steps`.",
    )


def check_checkpoints(where: str, checkpoints: object) -> None:
    """Raises `TypeError` unless `checkpoints` is a `Checkpoints`."""
    if not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            f"`checkpoints` of `{where}` must be `every_iterate()`, `rematerialised()`, `nested()` or "
            f"`recursive()`, got {show(checkpoints)}."
        )


def _refused(lower: Lower, stop: Stopping, on_failure: OnFailure) -> tuple[PyTree, SolveInfo]:
    del on_failure
    measure = functools.partial(lower.measured, stop)
    image = lower.phi(lower.w0)
    w, _, info = iterate(lower.phi, lower.w0, image, measure, stop.max_steps)
    remedy = "`checkpoints=recursive()`, which sees whether the steps suffice"
    return stopped_by_residual("picard", w, remedy), info


def _every_iterate(phi: Step, w0: PyTree, num_steps: int) -> PyTree:
    step, start = steady(phi, w0)
    return lax.fori_loop(0, num_steps, lambda _, w: step(w), start)


def _rematerialised(phi: Step, w0: PyTree, num_steps: int) -> PyTree:
    # In a loop there is nothing that XLA could merge the second run of a step with.
    return _every_iterate(jax.checkpoint(phi, prevent_cse=False), w0, num_steps)


def _nested(phi: Step, w0: PyTree, num_steps: int) -> PyTree:
    step, start = steady(phi, w0)
    length = _segment(num_steps, _bytes(start), _tape(step, start))

    def segment(w: PyTree) -> PyTree:
        return _scanned(step, w, length)

    count, rest = divmod(num_steps, length)
    w = _scanned(jax.checkpoint(segment, prevent_cse=False), start, count)
    return _scanned(step, w, rest) if rest else w


def _scanned(step: Step, w: PyTree, num_steps: int) -> PyTree:
    return lax.scan(lambda w, _: (step(w), None), w, length=num_steps)[0]


def _segment(num_steps: int, iterate: int, tape: int) -> int:
    """The length s of segments with little memory, s tapes and `num_steps` / s iterates."""

    def memory(s: int) -> float:
        return s * tape + iterate * num_steps / s

    best = math.sqrt(num_steps * iterate / max(tape, 1))
    best = min(max(round(best), 1), num_steps)
    # A remainder stands in the program as a loop of its own.
    near = range(max(best // 2, 1), min(2 * best, num_steps) + 1)
    divisor = min((s for s in near if num_steps % s == 0), key=memory, default=num_steps)
    return divisor if memory(divisor) <= _WASTE * memory(best) else best


def _tape(step: Step, w: PyTree) -> int:
    """The bytes that one step keeps for reverse mode in w, beside what all steps share."""

    def kept(num_steps: int) -> int:
        loop = functools.partial(_scanned, step, num_steps=num_steps)
        return _bytes(jax.eval_shape(lambda w: jax.vjp(loop, w)[1], w))

    return kept(3) - kept(2)


def _bytes(tree: PyTree) -> int:
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    return sum(x.size * x.dtype.itemsize for x in leaves)
