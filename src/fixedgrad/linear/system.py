"""The frame of all linear solvers: the system in real form, the verdict, corrections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from ..errors import check_callable, check_inexact, check_number, check_same
from ..iteration import Measured, Stopping, joint_tolerance, verdict
from ..leaves import traced_once
from ..mapped_axes import steady
from ..real_form import (
    COMPUTATION,
    Space,
    of_product,
    power_of_two,
    random_signs,
    real_dtype,
    realified,
    resolution,
)
from ..types import (
    Jacobian,
    LinearSolver,
    MatVec,
    PyTree,
    Scalar,
    SolveInfo,
    Status,
    is_failure,
    jacobian,
    solve_info,
    status_where,
)
from .preconditioner import Built, Preconditioner, applied, check_preconditioner
from .tunable import Tunable

tree = optax.tree


class System(NamedTuple):
    """(I − M) x = b in real form, divided by `scale`, with what every solver asks of it.

    Attributes:
        matvec: The product with M.
        product: The product with A = I − M.
        b: The right-hand side.
        x0: The start; `None` for zero.
        space: Where norms and inner products are taken.
        norm: ‖b‖.
        scale: What b was divided by.
        eps: What a product can resolve.
        precondition: The product with P ≈ A⁻¹; `None` for none.
    """

    matvec: MatVec
    product: MatVec
    b: PyTree
    x0: PyTree | None
    space: Space
    norm: jax.Array
    scale: jax.Array
    eps: float
    precondition: MatVec | None = None

    def residual(self, x: PyTree) -> PyTree:
        return tree.sub(self.b, self.product(x))

    def residual_norm(self, x: PyTree) -> jax.Array:
        return self.space.size(self.residual(x))

    def measured(self, stop: Stopping, x: PyTree, r: PyTree) -> Measured:
        """The residual r of x against what `stop` asks for and what is rounding.

        Over all leaves it is held to max(rtol ‖b‖, atol). A leaf on a small scale of its own must not
        hide behind the others: in each the residual is held to rtol times what b and x have there.
        """
        stop = stop._replace(atol=jnp.asarray(stop.atol, self.scale.dtype) / self.scale)
        norm, entries = self.space.norm(r), self.space.entries
        scales = jnp.maximum(entries(self.b), entries(x))
        tolerance = joint_tolerance(stop, norm, self.norm, entries(r), scales)
        floor = self.floor(x)
        return Measured(norm, tolerance, floor, norm <= floor)

    def floor(self, x: PyTree) -> jax.Array:
        # ‖b − Ax‖ at rounding, where ‖A‖ ≤ 2 for the contractions of this library.
        return of_product(self.eps) * (self.norm + 2 * self.space.norm(x))

    def steps_status(self, residual: jax.Array, start: jax.Array, x: PyTree) -> jax.Array:
        """The status of exact steps that ended in x, by the residual norms there and at the start."""
        # As large as x = x₀ leaves it, but for rounding: these steps have led nowhere.
        idle = (residual >= (1 - of_product(self.eps)) * start) & (residual > self.floor(x))
        return status_where(idle, Status.NO_PROGRESS, Status.FIXED_STEPS)

    @property
    def noise(self) -> float:
        """The share of ‖b‖ that may be rounding before x means nothing."""
        return max(0.01, min(0.5, COMPUTATION * self.eps))

    def fixed(
        self,
        num_steps: Scalar,
        x: PyTree,
        status: jax.Array | Status,
        residual: jax.Array | None = None,
    ) -> SolveInfo:
        """The verdict on a solve without a tolerance; `status` says what else was seen."""
        sane = jnp.isfinite(self.space.norm(x)) | (status == int(Status.SINGULAR))
        status = status_where(sane & jnp.isfinite(self.norm), status, Status.NON_FINITE)
        residual = self.residual_norm(x) if residual is None else residual
        return solve_info(num_steps, residual, status)

    def judge(self, info: SolveInfo) -> SolveInfo:
        """The verdict on a solve with a tolerance, given that of its iteration.

        A residual of the size of b at the floor: x is so large that it lies along a null vector of A.
        """
        at_floor = info.status == int(Status.AT_FLOOR)
        lost = at_floor & ~(info.residual <= self.noise * self.norm)
        status = status_where(lost, Status.SINGULAR, info.status)
        return solve_info(info.num_steps, info.residual, status, info.tolerance)


class Correction(NamedTuple):
    """d ≈ A⁻¹ r, the steps taken, and how it ended."""

    d: PyTree
    steps: jax.Array | int
    status: jax.Array | Status


def from_the_right(correct: Callable) -> Callable:
    """The method on A P y = r, for d = P y."""

    def preconditioned(system: System, *args: Any) -> Correction:
        precondition = system.precondition
        if precondition is None:
            return correct(system, *args)
        at = system._replace(product=lambda u: system.product(precondition(u)), precondition=None)
        done = correct(at, *args)
        return done._replace(d=precondition(done.d))

    return preconditioned


def corrected(stop: Stopping, correct: Callable, reduction: float = 0.5) -> Callable:
    """A solve by corrections x ← x + d, d ≈ A⁻¹ (b − A x), each from the true residual.

    A recurrence for the residual drifts from the true one. So the true one is computed when the
    recurrence has met the tolerance, and the method starts again from there for as long as that
    still brings the residual down by the factor `reduction`: this is iterative refinement, and it
    decides on true residuals only.
    """

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        if system.x0 is None:
            x, r, start = tree.zeros_like(system.b), system.b, system.norm
        else:
            x, r = system.x0, system.residual(system.x0)
            start = system.space.norm(r)
        if stop.num_steps is not None:
            done = correct(system, r, stop.num_steps, jnp.zeros_like(start))
            x = tree.add(x, done.d)
            return x, system.fixed(done.steps, x, done.status)

        def unfinished(carry: Any) -> jax.Array:
            _, _, measured, before, steps, status = carry
            gains = (measured.sizes <= reduction * before) & ~is_failure(status)
            return ~measured.met & jnp.any(gains) & (steps < stop.max_steps)

        def cycle(carry: Any) -> Any:
            x, r, measured, _, steps, status = carry
            # Where one leaf is behind, all have to shrink; below a share of the floor none can.
            least = jnp.maximum(measured.tolerance, measured.floor / 64)
            done = correct(system, r, stop.max_steps - steps, least)
            proposed = tree.add(x, done.d)
            left = system.residual(proposed)
            now = system.measured(stop, proposed, left)
            status = status_where(jnp.isfinite(now.norm), done.status, Status.NON_FINITE)
            better = now.norm < measured.norm
            x, r, now = tree.where(better, (proposed, left, now), (x, r, measured))
            return x, r, now, measured.sizes, steps + done.steps, status

        measured = system.measured(stop, x, r)
        infinite = jnp.full_like(measured.sizes, jnp.inf)
        carry = x, r, measured, infinite, jnp.int32(0), jnp.int32(Status.FIXED_STEPS)
        x, _, measured, _, steps, status = lax.while_loop(unfinished, *steady(cycle, carry))
        info = system.judge(verdict(steps, measured, start))
        # A breakdown explains a missed tolerance; it does not matter where the tolerance is met.
        explained = is_failure(info.status) & is_failure(status)
        status = status_where(explained, status, info.status)
        return x, solve_info(steps, info.residual, status, info.tolerance)

    return solve


def linear_solver(
    where: str,
    solve: Callable[[System], tuple[PyTree, SolveInfo]],
    *,
    scaled: bool = True,
    normalised: bool = True,
    direct: bool = False,
    preconditioner: Any = None,
    ridge: Scalar = 0.0,
) -> LinearSolver:
    """The common frame of all solvers: the real form, and zero for a zero right-hand side.

    `scaled` is for solvers that square the entries of b, `direct` for those that cannot solve a system
    which collectives spread over a mapped axis. With a ridge ρ the system is (I − M + ρI) x = b.
    `normalised` is for those that need ‖I − M‖ to be about 1, as it is for a contraction: where I − M
    is of any scale it is divided by that.
    """
    check_preconditioner(where, preconditioner)
    check_number(where, "ridge", ridge, lambda x: 0 <= x < jnp.inf, "a finite number >= 0")

    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        check_callable(where, "matvec", matvec, "matvec(x) -> M x")
        check_inexact(where, "b", b)
        m = jacobian(matvec)
        known, image, jaxpr = traced_once(m.known, b)
        check_same(where, image, b, "`matvec(b)`", "`b`")
        m = m.replaced(known)
        if x0 is not None:
            check_same(where, x0, b, "`x0`", "`b`")
        if not sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: b))):  # Nothing to solve.
            return b, solve_info(0, jnp.zeros((), real_dtype(b)), Status.CONVERGED)
        to_real, from_real = realified(b)
        real, space = to_real(b), Space.of(jaxpr, b)
        if direct and any(space.axes):
            names = ", ".join(f"`{name}`" for name in space.together)
            raise TypeError(
                f"`{where}` solves one system on its own, but a collective over {names} makes one of "
                "all those along it; take `cg`, `gmres`, `bicgstab`, `normal_cg` or `fp`, whose inner "
                "products go over it too."
            )
        scale = power_of_two(real, space.together) if scaled else jnp.ones((), real_dtype(b))
        real = tree.scale(1 / scale, real)
        norm = space.norm(real) if scaled else space.size(real)
        matvec, product = in_real_form(m, to_real, from_real, ridge)
        of_x, precondition = scale, None
        if preconditioner is not None:
            precondition = applied(preconditioner, m, product, b, real, space, to_real, from_real)
        if normalised and m.any_scale:  # With A/u, u = ‖A‖, the solution is that of A times u.
            size = _size(product, real, space)
            of_x = scale / size
            divided = product = _times(1 / size, product)
            matvec = lambda u: tree.sub(u, divided(u))  # noqa: E731
            precondition = precondition and _times(size, precondition)
        start = None
        if x0 is not None:
            start = tree.where(norm > 0, tree.scale(1 / of_x, to_real(x0)), tree.zeros_like(real))

        system = System(
            matvec, product, real, start, space, norm, scale, resolution(b), precondition
        )
        x, info = solve(system)
        info = info._replace(residual=info.residual * scale, tolerance=info.tolerance * scale)
        return from_real(tree.scale(of_x, x)), info

    return solver


def _size(product: MatVec, like: PyTree, space: Space) -> jax.Array:
    """About ‖A‖, as a power of two: what A makes of a vector of signs as if at random."""
    signs = random_signs(like)
    size = space.size(product(signs)) / space.norm(signs)
    return power_of_two(jnp.where(jnp.isfinite(size), size, 1.0))


def _times(factor: jax.Array, product: MatVec) -> MatVec:
    return lambda u: tree.scale(factor, product(u))


def in_real_form(
    m: Jacobian,
    to_real: Callable[[PyTree], PyTree],
    from_real: Callable[[PyTree], PyTree],
    ridge: Scalar,
) -> tuple[MatVec, MatVec]:
    """Products with M − ρI and with A = I − M + ρI."""

    def real_form(product: MatVec) -> MatVec:
        return lambda u: to_real(product(from_real(u)))

    of_m = real_form(m.product)
    # Subtracted in the real form, which may be wider.
    of_a = real_form(m.complement) if m.complement else (lambda u: tree.sub(u, of_m(u)))
    if not isinstance(ridge, Tracer) and float(ridge) == 0:
        return of_m, of_a

    def plus(product: MatVec, sign: float) -> MatVec:
        return lambda u: jax.tree.map(
            lambda a, x: a + jnp.asarray(sign * ridge, x.dtype) * x, product(u), u
        )

    return plus(of_m, -1.0), plus(of_a, 1.0)


class Kept(NamedTuple):
    """The state of a preconditioner from update to update.

    Attributes:
        state: Of the preconditioner, made from products with Jᵀ.
        uses: Solves that it has served; 0 before it is made.
        first: The steps of the first of them.
        last: The steps of the last of them.
    """

    state: PyTree
    uses: jax.Array
    first: jax.Array
    last: jax.Array

    def due(self, every: int) -> jax.Array:
        """Whether it is to be made anew."""
        return (self.uses == 0) | (self.uses >= every) | (self.last > 2 * self.first + 1)


class Reusable(NamedTuple):
    """A linear solver whose preconditioner somebody keeps: made for one system, used for others.

    Attributes:
        linear_solver: The solver.
        preconditioner: What it makes for each system anew, by itself.
    """

    linear_solver: Tunable
    preconditioner: Preconditioner

    @classmethod
    def of(cls, linear_solver: object) -> "Reusable | None":
        """`None` for a solver that makes none."""
        if not isinstance(linear_solver, Tunable):
            return None
        preconditioner = linear_solver.options.get("preconditioner")
        if not isinstance(preconditioner, Preconditioner):
            return None
        return cls(linear_solver, preconditioner)

    def state(self, matvec: MatVec, b: PyTree) -> PyTree:
        """The state of the preconditioner for this system."""
        m = jacobian(matvec)
        known, _, jaxpr = traced_once(m.known, b)
        to_real, from_real = realified(b)
        ridge = self.linear_solver.options.get("ridge", 0.0)
        _, product = in_real_form(m.replaced(known), to_real, from_real, ridge)
        return self.preconditioner.build(product, to_real(b), Space.of(jaxpr, b))

    def using(self, state: PyTree, *, transposed: bool) -> LinearSolver:
        """The solver with the preconditioner of this state; of a system with Jᵀ, or with J."""
        built = Built(self.preconditioner, state, transposed)
        return self.linear_solver.replaced(preconditioner=built)
