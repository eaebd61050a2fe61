"""A tolerance on the hypergradient itself: `adaptive_hypergradient`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_callable, check_count, check_number, check_same
from ..failure import Policy, enforce
from ..hypergradient import (
    Hypergradient,
    HypergradientInfo,
    HypergradientState,
    check_state,
)
from ..leaves import (
    blank,
    owned,
    partition,
    settled_lam,
    started,
    strongly_typed,
    zeros_like_inexact,
)
from ..linear.assisted import Assisted, Plain, assisted
from ..lower import solve_with_info
from ..lower.newton import LOOSE, products_of, solve_for_w
from ..mapped_axes import placed_like
from ..monitor import Monitor
from ..printing import by_name, printed
from ..problem import Problem
from ..real_form import ratio, real_dtype
from ..starts import WARM, Start, check_start
from ..types import (
    LinearSolver,
    OnFailure,
    Outer,
    Phi,
    Products,
    PyTree,
    Scalar,
    Solver,
    Status,
    failed,
    is_failure,
    solve_info,
    status_where,
)
from .certificate import Certificate
from .certify import assess, objected
from .dual_weighted import dual_weighted, estimate_once
from .loose_solves import LooseSolves, no_solves
from .options import check_factory, krylov
from .saddle import leads_away

tree = optax.tree

_MAX_ROUNDS = 20
_SHARE = 0.7  # Of the tolerance, that both stages are to use.


@by_name
def stay(w0: PyTree, /, *_: PyTree, **__: PyTree) -> PyTree:
    """The solver that leaves w where it is."""
    return w0


@printed
def adaptive_hypergradient(
    outer: Outer,
    phi: Phi,
    *,
    rtol: Scalar,
    atol: Scalar = 0.0,
    max_products: int = 100_000,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
    solver: Solver = stay,
    start: Start = WARM,
    safety: Scalar = 1.25,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Hypergradient:
    """A hypergradient with ‖g − ∇f‖ ≤ max(rtol ‖∇f‖, atol), as estimated; it chooses t and k itself.

    Each round brings w to ‖r_w‖ ≤ τ_w, the first to a relative error of w of `rtol`/2: by steps of Φ
    for as long as each takes a third off the residual, then by Newton–Krylov steps w ← w − e_w, A e_w ≈
    r_w (where one does not bring the residual down, by ten steps of Φ or more). It brings v to ‖r_v‖ ≤
    τ_v, and takes the dual weighted estimate of `certify`. Where that is above the tolerance each stage
    is to have a share of the tolerance, in proportion to what a digit costs it; the two thresholds
    shrink accordingly, and the next round goes on from the corrected pair (w⁺, v⁺). The result is the
    corrected gradient g⁺ of the last round, while the tolerance is met by the estimate for ĝ before the
    correction.

    With the linear solver by default, and up to 1024 unknowns (not within a `shard_map`, nor of an
    explicit mesh), (I − J)⁻¹ is made as a matrix once the solves have spent what it costs: at once for
    some tens of unknowns, never where products are too cheap for it. It serves all solves by refinement
    from then on, also those of the updates to come (`state.kept`), until they show that it is one of
    another system.

    Near a minimum of f the terms of ∇f cancel. Where the error left is rounding, and is below rtol
    times the size of these terms, the request counts as met, with the status `AT_FLOOR`.

    Every update starts from the w and v of the last one, by default: in an outer loop most of the work
    is done already. For a descent direction a relative error below 1 suffices: loose tolerances early
    are sound.

    Cost: measured in `state.certificate.products`; about a Newton–Krylov solve for w, one solve for v
    and one estimate, at times two. Memory: that of the linear solver (`gmres`: 54 vectors), and 2 d²
    numbers where a matrix of d unknowns may be made.
    When not to use it: where second derivatives of Φ mean nothing (kinks near the solution), or to
    differentiate the iterations of a solver that does not converge (`itd`).

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        rtol: Relative tolerance on the hypergradient.
        atol: Absolute tolerance on the hypergradient.
        max_products: Bound on evaluations of Φ plus products, checked before each Newton step and each
            round: the last round may exceed it, by the linear solves that it has begun.
        make_linear_solver: A function of a relative tolerance that returns a `LinearSolver`, such as
            `lambda rtol: cg(max_steps=1000, rtol=rtol)` where J is symmetric. With one of yours there
            is no matrix.
        solver: `solver(w, lam, *args, **kwargs) -> w`, run in each update before anything else: the
            Newton–Krylov steps start at its result. By default they start at the last w itself. A
            solver of yours is the one that knows which fixed point is meant, where there are several.
        start: Where w and v of an update start: `warm()` at those of the last that succeeded.
        safety: Factor on the estimate.
        on_failure: What becomes of a gradient that missed the tolerance: "nan", "zero", "warn",
            "raise" or "ignore". The state says how far it came in any case.
        monitor: As in `hypergradient`; it is called once an update.

    Returns:
        The pair (`init`, `update`) of the explicit form; `state.certificate` holds the estimate.
        `num_steps` in `state.info` is evaluations of Φ for w, one a step of Newton's method or of Φ,
        and products with Jᵀ for v, one a step of the linear solver.

    Raises:
        TypeError: An argument is not of its kind.
        ValueError: Bad numbers.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> hypergrad = fg.adaptive_hypergradient(lambda w, lam: w**2, phi, rtol=1e-6)
    >>> grad, state = hypergrad.update(hypergrad.init(0.0, 0.3), 0.3)
    >>> float(state.certificate.relative_error) < 1e-6
    True
    """
    where = "adaptive_hypergradient"
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    check_callable(where, "solver", solver, "solver(w, lam, *args) -> w")
    check_factory(where, make_linear_solver)
    check_number(where, "rtol", rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check_number(where, "atol", atol, lambda x: x >= 0, "a number >= 0")
    check_number(where, "safety", safety, lambda x: x >= 1, "a number >= 1")
    check_count(where, "max_products", max_products)
    check_start(f"`start` of `{where}`", start)
    policy = Policy.of(where, on_failure, monitor)
    made = to_tolerance(where, outer, phi, make_linear_solver, solver, start, safety, policy)

    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        check_state(state)
        return made.update(Tolerance(rtol, atol, max_products), state, lam, *args, **kwargs)

    return Hypergradient(made.init, update, outer, phi)


class Tolerance(NamedTuple):
    """On a hypergradient: ‖g − ∇f‖ ≤ max(rtol ‖∇f‖, atol), for so many products."""

    rtol: Scalar
    atol: Scalar
    max_products: jax.Array | int

    def on(self, size: jax.Array) -> jax.Array:
        """On one of this norm."""
        rtol, atol = (jnp.asarray(x, size.dtype) for x in (self.rtol, self.atol))
        return jnp.maximum(rtol * size, atol)


class ToTolerance(NamedTuple):
    """`adaptive_hypergradient` with a tolerance that each update is given.

    Attributes:
        init: `init(w0, lam, *args, **kwargs) -> state`.
        update: `update(tolerance, state, lam, *args, **kwargs) -> (grad, state)`.
    """

    init: Callable[..., HypergradientState]
    update: Callable[..., tuple[PyTree, HypergradientState]]


def to_tolerance(
    where: str,
    outer: Outer,
    phi: Phi,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    solver: Solver,
    start: Start,
    safety: Scalar,
    policy: Policy,
) -> ToTolerance:
    """The functions of `adaptive_hypergradient`, which documents the options."""

    def first_round(
        problem: Problem,
        solves_with: Plain | Assisted,
        kept: PyTree,
        w: PyTree,
        v: PyTree,
        last: Certificate | None,
        asked: Tolerance,
    ) -> _Round:
        zero = jnp.zeros_like(problem.norm(w))
        solves = no_solves(zero)
        make = functools.partial(solves_with.solver, kept)

        def like() -> Certificate:
            return assess(
                problem,
                estimate_once(
                    problem,
                    dual_weighted(problem, w, v, make, LOOSE, solves, split=False, once=False),
                    solves,
                ),
                None,
                safety,
            )

        certificate = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(like))
        tau_w, tau_v = zero, zero
        if last is not None:  # What a residual did to the gradient then it will do to this one.
            size = ratio(last.error, last.relative_error).astype(zero.dtype)
            share = _SHARE / 2 * asked.on(size) / jnp.asarray(safety, zero.dtype)
            per_w, per_v = (
                ratio(part, residual).astype(zero.dtype)
                for part, residual in (
                    (last.lower_part, last.residual_w),
                    (last.linear_part, last.residual_v),
                )
            )
            known = last.valid & (per_w > 0) & (per_v > 0)
            tau_w = jnp.where(known, ratio(share, per_w), 0.0)
            tau_v = jnp.where(known, ratio(share, per_v), 0.0)
        none, false = jnp.int32(0), jnp.asarray(False)
        spent = Products(none, none, none)
        return _Round(
            w, v, tau_w, tau_v, solves, certificate, spent, kept, none, false, false, false
        )

    def one_round(
        problem: Problem, solves_with: Plain | Assisted, asked: Tolerance, s: _Round
    ) -> _Round:
        norm = problem.norm
        dtype = norm(s.w).dtype
        # Where no update came before, at first to a relative error of w of half the tolerance, and such
        # a residual of v: as a rule one round will do.
        rtol = jnp.asarray(asked.rtol, dtype)
        goal = rtol
        unknown = (s.rounds == 0) & (s.tau_w == 0)
        goal = jnp.where(unknown, 0.5 * jnp.where(goal > 0, goal, LOOSE), 0.0)
        lower = solve_for_w(
            problem, s.w, s.tau_w, solves_with, s.kept, asked.max_products, goal, s.products
        )
        w = lower.w
        linear = _bring_down(problem, w, s.v, s.tau_v, solves_with, lower.kept, goal)
        v, kept = linear.v, linear.kept
        spent = jax.tree.map(jnp.add, lower.spent, linear.products)
        solves = s.solves.then(
            LooseSolves(lower.amplification, linear.amplification, lower.left, linear.left)
        )
        make = functools.partial(solves_with.solver, kept)
        p = dual_weighted(problem, w, v, make, LOOSE, solves, split=False, once=False)
        # A matrix by which these solves fail, or take long, is one of another system.
        ended = status_where(p.solved, Status.CONVERGED, Status.MAX_STEPS)
        ended = solve_info(p.steps, p.r_w, ended)
        kept = solves_with.used(kept, ended, LOOSE)
        c = estimate_once(problem, p, solves)
        spent = jax.tree.map(jnp.add, spent, c.products)
        certificate = assess(problem, c, None, safety)
        tol = asked.on(norm(certificate.polished).astype(dtype))
        met = certificate.valid & (certificate.error <= tol)
        # Where ∇f = 0 no relative tolerance can be met, as what is left is the rounding of the terms
        # that cancel: ∇₂E, Bᵀv, and what w adds to them. It is to be small relative to these.
        e_w = tree.sub(w, p.w)
        of_w, of_e_w = problem.norms(w, e_w)
        terms = p.terms + ratio(p.size_lower * of_w, of_e_w)
        only_rounding = certificate.error <= 4 * p.rounding
        at_floor = only_rounding & (certificate.error <= rtol * terms)
        met_at_floor = certificate.valid & ~met & at_floor
        # A saddle is looked for where all else is well, once as a rule.
        wanted = met | met_at_floor
        of_j = problem.equation.jvp(w, problem.x).j
        wanted &= ~solves_with.definite(kept, of_j, w, wanted)
        repels, probes = leads_away(problem, w, e_w, wanted)
        certificate = objected(certificate, repels)
        met, met_at_floor = met & ~repels, met_at_floor & ~repels
        spent = jax.tree.map(jnp.add, spent, probes)
        # Of what may remain each stage gets a share in proportion to what a digit costs it: the sum of
        # a ln(1/θ) and b ln(1/(1 − θ)) is least at θ = a/(a + b). Both solves of the pass went to the
        # same relative tolerance, so that their products show a : b. A stage that has its share
        # already shrinks a little, since the other one's moves. Invalid: come closer and look again.
        a, b = (x.astype(dtype) for x in (p.products.j, p.products.jt))
        theta = jnp.clip(a / (a + b), 0.1, 0.9)
        share = _SHARE * tol / jnp.asarray(safety, dtype)
        share_w, share_v = theta * share, (1 - theta) * share
        shrink_w = jnp.minimum(0.5, share_w / jnp.maximum(certificate.lower_part, share_w))
        shrink_v = jnp.minimum(0.9, share_v / jnp.maximum(certificate.linear_part, share_v))
        shrink_w = jnp.where(certificate.valid, shrink_w, LOOSE)
        shrink_v = jnp.where(certificate.valid, shrink_v, LOOSE)
        # The pass has already brought (w, v) to (w⁺, v⁺).
        improved = (c.reduction_w <= 0.5) & jnp.isfinite(certificate.error)
        w, v = tree.where(improved & ~(met | met_at_floor), (p.w, p.v), (w, v))
        # Twice at the floor of the dtype, or not finite: there is nothing to gain any more.
        stuck = (certificate.at_floor & s.certificate.at_floor) | ~jnp.isfinite(norm(w))
        return _Round(
            w,
            v,
            shrink_w * p.r_w,
            shrink_v * p.r_v,
            c.solves,
            certificate._replace(products=spent),
            spent,
            kept,
            s.rounds + 1,
            met | met_at_floor,
            met_at_floor,
            stuck,
        )

    def unfinished(asked: Tolerance, s: _Round) -> jax.Array:
        affordable = sum(s.products) < asked.max_products
        return ~s.met & ~s.stuck & affordable & (s.rounds < _MAX_ROUNDS)

    @Compiled
    def solved(
        memory: PyTree,
        kept: PyTree,
        last: Certificate | None,
        asked: Tolerance,
        lam: PyTree,
        /,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> tuple[PyTree, HypergradientState]:
        w0, v0 = start.propose(memory)
        v0 = zeros_like_inexact(w0) if v0 is None else v0
        w, _ = solve_with_info(solver, w0, lam, *args, **kwargs)
        check_same(where, w, w0, "`solver(w, ...)`", "`w0`")
        problem = Problem.at(where, outer, phi, strongly_typed(w), lam, args, kwargs)
        finite = jnp.isfinite(problem.norm(problem.w))
        at = tree.where(finite, problem.w, partition(w0)[0])
        solves_with = Plain(make_linear_solver)
        if make_linear_solver is krylov:
            solves_with = assisted(krylov, lambda w: problem.equation.phi(w, problem.x), at)
        fresh = solves_with.start(at)  # Other sizes of data, and it may not be of the same kind.
        alike = jax.tree.structure(kept) == jax.tree.structure(fresh)
        kept = kept if alike else fresh
        s = first_round(problem, solves_with, kept, at, partition(v0)[0], last, asked)
        s = lax.while_loop(
            functools.partial(unfinished, asked),
            lambda s: one_round(problem, solves_with, asked, s),
            s,
        )

        c = s.certificate
        missed = status_where(jnp.isfinite(c.error), Status.MAX_STEPS, Status.NON_FINITE)
        reached = status_where(s.by_rounding, Status.AT_FLOOR, Status.CONVERGED)
        status = status_where(s.met, reached, missed)
        lower = solve_info(s.products.phi, c.residual_w, status)
        linear = solve_info(s.products.jt, c.residual_v, status)
        grad = placed_like(c.polished, lam)
        grad = enforce(policy, "hypergradient to its tolerance", lower, grad)
        w, v = problem.join_w(s.w), problem.join_w(s.v)
        recorded = start.record(memory, w, v)
        memory = tree.where(is_failure(status), memory, recorded)
        kept = solves_with.forgotten(s.kept, is_failure(status))
        value, info = problem.outer(s.w, problem.x), HypergradientInfo(lower, linear)
        memory, kept = owned((memory, kept))
        corrected = c.polished_value.astype(value.dtype)
        none = jnp.int32(0)
        return grad, HypergradientState(value, w, v, info, memory, none, c, kept, corrected)

    def update(
        asked: Tolerance,
        state: HypergradientState,
        lam: PyTree,
        /,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> tuple[PyTree, HypergradientState]:
        last = state.certificate._replace(gradient=None, polished=None)  # They may hold functions.
        grad, new = solved(state.memory, state.kept, last, asked, lam, *args, **kwargs)
        return grad, new._replace(num_updates=state.num_updates + 1)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        w0 = started(where, phi, w0, (lam, *args), kwargs)
        v_zero = zeros_like_inexact(w0)
        memory = start.init(w0, v_zero)
        _, shapes = solved.eval_shape(
            memory, None, None, Tolerance(0.1, 0.0, 1), settled_lam(lam, w0), *args, **kwargs
        )
        # Not w, v and the memory: they may hold keys, and are known.
        known = ("value", "info", "certificate", "kept", "corrected_value")
        of_an_update = {name: blank(getattr(shapes, name)) for name in known}
        state = HypergradientState(
            w=w0, v=v_zero, memory=memory, num_updates=jnp.int32(0), **of_an_update
        )
        return owned(state)

    return ToTolerance(init, update)


class _Round(NamedTuple):
    """The carry over rounds: the pair, its thresholds, its last certificate, products, what is kept."""

    w: PyTree
    v: PyTree
    tau_w: jax.Array
    tau_v: jax.Array
    solves: LooseSolves
    certificate: Certificate
    products: Products
    kept: PyTree
    rounds: jax.Array
    met: jax.Array
    by_rounding: jax.Array
    stuck: jax.Array


class _Linear(NamedTuple):
    """What brought v near its solution.

    Attributes:
        v: Where it is now.
        amplification: The largest ‖e‖/‖r‖ of the solves.
        left: The residual norm that the last of them left; see `LooseSolves`.
        kept: What the solves keep.
        products: What they cost.
        again: Whether the last of them failed, for the first time.
    """

    v: PyTree
    amplification: jax.Array
    left: jax.Array
    kept: PyTree
    products: Products
    again: jax.Array


def _bring_down(
    problem: Problem,
    w: PyTree,
    v: PyTree,
    tau: jax.Array,
    solves: Plain | Assisted,
    kept: PyTree,
    goal: jax.Array,
) -> _Linear:
    """Brings ‖∇₁E − Aᵀv‖ to `tau`, or to `goal` ‖∇₁E‖ if that is more.

    By one solve; by one more where it fails and something is kept that may be made anew.
    """
    norm = problem.norm
    of_j, of_jt = problem.equation.jvp(w, problem.x).j, problem.equation.vjp(w, problem.x).j

    def once(s: _Linear) -> _Linear:
        _, _, r_v, _, b = problem.gradients(w, s.v)
        kept = solves.prepared(s.kept, of_j, w)
        size = norm(r_v)
        target = jnp.maximum(tau, goal * norm(b))
        rtol = jnp.clip(target / jnp.where(size > 0, size, 1.0), 1e-12, 1.0)
        dv, info = solves.solver(kept, rtol.astype(real_dtype(w)))(of_jt, r_v)
        better = jnp.isfinite(norm(dv))
        solved = better & (info.num_steps > 0)
        left = jnp.where(failed(info), info.residual.astype(size.dtype), rtol * size)
        return _Linear(
            tree.where(better, tree.add(s.v, dv), s.v),
            jnp.maximum(s.amplification, jnp.where(solved, ratio(norm(dv), size), 0.0)),
            jnp.where(solved, left, s.left),
            solves.used(kept, info, rtol),
            s.products._replace(phi=s.products.phi + 1, jt=s.products.jt + products_of(info) + 1),
            failed(info) & (s.products.phi == 0),
        )

    zero, none = jnp.zeros_like(norm(w)), jnp.int32(0)
    start = _Linear(v, zero, zero + jnp.inf, kept, Products(none, none, none), jnp.asarray(True))
    if isinstance(solves, Plain):
        return once(start)
    return lax.while_loop(lambda s: s.again, once, start)
