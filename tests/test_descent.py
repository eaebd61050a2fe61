"""`descent`: it arrives, it never takes a step up, and it says why it ended."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import fixedgrad as fg
from fixedgrad import StopReason

D, N = 6, 8
_RNG = np.random.default_rng(3)


def quadratic_problem(seed, condition=10.0, scales=1.0):
    """(A, B, target) of w(λ) = A⁻¹Bλ and E = ½‖w − target‖² + 10⁻³ ½‖λ/scales‖²."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    a = q @ np.diag(np.geomspace(1 / condition, 1.0, N)) @ q.T
    scales = scales * np.ones(D)
    b = rng.normal(size=(N, D)) / scales
    return tuple(map(jnp.asarray, (a, b, rng.normal(size=N), scales)))


def phi(w, lam, data):
    a, b, *_ = data
    return w - a @ w + b @ lam


def outer(w, lam, data):
    *_, target, scales = data
    return 0.5 * jnp.sum((w - target) ** 2) + 5e-4 * jnp.sum((lam / scales) ** 2)


def minimum(data):
    """λ* and f(λ*), by algebra."""
    a, b, target, scales = map(np.asarray, data)
    m = np.linalg.solve(a, b)
    lam = np.linalg.solve(m.T @ m + 1e-3 * np.diag(scales**-2), m.T @ target)
    return lam, 0.5 * np.sum((m @ lam - target) ** 2) + 5e-4 * np.sum((lam / scales) ** 2)


def exact(lam, data):
    a, b, *_ = data
    return outer(jnp.linalg.solve(a, b @ lam), lam, data)


def check_never_up(history):
    """No step that was taken raised f by more than the two values may err by."""
    value, error = (
        np.asarray(x)[np.isfinite(history.value)] for x in (history.value, history.value_error)
    )
    assert np.all(np.diff(value) <= error[1:] + error[:-1])


# A small `rtol`: how many steps an ill-conditioned f takes hangs on the last digits.
LOOP = fg.descent(outer, phi, rtol=1e-7)
W0 = jnp.zeros(N)


@pytest.mark.parametrize(
    ("condition", "scales", "start"),
    [
        (10.0, 1.0, 0.0),
        (1e3, 1.0, 0.0),
        (10.0, np.geomspace(1e-2, 1e2, D), 0.0),
        (10.0, 1.0, 1e4),
        (10.0, 1e-4, 1.0),
    ],
    ids=["plain", "ill-conditioned", "badly scaled", "far off", "small"],
)
def test_it_arrives_at_the_minimum_and_no_step_leads_up(condition, scales, start):
    for seed in range(3):
        data = quadratic_problem(seed, condition, scales)
        _, least = minimum(data)
        state, history = LOOP.run(LOOP.init(W0, start * jnp.ones(D), data), data, num_steps=300)
        assert StopReason(int(state.reason)) in (StopReason.CONVERGED, StopReason.NO_DECREASE)
        assert exact(state.lam, data) - least <= 2e-3 * abs(least) + 1e-9
        assert abs(state.optimizer.value - exact(state.lam, data)) <= state.optimizer.value_error
        check_never_up(history)


def logistic(seed, rows=60, features=5):
    """Logistic regression with a logarithm of a penalty for each weight, and data for validation."""
    rng = np.random.default_rng(seed)
    x, x_val = rng.normal(size=(2, rows, features))
    w = rng.normal(size=features)
    y, y_val = (np.sign(z @ w + rng.normal(size=rows)) for z in (x, x_val))
    return tuple(map(jnp.asarray, (x, y, x_val, y_val)))


