"""What a derivative costs besides time: temporary memory, traces of Φ, compilations."""

import time

import jax
import jax.numpy as jnp
import pytest

import fixedgrad as fg

D = 400


def decay(w, lam):
    """A map whose products need no workspace: what memory is used is the estimator's."""
    return 0.5 * jnp.tanh(w) + lam


def temporary_bytes(function, *args):
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def compilations(jitted):
    return jitted._cache_size()


def objective(estimator, solver, phi=decay):
    solve = fg.fixed_point(phi, estimator)(solver)
    return lambda lam: jnp.sum(solve(jnp.zeros_like(lam), lam) ** 2)


LAM = jnp.linspace(0.1, 1.0, D)
AID = {
    "truncated_itd": fg.truncated_itd(num_steps=3),
    "fp": fg.aid(fg.fp(num_steps=20)),
    "cg": fg.aid(fg.cg(num_steps=20)),
    "cg rtol": fg.aid(fg.cg(max_steps=20, rtol=1e-6)),
    "normal_cg": fg.aid(fg.normal_cg(num_steps=20)),
    "gmres": fg.aid(fg.gmres(num_steps=20, restart=5)),
    "bicgstab": fg.aid(fg.bicgstab(num_steps=20)),
    "dense": fg.aid(fg.dense()),
}


@pytest.mark.slow(but=("*cg*",))
@pytest.mark.parametrize("name", AID)
def test_memory_of_aid_does_not_depend_on_the_iterations_of_the_lower_level(name):
    few, many = (
        temporary_bytes(jax.grad(objective(AID[name], fg.picard(decay, num_steps=t))), LAM)
        for t in (10, 10_000)
    )
    print(f"\n{name}: {few} bytes at t=10, {many} at t=10,000; w has {LAM.nbytes}")
    assert few == many
    if name not in ("truncated_itd", "dense"):
        assert many <= 20 * LAM.nbytes + 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver_with",
    [fg.fp, fg.cg, fg.normal_cg, fg.bicgstab, lambda num_steps: fg.gmres(num_steps=num_steps)],
    ids=["fp", "cg", "normal_cg", "bicgstab", "gmres"],
)
def test_memory_of_aid_does_not_depend_on_the_steps_of_the_linear_solver(solver_with):
    few, many = (
        temporary_bytes(
            jax.grad(objective(fg.aid(solver_with(num_steps=k)), fg.picard(decay, num_steps=10))),
            LAM,
        )
        for k in (60, 6000)
    )
    assert few == many


def test_memory_of_itd_grows_linearly_in_reverse_mode():
    ts = (100, 200, 400, 800)
    sizes = [
        temporary_bytes(jax.grad(objective(fg.itd(), fg.picard(decay, num_steps=t))), LAM)
        for t in ts
    ]
    print(f"\nitd, reverse mode: {sizes} bytes at t={ts}; w has {LAM.nbytes}")
    slopes = [(b - a) / (t - s) for a, b, s, t in zip(sizes, sizes[1:], ts, ts[1:], strict=False)]
    assert slopes[0] >= LAM.nbytes  # At least one w an iteration.
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=0.05)


def test_memory_of_itd_does_not_grow_in_forward_mode():
    def tangent(t):
        f = objective(fg.itd(), fg.picard(decay, num_steps=t))
        return temporary_bytes(lambda lam: jax.jvp(f, (lam,), (lam,)), LAM)

    few, many = tangent(100), tangent(10_000)
    print(f"\nitd, forward mode: {few} bytes at t=100, {many} at t=10,000; w has {LAM.nbytes}")
    assert few == many


class Counted:
    """Φ with a count of how often Python ran it."""

    def __init__(self):
        self.traces = 0

    def __call__(self, w, lam):
        self.traces += 1
        return 0.5 * jnp.tanh(w) + lam


