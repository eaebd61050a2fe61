"""Rates of the two stages: fixed-point steps (Theorem 2.3) and conjugate gradients (17), (18)."""

import math
from typing import Any, Protocol

import jax.numpy as jnp

from .constants import Constants, Real, check_constants, count, require


class Rate(Protocol):
    """A rate, or a bound, after some steps: the type of `fp_rate`, `cg_rate`, `itd`."""

    def __call__(self, n: Real, c: Any, /) -> Real:
        """Value after `n` steps, given the constants `c`."""
        ...


def fp_rate(k: Real, c: Constants) -> Real:
    """Rate qᵏ of fixed-point steps from 0: σ(k) of v ← Jᵀv + b (Theorem 2.3), ρ(t) of w ← Φ(w, λ).

    Assumed, not checked: B. From another start it is the share of the first error that is left.

    Args:
        k: number of steps, ≥ 0, any shape.
        c: constants, with a contraction.

    Returns:
        The rate, a float, or an array where an argument is one.

    Raises:
        ValueError: `k` is negative, or `c` has a `q` outside (0, 1) or another bad constant.

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> fp_rate(3, c)
    0.125
    """
    check_constants(c)
    return c.q ** count("k", k, *c)


def gradient_descent_rate(kappa: Real) -> Real:
    """Contraction constant (6) of gradient descent on ℓ with the step 2/(μ_ℓ + L_ℓ).

        q = (κ−1)/(κ+1) ≥ (√κ−1)/(√κ+1) = r    (18)

    r is the rate of conjugate gradients in the long run, see `cg_rate`. With s = √κ the difference
    is 2s(s−1)/((s²+1)(s+1)) ≥ 0. At κ = 1, q = 0: then give `contraction_constants` any q > 0.

    When not to use it: for another step α, where q = max(|1 − α μ_ℓ|, |1 − α L_ℓ|).

    Args:
        kappa: κ = L_ℓ/μ_ℓ ≥ 1, where μ_ℓ I ≤ ∇₁²ℓ ≤ L_ℓ I (assumed, not checked).

    Returns:
        q, a float, or an array where `kappa` is one.

    Raises:
        ValueError: `kappa` is less than 1 or not finite.

    >>> gradient_descent_rate(9.0)
    0.8
    """
    _check_kappa(kappa)
    return (kappa - 1) / (kappa + 1)


def cg_rate(k: Real, kappa: Real) -> Real:
    """Rate (17) of conjugate gradients from 0 in the Euclidean norm: σ(k) of Assumption C(iii).

        ‖v_k − v‖ ≤ σ(k) ‖v‖,    σ(k) = min(1, 2√κ rᵏ),    r = (√κ−1)/(√κ+1)

    In the energy norm it is 2rᵏ (Chebyshev). As λmin ‖x‖² ≤ ⟨x, (I−J)x⟩ ≤ λmax ‖x‖², the Euclidean
    norm adds √κ; 2rᵏ alone is false, and so is qᵏ. The 1: these errors never grow.

    Assumed, not checked: I − J symmetric and positive definite, exact arithmetic. For the normal
    equations (15), where I − J need only be invertible, pass κ².
    When not to use it: to predict a solve whose eigenvalues cluster; it knows κ only, and `cg` is
    faster there.

    Args:
        k: number of steps, ≥ 0, any shape.
        kappa: κ(I − J) ≥ 1; at most L_ℓ/μ_ℓ for gradient descent, (1+q)/(1−q) for a symmetric J.

    Returns:
        σ(k), at most 1: a float, or an array where an argument is one.

    Raises:
        ValueError: `k` is negative, or `kappa` is less than 1 or not finite.

    >>> cg_rate(0, 9.0), cg_rate(4, 9.0)
    (1.0, 0.375)
    """
    _check_kappa(kappa)
    root = kappa**0.5
    bound = 2 * root * ((root - 1) / (root + 1)) ** count("k", k, kappa)
    return min(bound, 1.0) if isinstance(bound, float) else jnp.minimum(bound, 1.0)


def _check_kappa(kappa: Real) -> None:
    rule = "be finite and at least 1"
    require((kappa >= 1) & (kappa < math.inf), "kappa", kappa, rule, "it is λmax/λmin of I − ∂₁Φ")
