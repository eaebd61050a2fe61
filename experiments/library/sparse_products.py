"""Products with a sparse X, in pieces, are faster inside `jit` than sorted segment sums and than BCOO.

X W and Xᵀ R for the training half of 20 newsgroup (5657 × 101631, float32, 20 columns), by

- *pieces*: `sparse.py`, which the experiments use;
- *segment sums*: one gathered row for each entry, summed over sorted segments, CSR and CSC;
- *BCOO*: `jax.experimental.sparse`, its indices sorted and unique;
- *callback*: SciPy's CSR and CSC products through `jax.pure_callback`.

Gathers of whole padded rows are out of the question: the longest row or column times their number is
printed as the padding's factor. Times are medians over rounds in which all take turns.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from ..problems import data, sparse
from ..tools import report

FLOAT64 = False

CLASSES = 20

Product = Callable[[jax.Array], jax.Array]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--rounds", type=int, help="how often all competitors are timed in turn")


def main(options: argparse.Namespace) -> int:
    """Measures all products and checks the claims."""
    rounds = options.rounds or (2 if options.quick else 50 if options.full else 20)
    x = _matrix(options)
    rng = np.random.default_rng(options.seed)
    claims, found = report.Claims(), {}
    longest = {}
    for name, matrix in (("X W", x), ("Xᵀ R", x.T.tocsr())):
        n, p = np.shape(matrix)
        operand = rng.normal(size=(p, CLASSES)).astype(np.float32)
        found[name] = _timed(_competitors(matrix), jnp.asarray(operand), matrix @ operand, rounds)
        longest[name] = int(np.diff(matrix.indptr).max()) * n / matrix.nnz

    header = ["", *(f"{name}, {what}" for name in found for what in ("time", "error"))]
    methods = list(found["X W"])
    rows = [
        [method]
        + [
            cell
            for at in found.values()
            for cell in (f"{1e3 * at[method]['seconds']:.2f} ms", f"{at[method]['error']:.0e}")
        ]
        for method in methods
    ]
    print(f"X: {' × '.join(map(str, np.shape(x)))}, {x.nnz} entries")
    print(report.table(header, rows))
    for name, factor in longest.items():
        print(f"{name} by padded rows would gather {factor:.0f} times the entries.")
    worst = max(at["error"] for rows in found.values() for at in rows.values())
    claims.check("all products agree with SciPy's to 1e-5", worst < 1e-5, f"{worst:.0e}")
    for name, at in found.items():
        inside = {method: row["seconds"] for method, row in at.items() if method != "callback"}
        ratio = min(s for method, s in inside.items() if method != "pieces") / inside["pieces"]
        claims.check(
            f"{name}: pieces are the fastest that XLA itself computes",
            ratio > 1,
            f"{ratio:.1f} times the next",
            required=not options.quick,
        )
    _draw(options, found)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "shape": np.shape(x), "entries": x.nnz},
        results={
            "errors": {n: {m: at["error"] for m, at in rows.items()} for n, rows in found.items()},
            "padding": longest,
        },
        volatile={
            "seconds": {
                n: {m: at["seconds"] for m, at in rows.items()} for n, rows in found.items()
            }
        },
    )
    return claims.exit_code


def _matrix(options: argparse.Namespace) -> Any:  # SciPy's types do not know its shapes.
    if options.quick:
        rng = np.random.default_rng(options.seed)
        return scipy.sparse.csr_array(
            scipy.sparse.random_array((40, 70), density=0.1, dtype="f4", rng=rng)
        )
    corpus = data.load("news20")
    rows = data.by_date(options.seed, corpus).train
    return data.normalise_rows(scipy.sparse.csr_array(corpus.x))[rows].sorted_indices()


def _competitors(x: Any) -> dict[str, tuple[Any, Callable[..., jax.Array]]]:
    """For each way to compute X u, its layout of X and the product (layout, u) -> X u."""
    entries, shape = x.tocoo(), np.shape(x)
    rows, columns = (jnp.asarray(a, jnp.int32) for a in (entries.row, entries.col))
    values = jnp.asarray(entries.data)

    def segment_sums(layout: tuple, u: jax.Array) -> jax.Array:
        values, rows, columns = layout
        return jax.ops.segment_sum(
            values[:, None] * u[columns], rows, shape[0], indices_are_sorted=True
        )

    def callback(_: None, u: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((shape[0], u.shape[1]), u.dtype)
        return jax.pure_callback(lambda u: x @ np.asarray(u), result, u)

    bcoo = BCOO(
        (values, jnp.stack([rows, columns], axis=1)),
        shape=shape,
        indices_sorted=True,
        unique_indices=True,
    )
    return {
        "pieces": (sparse.from_csr(x), sparse.matmul),
        "segment sums": ((values, rows, columns), segment_sums),
        "BCOO": (bcoo, lambda bcoo, u: bcoo @ u),
        "callback": (None, callback),
    }


def _timed(
    competitors: dict, u: jax.Array, expected: np.ndarray, rounds: int
) -> dict[str, dict[str, float]]:
    compiled = {
        name: (jax.jit(product).lower(layout, u).compile(), layout)
        for name, (layout, product) in competitors.items()
    }
    errors = {
        name: float(np.abs(np.asarray(run(layout, u)) - expected).max() / np.abs(expected).max())
        for name, (run, layout) in compiled.items()
    }
    seconds = {name: np.zeros(rounds) for name in compiled}
    for i in range(rounds):
        for name, (run, layout) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(layout, u))
            seconds[name][i] = time.perf_counter() - start
    return {n: {"seconds": float(np.median(seconds[n])), "error": errors[n]} for n in compiled}


def _draw(options: argparse.Namespace, found: dict) -> None:
    with report.figure(options.out / "sparse_products.png", size=(5.2, 3)) as (_, axes):
        ax = axes[0][0]
        methods = list(found["X W"])
        for name, shift, color in (("X W", -0.2, "#0072b2"), ("Xᵀ R", 0.2, "#d55e00")):
            times = [1e3 * found[name][method]["seconds"] for method in methods]
            ax.barh(np.arange(len(methods)) + shift, times, 0.36, label=name, color=color)
        ax.set_yticks(range(len(methods)), methods)
        ax.invert_yaxis()
        ax.set(xlabel="milliseconds a product")
        ax.grid(visible=False, axis="y")
        ax.legend()
