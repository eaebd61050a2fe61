"""`fixed_point`: arguments, closures, tracing, transformations, auxiliary output, failures."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fixedgrad as fg
from problems import (
    ESTIMATORS,
    PROBLEM,
    RULES,
    assert_close,
    like,
    matrix,
    named,
    outer,
    solver_of,
)

EPS = float(jnp.finfo(jnp.float64).eps)
CLOSE = 2**10 * EPS

ROOT = PROBLEM["square root"]  # w = √λ, so that dw/dλ = ½ λ^(−½) entry by entry.
SLOPES = 0.5 / np.sqrt(ROOT.lam)
REVERSE, FORWARD = fg.aid(fg.fp(num_steps=70)), fg.forward(fg.aid(fg.fp(num_steps=70)))
EACH = pytest.mark.parametrize("estimator", [row.estimator for row in RULES], ids=map(named, RULES))
# Where the arguments reach the products with Jᵀ, every linear solver too. All of `ESTIMATORS`, with
# every option of a linear solver, would take half a minute more.
EVERY = pytest.mark.parametrize(
    "estimator",
    [pytest.param(r.estimator, id=named(r)) for r in ESTIMATORS if r.everywhere or r.rule],
)


def root(estimator, phi=ROOT.phi, **settings):
    return fg.fixed_point(phi, estimator, **settings)(fg.picard(phi, num_steps=70))


class Counter:
    """A function that counts how often Python runs it."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


# What the decorated function computes.


@EACH
def test_decorated_solver_keeps_its_name_and_computes_what_the_solver_computes(estimator):
    @fg.fixed_point(ROOT.phi, estimator)
    def solve(w0, lam):
        """Doc."""
        return fg.picard(ROOT.phi, num_steps=70)(w0, lam)

    assert (solve.__name__, solve.__doc__) == ("solve", "Doc.")
    assert_close(solve(ROOT.w0, ROOT.lam), jnp.sqrt(ROOT.lam), 4 * EPS)


def test_value_of_an_unconverged_solver_is_left_as_it_is():
    solver = fg.picard(ROOT.phi, num_steps=3)
    solve = fg.fixed_point(ROOT.phi, REVERSE)(solver)
    w = solve(ROOT.w0, ROOT.lam)
    assert_close(w, solver(ROOT.w0, ROOT.lam), 4 * EPS)
    assert jnp.linalg.norm(w - jnp.sqrt(ROOT.lam)) > 1e-3


@EACH
def test_python_numbers_are_accepted_as_starting_point_and_argument(estimator):
    def phi(w, lam):
        return 0.5 * w + lam

    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=70))
    assert float(jax.grad(lambda lam: solve(0.0, lam))(1.0)) == pytest.approx(2.0, rel=CLOSE)


def test_solver_that_is_a_while_loop_is_differentiated():
    @fg.fixed_point(ROOT.phi, REVERSE)
    def solve(w0, lam):
        def unfinished(w):
            return jnp.linalg.norm(ROOT.phi(w, lam) - w) > 1e-13

        return lax.while_loop(unfinished, lambda w: ROOT.phi(w, lam), w0)

    jacobian = jax.jit(jax.jacrev(lambda lam: solve(ROOT.w0, lam)))(ROOT.lam)
    assert_close(jacobian, np.diag(SLOPES), CLOSE)


# Arguments of every kind.


@pytest.mark.slow(but=("itd*", "aid-cg*"))
@EVERY
def test_keyword_arguments_in_any_order_give_the_same_gradient_without_tracing_again(estimator):
    def phi(w, *, lam, scale):
        return w - 0.25 * (w**2 - scale * lam)

    counted = Counter(phi)
    solve = fg.fixed_point(counted, estimator)(fg.picard(counted, num_steps=70))
    one = jax.jit(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam=lam, scale=2.0))))(ROOT.lam)
    traced = counted.calls
    two = jax.jit(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, scale=2.0, lam=lam))))(ROOT.lam)
    assert_close(one, SLOPES * np.sqrt(2.0), CLOSE)
    np.testing.assert_array_equal(one, two)
    assert counted.calls == traced > 0


@pytest.mark.slow(but=("itd*", "*cg*"))
@EVERY
def test_data_is_a_differentiable_argument_like_any_other(estimator):
    x, y = jnp.asarray(matrix(30, 1.0, 5, 3)), jnp.cos(jnp.arange(5.0))

    def loss(w, lam, x, *, y):
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)

    phi = fg.gradient_descent(loss, step_size=0.7)
    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=70))

    def closed(lam, x, y):
        return outer(jnp.linalg.solve(x.T @ x + lam * jnp.eye(3), x.T @ y), lam)

    def objective(lam, x, y):
        return outer(solve(jnp.zeros(3), lam, x, y=y), lam)

    arguments = (jnp.asarray(0.8), x, y)
    got = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))(*arguments)
    assert_close(got, jax.grad(closed, argnums=(0, 1, 2))(*arguments), CLOSE)


