"""A Krylov method that gets (I − J)⁻¹ as a matrix once that pays: `Assisted`.

To rent or to buy: nobody knows beforehand how many products the systems to come will take. The matrix
costs as much as `price` products; a Krylov method does without until it has spent as many. So both
together cost at most about twice what the better of them would, and systems that are close to one
another, as on the way of Newton's method and from one outer step to the next, share one matrix.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..leaves import is_sharded, within_shard_map
from ..mapped_axes import inner_jaxprs, run_if
from ..real_form import Space, random_signs, real_dtype, real_size, realified
from ..types import LinearSolver, MatVec, PyTree, Scalar, SolveInfo, failed, jacobian
from .elimination import Factors
from .fixed_point import refinement
from .preconditioner import Known, known_inverse
from .system import Reusable, in_real_form

WORTHWHILE = 0.7
"""What a plain step is to leave of a residual at most: else Newton's or Krylov's do better."""

MAX_SIZE = 1024
"""The largest number of real unknowns for which a matrix is made."""

_AT_ONCE = 45.0  # A price so low that the first system pays it.
_TOO_DEAR = 100.0  # A price that is hardly ever paid, while the place for the matrix always is.
_REFINEMENTS = 30
_CONTRACTION = 0.3  # Of a refinement: where it takes less off, the matrix is one of another system.
_BLOCKED = 0.15  # What a product costs in a block of many, of a single one.
_START = 1e4  # Operations in the time that it takes to start one.

_INVERSE = known_inverse(MAX_SIZE)
_REFINED: Any = refinement(max_steps=_REFINEMENTS, reduction=WORTHWHILE, preconditioner=_INVERSE)
_REUSABLE = Reusable(_REFINED, _INVERSE)

MakeLinearSolver = Callable[[Scalar], LinearSolver]


class Plain(NamedTuple):
    """Solves that keep nothing: those of a function of the user's from a tolerance to a solver."""

    make_linear_solver: MakeLinearSolver

    def start(self, w: PyTree) -> PyTree:
        """What is kept, before the first solve."""
        del w
        return ()

    def prepared(self, kept: PyTree, matvec: MatVec, w: PyTree) -> PyTree:
        """What is kept, made ready for systems with this M = J."""
        del matvec, w
        return kept

    def solver(self, kept: PyTree, rtol: Scalar) -> LinearSolver:
        """The linear solver, for systems with J or with Jᵀ."""
        del kept
        return self.make_linear_solver(rtol)

    def used(self, kept: PyTree, info: SolveInfo, rtol: Scalar) -> PyTree:
        """What is kept, after a solve to this tolerance that ended so."""
        del info, rtol
        return kept

    def forgotten(self, kept: PyTree, lost: jax.Array) -> PyTree:
        """What is kept, but nothing where all is `lost`."""
        del lost
        return kept

    def definite(self, kept: PyTree, matvec: MatVec, w: PyTree, wanted: jax.Array) -> jax.Array:
        """Whether I − J, with this M = J, is seen to be positive definite, if it is symmetric.

        False where that is not `wanted`.
        """
        del kept, matvec, w, wanted
        return jnp.asarray(False)


class Assistance(NamedTuple):
    """The state of `Assisted`.

    Attributes:
        inverse: P = (I − J)⁻¹ of a system nearby, in the real form.
        spent: Steps since it was made, or since the beginning.
    """

    inverse: Known
    spent: jax.Array


