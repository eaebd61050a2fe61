"""Certificates in the explicit form: `certified` and `polished` transform a `Hypergradient`."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_count
from ..hypergradient import Hypergradient, HypergradientState
from ..leaves import blank, split_static
from ..mapped_axes import placed_like
from ..printing import printed
from ..real_form import norm
from ..types import LinearSolver, PyTree, Scalar
from .certificate import Certificate
from .certify import Options, certificate_of, check_options
from .options import krylov

tree = optax.tree


@printed
def certified(
    hypergrad: Hypergradient,
    *,
    every: int = 1,
    solve_rtol: Scalar = 0.01,
    safety: Scalar = 1.25,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
) -> Hypergradient:
    """The same hypergradient, with a `Certificate` in its state, renewed every `every` updates.

    It is of the ĝ = ∇₂E + Bᵀv that the (w, v) in the state gives, or of the gradient itself where the
    estimator has no v (`itd`). A failed solve, whose gradient the policy made NaN, has one as well.

    Cost: that of `certify` in every `every`-th update.

    Args:
        hypergrad: The result of `hypergradient`.
        every: How often to certify; the first update always is.
        solve_rtol: As in `certify`.
        safety: As in `certify`.
        make_linear_solver: As in `certify`.

    Returns:
        A `Hypergradient` with the same `init` and `update`; see `state.certificate`.

    Raises:
        TypeError: `hypergrad` does not come from `hypergradient`, or `make_linear_solver` makes no
            linear solver.
        ValueError: `every` is not a positive integer; an option of `certify` is not what it asks for.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> hypergrad = fg.certified(fg.hypergradient(
    ...     lambda w, lam: w**2, phi, fg.picard(phi, num_steps=3), fg.aid(fg.fp(num_steps=3))))
    >>> grad, state = hypergrad.update(hypergrad.init(0.0, 0.3), 0.3)
    >>> float(state.certificate.relative_error) < 0.1
    True
    """
    options = Options(solve_rtol, safety, make_linear_solver)
    return _with_certificate("certified", hypergrad, every, options, lambda *kept: kept[:2])


@printed
def polished(
    hypergrad: Hypergradient,
    *,
    solve_rtol: Scalar = 0.01,
    safety: Scalar = 1.25,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
) -> Hypergradient:
    """The corrected hypergradient g⁺ instead of ĝ, with its `Certificate` in the state.

    g⁺ is handed out where the certificate is valid, ĝ elsewhere. Its error is quadratic in that of
    (w, v). The certificate is that of ĝ: `error` is what ĝ errs by, `remainder` what g⁺ may.

    Cost: that of `certify` in every update.

    Args:
        hypergrad: The result of `hypergradient`.
        solve_rtol: As in `certify`.
        safety: As in `certify`.
        make_linear_solver: As in `certify`.

    Returns:
        A `Hypergradient` with the same `init` and `update`.

    Raises:
        TypeError: `hypergrad` does not come from `hypergradient`, or `make_linear_solver` makes no
            linear solver.
        ValueError: `solve_rtol` is not in (0, 1), or `safety` is below 1.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> rough = fg.hypergradient(
    ...     lambda w, lam: w**2, phi, fg.picard(phi, num_steps=3), fg.aid(fg.fp(num_steps=3)))
    >>> hypergrad = fg.polished(rough)
    >>> grad, _ = hypergrad.update(hypergrad.init(0.0, 1.0), 1.0)
    >>> round(float(grad), 6)  # f = 4 λ²
    8.0
    """

    def choose(grad: PyTree, value: PyTree, certificate: Certificate) -> tuple[PyTree, PyTree]:
        # A gradient that the policy made NaN stays NaN.
        failed = ~jnp.isfinite(norm(grad))
        value = None if value is None else certificate.polished_value.astype(value.dtype)
        return tree.where(failed, grad, certificate.polished), value

    options = Options(solve_rtol, safety, make_linear_solver)
    return _with_certificate("polished", hypergrad, 1, options, choose)


def _with_certificate(
    where: str,
    hypergrad: Hypergradient,
    every: int,
    options: Options,
    choose: Callable[[PyTree, PyTree, Certificate], tuple[PyTree, PyTree]],
) -> Hypergradient:
    if not isinstance(hypergrad, Hypergradient):
        raise TypeError(
            f"`hypergrad` of `{where}` must be the result of `hypergradient(...)`, got {hypergrad!r}."
        )
    check_count(where, "every", every)
    check_options(where, options)
    inner_init, inner_update, outer, phi, _ = hypergrad

    def answer(
        grad: PyTree, state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> Certificate:
        given = grad if state.v is None else None
        return certificate_of(
            where, outer, phi, state.w, state.v, lam, args, kwargs, given, options
        )

    @Compiled
    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        due = state.num_updates % every == 0
        before = state.certificate
        grad, state = inner_update(state, lam, *args, **kwargs)
        if every == 1 or before is None:
            certificate = answer(grad, state, lam, *args, **kwargs)
        else:
            layout, kept = split_static(before)
            certificate = layout.join(
                lax.cond(
                    due,
                    lambda: split_static(answer(grad, state, lam, *args, **kwargs))[1],
                    lambda: kept,
                )
            )
        grad, value = choose(grad, state.corrected_value, certificate)
        state = state._replace(certificate=certificate, corrected_value=value)
        return placed_like(grad, lam), state

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        state = inner_init(w0, lam, *args, **kwargs)
        _, shapes = update.eval_shape(state, lam, *args, **kwargs)
        return state._replace(certificate=blank(shapes.certificate))

    return Hypergradient(init, update, outer, phi)
