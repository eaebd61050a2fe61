"""What reverse mode keeps of the steps of `picard`: the same derivatives, and what it costs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fixedgrad as fg
from problems import PROBLEM, PROBLEMS, assert_close, named, single
from test_memory_and_traces import Counted, decay, temporary_bytes

SCHEMES = {
    "rematerialised": fg.rematerialised(),
    "nested": fg.nested(),
    "recursive": fg.recursive(),
    "recursive 3": fg.recursive(num_checkpoints=3),
    "recursive 1": fg.recursive(num_checkpoints=1),
}
NATIVE = ("rematerialised", "nested")
RECURSIVE = {name: scheme for name, scheme in SCHEMES.items() if name not in NATIVE}
STEPS = 17  # Prime: segments of equal length leave a rest, and binomials are none of it.
W0, LAM = jnp.zeros(2), jnp.array([0.3, -1.0])
TOLERANCE = {"max_steps": 300, "rtol": 1e-7}


def phi(w, lam, q=0.5):
    return q * jnp.tanh(w) + lam


def gradient(problem, scheme, **rule):
    """The gradient with respect to the start and to λ, both."""
    solver = fg.picard(problem.phi, checkpoints=scheme, **rule)
    f = lambda w0, lam: problem.outer(solver(w0, lam), lam)  # noqa: E731
    return jax.jit(jax.grad(f, argnums=(0, 1)))(problem.w0, problem.lam)


@functools.cache
def plainly(name, num_steps, is_single=False):
    """By all iterates and tapes."""
    problem = single(PROBLEM[name]) if is_single else PROBLEM[name]
    return gradient(problem, fg.every_iterate(), num_steps=num_steps)


@pytest.mark.slow(but=("*pytree*", "*non-holomorphic*", "*nonlinear*"))
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=named)
def test_every_scheme_gives_the_derivative_of_the_same_steps(problem, name):
    got = gradient(problem, SCHEMES[name], num_steps=STEPS)
    assert_close(got, plainly(problem.name, STEPS), 1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_keeps_single_precision(name):
    got = gradient(single(PROBLEM["ridge"]), SCHEMES[name], num_steps=STEPS)
    assert_close(got, plainly("ridge", STEPS, is_single=True), 1e-6)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.slow(but=("*pytree*", "*non-holomorphic*", "*nonlinear*"))
@pytest.mark.parametrize("name", RECURSIVE)
@pytest.mark.parametrize("problem", PROBLEMS, ids=named)
def test_reverse_mode_through_a_tolerance_is_that_of_the_steps_it_took(problem, name):
    rule = {"max_steps": 100, "rtol": 1e-5}
    _, info = fg.picard(problem.phi, **rule).with_info(problem.w0, problem.lam)
    assert int(info.num_steps) > 3
    want = plainly(problem.name, int(info.num_steps))
    assert_close(gradient(problem, RECURSIVE[name], **rule), want, 1e-12)


@pytest.mark.parametrize("name", RECURSIVE)
def test_elements_of_a_batch_reverse_each_as_many_steps_as_it_took(name):
    q = jnp.array([0.1, 0.5, 0.9, 0.99])
    until = fg.picard(phi, checkpoints=RECURSIVE[name], **TOLERANCE)
    got = jax.vmap(jax.grad(lambda q: jnp.sum(until(W0, LAM, q) ** 2)))(q)
    counts = jax.vmap(lambda q: until.with_info(W0, LAM, q)[1].num_steps)(q)
    assert len(set(counts.tolist())) == len(q)
    for n, x, g in zip(counts, q, got, strict=True):
        want = jax.grad(lambda q, n=int(n): jnp.sum(fg.picard(phi, num_steps=n)(W0, LAM, q) ** 2))(
            x
        )
        np.testing.assert_allclose(g, want, rtol=1e-12)


def squared(lam, **rule):
    return jnp.sum(fg.picard(phi, **rule)(W0, lam) ** 2)


@pytest.mark.parametrize("name", SCHEMES)
def test_second_derivatives_and_batches_of_every_scheme(name):
    f = functools.partial(squared, num_steps=STEPS, checkpoints=SCHEMES[name])
    plain = functools.partial(squared, num_steps=STEPS)
    np.testing.assert_allclose(jax.hessian(f)(LAM), jax.hessian(plain)(LAM), rtol=1e-12, atol=1e-13)
    batch = jnp.stack([LAM, 2 * LAM])
    want = jax.vmap(jax.grad(plain))(batch)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(batch), want, rtol=1e-12)
    if name in NATIVE:
        tangents = [jax.jvp(g, (LAM,), (LAM,))[1] for g in (f, plain)]
        np.testing.assert_allclose(*tangents, rtol=1e-12)
        twice = jax.grad(lambda lam: jnp.sum(jax.grad(f)(lam)))(LAM)
        np.testing.assert_allclose(twice, jnp.sum(jax.hessian(plain)(LAM), 0), rtol=1e-12)


def test_forward_mode_of_a_recursive_scheme_is_refused_with_a_way_out():
    f = functools.partial(squared, num_steps=STEPS, checkpoints=fg.recursive())
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        jax.jvp(f, (LAM,), (LAM,))
    assert any("`fixedgrad.nested()` and `num_steps`" in note for note in caught.value.__notes__)
    solve = fg.fixed_point(phi, fg.itd())(fg.picard(phi, checkpoints=fg.recursive(), **TOLERANCE))
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        jax.jvp(lambda lam: solve(W0, lam), (LAM,), (LAM,))
    assert any("with `nested()` it does not" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("rule", [TOLERANCE, {"num_steps": STEPS}], ids=["rtol", "num_steps"])
def test_what_phi_closes_over_is_differentiated_and_data_is_not(rule):
    @jax.custom_jvp
    def data_of(x):
        return x

    @data_of.defjvp
    def refuse(primals, tangents):
        del primals, tangents
        raise AssertionError("The data has no tangent, hence no cotangent either.")

    def f(lam, data, decorated):
        def closed(w, data, *, count):
            return phi(w, lam) * data_of(data) + 0.0 * count

        solver = fg.picard(closed, checkpoints=fg.recursive(), **rule)
        solve = fg.fixed_point(closed, fg.itd())(solver) if decorated else solver
        return jnp.sum(solve(W0, data, count=jnp.int32(3).astype(float)) ** 2)

    want = jax.grad(functools.partial(squared, num_steps=60 if "rtol" in rule else STEPS))(LAM)
    for decorated in (False, True):
        for transform in (jax.grad, lambda f: jax.jit(jax.grad(f), static_argnums=2)):
            got = transform(f)(LAM, jnp.ones(()), decorated)
            np.testing.assert_allclose(got, want, rtol=1e-5 if "rtol" in rule else 1e-12)


@pytest.mark.parametrize("name", ["nested", "rematerialised", "recursive 3"])
def test_leaves_of_w_without_a_derivative_ride_along(name):
    def counted(w, lam):
        return {"n": w["n"] + 1, "x": 0.5 * w["x"] + lam / (1 + w["n"] % 3), "key": w["key"]}

    def f(lam, scheme):
        start = {"n": 0, "x": 0.0, "key": jax.random.key(0)}
        return fg.picard(counted, num_steps=STEPS, checkpoints=scheme)(start, lam)["x"]

    assert jax.grad(f)(1.0, SCHEMES[name]) == jax.grad(f)(1.0, fg.every_iterate())


# How often Φ runs.


def fewest(steps, slots):
    """Of l steps, by Griewank and Walther: r l − β(c + 1, r − 1), with the least r with β(c, r) ≥ l."""
    r = next(r for r in range(steps + 1) if math.comb(slots + r, slots) >= steps)
    return r * steps - math.comb(slots + r, slots + 1)


def evaluations(scheme, **rule):
    """Of Φ in one gradient, and the steps that it reverses."""
    count = []

    def observed(w, lam):
        jax.debug.callback(lambda: count.append(1))
        return 0.5 * w + lam

    solver = fg.picard(observed, checkpoints=scheme, **rule)
    jax.block_until_ready(jax.jit(jax.grad(lambda lam: solver(0.0, lam)))(1.0))
    jax.effects_barrier()
    return len(count)


@pytest.mark.parametrize("num_steps", [1, 6, 33])
@pytest.mark.parametrize("slots", [1, 3, None])
def test_known_steps_run_as_often_as_the_binomial_formula_says(num_steps, slots):
    c = slots or next(c for c in range(1, 99) if math.comb(c + 2, c) >= num_steps + 1)
    # Each step is linearised once. The residual in the info, which nobody reads, has an effect here.
    want = fewest(num_steps + 1, c) + num_steps + 1
    assert evaluations(fg.recursive(num_checkpoints=slots), num_steps=num_steps) == want


@pytest.mark.parametrize(("max_steps", "slots"), [(40, 4), (70, None)])
def test_steps_of_unknown_number_run_hardly_more_often(max_steps, slots):
    rule = {"max_steps": max_steps, "rtol": 1e-12}
    n = int(fg.picard(lambda w, lam: 0.5 * w + lam, **rule).with_info(0.0, 1.0)[1].num_steps)
    assert 30 < n <= max_steps
    c = slots or next(c for c in range(1, 99) if math.comb(c + 2, c) > max_steps) + 1
    # One evaluation for the residual of the start; each step is linearised once.
    got = evaluations(fg.recursive(num_checkpoints=slots), **rule) - 1 - n
    assert fewest(n + 1, c) <= got <= 1.25 * fewest(n + 1, c)


def test_phi_is_traced_as_often_for_any_number_of_steps():
    for scheme in SCHEMES.values():
        counts = []
        for rule in ({"num_steps": 3}, {"num_steps": 300}):
            counted = Counted()
            solver = fg.picard(counted, checkpoints=scheme, **rule)
            jax.jit(jax.grad(lambda lam, s=solver: jnp.sum(s(jnp.zeros_like(lam), lam))))(LAM)
            counts.append(counted.traces)
        assert counts[0] == counts[1] <= 2


# What is kept.


def kept(scheme, lam, **rule):
    """Temporary memory of a gradient, in units of w."""
    f = lambda lam: jnp.sum(fg.picard(decay, checkpoints=scheme, **rule)(0 * lam, lam) ** 2)  # noqa: E731
    return temporary_bytes(jax.grad(f), lam) / lam.nbytes


def test_memory_of_every_scheme_is_what_it_says():
    t, lam = 1024, jnp.linspace(0.1, 1.0, 1000)
    plain = kept(fg.every_iterate(), lam, num_steps=t)
    got = {name: kept(scheme, lam, num_steps=t) for name, scheme in SCHEMES.items()}
    print(f"\nevery_iterate: {plain:.1f} w, {got}")
    assert plain >= t
    assert got["rematerialised"] <= t + 20
    assert got["nested"] <= plain / 12
    assert got["recursive"] <= math.sqrt(2 * t) + 20
    assert got["recursive 3"] <= 20
    until = kept(fg.recursive(), lam, max_steps=t, rtol=1e-9)
    assert until <= math.sqrt(2 * t) + 25


# Too few steps.

RECURSIVELY = fg.picard(phi, checkpoints=fg.recursive(), **TOLERANCE)


def test_the_derivative_from_a_warm_start_is_nan_and_says_why():
    w = RECURSIVELY(W0, LAM)
    assert int(RECURSIVELY.with_info(w, LAM)[1].num_steps) == 0

    def slope(w0, **option):
        solver = fg.picard(phi, checkpoints=fg.recursive(), **TOLERANCE, **option)
        return jax.grad(lambda lam: jnp.sum(solver(w0, lam)))(LAM)

    want = jax.grad(lambda lam: jnp.sum(fg.picard(phi, num_steps=60)(W0, lam)))(LAM)
    np.testing.assert_allclose(slope(W0), want, rtol=1e-5)
    assert np.isnan(slope(w)).all()
    assert np.isnan(slope(w + 1e-5)).all()  # A few steps, of which the derivative needs more.
    np.testing.assert_array_equal(slope(w, on_failure="ignore"), 0.0)
    message = re.escape(
        "the derivative through the steps of `picard` failed: TOO_FEW_STEPS after 0 steps"
    )
    with pytest.raises(
        Exception, match=f"(?s){message}.*start further from the solution, give `num_st"
    ):
        slope(w, on_failure="raise").block_until_ready()


def test_only_the_element_that_starts_at_its_solution_has_no_derivative():
    starts = jnp.stack([W0, RECURSIVELY(W0, LAM)])
    got = jax.vmap(jax.grad(lambda lam, w0: jnp.sum(RECURSIVELY(w0, lam))), (None, 0))(LAM, starts)
    np.testing.assert_array_equal(np.isnan(got).all(1), [False, True])


@pytest.mark.parametrize(
    ("q", "rtol"), [(0.0, 1e-3), (0.3, 0.0), (0.99, 1e-3), (0.99, 1e-12), (-0.99, 1e-3)]
)
def test_a_cold_start_has_a_derivative_to_the_root_of_the_tolerance_or_none(q, rtol):
    solver = fg.picard(
        lambda w, lam: q * w + lam, max_steps=9000, rtol=rtol, checkpoints=fg.recursive()
    )
    got = jax.jit(jax.grad(lambda lam: solver(0.0, lam)))(1.0)
    if (q, rtol) == (0.99, 1e-3):  # qⁿ = 0.09: so wrong would the derivative be, and so wrong is w.
        assert np.isnan(got)
    else:
        assert got == pytest.approx(1 / (1 - q), rel=max(math.sqrt(rtol), 1e-7))


def test_the_derivative_of_a_solve_that_missed_its_tolerance_is_nan():
    solver = fg.picard(phi, max_steps=3, rtol=1e-9, checkpoints=fg.recursive())
    assert np.isnan(jax.grad(lambda lam: jnp.sum(solver(W0, lam)))(LAM)).all()


@pytest.mark.parametrize("scheme", [fg.every_iterate(), *(SCHEMES[name] for name in NATIVE)])
def test_the_refusal_of_steps_with_a_tolerance_names_the_scheme_that_reverses_them(scheme):
    solver = fg.picard(phi, checkpoints=scheme, **TOLERANCE)
    np.testing.assert_array_equal(solver(W0, LAM), RECURSIVELY(W0, LAM))
    with pytest.raises(
        TypeError, match=r"`checkpoints=recursive\(\)`, which sees whether the steps"
    ):
        jax.grad(lambda lam: jnp.sum(solver(W0, lam)))(LAM)


@pytest.mark.parametrize("rule", [{"num_steps": 40}, {"max_steps": 99, "rtol": 1e-12}])
def test_devices_that_need_other_numbers_of_steps_do_not_wait_for_one_another(rule):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jnp.array([0.3, 1.0])

    def total(lam, **rule):
        def local(lam, data):
            w = fg.picard(phi, **rule)(0 * data, lam, 0.5 * data)  # λ is replicated, and w is not.
            return jax.lax.psum(jnp.sum(w**2), "i")

        specs = P(), P("i")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(lam, data)

    got = jax.grad(functools.partial(total, checkpoints=fg.recursive(), **rule))(0.3)
    want = jax.grad(functools.partial(total, num_steps=40))(0.3)
    np.testing.assert_allclose(got, want, rtol=1e-9)
