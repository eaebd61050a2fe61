"""How many steps a given error takes: the bounds inverted, on the host."""

import math
from typing import Any

import jax

from .constants import Constants, require
from .rates import Rate, cg_rate, fp_rate
from .theorems import aid, aid_fp, itd


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

    >>> from fixedgrad.bounds import contraction_constants
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

    >>> from fixedgrad.bounds import contraction_constants
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

    >>> from fixedgrad.bounds import contraction_constants
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
    require(0 < tol < math.inf, "tol", tol, "be positive and finite", "no bound is ever zero")
    low, high = -1, 0
    while not bound(high, c) <= tol:  # Not `>`, which a nan would end.
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle, c) <= tol else (middle, high)
    return high
