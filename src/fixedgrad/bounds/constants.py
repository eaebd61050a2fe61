"""What is known of Φ and E, the constants of Lemma 2.1, and the coefficients made of them."""

import math
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp

Real = float | jax.Array


class Constants(NamedTuple):
    """What is known of Φ and E at one λ: the constants of Lemma 2.1 and Assumptions A, B, C.

    All are over the ball ‖u‖ ≤ 2D, which holds w and every w_t from w₀ = 0; nothing is needed
    outside it. For another w₀ that does not depend on λ, let D ≥ ‖w₀ − w‖ and the ball be
    ‖u − w‖ ≤ D. Under Assumption B build it with `contraction_constants`.

    Assumed, not checked: that they are such constants. A step size that depends on λ is a part of
    Φ, hence of `L_Phi` and `nu2`. Heavy ball has no Euclidean `q`: it contracts in another norm.
    Signs and ranges are validated where the constants are used, not here.

    Attributes:
        D: ≥ ‖w‖.
        L_E: ≥ sup ‖∇₁E(u, λ)‖.
        L_Phi: ≥ sup ‖∂₂Φ(u, λ)‖.
        nu1: Lipschitz constant ν₁ of ∂₁Φ(·, λ).
        nu2: Lipschitz constant ν₂ of ∂₂Φ(·, λ).
        eta1: Lipschitz constant η₁ of ∇₁E(·, λ).
        eta2: Lipschitz constant η₂ of ∇₂E(·, λ).
        mu: > 0, with sup ‖(I − ∂₁Φ(u, λ))⁻¹‖ ≤ 1/μ (12).
        q: < 1, with sup ‖∂₁Φ(u, λ)‖ ≤ q; nan if Φ is not known to contract: then only `aid` holds.

    >>> from fixedgrad.bounds import aid
    >>> c = Constants(D=1, L_E=1, L_Phi=1, nu1=0, nu2=0, eta1=1, eta2=0, mu=0.5)
    >>> aid(0.25, 0.125, c)
    0.75
    """

    D: Real
    L_E: Real
    L_Phi: Real
    nu1: Real
    nu2: Real
    eta1: Real
    eta2: Real
    mu: Real
    q: Real = math.nan


class Coefficients(NamedTuple):
    """c₁(λ), c₂(λ), c₃(λ) of Theorem 2.1, made by `constants`.

    Attributes:
        c1: The factor of ρ(t), or qᵗ, from ∇₁E and ∇₂E at w_t.
        c2: The same from ∂₁Φ and ∂₂Φ, to be multiplied by t/q, 1/(1−q) or (1−qᵏ)/(1−q).
        c3: The factor of σ(k), or qᵗ, from the recursion that is cut short.
    """

    c1: Real
    c2: Real
    c3: Real


def contraction_constants(
    *, q: Real, D: Real, L_E: Real, L_Phi: Real, nu1: Real, nu2: Real, eta1: Real, eta2: Real
) -> Constants:
    """Constants under Assumption B: Φ(·, λ) is a q-contraction, so μ = 1 − q (Lemma 2.2).

    The arguments are explained in `Constants`. If a larger μ is known, `_replace(mu=...)` improves
    `aid` and `aid_cg_steps`, nothing else.

    Assumed, not checked: Assumption B, and that the others are such constants.
    When not to use it: for a map that contracts in another norm only, such as heavy ball. Build
    `Constants` there, with `mu` and without `q`, and take `aid`.

    Returns:
        `Constants` with `mu` = 1 − q.

    Raises:
        ValueError: `q` is not in (0, 1), or another constant is negative or not finite.

    >>> contraction_constants(q=0.75, D=1, L_E=1, L_Phi=1, nu1=0, nu2=0, eta1=1, eta2=0).mu
    0.25
    """
    return check_constants(Constants(D, L_E, L_Phi, nu1, nu2, eta1, eta2, mu=1 - q, q=q))


def constants(c: Constants) -> Coefficients:
    """Coefficients of Theorems 2.1, 2.2 and 2.4.

        c₁ = (η₂ + η₁ L_Φ/(1−q)) D,    c₂ = (ν₂ + ν₁ L_Φ/(1−q)) L_E D,    c₃ = L_E L_Φ/(1−q)

    They are the prices of ∇E (c₁) and Φ′ (c₂) taken off w, and of a recursion cut short (c₃).

    Assumed, not checked: A(iii), A(iv), B.
    When not to use it: without a contraction; `aid` needs only μ.

    Args:
        c: constants, with a contraction.

    Returns:
        `Coefficients`; each is a float, or an array where a constant in it is one.

    Raises:
        ValueError: `c` has a `q` outside (0, 1) or another bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> constants(c)
    Coefficients(c1=2.0, c2=4.0, c3=4.0)
    """
    check_constants(c)
    dw = c.L_Phi / (1 - c.q)  # ≥ ‖w′‖ = ‖(I − J)⁻¹ B‖
    de, dphi = c.eta2 + c.eta1 * dw, c.nu2 + c.nu1 * dw
    return Coefficients(de * c.D, dphi * c.L_E * c.D, c.L_E * dw)


def check_constants(c: Constants, *, contraction: bool = True) -> Constants:
    """Raises `ValueError` unless `c` may be constants; without `contraction` q may be unknown."""
    advice = "build `c` with `contraction_constants`; without a contraction only `aid` holds"
    known = (c.q > 0) & (c.q < 1)
    require(known if contraction else known | (c.q != c.q), "q", c.q, "lie in (0, 1)", advice)
    for name in Constants._fields[:-2]:
        x = getattr(c, name)
        require((x >= 0) & (x < math.inf), name, x, "be finite and ≥ 0", "it bounds a norm")
    require((c.mu > 0) & (c.mu < math.inf), "mu", c.mu, "be > 0", "1/`mu` bounds ‖(I − ∂₁Φ)⁻¹‖")
    return c


def require(holds: bool | jax.Array, name: str, value: object, rule: str, advice: str) -> None:
    """Raises `ValueError` where the known value does not hold; nothing is known of a traced one."""
    if isinstance(holds, jax.core.Tracer) or (holds if isinstance(holds, bool) else holds.all()):
        return
    raise ValueError(f"`{name}` must {rule}, got {value}: {advice}.")


def count(name: str, n: Real, *like: Real) -> Real:
    """`n` ≥ 0, an array in the real dtype of `like`: integer arrays do not promote strictly."""
    require(n >= 0, name, n, "be non-negative", "it is a number of steps")
    return n if isinstance(n, int | float) else jnp.asarray(n, jnp.result_type(1.0, *like))
