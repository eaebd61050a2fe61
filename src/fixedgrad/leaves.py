"""A pytree taken apart into what is differentiated, what rides along, and what is static."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CellType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .errors import check_same, hint, shapes_of, show
from .types import Phi, PyTree

SOLVED = "`w` (the solver's result)"


class Layout(NamedTuple):
    """The structure of a call's arguments, with the leaves that are not arrays: hashable."""

    treedef: Any
    static: tuple[tuple[int, Any], ...]

    def join(self, arrays: list[Any]) -> PyTree:
        """The arguments again, from the arrays among their leaves."""
        leaves = list(arrays)
        for position, leaf in self.static:
            leaves.insert(position, leaf.zeros() if isinstance(leaf, _Float0) else leaf)
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class _Float0:
    """The gradient of a leaf that has none: no array to `jit`, and hashable."""

    shape: tuple[int, ...]

    def zeros(self) -> np.ndarray:
        return np.zeros(self.shape, jax.dtypes.float0)


def _is_float0(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def split_static(call: PyTree) -> tuple[Layout, list[Any]]:
    """The layout of `call` and the arrays among its leaves.

    Raises:
        TypeError: A leaf is neither an array nor hashable.
    """
    leaves, treedef = jax.tree.flatten(call)
    leaves = [_Float0(x.shape) if _is_float0(x) else x for x in leaves]
    static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not _is_array(leaf))
    for _, leaf in static:
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"An argument holds {show(leaf)}, which is neither numeric "
                "nor hashable; pass arrays, numbers or registered pytrees, or close over it."
            ) from None
    positions = {i for i, _ in static}
    return Layout(treedef, static), [x for i, x in enumerate(leaves) if i not in positions]


def eval_shape(function: Callable[..., PyTree], /, *args: PyTree, **kwargs: PyTree) -> PyTree:
    """`jax.eval_shape` for arguments some of whose leaves are not arrays."""
    layout, arrays = split_static((args, kwargs))

    def call(arrays: list[Any]) -> PyTree:
        args, kwargs = layout.join(arrays)
        return function(*args, **kwargs)

    return jax.eval_shape(call, arrays)


def check_arrays(where: str, name: str, tree: PyTree) -> None:
    """Raises `TypeError` unless every leaf of `tree` is an array or a number."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not _is_array(leaf):
            raise TypeError(
                f"`{name}` of `{where}` must hold arrays and numbers only, got {show(leaf)} at "
                f"`{name}{jax.tree_util.keystr(path)}`; keep it elsewhere: as a further argument, or "
                "in a closure."
            )


def check_concrete(where: str, tree: PyTree) -> None:
    """Raises `TypeError` if a leaf of `tree` is traced."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"`{where}` looks at numbers and returns text: it needs concrete arguments, got "
                f"{show(leaf)}; call it outside `jit`, `vmap` and `grad`."
            )


