"""Linear solvers: exactness, true residuals, verdicts, and agreement with SciPy step by step."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
import scipy.sparse.linalg as scipy_linalg

import fixedgrad as fg
from fixedgrad import Status
from fixedgrad.linear import elimination
from problems import LINEAR, LINEAR_SOLVERS, PROBLEM, assert_close, like, matrix, named

EPS = float(jnp.finfo(jnp.float64).eps)
EACH = pytest.mark.parametrize("row", LINEAR_SOLVERS, ids=named)
WITH_TOLERANCE = ("fp rtol", "cg rtol", "normal_cg rtol", "gmres rtol", "bicgstab rtol")

D = 4
GENERAL, SYMMETRIC = matrix(40, 0.7, D, D), matrix(41, 0.7, D, D, symmetric=True)
B, OTHER = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.3, 0.1, -1.0, 2.0])
ORTHOGONAL = np.linalg.qr(matrix(42, 1.0, D, D))[0]


def with_eigenvalues(*eigenvalues: float) -> np.ndarray:
    """A dense symmetric matrix."""
    return ORTHOGONAL @ np.diag(eigenvalues) @ ORTHOGONAL.T


@functools.cache
def _compiled(solver: fg.LinearSolver):
    return jax.jit(lambda m, b, x0: solver(lambda v: like(m, v) @ v, b, x0))


@functools.cache
def exactly(name: str, num_steps: int) -> fg.LinearSolver:
    return getattr(fg, name)(num_steps=num_steps)


def run(solver, m, b: Any = B, x0=None):
    """(x, info) of a solver, compiled once for all matrices of the same shape."""
    return _compiled(solver)(*jax.tree.map(jnp.asarray, (m, b, x0)))


def suited(row) -> np.ndarray:
    return SYMMETRIC if row.symmetric_only else GENERAL


def residual(m, x, b=B) -> float:
    x, b = np.asarray(x), np.asarray(b)
    return float(np.linalg.norm(b - (x - m @ x)))


def exact(m, b=B) -> np.ndarray:
    return np.linalg.solve(np.eye(len(b)) - m, b)


# Solutions and info.


@EACH
def test_solver_solves_and_says_so(row):
    m = suited(row)
    x, info = run(row.solver, m)
    assert_close(x, exact(m), row.accuracy + 2**8 * EPS)
    assert bool(info.converged)
    assert int(info.status) in (Status.CONVERGED, Status.FIXED_STEPS)
    assert info.residual <= max(row.accuracy, 2**8 * EPS) * np.linalg.norm(B)
    assert (info.num_steps.dtype, info.status.dtype) == (jnp.int32, jnp.int32)
    chex.assert_shape(tuple(info), ())


COARSE = {
    "fp": fg.fp(num_steps=3),
    "cg": fg.cg(num_steps=2),
    "normal_cg": fg.normal_cg(num_steps=2),
    "gmres": fg.gmres(num_steps=3, restart=2),
    "bicgstab": fg.bicgstab(num_steps=1),
    "fp tolerance": fg.fp(max_steps=100, rtol=0.05),
    "cg tolerance": fg.cg(max_steps=100, rtol=0.05),
    "normal_cg tolerance": fg.normal_cg(max_steps=100, rtol=0.05),
    "gmres tolerance": fg.gmres(max_steps=100, rtol=0.05, restart=2),
    "bicgstab tolerance": fg.bicgstab(max_steps=100, rtol=0.05),
}


@pytest.mark.parametrize("name", COARSE)
def test_reported_residual_is_the_true_one_of_the_returned_x(name):
    m = SYMMETRIC if name.startswith("cg") else GENERAL
    x, info = run(COARSE[name], m, x0=OTHER)
    np.testing.assert_allclose(info.residual, residual(m, x), rtol=1e-12)
    assert info.residual > 1e-3  # A coarse solve: its residual is no rounding error.
    if "tolerance" in name:
        assert info.residual <= 0.05 * np.linalg.norm(B)
        assert int(info.status) == Status.CONVERGED
    else:
        assert int(info.status) == Status.FIXED_STEPS


@pytest.mark.slow(but=("*rtol",))
@EACH
def test_solver_starts_from_x0(row):
    m = suited(row)
    x, info = run(row.solver, m, x0=OTHER)
    assert_close(x, exact(m), 10 * row.accuracy + 2**8 * EPS)
    assert bool(info.converged)
    # Solved already: nothing happens, in particular no 0/0.
    x, info = run(row.solver, m, x0=exact(m))
    assert_close(x, exact(m), 10 * row.accuracy + 2**8 * EPS)
    assert bool(info.converged)
    if row.name in WITH_TOLERANCE:
        assert int(info.num_steps) == 0


@pytest.mark.parametrize("name", ["fp rtol", "cg rtol"])
def test_better_start_needs_fewer_steps(name):
    m = with_eigenvalues(0.9, 0.6, 0.3, -0.5)
    _, cold = run(LINEAR[name].solver, m)
    _, warm = run(LINEAR[name].solver, m, x0=exact(m) + 1e-7 * OTHER)
    assert 0 < int(warm.num_steps) < int(cold.num_steps)


@EACH
def test_zero_right_hand_side_does_not_yield_nan(row):
    for x0 in (None, OTHER):
        x, info = run(row.solver, suited(row), b=np.zeros(D), x0=x0)
        np.testing.assert_array_equal(x, np.zeros(D))
        assert float(info.residual) == 0.0
        assert bool(info.converged)


@EACH
def test_nan_in_products_or_right_hand_side_is_reported(row):
    bad = suited(row).copy()
    bad[1, 2] = np.nan
    _, info = run(row.solver, bad)
    assert not bool(info.converged)
    assert int(info.status) == Status.NON_FINITE
    _, info = run(row.solver, suited(row), b=np.array([1.0, np.nan, 0.0, 0.0]))
    assert not bool(info.converged)
    assert int(info.status) == Status.NON_FINITE


# Verdicts.


@pytest.mark.parametrize(
    "solver",
    [
        fg.fp(max_steps=2, rtol=1e-9),
        fg.cg(max_steps=2, rtol=1e-9),
        fg.normal_cg(max_steps=2, rtol=1e-9),
        fg.gmres(max_steps=2, rtol=1e-9),
        fg.bicgstab(max_steps=2, rtol=1e-9),
    ],
    ids=["fp", "cg", "normal_cg", "gmres", "bicgstab"],
)
def test_too_few_steps_for_the_tolerance_are_reported(solver):
    x, info = run(solver, SYMMETRIC)
    assert int(info.status) == Status.MAX_STEPS
    assert int(info.num_steps) == 2
    assert not bool(info.converged)
    np.testing.assert_allclose(info.residual, residual(SYMMETRIC, x), rtol=1e-12)


BELOW_RESOLUTION = {
    "fp": fg.fp(max_steps=500, rtol=1e-30),
    "cg": fg.cg(max_steps=500, rtol=1e-30),
    "normal_cg": fg.normal_cg(max_steps=500, rtol=1e-30),
    "gmres": fg.gmres(max_steps=500),
    "bicgstab": fg.bicgstab(max_steps=500, atol=1e-30),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BELOW_RESOLUTION)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_tolerance_below_the_resolution_of_the_dtype_ends_at_the_floor(dtype, name):
    b = jnp.asarray(B, dtype)
    m = np.asarray(jnp.asarray(SYMMETRIC, dtype).astype(float))
    x, info = run(BELOW_RESOLUTION[name], SYMMETRIC, b=b)
    assert x.dtype == dtype
    assert info.residual.dtype == ("float64" if dtype == "float64" else "float32")
    assert int(info.status) in (Status.AT_FLOOR, Status.CONVERGED)  # Exact zero is possible.
    if name != "bicgstab":  # It says how many steps it was allowed.
        assert int(info.num_steps) < 500
    # bfloat16 resolves 2⁻⁷ and its floor is low, so that the bound is 2⁻³ there.
    bound = {"float64": 2**7 * EPS, "bfloat16": 2**-3}
    assert_close(x.astype(float), exact(m), bound[dtype])


def test_fp_on_an_expansion_says_no_progress_or_diverged():
    expansion = with_eigenvalues(1.3, 0.5, 0.2, -0.1)
    _, info = run(fg.fp(num_steps=30), expansion)
    assert int(info.status) == Status.NO_PROGRESS
    assert not bool(info.converged)
    _, info = run(fg.fp(max_steps=2000, rtol=1e-6), expansion)
    assert int(info.status) == Status.DIVERGED
    assert int(info.num_steps) < 2000  # It gives up before the numbers overflow.
    assert jnp.isfinite(info.residual)


def test_fp_that_grows_before_it_shrinks_is_not_given_up():
    # Not normal: ‖Mᵏ‖ reaches a hundred before it decays.
    m = np.diag([0.8] * D) + np.diag([3.0] * (D - 1), 1)
    x, info = run(fg.fp(max_steps=2000, rtol=1e-10), m)
    assert int(info.status) == Status.CONVERGED
    assert_close(x, exact(m), 1e-6)


CG = [LINEAR["cg num_steps"].solver, LINEAR["cg rtol"].solver]


@pytest.mark.parametrize("solver", CG, ids=["num_steps", "rtol"])
@pytest.mark.parametrize(
    ("m", "status"),
    [
        (with_eigenvalues(3.0, 0.4, 0.2, -0.3), Status.INDEFINITE),
        (with_eigenvalues(3.0, 2.5, 4.0, 2.0), Status.INDEFINITE),
        # Bᵀ A B = 0 at once, although A = I − M is far from singular.
        (np.eye(D) - np.diag([1.0, 2.0, 4.0, -10 / 9]), Status.INDEFINITE),
        (GENERAL, Status.NOT_SYMMETRIC),
        (np.triu(GENERAL), Status.NOT_SYMMETRIC),
        (with_eigenvalues(1.0, 0.4, 0.2, -0.3), Status.SINGULAR),
        (np.eye(D), Status.SINGULAR),
    ],
    ids=["saddle", "maximum", "balanced", "general", "triangular", "singular", "zero"],
)
def test_cg_reports_what_it_is_wrong_on(solver, m, status):
    _, info = run(solver, m)
    assert int(info.status) == status
    assert not bool(info.converged)


@pytest.mark.parametrize(
    "name",
    [name for name in LINEAR if name.split()[0] in ("normal_cg", "gmres", "bicgstab", "dense")],
)
def test_solvers_for_any_matrix_solve_indefinite_and_expanding_systems(name):
    row = LINEAR[name]
    for m in (with_eigenvalues(3.0, 0.4, 0.2, -0.3), 2.5 * GENERAL):
        x, info = run(row.solver, m)
        assert_close(x, exact(m), 30 * row.accuracy + 2**12 * EPS)
        assert bool(info.converged)


@pytest.mark.parametrize(
    "name",
    [
        "normal_cg num_steps",
        "normal_cg rtol",
        "gmres num_steps",
        "gmres rtol",
        "dense",
        "dense blocks",
    ],
)
@pytest.mark.parametrize(
    "m",
    [with_eigenvalues(1.0, 0.4, 0.2, -0.3), np.eye(D), np.eye(D) - np.outer(B, OTHER)],
    ids=["symmetric", "zero", "rank one"],
)
def test_singular_systems_are_reported(name, m):
    _, info = run(LINEAR[name].solver, m, b=OTHER + 1.0)
    assert int(info.status) == Status.SINGULAR
    assert not bool(info.converged)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [3, 40])
def test_a_direct_solve_finds_a_singular_matrix_though_b_lies_in_its_range(size, dtype):
    rng = np.random.default_rng(size)
    a = rng.normal(size=(size, size))
    a[:, 0] = a[:, 1:] @ rng.normal(size=size - 1)
    m, b = jnp.asarray(np.eye(size) - a, dtype), jnp.asarray(a @ rng.normal(size=size), dtype)
    _, info = fg.dense()(lambda u: m @ u, b)
    assert int(info.status) == Status.SINGULAR
    # Ill-conditioned is not singular.
    q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    a = q * np.geomspace(1.0, 1e-4 if dtype == np.float32 else 1e-11, size) @ q.T
    m = jnp.asarray(np.eye(size) - a, dtype)
    _, info = fg.dense()(lambda u: m @ u, jnp.asarray(a @ rng.normal(size=size), dtype))
    assert int(info.status) == Status.CONVERGED


@pytest.mark.parametrize("name", ["fp rtol", "bicgstab rtol", "lineax"])
def test_solvers_that_cannot_tell_singular_systems_still_do_not_call_them_solved(name):
    _, info = run(LINEAR[name].solver, with_eigenvalues(1.0, 0.4, 0.2, -0.3))
    assert not bool(info.converged)


# Step by step.

N = 12
SPREAD = np.linalg.qr(matrix(43, 1.0, N, N))[0]
BIG_SYMMETRIC = SPREAD @ np.diag(np.linspace(-0.8, 0.9, N)) @ SPREAD.T
BIG_GENERAL = matrix(44, 0.8, N, N)
BIG_B = np.cos(np.arange(1.0, N + 1))
START = np.sin(np.arange(1.0, N + 1))


@pytest.mark.parametrize("x0", [None, START], ids=["from zero", "from x0"])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_cg_equals_that_of_scipy_step_by_step(num_steps, x0):
    x, info = run(exactly("cg", num_steps), BIG_SYMMETRIC, BIG_B, x0)
    want, _ = scipy_linalg.cg(
        np.eye(N) - BIG_SYMMETRIC, BIG_B, x0=x0, rtol=0.0, atol=0.0, maxiter=num_steps
    )
    assert_close(x, want, 1e-12)
    assert int(info.num_steps) == num_steps
    assert info.residual > 1e-6  # Not yet converged, so the steps are what is compared.


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_normal_cg_equals_cg_of_scipy_on_the_normal_equations(num_steps):
    x, info = run(exactly("normal_cg", num_steps), BIG_GENERAL, BIG_B)
    a = np.eye(N) - BIG_GENERAL
    want, _ = scipy_linalg.cg(a.T @ a, a.T @ BIG_B, rtol=0.0, atol=0.0, maxiter=num_steps)
    assert_close(x, want, 1e-11)
    assert int(info.num_steps) == num_steps
    assert info.residual > 1e-8


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_bicgstab_equals_that_of_scipy_step_by_step(num_steps):
    x, info = run(exactly("bicgstab", num_steps), BIG_GENERAL, BIG_B)
    want, _ = scipy_linalg.bicgstab(
        np.eye(N) - BIG_GENERAL, BIG_B, rtol=0.0, atol=0.0, maxiter=num_steps
    )
    assert_close(x, want, 1e-10)
    assert info.residual > 1e-8


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_gmres_minimises_the_residual_over_the_krylov_space(num_steps):
    x, info = run(exactly("gmres", num_steps), BIG_GENERAL, BIG_B)
    a = np.eye(N) - BIG_GENERAL
    krylov = np.stack([np.linalg.matrix_power(a, i) @ BIG_B for i in range(num_steps)], axis=1)
    q, _ = np.linalg.qr(krylov)
    y, *_ = np.linalg.lstsq(a @ q, BIG_B, rcond=None)
    # The monomial basis of the comparison costs digits.
    assert_close(x, q @ y, 1e-12 if num_steps < 10 else 1e-9)
    assert int(info.num_steps) == num_steps
    assert info.residual > 1e-6


def test_restarted_gmres_equals_cycles_one_after_another():
    cycle = fg.gmres(num_steps=3)
    x, _ = run(cycle, BIG_GENERAL, BIG_B)
    x, _ = run(cycle, BIG_GENERAL, BIG_B, x)
    x, last = run(fg.gmres(num_steps=2), BIG_GENERAL, BIG_B, x)
    got, info = run(fg.gmres(num_steps=8, restart=3), BIG_GENERAL, BIG_B)
    assert_close(got, x, 1e-12)
    np.testing.assert_allclose(info.residual, last.residual, rtol=1e-9)
    assert int(info.num_steps) == 8


def test_gmres_with_restarts_too_short_stagnates_and_says_so():
    # I − M is a cyclic shift: no Krylov space short of the whole space reduces the residual.
    m = np.eye(D) - np.roll(np.eye(D), 1, axis=0)
    b = np.array([1.0, 0.0, 0.0, 0.0])
    x, info = run(fg.gmres(max_steps=60, rtol=1e-8, restart=D - 1), m, b)
    assert int(info.status) == Status.MAX_STEPS
    np.testing.assert_allclose(info.residual, 1.0, rtol=1e-12)
    x, info = run(fg.gmres(max_steps=60, rtol=1e-8, restart=D), m, b)
    assert int(info.status) == Status.CONVERGED
    assert_close(x, exact(m, b), 1e-12)


def test_gmres_stops_where_the_krylov_space_ends():
    # Two distinct eigenvalues: two steps are exact, and more would be directions made of noise.
    m = np.diag([0.5, 0.5, -0.25, -0.25])
    x, info = run(fg.gmres(num_steps=8), m)
    assert_close(x, exact(m), 8 * EPS)
    assert int(info.num_steps) == 2


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12])
def test_fp_is_the_truncated_neumann_series_and_its_error_is_bounded(num_steps):
    # Compared with ‖xₖ − x‖ ≤ qᵏ ‖x‖ where q = ‖M‖.
    x, info = run(exactly("fp", num_steps), BIG_GENERAL, BIG_B)
    series = sum(np.linalg.matrix_power(BIG_GENERAL, i) @ BIG_B for i in range(num_steps))
    assert_close(x, series, 1e-14)
    want = exact(BIG_GENERAL, BIG_B)
    assert np.linalg.norm(x - want) <= 0.8**num_steps * np.linalg.norm(want)
    assert int(info.num_steps) == num_steps
    start, _ = run(exactly("fp", num_steps), BIG_GENERAL, BIG_B, START)
    power = np.linalg.matrix_power(BIG_GENERAL, num_steps)
    assert_close(start, power @ START + series, 1e-14)


def test_cg_keeps_its_rate():
    # ‖xₖ − x‖_A ≤ 2 ((√κ − 1)/(√κ + 1))ᵏ ‖x‖_A.
    a, want = np.eye(N) - BIG_SYMMETRIC, exact(BIG_SYMMETRIC, BIG_B)
    kappa = np.linalg.cond(a)
    rate = (np.sqrt(kappa) - 1) / (np.sqrt(kappa) + 1)
    for num_steps in (1, 3, 10):
        error = np.asarray(run(exactly("cg", num_steps), BIG_SYMMETRIC, BIG_B)[0]) - want
        bound = 2 * rate**num_steps * np.sqrt(want @ a @ want)
        assert 1e-12 < np.sqrt(error @ a @ error) <= bound


def test_residual_of_normal_cg_keeps_its_rate():
    a = np.eye(N) - BIG_GENERAL
    kappa = np.linalg.cond(a)
    for num_steps in (1, 3, 10):
        _, info = run(exactly("normal_cg", num_steps), BIG_GENERAL, BIG_B)
        bound = 2 * ((kappa - 1) / (kappa + 1)) ** num_steps * np.linalg.norm(BIG_B)
        assert 1e-12 < info.residual <= bound


def test_more_cg_steps_than_the_system_needs_do_no_harm():
    x, info = run(fg.cg(num_steps=200), BIG_SYMMETRIC, BIG_B)
    assert_close(x, exact(BIG_SYMMETRIC, BIG_B), 2**6 * EPS)
    assert int(info.status) == Status.FIXED_STEPS


@pytest.mark.parametrize(
    ("solver", "products"),
    [
        (fg.fp(num_steps=5), 4),
        (fg.cg(num_steps=3), 3),
        (fg.normal_cg(num_steps=3), 2 * 3 + 1),
        (fg.gmres(num_steps=3), 3),
        (fg.dense(block_size=2), D),
    ],
    ids=["fp", "cg", "normal_cg", "gmres", "dense"],
)
def test_solver_takes_as_many_products_as_it_says_where_nobody_reads_the_info(solver, products):
    counted = []

    def on_host(transposed):
        def product(v):
            counted.append(transposed)
            return (SYMMETRIC.T if transposed else SYMMETRIC) @ v

        shape = jax.ShapeDtypeStruct((D,), jnp.float64)
        return lambda v: jax.pure_callback(product, shape, v, vmap_method="sequential")

    if products == 7:  # `normal_cg` transposes the product.
        forward, backward = on_host(False), on_host(True)

        def matvec(v):
            return jax.custom_derivatives.linear_call(
                lambda _, v: forward(v), lambda _, u: backward(u), (), v
            )
    else:
        matvec = on_host(False)

    x = jax.jit(lambda b: solver(matvec, b)[0])(jnp.asarray(B))
    assert residual(SYMMETRIC, x) < 0.5 * np.linalg.norm(B)
    assert len(counted) == products


def test_products_are_traced_as_often_for_many_steps_as_for_few():
    def traces(make, num_steps):
        calls = []

        def matvec(v):
            calls.append(None)
            return 0.5 * v

        jax.eval_shape(lambda b: make(num_steps=num_steps)(matvec, b), jnp.ones(2))
        return len(calls)

    for make in (fg.fp, fg.cg, fg.normal_cg, fg.gmres):
        assert traces(make, 2) == traces(make, 20) <= 8


# Pytrees, dtypes, transformations.


def test_complex_cg_takes_the_steps_of_scipy():
    m = matrix(45, 0.7, 6, 6, symmetric=True, is_complex=True)
    b = np.exp(1j * np.arange(6.0))
    x, info = run(fg.cg(num_steps=3), m, b)
    want, _ = scipy_linalg.cg(np.eye(6) - m, b, rtol=0.0, atol=0.0, maxiter=3)
    assert_close(x, want, 1e-13)
    np.testing.assert_allclose(info.residual, residual(m, x, b), rtol=1e-12)


@pytest.mark.parametrize("name", ["normal_cg num_steps", "gmres num_steps", "dense"])
def test_product_that_is_linear_over_the_reals_only_is_solved(name):
    a, c = matrix(46, 0.4, 2, 2, is_complex=True), matrix(47, 0.4, 2, 2, is_complex=True)
    b = jnp.array([1.0 + 2.0j, -0.5j])
    x, info = jax.jit(lambda b: LINEAR[name].solver(lambda v: a @ v + c @ jnp.conj(v), b))(b)
    assert_close(x - a @ x - c @ jnp.conj(x), b, 2**6 * EPS)
    assert bool(info.converged)


def test_structure_shapes_and_dtypes_of_the_right_hand_side_are_kept():
    b = {"a": (jnp.ones(()), jnp.ones((2, 2), jnp.float32)), "b": [jnp.ones(3, complex)]}

    def matvec(v):
        return jax.tree.map(lambda x: like(0.5, x) * x, v)

    for name in ("fp num_steps", "dense"):
        x, info = jax.jit(lambda b, name=name: LINEAR[name].solver(matvec, b))(b)
        chex.assert_trees_all_equal_shapes_and_dtypes(x, b)
        chex.assert_trees_all_close(x, jax.tree.map(lambda v: 2 * v, b), rtol=1e-6)
        assert info.residual.dtype == jnp.float64


def test_inner_products_of_float16_do_not_overflow():
    # ‖b‖² = 4 · 300² is beyond float16.
    b = 300.0 * jnp.ones(D, jnp.float16)
    m = with_eigenvalues(0.5, 0.25, 0.0, -0.5)
    for solver in (fg.cg(num_steps=4), fg.fp(num_steps=20), fg.gmres(num_steps=4)):
        x, info = run(solver, m, b)
        assert (x.dtype, info.residual.dtype) == (jnp.float16, jnp.float32)
        # float16 resolves 2⁻¹⁰, and each product rounds to it.
        assert_close(x.astype(float), exact(m, np.asarray(b, float)), 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fp rtol", "cg rtol", "normal_cg rtol", "gmres num_steps", "bicgstab rtol", "dense"]
)
def test_bad_element_of_a_batch_leaves_the_others_alone(name):
    row = LINEAR[name]
    bad = with_eigenvalues(1.0, 0.4, 0.2, -0.3)
    nan = SYMMETRIC * np.nan
    batch = jnp.stack([SYMMETRIC, bad, 0.5 * SYMMETRIC, nan])
    x, info = jax.jit(jax.vmap(lambda m: row.solver(lambda v: m @ v, jnp.asarray(B))))(batch)
    np.testing.assert_array_equal(info.converged, [True, False, True, False])
    assert int(info.status[3]) == Status.NON_FINITE
    for i in (0, 2):
        assert_close(x[i], exact(np.asarray(batch[i])), row.accuracy + 2**8 * EPS)
        _, alone = run(row.solver, batch[i])
        assert int(info.num_steps[i]) == int(alone.num_steps)


def test_tolerances_may_be_traced():
    @jax.jit
    def solve(rtol, atol):
        return fg.cg(max_steps=20, rtol=rtol, atol=atol)(lambda v: SYMMETRIC @ v, jnp.asarray(B))[1]

    loose, tight = solve(0.1, 0.0), solve(1e-10, 0.0)
    by_atol = solve(0.0, 0.2)
    assert int(loose.num_steps) < int(tight.num_steps)
    assert loose.residual <= 0.1 * np.linalg.norm(B)
    assert tight.residual <= 1e-10 * np.linalg.norm(B)
    assert 1e-10 < by_atol.residual <= 0.2


@pytest.mark.parametrize(
    "solver",
    [lineax.CG(1e-10, 1e-10), lineax.GMRES(1e-10, 1e-10), lineax.LU()],
    ids=["CG", "GMRES", "LU"],
)
def test_lineax_solvers_are_linear_solvers(solver):
    x, info = run(fg.from_lineax(solver), SYMMETRIC)
    assert_close(x, exact(SYMMETRIC), 1e-8)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(info.residual, residual(SYMMETRIC, x), rtol=1e-6, atol=1e-15)


def test_lineax_solver_that_gives_up_is_reported():
    x, info = run(fg.from_lineax(lineax.BiCGStab(1e-10, 1e-10, max_steps=1)), GENERAL)
    assert int(info.status) == Status.MAX_STEPS
    assert not bool(info.converged)
    np.testing.assert_allclose(info.residual, residual(GENERAL, x), rtol=1e-12)


LINEAX = {
    "CG": lineax.CG(1e-5, 1e-5),
    "GMRES": lineax.GMRES(1e-5, 1e-5),
    "BiCGStab": lineax.BiCGStab(1e-5, 1e-5),
    "LU": lineax.LU(),
    "QR": lineax.QR(),
    "SVD": lineax.SVD(),
    "Normal": lineax.Normal(lineax.CG(1e-5, 1e-5)),
}


def _spectra(least: float, count: int, size: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric I − M with the eigenvalue `least`, and b a third of which is its eigenvector."""
    rng = np.random.default_rng(size)
    bases = np.linalg.qr(rng.normal(size=(count, size, size)))[0]
    values = np.concatenate([np.full((count, 1), least), rng.uniform(0.3, 2, (count, size - 1))], 1)
    weights = rng.normal(size=(count, size))
    weights[:, 0] = np.linalg.norm(weights[:, 1:], axis=1) / 3
    a, b = (bases * values[:, None, :]) @ bases.swapaxes(1, 2), (bases @ weights[..., None])[..., 0]
    return a.astype(dtype), b.astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LINEAX)
