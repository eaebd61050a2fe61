"""The fixed-point method for (I − M) x = b: `fp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..iteration import Measured, iterate, stopping
from ..mapped_axes import steady
from ..printing import printed
from ..types import LinearSolver, MatVec, PyTree, Scalar, SolveInfo, Status
from .preconditioner import Preconditioner
from .system import Correction, System, corrected, linear_solver, tree
from .tunable import tunable


@printed
@tunable
def fp(
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    preconditioner: Preconditioner | MatVec | None = None,
) -> LinearSolver:
    """The fixed-point method: x₀ = 0, xᵢ₊₁ = M xᵢ + b.

    After k steps xₖ = Σᵢ₍ᵢ<ₖ₎ Mⁱ b, the truncated Neumann series, and ‖xₖ − x‖ ≤ qᵏ ‖x‖ where
    ‖M‖ ≤ q < 1. On an affine Φ, k steps give exactly what differentiating k iterations gives.

    With a preconditioner P ≈ (I − M)⁻¹ it is xᵢ₊₁ = xᵢ + P (b − (I − M) xᵢ), iterative refinement,
    which contracts by ‖I − P (I − M)‖. With a tolerance it ends where a step takes less than a tenth
    off.

    Cost: one product a step (the first of them is free when `x0` is `None`). Memory: 2 vectors.
    Not for ρ(M) ≥ 1, where it diverges (status `NO_PROGRESS` or `DIVERGED`); slow for q near 1, where
    `cg` (symmetric) or `gmres` needs about the square root of its steps.
    Assumed, not checked: ρ(M) < 1, in exactly one step; more steps show it.

    Args:
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the true residual, ‖b − (I − M)x‖ ≤ rtol ‖b‖.
        atol: Absolute tolerance on the same.
        preconditioner: P ≈ (I − J)⁻¹: `inverse` of a system nearby, which somebody keeps, or a linear
            function u ↦ P u, whose transpose is taken where the system is that of Jᵀ.

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

    refined = corrected(stop, _refinement, 0.9)

    def solve(system: System) -> tuple[PyTree, SolveInfo]:
        if system.precondition is not None:
            return refined(system)
        b = system.b

        def phi(x: PyTree) -> PyTree:
            return tree.add(system.matvec(x), b)

        def residual_norm(x: PyTree, image: PyTree) -> jax.Array:
            return system.space.norm(tree.sub(image, x))

        # The first product is free where x₀ = 0.
        free = system.x0 is None
        x0, image = (tree.zeros_like(b), b) if free else (system.x0, phi(system.x0))
        if stop.num_steps is None:
            # ρ(M) > 1 shows as growth beyond what any transient of a usable map reaches.
            def measure(x: PyTree, image: PyTree) -> Measured:
                return system.measured(stop, x, tree.sub(image, x))

            x, _, info = iterate(phi, x0, image, measure, stop.max_steps, 1 / system.eps)
            return x, system.judge(info)

        # One product less than it may seem: x₁ is at hand, and what has grown is judged at xₖ₋₁, so
        # that the product behind the true residual runs only if somebody reads it.
        start = residual_norm(x0, image)
        step, carry = steady(lambda c: (c[1], phi(c[1])), (x0, image))
        x, image = lax.fori_loop(1, stop.num_steps, lambda _, c: step(c), carry)
        status = jnp.int32(Status.FIXED_STEPS)
        if stop.num_steps > 1:
            status = system.steps_status(residual_norm(x, image), start, image)
        return image, system.fixed(stop.num_steps, image, status)

    # Its steps are those of Φ, whatever the size of I − M; with P they are in units of A.
    normalised = preconditioner is not None
    return linear_solver("fp", solve, normalised=normalised, preconditioner=preconditioner)


@tunable
def refinement(
    *, max_steps: int, rtol: Scalar = 0.0, reduction: float, preconditioner: Any
) -> LinearSolver:
    """`fp` with a preconditioner, for as long as a step takes the share 1 − `reduction` off."""
    stop = stopping("fp", None, max_steps, rtol, 0.0)
    refined = corrected(stop, _refinement, reduction)
    return linear_solver("fp", refined, preconditioner=preconditioner)


def _refinement(system: System, r: PyTree, steps: jax.Array | int, tol: jax.Array) -> Correction:
    """One step of iterative refinement, or exactly `steps`."""
    del tol  # A step that is all of a correction: the true residual follows.
    precondition = system.precondition
    assert precondition is not None
    d = precondition(r)
    if not isinstance(steps, int):
        return Correction(d, 1, Status.FIXED_STEPS)

    def once(carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        left = tree.sub(r, system.product(carry[0]))
        return tree.add(carry[0], precondition(left)), left

    step, start = steady(once, (d, r))
    d, left = lax.fori_loop(1, steps, lambda _, carry: step(carry), start)
    status = system.steps_status(system.space.norm(left), system.space.norm(r), d)
    return Correction(d, steps, status if steps > 1 else Status.FIXED_STEPS)
