"""How things print: what a factory made as the call that made it, records of arrays as what they say.

No addresses, no weights. A record whose arrays have no values to look at (under `jit`, donated, on
other machines) prints their shapes.
"""

import collections
import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Iterable
from html import escape
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer

from .errors import shapes_of

Factory = TypeVar("Factory", bound=Callable[..., Any])


class NamedFunction:
    """A function that prints as the text it was given."""

    def __init__(self, function: Callable[..., Any], text: str):
        functools.update_wrapper(self, function)
        self._function, self._text = function, text

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return self._text


def by_name(function: Factory) -> Factory:
    """The function, printing as its name: for defaults, which `help` shows."""
    return cast(Factory, NamedFunction(function, function.__name__))


def printed(factory: Factory) -> Factory:
    """The factory, whose results print as the call that made them, such as `cg(num_steps=3)`.

    A result that is a function is wrapped in `NamedFunction`; a record has a field `name` for the text.
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = factory(*args, **kwargs)
        text = f"{factory.__name__}({_arguments(signature, args, kwargs)})"
        if hasattr(made, "_replace"):
            return made._replace(name=text)
        if dataclasses.is_dataclass(made):
            return dataclasses.replace(cast(Any, made), name=text)
        return NamedFunction(made, text)

    return cast(Factory, make)


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> str:
    cells = []
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()  # What nobody chose is said where its place is in the call.
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            cells += [f"{key}={_short(x)}" for key, x in value.items()]
        elif parameter.kind == inspect.Parameter.KEYWORD_ONLY:
            if value is not parameter.default and _short(value) != _short(parameter.default):
                cells.append(f"{name}={_short(value)}")
        else:
            cells.append(_short(value))
    return ", ".join(cells)


def _short(value: Any) -> str:
    if isinstance(value, Tracer):
        return f"traced {jax.typeof(value)}"
    if isinstance(value, jax.Array | np.ndarray) and np.size(value) != 1:
        return shapes_of(value)
    if isinstance(value, float | jax.Array | np.ndarray | np.generic):
        return number(value)
    text = repr(value)
    if " at 0x" in text or len(text) > 200:
        return getattr(value, "__name__", type(value).__name__)
    return text


def number(value: Any) -> str:
    """A scalar to three digits."""
    return f"{np.asarray(value).item():.3g}"


def count(number: Any, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{int(number)} {noun}{'s' * (int(number) != 1)}"


def values_of(*leaves: Any) -> list[np.ndarray] | None:
    """The numbers as NumPy arrays; `None` where any of them cannot be looked at."""
    for x in leaves:
        if isinstance(x, jax.Array):
            if isinstance(x, Tracer) or x.is_deleted():
                return None
            if not (x.is_fully_addressable or x.is_fully_replicated):
                return None
        elif not isinstance(x, bool | int | float | np.ndarray | np.generic):
            return None
    return [np.asarray(x) for x in leaves]


def record(of: tuple, *cells: str) -> str:
    """`Name(cell, cell)` for a record."""
    return f"{type(of).__name__}({', '.join(cells)})"


def shapes_in(of: Any) -> str:
    """A record with the shapes of its fields in their place."""
    return record(of, *(f"{name}={shapes_of(x)}" for name, x in of._asdict().items()))


def member(kind: type[enum.IntEnum], value: Any) -> str:
    """The name of a member; the number where there is none of that value."""
    number = int(value)
    return kind(number).name if number in kind.__members__.values() else str(number)


def tally(noun: str, names: Iterable[str]) -> str:
    """`32 solves: 30 CONVERGED, 2 MAX_STEPS`, the most frequent first."""
    counted = collections.Counter(names)
    parts = ", ".join(f"{n} {name}" for name, n in counted.most_common())
    return f"{count(counted.total(), noun)}: {parts}"


def html(caption: str, fields: dict[str, Any], **kinds: type[enum.IntEnum]) -> str:
    """Fields as a table, for notebooks; `kinds` are those of fields that are codes."""
    cells = {name: _cell(x, kinds.get(name)) for name, x in fields.items()}
    return html_table(caption, (), [[name, x] for name, x in cells.items() if x])


def html_table(caption: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in HTML; the first cell of each row is what the row is about."""
    style = "text-align: left; padding: 0.1em 1em 0.1em 0"
    lines = [f'<table><caption style="{style}"><b>{escape(caption)}</b></caption>']
    if header := list(header):
        cells = "".join(f'<th style="{style}">{escape(x)}</th>' for x in header)
        lines.append(f"<tr>{cells}</tr>")
    for first, *others in rows:
        cells = "".join(f'<td style="{style}">{escape(x)}</td>' for x in others)
        lines.append(f'<tr><th style="{style}">{escape(first)}</th>{cells}</tr>')
    return "".join([*lines, "</table>"])


def _cell(value: Any, kind: type[enum.IntEnum] | None) -> str:
    """A value for a person: a number, the name of a code, a record as it prints, or shapes."""
    if value is None or (isinstance(value, tuple) and not value):
        return ""
    known = values_of(value)
    if known is None:
        return repr(value) if hasattr(value, "_replace") else shapes_of(value)
    x = known[0]
    if x.ndim:
        return shapes_of(value)
    if kind is not None:
        return member(kind, x)
    if x.dtype == bool:
        return "yes" if x else "no"
    return f"{x.item()}" if np.issubdtype(x.dtype, np.integer) else number(x)
