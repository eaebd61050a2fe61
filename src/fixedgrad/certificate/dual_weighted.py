"""Dual-weighted passes at (w, v): one Newton step on both residuals of the bilevel problem each.

With A = I − J and the Lagrangian L(w, λ, v) = E(w, λ) + ⟨v, Φ(w, λ) − w⟩ the gradients of L are the
residual r_v = ∇₁E − Aᵀv and the hypergradient ĝ = ∇₂E + Bᵀv. One Newton step on both residuals,

    e_w = A⁻¹ r_w,    (h_w, h_λ) = d/dw ∇_{w,λ}L [e_w],    e_v = A⁻ᵀ (h_w − r_v),

gives w⁺ = w − e_w, v⁺ = v − e_v and, to first order, ĝ − ∇f = h_λ + Bᵀe_v. L itself is stationary at
the solution, so that by the trapezoidal rule along the way there

    L(w, v) − f = ½ (⟨r_v, e_w⟩ − ⟨r_w, e_v⟩) = ⟨r_v − ½ h_w, e_w⟩     to second order,

since ⟨r_w, e_v⟩ = ⟨A e_w, e_v⟩ = ⟨e_w, h_w − r_v⟩.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..problem import Problem
from ..real_form import (
    LAST_DIGITS,
    VALUE,
    norms,
    nudged,
    pairing,
    random_signs,
    ratio,
    resolution,
)
from ..types import LinearSolver, MatVec, Products, PyTree, Scalar
from .loose_solves import LooseSolves, loosely, no_solves

tree = optax.tree

_ROUGH = 0.3  # Tolerance of solves that have to get the size right.


class Estimate(NamedTuple):
    """The result of one pass at (w, v); sizes are norms.

    Attributes:
        gradient: ĝ at (w, v).
        lower: h_λ + BᵀA⁻ᵀh_w, the error that comes from w.
        linear: −BᵀA⁻ᵀr_v, the error that comes from v.
        w: w⁺.
        v: v⁺.
        r_w: ‖w − Φ(w)‖.
        r_v: ‖∇₁E − Aᵀv‖.
        right: ‖r_v‖ + ‖h_w‖, the right-hand sides of e_v.
        noise_w: The part of `r_w` that may be rounding.
        noise_v: The part of `right` that may be rounding.
        size: ‖ĝ‖.
        size_lower: ‖lower‖.
        size_linear: ‖linear‖.
        value: L(w, v).
        value_error: ⟨r_v − h_w/2, e_w⟩, what L(w, v) − f is to third order.
        value_bound: ‖e_w‖ (‖r_v‖ + ‖h_w‖/2), above the size of that.
        value_noise: The part of L that may be the rounding of w.
        value_missed: What `value_error` may miss by, as e_w solves loosely.
        size_e_w: ‖e_w‖.
        terms: ‖ĝ‖ + ‖Bᵀv‖, the size of the terms of ĝ.
        noise: The part of ‖ĝ‖ that may be rounding.
        solves: The `LooseSolves` of this pass.
        seen: Those that they are to be compared with: those before, or its own first stages.
        products: The `Products` that it cost.
        steps: Those of the linear solver in one stage of the solve for e_w.
        solved: Whether the loose solves succeeded.
    """

    gradient: PyTree
    lower: PyTree
    linear: PyTree
    w: PyTree
    v: PyTree
    r_w: jax.Array
    r_v: jax.Array
    right: jax.Array
    noise_w: jax.Array
    noise_v: jax.Array
    size: jax.Array
    size_lower: jax.Array
    size_linear: jax.Array
    value: jax.Array
    value_error: jax.Array
    value_bound: jax.Array
    value_noise: jax.Array
    value_missed: jax.Array
    size_e_w: jax.Array
    terms: jax.Array
    noise: jax.Array
    solves: LooseSolves
    seen: LooseSolves
    products: Products
    steps: jax.Array
    solved: jax.Array

    @property
    def rounding(self) -> jax.Array:
        """The part of the error that may be rounding: of the residuals, amplified, and of ĝ."""
        amplified = ratio(self.size_lower * self.noise_w, self.r_w)
        return amplified + ratio(self.size_linear * self.noise_v, self.right) + self.noise


class RefinedEstimate(NamedTuple):
    """The error at (w, v) as one or several passes from there find it.

    Attributes:
        first: The first `Estimate`.
        end: The corrected gradient after the last pass.
        value_end: The corrected value, an estimate of f.
        value_rest: An estimate of the error of `value_end`.
        change: The size of the last correction.
        rest: An estimate of the error of `end`.
        reduction_w: The largest ratio of ‖w − Φ(w)‖ after a pass to that before, rounding aside.
        reduction_v: Ratio of ‖r_v‖ after the last pass but one to ‖r_v‖ + ‖h_w‖ before, rounding aside.
            The equation for v is linear: where w comes closer, v follows.
        solves: The `LooseSolves` of all passes.
        missed: Whether the last pass found an error that those before had missed, so that more may be
            hidden.
        products: The `Products` of all passes.
        solved: Whether all loose solves succeeded.
        w: Where the passes end.
    """

    first: Estimate
    end: PyTree
    value_end: jax.Array
    value_rest: jax.Array
    change: jax.Array
    rest: jax.Array
    reduction_w: jax.Array
    reduction_v: jax.Array
    solves: LooseSolves
    missed: jax.Array
    products: Products
    solved: jax.Array
    w: PyTree


def dual_weighted(
    problem: Problem,
    w: PyTree,
    v: PyTree,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    rtol: Scalar,
    before: LooseSolves,
    split: bool | jax.Array = True,
    once: bool = True,
) -> Estimate:
    """One pass at (w, v).

    Args:
        problem: Φ and E.
        w: Where.
        v: Where.
        make_linear_solver: From a relative tolerance to a solver.
        rtol: Tolerance of the solves, relative to ‖r_w‖ and to ‖r_v‖ + ‖h_w‖, or to what the solves
            before left, where that is less.
        before: What these have shown.
        split: Whether the parts of the error are wanted, by one rough solve more; else they are in
            proportion to their right-hand sides.
        once: Whether the solves are taken in one stage. Else one that none came before is taken in two,
            the second of what the first left, so that it can tell whether more may be hidden.
    """
    norm, norms = problem.norm, problem.norms
    # ∇L in one linearisation: its tangent gives A = I − J and h, its transpose is not needed.
    at_v, tangent = jax.linearize(lambda u: problem.gradients(u, v), w)
    _, r_w, r_v, g, b = at_v
    of_phi = problem.equation.vjp(w, problem.x)
    eps = VALUE * resolution(w)
    of_w, of_image, left_w, left_v, of_b, of_v = norms(w, tree.sub(w, r_w), r_w, r_v, b, v)
    noise_w, size_a = _noise(problem, w, r_w, of_w + of_image, lambda u: tangent(u).r_w)
    # A residual below the noise says nothing, zero least of all: noise of that size takes its place.
    at_floor = left_w <= 2 * noise_w
    direction = jax.tree.map(lambda x, s: s * x, w, random_signs(w))
    share = ratio(noise_w, 4 * of_w)
    random = jax.tree.map(lambda x: share.astype(x.dtype) * x, direction)
    r_w = tree.where(left_w <= noise_w, tree.add(r_w, random), r_w)
    size_w = norm(r_w)
    rtol = jnp.asarray(rtol, size_w.dtype)
    rtol_w = rtol * jnp.minimum(1.0, ratio(before.residual_w, size_w))
    at_w = problem.equation.jacobian(lambda u: tangent(u).r_w)
    first_w = jnp.asarray(once) | (before.amplification_w > 0)
    of_w_solve = loosely(norm, make_linear_solver, at_w, r_w, rtol_w, once, first_w)
    e_w = of_w_solve.x
    _, _, h_w, h_x, _ = tangent(e_w)
    both_sides = tree.sub(h_w, r_v)
    of_h_w, of_both, size_e_w = norms(h_w, both_sides, e_w)

    # Of the two right-hand sides the second only serves to tell the parts apart: a rough solve.
    right = left_v + of_h_w
    rtol_v = rtol * jnp.minimum(1.0, ratio(before.residual_v, right))
    sides = [(both_sides, jnp.minimum(ratio(rtol_v * right, of_both), 1.0))]
    if split is not False:
        asked = tree.where(split, h_w, tree.zeros_like(h_w))
        rough = jnp.minimum(ratio(_ROUGH * of_h_w, jnp.where(split, of_h_w, 0.0)), 1.0)
        sides.append((asked, rough.astype(right.dtype)))
    rows = jax.tree.map(lambda *x: jnp.stack(x), *sides)

    first_v = jnp.asarray(once) | (before.amplification_v > 0)
    of_v_solves = lax.map(
        lambda row: loosely(norm, make_linear_solver, of_phi.j, row[0], row[1], once, first_v), rows
    )
    of_v_solve, *others = (
        jax.tree.map(lambda x, i=i: x[i], of_v_solves) for i in range(len(sides))
    )
    e_v, from_h = of_v_solve.x, [other.x for other in others]
    both = of_phi.b(e_v)
    # Without that solve the parts are told apart by their right-hand sides.
    share = ratio(of_h_w, right)
    of_h = jax.tree.map(lambda x: share.astype(x.dtype) * x, both)
    if from_h:
        of_h = tree.where(split, of_phi.b(from_h[0]), of_h)
    one = jnp.int32(1)
    # Φ is linearised once; ∇L, its tangent (J and the second derivative), and Bᵀ for each part.
    products = Products(
        one,
        of_w_solve.products(once) + one,
        jnp.sum(of_v_solves.products(once), dtype=jnp.int32)
        + 3 * one
        + jnp.asarray(split, jnp.int32),
    )
    noise_v = eps * (of_b + 2 * size_a * of_v)
    # A right-hand side that is rounding has parts along all singular vectors of A: how much a solve
    # amplifies it says nothing of the residuals.
    visible = right > 2 * noise_v
    solves = LooseSolves(
        jnp.where(at_floor, 0.0, of_w_solve.amplification),
        jnp.where(visible, of_v_solve.amplification, 0.0),
        of_w_solve.left,
        of_v_solve.left,
    )
    seen = LooseSolves(
        jnp.where(first_w, before.amplification_w, of_w_solve.at_first),
        jnp.where(first_v, before.amplification_v, of_v_solve.at_first),
        before.residual_w,
        before.residual_v,
    )
    lower, linear = tree.add(h_x, of_h), tree.sub(both, of_h)
    size, size_b, size_lower, size_linear = norms(g, of_phi.b(v), lower, linear)
    return Estimate(
        g,
        lower,
        linear,
        tree.sub(w, e_w),
        tree.sub(v, e_v),
        size_w,
        left_v,
        right,
        noise_w,
        noise_v,
        size,
        size_lower,
        size_linear,
        at_v.lagrangian(v).astype(size.dtype),
        pairing(tree.sub(r_v, tree.scale(0.5, h_w)), e_w).astype(size.dtype),
        size_e_w * (left_v + 0.5 * of_h_w),
        _value_noise(eps, w, v, b).astype(size.dtype),
        of_w_solve.amplification * of_w_solve.left * (left_v + 0.5 * of_h_w),
        size_e_w,
        size + size_b,
        eps * (size + size_b),
        solves,
        seen,
        products,
        of_w_solve.steps // jnp.maximum(of_w_solve.stages, 1),
        ~(of_w_solve.lost | jnp.any(of_v_solves.lost)),
    )


def _value_noise(eps: float, w: PyTree, v: PyTree, b: PyTree) -> jax.Array:
    """The part of L that may be rounding of w, where E and Φ take it; that of E itself comes on top.

    The rounding of the entries of w is as if at random, so that squares add.
    """
    return eps * jnp.sum(norms(tree.mul(w, b), tree.mul(w, v)))


def _noise(
    problem: Problem, w: PyTree, r_w: PyTree, sizes: jax.Array, product: MatVec
) -> tuple[jax.Array, jax.Array]:
    """The part of ‖r_w‖ that may be rounding, and ‖A‖ along the rounding of w, at most 1.

    `sizes` is ‖w‖ + ‖Φ(w)‖.

    A residual w − Φ(w) has the rounding of w and Φ(w), whatever the map. A residual F that is given has
    the rounding of its terms, which are not known. So its rounding is observed: with δ the last digits
    of w, F(w + δ) − F(w) − A δ is rounding, to second order. The rounding of w itself enters F as A δ.
    """
    norm, eps = problem.norm, resolution(w)
    if not problem.equation.by_residual:
        return VALUE * eps * sizes, jnp.ones_like(sizes)
    moved = nudged(w)
    delta = tree.sub(moved, w)
    change = product(delta)
    there = problem.equation.residual(moved, problem.x)
    observed = norm(tree.sub(tree.sub(there, r_w), change))
    size_a = jnp.minimum(VALUE * ratio(norm(change), norm(delta)), 1.0)
    return VALUE * (observed + norm(change) / LAST_DIGITS + eps * norm(r_w)), size_a


def refine(
    problem: Problem,
    w: PyTree,
    v: PyTree,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    rtol: Scalar,
    max_passes: int,
) -> RefinedEstimate:
    """Passes from (w, v) until one changes the gradient little, and its solves find nothing unseen.

    Little is less than a quarter of all change. At least two passes: the second one starts at the
    corrected pair, linearises there, and measures what the first left, whether by a loose solve, by
    curvature or by a kink. This is Newton's method with Deuflhard's test, the size of the next
    correction, in the norm of the hypergradient; `LooseSolves` tells when that size cannot be trusted.
    """
    norm = problem.norm

    def run(i: jax.Array, w: PyTree, v: PyTree, solves: LooseSolves) -> Estimate:
        # The second pass only has to show what the first left: a looser solve will do. There is a third
        # where much was left: A is so ill-conditioned that loose solves miss it, or w is far.
        tol = jnp.asarray(rtol, norm(w).dtype)
        tol = jnp.stack([tol, jnp.sqrt(tol), tol**2])[jnp.minimum(i, 2)]
        return dual_weighted(problem, w, v, make_linear_solver, tol, solves, i == 0)

    def body(
        carry: tuple[jax.Array, Estimate, RefinedEstimate],
    ) -> tuple[jax.Array, Estimate, RefinedEstimate]:
        i, before, s = carry
        solves = tree.where(i == 0, no_solves(s.change), s.solves)
        at_w, at_v = tree.where(i == 0, (w, v), (before.w, before.v))
        p = run(i, at_w, at_v, solves)
        first = tree.where(i == 0, p, s.first)
        correction = tree.add(p.lower, p.linear)
        end = tree.sub(p.gradient, correction)
        change = norm(correction)
        later = i > 0
        noise_w, noise_v = 2 * first.noise_w, 2 * first.noise_v
        reduction_w = jnp.maximum(
            s.reduction_w, ratio(jnp.maximum(p.r_w - noise_w, 0.0), before.r_w)
        )
        reduction_v = ratio(jnp.maximum(p.r_v - noise_v, 0.0), before.right)
        theta = ratio(change, s.change)
        # The geometric series of the corrections to come.
        series = jnp.minimum(theta, 1.0) / jnp.maximum(1 - theta, 0.1)
        rest = change * series
        zero = jnp.zeros_like(change)
        return (
            i + 1,
            p,
            RefinedEstimate(
                first,
                end,
                p.value - p.value_error,
                p.value_bound * jnp.where(later, series, 1.0) + p.value_missed,
                change,
                jnp.where(later, rest, change),
                jnp.where(later, reduction_w, zero),
                jnp.where(later, reduction_v, zero),
                solves.then(p.solves),
                later & solves.exceeded_by(p.solves),
                jax.tree.map(jnp.add, s.products, p.products),
                s.solved & p.solved,
                p.w,
            ),
        )

    def unfinished(carry: tuple[jax.Array, Estimate, RefinedEstimate]) -> jax.Array:
        i, _, s = carry
        whole = norm(tree.sub(s.first.gradient, s.end))
        large = (s.change > 0.25 * whole + s.first.rounding) | (s.reduction_v > 0.5)
        hopeful = s.solved & (s.reduction_w <= 0.5) & jnp.isfinite(s.change)
        return (i < 2) | ((i < max_passes) & (large | s.missed) & hopeful)

    def blank() -> tuple[Estimate, RefinedEstimate]:
        p = run(jnp.int32(0), w, v, no_solves(norm(w)))
        x, no = p.r_w, jnp.asarray(False)
        return p, RefinedEstimate(
            p, p.gradient, x, x, x, x, x, x, p.solves, no, p.products, no, p.w
        )

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(blank))
    before, s = zeros
    start = (jnp.int32(0), before, s._replace(solved=jnp.asarray(True)))
    return lax.while_loop(unfinished, body, start)[2]


def estimate_once(problem: Problem, p: Estimate, before: LooseSolves) -> RefinedEstimate:
    """The error at (w, v) by one pass alone, after the solves `before`.

    One evaluation at (w⁺, v⁺) stands in place of a second pass.
    """
    there = problem.gradients(p.w, p.v)
    _, r_w, r_v, end, _ = there
    correction = tree.add(p.lower, p.linear)
    rest = tree.sub(end, tree.sub(p.gradient, correction))
    size_w, size_v = problem.norms(r_w, r_v)
    change, size_rest = problem.norms(correction, rest)
    one = jnp.int32(1)
    # ‖e_w‖ and ‖h_w‖ there, as they were here beside ‖r_w‖ and ‖e_w‖.
    seen = jnp.maximum(before.amplification_w, p.solves.amplification_w)
    size_e_w = seen * size_w
    of_h_w = ratio((p.right - p.r_v) * size_e_w, p.size_e_w)
    return RefinedEstimate(
        p,
        end,
        there.lagrangian(p.v).astype(change.dtype),
        size_e_w * (size_v + 0.5 * of_h_w),
        change,
        size_rest,
        ratio(jnp.maximum(size_w - 2 * p.noise_w, 0.0), p.r_w),
        ratio(jnp.maximum(size_v - 2 * p.noise_v, 0.0), p.right),
        before.then(p.solves),
        p.seen.exceeded_by(p.solves),
        p.products._replace(phi=p.products.phi + one, jt=p.products.jt + one),
        p.solved,
        p.w,
    )
