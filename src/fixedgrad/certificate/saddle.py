"""Do steps of Φ lead away from the fixed point near w? Lanczos's method on I − J answers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..problem import Problem
from ..real_form import COMPUTATION, inner, norm, random_signs, resolution
from ..types import Products, PyTree

tree = optax.tree

_MAX_PRODUCTS = 20


def leads_away(
    problem: Problem, w: PyTree, e_w: PyTree, wanted: bool | jax.Array
) -> tuple[jax.Array, Products]:
    """Whether steps of Φ lead away from a fixed point at w, and what it took to see, where `wanted`.

    Args:
        problem: Φ.
        w: Where.
        e_w: Lanczos's method starts at this and a random direction.
        wanted: False for an answer of False.
    """
    of_phi = problem.equation.vjp(w, problem.x)
    repels, products = repelled(lambda u: tree.conj(of_phi.j(tree.conj(u))), e_w, wanted)
    evaluations = jnp.asarray(wanted, jnp.int32)
    return repels, Products(evaluations, jnp.zeros_like(products), products)


def repelled(
    jt: Callable[[PyTree], PyTree], e_w: PyTree, wanted: bool | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether J is symmetric with an eigenvalue above 1, and the products that it took to see.

    Lanczos's method on A = I − J from e_w and a random direction, which has a part in every
    eigenvector. With T = LDLᵀ its tridiagonal matrix, a negative pivot in D shows a vector u with
    ⟨u, Au⟩ < 0, as in the conjugate gradient method. J is symmetric where ⟨q₋, Aq⟩ = ⟨Aq₋, q⟩ for all
    pairs of neighbours. Eigenvalues of J above 1 by less than about a hundredth of ‖A‖ may go unseen.
    """
    dtype = norm(e_w).dtype
    eps = resolution(e_w)

    def unit(u: PyTree) -> tuple[PyTree, jax.Array]:
        size = norm(u)
        scale = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1.0), 0.0)
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, u), size

    def step(s: _Lanczos) -> _Lanczos:
        a_q = tree.sub(s.q, jt(s.q))
        alpha, back = inner(s.q, a_q), inner(s.before, a_q)
        first = s.products == 0
        skew = jnp.where(first, 0.0, jnp.abs(back - s.beta))
        rest = jax.tree.map(
            lambda a, q, b: a - alpha.astype(a.dtype) * q - s.beta.astype(a.dtype) * b,
            a_q,
            s.q,
            s.before,
        )
        scale = jnp.maximum(s.scale, norm(a_q))
        pivot = alpha + COMPUTATION * eps * scale - jnp.where(first, 0.0, s.beta**2 / s.pivot)
        following, beta = unit(rest)
        spanned = beta <= eps**0.5 * scale  # An invariant subspace: there is no more to see.
        symmetric = s.symmetric & (skew <= eps**0.5 * scale)
        count = s.products + 1
        negative = s.negative | (pivot < 0)
        done = spanned | ~symmetric | (negative & (count > 2)) | (count >= _MAX_PRODUCTS)
        pivot = jnp.where(pivot == 0, jnp.finfo(dtype).tiny, pivot)
        return _Lanczos(
            following, s.q, beta, pivot, scale, count, negative, symmetric, done | ~(scale > 0)
        )

    # Of different lengths, so that they cannot cancel, as they might in one dimension.
    start, _ = unit(tree.add_scale(unit(e_w)[0], 0.5, unit(random_signs(e_w))[0]))
    zero, false = jnp.zeros((), dtype), jnp.asarray(False)
    s = _Lanczos(start, start, zero, zero, zero, jnp.int32(0), false, ~false, ~jnp.asarray(wanted))
    s = lax.while_loop(lambda s: ~s.done, step, s)
    return s.symmetric & s.negative, s.products


class _Lanczos(NamedTuple):
    """The carry: two vectors, the off-diagonal and the pivot of T, ‖A‖ as observed, what is known."""

    q: PyTree
    before: PyTree
    beta: jax.Array
    pivot: jax.Array
    scale: jax.Array
    products: jax.Array
    negative: jax.Array
    symmetric: jax.Array
    done: jax.Array
