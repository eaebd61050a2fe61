"""The outer loop: optimisers, projections, records, stopping, failures, and what rides along."""

import functools
import gc
import warnings
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fixedgrad as fg
from fixedgrad import Status, StopReason
from problems import ESTIMATORS, PROBLEM, PROBLEMS, assert_close, matrix, named, single, solver_of

EPS = float(jnp.finfo(jnp.float64).eps)
RIDGE, ROOT = PROBLEM["ridge"], PROBLEM["square root"]


@pytest.fixture
def as_users_run():
    """Optax's Adam and its schedules multiply integers with floats: not under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Counter:
    """A function that counts how often Python runs it."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def halved(w, lam):
    """Φ with w(λ) = 2λ."""
    return 0.5 * w + lam


def to_three(w, lam):
    """E = ½‖w − 3‖², hence f = ½‖2λ − 3‖² with its minimum at λ = 3/2."""
    del lam
    return 0.5 * jnp.sum((w - 3.0) ** 2)


def of_halved(estimator=None, num_steps=60, **settings):
    solver = fg.picard(halved, num_steps=num_steps)
    return fg.hypergradient(to_three, halved, solver, estimator or fg.aid(fg.dense()), **settings)


def hypergrad_of(problem, estimator, **settings):
    return fg.hypergradient(problem.outer, problem.phi, solver_of(problem), estimator, **settings)


def by_hand(hypergrad, optimizer, w0, lam, *args, num_steps, project=lambda lam: lam, **kwargs):
    """The outer loop as one would write it in Python: λ after each step, f and ‖g‖ before it."""
    update = jax.jit(hypergrad.update)
    optimizer = optax.with_extra_args_support(optimizer)
    improve = jax.jit(optimizer.update)
    hyper, state = hypergrad.init(w0, lam, *args, **kwargs), optimizer.init(lam)
    lams, values, norms = [], [], []
    for _ in range(num_steps):
        gradient, hyper = update(hyper, lam, *args, **kwargs)
        updates, state = improve(gradient, state, lam, value=hyper.value)
        lam = project(optax.apply_updates(lam, updates))
        lams.append(lam)
        values.append(hyper.value)
        norms.append(jnp.linalg.norm(ravel_pytree(gradient)[0]))
    return lams, jnp.stack(values), jnp.stack(norms)


# Steps.


@pytest.mark.slow(but=("momentum", "polyak"))
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.05, momentum=0.9, nesterov=True),
        optax.adam(0.1),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(0.01),
            # Schedules are in float32: one without a power, whose rounding is the compiler's.
            optax.sgd(optax.piecewise_constant_schedule(0.25, {4: 0.5, 8: 0.5})),
        ),
        optax.polyak_sgd(),
        optax.chain(optax.sgd(0.24), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)),
        optax.MultiSteps(optax.adam(0.1), every_k_schedule=3),
    ],
    ids=["momentum", "adam", "chain", "polyak", "plateau", "multi-steps"],
)
@pytest.mark.usefixtures("as_users_run")
def test_the_loop_equals_update_and_optimiser_by_hand(optimizer):
    hypergrad = hypergrad_of(RIDGE, fg.aid(fg.cg(num_steps=3)), start=fg.warm())
    loop = fg.bilevel(hypergrad, optimizer)
    state, history = loop.run(loop.init(RIDGE.w0, RIDGE.lam), num_steps=12)
    lams, values, norms = by_hand(hypergrad, optimizer, RIDGE.w0, RIDGE.lam, num_steps=12)
    # Rounding alone, which twelve steps and the optimiser's own quotients amplify.
    assert_close(state.lam, lams[-1], 2**8 * EPS)
    assert_close((history.value, history.gradient_norm), (values, norms), 2**8 * EPS)
    assert not bool(state.stopped)
    assert int(state.num_steps) == int(history.taken.sum()) == 12


def test_an_optimiser_that_needs_the_value_is_given_that_of_the_last_update():
    # Polyak's step (f − f*)/‖g‖² halves the distance to the minimum of a quadratic: g = 4(λ − 3/2).
    loop = fg.bilevel(of_halved(), optax.polyak_sgd(max_learning_rate=10.0))
    state, history = loop.run(loop.init(0.0, 0.0), num_steps=5)
    np.testing.assert_allclose(history.value, 4.5 * 4.0 ** -np.arange(5.0), rtol=2**8 * EPS)
    np.testing.assert_allclose(state.lam, 1.5 * (1 - 2.0**-5), rtol=2**6 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "row"),
    [
        pytest.param(PROBLEM["ridge" if row.symmetric_only else "nonlinear"], row, id=named(row))
        for row in ESTIMATORS
        if row.everywhere
    ],
)
def test_the_loop_descends_as_one_with_the_gradients_of_the_closed_form(problem, row):
    loop = fg.bilevel(hypergrad_of(problem, row.estimator), optax.sgd(0.1))
    state, history = loop.run(loop.init(problem.w0, problem.lam), num_steps=3)
    want, values = problem.lam, []
    for _ in range(3):
        values.append(problem.outer(problem.solution(want), want))
        want = want - 0.1 * problem.gradient(want)
    assert_close(state.lam, want, row.accuracy + 2**10 * EPS)
    np.testing.assert_allclose(history.value, values, rtol=row.accuracy + 2**10 * EPS)
    assert np.all(np.diff(history.value) < 0)


