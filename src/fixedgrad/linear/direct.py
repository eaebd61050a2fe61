"""A direct solve of (I − M) x = b, `dense`, and the solvers of lineax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ..errors import check_count, show
from ..printing import printed
from ..real_form import COMPUTATION, norm, random_signs
from ..types import LinearSolver, MatVec, PyTree, SolveInfo, Status, solve_info, status_where
from .elimination import Factors, eliminated, solved
from .preconditioner import Preconditioner, materialised
from .system import System, linear_solver, tree
from .tunable import Tunable


@printed
def dense(*, max_size: int = 4096, block_size: int = 128) -> LinearSolver:
    """A direct solve: I − M as a matrix, by products with blocks of unit vectors, then LU.

    Cost: d products, in blocks of `block_size` (a blocked product costs a small fraction of single
    ones), one more for the residual, and ⅔ d³ operations. Memory: 2 d² numbers, the matrix and its
    factors (for complex w with 2d in the place of d).
    Nearly always right for d ≤ 64, often up to d ≈ 2000. Not for large d: refused above `max_size`.
    Nor for an x that is sharded in its type (an explicit mesh).
    Assumed, not checked: `matvec` works under `vmap`, by which a block of products is taken.

    Args:
        max_size: The largest number of real unknowns that is accepted.
        block_size: Unit vectors in one product.

    Returns:
        A `LinearSolver`; its status is `SINGULAR` where I − M is singular to working precision.

    Raises:
        ValueError: For counts that are not positive integers; at trace time, for more than
            `max_size` unknowns.

    >>> import jax.numpy as jnp
    >>> m = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
    >>> x, info = dense()(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 12)
    Array([ 0.8, -0.4], dtype=float64)

    References:
        Golub, Van Loan, Matrix Computations, 4th edition, 2013, section 3.4 (LU with pivoting) and
        3.5 (its accuracy).
    """
    check_count("dense", "max_size", max_size)
    check_count("dense", "block_size", block_size)

    def eliminated_beside(
        system: System, beside: Callable[[jax.Array], list[jax.Array]]
    ) -> tuple[jax.Array, Factors, Callable[[jax.Array], PyTree]]:
        """A, its elimination with b and what is `beside`, and how a column is a pytree."""
        b, unravel = ravel_pytree(system.b)
        if b.size > max_size:
            raise ValueError(
                f"`dense` would materialise a {b.size} by {b.size} matrix, more than its "
                f"`max_size`={max_size}; use `cg`, `gmres` or `fp`, or raise `max_size`."
            )
        matrix = materialised(system.product, b, unravel, block_size)
        return matrix, eliminated(matrix, jnp.stack([b, *beside(b)], axis=1)), unravel

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        matrix, done, unravel = eliminated_beside(system, lambda b: [random_signs(b)])
        solution = solved(done)
        x, u = solution.T
        # Here b is of usual size, and so is what can be told from x and u; else these are infinite.
        size_x, size_u = jnp.sqrt(jnp.sum(solution * solution, axis=0))
        size = jnp.sqrt(jnp.sum(matrix * matrix))
        # eps ‖A‖ ‖x‖ is the backward error of LU; where it is as large as b, x means nothing.
        noise = system.eps * size * size_x
        singular = ~(noise < system.noise * system.norm) & (system.norm > 0)
        # A b that lies in the range of a singular A tells nothing of it, and x has any part along its
        # null vector. A⁻¹u is close to that, and ‖A⁻ᵀ A⁻¹u‖/‖A⁻¹u‖ to ‖A⁻¹‖: A has an equal of lower
        # rank within rounding.
        singular |= ~(system.eps * size * done.transposed_size(u / size_u) < 0.05)
        x = unravel(x)
        residual = system.space.norm(system.residual(x))
        singular |= residual > system.noise * system.norm
        singular &= jnp.isfinite(size)
        status = status_where(singular, Status.SINGULAR, Status.CONVERGED)
        return x, system.fixed(1, x, status, residual)

    def step(system: System) -> tuple[PyTree, SolveInfo]:
        _, done, unravel = eliminated_beside(system, lambda _: [])
        return unravel(solved(done)[:, 0]), solve_info(
            1, jnp.zeros_like(system.norm), Status.CONVERGED
        )

    options = {"max_size": max_size, "block_size": block_size}
    judged, unjudged = (linear_solver("dense", f, direct=True) for f in (solve, step))
    return Tunable(judged, dense, options, unjudged)


@printed
def from_lineax(
    solver: Any, *, preconditioner: Preconditioner | MatVec | None = None
) -> LinearSolver:
    """Any solver of the package lineax, such as `lineax.GMRES(1e-6, 1e-6)`, as a `LinearSolver`.

    lineax gets I − M as a `FunctionLinearOperator` on the real form of b.

    Cost: the solver's products (d for a direct one, such as `lineax.LU`), and two more, for the
    residuals of the start and of the result. Memory: the solver's.
    Not for solvers that need to be told a structure, such as `lineax.Cholesky` or
    `lineax.Diagonal`: the operator has no tags, and lineax refuses. Nor where Φ holds collectives
    in a `shard_map`, which JAX refuses. Where one of `fp`, `cg`, `gmres`, `bicgstab`, `dense` will
    do, its status says more.
    Assumed, not checked: for `lineax.CG`, that I − M is positive semidefinite, as it is tagged
    then; only the residual of the result is looked at. A residual at rounding says nothing of the
    error of x where I − M is close to singular.

    Args:
        solver: A `lineax.AbstractLinearSolver` for square operators.
        preconditioner: P ≈ (I − J)⁻¹ for `lineax.CG`, `lineax.GMRES` or `lineax.BiCGStab`, as in `cg`.

    Returns:
        A `LinearSolver`. It has converged where the residual, computed here, is within ten times what
        the solver's `rtol` and `atol` ask for, or at rounding, and below ‖b‖. A direct solver is held
        to the rounding of a backward-stable solve, as `dense` is: `SINGULAR` where that means nothing.

    Raises:
        ImportError: Where lineax is not installed; the extra `lineax` installs it.
        TypeError: `solver` is not a solver of lineax, or not one that takes the preconditioner.

    >>> import jax.numpy as jnp
    >>> import lineax  # The extras `lineax` and `test` install it.
    >>> m = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
    >>> solver = from_lineax(lineax.GMRES(rtol=1e-9, atol=1e-9))
    >>> x, info = solver(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 8)
    Array([ 0.8, -0.4], dtype=float64)

    References:
        Rader, Lyons, Kidger, Lineax: unified linear solves and linear least-squares in JAX and
        Equinox, 2023.
    """
    import lineax  # An optional package, needed by nobody else.

    if not isinstance(solver, lineax.AbstractLinearSolver):
        raise TypeError(
            f"`solver` of `from_lineax` must be a `lineax.AbstractLinearSolver`, got {show(solver)}; "
            "make one, as in `lineax.GMRES(rtol=1e-6, atol=1e-6)`."
        )

    inner: Any = getattr(solver, "inner_solver", solver)
    iterative = hasattr(inner, "rtol")

    if preconditioner is not None and not isinstance(
        solver, lineax.CG | lineax.GMRES | lineax.BiCGStab
    ):
        raise TypeError(
            "`from_lineax` has a `preconditioner` for `CG`, `GMRES` and `BiCGStab`, got "
            f"{show(solver)}."
        )

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        structure = jax.eval_shape(lambda: system.b)
        tags = (lineax.positive_semidefinite_tag,) if isinstance(solver, lineax.CG) else ()
        operator = lineax.FunctionLinearOperator(system.product, structure, tags)
        b, unravel, size = system.b, lambda x: x, jnp.asarray(jnp.nan)
        if not iterative:  # It would make the matrix anyway; here its norm is seen too.
            matrix = operator.as_matrix()
            b, unravel = ravel_pytree(b)
            operator, size = lineax.MatrixLinearOperator(matrix), jnp.linalg.norm(matrix)
        options: dict[str, Any] = {}
        if iterative and system.x0 is not None:
            options["y0"] = system.x0
        if system.precondition is not None:
            options["preconditioner"] = lineax.FunctionLinearOperator(
                system.precondition, structure, tags
            )
        solution = lineax.linear_solve(operator, b, solver, options=options, throw=False)
        ok = solution.result == lineax.RESULTS.successful
        steps = solution.stats.get("num_steps", 1)
        # Iterative solvers of lineax answer a residual of 0 with 0/0, and call some breakdowns a
        # success: a start that solves the system, and zero for b = 0, is the answer itself.
        start = tree.zeros_like(system.b) if system.x0 is None else system.x0
        solved = system.residual_norm(start) <= system.floor(start)
        x = tree.where(solved, start, unravel(solution.value))
        residual = system.residual_norm(x)
        # eps ‖A‖ ‖x‖ is the backward error of a direct solve, and the rounding of any product; where it
        # is as large as b, x means nothing. ‖A‖ ≤ 2 for contractions, of which there is no matrix here.
        rounding = system.eps * (2.0 if iterative else size) * norm(x)
        lost = ~(rounding < system.noise * system.norm) & ~solved
        if iterative:
            # Its tolerances are meant entry by entry; ten times that, over all entries, is a miss. So
            # is x = 0, whose residual is b.
            entries = sum(leaf.size for leaf in jax.tree.leaves(system.b))
            asked = system.norm * inner.rtol + entries**0.5 * inner.atol
            least = jnp.minimum(system.floor(x), system.eps**0.5 * system.norm)
            limit = jnp.maximum(jnp.where(ok, 10 * asked, 0.0), least)
            limit = jnp.minimum(limit, (1 - system.noise) * system.norm)
            status = status_where(lost, Status.MAX_STEPS, Status.CONVERGED)
        else:
            limit = COMPUTATION * (system.eps * system.norm + rounding)
            limit = jnp.minimum(limit, system.noise * system.norm)
            status = status_where(lost & jnp.isfinite(size), Status.SINGULAR, Status.CONVERGED)
        missed = ~(residual <= limit) & ~solved & (status == int(Status.CONVERGED))
        status = status_where(missed, Status.MAX_STEPS, status)
        return x, system.fixed(steps, x, status)

    return linear_solver(
        "from_lineax", solve, scaled=False, direct=True, preconditioner=preconditioner
    )
