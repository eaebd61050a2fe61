"""A pytree as real vectors of one dtype: where norms and inner products are taken.

Two reasons. Inner products of bfloat16 or float16 vectors must accumulate in at least float32.
And a map Φ of complex w need not be holomorphic: its derivative J is then linear over the reals
only, and a Krylov method over the complex numbers would be silently wrong. As real pairs
(Re x, Im x) every linear solver is right for every Φ, and on a holomorphic Φ the inner product
Re⟨x, y⟩ gives CG the same steps as the complex one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .mapped_axes import coupled_axes, largest, total
from .types import PyTree

# How many units of the resolution stand for rounding: every multiple of eps in this library.
NEGLIGIBLE = 1 / 8  # Of a start: a residual that more steps do not change.
DIFFERENCE = 2  # What of a difference of two rounded values is rounding, relative to one of them.
VALUE = 4  # What of a value that is computed from a few others is rounding.
EVALUATION = 8  # What of Φ(w) is rounding, generously.
LAST_DIGITS = 16  # By so much an entry is moved, to see what its rounding does.
COMPUTATION = 64  # What a whole computation rounds, generously.

_FEW = 4096  # Entries up to which a copy is cheaper than one operation more for each leaf.


def of_product(eps: float) -> float:
    """The error of a product relative to its size: a modest multiple of eps.

    Low precision rounds results only, since sums accumulate in float32; there sixteen times eps
    would be no floor but an end after two steps.
    """
    return 16 * eps if eps < 1e-5 else eps


def of_iterate(eps: np.ndarray) -> np.ndarray:
    """The residual w − Φ(w) of a w that is right but for rounding, relative to w, for each eps."""
    return np.where(eps < 1e-5, 8 * eps, 2 * eps)


def of_symmetry(eps: float) -> float:
    """How far from 0 a difference ⟨a, Mb⟩ − ⟨Ma, b⟩ of a symmetric M may be, relative to its terms."""
    return 100 * eps**0.75


def real_dtype(tree: PyTree) -> jnp.dtype:
    """The one real dtype, at least float32, that holds every inexact leaf of `tree`."""
    dtypes = [jnp.finfo(x.dtype).dtype for x in _leaves(tree)]
    widest = max(dtypes, key=lambda d: jnp.finfo(d).bits, default=jnp.dtype(jnp.float32))
    return widest if jnp.finfo(widest).bits >= 32 else jnp.dtype(jnp.float32)


def resolution(tree: PyTree) -> float:
    """The largest `finfo(dtype).eps` of the inexact leaves: what a product can resolve."""
    return max((float(jnp.finfo(x.dtype).eps) for x in _leaves(tree)), default=0.0)


def real_size(tree: PyTree) -> int:
    """The number of entries of the real form."""
    return sum(jnp.size(x) * (2 if jnp.iscomplexobj(x) else 1) for x in jax.tree.leaves(tree))


def joined(tree: PyTree) -> bool:
    """Whether the real form of `tree` is one vector, and not one array for each leaf.

    A vector compiles faster, by the number of leaves. But joining leaves that are sharded over devices
    gathers them, and under `jit` nothing says whether they are.
    """
    return len(jax.tree.leaves(tree)) > 1 and jax.device_count() == 1


def realified(
    like: PyTree, *, copied: bool = True
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Two inverse functions, to the real form of pytrees like `like` and back.

    The real form is a list: of one vector where leaves are `joined`, if they may be `copied`; else of
    the real array of each real leaf and the pair of each complex one, which keeps their sharding.
    """
    leaves, treedef = jax.tree.flatten(like)
    dtype = real_dtype(like)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    def to_real(tree: PyTree) -> PyTree:
        leaves = [jnp.asarray(x) for x in treedef.flatten_up_to(tree)]
        return [
            (jnp.real(x).astype(dtype), jnp.imag(x).astype(dtype))
            if jnp.iscomplexobj(x)
            else x.astype(dtype)
            for x in leaves
        ]

    def from_real(real: PyTree) -> PyTree:
        return treedef.unflatten(
            [
                jax.lax.complex(*x).astype(s.dtype) if isinstance(x, tuple) else x.astype(s.dtype)
                for x, s in zip(real, shapes, strict=True)
            ]
        )

    if not (copied and joined(like)):
        return to_real, from_real

    parts = [2 if jnp.issubdtype(s.dtype, jnp.complexfloating) else 1 for s in shapes]
    ends = np.cumsum([n * s.size for n, s in zip(parts, shapes, strict=True)])[:-1]

    def to_vector(tree: PyTree) -> PyTree:
        return [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(to_real(tree))])]

    def from_vector(real: PyTree) -> PyTree:
        cut = []
        for x, n, s in zip(jnp.split(real[0], ends), parts, shapes, strict=True):
            x = jnp.reshape(x, (n, *s.shape))
            cut.append((x[0], x[1]) if n == 2 else x[0])
        return from_real(cut)

    return to_vector, from_vector


