"""How wrong is this hypergradient? `certify` answers, and corrects it: `certified`, `polished`.

Notation at the computed pair (w, v): r_w = w − Φ(w, λ), A = I − J, r_v = ∇₁E − Aᵀv, ĝ = ∇₂E + Bᵀv.
With the Lagrangian L(w, λ, v) = E(w, λ) + ⟨v, Φ(w, λ) − w⟩ these are its gradients: ∇_w L = r_v and
∇_λ L = ĝ. Every estimate of the form ∇₂E + Bᵀv has a measurable r_v, whatever computed v.
"""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from .. import printing
from ..bounds import Constants
from ..compiled import compiled_for
from ..errors import check_number, check_same
from ..leaves import partition
from ..problem import Problem
from ..real_form import norm
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar
from .dual_weighted import RefinedEstimate, refine
from .lagrangian import Products, check_factory, krylov, solve_v, stated
from .options import NO_KWARGS, check_kwargs
from .proved import bound

tree = optax.tree

Level = Literal["estimate", "proved"]

_MAX_PASSES = 6


class CertificateStatus(enum.IntEnum):
    """Why a certificate is not valid. An array of it is int32; `CertificateStatus(int(x))` names it."""

    VALID = 0
    """Nothing speaks against it."""
    NON_FINITE = 1
    """NaN or infinity in w, v, Φ, E or their derivatives."""
    SOLVE_FAILED = 2
    """A loose solve with A or Aᵀ missed its tolerance: A may be singular here."""
    FAR = 3
    """A Newton step did not bring ‖w − Φ(w)‖ down to half: w is too far from the fixed point."""
    KINK = 4
    """‖r_v‖ stays: J or ∇₁E jumps near w, as at another active set, or is strongly curved."""
    REMAINDER = 5
    """What the last correction leaves may be half of the whole: the corrections do not contract, or the
    last one found an error where those before had seen none."""
    CONSTANT_CONTRADICTED = 6
    """An observation violates one of the `Constants`."""
    REPELLED = 7
    """Steps of Φ lead away from the fixed point nearby, as from a saddle of the lower level's loss that
    gradient descent is passing: the one that they come to is another. Seen where J is symmetric, by
    twenty products at most, which miss an eigenvalue of J above 1 by less than about a hundredth of
    ‖I − J‖. No objection where Φ = w − F is no iteration, and the equations F = 0 are no minimum."""


class Certificate(NamedTuple):
    """An answer to: how wrong is the hypergradient ĝ at (w, v)?

    Attributes:
        error: Level "estimate": an estimate of ‖ĝ − ∇f‖, safety factor included. Level "proved": an
            upper bound of it, given the constants.
        relative_error: `error` over the norm of the best gradient at hand.
        lower_part: The share of the error that comes from w ≠ w(λ) (a norm).
        linear_part: The share of the error that comes from (I − Jᵀ)v ≠ ∇₁E (a norm).
        remainder: What may be wrong with g⁺, estimated; 0 at level "proved".
        gradient: ĝ = ∇₂E + Bᵀv, or the gradient that was given.
        polished: g⁺, the corrected hypergradient; ĝ where `valid` is false or at level "proved".
        residual_w: ‖w − Φ(w)‖.
        residual_v: ‖∇₁E − (I − Jᵀ)v‖.
        products: What was spent, a `Products`.
        valid: Whether `error` can be relied on.
        status: A `CertificateStatus`, int32.
        at_floor: The residual of w is rounding: the correction brings nothing.
        level: 0 for "estimate", 1 for "proved".
    """

    error: jax.Array
    relative_error: jax.Array
    lower_part: jax.Array
    linear_part: jax.Array
    remainder: jax.Array
    gradient: PyTree
    polished: PyTree
    residual_w: jax.Array
    residual_v: jax.Array
    products: Products
    valid: jax.Array
    status: jax.Array
    at_floor: jax.Array
    level: jax.Array

    def __repr__(self) -> str:
        known = printing.values_of(self.relative_error, self.valid, self.status, self.level)
        if known is None:
            return printing.shapes_in(self)
        error, valid, status, level = known
        unnamed = {True: "valid", False: "none yet"}
        names = [
            printing.member(CertificateStatus, r) if r else unnamed[bool(v)]
            for r, v in zip(status.ravel(), valid.ravel(), strict=True)
        ]
        if status.ndim:
            return printing.record(self, printing.tally("certificate", names))
        sign = "<= " if level else ""
        return printing.record(self, f"relative error {sign}{printing.number(error)}", names[0])


class Options(NamedTuple):
    """The options of `certify`, which documents them, but for the gradient."""

    level: Level
    constants: Constants | None
    solve_rtol: Scalar
    safety: Scalar
    linear_solver: Callable[[Scalar], LinearSolver]


