"""A pytree as real vectors of one dtype: where norms and inner products are taken.

Two reasons. Inner products of bfloat16 or float16 vectors must accumulate in at least float32.
And a map Φ of complex w need not be holomorphic: its derivative J is then linear over the reals
only, and a Krylov method over the complex numbers would be silently wrong. As real pairs
(Re x, Im x) every linear solver is right for every Φ, and on a holomorphic Φ the inner product
Re⟨x, y⟩ gives CG the same steps as the complex one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from .types import PyTree


def real_dtype(tree: PyTree) -> jnp.dtype:
    """The one real dtype, at least float32, that holds every inexact leaf of `tree`."""
    dtypes = [jnp.finfo(x.dtype).dtype for x in _leaves(tree)]
    widest = max(dtypes, key=lambda d: jnp.finfo(d).bits, default=jnp.dtype(jnp.float32))
    return widest if jnp.finfo(widest).bits >= 32 else jnp.dtype(jnp.float32)


def resolution(tree: PyTree) -> float:
    """The largest `finfo(dtype).eps` of the inexact leaves: what a product can resolve."""
    return max((float(jnp.finfo(x.dtype).eps) for x in _leaves(tree)), default=0.0)


def realified(like: PyTree) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Two inverse functions, to the real form of pytrees like `like` and back.

    The real form is a list with the real array of each real leaf and the pair of each complex one.
    Leaves are neither reshaped nor joined, so that their sharding stays as it is.
    """
    leaves, treedef = jax.tree.flatten(like)
    dtype = real_dtype(like)
    kinds = [(x.dtype, jnp.iscomplexobj(x)) for x in map(jnp.asarray, leaves)]

    def to_real(tree: PyTree) -> PyTree:
        return [
            (jnp.real(x).astype(dtype), jnp.imag(x).astype(dtype))
            if is_complex
            else jnp.asarray(x).astype(dtype)
            for x, (_, is_complex) in zip(treedef.flatten_up_to(tree), kinds, strict=True)
        ]

    def from_real(real: PyTree) -> PyTree:
        return treedef.unflatten(
            [
                jax.lax.complex(*x).astype(kind) if is_complex else x.astype(kind)
                for x, (kind, is_complex) in zip(real, kinds, strict=True)
            ]
        )

    return to_real, from_real


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all inexact leaves, in `real_dtype`, whatever their scale."""
    inexact = _leaves(tree)
    to_real, _ = realified(inexact)
    real = to_real(inexact)
    scale = power_of_two(real)
    size = scale * optax.tree.norm(optax.tree.scale(1 / scale, real))
    return jnp.asarray(size, real_dtype(inexact))


def inner(x: PyTree, y: PyTree) -> jax.Array:
    """The real inner product Re ⟨x, y⟩ over all leaves, in `real_dtype`."""
    to_real, _ = realified(x)
    return jnp.asarray(optax.tree.vdot(to_real(x), to_real(y)), real_dtype(x))


def power_of_two(tree: PyTree) -> jax.Array:
    """About the largest entry of a real pytree, at infinity or NaN too; 1 for zero. A constant.

    The square of a small entry is 0, below 10⁻²³ in float32, and would pass for 0; that of a large one
    is infinite. A power of two changes no digit.
    """
    largest = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(jax.lax.stop_gradient(tree))]
    size = jnp.max(jnp.stack(largest)) if largest else jnp.ones(())
    info = jnp.finfo(size.dtype)
    limited = jnp.clip(size, 4 * info.tiny, info.max / 4)  # So that 1 / scale is in range too.
    return jnp.where(size > 0, jax.lax.reduce_precision(limited, info.nexp, 0), 1)


def steepest_ascent(gradient: PyTree) -> PyTree:
    """The direction in which a real function grows fastest: the conjugate of what `jax.grad` gives."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient)


def _leaves(tree: PyTree) -> list[jax.Array]:
    leaves = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
