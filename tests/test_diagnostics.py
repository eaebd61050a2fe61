"""`recommend` and `check`: what they find, what they choose, what they say."""

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


def test_a_step_above_two_over_l_is_named(overshooting):
    assert overshooting.spectral_radius > 1.25
    assert any("step size above 2/L" in w for w in overshooting.warnings)
    assert any("not a contraction" in w for w in overshooting.warnings)
    assert not any(a.name.startswith("aid(fp(") for a in overshooting.alternatives)


def test_an_indefinite_lower_level_is_named():
    advice = advise(symmetric(0.0, 1.5))
    assert not advice.definite
    assert any("positive definite" in w for w in advice.warnings)
    assert not advice.name.startswith("aid(cg(")


def test_a_lower_level_without_a_fixed_point_is_named():
    advice = fg.recommend(outer, lambda w, lam: w + 1 + 0.0 * lam, jnp.zeros(SIZE), jnp.ones(SIZE))
    assert any("not solved" in w for w in advice.warnings)


def test_the_alternatives_are_sorted_by_cost_and_print(contractive):
    costs = [a.cost for a in contractive.alternatives if a.usable]
    assert costs == sorted(costs)
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
    return fg.check(solve, outer, phi, jnp.zeros(SIZE), jnp.ones(SIZE))


def test_a_right_gradient_agrees_with_all_three():
    found = checked(fg.aid(fg.dense()))
    assert found.disagree == ()
    assert max(found.against_polished, found.against_itd, found.against_difference) < 1e-5
    assert found.certificate.valid
    assert "all agree" in str(found)


def test_a_gradient_cut_short_disagrees_with_all_three():
    found = checked(fg.aid(fg.fp(num_steps=2)))
    assert found.disagree == ("polished", "ITD", "finite difference")
    assert "disagrees with: polished, ITD, finite difference" in str(found)


def test_a_wrong_derivative_rule_is_caught_by_all():
    @jax.custom_vjp
    def solve(w0, lam):
        del w0
        return jnp.linalg.solve(jnp.eye(SIZE) - symmetric(-0.2, 0.9), lam)

    solve.defvjp(lambda w0, lam: (solve(w0, lam), None), lambda _, g: (0 * g, g))
    found = fg.check(solve, outer, affine(symmetric(-0.2, 0.9)), jnp.zeros(SIZE), jnp.ones(SIZE))
    assert set(found.disagree) == {"polished", "ITD", "finite difference"}


def test_the_choice_for_the_paper_s_problems_is_near_the_best_of_the_alternatives():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from experiments import problems

    setting = problems.biased_regularization(jax.random.key(0), problems.Sizes(60, SIZE))
    lam = setting.sample(jax.random.key(1))
    step, _ = fg.optimal_step_size(*setting.curvature(lam))
    phi = fg.gradient_descent(setting.loss, step_size=step)
    advice = fg.recommend(setting.outer, phi, jnp.zeros(SIZE), lam)
    assert advice.symmetric
    assert (
        advice.name == min((a for a in advice.alternatives if a.usable), key=lambda a: a.cost).name
    )
    w = jax.jit(lambda: fg.picard(phi, num_steps=400)(jnp.zeros(SIZE), lam))()
    v = advice.estimator.bwd(
        phi, (w, lam), jax.grad(setting.outer)(w, lam), lambda s, m, b: s(m, b)
    )
    exact = setting.exact(lam)
    assert np.linalg.norm(v.args_bar - exact) <= 1e-2 * np.linalg.norm(exact)


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


@pytest.mark.parametrize("case", RIGHT)
def test_check_accuses_nothing_that_is_right(case):
    phi, outer, lam, solver = RIGHT[case]
    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(solver)
    assert fg.check(solve, outer, phi, 0.0, lam).disagree == ()


def test_check_misses_no_gradient_that_was_cut():
    phi = affine(symmetric(-0.2, 0.9))
    solver = fg.picard(phi, num_steps=300)
    found = fg.check(
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
    assert advice.name == "itd()"


def test_a_map_with_next_to_no_jacobian_counts_as_symmetric():
    noise = 1e-15 * np.random.default_rng(0).normal(size=(SIZE, SIZE))
    assert advise(noise).symmetric


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
            solve = fg.fixed_point(phi, alternative.estimator)(lambda w0, lam: w0)
            g = jax.grad(lambda lam, s=solve: along(s(0 * ones, lam), lam))(ones)
            assert np.linalg.norm(g - exact) <= 1.01e-3 * np.linalg.norm(exact), alternative.name