@EACH
def test_integers_booleans_keys_and_none_ride_along_without_a_gradient(estimator, key):
    def phi(w, lam, extras, nothing, *, flag):
        noise = 0.01 * jax.random.normal(extras["key"], w.shape)
        power = extras["power"].astype(w.dtype) + (0.0 if nothing is None else 1.0)
        return w - 0.25 * (w**power - lam) + jnp.where(flag, noise, 0.0)

    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=70))

    def objective(lam, extras, flag):
        return jnp.sum(solve(ROOT.w0, lam, extras, None, flag=flag))

    extras = {"power": jnp.asarray(2), "key": key}
    gradient = jax.grad(objective)
    assert_close(gradient(ROOT.lam, extras, False), SLOPES, CLOSE)
    # With the noise, w² = λ + 4 · noise.
    noise = 0.01 * jax.random.normal(key, (3,))
    want = 0.5 / jnp.sqrt(ROOT.lam + 4 * noise)
    assert_close(gradient(ROOT.lam, extras, jnp.asarray(True)), want, CLOSE)
    raw = {"power": np.int32(2), "key": jax.random.key_data(key)}
    none = jax.grad(objective, argnums=1, allow_int=True)(
        ROOT.lam, {"power": raw["power"], "key": key}, False
    )
    assert none["power"].dtype == jax.dtypes.float0
    assert none["key"].dtype == jax.dtypes.float0


@EACH
def test_raw_uint32_keys_ride_along(estimator):
    def phi(w, lam, raw):
        return 0.5 * w + lam + jax.random.uniform(raw, ())

    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=70))
    gradient = jax.grad(lambda lam: solve(0.0, lam, jax.random.PRNGKey(0)))(1.0)
    assert float(gradient) == pytest.approx(2.0, rel=CLOSE)


def test_strings_and_functions_are_static_arguments():
    def phi(w, lam, kind, *, activation):
        return (0.5 if kind == "half" else 0.25) * activation(w) + lam

    counted = Counter(phi)
    solve = fg.fixed_point(counted, REVERSE)(fg.picard(counted, num_steps=70))

    def slope(kind):
        return float(jax.grad(lambda lam: solve(0.0, lam, kind, activation=jnp.negative))(1.0))

    assert slope("half") == pytest.approx(1 / 1.5, rel=CLOSE)
    assert slope("quarter") == pytest.approx(1 / 1.25, rel=CLOSE)
    traced = counted.calls
    assert slope("half") == pytest.approx(1 / 1.5, rel=CLOSE)
    assert counted.calls == traced


@EACH
def test_integer_leaves_inside_w_are_carried_along(estimator):
    def phi(w, lam):
        return {"w": ROOT.phi(w["w"], lam), "count": w["count"], "on": w["on"]}

    w0 = {"w": ROOT.w0, "count": jnp.arange(2), "on": jnp.asarray(True)}
    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=70))
    w = solve(w0, ROOT.lam)
    chex.assert_trees_all_equal_shapes_and_dtypes(w, w0)
    np.testing.assert_array_equal(w["count"], [0, 1])
    gradient = jax.jit(jax.grad(lambda lam: jnp.sum(solve(w0, lam)["w"])))(ROOT.lam)
    assert_close(gradient, SLOPES, CLOSE)


def test_integers_that_the_solver_computes_steer_the_derivative():
    # The solver picks a coordinate system, Φ depends on it through an integer in w.
    def phi(w, lam):
        factor = jnp.where(w["branch"] == 1, 0.5, 0.25)
        return {"w": factor * w["w"] + lam, "branch": w["branch"]}

    @fg.fixed_point(phi, REVERSE)
    def solve(w0, lam):
        chosen = {"w": w0["w"], "branch": jnp.where(lam > 0, 1, 0)}
        return fg.picard(phi, num_steps=70)(chosen, lam)

    w0 = {"w": jnp.asarray(0.0), "branch": jnp.asarray(0)}
    gradient = jax.grad(lambda lam: solve(w0, lam)["w"])
    assert float(gradient(1.0)) == pytest.approx(2.0, rel=CLOSE)
    assert float(gradient(-1.0)) == pytest.approx(4 / 3, rel=CLOSE)


