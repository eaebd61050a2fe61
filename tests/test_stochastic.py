"""Stochastic hypergradients beside what they are the means of, and beside theory's orders.

Samples are thousands of keys at once, under `vmap`; each key is fixed. Where a mean is compared, the
bound is five of its own standard errors.
"""

import functools
import pickle
from collections.abc import Callable
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import fixedgrad as fg
from fixedgrad.stochastic.batches import Call
from fixedgrad.stochastic.single_loop import _Seen
from problems import assert_close

N, D = 24, 3
_RNG = np.random.default_rng(5)
X = jnp.asarray(_RNG.normal(size=(N, D)))
Y = jnp.asarray(_RNG.normal(size=N))
LAM = jnp.asarray([0.3, -0.2, 0.5])
W0 = jnp.zeros(D)
STEP = 0.15
NUM_KEYS = 4000


def loss(w, lam, data):
    """Biased regularisation: affine in (w, λ), with B constant."""
    x, y = data
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.25 * jnp.sum((w - lam) ** 2)


def outer(w, lam, data):
    x, y = data
    return 0.5 * jnp.mean((x @ w - 2.0 * y) ** 2) + 0.05 * jnp.sum(lam**2)


def curved_loss(w, lam, data):
    """Logistic regression with one penalty for each weight."""
    x, y = data
    penalty = 0.5 * jnp.sum(jnp.exp(lam) * w**2)
    return jnp.mean(jnp.logaddexp(0.0, -jnp.sign(y) * (x @ w))) + penalty


def scaled_loss(w, lam, data):
    """Logistic regression with a scale for each feature: B depends on the data."""
    x, y = data
    margins = jnp.sign(y) * (x @ (jnp.exp(lam) * w))
    return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.1 * jnp.sum(w**2)


DATA = (X, Y)
PHI = fg.gradient_descent(loss, step_size=STEP)
CURVED = fg.gradient_descent(curved_loss, step_size=0.5)
SCALED = fg.gradient_descent(scaled_loss, step_size=0.5)


def deterministic(phi, t, k, w0=W0, lam=LAM, data=DATA, outer=outer):
    """The gradient of t and k exact steps on all rows."""
    solver, estimator = fg.picard(phi, num_steps=t), fg.aid(fg.fp(num_steps=k))
    hypergrad = fg.hypergradient(outer, phi, solver, estimator, on_failure="ignore")
    return hypergrad.update(hypergrad.init(w0, lam, data), lam, data)


@functools.cache
def exact(phi, data_is_all=True):
    del data_is_all
    hypergrad = fg.hypergradient(outer, phi)
    return hypergrad.update(hypergrad.init(W0, LAM, DATA), LAM, DATA)[0]


def samples(hypergrad, batch_size, w0=W0, data=DATA, keys=NUM_KEYS, replacement=True):
    """The first gradient for so many keys."""

    def one(key):
        source = fg.minibatches(data, batch_size, key=key, replacement=replacement)
        return hypergrad.update(hypergrad.init(w0, LAM, source), LAM, source)[0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), keys))


def deviation(gradients, wanted):
    """The distance of the mean from what is wanted, in standard errors, the largest over entries."""
    error = gradients.mean(0) - wanted
    return float(jnp.max(jnp.abs(error) / (gradients.std(0) / np.sqrt(len(gradients)))))


def slope(x, y):
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


class TestBatches:
    def draws(self, source, number, role=0):
        call = Call((source,), {})
        state, rows = call.first(role), []
        for _ in range(number):
            batch, state = call.draw(state)
            rows.append(np.asarray(batch.args[0]))
        return rows

    def test_every_row_comes_once_in_an_epoch_without_replacement(self):
        epochs = self.draws(fg.minibatches(jnp.arange(12), 4, replacement=False), 6)
        first, second = np.concatenate(epochs[:3]), np.concatenate(epochs[3:])
        assert sorted(first) == sorted(second) == list(range(12))
        assert first.tolist() != second.tolist()

    def test_the_rest_of_an_epoch_that_is_shorter_than_a_batch_is_left_out(self):
        for rows in self.draws(fg.minibatches(jnp.arange(10), 4, replacement=False), 8):
            assert len(set(rows.tolist())) == 4

    def test_rows_come_with_replacement_in_equal_shares(self):
        rows = np.concatenate(self.draws(fg.minibatches(jnp.arange(5), 5, key=3), 200))
        assert np.all(np.abs(np.bincount(rows, minlength=5) - 200) < 5 * np.sqrt(160))

    def test_the_same_key_gives_the_same_rows_and_another_stream_others(self):
        source = fg.minibatches(jnp.arange(1000), 20, key=jax.random.key(2))
        one, again, other = self.draws(source, 2), self.draws(source, 2), self.draws(source, 2, 1)
        chex.assert_trees_all_equal(one, again)
        assert not np.array_equal(one, other)

    def test_two_sources_with_one_key_are_independent(self):
        sources = (fg.minibatches(jnp.arange(1000), 20), fg.minibatches(jnp.arange(1000), 20))
        call = Call(sources, {})
        batch, _ = call.draw(call.first(0))
        assert not np.array_equal(*batch.args)

    def test_old_keys_and_seeds_serve(self):
        for key in (jax.random.PRNGKey(7), jax.random.key(7), 7):
            rows = self.draws(fg.minibatches(jnp.arange(1000), 5, key=key), 1)
            chex.assert_trees_all_equal(
                rows, self.draws(fg.minibatches(jnp.arange(1000), 5, key=7), 1)
            )

    def test_given_batches_come_in_order_and_anew_in_each_update(self):
        stack = jnp.arange(12.0).reshape(4, 3)
        chex.assert_trees_all_equal(self.draws(fg.given_batches(stack), 4), list(np.asarray(stack)))

    def test_they_print_as_what_they_hold(self):
        source = fg.minibatches(DATA, 5, replacement=False)
        assert repr(source) == "minibatches((float64[24,3], float64[24]), 5, replacement=False)"
        assert repr(fg.given_batches(X)) == "given_batches(float64[24,3])"


