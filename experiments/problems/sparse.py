"""Products with a fixed sparse matrix, X W and Xᵀ R, fast inside `jit` and differentiable.

    x = sparse.from_csr(csr)       # n × p, on the host, once
    sparse.matmul(x, w)            # X W,   (p, c) -> (n, c)
    sparse.rmatmul(x, r)           # Xᵀ R,  (n, c) -> (p, c)

XLA's own sparse products gather and scatter every single entry, one after the other on a CPU. Here
the rows of X are cut into pieces of eight entries. The sum over a piece, Σₖ values[i, k] ·
W[indices[i, k]], is a loop that XLA fuses, vectorises over the c columns and runs on every core;
what is left to scatter is one row per piece.
"""

import functools
import operator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import Array, lax

# Entries per piece: with fewer there is more to scatter, with more there is more padding.
_WIDTH = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """The rows of a sparse matrix, cut into pieces.

    Attributes:
        indices: column numbers, (pieces, `_WIDTH`); a short piece repeats its last one.
        values: the entries, (pieces, `_WIDTH`); a short piece ends in zeros.
        row: the row that each piece belongs to, (pieces,), ascending.
        num_rows: how many rows there are, also those without any entry.
    """

    indices: Array
    values: Array
    row: Array
    num_rows: int = field(metadata={"static": True})


class Matrix(NamedTuple):
    """A sparse matrix X, n × p, stored twice: by rows for X W and by columns for Xᵀ R.

    It is a pytree of arrays: pass it to a jitted function as an argument, since a closed-over one
    is compiled in as a constant. It is data: its gradient is zero by construction.
    """

    rows: Pieces
    columns: Pieces


def from_csr(csr: scipy.sparse.csr_matrix | scipy.sparse.csr_array) -> Matrix:
    """Lay out a SciPy matrix for `matmul` and `rmatmul`.

    Host work; about 1.5 times the memory of the CSR and CSC forms together on news20.

    Args:
        csr: (n, p), with a floating-point dtype, which is also the dtype of the products.

    Returns:
        The matrix as a pytree of arrays.

    Example:
        >>> x = from_csr(scipy.sparse.csr_matrix([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]], dtype="f4"))
        >>> matmul(x, jnp.array([[1.0], [10.0]], "f4")).tolist()
        [[20.0], [0.0], [31.0]]
    """
    if not np.issubdtype(csr.dtype, np.floating):
        raise ValueError(f"`csr` must be real floating-point, got {csr.dtype}; use `csr.astype`.")
    by_rows, by_columns = csr.sorted_indices(), csr.tocsc()
    return Matrix(
        _pieces(by_rows.indptr, by_rows.indices, by_rows.data),
        _pieces(by_columns.indptr, by_columns.indices, by_columns.data),
    )


@jax.jit
def matmul(x: Matrix, w: Array) -> Array:
    """The product X W.

    Works under `grad`, `jvp`, `linearize`, `linear_transpose`, `vmap` and any nesting of them; the
    transpose is the fast Xᵀ R. Linear in `w`; the gradient for `x` is zero.

    Cost: a multiply-add per entry of X, or of padding, and column of `w`; temporary memory of c
    numbers per piece. When not to use it: if more than a few per cent of X are nonzero, a dense
    product is faster. The layout was chosen for CPUs and has not been measured elsewhere.

    Args:
        x: an n × p matrix from `from_csr`.
        w: (p, c), of the dtype of `x`.

    Returns:
        X W, (n, c).
    """
    n, p = x.rows.num_rows, x.columns.num_rows
    _check("w", w, p, x.rows.values.dtype)
    x = lax.stop_gradient(x)

    # y = X w is the lower half of the solution of a block triangular system, and Xᵀ r the upper
    # half of the solution of its transpose:
    #
    #     [  I  0 ] [u]   [w]          [ I  −Xᵀ ] [u]   [0]
    #     [ −X  I ] [y] = [0],         [ 0   I  ] [v] = [r].
    #
    # `custom_linear_solve` lets us say how each is solved. It is the one public rule with which
    # jvp, transpose and vmap work: `custom_vjp` has no forward mode, `linear_call` (jax 0.10) no
    # batching rule, and a `custom_jvp` would be transposed into a scatter of every entry.
    # The concatenations and zeros cost nothing: XLA cancels them against the slices.
    def matvec(z: Array) -> Array:
        return jnp.concatenate([z[:p], z[p:] - _product(x.rows, z[:p])])

    def solve(_: object, b: Array) -> Array:
        return jnp.concatenate([b[:p], b[p:] + _product(x.rows, b[:p])])

    def transpose_solve(_: object, b: Array) -> Array:
        return jnp.concatenate([b[:p] + _product(x.columns, b[p:]), b[p:]])

    b = jnp.concatenate([w, jnp.zeros((n, w.shape[1]), w.dtype)])
    return lax.custom_linear_solve(matvec, b, solve, transpose_solve)[p:]


def rmatmul(x: Matrix, r: Array) -> Array:
    """The product Xᵀ R; everything said of `matmul` holds.

    Args:
        x: an n × p matrix from `from_csr`.
        r: (n, c), of the dtype of `x`.

    Returns:
        Xᵀ R, (p, c).
    """
    _check("r", r, x.rows.num_rows, x.rows.values.dtype)
    return matmul(Matrix(x.columns, x.rows), r)


def _check(name: str, a: Array, length: int, dtype: np.dtype) -> None:
    if a.ndim != 2 or a.shape[0] != length or a.dtype != dtype:
        raise ValueError(
            f"`{name}` must have shape ({length}, c) and the dtype of the matrix, {dtype}; "
            f"got shape {a.shape} and dtype {a.dtype}."
        )


def _product(pieces: Pieces, x: Array) -> Array:
    # Unrolled over k: XLA does not vectorise one gather reduced over k, which is 8 times slower.
    terms = (
        pieces.values[:, k, None] * x.at[pieces.indices[:, k]].get(mode="promise_in_bounds")
        for k in range(_WIDTH)
    )
    sums = functools.reduce(operator.add, terms)
    return jax.ops.segment_sum(sums, pieces.row, pieces.num_rows, indices_are_sorted=True)


def _pieces(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> Pieces:
    count = np.diff(indptr).astype(np.int64)
    num_pieces = -(-count // _WIDTH)
    row = np.repeat(np.arange(count.size), num_pieces)
    first = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)  # The first piece of the row.
    offset = _WIDTH * (np.arange(row.size) - first)[:, None] + np.arange(_WIDTH)
    entry = indptr[row, None] + np.minimum(offset, count[row, None] - 1)
    values = np.where(offset < count[row, None], data[entry], 0).astype(data.dtype)
    arrays = indices[entry].astype(np.int32), values, row.astype(np.int32)
    return Pieces(*map(jnp.asarray, arrays), num_rows=count.size)