# Closures.


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@EACH
def test_what_phi_and_the_solver_close_over_is_differentiated(estimator, jit):
    def objective(theta, lam):
        def phi(w, lam):
            return w - 0.25 * (w**2 - theta * lam)

        @fg.fixed_point(phi, estimator)
        def solve(w0, lam):
            return lax.fori_loop(0, 70, lambda _, w: w - 0.25 * (w**2 - theta * lam), w0)

        return jnp.sum(solve(ROOT.w0, lam))

    theta = jnp.asarray(0.6)
    got = jit(jax.grad(objective, argnums=(0, 1)))(theta, ROOT.lam)
    roots = jnp.sqrt(ROOT.lam)
    want = (jnp.sum(0.5 * roots / jnp.sqrt(theta)), 0.5 * jnp.sqrt(theta) / roots)
    assert_close(got, want, CLOSE)


def test_closed_over_values_may_be_batched_and_have_tangents():
    def objective(theta):
        def phi(w, lam):
            return 0.5 * jnp.cos(theta["frequency"]) * w + theta["shift"] * lam

        solve = fg.fixed_point(phi, FORWARD)(fg.picard(phi, num_steps=70))
        return solve(0.0, 2.0)

    def closed(theta):
        return 2.0 * theta["shift"] / (1 - 0.5 * jnp.cos(theta["frequency"]))

    theta = {"frequency": jnp.array([0.3, 1.0]), "shift": jnp.array([1.0, -2.0])}
    got = jax.vmap(jax.value_and_grad(objective))(theta)
    assert_close(got, jax.vmap(jax.value_and_grad(closed))(theta), CLOSE)
    first = jax.tree.map(lambda x: x[0], theta)
    got, want = (jax.jvp(f, (first,), (first,)) for f in (objective, closed))
    assert_close(got, want, CLOSE)


def test_phi_may_close_over_what_the_solver_does_not():
    # The solver is handed the answer; only Φ knows θ.
    def objective(theta):
        def phi(w, lam):
            return 0.5 * w + theta * lam

        @fg.fixed_point(phi, REVERSE)
        def solve(w0, lam):
            del lam
            return w0

        return solve(6.0, 1.0)

    assert float(jax.grad(objective)(3.0)) == pytest.approx(2.0, rel=CLOSE)


def test_arrays_of_the_module_scope_are_closed_over_as_constants():
    a = jnp.asarray(matrix(31, 0.5, 3, 3))

    def phi(w, lam):
        return a @ w + lam

    solve = root(REVERSE, phi)
    got = jax.jacrev(lambda lam: solve(jnp.zeros(3), lam))(jnp.ones(3))
    assert_close(got, jnp.linalg.inv(jnp.eye(3) - a), CLOSE)


# Tracing.


@EACH
def test_second_gradient_without_an_outer_jit_traces_phi_zero_times(estimator):
    counted = Counter(ROOT.phi)
    solve = root(estimator, counted)

    def objective(lam):
        return jnp.sum(solve(ROOT.w0, lam))

    jax.grad(objective)(ROOT.lam)
    traced = counted.calls
    again = jax.grad(objective)(2.0 * ROOT.lam)
    assert counted.calls == traced > 0
    assert_close(again, SLOPES / np.sqrt(2.0), CLOSE)


@EACH
def test_phi_is_traced_as_often_for_many_steps_as_for_few(estimator):
    def traces(num_steps):
        counted = Counter(ROOT.phi)
        solve = fg.fixed_point(counted, estimator)(fg.picard(counted, num_steps=num_steps))
        jax.jit(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam))))(ROOT.lam)
        return counted.calls

    assert traces(2) == traces(70) <= 8


def test_phi_is_traced_as_often_for_many_linear_steps_as_for_few():
    def traces(num_steps):
        counted = Counter(ROOT.phi)
        solve = root(fg.aid(fg.cg(num_steps=num_steps)), counted)
        jax.jit(jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam))))(ROOT.lam)
        return counted.calls

    assert traces(1) == traces(10)


def test_new_shapes_trace_phi_again_and_old_ones_do_not():
    counted = Counter(ROOT.phi)
    solve = root(REVERSE, counted)
    solve(jnp.ones(3), jnp.ones(3))
    first = counted.calls
    solve(jnp.ones(2), jnp.ones(2))
    second = counted.calls
    solve(jnp.ones(3), jnp.ones(3))
    assert first < second == counted.calls


def test_jitted_objective_is_traced_once():
    solve = root(REVERSE)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(lam):
        return jax.grad(lambda lam: jnp.sum(solve(ROOT.w0, lam)))(lam)

    for factor in (1.0, 2.0, 3.0):
        assert_close(gradient(factor * ROOT.lam), SLOPES / np.sqrt(factor), CLOSE)
    chex.clear_trace_counter()


