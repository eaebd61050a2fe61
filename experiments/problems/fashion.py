"""Training-data optimisation on Fashion MNIST: λ is the features of 10 training points, one a class."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from . import data
from .task import Task

CLASSES = 10
FEATURES = 784

_BETA = 1.0
_MU = _BETA / (CLASSES * FEATURES)


def task(*, seed: int, num_images: int, inner_step: float | Literal["optimal"] = "optimal") -> Task:
    """The problem min over X of CE(X' w(X), y'), w(X) minimises CE(X w, y) + β/(2cp) ‖w‖².

    (X', y') are `num_images` images of the training set, scaled to [0, 1]; β = 1, X₀ = 0. The lower
    level is solved by gradient descent from w = 0.

    Args:
        seed: Of the choice of images.
        num_images: How many of the 60000.
        inner_step: Its step size. "optimal" is 2/(L + μ) for the X at hand, which is not
            differentiated: μ = β/(cp), and L = μ + ‖X‖²/20, since the Hessian of CE in the logits of
            one of the 10 points is at most ½. At X₀ = 0 it is cp/β = 7840.
    """
    if inner_step == "optimal":
        prepare, inner = _prepare, "step 2/(L + μ)"
    else:
        prepare, inner = lambda lam, *_: (lam, jnp.float32(inner_step)), f"step {inner_step:g}"
    images = data.load("fashion_mnist")
    (chosen,) = data.split(seed, images.n_train, (num_images,))
    test = np.arange(images.n_train, len(images.y))
    arrays = tuple(
        jnp.asarray(a[rows]) for rows in (chosen, test) for a in (np.asarray(images.x), images.y)
    )
    descent = fg.gradient_descent(_loss, step_size=_step_size)
    return Task(
        lam=jnp.zeros((CLASSES, FEATURES), jnp.float32),
        w=jnp.zeros((FEATURES, CLASSES), jnp.float32),
        data=arrays,
        prepare=prepare,
        solver_map=descent,
        descent=descent,
        momentum=False,
        outer=_outer,
        accuracy=_accuracy,
        exact=_exact,
        start=fg.cold(),
        settings={
            "seed": seed,
            "images": num_images,
            "inner": f"gradient descent, {inner}",
            "beta": _BETA,
            "dtype": "float32",
        },
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _prepare(lam: jax.Array, *_: Any) -> tuple[jax.Array, jax.Array]:
    gram = jax.lax.stop_gradient(lam @ lam.T)
    L = _MU + jnp.linalg.eigvalsh(gram)[-1] / (2 * CLASSES)
    return lam, fg.optimal_step_size(L, _MU).step_size


def _step_size(points: jax.Array, step_size: jax.Array) -> jax.Array:
    del points
    return step_size


def _loss(w: jax.Array, points: jax.Array, step_size: jax.Array) -> jax.Array:
    del step_size
    penalty = 0.5 * _MU * jnp.sum(w**2)
    return _cross_entropy(points @ w, jnp.arange(CLASSES)) + penalty


def _outer(w: jax.Array, lam: jax.Array, x: jax.Array, y: jax.Array, *_: Any) -> jax.Array:
    del lam
    return _cross_entropy(x @ w, y)


def _accuracy(w: jax.Array, lam: jax.Array, *arrays: jax.Array) -> jax.Array:
    del lam
    *_, x_test, y_test = arrays
    return jnp.mean(jnp.argmax(x_test @ w, axis=1) == y_test)


def _exact(w: jax.Array, lam: jax.Array, *_: Any) -> jax.Array:
    # w lies in the span of the 10 points, w = Xᵀ a: 100 unknowns, by Newton's method.
    del w

    def loss(a: jax.Array) -> jax.Array:
        return _loss(lam.T @ a.reshape(CLASSES, CLASSES), lam, jnp.ones(()))

    def newton(_: int, a: jax.Array) -> jax.Array:
        hessian = jax.hessian(loss)(a)
        scale = 1e-6 * jnp.trace(hessian) / len(a)  # Softmax has null directions.
        step = jnp.linalg.solve(hessian + scale * jnp.eye(len(a)), jax.grad(loss)(a))
        sizes = 0.5 ** jnp.arange(12.0)
        losses = jax.vmap(lambda size: loss(a - size * step))(sizes)
        return a - sizes[jnp.argmin(losses)] * step

    a = jax.lax.fori_loop(0, 50, newton, jnp.zeros(CLASSES**2, lam.dtype))
    return lam.T @ a.reshape(CLASSES, CLASSES)
