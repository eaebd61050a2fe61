"""What a certificate says: `Certificate`, and `CertificateStatus` for where it says nothing."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import check_same
from ..leaves import partition
from ..printing import html, member, number, record, shapes_in, tally, values_of
from ..problem import Problem
from ..real_form import norm
from ..types import LinearSolver, Products, PyTree

tree = optax.tree


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
    """‖r_v‖ did not fall to half: J or ∇₁E jumps near w, as where the active set changes, or curves
    strongly."""
    REMAINDER = 5
    """The error left after the last correction may be half of the whole. Either the corrections do not
    contract, or the last one found an error that those before had missed."""
    CONSTANT_CONTRADICTED = 6
    """An observation violates one of the `Constants`."""
    REPELLED = 7
    """Steps of Φ lead away from the fixed point near w, and so to another one: gradient descent passes
    a saddle of its loss like this. The test needs a symmetric J and takes twenty products at most; it
    misses an eigenvalue of J above 1 by less than about a hundredth of ‖I − J‖. The status is no
    objection where Φ = w − F only stands for equations F = 0 that are no minimum."""


class Certificate(NamedTuple):
    """An answer to: how wrong is the hypergradient ĝ at (w, v)?

    Attributes:
        error: An estimate of ‖ĝ − ∇f‖, with the factor `safety`; from `certify_proved` an upper bound,
            given the constants.
        relative_error: `error` over the norm of the best gradient at hand.
        lower_part: The share of the error that comes from w ≠ w(λ) (a norm).
        linear_part: The share of the error that comes from (I − Jᵀ)v ≠ ∇₁E (a norm). A rough solve
            tells the two apart: below a third of the other a part means nothing.
        remainder: An estimate of ‖g⁺ − ∇f‖; 0 where `proved`.
        gradient: ĝ = ∇₂E + Bᵀv, or the gradient that was given.
        polished: g⁺, the corrected hypergradient; ĝ where `valid` is false or `proved` true.
        value: L(w, v) = E(w, λ) − ⟨v, w − Φ(w)⟩, which is f to second order in the errors of w and v.
        value_error: An estimate of how far `value` is from f, with the factor `safety` and rounding; an
            upper bound where `proved`.
        polished_value: The corrected value, in the place of `value` where `polished` is in that of ĝ.
        value_remainder: An estimate of how far `polished_value` is from f, made likewise.
        residual_w: ‖w − Φ(w)‖.
        residual_v: ‖∇₁E − (I − Jᵀ)v‖.
        products: The `Products` that it cost.
        valid: Whether `error` can be relied on.
        status: A `CertificateStatus`, int32.
        at_floor: Whether the residual of w is rounding, so that a correction brings nothing.
        rounding: The part of `error` that may be rounding. Two right answers may differ by so much.
        safety: The factor on the estimate; 1 where `proved`.
        proved: Whether `error` is an upper bound, given the constants.
    """

    error: jax.Array
    relative_error: jax.Array
    lower_part: jax.Array
    linear_part: jax.Array
    remainder: jax.Array
    gradient: PyTree
    polished: PyTree
    value: jax.Array
    value_error: jax.Array
    polished_value: jax.Array
    value_remainder: jax.Array
    residual_w: jax.Array
    residual_v: jax.Array
    products: Products
    valid: jax.Array
    status: jax.Array
    at_floor: jax.Array
    rounding: jax.Array
    safety: jax.Array
    proved: jax.Array

    def __repr__(self) -> str:
        known = values_of(self.relative_error, self.valid, self.status, self.proved)
        if known is None:
            return shapes_in(self)
        error, valid, status, proved = known
        unnamed = {True: "valid", False: "none yet"}
        names = [
            member(CertificateStatus, r) if r else unnamed[bool(v)]
            for r, v in zip(status.ravel(), valid.ravel(), strict=True)
        ]
        if status.ndim:
            return record(self, tally("certificate", names))
        sign = "<= " if proved else ""
        return record(self, f"relative error {sign}{number(error)}", names[0])

    def _repr_html_(self) -> str:
        return html(type(self).__name__, self._asdict(), status=CertificateStatus)


def relative(error: jax.Array, gradient: PyTree) -> jax.Array:
    """The error relative to the gradient's size; infinite where only that is 0."""
    size = norm(gradient).astype(error.dtype)
    of_nothing = jnp.where(error > 0, jnp.inf, error)  # 0 of 0 is 0, and NaN stays NaN.
    return jnp.where(size == 0, of_nothing, error / jnp.where(size == 0, 1.0, size))


def the_pair(
    where: str,
    problem: Problem,
    v: PyTree | None,
    gradient: PyTree | None,
    linear_solver: LinearSolver,
) -> tuple[PyTree, PyTree | None, jax.Array]:
    """The inexact leaves of v, which is computed where it is `None`, and of a gradient that was given.

    Returns:
        The two, and the products with Jᵀ that were spent.

    Raises:
        TypeError: v is not like w, or the gradient is not like λ.
    """
    given = None
    if gradient is not None:
        given = partition(jax.tree.map(jnp.asarray, gradient))[0]
        check_same(where, given, problem.x, "`gradient`", "`lam` (its inexact leaves)")
    if v is None:
        v, spent = _solve_v(problem, linear_solver)
        return v, given, spent
    v = jax.tree.map(jnp.asarray, v)
    check_same(where, v, problem.join_w(problem.w), "`v`", "`w`")
    return partition(v)[0], given, jnp.int32(0)


def _solve_v(problem: Problem, solver: LinearSolver) -> tuple[PyTree, jax.Array]:
    """V of (I − Jᵀ)v = ∇₁E at w, by two solves of `solver`, and the products spent."""
    at = problem.adjoint(problem.w)
    v, first = solver(at.jt, at.b)
    dv, second = solver(at.jt, problem.gradients(problem.w, v).r_v)
    return tree.add(v, dv), first.num_steps + second.num_steps + 3
