"""How wrong can a hypergradient be? The a-priori bounds of the paper, each naming its theorem.

At one λ: w = w(λ) is the fixed point, J = ∂₁Φ and B = ∂₂Φ; subscript t means "at w_t"; norms are
Euclidean or spectral. c₁, c₂, c₃ come from `constants`, ρ(t) and σ(k) are the two solvers' rates.

    ITD                ‖∇f_t − ∇f‖ ≤ (c₁ + c₂ t/q + c₃) qᵗ                         `itd`
    AID                ‖∇̂f − ∇f‖   ≤ (c₁ + c₂/(1−q)) ρ(t) + c₃ σ(k)                `aid`
    AID-FP             ‖∇̂f − ∇f‖   ≤ (c₁ + c₂ (1−qᵏ)/(1−q)) ρ(t) + c₃ qᵏ           `aid_fp`

Python numbers give Python floats, in double precision. A JAX array in any place gives an array:
`t`, `k` and the fields of `Constants` broadcast, and jit, vmap and grad apply. `..._steps` invert
the bounds on the host, not under jit. Known values are validated; traced ones cannot be.

Cost: a few operations on scalars. Φ and E are never evaluated: what holds of them, the caller says.
When not to use them: for the error of a hypergradient that was computed. These are worst cases over
a ball, before the computation; `certify` estimates the error at the w and v at hand.

References:
    R. Grazzi, L. Franceschi, M. Pontil, S. Salzo, "On the Iteration Complexity of Hypergradient
    Computation", ICML 2020. Theorem, assumption and equation numbers below are this paper's.
    Y. Saad, "Iterative Methods for Sparse Linear Systems", 2003, section 6.11.3: CG's rate.
    M. Hestenes, E. Stiefel, "Methods of Conjugate Gradients", 1952, Theorem 6:3: no error grows.
"""

import math
from typing import Any, NamedTuple, Protocol

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


