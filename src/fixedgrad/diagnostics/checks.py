"""Is the gradient of a decorated solver right? `check` compares it with three independent answers."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..certificate.certify import Certificate, Reason, certify
from ..certificate.lagrangian import pack
from ..decorator import fixed_point
from ..estimators import truncated_itd
from ..packing import check_arrays, check_concrete, partition, split_lam, strongly_typed
from ..realify import inner, norm, resolution
from ..types import Outer, Phi, PyTree, check_callable
from .spectrum import solve_lower

tree = optax.tree


class Check(NamedTuple):
    """What `check` found: relative differences from the decorated solver's gradient.

    Attributes:
        gradient: The decorated solver's gradient of E(solve(w₀, λ), λ).
        certificate: The `Certificate` at its w.
        against_polished: ‖g − g⁺‖ / ‖g⁺‖.
        against_itd: ‖g − g_itd‖ / ‖g_itd‖, steps of Φ differentiated from its w; NaN where half as many
            steps give something else, so that ITD has not converged and says nothing.
        against_difference: |⟨g, d⟩ − finite difference of f along d| / ‖g‖, d along the polished one.
        disagree: The names of those that disagree by more than `rtol`, and by more than rounding.
    """

    gradient: PyTree
    certificate: Certificate
    against_polished: float
    against_itd: float
    against_difference: float
    disagree: tuple[str, ...]

    def __repr__(self) -> str:
        verdict = (
            "all agree" if not self.disagree else "disagrees with: " + ", ".join(self.disagree)
        )
        reason = Reason(int(self.certificate.reason)).name
        return (
            f"{verdict}\n  polished {self.against_polished:.2e}, ITD {self.against_itd:.2e}, finite "
            f"difference {self.against_difference:.2e}\n  certificate: relative error "
            f"{float(self.certificate.relative_error):.2e} ({reason})"
        )


def check(
    solve: Callable[..., PyTree],
    outer: Outer,
    phi: Phi,
    w0: PyTree,
    lam: PyTree,
    /,
    *args: PyTree,
    rtol: float = 1e-2,
    num_steps: int = 200,
    **kwargs: PyTree,
) -> Check:
    """Does the gradient of a decorated solver agree with three independent answers?

    With g the gradient of E(solve(w₀, λ), λ): the polished gradient of a certificate at its w; ITD over
    `num_steps` further steps of Φ; a central difference of f(λ) = E(w(λ), λ) along the polished
    gradient, with w(λ) solved by Newton–Krylov to the floor of the dtype. The last one knows nothing of
    derivative rules. Where Φ contracts slowly or not at all, ITD is left out.

    Cost: some hundreds of products; it compiles. Not under `jit`.

    Args:
        solve: The decorated solver.
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w0: Where the solver starts.
        lam: λ.
        *args: Data.
        rtol: What counts as agreement; at least the root of the dtype's resolution does.
        num_steps: Steps of Φ that ITD differentiates.
        **kwargs: More data.

    Returns:
        A `Check`; print it.

    Raises:
        TypeError: An argument is not of its kind or shape, or is traced.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=60))
    >>> check(solve, lambda w, lam: w**2, phi, 0.0, 0.3).disagree
    ()
    """
    check_callable("check", "solve", solve, "solve(w0, lam, *args) -> w")
    check_callable("check", "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable("check", "phi", phi, "phi(w, lam, *args) -> w")
    check_arrays("check", "w0", w0)
    check_concrete("check", (w0, lam, args, kwargs))
    w0, lam = strongly_typed((w0, lam))
    x, join, join_gradient = split_lam("check", lam)

    def objective(solver: Callable[..., PyTree], x: PyTree) -> jax.Array:
        lam = join(x)
        return outer(solver(w0, lam, *args, **kwargs), lam, *args, **kwargs)

    gradient = jax.grad(lambda x: objective(solve, x))(x)
    w = solve(w0, lam, *args, **kwargs)
    certificate = certify(outer, phi, w, None, lam, *args, gradient=gradient, **kwargs)
    polished = partition(certificate.polished)[0]
    # What of the certificate's error is rounding: by so much two right answers may differ.
    distance = norm(tree.sub(gradient, polished))
    rounding = certificate.error - 1.25 * (distance + certificate.remainder)
    rounding = jnp.maximum(jnp.nan_to_num(rounding), 0.0)

    # ITD from the solver's own w, so that only the derivative rule differs.
    def itd(steps: int) -> PyTree:
        unrolled = fixed_point(phi, truncated_itd(num_steps=steps))(lambda *_, **__: w)
        return jax.grad(lambda x: objective(unrolled, x))(x)

    unrolled, halfway = itd(num_steps), itd(max(num_steps // 2, 1))
    conclusive = norm(tree.sub(unrolled, halfway)) <= 0.1 * rtol * norm(unrolled) + rounding

    @jax.jit
    def exact(x: PyTree) -> jax.Array:
        packed = pack("check", outer, phi, w, join(x), args, kwargs)
        solved, _, _ = solve_lower(packed, 0.0)
        return packed.outer(solved, packed.x)

    size, scale = norm(polished), float(norm(x))
    step = resolution(x) ** (1 / 3) * (scale if scale > 0 else 1.0)
    unit = 1 / jnp.where(size > 0, size, 1.0)
    direction = jax.tree.map(lambda d: unit.astype(d.dtype) * d, polished)
    moved = [
        jax.tree.map(lambda x, d, s=s: x + jnp.asarray(s * step, x.dtype) * d, x, direction)
        for s in (1.0, -1.0)
    ]
    difference = (exact(moved[0]) - exact(moved[1])) / (2 * step)
    along = inner(gradient, direction)
    rtol = max(rtol, resolution((w, x)) ** 0.5)
    size = jnp.maximum(jnp.maximum(norm(gradient), jnp.abs(difference)), size)
    found = {
        "polished": (distance, norm(polished)),
        "ITD": (norm(tree.sub(gradient, unrolled)), norm(unrolled)),
        "finite difference": (jnp.abs(difference - along), size),
    }
    disagree = tuple(
        name
        for name, (gap, size) in found.items()
        if not bool(gap <= rtol * size + rounding) and (name != "ITD" or bool(conclusive))
    )
    polished, by_itd, difference = (
        float(gap / jnp.where(size > 0, size, 1.0)) for gap, size in found.values()
    )
    by_itd = by_itd if bool(conclusive) else math.nan
    return Check(join_gradient(gradient), certificate, polished, by_itd, difference, disagree)
