"""The bilevel problem at one λ, maps that know their residual, and estimators of a user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg
from fixedgrad.problem import Problem
from fixedgrad.types import jacobian

A = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)) / 5)
W, V, LAM = (
    jnp.array([0.3, -0.2, 0.5, 0.1]),
    jnp.array([1.0, -1.0, 0.5, 2.0]),
    jnp.array([0.4, 0.7]),
)


def loss(w, lam):
    return jnp.sum(jnp.cosh(A @ w)) + 0.5 * lam[0] * jnp.sum(w**2) - lam[1] * jnp.sum(w)


def outer(w, lam):
    return jnp.sum((w - 1.0) ** 3) + lam[0] * lam[1]


def tanh(w, lam):
    return jnp.tanh(A @ w + lam[0]) + lam[1]


MAPS = {
    "tanh": tanh,
    "gradient_descent": fg.gradient_descent(loss, step_size=0.3),
    "damped": fg.damped(fg.gradient_descent(loss, step_size=0.3), damping=0.2),
}


@pytest.mark.parametrize("phi", MAPS.values(), ids=MAPS)
def test_the_gradients_of_the_lagrangian_are_residuals_and_hypergradient(phi):
    problem = Problem.of("test", outer, phi, W, LAM, (), {})

    def lagrangian(w, lam, v):
        return outer(w, lam) + jnp.vdot(v, phi(w, lam) - w)

    of_w, of_lam, of_v = jax.grad(lagrangian, argnums=(0, 1, 2))(W, LAM, V)
    found = problem.gradients(W, V)
    np.testing.assert_allclose(found.r_v, of_w, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, of_lam, rtol=1e-12)
    np.testing.assert_allclose(found.r_w, -of_v, rtol=1e-12)
    adjoint = problem.adjoint(W)
    np.testing.assert_allclose(adjoint.gradient(V), of_lam, rtol=1e-12)
    np.testing.assert_allclose(adjoint.b - V + adjoint.jt(V), of_w, rtol=1e-12)
    assert float(adjoint.value) == float(outer(W, LAM))


@pytest.mark.parametrize("phi", MAPS.values(), ids=MAPS)
def test_products_are_those_of_the_jacobians(phi):
    equation = Problem.of("test", outer, phi, W, LAM, (), {}).equation
    j, b = jax.jacobian(phi, argnums=(0, 1))(W, LAM)
    forward, reverse = equation.jvp(W, LAM), equation.vjp(W, LAM)
    np.testing.assert_allclose(forward.j(V), j @ V, rtol=1e-11)
    np.testing.assert_allclose(forward.b(LAM), b @ LAM, rtol=1e-11)
    np.testing.assert_allclose(reverse.j(V), j.T @ V, rtol=1e-11)
    np.testing.assert_allclose(reverse.b(V), b.T @ V, rtol=1e-11)
    np.testing.assert_allclose(equation.phi(W, LAM) + equation.residual(W, LAM), W, rtol=1e-12)


def test_momentum_maps_know_their_residual():
    state = fg.Momentum(W, 0.5 * W)
    for phi in (
        fg.heavy_ball(loss, step_size=0.3, momentum=0.4),
        fg.nesterov(loss, step_size=0.3, momentum=0.4),
    ):
        want = jax.tree.map(jnp.subtract, state, phi(state, LAM))
        for a, b in zip(phi.residual(state, LAM), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


# Where I − J is small: float32.


def test_float32_solves_what_a_small_step_size_makes_ill_conditioned():
    """κ of the Hessian is 100 whatever α: w − α∇ℓ must not make it 1/(αμ), which float32 cannot."""
    hessian = jnp.asarray(np.geomspace(1.0, 100.0, 6), jnp.float32)

    def quadratic(w, lam):
        return 0.5 * jnp.sum(hessian * w**2) - jnp.sum(lam * w)

    def sum_of_squares(w, lam):
        return 0.5 * jnp.sum(w**2) + 0.0 * jnp.sum(lam)

    lam = jnp.linspace(1.0, 2.0, 6, dtype=jnp.float32)
    want = lam / hessian**2
    phi = fg.gradient_descent(quadratic, step_size=1e-7)

    def error(phi, linear_solver):
        solve = fg.fixed_point(phi, fg.aid(linear_solver))(lambda w0, lam: lam / hessian)
        got = jax.grad(lambda lam: sum_of_squares(solve(jnp.zeros_like(lam), lam), lam))(lam)
        return float(jnp.max(jnp.abs(got / want - 1)))

    assert error(phi, fg.dense()) < 1e-5
    for method in (fg.cg, fg.gmres, fg.bicgstab):
        assert error(phi, method(max_steps=60, rtol=1e-5)) < 1e-3  # The tolerance times κ.
    # What subtraction leaves of it: the control.
    assert not error(lambda w, lam: phi(w, lam), fg.dense()) < 1e-2


# Estimators of a user's own.


def contracting(w, lam):
    return 0.5 * jnp.cos(w) + lam


def neumann(num_terms):
    """v = Σ (Jᵀ)ⁱ w̄ by hand; at `num_terms=1` one-step differentiation."""

    def vjp(equation, w, x, w_bar, solve):
        del solve
        at = equation.vjp(w, x)
        v = term = w_bar
        for _ in range(num_terms - 1):
            term = at.j(term)
            v = v + term
        return fg.Backward(at.b(v), v, None)

    def jvp(equation, w, x, x_dot, solve):
        del solve
        at = equation.jvp(w, x)
        w_dot = term = at.b(x_dot)
        for _ in range(num_terms - 1):
            term = at.j(term)
            w_dot = w_dot + term
        return w_dot

    return fg.Implicit(vjp, jvp)


@pytest.mark.parametrize("num_terms", [1, 3])
def test_an_implicit_estimator_of_a_user_s_own(num_terms):
    solver = fg.picard(contracting, num_steps=60)
    fixed = fg.aid(fg.fp(num_steps=num_terms))

    def f(estimator, lam):
        return jnp.sum(fg.fixed_point(contracting, estimator)(solver)(jnp.zeros(3), lam) ** 2)

    lam = jnp.array([0.1, 0.2, 0.3])
    own = neumann(num_terms)
    want = jax.grad(lambda lam: f(fixed, lam))(lam)
    np.testing.assert_allclose(jax.grad(lambda lam: f(own, lam))(lam), want, rtol=1e-12)
    both = fg.forward(own)
    np.testing.assert_allclose(jax.jacfwd(lambda lam: f(both, lam))(lam), want, rtol=1e-12)
    hypergrad = fg.hypergradient(lambda w, lam: jnp.sum(w**2), contracting, solver, own)
    grad, state = hypergrad.update(hypergrad.init(jnp.zeros(3), lam), lam)
    np.testing.assert_allclose(grad, want, rtol=1e-12)
    assert state.v is not None
    assert state.info.linear is None


def test_an_unrolled_estimator_of_a_user_s_own():
    named = fg.Unrolled("through_the_loop()")
    assert repr(named) == "through_the_loop()"
    solver = fg.picard(contracting, num_steps=7)
    lam = jnp.array([0.1, 0.2, 0.3])
    for estimator in (named, fg.forward(named)):
        solve = fg.fixed_point(contracting, estimator)(solver)
        got = jax.grad(lambda lam, solve=solve: jnp.sum(solve(jnp.zeros(3), lam) ** 2))(lam)
        want = jax.grad(lambda lam: jnp.sum(solver(jnp.zeros(3), lam) ** 2))(lam)
        np.testing.assert_allclose(got, want, rtol=1e-14)


# A tolerance that is traced, in a solver of the library and in a wrapper of a user's own.

TRACED = {
    "cg": lambda tol: fg.cg(max_steps=50, rtol=tol),
    "wrapper": lambda tol: lambda mv, b, x0=None: fg.cg(max_steps=50, rtol=tol)(mv, b, x0),
}


@pytest.mark.slow
@pytest.mark.parametrize("made", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("forward", [False, True])
def test_a_traced_tolerance_survives_every_transformation(made, forward):
    def f(lam, tol):
        estimator = fg.aid(made(tol))
        estimator = fg.forward(estimator) if forward else estimator
        solve = fg.fixed_point(contracting, estimator)(fg.picard(contracting, num_steps=60))
        return jnp.sum(solve(jnp.zeros(2), lam) ** 2)

    lam, tol = jnp.array([0.1, 0.2]), jnp.asarray(1e-9)
    w = fg.picard(contracting, num_steps=80)(jnp.zeros(2), lam)
    slope = 1 / (1 + 0.5 * jnp.sin(w))
    np.testing.assert_allclose(jax.jit(jax.grad(f))(lam, tol), 2 * w * slope, rtol=1e-7)
    np.testing.assert_allclose(jax.grad(jax.jit(f))(lam, tol), 2 * w * slope, rtol=1e-7)
    curvature = 2 * slope**2 - w * jnp.cos(w) * slope**3
    np.testing.assert_allclose(jnp.diag(jax.jit(jax.hessian(f))(lam, tol)), curvature, rtol=1e-6)
    batched = jax.vmap(jax.grad(f), in_axes=(None, 0))(lam, jnp.array([1e-9, 1e-9]))
    np.testing.assert_allclose(batched[1], 2 * w * slope, rtol=1e-7)
    assert float(jax.grad(f, argnums=1)(lam, tol)) == 0.0


def test_a_function_of_a_matrix_is_taken_for_products_with_it():
    m = jacobian(lambda u: 2.0 * u)
    assert m.complement is None
    assert float(m(3.0)) == 6.0