def test_one_step_without_jit_is_one_of_run():
    loop = fg.bilevel(hypergrad_of(ROOT, fg.aid(fg.dense())), optax.sgd(0.1, momentum=0.9))
    start = loop.init(ROOT.w0, ROOT.lam)
    state, record = loop.step(start)
    in_scan, history = loop.run(start, num_steps=1)
    chex.assert_trees_all_close(in_scan, state, rtol=2**6 * EPS, atol=2**6 * EPS)
    first = jax.tree.map(lambda x: x[0], history)
    chex.assert_trees_all_close(first, record, rtol=2**6 * EPS, atol=2**6 * EPS)


def test_data_reach_objective_map_and_solver_as_arguments_and_by_name():
    x, y = jnp.asarray(matrix(80, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))

    def loss(w, lam, x, *, y):
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)

    def outer(w, lam, x, *, y):
        return jnp.sum((x @ w - 2.0 * y) ** 2) + 0.0 * lam

    def closed(lam):
        w = jnp.linalg.solve(x.T @ x + jnp.exp(lam) * jnp.eye(3), x.T @ y)
        return outer(w, lam, x, y=y)

    phi = fg.gradient_descent(loss, step_size=0.6)
    solver, estimator = fg.picard(phi, num_steps=150), fg.aid(fg.dense())
    loop = fg.bilevel(fg.hypergradient(outer, phi, solver, estimator), optax.sgd(0.05))
    lam = want = jnp.asarray(0.3)
    state = loop.init(jnp.zeros(3), lam, x, y=y)
    state, _ = loop.run(state, x, y=y, num_steps=3)
    for _ in range(3):
        want = want - 0.05 * jax.grad(closed)(want)
    assert_close(state.lam, want, 2**10 * EPS)


# Infos.


@pytest.mark.parametrize(("t", "k"), [(3, 5), (6, 2)])
def test_an_info_is_what_the_formulas_say(t, k):
    # From 0, w = 2λ(1 − 2⁻ᵗ). With b = w − 3, v = Σ_{i<k} 2⁻ⁱ b = 2(1 − 2⁻ᵏ)b, which is also ĝ.
    loop = fg.bilevel(of_halved(fg.aid(fg.fp(num_steps=k)), num_steps=t), optax.sgd(0.1))
    lam = jnp.array([1.0, -2.0])
    state, history = loop.run(loop.init(jnp.zeros(2), lam), num_steps=2)
    w = g = jnp.zeros(2)
    for i in range(2):
        w = 2.0 * lam * (1 - 2.0**-t)
        b = w - 3.0
        g = 2.0 * (1 - 2.0**-k) * b
        rows = {
            "value": 0.5 * jnp.sum(b**2),
            "gradient_norm": jnp.linalg.norm(g),
            "lower_residual": 2.0**-t * jnp.linalg.norm(lam),
            "linear_residual": 2.0**-k * jnp.linalg.norm(b),
            "lower_steps": t,
            "linear_steps": k,
            "lower_status": Status.FIXED_STEPS,
            "linear_status": Status.FIXED_STEPS,
            "taken": True,
            "reason": StopReason.RUNNING,
        }
        assert {*rows, "metrics"} == set(fg.BilevelInfo._fields)
        for name, want in rows.items():
            np.testing.assert_allclose(getattr(history, name)[i], want, rtol=2**6 * EPS)
        lam = lam - 0.1 * g
    assert_close(state.lam, lam, 2**4 * EPS)
    # The state shows the last update: what belongs to the λ before the last step.
    assert_close((state.hypergrad.w, state.hypergrad.v), (w, g), 2**4 * EPS)
    assert float(state.hypergrad.value) == float(history.value[-1])


def test_an_info_without_a_linear_solve_has_no_residual_and_no_steps_of_it():
    loop = fg.bilevel(of_halved(fg.itd()), optax.sgd(0.1))
    _, history = loop.run(loop.init(jnp.zeros(2), jnp.ones(2)), num_steps=3)
    assert np.all(np.isinf(history.linear_residual))
    np.testing.assert_array_equal(history.linear_steps, np.zeros(3, np.int32))
    np.testing.assert_array_equal(history.lower_steps, np.full(3, 60, np.int32))


def test_the_recorded_norm_is_that_before_the_projection():
    loop = fg.bilevel(of_halved(), optax.sgd(0.1), project=lambda lam: jnp.minimum(lam, 0.25))
    state, history = loop.run(loop.init(0.0, 0.25), num_steps=3)
    np.testing.assert_allclose(
        history.gradient_norm, np.full(3, 5.0), rtol=2**4 * EPS
    )  # Of 4λ − 6.
    assert float(state.lam) == 0.25


# The state.


@pytest.mark.slow
@pytest.mark.parametrize("start", [fg.cold(), fg.warm()], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS, single(PROBLEM["pytree"]), single(PROBLEM["nonlinear"])],
    ids=[*map(named, PROBLEMS), "pytree-float32", "nonlinear-float32"],
)
def test_the_state_keeps_its_structure_shapes_and_dtypes(problem, start):
    hypergrad = hypergrad_of(problem, fg.aid(fg.fp(num_steps=3)), start=start)
    loop = fg.bilevel(hypergrad, optax.sgd(0.1, momentum=0.9))
    state = loop.init(problem.w0, problem.lam)
    following, history = jax.eval_shape(functools.partial(loop.run, num_steps=4), state)
    chex.assert_trees_all_equal_structs(state, following)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, following)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.lam, problem.lam)
    assert {x.shape for x in jax.tree.leaves(history)} == {(4,)}


def test_the_state_before_the_first_step_says_so_in_arrays():
    # An optimiser of one's own, whose state starts as a Python number: steps of 1/10, 1/11, ...
    slowing = optax.GradientTransformation(lambda _: 10.0, lambda g, n, _: (-g / n, n + 1.0))
    loop = fg.bilevel(of_halved(start=fg.warm()), slowing)
    state = loop.init(0.0, 1.0)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert not leaf.weak_type
    assert int(state.num_steps) == 0
    assert not bool(state.stopped)
    assert float(state.lam) == 1.0
    assert jnp.isinf(state.hypergrad.value)


