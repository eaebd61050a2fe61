"""Mapped axes: over which of them Φ couples w, and the types of a `shard_map`.

Along a mapped axis (of a `shard_map`, or of a `vmap` with an `axis_name`) a collective in Φ makes one
system of what looks like one on each device. Inner products, norms and stopping tests are then sums
over that axis; else the devices would solve different systems, and leave their loops at different
steps while a collective waits for all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from .leaves import is_inexact, within_shard_map, without_consts
from .types import Jacobian, MatVec, PyTree, jacobian


class Hoisted(NamedTuple):
    """A product with everything that it depends on as an argument: `at(consts)` are products."""

    at: Callable[[list[Any]], Jacobian]
    consts: list[Any]


class Casts(NamedTuple):
    """Casts of one kind of pytree: to vary over all axes at hand, and back to its own type."""

    varying: Callable[[PyTree], PyTree]
    own: Callable[[PyTree], PyTree]


# Primitives that name an axis without communicating over it.
_LOCAL = frozenset({"axis_index", "pcast", "pvary", "pbroadcast", "reduced_vary_cast"})


def collective_axes(jaxpr: Any) -> frozenset[str]:
    """The mapped axes over which a collective of `jaxpr` communicates, but for those bound inside."""
    axes = frozenset[str]()
    for equation in jaxpr.eqns:
        named = frozenset[str]()
        for name, value in equation.params.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            if name in ("axes", "axis_name") and equation.primitive.name not in _LOCAL:
                # Positional axes, of reductions, are integers; those that `vmap` has moved, NumPy's.
                named = frozenset(
                    x for x in parts if x is not None and not isinstance(x, int | np.integer)
                )
        inside = frozenset[str]().union(*map(collective_axes, inner_jaxprs(equation)))
        # What a `shard_map` within binds is its own; the name of that parameter depends on the version.
        bound = [x for k, v in equation.params.items() if k.endswith("manual_axes") for x in v]
        axes |= named | (inside - frozenset(bound))
    return axes


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation: of loops, branches, calls."""
    return [
        getattr(part, "jaxpr", part)
        for value in equation.params.values()
        for part in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(part, "eqns") or hasattr(part, "jaxpr")
    ]


def coupled_axes(jaxpr: Any, leaves: list[Any]) -> tuple[tuple[str, ...], ...]:
    """For each leaf of w the axes over which it is spread, and coupled by a collective of `jaxpr`.

    In a `shard_map` that checks replication the type of a leaf says whether it is spread or the same on
    all devices. Elsewhere it may be the same without saying so. Then every leaf counts once for each
    element of the axis: the system is that of all copies, which has the same solution.
    """
    axes = collective_axes(jaxpr)
    if not axes:
        return ((),) * len(leaves)
    typed = axes & frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    typed = frozenset(name for name in typed if name in _axes(lax.axis_index(name)))
    return tuple(tuple(sorted(axes - (typed - _axes(x)), key=str)) for x in leaves)


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum of x over mapped axes."""
    return lax.psum(x, axes) if axes else x


def largest(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The maximum of x over mapped axes."""
    return lax.pmax(x, axes) if axes else x


def steady(step: Callable[[Any], Any], carry: Any) -> tuple[Callable[[Any], Any], Any]:
    """The step and the start of a loop, each leaf of the carry typed as varying where a step makes it.

    In a `shard_map` a loop must keep the types of what it carries, and most starts vary over nothing.
    """
    if not within_shard_map():
        return step, carry
    leaves, treedef = jax.tree.flatten(carry)
    leaves = [jnp.asarray(x) for x in leaves]
    while True:
        after = jax.make_jaxpr(step)(treedef.unflatten(leaves)).out_avals
        more = [a.manual_axis_type.varying - _axes(x) for a, x in zip(after, leaves, strict=True)]
        if not any(more):
            break
        leaves = [_varying(x, axes) for x, axes in zip(leaves, more, strict=True)]
    types = [_axes(x) for x in leaves]

    def typed(carry: Any) -> Any:
        leaves = jax.tree.leaves(step(carry))
        return treedef.unflatten(
            [_varying(x, axes - _axes(x)) for x, axes in zip(leaves, types, strict=True)]
        )

    return typed, treedef.unflatten(leaves)


