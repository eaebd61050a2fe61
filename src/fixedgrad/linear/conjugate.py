"""Conjugate gradients for (I − M) x = b: `cg`, and `normal_cg` on the normal equations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..iteration import stopping
from ..mapped_axes import steady
from ..printing import printed
from ..real_form import NEGLIGIBLE, of_product
from ..types import LinearSolver, MatVec, PyTree, Scalar, Status, is_failure, status_where
from .preconditioner import Preconditioner
from .system import Correction, System, corrected, from_the_right, linear_solver, tree
from .tunable import tunable


@printed
@tunable
def cg(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    preconditioner: Preconditioner | MatVec | None = None,
    ridge: Scalar = 0.0,
) -> LinearSolver:
    """Conjugate gradients for M symmetric and I − M positive definite.

    The iterates minimise ½⟨x, (I − M)x⟩ − ⟨b, x⟩ over growing Krylov spaces; with κ the condition
    number of I − M the error shrinks like ((√κ − 1)/(√κ + 1))ᵏ, faster than the (κ − 1)/(κ + 1)
    of `fp` on a gradient-descent map.

    Cost: one product a step, one more for the residual. Memory: 5 vectors, 8 with a tolerance. On
    several devices two all-reduces of scalars a step where x is sharded, besides the product's own;
    none where it is not.
    Not for a map whose J is not symmetric: heavy ball, equilibrium models, a gradient step with a
    step size per coordinate. What it can see of that it reports as `NOT_SYMMETRIC`, `INDEFINITE`
    or `SINGULAR`, and these count as failures even for exact `num_steps`. Use `gmres`, `bicgstab`,
    `normal_cg` or `dense` there.
    Assumed, not checked: M symmetric and I − M positive definite, beyond what these statuses show.
    With exact `num_steps` an asymmetry below ε^¼ of the whole, 10⁻⁴ in float64, goes unseen, and in
    one step any; a negative eigenvalue does until a direction of negative curvature comes up. A
    tolerance is met by the true residual or missed.

    Args:
        num_steps: Exactly that many steps (none are wasted once the residual is at rounding).
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the true residual, ‖b − (I − M)x‖ ≤ rtol ‖b‖.
        atol: Absolute tolerance on the same.
        preconditioner: P ≈ (I − J)⁻¹: `nystrom`, `inverse`, or a linear function u ↦ P u, whose
            transpose is taken where the system is that of Jᵀ. Symmetric positive
            definite: a direction on which it is not is reported as `INDEFINITE`.
        ridge: ρ ≥ 0: the system solved, and its residual, are those of (I − M + ρI) x = b. That is a
            bias, whatever the tolerance: relative to the x returned at most ρ ‖(I − M)⁻¹‖.

    Returns:
        A `LinearSolver`.

    Raises:
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> import jax.numpy as jnp
    >>> eigenvalues = jnp.array([0.5, 0.25])
    >>> x, info = cg(num_steps=2)(lambda v: eigenvalues * v, jnp.ones(2))
    >>> jnp.round(x, 12)
    Array([2.        , 1.33333333], dtype=float64)

    References:
        Grazzi et al., ICML 2020, equations (16) and (17); Hestenes, Stiefel, Methods of Conjugate
        Gradients for Solving Linear Systems, 1952.
    """
    stop = stopping("cg", num_steps, max_steps, rtol, atol)

    def correct(system: System, r: PyTree, steps: jax.Array | int, tol: jax.Array) -> Correction:
        # A symmetric A gives ⟨p₀, A d⟩ = ⟨A p₀, d⟩ for the correction d; A d = r₀ − rₖ is known, so
        # that the test of symmetry costs one stored vector and two inner products in all.
        eps, dot, norm = system.eps, system.space.inner, system.space.norm
        precondition = system.precondition

        def conditioned(r: PyTree, rr: jax.Array) -> tuple[PyTree, jax.Array]:
            """P r, and its inner product with r."""
            if precondition is None:
                return r, rr
            z = precondition(r)
            return z, dot(r, z)

        def step(c: _CG) -> _CG:
            ap = system.product(c.p)
            pap, pp, apap = dot(c.p, ap), dot(c.p, c.p), dot(ap, ap)
            scale = jnp.maximum(c.scale, jnp.where(pp > 0, jnp.sqrt(apap / pp), 0.0))
            flat = jnp.abs(pap) <= of_product(eps) * scale * pp
            # pᵀAp = 0 with Ap ≠ 0 takes eigenvalues of both signs; ‖Ap‖² ≤ ‖A‖ pᵀAp where A ≥ 0.
            null = flat & (apap <= of_product(eps) * scale**2 * pp)
            bad = status_where(null, Status.SINGULAR, Status.INDEFINITE)
            # ⟨r, P r⟩ ≤ 0 is one of P.
            status = status_where(flat | (pap < 0) | (c.rho <= 0), bad, Status.FIXED_STEPS)
            live = (c.rr > c.least) & ~is_failure(c.status)
            status = status_where(live, status, c.status)
            live &= status == int(Status.FIXED_STEPS)
            alpha = jnp.where(live, c.rho / jnp.where(live, pap, 1.0), 0.0)
            x, r = tree.add_scale(c.x, alpha, c.p), tree.add_scale(c.r, -alpha, ap)
            rr = dot(r, r)
            z, rho = conditioned(r, rr)
            beta = jnp.where(live, rho / jnp.where(live, c.rho, 1.0), 0.0)
            p = tree.where(live, tree.add_scale(z, beta, c.p), c.p)
            ap0 = tree.where(c.i == 0, ap, c.ap0)
            rr, rho = jnp.where(live, rr, c.rr), jnp.where(live, rho, c.rho)
            return _CG(c.i + 1, x, r, p, ap0, rr, rho, c.least, scale, status)

        rr = dot(r, r)
        p, rho = conditioned(r, rr)
        least = (
            rr * (NEGLIGIBLE * eps) ** 2
        )  # Below it more steps change nothing, and ratios are noise.
        zero = tree.zeros_like(r)
        carry = _CG(
            jnp.int32(0), zero, r, p, zero, rr, rho, least, rr * 0, jnp.int32(Status.FIXED_STEPS)
        )
        carry = iterate(
            step, carry, steps, lambda c: (c.rr > tol**2) & (c.status == int(Status.FIXED_STEPS))
        )
        ad = tree.sub(r, carry.r)
        left, right = dot(p, ad), dot(carry.ap0, carry.x)
        size = norm(p) * norm(ad) + norm(carry.ap0) * norm(carry.x)
        skew = jnp.abs(left - right) > eps**0.5 * size
        status = status_where(skew, Status.NOT_SYMMETRIC, carry.status)
        return Correction(carry.x, carry.i, status)

    return linear_solver("cg", corrected(stop, correct), preconditioner=preconditioner, ridge=ridge)


@printed
@tunable
def normal_cg(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    preconditioner: Preconditioner | MatVec | None = None,
    ridge: Scalar = 0.0,
) -> LinearSolver:
    """Conjugate gradients on the normal equations, for any invertible I − M.

    With A = I − M it solves AᵀA x = Aᵀ b, that is min ‖A x − b‖, in the form that keeps the residual
    of A x = b itself (CGLS). It transposes the product with M by itself. The condition number is
    squared: the rate is ((κ − 1)/(κ + 1))ᵏ with κ that of A.

    Cost: two products a step, one more for the residual. Memory: 5 vectors, 8 with a tolerance.
    Assumed, not checked: `matvec` consists of operations that JAX can transpose; where it finds one
    that it cannot, JAX raises.
    Not for symmetric positive definite systems, where `cg` needs the square root of its steps.

    Args:
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the true residual, ‖b − (I − M)x‖ ≤ rtol ‖b‖.
        atol: Absolute tolerance on the same.
        preconditioner: P ≈ (I − J)⁻¹: `nystrom`, `inverse`, or a linear function u ↦ P u, whose
            transpose is taken where the system is that of Jᵀ.
        ridge: ρ ≥ 0: the system solved, and its residual, are those of (I − M + ρI) x = b. That is a
            bias, whatever the tolerance: relative to the x returned at most ρ ‖(I − M)⁻¹‖.

    Returns:
        A `LinearSolver`.

    Raises:
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> import jax.numpy as jnp
    >>> m = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
    >>> x, info = normal_cg(num_steps=2)(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 12)
    Array([ 0.8, -0.4], dtype=float64)

    References:
        Grazzi et al., ICML 2020, equation (15); Björck, Numerical Methods for Least Squares
        Problems, 1996, algorithm 7.4.1.
    """
    stop = stopping("normal_cg", num_steps, max_steps, rtol, atol)

    def correct(system: System, r: PyTree, steps: jax.Array | int, tol: jax.Array) -> Correction:
        eps, dot, norm = system.eps, system.space.inner, system.space.norm
        product = system.product
        transpose = jax.linear_transpose(product, r)

        def stuck(c: _CG) -> jax.Array:
            # Aᵀr = 0 with r ≠ 0: x minimises ‖Ax − b‖, and a step more would follow rounding errors
            # along a null vector of A.
            return jnp.sqrt(c.rr) <= 1e-2 * jnp.sqrt(eps * c.scale) * norm(c.r)

        def step(c: _CG) -> _CG:  # c.p is the direction, c.rr = ‖s‖² with s = Aᵀ r.
            q = product(c.p)
            qq, pp = dot(q, q), dot(c.p, c.p)
            scale = jnp.maximum(c.scale, jnp.where(pp > 0, qq / pp, 0.0))
            flat = qq <= eps**2 * scale * pp
            live = (c.rr > c.least) & ~flat & ~stuck(c)
            alpha = jnp.where(live, c.rr / jnp.where(live, qq, 1.0), 0.0)
            x, r = tree.add_scale(c.x, alpha, c.p), tree.add_scale(c.r, -alpha, q)
            s = transpose(r)[0]
            ss = dot(s, s)
            beta = jnp.where(live, ss / jnp.where(live, c.rr, 1.0), 0.0)
            p = tree.where(live, tree.add_scale(s, beta, c.p), c.p)
            rr = jnp.where(live, ss, c.rr)
            return _CG(c.i + 1, x, r, p, c.ap0, rr, rr, c.least, scale, c.status)

        s = transpose(r)[0]
        ss = dot(s, s)
        carry = _CG(
            jnp.int32(0),
            tree.zeros_like(r),
            r,
            s,
            (),
            ss,
            ss,
            ss * (NEGLIGIBLE * eps) ** 2,
            ss * 0,
            jnp.int32(Status.FIXED_STEPS),
        )
        carry = iterate(
            step,
            carry,
            steps,
            lambda c: (norm(c.r) > tol) & (c.rr > c.least) & ~stuck(c),
        )
        singular = stuck(carry) & (norm(carry.r) > jnp.sqrt(eps) * norm(r))
        status = status_where(singular, Status.SINGULAR, carry.status)
        return Correction(carry.x, carry.i, status)

    return linear_solver(
        "normal_cg",
        corrected(stop, from_the_right(correct)),
        preconditioner=preconditioner,
        ridge=ridge,
    )


class _CG(NamedTuple):
    """The carry of CG: iterate, residual, direction, A p₀, ‖r‖², ⟨r, P r⟩, and the guards."""

    i: jax.Array
    x: PyTree
    r: PyTree
    p: PyTree
    ap0: PyTree
    rr: jax.Array
    rho: jax.Array
    least: jax.Array
    scale: jax.Array
    status: jax.Array


def iterate(step: Callable, carry: Any, steps: Any, unfinished: Callable) -> Any:
    """`steps` many steps where that is a Python integer, else at most that many."""
    step, carry = steady(step, carry)
    if isinstance(steps, int):
        return lax.fori_loop(0, steps, lambda _, c: step(c), carry)
    return lax.while_loop(lambda c: (c.i < steps) & unfinished(c), step, carry)
