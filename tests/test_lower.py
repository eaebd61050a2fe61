"""Lower-level solvers: stopping, verdicts, acceleration, and adapters for code that is not ours."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

import fixedgrad as fg
from fixedgrad import Status
from fixedgrad.linear.tunable import loosened
from problems import LOWER_SOLVERS, PROBLEM, PROBLEMS, assert_close, like, matrix, named, single

EPS = float(jnp.finfo(jnp.float64).eps)
ROOT = PROBLEM["square root"]
A = matrix(50, 0.7, 4, 4)
LAM = jnp.array([1.0, -2.0, 0.5, 3.0])


def affine(w, lam):
    return like(A, w) @ w + lam


FIXED = np.linalg.solve(np.eye(4) - A, LAM)


# One row of each method; its other settings are for accuracy.
EVERY_SOLVER = pytest.mark.parametrize(
    "make",
    [row.make for row in LOWER_SOLVERS if " " not in row.name],
    ids=[row.name for row in LOWER_SOLVERS if " " not in row.name],
)


def distance(phi, w, *args) -> float:
    return float(optax.tree.norm(optax.tree.sub(phi(w, *args), w)))


# Picard.


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_picard_takes_exactly_the_steps_it_is_told(num_steps):
    w = jnp.ones(4)
    for _ in range(num_steps):
        w = affine(w, LAM)
    got, info = fg.picard(affine, num_steps=num_steps).with_info(jnp.ones(4), LAM)
    assert_close(got, w, 4 * EPS)
    assert (int(info.num_steps), int(info.status)) == (num_steps, Status.FIXED_STEPS)
    assert bool(info.converged)
    np.testing.assert_allclose(info.residual, distance(affine, w, LAM), rtol=1e-12)


def test_picard_converges_at_the_rate_of_the_contraction():
    errors = [
        np.linalg.norm(fg.picard(affine, num_steps=t)(jnp.zeros(4), LAM) - FIXED)
        for t in (1, 5, 10)
    ]
    for t, error in zip((1, 5, 10), errors, strict=True):
        assert 1e-9 < error <= 0.7**t * np.linalg.norm(FIXED)


@pytest.mark.slow(but=("pytree", "complex-non-holomorphic"))
@pytest.mark.parametrize("problem", PROBLEMS, ids=named)
def test_picard_with_a_tolerance_reaches_it_on_every_problem(problem):
    for case in (problem, single(problem)):
        solver = fg.picard(case.phi, max_steps=500, rtol=1e-5)
        w, info = jax.jit(solver.with_info)(case.w0, case.lam)
        chex.assert_trees_all_equal_shapes_and_dtypes(w, case.w0)
        assert int(info.status) == Status.CONVERGED
        assert 0 < int(info.num_steps) < 60
        want = case.solution(case.lam)
        size = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(want)]))
        assert info.residual <= 1e-5 * size * (1 + 1e-3)
        assert_close(w, want, 1e-4)


def test_picard_stops_at_the_first_iterate_that_meets_the_tolerance():
    solver = fg.picard(affine, max_steps=100, atol=1e-3)
    w, info = solver.with_info(jnp.zeros(4), LAM)
    np.testing.assert_allclose(info.residual, distance(affine, w, LAM), rtol=1e-9)
    iterates = [np.zeros(4)]
    while np.linalg.norm(affine(iterates[-1], LAM) - iterates[-1]) > 1e-3:
        iterates.append(np.asarray(affine(iterates[-1], LAM)))
    assert int(info.num_steps) == len(iterates) - 1
    assert_close(w, iterates[-1], 1e-12)


@EVERY_SOLVER
def test_start_at_the_fixed_point_needs_no_steps_to_speak_of(make):
    w, info = make(affine, max_steps=100, rtol=1e-8).with_info(jnp.asarray(FIXED), LAM)
    assert int(info.num_steps) <= 1
    assert_close(w, FIXED, 8 * EPS)


@EVERY_SOLVER
@pytest.mark.parametrize(
    ("slope", "settings", "status"),
    [
        (0.5, {"max_steps": 200, "rtol": 1e-6}, Status.CONVERGED),
        (0.5, {"max_steps": 200, "atol": 1e-6}, Status.CONVERGED),
        (0.5, {"max_steps": 200}, Status.AT_FLOOR),
        (0.5, {"max_steps": 200, "rtol": 1e-30, "atol": 1e-300}, Status.AT_FLOOR),
        (0.9, {"max_steps": 2, "rtol": 1e-12}, Status.MAX_STEPS),
    ],
    ids=["rtol", "atol", "no tolerance", "below resolution", "too few"],
)
def test_verdict_of_solvers(make, slope, settings, status):
    # Not quite affine, so that Anderson does not solve it at once.
    def phi(w, lam):
        return slope * w + 0.001 * w**3 + lam

    w, info = make(phi, **settings).with_info(jnp.asarray(1.0), jnp.asarray(0.01))
    # On some processors rounding leaves no residual at all, which meets any tolerance.
    exact = status == Status.AT_FLOOR and info.residual == 0
    assert Status(int(info.status)) == (Status.CONVERGED if exact else status)
    assert bool(info.converged) == (status <= Status.AT_FLOOR)
    if status in (Status.CONVERGED, Status.AT_FLOOR):
        assert abs(float(phi(w, 0.01) - w)) < 1e-6
        assert int(info.num_steps) < 200


def test_picard_that_overflows_in_a_fixed_number_of_steps_is_reported():
    _, info = fg.picard(lambda w: 1.5 * w + 1.0, num_steps=5000).with_info(jnp.asarray(1.0))
    assert int(info.status) == Status.NON_FINITE
    assert not bool(info.converged)


def test_picard_on_an_expansion_says_diverged():
    solver = fg.picard(lambda w: 1.5 * w + 1.0, max_steps=30, rtol=1e-6)
    _, info = solver.with_info(jnp.asarray(1.0))
    assert int(info.status) == Status.DIVERGED
    assert int(info.num_steps) == 30


@EVERY_SOLVER
def test_nan_in_the_map_ends_the_loop_at_once(make):
    solver = make(lambda w: jnp.where(w > 1.0, jnp.nan, w + 1.0), max_steps=100, rtol=1e-6)
    _, info = solver.with_info(jnp.asarray(0.5))
    assert int(info.status) == Status.NON_FINITE
    assert int(info.num_steps) < 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_low_precision_iterates_stay_low_and_end_near_the_fixed_point(dtype):
    def phi(w, lam):
        return jnp.asarray(0.75, dtype) * w + lam

    lam = jnp.array([1.0, -0.3], dtype)
    w, info = fg.picard(phi, max_steps=300, rtol=1e-9).with_info(jnp.zeros(2, dtype), lam)
    assert w.dtype == dtype
    assert info.residual.dtype == jnp.float32
    assert int(info.status) in (Status.AT_FLOOR, Status.CONVERGED)
    # The floor in w is that of the residual over 1 − q: a few percent in bfloat16.
    assert_close(w.astype(float), 4 * lam.astype(float), 32 * float(jnp.finfo(dtype).eps))


def test_batch_runs_until_its_slowest_element_and_reports_each():
    solver = fg.picard(lambda w, q: q * w + 1.0, max_steps=60, rtol=1e-10)
    q = jnp.array([0.2, 0.99, 0.5])
    w, info = jax.jit(jax.vmap(solver.with_info, in_axes=(None, 0)))(jnp.asarray(0.0), q)
    np.testing.assert_array_equal(info.converged, [True, False, True])
    assert list(info.num_steps)[1] == 60
    assert int(info.num_steps[0]) < int(info.num_steps[2]) < 60
    np.testing.assert_allclose(w[::2], 1 / (1 - q[::2]), rtol=1e-9)


@EVERY_SOLVER
def test_a_map_that_is_a_vmap_is_solved_as_one_system(make):
    # `vmap` leaves NumPy's integers as the axes of sums in Φ: no names of mapped axes.
    problem = PROBLEM["ridge"]
    solver = make(jax.vmap(problem.phi), max_steps=100, rtol=1e-9)
    lams = jnp.stack([problem.lam, 0.5 * problem.lam])
    w, info = solver.with_info(jnp.zeros((2, 4)), lams)
    assert bool(info.converged)
    assert_close(w, jax.vmap(problem.solution)(lams), 1e-7)


def test_integer_leaves_ride_through_a_solver():
    def phi(w, lam):
        return {"w": 0.5 * w["w"] + lam, "n": w["n"]}

    w, info = fg.picard(phi, max_steps=100, rtol=1e-9).with_info({"w": 0.0, "n": 3}, 1.0)
    assert int(w["n"]) == 3
    np.testing.assert_allclose(w["w"], 2.0, rtol=1e-8)
    assert bool(info.converged)


def test_tolerances_may_be_traced():
    @jax.jit
    def steps(rtol):
        return fg.picard(affine, max_steps=200, rtol=rtol).with_info(jnp.zeros(4), LAM)[1].num_steps

    assert 0 < int(steps(1e-2)) < int(steps(1e-6)) < 200


# Every solver on every problem.


@pytest.mark.slow(but=("*pytree-*", "nonlinear-newton", "complex-non-holomorphic-broyden"))
@pytest.mark.parametrize("row", LOWER_SOLVERS, ids=named)
@pytest.mark.parametrize("problem", PROBLEMS, ids=named)
def test_every_solver_finds_the_fixed_point_of_every_problem(problem, row):
    for at, rtol in ((problem, 1e-6), (single(problem), 1e-4)):
        solver = row.make(at.phi, max_steps=100, rtol=rtol)
        w, info = jax.jit(solver.with_info)(at.w0, at.lam)
        chex.assert_trees_all_equal_shapes_and_dtypes(w, at.w0)
        assert bool(info.converged)
        assert int(info.num_steps) <= row.steps
        assert_close(w, at.solution(at.lam), 10 * rtol)


@pytest.mark.slow(but=("newton", "broyden"))
@pytest.mark.parametrize("row", LOWER_SOLVERS, ids=named)
def test_every_solver_has_every_derivative_under_the_decorator(row):
    problem = PROBLEM["nonlinear"]
    solver = row.make(problem.phi, max_steps=100, rtol=1e-12)
    solve = fg.fixed_point(problem.phi, fg.forward(fg.aid(fg.dense())))(solver)

    def f(lam, w0=problem.w0):
        return problem.outer(solve(w0, lam), lam)

    assert_close(jax.grad(f)(problem.lam), problem.gradient(), 1e-9)
    batch = jnp.stack([problem.lam, 0.5 * problem.lam])
    want = jnp.stack([problem.gradient(lam) for lam in batch])
    assert_close(jax.jit(jax.vmap(jax.grad(f)))(batch), want, 1e-9)
    exact = jax.jacfwd(jax.grad(lambda lam: problem.outer(problem.solution(lam), lam)))
    assert_close(jax.hessian(f)(problem.lam), exact(problem.lam), 1e-8)
    unrolled = fg.fixed_point(problem.phi, fg.itd())(solver)
    through = jax.grad(lambda lam: problem.outer(unrolled(problem.w0, lam), lam))
    if row.name == "picard recursive":
        assert_close(through(problem.lam), problem.gradient(), 1e-6)
        return
    with pytest.raises(TypeError, match="with `max_steps` ends by the residual of w"):
        through(problem.lam)


# Anderson.

SLOW = matrix(51, 1.0, 8, 8, symmetric=True)
SLOW = np.linalg.eigh(SLOW)[1] @ np.diag(np.linspace(-0.5, 0.98, 8)) @ np.linalg.eigh(SLOW)[1].T
SLOW_LAM = jnp.cos(jnp.arange(8.0))


def slow(w, lam):
    return like(SLOW, w) @ w + lam


SLOW_FIXED = np.linalg.solve(np.eye(8) - SLOW, SLOW_LAM)


def test_anderson_needs_a_fraction_of_the_steps_of_picard_on_a_slow_map():
    _, plain = fg.picard(slow, max_steps=2000, rtol=1e-8).with_info(jnp.zeros(8), SLOW_LAM)
    w, mixed = fg.anderson(slow, max_steps=2000, rtol=1e-8).with_info(jnp.zeros(8), SLOW_LAM)
    assert bool(plain.converged)
    assert bool(mixed.converged)
    assert int(mixed.num_steps) * 8 < int(plain.num_steps)
    assert_close(w, SLOW_FIXED, 1e-6)
    np.testing.assert_allclose(mixed.residual, distance(slow, w, SLOW_LAM), rtol=1e-6)


def test_anderson_is_exact_on_an_affine_map_once_the_window_spans_the_space():
    # Walker and Ni: it is GMRES then, exact after d + 1 evaluations of Φ up to the regularisation.
    solver = fg.anderson(affine, num_steps=6, window=6, regularisation=1e-14)
    assert_close(solver(jnp.zeros(4), LAM), FIXED, 1e-9)
    assert distance(affine, fg.picard(affine, num_steps=6)(jnp.zeros(4), LAM), LAM) > 1e-3


def test_anderson_with_a_window_of_one_is_picard():
    mixed = fg.anderson(affine, num_steps=9, window=1)(jnp.ones(4), LAM)
    assert_close(mixed, fg.picard(affine, num_steps=9)(jnp.ones(4), LAM), 1e-13)


@pytest.mark.parametrize("num_steps", [1, 5, 20, 60])
def test_safeguarded_anderson_never_grows_and_beats_picard_on_a_rough_map(num_steps):
    # Kinks and oscillations of Φ make mixing fail from time to time; q = 0.9.
    def phi(w, lam):
        return 0.5 * jnp.abs(w) + 0.4 * jnp.sin(w[::-1]) + lam

    start, lam = jnp.array([5.0, -3.0, 4.0]), jnp.array([1.0, -0.5, 0.2])
    plain = distance(phi, fg.picard(phi, num_steps=num_steps)(start, lam), lam)
    mixed = distance(phi, fg.anderson(phi, num_steps=num_steps)(start, lam), lam)
    # Accepted residuals do not grow, and the last step is Φ, which shrinks them by q.
    assert mixed <= 0.9 * distance(phi, start, lam)
    if num_steps >= 20:
        assert mixed <= max(plain, 1e-14)


def test_rejected_points_of_anderson_do_not_spoil_the_result():
    # A residual that jumps: extrapolation overshoots into a region with a much larger residual.
    def phi(w):
        return jnp.where(w < 3.0, 0.9 * w + 0.25, 0.1 * w + 10.0 * jnp.sin(w))

    _, info = fg.anderson(phi, max_steps=400, rtol=1e-8).with_info(jnp.asarray(0.0))
    w = fg.anderson(phi, max_steps=400, rtol=1e-8)(jnp.asarray(0.0))
    assert bool(info.converged)
    assert abs(float(phi(w) - w)) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [8, 30])
def test_itd_through_anderson_is_right_after_it_has_converged(num_steps):
    # Two unknowns and a window of five: the residuals in it are collinear to rounding.
    def phi(w, lam):
        return 0.5 * jnp.cos(jnp.array([[0.4, 0.1], [0.2, 0.3]]) @ w) + lam

    def f(lam, estimator):
        solve = fg.fixed_point(phi, estimator)(fg.anderson(phi, num_steps=num_steps))
        return solve(jnp.zeros(2), lam) @ jnp.array([1.0, 2.0])

    lam = jnp.array([0.3, 0.1])
    exact = jax.grad(f)(lam, fg.aid(fg.dense()))
    assert_close(jax.grad(f)(lam, fg.itd()), exact, 1e-7)
    assert_close(jax.jacfwd(f)(lam, fg.itd()), exact, 1e-7)


def test_anderson_runs_under_vmap_with_elements_of_different_difficulty():
    solver = fg.anderson(lambda w, q: jnp.tanh(q * w) + 0.5, max_steps=50, rtol=1e-8)
    q = jnp.array([0.1, 0.7, 0.4])
    w, info = jax.jit(jax.vmap(solver.with_info, in_axes=(None, 0)))(jnp.asarray(0.0), q)
    assert bool(jnp.all(info.converged))
    np.testing.assert_allclose(w, jnp.tanh(q * w) + 0.5, rtol=1e-7)
    assert len(set(map(int, info.num_steps))) > 1


# Newton, Broyden.


@pytest.mark.parametrize("sign", [1, -1])
def test_newton_shortens_steps_that_overshoot_and_needs_no_contraction(sign):
    # From 4 away Newton's full steps on arctan lead off; there a relative tolerance would be met.
    def phi(w, lam):
        return w - sign * jnp.arctan(w - lam)

    w, info = fg.newton(phi, max_steps=40, rtol=1e-10).with_info(5.0, 1.0)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(w, 1.0, rtol=1e-12)


@pytest.mark.parametrize("linear_solver", [fg.dense(), fg.gmres(max_steps=20, rtol=1e-12)])
def test_newton_converges_quadratically_by_a_matrix_and_no_faster_than_its_forcing_terms(
    linear_solver,
):
    w0, lam = jnp.full(3, 4.0), jnp.array([1.0, 2.0, 3.5])

    def error(max_steps):
        w, _ = fg.newton(
            lambda w, lam: w - 0.25 * (w**2 - lam), max_steps=max_steps, linear_solver=linear_solver
        ).with_info(w0, lam)
        return np.max(np.abs(np.asarray(w) - np.sqrt(lam)))

    errors = [error(k) for k in (1, 2, 3, 4, 5)]
    heron = w0
    for k in range(5):
        heron = 0.5 * (heron + lam / heron)
        if "dense" in repr(linear_solver):
            np.testing.assert_allclose(errors[k], np.max(np.abs(heron - jnp.sqrt(lam))), rtol=1e-6)
    assert errors[-1] < 1e-5


def test_newton_uses_a_linear_solve_that_ran_out_of_steps():
    # κ = 10³: five steps of CG bring the residual down, never to the forcing term.
    curvature = jnp.geomspace(1.0, 1e-3, 60)
    phi = fg.gradient_descent(
        lambda w, lam: 0.5 * jnp.sum(curvature * (w - lam) ** 2), step_size=1.0
    )
    few = fg.cg(max_steps=5, rtol=1e-3)
    solver = fg.newton(phi, max_steps=60, atol=1e-6, linear_solver=few)
    _, info = solver.with_info(jnp.zeros(60), jnp.ones(60))
    assert bool(info.converged)


def test_newton_with_a_linear_solver_that_cannot_help_falls_back_on_phi():
    def useless(matvec, b, x0=None):
        del matvec, x0
        bad = jnp.asarray(False)
        return 0 * b, fg.SolveInfo(jnp.int32(3), jnp.linalg.norm(b), bad, jnp.int32(5), 0.0)

    w, info = fg.newton(affine, max_steps=40, rtol=1e-8, linear_solver=useless).with_info(
        jnp.zeros(4), LAM
    )
    assert int(info.status) == Status.CONVERGED
    assert_close(w, FIXED, 1e-7)


def test_the_tolerance_of_newtons_linear_solver_follows_the_step():
    asked = []

    def watched(matvec, b, x0=None):
        return inner(matvec, b, x0)

    inner = fg.gmres(max_steps=9, rtol=1e-9)
    asked = loosened(inner, jnp.asarray(0.1))
    assert "rtol=traced" not in repr(asked)
    _, loose = asked(lambda u: like(A, u) @ u, LAM)
    _, tight = inner(lambda u: like(A, u) @ u, LAM)
    assert int(loose.num_steps) < int(tight.num_steps)
    assert float(loose.residual) <= 0.1 * float(jnp.linalg.norm(LAM))
    # Never tighter than it was made, and another's solver or an exact number of steps is left alone.
    assert float(loosened(inner, jnp.asarray(1e-12))(lambda u: 0.5 * u, LAM)[1].tolerance) > 1e-9
    for left in (watched, fg.cg(num_steps=3)):
        assert loosened(left, 0.1) is left
    # What judges by more than its residual is spared that: the step has a judge of its own.
    singular, rhs = jnp.zeros((4, 4)).at[0, 0].set(1.0), jnp.array([0.0, 1.0, 2.0, 3.0])
    _, info = fg.dense()(lambda u: singular @ u, rhs)
    _, unjudged = loosened(fg.dense(), 0.1)(lambda u: singular @ u, rhs)
    assert (int(info.status), int(unjudged.status)) == (Status.SINGULAR, Status.CONVERGED)
    a, b = (s(lambda u: like(A, u) @ u, LAM)[0] for s in (fg.dense(), loosened(fg.dense(), 0.1)))
    assert_close(a, b, 1e-14)


def test_broyden_first_steps_are_those_of_the_dense_formula():
    def dense_broyden(w, steps):
        h, f = np.eye(4), w - affine(w, LAM)
        for _ in range(steps):
            s = -h @ f
            w = w + s
            new = w - affine(w, LAM)
            y, f = new - f, new
            h = h + np.outer(s - h @ y, s @ h) / (s @ h @ y)
        return w

    for steps in (1, 2, 3, 4):
        w, _ = fg.broyden(affine, max_steps=steps).with_info(jnp.ones(4), LAM)
        assert_close(w, dense_broyden(np.ones(4), steps), 1e-10)


def test_broyden_is_done_on_an_affine_map_in_twice_its_unknowns():
    # Gay: at most 2d steps.
    _, info = fg.broyden(affine, max_steps=30, rtol=1e-9).with_info(jnp.zeros(4), LAM)
    assert int(info.status) == Status.CONVERGED
    assert int(info.num_steps) <= 8


# Failure of direct calls.


def short(on_failure, make=fg.picard):
    return make(
        lambda w, lam: jnp.tanh(affine(w, lam)), max_steps=2, rtol=1e-12, on_failure=on_failure
    )


@EVERY_SOLVER
def test_missed_tolerance_gives_nan_in_a_direct_call_and_the_iterate_in_with_info(make):
    solver = short("nan", make)
    assert jnp.all(jnp.isnan(solver(jnp.zeros(4), LAM)))
    w, info = solver.with_info(jnp.zeros(4), LAM)
    assert jnp.all(jnp.isfinite(w))
    assert int(info.status) == Status.MAX_STEPS
    assert_close(short("ignore", make)(jnp.zeros(4), LAM), w, 8 * EPS)


def test_missed_tolerance_warns_on_request():
    with pytest.warns(fg.SolveFailedWarning, match="the lower-level solve failed: MAX_STEPS"):
        w = short("warn")(jnp.zeros(4), LAM).block_until_ready()
    assert jnp.all(jnp.isfinite(w))


def test_missed_tolerance_raises_on_request():
    with pytest.raises(Exception, match="the lower-level solve failed: MAX_STEPS"):
        short("raise")(jnp.zeros(4), LAM).block_until_ready()


@pytest.mark.parametrize("on_failure", ["nan", "warn", "raise"])
def test_met_tolerance_is_left_alone_by_every_policy(on_failure):
    solver = fg.picard(affine, max_steps=200, rtol=1e-10, on_failure=on_failure)
    assert_close(jax.jit(solver)(jnp.zeros(4), LAM), FIXED, 1e-9)


def test_only_the_failed_elements_of_a_batch_are_nan():
    solver = fg.picard(lambda w, q: q * w + 1.0, max_steps=60, rtol=1e-10)
    w = jax.vmap(solver, in_axes=(None, 0))(jnp.asarray(0.0), jnp.array([0.2, 0.99, 0.5]))
    np.testing.assert_array_equal(jnp.isnan(w), [False, True, False])


def test_failed_solution_keeps_its_integers():
    def phi(w):
        return {"w": 0.99 * w["w"] + 1.0, "n": w["n"]}

    w = fg.picard(phi, max_steps=2, rtol=1e-9)({"w": 0.0, "n": 3})
    assert jnp.isnan(w["w"])
    assert int(w["n"]) == 3


# Adapters.


def test_checked_accepts_a_good_solution_and_rejects_a_bad_one():
    good = fg.with_tolerance(lambda w0, lam: jnp.sqrt(lam) + 0.0 * w0, ROOT.phi, rtol=1e-10)
    w, info = good.with_info(ROOT.w0, ROOT.lam)
    assert (int(info.status), int(info.num_steps)) == (Status.CONVERGED, 0)
    np.testing.assert_array_equal(good(ROOT.w0, ROOT.lam), w)
    bad = fg.with_tolerance(lambda w0, lam: jnp.sqrt(lam) + 0.01 * w0, ROOT.phi, rtol=1e-10)
    w, info = bad.with_info(ROOT.w0, ROOT.lam)
    assert int(info.status) == Status.MAX_STEPS
    np.testing.assert_allclose(info.residual, distance(ROOT.phi, w, ROOT.lam), rtol=1e-12)
    assert jnp.all(jnp.isnan(bad(ROOT.w0, ROOT.lam)))
    lenient = fg.with_tolerance(lambda w0, lam: jnp.sqrt(lam) + 0.01 * w0, ROOT.phi, atol=1.0)
    assert bool(lenient.with_info(ROOT.w0, ROOT.lam)[1].converged)


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_checked_solver_guards_the_gradient_of_the_decorator(error):
    solver = fg.with_tolerance(lambda _, lam: jnp.sqrt(lam) + error, ROOT.phi, rtol=1e-8)
    solve = fg.fixed_point(ROOT.phi, fg.aid(fg.dense()))(solver)
    gradient = jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam)))(ROOT.lam)
    if error:
        assert jnp.all(jnp.isnan(gradient))
    else:
        assert_close(gradient, 0.5 / jnp.sqrt(ROOT.lam), 1e-12)


def by_scipy(w0, lam):
    assert isinstance(w0, np.ndarray)
    assert isinstance(lam, np.ndarray)
    return scipy.optimize.fixed_point(lambda w: w - 0.25 * (w**2 - lam), w0, xtol=1e-13)


HOST = fg.from_host(by_scipy)
ON_HOST = fg.fixed_point(ROOT.phi, fg.forward(fg.aid(fg.dense())))(HOST)
SLOPES = 0.5 / np.sqrt(ROOT.lam)


def test_host_solver_runs_eagerly_under_jit_and_under_vmap():
    want = jnp.sqrt(ROOT.lam)
    assert_close(HOST(ROOT.w0, ROOT.lam), want, 1e-12)
    assert_close(jax.jit(HOST)(ROOT.w0, ROOT.lam), want, 1e-12)
    batch = jnp.stack([ROOT.lam, 2 * ROOT.lam])
    got = jax.jit(jax.vmap(HOST, in_axes=(None, 0)))(ROOT.w0, batch)
    assert_close(got, jnp.sqrt(batch), 1e-12)


@pytest.mark.parametrize("estimator", [fg.aid(fg.dense()), fg.truncated_itd(num_steps=60)])
def test_gradient_through_a_host_solver(estimator):
    solve = fg.fixed_point(ROOT.phi, estimator)(HOST)
    gradient = jax.jit(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam))))(ROOT.lam)
    assert_close(gradient, SLOPES, 1e-11)


def test_every_derivative_goes_through_a_host_solver():
    def solve(lam):
        return ON_HOST(ROOT.w0, lam)

    _, tangent = jax.jvp(solve, (ROOT.lam,), (jnp.ones(3),))
    assert_close(tangent, SLOPES, 1e-11)
    batch = jnp.stack([ROOT.lam, 2 * ROOT.lam])
    gradients = jax.vmap(jax.grad(lambda lam: jnp.sum(solve(lam))))(batch)
    assert_close(gradients, 0.5 / jnp.sqrt(batch), 1e-11)
    hessian = jax.jit(jax.hessian(lambda lam: jnp.sum(solve(lam))))(ROOT.lam)
    assert_close(hessian, np.diag(-0.25 * np.asarray(ROOT.lam) ** -1.5), 1e-11)


def minimised_by_scipy(value_and_grad, w0, *_):
    options = {"gtol": 1e-10, "ftol": 0}
    return scipy.optimize.minimize(
        value_and_grad, w0, jac=True, method="L-BFGS-B", options=options
    ).x


def logistic_loss(w, lam, x, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w))) + 0.5 * lam * jnp.sum(w**2)


def test_scipy_minimises_with_gradients_that_the_program_evaluates():
    # Large enough that a callback which called JAX would wait for ever.
    rng = np.random.default_rng(3)
    x, y = jnp.asarray(rng.normal(size=(400, 60))), jnp.asarray(np.sign(rng.normal(size=400)))
    phi = fg.gradient_descent(logistic_loss, step_size=0.5)
    solver = fg.from_host(minimised_by_scipy, calling=jax.value_and_grad(logistic_loss))
    aid = fg.aid(fg.cg(max_steps=100, rtol=1e-10))
    solve = fg.fixed_point(phi, aid)(fg.with_tolerance(solver, phi, atol=1e-6))
    exact = fg.fixed_point(phi, aid)(fg.newton(phi, max_steps=20, rtol=1e-12))

    def f(lam, solve):
        return jnp.sum(solve(jnp.zeros(60), lam, x, y) ** 2)

    got = jax.jit(jax.value_and_grad(lambda lam: f(lam, solve)))(0.1)
    np.testing.assert_allclose(got, jax.value_and_grad(lambda lam: f(lam, exact))(0.1), rtol=1e-5)
    # Two elements that need different numbers of evaluations; and the same solve twice in a program.
    both = jnp.array([0.1, 1.0])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(lambda lam: f(lam, solve) + f(lam, solve)))(both),
        [2 * f(lam, exact) for lam in both],
        rtol=1e-5,
    )


def test_a_root_of_a_pytree_by_scipy():
    def residual(w, lam):
        return {"a": w["a"] ** 3 - lam, "b": w["b"] - w["a"]}

    def by_root(call, w0, lam):
        del lam
        flat, _ = ravel_pytree(w0)

        def fun(z):
            return np.concatenate([np.ravel(x) for x in jax.tree.leaves(call(as_numpy(z)))])

        def as_numpy(z):
            return jax.tree.map(np.asarray, {"a": z[:2], "b": z[2:]})

        return as_numpy(scipy.optimize.root(fun, np.asarray(flat), tol=1e-12).x)

    w0 = {"a": np.ones(2), "b": np.ones(2)}
    w = fg.from_host(by_root, calling=residual)(w0, jnp.array([8.0, 27.0]))
    assert_close(w, {"a": np.array([2.0, 3.0]), "b": np.array([2.0, 3.0])}, 1e-9)


def test_what_a_host_solver_raises_is_raised_also_between_two_calls():
    def impatient(call, w0, lam):
        del lam
        call(w0)
        raise ValueError("no luck")

    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: no luck"):
        jax.block_until_ready(fg.from_host(impatient, calling=affine)(jnp.zeros(4), LAM))


@pytest.mark.slow(but=("Newton",))
@pytest.mark.parametrize(
    ("function", "solver"),
    [
        (ROOT.phi, optimistix.FixedPointIteration(rtol=1e-10, atol=1e-10)),
        (lambda w, lam: w**2 - lam, optimistix.Newton(rtol=1e-10, atol=1e-10)),
        (lambda w, lam: jnp.sum(w**3 / 3 - lam * w), optimistix.BFGS(rtol=1e-10, atol=1e-10)),
        (lambda w, lam: w**2 - lam, optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, eqx.Module) else "",
)
def test_solvers_of_optimistix_get_our_derivatives(function, solver):
    ours = fg.from_optimistix(function, solver, max_steps=100)
    _, info = ours.with_info(ROOT.w0, ROOT.lam)
    assert int(info.status) == Status.CONVERGED
    assert 0 < int(info.num_steps) < 100
    assert float(info.residual) < 1e-6
    solve = fg.fixed_point(ROOT.phi, fg.forward(fg.aid(fg.dense())))(ours)
    assert_close(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam)))(ROOT.lam), SLOPES, 1e-7)
    late = fg.from_optimistix(function, solver, max_steps=1)
    assert int(late.with_info(ROOT.w0, ROOT.lam)[1].status) == Status.MAX_STEPS
    assert jnp.all(jnp.isnan(late(ROOT.w0, ROOT.lam)))


def test_host_solver_takes_pytrees_keywords_integers_and_none():
    def on_host(w0, lam, *, extra):
        assert extra["none"] is None
        assert extra["n"].dtype.kind == "i"
        return {"w": w0["w"] + lam["a"] * extra["n"], "k": w0["k"]}

    solver = fg.from_host(on_host)
    w0 = {"w": jnp.ones(2), "k": jnp.asarray(7)}
    extra = {"none": None, "n": jnp.asarray(3)}
    w = jax.jit(solver)(w0, {"a": jnp.array([1.0, 2.0])}, extra=extra)
    np.testing.assert_array_equal(w["w"], [4.0, 7.0])
    assert int(w["k"]) == 7


def ridge_loss(w, lam, x, *, y):
    return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.6),
        optax.sgd(0.4, momentum=0.3),
        optax.adam(optax.exponential_decay(0.3, 30, 0.5)),
        optax.lbfgs(),
    ],
    ids=["sgd", "momentum", "adam", "lbfgs"],
)
@jax.numpy_dtype_promotion("standard")  # Adam itself promotes its integer count.
def test_optax_solver_finds_the_minimiser_and_takes_the_map_of_another_method(optimizer):
    x, y = jnp.asarray(matrix(52, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))
    lam = jnp.asarray(0.8)
    solver = fg.from_optax(ridge_loss, optimizer, num_steps=400)
    phi = fg.gradient_descent(ridge_loss, step_size=0.5)
    solve = fg.fixed_point(phi, fg.aid(fg.cg(num_steps=3)))(solver)

    def closed(lam):
        return jnp.linalg.solve(x.T @ x + lam * jnp.eye(3), x.T @ y)

    assert_close(solve(jnp.zeros(3), lam, x, y=y), closed(lam), 1e-6)
    gradient = jax.grad(lambda lam: jnp.sum(solve(jnp.zeros(3), lam, x, y=y) ** 2))(lam)
    want = jax.grad(lambda lam: jnp.sum(closed(lam) ** 2))(lam)
    assert_close(gradient, want, 1e-6)


@pytest.mark.slow(but=("lbfgs",))
@pytest.mark.parametrize("optimizer", [optax.sgd(0.6), optax.lbfgs()], ids=["sgd", "lbfgs"])
def test_optax_solver_stops_by_the_gradient_and_says_so(optimizer):
    x, y = jnp.asarray(matrix(52, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))
    gradient = jax.grad(ridge_loss)

    def solved(dtype=jnp.float64, **settings):
        lam, w0 = jnp.asarray(0.8, dtype), jnp.zeros(3, dtype)
        solver = fg.from_optax(ridge_loss, optimizer, **settings)
        w, info = solver.with_info(w0, lam, x.astype(dtype), y=y.astype(dtype))
        size = jnp.linalg.norm(gradient(w, lam, x.astype(dtype), y=y.astype(dtype)))
        return w, info, float(size)

    first = float(jnp.linalg.norm(gradient(jnp.zeros(3), 0.8, x, y=y)))
    _, info, size = solved(max_steps=200, rtol=1e-8)
    assert int(info.status) == Status.CONVERGED
    assert size <= 1e-8 * first
    np.testing.assert_allclose(info.residual, size, rtol=1e-3)
    np.testing.assert_allclose(info.tolerance, 1e-8 * first, rtol=1e-12)
    _, info, size = solved(max_steps=200, atol=1e-3)
    assert 1e-6 < size <= 1e-3
    assert int(solved(max_steps=200)[1].status) in (Status.AT_FLOOR, Status.CONVERGED)
    assert int(solved(jnp.float32, max_steps=200, rtol=1e-12)[1].status) == Status.AT_FLOOR
    assert int(solved(max_steps=1, rtol=1e-8)[1].status) == Status.MAX_STEPS
    assert jnp.all(
        jnp.isnan(fg.from_optax(ridge_loss, optimizer, max_steps=1)(jnp.zeros(3), 0.8, x, y=y))
    )
    # Exact steps say what is left.
    _, info, size = solved(num_steps=2)
    assert int(info.status) == Status.FIXED_STEPS
    np.testing.assert_allclose(info.residual, size, rtol=1e-9)


def test_a_line_search_that_is_not_the_last_of_its_chain_deceives_nobody():
    # What it remembers is the gradient at a point to which half of the step leads.
    chain = optax.chain(optax.lbfgs(), optax.scale(0.5))
    solver = fg.from_optax(lambda w, lam: jnp.sum((w - lam) ** 2), chain, max_steps=3, atol=1e-6)
    w, info = solver.with_info(jnp.zeros(2), 3.0)
    np.testing.assert_allclose(info.residual, jnp.linalg.norm(2 * (w - 3.0)), rtol=1e-12)
    assert bool(info.converged) == (float(info.residual) <= 1e-6)


def test_optax_sgd_takes_the_steps_of_gradient_descent():
    x, y = jnp.asarray(matrix(52, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))
    solver = fg.from_optax(ridge_loss, optax.sgd(0.5), num_steps=3)
    phi = fg.gradient_descent(ridge_loss, step_size=0.5)
    want = fg.picard(phi, num_steps=3)(jnp.ones(3), 0.8, x, y=y)
    assert_close(solver(jnp.ones(3), 0.8, x, y=y), want, 1e-14)


def test_optax_solver_descends_in_complex_numbers():
    def distance(w, lam):
        return jnp.abs(w - lam) ** 2

    solver = fg.from_optax(distance, optax.sgd(0.25), num_steps=60)
    assert_close(solver(jnp.asarray(0j), jnp.asarray(1.0 + 2.0j)), 1.0 + 2.0j, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e19, 1e25])
@pytest.mark.parametrize("solver", [fg.picard, fg.anderson], ids=["picard", "anderson"])
def test_numbers_whose_squares_leave_the_range_of_the_dtype_are_solved(solver, scale):
    lam = jnp.full(2, scale, jnp.float32)
    w, info = solver(lambda w, lam: 0.5 * w + lam, max_steps=99, rtol=1e-6).with_info(0 * lam, lam)
    assert info.converged
    np.testing.assert_allclose(w / lam, 2 * np.ones(2), rtol=1e-5)


@pytest.mark.parametrize("settings", [{"num_steps": 3}, {"max_steps": 3, "rtol": 1e-3}])
def test_anderson_has_nothing_to_do_for_a_w_without_leaves(settings):
    w, info = fg.anderson(lambda w, lam: w, **settings).with_info({}, 1.0)
    assert w == {}
    assert bool(info.converged)


def two_scales(w, lam):
    """Two leaves that have nothing to do with each other, nine orders of magnitude apart."""
    return {"a": 0.5 * w["a"] + 5e5, "b": 0.9 * w["b"] + 1e-4 * lam}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@EVERY_SOLVER
def test_a_small_leaf_is_solved_beside_a_large_one(make, dtype):
    w0 = {"a": jnp.asarray(1e6, dtype), "b": jnp.asarray(0.0, dtype)}
    lam = jnp.asarray(1.0, dtype)

    def phi(w, lam):
        return jax.tree.map(lambda x: x.astype(dtype), two_scales(w, lam))

    w, info = make(phi, max_steps=500, rtol=1e-5).with_info(w0, lam)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(w["b"], 1e-3, rtol=2e-4)
    stuck = fg.with_tolerance(lambda w0, _: w0, phi, rtol=1e-5)
    assert int(stuck.with_info(w0, lam)[1].status) == Status.MAX_STEPS


@EVERY_SOLVER
def test_a_leaf_whose_solution_is_zero_meets_a_relative_tolerance(make):
    def phi(w, lam):
        return {"a": -0.9 * w["a"], "b": 0.5 * w["b"] + lam}

    w0 = {"a": jnp.ones(2), "b": jnp.ones(2)}
    w, info = make(phi, max_steps=900, rtol=1e-9).with_info(w0, 1.0)
    assert int(info.status) == Status.CONVERGED
    assert float(jnp.max(jnp.abs(w["a"]))) < 1e-20
    np.testing.assert_allclose(w["b"], 2.0, rtol=1e-8)


def test_anderson_is_fast_at_both_precisions():
    # Ill-conditioned: 1/(1 − q) = 2000, for which Φ alone takes thousands of steps.
    curvature = np.geomspace(1.0, 1961.0, 40)

    def steps(dtype):
        loss = lambda w, lam: 0.5 * jnp.sum(jnp.asarray(curvature, dtype) * (w - lam) ** 2)  # noqa: E731
        phi = fg.gradient_descent(loss, step_size=1 / 1961.0)
        solver = fg.anderson(phi, max_steps=2000, rtol=1e-6)
        return int(solver.with_info(jnp.zeros(40, dtype), jnp.ones(40, dtype))[1].num_steps)

    assert max(steps(jnp.float64), steps(jnp.float32)) < 700


def test_a_leaf_that_is_zero_but_for_rounding_is_no_failure():
    def phi(w, lam):  # b is what rounding leaves of a difference.
        return {"a": 0.5 * w["a"] + lam, "b": 0.3 * w["b"] + (0.1 * jnp.sum(w["a"]) - 0.6 * lam[0])}

    lam = jnp.ones(3)
    w0 = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    _, info = fg.picard(phi, max_steps=500, rtol=1e-8).with_info(w0, lam)
    assert bool(info.converged)
    near = {"a": 2.0 * lam * (1 + EPS), "b": jnp.asarray(1e-17)}
    assert bool(
        fg.with_tolerance(lambda w0, _: w0, phi, rtol=1e-8).with_info(near, lam)[1].converged
    )


def test_a_float32_intercept_does_not_hide_the_weights():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 2)), jnp.float32)
    y = jnp.asarray(5e5 + np.asarray(x) @ [1.0, 2.0] + rng.normal(size=40), jnp.float32)

    def loss(w, lam):
        fit = jnp.mean((x @ w["slope"] + w["intercept"] - y) ** 2)
        return 0.5 * (fit + lam * jnp.sum(w["slope"] ** 2))

    phi = fg.gradient_descent(loss, step_size=0.5)
    w0 = {"slope": jnp.zeros(2, jnp.float32), "intercept": jnp.asarray(5e5, jnp.float32)}
    w = fg.picard(phi, max_steps=1000, atol=1e-3)(w0, jnp.float32(0.1))
    np.testing.assert_allclose(w["slope"], [1.0, 2.0], atol=0.5)


@EVERY_SOLVER
def test_the_floor_of_the_dtype_is_tried_before_it_is_believed(make):
    rng = np.random.default_rng(1)
    a = rng.normal(size=(30, 30))
    a = jnp.asarray(0.8 * a / np.linalg.norm(a, 2), jnp.float32)
    lam = jnp.asarray(rng.normal(size=30), jnp.float32)
    w, info = make(lambda w, lam: a @ w + lam, max_steps=400, atol=1e-6).with_info(0 * lam, lam)
    # Eight times eps ‖w‖ is seven times this tolerance, and not the floor.
    assert float(jnp.linalg.norm(a @ w + lam - w)) < 3e-6
    assert bool(info.converged)
