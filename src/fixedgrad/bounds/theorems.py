"""Bounds on iterates, their derivatives and hypergradients: Proposition 2.1, Theorems 2.1 to 2.4."""

from .constants import Constants, Real, check_constants, constants, count, require
from .rates import Rate, fp_rate


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

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=4, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> iterate(3, c)
    0.5
    """
    check_constants(c)
    return c.q ** count("t", t, *c) * c.D


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

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> jacobian(2, c)
    2.5
    """
    # w_t′ − w′ = J_{t−1} (w_{t−1}′ − w′) + (J_{t−1} − J) w′ + (B_{t−1} − B), so the errors obey
    # e_t ≤ q e_{t−1} + (ν₁ ‖w′‖ + ν₂) D qᵗ⁻¹ and e₀ = ‖w′‖: after t steps, t equal terms and qᵗ e₀.
    check_constants(c)
    dw = c.L_Phi / (1 - c.q)
    return ((c.nu2 + c.nu1 * dw) * c.D * (count("t", t, *c) / c.q) + dw) * fp_rate(t, c)


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

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> itd(2, c)
    5.5
    """
    # [∇₂E(w_t) − ∇₂E(w)] + w′ᵀ [∇₁E(w_t) − ∇₁E(w)] + (w_t′ − w′)ᵀ ∇₁E(w_t): the first two are at
    # most c₁ qᵗ, the last L_E `jacobian(t)`.
    c1, c2, c3 = constants(c)
    return (c1 + c2 * (count("t", t, *c) / c.q) + c3) * fp_rate(t, c)


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

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid(0.25, 0.125, c)
    3.0
    """
    # [∇₂E(w_t) − ∇₂E(w)] + B_tᵀ (v_{t,k} − v_t) + (B_t − B)ᵀ v_t + Bᵀ (v_t − v) with ‖v_t‖ ≤ L_E/μ;
    # (I − J)ᵀ (v_t − v) = [∇₁E(w_t) − ∇₁E(w)] + (J_t − J)ᵀ v_t, ‖v_t − v‖ ≤ (η₁ + ν₁ ‖v_t‖) Dρ/μ.
    check_constants(c, contraction=False)
    _check_rho(rho_t)
    require(sigma_k >= 0, "sigma_k", sigma_k, "be non-negative", "it is a ratio of two norms")
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

    >>> from fixedgrad.bounds import contraction_constants
    >>> c = contraction_constants(q=0.5, D=1, L_E=2, L_Phi=1, nu1=1, nu2=0, eta1=1, eta2=0)
    >>> aid_fp(2, 2, c), aid_fp(2, 2, c, rho=lambda t, c: 0.0)
    (3.0, 1.0)
    """
    # For e_k = v_{t,k} − v: e_k = J_tᵀ e_{k−1} + [∇₁E(w_t) − ∇₁E(w)] + (J_t − J)ᵀ v. With ‖v‖ ≤
    # L_E/(1−q), S = (1−qᵏ)/(1−q): ‖e_k‖ ≤ qᵏ ‖v‖ + S (η₁ + ν₁ ‖v‖) Dρ and ‖v_{t,k}‖ ≤ S L_E. Insert
    # into Bᵀ e_k + (B_t − B)ᵀ v_{t,k}. Here η₁ too has S, not 1/(1−q): (21) could be smaller.
    c1, c2, c3 = constants(c)
    rho_t, sigma_k = rho(count("t", t, *c), c), fp_rate(k, c)
    _check_rho(rho_t)
    return (c1 + c2 * ((1 - sigma_k) / (1 - c.q))) * rho_t + c3 * sigma_k


def _check_rho(rho_t: Real) -> None:
    advice = "if ‖w_t − w‖ > ‖w‖, the constants of the ball ‖u‖ ≤ 2D say nothing of w_t"
    require((rho_t >= 0) & (rho_t <= 1), "rho_t", rho_t, "lie in [0, 1]", advice)