class Space(NamedTuple):
    """The real vectors that stand for pytrees like one w, which may be spread over mapped axes.

    Attributes:
        axes: For each array of the real form the mapped axes over which it is spread; inner products
            and norms are sums over these.
        ends: Where the leaves end in a real form that is one vector.
    """

    axes: tuple[tuple[str, ...], ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, jaxpr: Any, tree: PyTree) -> "Space":
        """That of `tree`, for an iteration or a linear system whose map has this jaxpr."""
        leaves = jax.tree.leaves(tree)
        axes = coupled_axes(jaxpr, leaves)
        if not joined(tree):
            return cls(axes, ())
        sizes = [real_size(x) for x in leaves]
        return cls(axes[:1], tuple(np.cumsum(sizes)))

    @classmethod
    def of_map(cls, phi: Callable[[PyTree], PyTree], w: PyTree) -> "Space":
        """That of w, for an iteration of Φ."""
        return cls.of(jax.make_jaxpr(phi)(w).jaxpr, w)

    def size_of(self, tree: PyTree) -> jax.Array:
        """The norm of a pytree of inexact leaves like w, whatever its scale. A constant."""
        return self.size(realified(tree)[0](tree))

    @property
    def together(self) -> tuple[str, ...]:
        """All mapped axes over which any leaf is spread."""
        return tuple(sorted(set().union(*self.axes), key=str))

    def inner(self, x: PyTree, y: PyTree) -> jax.Array:
        """⟨x, y⟩ of two real forms, as a sum of products; XLA compiles it like a `vdot`.

        A `vdot` is subject to the platform's precision, flattens leaves and so gathers sharded ones,
        and is refused by JAX where the sharding is part of the type.
        """
        return self._total(
            [optax.tree.sum(optax.tree.mul(a, b)) for a, b in zip(x, y, strict=True)]
        )

    def pairing(self, v: PyTree, r: PyTree) -> jax.Array:
        """Re Σ vᵢrᵢ of two pytrees of inexact leaves like w; see `pairing`."""
        to_real, _ = realified(r)
        return self.inner(to_real(optax.tree.conj(v)), to_real(r))

    def norm(self, x: PyTree) -> jax.Array:
        """‖x‖ of a real form whose entries are of usual size."""
        return jnp.sqrt(self.inner(x, x))

    def coefficients(self, basis: PyTree, u: PyTree) -> jax.Array:
        """The ⟨qᵢ, u⟩ of a stacked basis."""

        def leaf(q: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(q * x[None], axis=tuple(range(1, q.ndim)))  # As in `inner`.

        return self._total([_added(leaf, q, x) for q, x in zip(basis, u, strict=True)])

    def gram(self, basis: PyTree) -> jax.Array:
        """The ⟨qᵢ, qⱼ⟩ of a stacked basis."""
        return self.grams(basis, basis)

    def grams(self, basis: PyTree, other: PyTree) -> jax.Array:
        """The ⟨pᵢ, qⱼ⟩ of two stacked bases."""

        def leaf(p: jax.Array, q: jax.Array) -> jax.Array:
            return jnp.einsum("i...,j...->ij", p, q, precision="highest")

        return self._total([_added(leaf, p, q) for p, q in zip(basis, other, strict=True)])

    def size(self, x: PyTree) -> jax.Array:
        """‖x‖ of a real form, whatever its scale. A constant."""
        return self.sizes(x)[0]

    def sizes(self, *xs: PyTree) -> jax.Array:
        """The norms of some real forms alike, each whatever its scale. Constants.

        All in one: what a norm costs for few unknowns is the number of its operations.
        """
        if len(xs) > 1 and real_size(xs[0]) > _FEW:
            return jnp.concatenate([self.sizes(x) for x in xs])
        stacked = jax.lax.stop_gradient(jax.tree.map(lambda *x: jnp.stack(x), *xs))
        scale = power_of_two(stacked, self.together, len(xs))

        def squares(x: jax.Array) -> jax.Array:
            scaled = x * jnp.reshape(1 / scale, (-1, *(1,) * (x.ndim - 1)))
            return jnp.sum(scaled * scaled, axis=tuple(range(1, x.ndim)))

        return scale * jnp.sqrt(self._total([_added(squares, x) for x in stacked]))

    def norms(self, *xs: PyTree) -> jax.Array:
        """The norms of some real forms alike whose entries are of usual size."""
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *xs)

        def squares(x: jax.Array) -> jax.Array:
            return jnp.sum(x * x, axis=tuple(range(1, x.ndim)))

        return jnp.sqrt(self._total([_added(squares, x) for x in stacked]))

    def entries(self, x: PyTree) -> jax.Array:
        """The largest entry of each leaf of a real form, by absolute value, stacked. Constants."""
        if not x:
            return jnp.zeros(0)
        leaves = jnp.split(x[0], self.ends[:-1]) if self.ends else x
        axes = self.axes * (len(leaves) // len(self.axes))
        return jnp.stack([largest(_largest(a), b) for a, b in zip(leaves, axes, strict=True)])

    def _total(self, parts: list[Any]) -> jax.Array:
        """The sum of what all leaves contribute: one collective for all that are spread alike."""
        sums: dict[tuple[str, ...], Any] = {}
        for axes, part in zip(self.axes, parts, strict=True):
            sums[axes] = sums[axes] + part if axes in sums else part
        return jnp.asarray(sum(total(part, axes) for axes, part in sums.items()))


def combined(basis: PyTree, coefficients: jax.Array) -> PyTree:
    """Σ cᵢ qᵢ of a stacked basis."""
    return jax.tree.map(
        lambda q: jnp.einsum("i,i...->...", coefficients, q, precision="highest"), basis
    )


def _added(function: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(function, *trees))


def _largest(tree: PyTree, stacked: bool = False) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(x), axis=tuple(range(int(stacked), x.ndim)), initial=0)

    return functools.reduce(jnp.maximum, map(of, jax.tree.leaves(jax.lax.stop_gradient(tree))))


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all inexact leaves, in `real_dtype`, whatever their scale."""
    inexact = _leaves(tree)
    real = _uncopied(inexact)
    scale = power_of_two(real)
    size = scale * optax.tree.norm(optax.tree.scale(1 / scale, real))
    return jnp.asarray(size, real_dtype(inexact))


def norms(*trees: PyTree) -> jax.Array:
    """Those of some pytrees alike, stacked, in fewer operations; constants."""
    real = [_uncopied(_leaves(tree)) for tree in trees]
    return Space(((),) * len(real[0]), ()).sizes(*real)


def _uncopied(leaves: list[Any]) -> PyTree:
    """The real form; with each leaf for itself where to join them would copy many entries."""
    to_real, _ = realified(leaves, copied=real_size(leaves) <= _FEW)
    return to_real(leaves)


def inner(x: PyTree, y: PyTree) -> jax.Array:
    """The real inner product Re ⟨x, y⟩ over all leaves, in `real_dtype`."""
    to_real, _ = realified(x)
    return jnp.asarray(optax.tree.vdot(to_real(x), to_real(y)), real_dtype(x))


def pairing(v: PyTree, r: PyTree) -> jax.Array:
    """Re Σ vᵢrᵢ, a cotangent applied to a tangent: JAX conjugates neither."""
    return inner(optax.tree.conj(v), r)


def power_of_two(tree: PyTree, axes: tuple[str, ...] = (), stacked: int | None = None) -> jax.Array:
    """About the largest entry of a real pytree, at infinity or NaN too; 1 for zero. A constant.

    `axes` are the mapped axes over which any of it is spread: all their devices get the same. Of
    `stacked` many pytrees, along a first axis, that of each.

    The square of a small entry is 0, below 10⁻²³ in float32, and would pass for 0; that of a large one
    is infinite. A power of two changes no digit.
    """
    if not jax.tree.leaves(tree):
        return jnp.ones(() if stacked is None else stacked)
    size = largest(_largest(tree, stacked is not None), axes)
    info = jnp.finfo(size.dtype)
    limited = jnp.clip(size, 4 * info.tiny, info.max / 4)  # So that 1 / scale is in range too.
    return jnp.where(size > 0, jax.lax.reduce_precision(limited, info.nexp, 0), 1)


def steepest_ascent(gradient: PyTree) -> PyTree:
    """The direction in which a real function grows fastest: the conjugate of what `jax.grad` gives."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)


