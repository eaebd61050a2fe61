"""What J is like at the fixed point: its norms, its extreme eigenvalues, symmetry, operations."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..certificate.newton import newton_krylov
from ..certificate.options import krylov
from ..problem import Problem
from ..real_form import norm, ratio, realified, resolution
from ..types import Products, PyTree

tree = optax.tree

_PROBES = 3
_POWER_STEPS = 100


class Spectrum(NamedTuple):
    """Of J: `Recommendation` names the fields; `smallest`, `largest` are of its symmetric part."""

    radius: float
    norm: float
    symmetric: bool
    definite: bool
    smallest: float
    largest: float
    condition: float
    flops_phi: float
    flops_product: float


class Solved(NamedTuple):
    """Of a lower-level solve: w, ‖Φ(w) − w‖, whether it failed, the products that it took."""

    w: PyTree
    residual: jax.Array
    failed: jax.Array
    products: jax.Array


def solve_lower(problem: Problem, rtol: float, max_products: int = 20_000) -> Solved:
    """By Newton–Krylov, to `rtol` ‖Φ(w)‖ or to the floor."""

    @jax.jit
    def solve(w: PyTree) -> Solved:
        spent = Products(*(jnp.int32(0) for _ in range(3)))
        image = problem.equation.phi(w, problem.x)
        tau = rtol * norm(image)

        w, _, _, spent = newton_krylov(problem, w, tau, spent, krylov, max_products)
        return judge_lower(problem, w, rtol)._replace(products=jnp.asarray(sum(spent)))

    return solve(problem.w)


def judge_lower(problem: Problem, w: PyTree, rtol: float) -> Solved:
    """Whether ‖Φ(w) − w‖ is at most `rtol` ‖Φ(w)‖, or at the floor; no products."""
    image = problem.equation.phi(w, problem.x)
    size = norm(tree.sub(w, image))
    floor = 64 * resolution(w) * norm(image)
    solved = jnp.isfinite(size) & (size <= jnp.maximum(rtol * norm(image), floor))
    return Solved(w, size, ~solved, jnp.int32(0))


def measure(problem: Problem, w: PyTree, key: jax.Array) -> Spectrum:
    """Spectral facts of J at w."""
    jvp = problem.equation.jvp(w, problem.x).j
    to_real, from_real = realified(w)

    def j(u: PyTree) -> PyTree:
        return to_real(jvp(from_real(u)))

    real = to_real(w)
    transpose = jax.linear_transpose(j, real)
    probes = [tree.random_like(k, real) for k in jax.random.split(key, 2 * _PROBES)]

    def power(operator: Callable[[PyTree], PyTree]) -> tuple[jax.Array, jax.Array]:
        """(growth per step over the last half, ⟨u, M u⟩) of power iteration."""

        def step(carry: tuple[PyTree, jax.Array], i: jax.Array):
            u, log = carry
            u = operator(u)
            size = norm(u)
            alive = size > 0
            u = tree.scale(jnp.where(alive, 1 / jnp.where(alive, size, 1.0), 0.0), u)
            growth = jnp.where(alive, jnp.log(jnp.where(alive, size, 1.0)), -jnp.inf)
            return (u, log + jnp.where(i >= _POWER_STEPS // 2, growth, 0.0)), None

        u = tree.scale(1 / norm(probes[0]), probes[0])
        start = u, jnp.zeros((), norm(u).dtype)
        (u, log), _ = lax.scan(step, start, jnp.arange(_POWER_STEPS))
        growth = jnp.exp(log / (_POWER_STEPS - _POWER_STEPS // 2))
        return growth, jnp.asarray(tree.vdot(u, operator(u)))

    @jax.jit
    def spectrum() -> tuple[jax.Array, ...]:
        radius, _ = power(j)
        squared, _ = power(lambda u: transpose(j(u))[0])
        big = jnp.sqrt(squared)
        skew = jnp.zeros_like(big)
        for a, b in zip(probes[:_PROBES], probes[_PROBES:], strict=True):
            left, right = (jnp.asarray(tree.vdot(*p)) for p in ((a, j(b)), (j(a), b)))
            # Of I − J: where J is next to nothing its asymmetry is too.
            scale = norm(a) * (norm(b) + norm(j(b))) + norm(j(a)) * norm(b)
            skew = jnp.maximum(skew, ratio(jnp.abs(left - right), scale))

        # Extreme eigenvalues of the symmetric part S, by power iteration on ‖J‖I ± S.
        def part(sign: float) -> Callable[[PyTree], PyTree]:
            def operator(u: PyTree) -> PyTree:
                s = tree.scale(0.5 * sign, tree.add(j(u), transpose(u)[0]))
                return tree.add_scale(s, big, u)

            return operator

        return radius, big, skew, power(part(1.0))[1] - big, big - power(part(-1.0))[1]

    radius, big, skew, largest, smallest = map(float, spectrum())
    symmetric = skew <= 100 * resolution(w) ** 0.75
    definite = largest < 1
    condition = (1 - smallest) / (1 - largest) if symmetric and definite else math.nan

    def flops(function: Callable[..., PyTree], *operands: PyTree) -> float:
        analysis = jax.jit(function).lower(*operands).compile().cost_analysis()
        return float((analysis or {}).get("flops", math.nan))

    return Spectrum(
        radius,
        big,
        symmetric,
        definite,
        smallest,
        largest,
        condition,
        flops(problem.equation.phi, w, problem.x),
        flops(lambda u: transpose(u)[0], real),
    )
