"""Maps built from losses: their formulas, fixed points, constants, and what they leave alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fixedgrad as fg
from problems import assert_close, matrix

EPS = float(jnp.finfo(jnp.float64).eps)
H = np.diag([4.0, 2.0, 1.0])  # The Hessian of `loss`: L = 4, μ = 1.
C = np.array([1.0, -2.0, 0.5])
W, PREVIOUS, LAM = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.1, 0.7, -0.4]), jnp.asarray(0.8)


def loss(w, lam):
    """½ wᵀHw − λ cᵀw, with the minimiser λ H⁻¹c."""
    return 0.5 * w @ H @ w - lam * (C @ w)


def slope(w, lam):
    return H @ w - lam * C


def soft_threshold(v, step_size, lam):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step_size * lam, 0.0)


def rolling(w, previous=PREVIOUS):
    return fg.Momentum(w, previous)


Y = W + 0.6 * (W - PREVIOUS)

FORMULAS = {
    "gradient_descent": (
        fg.gradient_descent(loss, step_size=0.2),
        W,
        W - 0.2 * slope(W, LAM),
    ),
    "heavy_ball": (
        fg.heavy_ball(loss, step_size=0.2, momentum=0.6),
        rolling(W),
        fg.Momentum(W - 0.2 * slope(W, LAM) + 0.6 * (W - PREVIOUS), W),
    ),
    "heavy_ball without momentum": (
        fg.heavy_ball(loss, step_size=0.2, momentum=0.0),
        rolling(W),
        fg.Momentum(W - 0.2 * slope(W, LAM), W),
    ),
    "nesterov": (
        fg.nesterov(loss, step_size=0.2, momentum=0.6),
        rolling(W),
        fg.Momentum(Y - 0.2 * slope(Y, LAM), W),
    ),
    "proximal_gradient": (
        fg.proximal_gradient(loss, soft_threshold, step_size=0.2),
        W,
        soft_threshold(W - 0.2 * slope(W, LAM), 0.2, LAM),
    ),
    "damped": (
        fg.damped(lambda w, lam: lam * jnp.cos(w), damping=0.25),
        W,
        0.25 * W + 0.75 * LAM * jnp.cos(W),
    ),
    "undamped": (
        fg.damped(lambda w, lam: lam * jnp.cos(w), damping=0.0),
        W,
        LAM * jnp.cos(W),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_map_equals_its_formula(name):
    phi, w, want = FORMULAS[name]
    assert_close(phi(w, LAM), want, 8 * EPS)


MAPS = {
    "gradient_descent": fg.gradient_descent(loss, step_size=0.4),
    "heavy_ball": fg.heavy_ball(loss, step_size=0.4, momentum=0.2),
    "nesterov": fg.nesterov(loss, step_size=0.25, momentum=0.3),
    "proximal_gradient": fg.proximal_gradient(loss, lambda v, *_: v, step_size=0.4),
    "damped": fg.damped(fg.gradient_descent(loss, step_size=0.45), damping=0.2),
}


@pytest.mark.parametrize("name", MAPS)
def test_minimiser_of_the_loss_is_the_fixed_point_and_iteration_finds_it(name):
    phi = MAPS[name]
    with_momentum = name in ("heavy_ball", "nesterov")
    minimiser = LAM * jnp.linalg.solve(jnp.asarray(H), jnp.asarray(C))
    fixed = fg.Momentum(minimiser, minimiser) if with_momentum else minimiser
    assert_close(phi(fixed, LAM), fixed, 8 * EPS)
    start = fg.Momentum(W, W) if with_momentum else W
    assert_close(fg.picard(phi, num_steps=150)(start, LAM), fixed, 32 * EPS)


def test_fixed_point_of_proximal_gradient_is_the_lasso_solution():
    # With XᵀX = I the lasso is solved by soft thresholding Xᵀy.
    x, _ = np.linalg.qr(matrix(20, 1.0, 6, 3))
    y = np.array([2.0, -1.0, 0.3, 0.5, -3.0, 1.0])
    phi = fg.proximal_gradient(
        lambda w, _: 0.5 * jnp.sum((x @ w - y) ** 2), soft_threshold, step_size=0.5
    )
    want = soft_threshold(x.T @ y, 1.0, 0.7)
    assert 0 < jnp.sum(want != 0) < 3
    assert_close(fg.picard(phi, num_steps=60)(jnp.zeros(3), 0.7), want, 16 * EPS)


def test_projection_as_prox_gives_projected_gradient_descent():
    phi = fg.proximal_gradient(
        loss, lambda v, _step_size, _lam: jnp.clip(v, -0.5, 0.1), step_size=0.25
    )
    w = fg.picard(phi, num_steps=100)(W, LAM)
    # H is diagonal: the constrained minimiser is the clipped one.
    assert_close(w, jnp.clip(LAM * C / np.diag(H), -0.5, 0.1), 16 * EPS)


def spectral_radius(phi, state):
    flat, unravel = ravel_pytree(state)
    jacobian = jax.jacobian(lambda x: ravel_pytree(phi(unravel(x), LAM))[0])(flat)
    return float(np.max(np.abs(np.linalg.eigvals(np.asarray(jacobian)))))


def test_optimal_step_size_gives_the_smallest_contraction_constant():
    step_size, q = fg.optimal_step_size(4.0, 1.0)
    np.testing.assert_allclose((step_size, q), (2 / 5, 3 / 5), rtol=4 * EPS)

    def contraction(factor):
        return spectral_radius(fg.gradient_descent(loss, step_size=factor * step_size), W)

    np.testing.assert_allclose(contraction(1.0), q, rtol=16 * EPS)
    assert min(contraction(0.98), contraction(1.02)) > q + 1e-3


def test_optimal_heavy_ball_gives_the_smallest_spectral_radius():
    step_size, momentum, q = fg.optimal_heavy_ball(4.0, 1.0)
    np.testing.assert_allclose((step_size, momentum, q), (4 / 9, 1 / 9, 1 / 3), rtol=4 * EPS)

    def rate(of_step, of_momentum):
        phi = fg.heavy_ball(loss, step_size=of_step * step_size, momentum=of_momentum * momentum)
        return spectral_radius(phi, rolling(W))

    # At the optimum two eigenvalues meet, so that rounding shows as its square root.
    np.testing.assert_allclose(rate(1.0, 1.0), q, rtol=16 * EPS**0.5)
    assert min(rate(0.98, 1.0), rate(1.02, 1.0), rate(1.0, 0.9), rate(1.0, 1.1)) > q + 1e-3
    assert q < fg.optimal_step_size(4.0, 1.0).q


@pytest.mark.parametrize("constants", [fg.optimal_step_size, fg.optimal_heavy_ball])
def test_optimal_constants_take_traced_and_batched_arguments(constants):
    L, mu = jnp.array([4.0, 9.0]), jnp.array([1.0, 9.0])
    batch = jax.jit(jax.vmap(constants))(L, mu)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], batch)
        assert_close(one, constants(float(L[i]), float(mu[i])), 4 * EPS)
    assert float(batch.q[1]) == 0.0  # κ = 1: one step suffices.


def test_step_size_may_be_a_function_of_the_arguments_and_is_differentiated():
    phi = fg.gradient_descent(loss, step_size=lambda lam: 0.1 * lam**2)
    assert_close(phi(W, LAM), W - 0.1 * LAM**2 * slope(W, LAM), 8 * EPS)
    by_hand = -0.2 * LAM * slope(W, LAM) + 0.1 * LAM**2 * C
    assert_close(jax.jacobian(phi, argnums=1)(W, LAM), by_hand, 16 * EPS)


@pytest.mark.parametrize("make", [fg.heavy_ball, fg.nesterov])
def test_step_size_of_momentum_maps_may_be_a_function_of_the_arguments(make):
    constant = make(loss, step_size=0.1 * 0.8, momentum=0.5)
    following = make(loss, step_size=lambda lam: 0.1 * lam, momentum=0.5)
    assert_close(following(rolling(W), LAM), constant(rolling(W), LAM), 8 * EPS)


def test_step_size_of_proximal_gradient_reaches_the_prox_as_well():
    phi = fg.proximal_gradient(loss, soft_threshold, step_size=lambda lam: 0.2 * lam)
    want = soft_threshold(W - 0.2 * LAM * slope(W, LAM), 0.2 * LAM, LAM)
    assert_close(phi(W, LAM), want, 8 * EPS)


def test_keyword_arguments_reach_loss_step_size_and_prox():
    def shifted(w, *, shift, strength):
        return 0.5 * strength * jnp.sum((w - shift) ** 2)

    def prox(v, step_size, *, shift, strength):
        return v + step_size * shift * strength

    def step_size(*, shift, strength):
        return 0.1 * strength + 0.0 * shift

    phi = fg.proximal_gradient(shifted, prox, step_size=step_size)
    want = 2.0 - 0.3 * 3.0 * (2.0 - 1.0) + 0.3 * 1.0 * 3.0
    np.testing.assert_allclose(phi(2.0, strength=3.0, shift=1.0), want, rtol=4 * EPS)


# A state with an integer, a nested pytree and two precisions.
STATE = {
    "steps": jnp.asarray([3, 4]),
    "weights": (jnp.array([1.0, 2.0]), jnp.array([[0.5]], jnp.float32)),
}


def pytree_loss(w, lam):
    double, half = w["weights"]
    return 0.5 * lam * (jnp.sum(double**2) + jnp.sum(half.astype(double.dtype) ** 2))


def halved(w):
    return {"steps": w["steps"], "weights": jax.tree.map(lambda x: x * 0.5, w["weights"])}


@pytest.mark.parametrize("step_size", [0.25, np.float64(0.25), jnp.asarray(0.25, jnp.float32)])
def test_maps_of_pytrees_keep_dtypes_and_leave_integers_alone(step_size):
    lam = jnp.asarray(2.0)
    want = halved(STATE)
    got = fg.gradient_descent(pytree_loss, step_size=step_size)(STATE, lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, STATE)
    chex.assert_trees_all_equal(got, want)
    for make in (fg.heavy_ball, fg.nesterov):
        state = fg.Momentum(STATE, STATE)
        got = make(pytree_loss, step_size=step_size, momentum=0.5)(state, lam)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, state)
        chex.assert_trees_all_equal(got, fg.Momentum(want, STATE))
    mixed = fg.damped(lambda w, _: halved(w), damping=step_size)(STATE, lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(mixed, STATE)
    chex.assert_trees_all_close(mixed["weights"][0], 0.625 * STATE["weights"][0], rtol=4 * EPS)
    chex.assert_trees_all_equal(mixed["steps"], STATE["steps"])


def test_damped_takes_integer_leaves_from_the_map():
    def phi(w):
        return {"w": 0.5 * w["w"], "n": w["n"] + 1}

    got = fg.damped(phi, damping=0.5)({"w": jnp.asarray(4.0), "n": jnp.asarray(7)})
    chex.assert_trees_all_equal(got, {"w": jnp.asarray(3.0), "n": jnp.asarray(8)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_state_stays_in_its_dtype(dtype):
    w = jnp.array([1.0, -2.0], dtype)
    phi = fg.gradient_descent(lambda w: jnp.sum(w**2), step_size=jnp.asarray(0.25))
    got = phi(w)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), [0.5, -1.0])


@pytest.mark.parametrize("name", ["gradient_descent", "heavy_ball", "nesterov"])
def test_complex_maps_descend_to_the_minimiser(name):
    # ½ wᴴ H w − Re(cᴴ w) with H Hermitian: the minimiser is H⁻¹ c. Following jax.grad instead of its
    # conjugate would ascend in the imaginary parts.
    h = matrix(21, 1.0, 3, 3, symmetric=True, is_complex=True) + 2.0 * np.eye(3)
    c = np.array([1.0 + 2.0j, -0.5j, 0.3])

    def real_loss(w):
        return jnp.real(0.5 * jnp.vdot(w, h @ w) - jnp.vdot(c, w))

    make = getattr(fg, name)
    extra = {} if name == "gradient_descent" else {"momentum": 0.1}
    phi = make(real_loss, step_size=0.4, **extra)
    w0 = jnp.zeros(3, complex)
    want = np.linalg.solve(h, c)
    if extra:
        got = fg.picard(phi, num_steps=100)(fg.Momentum(w0, w0)).w
    else:
        assert_close(phi(w0 + 1), 1 - 0.4 * (h @ np.ones(3) - c), 8 * EPS)
        got = fg.picard(phi, num_steps=100)(w0)
    assert_close(got, want, 32 * EPS)


def test_damping_makes_a_divergent_map_contract():
    # Eigenvalues −1.5 and 0.5 ± i: plain iteration diverges, the damped one does not.
    a = np.zeros((3, 3))
    a[0, 0], a[1:, 1:] = -1.5, [[0.5, -1.0], [1.0, 0.5]]

    def phi(w, lam):
        return a @ w + lam

    assert spectral_radius(phi, W) > 1
    assert spectral_radius(fg.damped(phi, damping=0.6), W) < 0.9
    w = fg.picard(fg.damped(phi, damping=0.6), num_steps=300)(W, LAM * jnp.ones(3))
    assert_close(w, np.linalg.solve(np.eye(3) - a, 0.8 * np.ones(3)), 64 * EPS)


def test_step_size_and_momentum_may_be_traced():
    @jax.jit
    def step(step_size, momentum, damping):
        phi = fg.heavy_ball(loss, step_size=step_size, momentum=momentum)
        return fg.damped(phi, damping=damping)(rolling(W), LAM)

    phi = fg.heavy_ball(loss, step_size=0.2, momentum=0.6)
    assert_close(step(0.2, 0.6, 0.1), fg.damped(phi, damping=0.1)(rolling(W), LAM), 8 * EPS)