def test_products_with_the_jacobian_of_phi_have_the_highest_precision():
    seen = []

    def phi(w, lam):
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        seen.append(precision)
        return 0.5 * w + lam

    @fg.fixed_point(phi, REVERSE)
    def solve(w0, lam):
        del w0
        return 2.0 * lam  # Not through Φ: every trace of Φ is the estimator's.

    jax.grad(lambda lam: solve(0.0, lam))(1.0)
    assert "highest" in seen


# Transformations.


@pytest.mark.parametrize("estimator", [fg.itd(), REVERSE, FORWARD], ids=["itd", "aid", "forward"])
def test_gradients_inside_scan_cond_and_checkpoint(estimator):
    solve = root(estimator)

    def objective(lam):
        return jnp.sum(solve(ROOT.w0, lam))

    @jax.jit
    def descend(lam):
        def step(lam, _):
            gradient = jax.grad(jax.checkpoint(objective))(lam)
            return lax.cond(lam[0] > 0, lambda: lam + gradient, lambda: lam), gradient

        return lax.scan(step, lam, None, length=2)

    end, gradients = descend(ROOT.lam)
    moved = ROOT.lam + SLOPES
    assert_close(gradients, jnp.stack([SLOPES, 0.5 / jnp.sqrt(moved)]), CLOSE)
    assert_close(end, moved + 0.5 / jnp.sqrt(moved), CLOSE)


def test_vmap_over_starting_points_and_arguments():
    solve = root(REVERSE)
    w0 = jnp.stack([ROOT.w0, 1.5 * ROOT.w0])
    over_starts = jax.vmap(solve, in_axes=(0, None))(w0, ROOT.lam)
    assert_close(over_starts, jnp.stack(2 * [jnp.sqrt(ROOT.lam)]), 8 * EPS)
    jacobian = jax.vmap(jax.jacrev(solve, argnums=1))(w0, jnp.stack([ROOT.lam, ROOT.lam]))
    assert_close(jacobian, jnp.stack(2 * [jnp.diag(SLOPES)]), CLOSE)


@pytest.mark.parametrize("estimator", [REVERSE, FORWARD], ids=["aid", "forward"])
def test_decorated_solver_inside_the_map_of_another(estimator):
    # u = ½u + w(λ)/4 with w(λ) = √λ, so that u = √λ / 2.
    solve = root(estimator)

    def phi(u, lam):
        return 0.5 * u + 0.25 * solve(ROOT.w0, lam)

    outermost = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=60))
    got = jax.jit(jax.grad(lambda lam: jnp.sum(outermost(jnp.zeros(3), lam))))(ROOT.lam)
    assert_close(got, 0.5 * SLOPES, CLOSE)


def test_gradients_in_outer_objective_and_solver_add_up():
    solve = root(REVERSE)
    gradient = jax.grad(lambda lam: jnp.sum(lam * solve(ROOT.w0, lam)))(ROOT.lam)
    assert_close(gradient, 1.5 * np.sqrt(ROOT.lam), CLOSE)


