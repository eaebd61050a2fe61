"""Anderson acceleration of w = Φ(w, λ): `anderson`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_callable, check_count, check_number
from ..failure import check_on_failure
from ..iteration import Measured, Progress, first_progress, stopping, verdict
from ..leaves import stopped_by_residual
from ..mapped_axes import steady
from ..printing import printed
from ..real_form import Space, real_dtype, realified
from ..types import OnFailure, Phi, PyTree, Scalar, SolveInfo
from .solver import CheckedSolver, lower_level

tree = optax.tree


@printed
def anderson(
    phi: Phi,
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    window: int = 5,
    regularisation: Scalar = 1e-5,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Anderson acceleration of w = Φ(w, λ), safeguarded.

    With fᵢ = Φ(wᵢ) − wᵢ over the last `window` iterates, it takes w = Σ αᵢ Φ(wᵢ) where the αᵢ sum to 1
    and minimise ‖Σ αᵢ fᵢ‖² + ε ‖α‖² (fᵢ scaled to the smallest). Where a mixed point turns out to
    have a larger residual than the point before, it is given up: the plain step Φ(w) from there is
    taken instead, and the window starts anew.

    Assumed, not checked: every leaf of w is inexact.

    Cost: one Φ a step, and `window`² inner products.
    Memory: 2 `window` + 4 w, one more with a tolerance.
    Not needed for small q; of no use on strongly non-linear maps far from the fixed point.

    Args:
        phi: `phi(w, *args, **kwargs) -> w`; every leaf of w inexact.
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol` as in `picard`.
        rtol: Relative tolerance on the residual.
        atol: Absolute tolerance on the residual.
        window: How many iterates are mixed.
        regularisation: ε, relative to the smallest residual in the window; never below rounding.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`.

    Raises:
        TypeError: `phi` is not callable; when called, Φ(w₀) does not look like `w0`; where JAX
            differentiates the steps that a tolerance ends, as `itd` asks for.
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> solver = anderson(lambda w, lam: 0.9 * w + lam, max_steps=20, rtol=1e-6)
    >>> w, info = solver.with_info(0.0, 1.0)
    >>> round(float(w), 4), bool(info.converged), int(info.num_steps) < 5
    (10.0, True, True)

    References:
        Walker, Ni, Anderson Acceleration for Fixed-Point Iterations, 2011; Zhang, O'Donoghue, Boyd,
        Globally Convergent Type-I Anderson Acceleration, 2020 (the safeguard).
    """
    check_callable("anderson", "phi", phi, "phi(w, *args) -> w")
    check_on_failure("anderson", on_failure)
    check_count("anderson", "window", window)
    check_number("anderson", "regularisation", regularisation, lambda x: x > 0, "a number > 0")
    stop = stopping("anderson", num_steps, max_steps, rtol, atol)

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        lower = lower_level("anderson", phi, w0, args, kwargs)
        w0, space = lower.w0, lower.space
        if not jax.tree.leaves(w0):  # Nothing to solve.
            return w0, lower.exact_steps(0, w0)
        to_real, from_real = realified(w0)

        def image(w: PyTree) -> PyTree:
            return to_real(lower.phi(from_real(w)))

        def judged(w: PyTree, image: PyTree) -> Measured:
            return lower.measured(stop, from_real(w), from_real(image))

        def one_step(s: _Anderson) -> _Anderson:
            # s.mixed is the candidate; s.w, s.image the last accepted point.
            candidate_image = image(s.mixed)
            residual = tree.sub(candidate_image, s.mixed)
            # A scale and a test, not to be differentiated: a norm has no derivative at 0.
            measured = judged(*lax.stop_gradient((s.mixed, candidate_image)))
            size = measured.norm
            # After a rejection the plain step is taken for better or worse, NaN included.
            good = (size <= s.size) | jnp.isinf(s.size)
            slot = s.filled % window
            filled = jnp.where(good, s.filled + 1, 0)
            images, residuals = (
                jax.tree.map(lambda h, x: h.at[slot].set(x), history, new)
                for history, new in ((s.images, candidate_image), (s.residuals, residual))
            )
            # At rounding there is nothing to mix by, and weights have derivatives like 1/rounding.
            settled = 8 * size <= measured.floor
            weighed = tree.where(settled, tree.zeros_like(residuals), residuals)
            window_filled = jnp.minimum(filled, window)
            mixed = _mix(space, images, weighed, window_filled, regularisation, size)
            mixed = tree.where(settled, candidate_image, mixed)
            # Rejected: go on with the plain step from the last accepted point, and judge the next
            # residual afresh.
            accepted = (s.mixed, candidate_image, mixed, size, measured)
            rejected = (s.w, s.image, s.image, jnp.full_like(size, jnp.inf), s.measured)
            w, image_, mixed, size, measured = tree.where(good, accepted, rejected)
            progress, i = s.progress.after(s.i, measured), s.i + 1
            return _Anderson(
                i, w, image_, mixed, size, measured, progress, filled, images, residuals
            )

        real = to_real(w0)
        zeros = jax.tree.map(lambda x: jnp.zeros((window, *x.shape), x.dtype), real)
        infinite = jnp.asarray(jnp.inf, real_dtype(w0))
        zero = jnp.int32(0)
        nothing = judged(real, real)._replace(norm=infinite)
        s = _Anderson(
            zero, real, real, real, infinite, nothing, first_progress(nothing), zero, zeros, zeros
        )
        step, s = steady(one_step, s)
        if stop.num_steps is not None:
            s = lax.fori_loop(0, stop.num_steps, lambda _, s: step(s), s)
            w = from_real(s.image)
            return w, lower.exact_steps(stop.num_steps, w)

        def unfinished(s: _Anderson) -> jax.Array:
            alive = ~jnp.isnan(s.measured.norm) & ~s.progress.settled(s.i, s.measured)
            return (s.i < stop.max_steps) & ~s.measured.met & alive

        s = step(s)
        start = s.measured.norm
        s = lax.while_loop(unfinished, step, s)
        info = verdict(s.i, s.measured, start, s.progress)
        return stopped_by_residual("anderson", from_real(s.w)), info

    return CheckedSolver(solve, on_failure, phi)


