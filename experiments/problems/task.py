"""A bilevel problem on data, as the tables of the paper have them: `Task`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import fixedgrad as fg

PyTree = Any

# Of the paper: the lower level starts at the last w, the linear system at v = 0.
PAPER_START = fg.separately(w=fg.warm(), v=fg.cold())


class Task(NamedTuple):
    """A bilevel problem on data, as Table 1 has them.

    The maps take `(w, *system)`, where `system` is what `prepare` makes of λ and the data once for
    each solve, such as a kernel matrix and the step size for it.

    Attributes:
        lam: λ₀.
        w: w₀.
        data: Arrays, passed on to every function below after λ.
        prepare: `prepare(lam, *data) -> system`, a tuple.
        solver_map: The map that the lower-level solver iterates; ITD and FP differentiate it.
        descent: The gradient-descent map with the same fixed point, whose J is symmetric, for CG.
        momentum: Whether `solver_map` works on `fg.Momentum`.
        outer: `outer(w, lam, *data) -> scalar`.
        accuracy: `accuracy(w, lam, *data) -> scalar`, on the test set, in [0, 1].
        exact: `exact(w, lam, *data) -> w(lam)`, started at an approximate w.
        start: Where each solve of the lower level starts.
        settings: What a reader needs to repeat it.
    """

    lam: PyTree
    w: PyTree
    data: tuple[Any, ...]
    prepare: Callable[..., tuple[Any, ...]]
    solver_map: fg.Phi
    descent: fg.Phi
    momentum: bool
    outer: fg.Outer
    accuracy: Callable[..., jax.Array]
    exact: Callable[..., PyTree]
    start: fg.Start
    settings: dict[str, Any]