def certify(
    outer: Outer,
    phi: Phi,
    w: PyTree,
    v: PyTree | None,
    lam: PyTree,
    /,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    level: Level = "estimate",
    constants: Constants | None = None,
    solve_rtol: Scalar = 0.01,
    safety: Scalar = 1.25,
    linear_solver: Callable[[Scalar], LinearSolver] = krylov,
    gradient: PyTree | None = None,
) -> Certificate:
    """How wrong is the hypergradient ĝ = ∇₂E + Bᵀv at (w, v), and what is a better one?

    Level "estimate", dual-weighted residual passes, each with loose solves at the pair (w, v) so far:

        e_w ≈ A⁻¹ r_w,     (h_w, h_λ) = d/dw ∇_{w,λ}L [e_w],     e_v ≈ A⁻ᵀ (h_w − r_v),
        est = h_λ + Bᵀe_v ≈ ĝ − ∇f,      (w, v) ← (w − e_w, v − e_v).

    A second pass starts at the corrected pair, with solves that go below the residuals that the first
    ones left: its est₂ is what the first pass missed, be it for curvature or for a loose solve of an
    ill-conditioned system. More passes, six at most, by tight solves, come only where ‖est₂‖ is more
    than a quarter of the whole correction, or where a solve amplified its right-hand side by twice
    what those before had, which shows that they were too loose to see the largest error. With
    g⁺ = ∇_λ L − est at the last pair and θ the ratio of the last two corrections,

        error = safety (‖ĝ − g⁺‖ + ‖est_last‖ θ / (1 − θ)) + rounding.

    It is an estimate. `valid` is false where something speaks against it: see `CertificateStatus`.

    Level "proved", an upper bound from constants of the caller, with ε = ‖r_w‖/μ and L = ‖B‖:

        ‖ĝ − ∇f‖ ≤ (η₂ + ν₂‖v‖) ε + ((L + ν₂ε)/μ) (‖r_v‖ + (η₁ + ν₁‖v‖) ε),

    since B*ᵀv* − Bᵀv = B*ᵀ(v* − v) + (B* − B)ᵀv and A*ᵀ(v* − v) = r_v + (b* − b) + (J* − J)ᵀv. It
    holds if the constants do, on the ball of radius ε around w; `valid` is false where an
    observation contradicts one of them, and a constant that is wrong unseen makes it wrong.

    Assumed, not checked: that the fixed point near w is the one that is meant, but for `REPELLED`.

    Cost: "estimate": two passes as a rule, each one solve with J and one with Jᵀ, to `solve_rtol` and
    then below what those left; a rough solve with Jᵀ that tells the parts apart; twelve products, and
    twenty at most with Jᵀ, two where J is not symmetric, that look for a saddle.
    Measured in `products`: 3 to 6 times those of the linear solve at 1e-3 alone, about as many as of
    a whole hypergradient. "proved": two Φ and about twenty products. Memory: the linear solver's.
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
        level: "estimate" or "proved".
        constants: `fixedgrad.bounds.Constants` at this λ, for level "proved": `mu`, `nu1`, `nu2`,
            `eta1`, `eta2`, `L_Phi` and, if Φ is a contraction, `q`, on the ball of radius ε around w.
        solve_rtol: Relative tolerance of the solves in the first pass; its root is that of the second,
            relative to what the first left. Looser ones cost less and miss more of the error where the
            system is ill-conditioned.
        safety: Factor on the estimate.
        linear_solver: `linear_solver(rtol) -> LinearSolver` for J and Jᵀ; by default `gmres`, right for
            any invertible A. `lambda rtol: cg(max_steps=1000, rtol=rtol)` takes less memory where J
            is symmetric.
        gradient: An estimate that is not of the form ∇₂E + Bᵀv (`itd`); the error is then
            safety (‖gradient − g⁺‖ + remainder).

    Returns:
        A `Certificate`; a pytree, under `jit`, `vmap` and `lax.scan` as well.

    Raises:
        TypeError: An argument is not of its kind or shape; an option that there is not, or that could
            be meant for a parameter of `phi` or `outer`.
        ValueError: An unknown level; "proved" without `constants`; bad numbers.

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
    options = Options(level, constants, solve_rtol, safety, linear_solver)
    given = options._asdict() | {"gradient": gradient}
    data = check_kwargs(certify, {"phi": phi, "outer": outer}, 2 + len(args), kwargs, given)
    return certificate_of("certify", outer, phi, w, v, lam, args, data, gradient, options)


def check_options(where: str, o: Options) -> None:
    """Raises `TypeError` or `ValueError` unless the options are what `certify` asks for."""
    check_factory(where, o.linear_solver)
    check_number(where, "solve_rtol", o.solve_rtol, lambda x: 0 < x < 1, "a number in (0, 1)")
    check_number(where, "safety", o.safety, lambda x: x >= 1, "a number >= 1")
    if o.level not in get_args(Level):
        raise ValueError(f"`level` of `{where}` must be one of {get_args(Level)}, got {o.level!r}.")
    if (o.level == "proved") != isinstance(o.constants, Constants):
        raise ValueError(
            f'`{where}` needs `constants`, a `fixedgrad.bounds.Constants`, for level="proved" and for '
            f"that level only, got level={o.level!r}, constants={o.constants!r}. They must come from "
            "you: no finite number of products can bound the smallest singular value of I - J."
        )


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
    level, constants, solve_rtol, safety, linear_solver = options
    del level  # The constants say it.

    def made(outer: Outer, phi: Phi, linear_solver: Callable[[Scalar], LinearSolver]) -> Any:
        return functools.partial(_compute, where, outer, phi, linear_solver)

    compute = compiled_for((outer, phi, linear_solver), where, made)
    return compute(w, v, lam, args, kwargs, constants, gradient, solve_rtol, safety)


def _compute(
    where: str,
    outer: Outer,
    phi: Phi,
    linear_solver: Callable[[Scalar], LinearSolver],
    w: PyTree,
    v: PyTree | None,
    lam: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    constants: Constants | None,
    gradient: PyTree | None,
    solve_rtol: Scalar,
    safety: Scalar,
) -> Certificate:
    problem = stated(where, outer, phi, w, lam, args, kwargs)
    extra = jnp.int32(0)
    if v is None:
        v_x, extra = solve_v(problem, linear_solver(solve_rtol))
    else:
        v, w = jax.tree.map(jnp.asarray, (v, w))
        check_same(where, v, w, "`v`", "`w`")
        v_x = partition(v)[0]
    given = None
    if gradient is not None:
        given = partition(jax.tree.map(jnp.asarray, gradient))[0]
        check_same(where, given, problem.x, "`gradient`", "`lam` (its inexact leaves)")
    if constants is not None:
        return _proved(problem, v_x, constants, given)
    passes = refine(problem, problem.w, v_x, linear_solver, solve_rtol, _MAX_PASSES)
    return assess(problem, passes, given, safety, extra)


def assess(
    problem: Problem,
    s: RefinedEstimate,
    given: PyTree | None,
    safety: Scalar,
    extra_products: jax.Array | int = 0,
) -> Certificate:
    """The certificate of level "estimate" that follows from passes."""
    p = s.first
    gradient = p.gradient if given is None else given
    whole = norm(tree.sub(p.gradient, s.end))
    distance = norm(tree.sub(gradient, s.end))
    error = jnp.asarray(safety, whole.dtype) * (distance + s.rest) + p.rounding
    # A comparison with NaN is false, and may have ended a solve at once with a correction of 0.
    error = jnp.where(jnp.isfinite(p.r_w + p.r_v + norm(gradient)), error, jnp.nan)

    status = jnp.int32(CertificateStatus.VALID)
    for holds, otherwise in (
        (~s.missed, CertificateStatus.REMAINDER),
        (
            jnp.maximum(s.change - whole, s.rest) <= 0.5 * whole + p.rounding,
            CertificateStatus.REMAINDER,
        ),
        (s.reduction_v <= 0.5, CertificateStatus.KINK),
        (~s.repels, CertificateStatus.REPELLED),
        (s.reduction_w <= 0.5, CertificateStatus.FAR),
        (s.solved, CertificateStatus.SOLVE_FAILED),
        (jnp.isfinite(error), CertificateStatus.NON_FINITE),
    ):
        status = jnp.where(holds, status, jnp.int32(otherwise))
    valid = status == CertificateStatus.VALID
    # Where all of the difference may be rounding the correction is no better than what it corrects.
    better = valid & ((whole > p.rounding) if given is None else True)
    polished = tree.where(better, s.end, gradient)
    jt = s.products.jt + jnp.asarray(extra_products, jnp.int32)
    return Certificate(
        error=error,
        relative_error=_relative(error, polished),
        lower_part=norm(p.lower),
        linear_part=norm(p.linear),
        remainder=s.rest,
        gradient=problem.join_gradient(gradient),
        polished=problem.join_gradient(polished),
        residual_w=p.r_w,
        residual_v=p.r_v,
        products=s.products._replace(jt=jt),
        valid=valid,
        status=status,
        at_floor=p.r_w <= p.noise_w,
        level=jnp.int32(0),
    )


def _proved(problem: Problem, v: PyTree, c: Constants, given: PyTree | None) -> Certificate:
    """The certificate of level "proved"."""
    b = bound(problem, v, c, given)
    status = jnp.where(
        b.holds,
        jnp.int32(CertificateStatus.VALID),
        jnp.int32(CertificateStatus.CONSTANT_CONTRADICTED),
    )
    status = jnp.where(jnp.isfinite(b.error), status, jnp.int32(CertificateStatus.NON_FINITE))
    gradient = problem.join_gradient(b.gradient)
    return Certificate(
        error=b.error,
        relative_error=_relative(b.error, gradient),
        lower_part=b.lower,
        linear_part=b.linear,
        remainder=jnp.zeros_like(b.error),
        gradient=gradient,
        polished=gradient,
        residual_w=b.residual_w,
        residual_v=b.residual_v,
        products=b.products,
        valid=status == CertificateStatus.VALID,
        status=status,
        at_floor=b.at_floor,
        level=jnp.int32(1),
    )


def _relative(error: jax.Array, gradient: PyTree) -> jax.Array:
    size = norm(gradient)
    of_nothing = jnp.where(error > 0, jnp.inf, error)  # 0 of 0 is 0, and NaN stays NaN.
    return jnp.where(size == 0, of_nothing, error / jnp.where(size == 0, 1.0, size))