class _Anderson(NamedTuple):
    """The carry of Anderson: last accepted point, its image, the next candidate, the window.

    `size` is what the next residual is held to, `measured` the residual of the accepted point.
    """

    i: jax.Array
    w: PyTree
    image: PyTree
    mixed: PyTree
    size: jax.Array
    measured: Measured
    progress: Progress
    filled: jax.Array
    images: PyTree
    residuals: PyTree


def _mix(
    space: Space,
    images: PyTree,
    residuals: PyTree,
    filled: jax.Array,
    regularisation: Scalar,
    size: jax.Array,
) -> PyTree:
    """Σ αᵢ Φ(wᵢ), α ∝ (F + εI)⁻¹ 1 with F the Gram matrix of the residuals in the window.

    The least-squares problem with the constraint Σ αᵢ = 1 has this solution by its Lagrangian.
    """
    residuals = tree.scale(1 / jnp.where(size > 0, size, 1.0), residuals)
    gram = space.gram(residuals)
    window = gram.shape[0]
    used = jnp.arange(window, dtype=filled.dtype) < filled
    gram = jnp.where(used[:, None] & used[None, :], gram, 0.0)
    one = used.astype(gram.dtype)
    # Not below the rounding of F: there it is singular, and its solution infinite.
    rounding = jnp.finfo(gram.dtype).eps * lax.stop_gradient(jnp.trace(gram))
    epsilon = jnp.maximum(jnp.asarray(regularisation, gram.dtype), rounding)
    alpha = one * jnp.linalg.solve(gram + epsilon * jnp.eye(window, dtype=gram.dtype), one)
    # Of an empty window, after a rejection, nothing is used: not NaN, which reverse mode would spread.
    alpha = alpha / jnp.where(filled > 0, jnp.sum(alpha), 1.0)
    return jax.tree.map(lambda h: jnp.tensordot(alpha, h, axes=1, precision="highest"), images)
