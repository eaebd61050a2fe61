"""Stochastic AID: t steps on w, k on the linear system, J mixed products, all of minibatches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..failure import LOWER_STAGE, STAGE, Policy, enforce, passed_over
from ..hypergradient import (
    Hypergradient,
    HypergradientInfo,
    HypergradientState,
    check_state,
)
from ..leaves import blank, owned, partition, strongly_typed
from ..mapped_axes import placed_like
from ..monitor import Monitor
from ..printing import printed
from ..starts import WARM, Start, check_start
from ..types import ComposedMap, OnFailure, Outer, Phi, PyTree
from .batched import (
    PICARD,
    Count,
    Stochastic,
    Streams,
    about,
    beginning,
    check_functions,
    check_schedule,
    mean_over,
    moved_by,
    number_at,
    steps_info,
)
from .batches import Call, Drawing, check_given

tree = optax.tree


class _Memory(NamedTuple):
    """What an update needs of those before.

    Attributes:
        start: What the `Start` remembers, of w and v with the states of their optimisers.
        streams: Where the draws are.
        means: Whether Φ and E are means over rows, as far as `init` could tell.
    """

    start: PyTree
    streams: Streams
    means: jax.Array


@printed
def stochastic_hypergradient(
    outer: Outer,
    phi: Phi,
    optimizer: optax.GradientTransformation = PICARD,
    linear_optimizer: optax.GradientTransformation = PICARD,
    *,
    lower_steps: Count = 10,
    linear_steps: Count = 10,
    num_batches: Count = 1,
    batches_per_step: Count = 1,
    start: Start = WARM,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Hypergradient:
    """Stochastic AID: the hypergradient of means over data, from minibatches.

    With Φ = E_ζ Φ_ζ and E = E_ξ E_ξ, and a fresh batch ζ or ξ at each evaluation,

        t steps            w ← w − η (w − Φ_ζ(w, λ))
        J batches ξ        b = mean of ∇₁E_ξ(w, λ),  d = mean of ∇₂E_ξ
        k steps            v ← v − η (v − ∂₁Φ_ζᵀ v − b)
        J batches ζ        g = d + (mean of ∂₂Φ_ζ)ᵀ v .

    The steps are those of two optax optimisers, with schedules if wanted, on the residuals; `optax.sgd`
    with the step η is the method of the references, and η = 1 a stochastic fixed-point iteration. Other
    methods are settings of this one: stocBiO has `start=separately(w=warm(), v=cold())`, its Neumann
    series of k terms; AmIGO both warm; the authors' own both `cold()`, with `lower_steps`,
    `linear_steps` and `num_batches` that grow with the number of updates.

    Of its parts, given w: g is unbiased in the batches of d and of the mixed product, and v in its k
    batches about k deterministic steps from the same start (for `optax.sgd`, whose step is affine in
    v): so the bias of g at that w is that of k deterministic steps of FP, ‖(1 − η + ηJᵀ)ᵏ‖ times the
    error of the start. The variance falls as 1/J, but for that of v, which falls with η and
    `batches_per_step`. What w errs by has a mean: t deterministic steps' where Φ is affine in w; else
    a constant η adds a bias of the order of η over the batch size, and a decreasing η none in the end.
    Where g is curved in (w, v), their variance adds as much again. `certify_stochastic` measures all of
    it.

    Of a `proximal_gradient` map Φ = G(T), the derivative of G is taken at the mean of T over J batches,
    so that the linear system is unbiased about that point. The steps on w are not: the mean of G(T_ζ)
    is not G of the mean, where entries of T scatter about a kink of G. Larger batches
    (`batches_per_step`) lessen that.

    Φ and E, of a `proximal_gradient` map T, have to be means over rows. `init` holds a batch beside the
    same batch twice; where they differ the gradient is NaN, with the status `NOT_A_MEAN`.

    Assumed, not checked: that the steps converge.

    Cost of an update: t evaluations of Φ, k products with Jᵀ, J with Bᵀ, J gradients of E, on one batch
    each (t and k of them times `batches_per_step`). Memory: w, v, the states of the optimisers, a
    batch.
    When not to use it: for accuracies below the noise, or data of which a full product is cheap:
    `chunked` maps and `hypergradient` have no noise; with steps that a tolerance ends.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`, a mean over rows.
        phi: `phi(w, lam, *args, **kwargs) -> w`; the same arguments, in which `minibatches` or
            `given_batches` stand where the functions expect data.
        optimizer: For w, an optax optimiser of w − Φ_ζ(w): for `gradient_descent` of ℓ with the step α
            that is α∇ℓ.
        linear_optimizer: For v.
        lower_steps: t, or a function from the number of updates so far to it.
        linear_steps: k, or such a function.
        num_batches: J, or such a function.
        batches_per_step: Batches averaged in each of the t and k steps, or such a function.
        start: `warm()`, `cold()`, or one for each by `separately`; the state of an optimiser goes with
            what it optimises. Not `extrapolated`, which knows no noise.
        on_failure: What becomes of the gradient where w or v is not finite; see `hypergradient`.
        monitor: Told of both solves of each update; see `hypergradient`.

    Returns:
        A `Hypergradient`, the functions (`init`, `update`), for `bilevel` too. The residuals in its
        info are those of the last batch; its value is the mean of E over J batches.

    Raises:
        TypeError: An argument is not of its kind; when called, there are no batches among the
        arguments. ValueError: A number of steps or batches is no positive integer, or `on_failure` none
        of the
            policies; when called, `given_batches` are too few.

    >>> import fixedgrad as fg
    >>> x = jax.random.normal(jax.random.key(0), (1000, 3))
    >>> loss = lambda w, lam, x: 0.5 * jnp.mean((x @ w - 1.0) ** 2) + 0.5 * lam * jnp.sum(w**2)
    >>> outer = lambda w, lam, x: 0.5 * jnp.mean((x @ w - 2.0) ** 2)
    >>> phi = fg.gradient_descent(loss, step_size=0.2)
    >>> hypergrad = stochastic_hypergradient(outer, phi, lower_steps=20, linear_steps=20)
    >>> data = fg.minibatches(x, 50)
    >>> grad, state = hypergrad.update(hypergrad.init(jnp.zeros(3), 1.0, data), 1.0, data)
    >>> int(state.num_updates), fg.Status(int(state.info.linear.status)).name
    (1, 'FIXED_STEPS')

    References:
        Grazzi, Pontil, Salzo, Convergence properties of stochastic hypergradients, AISTATS 2021;
        Bilevel optimization with a lower-level contraction, JMLR 2023; Nonsmooth implicit
        differentiation, ICML 2024 (G and T). Ji, Yang, Liang, Bilevel optimization: convergence
        analysis and enhanced design, ICML 2021 (stocBiO). Arbel, Mairal, Amortized implicit
        differentiation for stochastic bilevel optimization, ICLR 2022 (AmIGO).
    """
    where = "stochastic_hypergradient"
    full, full_linear = check_functions(where, outer, phi, optimizer, linear_optimizer)
    counts = {
        "lower_steps": lower_steps,
        "linear_steps": linear_steps,
        "num_batches": num_batches,
        "batches_per_step": batches_per_step,
    }
    for name, count in counts.items():
        check_schedule(where, name, count)
    check_start(f"`start` of `{where}`", start)
    policy = Policy.of(where, on_failure, monitor)

    def check(call: Call) -> None:
        fixed = [x if isinstance(x, int) else None for x in counts.values()]
        of_phi = None
        if not any(x is None for x in fixed):
            t, k, j, m = (x or 0 for x in fixed)
            of_phi = (t + k) * m + j
        check_given(where, call, {"phi": of_phi, "outer": fixed[2]})

    @Compiled
    def solved(
        memory: _Memory, num_updates: jax.Array, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        call = Call(args, kwargs)
        t, k, j, m = (number_at(count, num_updates) for count in counts.values())
        streams = memory.streams.resumed(call)
        (w0, lower), of_v = start.propose(memory.start)
        at = Stochastic.at(where, outer, phi, w0, lam, call)
        drawings: tuple[Drawing, ...] = streams.phi

        def mean_of_inner(
            phi: ComposedMap, w: PyTree, count: int | jax.Array, drawings: PyTree
        ) -> tuple[PyTree, PyTree]:
            of_batch = call.sampler(lambda batch: at.image_of(phi.inner, batch, w))
            return mean_over(count, of_batch, drawings)

        def mean_residual(w: PyTree, drawings: PyTree) -> tuple[PyTree, PyTree]:
            """W − Φ(w) of m batches; the mean is that of T where Φ = G(T)."""
            if isinstance(phi, ComposedMap) and not (isinstance(m, int) and m == 1):
                batch, _ = call.draw(drawings)  # For G, which depends on no data.
                u, drawings = mean_of_inner(phi, w, m, drawings)
                return at.equation(batch, about(phi, u)).residual(w, at.x), drawings
            of_batch = call.sampler(lambda batch: at.equation(batch).residual(w, at.x))
            return mean_over(m, of_batch, drawings)

        def lower_step(_: jax.Array, carry: PyTree) -> PyTree:
            w, state, drawings, _ = carry
            r_w, drawings = mean_residual(w, drawings)
            return *moved_by(full, state, w, r_w), drawings, r_w

        w, _ = partition(w0)[:2]
        carry = (w, lower, drawings, tree.zeros_like(w))
        w, lower, drawings, r_w = lax.fori_loop(0, t, lower_step, carry)

        of_e = call.sampler(lambda batch: at.value_and_gradients(batch, w))
        (value, b, direct), of_outer = mean_over(j, of_e, streams.outer)

        batches_of_mixed, batch_map = None, phi
        if isinstance(phi, ComposedMap):
            # The batches of the mean of T are those of the mixed product, as in NSID.
            batches_of_mixed = drawings
            u, drawings = mean_of_inner(phi, w, j, drawings)
            batch_map = about(phi, u)

        def linear_step(_: jax.Array, carry: PyTree) -> PyTree:
            v, state, drawings, _ = carry

            product = call.sampler(lambda batch: at.equation(batch, batch_map).vjp(w, at.x).j.a(v))
            av, drawings = mean_over(m, product, drawings)
            minus_r_v = tree.sub(av, b)
            return *moved_by(full_linear, state, v, minus_r_v), drawings, minus_r_v

        if of_v is None:  # Cold: from 0.
            v0 = tree.zeros_like(w)
            of_v = v0, strongly_typed(full_linear.init(v0))
        v, linear = partition(of_v[0])[0], of_v[1]
        carry = (v, linear, drawings, tree.zeros_like(v))
        v, linear, drawings, r_v = lax.fori_loop(0, k, linear_step, carry)

        mixed = call.sampler(lambda batch: at.equation(batch, batch_map).vjp(w, at.x).b(v))
        if batches_of_mixed is None:
            bv, drawings = mean_over(j, mixed, drawings)
        else:
            bv, _ = mean_over(j, mixed, batches_of_mixed)

        means = memory.means
        of_w, of_linear = steps_info(t, r_w, w, means), steps_info(k, r_v, v, jnp.asarray(True))
        grad = placed_like(tree.add(direct, bv), at.x)
        grad = enforce(policy, LOWER_STAGE, of_w, grad)
        grad = enforce(policy, STAGE, of_linear, grad)

        w, v = at.join_w(w), at.join_w(v)
        recorded = start.record(memory.start, (w, lower), (v, linear))
        lost = passed_over(policy, of_w, of_linear)
        kept = tree.where(lost, memory.start, recorded)
        memory = owned(_Memory(kept, Streams(drawings, of_outer), means))
        state = HypergradientState(
            value, w, v, HypergradientInfo(of_w, of_linear), memory, num_updates + 1
        )
        return at.join_gradient(grad), state

    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        check_state(state)
        check(Call(args, kwargs))
        return solved(state.memory, state.num_updates, lam, *args, **kwargs)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        call = Call(args, kwargs)
        check(call)
        begun = beginning(where, outer, phi, (full, full_linear), w0, lam, call)
        remembered = start.init((begun.w, begun.states[0]), (begun.v, begun.states[1]))
        memory = _Memory(remembered, Streams.first(call), begun.means)
        _, shapes = solved.eval_shape(memory, jnp.int32(0), lam, *args, **kwargs)
        value, info = blank((shapes.value, shapes.info))
        return owned(HypergradientState(value, begun.w, begun.v, info, memory, jnp.int32(0)))

    return Hypergradient(init, update, outer, phi)