def test_a_flattened_state_goes_on_with_the_same_bits():
    loop = fg.bilevel(hypergrad_of(ROOT, fg.aid(fg.dense()), start=fg.warm()), optax.sgd(0.1, 0.9))
    start = loop.init(ROOT.w0, ROOT.lam)
    middle, _ = loop.run(start, num_steps=3)
    leaves, treedef = jax.tree.flatten(middle)
    assert treedef == jax.tree.structure(start)
    again = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(x)) for x in leaves])
    chex.assert_trees_all_equal(
        loop.run(again, num_steps=3), loop.run(middle, num_steps=3), strict=True
    )


@pytest.mark.usefixtures("as_users_run")
def test_a_state_saved_by_orbax_goes_on_with_the_same_bits(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    loop = fg.bilevel(hypergrad_of(ROOT, fg.aid(fg.dense()), start=fg.warm()), optax.adam(0.1))
    start = loop.init(ROOT.w0, ROOT.lam)
    middle, _ = loop.run(start, num_steps=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", start)
    chex.assert_trees_all_equal(restored, middle, strict=True)
    chex.assert_trees_all_equal(
        loop.run(restored, num_steps=3), loop.run(middle, num_steps=3), strict=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", [fg.cold(), fg.warm()], ids=["cold", "warm"])
def test_a_state_can_be_donated_and_costs_the_caller_nothing(start):
    w0, lam = jnp.zeros(2), jnp.ones(2)
    # An optimiser that keeps λ as it was given, as lookahead does.
    keeping = optax.GradientTransformation(lambda p: p, lambda g, p, _: (-0.1 * g, p))
    hypergrad = of_halved(start=start)
    loop = fg.bilevel(hypergrad, keeping)
    for state, advance in (
        (loop.init(w0, lam), lambda s: loop.run(s, num_steps=1)[0]),
        (loop.init(w0, lam), lambda s: loop.step(s)[0]),
        (hypergrad.init(w0, lam), lambda s: hypergrad.update(s, lam)[1]),
        (hypergrad.update(hypergrad.init(w0, lam), lam)[1], lambda s: hypergrad.update(s, lam)[1]),
    ):
        donating = jax.jit(advance, donate_argnums=0)
        for _ in range(2):
            state = donating(state)
        assert not w0.is_deleted()
        assert not lam.is_deleted()
        assert np.all(np.isfinite(state[0]))


# Projections.


def test_every_iterate_lies_in_the_box_and_the_last_is_the_constrained_minimum():
    low, high = jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 2.0, 4.0])
    project = functools.partial(optax.projections.projection_box, lower=low, upper=high)
    loop = fg.bilevel(of_halved(), optax.sgd(0.15, momentum=0.5), project=project)
    state = loop.init(jnp.zeros(3), jnp.array([0.0, 2.0, 4.0]))
    lams = []
    for _ in range(60):
        state, _ = loop.run(state, num_steps=1)
        lams.append(state.lam)
    assert all(jnp.all((low <= lam) & (lam <= high)) for lam in lams)
    # The minimum is at 3/2 in every coordinate: above, inside and inside the three intervals.
    assert_close(state.lam, jnp.array([1.0, 1.5, 1.5]), 1e-6)
    assert any(float(lam[2]) == 1.0 for lam in lams)  # Overshot, and held.


@pytest.mark.usefixtures("as_users_run")
def test_the_projected_loop_equals_the_one_by_hand():
    project = optax.projections.projection_simplex
    optimizer = optax.adam(0.2)
    loop = fg.bilevel(of_halved(), optimizer, project=project)
    lam = jnp.array([0.7, 0.2, 0.1])
    state, history = loop.run(loop.init(jnp.zeros(3), lam), num_steps=8)
    lams, values, norms = by_hand(
        of_halved(), optimizer, jnp.zeros(3), lam, num_steps=8, project=project
    )
    assert_close(state.lam, lams[-1], 2**8 * EPS)
    assert_close((history.value, history.gradient_norm), (values, norms), 2**8 * EPS)


@pytest.mark.parametrize(
    "project",
    [
        lambda lam: lam["x"],
        lambda lam: {**lam, "y": lam["x"]},
        lambda lam: {"x": lam["x"][:1]},
        lambda lam: {"x": lam["x"].astype(jnp.float32)},
        lambda lam: None,
    ],
    ids=["leaf", "more", "shape", "dtype", "none"],
)
def test_a_projection_that_changes_the_structure_is_refused_with_both(project):
    def phi(w, lam):
        return 0.5 * w + lam["x"]

    hypergrad = fg.hypergradient(to_three, phi, fg.picard(phi, num_steps=3), fg.aid(fg.dense()))
    loop = fg.bilevel(hypergrad, optax.sgd(0.1), project=project)
    state = loop.init(jnp.zeros(2), {"x": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"`project\(lam\)` must have .*\n.*{'x': float64\[2\]}"):
        loop.run(state, num_steps=1)


# Stopping.


def never(info):
    return info.lower_steps < 0


def below(info):
    return info.value < 1e-2


STOPPING = fg.bilevel(of_halved(start=fg.warm()), optax.sgd(0.05, momentum=0.5))


def stopping_start():
    return STOPPING.init(jnp.zeros(2), jnp.array([1.0, -2.0]))


def test_rows_after_an_early_stop_are_blank_and_the_state_is_that_of_the_step_that_stopped():
    start = stopping_start()
    state, history = STOPPING.run(start, num_steps=40, stop=below)
    n = int(state.num_steps)
    assert 5 < n < 35
    assert bool(state.stopped)
    np.testing.assert_array_equal(history.taken, np.arange(40) < n)
    np.testing.assert_array_equal(history.value < 1e-2, np.arange(40) == n - 1)
    np.testing.assert_array_equal(history.reason, np.arange(40) >= n - 1)
    assert int(state.reason) == StopReason.RULE == 1
    for rows in jax.tree.leaves(history._replace(reason=())):
        blank = np.inf if jnp.issubdtype(rows.dtype, jnp.floating) else 0
        np.testing.assert_array_equal(rows[n:], np.full(40 - n, blank, rows.dtype))
        assert np.all(np.isfinite(rows[:n]))
    # A loop that was never to stop, after as many steps.
    straight, rows = STOPPING.run(start, num_steps=n)
    chex.assert_trees_all_close(
        state._replace(reason=straight.reason), straight, rtol=2**6 * EPS, atol=2**6 * EPS
    )
    taken = jax.tree.map(lambda x: x[:n], history)._replace(reason=rows.reason)
    chex.assert_trees_all_close(taken, rows, rtol=2**6 * EPS, atol=2**6 * EPS)


def test_a_stopped_loop_takes_no_further_step():
    stopped, _ = STOPPING.run(stopping_start(), num_steps=40, stop=below)
    with pytest.warns(
        fg.LoopStoppedWarning, match=r"has ended \(RULE, after \d+ steps\): no step is"
    ):
        state, history = STOPPING.run(stopped, num_steps=3, stop=below)
    chex.assert_trees_all_equal(state, stopped, strict=True)
    assert not np.any(history.taken)
    assert np.all(history.reason == StopReason.RULE)
    # In a program of one's own there is nobody to warn; and what was ended can go on.
    jax.jit(lambda state: STOPPING.run(state, num_steps=1))(stopped)
    state, _ = STOPPING.run(stopped._replace(reason=jnp.int32(0)), num_steps=3, stop=never)
    assert int(state.num_steps) == int(stopped.num_steps) + 3


def test_a_rule_that_never_holds_stops_nothing():
    state, history = STOPPING.run(stopping_start(), num_steps=4, stop=never)
    assert not bool(state.stopped)
    assert np.all(history.taken)


@pytest.mark.parametrize(
    "stop",
    [None, below, fg.patience(num_steps=3, atol=1e-2)],
    ids=["to the end", "early", "with patience"],
)
def test_chunks_give_the_same_bits_as_one_run(stop):
    whole = STOPPING.run(stopping_start(), num_steps=40, stop=stop)
    state, chunks = stopping_start(), []
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fg.LoopStoppedWarning)
            state, history = STOPPING.run(state, num_steps=10, stop=stop)
        chunks.append(history)
    history = jax.tree.map(lambda *rows: jnp.concatenate(rows), *chunks)
    assert bool(state.stopped) == (stop is not None)
    chex.assert_trees_all_equal((state, history), whole, strict=True)


def test_a_second_run_of_the_same_shapes_traces_nothing():
    phi, outer, stop = Counter(halved), Counter(to_three), Counter(never)
    hypergrad = fg.hypergradient(
        outer, phi, fg.picard(phi, num_steps=5), fg.aid(fg.cg(num_steps=2)), start=fg.warm()
    )
    loop = fg.bilevel(hypergrad, optax.sgd(0.1, momentum=0.9))
    # From Python numbers, which are weakly typed: what comes back is not.
    state, _ = loop.run(loop.init(0.0, 1.0), num_steps=3, stop=stop)
    traced = phi.calls, outer.calls, stop.calls
    assert min(traced) > 0
    for num_steps in (3, 4, 60):  # One program for all of them.
        state, history = loop.run(state, num_steps=num_steps, stop=stop)
        assert history.value.shape == (num_steps,)
    assert (phi.calls, outer.calls, stop.calls) == traced


def test_phi_is_traced_as_often_for_many_outer_steps_as_for_few():
    def traces(num_steps):
        phi = Counter(halved)
        hypergrad = fg.hypergradient(to_three, phi, fg.picard(phi, num_steps=5), fg.itd())
        loop = fg.bilevel(hypergrad, optax.sgd(0.1))
        loop.run(loop.init(0.0, 1.0), num_steps=num_steps)
        return phi.calls

    assert 0 < traces(1) == traces(50) <= 8


def test_a_loop_that_nobody_holds_is_forgotten_with_what_it_compiled():
    def made_run_and_dropped():
        x = np.ones(3)  # Stands for the data that Φ closes over.

        class Data:
            value = x

        data = Data()

        def phi(w, lam):
            return 0.5 * w + lam * jnp.asarray(data.value)

        def sum_of(w, lam):
            return jnp.sum(w) + 0.0 * lam

        solver, estimator = fg.picard(phi, num_steps=3), fg.aid(fg.cg(num_steps=2))
        loop = fg.bilevel(fg.hypergradient(sum_of, phi, solver, estimator), optax.sgd(0.1))
        state = loop.init(jnp.zeros(3), 1.0)
        for _ in range(2):
            state, _ = loop.run(state, num_steps=2, stop=lambda info: info.value < 0.0)
        return weakref.ref(data), weakref.ref(phi)

    kept = made_run_and_dropped()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


# Rules that remember, metrics, batches.


def test_patience_ends_the_loop_after_so_many_steps_without_an_improvement():
    # f = ½‖2λ − 3‖² is at its minimum, and stays there: the first step alone is an improvement.
    loop = fg.bilevel(of_halved(), optax.sgd(0.1))
    start = loop.init(0.0, 1.5)
    state, history = loop.run(start, num_steps=9, stop=fg.patience(num_steps=3, atol=1e-9))
    assert int(state.num_steps) == int(history.taken.sum()) == 4
    assert int(state.reason) == StopReason.RULE
    # From λ = 0, f = 4.5 · 0.36ⁱ: 0.21, 0.076, and two values that are less than 0.1 below that.
    state, _ = loop.run(loop.init(0.0, 0.0), num_steps=20, stop=fg.patience(num_steps=2, atol=0.1))
    assert int(state.num_steps) == 7


def test_patience_made_anew_for_each_call_does_not_trace_again():
    phi = Counter(halved)
    hypergrad = fg.hypergradient(to_three, phi, fg.picard(phi, num_steps=5), fg.aid(fg.dense()))
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    state, _ = loop.run(loop.init(0.0, 0.0), num_steps=2, stop=fg.patience(num_steps=5))
    traced = phi.calls
    loop.run(state, num_steps=2, stop=fg.patience(num_steps=5))
    assert phi.calls == traced > 0


def keeps_best():
    best = jnp.inf

    def stop(info):
        nonlocal best
        worse, best = info.value > best, jnp.minimum(info.value, best)
        return worse

    return stop


def counts():
    calls = 0

    def stop(info):
        nonlocal calls
        calls += 1
        return calls * info.lower_steps > 99

    return stop


@pytest.mark.parametrize("made", [keeps_best, counts])
def test_a_rule_that_keeps_python_variables_is_refused(made):
    loop = fg.bilevel(of_halved(), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"from `info` alone.*`patience\(...\)`, or a `StopRule"):
        loop.run(loop.init(0.0, 1.0), num_steps=9, stop=made())


def test_a_rule_of_ones_own_is_carried_from_chunk_to_chunk():
    # The third step in a row below 1: of f = 4.5 · 0.36ⁱ the fifth, sixth counted from 1.
    def update(run, info):
        run = jnp.where(info.value < 1.0, run + 1, 0).astype(jnp.int32)
        return run, run >= 3

    loop = fg.bilevel(of_halved(), optax.sgd(0.1))
    state, rule = loop.init(0.0, 0.0), fg.StopRule(lambda: jnp.int32(0), update)
    for _ in range(3):
        state, _ = loop.run(state, num_steps=2, stop=rule)
    assert bool(state.stopped)
    assert int(state.num_steps) == 5
    assert int(state.memory) == 3


def test_metrics_of_the_state_are_in_the_history_and_a_rule_sees_them():
    def metrics(state):
        return {"lam": state.lam, "n": state.num_steps}

    loop = fg.bilevel(of_halved(), optax.sgd(0.1))
    start = loop.init(0.0, 0.0)
    state, history = loop.run(
        start, num_steps=4, metrics=metrics, stop=lambda info: info.metrics["n"] == 3
    )
    want = 1.5 * (1 - 0.6 ** np.arange(1, 4))  # λ − 3/2 shrinks by 1 − 0.1 · 4.
    np.testing.assert_allclose(history.metrics["lam"][:3], want, rtol=2**8 * EPS)
    assert float(history.metrics["lam"][3]) == np.inf
    np.testing.assert_array_equal(history.metrics["n"], [1, 2, 3, 0])
    assert float(state.lam) == float(history.metrics["lam"][2])


def test_every_step_gets_its_batch_before_the_other_data():
    def phi(w, lam, batch, scale):
        return 0.5 * w + lam + scale * batch["x"]

    def outer(w, lam, batch, scale):
        del lam, scale
        return 0.5 * jnp.sum((w - batch["y"]) ** 2)

    hypergrad = fg.hypergradient(outer, phi, fg.picard(phi, num_steps=60), fg.aid(fg.dense()))
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    batches = {"x": jnp.array([1.0, -1.0, 2.0]), "y": jnp.array([3.0, 0.0, -2.0])}
    slices = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(3)]
    start = loop.init(0.0, 0.0, slices[0], 0.25)
    got, history = loop.run(start, 0.25, num_steps=3, batches=batches)
    state, values = start, []
    for batch in slices:
        state, info = loop.step(state, batch, 0.25)
        values.append(float(info.value))
    assert_close(got.lam, state.lam, 2**8 * EPS)
    np.testing.assert_allclose(history.value, values, rtol=2**8 * EPS)


