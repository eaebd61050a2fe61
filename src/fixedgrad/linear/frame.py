"""The frame of all linear solvers: the system in real form, the verdict, corrections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..realify import norm as norm_of
from ..realify import power_of_two, real_dtype, realified, resolution
from ..replication import varying_alike
from ..types import (
    LinearSolver,
    MatVec,
    PyTree,
    Scalar,
    SolveInfo,
    Status,
    Stopping,
    check_callable,
    check_inexact,
    check_same,
    is_failure,
    solve_info,
    status_where,
)

tree = optax.tree


def rounding(eps: float) -> float:
    """The error of a product relative to its size: a modest multiple of eps.

    Low precision rounds results only, since sums accumulate in float32; there sixteen times eps
    would be no floor but an end after two steps.
    """
    return 16 * eps if eps < 1e-5 else eps


class System(NamedTuple):
    """(I − M) x = b in real form, divided by `scale`, with what every solver asks of it."""

    matvec: MatVec
    b: PyTree
    x0: PyTree | None
    norm: jax.Array
    scale: jax.Array
    eps: float

    def tolerance(self, stop: Stopping) -> jax.Array:
        return stop._replace(atol=jnp.asarray(stop.atol, self.norm.dtype) / self.scale).tolerance(
            self.norm
        )

    def product(self, x: PyTree) -> PyTree:
        return tree.sub(x, self.matvec(x))

    def residual(self, x: PyTree) -> PyTree:
        return tree.sub(self.b, self.product(x))

    def residual_norm(self, x: PyTree) -> jax.Array:
        return norm_of(self.residual(x))

    def floor(self, x: PyTree) -> jax.Array:
        # ‖b − Ax‖ at rounding, where ‖A‖ ≤ 2 for the contractions of this library.
        return rounding(self.eps) * (self.norm + 2 * norm_of(x))

    def steps_status(self, residual: jax.Array, start: jax.Array, x: PyTree) -> jax.Array:
        """The status of exact steps that ended in x, by the residual norms there and at the start."""
        grown = residual > jnp.maximum(start, self.floor(x))
        return status_where(grown, Status.GROWING, Status.FIXED_STEPS)

    @property
    def noise(self) -> float:
        """The share of ‖b‖ that may be rounding before x means nothing."""
        return max(0.01, min(0.5, 64 * self.eps))

    def fixed(self, num_steps: Scalar, x: PyTree, status: jax.Array | Status) -> SolveInfo:
        """The verdict on a solve without a tolerance; `status` says what else was seen."""
        sane = jnp.isfinite(norm_of(x)) | (status == int(Status.SINGULAR))
        status = status_where(sane & jnp.isfinite(self.norm), status, Status.NON_FINITE)
        return solve_info(num_steps, self.residual_norm(x), status)

    def judge(
        self, num_steps: Scalar, x: PyTree, residual: jax.Array, tol: jax.Array, start: jax.Array
    ) -> SolveInfo:
        """The verdict on a solve with a tolerance."""
        missed = status_where(residual > start, Status.DIVERGED, Status.MAX_STEPS)
        floor = self.floor(x)
        # A residual of the size of b at the floor: x is so large that it lies along a null vector of A.
        resolved = status_where(
            residual <= self.noise * self.norm, Status.AT_FLOOR, Status.SINGULAR
        )
        close = status_where(residual <= floor, resolved, missed)
        status = status_where(residual <= tol, Status.CONVERGED, close)
        status = status_where(jnp.isfinite(residual), status, Status.NON_FINITE)
        return solve_info(num_steps, residual, status, tol)


class Correction(NamedTuple):
    """d ≈ A⁻¹ r, the steps taken, and how it ended."""

    d: PyTree
    steps: jax.Array | int
    status: jax.Array | Status


def dot(x: PyTree, y: PyTree) -> jax.Array:
    """⟨x, y⟩ of real pytrees, as a sum of products; XLA compiles it like a `vdot`.

    A `vdot` is subject to the platform's precision, flattens leaves and so gathers sharded ones, and
    is refused by JAX where the sharding is part of the type.
    """
    return jnp.asarray(tree.sum(tree.mul(x, y)))


def corrected(stop: Stopping, correct: Callable, gain: float = 0.5) -> Callable:
    """A solve by corrections x ← x + d, d ≈ A⁻¹ (b − A x), each from the true residual.

    A recurrence for the residual drifts from the true one. So the true one is computed when the
    recurrence has met the tolerance, and the method starts again from there for as long as that
    still brings the residual down by the factor `gain`: this is iterative refinement, and it
    decides on true residuals only.
    """

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        if system.x0 is None:
            x, r, start = tree.zeros_like(system.b), system.b, system.norm
        else:
            x, r = system.x0, system.residual(system.x0)
            start = tree.norm(r)
        if stop.num_steps is not None:
            done = correct(system, r, stop.num_steps, jnp.zeros_like(start))
            x = tree.add(x, done.d)
            return x, system.fixed(done.steps, x, done.status)

        tol = system.tolerance(stop)

        def unfinished(carry: Any) -> jax.Array:
            x, _, norm, best, steps, status = carry
            target = jnp.maximum(tol, system.floor(x))
            gains = (norm <= gain * best) & ~is_failure(status)
            return (norm > target) & gains & (steps < stop.max_steps)

        def cycle(carry: Any) -> Any:
            x, r, norm, _, steps, status = carry
            done = correct(
                system, r, stop.max_steps - steps, jnp.maximum(tol, 0.1 * system.floor(x))
            )
            proposed = tree.add(x, done.d)
            left = system.residual(proposed)
            left_norm = tree.norm(left)
            better = left_norm < norm
            x, r = tree.where(better, (proposed, left), (x, r))
            status = status_where(jnp.isfinite(left_norm), done.status, Status.NON_FINITE)
            steps = steps + done.steps
            return x, r, jnp.where(better, left_norm, norm), norm, steps, status.astype(jnp.int32)

        status = jnp.int32(Status.FIXED_STEPS)
        carry = x, r, start, jnp.full_like(start, jnp.inf), jnp.int32(0), status
        x, _, norm, _, steps, status = lax.while_loop(unfinished, cycle, varying_alike(carry))
        info = system.judge(steps, x, norm, tol, start)
        # A breakdown explains a missed tolerance; it does not matter where the tolerance is met.
        explained = is_failure(info.status) & is_failure(status)
        status = status_where(explained, status, info.status)
        return x, solve_info(steps, norm, status, tol)

    return solve


def linear_solver(
    where: str,
    solve: Callable[[System], tuple[PyTree, SolveInfo]],
    stop: Stopping | None = None,
    *,
    scaled: bool = True,
) -> LinearSolver:
    """The common frame of all solvers: the real form, and zero for a zero right-hand side.

    `scaled` is for solvers that square the entries of b. A solver whose tolerance is traced says so by
    an attribute `traced`.
    """

    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        check_callable(where, "matvec", matvec, "matvec(x) -> M x")
        check_inexact(where, "b", b)
        check_same(where, jax.eval_shape(matvec, b), b, "`matvec(b)`", "`b`")
        if x0 is not None:
            check_same(where, x0, b, "`x0`", "`b`")
        if not sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: b))):  # Nothing to solve.
            return b, solve_info(0, jnp.zeros((), real_dtype(b)), Status.CONVERGED)
        to_real, from_real = realified(b)
        real = to_real(b)
        scale = power_of_two(real) if scaled else jnp.ones((), real_dtype(b))
        real = tree.scale(1 / scale, real)
        norm = norm_of(real)
        start = None
        if x0 is not None:
            start = tree.where(norm > 0, tree.scale(1 / scale, to_real(x0)), tree.zeros_like(real))

        def product(u: PyTree) -> PyTree:
            # Of the vector as it is: in a batch with collectives M mixes elements, and scales.
            return tree.scale(1 / scale, to_real(matvec(from_real(tree.scale(scale, u)))))

        system = System(product, real, start, norm, scale, resolution(b))
        x, info = solve(system)
        info = info._replace(residual=info.residual * scale, tolerance=info.tolerance * scale)
        return from_real(tree.scale(scale, x)), info

    solver.traced = stop is not None and stop.traced  # pyright: ignore[reportFunctionMemberAccess]
    return solver
