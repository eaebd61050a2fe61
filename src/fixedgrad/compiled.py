"""Compiled once: a function under a `jit` of its own, kept for as long as what it was made of.

A second call with the same functions, options and shapes traces nothing.
"""

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

from .leaves import Layout, split_static
from .types import PyTree


@jax.tree_util.register_pytree_node_class
class _Result:
    """What a compiled function returns: arrays, and leaves that are none in the structure."""

    def __init__(self, layout: Layout, arrays: list[Any]):
        self.layout, self.arrays = layout, arrays

    def tree_flatten(self) -> tuple[list[Any], Layout]:
        return self.arrays, self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, arrays: list[Any]) -> "_Result":
        return cls(layout, list(arrays))


def _value(result: _Result) -> PyTree:
    return result.layout.join(result.arrays)


class Compiled:
    """A function under a `jit` of its own; leaves of arguments and results may be no arrays.

    It is compiled once for all calls with the same shapes and the same leaves that are no arrays.
    """

    def __init__(self, function: Callable[..., PyTree]):
        functools.update_wrapper(self, function)

        def call(layout: Layout, arrays: list[jax.Array]) -> PyTree:
            args, kwargs = layout.join(arrays)
            return _Result(*split_static(function(*args, **kwargs)))

        self._jitted = jax.jit(call, static_argnums=0)

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return _value(self._jitted(*split_static((args, kwargs))))

    def eval_shape(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """The shapes of the result; what is traced for them is not traced again."""
        return _value(self._jitted.eval_shape(*split_static((args, kwargs))))


def compiled_for(
    functions: tuple[Callable[..., Any], ...],
    options: Hashable,
    make: Callable[..., Callable[..., PyTree]],
) -> Compiled:
    """`Compiled(make(*functions))`, made once for these functions and options, kept while they live.

    What is kept refers to the functions weakly: a program goes when one of its functions goes. A
    function that cannot be referred to so has its program made at every call.
    """
    try:
        references = [weakref.ref(function) for function in functions]
        table = _PROGRAMS
        for function in functions:
            table = table.setdefault(function, weakref.WeakKeyDictionary())
    except TypeError:
        return Compiled(make(*functions))
    programs = table.setdefault(_OPTIONS, {})
    if options not in programs:

        def call(*args: PyTree) -> PyTree:
            return make(*(reference() for reference in references))(*args)

        programs[options] = Compiled(call)
    return programs[options]


class _Options:
    """The key of the innermost table of programs."""


_OPTIONS = _Options()
_PROGRAMS: Any = weakref.WeakKeyDictionary()
