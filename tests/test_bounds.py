"""The bounds against measured errors, on problems whose constants are known in closed form."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fixedgrad import bounds

T = 40  # Steps measured; both t and k go from 0 to T.
TANH = 4 / (3 * math.sqrt(3))  # sup |tanh″| = sup 2 tanh sech²
SIGMOID = 1 / (6 * math.sqrt(3))  # sup |ψ‴| for the logistic loss ψ


class Problem(NamedTuple):
    """w = Φ(w, λ) in ℝᵈ, an outer objective, and the constants at one λ ∈ ℝⁿ."""

    phi: Callable
    outer: Callable
    lam: jax.Array
    w: jax.Array
    c: bounds.Constants
    kappa: float = math.nan  # κ(I − J) on the ball where J is symmetric, else nan.


def norm(x):
    return float(np.linalg.norm(np.asarray(x), 2))


def fixed_point(phi, lam, d):
    def newton(_, w):
        return w + jnp.linalg.solve(jnp.eye(d) - jax.jacfwd(phi)(w, lam), phi(w, lam) - w)

    w = jax.lax.fori_loop(0, 30, newton, jnp.zeros(d))
    assert norm(phi(w, lam) - w) < 1e-14
    return w


def affine(symmetric):
    """Φ = Aw + Bλ + a: ν₁ = ν₂ = 0. E has η₁ = 1, η₂ = ‖C‖."""
    rng = np.random.default_rng(0)
    d, n = 8, 3
    A = rng.normal(size=(d, d))
    A = A + A.T if symmetric else A
    A = 0.8 * A / norm(A)
    B, C, a, z = (rng.normal(size=s) for s in ((d, n), (d, n), d, d))
    lam = jnp.asarray(rng.normal(size=n))

    def phi(w, lam):
        return A @ w + B @ lam + a

    def outer(w, lam):
        return 0.5 * jnp.sum((w - z) ** 2) + w @ (C @ lam) + 0.5 * lam @ lam

    w = jnp.linalg.solve(jnp.eye(d) - A, B @ lam + a)
    D = norm(w)
    c = bounds.contraction_constants(
        q=0.8 + 1e-12,
        D=D,
        L_E=2 * D + norm(C @ lam - z),
        L_Phi=norm(B),
        nu1=0.0,
        nu2=0.0,
        eta1=1.0,
        eta2=norm(C),
    )
    kappa = float(np.linalg.cond(np.eye(d) - A)) if symmetric else math.nan
    return Problem(phi, outer, lam, w, c, kappa)


def ridge(rng, d=6):
    X, X_val = rng.normal(size=(12, d)), rng.normal(size=(9, d))
    return X, X @ np.ones(d) + 0.1 * rng.normal(size=12), X_val, rng.normal(size=9)


def least_squares(X, y):
    def outer(w, lam):
        del lam
        return 0.5 * jnp.sum((X @ w - y) ** 2)

    return outer


def ridge_optimal_step():
    """Gradient descent on ½‖Xw − y‖² + ½λ‖w‖² with α(λ) = 2/(g_min + g_max + 2λ), so α′ = −α².

    ∂₂Φ = −α′ ∇ℓ − αw = −α Φ(w, λ): the step counts. Hence ν₂ = αq and, as ‖Φ(u)‖ ≤ ‖w‖ + q‖u − w‖
    with ‖u − w‖ ≤ 3D on the ball, L_Φ = α (1 + 3q) D.
    """
    X, y, X_val, y_val = ridge(np.random.default_rng(1))
    d = X.shape[1]
    g = np.linalg.eigvalsh(X.T @ X)
    lam = jnp.array([2.0])

    def phi(w, lam):
        alpha = 2 / (g[0] + g[-1] + 2 * lam[0])
        return w - alpha * (X.T @ (X @ w - y) + lam[0] * w)

    w = jnp.linalg.solve(X.T @ X + 2 * np.eye(d), X.T @ y)
    D, alpha, kappa = norm(w), 2 / (g[0] + g[-1] + 4), (g[-1] + 2) / (g[0] + 2)
    q = bounds.gradient_descent_rate(float(kappa)) + 1e-12
    eta1 = norm(X_val.T @ X_val)
    c = bounds.contraction_constants(
        q=q,
        D=D,
        L_E=eta1 * 2 * D + norm(X_val.T @ y_val),
        L_Phi=float(alpha) * (1 + 3 * q) * D,
        nu1=0.0,
        nu2=float(alpha) * q,
        eta1=eta1,
        eta2=0.0,
    )
    return Problem(phi, least_squares(X_val, y_val), lam, w, c, float(kappa))


def ridge_per_feature():
    """Gradient descent on ½‖Xw − y‖² + ½ wᵀ diag(λ) w, fixed step: ∂₂Φ = −α diag(w)."""
    X, y, X_val, y_val = ridge(np.random.default_rng(2))
    d = X.shape[1]
    lam = jnp.linspace(0.5, 4.0, d)
    H = X.T @ X + np.diag(lam)
    h = np.linalg.eigvalsh(H)
    alpha = float(2 / (h[0] + h[-1]))

    def phi(w, lam):
        return w - alpha * (X.T @ (X @ w - y) + lam * w)

    w = jnp.linalg.solve(H, X.T @ y)
    D, eta1 = norm(w), norm(X_val.T @ X_val)
    c = bounds.contraction_constants(
        q=bounds.gradient_descent_rate(float(h[-1] / h[0])) + 1e-12,
        D=D,
        L_E=eta1 * 2 * D + norm(X_val.T @ y_val),
        L_Phi=alpha * 2 * D,
        nu1=0.0,
        nu2=alpha,
        eta1=eta1,
        eta2=0.0,
    )
    return Problem(phi, least_squares(X_val, y_val), lam, w, c, float(h[-1] / h[0]))


def logistic():
    """Gradient descent on Σ ψ(yᵢ xᵢᵀw) + ½λ‖w‖², α(λ) = 2/(2λ + s), s = ‖X‖²/4: ν₁ > 0.

    J is symmetric, ∂₂Φ = −α Φ as for ridge. ∇₁²ℓ(u) − ∇₁²ℓ(w) = Xᵀ diag(ψ″ − ψ″) X gives ν₁.
    """
    rng = np.random.default_rng(3)
    n_e, d = 12, 4
    X = rng.normal(size=(n_e, d))
    yX = np.sign(rng.normal(size=(n_e, 1))) * X
    X_val, y_val = rng.normal(size=(5, d)), rng.normal(size=5)
    s = norm(X) ** 2 / 4
    lam = jnp.array([1.5])

    def loss(w, lam):
        return jnp.sum(jnp.logaddexp(0.0, -yX @ w)) + 0.5 * lam[0] * w @ w

    def phi(w, lam):
        return w - 2 / (2 * lam[0] + s) * jax.grad(loss)(w, lam)

    w = fixed_point(phi, lam, d)
    D, alpha, kappa = norm(w), 2 / (3.0 + s), (1.5 + s) / 1.5
    q, eta1 = bounds.gradient_descent_rate(kappa), norm(X_val.T @ X_val)
    c = bounds.contraction_constants(
        q=q,
        D=D,
        L_E=eta1 * 2 * D + norm(X_val.T @ y_val),
        L_Phi=alpha * (1 + 3 * q) * D,
        nu1=alpha * norm(X) ** 2 * SIGMOID * max(norm(x) for x in X),
        nu2=alpha * q,
        eta1=eta1,
        eta2=0.0,
    )
    return Problem(phi, least_squares(X_val, y_val), lam, w, c, kappa)


def tanh(d):
    """Equilibrium model Φ = tanh(Aw + λ): ν₁ = ‖A‖² sup|tanh″|, ν₂ = ‖A‖ sup|tanh″|, L_Φ = 1."""
    rng = np.random.default_rng(4)
    A = rng.normal(size=(d, d))
    q = 0.7
    A = q * A / norm(A)
    lam = jnp.asarray(rng.normal(size=d))

    def phi(w, lam):
        return jnp.tanh(A @ w + lam)

    def outer(w, lam):
        return jnp.sum(jnp.sin(w)) + w @ lam

    w = fixed_point(phi, lam, d)
    c = bounds.contraction_constants(
        q=q + 1e-12,
        D=norm(w),
        L_E=math.sqrt(d) + norm(lam),
        L_Phi=1.0,
        nu1=q**2 * TANH,
        nu2=q * TANH,
        eta1=1.0,
        eta2=1.0,
    )
    return Problem(phi, outer, lam, w, c)


PROBLEMS = {
    "affine_symmetric": affine(True),
    "affine_not_symmetric": affine(False),
    "ridge_optimal_step": ridge_optimal_step(),
    "ridge_per_feature": ridge_per_feature(),
    "logistic": logistic(),
    "tanh_scalar": tanh(1),
    "tanh_vector": tanh(5),
}
SYMMETRIC = [name for name, p in PROBLEMS.items() if not math.isnan(p.kappa)]
all_problems = pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)
symmetric_problems = pytest.mark.parametrize("p", [PROBLEMS[s] for s in SYMMETRIC], ids=SYMMETRIC)


def iterates(p, lam, w0=None):
    """w_0, …, w_T, by plain iteration."""
    w0 = jnp.zeros_like(p.w) if w0 is None else w0
    _, ws = jax.lax.scan(lambda w, _: (p.phi(w, lam),) * 2, w0, length=T)
    return jnp.concatenate([w0[None], ws])


def linear_system(p, w):
    """J, B, ∇₁E, ∇₂E at w."""
    J, B = jax.jacfwd(p.phi, argnums=(0, 1))(w, p.lam)
    return (J, B, *jax.grad(p.outer, argnums=(0, 1))(w, p.lam))


def true_gradient(p):
    J, B, b, g = map(np.asarray, jax.jit(lambda w: linear_system(p, w))(p.w))
    return g + B.T @ np.linalg.solve((np.eye(len(b)) - J).T, b)


def itd_errors(p, w0=None):
    def values(lam):
        return jax.vmap(p.outer, (0, None))(iterates(p, lam, w0), lam)

    grads = jax.jit(jax.jacfwd(values))(p.lam)
    return np.linalg.norm(np.asarray(grads) - true_gradient(p), axis=1)


def fp_steps(J, b, num_steps):
    """v_0 = 0, …, v_k with v ← Jᵀv + b."""
    vs = [np.zeros_like(b)]
    for _ in range(num_steps):
        vs.append(J.T @ vs[-1] + b)
    return np.array(vs)


def cg_steps(A, b, num_steps):
    """v_0 = 0, …, v_k of Hestenes and Stiefel; it stands still once converged."""
    v, r = np.zeros_like(b), b
    p, rr = b, b @ b
    vs = [v]
    for _ in range(num_steps):
        if rr > 1e-28 * (b @ b):
            Ap = A @ p
            alpha = rr / (p @ Ap)
            v, r = v + alpha * p, r - alpha * Ap
            rr, old = r @ r, rr
            p = r + rr / old * p
        vs.append(v)
    return np.array(vs)


SYSTEMS = {}  # Compiled once per problem.


def aid_errors(p, solve):
    """‖∇̂f − ∇f‖ for all t, k ≤ T: an array of shape (T + 1, T + 1)."""

    def along_the_iterates(lam):
        return jax.vmap(lambda w: linear_system(p, w))(iterates(p, lam))

    if p.phi not in SYSTEMS:
        SYSTEMS[p.phi] = (*map(np.asarray, jax.jit(along_the_iterates)(p.lam)),)
    truth = true_gradient(p)
    errors = []
    for J, B, b, g in zip(*SYSTEMS[p.phi], strict=True):
        errors.append(np.linalg.norm(g + solve(J, b, T) @ B - truth, axis=1))
    return np.array(errors)


def grid():
    return jnp.arange(T + 1)[:, None], jnp.arange(T + 1)[None, :]


def constant(rho_t):
    def rho(t, c):
        del t, c
        return rho_t

    return rho


def cg_on_symmetric(J, b, num_steps):
    return cg_steps(np.eye(len(b)) - J, b, num_steps)


def assert_below(error, bound):
    """Up to the rounding of the measured error, which does not fall below eps times its start."""
    error, bound = np.broadcast_arrays(np.asarray(error), np.asarray(bound))
    floor = 100 * np.finfo(float).eps * bound.max()
    assert np.all(error <= bound * (1 + 1e-9) + floor), np.max(error / bound)


@all_problems
def test_constants_of_the_table_hold_on_sampled_points_of_the_ball(p):
    rng, c = np.random.default_rng(5), p.c
    u = rng.normal(size=(100, len(p.w)))
    u *= 2 * c.D * rng.uniform(size=(100, 1)) / np.linalg.norm(u, axis=1, keepdims=True)
    points = jnp.concatenate([p.w[None], u])
    systems = jax.jit(jax.vmap(lambda w: linear_system(p, w)))(points)
    (J, *Js), (B, *Bs), (b, *bs), (g, *gs) = map(np.asarray, systems)
    for k, x in enumerate(u):
        r = norm(x - p.w) * (1 + 1e-9)
        assert norm(Js[k]) <= c.q * (1 + 1e-9)
        assert norm(np.linalg.inv(np.eye(len(x)) - Js[k])) <= (1 + 1e-9) / c.mu
        assert norm(Bs[k]) <= c.L_Phi * (1 + 1e-9)
        assert norm(bs[k]) <= c.L_E * (1 + 1e-9)
        assert norm(Js[k] - J) <= c.nu1 * r + 1e-14
        assert norm(Bs[k] - B) <= c.nu2 * r + 1e-14
        assert norm(bs[k] - b) <= c.eta1 * r + 1e-14
        assert norm(gs[k] - g) <= c.eta2 * r + 1e-14


@pytest.mark.parametrize("name", ["affine_symmetric", "ridge_optimal_step", "ridge_per_feature"])
def test_truth_agrees_with_the_gradient_of_the_closed_form(name):
    p = PROBLEMS[name]
    zero = jnp.zeros_like(p.w)

    def closed_form(lam):  # Φ is affine in w.
        J = jax.jacfwd(p.phi)(zero, lam)
        return p.outer(jnp.linalg.solve(jnp.eye(len(zero)) - J, p.phi(zero, lam)), lam)

    expected = jax.jit(jax.grad(closed_form))(p.lam)
    np.testing.assert_allclose(true_gradient(p), expected, rtol=1e-10)


@all_problems
def test_measured_error_of_the_iterates_is_below_the_bound(p):
    errors = np.linalg.norm(np.asarray(iterates(p, p.lam)) - np.asarray(p.w), axis=1)
    assert_below(errors, bounds.iterate(jnp.arange(T + 1), p.c))


@all_problems
def test_measured_error_of_the_derivative_is_below_proposition_2_1(p):
    J, B, *_ = linear_system(p, p.w)
    truth = np.linalg.solve(np.eye(len(p.w)) - J, B)
    errors = np.asarray(jax.jit(jax.jacfwd(lambda lam: iterates(p, lam)))(p.lam)) - truth
    assert_below([norm(e) for e in errors], bounds.jacobian(jnp.arange(T + 1), p.c))


@all_problems
def test_measured_error_of_itd_is_below_theorem_2_1(p):
    assert_below(itd_errors(p), bounds.itd(jnp.arange(T + 1), p.c))


@all_problems
def test_measured_error_of_aid_fp_is_below_theorems_2_2_and_2_4(p):
    errors = aid_errors(p, fp_steps)
    t, k = grid()
    special = bounds.aid_fp(t, k, p.c)
    general = bounds.aid(bounds.fp_rate(t, p.c), bounds.fp_rate(k, p.c), p.c)
    assert_below(errors, special)
    assert jnp.all(special <= general * (1 + 1e-14))


@symmetric_problems
def test_measured_error_of_aid_cg_is_below_theorem_2_2(p):
    errors = aid_errors(p, cg_on_symmetric)
    t, k = grid()
    assert_below(errors, bounds.aid(bounds.fp_rate(t, p.c), bounds.cg_rate(k, p.kappa), p.c))


@all_problems
def test_measured_error_is_below_the_bound_at_the_measured_rate_of_the_lower_level_solver(p):
    ws = iterates(p, p.lam)
    measured = np.linalg.norm(np.asarray(ws) - np.asarray(p.w), axis=1) / norm(p.w)
    errors = aid_errors(p, fp_steps)
    for t in (0, 1, 5, 20):
        rho_t = min(float(measured[t]), 1.0)
        bound = bounds.aid_fp(t, jnp.arange(T + 1), p.c, rho=constant(rho_t))
        assert_below(errors[t], bound)
        assert jnp.all(bound <= bounds.aid_fp(t, jnp.arange(T + 1), p.c) * (1 + 1e-9))


def test_another_start_needs_only_its_own_distance():
    p = PROBLEMS["tanh_vector"]
    w0 = p.w + 0.1 * jnp.ones_like(p.w)
    c = p.c._replace(D=norm(w0 - p.w))  # The table's other constants are global.
    assert_below(itd_errors(p, w0), bounds.itd(jnp.arange(T + 1), c))


def test_bounds_are_attained_and_itd_does_lose_the_factor_t():
    # Φ = λw + a and E = ew at λ = q: ν₂ = 1, J does not move, ∂₂Φ(w_t) = w_t ≤ w = D = L_Φ. Then
    # w_t = (1 − qᵗ) D, so AID-FP errs by eD (qᵗ + qᵏ − qᵗ⁺ᵏ)/(1−q), ITD by eD (t qᵗ⁻¹ + qᵗ/(1−q)).
    a, e, lam = 0.3, -2.0, 0.9
    D = a / (1 - lam)
    c = bounds.contraction_constants(q=lam, D=D, L_E=abs(e), L_Phi=D, nu1=0, nu2=1, eta1=0, eta2=0)
    truth = e * D / (1 - lam)
    w, w_dot = 0.0, 0.0
    for t in range(30):
        assert bounds.iterate(t, c) == pytest.approx(abs(w - D), rel=1e-12)
        assert bounds.jacobian(t, c) == pytest.approx(abs(w_dot - D / (1 - lam)), rel=1e-12)
        assert bounds.itd(t, c) == pytest.approx(abs(e * w_dot - truth), rel=1e-12)
        for k in range(30):
            v = e * sum(lam**i for i in range(k))
            assert bounds.aid_fp(t, k, c) == pytest.approx(abs(w * v - truth), rel=1e-12)
        w, w_dot = lam * w + a, lam * w_dot + w


def test_every_term_of_the_general_bound_is_attained():
    a, lam, rho, sigma = 0.3, 0.9, 0.25, 0.125
    D = a / (1 - lam)
    rest = {"D": D, "nu1": 0, "nu2": 0, "eta1": 0, "eta2": 0, "mu": 1 - lam}
    # ν₂ and σ: the problem above, w_t = (1 + ρ) w and v = (1 + σ) v_t, so that L_Φ = (1 + ρ) D.
    c = bounds.Constants(**{**rest, "L_E": 1, "L_Phi": (1 + rho) * D, "nu2": 1})
    error = ((1 + rho) * (1 + sigma) - 1) * D / (1 - lam)
    assert bounds.aid(rho, sigma, c) == pytest.approx(error, rel=1e-12)
    # η₁: Φ = qw + 5λ and E = 7w²/2, v exact.
    c = bounds.Constants(**{**rest, "L_E": 14 * D, "L_Phi": 5, "eta1": 7})
    assert bounds.aid(rho, 0, c) == pytest.approx(5 * 7 * rho * D / (1 - lam), rel=1e-12)
    # η₂: E = 7wλ, v exact.
    c = bounds.Constants(**{**rest, "L_E": 7, "L_Phi": 5, "eta2": 7})
    assert bounds.aid(rho, 0, c) == pytest.approx(7 * rho * D, rel=1e-12)
    # ν₁, to first order: ∂₁Φ = q at w_t and q − νDρ at w, ∂₂Φ = 5, E = 3w, v exact.
    c = bounds.Constants(**{**rest, "L_E": 3, "L_Phi": 5, "nu1": 1e-6})
    error = 5 * 3 * (1 / (1 - lam) - 1 / (1 - lam + 1e-6 * D * rho))
    assert bounds.aid(rho, 0, c) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("affine_symmetric", 80), ("ridge_optimal_step", 2000), ("ridge_per_feature", 1000)],
)
def test_bounds_decay_as_fast_as_the_measured_errors(name, factor):
    # A symmetric J has ‖Jᵗ‖ = qᵗ; on a quadratic the bounds lose a constant, never a rate.
    # (Elsewhere they may lose a rate: where J is not normal, or ‖J‖ < q near w.)
    p = PROBLEMS[name]
    t = jnp.arange(T + 1)
    fp, cg = (aid_errors(p, solve).diagonal() for solve in (fp_steps, cg_on_symmetric))
    cg_bound = bounds.aid(bounds.fp_rate(t, p.c), bounds.cg_rate(t, p.kappa), p.c)
    for bound, error in (
        (bounds.itd(t, p.c), itd_errors(p)),
        (bounds.aid_fp(t, t, p.c), fp),
        (cg_bound, cg),
    ):
        worst_still_to_come = np.maximum.accumulate(error[::-1])[::-1]  # Errors may pass zero.
        assert np.max(np.asarray(bound) / worst_still_to_come) < factor


@all_problems
def test_aid_fp_bound_is_at_most_that_of_itd_for_as_many_steps(p):
    c2 = bounds.constants(p.c).c2
    assert bounds.aid_fp(0, 0, p.c) == bounds.itd(0, p.c)
    for t in range(1, 200):
        fp, itd = bounds.aid_fp(t, t, p.c), bounds.itd(t, p.c)
        assert fp < itd if c2 > 0 else fp == pytest.approx(itd, rel=1e-14)


@all_problems
def test_general_bound_is_formula_14_and_the_limit_of_formula_21(p):
    c1, c2, c3 = bounds.constants(p.c)
    rho, sigma = 0.3, 0.2
    expected = (c1 + c2 / (1 - p.c.q)) * rho + c3 * sigma
    assert bounds.aid(rho, sigma, p.c) == pytest.approx(expected, rel=1e-12)
    limit = bounds.aid_fp(5, 10_000, p.c)
    assert limit == pytest.approx(bounds.aid(p.c.q**5, 0.0, p.c), rel=1e-12)


def test_c2_of_formula_14_must_be_divided_by_one_minus_q():
    # Φ = aw + νw²/2 + λ on |w| ≤ 2D, E = w, w_t = 0, v exact: without 1/(1−q), (14) is violated.
    a, nu, D = 0.89, 0.05, 0.1
    c = bounds.contraction_constants(
        q=a + 2 * nu * D, D=D, L_E=1, L_Phi=1, nu1=nu, nu2=0, eta1=0, eta2=0
    )
    error = abs(1 / (1 - a) - 1 / (1 - a - nu * D))
    c1, c2, _ = bounds.constants(c)
    assert c1 + c2 < error / 5
    assert error <= bounds.aid(1.0, 0.0, c) < 2 * error


def test_general_bound_holds_without_a_contraction():
    # Φ = −2 tanh(w) + λ: |∂₁Φ| reaches 2, yet I − ∂₁Φ = 1 + 2 sech² ≥ 1 = μ. E = sin(w) + λw.
    lam, w = 1.0, 0.0
    for _ in range(50):
        w -= (w + 2 * math.tanh(w) - lam) / (3 - 2 * math.tanh(w) ** 2)
    c = bounds.Constants(D=w, L_E=1 + lam, L_Phi=1, nu1=2 * TANH, nu2=0, eta1=1, eta2=1, mu=1.0)
    truth = w + (math.cos(w) + lam) / (3 - 2 * math.tanh(w) ** 2)
    for rho, sign, sigma in itertools.product((1.0, 0.3, 1e-3), (1, -1), (1.0, 0.1, -0.1, 0.0)):
        w_t = w * (1 + sign * rho)
        v = (1 - sigma) * (math.cos(w_t) + lam) / (3 - 2 * math.tanh(w_t) ** 2)
        assert abs(w_t + v - truth) <= bounds.aid(rho, abs(sigma), c)


def test_larger_mu_gives_a_smaller_bound_that_still_holds():
    old = PROBLEMS["affine_symmetric"]
    A, _, b0, _ = linear_system(old, jnp.zeros_like(old.w))

    def phi(w, lam):  # −A² is symmetric with eigenvalues in [−0.64, 0], so μ = 1.
        return -A @ (A @ w) + old.phi(jnp.zeros_like(w), lam)

    w = fixed_point(phi, old.lam, len(old.w))
    D, q = norm(w), norm(A @ A)
    c = old.c._replace(q=q, mu=1 - q, D=D, L_E=2 * D + norm(b0))
    p = old._replace(phi=phi, w=w, c=c._replace(mu=1.0))
    t, k = grid()
    rho, sigma = bounds.fp_rate(t, p.c), bounds.fp_rate(k, p.c)
    assert_below(aid_errors(p, fp_steps), bounds.aid(rho, sigma, p.c))
    assert bounds.aid(1.0, 1.0, p.c) < 0.5 * bounds.aid(1.0, 1.0, c)


def spd(kappa, d=30):
    Q, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(d, d)))
    return Q * np.geomspace(1, kappa, d) @ Q.T


@pytest.mark.parametrize("kappa", [1.5, 10.0, 300.0])
def test_measured_euclidean_error_of_cg_is_below_its_rate(kappa):
    A = spd(kappa)
    for seed in range(5):
        v = np.random.default_rng(seed).normal(size=len(A))
        errors = np.linalg.norm(cg_steps(A, A @ v, 25) - v, axis=1) / norm(v)
        assert_below(errors, bounds.cg_rate(jnp.arange(26), kappa))


def test_measured_error_of_cg_on_the_normal_equations_is_below_the_rate_of_kappa_squared():
    p = PROBLEMS["affine_not_symmetric"]
    J, *_ = (np.asarray(x) for x in linear_system(p, p.w))
    A = np.eye(len(J)) - J
    for seed in range(5):
        v = np.random.default_rng(seed).normal(size=len(A))
        errors = np.linalg.norm(cg_steps(A.T @ A, A.T @ A @ v, 12) - v, axis=1) / norm(v)
        assert_below(errors, bounds.cg_rate(jnp.arange(13), float(np.linalg.cond(A)) ** 2))


def test_factor_root_kappa_of_cg_is_needed_in_the_euclidean_norm():
    # Three steps on diag(1, 4, 8, 10): 16% above 2r³, though the energy norm respects it.
    eigenvalues, v, kappa = np.array([1.0, 4.0, 8.0, 10.0]), np.array([3.0, 2.0, 1.0, 1.0]), 10.0
    r = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    error = cg_steps(np.diag(eigenvalues), eigenvalues * v, 3)[3] - v
    root = np.sqrt(eigenvalues)
    assert norm(error) / norm(v) > 1.15 * 2 * r**3
    assert norm(error) / norm(v) <= bounds.cg_rate(3, kappa)
    assert norm(root * error) / norm(root * v) <= 2 * r**3


def test_first_step_of_cg_can_be_worse_than_that_of_fp():
    # diag(1, 10): it leaves 0.85 of the error, gradient descent with the optimal step 0.82.
    v, kappa = np.array([1.0, math.sqrt(2) / 10]), 10.0
    A = np.diag([1.0, kappa])
    error = norm(cg_steps(A, A @ v, 1)[1] - v) / norm(v)
    assert bounds.gradient_descent_rate(kappa) < error <= bounds.cg_rate(1, kappa)


def test_cg_is_asymptotically_no_slower_than_fp_as_in_formula_18():
    assert bounds.gradient_descent_rate(1.0) == 0.0
    for kappa in (1.0001, 1.5, 10.0, 1e3, 1e6):
        q = bounds.gradient_descent_rate(kappa)
        k = bounds.cg_steps(1e-3, kappa)
        r = bounds.cg_rate(k + 1, kappa) / bounds.cg_rate(k, kappa)
        assert r == pytest.approx((math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1), rel=1e-9)
        assert r < q
        late = math.ceil(math.log(2 * math.sqrt(kappa)) / math.log(q / r))
        assert all(bounds.cg_rate(late + i, kappa) <= q ** (late + i) for i in range(50))


TOLERANCES = [1e3, 1.0, 1e-2, 1e-6, 1e-12]


@all_problems
@pytest.mark.parametrize("tol", TOLERANCES)
def test_steps_of_itd_and_aid_fp_are_the_smallest_that_meet_the_tolerance(p, tol):
    itd, fp = bounds.itd_steps(tol, p.c), bounds.aid_fp_steps(tol, p.c)
    assert isinstance(itd, int)
    assert isinstance(fp, int)
    assert bounds.itd(itd, p.c) <= tol
    assert bounds.aid_fp(fp, fp, p.c) <= tol
    assert all(bounds.itd(t, p.c) > tol for t in range(itd))
    assert all(bounds.aid_fp(t, t, p.c) > tol for t in range(fp))
    assert fp <= itd


def test_steps_of_itd_are_zero_or_past_the_hump_of_the_bound():
    c = bounds.contraction_constants(q=0.9, D=1, L_E=1, L_Phi=1, nu1=1, nu2=0, eta1=0, eta2=0)
    start = float(bounds.itd(0, c))
    assert bounds.itd(5, c) > start
    assert bounds.itd_steps(start, c) == 0
    t = bounds.itd_steps(0.999 * start, c)
    assert bounds.itd(t, c) <= 0.999 * start < bounds.itd(t - 1, c)


@pytest.mark.parametrize("kappa", [1.0, 1.5, 10.0, 300.0, 1e6])
@pytest.mark.parametrize("tol", [2.0, *TOLERANCES[1:]])
def test_steps_of_cg_are_the_smallest_that_meet_the_tolerance(kappa, tol):
    k = bounds.cg_steps(tol, kappa)
    assert bounds.cg_rate(k, kappa) <= tol
    assert k == 0 or bounds.cg_rate(k - 1, kappa) > tol


@symmetric_problems
@pytest.mark.parametrize("tol", TOLERANCES)
def test_steps_of_aid_cg_have_the_least_sum(p, tol):
    def meets(t, k):
        return bounds.aid(bounds.fp_rate(t, p.c), bounds.cg_rate(k, p.kappa), p.c) <= tol

    t, k = bounds.aid_cg_steps(tol, p.c, p.kappa)
    assert meets(t, k)
    assert not any(meets(i, t + k - 1 - i) for i in range(t + k))
    assert not any(meets(i, t + k - i) for i in range(t))


def test_steps_are_found_quickly_when_there_are_millions():
    kappa = 1e6
    q = bounds.gradient_descent_rate(kappa)
    c = bounds.contraction_constants(q=q, D=1, L_E=1, L_Phi=1, nu1=1, nu2=1, eta1=1, eta2=1)
    t, k = bounds.aid_cg_steps(1e-3, c, kappa)
    assert k < 2e4 < 1e7 < t < bounds.itd_steps(1e-3, c) < 2e7


def test_arrays_jit_and_vmap_agree_with_python_floats():
    p, ts = PROBLEMS["tanh_vector"], jnp.arange(6)
    c = jax.tree.map(jnp.asarray, p.c)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), c)
    for bound in (bounds.iterate, bounds.jacobian, bounds.itd, lambda t, c: bounds.aid_fp(t, 3, c)):
        values = [bound(t, p.c) for t in range(6)]
        assert all(isinstance(x, float) for x in values)
        expected = np.array(values)
        np.testing.assert_allclose(np.asarray(bound(ts, p.c)), expected, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(bound)(ts, c), expected, rtol=1e-12)
        both = jax.vmap(lambda c, bound=bound: bound(ts, c))(batch)
        np.testing.assert_allclose(both, np.stack([expected, expected]), rtol=1e-12)
    both = jax.vmap(lambda c: jnp.stack(bounds.constants(c)))(batch)
    np.testing.assert_allclose(both[0], np.array(bounds.constants(p.c)), rtol=1e-12)


def test_bounds_can_be_differentiated_with_respect_to_the_constants():
    c = PROBLEMS["tanh_vector"].c
    h = 1e-6
    slope = jax.grad(lambda q: bounds.itd(3, c._replace(q=q)))(c.q)
    finite = (bounds.itd(3, c._replace(q=c.q + h)) - bounds.itd(3, c._replace(q=c.q - h))) / (2 * h)
    assert slope == pytest.approx(finite, rel=1e-6)


def test_single_precision_is_kept():
    c = jax.tree.map(jnp.float32, PROBLEMS["logistic"].c)
    t = jnp.arange(4)
    for x in (bounds.itd(t, c), bounds.aid_fp(t, t, c), bounds.cg_rate(t, jnp.float32(9.0))):
        assert jnp.result_type(x) == jnp.float32
    assert jnp.result_type(bounds.constants(c).c1) == jnp.float32
    assert isinstance(bounds.itd_steps(1e-3, c), int)


VALID = {"q": 0.5, "D": 1, "L_E": 2, "L_Phi": 1, "nu1": 1, "nu2": 0, "eta1": 1, "eta2": 0}
C = bounds.contraction_constants(**VALID)
NO_CONTRACTION = C._replace(q=math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bounds.contraction_constants(**{**VALID, "q": 1.0}),
            r"`q` must lie in \(0, 1\), got 1.0",
        ),
        (
            lambda: bounds.contraction_constants(**{**VALID, "q": 0.0}),
            r"`q` must lie in \(0, 1\), got 0.0",
        ),
        (
            lambda: bounds.contraction_constants(**{**VALID, "q": jnp.array([0.5, 1.5])}),
            r"`q` must lie in \(0, 1\), got \[0.5 1.5\]",
        ),
        (
            lambda: bounds.contraction_constants(**{**VALID, "nu1": -1}),
            "`nu1` must be finite and ≥ 0, got -1",
        ),
        (
            lambda: bounds.contraction_constants(**{**VALID, "D": math.inf}),
            "`D` must be finite and ≥ 0, got inf",
        ),
        (
            lambda: bounds.constants(C._replace(L_E=math.nan)),
            "`L_E` must be finite and ≥ 0, got nan",
        ),
        (
            lambda: bounds.aid(0.1, 0.1, C._replace(mu=0.0)),
            "`mu` must be > 0, got 0.0: 1/`mu` bounds",
        ),
        (
            lambda: bounds.itd(3, NO_CONTRACTION),
            "got nan: build `c` with `contraction_constants`; .* `aid`",
        ),
        (
            lambda: bounds.jacobian(3, NO_CONTRACTION),
            "got nan: build `c` with `contraction_constants`",
        ),
        (
            lambda: bounds.iterate(3, NO_CONTRACTION),
            "got nan: build `c` with `contraction_constants`",
        ),
        (
            lambda: bounds.aid_fp(3, 3, NO_CONTRACTION),
            "got nan: build `c` with `contraction_constants`",
        ),
        (
            lambda: bounds.itd_steps(0.1, NO_CONTRACTION),
            "got nan: build `c` with `contraction_constants`",
        ),
        (lambda: bounds.itd(-1, C), "`t` must be non-negative, got -1: it is a number of steps"),
        (lambda: bounds.aid_fp(1, -2, C), "`k` must be non-negative, got -2"),
        (lambda: bounds.aid_fp(-1, 2, C), "`t` must be non-negative, got -1"),
        (
            lambda: bounds.cg_rate(jnp.array([1, -1]), 2.0),
            r"`k` must be non-negative, got \[ 1 -1\]",
        ),
        (
            lambda: bounds.cg_rate(1, 0.5),
            "`kappa` must be finite and at least 1, got 0.5: it is λmax/λmin",
        ),
        (lambda: bounds.cg_steps(0.1, math.inf), "`kappa` must be finite and at least 1, got inf"),
        (
            lambda: bounds.gradient_descent_rate(0.5),
            "`kappa` must be finite and at least 1, got 0.5",
        ),
        (
            lambda: bounds.aid(1.5, 0.1, C),
            r"`rho_t` must lie in \[0, 1\], got 1.5: if ‖w_t − w‖ > ‖w‖",
        ),
        (
            lambda: bounds.aid_fp(1, 1, C, rho=constant(2.0)),
            r"`rho_t` must lie in \[0, 1\], got 2.0",
        ),
        (lambda: bounds.aid(0.5, -0.1, C), "`sigma_k` must be non-negative, got -0.1"),
        (
            lambda: bounds.itd_steps(0.0, C),
            "`tol` must be positive and finite, got 0.0: no bound is ever zero",
        ),
        (lambda: bounds.aid_fp_steps(math.nan, C), "`tol` must be positive and finite, got nan"),
        (lambda: bounds.cg_steps(-1.0, 2.0), "`tol` must be positive and finite, got -1.0"),
        (lambda: bounds.aid_cg_steps(0.0, C, 2.0), "`tol` must be positive and finite, got 0.0"),
    ],
)
def test_invalid_values_raise_and_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_contraction_constant_is_nan_and_leaves_the_general_bound():
    assert math.isnan(bounds.Constants(1, 1, 1, 1, 1, 1, 1, mu=0.5).q)
    assert bounds.aid(0.1, 0.1, NO_CONTRACTION) == bounds.aid(0.1, 0.1, C)


def test_steps_refuse_traced_and_batched_constants():
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda c: bounds.itd_steps(0.1, c))(C)
    with pytest.raises(TypeError, match="scalar"):
        bounds.itd_steps(0.1, C._replace(D=jnp.ones(2)))