def test_lineax_never_calls_a_system_without_solution_solved(name, dtype):
    solver = fg.from_lineax(LINEAX[name])
    batch = jax.jit(jax.vmap(lambda a, b: solver(lambda v: v - a @ v, b)))
    a, b = _spectra(0.0, 40, 5, dtype)
    a[20:, 1], b[20:, 1] = 0.0, 1.0  # The equation 0 = 1.
    assert not np.any(batch(a, b)[1].converged)
    assert not np.any(batch(0 * a, b)[1].converged)
    a, b = _spectra(0.3, 40, 5, dtype)
    x, info = batch(a, b)
    done = np.asarray(info.converged)
    assert dtype == np.float32 or np.all(done)
    want = np.linalg.solve(a, b[..., None])[..., 0]
    np.testing.assert_allclose(x[done], want[done], rtol=1e-2, atol=1e-2)
    x, info = batch(a, 0 * b)
    assert np.all(info.converged)
    np.testing.assert_array_equal(x, 0 * b)


@pytest.mark.parametrize("name", ["GMRES", "BiCGStab"])
def test_lineax_solver_that_leaves_all_of_b_has_solved_nothing(name):
    solver = fg.from_lineax(getattr(lineax, name)(1e-9, 1e3))
    x, info = solver(lambda v: 0.5 * v, jnp.asarray(B), jnp.asarray(3 * B))
    assert not bool(info.converged) or float(info.residual) < 0.99 * np.linalg.norm(B)
    np.testing.assert_allclose(info.residual, np.linalg.norm(B - 0.5 * x), rtol=1e-12, atol=1e-12)


