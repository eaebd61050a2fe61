"""`fixedgrad.compat` beside jaxopt: the same lines, both right, or jaxopt not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compat_cases
import fixedgrad as fg
from compat_cases import CASES, X, Y, ridge_by, ridge_slope
from fixedgrad import compat
from fixedgrad.compat import implicit_diff, linear_solve

TOLERANCE = 1e-5  # That of the linear solves by default, as in jaxopt.


@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_a_user_of_jaxopt_are_right(name):
    if "jaxopt" in name:
        pytest.importorskip("jaxopt", exc_type=ImportError)
    assert compat_cases.error(CASES[name], (implicit_diff, linear_solve)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_jaxopt_gives_the_same_or_fails(name):
    pytest.importorskip("jaxopt", exc_type=ImportError)
    case, modules = CASES[name], compat_cases.jaxopts()
    if case.theirs:
        assert compat_cases.error(case, modules) < TOLERANCE
        return
    with pytest.raises((TypeError, jax.errors.UnexpectedTracerError)):
        compat_cases.error(case, modules)


def test_the_decorators_have_jaxopts_names_in_both_places():
    for name in ("custom_root", "custom_fixed_point", "root_vjp", "root_jvp"):
        assert getattr(compat, name) is getattr(implicit_diff, name)


def test_a_linear_solve_that_missed_its_tolerance_is_nan_where_jaxopt_has_a_number():
    solve = functools.partial(linear_solve.solve_cg, maxiter=1)
    assert np.all(np.isnan(jax.jacrev(ridge_by(implicit_diff, solve), argnums=1)(None, 0.1, X, Y)))
    assert np.all(np.isnan(solve(lambda u: jnp.arange(1.0, 5.0) * u, jnp.ones(4))))
    rough = ridge_by(implicit_diff, solve, on_failure="ignore")
    got = jax.jacrev(rough, argnums=1)(None, 0.1, X, Y)
    assert np.all(np.isfinite(got))
    assert np.linalg.norm(got - ridge_slope(0.1)) < np.linalg.norm(ridge_slope(0.1))


def test_a_solver_nowhere_near_a_root_is_nan():
    far = implicit_diff.custom_root(jax.grad(compat_cases.ridge_loss))(
        lambda init_params, lam, x, y: init_params + 100.0
    )
    assert np.all(np.isnan(jax.jacrev(far, argnums=1)(jnp.zeros(4), 0.1, X, Y)))


def test_a_solve_of_ones_own_that_leads_nowhere_is_nan():
    solver = ridge_by(implicit_diff, lambda matvec, b: jnp.zeros_like(b))
    assert np.all(np.isnan(jax.jacrev(solver, argnums=1)(None, 0.1, X, Y)))


def test_a_linear_solve_is_differentiated_like_the_solution():
    a, b = compat_cases.ridge_matrix(0.5), jnp.array([1.0, 2.0, -1.0, 0.5])

    def x_of(shift, b):
        return linear_solve.solve_cg(lambda u: a @ u + shift * u, b, tol=1e-12)

    inverse = np.linalg.inv(a)
    np.testing.assert_allclose(jax.jacrev(x_of, argnums=1)(0.0, b), inverse, rtol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(x_of)(0.0, b), -inverse @ inverse @ b, rtol=1e-8)


def test_complex_systems():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3)) + 4 * np.eye(3)
    b = rng.normal(size=3) + 1j * rng.normal(size=3)
    for name in ("solve_lu", "solve_gmres", "solve_normal_cg", "solve_bicgstab"):
        x = (
            getattr(linear_solve, name)(lambda u: a @ u, jnp.asarray(b), tol=1e-9)
            if (name != "solve_lu")
            else linear_solve.solve_lu(lambda u: a @ u, jnp.asarray(b))
        )
        np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-7)
    x = linear_solve.solve_normal_cg(lambda u: a @ u, jnp.asarray(b), ridge=0.1, tol=1e-9)
    want = np.linalg.solve(a.conj().T @ a + 0.1 * np.eye(3), a.conj().T @ b)
    np.testing.assert_allclose(x, want, rtol=1e-7)


def test_what_the_start_is_does_not_matter():
    # `None`, as with jaxopt's solvers that need none, also for the decorators of this library.
    for decorate in (fg.root, implicit_diff.custom_root):
        solver = decorate(jax.grad(compat_cases.ridge_loss))(
            lambda w0, lam, x, y: jnp.linalg.solve(
                x.T @ x / len(x) + lam * jnp.eye(4), x.T @ y / len(x)
            )
        )
        for start in (None, 0, {"w": jnp.zeros(2)}):
            got = jax.jacrev(lambda lam: solver(start, lam, X, Y))(0.1)  # noqa: B023
            np.testing.assert_allclose(got, ridge_slope(0.1), rtol=1e-4)
