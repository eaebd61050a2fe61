"""Solvers that are not made here: `with_tolerance`, `from_optimistix`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..compiled import Compiled
from ..errors import check_callable, check_count, check_inexact, show
from ..failure import check_on_failure
from ..iteration import stopping, verdict
from ..leaves import SOLVED, eval_shape, stopped_by_residual, strongly_typed
from ..maps import gradient_descent
from ..printing import printed
from ..problem import Equation
from ..real_form import norm
from ..signatures import same_arguments
from ..types import (
    OnFailure,
    Phi,
    PyTree,
    ResidualMap,
    Scalar,
    SolveInfo,
    Solver,
    Status,
    solve_info,
    status_where,
)
from .solver import CheckedSolver, lower_level

tree = optax.tree


@printed
def with_tolerance(
    solver: Solver,
    phi: Phi,
    *,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Any solver, held to a tolerance: ‖Φ(w) − w‖ ≤ max(rtol ‖Φ(w)‖, atol) at the w it returns.

    For solvers that do not say whether they succeeded: a `while_loop` of your own, optax, SciPy. The
    solver may have nothing to do with Φ but the fixed point. Without a tolerance w must be a fixed
    point to rounding.

    Assumed, not checked: that a small residual is a small error. For a contraction with constant q,
    ‖w − w(λ)‖ ≤ ‖Φ(w) − w‖/(1 − q).

    Cost: one Φ. Memory: one w.
    When not to use it: on `picard` and `anderson` with a tolerance, which say it themselves, and
    whose info would be lost; on a few steps that are meant to be few, which would count as a
    failure.

    Args:
        solver: `solver(w0, *args, **kwargs) -> w`.
        phi: The map whose fixed point the solver should have found.
        rtol: Relative tolerance on the residual.
        atol: Absolute tolerance on the residual.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver with `with_info`; `info.num_steps` is 0, since nobody knows it.

    Raises:
        TypeError: `solver` or `phi` is not callable, or the two name their parameters in another
            order or with other defaults; when called, Φ(w) does not look like w.
        ValueError: `rtol` is not in [0, 1), `atol` is negative or not finite, or `on_failure` is
            none of the four.

    >>> solver = with_tolerance(lambda w0, lam: w0 + lam, lambda w, lam: 0.5 * w + lam, rtol=1e-6)
    >>> w, info = solver.with_info(0.0, 1.0)
    >>> bool(info.converged), float(info.residual)
    (False, 0.5)
    """
    check_callable("with_tolerance", "solver", solver, "solver(w0, *args) -> w")
    check_callable("with_tolerance", "phi", phi, "phi(w, *args) -> w")
    check_on_failure("with_tolerance", on_failure)
    stop = stopping("with_tolerance", None, 1, rtol, atol)
    check = same_arguments("with_tolerance", phi, solver)

    def with_info(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        check(args, kwargs)
        w = solver(w0, *args, **kwargs)
        lower = lower_level("with_tolerance", phi, w, args, kwargs, SOLVED)
        measured = lower.measured(stop, lower.w0, lower.phi(lower.w0), nudged=True)
        return w, verdict(0, measured, jnp.full_like(measured.norm, jnp.inf))

    return CheckedSolver(with_info, on_failure, phi)


@printed
def from_optimistix(
    function: Callable[..., PyTree],
    solver: Any,
    *,
    max_steps: int,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Any solver of the package optimistix, such as `optimistix.Newton(1e-8, 1e-8)`.

    What the function is depends on the solver: Φ for one of fixed points, F for a root finder
    (Φ = w − F), the loss for a minimiser, the residuals for one of least squares.

    Assumed, not checked: that the solver's own test, which looks at its last step, has found a fixed
    point of the Φ that the derivative is of; `with_tolerance` looks at the residual.

    Cost: the solver's, and one evaluation for the residual in the info. Memory: the solver's.
    Not for `itd`: the steps are not differentiated. Where `newton`, `broyden`, `anderson` or
    `from_optax` will do, their status says more.

    Args:
        function: `function(w, *args, **kwargs)`, of the solver's kind.
        solver: A solver of optimistix, with its tolerances.
        max_steps: At most that many of its steps.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls where it did not succeed.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`; the residual in its info
        is ‖Φ(w) − w‖, ‖F(w)‖ or the norm of the gradient of the loss.

    Raises:
        ImportError: Where optimistix is not installed; the extra `optimistix` installs it.
        TypeError: `function` is not callable, or `solver` no solver of optimistix; where JAX
            differentiates the steps, as `itd` asks for.
        ValueError: `max_steps` is not a positive integer.

    >>> import optimistix  # The extras `optimistix` and `test` install it.
    >>> newton = optimistix.Newton(rtol=1e-9, atol=1e-9)
    >>> solver = from_optimistix(lambda w, lam: w**2 - lam, newton, max_steps=50)
    >>> w, info = solver.with_info(1.0, 2.0)
    >>> round(float(w), 9), bool(info.converged)
    (1.414213562, True)

    References:
        Rader, Lyons, Kidger, Optimistix: modular optimisation in JAX and Equinox, 2024.
    """
    import optimistix as optx  # An optional package, needed by nobody else.

    check_callable("from_optimistix", "function", function, "function(w, *args) -> value")
    check_count("from_optimistix", "max_steps", max_steps)
    check_on_failure("from_optimistix", on_failure)

    def squares(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> jax.Array:
        return 0.5 * norm(function(w, *args, **kwargs)) ** 2

    def root(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return tree.sub(w, function(w, *args, **kwargs))

    kinds: list[tuple[Any, Any, Callable[[], Phi]]] = [
        (optx.AbstractFixedPointSolver, optx.fixed_point, lambda: function),
        (optx.AbstractRootFinder, optx.root_find, lambda: ResidualMap(root, function)),
        (optx.AbstractMinimiser, optx.minimise, lambda: gradient_descent(function, step_size=1.0)),
        (
            optx.AbstractLeastSquaresSolver,
            optx.least_squares,
            lambda: gradient_descent(squares, step_size=1.0),
        ),
    ]
    found = [(run, make_phi) for kind, run, make_phi in kinds if isinstance(solver, kind)]
    if not found:
        raise TypeError(
            f"`solver` of `from_optimistix` must be a solver of optimistix, got {show(solver)}; make "
            "one, as in `optimistix.Newton(rtol=1e-8, atol=1e-8)`."
        )
    run, make_phi = found[0]
    phi = make_phi()

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        check_inexact("from_optimistix", "w0", w0)
        w0 = strongly_typed(w0, eval_shape(phi, w0, *args, **kwargs))
        equation = Equation.of("from_optimistix", phi, w0, (), lambda _: (args, kwargs), "`w0`")
        solution = run(
            lambda w, call: function(w, *call[0], **call[1]),
            solver,
            w0,
            (args, kwargs),
            max_steps=max_steps,
            throw=False,
        )
        w = solution.value
        residual = equation.space(w).size_of(equation.residual(w, ()))
        succeeded = solution.result == optx.RESULTS.successful
        status = status_where(succeeded, Status.CONVERGED, Status.MAX_STEPS)
        status = status_where(jnp.isfinite(residual), status, Status.NON_FINITE)
        info = solve_info(solution.stats.get("num_steps", 0), residual, status)
        return stopped_by_residual("from_optimistix", w), info

    return CheckedSolver(solve, on_failure, phi)
