"""`jaxopt.linear_solve`: A x = b from products with A, by the linear solvers of this library.

Each function returns x alone, and NaN where the solve failed; `jax.scipy`, which jaxopt calls, returns
what it has. As the `solve` of a decorator it obeys the decorator's `on_failure` instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..errors import check_callable, check_same
from ..failure import STAGE, Policy, enforce
from ..leaves import alike
from ..linear import bicgstab, cg, dense, gmres, normal_cg
from ..linear.implicit import implicit_solve
from ..real_form import norm, of_product, real_size, resolution
from ..types import (
    Jacobian,
    LinearSolver,
    MatVec,
    PyTree,
    Scalar,
    SolveInfo,
    Status,
    jacobian,
    solve_info,
    status_where,
)

tree = optax.tree


def solve_lu(matvec: MatVec, b: PyTree, ridge: Scalar | None = None) -> PyTree:
    """A x = b by LU decomposition: `fixedgrad.dense`.

    Cost: d products, in blocks, and ⅔ d³ operations for d real unknowns. Memory: 2 d² numbers.
    When not to use it: above 4096 unknowns, where it refuses.

    Args:
        matvec: u ↦ A u.
        b: A pytree.
        ridge: ρ: the system is (A + ρI) x = b; `None` for 0.

    Returns:
        x, like b.

    >>> solve_lu(lambda u: 2.0 * u, jnp.array([1.0, 3.0]))
    Array([0.5, 1.5], dtype=float64)
    """
    return solved(_elimination(ridge), matvec, b)


def solve_cholesky(matvec: MatVec, b: PyTree, ridge: Scalar | None = None) -> PyTree:
    """As `solve_lu`, also for an A that is not positive definite."""
    return solve_lu(matvec, b, ridge)


def solve_inv(matvec: MatVec, b: PyTree, ridge: Scalar | None = None) -> PyTree:
    """As `solve_lu`, which is more accurate than a product with the inverse."""
    return solve_lu(matvec, b, ridge)


def solve_qr(matvec: MatVec, b: PyTree, ridge: Scalar | None = None) -> PyTree:
    """As `solve_lu`."""
    return solve_lu(matvec, b, ridge)


def solve_cg(
    matvec: MatVec,
    b: PyTree,
    ridge: Scalar | None = None,
    init: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """A x = b by conjugate gradients, A symmetric and positive definite: `fixedgrad.cg`.

    Cost: one product a step. Memory: 7 vectors.
    When not to use it: for another A, which it reports where it sees it.

    Args:
        matvec: u ↦ A u.
        b: A pytree.
        ridge: ρ: the system is (A + ρI) x = b; `None` for 0.
        init: Where x starts; `None` for zero.
        **options: `tol` (1e-5) and `atol` (0), tolerances on the residual relative to ‖b‖ and absolute;
            `maxiter`, by default ten times the unknowns; `M`, u ↦ M u with M ≈ A⁻¹.

    Returns:
        x, like b.

    >>> solve_cg(lambda u: jnp.array([2.0, 4.0]) * u, jnp.array([1.0, 3.0]), tol=1e-9)
    Array([0.5 , 0.75], dtype=float64)
    """
    return solved(_conjugate(ridge, **options), matvec, b, init)


def solve_normal_cg(
    matvec: MatVec,
    b: PyTree,
    ridge: Scalar | None = None,
    init: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """AᵀA x = Aᵀb by conjugate gradients, for any A: `fixedgrad.normal_cg`.

    With a ridge or `M`, or for an A that is not square, tolerances are those of (AᵀA + ρI) x = Aᵀb, as
    in jaxopt; else they are those of A x = b.

    Cost: two products a step. Memory: 8 vectors.
    When not to use it: where `solve_cg`, `solve_gmres` or `solve_lu` does; it squares the condition.

    Args:
        matvec: u ↦ A u.
        b: A pytree.
        ridge: ρ: the system is (AᵀA + ρI) x = Aᵀb; `None` for 0.
        init: Where x starts; `None` for zero. It has the structure of x, where A is not square.
        **options: As in `solve_cg`, with M ≈ (AᵀA)⁻¹.

    Returns:
        x, like `init`.
    """
    return solved(_normal(ridge, **options), matvec, b, init)


def solve_gmres(
    matvec: MatVec,
    b: PyTree,
    ridge: Scalar | None = None,
    init: PyTree | None = None,
    tol: Scalar = 1e-5,
    **options: Any,
) -> PyTree:
    """A x = b by restarted GMRES: `fixedgrad.gmres`.

    Cost: one product a step. Memory: `restart` + 4 vectors.
    When not to use it: where it stagnates for its restarts, which it says; `solve_lu` does not.

    Args:
        matvec: u ↦ A u.
        b: A pytree.
        ridge: ρ: the system is (A + ρI) x = b; `None` for 0.
        init: Where x starts; `None` for zero.
        tol: Tolerance on the residual relative to ‖b‖.
        **options: `atol`, `M` as in `solve_cg`; `restart` (20), the steps in one cycle; `maxiter`, the
            number of cycles.

    Returns:
        x, like b.
    """
    return solved(_restarted(ridge, tol=tol, **options), matvec, b, init)


def solve_bicgstab(
    matvec: MatVec,
    b: PyTree,
    ridge: Scalar | None = None,
    init: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """A x = b by BiCGStab, for any invertible A: `fixedgrad.bicgstab`.

    Cost: two products a step. Memory: 10 vectors.
    When not to use it: for a nearly skew-symmetric A; `solve_gmres`.

    Args:
        matvec: u ↦ A u.
        b: A pytree.
        ridge: ρ: the system is (A + ρI) x = b; `None` for 0.
        init: Where x starts; `None` for zero.
        **options: As in `solve_cg`.

    Returns:
        x, like b.
    """
    return solved(_stabilised(ridge, **options), matvec, b, init)


def _elimination(ridge: Scalar | None = None) -> LinearSolver:
    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        m, shift = jacobian(matvec), ridge
        if shift is not None:
            a = m.a
            m = m.with_complement(lambda u: tree.add_scale(a(u), shift, u))
        return dense()(m, b, x0)

    return solver


def _krylov(
    method: Callable[..., LinearSolver],
    ridge: Scalar | None = None,
    *,
    tol: Scalar = 1e-5,
    atol: Scalar = 0.0,
    maxiter: int | None = None,
    M: MatVec | None = None,
    steps: int = 1,
) -> LinearSolver:
    """A Krylov method with the options of `jax.scipy`; `steps` are those of one of its iterations."""

    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        m = jacobian(matvec)
        max_steps = steps * (10 * max(real_size(b), 1) if maxiter is None else maxiter)
        made = method(
            max_steps=max_steps,
            rtol=tol,
            atol=atol,
            ridge=0.0 if ridge is None else ridge,
            preconditioner=M,
        )
        # In jaxopt M is for the system that is solved, be that of Aᵀ.
        return made(m._replace(transposed=False) if M is not None else m, b, x0)

    return solver


_conjugate = functools.partial(_krylov, cg)
_stabilised = functools.partial(_krylov, bicgstab)


def _restarted(ridge: Scalar | None = None, *, restart: int = 20, **options: Any) -> LinearSolver:
    return _krylov(functools.partial(gmres, restart=restart), ridge, steps=restart, **options)


def _normal(ridge: Scalar | None = None, **options: Any) -> LinearSolver:
    by_residual = _krylov(normal_cg, **options)
    by_gradient = _krylov(cg, ridge, **options)

    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        like = b if x0 is None else x0
        if ridge is None and options.get("M") is None and alike(like, b):
            return by_residual(matvec, b, x0)
        a = jacobian(matvec).a

        def adjoint(u: PyTree) -> PyTree:
            conjugated = functools.partial(jax.tree.map, jnp.conj)
            return conjugated(jax.linear_transpose(a, like)(conjugated(u))[0])

        product = lambda u: adjoint(a(u))  # noqa: E731
        return by_gradient(Jacobian.from_complement(product, any_scale=True), adjoint(b), x0)

    return solver


LINEAR_SOLVERS: dict[Callable[..., PyTree], Callable[..., LinearSolver]] = {
    solve_lu: _elimination,
    solve_cholesky: _elimination,
    solve_inv: _elimination,
    solve_qr: _elimination,
    solve_cg: _conjugate,
    solve_normal_cg: _normal,
    solve_gmres: _restarted,
    solve_bicgstab: _stabilised,
}
"""From the functions of this module to the solvers that they run, which tell how they ended."""


def from_solve(where: str, solve: Callable[..., PyTree]) -> LinearSolver:
    """The linear solver that a function `x = solve(matvec, b)` is, `matvec` the product with A.

    One of this module, or a `functools.partial` of it, tells how it ended. A function of the user's is
    asked for no more than to have brought the residual down.
    """
    check_callable(where, "solve", solve, "solve(matvec, b) -> x")
    function, args, options = solve, (), {}
    if isinstance(solve, functools.partial):
        function, args, options = solve.func, solve.args, solve.keywords
    if function in LINEAR_SOLVERS and not args and "init" not in options:
        return LINEAR_SOLVERS[function](**options)

    def solver(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        del x0
        a = jacobian(matvec).a
        x = solve(a, b)
        check_same(where, x, b, "`solve(matvec, b)`", "`b`")
        size, residual = norm(b), norm(tree.sub(b, a(x)))
        idle = (residual >= (1 - of_product(resolution(b))) * size) & (size > 0)
        status = status_where(idle, Status.NO_PROGRESS, Status.FIXED_STEPS)
        finite = jnp.isfinite(residual)
        return x, solve_info(0, residual, status_where(finite, status, Status.NON_FINITE))

    return solver


def solved(
    linear_solver: LinearSolver,
    matvec: MatVec,
    b: PyTree,
    init: PyTree | None = None,
    *,
    transposed: bool = False,
) -> PyTree:
    """X, or NaN where the solve failed; differentiable like the solution of the system."""
    b = jax.tree.map(jnp.asarray, b)
    policy = Policy("nan")
    system = Jacobian.from_complement(matvec, transposed, any_scale=True)
    if init is not None and not alike(init, b):  # Not square: its steps are differentiated.
        x, info = linear_solver(system, b, init)
    else:
        x, info = implicit_solve(policy, linear_solver, system, b, init)
    return enforce(policy, STAGE, info, x)