def test_memory_of_aid_does_not_grow_with_the_iterations_and_that_of_itd_does():
    def temporary_bytes(estimator, num_steps):
        solve = fg.fixed_point(ROOT.phi, estimator)(fg.picard(ROOT.phi, num_steps=num_steps))
        gradient = jax.jit(jax.grad(lambda lam: jnp.sum(solve(jnp.ones(1000), lam))))
        analysis = gradient.lower(jnp.ones(1000)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    implicit = fg.aid(fg.cg(num_steps=5))
    w = 1000 * 8
    assert temporary_bytes(implicit, 100) == temporary_bytes(implicit, 10) < 30 * w
    assert temporary_bytes(fg.itd(), 100) > temporary_bytes(fg.itd(), 10) + 80 * w


# Auxiliary output.


@pytest.mark.slow(but=("itd*", "*cg*"))
@EVERY
def test_auxiliary_output_is_returned_and_detached(estimator):
    @fg.fixed_point(ROOT.phi, estimator, has_aux=True)
    def solve(w0, lam):
        w = fg.picard(ROOT.phi, num_steps=70)(w0, lam)
        return w, {"square": w**2, "steps": jnp.asarray(70), "none": None}

    w, aux = solve(ROOT.w0, ROOT.lam)
    assert_close((w, aux["square"]), (jnp.sqrt(ROOT.lam), ROOT.lam), 16 * EPS)
    assert int(aux["steps"]) == 70
    assert aux["none"] is None

    def objective(lam):
        w, aux = solve(ROOT.w0, lam)
        return jnp.sum(w) + jnp.sum(aux["square"]), aux

    gradient, aux = jax.jit(jax.grad(objective, has_aux=True))(ROOT.lam)
    assert_close(gradient, SLOPES, CLOSE)  # Not SLOPES + 1.
    assert int(aux["steps"]) == 70


# Failures.

SHORT = fg.picard(ROOT.phi, max_steps=3, rtol=1e-12)
LONG = fg.picard(ROOT.phi, max_steps=100, rtol=1e-12)


def total(solve, lam=ROOT.lam):
    return jnp.sum(solve(ROOT.w0, lam))


@EACH
def test_unconverged_lower_level_gives_nan_and_a_nan_gradient(estimator):
    unrolled = fg.with_tolerance(fg.picard(ROOT.phi, num_steps=3), ROOT.phi, rtol=1e-12)
    solver = unrolled if isinstance(estimator, fg.Unrolled) else SHORT
    solve = fg.fixed_point(ROOT.phi, estimator)(solver)
    assert jnp.all(jnp.isnan(jax.grad(lambda lam: total(solve, lam))(ROOT.lam)))
    assert jnp.isnan(total(solve))


@EACH
def test_converged_lower_level_gives_a_finite_gradient(estimator):
    unrolled = fg.with_tolerance(fg.picard(ROOT.phi, num_steps=70), ROOT.phi, rtol=1e-12)
    solver = unrolled if isinstance(estimator, fg.Unrolled) else LONG
    solve = fg.fixed_point(ROOT.phi, estimator)(solver)
    assert_close(jax.grad(lambda lam: total(solve, lam))(ROOT.lam), SLOPES, 1e-10)


def test_solver_written_with_def_that_calls_an_unconverged_picard_gives_nan():
    @fg.fixed_point(ROOT.phi, REVERSE)
    def solve(w0, lam):
        return SHORT(w0, lam)

    assert jnp.isnan(total(solve))
    assert jnp.all(jnp.isnan(jax.grad(lambda lam: total(solve, lam))(ROOT.lam)))


FAILING = fg.aid(fg.fp(max_steps=2, rtol=1e-12))
SKEW = PROBLEM["nonlinear"]


def test_unconverged_linear_solve_gives_a_finite_value_and_a_nan_gradient():
    solve = root(FAILING)
    value, gradient = jax.value_and_grad(lambda lam: total(solve, lam))(ROOT.lam)
    assert_close(value, jnp.sum(jnp.sqrt(ROOT.lam)), 8 * EPS)
    assert jnp.all(jnp.isnan(gradient))


def test_cg_on_a_map_that_is_not_symmetric_gives_nan_and_not_a_wrong_number():
    solve = fg.fixed_point(SKEW.phi, fg.aid(fg.cg(num_steps=3)))(solver_of(SKEW))
    gradient = jax.grad(lambda lam: SKEW.outer(solve(SKEW.w0, lam), lam))(SKEW.lam)
    assert jnp.all(jnp.isnan(gradient))


@pytest.mark.parametrize("forward", [lambda e: e, fg.forward], ids=["reverse", "forward"])
def test_failed_linear_solve_is_nan_in_second_derivatives_too(forward):
    solve = root(forward(FAILING))
    hessian = jax.hessian(lambda lam: total(solve, lam))(ROOT.lam)
    assert jnp.all(jnp.isnan(hessian))


def test_failed_linear_solve_is_nan_in_forward_mode():
    solve = root(fg.forward(FAILING))
    assert jnp.all(jnp.isnan(jax.jacfwd(lambda lam: solve(ROOT.w0, lam))(ROOT.lam)))


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd], ids=["reverse", "forward"])
def test_one_failed_element_of_a_batch_is_nan_alone(mode):
    # A small λ slows the iteration for √λ down: the rate is 1 − √λ/2.
    estimator = FORWARD if mode is jax.jacfwd else REVERSE
    solve = fg.fixed_point(ROOT.phi, estimator)(fg.picard(ROOT.phi, max_steps=60, rtol=1e-10))
    lam = jnp.array([1.0, 1e-3, 2.0])
    got = jax.vmap(mode(lambda lam: solve(jnp.asarray(1.0), lam)))(lam)
    np.testing.assert_array_equal(jnp.isnan(got), [False, True, False])
    np.testing.assert_allclose(got[::2], 0.5 / jnp.sqrt(lam[::2]), rtol=1e-8)


