"""Whether Φ and the solver mean the same by the same arguments: `same_arguments`."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .errors import show
from .types import PyTree


def same_arguments(
    where: str, phi: Callable[..., Any], solver: Callable[..., Any]
) -> Callable[[tuple[PyTree, ...], dict[str, PyTree]], None]:
    """The check of a call's arguments after w; what it needs of the two signatures is read once.

    Names may differ, and signatures that cannot be read, or hold `*args` and `**kwargs` alone, are
    not judged. What is refused goes by the same name in both and would have another value in Φ.

    Raises:
        TypeError: The solver is a method that is not bound; two parameters of the same names stand in
            another order; from the check, a positional argument has one name here and another there
            that both know, or a parameter that the call does not give has another default.
    """
    (start, ours), (_, theirs) = _parameters(solver), _parameters(phi)
    if start == "self":
        raise TypeError(
            f"`{where}`: the solver's first argument must be w0, got the method {show(solver)}, whose "
            "first is `self`. Decorate within a method, as in "
            "`fixed_point(phi, estimator)(self.solve)`: there `self` is bound."
        )
    here, there = _positions(ours), _positions(theirs)
    shared = [name for name in ours if name in theirs and not name.startswith("_")]
    ordered = [name for name in shared if name in here and name in there]
    if ordered != sorted(ordered, key=there.__getitem__):
        _refuse_order(where, ours, theirs)
    defaults = [(name, ours[name].default, theirs[name].default) for name in shared]
    unequal = [row for row in defaults if _differ(*row[1:])]

    def check(args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> None:
        for one, other in zip(list(here)[: len(args)], there, strict=False):
            if one != other and (one in shared or other in shared):
                _refuse_order(where, ours, theirs)
        for name, one, other in unequal:
            places = [positions.get(name, len(args)) for positions in (here, there)]
            if name not in kwargs and all(place >= len(args) for place in places):
                raise TypeError(
                    f"`{where}`: the parameter `{name}` has the default {show(one)} in the solver and "
                    f"{show(other)} in `phi`, and the call does not give it; give it in the call, or "
                    "make the defaults equal."
                )

    return check


def _refuse_order(where: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    raise TypeError(
        f"`{where}`: the solver and `phi` get the same arguments in the same places, but do not name "
        f"them in the same order: the solver has ({', '.join(['w0', *ours])}), `phi` has "
        f"({', '.join(['w', *theirs])}); give both the same order."
    )


def _parameters(function: Callable[..., Any]) -> tuple[str, dict[str, inspect.Parameter]]:
    """The name of the first parameter, w, and the named ones after it; none if it has no signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "", {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: p for p in parameters[1:] if p.kind not in variadic}
    return parameters[0].name if parameters else "", named


def _positions(parameters: dict[str, inspect.Parameter]) -> dict[str, int]:
    """The place after w of each parameter that may be given by position."""
    places = [p.name for p in parameters.values() if p.kind != inspect.Parameter.KEYWORD_ONLY]
    return {name: place for place, name in enumerate(places)}


def _differ(one: PyTree, other: PyTree) -> bool:
    """Whether two defaults are known to be different values."""
    if one is inspect.Parameter.empty or other is inspect.Parameter.empty:
        return False
    (xs, one_def), (ys, other_def) = jax.tree.flatten(one), jax.tree.flatten(other)
    return one_def != other_def or any(map(_leaves_differ, xs, ys))


def _leaves_differ(x: Any, y: Any) -> bool:
    if x is y or isinstance(x, Tracer) or isinstance(y, Tracer):
        return False
    with jax.ensure_compile_time_eval():
        return np.shape(x) != np.shape(y) or not bool(np.all(x == y))
