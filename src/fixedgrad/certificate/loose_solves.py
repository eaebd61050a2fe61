"""Loose solves with A and Aᵀ, and whether they were too loose to see the largest error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..mapped_axes import steady
from ..real_form import COMPUTATION, ratio, real_dtype, resolution
from ..types import Jacobian, LinearSolver, MatVec, PyTree, Scalar, failed, jacobian

tree = optax.tree

_UNSEEN = 2.0  # A gain that grows by more than this shows an error that was not seen before.


class LooseSolves(NamedTuple):
    """The amplification and the residuals of loose solves with A (for w) and Aᵀ (for v) so far.

    A Krylov method brings a residual down along the large singular values of A first. So a loose solve
    of an ill-conditioned system misses the part along the small ones, which may be most of the error.
    The next solve shows it, if its tolerance is below the residual that the last solve left: the part
    that was missed is amplified more than all before.

    Attributes:
        amplification_w: The largest ‖A⁻¹r‖/‖r‖ of a right-hand side r.
        amplification_v: The largest ‖A⁻ᵀb‖/‖b‖ of a right-hand side b.
        residual_w: The residual norm that the last solve for w left; infinity before the first.
        residual_v: The same for v.
    """

    amplification_w: jax.Array
    amplification_v: jax.Array
    residual_w: jax.Array
    residual_v: jax.Array

    def exceeded_by(self, later: "LooseSolves") -> jax.Array:
        """Whether later solves found an error that these had missed."""
        more_w = later.amplification_w > _UNSEEN * self.amplification_w
        return more_w | (later.amplification_v > _UNSEEN * self.amplification_v)

    def then(self, later: "LooseSolves") -> "LooseSolves":
        """These solves and later ones, taken together."""
        return LooseSolves(
            jnp.maximum(self.amplification_w, later.amplification_w),
            jnp.maximum(self.amplification_v, later.amplification_v),
            jnp.where(jnp.isfinite(later.residual_w), later.residual_w, self.residual_w),
            jnp.where(jnp.isfinite(later.residual_v), later.residual_v, self.residual_v),
        )


def no_solves(like: jax.Array) -> LooseSolves:
    """Before the first solve."""
    zero = jnp.zeros_like(like)
    return LooseSolves(zero, zero, zero + jnp.inf, zero + jnp.inf)


class LooseSolve(NamedTuple):
    """A loose solve, in stages.

    Attributes:
        x: A⁻¹b.
        rest: b − Ax.
        amplification: The largest ‖A⁻¹r‖/‖r‖ of the stages.
        at_first: That of the first.
        left: The residual norm that the last one was allowed to leave.
        steps: Those of the linear solver, in all.
        lost: Whether one failed.
        stages: How many there were.
    """

    x: PyTree
    rest: PyTree
    amplification: jax.Array
    at_first: jax.Array
    left: jax.Array
    steps: jax.Array
    lost: jax.Array
    stages: jax.Array

    def products(self, once: bool) -> jax.Array:
        """What it cost: a step each, and one for the residual of each stage where there may be two."""
        return self.steps + (0 if once else self.stages)


def loosely(
    norm: Callable[[PyTree], jax.Array],
    make_linear_solver: Callable[[Scalar], LinearSolver],
    m: Jacobian | MatVec,
    b: PyTree,
    rtol: jax.Array,
    once: bool,
    enough: jax.Array,
) -> LooseSolve:
    """A⁻¹b to the relative tolerance `rtol`; unless one stage is enough, then of what that left.

    Args:
        norm: Of vectors like b.
        make_linear_solver: From a relative tolerance to a solver.
        m: M, with A = I − M.
        b: The right-hand side.
        rtol: Of each stage.
        once: Whether there is one stage, whatever `enough` says: then there is no loop.
        enough: Whether one is enough.
    """
    of_a = jacobian(m).a
    size, eps = norm(b), COMPUTATION * resolution(b)

    def stage(s: LooseSolve) -> LooseSolve:
        before = size if once else norm(s.rest)
        x, info = make_linear_solver(rtol.astype(real_dtype(b)))(m, s.rest)
        gain = ratio(norm(x), before)
        return LooseSolve(
            tree.add(s.x, x),
            s.rest if once else tree.sub(s.rest, of_a(x)),
            jnp.maximum(s.amplification, gain),
            jnp.where(s.stages == 0, gain, s.at_first),
            rtol * before,
            s.steps + info.num_steps,
            s.lost | failed(info),
            s.stages + 1,
        )

    def unfinished(s: LooseSolve) -> jax.Array:
        # What is rounding has parts along all directions, and shows nothing.
        return (s.stages == 0) | ((s.stages == 1) & ~enough & (norm(s.rest) > eps * size))

    zero, none = jnp.zeros_like(size), jnp.int32(0)
    nothing = LooseSolve(tree.zeros_like(b), b, zero, zero, zero, none, jnp.asarray(False), none)
    return stage(nothing) if once else lax.while_loop(unfinished, *steady(stage, nothing))