def test_one_failed_linear_solve_of_a_batch_is_nan_alone():
    solve = root(fg.aid(fg.fp(max_steps=60, rtol=1e-10)))
    lam = jnp.array([1.0, 1e-2, 2.0])
    got = jax.vmap(jax.grad(lambda lam: solve(jnp.asarray(1.0), lam)))(lam)
    np.testing.assert_array_equal(jnp.isnan(got), [False, True, False])
    np.testing.assert_allclose(got[::2], 0.5 / jnp.sqrt(lam[::2]), rtol=1e-8)


@pytest.mark.parametrize(
    ("estimator", "solver"), [(REVERSE, SHORT), (FAILING, LONG)], ids=["lower", "linear"]
)
def test_failure_that_is_to_be_ignored_gives_the_inexact_gradient(estimator, solver):
    solve = fg.fixed_point(ROOT.phi, estimator, on_failure="ignore")(solver)
    gradient = jax.grad(lambda lam: total(solve, lam))(ROOT.lam)
    assert_close(gradient, SLOPES, 0.5)  # Two or three steps: a crude estimate.
    assert jnp.linalg.norm(gradient - SLOPES) > 1e-6


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("estimator", "solver", "stage"),
    [(REVERSE, SHORT, "lower-level solve"), (FAILING, LONG, "linear solve of the derivative")],
    ids=["lower", "linear"],
)
def test_failure_that_is_to_warn_warns_and_gives_the_inexact_gradient(
    estimator, solver, stage, jit
):
    solve = fg.fixed_point(ROOT.phi, estimator, on_failure="warn")(solver)
    with pytest.warns(fg.SolveFailedWarning, match=f"the {stage} failed: MAX_STEPS after . steps"):
        gradient = jit(jax.grad(lambda lam: total(solve, lam)))(ROOT.lam).block_until_ready()
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    ("estimator", "solver", "stage"),
    [(REVERSE, SHORT, "lower-level solve"), (FAILING, LONG, "linear solve of the derivative")],
    ids=["lower", "linear"],
)
def test_failure_that_is_to_raise_raises(estimator, solver, stage):
    solve = fg.fixed_point(ROOT.phi, estimator, on_failure="raise")(solver)
    with pytest.raises(Exception, match=f"SolveFailedError: the {stage} failed: MAX_STEPS"):
        jax.grad(lambda lam: total(solve, lam))(ROOT.lam).block_until_ready()


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_success_neither_warns_nor_raises(on_failure):
    solve = fg.fixed_point(ROOT.phi, REVERSE, on_failure=on_failure)(LONG)
    assert_close(jax.grad(lambda lam: total(solve, lam))(ROOT.lam), SLOPES, 1e-10)
    assert_close(
        jax.vmap(jax.grad(lambda lam: total(solve, lam)))(jnp.stack([ROOT.lam] * 2)),
        jnp.stack([SLOPES] * 2),
        1e-10,
    )


def test_singular_lower_level_gives_nan_and_not_zero():
    # Φ(w, λ) = w + 0·λ: every w is a fixed point and w(λ) is not defined.
    def phi(w, lam):
        return w + 0.0 * lam

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(lambda w0, lam: w0 + 0.0 * lam)
    assert jnp.isnan(jax.grad(lambda lam: solve(1.0, lam))(1.0))


def test_unused_solution_has_zero_gradient_even_where_the_linear_solve_would_be_hard():
    solve = root(fg.aid(fg.fp(max_steps=2, rtol=1e-12)))
    gradient = jax.grad(lambda lam: jnp.sum(lam) + 0.0 * total(solve, lam))(ROOT.lam)
    np.testing.assert_array_equal(gradient, np.ones(3))


def test_float32_gradient_with_a_tolerance_below_its_resolution_is_not_a_failure():
    lam = ROOT.lam.astype(jnp.float32)
    solver = fg.picard(ROOT.phi, max_steps=200, rtol=1e-12)
    solve = fg.fixed_point(ROOT.phi, fg.aid(fg.cg(max_steps=50, rtol=1e-12)))(solver)
    gradient = jax.grad(lambda lam: jnp.sum(solve(like(ROOT.w0, lam), lam)))(lam)
    assert gradient.dtype == jnp.float32
    assert_close(gradient, SLOPES, 2**6 * float(jnp.finfo(jnp.float32).eps))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["integer", "mask", "key"])
def test_what_is_closed_over_may_have_no_tangent(what):
    def f(lam, index):
        def phi(w, lam):
            by = {
                "integer": lambda: jnp.eye(2)[index],
                "mask": lambda: jnp.where(jnp.arange(2) == index, 1.0, 0.0),
                "key": lambda: jax.random.normal(jax.random.key(index), (2,)),
            }
            return 0.5 * w + lam * by[what]()

        solve = fg.fixed_point(phi, fg.forward(fg.aid(fg.dense())))(fg.picard(phi, num_steps=60))
        return jnp.sum(solve(jnp.zeros(2), lam) ** 2)

    value, grad = jax.jit(jax.value_and_grad(f))(1.0, 1)  # f is a multiple of λ².
    np.testing.assert_allclose(grad, 2 * value, rtol=1e-12)
    batched = jax.vmap(jax.grad(f), (None, 0))(1.0, jnp.arange(2))
    np.testing.assert_allclose(batched[1], grad, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(1.0, 1), grad, rtol=1e-12)