class TestMeans:
    def test_batches_of_all_rows_give_the_steps_of_the_deterministic_method(self):
        hypergrad = fg.stochastic_hypergradient(outer, PHI, lower_steps=7, linear_steps=5)
        source = fg.minibatches(DATA, N, replacement=False)
        grad, state = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        wanted, of_all = deterministic(PHI, 7, 5)
        assert_close(grad, wanted, 1e-12)
        chex.assert_trees_all_close((state.w, state.v), (of_all.w, of_all.v), rtol=1e-12)
        assert_close(state.value, of_all.value, 1e-12)

    def test_the_gradient_is_unbiased_about_the_same_number_of_exact_steps(self):
        # Φ affine, B constant, E quadratic: every mean commutes with every product.
        hypergrad = fg.stochastic_hypergradient(
            outer, PHI, lower_steps=4, linear_steps=3, num_batches=2
        )
        wanted, _ = deterministic(PHI, 4, 3)
        gradients = samples(hypergrad, 2)
        assert deviation(gradients, wanted) < 5
        assert deviation(gradients, exact(PHI)) > 12  # Of so few steps.

    def test_its_bias_falls_with_k_as_the_powers_of_the_contraction(self):
        w = fg.newton(PHI, max_steps=9, rtol=1e-12)(W0, LAM, DATA)
        stay = optax.sgd(0.0)
        biases = []
        for k in (2, 4, 8):
            hypergrad = fg.stochastic_hypergradient(
                outer, PHI, stay, lower_steps=1, linear_steps=k, num_batches=8
            )
            mean = samples(hypergrad, 8, w).mean(0)
            biases.append(float(jnp.linalg.norm(mean - exact(PHI))))
            of_exact_steps = deterministic(PHI, 1, k, w)[0] - exact(PHI)
            assert_close(biases[-1], float(jnp.linalg.norm(of_exact_steps)), 0.1)

    @pytest.mark.parametrize(
        ("option", "values"), [("num_batches", (1, 4, 16)), ("batches_per_step", (1, 4, 16))]
    )
    def test_the_variance_falls_as_one_over_the_number_of_batches(self, option, values):
        # J the batches of the mixed product and of E; m those of each step, of which w and v are made.
        others = {"num_batches": 64} if option == "batches_per_step" else {"batches_per_step": 64}
        phi = fg.gradient_descent(curved_loss, step_size=0.5)
        variances = []
        for value in values:
            hypergrad = fg.stochastic_hypergradient(
                outer, phi, lower_steps=6, linear_steps=6, **{option: value}, **others
            )
            gradients = samples(hypergrad, 2, keys=500)
            variances.append(float(jnp.sum(gradients.var(0))))
        assert -1.1 < slope(values, variances) < -0.7

    def test_the_variance_falls_as_one_over_the_batch_size(self):
        sizes, variances = (1, 4, 16), []
        hypergrad = fg.stochastic_hypergradient(outer, PHI, lower_steps=5, linear_steps=5)
        for size in sizes:
            variances.append(float(jnp.sum(samples(hypergrad, size).var(0))))
        assert -1.25 < slope(sizes, variances) < -0.9

    def test_a_constant_step_on_a_curved_loss_leaves_a_bias_of_the_order_of_one_over_the_batch(
        self,
    ):
        # Also the product of v and the mixed derivative, both functions of a w that scatters.
        sizes, biases = (2, 4, 8), []
        hypergrad = fg.stochastic_hypergradient(
            outer, CURVED, lower_steps=60, linear_steps=60, num_batches=4
        )
        exact_steps, _ = deterministic(CURVED, 60, 60)
        for size in sizes:
            gradients = samples(hypergrad, size, keys=8000)
            biases.append(float(jnp.linalg.norm(gradients.mean(0) - exact_steps)))
            assert deviation(gradients, exact_steps) > 5
        assert -1.6 < slope(sizes, biases) < -0.7

    def test_warm_starts_accumulate_the_steps_of_many_updates(self):
        hypergrad = fg.stochastic_hypergradient(
            outer, PHI, optax.sgd(0.5), optax.sgd(0.5), lower_steps=1, linear_steps=1
        )
        source = fg.minibatches(DATA, N, replacement=False)
        grad, state = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        for _ in range(300):
            grad, state = hypergrad.update(state, LAM, source)
        assert_close(grad, exact(PHI), 1e-9)

    def test_the_schedule_of_an_optimiser_goes_on_where_its_start_is_warm_and_begins_anew_where_cold(
        self,
    ):
        decreasing = optax.sgd(lambda count: 1.0 / (1.0 + count))
        counts = {}
        for name, start in (
            ("warm", fg.warm()),
            ("cold", fg.cold()),
            ("neumann", fg.separately(w=fg.warm(), v=fg.cold())),
        ):
            hypergrad = fg.stochastic_hypergradient(
                outer, PHI, decreasing, decreasing, lower_steps=3, linear_steps=2, start=start
            )
            source = fg.minibatches(DATA, 4)
            state = hypergrad.init(W0, LAM, source)
            for _ in range(2):
                _, state = hypergrad.update(state, LAM, source)
            states = jax.tree.leaves(state.memory.start)
            counts[name] = sorted(int(x) for x in states if x.dtype == jnp.int32)
        assert counts == {"warm": [4, 6], "cold": [0], "neumann": [0, 2, 6]}

    def test_numbers_may_grow_with_the_updates(self):
        growing = fg.stochastic_hypergradient(
            outer,
            PHI,
            lower_steps=lambda n: 2 + n,
            linear_steps=lambda n: 3 + 2 * n,
            num_batches=lambda n: 1 + n,
            batches_per_step=lambda n: 1 + n,
            start=fg.cold(),
        )
        source = fg.minibatches(DATA, N, replacement=False)
        state = growing.init(W0, LAM, source)
        for n in range(3):
            grad, state = growing.update(state, LAM, source)
            assert_close(grad, deterministic(PHI, 2 + n, 3 + 2 * n)[0], 1e-12)
            assert int(state.info.lower.num_steps) == 2 + n

    def test_any_residual_and_any_optimiser_serve(self):
        # F = ∇ℓ without a step: the optimiser brings its own.
        phi = fg.from_residual(lambda w, lam, data: jax.grad(loss)(w, lam, data))
        hypergrad = fg.stochastic_hypergradient(
            outer, phi, optax.adam(3e-2), optax.adam(3e-2), lower_steps=900, linear_steps=900
        )
        source = fg.minibatches(DATA, N, replacement=False)
        grad, _ = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        assert_close(grad, exact(PHI), 1e-3)

    def test_given_batches_are_what_is_used(self):
        hypergrad = fg.stochastic_hypergradient(
            outer, PHI, lower_steps=3, linear_steps=2, num_batches=1
        )
        batches = fg.given_batches(jax.tree.map(lambda x: jnp.stack([x] * 6), DATA))
        grad, state = hypergrad.update(hypergrad.init(W0, LAM, batches), LAM, batches)
        assert_close(grad, deterministic(PHI, 3, 2)[0], 1e-12)
        # Each update starts with the first of what it is given.
        again, _ = hypergrad.update(state, LAM, batches)
        wanted = deterministic(PHI, 3, 2, state.w)[1].w
        assert np.all(np.isfinite(again))
        assert_close(hypergrad.update(state, LAM, batches)[1].w, wanted, 1e-12)

    def test_complex_fixed_points_serve(self):
        z = jax.lax.complex(X, jnp.roll(X, 1, 0))
        smooth = lambda w, lam, z: 0.1 * jnp.mean(jnp.abs(z @ w - lam.astype(jnp.complex128)) ** 2)  # noqa: E731
        phi = fg.gradient_descent(smooth, step_size=1.0)
        of_w = lambda w, lam, z: jnp.sum(jnp.abs(w) ** 2) + jnp.sum(w.real) + 0 * lam  # noqa: E731
        hypergrad = fg.stochastic_hypergradient(of_w, phi, lower_steps=6, linear_steps=5)
        source, w0 = fg.minibatches(z, N, replacement=False), jnp.zeros(D, jnp.complex128)
        grad, state = hypergrad.update(
            hypergrad.init(w0, jnp.asarray(0.7), source), jnp.asarray(0.7), source
        )
        wanted, of_all = deterministic(phi, 6, 5, w0, jnp.asarray(0.7), z, of_w)
        assert_close(grad, wanted, 1e-12)
        assert_close(state.v, of_all.v, 1e-12)

    def test_who_knows_no_batches_says_what_it_was_given(self):
        hypergrad = fg.hypergradient(outer, PHI)
        with pytest.raises(Exception, match=r".*") as caught:
            hypergrad.init(0.0, LAM, fg.minibatches(DATA, 4))
        assert "minibatches" in str(getattr(caught.value, "__notes__", "")) + str(caught.value)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
    def test_dtypes_are_kept_and_nothing_is_traced_twice(self, dtype):
        data, w0, lam = jax.tree.map(lambda x: x.astype(dtype), (DATA, W0, LAM))
        traced = chex.assert_max_traces(n=12)(lambda w, lam, data: loss(w, lam, data))
        phi = fg.gradient_descent(traced, step_size=STEP)
        hypergrad = fg.stochastic_hypergradient(outer, phi, lower_steps=3, linear_steps=3)
        source = fg.minibatches(data, 4)
        grad, state = hypergrad.update(hypergrad.init(w0, lam, source), lam, source)
        for _ in range(2):
            grad, state = hypergrad.update(state, lam, source)
        assert grad.dtype == state.w.dtype == state.v.dtype == state.value.dtype == dtype


