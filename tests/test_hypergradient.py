"""The explicit form: gradients, the state and its structure, info, warm starts, failures."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fixedgrad as fg
from fixedgrad import Status
from problems import (
    ESTIMATOR,
    ESTIMATORS,
    PROBLEM,
    PROBLEMS,
    assert_close,
    matrix,
    named,
    single,
    solver_of,
)

EPS = float(jnp.finfo(jnp.float64).eps)
ROOT = PROBLEM["square root"]
STARTS = pytest.mark.parametrize(
    "start",
    [
        fg.cold(),
        fg.warm(),
        fg.separately(w=fg.warm(), v=fg.cold()),
        fg.extrapolated(),
        fg.separately(w=fg.extrapolated(order=2), v=fg.warm()),
    ],
    ids=["cold", "warm", "w warm, v cold", "extrapolated", "w extrapolated, v warm"],
)


def explicit(problem, estimator, solver=None, **settings):
    return fg.hypergradient(
        problem.outer, problem.phi, solver or solver_of(problem), estimator, **settings
    )


def after_one_update(problem, estimator, solver=None, **settings):
    hypergrad = explicit(problem, estimator, solver, **settings)
    update = jax.jit(hypergrad.update)
    return update(hypergrad.init(problem.w0, problem.lam), problem.lam)


# Gradients.


@pytest.mark.slow(but=("itd", "aid-cg-*"))
@pytest.mark.parametrize(
    ("problem", "row"),
    [
        pytest.param(PROBLEM["ridge" if row.symmetric_only else "nonlinear"], row, id=named(row))
        for row in ESTIMATORS
        if row.everywhere
    ],
)
def test_gradient_and_value_equal_those_of_the_closed_form(problem, row):
    gradient, state = after_one_update(problem, row.estimator, start=fg.warm())
    assert_close(gradient, problem.gradient(), row.accuracy + 2**10 * EPS)
    want = problem.outer(problem.solution(problem.lam), problem.lam)
    np.testing.assert_allclose(state.value, want, rtol=2**6 * EPS)


@pytest.mark.slow(but=("*pytree*", "*mixed*"))
@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS, single(PROBLEM["pytree"]), single(PROBLEM["complex holomorphic"])],
    ids=[*map(named, PROBLEMS), "pytree-float32", "complex64"],
)
def test_gradient_and_w_are_right_and_of_the_right_type_on_every_problem(problem):
    gradient, state = after_one_update(problem, fg.aid(fg.fp(num_steps=90)))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, problem.lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.w, problem.w0)
    assert_close(gradient, problem.gradient(), 2**10 * problem.eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [
        fg.itd(),
        fg.truncated_itd(num_steps=2),
        fg.aid(fg.fp(num_steps=2)),
        fg.aid(fg.cg(num_steps=2)),
    ],
    ids=["itd", "truncated_itd", "fp", "cg"],
)
def test_coarse_estimates_equal_those_of_the_decorator(estimator):
    problem = PROBLEM["ridge"]
    solver = fg.picard(problem.phi, num_steps=3)
    gradient, state = after_one_update(problem, estimator, solver)
    solve = fg.fixed_point(problem.phi, estimator)(solver)
    want = jax.value_and_grad(lambda lam: problem.outer(solve(problem.w0, lam), lam))(problem.lam)
    assert_close((state.value, gradient), want, 1e-13)
    assert jnp.linalg.norm(gradient - problem.gradient()) > 1e-6


def test_v_solves_the_adjoint_system():
    problem = PROBLEM["nonlinear"]
    _, state = after_one_update(problem, fg.aid(fg.dense()))
    b = jax.grad(problem.outer)(state.w, problem.lam)
    _, vjp = jax.vjp(lambda w: problem.phi(w, problem.lam), state.w)
    assert_close(state.v - vjp(state.v)[0], b, 2**6 * EPS)


def test_further_arguments_are_data_and_reach_all_three_functions():
    x, y = jnp.asarray(matrix(60, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))

    def loss(w, lam, x, *, y):
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * lam["ridge"] * jnp.sum(w**2)

    def outer(w, lam, x, *, y):
        return jnp.sum((x @ w - 2.0 * y) ** 2) + lam["ridge"]

    def closed(lam):
        w = jnp.linalg.solve(x.T @ x + lam["ridge"] * jnp.eye(3), x.T @ y)
        return outer(w, lam, x, y=y)

    phi = fg.gradient_descent(loss, step_size=0.7)
    hypergrad = fg.hypergradient(
        outer, phi, fg.picard(phi, num_steps=80), fg.aid(fg.cg(num_steps=3))
    )
    lam = {"ridge": jnp.asarray(0.8)}
    state = hypergrad.init(jnp.zeros(3), lam, x, y=y)
    gradient, state = jax.jit(hypergrad.update)(state, lam, x, y=y)
    assert_close(gradient, jax.grad(closed)(lam), 2**10 * EPS)
    np.testing.assert_allclose(state.value, closed(lam), rtol=2**6 * EPS)


def test_integers_in_lam_and_w_ride_along():
    def phi(w, lam):
        return {"w": 0.5 * w["w"] + lam["x"] * lam["n"].astype(float), "k": w["k"]}

    hypergrad = fg.hypergradient(
        lambda w, _: w["w"], phi, fg.picard(phi, num_steps=70), fg.aid(fg.dense())
    )
    lam = {"x": jnp.asarray(1.0), "n": jnp.asarray(3)}
    state = hypergrad.init({"w": 0.0, "k": 5}, lam)
    gradient, state = hypergrad.update(state, lam)
    np.testing.assert_allclose(gradient["x"], 6.0, rtol=2**6 * EPS)
    assert gradient["n"].dtype == jax.dtypes.float0
    assert int(state.w["k"]) == 5


# State.


@pytest.mark.slow(but=("pytree-*",))
@STARTS
@pytest.mark.parametrize("name", ["itd", "aid cg rtol"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=named)
def test_state_keeps_its_structure_shapes_and_dtypes(problem, name, start):
    hypergrad = explicit(problem, ESTIMATOR[name].estimator, start=start)
    state = hypergrad.init(problem.w0, problem.lam)
    _, following = jax.eval_shape(hypergrad.update, state, problem.lam)
    chex.assert_trees_all_equal_structs(state, following)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, following)


def test_state_before_the_first_update_says_so():
    state = explicit(ROOT, fg.aid(fg.dense())).init(ROOT.w0, ROOT.lam)
    assert jnp.isinf(state.value)
    np.testing.assert_array_equal(state.w, ROOT.w0)
    np.testing.assert_array_equal(state.v, np.zeros(3))
    for info in state.info:
        assert info is not None
        assert int(info.status) == Status.NOT_RUN
        assert not bool(info.converged)


def test_truncated_itd_tells_what_its_steps_leave():
    _, state = after_one_update(ROOT, fg.truncated_itd(num_steps=2))
    assert state.v is None
    assert int(state.info.linear.num_steps) == 2
    assert int(state.info.linear.status) == Status.FIXED_STEPS


def test_an_estimator_without_a_linear_system_has_neither_v_nor_its_info():
    _, state = after_one_update(ROOT, fg.itd(), start=fg.warm())
    assert state.v is None
    assert state.info.linear is None
    assert int(state.info.lower.status) == Status.FIXED_STEPS


@STARTS
def test_jitted_update_is_traced_once_even_from_python_numbers(start):
    def phi(w, lam):
        return 0.5 * w + lam

    hypergrad = fg.hypergradient(
        lambda w, lam: 0.5 * w**2 + lam,
        phi,
        fg.picard(phi, max_steps=80, rtol=1e-12),
        fg.aid(fg.cg(max_steps=5, rtol=1e-12)),
        start=start,
    )
    update = jax.jit(chex.assert_max_traces(hypergrad.update, n=1))
    state = hypergrad.init(0.0, 1.0)
    for lam in (1.0, 2.0, 3.0):
        gradient, state = update(state, lam)
        np.testing.assert_allclose(gradient, 4 * lam + 1, rtol=1e-10)
        np.testing.assert_allclose(state.value, 2 * lam**2 + lam, rtol=1e-10)
    chex.clear_trace_counter()


@pytest.mark.slow(but=("*warm*",))
@STARTS
@pytest.mark.parametrize("name", ["itd", "aid cg rtol"])
def test_scan_over_updates_equals_updates_one_by_one(start, name):
    hypergrad = explicit(ROOT, ESTIMATOR[name].estimator, start=start)
    state = hypergrad.init(ROOT.w0, ROOT.lam)

    @jax.jit
    def descend(lam, state):
        def step(carry, _):
            lam, state = carry
            gradient, state = hypergrad.update(state, lam)
            return (lam - 0.1 * gradient, state), (gradient, state.value)

        return lax.scan(step, (lam, state), None, length=3)

    (lam, last), (gradients, values) = descend(ROOT.lam, state)
    update, want = jax.jit(hypergrad.update), ROOT.lam
    for i in range(3):
        gradient, state = update(state, want)
        assert_close((gradients[i], values[i]), (gradient, state.value), 2**6 * EPS)
        assert_close(gradient, ROOT.gradient(want), 1e-6)
        want = want - 0.1 * gradient
    assert_close(lam, want, 2**6 * EPS)
    assert_close(last.w, state.w, 2**6 * EPS)


def test_update_runs_under_vmap_over_state_and_lam():
    hypergrad = explicit(ROOT, fg.aid(fg.dense()), start=fg.warm())
    lams = jnp.stack([ROOT.lam, 2.0 * ROOT.lam])
    states = jax.vmap(hypergrad.init, in_axes=(None, 0))(ROOT.w0, lams)
    gradients, states = jax.jit(jax.vmap(hypergrad.update))(states, lams)
    assert_close(gradients, jnp.stack([ROOT.gradient(lam) for lam in lams]), 2**10 * EPS)
    assert_close(states.w, jnp.sqrt(lams), 2**6 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hypergrad",
    [
        explicit(ROOT, fg.aid(fg.cg(max_steps=9, rtol=1e-9)), start=fg.warm()),
        explicit(ROOT, fg.itd()),
        fg.certified(explicit(ROOT, fg.aid(fg.dense())), every=2),
        fg.polished(explicit(ROOT, fg.aid(fg.fp(num_steps=2)))),
        fg.adaptive_hypergradient(ROOT.outer, ROOT.phi, rtol=1e-6),
    ],
    ids=["aid", "itd", "certified", "polished", "adaptive"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_nothing_is_nan_where_nothing_is_wrong(hypergrad, jit):
    if jit:
        hypergrad = hypergrad._replace(
            init=jax.jit(hypergrad.init), update=jax.jit(hypergrad.update)
        )
    with jax.debug_nans(True):
        state = hypergrad.init(ROOT.w0, ROOT.lam)
        _, state = hypergrad.update(state, ROOT.lam)
        if not jit:  # To the rows after an early stop.
            loop = fg.bilevel(hypergrad, optax.sgd(0.01))
            start = loop.init(ROOT.w0, ROOT.lam)
            _, history = loop.run(start, num_steps=3, stop=lambda info: info.lower_steps > 0)
            np.testing.assert_array_equal(history.taken, [True, False, False])
    jax.block_until_ready(state)


@pytest.mark.slow
def test_a_failed_solve_still_trips_who_hunts_for_nan():
    solver = fg.picard(ROOT.phi, max_steps=1, rtol=1e-12)
    hypergrad = explicit(ROOT, fg.aid(fg.dense()), solver)
    state = hypergrad.init(ROOT.w0, ROOT.lam)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(hypergrad.update)(state, ROOT.lam)


# Info.


def test_info_of_both_stages_is_that_of_the_solvers():
    solver = fg.picard(ROOT.phi, max_steps=200, rtol=1e-6)
    linear = fg.fp(max_steps=200, rtol=1e-3)
    _, state = after_one_update(ROOT, fg.aid(linear), solver)
    w, lower = solver.with_info(ROOT.w0, ROOT.lam)
    assert_close(state.w, w, 4 * EPS)
    chex.assert_trees_all_close(state.info.lower, lower, rtol=1e-9)
    b = jax.grad(ROOT.outer)(w, ROOT.lam)
    v, info = linear(lambda u: jax.vjp(lambda w: ROOT.phi(w, ROOT.lam), w)[1](u)[0], b)
    assert_close(state.v, v, 1e-13)
    chex.assert_trees_all_close(state.info.linear, info, rtol=1e-9)
    assert int(info.status) == Status.CONVERGED
    assert 0 < int(info.num_steps) < 200


def test_solver_that_says_nothing_of_itself_gets_a_true_residual():
    _, state = after_one_update(ROOT, fg.aid(fg.dense()), lambda _, lam: jnp.sqrt(lam) + 0.1)
    residual = jnp.linalg.norm(ROOT.phi(state.w, ROOT.lam) - state.w)
    np.testing.assert_allclose(state.info.lower.residual, residual, rtol=1e-12)
    assert int(state.info.lower.num_steps) == 0
    assert int(state.info.lower.status) == Status.FIXED_STEPS


# Starts.

TOLERANT = (fg.picard(ROOT.phi, max_steps=200, rtol=1e-9), fg.aid(fg.fp(max_steps=200, rtol=1e-9)))


def steps_of_two_updates(start, factor):
    hypergrad = explicit(ROOT, TOLERANT[1], TOLERANT[0], start=start)
    update = jax.jit(hypergrad.update)
    _, one = update(hypergrad.init(ROOT.w0, ROOT.lam), ROOT.lam)
    _, two = update(one, factor * ROOT.lam)
    return [tuple(int(info.num_steps) for info in state.info) for state in (one, two)]


def test_warm_start_needs_hardly_any_steps_where_lam_hardly_moved():
    assert steps_of_two_updates(fg.warm(), 1.0)[1] == (0, 0)
    first, second = steps_of_two_updates(fg.warm(), 1.0 + 1e-6)
    assert 0 < second[0] < first[0] // 2
    assert 0 < second[1] < first[1] // 2


def test_cold_start_forgets():
    first, second = steps_of_two_updates(fg.cold(), 1.0)
    assert first == second


def test_w_can_start_warm_and_v_cold():
    paper = fg.separately(w=fg.warm(), v=fg.cold())
    cold, warm, both = (steps_of_two_updates(start, 1.0) for start in (fg.cold(), fg.warm(), paper))
    assert both[0] == cold[0]
    assert both[1] == (warm[1][0], cold[1][1])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_extrapolated_start_is_exact_on_polynomials_of_its_order(order):
    # w = v = λ^order on an even grid of λ: the next point is met, one of a higher degree missed by
    # a difference of that order, which is (order + 1)!.
    start = fg.extrapolated(order=order)
    for degree, error in ((order, 0.0), (order + 1, [1.0, 2.0, 6.0][order])):
        memory = start.init(jnp.zeros(2), jnp.zeros(2))
        for lam in (3.0, 4.0, 5.0):
            memory = start.record(memory, jnp.full(2, lam**degree), jnp.full(2, -(lam**degree)))
        w, v = start.propose(memory)
        np.testing.assert_allclose(w, 6.0**degree - error, rtol=1e-12)
        np.testing.assert_allclose(v, error - 6.0**degree, rtol=1e-12)


def test_an_extrapolated_start_is_warm_before_it_knows_enough_and_keeps_integers():
    start = fg.extrapolated()
    first = {"w": jnp.ones(()), "n": jnp.asarray(3)}
    memory = start.init(first, {"w": jnp.zeros(()), "n": jnp.asarray(3)})
    assert float(start.propose(memory)[0]["w"]) == 1.0
    later = {"w": jnp.asarray(5.0), "n": jnp.asarray(3)}
    memory = start.record(memory, later, later)
    assert float(start.propose(memory)[0]["w"]) == 5.0
    memory = start.record(memory, {"w": jnp.asarray(6.0), "n": jnp.asarray(4)}, None)
    w, _ = start.propose(memory)
    assert float(w["w"]) == 7.0
    assert int(w["n"]) == 4


def steps_of_a_loop(start, preconditioner=None, num_updates=12):
    """Steps of both stages on a logistic regression, over gradient steps on λ; and its gradients."""
    x, y = jnp.asarray(matrix(60, 9.0, 80, 40)), jnp.sign(jnp.cos(3.0 * jnp.arange(80.0)))

    def loss(w, lam):
        fit = jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))
        return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    phi = fg.gradient_descent(loss, step_size=1.0)
    cg = fg.cg(max_steps=100, rtol=1e-4, preconditioner=preconditioner)
    solver = fg.newton(phi, max_steps=30, rtol=1e-9, linear_solver=cg)
    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sum((w - 0.1) ** 2), phi, solver, fg.aid(cg), start=start
    )

    def step(carry, _):
        state, lam = carry
        grad, state = hypergrad.update(state, lam)
        return (state, lam - 0.1 * grad), (state.info.lower.num_steps, state.info.linear, grad)

    lam = jnp.full(40, -6.0)
    (state, _), (lower, linear, grads) = jax.jit(
        lambda state: lax.scan(step, (state, lam), None, length=num_updates)
    )(hypergrad.init(jnp.zeros(40), lam))
    assert bool(jnp.all(linear.converged))
    return np.asarray(lower), np.asarray(linear.num_steps), np.asarray(grads), state


def test_an_extrapolated_start_takes_fewer_steps_than_a_warm_one():
    _, cold, wanted, _ = steps_of_a_loop(fg.cold())
    _, warm, grads, _ = steps_of_a_loop(fg.warm())
    _, onward, gradients, _ = steps_of_a_loop(fg.extrapolated())
    assert onward.sum() < warm.sum() < cold.sum()
    assert onward[3:].sum() <= 0.95 * warm[3:].sum()
    for got in (grads, gradients):
        assert_close(got, wanted, 1e-3)


@pytest.mark.parametrize("make", [fg.inverse, lambda every: fg.nystrom(rank=20, every=every)])
def test_a_preconditioner_is_kept_from_update_to_update(make):
    _, plain, wanted, _ = steps_of_a_loop(fg.warm())
    _, kept, grads, state = steps_of_a_loop(fg.warm(), make(every=5))
    _, always, _, _ = steps_of_a_loop(fg.warm(), make(every=1))
    assert_close(grads, wanted, 1e-3)
    assert kept.sum() < 0.9 * plain.sum()
    assert always.sum() <= kept.sum() + 5
    # Made at the 1st, 6th and 11th update, and used twice since; or earlier, where steps rose.
    assert 1 <= int(state.kept.uses) <= 5
    assert not np.any(kept > 2 * max(kept[0], kept[5]) + 3)


def test_a_preconditioner_that_was_kept_through_a_failure_is_made_anew():
    cg = fg.cg(max_steps=9, rtol=1e-9, preconditioner=fg.inverse(every=100))
    hypergrad = explicit(PROBLEM["ridge"], fg.aid(cg), start=fg.warm())
    state = hypergrad.init(PROBLEM["ridge"].w0, PROBLEM["ridge"].lam)
    assert int(state.kept.uses) == 0
    _, state = hypergrad.update(state, PROBLEM["ridge"].lam)
    assert int(state.kept.uses) == 1
    _, bad = hypergrad.update(state, jnp.full_like(PROBLEM["ridge"].lam, jnp.nan))
    assert int(bad.kept.uses) == 0
    grad, state = hypergrad.update(bad, PROBLEM["ridge"].lam)
    assert int(state.kept.uses) == 1
    assert_close(grad, PROBLEM["ridge"].gradient(), 1e-7)


def test_warm_start_with_exact_steps_comes_closer_with_every_update():
    solver = fg.picard(ROOT.phi, num_steps=4)
    hypergrad = explicit(ROOT, fg.aid(fg.fp(num_steps=4)), solver, start=fg.warm())
    update, state, errors = (
        jax.jit(hypergrad.update),
        hypergrad.init(ROOT.w0, ROOT.lam),
        [],
    )
    for _ in range(4):
        gradient, state = update(state, ROOT.lam)
        errors.append(float(jnp.linalg.norm(gradient - ROOT.gradient())))
    # J ≤ ½, so that four steps of each stage gain a factor of 16 less the cross terms.
    assert all(later < earlier / 4 for earlier, later in itertools.pairwise(errors))


def test_a_start_of_your_own_decides_where_the_solves_start():
    # Extrapolates w along the last two solutions.
    start = fg.Start(
        init=lambda w0, v: (w0, w0, v),
        propose=lambda memory: (2.0 * memory[0] - memory[1], memory[2]),
        record=lambda memory, w, v: (w, memory[0], v),
    )
    hypergrad = explicit(ROOT, fg.aid(fg.dense()), start=start)
    state = hypergrad.init(ROOT.w0, ROOT.lam)
    _, state = hypergrad.update(state, ROOT.lam)
    assert_close(state.memory, (jnp.sqrt(ROOT.lam), ROOT.w0, state.v), 2**6 * EPS)


# Failures.


def test_failed_lower_level_gives_nan_and_leaves_the_memory_alone():
    # Small λ slow the iteration down: 12 steps do not suffice there.
    solver = fg.picard(ROOT.phi, max_steps=60, rtol=1e-9)
    hypergrad = explicit(ROOT, fg.aid(fg.dense()), solver, start=fg.warm())
    update = jax.jit(hypergrad.update)
    gradient, good = update(hypergrad.init(ROOT.w0, ROOT.lam), ROOT.lam)
    assert_close(gradient, ROOT.gradient(), 1e-7)
    hard = jnp.array([1e-4, 2.0, 3.0])
    gradient, failed = update(good, hard)
    assert jnp.all(jnp.isnan(gradient))
    assert int(failed.info.lower.status) == Status.MAX_STEPS
    assert not bool(failed.info.lower.converged)
    assert jnp.all(jnp.isfinite(failed.w))
    assert jnp.isfinite(failed.value)
    assert float(failed.w[0]) < float(good.w[0])  # The state shows what was computed ...
    chex.assert_trees_all_equal(failed.memory, good.memory)  # ... and remembers what was good.
    gradient, again = update(failed, ROOT.lam)
    assert_close(gradient, ROOT.gradient(), 1e-7)
    assert int(again.info.lower.num_steps) == 0


def test_failed_linear_solve_gives_nan_and_leaves_the_memory_alone():
    hypergrad = explicit(ROOT, fg.aid(fg.fp(max_steps=2, rtol=1e-9)), start=fg.warm())
    start = hypergrad.init(ROOT.w0, ROOT.lam)
    gradient, state = jax.jit(hypergrad.update)(start, ROOT.lam)
    assert jnp.all(jnp.isnan(gradient))
    assert int(state.info.lower.status) == Status.FIXED_STEPS
    assert int(state.info.linear.status) == Status.MAX_STEPS
    assert jnp.all(jnp.isfinite(state.v))
    chex.assert_trees_all_equal(state.memory, start.memory)


def test_failure_that_is_to_be_ignored_gives_the_inexact_gradient():
    problem = PROBLEM["nonlinear"]
    linear = fg.aid(fg.fp(max_steps=2, rtol=1e-9))
    gradient, state = after_one_update(problem, linear, on_failure="ignore")
    two_steps = fg.aid(fg.fp(num_steps=2))
    want, _ = after_one_update(problem, two_steps)
    assert int(state.info.linear.status) == Status.MAX_STEPS
    # Two steps short of the tolerance are two or three of `num_steps`, depending on the last test.
    assert_close(gradient, want, 0.5)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    ("solver", "estimator", "stage"),
    [
        (fg.picard(ROOT.phi, max_steps=2, rtol=1e-9), fg.aid(fg.dense()), "lower-level solve"),
        (solver_of(ROOT), fg.aid(fg.fp(max_steps=2, rtol=1e-9)), "linear solve of the derivative"),
    ],
    ids=["lower", "linear"],
)
def test_failure_warns_or_raises_on_request(solver, estimator, stage):
    def gradient(on_failure):
        return after_one_update(ROOT, estimator, solver, on_failure=on_failure)[
            0
        ].block_until_ready()

    message = f"the {stage} failed: MAX_STEPS after 2 steps"
    with pytest.warns(fg.SolveFailedWarning, match=message):
        inexact = gradient("warn")
    assert jnp.all(jnp.isfinite(inexact))
    with pytest.raises(Exception, match=message):
        gradient("raise")


def test_only_the_failed_element_of_a_batch_is_nan_and_forgets_nothing():
    solver = fg.picard(ROOT.phi, max_steps=60, rtol=1e-9)
    hypergrad = explicit(ROOT, fg.aid(fg.dense()), solver, start=fg.warm())
    lams = jnp.stack([ROOT.lam, jnp.array([1e-4, 2.0, 3.0])])
    states = jax.vmap(hypergrad.init, in_axes=(None, 0))(ROOT.w0, lams)
    gradients, states = jax.jit(jax.vmap(hypergrad.update))(states, lams)
    np.testing.assert_array_equal(jnp.all(jnp.isnan(gradients), axis=1), [False, True])
    assert_close(gradients[0], ROOT.gradient(), 1e-7)
    memory_w, _ = states.memory
    assert_close(memory_w, jnp.stack([jnp.sqrt(ROOT.lam), ROOT.w0]), 1e-7)


def test_update_drives_an_optax_loop_to_the_minimum():
    # min over λ of ½ ‖√λ − 1‖², whose minimiser is λ = 1.
    hypergrad = fg.hypergradient(
        lambda w, _: 0.5 * jnp.sum((w - 1.0) ** 2),
        ROOT.phi,
        TOLERANT[0],
        TOLERANT[1],
        start=fg.warm(),
    )
    optimizer = optax.sgd(1.0)

    @jax.jit
    def descend(lam):
        def step(_, carry):
            lam, state, hyper = carry
            gradient, hyper = hypergrad.update(hyper, lam)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(lam, updates), state, hyper

        start = lam, optimizer.init(lam), hypergrad.init(ROOT.w0, lam)
        return lax.fori_loop(0, 60, step, start)[0]

    assert_close(descend(ROOT.lam), jnp.ones(3), 1e-6)


def test_a_solver_under_vmap_is_not_taken_for_the_one_inside():
    # `jax.vmap` copies attributes: the function of a kept preconditioner is that of one element.
    phi = PROBLEM["ridge"].phi
    cg = fg.cg(max_steps=9, rtol=1e-9, preconditioner=fg.inverse())
    newton = fg.newton(phi, max_steps=9, rtol=1e-10, linear_solver=cg)
    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sum(jax.vmap(PROBLEM["ridge"].outer)(w, lam)),
        jax.vmap(phi),
        jax.vmap(newton),
        fg.aid(cg),
        start=fg.warm(),
    )
    lams = jnp.stack([PROBLEM["ridge"].lam, 0.5 * PROBLEM["ridge"].lam])
    state = hypergrad.init(jnp.zeros((2, 4)), lams)
    _, state = hypergrad.update(state, lams)
    grad, _ = hypergrad.update(state, lams)
    assert_close(grad, jnp.stack([PROBLEM["ridge"].gradient(lam) for lam in lams]), 1e-7)


def test_under_ignore_the_next_update_starts_from_what_there_is_unless_it_is_not_finite():
    # Three steps of a map that expands lead nowhere, and are wanted all the same.
    phi = lambda w, lam: 1.1 * w + lam  # noqa: E731
    outer = lambda w, lam: w  # noqa: E731
    for on_failure, moves in (("ignore", True), ("nan", False)):
        hypergrad = fg.hypergradient(
            outer,
            phi,
            fg.picard(phi, num_steps=3),
            fg.aid(fg.fp(num_steps=3)),
            start=fg.warm(),
            on_failure=on_failure,
        )
        state = hypergrad.init(1.0, 1.0)
        _, first = hypergrad.update(state, 1.0)
        _, second = hypergrad.update(first, 1.0)
        assert fg.Status(int(first.info.linear.status)).name == "NO_PROGRESS"
        assert (float(second.w) != float(first.w)) == moves
    infinite = lambda w, lam: jnp.inf * w + lam  # noqa: E731
    hypergrad = fg.hypergradient(
        outer,
        infinite,
        fg.picard(infinite, num_steps=1),
        fg.aid(fg.fp(num_steps=1)),
        start=fg.warm(),
        on_failure="ignore",
    )
    _, state = hypergrad.update(hypergrad.init(1.0, 1.0), 1.0)
    assert float(state.memory[0]) == 1.0
