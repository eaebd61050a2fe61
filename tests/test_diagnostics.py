"""`recommend` and `check_gradient`: what they find, what they choose, what they say."""

import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg

SIZE = 20


def symmetric(low: float, high: float, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with eigenvalues from `low` to `high`."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))
    return basis @ np.diag(np.linspace(low, high, SIZE)) @ basis.T


def affine(a):
    return lambda w, lam: jnp.asarray(a) @ w + lam


def outer(w, lam):
    return 0.5 * jnp.sum((w - 1) ** 2) + 0.0 * jnp.sum(lam)


def advise(a, **options):
    return fg.recommend(outer, affine(a), jnp.zeros(SIZE), jnp.ones(SIZE), **options)


@pytest.fixture(scope="module")
def contractive():
    return advise(symmetric(-0.2, 0.9))


@pytest.fixture(scope="module")
def rotating():
    a = np.random.default_rng(3).normal(size=(SIZE, SIZE))
    return 0.8 * (a - a.T) / np.linalg.norm(a - a.T, 2)


@pytest.fixture(scope="module")
def skew(rotating):
    return advise(rotating)


@pytest.fixture(scope="module")
def overshooting():
    return advise(symmetric(-1.3, 0.5))


@pytest.mark.slow
def test_the_spectrum_of_a_symmetric_map_is_found(contractive):
    assert contractive.symmetric
    assert contractive.definite
    assert contractive.size == SIZE
    np.testing.assert_allclose(contractive.spectral_radius, 0.9, rtol=1e-2)
    np.testing.assert_allclose(contractive.norm, 0.9, rtol=1e-2)
    np.testing.assert_allclose(contractive.condition, 1.2 / 0.1, rtol=0.1)
    assert contractive.warnings == ()
    assert contractive.residual < 1e-4


def test_cg_is_offered_for_symmetric_maps_only(contractive, skew):
    assert any("cg(" in a.name for a in contractive.alternatives)
    assert not any(a.name.startswith("aid(cg(") for a in skew.alternatives)
    assert not skew.symmetric
    assert any("not symmetric" in w for w in skew.warnings)


def test_the_recommended_estimator_is_ready_to_use(contractive, skew, rotating):
    for advice, a in ((contractive, symmetric(-0.2, 0.9)), (skew, rotating)):
        phi = affine(a)
        solve = fg.fixed_point(phi, advice.estimator)(fg.picard(phi, num_steps=400))
        g = jax.jit(jax.grad(lambda lam, s=solve: outer(s(jnp.zeros(SIZE), lam), lam)))(
            jnp.ones(SIZE)
        )
        inverse = np.linalg.inv(np.eye(SIZE) - a)
        exact = inverse.T @ (inverse @ np.ones(SIZE) - 1)
        assert np.linalg.norm(g - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.slow
def test_a_step_above_two_over_l_is_named(overshooting):
    assert overshooting.spectral_radius > 1.25
    # 2/2.3 = 0.87 of the step is 2/L, and 2/(2.3 + 0.5) = 0.71 of it is 2/(L + mu).
    text = "\n".join(overshooting.warnings)
    found = re.search(
        r"2/L. Phi contracts below (\S+) times this step, and best at (\S+) times", text
    )
    np.testing.assert_allclose([float(x) for x in found.groups()], [2 / 2.3, 2 / 2.8], rtol=0.02)
    assert any("not a contraction" in w for w in overshooting.warnings)
    assert not any(a.name.startswith("aid(fp(") for a in overshooting.alternatives)


@pytest.mark.slow
def test_an_indefinite_lower_level_is_named():
    advice = advise(symmetric(0.0, 1.5))
    assert not advice.definite
    assert any("positive definite" in w for w in advice.warnings)
    assert not advice.name.startswith("aid(cg(")


def test_nothing_is_recommended_where_nothing_works():
    advice = fg.recommend(outer, lambda w, lam: w + 1 + 0.0 * lam, jnp.zeros(SIZE), jnp.ones(SIZE))
    assert any("not solved" in w for w in advice.warnings)
    assert advice.estimator is None
    assert advice.name == "nothing"
    assert not any(a.usable for a in advice.alternatives)
    text = str(advice)
    assert text.startswith("recommended: nothing works here\n")
    assert "the lower level was not solved, and Phi does not contract (rho(J) = 1)" in text


@pytest.mark.slow
def test_a_solver_of_yours_says_where_the_lower_level_is():
    def phi(
        w, lam
    ):  # From 0, Newton's method does not come to one of the wells, as descent does not.
        return w - 0.1 * (w**3 - w) + 0 * lam

    at_a_saddle = fg.recommend(outer, phi, jnp.zeros(2), jnp.ones(2))
    in_a_well = fg.recommend(
        outer, phi, jnp.zeros(2), jnp.ones(2), solver=lambda w0, lam: w0 + jnp.sign(lam)
    )
    assert at_a_saddle.spectral_radius > 1
    np.testing.assert_allclose(in_a_well.spectral_radius, 0.8)
    assert in_a_well.residual == 0
    assert in_a_well.estimator is not None


@pytest.mark.slow
def test_the_products_of_a_recommendation_are_bounded():
    # I - J is so ill-conditioned that the methods want more steps than they get.
    advice = advise(symmetric(-0.9, 0.99999), max_products=100)
    few = [a for a in advice.alternatives if not a.usable and a.name.startswith("aid(fp(")]
    assert [a.why for a in few] == ["MAX_STEPS"]
    assert all(a.products <= 100 for a in few)
    assert advice.name == "aid(dense())"
    with pytest.raises(ValueError, match="`max_products` of `recommend`"):
        advise(symmetric(0.0, 0.5), max_products=0)


def test_the_alternatives_are_sorted_by_time_and_print(contractive):
    *seconds, unrolled = (a.seconds for a in contractive.alternatives if a.usable)
    assert seconds == sorted(seconds)
    assert math.isnan(unrolled)
    text = str(contractive)
    assert text.startswith(f"recommended: {contractive.name}")
    for a in contractive.alternatives:
        assert a.name in text
        assert a.memory > 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`rtol` of `recommend`"):
        advise(symmetric(0.0, 0.5), rtol=2.0)
    with pytest.raises(TypeError, match="`outer` of `recommend`"):
        fg.recommend(None, affine(symmetric(0.0, 0.5)), jnp.zeros(SIZE), jnp.ones(SIZE))  # pyright: ignore


def checked(estimator, steps=300):
    phi = affine(symmetric(-0.2, 0.9))
    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=steps))
    return fg.check_gradient(solve, outer, phi, jnp.zeros(SIZE), jnp.ones(SIZE))


