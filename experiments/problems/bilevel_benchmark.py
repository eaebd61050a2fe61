"""Two problems of the public bilevel benchmark: the cleaning of MNIST, and simulated quadratics.

Both are defined by the files of `benchopt/benchmark_bilevel` (2024): `datasets/mnist.py`,
`datasets/simulated.py` and `benchmark_utils/gen_matrices.py`. Every level is a mean over rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fixedgrad as fg

from . import data

Rows = Any  # A pytree of arrays with a leading axis of rows.


class BenchmarkTask(NamedTuple):
    """One problem: functions of (w, λ, rows of the lower level, rows of the upper level).

    Attributes:
        name: How it is called in tables.
        loss: `loss(w, lam, lower)`: the lower level, a mean over rows.
        outer: `outer(w, lam, upper)`: E, a mean over rows.
        lower: Rows of the lower level.
        upper: Rows of the upper level.
        w0: Where w starts.
        lam0: Where λ starts.
        measures: `measures(w, lam) -> {name: number}`: what the benchmark measures, and more; no
            evaluation in it is counted.
    """

    name: str
    loss: Callable[[jax.Array, jax.Array, Rows], jax.Array]
    outer: Callable[[jax.Array, jax.Array, Rows], jax.Array]
    lower: Rows
    upper: Rows
    w0: jax.Array
    lam0: jax.Array
    measures: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]

    @property
    def phi(self) -> fg.Phi:
        """A gradient step of length 1, Φ = w − ∇ℓ: steps on w − Φ are then steps on ∇ℓ."""
        return fg.gradient_descent(lambda w, lam, lower, _: self.loss(w, lam, lower), step_size=1.0)

    @property
    def objective(self) -> fg.Outer:
        """E as a function of both kinds of rows, as Φ is."""
        return lambda w, lam, _, upper: self.outer(w, lam, upper)

    @property
    def num_lower(self) -> int:
        """Rows of the lower level."""
        return jax.tree.leaves(self.lower)[0].shape[0]

    @property
    def num_upper(self) -> int:
        """Rows of the upper level."""
        return jax.tree.leaves(self.upper)[0].shape[0]


class _Quadratics(NamedTuple):
    """Rows of one level: ½ (xᵀw)² + ½ (yᵀλ)² + (aᵀλ)(bᵀw) + cᵀw + dᵀλ."""

    x: jax.Array
    y: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array


def quadratics(
    *,
    num_rows: tuple[int, int] = (1024, 1024),
    dimensions: tuple[int, int] = (100, 100),
    mu: float = 0.1,
    cross: float = 0.1,
    random_state: int = 2442,
) -> BenchmarkTask:
    """Simulated quadratics: ℓ and E are means of quadratics of (w, λ) with Hessians of rank one.

    The matrices xxᵀ of a row have, over many rows, the mean A² with a spectrum from μ to L = 1; those
    of λ one more eigenvalue 0, which `gen_matrices` gives them. The factors x are kept in place of the
    matrices xxᵀ: the functions are the same, and evaluated with d operations a row in place of d². The
    measure is ‖∇h(λ)‖², h(λ) = E(w(λ), λ), in double precision.

    Args:
        num_rows: Of the lower and of the upper level.
        dimensions: Of w and of λ.
        mu: The smallest eigenvalue of the lower level's mean matrix.
        cross: The size of the mixed terms.
        random_state: The key of the data, and that of the benchmark's default.

    Returns:
        The problem, with w₀ = 0 and λ₀ = −2.

    Raises:
        ValueError: h is not convex with these numbers.
    """
    keys = jax.random.split(jax.random.PRNGKey(random_state), 2)
    lower, upper = (
        _rows(key, n, *dimensions, mu, cross) for key, n in zip(keys, num_rows, strict=True)
    )
    means = [_mean_matrices(rows) for rows in (lower, upper)]
    gradient = _exact_gradient(*means)
    slope = gradient(np.zeros(dimensions[1]))
    hessian = np.stack([gradient(e) - slope for e in np.eye(dimensions[1])], axis=1)
    if np.linalg.eigvalsh((hessian + hessian.T) / 2)[0] < 1e-12:
        raise ValueError(
            "`quadratics` drew a problem whose h(λ) is not convex; take other numbers."
        )

    def measures(w: jax.Array, lam: jax.Array) -> dict[str, Any]:
        del w  # ∇h is affine in λ: a solve for each measurement would take longer than the methods.
        gradient_at = slope + hessian @ np.asarray(lam, np.float64)
        return {"squared_gradient": float(np.sum(gradient_at**2))}

    def of_rows(w: jax.Array, lam: jax.Array, rows: _Quadratics) -> jax.Array:
        squares = 0.5 * (rows.x @ w) ** 2 + 0.5 * (rows.y @ lam) ** 2
        mixed = (rows.a @ lam) * (rows.b @ w)
        return jnp.mean(squares + mixed + rows.c @ w + rows.d @ lam)

    w0, lam0 = jnp.zeros(dimensions[0]), jnp.full(dimensions[1], -2.0)
    return BenchmarkTask("simulated quadratics", of_rows, of_rows, lower, upper, w0, lam0, measures)


def _rows(key: jax.Array, n: int, d_w: int, d_lam: int, mu: float, cross: float) -> _Quadratics:
    keys = jax.random.split(key, 10)

    def factors(of_basis: jax.Array, of_rows: jax.Array, roots: jax.Array) -> jax.Array:
        basis, *_ = jnp.linalg.svd(jax.random.normal(of_basis, (roots.size, 1)))
        gaussian = jax.random.normal(of_rows, (n, 1, roots.size))[:, 0]
        return gaussian @ (basis * roots[None]) @ basis.T

    def roots(size: int) -> jax.Array:
        return jnp.logspace(jnp.log10(mu) / 2, 0.0, size)

    x = factors(keys[0], keys[1], roots(d_w))
    y = factors(keys[2], keys[3], jnp.concatenate([jnp.zeros(1), roots(d_lam - 1)]))
    left, _, right = jnp.linalg.svd(jax.random.normal(keys[4], (d_lam, d_w)))
    size = min(d_lam, d_w)
    scale = jnp.logspace(jnp.log10(mu), jnp.log10(cross), size)
    gaussian = jax.random.normal(keys[5], (n, 1, d_w))[:, 0]
    return _Quadratics(
        x,
        y,
        a=(gaussian[:, :size] * scale[None]) @ left[:, :size].T,
        b=gaussian @ right.T,
        c=jax.random.normal(keys[6], (n, d_w)),
        d=jax.random.normal(keys[7], (n, d_lam)),
    )


class _MeanMatrices(NamedTuple):
    """The mean of the quadratics: ½ wᵀH w + ½ λᵀK λ + λᵀC w + cᵀw + dᵀλ."""

    h: np.ndarray
    k: np.ndarray
    cross: np.ndarray
    c: np.ndarray
    d: np.ndarray


def _mean_matrices(rows: _Quadratics) -> _MeanMatrices:
    x, y, a, b, c, d = (np.asarray(z, np.float64) for z in rows)
    n = len(x)
    return _MeanMatrices(x.T @ x / n, y.T @ y / n, a.T @ b / n, c.mean(axis=0), d.mean(axis=0))


def _exact_gradient(
    lower: _MeanMatrices, upper: _MeanMatrices
) -> Callable[[np.ndarray], np.ndarray]:
    """∇h at λ, on the host."""

    def gradient(lam: np.ndarray) -> np.ndarray:
        w = -np.linalg.solve(lower.h, lower.c + lower.cross.T @ lam)
        of_w = upper.h @ w + upper.cross.T @ lam + upper.c
        direct = upper.k @ lam + upper.cross @ w + upper.d
        return direct - lower.cross @ np.linalg.solve(lower.h, of_w)

    return gradient


class _Images(NamedTuple):
    """Images, labels, and the number of each row of the lower level."""

    x: jax.Array
    y: jax.Array
    row: jax.Array


def mnist_cleaning(
    *,
    corruption: float,
    num_rows: tuple[int, int] = (20_000, 5_000),
    random_state: int = 32,
    penalty: float = 0.2,
) -> BenchmarkTask:
    """The cleaning of MNIST: a weight σ(λ_i) for each training image, of which many have wrong labels.

        ℓ(w, λ) = mean of σ(λ_i) CE_i(w) + 0.2 ‖w‖²,     E(w) = mean of CE over the validation images.

    A linear softmax classifier without offset. The parts are those of scikit-learn's
    `train_test_split` of the 60,000 training images with the `random_state`; the label of each training
    image is replaced by a uniform one of the ten with the probability `corruption`; the features are
    standardised by the training part.

    Args:
        corruption: The probability of a new label.
        num_rows: Training and validation images.
        random_state: Of the parts and of the labels.
        penalty: 0.2 in the benchmark.

    Returns:
        The problem, with w₀ = 0 and λ₀ = −2.
    """
    from sklearn.model_selection import train_test_split

    dataset = data.load("mnist")
    rng = np.random.RandomState(random_state)
    n_train, n_val = num_rows
    train, val = train_test_split(
        np.arange(dataset.n_train), test_size=n_val, train_size=n_train, random_state=rng
    )
    test = np.arange(dataset.n_train, len(dataset.y))
    labels = dataset.y[train].copy()
    wrong = rng.rand(n_train) < corruption
    labels[wrong] = rng.randint(0, 10, int(wrong.sum()))
    features = np.asarray(dataset.x, np.float64)
    x_train, x_val, x_test = data.standardise(*(features[rows] for rows in (train, val, test)))
    name = f"MNIST cleaning, {corruption:g}"
    parts = ((x_train, labels), (x_val, dataset.y[val]), (x_test, dataset.y[test]))
    return _cleaning(name, *parts, penalty=penalty)


def small_cleaning(*, num_rows: tuple[int, int] = (80, 40), seed: int = 0) -> BenchmarkTask:
    """The same problem on synthetic classes, a few rows of 6 features, half of the labels wrong."""
    rng = np.random.default_rng(seed)
    centres, (n, m) = rng.normal(size=(10, 6)), num_rows
    y = rng.integers(0, 10, n + 2 * m).astype(np.int32)
    x = centres[y] + 0.5 * rng.normal(size=(len(y), 6))
    labels = np.where(rng.random(n) < 0.5, rng.integers(0, 10, n), y[:n]).astype(np.int32)
    parts = ((x[:n], labels), (x[n : n + m], y[n : n + m]), (x[n + m :], y[n + m :]))
    return _cleaning("cleaning, synthetic", *parts, penalty=0.2)


Part = tuple[np.ndarray, np.ndarray]


def _cleaning(
    name: str, train: Part, validation: Part, test: Part, *, penalty: float
) -> BenchmarkTask:
    def images(part: Part) -> _Images:
        x, y = part
        rows = jnp.arange(len(y), dtype=jnp.int32)
        return _Images(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), rows)

    lower, upper, held_out = images(train), images(validation), images(test)

    def loss(w: jax.Array, lam: jax.Array, rows: _Images) -> jax.Array:
        weights = jax.nn.sigmoid(lam[rows.row])
        return jnp.mean(weights * _cross_entropy(w, rows)) + penalty * jnp.sum(w**2)

    def outer(w: jax.Array, lam: jax.Array, rows: _Images) -> jax.Array:
        del lam
        return jnp.mean(_cross_entropy(w, rows))

    @jax.jit
    def measures(w: jax.Array, lam: jax.Array) -> dict[str, jax.Array]:
        del lam
        return {
            "validation_loss": jnp.mean(_cross_entropy(w, upper)),
            "validation_error": _error(w, upper),
            "test_error": _error(w, held_out),
        }

    w0 = jnp.zeros((lower.x.shape[1], 10), jnp.float32)
    lam0 = jnp.full(lower.x.shape[0], -2.0, jnp.float32)
    return BenchmarkTask(name, loss, outer, lower, upper, w0, lam0, measures)


def _cross_entropy(w: jax.Array, rows: _Images) -> jax.Array:
    logits = rows.x @ w
    own = jnp.take_along_axis(logits, rows.y[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - own


def _error(w: jax.Array, rows: _Images) -> jax.Array:
    return jnp.mean(jnp.argmax(rows.x @ w, axis=1) != rows.y)
