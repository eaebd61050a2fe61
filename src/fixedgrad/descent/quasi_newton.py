"""Limited-memory quasi-Newton directions on the free entries of λ.

The product H g by the two loops of Nocedal (1980), with pairs s = λ⁺ − λ and y = g⁺ − g. It is not
optax's `scale_by_lbfgs`, which takes every pair and every entry: here a pair has to be certain beside
the error of its y, and entries at a bound are left out of s and y, so that H is the inverse of the
Hessian's free block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..real_form import inner, norms, ratio, real_dtype, resolution
from ..types import PyTree

tree = optax.tree


class Pairs(NamedTuple):
    """The last pairs, each leaf with a leading axis; pair i is in row i modulo their number.

    Attributes:
        s: Differences of λ.
        y: Differences of g.
        number: How many pairs there were, int32.
    """

    s: PyTree
    y: PyTree
    number: jax.Array

    def then(self, s: PyTree, y: PyTree, certain: jax.Array) -> "Pairs":
        """With one pair more, in the place of the oldest, if it is certain."""
        rows = jax.tree.leaves(self.s)[0].shape[0]
        i = self.number % rows

        def put(stack: jax.Array, x: jax.Array) -> jax.Array:
            return stack.at[i].set(jnp.where(certain, x, stack[i]))

        new = self.number + certain.astype(jnp.int32)
        return Pairs(jax.tree.map(put, self.s, s), jax.tree.map(put, self.y, y), new)

    def forgotten(self, when: jax.Array) -> "Pairs":
        """Without any."""
        return self._replace(number=jnp.where(when, 0, self.number))


def no_pairs(x: PyTree, memory: int) -> Pairs:
    """Before the first of at most `memory` pairs."""
    stack = jax.tree.map(lambda x: jnp.zeros((memory, *x.shape), x.dtype), x)
    return Pairs(stack, stack, jnp.int32(0))


def inverse_hessian(pairs: Pairs, g: PyTree, free: PyTree) -> tuple[PyTree, jax.Array]:
    """H g on the free entries, zero elsewhere; and whether any pair served.

    Args:
        pairs: Pairs; those that are not of positive curvature on the free entries are passed over.
        g: The gradient.
        free: Booleans like g.
    """
    rows = jax.tree.leaves(pairs.s)[0].shape[0]
    dtype, eps = real_dtype(g), resolution(g)

    def pair(age: jax.Array) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
        i = (pairs.number - 1 - age) % rows
        s, y = (masked(jax.tree.map(lambda x: x[i], stack), free) for stack in (pairs.s, pairs.y))
        product, (size_s, size_y) = inner(s, y), norms(s, y).astype(dtype)
        usable = (age < pairs.number) & (product > eps * size_s * size_y)
        return s, y, jnp.where(usable, ratio(1.0, product), 0.0), ratio(product, size_y**2)

    def backward(
        age: jax.Array, carry: tuple[PyTree, jax.Array, jax.Array]
    ) -> tuple[PyTree, jax.Array, jax.Array]:
        q, alphas, scale = carry
        s, y, rho, own = pair(age)
        alpha = rho * inner(s, q)
        scale = jnp.where((scale == 0) & (rho > 0), own, scale)  # Of the newest that serves.
        return _added(q, -alpha, y), alphas.at[age].set(alpha), scale

    def forward(j: jax.Array, z: PyTree, alphas: jax.Array) -> PyTree:
        age = rows - 1 - j
        s, y, rho, _ = pair(age)
        return _added(z, alphas[age] - rho * inner(y, z), s)

    zero = jnp.zeros((), dtype)
    start = masked(g, free), jnp.zeros(rows, dtype), zero
    q, alphas, scale = lax.fori_loop(0, rows, backward, start)
    z = jax.tree.map(lambda x: jnp.where(scale > 0, scale, 1.0).astype(x.dtype) * x, q)
    return lax.fori_loop(0, rows, lambda j, z: forward(j, z, alphas), z), scale > 0


def masked(x: PyTree, free: PyTree) -> PyTree:
    """The free entries; zero in the place of the others."""
    return jax.tree.map(lambda x, f: jnp.where(f, x, jnp.zeros_like(x)), x, free)


def _added(x: PyTree, factor: jax.Array, y: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + factor.astype(x.dtype) * y, x, y)