# Failures.


def growing(w, lam):
    """Φ with w(λ) = 1/(1 − λ), a contraction for |λ| < 1 alone."""
    return lam * w + 1.0


def failing_loop(**settings):
    # f = −1/(1 − λ) draws λ beyond 1, where the lower level diverges.
    hypergrad = fg.hypergradient(
        lambda w, _: -jnp.sum(w),
        growing,
        fg.picard(growing, max_steps=100, rtol=1e-9),
        fg.aid(fg.dense()),
        start=fg.warm(),
        **settings,
    )
    return fg.bilevel(hypergrad, optax.sgd(0.1, momentum=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, never], ids=["no rule", "with a rule"])
def test_a_hypergradient_that_is_not_finite_moves_nothing_and_stops(stop):
    loop = failing_loop()
    start = loop.init(0.0, 0.0)
    state, history = loop.run(start, num_steps=12, stop=stop)
    n = int(state.num_steps)
    assert 2 <= n < 11
    assert bool(state.stopped)
    np.testing.assert_array_equal(history.taken, np.arange(12) < n)
    # The step that failed is shown, and why it did, ...
    np.testing.assert_array_equal(np.isnan(history.gradient_norm), np.arange(12) == n)
    reasons = np.where(np.arange(12) < n, StopReason.RUNNING, StopReason.LOWER_FAILED)
    np.testing.assert_array_equal(history.reason, reasons)
    assert int(state.reason) == StopReason.LOWER_FAILED
    assert int(history.lower_status[n]) == int(state.hypergrad.info.lower.status) == Status.DIVERGED
    with pytest.warns(fg.LoopStoppedWarning, match="LOWER_FAILED"):
        loop.run(state, num_steps=12, stop=stop)
    # ... and λ, momentum and what warm starts remember are those before it.
    good, _ = loop.run(start, num_steps=n)
    assert not bool(good.stopped)
    assert 1.0 < float(state.lam) < 10.0
    before = good.lam, good.optimizer, good.hypergrad.memory
    after = state.lam, state.optimizer, state.hypergrad.memory
    chex.assert_trees_all_close(after, before, rtol=2**6 * EPS)


