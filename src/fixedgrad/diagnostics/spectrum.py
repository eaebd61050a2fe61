"""What J is like at the fixed point: its norms, its extreme eigenvalues, symmetry."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..certificate.options import krylov
from ..linear.assisted import Plain
from ..lower.newton import solve_for_w
from ..problem import Problem
from ..real_form import COMPUTATION, norm, of_symmetry, ratio, realified, resolution
from ..types import PyTree, Scalar

tree = optax.tree

_PROBES = 3
_POWER_STEPS = 100


class Solved(NamedTuple):
    """The result of a lower-level solve: w, ‖Φ(w) − w‖, whether it failed, the products it took."""

    w: PyTree
    residual: jax.Array
    failed: jax.Array
    products: jax.Array


def solve_lower(problem: Problem, rtol: Scalar, max_products: int | jax.Array = 20_000) -> Solved:
    """The fixed point by Newton–Krylov: w to a hundredth of `rtol`, as estimated, or to the floor."""
    rtol = _as_norm(problem, rtol)
    zero = jnp.zeros_like(rtol)
    done = solve_for_w(problem, problem.w, zero, Plain(krylov), (), max_products, 0.01 * rtol)
    judged = judge_lower(problem._replace(w=done.w), rtol)
    return judged._replace(products=jnp.asarray(sum(done.spent)))


def judge_lower(problem: Problem, rtol: Scalar) -> Solved:
    """Whether ‖Φ(w) − w‖ is at most `rtol` ‖Φ(w)‖, or at the floor; no products."""
    rtol = _as_norm(problem, rtol)
    image = problem.equation.phi(problem.w, problem.x)
    size = problem.norm(tree.sub(problem.w, image))
    floor = COMPUTATION * resolution(problem.w) * problem.norm(image)
    solved = jnp.isfinite(size) & (size <= jnp.maximum(rtol * problem.norm(image), floor))
    return Solved(problem.join_w(problem.w), size, ~solved, jnp.int32(0))


def _as_norm(problem: Problem, number: Scalar) -> jax.Array:
    return jnp.asarray(number, problem.norm(problem.w).dtype)


class Spectrum(NamedTuple):
    """Norms and extreme eigenvalues of J at w.

    Attributes:
        radius: ρ(J).
        norm: ‖J‖.
        skew: How far J is from symmetric, relative to I − J.
        smallest: The smallest eigenvalue of the symmetric part of J.
        largest: The largest one.
        eps: The resolution of its products.
        size: Real unknowns.
    """

    radius: float
    norm: float
    skew: float
    smallest: float
    largest: float
    eps: float
    size: int

    @property
    def symmetric(self) -> bool:
        """Whether J is symmetric to the precision of the probes."""
        return self.skew <= of_symmetry(self.eps)

    @property
    def definite(self) -> bool:
        """Whether the symmetric part of I − J is positive definite."""
        return self.largest < 1

    @property
    def condition(self) -> float:
        """Of I − J where it is symmetric and definite, else NaN."""
        known = self.symmetric and self.definite
        return (1 - self.smallest) / (1 - self.largest) if known else math.nan


def measure(problem: Problem, key: jax.Array) -> Spectrum:
    """The spectrum of J at w, by power iteration and random probes; to be read outside `jit`."""
    w = problem.w
    jvp = problem.equation.jvp(w, problem.x).j
    to_real, from_real = realified(w)

    def j(u: PyTree) -> PyTree:
        return to_real(jvp(from_real(u)))

    real = to_real(w)
    transpose = jax.linear_transpose(j, real)
    probes = [tree.random_like(k, real) for k in jax.random.split(key, 2 * _PROBES)]

    def power(operator: Callable[[PyTree], PyTree]) -> tuple[jax.Array, PyTree]:
        """(growth per step over the last half, the vector) of power iteration, twice at a time."""

        def step(carry: tuple[PyTree, jax.Array], i: jax.Array):
            u, log = carry
            u = operator(u)
            size = jax.vmap(norm)(u)
            alive = size > 0
            scale = jnp.where(alive, 1 / jnp.where(alive, size, 1.0), 0.0)
            u = jax.vmap(tree.scale)(scale, u)
            growth = jnp.where(alive, jnp.log(jnp.where(alive, size, 1.0)), -jnp.inf)
            return (u, log + jnp.where(i >= _POWER_STEPS // 2, growth, 0.0)), None

        u = tree.scale(1 / norm(probes[0]), probes[0])
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), u)
        start = twice, jnp.zeros(2, norm(u).dtype)
        (u, log), _ = lax.scan(step, start, jnp.arange(_POWER_STEPS))
        return jnp.exp(log / (_POWER_STEPS - _POWER_STEPS // 2)), u

    def pair(u: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[i], u)

    def stacked(*u: PyTree) -> PyTree:
        return jax.tree.map(lambda *x: jnp.stack(x), *u)

    # J and JᵀJ.
    (radius, squared), _ = power(lambda u: stacked(j(pair(u, 0)), transpose(j(pair(u, 1)))[0]))
    big = jnp.sqrt(squared)

    # Extreme eigenvalues of the symmetric part S, by power iteration on ‖J‖I ± S.
    signs = jnp.asarray([0.5, -0.5], big.dtype)

    def parts(u: PyTree) -> PyTree:
        def one(row: tuple[PyTree, jax.Array]) -> PyTree:
            u, sign = row
            return tree.add_scale(tree.scale(sign, tree.add(j(u), transpose(u)[0])), big, u)

        return lax.map(one, (u, signs))

    _, u = power(parts)
    above, below = jnp.asarray(jax.vmap(tree.vdot)(u, parts(u)))

    def probe(skew: jax.Array, pair: tuple[PyTree, PyTree]) -> tuple[jax.Array, None]:
        a, b = pair
        left, right = (jnp.asarray(tree.vdot(*p)) for p in ((a, j(b)), (j(a), b)))
        # Of I − J: where J is next to nothing its asymmetry is too.
        scale = norm(a) * (norm(b) + norm(j(b))) + norm(j(a)) * norm(b)
        return jnp.maximum(skew, ratio(jnp.abs(left - right), scale)), None

    pairs = stacked(*probes[:_PROBES]), stacked(*probes[_PROBES:])
    skew, _ = lax.scan(probe, jnp.zeros_like(big), pairs)
    size = int(tree.size(real))
    return Spectrum(radius, big, skew, big - below, above - big, resolution(w), size)  # pyright: ignore
