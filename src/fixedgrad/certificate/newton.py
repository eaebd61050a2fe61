"""Newton–Krylov steps for w = Φ(w, λ): where the adaptive form and the diagnostics solve for w."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..problem import Problem
from ..real_form import LAST_DIGITS, ratio, real_dtype, resolution
from ..types import Jacobian, LinearSolver, Products, PyTree, Scalar, SolveInfo, failed

tree = optax.tree

_PLAIN_STEPS = 10  # Steps of Φ, at least, where a Newton step does not bring the residual down.
LOOSE = 0.1  # Tolerance of the solves in an estimate, and of a Newton step far from the goal.


class _Newton(NamedTuple):
    """The carry of Newton–Krylov: a proposed point, the last accepted one and its residual norm.

    `effort` counts the products of the solve that proposed the point.
    """

    w: PyTree
    before: PyTree
    size: jax.Array
    proposed: jax.Array
    met: jax.Array
    amplification: jax.Array
    left: jax.Array
    effort: jax.Array
    spent: Products


def newton_krylov(
    problem: Problem,
    w: PyTree,
    tau: jax.Array,
    spent: Products,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    max_products: int | jax.Array,
    goal: jax.Array | float = 0.0,
) -> tuple[PyTree, jax.Array, jax.Array, Products]:
    """Brings ‖w − Φ(w)‖ to `tau`, or to `goal` ‖Φ(w)‖ if that is more: Newton steps with forcing terms.

    Each step linearises Φ once, at the point that the last one proposed. Where that point has not
    brought the residual down, plain steps of Φ from the point before take its place: as many as the
    failed step took products, so that where Newton's method gets nowhere, as on the plateaus of a
    network, half of the work at least is Φ's; ten only, where they lead away.

    Returns:
        w, the largest amplification ‖e‖/‖r‖ by the solves, the residual that the last one left (see
        `LooseSolves`), and what was spent in all.
    """
    norm, dtype = problem.norm, real_dtype(w)
    floor = LAST_DIGITS * resolution(w)

    def unfinished(s: _Newton) -> jax.Array:
        return ~s.met & (sum(s.spent) < max_products)

    def step(s: _Newton) -> _Newton:
        r, product = jax.linearize(lambda u: problem.equation.residual(u, problem.x), s.w)
        image = tree.sub(s.w, r)
        size = norm(r)
        rejected = s.proposed & ~(size <= 0.7 * s.size)
        target = jnp.maximum(tau, goal * norm(image))
        met = ~rejected & ((size <= target) | ~jnp.isfinite(size))
        # Where the residual may be rounding, a step that does not bring it down is the last one.
        settled = rejected & (s.size <= floor * norm(s.before))
        met |= settled
        # No more accurate than the goal asks for, nor than a Newton step can use; 1 for no step.
        forcing = jnp.clip(0.5 * target / size, 1e-4, LOOSE)
        wanted = jnp.where(met | rejected, 1.0, forcing).astype(dtype)
        e, info = make_linear_solver(wanted)(Jacobian.from_complement(product), r)
        lost = ~met & (rejected | failed(info))
        effort = products_of(info)
        many = jnp.maximum(jnp.where(rejected, s.effort, effort), _PLAIN_STEPS)

        def plain() -> tuple[PyTree, jax.Array]:
            def unfinished(carry: tuple[jax.Array, PyTree, jax.Array, jax.Array]) -> jax.Array:
                i, _, start, size = carry
                return (i < many) & ((i < _PLAIN_STEPS) | (size <= start))

            def body(carry: tuple[jax.Array, PyTree, jax.Array, jax.Array]):
                i, u, start, _ = carry
                image = problem.equation.phi(u, problem.x)
                size = norm(tree.sub(u, image))
                return i + 1, image, jnp.where(i == 0, size, start), size

            start = tree.where(rejected, s.before, s.w)
            i, u, _, _ = lax.while_loop(unfinished, body, (jnp.int32(0), start, size, size))
            return u, i

        def newton() -> tuple[PyTree, jax.Array]:
            return tree.where(settled, s.before, tree.where(met, s.w, tree.sub(s.w, e))), jnp.int32(
                0
            )

        w, steps = lax.cond(lost, plain, newton)
        spent = s.spent._replace(phi=s.spent.phi + 1 + steps, j=s.spent.j + effort)
        amplification, left = jnp.maximum(s.amplification, ratio(norm(e), size)), forcing * size
        amplification, left = tree.where(
            lost | met, (s.amplification, s.left), (amplification, left)
        )
        return _Newton(w, s.w, size, ~lost, met, amplification, left, effort, spent)

    false = jnp.asarray(False)
    infinite = jnp.full_like(norm(w), jnp.inf)
    zero = jnp.zeros_like(infinite)
    s = _Newton(w, w, infinite, false, false, zero, infinite, jnp.int32(0), spent)
    s = lax.while_loop(unfinished, step, s)
    return s.w, s.amplification, s.left, s.spent


def products_of(info: SolveInfo) -> jax.Array:
    """The products of a linear solve: one a step, and one for the true residual."""
    return info.num_steps + jnp.minimum(info.num_steps, 1)
