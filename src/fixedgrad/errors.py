"""Checks of arguments, and how values are shown in messages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .types import PyTree


def check_count(where: str, name: str, count: object) -> None:
    """Raises `ValueError` unless `count` is a positive Python integer."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(
            f"`{name}` of `{where}` must be a positive integer known before tracing, got "
            f"{show(count)}."
        )


def check_number(
    where: str, name: str, value: object, accept: Callable[[float], bool], wanted: str
) -> None:
    """Raises `ValueError` unless `value` is a real scalar, acceptable if it is concrete."""
    shape, dtype = np.shape(value), jnp.result_type(value) if _is_numeric(value) else None  # pyright: ignore
    if (
        dtype is None
        or shape != ()
        or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    ):
        raise ValueError(f"`{name}` of `{where}` must be {wanted}, got {show(value)}.")
    if not isinstance(value, Tracer) and not accept(float(value)):  # pyright: ignore
        raise ValueError(f"`{name}` of `{where}` must be {wanted}, got {show(value)}.")


def check_callable(where: str, name: str, value: object, signature: str) -> None:
    """Raises `TypeError` unless `value` is callable."""
    if not callable(value):
        raise TypeError(
            f"`{name}` of `{where}` must be a function `{signature}`, got {show(value)}."
        )


def check_same(where: str, got: PyTree, wanted: PyTree, got_name: str, wanted_name: str) -> None:
    """Raises `TypeError` unless two pytrees agree in structure, shapes and dtypes."""
    # Not as text: a class need not have a `repr`, nor one that shows what it holds.
    if _described(got) != _described(wanted):
        both = shapes_of(wanted), shapes_of(got)
        one, other = both if both[0] != both[1] else (_in_full(wanted), _in_full(got))
        raise TypeError(
            f"`{where}`: {got_name} must have the structure, shapes and dtypes of {wanted_name}.\n"
            f"  {wanted_name}: {one}\n"
            f"  {got_name}: {other}\n"
            "Make the two agree; where only dtypes differ, cast one of them with `.astype`."
        )


def check_inexact(where: str, name: str, tree: PyTree) -> None:
    """Raises `TypeError` unless every leaf of `tree` is a floating-point or complex array."""
    if not all(
        _is_numeric(x, complex) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        for x in jax.tree.leaves(tree)
    ):
        raise TypeError(
            f"`{name}` of `{where}` must hold floating-point or complex arrays only, got "
            f"{shapes_of(tree)}; cast integers, as in `1.0` for `1`, and keep keys elsewhere."
        )


def check_scalar(where: str, value: PyTree, name: str = "outer") -> None:
    """Raises `TypeError` unless `value` (an array or its shape) is one real scalar."""
    numeric = _is_numeric(value) or isinstance(value, jax.ShapeDtypeStruct)
    real = numeric and jnp.issubdtype(jnp.result_type(value), jnp.floating)  # pyright: ignore
    if not real or np.shape(value) != ():
        raise TypeError(
            f"`{name}` of `{where}` must return one real scalar, got {shapes_of(value)}; sum or "
            "average the losses, and return auxiliary output elsewhere."
        )


@contextmanager
def hint(*exceptions: type[Exception], text: Callable[[], str]) -> Iterator[None]:
    """Adds a note to an exception of code that is not ours: what was going on, what to do."""
    try:
        yield
    except exceptions as error:
        error.add_note(text())
        raise


@contextmanager
def no_custom_vjp(text: str) -> Iterator[None]:
    """Says what to do instead where JAX refuses forward mode of a `custom_vjp`; once."""
    try:
        yield
    except TypeError as error:
        told = any("`fixedgrad." in note for note in getattr(error, "__notes__", ()))
        if "custom_vjp" in str(error) and not told:
            error.add_note(text)
        raise


def _is_numeric(value: object, *more: type) -> bool:
    kinds = (int, float, np.ndarray, np.generic, jax.Array, *more)
    return isinstance(value, kinds) and not isinstance(value, bool)


def show(value: object) -> str:
    """A value and its type, for an error message."""
    if isinstance(value, Tracer):
        return f"a traced {jax.typeof(value)}"
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} of type `{type(value).__name__}`"


def shapes_of(tree: PyTree) -> str:
    """One line with the shapes and dtypes of a pytree, such as `{'a': float32[3]}`."""
    treedef, leaves = _described(tree)
    try:
        text = str(jax.tree.unflatten(treedef, [_Bare(leaf) for leaf in leaves]))
    except Exception:  # A class that looks at its leaves.
        text = ""
    return text if text and " object at 0x" not in text else _in_full(tree)


def _in_full(tree: PyTree) -> str:
    """The same, in JAX's words for the structure."""
    treedef, leaves = _described(tree)
    return f"{treedef} of ({', '.join(leaves)})"


def _described(tree: PyTree) -> tuple[Any, list[str]]:
    """The structure of a pytree, and shape and dtype of each leaf."""

    def leaf(x: Any) -> str:
        if isinstance(x, _Bare):
            return x
        if not hasattr(x, "dtype"):
            x = jnp.asarray(x) if _is_numeric(x) or isinstance(x, bool | complex) else x
        if not hasattr(x, "dtype"):
            return type(x).__name__
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"

    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [leaf(x) for x in leaves]


class _Bare(str):
    """A string that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