def test_a_first_hypergradient_that_is_not_finite_leaves_the_starting_point():
    loop = failing_loop()
    start = loop.init(0.0, 2.0)
    state, history = loop.run(start, num_steps=3)
    chex.assert_trees_all_equal((state.lam, state.optimizer), (start.lam, start.optimizer))
    assert int(state.num_steps) == 0
    assert not np.any(history.taken)


def test_a_failure_that_is_to_be_ignored_does_not_stop():
    # At 0.95 the solver is 6e-3 short of its tolerance after its hundred steps.
    for on_failure, stops in (("nan", True), ("ignore", False)):
        loop = failing_loop(on_failure=on_failure)
        state, history = loop.run(loop.init(0.0, 0.95), num_steps=1)
        assert bool(state.stopped) == bool(jnp.isnan(history.gradient_norm[0])) == stops


@pytest.mark.parametrize(
    ("outer", "estimator", "reason", "linear"),
    [
        (lambda w, _: w, fg.aid(fg.cg(max_steps=1, rtol=0.5)), "RUNNING", "CONVERGED"),
        (lambda w, _: w, fg.aid(fg.fp(max_steps=2, rtol=1e-6)), "LINEAR_FAILED", "MAX_STEPS"),
        (lambda w, _: jnp.sqrt(w - w), fg.itd(), "NON_FINITE", "NOT_RUN"),
    ],
    ids=["nothing", "the linear solve", "the objective"],
)
def test_a_loop_says_what_ended_it(outer, estimator, reason, linear):
    solver = fg.picard(halved, num_steps=60)
    loop = fg.bilevel(fg.hypergradient(outer, halved, solver, estimator), optax.sgd(0.1))
    state, history = loop.run(loop.init(0.0, 1.0), num_steps=1)
    assert StopReason(int(state.reason)).name == reason
    assert bool(history.taken[0]) == (reason == "RUNNING")
    assert int(history.lower_status[0]) == Status.FIXED_STEPS
    assert Status(int(history.linear_status[0])).name == linear


