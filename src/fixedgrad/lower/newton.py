"""Newton's method for w = Φ(w, λ), matrix-free or by a matrix: `newton`.

With F(w) = w − Φ(w) and A = ∂₁F = I − J a step is w ← w − e, A e ≈ F(w), solved as loosely as it can
use.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..compiled import Compiled
from ..errors import check_callable, check_count
from ..estimators import check_linear_solver
from ..failure import check_on_failure
from ..iteration import Measured, stopping, verdict
from ..leaves import partition, started, stopped_by_residual
from ..linear import auto, gmres
from ..linear.assisted import WORTHWHILE, Assisted, Plain
from ..linear.system import Kept, Reusable
from ..linear.tunable import loosened
from ..mapped_axes import packed_loop, run_if
from ..printing import printed
from ..problem import Equation, Form, Problem
from ..real_form import LAST_DIGITS, random_signs, ratio, real_dtype, resolution
from ..types import (
    LinearSolver,
    OnFailure,
    Phi,
    Products,
    PyTree,
    Scalar,
    SolveInfo,
    Status,
    failed,
    solve_info,
    status_where,
)
from .solver import CheckedSolver, ForPhi, Lower

tree = optax.tree

_FINEST, _COARSEST = 1e-4, 0.5  # Tolerances that a solve is asked for on the way.
_PLAIN_STEPS = 10  # Steps of Φ, at least, where a Newton step does not bring the residual down.
_HALVINGS = 4  # Shorter steps that are tried before these.
LOOSE = 0.1  # Tolerance of the solves in an estimate.
_SOLVER = gmres(max_steps=1000, restart=50)


@printed
def newton(
    phi: Phi,
    *,
    max_steps: int,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    linear_solver: LinearSolver = _SOLVER,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Newton's method for F(w) = w − Φ(w, λ) = 0, safeguarded.

        w ← w − e,    (I − J) e = w − Φ(w),    J = ∂₁Φ(w, λ).

    A linear solver with a tolerance is asked for no more than the step can use (forcing terms): a
    relative residual of 0.5 at first, then of the square of what the last step left of ‖F‖, but of no
    less than half of what is left to do; never less than its own `rtol`. `dense()` makes it the
    classical method, for few unknowns, and its verdict on the matrix is left out: the residual judges
    the step. Its preconditioner, where it makes one, is made once, at w₀. Where the linear solver of
    the estimator has the same one (the same object, not an equal one), the derivative is computed with
    the matrix that was made on the way to w, and in the explicit form the way to w with that of the
    last update. Where a step does not shrink ‖F‖, shorter ones are tried, and then steps of Φ itself,
    as many as the linear solve took products. Φ need not be a contraction.

    Assumed, not checked: Φ is continuously differentiable, I − J invertible on the way. Where there are
    several fixed points, Newton's method comes to any of them, saddle points and maxima of a loss too.

    Cost: two Φ, one of them linearised, and one linear solve with J a step. Memory: 4 w and those of
    the linear solver.
    Not where Φ has kinks, nor for a q so small that a few steps of `picard` do.
    Up to some hundred unknowns `cg` (`gmres` where J is not symmetric) with `preconditioner=inverse()`
    is the fastest: one matrix in all, the derivative's included, where `dense()` makes one a step.

    Args:
        phi: `phi(w, *args, **kwargs) -> w`; the steps are taken in the inexact leaves of w.
        max_steps: At most that many linear solves, each with its step, shorter ones or some of Φ.
        rtol: Relative tolerance on the residual, as in `picard`.
        atol: Absolute tolerance on the residual.
        linear_solver: For (I − J) e = F(w): `cg` where J is symmetric, `dense()`, or any other one.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`.

    Raises:
        TypeError: `phi` is not callable, `linear_solver` not a linear solver; when called, Φ(w₀) does
            not look like `w0`; where JAX differentiates the steps, as `itd` asks for.
        ValueError: `max_steps` is not a positive integer, or bad numbers.

    >>> solver = newton(lambda w, lam: w - (w**2 - lam), max_steps=20, rtol=1e-12)
    >>> w, info = solver.with_info(1.0, 2.0)
    >>> round(float(w), 12), bool(info.converged)
    (1.414213562373, True)

    References:
        Eisenstat, Walker, Choosing the Forcing Terms in an Inexact Newton Method, 1996; Knoll, Keyes,
        Jacobian-free Newton–Krylov methods, 2004.
    """
    check_callable("newton", "phi", phi, "phi(w, *args) -> w")
    check_count("newton", "max_steps", max_steps)
    check_linear_solver("newton", linear_solver)
    check_on_failure("newton", on_failure)
    stop = stopping("newton", None, max_steps, rtol, atol)

    reusable = Reusable.of(linear_solver)

    def solve_with(
        kept: Kept | None, w0: PyTree, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
    ) -> tuple[PyTree, SolveInfo, PyTree]:
        w0 = started("newton", phi, w0, args, kwargs)
        equation = Equation.of("newton", phi, w0, (), lambda _: (args, kwargs), "`w0`")
        w_x, w_rest, join = partition(w0)
        unscaled = equation if equation.form is Form.ANY_SCALE else None
        lower = Lower(lambda w: equation.phi(w, ()), w_x, equation.space(w_x), unscaled)
        if not jax.tree.leaves(w_x):  # Nothing to solve.
            return w0, lower.exact_steps(0, w_x), None

        def judge(w: PyTree, image: PyTree, _: jax.Array) -> Measured:
            return lower.measured(stop, w, image)

        preconditioned, state = linear_solver, None
        if reusable is not None:  # Made once, at the start: on the way I − J changes little.
            make = functools.partial(reusable.state, equation.vjp(w_x, ()).j, w_x)
            state = run_if(kept.uses == 0, make, kept.state) if kept else make()
            preconditioned = reusable.using(state, transposed=True)
        s = newton_krylov(
            equation,
            (),
            w_x,
            judge,
            Plain(lambda rtol: loosened(preconditioned, rtol)),
            (),
            lambda s: s.num_steps < stop.max_steps,
            _HALVINGS,
        )
        info = verdict(s.num_steps, s.measured, s.start)
        at_floor = s.settled & ~s.measured.met & jnp.isfinite(s.measured.norm)
        status = status_where(at_floor, Status.AT_FLOOR, info.status)
        info = solve_info(info.num_steps, info.residual, status, info.tolerance)
        made = None if reusable is None else (state, ~s.missed)
        return stopped_by_residual("newton", join(s.w, w_rest)), info, made

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        return solve_with(None, w0, args, kwargs)[:2]

    if reusable is None:
        return CheckedSolver(solve, on_failure, phi)
    return CheckedSolver(solve, on_failure, phi, (reusable.preconditioner, solve_with))


