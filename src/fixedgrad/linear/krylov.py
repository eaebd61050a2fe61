"""Krylov methods for any invertible I − M: `gmres`, `bicgstab`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import check_count
from ..iteration import stopping
from ..mapped_axes import steady
from ..printing import printed
from ..real_form import NEGLIGIBLE, VALUE, combined
from ..types import LinearSolver, MatVec, PyTree, Scalar, Status, is_failure, status_where
from .preconditioner import Preconditioner
from .system import Correction, System, corrected, from_the_right, linear_solver, tree
from .tunable import tunable


@printed
@tunable
def gmres(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    preconditioner: Preconditioner | MatVec | None = None,
    ridge: Scalar = 0.0,
    restart: int = 30,
) -> LinearSolver:
    """GMRES for any invertible I − M, restarted every `restart` steps.

    Each cycle minimises ‖b − (I − M)x‖ over a Krylov space of dimension up to `restart`, so that the
    residual never grows: Arnoldi with classical Gram–Schmidt done twice, and Givens rotations, which
    give the residual norm at every step. (`jax.scipy` has a GMRES too; its `info` cannot be trusted,
    it does not count its steps, and it takes ten times as long to compile.)

    Cost: one product a step, one more a cycle; up to 4 `restart` vector operations a step. Memory:
    `restart` + 4 vectors, 2 more with a tolerance.
    Not where I − M is symmetric positive definite: `cg` does the same with 5 vectors. Short
    restarts can stagnate (status `MAX_STEPS`): lengthen them or use `dense`.
    Exact `num_steps` that leave the residual where it was are `NO_PROGRESS`.

    Args:
        num_steps: Exactly that many steps, fewer where the Krylov space ends before.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the true residual, ‖b − (I − M)x‖ ≤ rtol ‖b‖.
        atol: Absolute tolerance on the same.
        preconditioner: P ≈ (I − J)⁻¹: `nystrom`, `inverse`, or a linear function u ↦ P u, whose
            transpose is taken where the system is that of Jᵀ.
        ridge: ρ ≥ 0: the system solved, and its residual, are those of (I − M + ρI) x = b. That is a
            bias, whatever the tolerance: relative to the x returned at most ρ ‖(I − M)⁻¹‖.
        restart: Steps in one cycle.

    Returns:
        A `LinearSolver`.

    Raises:
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> import jax.numpy as jnp
    >>> m = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
    >>> x, info = gmres(num_steps=2)(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 12)
    Array([ 0.8, -0.4], dtype=float64)

    References:
        Saad, Schultz, GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric
        Linear Systems, 1986.
    """
    stop = stopping("gmres", num_steps, max_steps, rtol, atol)
    check_count("gmres", "restart", restart)

    def correct(system: System, r: PyTree, steps: jax.Array | int, tol: jax.Array) -> Correction:
        if not isinstance(steps, int):  # A tolerance: one cycle, then the true residual decides.
            length = min(restart, stop.max_steps)
            return _gmres_cycle(system, r, length, steps, tol)[0]

        def advance(carry: Any, length: int) -> Any:
            x, left, taken, _, _ = carry
            done, norm = _gmres_cycle(system, left, length, length, tol)
            return (
                tree.add(x, done.d),
                tree.sub(left, system.product(done.d)),
                taken + done.steps,
                done.status,
                norm,
            )

        whole, rest = divmod(steps, restart)
        start = system.space.norm(r)
        carry = tree.zeros_like(r), r, jnp.int32(0), jnp.int32(Status.FIXED_STEPS), start
        cycle, carry = steady(lambda c: advance(c, restart), carry)
        carry = lax.fori_loop(0, whole, lambda _, c: cycle(c), carry)
        if rest:
            carry = advance(carry, rest)
        x, _, taken, status, norm = carry
        ended = system.steps_status(norm, start, x)
        return Correction(x, taken, status_where(is_failure(status), status, ended))

    return linear_solver(
        "gmres",
        corrected(stop, from_the_right(correct), reduction=0.99),
        preconditioner=preconditioner,
        ridge=ridge,
    )


@printed
@tunable
def bicgstab(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    preconditioner: Preconditioner | MatVec | None = None,
    ridge: Scalar = 0.0,
) -> LinearSolver:
    """BiCGStab for any invertible I − M, in short recurrences.

    Where the recurrence breaks down it begins anew from the residual at hand, which `jax.scipy` and
    SciPy do not; without breakdowns its steps are theirs.

    Cost: two products a step, one more for the residual. Memory: 8 vectors, 10 with a tolerance.
    Not where I − M is symmetric positive definite (`cg`), nor for nearly skew-symmetric I − M,
    where it makes no way and `gmres` does.
    Exact `num_steps` that leave the residual where it was, or larger, are `NO_PROGRESS`.

    Args:
        num_steps: Exactly that many steps, fewer on a breakdown or at an exact solution.
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
    >>> m = jnp.array([[0.1, 0.5], [-0.4, 0.0]])
    >>> x, info = bicgstab(num_steps=2)(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> bool(jnp.allclose(x - m @ x, jnp.array([1.0, 0.0]), atol=1e-12))
    True

    References:
        Van der Vorst, Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the Solution of
        Nonsymmetric Linear Systems, 1992.
    """
    stop = stopping("bicgstab", num_steps, max_steps, rtol, atol)

    def correct(system: System, r: PyTree, steps: jax.Array | int, tol: jax.Array) -> Correction:
        eps, dot, norm = system.eps, system.space.inner, system.space.norm
        start = norm(r)
        least = jnp.maximum(tol, NEGLIGIBLE * eps * start)

        def ratio(a: jax.Array, b: jax.Array, scale: jax.Array | float = 0.0) -> jax.Array:
            # Where b is rounding on its scale the ratio means nothing: a breakdown, answered by 0.
            usable = jnp.abs(b) > eps * scale
            return jnp.where(usable, a / jnp.where(usable, b, 1.0), 0.0)

        def step(c: _BiCGStab) -> _BiCGStab:
            rho = dot(c.shadow, c.r)
            beta = ratio(rho, c.rho) * ratio(c.alpha, c.omega)
            anew = (beta == 0) | (jnp.abs(rho) <= eps * norm(c.shadow) * c.norm)
            shadow, rho = tree.where(anew, (c.r, c.norm**2), (c.shadow, rho))
            onward = tree.add_scale(c.r, beta, tree.add_scale(c.p, -c.omega, c.v))
            p = tree.where(anew, c.r, onward)
            v = system.product(p)
            alpha = ratio(rho, dot(shadow, v), norm(shadow) * norm(v))
            s = tree.add_scale(c.r, -alpha, v)
            t = system.product(s)
            omega = ratio(dot(t, s), dot(t, t))
            omega = jnp.where(jnp.abs(omega) * norm(t) > eps * norm(s), omega, 0.0)
            x = tree.add_scale(tree.add_scale(c.x, alpha, p), omega, s)
            left = tree.add_scale(s, -omega, t)
            return _BiCGStab(c.i + 1, x, left, shadow, p, v, rho, alpha, omega, norm(left))

        def lost(c: _BiCGStab) -> jax.Array:
            stuck = (c.i > 0) & (c.alpha == 0) & (c.omega == 0)
            # Beyond that growth nothing of r is left in the residual.
            return stuck | ~(eps * c.norm <= start)

        def unfinished(c: _BiCGStab) -> jax.Array:
            return (c.i < steps) & (c.norm > least) & ~lost(c)

        zero, zeros = jnp.zeros_like(start), tree.zeros_like(r)
        carry = _BiCGStab(jnp.int32(0), zeros, r, r, zeros, zeros, zero, zero, zero, start)
        c = lax.while_loop(unfinished, *steady(step, carry))
        status = jnp.int32(Status.FIXED_STEPS)
        if isinstance(steps, int):  # With a tolerance the true residual decides.
            status = system.steps_status(c.norm, start, c.x)
        status = status_where(lost(c) & (c.norm > least), Status.MAX_STEPS, status)
        # As in GMRES: x so large that its rounding is as large as r lies along a null vector of A.
        singular = (eps * norm(c.x) >= system.noise * start) & (start > 0)
        status = status_where(singular, Status.SINGULAR, status)
        return Correction(c.x, c.i, status_where(jnp.isfinite(c.norm), status, Status.NON_FINITE))

    return linear_solver(
        "bicgstab",
        corrected(stop, from_the_right(correct), reduction=0.9),
        preconditioner=preconditioner,
        ridge=ridge,
    )


class _BiCGStab(NamedTuple):
    """The carry of BiCGStab: iterate, residual and its shadow, direction, A p, the scalars."""

    i: jax.Array
    x: PyTree
    r: PyTree
    shadow: PyTree
    p: PyTree
    v: PyTree
    rho: jax.Array
    alpha: jax.Array
    omega: jax.Array
    norm: jax.Array


class _Arnoldi(NamedTuple):
    """The carry of a GMRES cycle: the basis V, the rotations, R and g of min ‖g − R y‖."""

    j: jax.Array
    basis: PyTree
    rotations: jax.Array
    triangle: jax.Array
    g: jax.Array
    ended: jax.Array


def _gmres_cycle(
    system: System, r: PyTree, length: int, steps: jax.Array | int, tol: jax.Array
) -> tuple[Correction, jax.Array]:
    """One cycle: d minimises ‖r − A d‖ over span{r, Ar, ..., Aᵐ⁻¹r}, m ≤ `length` and ≤ `steps`.

    A V_m = V_{m+1} H with H Hessenberg; rotations turn H into R and ‖r‖e₁ into g, so that d = V_m y
    with R y = g, and |g_{m+1}|, returned too, is the residual norm.
    """
    eps, norm = system.eps, system.space.norm
    beta = norm(r)
    safe = jnp.where(beta > 0, beta, 1.0)
    dtype = beta.dtype

    def step(c: _Arnoldi) -> _Arnoldi:
        j = c.j
        u = system.product(jax.tree.map(lambda q: q[j], c.basis))
        size = norm(u)
        # Rows of the basis that are not filled yet are zero, so the projection needs no mask.
        h = jnp.zeros(length + 1, dtype)
        for _ in range(2):
            part = system.space.coefficients(c.basis, u)
            u = tree.sub(u, combined(c.basis, part))
            h += part
        height = norm(u)
        ended = height <= VALUE * eps * size  # The Krylov space is exhausted: d is exact.
        u = tree.scale(jnp.where(ended, 0.0, 1 / jnp.where(ended, 1.0, height)), u)
        h = h.at[j + 1].set(jnp.where(ended, 0.0, height))

        # All rotations so far are one matrix, in the place of a loop over them.
        h = jnp.matmul(c.rotations, h, precision="highest")
        radius = jnp.hypot(h[j], h[j + 1])
        safe = jnp.where(radius > 0, radius, 1.0)
        cosine = jnp.where(radius > 0, h[j] / safe, 1.0)
        sine = jnp.where(radius > 0, h[j + 1] / safe, 0.0)
        turn = jnp.stack([jnp.stack([cosine, sine]), jnp.stack([-sine, cosine])])
        pair = lax.dynamic_slice_in_dim(c.rotations, j, 2)
        pair = jnp.matmul(turn, pair, precision="highest")
        rotations = lax.dynamic_update_slice_in_dim(c.rotations, pair, j, axis=0)
        h = h.at[j].set(radius).at[j + 1].set(0.0)
        g = c.g.at[j + 1].set(-sine * c.g[j]).at[j].set(cosine * c.g[j])
        return _Arnoldi(
            j + 1,
            jax.tree.map(lambda q, x: q.at[j + 1].set(x), c.basis, u),
            rotations,
            c.triangle.at[:, j].set(h[:length]),
            g,
            ended,
        )

    def unfinished(c: _Arnoldi) -> jax.Array:
        # Below eps ‖r‖ more steps only turn rounding errors into directions.
        least = jnp.maximum(tol, eps * beta)
        return (c.j < length) & (c.j < steps) & (jnp.abs(c.g[c.j]) > least) & ~c.ended

    # The first row is r / ‖r‖; an outer product, so that the basis is sharded as r is.
    first = jnp.zeros(length + 1, dtype).at[0].set(1)
    basis = jax.tree.map(
        lambda x: jnp.expand_dims(first, range(1, x.ndim + 1)) * (x / safe)[None], r
    )
    start = _Arnoldi(
        jnp.int32(0),
        basis,
        jnp.eye(length + 1, dtype=dtype),
        jnp.zeros((length, length), dtype),
        jnp.zeros(length + 1, dtype).at[0].set(beta),
        jnp.asarray(False),
    )
    c = lax.while_loop(unfinished, *steady(step, start))
    used = jnp.arange(length, dtype=jnp.int32) < c.j
    diagonal = jnp.diagonal(c.triangle)
    flat = used & (jnp.abs(diagonal) <= eps * jnp.max(jnp.abs(c.triangle)))
    triangle = c.triangle + jnp.diag(jnp.where(used & ~flat, 0.0, 1.0).astype(dtype))
    g = jnp.where(used & ~flat, c.g[:length], 0.0)
    y = jax.scipy.linalg.solve_triangular(triangle, g)
    d = combined(c.basis, jnp.append(y, jnp.zeros(1, dtype)))
    # eps ‖A‖ ‖d‖ is the backward error; where it is as large as r, A is singular to this precision.
    size = jnp.max(jnp.abs(c.triangle))
    noise = eps * size * jnp.linalg.norm(y)
    singular = ((jnp.any(flat) & c.ended) | ~(noise < system.noise * beta)) & (beta > 0)
    singular &= jnp.isfinite(size)
    status = status_where(singular, Status.SINGULAR, Status.FIXED_STEPS)
    return Correction(d, c.j, status), jnp.abs(c.g[c.j])
