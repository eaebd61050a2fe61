"""The lower level of a `Problem` by Newton–Krylov: for the adaptive form and the diagnostics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ..iteration import Measured
from ..lower.newton import Newton, newton_krylov
from ..problem import Problem
from ..real_form import LAST_DIGITS, resolution
from ..types import LinearSolver, Products, PyTree, Scalar


def solve_for_w(
    problem: Problem,
    w: PyTree,
    tau: jax.Array,
    spent: Products,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    max_products: int | jax.Array,
    goal: jax.Array | float = 0.0,
) -> Newton:
    """Brings ‖w − Φ(w)‖ to `tau`, or to `goal` ‖Φ(w)‖ if that is more."""
    norm, floor = problem.norm, LAST_DIGITS * resolution(w)

    def judge(w: PyTree, image: PyTree) -> Measured:
        tolerance = jnp.maximum(tau, goal * norm(image))
        size = norm(optax.tree.sub(w, image))
        return Measured(size, tolerance, floor * norm(w), jnp.asarray(False))

    return newton_krylov(
        problem.equation,
        problem.x,
        w,
        judge,
        make_linear_solver,
        lambda s: jnp.asarray(sum(s.spent)) < max_products,
        spent=spent,
    )