NEWTON = ForPhi(
    lambda phi: newton(phi, max_steps=100, rtol=1e-8, linear_solver=auto(at_once=64)),
    "newton(phi, max_steps=100, rtol=1e-08, linear_solver=auto(at_once=64))",
)
"""What finds w where nobody says how."""


class Newton(NamedTuple):
    """Where Newton's method stands.

    Attributes:
        w: The last accepted point; the result.
        measured: Its residual.
        start: The norm of the first residual.
        settled: Whether that may be rounding, and a step did not bring it down.
        amplification: The largest ‖e‖/‖r‖ of the solves.
        left: The residual norm that the last of them left.
        num_steps: Linear solves so far.
        forcing: The relative tolerance that the next one can use.
        missed: Whether the last one missed its tolerance.
        spent: In all.
        kept: What the linear solves keep from one to the next.
    """

    w: PyTree
    measured: Measured
    start: jax.Array
    settled: jax.Array
    amplification: jax.Array
    left: jax.Array
    num_steps: jax.Array
    forcing: jax.Array
    missed: jax.Array
    spent: Products
    kept: PyTree

    @property
    def met(self) -> jax.Array:
        """Whether the end is reached."""
        return self.measured.met | self.settled


class _Trial(NamedTuple):
    """A point that is proposed, and how far the search for the next accepted one has come.

    Attributes:
        u: The point.
        theta: The share of the Newton step that led to it.
        plain: How many steps of Φ did, in the place of that.
        first: The residual norm after the first of them.
        measured: The residual of the last point that was looked at.
        found: Whether that was accepted.
        settled: Whether there is none, as the residual may be rounding.
        looks: Points looked at.
    """

    u: PyTree
    theta: jax.Array
    plain: jax.Array
    first: jax.Array
    measured: Measured
    found: jax.Array
    settled: jax.Array
    looks: jax.Array


