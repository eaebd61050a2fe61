"""Logistic regression at its solution, where the parts that need no tolerance measure."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class AtSolution(NamedTuple):
    """Logistic regression with one regulariser for each feature, at w(λ), and b = ∇₁E."""

    x: jax.Array
    labels: jax.Array
    step_size: float
    lam: jax.Array
    w: jax.Array
    b: jax.Array

    def loss(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        fit = jnp.mean(jnp.logaddexp(0.0, -self.labels * (self.x @ w)))
        return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def phi(self, w: jax.Array, lam: jax.Array) -> jax.Array:
        return w - self.step_size * jax.grad(self.loss)(w, lam)

    def outer(self, w: jax.Array, *_: Any) -> jax.Array:
        return jnp.vdot(self.b, w)


def at_solution(seed: int, n: int, d: int) -> AtSolution:
    """Of n examples and d features; κ is a few hundred."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.geomspace(1.0, 0.1, d)  # κ of a few hundred.
    labels = np.sign(x @ rng.normal(size=d) + rng.normal(size=n))
    lam = np.log(rng.uniform(0.5e-3, 1.5e-3, size=d))
    curvature = np.linalg.norm(x, 2) ** 2 / (4 * n) + np.exp(lam.max())
    arrays = [jnp.asarray(a) for a in (x, labels, lam, rng.normal(size=d))]
    problem = AtSolution(arrays[0], arrays[1], 1 / curvature, arrays[2], jnp.zeros(d), arrays[3])

    @jax.jit
    def newton(lam: jax.Array) -> jax.Array:
        def step(_: jax.Array, w: jax.Array) -> jax.Array:
            return w - jnp.linalg.solve(
                jax.hessian(problem.loss)(w, lam), jax.grad(problem.loss)(w, lam)
            )

        return lax.fori_loop(0, 15, step, jnp.zeros(d))

    return problem._replace(w=newton(problem.lam))
