"""Options beside data: in a call that takes both, every keyword is an option.

Data by keyword is `kwargs=`. So a misspelt option is a `TypeError` of Python's that names it, and no
data is taken for an option.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import check_callable, show
from ..estimators import check_linear_solver
from ..linear import gmres
from ..printing import by_name
from ..types import LinearSolver, PyTree, Scalar

NO_KWARGS: Mapping[str, PyTree] = MappingProxyType({})


def check_kwargs(
    where: Callable[..., Any],
    functions: dict[str, Callable[..., Any]],
    num_positional: int,
    kwargs: object,
    options: dict[str, Any],
) -> dict[str, PyTree]:
    """`kwargs` as a dictionary.

    Args:
        where: The public function that was called; its defaults tell which options were given.
        functions: Φ, E and what else gets the data, by the name of the argument.
        num_positional: How many positional arguments they get.
        kwargs: What they get by keyword.
        options: The options of the call.

    Raises:
        TypeError: `kwargs` is no mapping from strings; or an option was given whose name is that of a
            parameter which the data leaves to its default: it may have been meant for that one.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TypeError(
            f"`kwargs` of `{where.__name__}` must be a mapping from names to data, got "
            f'{show(kwargs)}; write kwargs={{"x": x}} for what `phi(w, lam, x=x)` gets.'
        )
    defaults = where.__kwdefaults__ or {}
    given = {name for name, value in options.items() if value is not defaults.get(name, value)}
    for name, function in functions.items():
        try:
            signature = inspect.signature(function)
            bound = signature.bind_partial(*range(num_positional), **kwargs).arguments
        except (TypeError, ValueError):  # It has no signature, or says by itself what it lacks.
            continue
        for option in sorted(given & signature.parameters.keys() - bound.keys()):
            raise TypeError(
                f"`{option}` is an option of `{where.__name__}` and a parameter of `{name}` as well, "
                f'to which the data gives no value: write kwargs={{"{option}": ...}} for the '
                f"parameter, and give `{name}` both where you mean the option."
            )
    return dict(kwargs)


@by_name
def krylov(rtol: Scalar, max_steps: int = 1000) -> LinearSolver:
    """What solves with A and Aᵀ where the caller has no wish: right for any invertible A."""
    return gmres(max_steps=max_steps, rtol=rtol, restart=50)


def check_factory(where: str, make: object) -> None:
    """Raises `TypeError` unless `make_linear_solver` makes a linear solver of a tolerance."""
    name, signature = "make_linear_solver", "make_linear_solver(rtol) -> LinearSolver"
    check_callable(where, name, make, signature)
    try:
        check_linear_solver(where, make(0.1))  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        raise TypeError(
            f"`{name}` of `{where}` must be a function `{signature}`, got {show(make)}, of "
            f"which {name}(0.1) is not one: {error} Write `lambda rtol: cg(max_steps=1000, rtol=rtol)`."
        ) from None