def fresh(phi: Phi) -> Phi:
    """Φ that may change its arguments in place: it gets containers and NumPy arrays of its own.

    A residual Φ(w) − w of a w that Φ itself has overwritten would be 0.
    """

    def own(leaf: Any) -> Any:
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    def with_own(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        w, args, kwargs = jax.tree.map(own, (w, args, kwargs))
        return phi(w, *args, **kwargs)

    return with_own


def stopped_by_residual(where: str, w: PyTree, counted: str = "") -> PyTree:
    """`w`, whose loop ended by a tolerance on its residual; any derivative of it is refused.

    The tolerance says nothing of the derivative of w: none of it is there where the loop ends at once.
    `counted` names the option of `where` that differentiates such steps and looks whether they suffice.
    """

    @jax.custom_jvp
    def result(w: PyTree) -> PyTree:
        return w

    @result.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        also = f"or {counted} (reverse mode only), " if counted else ""
        raise TypeError(
            f"`{where}` with `max_steps` ends by the residual of w, which says nothing of the "
            "derivative of w: from a start at the solution it would be 0. Give `num_steps`, which "
            f"`itd()` differentiates step by step, {also}or decorate the solver with "
            "`fixed_point(phi, aid(...))`, which does not differentiate it."
        )

    return result(w)


def check_phi(where: str, phi: Phi, w: PyTree, name: str, args: PyTree, kwargs: PyTree) -> None:
    """Raises `TypeError` unless Φ(w) is like w; what Φ raises gets a note of what it was given."""
    with phi_hint(where, w, args, kwargs):
        image = eval_shape(phi, w, *args, **kwargs)
    check_same(where, image, w, "`phi(w, ...)`", name)


def phi_hint(where: str, w: PyTree, args: PyTree, kwargs: PyTree) -> AbstractContextManager[None]:
    """Adds to an exception of Φ what Φ was given."""
    return hint(
        Exception,
        text=lambda: (
            f"`{where}` called `phi` with w = {shapes_of(w)}, args = {shapes_of(args)}, kwargs = "
            f"{shapes_of(kwargs)}: `phi` gets what the solver gets, in the same places."
            + " Where the solver returns `(w, aux)`, say `has_aux=True`."
            * isinstance(w, tuple)
        ),
    )


def partition(tree: PyTree) -> tuple[PyTree, PyTree, Callable[[PyTree, PyTree], PyTree]]:
    """The inexact leaves, the other arrays, and the function that joins the two again.

    Both parts keep the structure of `tree`, with `None` in the place of leaves that they lack; leaves
    that are not arrays stay inside the joining function.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds = ["fixed" if not _is_array(x) else "x" if is_inexact(x) else "rest" for x in leaves]
    # Not `leaves`: a function that outlives a trace must not hold its tracers.
    fixed = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == "fixed"]

    def join(x: PyTree, rest: PyTree) -> PyTree:
        sources = {
            "x": iter(jax.tree.leaves(x)),
            "rest": iter(jax.tree.leaves(rest)),
            "fixed": iter(fixed),
        }
        return jax.tree.unflatten(treedef, [next(sources[kind]) for kind in kinds])

    def of_kind(wanted: str) -> PyTree:
        part = [leaf if kind == wanted else None for leaf, kind in zip(leaves, kinds, strict=True)]
        return jax.tree.unflatten(treedef, part)

    return of_kind("x"), of_kind("rest"), join


def traced_once(
    function: Callable[..., PyTree], *args: PyTree
) -> tuple[Callable[..., PyTree], PyTree, Any]:
    """The same function, whose Python code has run once and for all, its result's shapes, its jaxpr.

    It takes arguments of these shapes and dtypes only. In a `shard_map` the types of arguments say
    more, and may be others in a loop: there the Python code runs again.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    if within_shard_map():
        return function, out, closed.jaxpr
    treedef = jax.tree.structure(out)

    def again(*args: PyTree) -> PyTree:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(treedef, leaves)

    return again, out, closed.jaxpr


def within_shard_map() -> bool:
    """Whether this is traced inside a `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def without_consts(closed: Any) -> Any:
    """The jaxpr of a closed one, for `eval_jaxpr` with any constants.

    What outlives a trace must not hold its tracers, and from JAX 0.12 on a jaxpr holds its constants.
    """
    jaxpr = closed.jaxpr
    if not hasattr(jaxpr, "with_consts"):
        return jaxpr
    return jaxpr.with_consts([None] * len(closed.consts))


class Converted(NamedTuple):
    """A function of its arguments and of the traced values that it closed over.

    Attributes:
        function: `(*args, *values)` to what the function returned of `args`.
        values: These values.
        shapes: Those of its result.
        jaxpr: Of the function.
    """

    function: Callable[..., PyTree]
    values: list[Any]
    shapes: PyTree
    jaxpr: Any


def closure_converted(function: Callable[..., PyTree], *args: PyTree) -> Converted:
    """The function of `args` and of the traced values that it closes over.

    `jax.closure_convert` leaves integers, booleans and keys behind, as they have no tangent; a rule
    that is traced later then holds a tracer of a trace that has ended.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    treedef, jaxpr = jax.tree.structure(out), without_consts(closed)
    places = [i for i, x in enumerate(closed.consts) if isinstance(x, Tracer)]
    values = [closed.consts[i] for i in places]
    fixed = [None if isinstance(x, Tracer) else x for x in closed.consts]
    del closed

    def converted(*operands: PyTree) -> PyTree:
        count = len(operands) - len(places)
        consts = list(fixed)
        for i, x in zip(places, operands[count:], strict=True):
            consts[i] = x
        leaves = jax.tree.leaves(operands[:count])
        return jax.tree.unflatten(treedef, jax.core.eval_jaxpr(jaxpr, consts, *leaves))

    return Converted(converted, values, out, jaxpr)


def closes_over_tracers(value: Any) -> bool:
    """Whether a function, or anything that it closes over, holds a traced value."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tracer):
            return True
        if id(value) in seen or isinstance(value, type | ModuleType | str | np.ndarray | jax.Array):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, tuple | list | set | frozenset):
            waiting += value
        else:
            parts = ("__self__", "__defaults__", "__kwdefaults__", "func", "args", "keywords")
            waiting += [getattr(value, name, None) for name in parts]
            waiting += [
                c.cell_contents for c in getattr(value, "__closure__", None) or () if _full(c)
            ]
            waiting += getattr(value, "__dict__", {}).values()
    return False


def _full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # Of a function that is not defined yet.
        return False


def split_lam(
    where: str, lam: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """The inexact leaves x of λ, the function x ↦ λ, and the same for a gradient.

    The gradient has `float0` zeros where λ has integers or keys, as `jax.grad` with `allow_int` has.

    Raises:
        TypeError: λ has no inexact leaf.
    """
    x, rest, join = partition(lam)
    if not jax.tree.leaves(x):
        raise TypeError(
            f"`lam` of `{where}` has no floating-point leaf to differentiate, got {shapes_of(lam)}; "
            "write `1.0` for `1`."
        )
    no_gradient = zero_tangent(rest)
    return x, lambda x: join(x, rest), lambda x_bar: join(x_bar, no_gradient)


def blank(shapes: PyTree) -> PyTree:
    """Arrays that hold nothing yet, from their shapes: infinity where inexact, else zero.

    Not NaN: whoever hunts one by `jax.debug_nans` is not to be stopped where nothing is wrong.
    """

    def nothing(s: Any) -> Any:
        if not isinstance(s, jax.ShapeDtypeStruct):  # A leaf that is no array, known already.
            return s
        return jnp.full(s.shape, jnp.inf if is_inexact(s) else 0, s.dtype)

    return jax.tree.map(nothing, shapes)


def is_inexact(leaf: Any) -> bool:
    """Whether an array or number has a floating or complex dtype."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def zero_tangent(tree: PyTree) -> PyTree:
    """The zero tangent of a pytree of arrays, `float0` where a leaf has none."""

    def zero(x: Any) -> Any:
        return jnp.zeros_like(x) if is_inexact(x) else np.zeros(np.shape(x), jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def zeros_like_inexact(tree: PyTree) -> PyTree:
    """Zeros for the inexact leaves; the others as they are."""
    return jax.tree.map(lambda x: jnp.zeros_like(x) if is_inexact(x) else x, tree)


def strongly_typed(tree: PyTree, like: PyTree = None) -> PyTree:
    """Arrays without weak types, as loops carry them at both ends; other leaves as they are.

    An inexact leaf of weak type, such as `0.0`, takes the dtype of its counterpart in `like`, as it
    would in arithmetic: `0.0` beside float32 is float32, also where 64-bit numbers are enabled.
    """
    leaves, treedef = jax.tree.flatten(tree)
    alike = like is not None and jax.tree.structure(like) == treedef

    def strong(x: Any, like: Any) -> Any:
        if not _is_array(x):
            return x
        dtype = jnp.result_type(x)
        if is_weak(x) and like is not None and jnp.issubdtype(like.dtype, jnp.number):
            with jax.numpy_dtype_promotion("standard"):  # A complex number beside real ones, too.
                dtype = jnp.result_type(x, like.dtype)
        elif not is_inexact(x):
            return jnp.asarray(x)
        return lax.convert_element_type(jnp.asarray(x), dtype)

    likes = jax.tree.leaves(like) if alike else [None] * len(leaves)
    return treedef.unflatten([strong(x, y) for x, y in zip(leaves, likes, strict=True)])


def started(where: str, phi: Phi, w0: PyTree, args: PyTree, kwargs: PyTree) -> PyTree:
    """`w0` as strongly typed arrays; a Python number in it takes the dtype that Φ gives it."""
    check_arrays(where, "w0", w0)
    image = None
    if any(map(is_weak, jax.tree.leaves(w0))):
        with phi_hint(where, w0, args, kwargs):
            image = eval_shape(phi, w0, *args, **kwargs)
    return strongly_typed(w0, image)


def settled_lam(lam: PyTree, w: PyTree) -> PyTree:
    """`lam` as strongly typed arrays; a Python number in it is as wide as the widest leaf of `w`."""
    dtypes = [jnp.finfo(jnp.result_type(x)).dtype for x in jax.tree.leaves(w) if is_inexact(x)]
    if not dtypes:
        return strongly_typed(lam)
    widest = jax.ShapeDtypeStruct((), max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits))
    return strongly_typed(lam, jax.tree.map(lambda _: widest, lam))


def alike(one: PyTree, other: PyTree) -> bool:
    """Whether two pytrees agree in structure and shapes."""
    shapes = [jax.tree.map(lambda x: tuple(jnp.shape(x)), tree) for tree in (one, other)]
    return jax.tree.structure(one) == jax.tree.structure(other) and shapes[0] == shapes[1]


def is_sharded(x: Any) -> bool:
    """Whether the type of an array, of an explicit mesh, says that it is sharded."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def is_weak(leaf: Any) -> bool:
    """Whether an inexact number is of weak type: it gives way to the dtype of what it meets."""
    if isinstance(leaf, float | complex):
        return not isinstance(leaf, np.generic)
    return getattr(leaf, "weak_type", False) and is_inexact(leaf)


def owned(tree: PyTree) -> PyTree:
    """Copies of all arrays: a state whose leaves are nobody else's, nor one another, can be donated."""
    return jax.tree.map(lambda x: jnp.copy(x) if _is_array(x) else x, tree)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):  # Not those of strings, objects or dates.
        return jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_
    kinds = (jax.Array, bool, int, float, complex, jax.ShapeDtypeStruct)
    return isinstance(leaf, kinds) or hasattr(leaf, "__jax_array__")