def newton_krylov(
    equation: Equation,
    x: PyTree,
    w: PyTree,
    judge: Callable[[PyTree, PyTree, jax.Array], Measured],
    solves: Plain | Assisted,
    kept: PyTree,
    affordable: Callable[[Newton], jax.Array],
    halvings: int = 0,
    spent: Products | None = None,
    image: PyTree | None = None,
) -> Newton:
    """Brings w − Φ(w) to what `judge` asks for: Newton steps with forcing terms.

    Each step linearises Φ once. Where w − e does not bring the residual down, half of the step is
    tried, up to `halvings` times. Then plain steps of Φ take its place: as many as the solve took
    products, so that where Newton's method gets nowhere, as on the plateaus of a network, half of the
    work at least is Φ's; ten only, where they lead away.

    A linear solve that missed its tolerance is a step all the same where it brought its residual down.

    Args:
        equation: w = Φ(w, x).
        x: What Φ depends on beside w.
        w: The start.
        judge: The residual of w against its tolerance, from w, Φ(w), and how much the last solve
            amplified its right-hand side.
        solves: The linear solves.
        kept: What they have kept.
        affordable: Whether another step may be taken.
        halvings: Of a step that did not bring the residual down.
        spent: What was spent before.
        image: Φ(w), where it is known.
    """
    space = equation.space(w)
    start = judge(w, equation.phi(w, x) if image is None else image, jnp.ones((), real_dtype(w)))
    dtype = start.norm.dtype  # Which holds more than w, where λ has more.

    def size_of(u: PyTree) -> jax.Array:
        return space.size_of(u).astype(dtype)

    def scaled(share: jax.Array, e: PyTree) -> PyTree:
        return jax.tree.map(lambda x: share.astype(x.dtype) * x, e)

    plain, image_of = tree.sub, lambda _, image: image
    if equation.form is Form.ANY_SCALE:  # A plain step then takes F in units of ∂₁F.
        signs = random_signs(w)
        _, change = jax.jvp(lambda u: equation.residual(u, x), (w,), (signs,))
        unit = ratio(size_of(signs), size_of(change))
        plain = lambda u, r: tree.sub(u, scaled(unit, r))  # noqa: E731
        image_of = lambda u, _: plain(u, equation.residual(u, x))  # noqa: E731

    def unfinished(s: Newton) -> jax.Array:
        return ~s.met & jnp.isfinite(s.measured.norm) & affordable(s)

    def step(s: Newton) -> Newton:
        now = s.measured
        r, product = jax.linearize(lambda u: equation.residual(u, x), s.w)
        # No more accurate than the goal asks for.
        least = jnp.clip(0.5 * ratio(now.tolerance, now.norm), _FINEST, _COARSEST)
        forcing = jnp.maximum(s.forcing, least)
        matvec = equation.jacobian(product)
        kept = solves.prepared(s.kept, matvec, r)
        e, info = solves.solver(kept, forcing.astype(real_dtype(w)))(matvec, r)
        missed, residual = failed(info), info.residual.astype(dtype)
        useless = missed & ~(residual < 0.9 * now.norm)
        effort = products_of(info)
        many = jnp.maximum(effort, _PLAIN_STEPS)
        amplification = ratio(size_of(e), now.norm)

        def look(t: _Trial) -> _Trial:
            image = equation.phi(t.u, x)
            there = judge(t.u, image, amplification)
            is_plain = t.plain > 0
            # A relative tolerance grows with w: far away it is met by a residual that has grown.
            shrunk = jnp.any(there.sizes <= (1 - 0.3 * t.theta) * now.sizes)
            shrunk &= there.norm <= now.norm + now.floor
            first = jnp.where(t.plain == 1, there.norm, t.first)
            away = (t.plain >= _PLAIN_STEPS) & ~(there.norm <= first)
            found = jnp.where(is_plain, (t.plain >= many) | away, shrunk)
            # Where the residual may be rounding, a step that does not bring it down is the last one.
            settled = ~is_plain & ~shrunk & (now.norm <= now.floor)
            shorter = ~is_plain & (t.theta > 0.5**halvings)
            theta = t.theta / 2
            turned = tree.where(shorter, tree.sub(s.w, scaled(theta, e)), plain(s.w, r))
            onward = tree.where(is_plain, image_of(t.u, image), turned)
            return _Trial(
                tree.where(found, t.u, onward),
                theta,
                jnp.where(shorter, 0, t.plain + 1),
                first,
                there,
                found,
                settled,
                t.looks + 1,
            )

        none, false, one = jnp.int32(0), jnp.asarray(False), jnp.ones((), dtype)
        u = tree.where(useless, plain(s.w, r), tree.sub(s.w, e))
        t = _Trial(u, one, jnp.where(useless, 1, none), now.norm, now, false, false, none)
        t = packed_loop(lambda t: ~t.found & ~t.settled, look, t)
        left = jnp.where(missed, residual, forcing * now.norm)
        # Nor than a Newton step can use, which leaves of the residual what curvature makes of it.
        shrunk = jnp.minimum(ratio(t.measured.norm, now.norm), 1.0)
        following = jnp.maximum(shrunk**2, jnp.where(forcing**2 > 0.1, forcing**2, 0.0))
        larger = jnp.maximum(s.amplification, amplification)
        return Newton(
            tree.where(t.settled, s.w, t.u),
            tree.where(t.settled, now, t.measured),
            s.start,
            t.settled,
            jnp.where(useless, s.amplification, larger),
            jnp.where(useless, s.left, left),
            s.num_steps + 1,
            jnp.minimum(following, _COARSEST),
            missed,
            s.spent._replace(phi=s.spent.phi + 1 + t.looks, j=s.spent.j + effort),
            solves.used(kept, info, forcing),
        )

    nothing = Products(*(jnp.int32(0) for _ in range(3)))
    spent = nothing if spent is None else spent
    zero = jnp.zeros_like(start.norm)
    spent = spent._replace(phi=spent.phi + int(image is None))
    false, none = jnp.asarray(False), jnp.int32(0)
    s = Newton(
        w,
        start,
        start.norm,
        false,
        zero,
        zero + jnp.inf,
        none,
        zero + _COARSEST,
        false,
        spent,
        kept,
    )
    return packed_loop(unfinished, step, s)


