"""The outer loop without a learning rate: `descent` knows how wrong its values and gradients are.

At λ with w ≈ w(λ), v: f̂ = L(w⁺, v⁺) with |f̂ − f| ≤ ε, ĝ with ‖ĝ − ∇f‖ ≤ e, both from the certificate
of an adaptive hypergradient. A trial λ⁺ = P(λ + α d), s = λ⁺ − λ, descends for certain where

    f̂⁺ − f̂ + (ε⁺ + ε) ≤ c ⟨ĝ, s⟩ ,     and does not where     f̂⁺ − f̂ − (ε⁺ + ε) > c ⟨ĝ, s⟩ .

In between nothing is decided: what has the larger ε is evaluated again, ten times as accurately.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..bilevel import Bilevel, BilevelState, StopReason
from ..bilevel.runs import run_of
from ..certificate.adaptive import Tolerance, to_tolerance
from ..certificate.options import check_factory, krylov
from ..compiled import Compiled
from ..errors import check_callable, check_count, check_number, show
from ..failure import Policy
from ..hypergradient import HypergradientState
from ..leaves import check_arrays, is_weak, owned, partition, settled_lam, strongly_typed
from ..monitor import OUTER_STEP, Monitor, check_monitor, emit
from ..printing import by_name, printed
from ..real_form import inner, norm, norms, ratio, real_dtype, resolution, steepest_ascent
from ..starts import WARM
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar, status_of
from .feasible import Feasible, feasible_set
from .quasi_newton import Pairs, inverse_hessian, no_pairs
from .records import DescentInfo

tree = optax.tree

_ACCURACY = 0.1  # Relative error of a hypergradient that is asked for at first.
_SHARPER = 0.1  # By so much, where a comparison is undecided.
_VAGUE = 0.3  # A gradient whose relative error is larger gives no direction.
_SUFFICIENT = 1e-4  # c, Armijo's constant.
_CALM = 3  # Steps that have to agree that little is left to gain: H knows a part of the Hessian.
_MAX_TRIALS = 30  # In one step.
_PATIENCE = 10  # Products of a trial: so many times those of the costliest λ so far,
_LEAST = 500  # and so many more.
_NO_LIMIT = jnp.iinfo(jnp.int32).max
_FURTHEST = 10.0  # Times the size of λ, of a quasi-Newton step.
_GROWTH = 4.0  # Of a gradient step where the last one found no positive curvature.


@by_name
def _stay(w0: PyTree, /, *_: PyTree, **__: PyTree) -> PyTree:
    return w0


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


class _Search(NamedTuple):
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


@printed
def descent(
    outer: Outer,
    phi: Phi,
    *,
    method: Literal["lbfgs", "gradient"] = "lbfgs",
    project: Callable[[PyTree], PyTree] | None = None,
    bounds: tuple[Any, Any] | None = None,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    memory: int = 10,
    max_products: int = 20_000,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
    monitor: Monitor | None = None,
) -> Bilevel[DescentInfo]:
    """The outer loop min over λ of f(λ), with no step size, no t and no k to choose.

        λ⁺ = P(λ + α d),   d = −H ĝ  on the entries that no bound holds,

    H by limited-memory BFGS. Each ĝ is an `adaptive_hypergradient` to a relative error of a tenth, from
    the last w and v, corrected; each f̂ is the corrected value L(w⁺, v⁺). A trial is taken where f
    descends for certain, by Armijo's rule with the errors of both values counted in; it is rejected
    where it certainly does not; in between the point whose value is known less well is evaluated again,
    ten times as accurately. Where that is at the end of the precision, the slopes at both ends decide,
    with their errors. A trial whose hypergradient cannot be certified, as where the lower level has
    no solution, counts as an infinite value.

    The loop ends, with `reason` in its state, where

    - `CONVERGED`: three steps in a row have lowered f by less than rtol |f|, the model promises no
      more, ½ ⟨ĝ, Hĝ⟩ ≤ rtol |f|, and neither does the slope where each λᵢ changes by its size, or by 1:
      Σ max(|λᵢ|, 1) |(λ − P(λ − ĝ))ᵢ| and its error are at most √rtol |f|, as they are for a quadratic
      of that scale so near its minimum; or ‖λ − P(λ − ĝ)‖ and its error are at most `atol`;
    - `NO_DECREASE`: no trial descends for certain: what is left is rounding;
    - `LOWER_FAILED`: the hypergradient at the first λ could not be certified to a tenth.

    `init`, `step` and `run` are those of `bilevel`: pure, compiled once, under `vmap`, resumed from a
    saved state bit for bit. `state.lam` and the w, v and certificate of `state.hypergrad` belong
    together, which those of `bilevel` do not.

    Assumed, not checked: the data of all steps are the same, as the state holds f and ĝ at λ; f is
    differentiable where the path goes; a `project` is the Euclidean projection onto a convex set.

    Cost: one adaptive hypergradient a trial, warm, and about one trial a step: `info.products`. Memory:
    2 · `memory` vectors like λ, and the states of two hypergradients.
    When not to use it: where batches make f noisy (`bilevel` with a stochastic form); at kinks of f.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        method: "lbfgs", or "gradient" for H a number (that of Barzilai and Borwein).
        project: P, `project(lam) -> lam`, onto a convex set; steps stay on the segment to P(λ + d).
        bounds: (lower, upper), numbers, arrays or pytrees like λ; `-jnp.inf` for none.
        rtol: How near to the least f to end, relative to f.
        atol: When to end, absolute, for ‖λ − P(λ − ĝ)‖.
        memory: Pairs of the quasi-Newton method.
        max_products: Of one hypergradient, about; see `adaptive_hypergradient`.
        make_linear_solver: As in `adaptive_hypergradient`.
        monitor: `monitor(stage, info)`, called with the `DescentInfo` of each step; see `bilevel`.

    Returns:
        The functions (`init`, `step`, `run`), a `Bilevel`.

    Raises:
        TypeError: An argument is not of its kind.
        ValueError: `method` is none of the two, `bounds` and `project` are both given, or a number is
            out of its range.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> loop = fg.descent(lambda w, lam: (w - 2.0) ** 2, phi)
    >>> state, history = loop.run(loop.init(0.0, 0.3), num_steps=20)
    >>> fg.StopReason(int(state.reason)).name, round(float(state.lam), 3)  # 2 - cos(2) / 2
    ('CONVERGED', 2.208)

    References:
        Nocedal, Updating quasi-Newton matrices with limited storage, 1980; Bertsekas, Projected Newton
        methods for optimization problems with simple constraints, 1982; Pedregosa, Hyperparameter
        optimization with approximate gradient, ICML 2016; Salehi, Mukherjee, Roberts, Ehrhardt, An
        adaptively inexact first-order method for bilevel optimization, 2024.
    """
    where = "descent"
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    if method not in ("lbfgs", "gradient"):
        raise ValueError(
            f'`method` of `{where}` must be "lbfgs" or "gradient", got {show(method)}.'
        )
    feasible = feasible_set(where, project, bounds)
    check_number(where, "rtol", rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check_number(where, "atol", atol, lambda x: x >= 0, "a number >= 0")
    check_count(where, "memory", memory)
    check_count(where, "max_products", max_products)
    check_factory(where, make_linear_solver)
    check_monitor(where, monitor)
    policy = Policy.of(where, "ignore", None)
    form = to_tolerance(where, outer, phi, make_linear_solver, _stay, WARM, 1.25, policy)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> BilevelState:
        check_arrays(where, "lam", lam)
        hyper = form.init(w0, lam, *args, **kwargs)
        if any(map(is_weak, jax.tree.leaves(lam))):  # Python numbers, as wide as w: known only now.
            lam = settled_lam(lam, hyper.w)
            hyper = form.init(w0, lam, *args, **kwargs)
        lam = feasible.project(strongly_typed(lam))
        x = partition(lam)[0]
        c = hyper.certificate
        zero = jnp.zeros_like(c.error)
        of_x = jnp.zeros((), real_dtype(x))
        start = DescentMemory(
            jnp.asarray(False),
            tree.zeros_like(x),
            zero,
            zero,
            zero,
            jnp.int32(0),
            no_pairs(x, memory),
            of_x,
            jnp.int32(0),
            jnp.int32(0),
        )
        running = jnp.int32(StopReason.RUNNING)
        return BilevelState(owned(lam), hyper, owned(start), jnp.int32(0), running)

    @Compiled
    def step(
        state: BilevelState, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[BilevelState, DescentInfo]:
        x, rest, join = partition(state.lam)
        m: DescentMemory = state.optimizer
        at = _At(feasible, lambda x: join(x, rest), atol)

        def evaluate(
            request: jax.Array, budget: jax.Array, hyper: HypergradientState, x: PyTree
        ) -> Point:
            asked = Tolerance(request, 0.0, jnp.minimum(budget, max_products))
            return Point.of(x, *form.update(asked, hyper, join(x, rest), *args, **kwargs))

        base = Point(
            x, state.hypergrad, m.g, m.value, m.value_error, m.error, m.known, jnp.int32(0)
        )
        direction = at.direction(base, m.pairs, m.reach)
        promised = -0.5 * inner(base.g, direction).astype(base.value.dtype)
        small = jnp.asarray(rtol, promised.dtype)
        size = jnp.abs(base.value)
        scaled = at.scaled(base).astype(size.dtype) <= jnp.sqrt(small) * size
        calm = (m.calm >= _CALM) & (promised <= small * size) & scaled
        done = m.known & (at.stationary(base) | calm)
        s = _searched(at, evaluate, base, m, done)

        best = tree.where(s.accepted, s.tried, s.base)
        change = tree.sub(s.tried.x, s.base.x)
        of_g = tree.sub(s.tried.g, s.base.g)
        curvature, (size_s,) = inner(change, of_g), norms(change)
        certain = curvature > (s.base.error + s.tried.error) * size_s
        certain &= s.accepted
        reach = jnp.where(certain, ratio(size_s**2, curvature), _GROWTH * s.alpha * s.reach)
        pairs = s.pairs.then(change, of_g, certain & (method == "lbfgs"))
        spent = m.products + s.lower + s.linear
        kept = DescentMemory(
            s.known,
            best.g,
            best.value,
            best.value_error,
            best.error,
            spent,
            pairs,
            jnp.where(s.accepted, reach, s.reach).astype(m.reach.dtype),
            jnp.where(s.base.value - best.value <= small * jnp.abs(best.value), m.calm + 1, 0),
            jnp.maximum(m.costliest, jnp.maximum(s.base.products, best.products)),
        )
        of_w = s.base.hypergrad.info.lower
        of_v = s.base.hypergrad.info.linear or of_w  # Never `None` in this form.
        info = DescentInfo(
            value=s.base.value,
            gradient_norm=norm(s.base.g),
            lower_residual=of_w.residual,
            linear_residual=of_v.residual,
            lower_steps=s.lower,
            linear_steps=s.linear,
            lower_status=jnp.asarray(of_w.status, jnp.int32),
            linear_status=jnp.asarray(of_v.status, jnp.int32),
            taken=s.accepted,
            reason=s.reason,
            value_error=s.base.value_error,
            gradient_error=s.base.error,
            projected_norm=at.projected(s.base),
            rtol=s.sharpest,
            trials=s.trials,
        )
        emit(monitor, OUTER_STEP, info)
        num_steps = state.num_steps + s.accepted.astype(jnp.int32)
        after = BilevelState(
            join(best.x, rest), best.hypergrad, kept, num_steps, s.reason, state.memory
        )
        return after, info

    return Bilevel(init, step, run_of(step))


class _At(NamedTuple):
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

    def projected(self, p: Point) -> jax.Array:
        """‖x − P(x − ĝ)‖, zero at a stationary point."""
        return norm(tree.sub(p.x, self.project(tree.sub(p.x, p.g))))

    def scaled(self, p: Point) -> jax.Array:
        """Σ max(|λᵢ|, 1) |(λ − P(λ − ĝ))ᵢ| and its error.

        What a change of each λᵢ by its size, or by 1, does to f by its slope.
        """
        change = tree.sub(p.x, self.project(tree.sub(p.x, p.g)))
        sizes = [
            jnp.sum(jnp.maximum(jnp.abs(a), 1) * jnp.abs(b)) for a, b in _pairwise(p.x, change)
        ]
        return jnp.sum(jnp.stack([s.astype(p.error.dtype) for s in sizes])) + p.error * jnp.maximum(
            norm(p.x), 1
        )

    def direction(self, p: Point, pairs: Pairs, reach: jax.Array) -> PyTree:
        """From λ to where α = 1 leads, no further than λ is long, or 1; ten times that with pairs."""
        free = self.feasible.free(p.x, p.g)
        newton, served = inverse_hessian(pairs, p.g, free)
        plain = _scaled(
            reach, jax.tree.map(lambda g, f: jnp.where(f, g, jnp.zeros_like(g)), p.g, free)
        )
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


def _searched(
    at: _At,
    evaluate: Callable[[jax.Array, jax.Array, HypergradientState, PyTree], Point],
    base: Point,
    m: DescentMemory,
    done: jax.Array,
) -> _Search:
    """Evaluations until a trial is taken, or the loop ends."""
    dtype = base.value.dtype
    least = 16 * resolution(base.x)  # Of a relative tolerance.

    def request(p: Point) -> jax.Array:
        # Where bounds hold most of ĝ the rest of it is what has to be known.
        share = jnp.minimum(1.0, ratio(at.projected(p), norm(p.g)))
        wanted = jnp.where(share > 0, _ACCURACY * share, _ACCURACY)
        return jnp.maximum(wanted, least).astype(dtype)

    def body(s: _Search) -> _Search:
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
        return _Search(
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
    start = _Search(
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


def _pairwise(x: PyTree, y: PyTree) -> Any:
    return zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)


def _scaled(factor: jax.Array, x: PyTree) -> PyTree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, x)
