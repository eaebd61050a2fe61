"""`adaptive_hypergradient`: requests met, warm starts, budgets, failures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg
from fixedgrad.linear import assisted

SIZE = 15


def matrix(seed: int, radius: float) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return radius * a / np.linalg.norm(a, 2)


M = matrix(1, 0.95)
X = np.random.default_rng(2).normal(size=(25, SIZE))
Y = np.sign(X @ np.cos(np.arange(SIZE)))
LAM = jnp.concatenate([jnp.array([1.0]), jnp.sin(jnp.arange(SIZE))])
WEIGHTS = jnp.linspace(-3.0, 1.0, SIZE)
CALLS = []


def equilibrium(w, lam):
    CALLS.append(None)
    return jnp.tanh(lam[0] * (jnp.asarray(M, w.dtype) @ w) + lam[1:])


def loss(w, lam):
    return jnp.sum(jax.nn.softplus(-Y * (X @ w))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


logistic = fg.gradient_descent(loss, step_size=float(4 / (np.linalg.norm(X, 2) ** 2 + 4)))


def outer(w, lam):
    return 0.5 * jnp.sum((w - 1) ** 2) + 0.1 * jnp.sum(lam**2)


def truth(phi, w, lam):
    w = jax.lax.fori_loop(0, 3000, lambda _, w: phi(w, lam), w)
    for _ in range(5):
        w = w - jnp.linalg.solve(jnp.eye(w.size) - jax.jacfwd(phi)(w, lam), w - phi(w, lam))
    b, direct = jax.grad(outer, argnums=(0, 1))(w, lam)
    v = jnp.linalg.solve(jnp.eye(w.size) - jax.jacfwd(phi)(w, lam).T, b)
    return direct + jax.vjp(lambda lam: phi(w, lam), lam)[1](v)[0]


def error(g, exact):
    return float(np.linalg.norm(g - exact) / np.linalg.norm(exact))


class Runner:
    """One problem, with the request as a traced argument: one compilation."""

    def __init__(self, phi, lam):
        self.lam = lam
        self.exact = jax.jit(lambda lam: truth(phi, jnp.zeros(SIZE), lam))

        def make(rtol):
            return fg.adaptive_hypergradient(outer, phi, rtol=rtol, on_failure="nan")

        self.init = jax.jit(lambda lam: make(0.5).init(jnp.zeros(SIZE), lam))
        self.update = jax.jit(lambda rtol, state, lam: make(rtol).update(state, lam))


@pytest.fixture(scope="module", params=["equilibrium", "logistic"])
def runner(request):
    return Runner(
        *{"equilibrium": (equilibrium, LAM), "logistic": (logistic, WEIGHTS)}[request.param]
    )


@pytest.mark.slow(but=("equilibrium-*",))
@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-9])
def test_every_request_is_met(runner, rtol):
    g, state = runner.update(rtol, runner.init(runner.lam), runner.lam)
    c = state.certificate
    assert error(g, runner.exact(runner.lam)) <= rtol
    assert c.valid
    assert c.relative_error <= rtol
    assert int(state.info.lower.status) == fg.Status.CONVERGED


def test_a_tighter_request_costs_more_and_a_warm_start_less(runner):
    start = runner.init(runner.lam)
    _, loose = runner.update(1e-1, start, runner.lam)
    _, tight = runner.update(1e-8, start, runner.lam)
    near = runner.lam * 1.0001
    g, warm = runner.update(1e-4, tight, near)
    _, cold = runner.update(1e-4, start, near)
    # But for the search for a saddle, which takes as many whatever is asked for.
    cost = lambda state: state.certificate.products.phi + state.certificate.products.j  # noqa: E731
    assert cost(loose) < cost(tight)
    assert sum(warm.certificate.products) < sum(cold.certificate.products)
    assert error(g, runner.exact(near)) <= 1e-4


def test_the_inverse_is_kept_from_update_to_update(runner):
    # 15 unknowns: the matrix is cheaper than a solve, and made at once where steps of Φ do not do.
    _, first = runner.update(1e-6, runner.init(runner.lam), runner.lam)
    assert first.kept.inverse.ready
    g, second = runner.update(1e-6, first, runner.lam * 1.01)
    assert error(g, runner.exact(runner.lam * 1.01)) <= 1e-6
    np.testing.assert_array_equal(second.kept.inverse.factors.left, first.kept.inverse.factors.left)
    # A matrix of another problem is found out, and made anew.
    other = first.kept._replace(inverse=jax.tree.map(jnp.zeros_like, first.kept.inverse))
    other = other._replace(inverse=other.inverse._replace(ready=jnp.asarray(True)))
    g, third = runner.update(1e-6, first._replace(kept=other), runner.lam * 0.7)
    assert error(g, runner.exact(runner.lam * 0.7)) <= 1e-6
    assert not np.array_equal(third.kept.inverse.factors.left, other.inverse.factors.left)


@pytest.mark.parametrize("price", [0.0, 5.0, 30.0, 1e9])
def test_a_request_is_met_whenever_the_matrix_is_made(price, monkeypatch):
    monkeypatch.setattr(assisted, "_AT_ONCE", 1.0)
    monkeypatch.setattr(assisted, "operations", lambda _: 0.0)
    monkeypatch.setattr(assisted, "_BLOCKED", 0.0)
    monkeypatch.setattr(assisted, "_START", SIZE**3 / price if price else np.inf)
    hypergrad = fg.adaptive_hypergradient(outer, logistic, rtol=1e-6)
    g, state = jax.jit(lambda lam: hypergrad.update(hypergrad.init(jnp.zeros(SIZE), lam), lam))(
        WEIGHTS
    )
    assert error(g, truth(logistic, jnp.zeros(SIZE), WEIGHTS)) <= 1e-6
    if price == 1e9:
        assert state.kept == ()
    else:
        assert bool(state.kept.inverse.ready)


def test_a_saddle_is_found_out_where_no_step_led_along_its_direction():
    # The curvature along y is 1 − x²: positive at the start, where the matrix is made, negative at
    # x = λ. No residual has a part along y.
    def loss(w, lam):
        return 0.5 * (w[0] - lam) ** 2 + 0.5 * (1 - w[0] ** 2) * w[1] ** 2 + w[1] ** 4

    phi = fg.gradient_descent(loss, step_size=0.1)
    hypergrad = fg.adaptive_hypergradient(lambda w, lam: w[0] ** 2, phi, rtol=1e-3)
    g, state = jax.jit(lambda lam: hypergrad.update(hypergrad.init(jnp.zeros(2), lam), lam))(0.5)
    np.testing.assert_allclose(g, 1.0, rtol=1e-3)
    assert bool(state.kept.inverse.definite)
    g, state = jax.jit(hypergrad.update)(state, 2.0)
    assert np.isnan(g)
    assert int(state.certificate.status) == fg.CertificateStatus.REPELLED


def test_data_of_other_sizes_begin_anew():
    def phi(w, lam, x):
        return w - 0.1 * (x.T @ (x @ w - 1.0) / x.shape[0] + lam * w)

    hypergrad = fg.adaptive_hypergradient(lambda w, lam, x: jnp.sum(w**2), phi, rtol=1e-6)
    lam, few = jnp.ones(SIZE), jnp.asarray(X[:5])
    state = hypergrad.init(jnp.zeros(SIZE), lam, few)._replace(kept=())
    g, state = hypergrad.update(state, lam, few)
    assert np.isfinite(g).all()
    assert state.kept != ()


def test_operations_of_a_program_are_counted():
    x = jnp.ones((30, SIZE))
    jaxpr = jax.make_jaxpr(lambda w: x.T @ (x @ w))(jnp.ones(SIZE)).jaxpr
    assert 4 * 30 * SIZE <= assisted.operations(jaxpr) <= 6 * 30 * SIZE  # The transposition too.
    looped = jax.make_jaxpr(lambda w: jax.lax.scan(lambda u, _: (x.T @ (x @ u), None), w, length=5))
    assert assisted.operations(looped(jnp.ones(SIZE)).jaxpr) >= 5 * 4 * 30 * SIZE


def test_a_request_beyond_the_dtype_is_a_failure_and_ends(runner):
    g, state = runner.update(0.0, runner.init(runner.lam), runner.lam)
    assert np.isnan(g).all()
    assert int(state.info.lower.status) == fg.Status.MAX_STEPS
    # What it reached is in the state all the same.
    assert error(state.certificate.polished, runner.exact(runner.lam)) < 1e-10
    # A failed update is not where the next one starts.
    np.testing.assert_array_equal(state.memory[0], np.zeros(SIZE))


def test_nan_in_lambda_ends_as_non_finite(runner):
    g, state = runner.update(1e-3, runner.init(runner.lam), runner.lam.at[0].set(jnp.nan))
    assert np.isnan(g).all()
    assert int(state.info.lower.status) == fg.Status.NON_FINITE


@pytest.mark.slow
def test_max_products_bounds_the_work_and_the_policy_decides():
    hypergrad = fg.adaptive_hypergradient(
        outer, logistic, rtol=1e-10, max_products=20, on_failure="ignore"
    )

    @jax.jit
    def run():
        return hypergrad.update(hypergrad.init(jnp.zeros(SIZE), WEIGHTS), WEIGHTS)

    g, state = run()
    assert np.isfinite(g).all()
    assert int(state.info.lower.status) == fg.Status.MAX_STEPS
    assert sum(state.certificate.products) < 300  # One round more than the budget, at most.


@pytest.mark.slow
def test_it_converges_where_phi_expands():
    a = matrix(3, 2.0)  # ρ(J) may exceed 1; I - J is invertible.

    def expansive(w, lam):
        return jnp.asarray(a) @ w + lam

    hypergrad = fg.adaptive_hypergradient(outer, expansive, rtol=1e-6)
    lam = jnp.ones(SIZE)
    g, _ = jax.jit(hypergrad.update)(hypergrad.init(jnp.zeros(SIZE), lam), lam)
    inverse = np.linalg.inv(np.eye(SIZE) - a)
    exact = inverse.T @ (inverse @ np.ones(SIZE) - 1) + 0.2 * np.ones(SIZE)
    assert np.max(np.abs(np.linalg.eigvals(a))) > 1
    assert error(g, exact) <= 1e-6


def test_phi_is_traced_a_bounded_number_of_times():
    hypergrad = fg.adaptive_hypergradient(outer, equilibrium, rtol=1e-3)
    state = hypergrad.init(jnp.zeros(SIZE), LAM)
    CALLS.clear()
    jax.jit(hypergrad.update).lower(state, LAM)
    assert len(CALLS) < 40


@pytest.mark.slow
def test_a_solver_says_which_of_several_fixed_points_is_meant():
    def wells(w, lam):
        return w - 0.1 * (w**3 - lam**2 * w)

    hypergrad = fg.adaptive_hypergradient(
        lambda w, lam: w + 0 * lam,
        wells,
        rtol=1e-6,
        solver=lambda w, lam: w + 0.9 * lam,
    )
    grad, state = hypergrad.update(hypergrad.init(0.0, 2.0), 2.0)  # w = λ, and not the saddle at 0.
    np.testing.assert_allclose(grad, 1.0, rtol=1e-6)
    np.testing.assert_allclose(state.w, 2.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_outer_loop_that_reaches_its_minimum_goes_on_with_a_zero_gradient(dtype):
    target = jnp.array([1.0, 2.0, 3.0], dtype)

    def phi(w, lam):
        return jnp.tanh(0.5 * w) + 0.5 * lam

    def distance(w, lam):
        return jnp.sum((w - target) ** 2) + 0 * jnp.sum(lam)

    hypergrad = fg.adaptive_hypergradient(distance, phi, rtol=1e-2)
    minimum = 2 * (target - jnp.tanh(0.5 * target))

    @jax.jit
    def run(lam):
        state = hypergrad.init(jnp.zeros(3, dtype), lam)
        return hypergrad.update(state, lam)

    grad, state = run(minimum)
    assert np.linalg.norm(grad) <= 100 * jnp.finfo(dtype).eps
    assert state.info.lower.status in (fg.Status.AT_FLOOR, fg.Status.CONVERGED)
    grad, state = run(2 * minimum)
    assert state.info.lower.status == fg.Status.CONVERGED


@pytest.mark.parametrize(
    ("name", "value"),
    [("rtol", 1.0), ("rtol", -1.0), ("atol", -1.0), ("safety", 0.9), ("max_products", 0)],
)
def test_bad_numbers_are_refused(name, value):
    options: Any = {"rtol": 0.1} | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` of `adaptive_hypergradient`"):
        fg.adaptive_hypergradient(outer, logistic, **options)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="on_failure"):
        fg.adaptive_hypergradient(outer, logistic, rtol=0.1, on_failure="pass")  # pyright: ignore
