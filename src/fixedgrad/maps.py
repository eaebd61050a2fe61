"""Fixed-point maps Φ built from losses and proximal operators, with their optimal step sizes.

A loss is `loss(w, *args, **kwargs) -> scalar`; the map takes the same arguments, and its fixed points
in w are the stationary points of the loss. Leaves of w that are not inexact stay as they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .errors import check_callable, check_number, check_same, check_scalar, shapes_of
from .leaves import fresh
from .printing import printed
from .real_form import steepest_ascent
from .types import ComposedMap, Phi, PyTree, ResidualMap, Scalar

Loss = Callable[..., jax.Array]
StepSize = Scalar | Callable[..., Scalar]
Prox = Callable[..., PyTree]


class Momentum(NamedTuple):
    """The state of a method with momentum: w and the w before it. Start with both equal."""

    w: PyTree
    previous: PyTree


class GradientDescentConstants(NamedTuple):
    """The optimal step size of gradient descent, and the contraction constant it gives."""

    step_size: jax.Array
    q: jax.Array


class HeavyBallConstants(NamedTuple):
    """The optimal constants of heavy ball, and the linear rate they give on quadratics."""

    step_size: jax.Array
    momentum: jax.Array
    q: jax.Array


@printed
def gradient_descent(loss: Loss, *, step_size: StepSize) -> ResidualMap:
    """Gradient descent: Φ(w, λ) = w − α ∇₁ℓ(w, λ).

    J = I − α ∇₁²ℓ is symmetric, so `cg` applies. Where ℓ(·, λ) is μ-strongly convex and L-smooth, Φ
    is a contraction for 0 < α < 2/L, with the smallest constant q = (κ − 1)/(κ + 1), κ = L/μ, at
    α = 2/(L + μ) (`optimal_step_size`). For complex w the direction is the conjugate of `jax.grad`,
    steepest descent.

    Assumed, not checked: 0 < α < 2/L.

    Cost: one gradient. Memory: w and its gradient.
    When not to use it: as the iteration for large κ, where `heavy_ball` or `nesterov` needs about
    √κ in place of κ steps; as the Φ of `aid` it still serves. Nor for a loss with kinks:
    `proximal_gradient`.

    Args:
        loss: `loss(w, *args, **kwargs) -> scalar`.
        step_size: α, a positive number or array, or a function `(*args, **kwargs) -> α`, so that
            α(λ) may follow the hyperparameters. One number for all of w: a step size per coordinate
            makes J non-symmetric.

    Returns:
        `phi(w, *args, **kwargs)`.

    Raises:
        TypeError: `loss` is not callable; when called, it does not return a real scalar.
        ValueError: `step_size` is not a finite number > 0, or, when called, its value is not.

    >>> phi = gradient_descent(lambda w, lam: 0.5 * lam * w**2, step_size=0.25)
    >>> float(phi(1.0, 2.0))
    0.5

    References:
        Grazzi et al., ICML 2020, section 2.1, case (a) and equation (6).
    """
    check_callable("gradient_descent", "loss", loss, "loss(w, *args) -> scalar")
    alpha = _step_size("gradient_descent", step_size)

    def residual(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        gradient = _gradient("gradient_descent", loss, w, *args, **kwargs)
        return _scaled(alpha(*args, **kwargs), gradient, w)

    def phi(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return _subtracted(w, residual(w, *args, **kwargs))

    return ResidualMap(phi, residual)


@printed
def from_residual(residual: Phi) -> ResidualMap:
    """The map of an equation F(w, λ) = 0: Φ(w, λ) = w − F(w, λ), whose fixed points are the roots.

    I − J = ∂₁F, and B = −∂₂F: so `cg` applies where ∂₁F is symmetric and positive definite, as the
    Hessian of a loss at a minimum is. F may be multiplied by any factor, which changes no root: what
    counts as small is told by ∂₁F. So `rtol` of `newton`, `broyden` or `with_tolerance` bounds ‖F(w)‖
    relative to ‖∂₁F(w) w‖ in every leaf, which for F = Aw − b is ‖b‖ at the solution, and `atol` bounds
    ‖F(w)‖.

    Assumed, not checked: F is continuously differentiable at the root, and ∂₁F invertible there.

    Cost: one F. A test of the tolerance takes F, one linearisation of it, and two products.
    When not to use it: for `picard` and `anderson`, whose steps w − F(w) need a contraction; scale F,
    or take `newton`. For the gradient of a loss with a step size, `gradient_descent`.

    Args:
        residual: F, `residual(w, *args, **kwargs)` with structure, shapes and dtypes of w.

    Returns:
        `phi(w, *args, **kwargs)`, which knows F.

    Raises:
        TypeError: `residual` is not callable; when called, F(w) is not like w.

    >>> import fixedgrad as fg
    >>> kepler = from_residual(lambda w, e, m: w - e * jnp.sin(w) - m)
    >>> w, info = fg.newton(kepler, max_steps=9, rtol=1e-12).with_info(1.0, 0.5, 1.0)
    >>> round(float(w), 6), bool(info.converged)
    (1.498701, True)

    References:
        Krantz, Parks, The Implicit Function Theorem, 2002.
    """
    check_callable("from_residual", "residual", residual, "residual(w, *args) -> F(w, lam)")

    def phi(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        f = fresh(residual)(w, *args, **kwargs)
        check_same("from_residual", f, w, "`residual(w, ...)`", "`w`")
        return _subtracted(w, f)

    return ResidualMap(phi, residual, any_scale=True)


@printed
def heavy_ball(loss: Loss, *, step_size: StepSize, momentum: Scalar) -> ResidualMap:
    """Heavy ball: Φ((w, w₋), λ) = (w − α ∇₁ℓ(w, λ) + β (w − w₋), w).

    On quadratics it is a contraction in a norm that depends on ℓ, not in the Euclidean one: errors
    may grow at first. J is not symmetric, so `cg` is wrong with this Φ: give AID the
    `gradient_descent` map, which has the same fixed point.

    Assumed, not checked: ℓ is a strongly convex quadratic with largest eigenvalue L, or close to
    one, and α < 2 (1 + β)/L.

    Cost: one gradient. Memory: 2 w, the state is `Momentum(w, previous)`.
    When not to use it: far from a quadratic. There are smooth strongly convex ℓ on which it cycles
    for ever with the constants of `optimal_heavy_ball`; take `nesterov`.

    Args:
        loss: `loss(w, *args, **kwargs) -> scalar`.
        step_size: α > 0, or a function `(*args, **kwargs) -> α`.
        momentum: β in [0, 1).

    Returns:
        `phi(state, *args, **kwargs) -> state` with a `Momentum` state.

    Raises:
        TypeError: `loss` is not callable; when called, it does not return a real scalar, or the
            state is not a pair.
        ValueError: `step_size` is not a finite number > 0, or, when called, its value is not;
            `momentum` is not in [0, 1).

    >>> phi = heavy_ball(lambda w: 0.5 * w**2, step_size=0.5, momentum=0.25)
    >>> float(phi(Momentum(1.0, 2.0)).w)
    0.25

    References:
        Polyak, Introduction to Optimization, 1987; Grazzi et al., ICML 2020, section 2.1, case (b);
        Lessard, Recht, Packard, Analysis and Design of Optimization Algorithms via Integral
        Quadratic Constraints, 2016 (the cycle).
    """
    check_callable("heavy_ball", "loss", loss, "loss(w, *args) -> scalar")
    alpha, beta = _step_size("heavy_ball", step_size), _momentum("heavy_ball", momentum)

    def residual(state: PyTree, /, *args: PyTree, **kwargs: PyTree) -> Momentum:
        w, previous = _unpacked("heavy_ball", state)
        gradient = _gradient("heavy_ball", loss, w, *args, **kwargs)
        step = _scaled(alpha(*args, **kwargs), gradient, w)
        return Momentum(_extrapolate(step, -beta, w, previous), _subtracted(previous, w))

    def phi(state: PyTree, /, *args: PyTree, **kwargs: PyTree) -> Momentum:
        w, _ = _unpacked("heavy_ball", state)
        return Momentum(_subtracted(w, residual(state, *args, **kwargs).w), w)

    return ResidualMap(phi, residual)


@printed
def nesterov(loss: Loss, *, step_size: StepSize, momentum: Scalar) -> ResidualMap:
    """Nesterov's method with constant momentum: y = w + β (w − w₋), Φ = (y − α ∇₁ℓ(y, λ), w).

    For α = 1/L and β = (√κ − 1)/(√κ + 1) the rate is 1 − 1/√κ: of w on quadratics, of the values of
    ℓ on any ℓ that is μ-strongly convex and L-smooth, κ = L/μ. J is not symmetric (see `heavy_ball`
    for what follows), and the contraction is not in the Euclidean norm.

    Assumed, not checked: 0 < α ≤ 1/L.

    Cost: one gradient. Memory: 2 w, the state is `Momentum(w, previous)`.
    When not to use it: on quadratics, where `heavy_ball` has the better rate (√κ − 1)/(√κ + 1); as
    the Φ of `aid` with `cg`.

    Args:
        loss: `loss(w, *args, **kwargs) -> scalar`.
        step_size: α > 0, or a function `(*args, **kwargs) -> α`.
        momentum: β in [0, 1).

    Returns:
        `phi(state, *args, **kwargs) -> state` with a `Momentum` state.

    Raises:
        TypeError: `loss` is not callable; when called, it does not return a real scalar, or the
            state is not a pair.
        ValueError: `step_size` is not a finite number > 0, or, when called, its value is not;
            `momentum` is not in [0, 1).

    >>> phi = nesterov(lambda w: 0.5 * w**2, step_size=0.5, momentum=0.5)
    >>> float(phi(Momentum(2.0, 1.0)).w)
    1.25

    References:
        Nesterov, A method for solving the convex programming problem with convergence rate
        O(1/k²), 1983; Introductory Lectures on Convex Optimization, 2004, section 2.2 (constant β).
    """
    check_callable("nesterov", "loss", loss, "loss(w, *args) -> scalar")
    alpha, beta = _step_size("nesterov", step_size), _momentum("nesterov", momentum)

    def residual(state: PyTree, /, *args: PyTree, **kwargs: PyTree) -> Momentum:
        w, previous = _unpacked("nesterov", state)
        gradient = _gradient("nesterov", loss, _extrapolate(w, beta, w, previous), *args, **kwargs)
        step = _scaled(alpha(*args, **kwargs), gradient, w)
        return Momentum(_extrapolate(step, -beta, w, previous), _subtracted(previous, w))

    def phi(state: PyTree, /, *args: PyTree, **kwargs: PyTree) -> Momentum:
        w, _ = _unpacked("nesterov", state)
        return Momentum(_subtracted(w, residual(state, *args, **kwargs).w), w)

    return ResidualMap(phi, residual)


@printed
def proximal_gradient(loss: Loss, prox: Prox, *, step_size: StepSize) -> ComposedMap:
    """Proximal gradient: Φ(w, λ) = prox_{αg(·, λ)}(w − α ∇₁ℓ(w, λ)), for min ℓ + g.

    A projection is a prox, so projected gradient descent is this map. J is not symmetric in general
    although I − J is often well conditioned: `fp`, `gmres`, `normal_cg` or `dense`.

    A Φ with kinks has at each point the Jacobians of JAX's rules, which select one branch (at a tie of
    `jnp.maximum` the mean of both). For a piecewise smooth Φ that contracts in w these form a
    conservative derivative: w'(λ) from them is one too, equal to the derivative at almost every λ, and
    `fp` converges to it linearly from the step on at which the w's branches no longer change. At a kink
    itself (an entry at a threshold) it is one of several, none of which finite differences need have.
    Before the branches have settled the bounds for smooth Φ do not hold: a `Certificate` says `KINK`.

    Assumed, not checked: `prox` is the proximal map of αg with g convex, ℓ is L-smooth,
    0 < α < 2/L, and w(λ) is not at a kink.

    Cost: one gradient and one prox. Memory: w and its gradient, and that of the prox.
    When not to use it: where g is smooth. `gradient_descent` on ℓ + g has a symmetric J, hence
    `cg`.

    Args:
        loss: The smooth part, `loss(w, *args, **kwargs) -> scalar`.
        prox: `prox(v, step_size, *args, **kwargs) -> w`; a projection ignores `step_size`.
        step_size: α > 0, or a function `(*args, **kwargs) -> α`.

    Returns:
        `phi(w, *args, **kwargs)`.

    Raises:
        TypeError: `loss` or `prox` is not callable; when called, the loss is not a real scalar.
        ValueError: `step_size` is not a finite number > 0, or, when called, its value is not.

    >>> def soft(v, step_size, lam):
    ...     return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step_size * lam, 0.0)
    >>> phi = proximal_gradient(lambda w, lam: 0.5 * (w - 3.0) ** 2, soft, step_size=1.0)
    >>> float(phi(0.0, 1.0))
    2.0

    References:
        Combettes, Wajs, Signal Recovery by Proximal Forward-Backward Splitting, 2005; Bertrand et
        al., Implicit Differentiation of Lasso-type Models for Hyperparameter Optimization, ICML
        2020; Bolte, Le, Pauwels, Silveti-Falls, Nonsmooth Implicit Differentiation for Machine Learning
        and Optimization, NeurIPS 2021; Grazzi, Pontil, Salzo, Nonsmooth Implicit Differentiation, ICML
        2024 (rates).
    """
    check_callable("proximal_gradient", "loss", loss, "loss(w, *args) -> scalar")
    check_callable("proximal_gradient", "prox", prox, "prox(v, step_size, *args) -> w")
    alpha = _step_size("proximal_gradient", step_size)

    def step(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        gradient = _gradient("proximal_gradient", loss, w, *args, **kwargs)
        return _subtracted(w, _scaled(alpha(*args, **kwargs), gradient, w))

    def proximal(v: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return prox(v, alpha(*args, **kwargs), *args, **kwargs)

    return ComposedMap(step, proximal)


@printed
def damped(phi: Phi, *, damping: Scalar) -> Phi:
    """The damped map: Φ_δ(w, λ) = δ w + (1 − δ) Φ(w, λ), with the fixed points of Φ.

    With J the Jacobian of Φ, its own is J_δ = δI + (1 − δ)J. For a δ close enough to 1 the spectral
    radius of J_δ is below 1 wherever the eigenvalues of J have real parts below 1, as large as they
    may be on the left. It cannot help an eigenvalue of J right of 1.

    As I − J_δ = (1 − δ)(I − J) and ∂₂Φ_δ = (1 − δ) ∂₂Φ, w'(λ) is that of Φ.

    Assumed, not checked: that δ is close enough to 1.

    Cost: one Φ. Memory: that of Φ, and w.
    When not to use it: where Φ contracts with a constant q, as the bound becomes δ + (1 − δ) q > q;
    for the linear solve of `aid` by `cg`, `gmres` or `dense`, to which I − J and its multiple are
    alike.

    Args:
        phi: The map to damp.
        damping: δ in [0, 1); 0 is Φ itself.

    Returns:
        `phi(w, *args, **kwargs)`.

    Raises:
        TypeError: `phi` is not callable.
        ValueError: `damping` is not in [0, 1).

    >>> float(damped(lambda w, lam: lam - w, damping=0.5)(0.0, 3.0))
    1.5

    References:
        Krasnosel'skii, Two remarks on the method of successive approximations, 1955.
    """
    check_callable("damped", "phi", phi, "phi(w, *args) -> w")
    check_number("damped", "damping", damping, lambda x: 0 <= x < 1, "a number in [0, 1)")

    def residual(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        of_phi = phi.residual  # pyright: ignore[reportAttributeAccessIssue]
        return _scaled(1 - jnp.asarray(damping), fresh(of_phi)(w, *args, **kwargs), w)

    def mixed(w: PyTree, image: PyTree) -> PyTree:
        step = 1 - jnp.asarray(damping)

        def mix(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + step.astype(jnp.result_type(y)) * (y - x) if _inexact(y) else y

        return jax.tree.map(mix, w, image)

    def damped_phi(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return mixed(w, fresh(phi)(w, *args, **kwargs))

    if isinstance(phi, ComposedMap):
        inner, after = phi.inner, phi.after
        return ComposedMap(
            lambda w, *args, **kwargs: (w, inner(w, *args, **kwargs)),
            lambda u, *args, **kwargs: mixed(u[0], after(u[1], *args, **kwargs)),
        )
    return ResidualMap(damped_phi, residual) if isinstance(phi, ResidualMap) else damped_phi


def optimal_step_size(L: Scalar, mu: Scalar) -> GradientDescentConstants:
    """The step size of gradient descent with the smallest contraction constant.

    For ℓ μ-strongly convex and L-smooth, α = 2/(L + μ) gives q = (κ − 1)/(κ + 1), κ = L/μ.

    Assumed, not checked: that ℓ has these constants. With an `L` that is too small Φ may expand;
    with a `mu` that is too large Φ contracts, but not by `q`.

    Cost: a few operations on scalars.
    When not to use it: for a loss that is convex only, where 1/L is usual and there is no q.

    Args:
        L: Smoothness constant, L ≥ μ.
        mu: Strong convexity constant, μ > 0.

    Returns:
        The pair (`step_size`, `q`).

    Raises:
        ValueError: Concrete constants that violate 0 < μ ≤ L.

    >>> step_size, q = optimal_step_size(3.0, 1.0)
    >>> float(step_size), float(q)
    (0.5, 0.5)

    References:
        Grazzi et al., ICML 2020, equation (6).
    """
    _check_constants("optimal_step_size", L, mu)
    L, mu = jnp.asarray(L), jnp.asarray(mu)
    return GradientDescentConstants(2 / (L + mu), (L - mu) / (L + mu))


def optimal_heavy_ball(L: Scalar, mu: Scalar) -> HeavyBallConstants:
    """The constants of heavy ball with the best rate on quadratics.

    α = 4/(√L + √μ)², β = ((√L − √μ)/(√L + √μ))², rate q = √β = (√κ − 1)/(√κ + 1).

    Assumed, not checked: the Hessian is constant, with these eigenvalues. q is the spectral radius
    of J, no contraction constant in the Euclidean norm: the bounds of `fixedgrad.bounds` do not
    hold with it.

    Cost: a few operations on scalars.
    When not to use it: for other losses; see `heavy_ball`.

    Args:
        L: Largest eigenvalue of the Hessian, L ≥ μ.
        mu: Smallest eigenvalue, μ > 0.

    Returns:
        The triple (`step_size`, `momentum`, `q`).

    Raises:
        ValueError: Concrete constants that violate 0 < μ ≤ L.

    >>> tuple(map(float, optimal_heavy_ball(9.0, 1.0)))
    (0.25, 0.25, 0.5)

    References:
        Polyak, Introduction to Optimization, 1987.
    """
    _check_constants("optimal_heavy_ball", L, mu)
    high, low = jnp.sqrt(jnp.asarray(L)), jnp.sqrt(jnp.asarray(mu))
    q = (high - low) / (high + low)
    return HeavyBallConstants(4 / (high + low) ** 2, q**2, q)


def _gradient(where: str, loss: Loss, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
    def scalar_loss(w: PyTree) -> jax.Array:
        value = loss(w, *args, **kwargs)
        check_scalar(where, value, "loss")
        return value

    return steepest_ascent(jax.grad(scalar_loss, allow_int=True)(w))


def _scaled(step: Scalar, direction: PyTree, w: PyTree) -> PyTree:
    """Step · direction; leaves of w that are not inexact in their places."""

    def leaf(d: jax.Array, x: jax.Array) -> jax.Array:
        # The step size takes the dtype of the leaf, so that Φ keeps the dtypes of w.
        return jnp.asarray(step, jnp.result_type(d)) * d if _inexact(x) else x

    return jax.tree.map(leaf, direction, w)


def _subtracted(w: PyTree, change: PyTree) -> PyTree:
    return jax.tree.map(lambda x, d: x - d if _inexact(x) else x, w, change)


def _extrapolate(y: PyTree, beta: Scalar, w: PyTree, previous: PyTree) -> PyTree:
    def leaf(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return x + jnp.asarray(beta, jnp.result_type(x)) * (a - b) if _inexact(x) else x

    return jax.tree.map(leaf, y, w, previous)


def _unpacked(where: str, state: PyTree) -> tuple[PyTree, PyTree]:
    if not (isinstance(state, tuple) and len(state) == 2):
        raise TypeError(
            f"The map of `{where}` acts on a state `Momentum(w, previous)`, got {shapes_of(state)}; "
            "start from `Momentum(w0, w0)`, and take `.w` of the result."
        )
    return state


def _inexact(x: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _step_size(where: str, step_size: StepSize) -> Callable[..., Scalar]:
    wanted = "a finite number > 0 or a function of the arguments after w that returns one"

    def evaluate(*args: PyTree, **kwargs: PyTree) -> Scalar:
        value = step_size(*args, **kwargs) if callable(step_size) else step_size
        check_number(where, "step_size", value, lambda x: 0 < x < jnp.inf, wanted)
        return value

    if not callable(step_size):
        evaluate()
    return evaluate


def _momentum(where: str, momentum: Scalar) -> Scalar:
    check_number(where, "momentum", momentum, lambda x: 0 <= x < 1, "a number in [0, 1)")
    return momentum


def _check_constants(where: str, L: Scalar, mu: Scalar) -> None:
    if isinstance(L, Tracer) or isinstance(mu, Tracer):
        return
    low, high = jnp.asarray(mu), jnp.asarray(L)
    if not bool(jnp.all((low > 0) & (high >= low) & jnp.isfinite(high))):
        raise ValueError(f"`{where}` needs 0 < `mu` <= `L`, both finite, got L={L!r}, mu={mu!r}.")