HIDDEN = {
    # Of exact steps: each was finite, wrong, and called a success.
    "cg, not symmetric, in float32": (
        fg.cg(num_steps=2),
        np.array([[0.4, 0.15], [0.05, 0.1]], np.float32),
        np.ones(2, np.float32),
        Status.NOT_SYMMETRIC,
    ),
    "cg, skew-symmetric I - M": (
        fg.cg(num_steps=2),
        np.eye(3) - np.array([[0.0, -1.84, 1.63], [1.84, 0.0, -0.08], [-1.63, 0.08, 0.0]]),
        np.array([0.3, 0.7, 0.1]),
        Status.INDEFINITE,
    ),
    "bicgstab, a rotation": (
        fg.bicgstab(num_steps=10),
        np.eye(2) - np.array([[0.0, 1.0], [-1.0, 0.0]]),
        np.array([1.0, 0.0]),
        Status.MAX_STEPS,
    ),
    "lineax, least squares of no solution": (
        fg.from_lineax(lineax.SVD()),
        np.diag([1.0, 0.5, 0.25]),
        np.array([0.005, 1.0, 1.0]),
        Status.MAX_STEPS,
    ),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_breakdown_of_exact_steps_is_reported(case):
    solver, m, b, status = HIDDEN[case]
    _, info = solver(lambda v: m @ v, jnp.asarray(b))
    assert Status(int(info.status)) == status
    assert not info.converged


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 50])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_cg_accuses_no_symmetric_matrix(dtype, condition, size):
    basis, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))
    a = (basis * np.geomspace(1 / condition, 1, size)) @ basis.T
    m = jnp.asarray(np.eye(size) - (a + a.T) / 2, dtype)
    for num_steps in (3, 20):
        _, info = fg.cg(num_steps=num_steps)(lambda v: m @ v, jnp.ones(size, dtype))
        assert Status(int(info.status)) == Status.FIXED_STEPS