@pytest.mark.slow
@pytest.mark.parametrize("entry", [0.0, -jnp.inf], ids=["finite", "with an infinite entry"])
def test_a_step_that_overflows_is_not_taken(entry):
    # f′ = 2λ − 3 is finite, 1e308 times it is not; an entry that was infinite from the start may be.
    lam = jnp.array([10.0, entry])

    def phi(w, lam):
        return halved(w, lam[0])

    hypergrad = fg.hypergradient(
        lambda w, lam: to_three(w, lam[0]), phi, fg.picard(phi, num_steps=60), fg.aid(fg.dense())
    )
    loop = fg.bilevel(hypergrad, optax.sgd(1e308))
    state, history = loop.run(loop.init(0.0, lam), num_steps=3)
    assert bool(jnp.isfinite(history.gradient_norm[0]))
    assert int(state.reason) == StopReason.OVERFLOW
    assert not np.any(history.taken)
    np.testing.assert_array_equal(state.lam, lam)
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    state, _ = loop.run(loop.init(0.0, lam), num_steps=3)
    assert not bool(state.stopped)


LINE_SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    ),
}


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_is_served_with_values_and_their_derivative(name):
    ridge = hypergrad_of(RIDGE, fg.aid(fg.cg(num_steps=40)), start=fg.warm())
    loop = fg.bilevel(ridge, LINE_SEARCHES[name])
    state, history = loop.run(loop.init(RIDGE.w0, RIDGE.lam), num_steps=30)
    f = history.value
    assert np.all(np.diff(f) <= 1e-6 * f[0])
    exact = np.linalg.norm(ravel_pytree(RIDGE.gradient(state.lam))[0])
    assert exact <= 1e-2 * history.gradient_norm[0]


@pytest.mark.usefixtures("as_users_run")
def test_a_line_search_keeps_out_of_where_a_lower_level_fails():
    def phi(w, lam):
        return 0.5 * w + jnp.where(lam < 1.4, lam, jnp.nan)

    hypergrad = fg.hypergradient(
        to_three, phi, fg.picard(phi, max_steps=90, rtol=1e-12), fg.aid(fg.dense())
    )
    loop = fg.bilevel(hypergrad, LINE_SEARCHES["backtracking"])
    state, history = loop.run(loop.init(0.0, 0.2), num_steps=20)
    assert not bool(state.stopped)
    assert 1.3 <= state.lam < 1.4
    assert np.all(np.diff(history.value) <= 0)


@pytest.mark.usefixtures("as_users_run")
def test_an_optimiser_that_asks_for_what_is_not_there_is_told_what_is():
    def update(updates, state, params=None, *, hessian, **extra):
        del params, hessian, extra
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    loop = fg.bilevel(of_halved(), optimizer)
    with pytest.raises(TypeError, match="hessian") as caught:
        loop.step(loop.init(0.0, 1.0))
    assert any("gives the optimiser gradients" in note for note in caught.value.__notes__)


