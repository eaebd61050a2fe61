"""Fixed-point iteration, w ← Φ(w, λ): `picard`."""

from ..compiled import Compiled
from ..errors import check_callable, no_custom_vjp
from ..failure import check_on_failure
from ..iteration import stopping
from ..printing import printed
from ..types import OnFailure, Phi, PyTree, Scalar, SolveInfo
from .checkpoints import Checkpoints, check_checkpoints, every_iterate
from .solver import CheckedSolver, lower_level


@printed
def picard(
    phi: Phi,
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    checkpoints: Checkpoints = every_iterate(),  # noqa: B008
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Fixed-point iteration: wᵢ₊₁ = Φ(wᵢ, λ).

    For a contraction with constant q, ‖w_t − w‖ ≤ qᵗ ‖w₀ − w‖. With `num_steps` it is a `fori_loop` of
    static length, which `itd` can differentiate in every mode. With `max_steps` it is a
    `while_loop` that ends when ‖Φ(w) − w‖ ≤ max(rtol ‖Φ(w)‖, atol) in every leaf of w, or when a
    residual near rounding has stopped shrinking (status `AT_FLOOR`); `itd` can differentiate that with
    `checkpoints=recursive()`, in reverse mode.

    Assumed, not checked: with exact `num_steps`, that they suffice; `with_info` has the residual,
    for one Φ more.

    Cost: one Φ a step, one more with a tolerance. Memory: w, 2 w with a tolerance; under `itd` in
    reverse mode what `checkpoints` keeps, by default all iterates and the tapes of all steps.
    Not for maps with ρ(J) ≥ 1; slow for q near 1, where `anderson` or a heavy-ball map is faster.

    Args:
        phi: `phi(w, *args, **kwargs) -> w`.
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Relative tolerance on the residual.
        atol: Absolute tolerance on the residual.
        checkpoints: What reverse mode keeps of the steps: `every_iterate()`, `rematerialised()`,
            `nested()` or `recursive()`.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance, and
            for derivatives of too few steps (`recursive`).

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`.

    Raises:
        TypeError: `phi` is not callable, `checkpoints` not one of these values; when called, Φ(w₀)
            does not look like `w0`; where JAX differentiates the steps that a tolerance ends, as `itd`
            asks for, without `recursive()`.
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> solver = picard(lambda w, lam: 0.5 * w + lam, max_steps=100, rtol=1e-6)
    >>> w, info = solver.with_info(0.0, 1.0)
    >>> round(float(w), 5), int(info.num_steps), bool(info.converged)
    (2.0, 19, True)

    References:
        Grazzi et al., ICML 2020, Algorithm 1.
    """
    check_callable("picard", "phi", phi, "phi(w, *args) -> w")
    check_checkpoints("picard", checkpoints)
    check_on_failure("picard", on_failure)
    stop = stopping("picard", num_steps, max_steps, rtol, atol)

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        lower = lower_level("picard", phi, w0, args, kwargs)
        if stop.num_steps is None:
            return checkpoints.until(lower, stop, on_failure)
        w = checkpoints.exactly(lower.phi, lower.w0, stop.num_steps)
        return w, lower.exact_steps(stop.num_steps, w)

    def with_info(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        with no_custom_vjp(checkpoints.reverse_only):
            return solve(w0, *args, **kwargs)

    return CheckedSolver(with_info if checkpoints.reverse_only else solve, on_failure, phi)