KRYLOV = [fg.cg, fg.gmres, fg.bicgstab, fg.normal_cg]


@pytest.mark.parametrize("make", [*KRYLOV, fg.fp])
def test_a_small_leaf_is_solved_beside_a_large_one(make):
    def matvec(v):
        return {"a": 0.5 * v["a"], "b": jnp.array([0.9, 0.2]) * v["b"]}

    b = {"a": jnp.array(1e6), "b": jnp.array([1e-3, 1e-3])}
    x, info = make(max_steps=500, rtol=1e-6)(matvec, b)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x["b"], [1e-2, 1.25e-3], rtol=1e-4)


@pytest.mark.parametrize("make", [fg.cg, fg.gmres, fg.bicgstab, fg.normal_cg])
def test_a_leaf_on_which_b_is_zero_costs_nothing_extra(make):
    def matvec(v):
        return {"a": 0.5 * v["a"] + 0.1 * v["b"], "b": 0.1 * v["a"] + 0.5 * v["b"]}

    b = {"a": jnp.ones(3), "b": jnp.zeros(3)}
    _, info = make(max_steps=9, rtol=1e-8)(matvec, b)
    assert bool(info.converged)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("make", KRYLOV)
def test_a_float32_floor_is_not_a_singular_matrix(make, warm):
    eigenvalues = jnp.linspace(1 / 1.4e4, 1.0, 30).astype(jnp.float32)
    b = jnp.asarray(np.random.default_rng(0).normal(size=30), jnp.float32)
    start = b / eigenvalues if warm else None
    x, info = make(max_steps=3000, rtol=1e-7)(lambda v: v - eigenvalues * v, b, start)
    assert bool(info.converged)
    np.testing.assert_allclose(x, b / eigenvalues, rtol=1e-2)


