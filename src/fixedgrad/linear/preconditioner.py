"""Preconditioners P ≈ (I − M)⁻¹ of the Krylov methods: `nystrom`, `inverse`, or a function of yours.

Right preconditioning, (I − M) P y = b with x = P y, leaves the residual what it is, so that a poor P
costs steps, not accuracy. `cg` applies P to residuals, and asks for a symmetric positive definite one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from ..errors import check_count, check_same, show
from ..leaves import traced_once
from ..mapped_axes import varying_alike
from ..printing import printed
from ..real_form import Space, combined
from ..types import Jacobian, MatVec, PyTree
from .elimination import Factors, factorised

tree = optax.tree


class Preconditioner(NamedTuple):
    """How P is made, from products with A = I − M, and applied; on the real form of a right-hand side.

    Attributes:
        build: `(product, like, space) -> state`; `like` is the right-hand side.
        apply: `(state, u, space) -> P u`, linear in u.
        every: In the explicit form P is made anew in every so many updates, and where a solve takes
            more than twice the steps that it took when P was new.
        name: How it prints: as the call that made it.
    """

    build: Callable[[MatVec, PyTree, Space], PyTree]
    apply: Callable[[PyTree, PyTree, Space], PyTree]
    every: int = 1
    name: str = "Preconditioner(...)"

    def __repr__(self) -> str:
        return self.name


class Built(NamedTuple):
    """A `Preconditioner` with its state.

    Attributes:
        preconditioner: What it was made by.
        state: Of it.
        transposed: Whether it was made from products with Jᵀ.
    """

    preconditioner: Preconditioner
    state: PyTree
    transposed: bool


@printed
def nystrom(*, rank: int, seed: int = 0, every: int = 10) -> Preconditioner:
    """The randomised Nyström preconditioner, for A = I − M symmetric and positive semidefinite.

    With a random Ω of `rank` columns and Y = AΩ, A ≈ Y (ΩᵀY)⁻¹ Yᵀ = U diag(s) Uᵀ, and

        P = I + U diag(s_min/s − 1) Uᵀ,

    takes the `rank` largest eigenvalues down to the smallest of them. For gradient maps of a loss
    whose Hessian has few large eigenvalues above a floor, as with a ridge.

    Assumed, not checked: A symmetric; for another A it is any matrix.

    Cost: to make it `rank` products, in one block (a fraction of as many single ones), and 2 `rank`²
    vector operations; to apply it 2 `rank`. Memory: 2 `rank` vectors while it is made, then half.
    When not to use it: where it is made for one solve of fewer steps than `rank`, which is the usual
    case; where the eigenvalues do not fall off.

    Args:
        rank: Columns of Ω; at most the number of unknowns are taken.
        seed: Of Ω: the same one every time.
        every: In the explicit form it is made anew in every so many updates, and where a solve takes
            more than twice the steps that it took when P was new.

    Returns:
        A `Preconditioner`.

    Raises:
        ValueError: `rank` or `every` is not a positive integer.

    >>> import fixedgrad as fg
    >>> curvature = 1e-3 + jnp.geomspace(1.0, 1e-7, 100)
    >>> steps = lambda **options: fg.cg(max_steps=200, rtol=1e-8, **options)(
    ...     lambda u: u - curvature * u, jnp.ones(100))[1].num_steps
    >>> bool(2 * steps(preconditioner=nystrom(rank=30)) < steps())
    True

    References:
        Frangella, Tropp, Udell, Randomized Nyström Preconditioning, 2023.
    """
    check_count("nystrom", "rank", rank)
    check_count("nystrom", "every", every)

    def build(product: MatVec, like: PyTree, space: Space) -> PyTree:
        columns = min(rank, sum(x.size for x in jax.tree.leaves(like)))
        omega = _gaussian(like, columns, seed, space)
        omega = jax.tree.map(lambda q, x: varying_alike((q, x))[0], omega, like)
        y = jax.vmap(product)(omega)
        # Y (ΩᵀY)⁻¹ Yᵀ = B Bᵀ with B = Y L⁻ᵀ, LLᵀ = ΩᵀY; BᵀB has the eigenvalues s of it.
        core = space.grams(omega, y)
        core = 0.5 * (core + core.T)
        eps = jnp.finfo(core.dtype).eps
        core += columns * eps * jnp.trace(core) * jnp.eye(columns, dtype=core.dtype)
        factor = jnp.linalg.cholesky(core)
        half = jax.scipy.linalg.solve_triangular(factor, space.gram(y), lower=True)
        small = jax.scipy.linalg.solve_triangular(factor, half.T, lower=True)
        s, v = jnp.linalg.eigh(0.5 * (small + small.T))
        kept = s > columns * eps * s[-1]
        s = jnp.where(kept, s, 1.0)
        # U = B V S^−½ = Y (L⁻ᵀ V S^−½).
        mix = jax.scipy.linalg.solve_triangular(factor.T, v, lower=False)
        mix *= jnp.where(kept, lax.rsqrt(s), 0.0)[None]
        u = _mixed(mix, y)
        # Rounding leaves U as orthogonal as ΩᵀY is well-conditioned; U G^−½ has norm 1, so that P > 0.
        g, q = jnp.linalg.eigh(space.gram(u))
        root = jnp.where(g > 0.5, lax.rsqrt(jnp.where(g > 0.5, g, 1.0)), 0.0)
        u = _mixed((q * root[None]) @ q.T, u)
        least = jnp.min(jnp.where(kept, s, jnp.inf))
        weights = jnp.where(kept, least / s - 1, 0.0)
        fine = jnp.all(jnp.isfinite(g))  # An indefinite A has no such factors: then P = I.
        u, weights = tree.where(fine, (u, weights), tree.zeros_like((u, weights)))
        return u, weights

    def apply(state: PyTree, x: PyTree, space: Space) -> PyTree:
        u, weights = state
        return tree.add(x, combined(u, weights * space.coefficients(u, x)))

    return Preconditioner(build, apply, every)


@printed
def inverse(*, max_size: int = 4096, block_size: int = 128, every: int = 10) -> Preconditioner:
    """(I − M)⁻¹ as a matrix: what `dense` solves by, kept for systems that are close to this one.

    Cost: to make it d products, in blocks of `block_size`, and 5/3 d³ operations; to apply it
    3 d². Memory: 3 d² numbers while it is made, then 2 d².
    When not to use it: for one system, which `dense` solves in the same time; where collectives over a
    mapped axis spread it.

    Args:
        max_size: The largest number of real unknowns that is accepted.
        block_size: Unit vectors in one product.
        every: As in `nystrom`.

    Returns:
        A `Preconditioner`.

    Raises:
        ValueError: For counts that are not positive integers; at trace time, for more than
            `max_size` unknowns.

    >>> import fixedgrad as fg
    >>> m = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
    >>> solver = fg.gmres(max_steps=5, rtol=1e-9, preconditioner=inverse())
    >>> x, info = solver(lambda v: m @ v, jnp.array([1.0, 0.0]))
    >>> jnp.round(x, 12), int(info.num_steps)
    (Array([ 0.8, -0.4], dtype=float64), 1)

    References:
        Kelley, Iterative Methods for Linear and Nonlinear Equations, 1995, section 5.4 (the chord and
        Shamanskii methods).
    """
    check_count("inverse", "max_size", max_size)
    check_count("inverse", "block_size", block_size)
    check_count("inverse", "every", every)

    def build(product: MatVec, like: PyTree, space: Space) -> Factors:
        return factorised(_matrix_of(product, like, space, max_size, block_size))

    return Preconditioner(build, _by_factors, every)


class Known(NamedTuple):
    """The state of `known_inverse`.

    Attributes:
        factors: P = A⁻¹, where `ready`.
        ready: Whether it is there; else P = I.
        definite: Whether A is symmetric and positive definite.
    """

    factors: Factors
    ready: jax.Array
    definite: jax.Array


def known_inverse(max_size: int) -> Preconditioner:
    """`inverse` once it is known, and until then the identity."""

    def build(product: MatVec, like: PyTree, space: Space) -> Known:
        matrix = _matrix_of(product, like, space, max_size, max_size)
        skew, size = jnp.max(jnp.abs(matrix - matrix.T)), jnp.max(jnp.abs(matrix))
        symmetric = skew <= jnp.finfo(matrix.dtype).eps ** 0.5 * size
        definite = symmetric & jnp.all(jnp.isfinite(jnp.linalg.cholesky(matrix)))
        return Known(factorised(matrix), jnp.asarray(True), definite)

    def apply(state: Known, x: PyTree, space: Space) -> PyTree:
        return lax.cond(state.ready, lambda: _by_factors(state.factors, x, space), lambda: x)

    return Preconditioner(build, apply)


def _matrix_of(
    product: MatVec, like: PyTree, space: Space, max_size: int, block_size: int
) -> jax.Array:
    if any(space.axes):
        raise TypeError(
            "`inverse` makes a matrix of one system, but a collective makes one of all those along "
            f"{', '.join(map(repr, space.together))}; take `nystrom`, or no preconditioner."
        )
    flat, unravel = ravel_pytree(like)
    if flat.size > max_size:
        raise ValueError(
            f"`inverse` would materialise a {flat.size} by {flat.size} matrix, more than its "
            f"`max_size`={max_size}; take `nystrom`, or raise `max_size`."
        )
    return materialised(product, flat, unravel, block_size)


def _by_factors(state: Factors, x: PyTree, space: Space) -> PyTree:
    del space
    flat, unravel = ravel_pytree(x)
    return unravel(state.solve(flat))


def materialised(
    product: MatVec, like: jax.Array, unravel: Callable[[jax.Array], PyTree], block_size: int
) -> jax.Array:
    """The matrix of `product`, by products with blocks of unit vectors."""
    column = lambda e: ravel_pytree(product(unravel(e)))[0]  # noqa: E731
    eye = varying_alike((jnp.eye(like.size, dtype=like.dtype), like))[0]
    if like.size <= block_size:
        return jax.vmap(column, out_axes=1)(eye)
    return lax.map(column, eye, batch_size=block_size).T


def check_preconditioner(where: str, preconditioner: object) -> None:
    """Raises `TypeError` unless it is `None`, a `Preconditioner` or a function."""
    if not (
        preconditioner is None
        or isinstance(preconditioner, Preconditioner | Built)
        or callable(preconditioner)
    ):
        raise TypeError(
            f"`preconditioner` of `{where}` must be a `Preconditioner`, got {show(preconditioner)}; "
            "write `nystrom(rank=20)`, or a linear function u -> P u with P like the inverse of I - J."
        )


def applied(
    preconditioner: Any,
    m: Jacobian,
    product: MatVec,
    b: PyTree,
    real: PyTree,
    space: Space,
    to_real: Callable[[PyTree], PyTree],
    from_real: Callable[[PyTree], PyTree],
) -> MatVec:
    """Products with P in the real form, for a system with M.

    A function of the user's is P for (I − J)⁻¹: its transpose is taken where M is Jᵀ; so is that of one
    that was built for the other of the two.
    """
    if not isinstance(preconditioner, Preconditioner | Built):
        known, image, _ = traced_once(preconditioner, b)
        check_same("preconditioner", image, b, "`preconditioner(b)`", "`b`")
        if m.transposed:
            known = lambda u: jax.linear_transpose(preconditioner, b)(u)[0]  # noqa: E731
        return lambda u: to_real(known(from_real(u)))
    if isinstance(preconditioner, Preconditioner):
        state = preconditioner.build(product, real, space)
        preconditioner = Built(preconditioner, state, m.transposed)
    made, state, transposed = preconditioner

    def p(u: PyTree) -> PyTree:
        return made.apply(state, u, space)

    def conjugated(u: PyTree) -> PyTree:
        return to_real(jax.tree.map(jnp.conj, from_real(u)))

    if transposed == m.transposed:
        return p
    # JAX transposes complex products without conjugation; real pairs are transposed with it.
    return lambda u: conjugated(jax.linear_transpose(p, real)(conjugated(u))[0])


def _gaussian(like: PyTree, columns: int, seed: int, space: Space) -> PyTree:
    """Random columns of the real form, other ones on each device over which a part is spread."""

    def leaf(i: int, part: PyTree, axes: tuple[str, ...]) -> PyTree:
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name in axes:
            key = jax.random.fold_in(key, lax.axis_index(name))
        leaves, treedef = jax.tree.flatten(part)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return treedef.unflatten(
            [jax.random.normal(k, (columns, *x.shape), x.dtype) for k, x in pairs]
        )

    parts = zip(like, space.axes, strict=True)
    return [leaf(i, part, axes) for i, (part, axes) in enumerate(parts)]


def _mixed(mix: jax.Array, block: PyTree) -> PyTree:
    """Column j is Σᵢ mixᵢⱼ times column i of the block."""
    return jax.tree.map(lambda y: jnp.tensordot(mix.T, y, axes=1, precision="highest"), block)
