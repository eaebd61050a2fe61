"""Newton–Krylov steps for w = Φ(w, λ): where the adaptive form and the diagnostics solve for w."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..realify import norm, resolution
from ..types import LinearSolver, PyTree, Scalar, SolveInfo, failed
from .dual_weighted import Packed, Products

tree = optax.tree

_PLAIN_STEPS = 10  # Steps of Φ where a Newton step does not bring the residual down.
LOOSE = 0.1  # Tolerance of the solves in an estimate, and of a Newton step far from the goal.


class _Newton(NamedTuple):
    """The carry of Newton–Krylov: a point to be judged, the last one accepted and its residual norm."""

    w: PyTree
    before: PyTree
    size: jax.Array
    proposed: jax.Array
    met: jax.Array
    spent: Products


def newton_krylov(
    packed: Packed,
    w: PyTree,
    tau: jax.Array,
    spent: Products,
    linear_solver: Callable[[Scalar], LinearSolver],
    max_products: int,
    goal: jax.Array | float = 0.0,
) -> tuple[PyTree, Products]:
    """Brings ‖w − Φ(w)‖ to `tau`, or to `goal` ‖Φ(w)‖ if that is more: Newton steps with forcing terms.

    Each step linearises Φ once, at the point that the last one proposed. Where that point has not
    brought the residual down, plain steps of Φ from the point before take its place.
    """
    floor = 16 * resolution(w)

    def unfinished(s: _Newton) -> jax.Array:
        return ~s.met & (sum(s.spent) < max_products)

    def step(s: _Newton) -> _Newton:
        image, jvp = jax.linearize(lambda u: packed.phi(u, packed.x), s.w)
        r = tree.sub(s.w, image)
        size = norm(r)
        rejected = s.proposed & ~(size <= 0.7 * s.size)
        target = jnp.maximum(jnp.maximum(tau, goal * norm(image)), floor * norm(s.w))
        met = ~rejected & ((size <= target) | ~jnp.isfinite(size))
        # No more accurate than the goal asks for, nor than a Newton step can use; 1 for no step.
        forcing = jnp.clip(0.5 * target / size, 1e-4, LOOSE)
        e, info = linear_solver(jnp.where(met | rejected, 1.0, forcing))(jvp, r)
        lost = rejected | (failed(info) & ~met)

        def plain() -> PyTree:
            start = tree.where(rejected, s.before, s.w)
            return lax.fori_loop(0, _PLAIN_STEPS, lambda _, u: packed.phi(u, packed.x), start)

        w = lax.cond(lost, plain, lambda: tree.where(met, s.w, tree.sub(s.w, e)))
        extra = jnp.where(lost, 1 + _PLAIN_STEPS, 1).astype(jnp.int32)
        spent = s.spent._replace(phi=s.spent.phi + extra, j=s.spent.j + products_of(info))
        return _Newton(w, s.w, size, ~lost, met, spent)

    false = jnp.asarray(False)
    s = _Newton(w, w, jnp.full_like(norm(w), jnp.inf), false, false, spent)
    s = lax.while_loop(unfinished, step, s)
    return s.w, s.spent


def products_of(info: SolveInfo) -> jax.Array:
    """What a linear solve takes: one a step, and one for the true residual."""
    return info.num_steps + jnp.minimum(info.num_steps, 1)