class Rate(Protocol):
    """A rate, or a bound, after some steps: the type of `fp_rate`, `cg_rate`, `itd`."""

    def __call__(self, n: Real, c: Any, /) -> Real:
        """Value after `n` steps, given the constants `c`."""
        ...


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
    return _check(Constants(D, L_E, L_Phi, nu1, nu2, eta1, eta2, mu=1 - q, q=q))


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
    _check(c)
    dw = c.L_Phi / (1 - c.q)  # ≥ ‖w′‖ = ‖(I − J)⁻¹ B‖
    de, dphi = c.eta2 + c.eta1 * dw, c.nu2 + c.nu1 * dw
    return Coefficients(de * c.D, dphi * c.L_E * c.D, c.L_E * dw)


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

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> fp_rate(3, c)
    0.125
    """
    _check(c)
    return c.q ** _count("k", k, *c)


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
    bound = 2 * root * ((root - 1) / (root + 1)) ** _count("k", k, kappa)
    return min(bound, 1.0) if isinstance(bound, float) else jnp.minimum(bound, 1.0)


def iterate(t: Real, c: Constants) -> Real:
    """Bound on the error of the iterates w_t = Φ(w_{t−1}, λ) from 0: ‖w_t − w‖ ≤ qᵗ D.

    Assumed, not checked: B.
    When not to use it: where w_t is at hand; ‖w_t − w‖ ≤ ‖Φ(w_t, λ) − w_t‖/(1−q) needs no D.

    Args:
        t: number of steps, ≥ 0, any shape.
        c: constants, with a contraction.

    Returns:
        The bound, a float, or an array where an argument is one.

    Raises:
        ValueError: `t` is negative, or `c` has a `q` outside (0, 1) or another bad constant.

    >>> c = contraction_constants(q=0.5, D=4, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> iterate(3, c)
    0.5
    """
    _check(c)
    return c.q ** _count("t", t, *c) * c.D


def jacobian(t: Real, c: Constants) -> Real:
    """Bound (7) on the error of the iterates' derivative with respect to λ (Proposition 2.1).

        ‖w_t′ − w′‖ ≤ (ν₂ + ν₁ L_Φ/(1−q)) D t qᵗ⁻¹ + L_Φ/(1−q) qᵗ

    Assumed, not checked: A(iii), B, a w₀ that does not depend on λ.

    Args:
        t: number of steps, ≥ 0 (the paper has t ≥ 1; 0 holds too), any shape.
        c: constants, with a contraction.

    Returns:
        The bound, a float, or an array where an argument is one.

    Raises:
        ValueError: `t` is negative, or `c` has a `q` outside (0, 1) or another bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> jacobian(2, c)
    2.5
    """
    # w_t′ − w′ = J_{t−1} (w_{t−1}′ − w′) + (J_{t−1} − J) w′ + (B_{t−1} − B), so the errors obey
    # e_t ≤ q e_{t−1} + (ν₁ ‖w′‖ + ν₂) D qᵗ⁻¹ and e₀ = ‖w′‖: after t steps, t equal terms and qᵗ e₀.
    _check(c)
    dw = c.L_Phi / (1 - c.q)
    return ((c.nu2 + c.nu1 * dw) * c.D * (_count("t", t, *c) / c.q) + dw) * fp_rate(t, c)


def itd(t: Real, c: Constants) -> Real:
    """Bound (8) on the error of iterative differentiation (Theorem 2.1).

        ‖∇f_t − ∇f‖ ≤ (c₁ + c₂ t/q + c₃) qᵗ

    Assumed, not checked: A(iii), A(iv), B, a w₀ that does not depend on λ. It may rise first.
    When not to use it: for a solver that does not iterate Φ itself, since `itd` differentiates the
    solver; the bound is of w_t = Φ(w_{t−1}, λ).

    Args:
        t: number of steps, ≥ 0 (the paper has t ≥ 1; 0 holds too), any shape.
        c: constants, with a contraction.

    Returns:
        The bound, a float, or an array where an argument is one.

    Raises:
        ValueError: `t` is negative, or `c` has a `q` outside (0, 1) or another bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> itd(2, c)
    5.5
    """
    # [∇₂E(w_t) − ∇₂E(w)] + w′ᵀ [∇₁E(w_t) − ∇₁E(w)] + (w_t′ − w′)ᵀ ∇₁E(w_t): the first two are at
    # most c₁ qᵗ, the last L_E `jacobian(t)`.
    c1, c2, c3 = constants(c)
    return (c1 + c2 * (_count("t", t, *c) / c.q) + c3) * fp_rate(t, c)


def aid(rho_t: Real, sigma_k: Real, c: Constants) -> Real:
    """Bound (13) on approximate implicit differentiation with any two solvers (Theorem 2.2).

        (η₂ + (η₁ L_Φ + ν₂ L_E)/μ + ν₁ L_Φ L_E/μ²) D ρ(t) + (L_Φ L_E/μ) σ(k)    (13)
        = (c₁ + c₂/(1−q)) ρ(t) + c₃ σ(k)    with a contraction, μ = 1 − q       (14)

    AID-CG: `aid(fp_rate(t, c), cg_rate(k, kappa), c)`. AID-FP: `aid_fp` is smaller if μ = 1 − q.

    Assumed, not checked: A(i), A(iii), A(iv), C. Any solver of the lower level will do.

    Args:
        rho_t: ρ(t) ≤ 1 with ‖w_t − w‖ ≤ ρ(t) ‖w‖, any shape.
        sigma_k: σ(k) with ‖v_{t,k} − v_t‖ ≤ σ(k) ‖v_t‖ for the system at w_t, any shape.
        c: constants; `q` is not used.

    Returns:
        The bound, a float, or an array where an argument is one.

    Raises:
        ValueError: `rho_t` is not in [0, 1], `sigma_k` is negative, or `c` has a `mu` that is not
            positive, a `q` that is neither in (0, 1) nor nan, or another bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid(0.25, 0.125, c)
    3.0
    """
    # [∇₂E(w_t) − ∇₂E(w)] + B_tᵀ (v_{t,k} − v_t) + (B_t − B)ᵀ v_t + Bᵀ (v_t − v) with ‖v_t‖ ≤ L_E/μ;
    # (I − J)ᵀ (v_t − v) = [∇₁E(w_t) − ∇₁E(w)] + (J_t − J)ᵀ v_t, ‖v_t − v‖ ≤ (η₁ + ν₁ ‖v_t‖) Dρ/μ.
    _check(c, contraction=False)
    _check_rho(rho_t)
    _require(sigma_k >= 0, "sigma_k", sigma_k, "be non-negative", "it is a ratio of two norms")
    v = c.L_E / c.mu
    lower = c.eta2 + c.nu2 * v + (c.eta1 + c.nu1 * v) * (c.L_Phi / c.mu)
    return lower * c.D * rho_t + c.L_Phi * v * sigma_k


def aid_fp(t: Real, k: Real, c: Constants, *, rho: Rate = fp_rate) -> Real:
    """Bound (21) on AID with k fixed-point steps v ← Jᵀv + b from 0 (Theorem 2.4).

        ‖∇̂f − ∇f‖ ≤ (c₁ + c₂ (1−qᵏ)/(1−q)) ρ(t) + c₃ qᵏ

    With ρ(t) = qᵗ and k = t ≥ 1 at most `itd(t, c)`, less if c₂ > 0, as q + q² + … + qᵗ < t. Both
    are attained: by Φ = λw + a, E = w in one dimension, with L_Φ over the w_t alone.

    Assumed, not checked: A(iii), A(iv), B, and C(ii) by `rho`.
    When not to use it: for another linear solver or another start of v; `aid` takes any σ(k).

    Args:
        t: number of lower-level steps, ≥ 0, any shape.
        k: number of linear steps, ≥ 0, any shape.
        c: constants, with a contraction.
        rho: `rho(t, c)` = ρ(t), by default qᵗ; for a w_t that is given, a constant function.

    Returns:
        The bound, a float, or an array where an argument is one.

    Raises:
        ValueError: `t` or `k` is negative, `rho` gives a value outside [0, 1], or `c` has a `q`
            outside (0, 1) or another bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid_fp(2, 2, c), aid_fp(2, 2, c, rho=lambda t, c: 0.0)
    (3.0, 1.0)
    """
    # For e_k = v_{t,k} − v: e_k = J_tᵀ e_{k−1} + [∇₁E(w_t) − ∇₁E(w)] + (J_t − J)ᵀ v. With ‖v‖ ≤
    # L_E/(1−q), S = (1−qᵏ)/(1−q): ‖e_k‖ ≤ qᵏ ‖v‖ + S (η₁ + ν₁ ‖v‖) Dρ and ‖v_{t,k}‖ ≤ S L_E. Insert
    # into Bᵀ e_k + (B_t − B)ᵀ v_{t,k}. Here η₁ too has S, not 1/(1−q): (21) could be smaller.
    c1, c2, c3 = constants(c)
    rho_t, sigma_k = rho(_count("t", t, *c), c), fp_rate(k, c)
    _check_rho(rho_t)
    return (c1 + c2 * ((1 - sigma_k) / (1 - c.q))) * rho_t + c3 * sigma_k


def itd_steps(tol: float, c: Constants) -> int:
    """Smallest t ≥ 0 with `itd(t, c)` ≤ `tol`, by search over the bound itself.

    Assumed, not checked: what `itd` assumes.
    Cost: about 2 log₂ t evaluations of the bound, on the host.
    When not to use it: where a tolerance can stop the solver, as everywhere but in reverse mode of
    `itd`. It ends when the iterates are good; t steps are for the worst case.

    Args:
        tol: absolute tolerance on the hypergradient, > 0.
        c: constants, scalars, with a contraction.

    Returns:
        t, an integer.

    Raises:
        TypeError: an argument is traced or not a scalar.
        ValueError: `tol` is not positive and finite, or `c` has a bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> itd_steps(5.5, c), itd_steps(1e-3, c)
    (2, 18)
    """
    return _first(itd, tol, c)  # (a + b t) qᵗ rises, then falls: it crosses `tol` once.


def aid_fp_steps(tol: float, c: Constants) -> int:
    """Smallest t = k ≥ 0 with `aid_fp(t, t, c)` ≤ `tol`; never more than `itd_steps(tol, c)`.

    Assumed, not checked: what `aid_fp` assumes.
    Cost: about 2 log₂ t evaluations of the bound, on the host.
    When not to use it: see `itd_steps`.

    Args:
        tol: absolute tolerance on the hypergradient, > 0.
        c: constants, scalars, with a contraction.

    Returns:
        t = k, an integer.

    Raises:
        TypeError: an argument is traced or not a scalar.
        ValueError: `tol` is not positive and finite, or `c` has a bad constant.

    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid_fp_steps(1e-3, c)
    14
    """
    return _first(lambda t, c: aid_fp(t, t, c), tol, c)  # Concave in x = qᵗ: crosses `tol` once.


def cg_steps(tol: float, kappa: float) -> int:
    """Smallest k ≥ 0 with `cg_rate(k, kappa)` ≤ `tol`, of order √κ log(√κ/tol).

    Assumed, not checked: what `cg_rate` assumes.
    Cost: about 2 log₂ k evaluations of the rate, on the host.
    When not to use it: see `itd_steps`.

    Args:
        tol: relative tolerance, on ‖v_k − v‖/‖v‖, > 0.
        kappa: condition number κ ≥ 1 of I − J.

    Returns:
        k, an integer.

    Raises:
        TypeError: an argument is traced or not a scalar.
        ValueError: `tol` is not positive and finite, or `kappa` is less than 1 or not finite.
        OverflowError: `kappa` is so large, above about 10³¹, that r rounds to 1.

    >>> cg_steps(1e-3, 9.0)
    13
    """
    return _first(cg_rate, tol, kappa)


def aid_cg_steps(tol: float, c: Constants, kappa: float) -> tuple[int, int]:
    """The (t, k) of least t + k, then t, with `aid(fp_rate(t, c), cg_rate(k, kappa), c)` ≤ `tol`.

    Assumed, not checked: what `aid` and `cg_rate` assume; κ that of I − ∂₁Φ at every w_t.
    Cost: up to about 2k evaluations of the bound, on the host: seconds at κ = 10⁸.
    When not to use it: see `itd_steps`.

    Args:
        tol: absolute tolerance on the hypergradient, > 0.
        c: constants, scalars, with a contraction and a symmetric J.
        kappa: condition number κ ≥ 1 of I − J.

    Returns:
        The pair (t, k) of integers.

    Raises:
        TypeError: an argument is traced or not a scalar.
        ValueError: `tol` is not positive and finite, `kappa` is less than 1 or not finite, or `c`
            has a bad constant.
        OverflowError: `kappa` is so large, above about 10³¹, that the rate of `cg` rounds to 1.

    >>> c = contraction_constants(q=0.8, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid_cg_steps(1e-3, c, kappa=9.0), aid_fp_steps(1e-3, c)
    ((50, 19), 50)
    """
    c, kappa = jax.tree.map(float, (c, kappa))
    t = _first(lambda t, c: aid(fp_rate(t, c), 0.0, c), tol, c)
    k = _first(lambda k, c: aid(fp_rate(t, c), cg_rate(k, kappa), c), tol, c)
    best = t, k
    while t < sum(best):  # The k that `tol` needs only falls as t grows.
        t += 1
        while k > 0 and aid(fp_rate(t, c), cg_rate(k - 1, kappa), c) <= tol:
            k -= 1
        best = min(best, (t, k), key=sum)
    return best


def _first(bound: Rate, tol: float, c: Any) -> int:
    """Smallest n ≥ 0 with bound(n, c) ≤ tol, for a bound that crosses tol once if above it at 0."""
    tol, c = jax.tree.map(float, (tol, c))  # Double precision; a traced or batched `c` raises here.
    _require(0 < tol < math.inf, "tol", tol, "be positive and finite", "no bound is ever zero")
    low, high = -1, 0
    while not bound(high, c) <= tol:  # Not `>`, which a nan would end.
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle, c) <= tol else (middle, high)
    return high


def _count(name: str, n: Real, *like: Real) -> Real:
    """`n` ≥ 0, an array in the real dtype of `like`: integer arrays do not promote strictly."""
    _require(n >= 0, name, n, "be non-negative", "it is a number of steps")
    return n if isinstance(n, int | float) else jnp.asarray(n, jnp.result_type(1.0, *like))


def _require(holds: bool | jax.Array, name: str, value: object, rule: str, advice: str) -> None:
    if isinstance(holds, jax.core.Tracer) or (holds if isinstance(holds, bool) else holds.all()):
        return
    raise ValueError(f"`{name}` must {rule}, got {value}: {advice}.")


def _check(c: Constants, *, contraction: bool = True) -> Constants:
    advice = "build `c` with `contraction_constants`; without a contraction only `aid` holds"
    known = (c.q > 0) & (c.q < 1)
    _require(known if contraction else known | (c.q != c.q), "q", c.q, "lie in (0, 1)", advice)
    for name in Constants._fields[:-2]:
        x = getattr(c, name)
        _require((x >= 0) & (x < math.inf), name, x, "be finite and ≥ 0", "it bounds a norm")
    _require((c.mu > 0) & (c.mu < math.inf), "mu", c.mu, "be > 0", "1/`mu` bounds ‖(I − ∂₁Φ)⁻¹‖")
    return c


def _check_kappa(kappa: Real) -> None:
    rule = "be finite and at least 1"
    _require((kappa >= 1) & (kappa < math.inf), "kappa", kappa, rule, "it is λmax/λmin of I − ∂₁Φ")


def _check_rho(rho_t: Real) -> None:
    advice = "if ‖w_t − w‖ > ‖w‖, the constants of the ball ‖u‖ ≤ 2D say nothing of w_t"
    _require((rho_t >= 0) & (rho_t <= 1), "rho_t", rho_t, "lie in [0, 1]", advice)