def test_a_right_gradient_agrees_with_all_three():
    found = checked(fg.aid(fg.dense()))
    assert found.disagree == ()
    assert found.agree == ("polished", "ITD", "finite difference")
    for answer in (found.polished, found.itd, found.finite_difference):
        assert answer.difference < 1e-5
    assert found.certificate.valid
    assert "all agree" in str(found)


@pytest.mark.slow
def test_a_gradient_cut_short_disagrees_with_all_three():
    found = checked(fg.aid(fg.fp(num_steps=2)))
    assert found.disagree == ("polished", "ITD", "finite difference")
    assert "disagrees with: polished, ITD, finite difference" in str(found)


@pytest.mark.slow
def test_a_wrong_derivative_rule_is_caught_by_all():
    @jax.custom_vjp
    def solve(w0, lam):
        del w0
        return jnp.linalg.solve(jnp.eye(SIZE) - symmetric(-0.2, 0.9), lam)

    solve.defvjp(lambda w0, lam: (solve(w0, lam), None), lambda _, g: (0 * g, g))
    found = fg.check_gradient(
        solve, outer, affine(symmetric(-0.2, 0.9)), jnp.zeros(SIZE), jnp.ones(SIZE)
    )
    assert set(found.disagree) == {"polished", "ITD", "finite difference"}


@pytest.mark.slow
def test_the_choice_for_the_paper_s_problems_is_near_the_best_of_the_alternatives():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from experiments.problems import synthetic

    setting = synthetic.biased_regularization(jax.random.key(0), synthetic.Sizes(60, SIZE))
    lam = setting.sample(jax.random.key(1))
    step, _ = fg.optimal_step_size(*setting.curvature(lam))
    phi = fg.gradient_descent(setting.loss, step_size=step)
    advice = fg.recommend(setting.outer, phi, jnp.zeros(SIZE), lam)
    assert advice.symmetric
    times = {a.name: a.seconds for a in advice.alternatives if a.usable and a.name != "itd()"}
    assert times[advice.name] <= 1.2 * min(times.values())
    w = jax.jit(lambda: fg.picard(phi, num_steps=400)(jnp.zeros(SIZE), lam))()
    hypergrad = fg.hypergradient(setting.outer, phi, lambda w0, lam: w0, advice.estimator)
    grad, _ = hypergrad.update(hypergrad.init(w, lam), lam)
    exact = setting.exact(lam)
    assert np.linalg.norm(grad - exact) <= 1e-2 * np.linalg.norm(exact)


