"""A bilevel task on data, and the paper's five methods on it, each as one `fg.hypergradient`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import fixedgrad as fg

PyTree = Any


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


class Method(NamedTuple):
    """A method of the paper on a task: a hypergradient, and w read off its state.

    Attributes:
        hypergrad: For `fg.bilevel`.
        w0: The start of its lower-level state.
        read: `read(state) -> w`.
    """

    hypergrad: fg.Hypergradient
    w0: PyTree
    read: Callable[[PyTree], PyTree]


def warm_lower() -> fg.Start:
    """The lower level starts at the last w, the linear system at v = 0: the paper's warm start."""
    return fg.Start(lambda w0, _: w0, lambda memory: (memory, None), lambda _, w, __: w)


def method(task: Task, name: str, t: int, k: int) -> Method:
    """One of the five methods.

    ITD and FP see the map that the solver iterates, heavy ball's included; CG sees gradient descent,
    since it needs a symmetric J. All five compute the same w_t: with heavy ball every solve starts
    without momentum.

    Args:
        task: The problem.
        name: "itd", "fp_t", "fp_k", "cg_t" or "cg_k".
        t: Steps of the lower-level solver.
        k: Steps of the linear solver in "fp_k" and "cg_k"; in "fp_t" and "cg_t" it is t.
    """
    kind, _, steps = name.partition("_")
    steps = t if steps == "t" else k
    iterate = fg.picard(task.solver_map, num_steps=t)

    def solve(w: PyTree, lam: PyTree, *data: Any) -> PyTree:
        start = fg.Momentum(w, w) if task.momentum else w
        return iterate(start, *task.prepare(lam, *data))

    def read(state: PyTree) -> PyTree:
        return state.w if task.momentum else state

    def prepared(phi: fg.Phi) -> fg.Phi:
        return lambda w, lam, *data: phi(w, *task.prepare(lam, *data))

    if kind == "fp":  # The state is the map's own, with momentum.
        hypergrad = fg.hypergradient(
            lambda state, lam, *data: task.outer(read(state), lam, *data),
            prepared(task.solver_map),
            lambda state, lam, *data: solve(read(state), lam, *data),
            fg.aid(fg.fp(num_steps=steps)),
            start=task.start,
            on_failure="ignore",
        )
        return Method(hypergrad, fg.Momentum(task.w, task.w) if task.momentum else task.w, read)
    hypergrad = fg.hypergradient(
        task.outer,
        prepared(task.descent),
        lambda w, lam, *data: read(solve(w, lam, *data)),
        fg.itd() if kind == "itd" else fg.aid(fg.cg(num_steps=steps)),
        start=task.start,
        on_failure="ignore",  # Few steps are asked for, however little they achieve.
    )
    return Method(hypergrad, task.w, lambda w: w)
