"""`jaxopt.implicit_diff`: `custom_root`, `custom_fixed_point`, `root_vjp`, `root_jvp`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from ..decorator import fixed_point, root
from ..errors import check_callable
from ..estimators import aid
from ..leaves import strongly_typed
from ..types import MatVec, OnFailure, PyTree, Solver
from .linear_solve import from_solve, solve_normal_cg, solved

tree = optax.tree

Solve = Callable[[MatVec, PyTree], PyTree]


def custom_root(
    optimality_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve = solve_normal_cg,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    on_failure: OnFailure = "nan",
) -> Callable[[Solver], Callable[..., PyTree]]:
    """A decorator for solvers of F(w, λ) = 0: `fixedgrad.root` with jaxopt's signature.

    Arguments of a call that go by keyword are put where the solver's signature has them, its defaults
    among them, and then go to F by position: F need not name them alike.

    Cost, memory and what is assumed are those of `fixedgrad.root` with `aid`.
    When not to use it: in new code. `root` has forward mode and tells how its solves ended.

    Args:
        optimality_fun: F, `optimality_fun(params, *args)`.
        has_aux: The solver returns (w, aux), a tuple or a named one, which the decorated one returns
            too.
        solve: `solve(matvec, b) -> x`, for A x = b from products with A, such as
            `linear_solve.solve_cg`, a `functools.partial` of it, or a function of yours.
        reference_signature: A signature, or a function that has it, by which F's arguments are named
            where F has `*args` or `**kwargs`.
        on_failure: As in `fixedgrad.root`; jaxopt's behaviour is "ignore".

    Returns:
        A decorator of solvers `solver(init_params, *args, **kwargs)`.

    Raises:
        TypeError: As in `fixedgrad.root`; `solve` is not callable; a call does not fit the solver's
            signature.
        ValueError: As in `fixedgrad.root`.

    >>> import jax, jax.numpy as jnp
    >>> @custom_root(jax.grad(lambda w, lam: jnp.sum((w - 1) ** 2) + lam * jnp.sum(w**2)))
    ... def ridge(init_params, lam):
    ...     return jnp.full(2, 1 / (1 + lam))
    >>> bool(jnp.allclose(jax.jacrev(ridge, argnums=1)(None, 1.0), -0.25))
    True

    References:
        Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022.
    """
    check_callable("custom_root", "optimality_fun", optimality_fun, "optimality_fun(params, *args)")
    named = _by_reference(optimality_fun, reference_signature)
    estimator = aid(from_solve("custom_root", solve))
    return _decorator(root(named, estimator, has_aux=has_aux, on_failure=on_failure), has_aux)


def custom_fixed_point(
    fixed_point_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve = solve_normal_cg,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    on_failure: OnFailure = "nan",
) -> Callable[[Solver], Callable[..., PyTree]]:
    """A decorator for solvers of w = Φ(w, λ): `fixedgrad.fixed_point` with jaxopt's signature.

    `solve` gets products with A = I − J, or its transpose; in jaxopt they are those of J − I.

    Cost, memory and what is assumed are those of `fixedgrad.fixed_point` with `aid`.
    When not to use it: in new code. `fixed_point` has forward mode and tells how its solves ended.

    Args:
        fixed_point_fun: Φ, `fixed_point_fun(params, *args)`.
        has_aux: As in `custom_root`.
        solve: As in `custom_root`.
        reference_signature: As in `custom_root`.
        on_failure: As in `custom_root`.

    Returns:
        A decorator of solvers `solver(init_params, *args, **kwargs)`.

    Raises:
        TypeError: As in `custom_root`.
        ValueError: As in `custom_root`.

    >>> import jax
    >>> solver = custom_fixed_point(lambda w, lam: 0.5 * w + lam)(lambda init_params, lam: 2.0 * lam)
    >>> round(float(jax.grad(solver, argnums=1)(None, 1.0)), 6)
    2.0
    """
    where = "custom_fixed_point"
    check_callable(where, "fixed_point_fun", fixed_point_fun, "fixed_point_fun(params, *args)")
    named = _by_reference(fixed_point_fun, reference_signature)
    estimator = aid(from_solve(where, solve))
    return _decorator(
        fixed_point(named, estimator, has_aux=has_aux, on_failure=on_failure), has_aux
    )


def root_vjp(
    optimality_fun: Callable[..., PyTree],
    sol: PyTree,
    args: tuple[PyTree, ...],
    cotangent: PyTree,
    solve: Solve = solve_normal_cg,
) -> tuple[PyTree, ...]:
    """w'(λ)ᵀ w̄ at a root of F(w, λ): −(∂₂F)ᵀ (∂₁F)⁻ᵀ w̄.

    Cost: one linearisation of F, one linear solve. Memory: that of the solve.

    Args:
        optimality_fun: F, `optimality_fun(sol, *args)`.
        sol: w, where F is zero.
        args: λ.
        cotangent: w̄, like `sol`.
        solve: As in `custom_root`.

    Returns:
        The cotangents of `args`; NaN where the solve failed.

    >>> root_vjp(lambda w, lam: w**2 - lam, 3.0, (9.0,), 1.0)
    (Array(0.16666667, dtype=float64),)
    """
    sol, args, cotangent = strongly_typed((sol, args, cotangent))
    _, pull = jax.vjp(optimality_fun, sol, *args)
    linear_solver = from_solve("root_vjp", solve)
    u = solved(linear_solver, lambda u: pull(u)[0], cotangent, transposed=True)
    return pull(tree.scale(-1, u))[1:]


def root_jvp(
    optimality_fun: Callable[..., PyTree],
    sol: PyTree,
    args: tuple[PyTree, ...],
    tangents: tuple[PyTree, ...],
    solve: Solve = solve_normal_cg,
) -> PyTree:
    """w'(λ) λ̇ at a root of F(w, λ): −(∂₁F)⁻¹ ∂₂F λ̇.

    Cost: one linearisation of F, one linear solve. Memory: that of the solve.

    Args:
        optimality_fun: F, `optimality_fun(sol, *args)`.
        sol: w, where F is zero.
        args: λ.
        tangents: λ̇, one for each of `args`.
        solve: As in `custom_root`.

    Returns:
        The tangent of w, like `sol`; NaN where the solve failed.

    Raises:
        ValueError: `tangents` are not as many as `args`.

    >>> root_jvp(lambda w, lam: w**2 - lam, 3.0, (9.0,), (1.0,))
    Array(0.16666667, dtype=float64)
    """
    if len(args) != len(tangents):
        raise ValueError(
            f"`tangents` of `root_jvp` must be as many as `args`, got {len(tangents)} for {len(args)}; "
            "give a zero where an argument does not move."
        )
    sol, args, tangents = strongly_typed((sol, args, tangents))
    _, change = jax.jvp(lambda *args: optimality_fun(sol, *args), args, tangents)
    _, push = jax.linearize(lambda w: optimality_fun(w, *args), sol)
    return solved(from_solve("root_jvp", solve), push, tree.scale(-1, change))


def _by_reference(
    function: Callable[..., PyTree],
    reference: Callable[..., Any] | inspect.Signature | None,
) -> Callable[..., PyTree]:
    """The function with the arguments in the places that the reference names."""
    if reference is None:
        return function
    if not isinstance(reference, inspect.Signature):
        # jaxopt's linear functions are named by what they wrap.
        reference = inspect.signature(getattr(reference, "subfun", reference))
    signature = reference

    def named(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        bound = signature.bind(w, *args, **kwargs)
        return function(*bound.args, **bound.kwargs)

    return named


def _decorator(
    decorate: Callable[[Solver], Callable[..., PyTree]], has_aux: bool
) -> Callable[[Solver], Callable[..., PyTree]]:
    def decorator(solver: Solver) -> Callable[..., PyTree]:
        signature = inspect.signature(solver)
        kinds: list[Callable[..., PyTree]] = []

        @functools.wraps(solver)
        def positional(init_params: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
            out = solver(init_params, *args, **kwargs)
            if has_aux and hasattr(out, "_fields"):  # Such as jaxopt's `OptStep`.
                kinds[:] = [type(out)._make]
                return tuple(out)
            return out

        decorated = decorate(positional)

        @functools.wraps(solver)
        def wrapped(*args: PyTree, **kwargs: PyTree) -> PyTree:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            out = decorated(*bound.args, **bound.kwargs)
            return kinds[0](out) if kinds else out

        return wrapped

    return decorator