RIGHT = {
    # Each was accused once. Φ, E, λ, and the fixed point as the solver.
    "a map that contracts slowly": (
        lambda w, lam: 0.9999 * w + lam,
        lambda w, lam: w**2,
        1.0,
        lambda w0, lam: lam / 1e-4,
    ),
    "a map that expands": (
        lambda w, lam: -1.5 * w + lam,
        lambda w, lam: (w - 1) ** 2,
        1.0,
        lambda w0, lam: lam / 2.5,
    ),
    "an optimum": (
        lambda w, lam: 0.5 * w + 0.5 * lam,
        lambda w, lam: (w - 1) ** 2,
        1.0,
        lambda w0, lam: 1.0 * lam,
    ),
    "a small lam": (
        lambda w, lam: 0.5 * w + 1e8 * lam,
        lambda w, lam: (w - 0.3) ** 2,
        1e-8,
        lambda w0, lam: 2e8 * lam,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT)
def test_check_accuses_nothing_that_is_right(case):
    phi, outer, lam, solver = RIGHT[case]
    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(solver)
    assert fg.check_gradient(solve, outer, phi, 0.0, lam).disagree == ()


def _quadratic(w, lam):  # F = 0 where w = λ; as Φ it has other fixed points, or none.
    return 3.0 * (w - lam)


# The residual F of a solver of F(w, λ) = 0 in Φ's place; F, E.
RESIDUALS = {
    "linear objective": (_quadratic, lambda w, lam: jnp.sum(w)),
    "quadratic objective": (_quadratic, lambda w, lam: jnp.sum((w - 0.3) ** 2)),
    "the plain gradient of half a square": (
        lambda w, lam: w - lam,
        lambda w, lam: jnp.sum((w - 0.3) ** 2),
    ),
    "an unsolvable system": (lambda w, lam: w - lam, lambda w, lam: jnp.sum(w)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESIDUALS)
def test_a_residual_in_the_place_of_phi_is_found_out(case):
    residual, outer = RESIDUALS[case]
    solve = fg.fixed_point(residual, fg.aid(fg.dense()), on_failure="ignore")(
        lambda w0, lam: 0 * w0 + lam
    )
    found = fg.check_gradient(solve, outer, residual, jnp.zeros(2), jnp.array([1.0, -2.0]))
    assert found.agree == ()
    assert "finite difference" in found.disagree or not np.isfinite(found.gradient).all()
    assert any("is `phi` the residual F(w, lam)? Then Phi = w - F" in w for w in found.warnings)
    assert "all agree" not in str(found)


@pytest.mark.slow
def test_an_invalid_certificate_is_no_witness():
    # Newton's method for arctan(w) = λ diverges from |w| > 1.4, where the solver stopped.
    def phi(w, lam):
        return w - jnp.arctan(w - lam)

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(lambda w0, lam: w0)
    found = fg.check_gradient(solve, lambda w, lam: w**2, phi, 40.0, 0.0)
    assert not found.certificate.valid
    assert found.polished.verdict == "inconclusive"
    assert found.polished.why == "the certificate is not valid: FAR"


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.9969, 0.9999999])
def test_a_right_gradient_beside_a_kink_is_not_accused(lam):
    def phi(w, lam):  # The Lasso with three features; the first one leaves at λ = 1.
        u = 0.5 * (w + jnp.array([1.0, 2.0, 3.0], jnp.float32))
        return jnp.sign(u) * jnp.maximum(jnp.abs(u) - jnp.float32(0.5) * lam, 0)

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=100))
    w0 = jnp.zeros(3, jnp.float32)
    found = fg.check_gradient(solve, lambda w, lam: jnp.sum(w), phi, w0, jnp.float32(lam))
    assert found.gradient == -3
    assert found.finite_difference.verdict == "inconclusive"
    assert found.agree == ("polished", "ITD")


@pytest.mark.slow
def test_a_complex_lambda_is_differenced_along_its_steepest_ascent():
    def phi(w, lam):
        return 0.4j * w + lam

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=80))
    w0, lam = jnp.zeros(2, complex), jnp.array([1.0 + 2j, 0.5j])
    found = fg.check_gradient(solve, lambda w, lam: jnp.sum(jnp.abs(w - 0.3) ** 2), phi, w0, lam)
    assert found.agree == ("polished", "ITD", "finite difference"), str(found)


