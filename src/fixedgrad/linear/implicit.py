"""One differentiable solve of (I − M) x = b, whose info gets out: `implicit_solve`.

From (I − M) x = b follows (I − M) ẋ = ḃ + Ṁ x: the same matrix again, whatever solved the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax

from ..errors import check_same, show
from ..failure import STAGE, Policy, enforce
from ..leaves import closes_over_tracers, closure_converted, within_shard_map, zero_tangent
from ..mapped_axes import casts, hoisted, varying_axes
from ..types import Jacobian, LinearSolver, MatVec, PyTree, SolveInfo, jacobian


def implicit_solve(
    policy: Policy,
    linear_solver: LinearSolver,
    matvec: MatVec,
    b: PyTree,
    x0: PyTree | None = None,
) -> tuple[PyTree, SolveInfo]:
    """(x, info) of a linear solver, with the derivative rule of the system.

    The rule is traced where somebody differentiates, and not before: a first derivative holds one copy
    of the solver. `x0` is the start of this solve alone; solves for derivatives of x start at zero, and
    obey the policy, which for x itself is left to the caller.
    """
    at, consts = hoisted(matvec, b)
    # Products with I − M give −Ṁ x.
    add = optax.tree.sub if jacobian(matvec).complement else optax.tree.add

    def compute(consts: list[Any], b: PyTree, x0: PyTree | None) -> tuple[PyTree, SolveInfo]:
        return run_linear_solver(linear_solver, at(consts), b, *(() if x0 is None else (x0,)))

    def tangent(consts: list[Any], right: PyTree) -> PyTree:
        return linear_solve(policy, linear_solver, at(consts), right)

    held: tuple[list[Any], list[Any]] = [], []
    if closes_over_tracers(linear_solver):  # The rule may run after their trace has ended.
        converted = closure_converted(compute, consts, b, x0), closure_converted(tangent, consts, b)
        compute, tangent = (c.function for c in converted)
        held = converted[0].values, converted[1].values

    @jax.custom_jvp
    def solved(consts: Any, b: PyTree, x0: PyTree | None, held: Any) -> tuple[PyTree, SolveInfo]:
        return compute(consts, b, x0, *held[0])

    @solved.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (consts, _, _, held), (consts_dot, b_dot, *_) = primals, tangents
        x, info = solved(*primals)
        _, change = jax.jvp(lambda consts: at(consts).known(x), (consts,), (consts_dot,))
        x_dot = tangent(consts, add(b_dot, change), *held[1])
        return (x, info), (x_dot, zero_tangent(info))

    return solved(consts, b, x0, held)


def linear_solve(policy: Policy, linear_solver: LinearSolver, matvec: MatVec, b: PyTree) -> PyTree:
    """X as a linear function of b, which JAX can transpose: to the same solver on I − Mᵀ.

    The policy is applied within each of these solves: outside, its factor would depend on the tangent,
    and JAX could not transpose the tangent map any more.
    """

    def solve_with(m: Jacobian) -> MatVec:
        def solve(rhs: PyTree) -> PyTree:
            # M, not the I − M that `custom_linear_solve` offers: x − (x − M x) would lose digits.
            x, info = run_linear_solver(linear_solver, m, rhs)
            return enforce(policy, STAGE, info, x)

        return solve

    def transpose(m: Jacobian) -> Jacobian:
        other = m.replaced(lambda u: jax.linear_transpose(m.known, b)(u)[0])
        return other._replace(transposed=not m.transposed)

    m = jacobian(matvec)
    if not within_shard_map():
        return lax.custom_linear_solve(
            m.a,
            b,
            lambda _, rhs: solve_with(m)(rhs),
            lambda _, rhs: solve_with(transpose(m))(rhs),
        )

    # With sharded data and replicated w, the products vary over devices inside and end in a sum over
    # them. `custom_linear_solve` knows one type only: if anything varies, everything does. So all
    # that enters or leaves it wears that type, and is taken back to its own inside, where the
    # products are: one collective a solve for each array, none more a product.
    at, consts = hoisted(m, b)
    axes = varying_axes((consts, b))
    of_consts, of_b = casts(consts, axes), casts(b, axes)
    consts = of_consts.varying(consts)

    def inside(rule: Callable[[Jacobian], MatVec]) -> MatVec:
        def wrapped(u: PyTree) -> PyTree:
            return of_b.varying(rule(at(of_consts.own(consts)))(of_b.own(u)))

        return wrapped

    x = lax.custom_linear_solve(
        inside(lambda m: m.a),
        of_b.varying(b),
        lambda _, rhs: inside(solve_with)(rhs),
        lambda _, rhs: inside(lambda m: solve_with(transpose(m)))(rhs),
    )
    return of_b.own(x)


def run_linear_solver(
    linear_solver: LinearSolver, matvec: MatVec, b: PyTree, *x0: PyTree
) -> tuple[PyTree, SolveInfo]:
    """(x, info) of any linear solver.

    Raises:
        TypeError: It did not return a pair, x is not like b, or info is not a `SolveInfo`.
    """
    out = linear_solver(matvec, b, *x0)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], SolveInfo)):
        raise TypeError(
            "`linear_solver` of `aid` must return a pair `(x, info)` with info a `SolveInfo`, got "
            f"{show(out)}. It solves (I - M) x = b from products with M: the solvers of `jax.scipy` "
            "do something else, those of lineax go through `from_lineax`."
        )
    check_same("aid", out[0], b, "`x`, of the linear solver's `(x, info)`", "`b`")
    return out
