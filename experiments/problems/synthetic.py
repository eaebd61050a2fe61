"""The four settings of the paper's Figure 1 on synthetic data: LR, KRR, BR, HR.

Their formulas are the paper's (section 3.1). Its sizes, ranges of λ, noise and β stand in an appendix
that is not public, so those below are *ours*: X, y = Xw + 0.1 ε with all entries standard normal,
training and validation sets of equal size.

    LR   f = Σ ψ(y'ₑ x'ₑᵀ w),      w = argmin Σ ψ(yₑ xₑᵀ w) + ½ wᵀ diag(λ) w,      ψ(s) = log(1 + e⁻ˢ)
    KRR  f = ½‖y' − K'(γ) w‖²,     w = argmin ½ wᵀ(K(γ) + βI) w − wᵀy,             λ = (β, γ)
    BR   f = ½‖X'w − y'‖²,         w = argmin ½‖Xw − y‖² + β/2 ‖w − λ‖²
    HR   f = ½‖X'Hw − y'‖²,        w = argmin ½‖XHw − y‖² + β/2 ‖w‖²,              λ = H

LR is solved by gradient descent with the step size of case (a), the others by heavy ball with the
constants that are optimal for their quadratics. FP and ITD differentiate the map that solves; CG takes
the gradient-descent map, since heavy ball's Jacobian is not symmetric. Steps and momenta belong to
a λ and are held fixed in derivatives.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import fixedgrad as fg

from ..tools.convergence import Problem

PyTree = Any


class Sizes(NamedTuple):
    """The size of a data set: examples for training (as many for validation), and features."""

    examples: int
    features: int


class Curvature(NamedTuple):
    """μ ≤ eigenvalues of ∇₁²ℓ(·, λ) ≤ L."""

    L: jax.Array
    mu: jax.Array


class Setting(NamedTuple):
    """One panel of the figure.

    Attributes:
        title: Its name.
        short: Its abbreviation.
        heavy_ball: Whether heavy ball solves the lower level; else gradient descent does.
        loss: ℓ, `loss(w, lam) -> scalar`.
        outer: E, `outer(w, lam) -> scalar`.
        dimension: The number of entries of w.
        sample: `sample(key) -> lam`.
        curvature: `curvature(lam) -> Curvature`.
        exact: `exact(lam)`, the hypergradient ∇f(λ) by other means than `fixedgrad`.
        constants: `constants(lam) -> fixedgrad.bounds.Constants` for the bounds; `None` if unknown.
    """

    title: str
    short: str
    heavy_ball: bool
    loss: Callable[[jax.Array, PyTree], jax.Array]
    outer: Callable[[jax.Array, PyTree], jax.Array]
    dimension: int
    sample: Callable[[jax.Array], PyTree]
    curvature: Callable[[PyTree], Curvature]
    exact: Callable[[PyTree], PyTree]
    constants: Callable[[PyTree], fg.bounds.Constants] | None = None


class Split(NamedTuple):
    """Features and targets."""

    x: jax.Array
    y: jax.Array


def regression_data(key: jax.Array, sizes: Sizes) -> tuple[Split, Split]:
    """A training and a validation set of y = Xw + 0.1 ε."""
    keys = jax.random.split(key, 3)
    w = jax.random.normal(keys[0], (sizes.features,))
    x = jax.random.normal(keys[1], (2 * sizes.examples, sizes.features))
    y = x @ w + 0.1 * jax.random.normal(keys[2], (2 * sizes.examples,))
    n = sizes.examples
    return Split(x[:n], y[:n]), Split(x[n:], y[n:])


def logistic_regression(key: jax.Array, sizes: Sizes) -> Setting:
    """LR: λ ~ U[0.01, 10] for each feature; labels are the signs of the targets."""
    train, validation = (Split(d.x, jnp.sign(d.y)) for d in regression_data(key, sizes))

    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        return _logistic(w, train) + 0.5 * jnp.sum(lam * w**2)

    def outer(w: jax.Array, lam: jax.Array) -> jax.Array:
        del lam
        return _logistic(w, validation)

    def curvature(lam: jax.Array) -> Curvature:
        # 0 ≤ ψ'' ≤ ¼; with fewer examples than features the loss alone is not strongly convex.
        return Curvature(_largest(0.25 * train.x.T @ train.x + jnp.diag(lam)), lam.min())

    def minimiser(lam: jax.Array) -> jax.Array:
        def newton(_: Any, w: jax.Array) -> jax.Array:
            return w - jnp.linalg.solve(jax.hessian(loss)(w, lam), jax.grad(loss)(w, lam))

        return lax.fori_loop(0, 30, newton, jnp.zeros_like(lam))

    def exact(lam: jax.Array) -> jax.Array:
        w = minimiser(lam)
        v = jnp.linalg.solve(jax.hessian(loss)(w, lam), jax.grad(outer)(w, lam))
        return -w * v  # ∂₂∇₁ℓ = diag(w), and E does not depend on λ.

    def constants(lam: jax.Array) -> fg.bounds.Constants:
        # |ψ′| ≤ 1, ψ″ ≤ ¼, |ψ‴| ≤ 1/(6√3); ∂₂Φ = −α diag(u), and ‖u‖ ≤ 2D on the ball.
        step_size, q = fg.optimal_step_size(*curvature(lam))
        norm, norm_validation = jnp.linalg.norm(train.x, 2), jnp.linalg.norm(validation.x, 2)
        longest = jnp.linalg.norm(train.x, axis=1).max()
        D = jnp.linalg.norm(minimiser(lam))
        return fg.bounds.contraction_constants(
            q=q,
            D=D,
            L_E=norm_validation * math.sqrt(sizes.examples),
            L_Phi=2 * step_size * D,
            nu1=step_size * norm**2 * longest / (6 * math.sqrt(3)),
            nu2=step_size,
            eta1=norm_validation**2 / 4,
            eta2=0.0,
        )

    return Setting(
        title="Logistic Regression",
        short="LR",
        heavy_ball=False,
        loss=loss,
        outer=outer,
        dimension=sizes.features,
        sample=lambda key: jax.random.uniform(key, (sizes.features,), minval=0.01, maxval=10.0),
        curvature=curvature,
        exact=exact,
        constants=constants,
    )


def kernel_ridge_regression(key: jax.Array, sizes: Sizes) -> Setting:
    """KRR: λ = (β, γ), β ~ U[1e-3, 0.1], γ ~ U[5e-4, 1e-2]; K = exp(−Σ_l γ_l (x_l − x'_l)²)."""
    train, validation = regression_data(key, sizes)

    def kernel(x: jax.Array, lam: PyTree) -> jax.Array:
        return jnp.exp(-jnp.sum(lam["gamma"] * (x[:, None] - train.x[None, :]) ** 2, axis=-1))

    def matrix(lam: PyTree) -> jax.Array:
        return kernel(train.x, lam) + lam["beta"] * jnp.eye(sizes.examples)

    def loss(w: jax.Array, lam: PyTree) -> jax.Array:
        return 0.5 * w @ matrix(lam) @ w - w @ train.y

    def outer(w: jax.Array, lam: PyTree) -> jax.Array:
        return 0.5 * jnp.sum((validation.y - kernel(validation.x, lam) @ w) ** 2)

    def sample(key: jax.Array) -> PyTree:
        beta, gamma = jax.random.split(key)
        return {
            "beta": jax.random.uniform(beta, minval=1e-3, maxval=0.1),
            "gamma": jax.random.uniform(gamma, (sizes.features,), minval=5e-4, maxval=1e-2),
        }

    return Setting(
        title="Kernel Ridge Regression",
        short="KRR",
        heavy_ball=True,
        loss=loss,
        outer=outer,
        dimension=sizes.examples,
        sample=sample,
        curvature=lambda lam: _spectrum(matrix(lam)),
        exact=jax.grad(lambda lam: outer(jnp.linalg.solve(matrix(lam), train.y), lam)),
    )


def biased_regularization(key: jax.Array, sizes: Sizes) -> Setting:
    """BR: λ ~ U[−10, 10], β = 1. Φ is affine with constant Jacobians, so that ITD = FP k = t."""
    train, validation = regression_data(key, sizes)
    matrix = train.x.T @ train.x + jnp.eye(sizes.features)

    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        return _squares(train, w) + 0.5 * jnp.sum((w - lam) ** 2)

    def outer(w: jax.Array, lam: jax.Array) -> jax.Array:
        del lam
        return _squares(validation, w)

    def minimiser(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(matrix, train.x.T @ train.y + lam)

    return Setting(
        title="Biased Regularization",
        short="BR",
        heavy_ball=True,
        loss=loss,
        outer=outer,
        dimension=sizes.features,
        sample=lambda key: jax.random.uniform(key, (sizes.features,), minval=-10.0, maxval=10.0),
        curvature=lambda _: _spectrum(matrix),
        exact=jax.grad(lambda lam: outer(minimiser(lam), lam)),
    )


def hyper_representation(key: jax.Array, sizes: Sizes, dimension: int) -> Setting:
    """HR: λ = H ~ U[−1, 1], features by `dimension`, β = 1."""
    train, validation = regression_data(key, sizes)

    def loss(w: jax.Array, h: jax.Array) -> jax.Array:
        return _squares(train, h @ w) + 0.5 * jnp.sum(w**2)

    def outer(w: jax.Array, h: jax.Array) -> jax.Array:
        return _squares(validation, h @ w)

    def matrix(h: jax.Array) -> jax.Array:
        xh = train.x @ h
        return xh.T @ xh + jnp.eye(dimension)

    def minimiser(h: jax.Array) -> jax.Array:
        return jnp.linalg.solve(matrix(h), h.T @ train.x.T @ train.y)

    shape = sizes.features, dimension
    return Setting(
        title="Hyper-Representation",
        short="HR",
        heavy_ball=True,
        loss=loss,
        outer=outer,
        dimension=dimension,
        sample=lambda key: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0),
        curvature=lambda h: _spectrum(matrix(h)),
        exact=jax.grad(lambda h: outer(minimiser(h), h)),
    )


def problem(setting: Setting, curvature: Curvature) -> Problem:
    """The setting with the maps whose constants are optimal for this curvature."""
    zero = jnp.zeros(setting.dimension)
    step_size, _ = fg.optimal_step_size(*curvature)
    descent = fg.gradient_descent(setting.loss, step_size=step_size)
    if not setting.heavy_ball:
        return Problem(setting.outer, descent, zero, setting.outer, descent, lambda w: w)
    step_size, momentum, _ = fg.optimal_heavy_ball(*curvature)
    return Problem(
        outer=lambda state, lam: setting.outer(state.w, lam),
        phi=fg.heavy_ball(setting.loss, step_size=step_size, momentum=momentum),
        w0=fg.Momentum(zero, zero),
        outer_cg=setting.outer,
        phi_cg=descent,
        to_cg=lambda state: state.w,
    )


def rate(setting: Setting, curvature: Curvature) -> jax.Array:
    """The rate of the solver in the long run: (κ−1)/(κ+1) of gradient descent, (√κ−1)/(√κ+1)."""
    L, mu = curvature
    kappa = L / mu
    kappa = jnp.sqrt(kappa) if setting.heavy_ball else kappa
    return jnp.asarray(fg.bounds.gradient_descent_rate(kappa))


def _logistic(w: jax.Array, data: Split) -> jax.Array:
    return jnp.sum(jax.nn.softplus(-data.y * (data.x @ w)))


def _squares(data: Split, w: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((data.x @ w - data.y) ** 2)


def _largest(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.eigvalsh(matrix)[-1]


def _spectrum(matrix: jax.Array) -> Curvature:
    eigenvalues = jnp.linalg.eigvalsh(matrix)
    return Curvature(eigenvalues[-1], eigenvalues[0])