def cross_entropy(w, x, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


PENALISED = fg.gradient_descent(
    lambda w, lam, data: cross_entropy(w, *data[:2]) + 0.5 * jnp.sum(jnp.exp(lam) * w**2),
    step_size=0.2,
)
IN_BOX = fg.descent(lambda w, lam, data: cross_entropy(w, *data[2:]), PENALISED, bounds=(-4.0, 1.0))


def test_in_a_box_it_finds_what_scipy_finds_with_exact_gradients():
    def w_of(lam, data):
        w = jnp.zeros(5)
        for _ in range(30):
            gradient = jax.grad(lambda w: cross_entropy(w, *data[:2]))(w) + jnp.exp(lam) * w
            hessian = jax.hessian(lambda w: cross_entropy(w, *data[:2]))(w) + jnp.diag(jnp.exp(lam))
            w = w - jnp.linalg.solve(hessian, gradient)
        return w

    f = jax.jit(jax.value_and_grad(lambda lam, data: cross_entropy(w_of(lam, data), *data[2:])))
    for seed in range(3):
        data = logistic(seed)
        found = scipy.optimize.minimize(
            lambda lam, data=data: tuple(map(np.asarray, f(lam, data))),
            np.full(5, -2.0),
            jac=True,
            bounds=[(-4.0, 1.0)] * 5,
        )
        state, history = IN_BOX.run(
            IN_BOX.init(jnp.zeros(5), jnp.full(5, -2.0), data), data, num_steps=50
        )
        assert int(state.reason) == StopReason.CONVERGED
        assert np.all((state.lam >= -4.0) & (state.lam <= 1.0))
        assert state.optimizer.value <= found.fun + 1e-3 * abs(found.fun)
        assert int(history.trials.sum()) <= 40
        assert int(state.optimizer.products) == int(
            history.products[np.isfinite(history.value)].sum()
        )
        check_never_up(history)


def in_ball(lam):
    return optax.projections.projection_l2_ball(lam, 0.1)


def test_a_projection_keeps_it_on_a_sphere():
    loop = fg.descent(outer, phi, project=in_ball, rtol=1e-8)
    data = quadratic_problem(0)
    state, history = loop.run(loop.init(W0, jnp.zeros(D), data), data, num_steps=100)
    gradient = jax.grad(exact)(state.lam, data)
    assert np.linalg.norm(state.lam) <= 0.1 * (1 + 1e-12)
    # Stationary: the gradient is normal to the sphere, and points inwards.
    normal = state.lam / np.linalg.norm(state.lam)
    tangential = gradient - (gradient @ normal) * normal
    assert np.linalg.norm(tangential) <= 3e-2 * np.linalg.norm(gradient)
    assert gradient @ normal < 0
    check_never_up(history)


def test_plain_gradient_steps_arrive_too():
    loop = fg.descent(outer, phi, method="gradient", rtol=1e-6)
    data = quadratic_problem(1)
    state, history = loop.run(loop.init(W0, jnp.zeros(D), data), data, num_steps=400)
    _, least = minimum(data)
    assert exact(state.lam, data) - least <= 1e-2 * abs(least)
    check_never_up(history)


def test_a_resumed_run_is_the_run_bit_for_bit_and_step_is_what_run_takes():
    data = quadratic_problem(2)
    start = LOOP.init(W0, jnp.zeros(D), data)
    whole, history = LOOP.run(start, data, num_steps=10)
    half, first = LOOP.run(start, data, num_steps=4)
    resumed, second = LOOP.run(half, data, num_steps=6)
    chex.assert_trees_all_equal(jax.tree.leaves(resumed), jax.tree.leaves(whole))
    np.testing.assert_array_equal(np.concatenate([first.value, second.value]), history.value)


def test_vmap_over_starts_gives_each_its_own():
    data = quadratic_problem(0)
    starts = jnp.stack([jnp.zeros(D), jnp.full(D, 30.0)])
    run = lambda lam: LOOP.run(LOOP.init(W0, lam, data), data, num_steps=60)  # noqa: E731
    states, _ = jax.vmap(run)(starts)
    _, least = minimum(data)
    for i, start in enumerate(starts):
        alone, _ = run(start)
        for lam in (states.lam[i], alone.lam):
            assert exact(lam, data) - least <= 2e-3 * abs(least)


def test_what_is_left_is_rounding_and_the_loop_says_so():
    loop = fg.descent(outer, phi, rtol=0.0)
    data = quadratic_problem(0)
    state, history = loop.run(loop.init(W0, jnp.zeros(D), data), data, num_steps=200)
    lam, least = minimum(data)
    assert int(state.reason) == StopReason.NO_DECREASE
    np.testing.assert_allclose(state.lam, lam, rtol=1e-5)
    assert exact(state.lam, data) - least <= 1e-12 * abs(least)
    check_never_up(history)
    assert repr(history).startswith("DescentInfo(")
    assert "NO_DECREASE" in repr(state)


def test_a_stationary_start_takes_no_step():
    data = quadratic_problem(0)
    lam, _ = minimum(data)
    loop = fg.descent(outer, phi, atol=1e-3)
    state, history = loop.run(loop.init(W0, jnp.asarray(lam), data), data, num_steps=5)
    assert int(state.reason) == StopReason.CONVERGED
    assert int(state.num_steps) <= 1
    assert not bool(history.taken[-1])


def test_it_keeps_out_of_where_the_lower_level_has_no_solution():
    def phi(w, lam):
        return 0.5 * w + jnp.where(lam < 1.4, lam, jnp.nan)

    loop = fg.descent(lambda w, lam: (w - 3.0) ** 2, phi)
    state, history = loop.run(loop.init(0.0, 0.2), num_steps=60)
    assert np.isfinite(state.optimizer.value)
    assert 1.3 <= state.lam < 1.4
    check_never_up(history)


@pytest.mark.parametrize("lam", [1.5, jnp.nan])
def test_a_start_that_has_no_solution_is_told(lam):
    def phi(w, lam):
        return 0.5 * w + jnp.where(lam < 1.4, lam, jnp.nan)

    loop = fg.descent(lambda w, lam: (w - 3.0) ** 2, phi)
    state, history = loop.run(loop.init(0.0, lam), num_steps=3)
    assert int(state.reason) == StopReason.LOWER_FAILED
    assert int(state.num_steps) == 0
    np.testing.assert_array_equal(state.lam, lam)
    assert not np.any(history.taken)


def test_integers_ride_along_and_float32_serves():
    def phi(w, lam):
        return 0.5 * jnp.cos(w) + lam["x"] * lam["n"].astype(w.dtype)

    loop = fg.descent(
        lambda w, lam: jnp.sum((w - 2.0) ** 2), phi, bounds=({"x": 0.0, "n": 0}, {"x": 5.0, "n": 9})
    )
    lam = {"x": jnp.full(2, 0.3, jnp.float32), "n": jnp.asarray(2)}
    state, history = loop.run(loop.init(jnp.zeros(2, jnp.float32), lam), num_steps=30)
    assert state.lam["x"].dtype == jnp.float32
    assert int(state.lam["n"]) == 2
    np.testing.assert_allclose(state.lam["x"], (2 - np.cos(2) / 2) / 2, rtol=1e-3)
    check_never_up(history)