# Elimination.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_elimination_solves_what_lapack_solves(dtype):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(x, dtype) for x in (rng.normal(size=(7, 7)), rng.normal(size=(7, 2))))
    want, eps = np.linalg.inv(np.asarray(a, float)), float(jnp.finfo(dtype).eps)
    limit = 100 * eps * np.linalg.cond(np.asarray(a, float))
    factors, columns = elimination.factorised(a), np.asarray(b, float)
    assert_close(elimination.solved(elimination.eliminated(a, b)), want @ columns, limit)
    assert_close(factors.solve(b[:, 0]), want @ columns[:, 0], limit)
    size = np.linalg.norm(want.T @ columns[:, 0])
    np.testing.assert_allclose(factors.transposed_size(b[:, 0]), size, rtol=limit)


def test_elimination_interchanges_rows():
    a = jnp.array([[0.0, 1.0], [2.0, 0.0]])
    np.testing.assert_array_equal(
        elimination.factorised(a).solve(jnp.array([3.0, 4.0])), [2.0, 3.0]
    )


# Preconditioners and ridge.


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_preconditioned_cg_equals_that_of_scipy_step_by_step(steps):
    a = np.diag([1.0, 0.3, 0.1, 0.01]) + 0.005
    p = np.diag(1 / np.diag(a))
    if steps < 4:
        want, _ = scipy_linalg.cg(a, B, rtol=0, atol=0, maxiter=steps, M=p)
    else:
        want = np.linalg.solve(a, B)
    solver = fg.cg(num_steps=steps, preconditioner=lambda u: like(p, u) @ u)
    assert_close(run(solver, np.eye(4) - a)[0], want, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fp_with_the_identity_is_fp(steps):
    plain, same = fg.fp(num_steps=steps), fg.fp(num_steps=steps, preconditioner=lambda u: u)
    (x, info), (y, again) = run(plain, GENERAL), run(same, GENERAL)
    assert_close(y, x, 1e-13)
    np.testing.assert_allclose(again.residual, info.residual, rtol=1e-12)
    assert int(again.num_steps) == steps


def test_fp_with_a_preconditioner_that_leads_nowhere_ends():
    _, info = run(fg.fp(max_steps=500, rtol=1e-9, preconditioner=lambda u: 9.0 * u), GENERAL)
    assert not info.converged
    assert int(info.num_steps) < 5
    _, info = run(fg.fp(num_steps=3, preconditioner=lambda u: 0.0 * u), GENERAL)
    assert int(info.status) == fg.Status.NO_PROGRESS


@pytest.mark.parametrize("make", [fg.cg, fg.gmres, fg.bicgstab, fg.normal_cg, fg.fp])
def test_an_exact_preconditioner_is_a_solver_of_one_step(make):
    m = SYMMETRIC if make is fg.cg else GENERAL
    for preconditioner in (
        fg.inverse(),
        lambda u: like(np.linalg.inv(np.eye(D) - m), u) @ u,
    ):
        x, info = run(make(max_steps=20, rtol=1e-10, preconditioner=preconditioner), m)
        assert int(info.num_steps) == 1
        assert_close(x, exact(m), 1e-9)
        np.testing.assert_allclose(info.residual, residual(m, x), atol=1e-12)


def test_nystrom_of_full_rank_is_an_exact_one_and_of_a_low_rank_a_better_one():
    curvature = np.geomspace(1.0, 1e-4, 40) + 1e-4
    q = np.linalg.qr(matrix(44, 1.0, 40, 40))[0]
    m = np.eye(40) - q @ np.diag(curvature) @ q.T

    def steps(**options):
        return int(run(fg.cg(max_steps=300, rtol=1e-8, **options), m, np.ones(40))[1].num_steps)

    assert steps(preconditioner=fg.nystrom(rank=40)) <= 2
    assert steps(preconditioner=fg.nystrom(rank=99)) <= 2
    assert 3 * steps(preconditioner=fg.nystrom(rank=25)) < steps()


@pytest.mark.parametrize("rank", [3, 30, 60])
def test_nystrom_in_float32_is_positive_definite_whatever_rounding_does(rank):
    curvature = np.geomspace(1.0, 1e-4, 60)
    q = np.linalg.qr(matrix(45, 1.0, 60, 60))[0]
    m, b = np.eye(60) - q @ np.diag(curvature) @ q.T, np.ones(60)
    solver = fg.cg(max_steps=400, rtol=1e-3, preconditioner=fg.nystrom(rank=rank))
    x, info = run(solver, m.astype(np.float32), b.astype(np.float32))
    assert int(info.status) in (Status.CONVERGED, Status.AT_FLOOR)
    assert residual(m, x, b) <= 1e-2 * np.linalg.norm(b)


def test_nystrom_of_an_indefinite_matrix_does_no_harm():
    m = with_eigenvalues(-0.5, 0.3, 2.0, 0.1)
    x, _ = run(fg.gmres(max_steps=30, rtol=1e-9, preconditioner=fg.nystrom(rank=2)), m)
    assert_close(x, exact(m), 1e-7)


def test_cg_reports_a_preconditioner_that_is_not_positive_definite():
    solver = fg.cg(max_steps=9, rtol=1e-9, preconditioner=lambda u: -u)
    assert int(run(solver, SYMMETRIC)[1].status) == Status.INDEFINITE


@pytest.mark.parametrize("problem", ["affine non-symmetric", "complex non-holomorphic"])
@pytest.mark.parametrize("forward", [False, True], ids=["reverse", "forward"])
def test_a_preconditioner_for_j_is_transposed_where_the_system_is_that_of_its_transpose(
    problem, forward
):
    problem = PROBLEM[problem]
    w = problem.solution(problem.lam)
    jacobian = jax.linearize(lambda w: problem.phi(w, problem.lam), w)[1]
    unit = jnp.eye(w.size, dtype=w.dtype)
    directions = (unit, 1j * unit) if jnp.iscomplexobj(w) else (unit,)
    columns = [jax.vmap(lambda u: u - jacobian(u))(d) for d in directions]

    def real(z):  # Rows (Re z, Im z).
        return jnp.concatenate([z.real, z.imag], 1) if jnp.iscomplexobj(z) else z

    inverse = jnp.linalg.inv(jnp.concatenate([real(c) for c in columns]).T)

    def p(u):  # (I − J)⁻¹, linear over the reals.
        out = inverse @ real(u[None])[0]
        return out if not jnp.iscomplexobj(u) else jax.lax.complex(*jnp.split(out, 2))

    seen = []

    def watched(matvec, b, x0=None):
        x, info = one_step(matvec, b, x0)
        jax.debug.callback(lambda n: seen.append(int(n)), info.num_steps)
        return x, info

    one_step = fg.gmres(max_steps=9, rtol=1e-9, preconditioner=p)
    estimator = fg.aid(watched)
    solve = fg.fixed_point(problem.phi, fg.forward(estimator) if forward else estimator)(
        lambda w0, lam: w
    )

    def f(lam):
        return problem.outer(solve(problem.w0, lam), lam)

    assert_close(jax.grad(f)(problem.lam), problem.gradient(), 1e-7)
    if forward:
        jax.jvp(f, (problem.lam,), (problem.lam,))
    jax.effects_barrier()
    assert seen
    assert set(seen) == {1}


def watched_inverse():
    """`inverse()`, and a list that grows when a program makes one."""
    built, made = [], fg.inverse()

    def build(product, like, space):
        jax.debug.callback(lambda: built.append(1))
        return made.build(product, like, space)

    return made._replace(build=build), built


def newton_with(preconditioner, phi):
    linear_solver = fg.gmres(max_steps=20, preconditioner=preconditioner)
    return fg.newton(phi, max_steps=30, rtol=1e-10, linear_solver=linear_solver)


def test_newton_makes_its_preconditioner_once():
    problem = PROBLEM["nonlinear"]
    watched, built = watched_inverse()
    w, info = newton_with(watched, problem.phi).with_info(problem.w0, problem.lam)
    jax.effects_barrier()
    assert len(built) == 1
    assert int(info.num_steps) > 1
    assert_close(w, problem.solution(problem.lam), 1e-8)


@pytest.mark.parametrize("rule", [lambda e: e, fg.forward], ids=["reverse", "forward"])
def test_what_newton_and_the_derivative_both_name_is_made_once(rule):
    problem = PROBLEM["nonlinear"]
    watched, built = watched_inverse()

    def gradient(preconditioner, lam, rtol=1e-10):
        linear_solver = fg.gmres(max_steps=20, rtol=rtol, preconditioner=preconditioner)
        estimator = rule(fg.aid(linear_solver))
        solve = fg.fixed_point(problem.phi, estimator)(newton_with(watched, problem.phi))
        return jax.grad(lambda lam: problem.outer(solve(problem.w0, lam), lam))(lam)

    def makes(function, *args):
        built.clear()
        out = jax.block_until_ready(function(*args))
        jax.effects_barrier()
        return out, len(built)

    exact = problem.gradient(problem.lam)
    grad, count = makes(gradient, watched, problem.lam)
    assert count == 1
    assert_close(grad, exact, 1e-8)
    grad, count = makes(gradient, watched_inverse()[0], problem.lam)  # Equal, but not the same.
    assert count == 1
    assert_close(grad, exact, 1e-8)
    # Where the estimator closes over a tracer, under `jit`; each element of a batch its own.
    grad, count = makes(jax.jit(lambda lam, rtol: gradient(watched, lam, rtol)), problem.lam, 1e-10)
    assert count == 1
    assert_close(grad, exact, 1e-8)
    lams = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), problem.lam)
    grads = jax.vmap(lambda lam: gradient(watched, lam))(lams)
    for i in range(2):
        lam = jax.tree.map(lambda x: x[i], lams)  # noqa: B023
        assert_close(jax.tree.map(lambda x: x[i], grads), problem.gradient(lam), 1e-8)  # noqa: B023
    # The preconditioner is constant: what it is made of is not differentiated.
    second = jax.jacfwd if rule is fg.forward else jax.jacrev
    hessian = second(lambda lam: gradient(watched, lam))(problem.lam)
    assert_close(hessian, jax.jacfwd(problem.gradient)(problem.lam), 1e-7)


