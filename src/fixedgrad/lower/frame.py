"""What all lower-level solvers share: info, the residual ‖Φ(w) − w‖, the verdict."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..failure import enforce
from ..packing import check_arrays, check_phi, fresh, is_inexact, strongly_typed
from ..realify import norm, resolution
from ..types import (
    OnFailure,
    Phi,
    PyTree,
    Scalar,
    SolveInfo,
    Solver,
    Status,
    solve_info,
    status_where,
)


@dataclasses.dataclass(frozen=True)
class CheckedSolver:
    """A lower-level solver that knows whether it succeeded.

    Not a `NamedTuple`: `jax.jit` refers weakly to what it compiles, and tuples cannot be.

    Attributes:
        with_info: `(w0, *args, **kwargs) -> (w, SolveInfo)`.
        on_failure: The policy of a direct call, which has nowhere to put the info.
    """

    with_info: Callable[..., tuple[PyTree, SolveInfo]]
    on_failure: OnFailure

    def __call__(self, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        w, info = self.with_info(w0, *args, **kwargs)
        return enforce(self.on_failure, "lower-level solve", info, w)


def solve_with_info(
    solver: Solver, w0: PyTree, /, *args: PyTree, **kwargs: PyTree
) -> tuple[PyTree, SolveInfo | None]:
    """(w, info) of any solver; `None` for one that does not say whether it succeeded."""
    with_info = getattr(solver, "with_info", None)
    # `jax.vmap` and its like copy attributes: the copy is that of the solver before the `vmap`.
    copied = with_info is getattr(getattr(solver, "__wrapped__", None), "with_info", None)
    if with_info is not None and (isinstance(solver, jax.stages.Wrapped) or not copied):
        return with_info(w0, *args, **kwargs)
    return solver(w0, *args, **kwargs), None


def fixed_point_info(
    phi: Phi, num_steps: Scalar, w: PyTree, /, *args: PyTree, **kwargs: PyTree
) -> SolveInfo:
    """The info of a solve without a tolerance: its true residual, and whether w is finite."""
    residual = distance(fresh(phi)(w, *args, **kwargs), w)
    status = status_where(jnp.isfinite(norm(w)), Status.FIXED_STEPS, Status.NON_FINITE)
    return solve_info(num_steps, residual, status)


def checked_start(where: str, phi: Phi, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
    """`w0` as arrays that a loop over Φ can carry; raises `TypeError` where Φ(w0) differs."""
    check_arrays(where, "w0", w0)
    w0 = strongly_typed(w0)
    check_phi(where, phi, w0, "`w0`", args, kwargs)
    return w0


def distance(a: PyTree, b: PyTree) -> jax.Array:
    """‖a − b‖ over the inexact leaves, in at least float32."""
    inexact = [
        (x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True) if is_inexact(x)
    ]
    return norm([x - y for x, y in inexact])


def floor(w: PyTree) -> jax.Array:
    """‖Φ(w) − w‖ at rounding: a modest multiple of eps ‖w‖, smaller where eps is coarse."""
    eps = resolution(w)
    return (8 * eps if eps < 1e-5 else 2 * eps) * norm(w)


def above(residual: jax.Array, tolerance: Callable, w: PyTree) -> jax.Array:
    """Whether to go on: finite, above the tolerance and above the floor of the dtype."""
    least = jnp.maximum(tolerance(norm(w)), floor(w))
    return jnp.isfinite(residual) & (residual > least) | (residual == jnp.inf)


def judge(
    num_steps: Scalar, residual: jax.Array, start: jax.Array, tolerance: Callable, w: PyTree
) -> SolveInfo:
    """The verdict on a solve with a tolerance."""
    missed = status_where(residual > start, Status.DIVERGED, Status.MAX_STEPS)
    close = status_where(residual <= floor(w), Status.AT_FLOOR, missed)
    tol = tolerance(norm(w))
    status = status_where(residual <= tol, Status.CONVERGED, close)
    status = status_where(jnp.isfinite(residual), status, Status.NON_FINITE)
    return solve_info(num_steps, residual, status, tol)