def solve_for_w(
    problem: Problem,
    w: PyTree,
    tau: jax.Array,
    solves: Plain | Assisted,
    kept: PyTree,
    max_products: int | jax.Array,
    goal: jax.Array | float = 0.0,
    spent: Products | None = None,
) -> Newton:
    """Brings ‖w − Φ(w)‖ to `tau`, or w to a relative error of `goal` if that is less strict.

    The error is the residual as much amplified as that of the last solve was. First by steps of Φ, for
    as long as each takes a good part off: nothing is cheaper.
    """
    norm, floor, x = problem.norm, LAST_DIGITS * resolution(w), problem.x
    phi = problem.equation.phi
    any_scale = problem.equation.form is Form.ANY_SCALE

    def judge(w: PyTree, image: PyTree, amplification: jax.Array) -> Measured:
        size, false = norm(tree.sub(w, image)), jnp.asarray(False)
        amplification = amplification.astype(size.dtype)
        if any_scale:
            _, beside = problem.equation.with_terms(w, x, tree.zeros_like(w))
            tolerance = jnp.maximum(tau, goal * norm(w) / amplification)
            return Measured(size, tolerance, floor * norm(beside.rounded), false)
        tolerance = jnp.maximum(tau, goal * norm(image) / jnp.maximum(amplification, 1.0))
        return Measured(size, tolerance, floor * norm(w), false)

    def contracts(c: _Steps) -> jax.Array:
        return ~c.measured.met & (c.measured.norm <= WORTHWHILE * c.before)

    def step(c: _Steps) -> _Steps:
        image, before = phi(c.image, x), c.measured.norm
        # Contracted by q, a residual r leaves an error of r/(1 − q).
        q = jnp.minimum(ratio(norm(tree.sub(c.image, image)), before), WORTHWHILE)
        return _Steps(c.image, image, judge(c.image, image, 1 / (1 - q)), before, c.evaluations + 1)

    image = phi(w, x)
    # Nothing is known of an F of any scale before the first solve, and its steps lead nowhere.
    known = jnp.inf if any_scale else 1 / (1 - WORTHWHILE)
    start = judge(w, image, jnp.full_like(norm(w), known))
    c = _Steps(w, image, start, jnp.full_like(start.norm, jnp.inf), jnp.int32(1))
    c = c if any_scale else packed_loop(contracts, step, c)
    nothing = Products(*(jnp.int32(0) for _ in range(3)))
    spent = nothing if spent is None else spent
    return newton_krylov(
        problem.equation,
        x,
        c.w,
        judge,
        solves,
        kept,
        lambda s: jnp.asarray(sum(s.spent)) < max_products,
        spent=spent._replace(phi=spent.phi + c.evaluations),
        image=c.image,
    )


class _Steps(NamedTuple):
    """The carry of steps of Φ: w, Φ(w), its residual, the one before, evaluations of Φ."""

    w: PyTree
    image: PyTree
    measured: Measured
    before: jax.Array
    evaluations: jax.Array


def products_of(info: SolveInfo) -> jax.Array:
    """The products of a linear solve: one a step, and one for the true residual."""
    return info.num_steps + jnp.minimum(info.num_steps, 1)