@pytest.mark.parametrize("rule", [lambda e: e, fg.forward], ids=["reverse", "forward"])
def test_a_preconditioner_that_did_not_serve_newton_is_made_anew_for_the_derivative(rule):
    # ∇²ℓ at w₀ = 0.1 is indefinite: CG can do nothing with its inverse, where ∇²ℓ is definite.
    def loss(w, lam):
        return jnp.sum(0.25 * w**4 - 0.5 * lam * jnp.array([1.0, -1.0]) * w**2 - 0.1 * w)

    phi = fg.gradient_descent(loss, step_size=0.1)
    watched, built = watched_inverse()
    cg = fg.cg(max_steps=20, rtol=1e-10, preconditioner=watched)
    newton = fg.newton(phi, max_steps=60, rtol=1e-10, linear_solver=cg)
    solve = fg.fixed_point(phi, rule(fg.aid(cg)))(newton)
    w0 = jnp.full(2, 0.1)
    w, slope = solve(w0, 1.0), jax.grad(lambda lam: jnp.sum(solve(w0, lam)))(1.0)
    jax.effects_barrier()
    curvature = 3 * w**2 - jnp.array([1.0, -1.0])
    assert bool(jnp.all(curvature > 0))
    assert_close(slope, jnp.sum(jnp.array([1.0, -1.0]) * w / curvature), 1e-8)
    assert len(built) == 3  # One in the call, two where there is a derivative.


@pytest.mark.parametrize("make", [fg.cg, fg.gmres, fg.bicgstab, fg.normal_cg])
def test_a_ridge_solves_the_regularised_system_and_says_so(make):
    m = SYMMETRIC if make is fg.cg else GENERAL
    x, info = run(make(max_steps=30, rtol=1e-10, ridge=0.3), m)
    assert_close(x, np.linalg.solve(1.3 * np.eye(D) - m, B), 1e-9)
    assert bool(info.converged)
    # Of a singular one too; traced.
    solve = jax.jit(lambda ridge: make(max_steps=30, rtol=1e-9, ridge=ridge)(lambda u: u, B))
    assert_close(solve(0.5)[0], B / 0.5, 1e-8)
