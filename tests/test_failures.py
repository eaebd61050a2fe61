"""Failed solves: each has its code, obeys the policy under every transformation, says what to try."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg
from fixedgrad.failure import describe
from fixedgrad.types import OnFailure, is_failure, solve_info

POLICIES = get_args(OnFailure)
Function = Callable[[Any], jax.Array]


def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
    """w = λ w + 1 has the solution 1/(1 − λ)."""
    return lam * w + 1.0


# Each of the two stages, of two steps where many more are needed; the other one is exact.
STAGES = {
    "lower-level solve": (fg.picard(phi, max_steps=2, rtol=1e-9), fg.dense()),
    "linear solve of the derivative": (
        fg.from_host(lambda w0, lam: np.asarray(1 / (1 - lam), w0.dtype)),
        fg.fp(max_steps=2, rtol=1e-9),
    ),
}

TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of grad": lambda f: jax.jit(jax.grad(jax.grad(f))),
    "jvp": lambda f: lambda lam: jax.jvp(f, (lam,), (1.0,))[1],
    "jacfwd of jacfwd": lambda f: jax.jit(jax.jacfwd(jax.jacfwd(f))),
}


def function_of(stage: str, on_failure: OnFailure) -> Function:
    solver, linear_solver = STAGES[stage]
    estimator = fg.forward(fg.aid(linear_solver))
    solve = fg.fixed_point(phi, estimator, on_failure=on_failure)(solver)
    return lambda lam: solve(jnp.zeros_like(lam), lam)


@pytest.mark.slow(but=("jit of grad-*", "jvp-*"))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_policy_is_obeyed_under_every_transformation(name: str, stage: str) -> None:
    transform, lam = TRANSFORMATIONS[name], jnp.asarray(0.5)
    assert jnp.isnan(transform(function_of(stage, "nan"))(lam))
    ignored = transform(function_of(stage, "ignore"))(lam)
    assert jnp.isfinite(ignored)
    with pytest.warns(fg.SolveFailedWarning, match=f"the {stage} failed: MAX_STEPS"):
        warned = transform(function_of(stage, "warn"))(lam)
    np.testing.assert_allclose(warned, ignored, rtol=1e-12)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"SolveFailedError: the {stage} failed"):
        jax.block_until_ready(transform(function_of(stage, "raise"))(lam))


@pytest.mark.slow(but=("nan*", "zero*"))
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("on_failure", POLICIES)
def test_each_policy_is_obeyed_by_each_element_of_a_batch(on_failure: Any, jit: Any) -> None:
    solver = fg.picard(phi, max_steps=40, rtol=1e-6)
    solve = fg.fixed_point(phi, fg.aid(fg.dense()), on_failure=on_failure)(solver)
    gradient = jit(jax.vmap(jax.grad(lambda lam: solve(jnp.zeros_like(lam), lam))))
    lams = jnp.array([0.1, 0.95, 0.5, 1.5])  # Converged, slow, converged, diverging.
    if on_failure == "raise":
        with pytest.raises(jax.errors.JaxRuntimeError, match="the lower-level solve failed"):
            jax.block_until_ready(gradient(lams))
        lams = lams[::2]
        np.testing.assert_allclose(gradient(lams), 1 / (1 - lams) ** 2, rtol=1e-5)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = gradient(lams)
    np.testing.assert_allclose(got[::2], 1 / (1 - lams[::2]) ** 2, rtol=1e-5)
    assert list(jnp.isnan(got)) == [False, on_failure == "nan"] * 2
    if on_failure == "warn":
        texts = sorted(str(warning.message) for warning in caught)
        assert len(texts) == 2
        assert "DIVERGED" in texts[0]
        assert "MAX_STEPS" in texts[1]
    else:
        assert not caught


def test_the_message_says_which_solve_why_residual_tolerance_steps_and_what_to_try() -> None:
    with pytest.warns(fg.SolveFailedWarning) as caught:
        jax.grad(function_of("lower-level solve", "warn"))(jnp.asarray(0.5))
    # From w₀ = 0 to w₂ = 1.5: Φ(w₂) − w₂ = 0.25, and Φ(w₂) = 1.75.
    expected = (
        "the lower-level solve failed: MAX_STEPS after 2 steps, residual 0.25 (tolerance 1.75e-09); "
        "raise `max_steps`, take a method that needs fewer (`newton`, `dense`), loosen `rtol`/`atol` "
        "where they are finer than you need, or start closer."
    )
    assert str(caught[0].message) == expected


@pytest.mark.parametrize("status", [s for s in fg.Status if is_failure(jnp.asarray(s))])
def test_every_kind_of_failure_has_its_own_advice(status: fg.Status) -> None:
    text = describe("linear solve", solve_info(7, 0.125, status, 0.5))
    assert f"failed: {status.name} after 7 steps, residual 0.125 (tolerance 0.5); " in text
    others = (describe("linear solve", solve_info(7, 0.125, s, 0.5)) for s in fg.Status if s > 3)
    advice = text.partition("; ")[2]
    assert len(advice) > 20
    assert sum(advice in other for other in others) == 1


def test_a_solve_of_exact_steps_that_broke_down_names_no_tolerance() -> None:
    info = solve_info(3, jnp.nan, fg.Status.NON_FINITE)
    assert "residual nan; NaN or infinity appeared" in describe("linear solve", info)


class Case(NamedTuple):
    """A map w ↦ M w + λ, a linear solver, and how the two solves must end."""

    name: str
    m: Any
    linear_solver: fg.LinearSolver
    linear: fg.Status
    lower: fg.Status = fg.Status.CONVERGED
    fails: bool = True


_DIAGONAL, _TURN = np.diag([0.5, -0.25]), np.array([[0, 0.6], [-0.6, 0.1]])
_UNTIL = {"max_steps": 60, "rtol": 1e-9}
S = fg.Status
CASES = (
    Case("met tolerance", _DIAGONAL, fg.cg(**_UNTIL), S.CONVERGED, fails=False),
    Case("exact steps", _DIAGONAL, fg.fp(num_steps=60), S.FIXED_STEPS, fails=False),
    Case("rounding floor", _DIAGONAL, fg.fp(max_steps=99), S.AT_FLOOR, fails=False),
    Case("growth in exact steps", np.diag([-2, 0.5]), fg.fp(num_steps=9), S.NO_PROGRESS),
    Case("few steps", _DIAGONAL, fg.fp(max_steps=3, rtol=1e-9), S.MAX_STEPS),
    Case("spectral radius above one", np.diag([-2, 0.5]), fg.fp(**_UNTIL), S.DIVERGED),
    Case("indefinite", np.diag([2, 0.5]), fg.cg(**_UNTIL), S.INDEFINITE),
    Case("indefinite, exact steps", np.diag([2, 0.5]), fg.cg(num_steps=2), S.INDEFINITE),
    Case("not symmetric", _TURN, fg.cg(**_UNTIL), S.NOT_SYMMETRIC),
    Case("not symmetric, exact steps", _TURN, fg.cg(num_steps=3), S.NOT_SYMMETRIC),
    Case("singular by cg", np.eye(2), fg.cg(**_UNTIL), S.SINGULAR, S.NON_FINITE),
    Case("singular by gmres", np.eye(2), fg.gmres(**_UNTIL), S.SINGULAR, S.NON_FINITE),
    Case("singular by LU", np.eye(2), fg.dense(), S.SINGULAR, S.NON_FINITE),
    Case("NaN in the map", np.diag([np.nan, 0.5]), fg.gmres(**_UNTIL), S.NON_FINITE, S.NON_FINITE),
    Case(
        "NaN, exact steps", np.diag([np.nan, 0.5]), fg.fp(num_steps=3), S.NON_FINITE, S.NON_FINITE
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[ ,]+", "-", case.name))
def test_each_failure_has_its_code_readable_under_jit_and_vmap(case: Case) -> None:
    def affine(w: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.asarray(case.m) @ w + lam

    def direct(w0: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(jnp.eye(w0.size) - case.m, lam)

    solver = fg.with_tolerance(direct, affine, rtol=1e-9)
    outer = lambda w, _: jnp.vdot(np.array([1.0, 2.0]), w)  # noqa: E731
    hypergrad = fg.hypergradient(outer, affine, solver, fg.aid(case.linear_solver))
    state = hypergrad.init(np.zeros(2), np.ones(2))
    batch = jnp.stack([jnp.ones(2), 2 * jnp.ones(2)])
    gradients, states = jax.jit(jax.vmap(hypergrad.update, (None, 0)))(state, batch)
    for i in range(2):
        status, residual = (x[i] for x in (states.info.linear.status, states.info.linear.residual))
        # On some processors rounding leaves no residual at all, which meets any tolerance.
        exact = case.linear == S.AT_FLOOR and residual == 0
        assert fg.Status(int(status)) == (S.CONVERGED if exact else case.linear)
        assert fg.Status(int(states.info.lower.status[i])) == case.lower
    assert bool(jnp.all(jnp.isnan(gradients))) == case.fails
    assert bool(jnp.all(jnp.isfinite(gradients))) != case.fails


def test_the_codes_keep_their_numbers() -> None:
    names = (
        "NOT_RUN CONVERGED FIXED_STEPS AT_FLOOR NO_PROGRESS MAX_STEPS DIVERGED INDEFINITE "
        "NOT_SYMMETRIC SINGULAR NON_FINITE NOT_FIXED TOO_FEW_STEPS NOT_A_MEAN"
    )
    assert [status.name for status in sorted(fg.Status)] == names.split()
    assert [int(status) for status in sorted(fg.Status)] == list(range(14))


@pytest.mark.parametrize("estimator", [fg.itd(), fg.aid(fg.fp(num_steps=5))], ids=["itd", "aid"])
def test_a_non_finite_result_of_exact_steps_stays_non_finite(estimator: fg.Estimator) -> None:
    solve = fg.fixed_point(phi, estimator, on_failure="ignore")(fg.picard(phi, num_steps=40))
    assert not jnp.isfinite(jax.grad(lambda lam: solve(0.0, lam))(1e30))


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_itd_through_a_solve_that_missed_its_tolerance_is_nan(mode: Any) -> None:
    solver = fg.with_tolerance(lambda w0, lam: phi(phi(w0, lam), lam), phi, rtol=1e-9)
    for on_failure, lost in (("nan", True), ("ignore", False)):
        solve = fg.fixed_point(phi, fg.itd(), on_failure=on_failure)(solver)
        got = mode(lambda lam, solve=solve: solve(0.0, lam))(0.5)
        assert bool(jnp.isnan(got)) == lost


def test_nan_in_the_cotangent_is_reported_as_such() -> None:
    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sqrt(w - w) * lam,  # Its derivative in w is infinite times zero.
        phi,
        fg.picard(phi, max_steps=200, rtol=1e-9),
        fg.aid(fg.cg(**_UNTIL)),
    )
    gradient, state = hypergrad.update(hypergrad.init(0.0, 0.5), 0.5)
    assert jnp.isnan(gradient)
    assert state.info.lower.converged
    assert fg.Status(int(state.info.linear.status)) == S.NON_FINITE


def _expansion(w: jax.Array, lam: jax.Array) -> jax.Array:
    return -1.5 * w + lam


def _cycle(w: jax.Array, lam: jax.Array) -> jax.Array:
    return lam - w


def _turn(w: jax.Array, lam: jax.Array) -> jax.Array:
    return (
        w - jnp.roll(w, 1) + lam
    )  # I − J is a cyclic shift: GMRES stands still until the last step.


_NOWHERE = (
    ("fp, expansion", _expansion, 2.5, fg.aid(fg.fp(num_steps=5))),
    ("truncated_itd, expansion", _expansion, 2.5, fg.truncated_itd(num_steps=5)),
    ("fp, two-cycle", _cycle, 2.0, fg.aid(fg.fp(num_steps=4))),
    ("truncated_itd, two-cycle", _cycle, 2.0, fg.truncated_itd(num_steps=4)),
    ("gmres, stagnation", _turn, 1.0, fg.aid(fg.gmres(num_steps=3))),
)


@pytest.mark.slow(but=("aid-cg*", "*cg*"))
@pytest.mark.parametrize("row", _NOWHERE, ids=lambda row: row[0].replace(", ", "-"))
def test_exact_steps_that_lead_nowhere_are_no_derivative(row: Any) -> None:
    _, phi, divisor, estimator = row

    def solver(w0: jax.Array, lam: jax.Array) -> jax.Array:
        return (jnp.roll(lam, -1) if phi is _turn else lam / divisor) + 0 * w0

    def gradient(on_failure: Any) -> jax.Array:
        solve = fg.fixed_point(phi, estimator, on_failure=on_failure)(solver)
        return jax.grad(lambda lam: solve(jnp.zeros(5), lam)[0])(jnp.arange(1.0, 6.0))

    assert jnp.all(jnp.isnan(gradient("nan")))
    assert jnp.all(jnp.isfinite(gradient("ignore")))  # They may be asked for.
    explicit = fg.hypergradient(lambda w, _: w[0], phi, solver, estimator)
    lam = jnp.arange(1.0, 6.0)
    _, state = explicit.update(explicit.init(jnp.zeros(5), lam), lam)
    assert fg.Status(int(state.info.linear.status)) == S.NO_PROGRESS


def _root(w: jax.Array, lam: jax.Array) -> jax.Array:
    return 3.0 * w - lam


@pytest.mark.parametrize(
    "estimator", [fg.aid(fg.dense()), fg.truncated_itd(num_steps=1)], ids=["aid", "truncated_itd"]
)
def test_a_residual_in_the_place_of_phi_is_seen(estimator: fg.Estimator) -> None:
    def solver(w0: jax.Array, lam: jax.Array) -> jax.Array:
        return lam / 3.0 + 0 * w0

    solve = fg.fixed_point(_root, estimator)(solver)
    assert jnp.isnan(jax.grad(lambda lam: solve(0.0, lam))(1.0))
    explicit = fg.hypergradient(lambda w, _: w, _root, solver, estimator)
    gradient, state = explicit.update(explicit.init(0.0, 1.0), 1.0)
    assert jnp.isnan(gradient)
    assert fg.Status(int(state.info.lower.status)) == S.NOT_FIXED
    with pytest.warns(fg.SolveFailedWarning, match="is `phi` the residual F"):
        fg.fixed_point(_root, estimator, on_failure="warn")(solver)(0.0, 1.0)


@pytest.mark.parametrize("w0", [0.0, 1.0, 1e3])
def test_a_solution_that_is_zero_is_a_fixed_point(w0: float) -> None:
    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return lam - 0.95 * w

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=700))
    assert float(jax.grad(lambda lam: solve(w0, lam))(0.0)) == pytest.approx(1 / 1.95)


@pytest.mark.parametrize(("slope", "num_steps"), [(-0.5, 20), (-0.9, 60)])
def test_a_solution_that_is_zero_is_a_fixed_point_for_a_loop_of_one_s_own(slope, num_steps) -> None:
    phi = lambda w, lam: slope * w + lam  # noqa: E731
    loop = lambda w0, lam: jax.lax.fori_loop(0, num_steps, lambda _, w: phi(w, lam), w0)  # noqa: E731
    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(loop)
    got = jax.grad(lambda lam: solve(jnp.asarray(1.0), lam))(jnp.asarray(0.0))
    assert float(got) == pytest.approx(1 / (1 - slope))


def test_few_steps_from_far_away_are_still_differentiated() -> None:
    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return 0.8 * w + lam

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=1))
    assert float(jax.grad(lambda lam: solve(0.0, lam))(1.0)) == pytest.approx(5.0)


def test_the_policy_of_the_value_is_that_of_the_derivative() -> None:
    slow = lambda w, lam: 0.99 * w + lam  # noqa: E731
    solver = fg.picard(slow, max_steps=3, rtol=1e-9)
    values = {
        policy: fg.fixed_point(slow, fg.aid(fg.dense()), on_failure=policy)(solver)(0.0, 1.0)
        for policy in ("nan", "zero", "ignore")
    }
    assert jnp.isnan(values["nan"])
    assert values["zero"] == values["ignore"] == solver.with_info(0.0, 1.0)[0]
    with pytest.warns(fg.SolveFailedWarning, match="lower-level solve failed"):
        fg.fixed_point(slow, fg.aid(fg.dense()), on_failure="warn")(solver)(0.0, 1.0)
    fine = fg.fixed_point(slow, fg.aid(fg.dense()))(fg.picard(slow, max_steps=4000, rtol=1e-9))
    assert jnp.isnan(fine(0.0, jnp.nan))  # NaN in, NaN out: not w₀.


@pytest.mark.parametrize("estimator", [fg.aid(fg.dense()), fg.forward(fg.aid(fg.gmres(**_UNTIL)))])
def test_an_element_that_failed_can_be_left_out_of_what_all_share(estimator: fg.Estimator) -> None:
    def phi(w: jax.Array, lam: jax.Array, x: jax.Array) -> jax.Array:
        return x * w + lam

    solve = fg.fixed_point(phi, estimator, on_failure="zero")(
        fg.picard(phi, max_steps=300, rtol=1e-10)
    )
    x = jnp.array([0.5, 0.999, 0.25])  # The second is too slow for that many steps.
    total = jax.jit(jax.grad(lambda lam: jnp.sum(jax.vmap(lambda x: solve(0.0, lam, x))(x))))
    assert float(total(1.0)) == pytest.approx(2 + 4 / 3, rel=1e-8)