def test_a_decorated_solver_inside_the_explicit_form_keeps_its_rule():
    def phi(w, lam):
        return 0.9 * jnp.tanh(w) + lam

    decorated = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=3))
    lam = jnp.asarray(0.3)
    given = fg.hypergradient(lambda w, lam: w**2 + 0 * lam, phi, decorated, fg.itd())
    grad, _ = given.update(given.init(0.0, lam), lam)
    want = jax.grad(lambda lam: decorated(jnp.zeros(()), lam) ** 2)(lam)
    np.testing.assert_allclose(grad, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [fg.aid, lambda s: fg.forward(fg.aid(s))], ids=["aid", "forward"]
)
def test_a_tolerance_that_depends_on_lam_is_constant_for_derivatives(estimator):
    def f(lam, tol):
        solver = fg.picard(_cosine, max_steps=90, rtol=tol)
        solve = fg.fixed_point(_cosine, estimator(fg.gmres(max_steps=9, rtol=tol)))(solver)
        return solve(jnp.zeros(()), lam)

    lam = jnp.asarray(0.3)
    fixed = jax.grad(f)(lam, 1e-9)
    assert_close(jax.grad(lambda lam: f(lam, 1e-8 * lam))(lam), fixed, 1e-7)
    assert jax.grad(f, argnums=1)(lam, jnp.asarray(1e-9)) == 0.0


def _cosine(w, lam):
    return 0.5 * jnp.cos(w) + lam


# A solver that is decorated already.


def _slow(w, lam):
    return 0.99 * w + lam


_IMPLICIT = fg.aid(fg.dense())
_MISSED = fg.fixed_point(_slow, _IMPLICIT)(fg.picard(_slow, max_steps=5, rtol=1e-8))
_REACHED = fg.fixed_point(_slow, _IMPLICIT)(fg.anderson(_slow, max_steps=9, rtol=1e-8))


def _decorated_again(solver, **settings):
    solve = fg.fixed_point(_slow, _IMPLICIT, **settings)(solver)
    value = (lambda w: w[0]) if settings else (lambda w: w)
    return jax.grad(lambda lam: value(solve(jnp.zeros(()), lam)) ** 2)(1.0)


def _in_the_explicit_form(solver):
    hypergrad = fg.hypergradient(lambda w, lam: w**2 + 0 * lam, _slow, solver, _IMPLICIT)
    return hypergrad.update(hypergrad.init(jnp.zeros(()), 1.0), 1.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "gradient",
    [
        _decorated_again,
        lambda solver: _decorated_again(jax.jit(solver)),
        lambda solver: _decorated_again(solver.with_info, has_aux=True),
        _in_the_explicit_form,
    ],
    ids=["decorated", "jitted", "with_info as aux", "explicit"],
)
def test_a_decorated_solver_that_failed_says_so_to_what_is_around_it(gradient):
    assert jnp.isnan(gradient(_MISSED))
    assert float(gradient(_REACHED)) == pytest.approx(20_000.0, rel=1e-6)


def test_a_decorated_solver_has_the_info_of_its_solver_detached():
    w, info = _MISSED.with_info(jnp.zeros(()), 1.0)
    assert (int(info.num_steps), int(info.status)) == (5, fg.Status.MAX_STEPS)
    assert jnp.isfinite(w)
    assert jnp.isnan(_MISSED(jnp.zeros(()), 1.0))
    assert jax.grad(lambda lam: _REACHED.with_info(jnp.zeros(()), lam)[1].residual)(1.0) == 0.0
    silent = fg.fixed_point(_slow, _IMPLICIT, has_aux=True)(lambda w0, lam: (100.0 * lam, w0))
    out, info = silent.with_info(0.0, 1.0)  # What Φ says of w, as the solver says nothing.
    assert out == (100.0, 0.0)
    assert (int(info.status), bool(info.converged)) == (fg.Status.NOT_RUN, True)


def test_a_transformation_of_a_solver_is_not_passed_over_for_its_info():
    def phi(w, lam):
        return lam + 0.5 * w / (1 + jnp.sum(jnp.abs(w)))

    each = jax.vmap(fg.picard(phi, num_steps=50))
    lam = jnp.arange(3.0)
    solve = fg.fixed_point(lambda w, lam: jax.vmap(phi)(w, lam), _IMPLICIT)(each)
    assert_close(solve(jnp.zeros(3), lam), each(jnp.zeros(3), lam), EPS)


