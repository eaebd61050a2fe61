"""Replication over devices: the types of a `shard_map`, taken to what JAX's linear solve wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental.shard_alike import shard_alike

from .packing import is_inexact
from .types import MatVec, PyTree


class Hoisted(NamedTuple):
    """A product with everything that it depends on as an argument: `apply(consts, u)`."""

    apply: Callable[[list[Any], PyTree], PyTree]
    consts: list[Any]


class Casts(NamedTuple):
    """Casts of one kind of pytree: to vary over all axes at hand, and back to its own type."""

    varying: Callable[[PyTree], PyTree]
    own: Callable[[PyTree], PyTree]


def within_shard_map() -> bool:
    """Whether this is traced inside a `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def hoisted(matvec: MatVec, b: PyTree) -> Hoisted:
    """`matvec`, a function of pytrees like `b`, without a closure."""
    closed, out = jax.make_jaxpr(matvec, return_shape=True)(b)
    treedef = jax.tree.structure(out)

    def apply(consts: list[Any], u: PyTree) -> PyTree:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(u))
        return jax.tree.unflatten(treedef, leaves)

    return Hoisted(apply, list(closed.consts))


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The mesh axes over which any leaf is typed as varying."""
    return frozenset[str]().union(*map(_axes, jax.tree.leaves(tree)))


def varying_alike(tree: PyTree) -> PyTree:
    """Every leaf typed as varying where any leaf is, as the carry of a loop must be at its start."""
    if not within_shard_map():
        return tree
    return casts(tree, varying_axes(tree)).varying(tree)


def placed_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` on the devices of `like` and sharded as it, array by array.

    A gradient that hardly depends on λ, or not at all, is else replicated, or on the default device.
    """
    return jax.tree.map(
        lambda x, y: shard_alike(x, y)[0] if isinstance(x, jax.Array) else x, tree, like
    )


def casts(like: PyTree, axes: frozenset[str]) -> Casts:
    """The casts of pytrees like `like` to vary over `axes`, and back."""
    # Sorted, so that all processes of a distributed program compile the same.
    extra = jax.tree.map(lambda x: tuple(sorted(axes - _axes(x))), like)

    def varying(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x, axes: lax.pcast(x, axes, to="varying"), tree, extra)

    def own(tree: PyTree) -> PyTree:
        return jax.tree.map(_agreed, tree, extra)

    return Casts(varying, own)


def _axes(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _agreed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """What all devices along `axes` hold, typed as such: of equal numbers the mean is the number."""
    if not axes:
        return x
    if is_inexact(x):
        return lax.pmean(x, axes)
    return lax.pmax(x.astype(jnp.int8) if x.dtype == bool else x, axes).astype(x.dtype)
