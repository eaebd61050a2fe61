"""Gaussian elimination of [A | B]: solves without the permutation of its pivots.

What elimination does to A it does to the columns B beside it, row interchanges too: PA = LU makes of
[A | B] the upper part [U | L⁻¹PB], and A⁻¹B = U⁻¹ (L⁻¹PB). A solve with finished factors needs P as a
permutation, which XLA works out in a loop over all rows: for tens of unknowns that takes longer than the
elimination.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Eliminated(NamedTuple):
    """The factors of [A | B].

    Attributes:
        factors: U on and above the diagonal, L below it, whose diagonal is 1.
        solution: A⁻¹ B.
    """

    factors: jax.Array
    solution: jax.Array

    def transposed_size(self, column: jax.Array) -> jax.Array:
        """‖A⁻ᵀ u‖, for which the permutation does not matter: A⁻ᵀ = Pᵀ L⁻ᵀ U⁻ᵀ."""
        solve = functools.partial(lax.linalg.triangular_solve, left_side=True, transpose_a=True)
        u = solve(self.factors, column[:, None])
        return jnp.linalg.norm(solve(self.factors, u, lower=True, unit_diagonal=True))


def eliminated(matrix: jax.Array, columns: jax.Array) -> Eliminated:
    """The factors of [A | B], with A⁻¹ B; of a singular A they are not finite, or very large."""
    n = matrix.shape[0]
    factors = lax.linalg.lu(jnp.concatenate([matrix, columns], axis=1))[0]
    square = factors[:, :n]
    solution = lax.linalg.triangular_solve(square, factors[:, n:], left_side=True)
    return Eliminated(square, solution)
