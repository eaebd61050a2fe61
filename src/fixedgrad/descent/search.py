"""The evaluations of one step of `descent`: where to, how accurately, and whether it is taken."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..bilevel import StopReason
from ..hypergradient import HypergradientState
from ..leaves import partition
from ..real_form import inner, norm, norms, ratio, real_dtype, resolution, steepest_ascent
from ..types import PyTree, Scalar, status_of
from .feasible import Feasible
from .quasi_newton import Pairs, inverse_hessian, masked

tree = optax.tree

_ACCURACY = 0.1  # Relative error of a hypergradient that is asked for at first.
_SHARPER = 0.1  # By so much, where a comparison is undecided.
_VAGUE = 0.3  # A gradient whose relative error is larger gives no direction.
_SUFFICIENT = 1e-4  # c, Armijo's constant.
_MAX_TRIALS = 30  # In one step.
_PATIENCE = 10  # Products of a trial: so many times those of the costliest λ so far,
_LEAST = 500  # and so many more.
_NO_LIMIT = jnp.iinfo(jnp.int32).max
_FURTHEST = 10.0  # Times the size of λ, of a quasi-Newton step.


class Point(NamedTuple):
    """What is known at a λ.

    Attributes:
        x: Its inexact leaves.
        hypergrad: The state of the hypergradient.
        g: The direction of steepest ascent, by the corrected hypergradient.
        value: f̂.
        value_error: ε, for f̂.
        error: e, for ĝ.
        usable: Whether all is finite, certified, and ĝ known to better than its size.
        products: Of this evaluation.
    """

    x: PyTree
    hypergrad: HypergradientState
    g: PyTree
    value: jax.Array
    value_error: jax.Array
    error: jax.Array
    usable: jax.Array
    products: jax.Array

    @classmethod
    def of(cls, x: PyTree, gradient: PyTree, state: HypergradientState) -> "Point":
        """From what an update gave."""
        c = state.certificate
        g = steepest_ascent(partition(gradient)[0])
        error = c.safety * c.remainder + c.rounding
        finite = jnp.isfinite(c.polished_value) & jnp.isfinite(norm(g)) & jnp.isfinite(error)
        products = sum(c.products)
        return cls(
            x,
            state,
            g,
            c.polished_value,
            c.value_remainder,
            error,
            finite & c.valid,
            jnp.asarray(products, jnp.int32),
        )


class DescentMemory(NamedTuple):
    """What the next step needs beside λ and the state of the hypergradient there.

    Attributes:
        known: Whether λ was evaluated.
        g: ĝ at λ, as the direction of steepest ascent.
        value: f̂.
        value_error: ε.
        error: e.
        products: Of all steps, int32.
        pairs: Of the quasi-Newton method.
        reach: The step size of a plain gradient step.
        calm: Steps in a row that lowered f by less than rtol |f|, int32.
        costliest: The most products that a λ which was taken has cost, int32.
    """

    known: jax.Array
    g: PyTree
    value: jax.Array
    value_error: jax.Array
    error: jax.Array
    products: jax.Array
    pairs: Pairs
    reach: jax.Array
    calm: jax.Array
    costliest: jax.Array


class Search(NamedTuple):
    """The carry over the evaluations of one step.

    Attributes:
        base: λ.
        tried: The last trial, or `base` before one.
        pairs: As the search takes its direction from them.
        reach: As in `DescentMemory`.
        alpha: Of the next trial.
        at_base: Whether λ itself is evaluated next.
        known: Whether λ was evaluated.
        rtol: What the next evaluation asks for.
        sharpest: The smallest rtol that was asked for.
        sharpened: How often the present comparison was.
        trials: Evaluations.
        lower: Evaluations of Φ and products with J.
        linear: Products with Jᵀ.
        accepted: Whether the last trial is the next λ.
        reason: A `StopReason`.
    """

    base: Point
    tried: Point
    pairs: Pairs
    reach: jax.Array
    alpha: jax.Array
    at_base: jax.Array
    known: jax.Array
    rtol: jax.Array
    sharpest: jax.Array
    sharpened: jax.Array
    trials: jax.Array
    lower: jax.Array
    linear: jax.Array
    accepted: jax.Array
    reason: jax.Array


class At(NamedTuple):
    """The feasible set, for inexact leaves.

    Attributes:
        feasible: The set.
        join: From inexact leaves to λ.
        atol: On the projected gradient.
    """

    feasible: Feasible
    join: Callable[[PyTree], PyTree]
    atol: Scalar

    def stationary(self, p: Point) -> jax.Array:
        """Whether the projected gradient is zero, or below the absolute tolerance with its error."""
        left = self.projected(p)
        return (left == 0) | (left + p.error <= jnp.asarray(self.atol, left.dtype))

    def project(self, x: PyTree) -> PyTree:
        """P(x)."""
        return partition(self.feasible.project(self.join(x)))[0]

    def towards(self, p: Point) -> PyTree:
        """X − P(x − ĝ)."""
        return tree.sub(p.x, self.project(tree.sub(p.x, p.g)))

    def projected(self, p: Point) -> jax.Array:
        """‖x − P(x − ĝ)‖, zero at a stationary point."""
        return norm(self.towards(p))

    def scaled(self, p: Point) -> jax.Array:
        """Σ max(|λᵢ|, 1) |(λ − P(λ − ĝ))ᵢ| and its error.

        What a change of each λᵢ by its size, or by 1, does to f by its slope.
        """
        pairs = zip(jax.tree.leaves(p.x), jax.tree.leaves(self.towards(p)), strict=True)
        sizes = [jnp.sum(jnp.maximum(jnp.abs(x), 1) * jnp.abs(change)) for x, change in pairs]
        return jnp.sum(jnp.stack([s.astype(p.error.dtype) for s in sizes])) + p.error * jnp.maximum(
            norm(p.x), 1
        )

    def direction(self, p: Point, pairs: Pairs, reach: jax.Array) -> PyTree:
        """From λ to where α = 1 leads, no further than λ is long, or 1; ten times that with pairs."""
        free = self.feasible.free(p.x, p.g)
        newton, served = inverse_hessian(pairs, p.g, free)
        plain = _scaled(reach, masked(p.g, free))
        back = tree.where(served, newton, plain)
        limit = jnp.where(served, _FURTHEST, 1.0) * jnp.maximum(1.0, _largest(p.x))
        size = _largest(back)
        d = _scaled(-jnp.minimum(1.0, ratio(limit, size)), back)
        if self.feasible.bends:
            return d

        def to(d: PyTree) -> PyTree:
            return tree.sub(self.project(tree.add(p.x, d)), p.x)

        segment = to(d)
        # A projection of a quasi-Newton step may point nowhere; that of a gradient step descends.
        sized = norms(segment, p.g)
        descends = -inner(segment, p.g) >= 1e-3 * sized[0] * sized[1]
        gradient = to(_scaled(-reach, p.g))
        return tree.where(descends, segment, gradient)

    def trial(self, p: Point, d: PyTree, alpha: jax.Array) -> PyTree:
        """The point at α on the path."""
        x = tree.add(p.x, _scaled(alpha, d))
        return self.project(x) if self.feasible.bends else x


def searched(
    at: At,
    evaluate: Callable[[jax.Array, jax.Array, HypergradientState, PyTree], Point],
    base: Point,
    m: DescentMemory,
    done: jax.Array,
) -> Search:
    """Evaluations until a trial is taken, or the loop ends."""
    dtype = base.value.dtype
    least = 16 * resolution(base.x)  # Of a relative tolerance.

    def request(p: Point) -> jax.Array:
        # Where bounds hold most of ĝ the rest of it is what has to be known.
        share = jnp.minimum(1.0, ratio(at.projected(p), norm(p.g)))
        wanted = jnp.where(share > 0, _ACCURACY * share, _ACCURACY)
        return jnp.maximum(wanted, least).astype(dtype)

    def body(s: Search) -> Search:
        first = s.at_base & ~s.known
        d = at.direction(s.base, s.pairs, s.reach)
        x = tree.where(s.at_base, s.base.x, at.trial(s.base, d, s.alpha))
        warm = s.at_base | ~s.tried.usable
        # A trial that takes much longer than λ did went too far.
        budget = jnp.where(s.at_base | ~s.known, _NO_LIMIT, _PATIENCE * m.costliest + _LEAST)
        p = evaluate(s.rtol, budget, tree.where(warm, s.base.hypergrad, s.tried.hypergrad), x)
        base = tree.where(s.at_base & (first | p.usable), p, s.base)
        tried = tree.where(~s.at_base | first, p, s.tried)

        step = tree.sub(tried.x, base.x)
        slope, slope_there = inner(base.g, step), inner(tried.g, step)
        size = norm(step)
        target = _SUFFICIENT * slope
        change = tried.value - base.value
        doubt = tried.value_error + base.value_error
        sure = tried.usable & (change + doubt <= target)
        undecided = tried.usable & ~sure & (change - doubt <= target)
        vague = (sure | first) & (tried.error > _VAGUE * at.projected(tried))
        vague &= tried.usable
        possible = (s.sharpened < 8) & (s.rtol * _SHARPER >= least)
        sharpen = ((undecided & ~first) | vague) & possible
        of_slopes = 0.5 * (slope + slope_there) + 0.5 * (base.error + tried.error) * size
        by_slopes = undecided & ~possible & (of_slopes <= target)
        accepted = ~first & ((sure & ~sharpen) | by_slopes)
        shrink = ~first & ~accepted & ~sharpen

        # The minimum of the parabola through both values and the slope, if it is not too far off.
        fit = ratio(-0.5 * slope, change - slope)
        factor = jnp.where(tried.usable & (fit > 0), jnp.clip(fit, 0.1, 0.5), 0.2)
        at_end = (size <= 4 * resolution(base.x) * norm(base.x)) | (s.trials >= _MAX_TRIALS)
        lost = shrink & (at_end | undecided)
        again = lost & (s.pairs.number > 0) & (s.trials < _MAX_TRIALS)
        reason = status_of(
            StopReason.RUNNING,
            (~(lost & ~again), StopReason.NO_DECREASE),
            (~(first & p.usable & at.stationary(p)), StopReason.CONVERGED),
            (~first | p.usable, StopReason.LOWER_FAILED),
        )
        alpha = jnp.where(shrink, jnp.where(again, 1.0, factor * s.alpha), s.alpha)
        asked = jnp.where(sharpen, _SHARPER * s.rtol, request(base))
        c = p.hypergrad.certificate.products
        return Search(
            base,
            tried,
            s.pairs.forgotten(again),
            jnp.where(first & (s.reach == 0), _first_reach(base), s.reach),
            alpha.astype(s.alpha.dtype),
            sharpen & (first | (undecided & (base.value_error > tried.value_error))),
            s.known | (p.usable & ~(first & sharpen)),
            asked.astype(s.rtol.dtype),
            jnp.minimum(s.sharpest, s.rtol),
            jnp.where(sharpen, s.sharpened + 1, 0),
            s.trials + 1,
            s.lower + c.phi + c.j,
            s.linear + c.jt,
            accepted,
            reason,
        )

    one, none, no = jnp.ones((), dtype), jnp.int32(0), jnp.asarray(False)
    begun = request(base)
    start = Search(
        base,
        base,
        m.pairs,
        m.reach,
        one.astype(m.reach.dtype),
        ~m.known,
        m.known,
        jnp.where(m.known, begun, _ACCURACY).astype(dtype),
        one,
        none,
        none,
        none,
        none,
        no,
        jnp.where(done, jnp.int32(StopReason.CONVERGED), jnp.int32(StopReason.RUNNING)),
    )
    going = int(StopReason.RUNNING)
    return lax.while_loop(lambda s: ~s.accepted & (s.reason == going), body, start)


def _first_reach(p: Point) -> jax.Array:
    """A step size that promises half of |f|, if it moves no entry by more than λ is long, or 1."""
    size, largest = norm(p.g), _largest(p.g)
    limit = ratio(jnp.maximum(1.0, _largest(p.x)), largest)
    promised = ratio(0.5 * jnp.abs(p.value).astype(size.dtype), size**2)
    return jnp.clip(promised, 1e-3 * limit, limit)


def _largest(x: PyTree) -> jax.Array:
    """The largest entry, by absolute value."""
    sizes = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(x)]
    return jnp.max(jnp.stack([size.astype(real_dtype(x)) for size in sizes]))


def _scaled(factor: jax.Array, x: PyTree) -> PyTree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, x)
