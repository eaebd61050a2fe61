"""What all lower-level solvers share: info, the residual ‖Φ(w) − w‖, the verdict."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import check_same
from ..failure import enforce_value
from ..iteration import Measured, Stopping, joint_tolerance
from ..leaves import fresh, is_inexact, partition, phi_hint, started, traced_once
from ..linear.system import Reusable
from ..problem import Equation
from ..real_form import EVALUATION, Space, nudged, of_iterate, realified
from ..types import (
    OnFailure,
    Phi,
    PyTree,
    Scalar,
    SolveInfo,
    Solver,
    Status,
    failed,
    solve_info,
    status_where,
)


@dataclasses.dataclass(frozen=True, repr=False)
class CheckedSolver:
    """A lower-level solver that knows whether it succeeded.

    Not a `NamedTuple`: `jax.jit` refers weakly to what it compiles, and tuples cannot be.

    Attributes:
        with_info: `(w0, *args, **kwargs) -> (w, SolveInfo)`.
        on_failure: The policy of a direct call, which has nowhere to put the info.
        phi: The map whose fixed point it looks for.
        preconditioned: The `Preconditioner` of its linear solves, where it has one, and itself as a
            function `(kept, w0, args, kwargs) -> (w, SolveInfo, made)` of a `Kept` state of that, or
            of `None`: then it makes one, from products with Jᵀ. `made` are the state, and whether it
            was of use at the end.
        name: How it prints: as the call that made it.
    """

    with_info: Callable[..., tuple[PyTree, SolveInfo]]
    on_failure: OnFailure
    phi: Phi
    preconditioned: tuple[Any, Callable[..., tuple[PyTree, SolveInfo, PyTree]]] | None = None
    name: str = "CheckedSolver(...)"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        w, info = self.with_info(w0, *args, **kwargs)
        return enforce_value(self.on_failure, "lower-level solve", info, w)


def sharing(
    solver: Solver, reusable: Reusable | None
) -> Callable[..., tuple[PyTree, SolveInfo, PyTree]] | None:
    """The solver as a function of the preconditioner's state, where both stages name the same one."""
    if reusable is None or not (isinstance(solver, CheckedSolver) and solver.preconditioned):
        return None
    preconditioner, solve = solver.preconditioned
    return solve if preconditioner is reusable.preconditioner else None


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


def exact_steps_info(space: Space, num_steps: Scalar, w: PyTree, residual: PyTree) -> SolveInfo:
    """The info of a solve without a tolerance: ‖Φ(w) − w‖, and whether w is finite.

    `w` and `residual` are inexact leaves, whose norms `space` takes.
    """
    finite = jnp.isfinite(space.size_of(w))
    status = status_where(finite, Status.FIXED_STEPS, Status.NON_FINITE)
    return solve_info(num_steps, space.size_of(residual), status)


def iterates(solver: Solver, phi: Phi) -> bool:
    """Whether the solver was made for this Φ."""
    return getattr(solver, "phi", None) is phi


def held_to_phi(
    equation: Equation, w0: PyTree, w: PyTree, x: PyTree, info: SolveInfo | None
) -> SolveInfo:
    """The info of a solve that was not made for Φ: `NOT_FIXED` where Φ(w) is nothing like w.

    This is the least to ask before w is differentiated as a fixed point of Φ. Where the solution is
    w = 0, Φ(w) need not be like any w ≠ 0: what w was at the start tells that such a w is next to
    nothing.
    """
    r, space = equation.residual(w, x), equation.space(w)
    residual = space.size_of(r)
    size = jnp.maximum(space.size_of(w), space.size_of(optax.tree.sub(w, r)))
    far = (residual > 0.9 * size) & (residual > 0.01 * space.size_of(w0))
    if info is None:
        info = solve_info(0, residual, Status.NOT_RUN)._replace(converged=jnp.asarray(True))
    far &= ~failed(info)
    status = status_where(far, Status.NOT_FIXED, jnp.asarray(info.status))
    return info._replace(status=status, converged=info.converged & ~far)


class Lower(NamedTuple):
    """The equation w = Φ(w) at the arguments of one call, as a solver iterates it.

    Attributes:
        phi: Φ of w alone.
        w0: The start, as arrays that a loop over Φ can carry.
        space: Where residuals are measured.
    """

    phi: Callable[[PyTree], PyTree]
    w0: PyTree
    space: Space

    def exact_steps(self, num_steps: int, w: PyTree) -> SolveInfo:
        """The info after exactly `num_steps`; its one Φ runs where somebody reads it."""
        before, after = _inexact(w), _inexact(self.phi(w))
        return exact_steps_info(self.space, num_steps, before, optax.tree.sub(after, before))

    def measured(
        self, stop: Stopping, w: PyTree, image: PyTree, *, nudged: bool = False
    ) -> Measured:
        """The residual Φ(w) − w, leaf by leaf, against what `stop` asks for and what is rounding.

        Where a solution has a leaf that is zero, what is left of that leaf is rounding of the others:
        with `nudged` one more Φ shows how far their last digits move each leaf. An iteration need not
        ask; it stops shrinking there.
        """
        after = _inexact(image)
        to_real, _ = realified(after)
        real = to_real(after)
        r = optax.tree.sub(real, to_real(_inexact(w)))
        norm, scale = self.space.sizes(r, real)
        sizes, scales = self.space.entries(r), self.space.entries(real)
        eps = np.array([float(jnp.finfo(x.dtype).eps) for x in after])
        # A leaf whose solution is zero shrinks for ever: what it has lost all digits of it is rid of.
        first = self.space.entries(to_real(_inexact(self.w0)))
        scales = jnp.maximum(scales, eps.astype(scales.dtype) * first)
        multiple = of_iterate(eps).astype(scales.dtype)
        rounding = multiple * scales
        if nudged and len(after) > 1:
            moved = to_real(_inexact(self.phi(_nudged(w))))
            rounding += self.space.entries(optax.tree.sub(moved, real))
        tolerance = joint_tolerance(stop, norm, scale, sizes, scales)
        largest = multiple.max(initial=0)
        rounded = jnp.all(sizes <= rounding) if len(after) > 1 else norm <= largest * scale
        return Measured(norm, tolerance, EVALUATION * largest * scale, rounded)


def lower_level(
    where: str, phi: Phi, w0: PyTree, args: PyTree, kwargs: PyTree, name: str = "`w0`"
) -> Lower:
    """The equation of one call; raises `TypeError` where Φ(w0) does not look like `w0`."""
    phi = fresh(phi)
    w0 = started(where, phi, w0, args, kwargs)

    def at(w: PyTree) -> PyTree:
        return phi(w, *args, **kwargs)

    with phi_hint(where, w0, args, kwargs):
        at, image, jaxpr = traced_once(at, w0)
    check_same(where, image, w0, "`phi(w, ...)`", name)
    return Lower(at, w0, Space.of(jaxpr, _inexact(w0)))


def _inexact(w: PyTree) -> list[jax.Array]:
    return [x for x in map(jnp.asarray, jax.tree.leaves(w)) if is_inexact(x)]


def _nudged(w: PyTree) -> PyTree:
    """`w` with its inexact entries moved by some of their last digits."""
    x, rest, join = partition(jax.tree.map(jnp.asarray, w))
    return join(nudged(x), rest)
