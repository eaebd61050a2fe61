"""Data hyper-cleaning: a weight σ(λ_i) for each training image, of which some labels are wrong."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import data

PyTree = Any
CLASSES = 10


class Cleaning(NamedTuple):
    """Images as columns, (p, n): products with the weights, (10, p), read them in their order.

    Attributes:
        x, y: Training images and their labels, some of which are wrong.
        clean: Whether a label was left alone; one that was drawn anew counts as wrong, whatever it is.
        x_val, y_val: Validation images, clean.
        x_test, y_test: Test images, clean.
    """

    x: jax.Array
    y: jax.Array
    clean: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def make(name: str, seed: int, sizes: Sequence[int], polluted: float) -> Cleaning:
    """A random split of the published training part, with labels of the training images drawn anew.

    Args:
        name: mnist or digits.
        seed: Of the split, of the choice of wrong labels and of these labels.
        sizes: The numbers of training, validation and test images.
        polluted: The part of the training labels that is drawn anew, uniformly from all ten.

    Returns:
        The data, float32.
    """
    images = data.load(name)
    x = np.asarray(images.x, np.float32)
    x = x / x.max()
    train, val, test = data.split(seed, images.n_train, tuple(sizes))
    rng = np.random.default_rng([seed, 1])
    wrong = rng.permutation(len(train))[: round(polluted * len(train))]
    y = images.y[train].copy()
    y[wrong] = rng.integers(0, CLASSES, len(wrong))
    clean = np.ones(len(train), bool)
    clean[wrong] = False

    def columns(rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[rows].T)

    arrays = columns(train), y, clean, columns(val), images.y[val], columns(test), images.y[test]
    return Cleaning(*map(jnp.asarray, arrays))


def initial(key: jax.Array, widths: Sequence[int]) -> PyTree:
    """Weights and biases of layers of these widths, uniform on ±1/√(inputs), float32."""
    layers = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        keys, bound = jax.random.split(jax.random.fold_in(key, i)), inputs**-0.5
        shapes = (outputs, inputs), (outputs, 1)
        layers.append(
            tuple(
                jax.random.uniform(k, s, jnp.float32, -bound, bound)
                for k, s in zip(keys, shapes, strict=True)
            )
        )
    return layers


def logits(w: PyTree, x: jax.Array) -> jax.Array:
    """Of a linear model or of a perceptron with sigmoids, (10, n)."""
    *hidden, (last, bias) = w
    for weight, hidden_bias in hidden:
        x = jax.nn.sigmoid(weight @ x + hidden_bias)
    return last @ x + bias


def cross_entropies(z: jax.Array, y: jax.Array) -> jax.Array:
    """Of each column of logits."""
    hit = jnp.arange(CLASSES)[:, None] == y[None, :]
    return jax.nn.logsumexp(z, axis=0) - jnp.sum(jnp.where(hit, z, 0.0), axis=0)


def lower_loss(penalty: float) -> Callable[..., jax.Array]:
    """ℓ(w, λ) = mean of σ(λ_i) CE_i(w), plus `penalty`/2 ‖w‖² without the biases."""

    def loss(w: PyTree, lam: jax.Array, task: Cleaning) -> jax.Array:
        weighted = jnp.mean(jax.nn.sigmoid(lam) * cross_entropies(logits(w, task.x), task.y))
        return weighted + 0.5 * penalty * sum(jnp.sum(weight**2) for weight, _ in w)

    return loss


def outer(w: PyTree, lam: jax.Array, task: Cleaning) -> jax.Array:
    """E: the mean cross-entropy of the validation images."""
    del lam
    return jnp.mean(cross_entropies(logits(w, task.x_val), task.y_val))


def accuracy(w: PyTree, task: Cleaning) -> jax.Array:
    """On the test images, in %."""
    return 100 * jnp.mean(jnp.argmax(logits(w, task.x_test), axis=0) == task.y_test)


def detection(lam: jax.Array, clean: jax.Array) -> jax.Array:
    """F1 in %, where λ_i ≥ 0 says that label i is clean."""
    said = lam >= 0
    right = jnp.sum(said & clean)
    return 200 * right / jnp.maximum(jnp.sum(said) + jnp.sum(clean), 1)


class Published(NamedTuple):
    """A row of MLS-Bench: accuracy and F1 in %, seconds on its GPU."""

    accuracy: float
    f1: float
    seconds: float


PUBLISHED = {
    "RHG": Published(84.63, 89.55, 91),
    "T-RHG": Published(84.6, 89.06, 39),
    "G-PBGD": Published(89.84, 80.6, 60),
    "V-PBGD": Published(90.10, 91.72, 66),
}
