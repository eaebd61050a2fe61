"""Single loops: `soba` and `saba` move w, v and λ at once, each by one batch.

The three directions are the gradients of the Lagrangian L(w, λ, v) = E + ⟨v, Φ − w⟩ at (w, v, λ):

    w:  r_w = w − Φ(w, λ),     v:  −r_v = (I − Jᵀ)v − ∇₁E,     λ:  ∇₂E + Bᵀv ,

whose common zero is the solution. Each is a mean over rows, so that those of a batch are unbiased at
(w, v, λ), whatever these are. What λ's direction errs by is how far (w, v) lags behind λ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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
from ..leaves import blank, owned, partition
from ..mapped_axes import placed_like
from ..monitor import Monitor
from ..printing import printed
from ..types import ComposedMap, OnFailure, Outer, Phi, PyTree
from .batched import (
    PICARD,
    Stochastic,
    Streams,
    beginning,
    check_functions,
    moved_by,
    steps_info,
)
from .batches import Call, Drawing, Minibatches, check_given, take

tree = optax.tree


class _OfPhi(NamedTuple):
    """What Φ of a batch gives at (w, v): r_w, (I − Jᵀ)v and Bᵀv."""

    r_w: PyTree
    av: PyTree
    bv: PyTree


class _OfOuter(NamedTuple):
    """What E of a batch gives at w: its value, ∇₁E and ∇₂E."""

    value: jax.Array
    b: PyTree
    direct: PyTree


class _Memory(NamedTuple):
    """What the next update needs.

    Attributes:
        w: W.
        v: V.
        optimizer: The state of the optimiser of w.
        linear_optimizer: That of v.
        draws: What the way of drawing batches remembers.
        means: Whether Φ and E are means over rows, as far as `init` could tell.
    """

    w: PyTree
    v: PyTree
    optimizer: PyTree
    linear_optimizer: PyTree
    draws: PyTree
    means: jax.Array


class _Draws(NamedTuple):
    """How directions come from batches.

    Attributes:
        first: `(call, of_phi, of_outer) -> draws`, from the shapes of directions.
        directions: `(at, w, v, draws) -> (of_phi, of_outer, after)`, where `after(failed)` is what to
            remember: after a failed update too the next one gets other batches.
        check: `(call)`, raising where the sources do not serve.
    """

    first: Callable[[Call, _OfPhi, _OfOuter], PyTree]
    directions: Callable[
        [Stochastic, PyTree, PyTree, PyTree],
        tuple[_OfPhi, _OfOuter, Callable[[jax.Array], PyTree]],
    ]
    check: Callable[[Call], None]


@printed
def soba(
    outer: Outer,
    phi: Phi,
    optimizer: optax.GradientTransformation = PICARD,
    linear_optimizer: optax.GradientTransformation = PICARD,
    *,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Hypergradient:
    """SOBA: one batch moves w, v and λ at once, along the gradients of the Lagrangian.

        w ← w − η (w − Φ_ζ),   v ← v − η ((I − J_ζᵀ)v − ∇₁E_ξ),   g = ∇₂E_ξ + B_ζᵀ v ,

    all three at the (w, v, λ) before the update, from one linearisation of Φ_ζ and one gradient of E_ξ.
    Take the steps of λ by `bilevel` with `optax.sgd` and a schedule: the paper's steps fall as 1/√n,
    all of them in proportion.

    g is unbiased for ∇_λ L at (w, v, λ). For ∇f it is biased by what (w, v) lags behind λ, to first
    order in it; with steps that decrease the lag goes, and with constant ones it stays.

    Φ and E have to be means over rows, which `init` looks at; see `stochastic_hypergradient`. Of a
    `proximal_gradient` map G(T) the fixed point of the mean of G(T_ζ) is found, which is that of Φ only
    where no entry scatters about a kink.

    Cost of an update: one Φ, one product with Jᵀ and Bᵀ from the same linearisation, one gradient of E,
    on a batch each. Memory: w, v, a batch.
    When not to use it: for a few accurate hypergradients: `stochastic_hypergradient` or
    `hypergradient`; where λ must not move before w has.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`, a mean over rows.
        phi: `phi(w, lam, *args, **kwargs) -> w`; `minibatches` or `given_batches` stand among the
            arguments.
        optimizer: For w, an optax optimiser of w − Φ_ζ(w).
        linear_optimizer: For v.
        on_failure: What becomes of the gradient where w or v is not finite; see `hypergradient`.
        monitor: Told of w and v at each update; see `hypergradient`.

    Returns:
        A `Hypergradient`, the functions (`init`, `update`), for `bilevel`.

    Raises:
        TypeError: An argument is not of its kind; when called, there are no batches among the
        arguments. ValueError: `on_failure` is none of the policies.

    >>> import fixedgrad as fg
    >>> x = jax.random.normal(jax.random.key(0), (1000, 3))
    >>> loss = lambda w, lam, x: 0.5 * jnp.mean((x @ w - lam) ** 2)
    >>> outer = lambda w, lam, x: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> phi = fg.gradient_descent(loss, step_size=0.2)
    >>> loop = fg.bilevel(soba(outer, phi), optax.sgd(0.02))
    >>> data = fg.minibatches(x, 32)
    >>> state, _ = loop.run(loop.init(jnp.zeros(3), 1.0, data), data, num_steps=300)

    References:
        Dagréou, Ablin, Vaiter, Moreau, A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms, NeurIPS 2022.
    """

    def directions(
        at: Stochastic, w: PyTree, v: PyTree, streams: Streams
    ) -> tuple[_OfPhi, _OfOuter, Callable[[jax.Array], Streams]]:
        streams = streams.resumed(at.call)
        zeta, of_phi = at.call.draw(streams.phi)
        xi, of_outer = at.call.draw(streams.outer)
        return _of_phi(at, zeta, w, v), _of_outer(at, xi, w), lambda _: Streams(of_phi, of_outer)

    draws = _Draws(
        lambda call, *_: Streams.first(call),
        directions,
        lambda call: check_given("soba", call, {"phi": 1, "outer": 1}),
    )
    options = (optimizer, linear_optimizer, on_failure, monitor)
    return _single_loop("soba", outer, phi, draws, *options)


@printed
def saba(
    outer: Outer,
    phi: Phi,
    optimizer: optax.GradientTransformation = PICARD,
    linear_optimizer: optax.GradientTransformation = PICARD,
    *,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Hypergradient:
    """SABA: as `soba`, with the variance reduction of SAGA: constant steps converge to the solution.

    The rows are cut into blocks of the batch size. Each direction d of block i is corrected by what
    that block gave when it was last seen, and by the mean of these over all blocks:

        d_i(w, v, λ) − seen_i + mean of seen,        seen_i ← d_i(w, v, λ) ,

    unbiased for the mean over blocks, with a variance that goes to zero as (w, v, λ) settles. At first
    what was seen is 0, which is unbiased too. With `replacement=False` the blocks come in epochs, each
    block once in an epoch.

    The first `minibatches` among the arguments is that of Φ, the last one that of E; one alone serves
    both.

    Assumed, not checked: Φ depends on the rows of the first source only, E on those
    of the last.

    Cost of an update: as `soba`. Memory: (blocks of Φ) × (2 w + λ) + (blocks of E) × (w + λ), where w
    and λ stand for their sizes.
    When not to use it: where these tables are too large; with `given_batches`, which do not come back.

    Args:
        outer: As in `soba`.
        phi: As in `soba`; `minibatches` whose batch size divides the number of rows.
        optimizer: As in `soba`; a constant step serves.
        linear_optimizer: As in `soba`.
        on_failure: As in `soba`.
        monitor: As in `soba`.

    Returns:
        A `Hypergradient`, the functions (`init`, `update`), for `bilevel`.

    Raises:
        TypeError: An argument is not of its kind, or `phi` a `proximal_gradient` map; when called, the
            sources are not one or two `minibatches`.
        ValueError: `on_failure` is none of the policies; when called, a batch size does not divide the
            number of rows.

    >>> import fixedgrad as fg
    >>> x = jax.random.normal(jax.random.key(0), (1000, 3))
    >>> loss = lambda w, lam, x: 0.5 * jnp.mean((x @ w - lam) ** 2)
    >>> outer = lambda w, lam, x: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> phi = fg.gradient_descent(loss, step_size=0.2)
    >>> loop = fg.bilevel(saba(outer, phi), optax.sgd(0.02))
    >>> data = fg.minibatches(x, 50)
    >>> state, _ = loop.run(loop.init(jnp.zeros(3), 1.0, data), data, num_steps=300)

    References:
        Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022, section 3.3; Defazio, Bach, Lacoste-Julien, SAGA,
        NeurIPS 2014.
    """
    if isinstance(phi, ComposedMap):
        raise TypeError(
            "`saba` needs a `phi` that is a mean over rows, got a `proximal_gradient` map, whose mean "
            "over blocks has another fixed point; take `stochastic_hypergradient`, with larger batches "
            "by `batches_per_step`."
        )

    draws = _Draws(_Tables.first, _from_tables, _check_blocks)
    options = (optimizer, linear_optimizer, on_failure, monitor)
    return _single_loop("saba", outer, phi, draws, *options)


def _single_loop(
    where: str,
    outer: Outer,
    phi: Phi,
    draws: _Draws,
    optimizer: optax.GradientTransformation,
    linear_optimizer: optax.GradientTransformation,
    on_failure: OnFailure,
    monitor: Monitor | None,
) -> Hypergradient:
    """The form whose directions come as `draws` says."""
    full, full_linear = check_functions(where, outer, phi, optimizer, linear_optimizer)
    policy = Policy.of(where, on_failure, monitor)

    @Compiled
    def solved(
        memory: _Memory, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        at = Stochastic.at(where, outer, phi, memory.w, lam, Call(args, kwargs))
        w, v = partition(memory.w)[0], partition(memory.v)[0]
        of_phi, of_outer, after = draws.directions(at, w, v, memory.draws)
        minus_r_v = tree.sub(of_phi.av, of_outer.b)
        grad = placed_like(tree.add(of_outer.direct, of_phi.bv), at.x)

        new_w, state = moved_by(full, memory.optimizer, w, of_phi.r_w)
        new_v, linear = moved_by(full_linear, memory.linear_optimizer, v, minus_r_v)
        lower = steps_info(1, of_phi.r_w, new_w, memory.means)
        of_v = steps_info(1, minus_r_v, new_v, jnp.asarray(True))
        grad = enforce(policy, LOWER_STAGE, lower, grad)
        grad = enforce(policy, STAGE, of_v, grad)

        # What was drawn is kept out of the choice, which would copy SABA's tables.
        moved = _Memory(at.join_w(new_w), at.join_w(new_v), state, linear, (), memory.means)
        failed = passed_over(policy, lower, of_v)
        kept = owned(tree.where(failed, memory._replace(draws=()), moved))
        kept = kept._replace(draws=after(failed))
        info = HypergradientInfo(lower, of_v)
        new = HypergradientState(of_outer.value, moved.w, moved.v, info, kept, jnp.int32(0))
        return at.join_gradient(grad), new

    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        check_state(state)
        draws.check(Call(args, kwargs))
        grad, new = solved(state.memory, lam, *args, **kwargs)
        return grad, new._replace(num_updates=state.num_updates + 1)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        call = Call(args, kwargs)
        draws.check(call)
        begun = beginning(where, outer, phi, (full, full_linear), w0, lam, call)
        w_x, v_x = partition(begun.w)[0], partition(begun.v)[0]

        def of_batch() -> tuple[_OfPhi, _OfOuter]:
            batch, _ = call.draw(Streams.first(call).phi)
            return _of_phi(begun.at, batch, w_x, v_x), _of_outer(begun.at, batch, w_x)

        first = draws.first(call, *jax.eval_shape(of_batch))
        memory = _Memory(begun.w, begun.v, *begun.states, first, begun.means)
        _, shapes = solved.eval_shape(memory, lam, *args, **kwargs)
        value, info = blank((shapes.value, shapes.info))
        return owned(HypergradientState(value, begun.w, begun.v, info, memory, jnp.int32(0)))

    return Hypergradient(init, update, outer, phi)


def _of_phi(at: Stochastic, batch: Call, w: PyTree, v: PyTree) -> _OfPhi:
    """From one linearisation of Φ of a batch."""
    equation = at.equation(batch)
    value, pull = jax.vjp(equation.function, w, at.x)
    of_w, of_x = pull(v)
    if equation.by_residual:  # F = w − Φ: (I − Jᵀ)v and −Bᵀv.
        return _OfPhi(value, of_w, tree.scale(-1, of_x))
    return _OfPhi(tree.sub(w, value), tree.sub(v, of_w), of_x)


def _of_outer(at: Stochastic, batch: Call, w: PyTree) -> _OfOuter:
    return _OfOuter(*at.value_and_gradients(batch, w))


class _Seen(NamedTuple):
    """What each block gave when it was last seen, and the mean of these."""

    rows: PyTree
    mean: PyTree

    @classmethod
    def nothing(cls, shapes: PyTree, number: int) -> "_Seen":
        """Zeros for so many blocks."""
        rows = jax.tree.map(lambda s: jnp.zeros((number, *s.shape), s.dtype), shapes)
        return cls(rows, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def corrected(self, i: jax.Array, now: PyTree) -> tuple[PyTree, Callable[[jax.Array], "_Seen"]]:
        """The corrected direction of block i; what is seen from now on, unless the update failed."""
        number = jax.tree.leaves(self.rows)[0].shape[0]
        # Read once, in a branch of its own: a read that XLA repeats where it is used, so after the row
        # is written as well, would cost a copy of the table.
        before = lax.cond(
            i >= 0,
            lambda: jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), self.rows
            ),
            lambda: tree.zeros_like(self.mean),
        )
        change = tree.sub(now, before)

        def after(failed: jax.Array) -> _Seen:
            row, mean = tree.where(
                failed,
                (before, self.mean),
                (now, jax.tree.map(lambda m, c: m + c / number, self.mean, change)),
            )
            rows = jax.tree.map(
                lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), self.rows, row
            )
            return _Seen(rows, mean)

        return tree.add(self.mean, change), after


class _Tables(NamedTuple):
    """The memory of SABA.

    Attributes:
        phi: Of the blocks of Φ.
        outer: Of the blocks of E.
        draws: Where the draws of blocks of Φ and of E are.
    """

    phi: _Seen
    outer: _Seen
    draws: tuple[Drawing, Drawing]

    @classmethod
    def first(cls, call: Call, of_phi: _OfPhi, of_outer: _OfOuter) -> "_Tables":
        lower, upper = map(_blocks, _sources(call))
        return cls(
            _Seen.nothing(of_phi, lower.num_rows),
            _Seen.nothing(of_outer, upper.num_rows),
            (lower.first(0), upper.first(1)),
        )


def _from_tables(
    at: Stochastic, w: PyTree, v: PyTree, tables: _Tables
) -> tuple[_OfPhi, _OfOuter, Callable[[jax.Array], _Tables]]:
    lower, upper = _sources(at.call)
    (i,), of_i = _blocks(lower).draw(tables.draws[0])
    (j,), of_j = _blocks(upper).draw(tables.draws[1])

    def block(source: Minibatches, i: jax.Array) -> PyTree:
        rows = i * source.batch_size + jnp.arange(source.batch_size, dtype=jnp.int32)
        return take(source.data, rows)

    def call_with(of_lower: jax.Array, of_upper: jax.Array) -> Call:
        blocks = [block(lower, of_lower), block(upper, of_upper)]
        return at.call.replaced(blocks[: len(at.call.sources)])

    # With one source for both, E sees another block of it.
    batch, of_outer = call_with(i, j), call_with(j, j)
    of_phi_now, phi = tables.phi.corrected(i, _of_phi(at, batch, w, v))
    of_outer_now, seen = tables.outer.corrected(j, _of_outer(at, of_outer, w))
    return of_phi_now, of_outer_now, lambda failed: _Tables(phi(failed), seen(failed), (of_i, of_j))


def _sources(call: Call) -> tuple[Minibatches, Minibatches]:
    """The source of Φ and that of E."""
    first, *others = call.sources
    return first, others[-1] if others else first  # pyright: ignore[reportReturnType]


def _blocks(source: Minibatches) -> Minibatches:
    """The numbers of the blocks, drawn one at a time as the source draws rows."""
    numbers = jnp.arange(source.num_rows // source.batch_size, dtype=jnp.int32)
    return dataclasses.replace(source, data=numbers, batch_size=1)


def _check_blocks(call: Call) -> None:
    """Raises unless one or two `minibatches` are there, and cut their rows into blocks."""
    sources: list[Any] = call.sources
    if not 1 <= len(sources) <= 2 or not all(isinstance(x, Minibatches) for x in sources):
        raise TypeError(
            "`saba` needs one or two `minibatches` among the arguments, that of Φ first and that of E "
            f"last, got {sources}; put what belongs to one row into one of them."
        )
    for source in sources:
        if source.num_rows % source.batch_size:
            raise ValueError(
                f"`saba` cuts {source.num_rows} rows into blocks of {source.batch_size}, which does "
                f"not divide them; take a batch size of {_divisors_near(source)}, or leave out rows."
            )


def _divisors_near(source: Minibatches) -> str:
    n, size = source.num_rows, source.batch_size
    below = next(x for x in range(size, 0, -1) if n % x == 0)
    above = next(x for x in range(size, n + 1) if n % x == 0)
    return f"{below} or {above}"
