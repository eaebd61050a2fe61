"""A linear solve for those who know nothing of their I − M: `auto`."""

import jax

from ..errors import check_count
from ..iteration import stopping
from ..leaves import is_sharded
from ..mapped_axes import run_if
from ..printing import printed
from ..real_form import Space, real_size
from ..types import LinearSolver, MatVec, PyTree, Scalar, SolveInfo, failed, jacobian
from .direct import dense
from .krylov import gmres
from .tunable import Tunable


@printed
def auto(
    *,
    max_steps: int = 2000,
    rtol: Scalar = 1e-8,
    at_once: int = 512,
    max_size: int = 2048,
) -> LinearSolver:
    """Any invertible I − M: by elimination where unknowns are few, else by GMRES, then by elimination.

    Up to `at_once` unknowns this is `dense()`. Above, it is `gmres` with cycles of 50 steps; where that
    misses its tolerance and there are at most `max_size` unknowns, `dense()` again. What none of them
    solves fails with the status of the last.

    Cost: d products in blocks and ⅔ d³ operations up to `at_once` unknowns; above, one product a step.
    Memory: 2 d² numbers up to `max_size` unknowns, also where GMRES succeeds; 54 vectors above.
    When not to use it: where J is known to be symmetric (`cg`: 5 vectors, and fewer operations) or to
    contract quickly (`fp`). Where collectives over a mapped axis spread the system, and where its
    sharding is part of its type (an explicit mesh), only GMRES is there.
    Assumed, not checked: `matvec` works under `vmap` up to `max_size` unknowns, as for `dense`.

    Args:
        max_steps: Of GMRES, at most.
        rtol: Relative tolerance of GMRES on the true residual. The error of x is up to the condition
            number of I − M times that.
        at_once: The largest number of real unknowns that are eliminated at once.
        max_size: The largest number of real unknowns that are eliminated at all.

    Returns:
        A `LinearSolver`.

    Raises:
        ValueError: For bad numbers.

    >>> import jax.numpy as jnp
    >>> m = jnp.array([[0.0, 2.0], [-2.0, 0.0]])
    >>> x, info = auto()(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 12)
    Array([ 0.2, -0.4], dtype=float64)

    References:
        Saad, Iterative Methods for Sparse Linear Systems, 2nd edition, 2003, section 6.5 (GMRES and its
        restarts).
    """
    stopping("auto", None, max_steps, rtol, 0.0)
    check_count("auto", "at_once", at_once)
    check_count("auto", "max_size", max_size)
    eliminate = dense(max_size=max(at_once, max_size))
    iterate = gmres(max_steps=max_steps, rtol=rtol, restart=50)

    def solve(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        size = real_size(b)
        alone = not any(map(is_sharded, jax.tree.leaves(b)))
        alone &= not any(Space.of(jax.make_jaxpr(jacobian(matvec).known)(b).jaxpr, b).axes)
        if alone and size <= at_once:
            return eliminate(matvec, b)
        x, info = iterate(matvec, b, x0)
        if not (alone and size <= max_size):
            return x, info
        return run_if(failed(info), lambda: eliminate(matvec, b), (x, info))

    options = {"max_steps": max_steps, "rtol": rtol, "at_once": at_once, "max_size": max_size}
    return Tunable(solve, auto, options)
