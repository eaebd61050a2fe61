"""The outer loop without a learning rate: `descent` knows how wrong its values and gradients are.

At λ with w ≈ w(λ), v: f̂ = L(w⁺, v⁺) with |f̂ − f| ≤ ε, ĝ with ‖ĝ − ∇f‖ ≤ e, both from the certificate
of an adaptive hypergradient. A trial λ⁺ = P(λ + α d), s = λ⁺ − λ, descends for certain where

    f̂⁺ − f̂ + (ε⁺ + ε) ≤ c ⟨ĝ, s⟩ ,     and does not where     f̂⁺ − f̂ − (ε⁺ + ε) > c ⟨ĝ, s⟩ .

In between nothing is decided: what has the larger ε is evaluated again, ten times as accurately.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ..bilevel import Bilevel, BilevelState, StopReason
from ..bilevel.loop import begun
from ..bilevel.runs import run_of
from ..certificate.adaptive import Tolerance, stay, to_tolerance
from ..certificate.options import check_factory, krylov
from ..compiled import Compiled
from ..errors import check_callable, check_count, check_number, show
from ..failure import Policy
from ..hypergradient import HypergradientState
from ..leaves import owned, partition
from ..monitor import OUTER_STEP, Monitor, check_monitor, emit
from ..printing import printed
from ..real_form import inner, norm, norms, ratio, real_dtype
from ..starts import WARM
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar
from .feasible import feasible_set
from .info import DescentInfo
from .quasi_newton import no_pairs
from .search import At, DescentMemory, Point, searched

tree = optax.tree

_CALM = 3  # Steps that have to agree that little is left to gain: H knows a part of the Hessian.
_GROWTH = 4.0  # Of a gradient step where the last one found no positive curvature.


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
    form = to_tolerance(where, outer, phi, make_linear_solver, stay, WARM, 1.25, policy)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> BilevelState:
        lam, hyper = begun(where, form.init, w0, lam, args, kwargs)
        lam = feasible.project(lam)
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
        at = At(feasible, lambda x: join(x, rest), atol)

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
        s = searched(at, evaluate, base, m, done)

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
