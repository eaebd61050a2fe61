"""Every estimator on every problem, and the identities between estimators."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg
from problems import (
    ESTIMATOR,
    ESTIMATORS,
    PROBLEM,
    PROBLEMS,
    EstimatorRow,
    Problem,
    assert_close,
    like,
    matrix,
    named,
    outer,
    single,
    solver_of,
)


def applies(row: EstimatorRow, problem: Problem) -> bool:
    return problem.symmetric or not row.symmetric_only


def one_each(symmetric: Problem, general: Problem, which=ESTIMATORS) -> list:
    """Every estimator with the second problem, or the first where it needs symmetry."""
    return [
        pytest.param(symmetric if row.symmetric_only else general, row, id=named(row))
        for row in which
    ]


def rows(*names: str) -> list:
    return [pytest.param(ESTIMATOR[name], id=named(ESTIMATOR[name])) for name in names]


def objective(problem: Problem, estimator: fg.Estimator, solver=None):
    solve = fg.fixed_point(problem.phi, estimator)(solver or solver_of(problem))
    return lambda lam, w0=problem.w0: problem.outer(solve(w0, lam), lam)


def tolerance(problem: Problem, row: EstimatorRow) -> float:
    return row.accuracy + 2**10 * problem.eps


def times(problem: Problem, factor: float):
    """λ, a little moved."""
    return jax.tree.map(lambda x: x * like(factor, x), problem.lam)


EVERYWHERE = [row for row in ESTIMATORS if row.everywhere]
FURTHER = [row for row in ESTIMATORS if not row.everywhere]
WITH_TOLERANCE = [row for row in FURTHER if "rtol" in row.name]


@pytest.mark.slow(but=("*-pytree", "*rtol", "forward-*", "itd-*"))
@pytest.mark.parametrize(
    ("problem", "row"),
    [
        pytest.param(problem, row, id=f"{named(row)}-{named(problem)}")
        for row in EVERYWHERE
        for problem in PROBLEMS
        if applies(row, problem)
    ]
    + one_each(PROBLEM["ridge"], PROBLEM["affine non-symmetric"], FURTHER),
)
def test_gradient_equals_that_of_the_closed_form(problem, row):
    gradient = jax.jit(jax.grad(objective(problem, row.estimator)))(problem.lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, problem.lam)
    assert_close(gradient, problem.gradient(), tolerance(problem, row))


@pytest.mark.slow(but=("itd*", "*rtol"))
@pytest.mark.parametrize(
    ("problem", "row"),
    one_each(single(PROBLEM["ridge"]), single(PROBLEM["nonlinear"]), EVERYWHERE + WITH_TOLERANCE)
    + one_each(
        single(PROBLEM["complex Hermitian"]), single(PROBLEM["complex non-holomorphic"]), EVERYWHERE
    ),
)
def test_single_precision_gradient_equals_that_of_the_closed_form_and_stays_single(problem, row):
    gradient = jax.jit(jax.grad(objective(problem, row.estimator)))(problem.lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, problem.lam)
    assert_close(gradient, problem.gradient(), tolerance(problem, row))


@pytest.mark.slow(but=("itd", "aid-cg-rtol"))
@pytest.mark.parametrize(
    ("problem", "row"),
    one_each(PROBLEM["ridge"], PROBLEM["nonlinear"], EVERYWHERE + WITH_TOLERANCE),
)
def test_vmap_of_the_gradient_equals_the_gradients_one_by_one(problem, row):
    lams = [times(problem, factor) for factor in (1.0, 0.9, 1.1)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *lams)
    gradients = jax.jit(jax.vmap(jax.grad(objective(problem, row.estimator))))(batch)
    for i, lam in enumerate(lams):
        one = jax.tree.map(lambda x, i=i: x[i], gradients)
        assert_close(one, problem.gradient(lam), tolerance(problem, row))


@pytest.mark.slow(but=("itd", "aid-cg-*"))
@pytest.mark.parametrize(
    ("problem", "row"), one_each(PROBLEM["ridge"], PROBLEM["nonlinear"], EVERYWHERE)
)
def test_gradient_without_an_outer_jit_equals_that_of_the_closed_form(problem, row):
    value, gradient = jax.value_and_grad(objective(problem, row.estimator))(problem.lam)
    want = problem.outer(problem.solution(problem.lam), problem.lam)
    assert_close(value, want, 2**6 * problem.eps)
    assert_close(gradient, problem.gradient(), tolerance(problem, row))


FORWARD = [
    row for row in ESTIMATORS if isinstance(row.estimator, fg.Unrolled) or row.estimator.every_mode
]
FORWARD_PROBLEMS = ("pytree", "complex non-holomorphic")


@pytest.mark.slow(but=("*-pytree",))
@pytest.mark.parametrize(
    ("problem", "row"),
    [
        pytest.param(PROBLEM[name], row, id=f"{named(row)}-{name}")
        for row in FORWARD
        for name in FORWARD_PROBLEMS
        if applies(row, PROBLEM[name])
    ],
)
def test_jvp_equals_that_of_the_closed_form(problem, row):
    solve = fg.fixed_point(problem.phi, row.estimator)(solver_of(problem))
    directions = jax.tree.map(
        lambda x: like(np.sin(1.0 + np.arange(x.size)).reshape(x.shape), x), problem.lam
    )
    got = jax.jit(lambda lam, u: jax.jvp(lambda lam: solve(problem.w0, lam), (lam,), (u,)))
    want = jax.jvp(problem.solution, (problem.lam,), (directions,))
    w, w_dot = got(problem.lam, directions)
    chex.assert_trees_all_equal_shapes_and_dtypes(w_dot, problem.w0)
    assert_close((w, w_dot), want, tolerance(problem, row))


@pytest.mark.slow
@pytest.mark.parametrize("row", rows("itd", "forward truncated_itd", "forward aid dense"))
def test_jacfwd_jacrev_and_linearize_agree_with_the_closed_form(row):
    problem = PROBLEM["nonlinear"]
    decorated = fg.fixed_point(problem.phi, row.estimator)(solver_of(problem))

    def solve(lam: jax.Array) -> jax.Array:
        return decorated(problem.w0, lam)

    want = jax.jacobian(problem.solution)(problem.lam)
    assert_close(jax.jacfwd(solve)(problem.lam), want, tolerance(problem, row))
    assert_close(jax.jacrev(solve)(problem.lam), want, tolerance(problem, row))
    _, product = jax.linearize(solve, problem.lam)
    assert_close(product(jnp.ones(2)), want @ jnp.ones(2), tolerance(problem, row))


SECOND = (
    "itd",
    "truncated_itd",
    "aid fp num_steps",
    "aid cg rtol",
    "aid normal_cg num_steps",
    "aid gmres num_steps",
    "aid dense",
    "forward aid dense",
)


@pytest.mark.slow(but=("itd", "aid-fp-*", "forward-aid-dense"))
@pytest.mark.parametrize("row", rows(*SECOND))
def test_hessian_equals_that_of_the_closed_form(row):
    problem = PROBLEM["ridge"] if row.symmetric_only else PROBLEM["nonlinear"]
    got = jax.jit(jax.hessian(objective(problem, row.estimator)))(problem.lam)
    want = jax.hessian(lambda lam: problem.outer(problem.solution(lam), lam))(problem.lam)
    assert_close(got, want, 4 * tolerance(problem, row))


@pytest.mark.parametrize("row", rows("aid dense", "forward aid dense", "truncated_itd"))
def test_gradient_of_the_gradient_equals_that_of_the_closed_form(row):
    problem = PROBLEM["square root"]
    u = jnp.array([1.0, -2.0, 0.5])

    def squared(gradient):
        return lambda lam: jnp.vdot(u, gradient(lam)) ** 2

    got = jax.jit(jax.grad(squared(jax.grad(objective(problem, row.estimator)))))(problem.lam)
    closed = jax.grad(lambda lam: problem.outer(problem.solution(lam), lam))
    assert_close(got, jax.grad(squared(closed))(problem.lam), tolerance(problem, row))


# Identities. They hold for estimates that are far from the true gradient, to rounding.

A, B = matrix(10, 0.8, 4, 4), matrix(11, 1.0, 4, 3)
AFFINE = Problem(
    "affine",
    lambda w, lam: like(A, w) @ w + like(B, w) @ lam,
    lambda lam: jnp.linalg.solve(like(np.eye(4) - A, lam), like(B, lam) @ lam),
    jnp.array([1.0, -0.5, 2.0]),
    jnp.ones(4),
    0.8,
    False,
    True,
    outer,
)


def gradient_after(problem: Problem, num_steps: int, estimator: fg.Estimator):
    solver = fg.picard(problem.phi, num_steps=num_steps)
    return jax.jit(jax.grad(objective(problem, estimator, solver)))(problem.lam)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("problem", [AFFINE, PROBLEM["complex non-holomorphic"]], ids=named)
def test_itd_equals_fp_with_as_many_steps_on_an_affine_map(problem, num_steps):
    unrolled = gradient_after(problem, num_steps, fg.itd())
    implicit = gradient_after(problem, num_steps, fg.aid(fg.fp(num_steps=num_steps)))
    assert_close(implicit, unrolled, 1e-12)
    far = optax.tree.norm(optax.tree.sub(unrolled, problem.gradient()))
    assert far > 1e-9  # An estimate, not yet the gradient.


@pytest.mark.parametrize("num_steps", [1, 5])
def test_truncated_itd_equals_fp_at_the_same_iterate_of_an_affine_map(num_steps):
    truncated = gradient_after(AFFINE, 6, fg.truncated_itd(num_steps=num_steps))
    implicit = gradient_after(AFFINE, 6 + num_steps, fg.aid(fg.fp(num_steps=num_steps)))
    assert_close(truncated, implicit, 1e-12)


@pytest.mark.parametrize("name", ["nonlinear", "ridge", "complex holomorphic"])
def test_at_the_fixed_point_itd_truncated_itd_and_fp_agree_on_any_map(name):
    problem = PROBLEM[name]
    problem = problem._replace(w0=problem.solution(problem.lam))
    unrolled = gradient_after(problem, 3, fg.itd())
    assert_close(gradient_after(problem, 3, fg.aid(fg.fp(num_steps=3))), unrolled, 1e-12)
    assert_close(gradient_after(problem, 3, fg.truncated_itd(num_steps=3)), unrolled, 1e-12)


def test_one_step_differentiation_is_one_product_with_the_derivative_in_lam():
    problem = PROBLEM["nonlinear"]
    w = problem.w0
    for _ in range(4):
        w = problem.phi(w, problem.lam)
    following, vjp = jax.vjp(lambda lam: problem.phi(w, lam), problem.lam)
    w_bar, direct = jax.grad(problem.outer, argnums=(0, 1))(following, problem.lam)
    got = gradient_after(problem, 4, fg.truncated_itd(num_steps=1))
    assert_close(got, direct + vjp(w_bar)[0], 1e-12)


def test_one_step_differentiation_equals_fp_with_one_step_at_the_fixed_point():
    problem = PROBLEM["nonlinear"]
    problem = problem._replace(w0=problem.solution(problem.lam))
    one_step = gradient_after(problem, 1, fg.truncated_itd(num_steps=1))
    assert_close(one_step, gradient_after(problem, 1, fg.aid(fg.fp(num_steps=1))), 1e-12)


COARSE = (
    fg.truncated_itd(num_steps=3),
    fg.aid(fg.fp(num_steps=3)),
    fg.aid(fg.normal_cg(num_steps=2)),
    fg.aid(fg.gmres(num_steps=2)),
    fg.aid(fg.bicgstab(num_steps=1)),
)
COARSE_IDS = ("truncated_itd", "fp", "normal_cg", "gmres", "bicgstab")


@pytest.mark.parametrize("estimator", COARSE, ids=COARSE_IDS)
def test_forward_gives_the_same_reverse_mode_estimate(estimator):
    problem = PROBLEM["nonlinear"]
    reverse = gradient_after(problem, 5, estimator)
    assert_close(gradient_after(problem, 5, fg.forward(estimator)), reverse, 1e-12)


@pytest.mark.parametrize(
    "estimator", [fg.itd(), *COARSE[:2], fg.aid(fg.dense())], ids=["itd", *COARSE_IDS[:2], "dense"]
)
def test_forward_mode_is_the_transpose_of_reverse_mode(estimator):
    problem = PROBLEM["nonlinear"]
    solver = fg.picard(problem.phi, num_steps=3)
    solve = fg.fixed_point(problem.phi, fg.forward(estimator))(solver)
    u, w_bar = jnp.array([0.3, -2.0]), jnp.array([1.0, 2.0, -0.5])
    w, w_dot = jax.jvp(lambda lam: solve(problem.w0, lam), (problem.lam,), (u,))
    same, vjp = jax.vjp(lambda lam: solve(problem.w0, lam), problem.lam)
    assert_close(w, same, 1e-15)
    np.testing.assert_allclose(jnp.vdot(w_bar, w_dot), jnp.vdot(vjp(w_bar)[0], u), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dimension"),
    [("affine symmetric", 4), ("ridge", 4), ("pytree", 8), ("complex Hermitian", 3)],
)
def test_cg_is_exact_after_as_many_steps_as_dimensions(name, dimension):
    problem = PROBLEM[name]
    exact, short = (
        gradient_after(problem, problem.num_steps, fg.aid(fg.cg(num_steps=k)))
        for k in (dimension, dimension - 1)
    )
    assert_close(exact, problem.gradient(), 1e-12)
    assert optax.tree.norm(optax.tree.sub(short, problem.gradient())) > 1e-9


def test_error_of_fp_shrinks_by_the_contraction_constant_with_every_step():
    problem = PROBLEM["affine symmetric"]
    want, v_norm = problem.gradient(), None
    solve = solver_of(problem)
    w = solve(problem.w0, problem.lam)
    b = jax.grad(problem.outer)(w, problem.lam)
    _, vjp = jax.vjp(problem.phi, w, problem.lam)
    v, _ = fg.dense()(lambda u: vjp(u)[0], b)
    b_norm = jnp.linalg.norm(jax.jacobian(lambda lam: problem.phi(w, lam))(problem.lam), 2)
    v_norm = jnp.linalg.norm(v)
    for k in (1, 2, 5, 12):
        got = gradient_after(problem, problem.num_steps, fg.aid(fg.fp(num_steps=k)))
        error = jnp.linalg.norm(got - want)
        assert 1e-3 * problem.q**k * v_norm < error < b_norm * problem.q**k * v_norm


def test_heavy_ball_solver_gives_the_gradient_of_a_gradient_descent_solver_at_the_same_w():
    x, y = matrix(4, 1.0, 6, 4), np.cos(np.arange(6.0))

    def loss(w, lam):
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    lam = jnp.array([-1.0, 0.0, -0.5, 0.3])
    phi = fg.gradient_descent(loss, step_size=0.5)
    momentum = fg.heavy_ball(loss, step_size=0.6, momentum=0.2)
    estimator = fg.aid(fg.cg(num_steps=2))

    @fg.fixed_point(phi, estimator)
    def by_heavy_ball(w0, lam):
        return fg.picard(momentum, num_steps=5)(fg.Momentum(w0, w0), lam).w

    @fg.fixed_point(phi, estimator)
    def given(w0, lam):
        del lam
        return w0

    w = by_heavy_ball(jnp.zeros(4), lam)
    assert_close(
        jax.grad(lambda lam: outer(by_heavy_ball(jnp.zeros(4), lam), lam))(lam),
        jax.grad(lambda lam: outer(given(w, lam), lam))(lam),
        1e-13,
    )


def test_converged_heavy_ball_and_gradient_descent_solvers_give_the_same_gradient():
    problem = PROBLEM["ridge"]
    x, y = matrix(4, 1.0, 6, 4), np.cos(np.arange(6.0))

    def loss(w, lam):
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    momentum = fg.heavy_ball(loss, step_size=0.6, momentum=0.2)

    def by_heavy_ball(w0, lam):
        return fg.picard(momentum, num_steps=120)(fg.Momentum(w0, w0), lam).w

    estimator = fg.aid(fg.cg(num_steps=4))
    by_momentum = jax.grad(objective(problem, estimator, by_heavy_ball))(problem.lam)
    by_descent = jax.grad(objective(problem, estimator))(problem.lam)
    assert_close(by_momentum, by_descent, 1e-12)


@pytest.mark.parametrize("row", rows("truncated_itd", "aid fp num_steps", "forward aid dense"))
def test_gradient_in_the_starting_point_is_exactly_zero(row):
    problem = PROBLEM["pytree"]
    solver = fg.picard(problem.phi, num_steps=2)  # Far from converged, so that w does depend on w0.
    gradient = jax.grad(objective(problem, row.estimator, solver), argnums=1)(
        problem.lam, problem.w0
    )
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, problem.w0))


def test_gradient_of_itd_in_the_starting_point_is_that_of_the_iterations():
    solver = fg.picard(AFFINE.phi, num_steps=3)
    gradient = jax.grad(objective(AFFINE, fg.itd(), solver), argnums=1)(AFFINE.lam, AFFINE.w0)
    w = solver(AFFINE.w0, AFFINE.lam)
    want = np.linalg.matrix_power(A.T, 3) @ jax.grad(AFFINE.outer)(w, AFFINE.lam)
    assert_close(gradient, want, 1e-13)


def test_forward_mode_itd_goes_through_a_while_loop():
    problem = PROBLEM["square root"]

    def solver(w0, lam):
        def unfinished(w):
            return jnp.any(jnp.abs(problem.phi(w, lam) - w) > 1e-15)

        return jax.lax.while_loop(unfinished, lambda w: problem.phi(w, lam), w0)

    solve = fg.fixed_point(problem.phi, fg.itd())(solver)
    got = jax.jacfwd(lambda lam: solve(problem.w0, lam))(problem.lam)
    assert_close(got, jnp.diag(0.5 / jnp.sqrt(problem.lam)), 1e-6)  # The tangents lag behind w.


def test_forward_leaves_itd_as_it_is():
    estimator = fg.itd()
    assert fg.forward(estimator) is estimator


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine symmetric", "ridge"])
def test_error_of_aid_shrinks_with_the_error_of_the_lower_level(name):
    problem = PROBLEM[name]
    want = problem.gradient()

    def error(num_steps: int) -> float:
        got = gradient_after(problem, num_steps, fg.aid(fg.dense()))
        return float(jnp.linalg.norm(got - want))

    # The error is of order qᵗ: eight steps more gain q⁸ up to the initial transient.
    assert error(16) < 3 * problem.q**8 * error(8)
    assert error(16) > 1e-12