def _leaves(tree: PyTree) -> list[jax.Array]:
    leaves = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def ratio(part: Any, whole: jax.Array) -> jax.Array:
    """Part / whole; 0 where there is nothing of either, 1 where only the whole is missing."""
    safe = jnp.where(whole > 0, whole, 1.0)
    return jnp.where(whole > 0, part / safe, jnp.where(jnp.asarray(part) > 0, 1.0, 0.0))


def random_signs(tree: PyTree) -> PyTree:
    """Entries of 1 and −1 as if at random, in the dtype of each leaf; the same ones every time.

    A hash of the position. The generators of `jax.random` take hundreds of operations to start, which
    is more than a whole solve for few unknowns takes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    starts = np.cumsum([0, *(x.size for x in leaves)])
    return treedef.unflatten(
        [
            _signs(x.shape, int(start)).astype(x.dtype)
            for x, start in zip(leaves, starts, strict=False)
        ]
    )


def _signs(shape: tuple[int, ...], start: int) -> jax.Array:
    """The top bit of a mixed position; shifts and products by odd numbers mix all bits of it."""
    position = jnp.full(shape, start % 2**32, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        position += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    x = position + jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return 1 - 2 * ((x ^ (x >> 16)) >> 31).astype(jnp.int32)


def nudged(tree: PyTree) -> PyTree:
    """Inexact leaves, each entry moved by some of its last digits, up or down at random."""

    def moved(x: jax.Array, sign: jax.Array) -> jax.Array:
        return x + (LAST_DIGITS * float(jnp.finfo(x.dtype).eps)) * sign * x

    return jax.tree.map(moved, tree, random_signs(tree))