class Assisted(NamedTuple):
    """Solves by a Krylov method, and by refinement with a matrix once that is there.

    Attributes:
        make_linear_solver: From a tolerance to the Krylov method.
        price: What the matrix costs, in products.
    """

    make_linear_solver: Callable[..., LinearSolver]
    price: float

    @property
    def at_once(self) -> bool:
        """Whether the matrix is made for the first system."""
        return self.price <= _AT_ONCE

    def start(self, w: PyTree) -> Assistance:
        """As in `Plain`."""
        size = real_size(w)
        empty, false = jnp.zeros((size, size), real_dtype(w)), jnp.asarray(False)
        return Assistance(Known(Factors(empty, empty), false, false), jnp.int32(0))

    def prepared(self, kept: Assistance, matvec: MatVec, w: PyTree) -> Assistance:
        """As in `Plain`."""
        ready = kept.inverse.ready
        due = ~ready if self.at_once else ~ready & (kept.spent >= math.ceil(self.price))

        def make() -> Assistance:
            return Assistance(_REUSABLE.state(matvec, w), jnp.int32(0))

        return run_if(due, make, kept)

    def solver(self, kept: Assistance, rtol: Scalar) -> LinearSolver:
        """As in `Plain`."""
        built: Any = _REUSABLE.using(kept.inverse, transposed=False)
        refined = built.replaced(rtol=rtol)
        if self.at_once:
            return refined
        krylov = self.make_linear_solver(rtol, max_steps=max(math.ceil(self.price), 50))

        def solve(matvec: MatVec, b: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
            # Steps of the fixed-point method are the cheapest, for as long as they contract.
            x, first = refined(matvec, b, x0)
            x, info = krylov(matvec, b, x)
            return x, info._replace(num_steps=first.num_steps + info.num_steps)

        return solve

    def used(self, kept: Assistance, info: SolveInfo, rtol: Scalar) -> Assistance:
        """As in `Plain`."""
        rtol = jnp.asarray(rtol)
        enough = 2 + jnp.log(rtol) / math.log(_CONTRACTION)
        ready = kept.inverse.ready
        good = ready & ~failed(info) & (info.num_steps.astype(rtol.dtype) <= enough)
        return Assistance(kept.inverse._replace(ready=good), kept.spent + info.num_steps)

    def forgotten(self, kept: Assistance, lost: jax.Array) -> Assistance:
        """As in `Plain`."""
        # Not the matrix itself, which to copy may take as long as a solve.
        ready = kept.inverse.ready & ~lost
        return Assistance(kept.inverse._replace(ready=ready), jnp.where(lost, 0, kept.spent))

    def definite(self, kept: Assistance, matvec: MatVec, w: PyTree, wanted: jax.Array) -> jax.Array:
        """As in `Plain`: a few products with a random vector, in the place of Lanczos's many."""
        # P ≻ 0 is that of another w. With A = I − J symmetric, PA has the signs of A: a direction with
        # pᵀAp ≤ 0 is one that I − PA does not shrink. So a random vector that it shrinks to less than
        # what it has, as a rule, along any one direction has met none.
        to_real, from_real = realified(w)
        start = to_real(random_signs(w))
        _, product = in_real_form(jacobian(matvec), to_real, from_real, 0.0)
        space = Space(((),) * len(start), ())
        known = wanted & kept.inverse.ready & kept.inverse.definite
        size = space.norm(start)
        least = 0.1 * size / math.sqrt(real_size(w))

        def step(carry: tuple[jax.Array, PyTree, jax.Array]) -> tuple[jax.Array, PyTree, jax.Array]:
            i, z, _ = carry
            z = optax.tree.sub(z, _INVERSE.apply(kept.inverse, product(z), space))
            return i + 1, z, space.norm(z)

        def unfinished(carry: tuple[jax.Array, PyTree, jax.Array]) -> jax.Array:
            i, _, left = carry
            return known & (i < _REFINEMENTS) & (left > least) & (left <= size)

        *_, left = lax.while_loop(unfinished, step, (jnp.int32(0), start, size))
        return known & (left <= least)


def assisted(
    make_linear_solver: Callable[..., LinearSolver], phi: Callable[[PyTree], PyTree], w: PyTree
) -> Assisted | Plain:
    """`Assisted` where a matrix may pay: for few unknowns, in one place.

    Args:
        make_linear_solver: `make_linear_solver(rtol, max_steps=1000)`.
        phi: Φ, of inexact leaves.
        w: Such leaves.
    """
    size = real_size(w)
    if not 0 < size <= MAX_SIZE or within_shard_map() or any(map(is_sharded, jax.tree.leaves(w))):
        return Plain(make_linear_solver)
    jaxpr = jax.make_jaxpr(phi)(w).jaxpr
    if any(Space.of(jaxpr, w).axes):
        return Plain(make_linear_solver)
    price = _BLOCKED * size + size**3 / (_START + operations(jaxpr))
    return Assisted(make_linear_solver, price) if price <= _TOO_DEAR else Plain(make_linear_solver)


def operations(jaxpr: Any) -> float:
    """About how many operations a program takes; a `while_loop` counts as one pass."""
    count = 0.0
    for equation in jaxpr.eqns:
        inside = [operations(inner) for inner in inner_jaxprs(equation)]
        out = float(sum(math.prod(getattr(x.aval, "shape", ())) for x in equation.outvars))
        if equation.primitive.name == "scan":
            count += equation.params["length"] * sum(inside)
        elif inside:
            count += max(inside) if equation.primitive.name == "cond" else sum(inside)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            count += 2 * out * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            numbers = equation.params["dimension_numbers"]
            count += 2 * out * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        else:
            count += out
    return count
