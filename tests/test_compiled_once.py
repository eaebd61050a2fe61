"""Every public call, made again with the same functions, options and shapes, traces nothing."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg

W0, LAM = jnp.zeros(5), jnp.linspace(0.1, 0.5, 5)


class Traced:
    """w ↦ ½ cos w + λ, and E, with the number of times that Python code of either ran."""

    def __init__(self):
        self.calls = 0

    def phi(self, w, lam):
        self.calls += 1
        return 0.5 * jnp.cos(w) + lam

    def outer(self, w, lam):
        self.calls += 1
        return jnp.sum(w**2) + 0.0 * jnp.sum(lam)


def functions(traced):
    """Functions, not methods: those would be other objects each time."""
    return (lambda w, lam: traced.phi(w, lam)), (lambda w, lam: traced.outer(w, lam))


def of_hypergradient(make):
    def calls(traced):
        phi, outer = functions(traced)
        hypergrad = make(outer, phi)
        return lambda: hypergrad.update(hypergrad.init(W0, LAM), LAM)

    return calls


def explicit(outer, phi, **options):
    solver = fg.picard(phi, max_steps=90, rtol=1e-9)
    return fg.hypergradient(outer, phi, solver, fg.aid(fg.cg(max_steps=9, rtol=1e-8)), **options)


def certify(traced):
    phi, outer = functions(traced)
    return lambda: fg.certify(outer, phi, W0, None, LAM)


def certify_proved(traced):
    phi, outer = functions(traced)
    constants = fg.bounds.contraction_constants(
        q=0.5, D=2.0, L_E=4.0, L_Phi=1.0, nu1=0.5, nu2=0.0, eta1=2.0, eta2=0.0
    )
    return lambda: fg.certify_proved(outer, phi, W0, None, LAM, constants=constants)


def recommend(traced):
    phi, outer = functions(traced)
    return lambda: fg.recommend(outer, phi, W0, LAM).spectral_radius


def check_gradient(traced):
    phi, outer = functions(traced)
    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=60))
    return lambda: fg.check_gradient(solve, outer, phi, W0, LAM).gradient


def solver(make):
    def calls(traced):
        phi, _ = functions(traced)
        solve = make(phi)
        return lambda: (solve(W0, LAM), solve.with_info(W0, LAM))

    return calls


def decorated(traced):
    phi, outer = functions(traced)
    solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=5))
    return lambda: (solve(W0, LAM), jax.grad(lambda lam: outer(solve(W0, lam), W0))(LAM))


def outer_loop(method):
    def calls(traced):
        phi, outer = functions(traced)
        loop = fg.bilevel(explicit(outer, phi, start=fg.warm()), optax.sgd(0.1))
        lengths = iter((2, 3, 5))

        def call():
            state = loop.init(W0, LAM)
            return (
                loop.step(state) if method == "step" else loop.run(state, num_steps=next(lengths))
            )

        return call

    return calls


CALLS = {
    "hypergradient": of_hypergradient(explicit),
    "warm": of_hypergradient(lambda outer, phi: explicit(outer, phi, start=fg.warm())),
    "certified": of_hypergradient(lambda outer, phi: fg.certified(explicit(outer, phi))),
    "certified, every second": of_hypergradient(
        lambda outer, phi: fg.certified(explicit(outer, phi), every=2)
    ),
    "polished": of_hypergradient(lambda outer, phi: fg.polished(explicit(outer, phi))),
    "adaptive": of_hypergradient(
        lambda outer, phi: fg.adaptive_hypergradient(outer, phi, rtol=1e-3)
    ),
    "certify": certify,
    "certify_proved": certify_proved,
    "recommend": recommend,
    "check_gradient": check_gradient,
    "picard": solver(lambda phi: fg.picard(phi, max_steps=90, rtol=1e-9)),
    "picard, exact steps": solver(lambda phi: fg.picard(phi, num_steps=9)),
    "anderson": solver(lambda phi: fg.anderson(phi, max_steps=90, rtol=1e-9)),
    "broyden": solver(lambda phi: fg.broyden(phi, max_steps=90, rtol=1e-9)),
    "newton": solver(lambda phi: fg.newton(phi, max_steps=90, rtol=1e-9)),
    "decorated": decorated,
    "step": outer_loop("step"),
    "run": outer_loop("run"),
}


@pytest.mark.slow(but=("hypergradient", "certify", "picard*", "decorated", "step", "run"))
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_traces_nothing(name):
    traced = Traced()
    call = CALLS[name](traced)
    first = call()
    before = traced.calls
    assert before > 0
    second = call()
    by_hand = 1 if name == "decorated" else 0  # That E is called by the test itself.
    assert traced.calls == before + by_hand
    if name != "run":  # Which takes another number of steps.
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow(but=("hypergradient", "certify", "picard", "run"))
@pytest.mark.parametrize("name", CALLS)
def test_what_was_compiled_goes_with_the_functions(name):
    def made_and_dropped():
        traced = Traced()
        CALLS[name](traced)()
        return weakref.ref(traced)

    kept = made_and_dropped()
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_options_of_a_certificate_are_not_mixed_up():
    traced = Traced()
    phi, outer = functions(traced)
    errors = [
        float(fg.certify(outer, phi, W0, None, LAM, safety=safety).error)
        for safety in (1.5, 3.0, 1.5)
    ]
    assert errors[0] == errors[2] != errors[1]
    tight = fg.certify(outer, phi, W0, None, LAM, make_linear_solver=lambda rtol: fg.dense())
    assert int(tight.products.j) != int(fg.certify(outer, phi, W0, None, LAM).products.j)


@pytest.mark.slow
def test_a_bound_method_and_a_callable_without_a_hash_are_certified_too():
    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, w, lam):
            return 0.5 * jnp.cos(w) + lam

    traced = Traced()
    for phi in (traced.phi, Unhashable()):
        certificate = fg.certify(traced.outer, phi, W0, None, LAM)
        assert bool(jnp.isfinite(certificate.error))


@pytest.mark.slow(but=("hypergradient",))
@pytest.mark.parametrize("name", ["hypergradient", "certified", "adaptive"])
def test_made_within_a_trace_it_closes_over_what_is_traced(name):
    def gradient(scale):
        def phi(w, lam):
            return 0.5 * scale * jnp.cos(w) + lam

        def outer(w, lam):
            return jnp.sum(w**2) + 0.0 * jnp.sum(lam)

        hypergrad = {
            "hypergradient": explicit,
            "certified": lambda *of: fg.certified(explicit(*of)),
            "adaptive": lambda *of: fg.adaptive_hypergradient(*of, rtol=1e-6),
        }[name](outer, phi)
        return hypergrad.update(hypergrad.init(W0, LAM), LAM)[0]

    scales = jnp.array([0.5, 1.0])
    batched = jax.jit(jax.vmap(gradient))(scales)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(batched[i], gradient(scale), rtol=1e-6)
    assert float(jnp.max(jnp.abs(batched[0] - batched[1]))) > 1e-2


@pytest.mark.slow
def test_leaves_of_lam_that_are_no_arrays_come_back_in_the_gradient():
    lam = {"value": LAM, "kind": "ridge", "count": jnp.int32(3)}

    def phi(w, lam):
        return 0.5 * jnp.cos(w) + lam["value"] * lam["count"].astype(float)

    def outer(w, lam):
        return jnp.sum(w**2) + 0.0 * jnp.sum(lam["value"])

    plain = explicit(outer, phi)
    for hypergrad in (plain, fg.certified(plain), fg.certified(plain, every=2)):
        _, state = hypergrad.update(hypergrad.init(W0, lam), lam)
        grad, state = hypergrad.update(state, lam)
        assert grad["kind"] == "ridge"
        assert grad["count"].dtype == jax.dtypes.float0
        assert bool(jnp.all(jnp.isfinite(grad["value"])))
    assert state.certificate.gradient["kind"] == "ridge"
