"""Fixed-point iteration, w ← Φ(w, λ): `picard`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..failure import check_on_failure
from ..packing import fresh, stopped_by_residual
from ..types import OnFailure, Phi, PyTree, Scalar, SolveInfo, check_callable, stopping
from .frame import CheckedSolver, above, checked_start, distance, fixed_point_info, judge

tree = optax.tree


def picard(
    phi: Phi,
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Fixed-point iteration: wᵢ₊₁ = Φ(wᵢ, λ).

    For a contraction with constant q, ‖w_t − w‖ ≤ qᵗ ‖w₀ − w‖. With `num_steps` it is a `fori_loop` of
    static length, which reverse mode can differentiate (`itd`). With `max_steps` it is a
    `while_loop` that ends when ‖Φ(w) − w‖ ≤ max(rtol ‖Φ(w)‖, atol), or at the floor of the dtype.

    Assumed, not checked: with exact `num_steps`, that they suffice; `with_info` has the residual,
    for one Φ more.

    Cost: one Φ a step, one more with a tolerance. Memory: w, 2 w with a tolerance (t of them under
    reverse-mode `itd`).
    Not for maps with ρ(J) ≥ 1; slow for q near 1, where `anderson` or a heavy-ball map is faster.

    Args:
        phi: `phi(w, *args, **kwargs) -> w`.
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the residual.
        atol: Absolute tolerance on the residual.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`.

    Raises:
        TypeError: `phi` is not callable; when called, Φ(w₀) does not look like `w0`; where JAX
            differentiates the steps that a tolerance ends, as `itd` asks for.
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> solver = picard(lambda w, lam: 0.5 * w + lam, max_steps=100, rtol=1e-6)
    >>> w, info = solver.with_info(0.0, 1.0)
    >>> round(float(w), 5), int(info.num_steps), bool(info.converged)
    (2.0, 19, True)

    References:
        Grazzi et al., ICML 2020, Algorithm 1.
    """
    check_callable("picard", "phi", phi, "phi(w, *args) -> w")
    phi = fresh(phi)
    check_on_failure("picard", on_failure)
    stop = stopping("picard", num_steps, max_steps, rtol, atol)

    def with_info(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        w0 = checked_start("picard", phi, w0, *args, **kwargs)
        if stop.num_steps is not None:
            w = lax.fori_loop(0, stop.num_steps, lambda _, w: phi(w, *args, **kwargs), w0)
            return w, fixed_point_info(phi, stop.num_steps, w, *args, **kwargs)

        def unfinished(carry: Any) -> jax.Array:
            i, _, following, residual = carry
            return (i < stop.max_steps) & above(residual, stop.tolerance, following)

        def step(carry: Any) -> Any:
            i, _, w, _ = carry
            following = phi(w, *args, **kwargs)
            return i + 1, w, following, distance(following, w)

        following = phi(w0, *args, **kwargs)
        start = distance(following, w0)
        carry = lax.while_loop(unfinished, step, (jnp.int32(0), w0, following, start))
        i, w, following, residual = carry
        info = judge(i, residual, start, stop.tolerance, following)
        return stopped_by_residual("picard", w), info

    return CheckedSolver(with_info, on_failure)
