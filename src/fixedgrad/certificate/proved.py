"""The bound behind level "proved" of `certify`, and what would contradict its constants."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..bounds import Constants
from ..problem import Problem
from ..real_form import norm, resolution
from ..types import PyTree
from .lagrangian import Products

tree = optax.tree


class Bound(NamedTuple):
    """The bound and its two parts, ĝ, the residuals, and whether no constant was contradicted."""

    error: jax.Array
    lower: jax.Array
    linear: jax.Array
    gradient: PyTree
    residual_w: jax.Array
    residual_v: jax.Array
    holds: jax.Array
    at_floor: jax.Array
    products: Products


def bound(problem: Problem, v: PyTree, c: Constants, given: PyTree | None) -> Bound:
    """The bound of level "proved" at (w, v), and whether an observation contradicts its constants."""
    w, x = problem.w, problem.x
    r_w, r_v, g, b = problem.gradients(w, v)
    image = tree.sub(w, r_w)
    at, j = problem.equation.vjp(w, x), problem.equation.jvp(w, x).j
    eps = 8 * resolution(w)
    dtype = norm(w).dtype
    mu, q, nu1, nu2, eta1, eta2, big_l = (
        jnp.asarray(value, dtype) for value in (c.mu, c.q, c.nu1, c.nu2, c.eta1, c.eta2, c.L_Phi)
    )
    size_w = norm(r_w) + eps * (norm(w) + norm(image))
    size_v = norm(r_v) + eps * (norm(b) + 2 * norm(v))
    radius = size_w / mu
    lower = (eta2 + nu2 * norm(v)) * radius
    lower += (big_l + nu2 * radius) / mu * (eta1 + nu1 * norm(v)) * radius
    linear = (big_l + nu2 * radius) / mu * size_v
    gradient = g if given is None else given
    distance = jnp.zeros_like(lower) if given is None else norm(tree.sub(given, g))
    error = lower + linear + distance + eps * norm(g)

    # What can be observed: two points, two v, and directions that J stretches most.
    r_w2, r_v2, g2, _ = problem.gradients(image, v)
    at2 = problem.equation.vjp(image, x)
    (jt_v, bt_v), (jt_v2, bt_v2) = ((a.j(v), a.b(v)) for a in (at, at2))
    moved = norm(r_w)
    slack = 1 + 1e-6

    def stretch(_: jax.Array, u: PyTree) -> PyTree:
        u = at.j(j(u))
        return tree.scale(1 / jnp.maximum(norm(u), jnp.finfo(dtype).tiny), u)

    u = lax.fori_loop(0, 8, stretch, tree.add(tree.add(r_w, v), b))
    ju = j(u)
    noise = eps * (norm(image) + norm(v) + norm(b) + norm(g))
    contraction = ~jnp.isfinite(q) | (
        (norm(r_w2) <= q * moved * slack + noise)
        & (norm(ju) <= q * norm(u) * slack + noise)
        & (norm(jt_v) <= q * norm(v) * slack + noise)
    )
    holds = (
        contraction
        & (norm(tree.sub(u, ju)) * slack + noise >= mu * norm(u))
        & (norm(tree.sub(v, jt_v)) * slack + noise >= mu * norm(v))
        & (norm(bt_v) <= big_l * norm(v) * slack + noise)
        & (norm(tree.sub(jt_v2, jt_v)) <= nu1 * moved * norm(v) * slack + noise)
        & (norm(tree.sub(bt_v2, bt_v)) <= nu2 * moved * norm(v) * slack + noise)
        & (
            norm(tree.sub(tree.sub(r_v2, jt_v2), tree.sub(r_v, jt_v)))
            <= eta1 * moved * slack + noise
        )
        & (norm(tree.sub(tree.sub(g2, bt_v2), tree.sub(g, bt_v))) <= eta2 * moved * slack + noise)
    )
    return Bound(
        error,
        lower,
        linear,
        gradient,
        moved,
        norm(r_v),
        holds,
        moved <= eps * (norm(w) + norm(image)),
        Products(jnp.int32(5), jnp.int32(10), jnp.int32(14)),
    )
