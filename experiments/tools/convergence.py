"""Error of the five methods' hypergradients at many t, in one compilation for each method.

`fixedgrad`'s estimators do all the work; what is done here is to read them at t = 0, s, 2s, ..., ms
(s is the `stride`) without compiling or running each t by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import fixedgrad as fg

PyTree = Any


class Problem(NamedTuple):
    """A bilevel problem with the maps that solve its lower level.

    Attributes:
        outer: `outer(w, lam) -> scalar`, w the state of `phi`.
        phi: The map that the lower-level solver iterates; ITD and FP differentiate it.
        w0: Where the solver starts, a state of `phi`.
        outer_cg: `outer` for a state of `phi_cg`.
        phi_cg: A map with the same fixed point and a symmetric Jacobian, as CG needs it.
        to_cg: From a state of `phi` to a state of `phi_cg`.
    """

    outer: fg.Outer
    phi: fg.Phi
    w0: PyTree
    outer_cg: fg.Outer
    phi_cg: fg.Phi
    to_cg: Callable[[PyTree], PyTree]


class Grid(NamedTuple):
    """The numbers of iterations t = 0, stride, 2 stride, ..., points · stride."""

    stride: int
    points: int

    @property
    def t(self) -> list[int]:
        """All of them."""
        return [self.stride * i for i in range(self.points + 1)]


def iterates(problem: Problem, lam: PyTree, grid: Grid) -> PyTree:
    """w_t at every t of the grid, along a new first axis."""
    solver = fg.picard(problem.phi, num_steps=grid.stride)

    def advance(w: PyTree, _: None) -> tuple[PyTree, PyTree]:
        w = solver(w, lam)
        return w, w

    return _after(problem.w0, lax.scan(advance, problem.w0, length=grid.points)[1])


def hypergradients(
    method: str, problem: Problem, lam: PyTree, w: PyTree, grid: Grid, k: int = 10
) -> PyTree:
    """The hypergradients of one of the five methods at every t of the grid, along a new first axis.

    Args:
        method: A key of `report.METHODS`.
        problem: The bilevel problem.
        lam: λ.
        w: The result of `iterates`.
        grid: The values of t.
        k: The k of the methods with a fixed number of linear steps.
    """
    direct = jax.grad(problem.outer, argnums=1)(problem.w0, lam)  # ∇₂E, all there is at t = k = 0.
    iterated = jax.tree.map(lambda x: x[1:], w)
    match method:
        case "itd":
            return _after(direct, _itd(problem, lam, grid))
        case "fp_t":
            return _after(direct, _fp_t(problem, lam, iterated, grid))
        case "cg_t":
            return _after(direct, _cg_t(problem, lam, problem.to_cg(iterated), grid))
        case "fp_10":
            fp = fg.aid(fg.fp(num_steps=k))
            return jax.vmap(lambda w: _aid(problem.outer, problem.phi, fp, w, lam))(w)
        case "cg_10":
            cg, outer, phi = fg.aid(fg.cg(num_steps=k)), problem.outer_cg, problem.phi_cg
            return jax.vmap(lambda w: _aid(outer, phi, cg, w, lam))(problem.to_cg(w))
    raise ValueError(f"`method` must be a key of `report.METHODS`, got {method!r}.")


def errors(gradients: PyTree, exact: PyTree) -> jax.Array:
    """‖g(λ) − ∇f(λ)‖ for hypergradients along a first axis."""
    return jax.vmap(lambda g: optax.tree.norm(optax.tree.sub(g, exact)))(gradients)


def _itd(problem: Problem, lam: PyTree, grid: Grid) -> PyTree:
    """∇f_t by reverse mode through the iterations.

    `itd` gives the derivative with respect to the starting point too, so m solvers of s steps, one
    after the other, are one of m·s steps; the rows of the Jacobian of (f_s, f_2s, ...) are ∇f_t.
    """
    solve = fg.fixed_point(problem.phi, fg.itd())(fg.picard(problem.phi, num_steps=grid.stride))

    def objectives(lam: PyTree) -> jax.Array:
        def advance(w: PyTree, _: None) -> tuple[PyTree, jax.Array]:
            w = solve(w, lam)
            return w, problem.outer(w, lam)

        return lax.scan(advance, problem.w0, length=grid.points)[1]

    return jax.jacrev(objectives)(lam)


def _fp_t(problem: Problem, lam: PyTree, w: PyTree, grid: Grid) -> PyTree:
    """FP with k = t: at w_t, t/s updates of s steps each, every one warm-started at the last v.

    A fixed-point method has no memory but its last iterate, so that this is one solve of t steps.
    """
    hypergrad = fg.hypergradient(
        problem.outer,
        problem.phi,
        _given,
        fg.aid(fg.fp(num_steps=grid.stride)),
        start=fg.warm(),
        on_failure="ignore",
    )

    def at(point: tuple[PyTree, jax.Array]) -> PyTree:
        w, updates = point
        carry = jax.tree.map(jnp.zeros_like, lam), hypergrad.init(w, lam)
        return lax.fori_loop(0, updates, lambda _, c: hypergrad.update(c[1], lam), carry)[0]

    return lax.map(at, (w, jnp.arange(1, grid.points + 1)))


def _cg_t(problem: Problem, lam: PyTree, states: PyTree, grid: Grid) -> PyTree:
    """CG with k = t.

    CG remembers all its directions and takes a static number of steps, so each t is compiled by
    itself: the linear solve alone, whose result a "linear solver" hands to `aid` for all t at once.
    """
    outer, phi = problem.outer_cg, problem.phi_cg

    def system(w: PyTree) -> tuple[Callable[[PyTree], PyTree], PyTree]:
        _, phi_vjp = jax.vjp(lambda u: phi(u, lam), w)
        return lambda u: phi_vjp(u)[0], jax.grad(outer)(w, lam)

    rows = [
        fg.cg(num_steps=t)(*system(jax.tree.map(lambda x, i=i: x[i], states)))
        for i, t in enumerate(grid.t[1:])
    ]
    solutions = jax.tree.map(lambda *x: jnp.stack(x), *rows)

    def at(w: PyTree, solution: tuple[PyTree, fg.SolveInfo]) -> PyTree:
        v, info = solution

        def solved(matvec: Any, b: PyTree, x0: PyTree = None) -> tuple[PyTree, fg.SolveInfo]:
            del matvec, x0
            return jax.tree.unflatten(jax.tree.structure(b), jax.tree.leaves(v)), info

        return _aid(outer, phi, fg.aid(solved), w, lam)

    return jax.vmap(at)(states, solutions)


def _aid(outer: fg.Outer, phi: fg.Phi, estimator: fg.Estimator, w: PyTree, lam: PyTree) -> PyTree:
    """The hypergradient of AID at a given w."""
    hypergrad = fg.hypergradient(outer, phi, _given, estimator, on_failure="ignore")
    return hypergrad.update(hypergrad.init(w, lam), lam)[0]


def _after(first: PyTree, rows: PyTree) -> PyTree:
    """Rows along the first axis, with one more before them."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rows)


def _given(w0: PyTree, lam: PyTree) -> PyTree:
    """The lower-level solver that has already run: its result is its starting point."""
    del lam
    return w0
