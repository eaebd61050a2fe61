"""What all lower-level solvers share: info, the residual ‖Φ(w) − w‖, the verdict."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import check_same
from ..failure import LOWER_STAGE, Policy, enforce_value
from ..iteration import Measured, Stopping, joint_tolerance
from ..leaves import alike, fresh, is_inexact, partition, phi_hint, started, traced_once
from ..linear.system import Reusable
from ..problem import Equation, Form
from ..real_form import EVALUATION, Space, nudged, of_iterate, realified
from ..types import (
    OnFailure,
    Phi,
    PyTree,
    ResidualMap,
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
        return enforce_value(Policy(self.on_failure), LOWER_STAGE, info, w)


@dataclasses.dataclass(frozen=True, repr=False)
class ForPhi:
    """A lower-level solver that is made when Φ is known.

    Attributes:
        make: From Φ to the solver.
        name: How it prints.
    """

    make: Callable[[Phi], Solver]
    name: str

    def __repr__(self) -> str:
        return self.name


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
    """Whether the solver was made for this Φ, or for the same F."""
    made_for = getattr(solver, "phi", None)
    if isinstance(made_for, ResidualMap) and isinstance(phi, ResidualMap):
        return made_for.residual is phi.residual
    return made_for is phi


def held_to_phi(
    equation: Equation, w0: PyTree, w: PyTree, x: PyTree, info: SolveInfo | None
) -> SolveInfo:
    """The info of a solve that was not made for Φ: `NOT_FIXED` where Φ(w) is nothing like w.

    This is the least to ask before w is differentiated as a fixed point of Φ. Where the solution is
    w = 0, Φ(w) need not be like any w ≠ 0: what w was at the start tells that such a w is next to
    nothing. An F of any scale is held to what it is made of in the place of w.
    """
    size = equation.space(w).size_of
    if not alike(w0, w):  # Such as `None`: it tells nothing.
        w0 = optax.tree.zeros_like(w)
    if equation.form is Form.ANY_SCALE:
        least = jax.tree.map(lambda x: 0.1 * jnp.abs(x) + float(jnp.finfo(x.dtype).eps), w0)
        r, beside = equation.with_terms(w, x, least)
        residual = size(r)
        # Of an F that grows like a power of w both are multiples of F far from a root.
        far = (residual > 0.1 * size(beside.of_w)) & (residual > 0.1 * size(beside.rounded))
    else:
        r = equation.residual(w, x)
        residual = size(r)
        large = jnp.maximum(size(w), size(optax.tree.sub(w, r)))
        far = (residual > 0.9 * large) & (residual > 0.01 * size(w0))
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
        unscaled: The equation on inexact leaves where its F is of any scale, else `None`.
    """

    phi: Callable[[PyTree], PyTree]
    w0: PyTree
    space: Space
    unscaled: Equation | None = None

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
        after, entries = _inexact(image), self.space.entries
        to_real, _ = realified(after)
        eps = np.array([float(jnp.finfo(x.dtype).eps) for x in after])
        r, terms = self._beside(w, after)
        norm, *known = self.space.sizes(r, *terms)
        sizes, scales = entries(r), list(map(entries, terms))
        if self.unscaled is None:
            # A leaf whose solution is zero shrinks for ever: it is rid of what lost all its digits.
            first = entries(to_real(_inexact(self.w0)))
            scales = [jnp.maximum(scales[0], eps.astype(norm.dtype) * first)]
        multiple = of_iterate(eps).astype(norm.dtype)
        rounding = multiple * scales[-1]
        if nudged and len(after) > 1 and self.unscaled is None:
            moved = to_real(_inexact(self.phi(_nudged(w))))
            rounding += entries(optax.tree.sub(moved, terms[0]))
        tolerance = joint_tolerance(stop, norm, known[0], sizes, scales[0])
        largest = multiple.max(initial=0)
        rounded = jnp.all(sizes <= rounding) if len(after) > 1 else norm <= largest * known[-1]
        return Measured(norm, tolerance, EVALUATION * largest * known[-1], rounded)

    def _beside(self, w: PyTree, after: list[jax.Array]) -> tuple[PyTree, list[PyTree]]:
        """The residual in the real form, and what it is small beside: Φ(w), or `Terms`."""
        to_real, _ = realified(after)
        if self.unscaled is None:
            real = to_real(after)
            return optax.tree.sub(real, to_real(_inexact(w))), [real]
        w_x, first = (partition(tree)[0] for tree in (w, self.w0))
        least = jax.tree.map(lambda x: float(jnp.finfo(x.dtype).eps) * jnp.abs(x), first)
        f, beside = self.unscaled.with_terms(w_x, (), least)
        r, *terms = (to_real(_inexact(x)) for x in (f, *beside))
        return r, terms


def lower_level(
    where: str, phi: Phi, w0: PyTree, args: PyTree, kwargs: PyTree, name: str = "`w0`"
) -> Lower:
    """The equation of one call; raises `TypeError` where Φ(w0) does not look like `w0`."""
    given, phi = phi, fresh(phi)
    w0 = started(where, phi, w0, args, kwargs)

    def at(w: PyTree) -> PyTree:
        return phi(w, *args, **kwargs)

    with phi_hint(where, w0, args, kwargs):
        at, image, jaxpr = traced_once(at, w0)
    check_same(where, image, w0, "`phi(w, ...)`", name)
    equation = None
    if isinstance(given, ResidualMap) and given.any_scale:
        equation = Equation.of(where, given, w0, (), lambda _: (args, kwargs), name)
    return Lower(at, w0, Space.of(jaxpr, _inexact(w0)), equation)


def _inexact(w: PyTree) -> list[jax.Array]:
    return [x for x in map(jnp.asarray, jax.tree.leaves(w)) if is_inexact(x)]


def _nudged(w: PyTree) -> PyTree:
    """`w` with its inexact entries moved by some of their last digits."""
    x, rest, join = partition(jax.tree.map(jnp.asarray, w))
    return join(nudged(x), rest)