@pytest.mark.slow
def test_a_difference_that_rounding_hides_is_inconclusive():
    def phi(w, lam):
        return 0.5 * w + lam

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(lambda w0, lam: 2 * lam)
    w0, lam = (jnp.asarray(x, jnp.float32) for x in (0.0, 1.0))
    found = fg.check_gradient(
        solve, lambda w, lam: 1e6 + jnp.asarray(1e-3, w.dtype) * w, phi, w0, lam
    )
    assert found.finite_difference.verdict == "inconclusive"
    assert found.agree == ("polished", "ITD")
    assert "inconclusive: finite difference" in str(found)


@pytest.mark.slow
def test_check_misses_no_gradient_that_was_cut():
    phi = affine(symmetric(-0.2, 0.9))
    solver = fg.picard(phi, num_steps=300)
    found = fg.check_gradient(
        lambda w0, lam: jax.lax.stop_gradient(solver(w0, lam)),
        outer,
        phi,
        jnp.zeros(SIZE),
        jnp.ones(SIZE),
    )
    assert found.disagree == ("polished", "ITD", "finite difference")


def test_a_lower_level_that_explodes_is_named():
    advice = fg.recommend(
        lambda w, lam: jnp.sum(w**2), lambda w, lam: w + w**2 + lam, jnp.ones(3), jnp.ones(3)
    )
    assert any("not solved" in w for w in advice.warnings)
    assert advice.name in ("itd()", "nothing")
    chosen = [a for a in advice.alternatives if a.name == advice.name]
    assert all(a.usable for a in chosen)


@pytest.mark.slow
def test_a_map_with_next_to_no_jacobian_counts_as_symmetric():
    noise = 1e-15 * np.random.default_rng(0).normal(size=(SIZE, SIZE))
    assert advise(noise).symmetric


@pytest.mark.slow
def test_the_recommended_tolerance_is_one_on_the_hypergradient():
    # E pulls along the small eigenvalues of I - J, where a residual says little.
    a = symmetric(0.0, 0.9999)
    values, basis = np.linalg.eigh(a)
    pull = basis @ (1e-3 / (1 - values) + 1.0)
    phi, ones = affine(a), jnp.ones(SIZE)

    def along(w, lam):
        return jnp.asarray(pull) @ w + 0 * jnp.sum(lam)

    advice = fg.recommend(along, phi, 0 * ones, ones)
    exact = np.linalg.solve(np.eye(SIZE) - a.T, pull)
    for alternative in advice.alternatives:
        if alternative.usable and alternative.name != "itd()":
            direct = lambda w0, lam: jnp.linalg.solve(jnp.eye(SIZE) - a, lam) + 0 * w0  # noqa: E731
            solve = fg.fixed_point(phi, alternative.estimator)(direct)
            g = jax.grad(lambda lam, s=solve: along(s(0 * ones, lam), lam))(ones)
            assert np.linalg.norm(g - exact) <= 1.01e-3 * np.linalg.norm(exact), alternative.name


@pytest.mark.slow
def test_a_map_that_draws_from_a_generator_is_named():
    generator = np.random.default_rng(0)

    def phi(w, lam):
        return 0.5 * w + lam + 1e-9 * generator.normal()

    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=60))
    found = fg.check_gradient(solve, lambda w, lam: w**2, phi, 0.0, 0.3)
    assert any("does `phi` draw from a random generator?" in text for text in found.warnings)


def test_advice_holds_where_the_condition_is_high():
    # I − J has the eigenvalues 1 to 1e-5: the residual at the reference says little of its error.
    curvature, target = jnp.geomspace(1.0, 1e-5, 20), jnp.linspace(-1.0, 1.0, 20)

    def phi(w, lam):
        return w - (curvature * (w - target) + 1e-5 * jnp.exp(lam) * w)

    def outer(w, lam):
        return jnp.sum((w - 0.5) ** 2) + 0.0 * lam

    advice = fg.recommend(outer, phi, jnp.zeros(20), 0.0)
    assert advice.estimator is not None
    assert advice.solver is not None
    solve = fg.fixed_point(phi, advice.estimator)(advice.solver)
    got = jax.grad(lambda lam: outer(solve(jnp.zeros(20), lam), lam))(0.0)
    a = curvature + 1e-5
    w = curvature * target / a
    want = float(-jnp.sum(2 * (w - 0.5) / a * 1e-5 * w))
    assert abs(got - want) <= 1e-2 * abs(want)
