"""A bilevel task on data, and the paper's five methods on it, each as one `fg.hypergradient`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import fixedgrad as fg

from ..problems.task import Task

PyTree = Any


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