class TestOuterLoops:
    HYPERGRADS: ClassVar[dict[str, Callable[[], fg.Hypergradient]]] = {
        "stochastic_hypergradient": lambda: fg.stochastic_hypergradient(
            outer, PHI, lower_steps=5, linear_steps=5
        ),
        "soba": lambda: fg.soba(outer, PHI),
        "saba": lambda: fg.saba(outer, PHI),
    }

    @pytest.mark.parametrize("name", HYPERGRADS)
    def test_a_loop_resumes_bit_for_bit_from_a_pickle(self, name):
        loop = fg.bilevel(self.HYPERGRADS[name](), optax.sgd(0.05))
        source = fg.minibatches(DATA, 4, key=2, replacement=name == "saba")
        start = loop.init(W0, LAM, source)
        whole, _ = loop.run(start, source, num_steps=10)
        half, _ = loop.run(start, source, num_steps=5)
        half = pickle.loads(pickle.dumps(half))
        resumed, _ = loop.run(half, source, num_steps=5)
        chex.assert_trees_all_equal(resumed, whole)

    @pytest.mark.parametrize("name", HYPERGRADS)
    def test_many_keys_run_at_once(self, name):
        loop = fg.bilevel(self.HYPERGRADS[name](), optax.sgd(0.05))

        def run(key):
            source = fg.minibatches(DATA, 4, key=key)
            return loop.run(loop.init(W0, LAM, source), source, num_steps=3)[0].lam

        keys = jax.random.split(jax.random.key(0), 3)
        together = jax.jit(jax.vmap(run))(keys)
        chex.assert_trees_all_close(together, jnp.stack([run(k) for k in keys]), rtol=1e-9)

    @pytest.mark.parametrize("name", HYPERGRADS)
    def test_what_is_not_finite_moves_nothing_and_ends_the_loop(self, name):
        bad = (X.at[3, 0].set(jnp.nan), Y)
        loop = fg.bilevel(self.HYPERGRADS[name](), optax.sgd(0.05))
        source = fg.minibatches(bad, 8)
        state, _ = loop.run(loop.init(W0, LAM, source), source, num_steps=40)
        assert fg.StopReason(int(state.reason)) in (
            fg.StopReason.LOWER_FAILED,
            fg.StopReason.LINEAR_FAILED,
            fg.StopReason.NON_FINITE,
        )
        assert np.all(np.isfinite(state.lam))
        memory = state.hypergrad.memory
        kept = memory.start if name == "stochastic_hypergradient" else (memory.w, memory.v)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(kept))

    @pytest.mark.parametrize("name", HYPERGRADS)
    def test_a_state_may_be_donated(self, name):
        hypergrad = self.HYPERGRADS[name]()
        source = fg.minibatches(DATA, 4)
        update = jax.jit(hypergrad.update, donate_argnums=0)
        _, state = update(hypergrad.init(W0, LAM, source), LAM, source)
        grad, state = update(state, LAM, source)
        assert np.all(np.isfinite(grad))

    @pytest.mark.parametrize("name", HYPERGRADS)
    def test_after_a_failure_other_batches_come(self, name):
        hypergrad = self.HYPERGRADS[name]()
        source = fg.minibatches((X.at[3, 0].set(jnp.nan), Y), 4)
        state, finite = hypergrad.init(W0, LAM, source), []
        for _ in range(60):
            grad, state = hypergrad.update(state, LAM, source)
            finite.append(bool(np.all(np.isfinite(grad))))
        assert not all(finite)
        assert any(finite[finite.index(False) :])

    def test_a_run_takes_the_batches_of_a_loader_step_by_step(self):
        hypergrad = fg.stochastic_hypergradient(outer, PHI, lower_steps=3, linear_steps=2)
        loop = fg.bilevel(hypergrad, optax.sgd(0.05))
        rows = jax.tree.map(lambda x: jnp.stack([jnp.stack([x] * 6)] * 4), DATA)
        first = fg.given_batches(jax.tree.map(lambda x: x[0], rows))
        state, history = loop.run(
            loop.init(W0, LAM, first), batches=fg.given_batches(rows), num_steps=4
        )
        assert int(state.num_steps) == 4
        assert_close(history.value[0], deterministic(PHI, 3, 2)[1].value, 1e-12)

    @pytest.mark.parametrize("name", ["stochastic_hypergradient", "soba", "saba"])
    @pytest.mark.parametrize("which", ["phi", "outer"])
    def test_a_sum_over_rows_in_the_place_of_a_mean_gives_nan_and_a_code(self, name, which):
        of_sum = lambda of: lambda w, lam, data: len(data[1]) * of(w, lam, data)  # noqa: E731
        phi = fg.gradient_descent(of_sum(loss), step_size=STEP / N) if which == "phi" else PHI
        e = of_sum(outer) if which == "outer" else outer
        hypergrad = getattr(fg, name)(e, phi)
        source = fg.minibatches(DATA, 4)
        grad, state = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        assert np.all(np.isnan(grad))
        assert fg.Status(int(state.info.lower.status)).name == "NOT_A_MEAN"

    def test_under_ignore_a_sum_is_taken_as_it_is(self):
        of_sum = lambda w, lam, data: len(data[1]) * outer(w, lam, data)  # noqa: E731
        hypergrad = fg.soba(of_sum, PHI, on_failure="ignore")
        source = fg.minibatches(DATA, 4)
        _, first = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        grad, second = hypergrad.update(first, LAM, source)
        assert np.all(np.isfinite(grad))
        assert float(jnp.linalg.norm(second.w - first.w)) > 0

    def test_a_function_of_one_batch_size_is_not_judged(self):
        fixed = lambda w, lam, data: loss(w, lam, (data[0].reshape(4, D), data[1]))  # noqa: E731
        phi = fg.gradient_descent(fixed, step_size=STEP)
        hypergrad = fg.soba(outer, phi)
        source = fg.minibatches(DATA, 4)
        grad, _ = hypergrad.update(hypergrad.init(W0, LAM, source), LAM, source)
        assert np.all(np.isfinite(grad))

    def test_soba_moves_along_the_gradients_of_the_lagrangian(self):
        hypergrad = fg.soba(outer, PHI, optax.sgd(0.5), optax.sgd(0.25))
        source = fg.minibatches(DATA, N, replacement=False)
        _, before = hypergrad.update(hypergrad.init(W0 + 1.0, LAM, source), LAM, source)
        grad, state = hypergrad.update(before, LAM, source)

        def lagrangian(w, lam, v):
            return outer(w, lam, DATA) + v @ (PHI(w, lam, DATA) - w)

        at = (before.w, LAM, before.v)
        of_w, of_lam, of_v = jax.grad(lagrangian, argnums=(0, 1, 2))(*at)
        assert_close(grad, of_lam, 1e-12)
        assert_close(state.w, before.w + 0.5 * of_v, 1e-12)
        assert_close(state.v, before.v + 0.25 * of_w, 1e-12)

    def test_soba_with_steps_that_decrease_comes_near_the_solution(self):
        rate = lambda scale: optax.sgd(lambda n: scale / (1.0 + n / 100))  # noqa: E731
        loop = fg.bilevel(fg.soba(outer, PHI, rate(1.0), rate(1.0)), rate(0.5))
        source = fg.minibatches(DATA, 8)
        state, _ = loop.run(loop.init(W0, LAM, source), source, num_steps=20_000)
        assert float(jnp.linalg.norm(state.lam - _minimiser())) < 0.1

    def test_saba_converges_with_constant_steps(self):
        loop = fg.bilevel(fg.saba(outer, PHI), optax.sgd(0.2))
        source = fg.minibatches(DATA, 4)
        state, _ = loop.run(loop.init(W0, LAM, source), source, num_steps=10_000)
        assert_close(state.lam, _minimiser(), 1e-8)

    def test_saba_tells_the_rows_of_phi_and_of_e_apart(self):
        phi = fg.gradient_descent(lambda w, lam, a, b: loss(w, lam, a), step_size=STEP)
        loop = fg.bilevel(fg.saba(lambda w, lam, a, b: outer(w, lam, b), phi), optax.sgd(0.2))
        half = N // 2
        sources = (fg.minibatches((X[:half], Y[:half]), 4), fg.minibatches((X[half:], Y[half:]), 6))
        start = loop.init(W0, LAM, *sources)
        assert jax.tree.leaves(start.hypergrad.memory.draws.outer.rows)[0].shape[0] == 2
        state, _ = loop.run(start, *sources, num_steps=10_000)
        whole = fg.hypergradient(lambda w, lam, a, b: outer(w, lam, b), phi)
        data = tuple(source.data for source in sources)
        grad, _ = whole.update(whole.init(W0, state.lam, *data), state.lam, *data)
        assert float(jnp.linalg.norm(grad)) < 1e-8

    def test_corrected_directions_are_unbiased_over_the_blocks(self, key):
        rows = jax.random.normal(key, (5, 3))
        seen = _Seen(rows, rows.mean(0))
        now = jax.random.normal(jax.random.fold_in(key, 1), (5, 3))
        corrected = [seen.corrected(jnp.int32(i), now[i]) for i in range(5)]
        assert_close(sum(c for c, _ in corrected) / 5, now.mean(0), 1e-12)
        for i, (_, after) in enumerate(corrected):
            moved, stayed = after(jnp.asarray(False)), after(jnp.asarray(True))
            assert_close(moved.mean, moved.rows.mean(0), 1e-12)
            assert_close(moved.rows, rows.at[i].set(now[i]), 1e-12)
            chex.assert_trees_all_equal(stayed, seen)

    def test_the_tables_of_saba_are_written_in_place_under_scan(self):
        rows, size = 100, 200
        hypergrad = fg.saba(outer, PHI)
        source = fg.minibatches((jnp.ones((rows, size)), jnp.ones(rows)), 1)
        lam = jnp.zeros(size)
        state = hypergrad.init(lam, lam, source)

        def steps(state):
            def body(state, _):
                _, state = hypergrad.update(state, lam, source)
                return state, None

            return jax.lax.scan(body, state, None, length=3)[0]

        account = jax.jit(steps, donate_argnums=0).lower(state).compile().memory_analysis()
        assert account.temp_size_in_bytes < state.memory.draws.phi.rows.r_w.nbytes


