"""What to cite: the references of the estimators, solvers and loops that were used."""

import inspect
import re
from typing import Any

from .errors import show

_SOURCE = (
    "Riccardo Grazzi, Luca Franceschi, Massimiliano Pontil, Saverio Salzo, On the Iteration "
    "Complexity of Hypergradient Computation, ICML 2020, PMLR 119."
)


def citation(*used: Any) -> str:
    """The references of what was used, a line each, beside those of the theory and of the library.

    What the factories of this library make prints as the call that made it, and is looked up by the
    names in that call. So one argument, such as the result of `bilevel` or of `hypergradient`, has all.

    Cost: nothing to speak of. When not to use it: for a decorated solver, which is a function; give
    the estimator and the solver.

    Args:
        used: What the factories of this library made, or the factories themselves.

    Returns:
        Text to print.

    Raises:
        TypeError: An argument is neither.

    >>> import fixedgrad as fg
    >>> print(fg.citation(fg.aid(fg.cg(num_steps=9))))  # doctest: +ELLIPSIS
    fixedgrad ...
    theory: Riccardo Grazzi, Luca Franceschi, Massimiliano Pontil, Saverio Salzo, ...
    aid: Grazzi et al., ICML 2020, Algorithm 2 and Theorem 2.2; Pedregosa, Hyperparameter ...
    cg: ...
    """
    import fixedgrad  # Whose names are looked up.

    names: dict[str, None] = {}
    for one in used:
        text = getattr(one, "__name__", "") or repr(one)
        found = [name for name in re.findall(r"\w+", text) if name in fixedgrad.__all__]
        if not found:
            raise TypeError(
                f"`citation` looks up what factories of `fixedgrad` made, got {show(one)}; give the "
                "estimator, the solver or the loop, as in `citation(aid(cg(num_steps=9)))`."
            )
        names |= dict.fromkeys(found)
    lines = [f"fixedgrad {fixedgrad.__version__}", f"theory: {_SOURCE}"]
    references = {name: _references(getattr(fixedgrad, name)) for name in names}
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in references.items() if text)])


def _references(function: Any) -> str:
    """The section of that name of a docstring, as one line."""
    _, _, section = (inspect.getdoc(function) or "").partition("\nReferences:\n")
    return " ".join(section.split())
