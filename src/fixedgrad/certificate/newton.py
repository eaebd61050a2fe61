"""Newton–Krylov steps for w = Φ(w, λ): where the adaptive form and the diagnostics solve for w."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..realify import norm, resolution
from ..types import LinearSolver, PyTree, Scalar, SolveInfo, failed
from .lagrangian import Packed, Products, ratio

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
    gain: jax.Array
    left: jax.Array
    spent: Products


def newton_krylov(
    packed: Packed,
    w: PyTree,
    tau: jax.Array,
    spent: Products,
    linear_solver: Callable[[Scalar], LinearSolver],
    max_products: int,
    goal: jax.Array | float = 0.0,
) -> tuple[PyTree, jax.Array, jax.Array, Products]:
    """Brings ‖w − Φ(w)‖ to `tau`, or to `goal` ‖Φ(w)‖ if that is more: Newton steps with forcing terms.

    Each step linearises Φ once, at the point that the last one proposed. Where that point has not
    brought the residual down, plain steps of Φ from the point before take its place.

    Returns:
        w, the largest gain ‖e‖/‖r‖ of the solves, the residual that the last one left (see `Seen`), and
        what was spent in all.
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
        gain, left = jnp.maximum(s.gain, ratio(norm(e), size)), forcing * size
        gain, left = tree.where(lost | met, (s.gain, s.left), (gain, left))
        return _Newton(w, s.w, size, ~lost, met, gain, left, spent)

    false = jnp.asarray(False)
    infinite = jnp.full_like(norm(w), jnp.inf)
    s = _Newton(w, w, infinite, false, false, jnp.zeros_like(infinite), infinite, spent)
    s = lax.while_loop(unfinished, step, s)
    return s.w, s.gain, s.left, s.spent


def products_of(info: SolveInfo) -> jax.Array:
    """What a linear solve takes: one a step, and one for the true residual."""
    return info.num_steps + jnp.minimum(info.num_steps, 1)