@functools.cache
def _minimiser():
    """Of f, which is quadratic: where its gradient is zero."""
    gradient = lambda lam: deterministic(PHI, 400, 400, lam=lam)[0]  # noqa: E731
    at_zero = gradient(jnp.zeros(D))
    hessian = jnp.stack([gradient(e) - at_zero for e in jnp.eye(D)])
    return -jnp.linalg.solve(hessian, at_zero)


class TestNonSmooth:
    """Φ a proximal or projected step: Φ = G(T), with T alone a mean over rows."""

    LAM = jnp.asarray([0.25, 0.05])

    @staticmethod
    def smooth(w, lam, data):
        x, y = data
        return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * lam[1] * jnp.sum(w**2)

    @staticmethod
    def soft(u, step, lam, data):
        del data
        return jnp.sign(u) * jnp.maximum(jnp.abs(u) - step * lam[0], 0.0)

    @classmethod
    def phi(cls):
        return fg.proximal_gradient(cls.smooth, cls.soft, step_size=0.2)

    @classmethod
    def solution(cls, lam):
        return fg.picard(cls.phi(), num_steps=400)(W0, lam, DATA)

    @staticmethod
    def objective(w, lam, data):
        del lam
        x, y = data
        return 0.5 * jnp.mean((x @ w - 1.5 * y) ** 2)

    @classmethod
    def finite_differences(cls):
        h = 1e-6
        f = jax.jit(lambda lam: cls.objective(cls.solution(lam), lam, DATA))
        return jnp.stack([(f(cls.LAM + h * e) - f(cls.LAM - h * e)) / (2 * h) for e in jnp.eye(2)])

    def test_the_solution_is_off_the_kinks_and_has_zeros(self):
        w = self.solution(self.LAM)
        assert 0 < int(jnp.sum(w == 0)) < D

    @pytest.mark.parametrize("chunk_size", [None, 8])
    def test_the_deterministic_gradient_is_that_of_finite_differences(self, chunk_size):
        phi = self.phi() if chunk_size is None else fg.chunked(self.phi(), chunk_size=chunk_size)
        hypergrad = fg.hypergradient(self.objective, phi, fg.picard(phi, num_steps=400))
        grad, _ = hypergrad.update(hypergrad.init(W0, self.LAM, DATA), self.LAM, DATA)
        assert_close(grad, self.finite_differences(), 1e-6)

    def test_a_mean_of_proximal_steps_has_another_fixed_point(self):
        # Why `chunked` and the batches average T: what follows is the plausible wrong number.
        rows = jax.tree.map(lambda x: x.reshape(N, 1, *x.shape[1:]), DATA)
        mean = lambda w, lam: jax.vmap(lambda row: self.phi()(w, lam, row))(rows).mean(0)  # noqa: E731
        w = fg.picard(mean, num_steps=400)(W0, self.LAM)
        assert float(jnp.linalg.norm(w - self.solution(self.LAM))) > 0.01

    def test_the_linear_system_is_unbiased_at_the_mean_of_the_steps(self):
        # w stays at w(λ): optax.sgd(0.0). The mean of T over so many rows lies off the kinks.
        stay = optax.sgd(0.0)
        hypergrad = fg.stochastic_hypergradient(
            self.objective, self.phi(), stay, linear_steps=120, num_batches=200
        )
        w = self.solution(self.LAM)

        def one(key):
            source = fg.minibatches(DATA, 8, key=key)
            return hypergrad.update(hypergrad.init(w, self.LAM, source), self.LAM, source)[0]

        gradients = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 1000))
        assert deviation(gradients, self.finite_differences()) < 5
        assert float(jnp.max(gradients.std(0))) < 0.5

    def test_larger_batches_bring_w_to_the_fixed_point(self):
        errors = []
        for m in (1, 8, 64):
            hypergrad = fg.stochastic_hypergradient(
                self.objective, self.phi(), lower_steps=150, linear_steps=1, batches_per_step=m
            )
            source = fg.minibatches(DATA, 2)
            _, state = hypergrad.update(hypergrad.init(W0, self.LAM, source), self.LAM, source)
            errors.append(float(jnp.linalg.norm(state.w - self.solution(self.LAM))))
        assert errors[2] < 0.5 * errors[0]
        assert errors[2] < 0.15

    def test_at_a_kink_the_derivative_lies_between_the_one_sided_ones(self):
        # w(λ) = max(λ, 0) at λ = 0.
        smooth = lambda w, lam: 0.5 * (w - lam) ** 2  # noqa: E731
        phi = fg.proximal_gradient(smooth, lambda u, *_: jnp.maximum(u, 0.0), step_size=0.5)
        solve = fg.fixed_point(phi, fg.aid(fg.fp(max_steps=99, rtol=1e-12)))(
            fg.picard(phi, num_steps=99)
        )
        derivative = float(jax.grad(lambda lam: solve(1.0, lam))(0.0))
        assert 0 <= derivative <= 1

    def test_a_projected_step_serves(self):
        project = lambda u, step, lam, data: jnp.clip(u, 0.0, 0.3)  # noqa: E731
        phi = fg.proximal_gradient(self.smooth, project, step_size=0.2)
        hypergrad = fg.stochastic_hypergradient(
            self.objective, phi, lower_steps=300, linear_steps=300
        )
        source = fg.minibatches(DATA, N, replacement=False)
        grad, _ = hypergrad.update(hypergrad.init(W0, self.LAM, source), self.LAM, source)
        solve = lambda lam: fg.picard(phi, num_steps=400)(W0, lam, DATA)  # noqa: E731
        f = jax.jit(lambda lam: self.objective(solve(lam), lam, DATA))
        h = 1e-6
        wanted = [(f(self.LAM + h * e) - f(self.LAM - h * e)) / (2 * h) for e in jnp.eye(2)]
        assert_close(grad, jnp.stack(wanted), 1e-6)


