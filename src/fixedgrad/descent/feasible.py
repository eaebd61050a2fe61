"""Where λ may be: everywhere, in a box, or in a convex set that a projection describes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ..errors import check_callable, check_same, shapes_of, show
from ..leaves import partition
from ..types import PyTree

tree = optax.tree


class Feasible(NamedTuple):
    """A convex set of λ, for inexact leaves.

    Attributes:
        project: `project(lam) -> lam`, the nearest point.
        free: `free(x, g)`: booleans like x, false where a bound holds an entry that −g would push out.
        bends: Whether a path is P(x + αd), along the faces of a box; else it is the segment from x to
            P(x + d), which stays in the set.
    """

    project: Callable[[PyTree], PyTree]
    free: Callable[[PyTree, PyTree], PyTree]
    bends: bool


def _all_free(x: PyTree, g: PyTree) -> PyTree:
    del g
    return jax.tree.map(lambda x: jnp.ones(x.shape, bool), x)


def feasible_set(
    where: str, project: Callable[[PyTree], PyTree] | None, bounds: tuple[Any, Any] | None
) -> Feasible:
    """The set of the options `project` and `bounds` of `where`, of which one at most is given.

    Raises:
        TypeError: `project` is not callable, or `bounds` no pair.
        ValueError: Both are given, or a lower bound is above an upper one.
    """
    if bounds is None:
        if project is None:
            return Feasible(lambda lam: lam, _all_free, True)
        check_callable(where, "project", project, "project(lam) -> lam")
        return Feasible(_checked(where, project), _all_free, False)
    if project is not None:
        raise ValueError(
            f"`{where}` takes one of `bounds` and `project`, got both; a box is best given by `bounds`."
        )
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise TypeError(
            f"`bounds` of `{where}` must be a pair (lower, upper) of numbers, arrays or pytrees like "
            f"`lam`, got {show(bounds)}; write `-jnp.inf` for none."
        )
    lower, upper = bounds
    _check_order(where, lower, upper)

    def bound(value: PyTree, x: PyTree) -> PyTree:
        """`value`, a prefix of λ, for each inexact leaf of it."""
        try:
            full = jax.tree.broadcast(value, x, is_leaf=_is_none)  # Where λ has integers.
        except ValueError as error:
            raise TypeError(
                f"`bounds` of `{where}` must have the structure of `lam`, or be numbers, got "
                f"{shapes_of(value)} for {shapes_of(x)}."
            ) from error

        def like(x: jax.Array | None, b: PyTree) -> jax.Array | None:
            return None if x is None else jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape)

        return jax.tree.map(like, x, full, is_leaf=_is_none)

    def box(x: PyTree) -> tuple[PyTree, PyTree]:
        return bound(lower, x), bound(upper, x)

    def clipped(lam: PyTree) -> PyTree:
        x, rest, join = partition(lam)
        return join(jax.tree.map(jnp.clip, x, *box(x)), rest)

    def free(x: PyTree, g: PyTree) -> PyTree:
        def inside(x: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            return ~(((x <= low) & (g > 0)) | ((x >= high) & (g < 0)))

        return jax.tree.map(inside, x, g, *box(x))

    return Feasible(clipped, free, True)


def _is_none(x: object) -> bool:
    return x is None


def _checked(where: str, project: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    def projected(lam: PyTree) -> PyTree:
        result = project(lam)
        check_same(where, result, lam, "`project(lam)`", "`lam`")
        return result

    return projected


def _check_order(where: str, lower: PyTree, upper: PyTree) -> None:
    """Raises `ValueError` where a lower bound is above an upper one, if both can be looked at."""
    pairs = jax.tree.leaves(lower), jax.tree.leaves(upper)
    traced = any(isinstance(x, Tracer) for side in pairs for x in side)
    if traced or len(pairs[0]) != len(pairs[1]):
        return
    for low, high in zip(*pairs, strict=True):
        if np.any(np.asarray(low) > np.asarray(high)):
            raise ValueError(
                f"`bounds` of `{where}` must be (lower, upper) with lower <= upper, got "
                f"({show(lower)}, {show(upper)})."
            )
