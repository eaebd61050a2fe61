"""An upper bound of a hypergradient's error from constants of the caller: `certify_proved`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..bounds import Constants
from ..errors import show
from ..problem import Problem, compiled_at
from ..real_form import EVALUATION, resolution
from ..types import Outer, Phi, Products, PyTree, status_of
from .certificate import Certificate, CertificateStatus, relative, the_pair
from .options import NO_KWARGS, check_kwargs, krylov

tree = optax.tree


def certify_proved(
    outer: Outer,
    phi: Phi,
    w: PyTree,
    v: PyTree | None,
    lam: PyTree,
    /,
    *args: PyTree,
    constants: Constants,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    gradient: PyTree | None = None,
) -> Certificate:
    """How wrong can the hypergradient ĝ = ∇₂E + Bᵀv at (w, v) be, given constants of Φ and E?

    With ε = ‖r_w‖/μ and L = ‖B‖, in the notation of `certify`,

        ‖ĝ − ∇f‖ ≤ (η₂ + ν₂‖v‖) ε + ((L + ν₂ε)/μ) (‖r_v‖ + (η₁ + ν₁‖v‖) ε),

    since B*ᵀv* − Bᵀv = B*ᵀ(v* − v) + (B* − B)ᵀv and A*ᵀ(v* − v) = r_v + (b* − b) + (J* − J)ᵀv. It
    holds if the constants do, on the ball of radius ε around w; `valid` is false where an
    observation contradicts one of them.

    Assumed, not checked: the constants where no observation contradicts them; a constant that is wrong
    unseen makes the bound wrong.

    Cost: five Φ and about twenty products. Memory: a few w.
    When not to use it: without constants, and where an estimate will do: `certify` is closer to the
    error by orders of magnitude.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w: The lower-level iterate.
        v: The solution of (I − Jᵀ)v = ∇₁E at w as it was computed, like w; `None` to have it computed.
        lam: λ; the hypergradient is with respect to its inexact leaves.
        *args: Data.
        constants: `fixedgrad.bounds.Constants` at this λ: `mu`, `nu1`, `nu2`, `eta1`, `eta2`, `L_Phi`
            and, if Φ is a contraction, `q`, on the ball of radius ε around w.
        kwargs: Data by keyword, `kwargs={"x": x}` for `phi(w, lam, x=x)`: other keywords are options.
        gradient: An estimate that is not of the form ∇₂E + Bᵀv (`itd`); its distance to ĝ adds to the
            bound.

    Returns:
        A `Certificate` with `proved`; a pytree, under `jit`, `vmap` and `lax.scan` as well.

    Raises:
        TypeError: An argument is not of its kind or shape; an option that there is not, or that could
            be meant for a parameter of `phi` or `outer`.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> constants = fg.bounds.contraction_constants(
    ...     q=0.5, D=2.0, L_E=4.0, L_Phi=1.0, nu1=0.0, nu2=0.0, eta1=2.0, eta2=0.0)
    >>> certificate = fg.certify_proved(
    ...     lambda w, lam: w**2, phi, 1.9, 7.6, 1.0, constants=constants)  # w(λ) = 2 λ, f = 4 λ²
    >>> bool(certificate.valid), round(float(certificate.error), 2)
    (True, 0.4)

    References:
        Ehrhardt, Roberts, Analyzing inexact hypergradients for bilevel learning, 2023.
    """
    where = "certify_proved"
    if not isinstance(constants, Constants):
        raise TypeError(
            f"`constants` of `{where}` must be a `fixedgrad.bounds.Constants`, got {show(constants)}. "
            "They must come from you: no finite number of products can bound the smallest singular "
            "value of I - J."
        )
    functions = {"phi": phi, "outer": outer}
    options = {"constants": constants, "gradient": gradient}
    data = check_kwargs(certify_proved, functions, 2 + len(args), kwargs, options)

    compute = compiled_at(where, _compute, (outer, phi), where)
    return compute(w, lam, args, data, v, gradient, constants)


def _compute(
    problem: Problem, where: str, v: PyTree | None, gradient: PyTree | None, constants: Constants
) -> Certificate:
    v, given, extra = the_pair(where, problem, v, gradient, krylov(0.01))
    return _bound(problem, v, constants, given, extra)


def _bound(
    problem: Problem, v: PyTree, c: Constants, given: PyTree | None, extra_products: jax.Array
) -> Certificate:
    """The bound at (w, v), and whether an observation contradicts its constants."""
    w, x = problem.w, problem.x
    at_v = problem.gradients(w, v)
    value, r_w, r_v, g, b = at_v
    image = tree.sub(w, r_w)
    at, j = problem.equation.vjp(w, x), problem.equation.jvp(w, x).j
    eps = EVALUATION * resolution(w)
    norm = problem.norm
    dtype = norm(w).dtype
    mu, q, nu1, nu2, eta1, eta2, big_l = (
        jnp.asarray(value, dtype) for value in (c.mu, c.q, c.nu1, c.nu2, c.eta1, c.eta2, c.L_Phi)
    )
    size_w = norm(r_w) + eps * (norm(w) + norm(image))
    size_v = norm(r_v) + eps * (norm(b) + 2 * norm(v))
    radius = size_w / mu
    lower = (eta2 + nu2 * norm(v)) * radius
    lower += (big_l + nu2 * radius) / mu * (eta1 + nu1 * norm(v)) * radius
    linear = (big_l + nu2 * radius) / mu * size_v
    # f is L(w(λ), v) for any v, and ∇_w L at (w, v) is r_v.
    lagrangian = at_v.lagrangian(v).astype(dtype)
    value_error = radius * (size_v + 0.5 * (eta1 + nu1 * norm(v)) * radius)
    value_error += eps * (jnp.abs(value).astype(dtype) + norm(w) * (norm(b) + norm(v)))
    gradient = g if given is None else given
    distance = jnp.zeros_like(lower) if given is None else norm(tree.sub(given, g))
    rounding = eps * norm(g)
    error = lower + linear + distance + rounding

    # What can be observed: two points, two v, and directions that J stretches most.
    _, r_w2, r_v2, g2, _ = problem.gradients(image, v)
    at2 = problem.equation.vjp(image, x)
    (jt_v, bt_v), (jt_v2, bt_v2) = ((a.j(v), a.b(v)) for a in (at, at2))
    moved = norm(r_w)
    slack = 1 + 1e-6

    def stretch(_: jax.Array, u: PyTree) -> PyTree:
        u = at.j(j(u))
        scale = 1 / jnp.maximum(norm(u), jnp.finfo(dtype).tiny)
        return jax.tree.map(lambda x: scale.astype(x.dtype) * x, u)

    u = lax.fori_loop(0, 8, stretch, tree.add(tree.add(r_w, v), b))
    ju = j(u)
    noise = eps * (norm(image) + norm(v) + norm(b) + norm(g))
    contraction = ~jnp.isfinite(q) | (
        (norm(r_w2) <= q * moved * slack + noise)
        & (norm(ju) <= q * norm(u) * slack + noise)
        & (norm(jt_v) <= q * norm(v) * slack + noise)
    )
    holds = (
        contraction
        & (norm(tree.sub(u, ju)) * slack + noise >= mu * norm(u))
        & (norm(tree.sub(v, jt_v)) * slack + noise >= mu * norm(v))
        & (norm(bt_v) <= big_l * norm(v) * slack + noise)
        & (norm(tree.sub(jt_v2, jt_v)) <= nu1 * moved * norm(v) * slack + noise)
        & (norm(tree.sub(bt_v2, bt_v)) <= nu2 * moved * norm(v) * slack + noise)
        & (
            norm(tree.sub(tree.sub(r_v2, jt_v2), tree.sub(r_v, jt_v)))
            <= eta1 * moved * slack + noise
        )
        & (norm(tree.sub(tree.sub(g2, bt_v2), tree.sub(g, bt_v))) <= eta2 * moved * slack + noise)
    )
    status = status_of(
        CertificateStatus.VALID,
        (holds, CertificateStatus.CONSTANT_CONTRADICTED),
        (jnp.isfinite(error), CertificateStatus.NON_FINITE),
    )
    gradient = problem.join_gradient(gradient)
    return Certificate(
        error=error,
        relative_error=relative(error, gradient),
        lower_part=lower,
        linear_part=linear,
        remainder=jnp.zeros_like(error),
        gradient=gradient,
        polished=gradient,
        value=lagrangian,
        value_error=value_error,
        polished_value=lagrangian,
        value_remainder=value_error,
        residual_w=moved,
        residual_v=norm(r_v),
        products=Products(jnp.int32(5), jnp.int32(10), jnp.int32(14) + extra_products),
        valid=status == CertificateStatus.VALID,
        status=status,
        at_floor=moved <= eps * (norm(w) + norm(image)),
        rounding=rounding,
        safety=jnp.ones_like(error),
        proved=jnp.asarray(True),
    )