class TestChunks:
    ROWS = 24

    @staticmethod
    def pair(option):
        return CURVED, fg.chunked(CURVED, **option)

    @pytest.mark.parametrize("chunk_size", [1, 4, 7, 24, 1000])
    def test_values_and_derivatives_are_those_of_all_rows(self, chunk_size):
        plain, cut = self.pair({"chunk_size": chunk_size})
        v = jnp.asarray([0.3, -0.1, 0.7])
        w = W0 + 0.2

        def everything(phi):
            value, pull = jax.vjp(lambda w, lam: phi(w, lam, DATA), w, LAM)
            tangent = jax.jvp(lambda w, lam: phi(w, lam, DATA), (w, LAM), (v, v))[1]
            second = jax.jacfwd(jax.grad(lambda w: v @ phi(w, LAM, DATA)))(w)
            of_data = jax.grad(lambda data: v @ phi(w, LAM, data))(DATA)
            return value, pull(v), tangent, second, of_data

        one, other = (
            jax.jit(everything, static_argnums=0)(plain),
            jax.jit(everything, static_argnums=0)(cut),
        )
        chex.assert_trees_all_close(one, other, rtol=1e-12, atol=1e-14)

    def test_the_deterministic_estimators_run_on_chunks_with_the_same_numbers(self):
        of_e = fg.chunked(outer, chunk_size=5)
        plain, cut = self.pair({"chunk_size": 6})
        rows = []
        for e, phi in ((outer, plain), (of_e, cut)):
            for solver, estimator in (
                (fg.picard(phi, num_steps=30), fg.aid(fg.fp(num_steps=30))),
                (fg.picard(phi, num_steps=30), fg.itd()),
                (fg.newton(phi, max_steps=20, rtol=1e-12), fg.aid(fg.cg(max_steps=20, rtol=1e-12))),
            ):
                hypergrad = fg.hypergradient(e, phi, solver, estimator)
                grad, state = hypergrad.update(hypergrad.init(W0, LAM, DATA), LAM, DATA)
                rows.append((grad, state.value))
            certificate = fg.certify(e, phi, W0, None, LAM, DATA)
            rows.append((certificate.polished, certificate.error))
        chex.assert_trees_all_close(rows[:3], rows[4:7], rtol=1e-9)
        # By loose solves, whose last step rounding may decide.
        chex.assert_trees_all_close(rows[3], rows[7], rtol=0.05)

    def test_a_decorated_solver_of_a_chunked_map_has_every_derivative(self):
        plain, cut = self.pair({"chunk_size": 6})
        results = []
        for phi in (plain, cut):
            solve = fg.fixed_point(phi, fg.forward(fg.aid(fg.dense())))(
                fg.picard(phi, num_steps=80)
            )
            f = lambda lam, solve=solve: jnp.sum(solve(W0, lam, DATA) ** 3)  # noqa: E731
            results.append((jax.grad(f)(LAM), jax.jacfwd(f)(LAM), jax.hessian(f)(LAM)))
        chex.assert_trees_all_close(*results, rtol=1e-9)

    def test_data_with_row_numbers_and_a_weight_for_each_row(self):
        def weighted(w, lam, data):
            x, y, i = data
            return jnp.mean(jax.nn.sigmoid(lam[i]) * (x @ w - y) ** 2) + 0.1 * jnp.sum(w**2)

        phi = fg.gradient_descent(weighted, step_size=0.2)
        data = (*DATA, jnp.arange(N))
        lam = jnp.linspace(-1.0, 1.0, N)
        pull = lambda phi: jax.vjp(lambda w, lam: phi(w, lam, data), W0 + 0.3, lam)[1](LAM)  # noqa: E731
        chex.assert_trees_all_close(pull(fg.chunked(phi, chunk_size=8)), pull(phi), rtol=1e-12)

    @pytest.mark.parametrize("memory", ["40 kB", 100_000, "1 MiB"])
    def test_a_product_takes_no_more_memory_than_was_asked_for(self, memory):
        n, d = 4096, 16
        x, y = jnp.ones((n, d)), jnp.ones(n)
        phi = fg.chunked(CURVED, memory=memory)

        @jax.jit
        def product(w, lam, v, data):
            return jax.vjp(lambda w, lam: phi(w, lam, data), w, lam)[1](v)

        w = jnp.zeros(d)
        used = product.lower(w, w, w, (x, y)).compile().memory_analysis().temp_size_in_bytes
        bound = {"40 kB": 40_000, "1 MiB": 2**20}.get(memory, memory)
        assert used <= bound
        whole = jax.jit(lambda w, v: jax.vjp(lambda w: CURVED(w, w, (x, y)), w)[1](v))
        assert whole.lower(w, w).compile().memory_analysis().temp_size_in_bytes > 40_000

    def test_the_chunk_is_found_although_the_map_closes_over_a_traced_value(self):
        def f(scale):
            phi = fg.chunked(
                fg.gradient_descent(
                    lambda w, lam, data: scale * curved_loss(w, lam, data), step_size=0.5
                ),
                memory="100 kB",
            )
            return jnp.sum(phi(W0 + 0.1, LAM, DATA))

        wanted = jax.grad(lambda s: jnp.sum(-0.5 * s * jax.grad(curved_loss)(W0 + 0.1, LAM, DATA)))(
            1.0
        )
        assert_close(jax.jit(jax.grad(f))(1.0), wanted, 1e-9)

    @pytest.mark.slow
    def test_sharded_rows_give_the_same_numbers_and_no_gathers(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(64, D)))
        data = (x, jnp.sin(x[:, 0]))
        sharded = jax.tree.map(lambda a: jax.device_put(a, rows), data)
        phi = fg.chunked(CURVED, chunk_size=16)
        product = jax.jit(lambda w, v, data: jax.vjp(lambda w: phi(w, LAM, data), w)[1](v))
        chex.assert_trees_all_close(product(W0, LAM, sharded), product(W0, LAM, data), rtol=1e-12)
        text = product.lower(W0, LAM, sharded).compile().as_text()
        assert "all-reduce(" in text
        assert "all-gather(" not in text

    def test_maps_keep_their_kind_and_print(self):
        cut = fg.chunked(CURVED, chunk_size=6)
        assert type(cut) is type(CURVED)
        assert repr(cut) == "chunked(gradient_descent(curved_loss, step_size=0.5), chunk_size=6)"


