"""What the stochastic forms share: Φ and E of a batch at one λ, means over batches, the state."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..errors import check_callable, check_count, check_scalar, show
from ..leaves import (
    eval_shape,
    is_inexact,
    partition,
    settled_lam,
    split_lam,
    started,
    strongly_typed,
    zeros_like_inexact,
)
from ..lower.optimisers import check_optimizer
from ..printing import by_name
from ..problem import Equation, precise
from ..real_form import norm, resolution
from ..types import (
    ComposedMap,
    Outer,
    Phi,
    PyTree,
    SolveInfo,
    Status,
    solve_info,
    status_of,
)
from .batches import Call, Drawing, check_sources

tree = optax.tree

Count = int | Callable[[jax.Array], Any]
"""A number of steps or batches: fixed, or a function of the number of updates so far."""

PICARD = optax.GradientTransformation(*map(by_name, optax.sgd(1.0)))  # pyright: ignore


class Streams(NamedTuple):
    """Where the draws for Φ and for E are."""

    phi: tuple[Drawing, ...]
    outer: tuple[Drawing, ...]

    @classmethod
    def first(cls, call: Call) -> "Streams":
        """Before the first draw."""
        return cls(call.first(0), call.first(1))

    def resumed(self, call: Call) -> "Streams":
        """At the beginning of an update with these arguments."""
        return Streams(call.resumed(self.phi), call.resumed(self.outer))


class Stochastic(NamedTuple):
    """Φ and E at one λ, of which every evaluation gets a batch.

    Attributes:
        where: The public function, for messages.
        outer: E.
        phi: Φ.
        x: The inexact leaves of λ.
        call: The further arguments, with sources among them.
        w: A w that says of what kind all are.
        join_lam: From inexact leaves to λ.
        join_w: From inexact leaves to w.
        join_gradient: From those of a gradient to one like λ.
    """

    where: str
    outer: Outer
    phi: Phi
    x: PyTree
    call: Call
    w: PyTree
    join_lam: Callable[[PyTree], PyTree]
    join_w: Callable[[PyTree], PyTree]
    join_gradient: Callable[[PyTree], PyTree]

    @classmethod
    def at(
        cls, where: str, outer: Outer, phi: Phi, w: PyTree, lam: PyTree, call: Call
    ) -> "Stochastic":
        """At a λ whose numbers become arrays.

        Raises:
            TypeError: λ has no inexact leaf.
        """
        lam = settled_lam(lam, w)
        x, join_lam, join_gradient = split_lam(where, lam)
        _, rest, join = partition(w)
        join_w = lambda w_x: join(w_x, rest)  # noqa: E731
        return cls(where, outer, phi, x, call, w, join_lam, join_w, join_gradient)

    def equation(self, batch: Call, phi: Phi | None = None) -> Equation:
        """The equation w = Φ(w, x) of a batch; `phi` is another map of the same arguments."""

        def call(x: PyTree) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
            return (self.join_lam(x), *batch.args), batch.kwargs

        return Equation.of(self.where, phi or self.phi, self.w, self.x, call)

    def value(self, batch: Call, w: PyTree, x: PyTree) -> jax.Array:
        """E of a batch at inexact leaves."""
        return self.outer(self.join_w(w), self.join_lam(x), *batch.args, **batch.kwargs)

    def value_and_gradients(self, batch: Call, w: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        """E of a batch at w, ∇₁E and ∇₂E."""
        of_batch = functools.partial(self.value, batch)
        f, (b, direct) = jax.value_and_grad(of_batch, argnums=(0, 1))(w, self.x)
        return f, b, direct

    def image_of(self, inner: Callable[..., PyTree], batch: Call, w: PyTree) -> PyTree:
        """T(w, λ) of a batch, for Φ = G(T)."""
        at_highest, _ = precise(self.where, inner)
        return at_highest(self.join_w(w), self.join_lam(self.x), *batch.args, **batch.kwargs)


def are_means(at: Stochastic, w: PyTree) -> jax.Array:
    """Whether Φ and E of a batch twice are those of the batch, as means over its rows are.

    A sum over rows is twice as large; a batch tells then nothing about all data. What does not take a
    batch of twice the rows is not judged.
    """

    def values(batch: Call) -> tuple[PyTree, jax.Array]:
        return at.equation(batch).residual(w, at.x), at.value(batch, w, at.x)

    once, _ = at.call.draw(Streams.first(at.call).phi)
    twice = at.call.drawn_twice(Streams.first(at.call).phi)
    r, e = values(once)
    try:
        r_twice, e_twice = values(twice)
    except Exception:  # Whatever a function of one batch size may raise.
        return jnp.asarray(True)
    tolerance = math.sqrt(resolution((w, at.x)))

    def same(one: PyTree, other: PyTree, least: jax.Array) -> jax.Array:
        size = jnp.maximum(norm(one) + norm(other), least.astype(norm(one).dtype))
        # NaN is another matter, of another status.
        return ~(norm(tree.sub(other, one)) > tolerance * size)

    nothing = jnp.zeros((), e.dtype)
    return same(r, r_twice, tolerance * norm(w)) & same(e, e_twice, nothing)


def about(phi: ComposedMap, u: PyTree) -> Phi:
    """The map with the value G(u) and the derivative G'(u) T'(w) of a batch.

    (∂₁T_ζ)ᵀ G'(u)ᵀ has the mean (∂₁T)ᵀ G'(u)ᵀ over batches ζ, where G' stays at one u, the mean of T
    over many: the derivative of G(T_ζ) as it is has not, as G' would jump with the batch.
    """

    def moved(u: jax.Array, t: jax.Array) -> jax.Array:
        return u + (t - lax.stop_gradient(t)) if is_inexact(t) else t

    def centred(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        t = phi.inner(w, *args, **kwargs)
        return phi.after(jax.tree.map(moved, u, t), *args, **kwargs)

    return centred


def mean_over(
    count: int | jax.Array, sample: Callable[[PyTree], tuple[PyTree, PyTree]], drawings: PyTree
) -> tuple[PyTree, PyTree]:
    """The mean of `count` samples `sample(drawings) -> (value, drawings)`, and the drawings after."""
    if isinstance(count, int) and count == 1:
        return sample(drawings)
    shapes, _ = jax.eval_shape(sample, drawings)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(_: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        value, drawings = sample(carry[1])
        return tree.add(carry[0], value), drawings

    total, drawings = lax.fori_loop(0, count, add, (zeros, drawings))

    def mean(x: jax.Array) -> jax.Array:
        return x / jnp.asarray(count, x.real.dtype) if is_inexact(x) else x

    return jax.tree.map(mean, total), drawings


def moved_by(
    optimizer: optax.GradientTransformationExtraArgs, state: PyTree, x: PyTree, ascent: PyTree
) -> tuple[PyTree, PyTree]:
    """X after a step of an optimiser against `ascent`, and its state."""
    with jax.numpy_dtype_promotion("standard"):  # As optax promotes its own counts.
        updates, state = optimizer.update(ascent, state, x)
    return optax.apply_updates(x, updates), state


def steps_info(num_steps: Any, residual: PyTree, x: PyTree, means: jax.Array) -> SolveInfo:
    """The info of a solve by steps of batches: the residual is that of its last batch."""
    finite = jnp.isfinite(norm(x)) & jnp.isfinite(norm(residual))
    status = status_of(Status.FIXED_STEPS, (means, Status.NOT_A_MEAN), (finite, Status.NON_FINITE))
    return solve_info(num_steps, norm(residual), status)


class Beginning(NamedTuple):
    """What `init` of every form starts from.

    Attributes:
        at: Φ and E, at the first w and λ.
        w: The first w, as arrays.
        v: Zeros like it.
        states: Of the optimisers of w and of v.
        means: Whether Φ and E are means over rows, as far as `are_means` can tell.
    """

    at: Stochastic
    w: PyTree
    v: PyTree
    states: tuple[PyTree, PyTree]
    means: jax.Array


def beginning(
    where: str,
    outer: Outer,
    phi: Phi,
    optimisers: tuple[Any, Any],
    w0: PyTree,
    lam: PyTree,
    call: Call,
) -> Beginning:
    """The beginning at w0 and λ; E is checked on a batch.

    Raises:
        TypeError: There are no batches, or E is no real scalar.
    """
    check_sources(where, call)
    batch, _ = call.draw(Streams.first(call).phi)
    w0 = started(where, phi, w0, (lam, *batch.args), batch.kwargs)
    check_scalar(where, eval_shape(outer, w0, lam, *batch.args, **batch.kwargs))
    at, w_x = Stochastic.at(where, outer, phi, w0, lam, call), partition(w0)[0]
    of_w, of_v = optimisers
    states = strongly_typed((of_w.init(w_x), of_v.init(tree.zeros_like(w_x))))
    return Beginning(at, w0, zeros_like_inexact(w0), states, are_means(at, w_x))


def check_functions(
    where: str, outer: object, phi: object, optimizer: object, linear_optimizer: object
) -> tuple[Any, Any]:
    """The optimisers, with extra arguments; raises `TypeError` unless all are of their kinds."""
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    check_optimizer(where, optimizer)
    check_optimizer(where, linear_optimizer)
    full = optax.with_extra_args_support
    return full(optimizer), full(linear_optimizer)  # pyright: ignore[reportArgumentType]


def check_schedule(where: str, name: str, count: object) -> None:
    """Raises `ValueError` unless `count` is a positive integer or a function of the update number."""
    if callable(count):
        return
    if not isinstance(count, int):
        raise ValueError(
            f"`{name}` of `{where}` must be a positive integer or a function of the number of updates, "
            f"got {show(count)}."
        )
    check_count(where, name, count)


def number_at(count: Count, num_updates: jax.Array) -> int | jax.Array:
    """The number of steps or batches at an update; at least 1."""
    if isinstance(count, int):
        return count
    return jnp.maximum(jnp.asarray(count(num_updates)), 1).astype(jnp.int32)
