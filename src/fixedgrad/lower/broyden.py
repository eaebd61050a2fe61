"""Broyden's method for w = Φ(w, λ), with a limited memory: `broyden`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_callable, check_count
from ..failure import check_on_failure
from ..iteration import Measured, Progress, first_progress, goes_on, stopping, verdict
from ..leaves import stopped_by_residual
from ..mapped_axes import steady
from ..printing import printed
from ..real_form import combined, realified
from ..types import OnFailure, Phi, PyTree, Scalar, SolveInfo
from .solver import CheckedSolver, lower_level

tree = optax.tree

_GROWTH = 2.0  # Of the least residual so far: a point with a larger one is given up.


@printed
def broyden(
    phi: Phi,
    *,
    max_steps: int,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    window: int = 20,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Broyden's method for F(w) = w − Φ(w, λ) = 0, safeguarded.

    With s the last step, y = F(w + s) − F(w) and H ≈ (I − J)⁻¹, at first the identity,

        w ← w − H F(w),    H ← H + (s − H y) sᵀH / ⟨s, H y⟩,

    so that the first step is Φ itself. After `window` steps, and where the residual is more than twice
    the least one so far, H is the identity again; in the second case from the point before.

    Assumed, not checked: every leaf of w is inexact.

    Cost: one Φ a step, and 4 `window` vector operations. Memory: 2 `window` + 5 w.
    Not for a Φ whose own steps lead away, where `newton` is safeguarded better; nor for gradient steps
    on an ill-conditioned loss, where `from_optax` with `optax.lbfgs()` takes a fifth of the steps.

    Args:
        phi: `phi(w, *args, **kwargs) -> w`; every leaf of w inexact.
        max_steps: At most that many steps.
        rtol: Relative tolerance on the residual, as in `picard`.
        atol: Absolute tolerance on the residual.
        window: Steps that H remembers.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`.

    Raises:
        TypeError: `phi` is not callable; when called, Φ(w₀) does not look like `w0`; where JAX
            differentiates the steps, as `itd` asks for.
        ValueError: A count that is not a positive integer, or bad numbers.

    >>> solver = broyden(lambda w, lam: jnp.cos(w) + lam, max_steps=30, rtol=1e-12)
    >>> w, info = solver.with_info(0.0, 0.0)
    >>> round(float(w), 10), bool(info.converged), int(info.num_steps) < 12
    (0.7390851332, True, True)

    References:
        Broyden, A Class of Methods for Solving Nonlinear Simultaneous Equations, 1965; Kelley,
        Iterative Methods for Linear and Nonlinear Equations, 1995, chapter 7 (limited memory); Bai,
        Kolter, Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """
    check_callable("broyden", "phi", phi, "phi(w, *args) -> w")
    check_count("broyden", "max_steps", max_steps)
    check_count("broyden", "window", window)
    check_on_failure("broyden", on_failure)
    stop = stopping("broyden", None, max_steps, rtol, atol)

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        lower = lower_level("broyden", phi, w0, args, kwargs)
        w0, space = lower.w0, lower.space
        if not jax.tree.leaves(w0):  # Nothing to solve.
            return w0, lower.exact_steps(0, w0)
        to_real, from_real = realified(w0)

        def looked_at(w: PyTree) -> tuple[PyTree, Measured]:
            image = lower.phi(from_real(w))
            return tree.sub(to_real(image), w), lower.measured(stop, from_real(w), image)

        def step(c: _Broyden) -> _Broyden:
            proposed = tree.add(c.w, c.s)
            f, measured = looked_at(proposed)
            # Not monotone, as the method is not: that takes 3 to 10 times the steps where I − J is
            # ill-conditioned. After H was given up, the plain step is taken for better or worse.
            good = (measured.norm <= _GROWTH * c.progress.least[0]) | (c.filled == 0)
            # F = −f and H F(w) = −s give s − H y = H f at the new point.
            h = tree.add(f, combined(c.left, space.coefficients(c.right, f)))
            row = tree.add(c.s, combined(c.right, space.coefficients(c.left, c.s)))
            pivot = space.inner(c.s, tree.sub(c.s, h))
            scale = space.norm(c.s) * (space.norm(c.s) + space.norm(h))
            kept = (
                good & (c.filled < window) & (jnp.abs(pivot) > jnp.finfo(pivot.dtype).eps * scale)
            )
            column = tree.scale(jnp.where(kept, 1 / jnp.where(kept, pivot, 1.0), 0.0), h)
            onward = tree.add_scale(h, space.inner(row, f), column)
            left, right = (
                jax.tree.map(lambda q, x: jnp.where(kept, q.at[c.filled].set(x), 0.0), q, x)
                for q, x in ((c.left, column), (c.right, row))
            )
            w, f = tree.where(good, (proposed, f), (c.w, c.f))
            s = tree.where(kept, onward, f)
            measured = tree.where(good, measured, c.measured)
            i = c.i + 1
            progress = c.progress.after(i, measured)
            filled = jnp.where(kept, c.filled + 1, 0)
            return _Broyden(i, w, f, s, measured, progress, filled, left, right)

        def unfinished(c: _Broyden) -> jax.Array:
            return goes_on(stop.max_steps, c.i, c.measured, c.progress)

        w = to_real(w0)
        f, measured = looked_at(w)
        nothing = jax.tree.map(lambda x: jnp.zeros((window, *x.shape), x.dtype), w)
        none = jnp.int32(0)
        progress = first_progress(measured)
        carry = _Broyden(none, w, f, f, measured, progress, none, nothing, nothing)
        c = lax.while_loop(unfinished, *steady(step, carry))
        info = verdict(c.i, c.measured, measured.norm, c.progress)
        return stopped_by_residual("broyden", from_real(c.w)), info

    return CheckedSolver(solve, on_failure, phi)


class _Broyden(NamedTuple):
    """The carry of Broyden: an accepted point, f = Φ(w) − w, the next step, H = I + Σ left rightᵀ."""

    i: jax.Array
    w: PyTree
    f: PyTree
    s: PyTree
    measured: Measured
    progress: Progress
    filled: jax.Array
    left: PyTree
    right: PyTree
