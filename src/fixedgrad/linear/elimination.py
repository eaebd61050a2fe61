"""Gaussian elimination of [A | B]: solves without the permutation of its pivots.

What elimination does to A it does to the columns B beside it, row interchanges too: PA = LU makes of
[A | B] the upper part [U | L⁻¹PB], and A⁻¹B = U⁻¹ (L⁻¹PB). A solve with finished factors needs P as a
permutation, which XLA works out in a loop over all rows: for tens of unknowns that takes longer than
the elimination.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Factors(NamedTuple):
    """A⁻¹ as U⁻¹ (L⁻¹P), two matrices.

    Their product would be a solve for many columns, for which BLAS starts threads of its own, and waits
    long for them where other programs run.

    Attributes:
        upper: U on and above its diagonal; what is below belongs to L.
        left: L⁻¹P.
    """

    upper: jax.Array
    left: jax.Array

    def solve(self, b: jax.Array) -> jax.Array:
        """A⁻¹ b."""
        right = jnp.matmul(self.left, b, precision="highest")
        return lax.linalg.triangular_solve(self.upper, right[:, None], left_side=True)[:, 0]

    def transposed_size(self, column: jax.Array) -> jax.Array:
        """‖A⁻ᵀ u‖, for which P does not matter: A⁻ᵀ = Pᵀ L⁻ᵀ U⁻ᵀ."""
        solve = functools.partial(lax.linalg.triangular_solve, left_side=True, transpose_a=True)
        u = solve(self.upper, column[:, None])
        return jnp.linalg.norm(solve(self.upper, u, lower=True, unit_diagonal=True))


def eliminated(matrix: jax.Array, columns: jax.Array) -> Factors:
    """The factors of [A | B], with L⁻¹PB for `left`."""
    n = matrix.shape[0]
    factors = lax.linalg.lu(jnp.concatenate([matrix, columns], axis=1))[0]
    return Factors(factors[:, :n], factors[:, n:])


def factorised(matrix: jax.Array) -> Factors:
    """Those of A; of a singular A what they solve is not finite, or very large."""
    return eliminated(matrix, jnp.eye(matrix.shape[0], dtype=matrix.dtype))


def solved(factors: Factors) -> jax.Array:
    """A⁻¹ B of `eliminated` columns B."""
    return lax.linalg.triangular_solve(factors.upper, factors.left, left_side=True)
