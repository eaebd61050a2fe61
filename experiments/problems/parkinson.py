"""Kernel ridge regression on Parkinson, equation (22) with exp(β) and exp(γ) in place of β and γ."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fixedgrad as fg

from . import data
from .task import Task


class KernelRidge(NamedTuple):
    """λ: the logarithms of the regularisation β and of the 22 kernel widths γ."""

    log_beta: jax.Array
    log_gamma: jax.Array


def task(*, seed: int) -> Task:
    """The problem on a random split into thirds, in double precision.

    Features are standardised on the training third; labels are 0 and 1, and a prediction above ½ is
    a 1. β₀ = 1 and γ₀ = 1/22. The lower level is solved by heavy ball with the optimal constants of
    the matrix K(γ) + βI at hand, which are not differentiated.
    """
    patients = data.load("parkinsons")
    parts = data.split(seed, len(patients.y), (65, 64, 66))
    features = data.standardise(*(np.asarray(patients.x)[part] for part in parts))
    p = patients.x.shape[1]
    sets = tuple(
        jnp.asarray(a, float)
        for x, part in zip(features, parts, strict=True)
        for a in (x, patients.y[part])
    )
    return Task(
        lam=KernelRidge(jnp.zeros(()), jnp.full(p, -jnp.log(p))),
        w=jnp.zeros(len(parts[0])),
        data=sets,
        prepare=_prepare,
        solver_map=_heavy_ball,
        descent=_descent,
        momentum=True,
        outer=_outer,
        accuracy=_accuracy,
        exact=_exact,
        start=fg.cold(),
        settings={
            "seed": seed,
            "split": [len(part) for part in parts],
            "log_beta": 0.0,
            "log_gamma": -float(np.log(p)),
            "dtype": str(sets[0].dtype),
        },
    )


def _kernel(log_gamma: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """K with entries exp(−Σ γ_l (a_l − b_l)²)."""
    return jnp.exp(-((a[:, None] - b[None]) ** 2) @ jnp.exp(log_gamma))


def _matrix(lam: KernelRidge, x: jax.Array) -> jax.Array:
    return _kernel(lam.log_gamma, x, x) + jnp.exp(lam.log_beta) * jnp.eye(len(x))


def _prepare(lam: KernelRidge, x: jax.Array, y: jax.Array, *_: Any) -> tuple[Any, ...]:
    matrix = _matrix(lam, x)
    eigenvalues = jnp.linalg.eigvalsh(jax.lax.stop_gradient(matrix))
    return matrix, y, eigenvalues[-1], eigenvalues[0]


def _loss(w: jax.Array, matrix: jax.Array, y: jax.Array, *_: Any) -> jax.Array:
    return w @ (0.5 * (matrix @ w) - y)


def _heavy_ball(state: Any, matrix: jax.Array, y: jax.Array, L: Any, mu: Any) -> Any:
    step_size, momentum, _ = fg.optimal_heavy_ball(L, mu)
    return fg.heavy_ball(_loss, step_size=step_size, momentum=momentum)(state, matrix, y)


def _descent(w: jax.Array, matrix: jax.Array, y: jax.Array, L: Any, mu: Any) -> jax.Array:
    return fg.gradient_descent(_loss, step_size=fg.optimal_step_size(L, mu).step_size)(w, matrix, y)


def _outer(w: jax.Array, lam: KernelRidge, *sets: jax.Array) -> jax.Array:
    x, _, x_val, y_val, _, _ = sets
    return 0.5 * jnp.sum((y_val - _kernel(lam.log_gamma, x_val, x) @ w) ** 2)


def _accuracy(w: jax.Array, lam: KernelRidge, *sets: jax.Array) -> jax.Array:
    x, _, _, _, x_test, y_test = sets
    prediction = _kernel(lam.log_gamma, x_test, x) @ w > 0.5
    return jnp.mean(prediction == (y_test > 0.5))


def _exact(w: jax.Array, lam: KernelRidge, *sets: jax.Array) -> jax.Array:
    del w
    x, y, *_ = sets
    return jnp.linalg.solve(_matrix(lam, x), y)
