"""The Lagrangian of the bilevel problem on inexact leaves alone, its gradients, and what they cost.

L(w, λ, v) = E(w, λ) + ⟨v, Φ(w, λ) − w⟩,    ∇_w L = r_v = ∇₁E − (I − Jᵀ)v,    ∇_λ L = ĝ = ∇₂E + Bᵀv.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..estimators import check_linear_solver
from ..linear import gmres
from ..packing import check_phi, eval_shape, fresh, partition, settled_lam, split_lam, started
from ..printing import by_name
from ..realify import Space
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar, check_callable, check_scalar, show

tree = optax.tree


class Products(NamedTuple):
    """What was spent: evaluations of Φ, products with J, products with Jᵀ; int32."""

    phi: jax.Array
    j: jax.Array
    jt: jax.Array


class Packed(NamedTuple):
    """Φ and E on the inexact leaves (w, x) alone, and how to get the pytrees back."""

    phi: Callable[[PyTree, PyTree], PyTree]
    outer: Callable[[PyTree, PyTree], jax.Array]
    w: PyTree
    x: PyTree
    join_w: Callable[[PyTree], PyTree]
    join_gradient: Callable[[PyTree], PyTree]


def pack(
    where: str, outer: Outer, phi: Phi, w: PyTree, lam: PyTree, args: PyTree, kwargs: PyTree
) -> Packed:
    """Φ and E as functions of inexact leaves, checked."""
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    phi = fresh(phi)
    w = started(where, phi, w, (lam, *args), kwargs)
    lam = settled_lam(lam, w)
    x, join_lam, join_gradient = split_lam(where, lam)
    check_phi(where, phi, w, "`w`", (lam, *args), kwargs)
    check_scalar(where, eval_shape(outer, w, lam, *args, **kwargs))
    w_x, w_rest, join_w = partition(w)

    def packed_phi(w_x: PyTree, x: PyTree) -> PyTree:
        with jax.default_matmul_precision("highest"):
            image = phi(join_w(w_x, w_rest), join_lam(x), *args, **kwargs)
        return partition(image)[0]

    spread = Space.of_map(lambda w_x: packed_phi(w_x, x), w_x).together
    if spread:
        raise TypeError(
            f"`{where}` knows one w, but a collective of `phi` over {', '.join(map(repr, spread))} "
            "couples it to those of other devices or elements; call it outside of the `shard_map` or "
            "`vmap`, on all of w."
        )

    def packed_outer(w_x: PyTree, x: PyTree) -> jax.Array:
        return outer(join_w(w_x, w_rest), join_lam(x), *args, **kwargs)

    return Packed(
        packed_phi,
        packed_outer,
        w_x,
        x,
        lambda w_x: join_w(w_x, w_rest),
        join_gradient,
    )


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


def lagrangian(packed: Packed, w: PyTree, v: PyTree) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """(Φ(w), r_v, ĝ, ∇₁E) at (w, v): ∇_w L = r_v = ∇₁E − v + Jᵀv and ∇_λ L = ĝ = ∇₂E + Bᵀv."""
    b, direct = jax.grad(packed.outer, argnums=(0, 1))(w, packed.x)
    image, vjp = jax.vjp(packed.phi, w, packed.x)
    jt_v, bt_v = vjp(v)
    return image, tree.add(tree.sub(b, v), jt_v), tree.add(direct, bt_v), b


def solve_v(packed: Packed, solver: LinearSolver) -> tuple[PyTree, jax.Array]:
    """V of (I − Jᵀ)v = ∇₁E at w, by two solves of `solver`, and the products spent."""
    b = jax.grad(packed.outer)(packed.w, packed.x)
    _, vjp = jax.vjp(packed.phi, packed.w, packed.x)

    def product(u: PyTree) -> PyTree:
        return vjp(u)[0]

    v, first = solver(product, b)
    rest = tree.sub(b, tree.sub(v, product(v)))
    dv, second = solver(product, rest)
    return tree.add(v, dv), first.num_steps + second.num_steps + 3


def ratio(part: Any, whole: jax.Array) -> jax.Array:
    """Part / whole; 0 where there is nothing of either, 1 where only the whole is missing."""
    safe = jnp.where(whole > 0, whole, 1.0)
    return jnp.where(whole > 0, part / safe, jnp.where(jnp.asarray(part) > 0, 1.0, 0.0))
