"""How wrong is this hypergradient? `certify` answers, and corrects it: `certified`, `polished`.

Notation at the computed pair (w, v): r_w = w − Φ(w, λ), A = I − J, r_v = ∇₁E − Aᵀv, ĝ = ∇₂E + Bᵀv.
With the Lagrangian L(w, λ, v) = E(w, λ) + ⟨v, Φ(w, λ) − w⟩ these are its gradients: ∇_w L = r_v and
∇_λ L = ĝ. Every estimate of the form ∇₂E + Bᵀv has a measurable r_v, whatever computed v.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import check_number
from ..problem import Problem, compiled_at
from ..real_form import EVALUATION, resolution
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar, status_of
from .certificate import Certificate, CertificateStatus, relative, the_pair
from .dual_weighted import RefinedEstimate, refine
from .options import NO_KWARGS, check_factory, check_kwargs, krylov
from .saddle import leads_away

tree = optax.tree

MAX_PASSES = 6


class Options(NamedTuple):
    """The options of `certify`, which documents them, but for the gradient."""

    solve_rtol: Scalar
    safety: Scalar
    make_linear_solver: Callable[[Scalar], LinearSolver]


def certify(
    outer: Outer,
    phi: Phi,
    w: PyTree,
    v: PyTree | None,
    lam: PyTree,
    /,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    solve_rtol: Scalar = 0.01,
    safety: Scalar = 1.25,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
    gradient: PyTree | None = None,
) -> Certificate:
    """How wrong is the hypergradient ĝ = ∇₂E + Bᵀv at (w, v), and what is a better one?

    Dual-weighted residual passes, each with loose solves at the pair (w, v) so far:

        e_w ≈ A⁻¹ r_w,     (h_w, h_λ) = d/dw ∇_{w,λ}L [e_w],     e_v ≈ A⁻ᵀ (h_w − r_v),
        est = h_λ + Bᵀe_v ≈ ĝ − ∇f,      (w, v) ← (w − e_w, v − e_v).

    A second pass starts at the corrected pair, with solves that go below the residuals that the first
    ones left: its est₂ is what the first pass missed, be it for curvature or for a loose solve of an
    ill-conditioned system. More passes, six at most, by tight solves, come only where ‖est₂‖ is more
    than a quarter of the whole correction, or where a solve amplified its right-hand side by twice
    what those before had, which shows that they were too loose to see the largest error. With
    g⁺ = ∇_λ L − est at the last pair and θ the ratio of the last two corrections,

        error = safety (‖ĝ − g⁺‖ + ‖est_last‖ θ / (1 − θ)) + rounding.

    L itself is f to second order, with the error ⟨r_v − ½ h_w, e_w⟩ to third: `value` is L(w, v), and
    `value_error` what it differs by from L at the last pair less that pair's estimate.

    These are estimates. `valid` is false where something speaks against it: see `CertificateStatus`.

    Assumed, not checked: that the fixed point near w is the one that is meant, but for `REPELLED`.

    Cost: two passes as a rule, each one solve with J and one with Jᵀ, to `solve_rtol` and
    then below what those left; a rough solve with Jᵀ that tells the parts apart; twelve products, and
    twenty at most with Jᵀ, two where J is not symmetric, that look for a saddle.
    Measured in `products`: 3 to 7 times those of the linear solve at 1e-3 alone, about as many as of
    a whole hypergradient. Memory: the linear solver's.
    When not to use it: far from the solution of a non-convex problem (it says `FAR`); at kinks of a
    proximal map between w and w(λ).

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w: The lower-level iterate.
        v: The solution of (I − Jᵀ)v = ∇₁E at w as it was computed, like w; `None` to have it computed.
        lam: λ; the hypergradient is with respect to its inexact leaves.
        *args: Data.
        kwargs: Data by keyword, `kwargs={"x": x}` for `phi(w, lam, x=x)`: other keywords are options.
        solve_rtol: Relative tolerance of the solves in the first pass; its root is that of the second,
            relative to what the first left. Looser ones cost less and miss more of the error where the
            system is ill-conditioned.
        safety: Factor on the estimate.
        make_linear_solver: `make_linear_solver(rtol) -> LinearSolver` for J and Jᵀ; by default `gmres`,
            right for any invertible A. `lambda rtol: cg(max_steps=1000, rtol=rtol)` takes less memory
            where J is symmetric.
        gradient: An estimate that is not of the form ∇₂E + Bᵀv (`itd`); the error is then
            safety (‖gradient − g⁺‖ + remainder).

    Returns:
        A `Certificate`; a pytree, under `jit`, `vmap` and `lax.scan` as well.

    Raises:
        TypeError: An argument is not of its kind or shape; an option that there is not, or that could
            be meant for a parameter of `phi` or `outer`.
        ValueError: `solve_rtol` is not in (0, 1), or `safety` is below 1.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> outer = lambda w, lam: w**2
    >>> w = fg.picard(phi, num_steps=5)(0.0, 0.3)
    >>> certificate = fg.certify(outer, phi, w, 1.0, 0.3)
    >>> bool(certificate.valid), fg.CertificateStatus(int(certificate.status)).name
    (True, 'VALID')

    References:
        Becker, Rannacher, An optimal control approach to a posteriori error estimation in finite
        element methods, Acta Numerica 2001 (dual-weighted residuals); Ehrhardt, Roberts, Analyzing
        inexact hypergradients for bilevel learning, 2023 (a-posteriori bounds).
    """
    options = Options(solve_rtol, safety, make_linear_solver)
    given = options._asdict() | {"gradient": gradient}
    data = check_kwargs(certify, {"phi": phi, "outer": outer}, 2 + len(args), kwargs, given)
    return certificate_of("certify", outer, phi, w, v, lam, args, data, gradient, options)


def check_options(where: str, o: Options) -> None:
    """Raises `TypeError` or `ValueError` unless the options are what `certify` asks for."""
    check_factory(where, o.make_linear_solver)
    check_number(where, "solve_rtol", o.solve_rtol, lambda x: 0 < x < 1, "a number in (0, 1)")
    check_number(where, "safety", o.safety, lambda x: x >= 1, "a number >= 1")


def certificate_of(
    where: str,
    outer: Outer,
    phi: Phi,
    w: PyTree,
    v: PyTree | None,
    lam: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    gradient: PyTree | None,
    options: Options,
) -> Certificate:
    """`certify` with its data in two arguments and its options in one: they cannot be confused."""
    check_options(where, options)
    solve_rtol, safety, make_linear_solver = options
    compute = compiled_at(where, _compute, (outer, phi, make_linear_solver), where)
    return compute(w, lam, args, kwargs, v, gradient, solve_rtol, safety)


def _compute(
    problem: Problem,
    make_linear_solver: Callable[[Scalar], LinearSolver],
    where: str,
    v: PyTree | None,
    gradient: PyTree | None,
    solve_rtol: Scalar,
    safety: Scalar,
) -> Certificate:
    v_x, given, extra = the_pair(where, problem, v, gradient, make_linear_solver(solve_rtol))
    passes = refine(problem, problem.w, v_x, make_linear_solver, solve_rtol, MAX_PASSES)
    certificate = assess(problem, passes, given, safety, extra)
    repels, probes = leads_away(problem, passes.w, tree.sub(problem.w, passes.w), True)
    spent = jax.tree.map(jnp.add, certificate.products, probes)
    return objected(certificate, repels)._replace(products=spent)


def assess(
    problem: Problem,
    s: RefinedEstimate,
    given: PyTree | None,
    safety: Scalar,
    extra_products: jax.Array | int = 0,
) -> Certificate:
    """The certificate that follows from passes."""
    p = s.first
    gradient = p.gradient if given is None else given
    norm = problem.norm
    whole = norm(tree.sub(p.gradient, s.end))
    distance = norm(tree.sub(gradient, s.end))
    safety = jnp.asarray(safety, whole.dtype)
    error = safety * (distance + s.rest) + p.rounding
    # A comparison with NaN is false, and may have ended a solve at once with a correction of 0.
    error = jnp.where(jnp.isfinite(p.r_w + p.r_v + norm(gradient)), error, jnp.nan)

    largest = jnp.maximum(jnp.abs(p.value), jnp.abs(s.value_end))
    value_noise = p.value_noise + EVALUATION * resolution(p.value) * largest
    value_error = safety * (jnp.abs(p.value - s.value_end) + s.value_rest) + value_noise
    value_error = jnp.where(jnp.isfinite(error + p.value), value_error, jnp.nan)

    unexplained = jnp.maximum(s.change - whole, s.rest)
    status = status_of(
        CertificateStatus.VALID,
        (~s.missed, CertificateStatus.REMAINDER),
        (unexplained <= 0.5 * whole + p.rounding, CertificateStatus.REMAINDER),
        (s.reduction_v <= 0.5, CertificateStatus.KINK),
        (s.reduction_w <= 0.5, CertificateStatus.FAR),
        (s.solved, CertificateStatus.SOLVE_FAILED),
        (jnp.isfinite(error), CertificateStatus.NON_FINITE),
    )
    valid = status == CertificateStatus.VALID
    # Where all of the difference may be rounding the correction is no better than what it corrects.
    better = valid & ((whole > p.rounding) if given is None else True)
    polished = tree.where(better, s.end, gradient)
    jt = s.products.jt + jnp.asarray(extra_products, jnp.int32)
    return Certificate(
        error=error,
        relative_error=relative(error, polished),
        lower_part=p.size_lower,
        linear_part=p.size_linear,
        remainder=s.rest,
        gradient=problem.join_gradient(gradient),
        polished=problem.join_gradient(polished),
        value=p.value,
        value_error=value_error,
        polished_value=jnp.where(valid, s.value_end, p.value),
        value_remainder=jnp.where(valid, safety * s.value_rest + value_noise, value_error),
        residual_w=p.r_w,
        residual_v=p.r_v,
        products=s.products._replace(jt=jt),
        valid=valid,
        status=status,
        at_floor=p.r_w <= p.noise_w,
        rounding=p.rounding,
        safety=safety,
        proved=jnp.asarray(False),
    )


def objected(certificate: Certificate, repels: jax.Array) -> Certificate:
    """The certificate with the status `REPELLED`, unless there is a worse one."""
    milder = (CertificateStatus.VALID, CertificateStatus.REMAINDER, CertificateStatus.KINK)
    objection = repels & jnp.any(certificate.status == jnp.array(milder, jnp.int32))
    status = jnp.where(objection, jnp.int32(CertificateStatus.REPELLED), certificate.status)
    polished = jax.tree.map(
        lambda plain, better: (
            jnp.where(objection, plain, better) if isinstance(plain, jax.Array) else plain
        ),
        certificate.gradient,
        certificate.polished,
    )
    c = certificate
    return c._replace(
        valid=c.valid & ~objection,
        status=status,
        polished=polished,
        polished_value=jnp.where(objection, c.value, c.polished_value),
        value_remainder=jnp.where(objection, c.value_error, c.value_remainder),
    )
