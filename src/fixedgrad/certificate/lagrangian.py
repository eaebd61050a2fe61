"""What certificates are made of: the problem, the default linear solver, what was spent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import check_callable, show
from ..estimators import check_linear_solver
from ..leaves import settled_lam, started
from ..linear import gmres
from ..printing import by_name
from ..problem import Problem
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar

tree = optax.tree


class Products(NamedTuple):
    """What was spent: evaluations of Φ, products with J, products with Jᵀ; int32."""

    phi: jax.Array
    j: jax.Array
    jt: jax.Array


def stated(
    where: str, outer: Outer, phi: Phi, w: PyTree, lam: PyTree, args: PyTree, kwargs: PyTree
) -> Problem:
    """The problem at w, checked; numbers in w and λ become arrays.

    Raises:
        TypeError: As `Problem.of`; or w is a part of a system that collectives of Φ spread.
    """
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    w = started(where, phi, w, (lam, *args), kwargs)
    problem = Problem.of(where, outer, phi, w, settled_lam(lam, w), args, kwargs)
    spread = problem.equation.space(problem.w).together
    if spread:
        raise TypeError(
            f"`{where}` knows one w, but a collective of `phi` over {', '.join(map(repr, spread))} "
            "couples it to those of other devices or elements; call it outside of the `shard_map` or "
            "`vmap`, on all of w."
        )
    return problem


@by_name
def krylov(rtol: Scalar) -> LinearSolver:
    """What solves with A and Aᵀ where the caller has no wish: right for any invertible A."""
    return gmres(max_steps=1000, rtol=rtol, restart=50)


def check_factory(where: str, linear_solver: object) -> None:
    """Raises `TypeError` unless `linear_solver` makes a linear solver of a tolerance."""
    name, signature = "linear_solver", "linear_solver(rtol) -> LinearSolver"
    check_callable(where, name, linear_solver, signature)
    try:
        check_linear_solver(where, linear_solver(0.1))  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        raise TypeError(
            f"`{name}` of `{where}` must be a function `{signature}`, got {show(linear_solver)}, of "
            f"which {name}(0.1) is not one: {error} Write `lambda rtol: cg(max_steps=1000, rtol=rtol)`."
        ) from None


def solve_v(problem: Problem, solver: LinearSolver) -> tuple[PyTree, jax.Array]:
    """V of (I − Jᵀ)v = ∇₁E at w, by two solves of `solver`, and the products spent."""
    at = problem.adjoint(problem.w)
    v, first = solver(at.jt, at.b)
    dv, second = solver(at.jt, problem.gradients(problem.w, v).r_v)
    return tree.add(v, dv), first.num_steps + second.num_steps + 3


def ratio(part: Any, whole: jax.Array) -> jax.Array:
    """Part / whole; 0 where there is nothing of either, 1 where only the whole is missing."""
    safe = jnp.where(whole > 0, whole, 1.0)
    return jnp.where(whole > 0, part / safe, jnp.where(jnp.asarray(part) > 0, 1.0, 0.0))