# Many loops at once.


def test_vmap_over_starting_points_equals_one_run_each():
    lams = jnp.array([[1.0, -2.0], [1.4, 1.5], [1.5, 40.0]])

    def descend(lam):
        start = STOPPING.init(jnp.zeros(2), lam)
        return STOPPING.run(start, num_steps=30, stop=below)

    states, histories = jax.jit(jax.vmap(descend))(lams)
    # Each stops on its own: at different steps.
    assert len(set(map(int, states.num_steps))) == 3
    for i, lam in enumerate(lams):
        got = jax.tree.map(lambda x, i=i: x[i], (states, histories))
        chex.assert_trees_all_close(got, descend(lam), rtol=2**10 * EPS, atol=2**10 * EPS)


def test_one_loop_that_fails_stops_alone():
    loop = failing_loop()
    start = jax.vmap(loop.init, in_axes=(None, 0))(0.0, jnp.array([-2.5, 0.0]))
    states, histories = jax.vmap(lambda s: loop.run(s, num_steps=2))(start)
    np.testing.assert_array_equal(states.stopped, [True, False])
    assert float(states.lam[0]) == -2.5
    assert np.all(np.isfinite(histories.gradient_norm[1]))


# What the hypergradient may be.


def tolerant(start):
    solver = fg.picard(ROOT.phi, max_steps=200, rtol=1e-9)
    estimator = fg.aid(fg.fp(max_steps=200, rtol=1e-9))
    return fg.bilevel(
        fg.hypergradient(ROOT.outer, ROOT.phi, solver, estimator, start=start), optax.sgd(1e-5)
    )


def test_warm_starts_need_fewer_steps_from_the_second_outer_step_on():
    loops = tolerant(fg.cold()), tolerant(fg.warm())
    (_, cold), (state, warm) = (
        loop.run(loop.init(ROOT.w0, ROOT.lam), num_steps=5) for loop in loops
    )
    for name in ("lower_steps", "linear_steps"):
        without, with_ = getattr(cold, name), getattr(warm, name)
        assert int(without[0]) == int(with_[0])
        assert np.all(with_[1:] < without[1:])
    np.testing.assert_allclose(warm.value, cold.value, rtol=1e-7)
    chex.assert_trees_all_equal(state.hypergrad.memory, (state.hypergrad.w, state.hypergrad.v))


NONLINEAR = PROBLEM["nonlinear"]


def rough():
    """Four steps of either stage, as a plain hypergradient of `NONLINEAR`."""
    solver, estimator = fg.picard(NONLINEAR.phi, num_steps=4), fg.aid(fg.fp(num_steps=4))
    return fg.hypergradient(NONLINEAR.outer, NONLINEAR.phi, solver, estimator)


def descent(hypergrad, num_steps=5):
    """The states after each of `num_steps` runs of one step, and the records stacked."""
    loop = fg.bilevel(hypergrad, optax.sgd(0.05, momentum=0.5))
    states, records = [loop.init(NONLINEAR.w0, NONLINEAR.lam)], []
    for _ in range(num_steps):
        state, record = loop.run(states[-1], num_steps=1)
        states.append(state)
        records.append(record)
    return states[1:], jax.tree.map(lambda *rows: jnp.concatenate(rows), *records)


@pytest.mark.slow
def test_certified_descends_as_without_and_its_certificate_is_of_the_last_step():
    # A certificate every third step: renewed by the first and the fourth, kept in between.
    plain, rows = descent(rough())
    states, history = descent(fg.certified(rough(), every=3))
    assert_close(states[-1].lam, plain[-1].lam, 2**8 * EPS)
    np.testing.assert_allclose(history.value, rows.value, rtol=2**8 * EPS)
    certificates = [state.hypergrad.certificate for state in states]
    for i, renewed in enumerate([0, 0, 0, 3, 3]):
        chex.assert_trees_all_equal(certificates[i], certificates[renewed], strict=True)
    lams = {0: NONLINEAR.lam, 3: states[2].lam}
    for i, lam in lams.items():
        certificate = certificates[i]
        size = jnp.linalg.norm(certificate.gradient)
        np.testing.assert_allclose(size, history.gradient_norm[i], rtol=2**8 * EPS)
        assert bool(certificate.valid)
        error = jnp.linalg.norm(certificate.gradient - NONLINEAR.gradient(lam))
        assert error <= certificate.error < 10 * error


@pytest.mark.slow
def test_polished_follows_the_exact_descent_closer_than_without():
    exact, plain, polished = (
        descent(hypergrad)[0][-1].lam
        for hypergrad in (
            hypergrad_of(NONLINEAR, fg.aid(fg.dense())),
            rough(),
            fg.polished(rough()),
        )
    )
    error = jnp.linalg.norm(plain - exact)
    assert error > 1e-5
    assert jnp.linalg.norm(polished - exact) < 0.1 * error


@pytest.mark.slow
def test_an_adaptive_hypergradient_follows_the_exact_descent_within_its_tolerance():
    exact, rows = descent(hypergrad_of(NONLINEAR, fg.aid(fg.dense())))
    hypergrad = fg.adaptive_hypergradient(NONLINEAR.outer, NONLINEAR.phi, rtol=1e-6)
    states, history = descent(hypergrad)
    assert_close(states[-1].lam, exact[-1].lam, 1e-6)
    # The tolerance is one on the gradient: w, and so E(w), is as accurate as that needs.
    np.testing.assert_allclose(history.value, rows.value, rtol=1e-5)
    assert all(state.hypergrad.certificate.relative_error < 1e-6 for state in states)
    # Later updates start from the w and v of the last one: as far as λ moves here they cost about as
    # much as the first, from a cold start.
    products = history.lower_steps + history.linear_steps
    assert np.all(10 * products[1:] <= 12 * products[0])