SMALL = jnp.linspace(0.1, 1.0, 4)
WITH_STEPS = {
    "itd": lambda _: fg.itd(),
    "truncated_itd": lambda k: fg.truncated_itd(num_steps=k),
    "fp": lambda k: fg.aid(fg.fp(num_steps=k)),
    "cg": lambda k: fg.aid(fg.cg(num_steps=k)),
    "cg rtol": lambda k: fg.aid(fg.cg(max_steps=k, rtol=1e-6)),
    "normal_cg": lambda k: fg.aid(fg.normal_cg(num_steps=k)),
    "gmres": lambda k: fg.aid(fg.gmres(num_steps=k)),
    "bicgstab": lambda k: fg.aid(fg.bicgstab(num_steps=k)),
    "dense": lambda _: fg.aid(fg.dense()),
    "forward cg": lambda k: fg.forward(fg.aid(fg.cg(num_steps=k))),
}


@pytest.mark.parametrize("name", WITH_STEPS)
def test_phi_is_traced_a_fixed_number_of_times(name):
    def traces(t, k):
        phi = Counted()
        f = objective(WITH_STEPS[name](k), fg.picard(phi, num_steps=t), phi)
        jax.jit(jax.grad(f)).lower(SMALL)
        return phi.traces

    counts = [traces(t, k) for t, k in ((5, 5), (500, 5), (5, 500))]
    print(f"\n{name}: Φ runs {counts[0]} times for a gradient")
    assert counts == [counts[0]] * 3
    assert counts[0] <= 6


def test_a_second_eager_gradient_traces_nothing():
    phi = Counted()
    f = objective(fg.aid(fg.cg(num_steps=4)), fg.picard(phi, num_steps=30), phi)
    first = jax.grad(f)(SMALL)
    traces = phi.traces
    seconds = []
    for i in range(20):
        start = time.perf_counter()
        jax.block_until_ready(jax.grad(f)(SMALL + i))
        seconds.append(time.perf_counter() - start)
    print(f"\neager jax.grad, not the first: {1e3 * sorted(seconds)[10]:.1f} ms")
    assert phi.traces == traces
    assert jax.grad(f)(SMALL).tolist() == first.tolist()


def test_a_changed_lambda_or_tolerance_does_not_recompile():
    phi = Counted()

    @jax.jit
    def gradient(lam, rtol):
        estimator = fg.aid(fg.cg(max_steps=20, rtol=rtol))
        solver = fg.picard(phi, max_steps=100, rtol=rtol / 10, atol=rtol)
        return jax.grad(objective(estimator, solver, phi))(lam)

    coarse = gradient(SMALL, 1e-2)
    traces = phi.traces
    fine = gradient(SMALL, 1e-10)
    gradient(2 * SMALL, 1e-4)
    assert phi.traces == traces
    assert compilations(gradient) == 1
    assert 1e-9 < float(jnp.max(jnp.abs(fine - coarse))) < 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp", "cg", "normal_cg", "gmres", "bicgstab"])
def test_every_tolerance_may_be_traced(name):
    @jax.jit
    def gradient(lam, rtol, atol):
        linear_solver = getattr(fg, name)(max_steps=60, rtol=rtol, atol=atol)
        solver = fg.anderson(decay, max_steps=60, rtol=rtol, atol=atol)
        return jax.grad(objective(fg.aid(linear_solver), solver))(lam)

    exact = 1 / (1 - 0.5 / jnp.cosh(_fixed_point(SMALL)) ** 2) * 2 * _fixed_point(SMALL)
    for rtol, atol in ((1e-9, 0.0), (0.0, 1e-9)):
        assert jnp.allclose(gradient(SMALL, rtol, atol), exact, rtol=1e-7, atol=0.0)
    assert compilations(gradient) == 1


def _fixed_point(lam):
    return jax.lax.fori_loop(0, 100, lambda _, w: decay(w, lam), lam)


def test_the_explicit_form_does_not_recompile_from_step_to_step():
    phi = Counted()
    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sum(w**2),
        phi,
        fg.picard(phi, max_steps=100, rtol=1e-8),
        fg.aid(fg.cg(max_steps=20, rtol=1e-8)),
        start=fg.warm(),
    )
    update = jax.jit(hypergrad.update)
    state = hypergrad.init(jnp.zeros_like(SMALL), SMALL)
    lam = SMALL
    for _ in range(4):
        grad, state = update(state, lam)
        lam = lam - 0.1 * grad
    assert compilations(update) == 1
