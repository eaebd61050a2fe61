"""`root` and `from_residual`: F(w, λ) = 0 on any scale, with every linear solver, in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import fixedgrad as fg

SIZE = 5
SCALES = np.array([1.0, 1e9, 1e-9, 1e-30])

LINEAR_SOLVERS = {
    "auto": (fg.auto(), False),
    "auto by GMRES": (fg.auto(at_once=1), False),
    "dense": (fg.dense(), False),
    "gmres": (fg.gmres(max_steps=100, rtol=1e-9), False),
    "bicgstab": (fg.bicgstab(max_steps=100, rtol=1e-9), False),
    "normal_cg": (fg.normal_cg(max_steps=200, rtol=1e-9), False),
    "cg": (fg.cg(max_steps=100, rtol=1e-9), True),
    "cg, exact steps": (fg.cg(num_steps=SIZE), True),
    "cg, inverse": (fg.cg(max_steps=9, rtol=1e-9, preconditioner=fg.inverse()), True),
    "cg, nystrom": (fg.cg(max_steps=100, rtol=1e-9, preconditioner=fg.nystrom(rank=2)), True),
}


def matrix(symmetric: bool, dtype=np.float64):
    a = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return (a @ a.T / SIZE + np.eye(SIZE) if symmetric else a + 3 * np.eye(SIZE)).astype(dtype)


def residual(w, lam, a, scale):
    return scale * (a @ w + 0.1 * w**3 - lam)


def derivative(w, a):
    """∂w/∂λ of the root of `residual`."""
    return np.linalg.inv(a + 0.3 * np.diag(w**2))


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_neither_root_nor_derivative_depends_on_the_scale_of_f(name):
    linear_solver, symmetric = LINEAR_SOLVERS[name]
    a, lam = matrix(symmetric), np.linspace(-1, 2, SIZE)
    phi = fg.from_residual(residual)
    solver = fg.newton(phi, max_steps=30, rtol=1e-10, linear_solver=linear_solver)
    solve = fg.root(residual, fg.aid(linear_solver))(solver)

    @jax.jit
    def both(scale):
        def f(lam):
            w, info = solve.with_info(jnp.zeros(SIZE), lam, a, scale)
            return jnp.sum(jnp.sin(w)), (w, info)

        return jax.value_and_grad(f, has_aux=True)(lam)

    for scale in SCALES:
        (_, (w, info)), grad = both(scale)
        assert bool(info.converged)
        np.testing.assert_allclose(residual(w, lam, a, 1.0), 0, atol=1e-8)
        np.testing.assert_allclose(grad, derivative(w, a).T @ np.cos(w), rtol=1e-6)


def test_a_root_in_float32_is_found_on_any_scale():
    a, lam = matrix(False, np.float32), np.linspace(-1, 2, SIZE).astype(np.float32)
    solver = fg.newton(fg.from_residual(residual), max_steps=30, rtol=1e-5)
    solve = jax.jit(fg.root(residual)(solver).with_info)
    for scale in SCALES[:3].astype(np.float32):
        w, info = solve(jnp.zeros(SIZE, jnp.float32), lam, a, scale)
        assert w.dtype == np.float32
        assert bool(info.converged)
        np.testing.assert_allclose(residual(np.asarray(w), lam, a, 1.0), 0, atol=1e-4)


def test_tolerances_bound_the_norm_of_f():
    a, lam = matrix(False), np.linspace(-1, 2, SIZE)
    phi = fg.from_residual(residual)
    for scale in SCALES[1:3]:
        solver = fg.newton(phi, max_steps=30, atol=1e-3 * scale)
        w, info = solver.with_info(jnp.zeros(SIZE), lam, a, scale)
        f = np.linalg.norm(residual(w, lam, a, scale))
        np.testing.assert_allclose(info.residual, f, rtol=1e-6)
        np.testing.assert_allclose(info.tolerance, 1e-3 * scale)
        assert f <= 1e-3 * scale
    # Relative to ∂₁F w, which for Aw − b is b at the solution.
    solver = fg.newton(fg.from_residual(lambda w, b: a @ w - b), max_steps=30, rtol=1e-3)
    _, info = solver.with_info(jnp.zeros(SIZE), lam)
    np.testing.assert_allclose(info.tolerance, 1e-3 * np.linalg.norm(lam), rtol=0.1)


@pytest.mark.parametrize("method", ["newton", "broyden"])
def test_a_tolerance_below_rounding_ends_at_the_floor(method):
    a, lam = matrix(True), np.linspace(-1, 2, SIZE)
    solver = getattr(fg, method)(fg.from_residual(residual), max_steps=200)
    w, info = solver.with_info(jnp.zeros(SIZE), lam, a, 1.0 if method == "broyden" else 1e6)
    assert bool(info.converged)
    np.testing.assert_allclose(residual(w, lam, a, 1.0), 0, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES[:3])
def test_what_is_no_root_is_not_differentiated(scale):
    a, lam = matrix(False), np.linspace(-1, 2, SIZE)
    grad = jax.grad(lambda lam, w: jnp.sum(solve(w, lam, a, scale)))
    solve = fg.root(residual)(lambda w0, lam, a, scale: w0)
    w = scipy.optimize.root(residual, np.zeros(SIZE), (lam, a, 1.0), tol=1e-12).x
    np.testing.assert_allclose(grad(lam, w), derivative(w, a).sum(0), rtol=1e-6)
    # A solver of few digits will do; one that has found something else will not.
    np.testing.assert_allclose(grad(lam, 1.01 * w), derivative(w, a).sum(0), rtol=0.1)
    for other in (0.0 * w, w + 1.0, np.full(SIZE, 1e3)):
        assert np.all(np.isnan(grad(lam, other)))


def test_a_root_at_zero_is_one():
    def f(w, lam):
        return jnp.sinh(w) - 1e-3 * lam * jnp.cos(w)

    for w0 in (0.0, 1.0):
        solver = fg.newton(fg.from_residual(f), max_steps=30, rtol=1e-8)
        for found in (solver, lambda w0, lam: 0.0 * w0):
            grad = jax.grad(fg.root(f)(found), argnums=1)(w0, 0.0)
            np.testing.assert_allclose(grad, 1e-3, rtol=1e-6)


def test_what_phi_says_root_says_too():
    def phi(w, lam):
        return jnp.tanh(0.4 * jnp.roll(w, 1) + lam)

    lam, w0 = jnp.linspace(0.1, 0.9, SIZE), jnp.zeros(SIZE)
    # With `fp`, too: its steps are those of Φ = w − F.
    for estimator in (fg.aid(fg.fp(num_steps=3)), fg.truncated_itd(num_steps=2)):
        solver = fg.picard(phi, num_steps=60)
        by_phi = jax.jacrev(lambda lam: fg.fixed_point(phi, estimator)(solver)(w0, lam))(lam)  # noqa: B023
        by_root = jax.jacrev(
            lambda lam: fg.root(lambda w, lam: w - phi(w, lam), estimator)(solver)(w0, lam)  # noqa: B023
        )(lam)
        np.testing.assert_allclose(by_root, by_phi, rtol=1e-10, atol=1e-14)


def test_certificates_and_the_adaptive_form_take_an_f_of_any_scale():
    a, lam = matrix(False), np.linspace(-1, 2, SIZE)

    def outer(w, lam, a, scale):
        del lam, a, scale
        return jnp.sum(jnp.sin(w))

    phi = fg.from_residual(residual)
    exact = fg.hypergradient(outer, phi)
    adaptive = fg.adaptive_hypergradient(outer, phi, rtol=1e-4)
    products = set()
    for scale in (1.0, 1e9, 1e-9):
        want, state = exact.update(exact.init(jnp.zeros(SIZE), lam, a, scale), lam, a, scale)
        got, made = adaptive.update(adaptive.init(jnp.zeros(SIZE), lam, a, scale), lam, a, scale)
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
        products.add(sum(map(int, made.certificate.products)))
        # Of a pair that is a little off.
        w, v = state.w * (1 + 1e-3), state.v * (1 - 1e-3)  # pyright: ignore
        rough = -jax.vjp(lambda lam: residual(w, lam, a, scale), lam)[1](v)[0]  # noqa: B023
        certificate = fg.certify(outer, phi, w, v, lam, a, scale)
        error = np.linalg.norm(rough - want)
        assert bool(certificate.valid)
        assert error <= certificate.error <= 2 * error
    assert max(products) < 1.5 * min(products)


def test_every_mode_and_second_derivatives_of_keplers_equation():
    def kepler(w, e, m):
        return 1e7 * (w - e * jnp.sin(w) - m)

    @fg.root(kepler, fg.forward(fg.aid()))
    def solve(w0, e, m):
        return jax.lax.fori_loop(
            0, 30, lambda _, w: w - (w - e * jnp.sin(w) - m) / (1 - e * jnp.cos(w)), w0
        )

    e, m = 0.3, jnp.array([0.5, 1.0, 2.0])
    w = jax.vmap(lambda m: solve(m, e, m))(m)
    first = 1 / (1 - e * np.cos(w))
    for mode in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(jax.vmap(mode(lambda m: solve(m, e, m)))(m), first, rtol=1e-10)
    # w'' = −e sin(w) w'³.
    hessian = jax.vmap(jax.hessian(lambda m: solve(m, e, m)))(m)
    np.testing.assert_allclose(hessian, -e * np.sin(w) * first**3, rtol=1e-9)


def test_kkt_conditions_of_a_quadratic_programme():
    q = jnp.array([[2.0, 0.5], [0.5, 1.0]])

    def kkt(w, c, d):  # min ½xᵀQx + cᵀx subject to x₁ + x₂ = d
        x, nu = w
        return q @ x + c + nu, jnp.sum(x) - d

    @fg.root(kkt)
    def solve(w0, c, d):
        del w0
        full = jnp.block([[q, jnp.ones((2, 1))], [jnp.ones((1, 2)), jnp.zeros((1, 1))]])
        x = jnp.linalg.solve(full, jnp.append(-c, d))
        return x[:2], x[2]

    c = jnp.array([1.0, -1.0])
    x_of = lambda c, d: solve((jnp.zeros(2), 0.0), c, d)[0]  # noqa: E731
    got = jax.jacrev(x_of, argnums=(0, 1))(c, 1.0)
    full = np.block([[q, np.ones((2, 1))], [np.ones((1, 2)), np.zeros((1, 1))]])
    inverse = np.linalg.inv(full)
    np.testing.assert_allclose(got[0], -inverse[:2, :2], rtol=1e-10)
    np.testing.assert_allclose(got[1], inverse[:2, 2], rtol=1e-10)


def test_the_explicit_form_takes_a_residual():
    a, lam = matrix(False), np.linspace(-1, 2, SIZE)
    for scale in SCALES[:3]:
        phi = fg.from_residual(lambda w, lam: residual(w, lam, a, scale))  # noqa: B023
        hypergrad = fg.hypergradient(lambda w, lam: jnp.sum(jnp.sin(w)), phi)
        grad, state = hypergrad.update(hypergrad.init(jnp.zeros(SIZE), lam), lam)
        want = derivative(state.w, a).T @ np.cos(state.w)
        np.testing.assert_allclose(grad, want, rtol=1e-6)
        # (I − Jᵀ)v = ∇₁E with I − J = ∂₁F, whatever the system was divided by.
        v = np.linalg.solve(scale * np.linalg.inv(derivative(state.w, a)).T, np.cos(state.w))
        np.testing.assert_allclose(state.v, v, rtol=1e-6)


def test_messages_name_the_decorator_that_was_used():
    solve = fg.root(lambda w, lam: w - lam)(lambda w0, lam: lam)
    with pytest.raises(TypeError) as caught:
        jax.jvp(lambda lam: solve(0.0, lam), (1.0,), (1.0,))
    assert any("`root` was given an estimator" in note for note in caught.value.__notes__)