def packed_loop(
    unfinished: Callable[[Any], jax.Array], step: Callable[[Any], Any], carry: Any
) -> Any:
    """`lax.while_loop` of a `steady` step, the scalars of whose carry travel in a few vectors.

    XLA makes a kernel of each value that a step hands on, on a CPU one of some 0.3 µs: for few unknowns
    a step that hands on a dozen scalars is mostly these. Where a scalar is a large sum, of which each
    kernel would make its own, it does not pay.
    """
    step, carry = steady(step, carry)
    leaves, treedef = jax.tree.flatten(carry)
    leaves = [jnp.asarray(x) for x in leaves]
    types = [x.dtype for x in leaves]
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if x.ndim == 0:
            dtype = jnp.dtype(jnp.int32) if x.dtype == bool else x.dtype
            groups.setdefault((dtype, within_shard_map() and _axes(x)), []).append(i)
    alone = [i for i, x in enumerate(leaves) if x.ndim]

    def packed(carry: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(carry)]
        vectors = [
            jnp.stack([leaves[i].astype(dtype) for i in members])
            for (dtype, _), members in groups.items()
        ]
        return [leaves[i] for i in alone], vectors

    def unpacked(parts: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        found = dict(zip(alone, parts[0], strict=True))
        for members, vector in zip(groups.values(), parts[1], strict=True):
            found |= {i: vector[j].astype(types[i]) for j, i in enumerate(members)}
        return treedef.unflatten([found[i] for i in range(len(types))])

    return unpacked(
        lax.while_loop(
            lambda parts: unfinished(unpacked(parts)),
            lambda parts: packed(step(unpacked(parts))),
            packed(carry),
        )
    )


def run_if(needed: jax.Array, function: Callable[[], PyTree], otherwise: PyTree) -> PyTree:
    """`function()` where it is needed, else `otherwise`: a loop of at most one step.

    A `lax.cond` asks in a `shard_map` for the same types of both, which only the function knows.
    """

    def step(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        return jnp.zeros_like(carry[0]), function()

    return lax.while_loop(lambda carry: carry[0], *steady(step, (needed, otherwise)))[1]


def _varying(x: Any, axes: frozenset[str]) -> jax.Array:
    # Sorted, so that all processes of a distributed program compile the same.
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def hoisted(matvec: MatVec, b: PyTree) -> Hoisted:
    """`matvec`, a function of pytrees like `b`, without a closure."""
    m = jacobian(matvec)
    closed, out = jax.make_jaxpr(m.known, return_shape=True)(b)
    like = m._replace(product=_nothing, complement=m.complement and _nothing)
    treedef, jaxpr, consts = jax.tree.structure(out), without_consts(closed), list(closed.consts)
    del closed, m  # What outlives a trace must not hold its tracers.

    def at(consts: list[Any]) -> Jacobian:
        def known(u: PyTree) -> PyTree:
            leaves = jax.core.eval_jaxpr(jaxpr, consts, *jax.tree.leaves(u))
            return jax.tree.unflatten(treedef, leaves)

        return like.replaced(known)

    return Hoisted(at, consts)


def _nothing(u: PyTree) -> PyTree:
    return u


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

    def placed(x: Any, y: Any) -> Any:
        if not hasattr(x, "dtype") or x.dtype == jax.dtypes.float0:
            return x
        never = (y != y) & (y == y)  # What XLA cannot know, so that x goes where y is.
        return jnp.where(never, jnp.asarray(y, x.dtype), x)

    return jax.tree.map(placed, tree, like)


def casts(like: PyTree, axes: frozenset[str]) -> Casts:
    """The casts of pytrees like `like` to vary over `axes`, and back."""
    extra = jax.tree.map(lambda x: tuple(sorted(axes - _axes(x))), like)

    def varying(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x, axes: _varying(x, frozenset(axes)), tree, extra)

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
