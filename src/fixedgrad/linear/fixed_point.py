"""The fixed-point method for (I − M) x = b: `fp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..printing import printed
from ..types import LinearSolver, PyTree, Scalar, SolveInfo, stopping
from .frame import System, linear_solver, tree


@printed
def fp(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
) -> LinearSolver:
    """The fixed-point method: x₀ = 0, xᵢ₊₁ = M xᵢ + b.

    After k steps xₖ = Σᵢ₍ᵢ<ₖ₎ Mⁱ b, the truncated Neumann series, and ‖xₖ − x‖ ≤ qᵏ ‖x‖ where
    ‖M‖ ≤ q < 1. On an affine Φ, k steps give exactly what differentiating k iterations gives.

    Cost: one product a step (the first of them is free when `x0` is `None`). Memory: 2 vectors.
    Not for ρ(M) ≥ 1, where it diverges (status `GROWING` or `DIVERGED`); slow for q near 1, where
    `cg` (symmetric) or `gmres` needs about the square root of its steps.
    Assumed, not checked: ρ(M) < 1, with exact `num_steps`. Growth is then reported as `GROWING`,
    which is no failure; one step shows none.

    Args:
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the true residual, ‖b − (I − M)x‖ ≤ rtol ‖b‖.
        atol: Absolute tolerance on the same.

    Returns:
        A `LinearSolver`.

    Raises:
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> import jax.numpy as jnp
    >>> x, info = fp(num_steps=3)(lambda v: 0.5 * v, jnp.ones(2))
    >>> x, info.residual  # 1 + 1/2 + 1/4, and ‖M³b‖
    (Array([1.75, 1.75], dtype=float64), Array(0.1767767, dtype=float64))

    References:
        Grazzi, Franceschi, Pontil, Salzo, On the Iteration Complexity of Hypergradient Computation,
        ICML 2020, equation (19) and Theorem 2.3.
    """
    stop = stopping("fp", num_steps, max_steps, rtol, atol)

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        matvec, b = system.matvec, system.b

        # The residual of xᵢ is xᵢ₊₁ − xᵢ: carrying both makes the true residual free.
        def step(carry: Any) -> Any:
            i, _, x = carry
            return i + 1, x, tree.add(matvec(x), b)

        def residual(carry: Any) -> jax.Array:
            _, x, following = carry
            return tree.norm(tree.sub(following, x))

        if system.x0 is None:
            carry = jnp.int32(0), tree.zeros_like(b), b
        else:
            carry = jnp.int32(0), system.x0, tree.add(matvec(system.x0), b)
        start = residual(carry)
        if stop.num_steps is not None:
            # One product less than it may seem: x₁ = b is free, and what has grown is judged at
            # xₖ₋₁, so that the product behind the true residual runs only if somebody reads it.
            carry = lax.fori_loop(1, stop.num_steps, lambda _, c: step(c), carry)
            status = system.steps_status(residual(carry), start, carry[2])
            return carry[2], system.fixed(stop.num_steps, carry[2], status)

        tol = system.tolerance(stop)

        def unfinished(carry: Any) -> jax.Array:
            i, x, _ = carry
            norm = residual(carry)
            # ρ(M) > 1 shows as growth beyond what any transient of a usable map reaches.
            alive = jnp.isfinite(norm) & (norm * system.eps <= start)
            return (i < stop.max_steps) & (norm > jnp.maximum(tol, system.floor(x))) & alive

        carry = lax.while_loop(unfinished, step, carry)
        i, x, _ = carry
        return x, system.judge(i, x, residual(carry), tol, start)

    return linear_solver("fp", solve, stop)