class TestCertificate:
    @staticmethod
    def problem(seed, n=2000, d=4):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.normal(size=(n, d)))
        y = jnp.asarray(np.sign(x @ rng.normal(size=d) + rng.normal(size=n)))
        return (x, y), jnp.asarray(rng.normal(size=d) / 2)

    def run(self, data, lam, key, **numbers):
        hypergrad = _FOR_CERTIFICATES[tuple(sorted(numbers.items()))]
        source = fg.minibatches(data, 20, key=key)
        grad, state = hypergrad.update(
            hypergrad.init(jnp.zeros_like(lam), lam, source), lam, source
        )
        return source, grad, state

    @staticmethod
    def truth(data, lam):
        grad, _ = _TRUTH.update(_TRUTH.init(jnp.zeros_like(lam), lam, data), lam, data)
        return grad

    def test_it_covers_the_error_of_one_update_nineteen_times_in_twenty(self):
        ratios, valid = [], []
        for seed in range(40):
            data, lam = self.problem(seed)
            source, grad, state = self.run(data, lam, seed, **dict(_NUMBERS[seed % 2]))
            certificate = fg.certify_stochastic(
                outer, SCALED, state.w, state.v, lam, source, gradient=grad, group_size=60, key=seed
            )
            error = jnp.linalg.norm(grad - self.truth(data, lam))
            valid.append(bool(certificate.valid))
            ratios.append(float(certificate.error / error))
        ratios, valid = np.array(ratios), np.array(valid)
        assert np.mean(valid) >= 0.9
        assert np.mean(ratios[valid] >= 1) >= 0.95
        assert np.median(ratios[valid]) < 3

    def test_its_parts_are_what_they_are_called(self):
        data, lam = self.problem(1)
        source, _, state = self.run(data, lam, 3, **dict(_NUMBERS[0]))
        certificates = [
            fg.certify_stochastic(
                outer, SCALED, state.w, state.v, lam, source, group_size=60, key=key
            )
            for key in range(30)
        ]
        at_pair = fg.certify(outer, SCALED, state.w, state.v, lam, data).gradient
        truth = self.truth(data, lam)
        bias = float(jnp.linalg.norm(at_pair - truth))
        for name, value, centre in (
            ("standard_error", "gradient", at_pair),
            ("sampling_error", "polished", truth),
        ):
            errors = [float(jnp.linalg.norm(getattr(c, value) - centre)) for c in certificates]
            estimates = [float(getattr(c, name)) for c in certificates]
            assert 0.6 < np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(estimates))) < 1.6
        assert 0.5 < np.mean([float(c.bias) for c in certificates]) / bias < 2

    def test_all_rows_leave_no_sampling_error(self):
        data, lam = self.problem(2, n=480)
        source, grad, state = self.run(data, lam, 0, **dict(_NUMBERS[0]))
        certificate = fg.certify_stochastic(
            outer, SCALED, state.w, state.v, lam, source, gradient=grad, group_size=60
        )
        whole = fg.certify(outer, SCALED, state.w, state.v, lam, data, gradient=grad)
        assert float(certificate.sampling_error) == float(certificate.standard_error) == 0
        assert_close(certificate.error, whole.error, 1e-6)
        assert_close(certificate.polished, whole.polished, 1e-9)

    def test_it_prints(self):
        data, lam = self.problem(2, n=480)
        source, _, state = self.run(data, lam, 0, **dict(_NUMBERS[0]))
        certificate = fg.certify_stochastic(
            outer, SCALED, state.w, state.v, lam, source, group_size=60
        )
        assert repr(certificate).endswith("VALID)")
        assert "bias" in certificate._repr_html_()


_NUMBERS = (
    (("linear_steps", 8), ("lower_steps", 8)),
    (("linear_steps", 30), ("lower_steps", 30)),
)
_FOR_CERTIFICATES = {
    numbers: fg.stochastic_hypergradient(outer, SCALED, **dict(numbers)) for numbers in _NUMBERS
}
_TRUTH = fg.hypergradient(outer, SCALED)