# Collectives over the axis of a `vmap`.


@pytest.mark.slow
@pytest.mark.parametrize("mode", [jax.grad, jax.hessian], ids=["grad", "hessian"])
@pytest.mark.parametrize(
    "estimator",
    [fg.aid(fg.fp(num_steps=80)), fg.truncated_itd(num_steps=60), FORWARD, fg.itd()],
    ids=["aid", "truncated", "forward", "itd"],
)
def test_derivative_of_a_vmap_whose_axis_the_map_averages_over(estimator, mode):
    def phi(w, lam):  # On all of them: w = w/2 + λ + mean(w)/10, hence mean(w) = 2.5 mean(λ).
        return 0.5 * w + lam + 0.1 * lax.pmean(w, "batch")

    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=60))

    def f(lam):
        return jnp.sum(jax.vmap(lambda lam: solve(0.0, lam), axis_name="batch")(lam) ** 3)

    def closed(lam):
        return jnp.sum((2 * lam + 0.2 * 2.5 * jnp.mean(lam)) ** 3)

    lam = jnp.arange(3.0)
    assert_close(mode(f)(lam), mode(closed)(lam), CLOSE)


# A map that holds a decorated solver, and one that holds a `custom_vjp`.


def _within(w, lam):
    return 0.3 * jnp.cos(w) + lam


def _three_levels(inner, estimator):
    """λ, with a solver within Φ."""
    solve = fg.fixed_point(_within, inner)(fg.picard(_within, num_steps=40))

    def phi(w, lam):
        return 0.2 * lam * jnp.sin(solve(jnp.zeros(()), w)) + lam

    return fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=30))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "transform"),
    [
        (_IMPLICIT, jax.grad),
        (_IMPLICIT, lambda f: jax.grad(jax.grad(f))),
        (fg.forward(_IMPLICIT), jax.jacfwd),
        (fg.forward(_IMPLICIT), lambda f: jax.jacfwd(jax.jacrev(f))),
    ],
    ids=["grad", "grad-grad", "jacfwd", "hessian"],
)
def test_a_map_that_holds_a_solver_with_forward_has_every_derivative(estimator, transform):
    def f(solve):
        return transform(lambda lam: solve(jnp.zeros(()), lam) ** 2)(0.7)

    unrolled = _three_levels(fg.itd(), fg.itd())
    assert_close(f(_three_levels(fg.forward(_IMPLICIT), estimator)), f(unrolled), CLOSE)


@jax.custom_vjp
def _reverse_only(x):
    return jnp.sin(x)


_reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, x_bar: (jnp.cos(x) * x_bar,))


def _holds_custom_vjp(w, lam):
    return 0.3 * lam * _reverse_only(w) + lam


def _around(estimator):
    return fg.fixed_point(_holds_custom_vjp, estimator)(fg.picard(_holds_custom_vjp, num_steps=40))


@pytest.mark.parametrize(
    ("solve", "transform", "note"),
    [
        (_around(_IMPLICIT), jax.jacfwd, "reverse mode alone"),
        (_around(_IMPLICIT), lambda f: jax.grad(jax.grad(f)), "`phi` in forward mode here"),
        (_around(fg.forward(_IMPLICIT)), jax.grad, "`phi` in forward mode here"),
        (_three_levels(_IMPLICIT, _IMPLICIT), jax.hessian, "`phi` in forward mode here"),
        (_three_levels(_IMPLICIT, fg.itd()), jax.jacfwd, "`phi` in forward mode here"),
    ],
    ids=["jvp", "grad-grad", "forward", "three-levels", "itd"],
)
def test_forward_mode_that_is_refused_names_forward_once(solve, transform, note):
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        transform(lambda lam: solve(jnp.zeros(()), lam))(0.7)
    notes = [text for text in caught.value.__notes__ if "fixedgrad.forward(" in text]
    assert len(notes) == 1
    assert note in notes[0]


def test_truncated_itd_has_second_derivatives_through_a_custom_vjp():
    def phi(w, lam):
        return 0.3 * lam * jnp.sin(w) + lam

    def second(solve):
        return jax.grad(jax.grad(lambda lam: solve(jnp.zeros(()), lam)))(0.7)

    want = second(fg.fixed_point(phi, _IMPLICIT)(fg.picard(phi, num_steps=40)))
    assert_close(second(_around(fg.truncated_itd(num_steps=40))), want, CLOSE)