def _with_data(w, lam, shift, *, scale):
    return 0.5 * w + scale * lam["x"] * lam["n"].astype(w.dtype) + shift


def _distance(w, lam, shift, *, scale):
    del lam, scale
    return 0.5 * jnp.sum((w - 2.0 * shift) ** 2)


_PLAIN = fg.hypergradient(
    _distance, _with_data, fg.picard(_with_data, num_steps=60), fg.aid(fg.dense())
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hypergrad",
    [
        _PLAIN,
        fg.certified(_PLAIN, make_linear_solver=lambda _: fg.dense()),
        fg.polished(_PLAIN, make_linear_solver=lambda _: fg.dense()),
        fg.adaptive_hypergradient(
            _distance, _with_data, rtol=1e-9, make_linear_solver=lambda _: fg.dense()
        ),
    ],
    ids=["plain", "certified", "polished", "adaptive"],
)
def test_data_and_integers_in_lam_reach_every_kind_of_hypergradient(hypergrad):
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    lam, data = {"x": jnp.ones(2), "n": jnp.asarray(3)}, (jnp.array([3.0, 4.0]),)
    state = loop.init(jnp.zeros(2), lam, *data, scale=0.25)
    state, history = loop.run(state, *data, scale=0.25, num_steps=3)
    # w = 3x/2 + 2 shift, so that f = ½‖3x/2‖² and x shrinks by 1 − 0.1 · 9/4.
    np.testing.assert_allclose(history.value, 2.25 * 0.775 ** (2 * np.arange(3)), rtol=1e-8)
    np.testing.assert_allclose(state.lam["x"], 0.775**3 * lam["x"], rtol=1e-8)
    assert state.lam["n"].dtype == lam["n"].dtype
    assert int(state.lam["n"]) == 3


# What rides along in λ.


@pytest.mark.parametrize(
    ("optimizer", "project"),
    [(optax.sgd(0.05, momentum=0.5), False), (optax.adam(0.1), True)],
    ids=["sgd", "adam-projected"],
)
@pytest.mark.usefixtures("as_users_run")
def test_integers_keys_and_none_in_lam_come_out_unchanged_and_the_rest_moves_as_without(
    optimizer, project, key
):
    def phi(w, lam):
        factor = lam["n"].astype(w.dtype) * jnp.where(lam["on"], 1.0, 0.0)
        return 0.5 * w + factor * lam["x"] + 0.1 * jax.random.normal(lam["key"], w.shape)

    riders = {
        "n": jnp.asarray(2, jnp.int8),
        "on": jnp.asarray(True),
        "key": key,
        "raw": jax.random.PRNGKey(3),
        "none": None,
        "empty": (),
    }

    def loop_of(phi, box):
        hypergrad = fg.hypergradient(
            to_three, phi, fg.picard(phi, num_steps=60), fg.aid(fg.dense()), start=fg.warm()
        )
        return fg.bilevel(hypergrad, optimizer, project=box if project else None)

    def box(lam):
        return {**lam, "x": jnp.minimum(lam["x"], 0.7)}

    x = jnp.array([0.1, 0.2])
    loop = loop_of(phi, box)
    got, history = loop.run(loop.init(jnp.zeros(2), {"x": x, **riders}), num_steps=6)
    alone = loop_of(lambda w, lam: phi(w, {**lam, **riders}), box)
    want, rows = alone.run(alone.init(jnp.zeros(2), {"x": x}), num_steps=6)

    assert_close(got.lam["x"], want.lam["x"], 2**6 * EPS)
    np.testing.assert_allclose(history.value, rows.value, rtol=2**6 * EPS)
    np.testing.assert_allclose(history.gradient_norm, rows.gradient_norm, rtol=2**6 * EPS)
    rest = {name: leaf for name, leaf in got.lam.items() if name != "x"}
    assert jax.tree.structure(rest) == jax.tree.structure(riders)
    for name in ("n", "on", "raw"):
        assert rest[name].dtype == riders[name].dtype
        np.testing.assert_array_equal(rest[name], riders[name])
    assert rest["key"].dtype == key.dtype
    assert rest["key"] == key


def test_python_integers_in_lam_do_not_trace_again():
    def phi(w, lam):
        return 0.5 * w + lam["x"] * lam["n"].astype(w.dtype)

    counted = Counter(phi)
    hypergrad = fg.hypergradient(
        to_three, counted, fg.picard(counted, num_steps=5), fg.aid(fg.dense())
    )
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    state, _ = loop.run(loop.init(0.0, {"x": 1.0, "n": 2}), num_steps=2)
    traced = counted.calls
    state, _ = loop.run(state, num_steps=2)
    assert counted.calls == traced > 0
    assert int(state.lam["n"]) == 2


def test_a_complex_lam_descends():
    # f = |2λ − (3 + 2i)|², steepest along the conjugate of JAX's gradient.
    def outer(w, lam):
        del lam
        return jnp.sum(jnp.abs(w - (3.0 + 2.0j)) ** 2)

    hypergrad = fg.hypergradient(outer, halved, fg.picard(halved, num_steps=60), fg.aid(fg.dense()))
    loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    state, history = loop.run(loop.init(0j, 0j), num_steps=20)
    assert np.all(np.diff(history.value) < 0)
    assert_close(state.lam, jnp.asarray(1.5 + 1.0j), 1e-6)
