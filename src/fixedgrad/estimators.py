"""Estimators of the hypergradient: `itd`, `truncated_itd`, `aid`, and `forward` for either mode.

An estimator approximates the products of w'(λ) = (I − J)⁻¹ B with a cotangent or a tangent, where
J = ∂₁Φ and B = ∂₂Φ. To add one, write a function that returns an `Estimator`, and one row of the
table `ESTIMATORS` in `tests/problems.py`.
"""

import inspect

import jax
from jax import lax

from .errors import check_callable, check_count, show
from .linear import auto
from .printing import printed
from .problem import Equation
from .types import (
    Backward,
    Estimator,
    Implicit,
    LinearSolver,
    PyTree,
    Solve,
    Status,
    Unrolled,
    solve_info,
    status_where,
)

_AUTO = auto()


@printed
def itd() -> Estimator:
    """Iterative differentiation: the derivative of the solver's own iterations.

        w_t(λ) as the solver computes it,    λ̄ = w_t'(λ)ᵀ w̄.

    For w_{i+1} = Φ(wᵢ, λ) and q the contraction constant of Φ(·, λ), the error of the hypergradient is
    at most (c₁ + c₂ t/q + c₃) qᵗ. The gradient with respect to the starting point w₀ is that of
    the iterations too, not zero.

    JAX differentiates the solver, in reverse and in forward mode; `forward` changes nothing. Both need
    a number of steps that is fixed, such as `picard` with `num_steps`. A loop that a tolerance on w
    ends says nothing of w': `picard` and `anderson` with `max_steps` are refused, but for `picard` with
    `checkpoints=recursive()`, which sees in reverse mode whether the steps suffice. For a `while_loop`
    of your own JAX has forward mode, and refuses reverse mode.

    Assumed, not checked: for the bound, that the solver iterates Φ, from a w₀ that does not depend
    on λ. Any other solver is differentiated as it is: a `while_loop` of your own that starts at w(λ)
    takes no step, and its derivative is 0.

    Cost: reverse, about t products with Jᵀ, forward t products with J for each tangent. Memory:
    reverse, all t iterates, or as few of them as `checkpoints` of `picard` has it; forward 2 w for each
    tangent, whatever t.
    When not to use it: for large t in reverse mode (memory), or for a solver that JAX cannot
    differentiate; `aid` needs neither.

    Returns:
        An `Estimator`.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, fg.itd())(fg.picard(phi, num_steps=3))
    >>> float(jax.grad(lambda lam: solve(0.0, lam))(1.0))  # 1 + 1/2 + 1/4
    1.75

    References:
        Grazzi et al., ICML 2020, Algorithm 1 and Theorem 2.1.
    """
    return Unrolled()


@printed
def truncated_itd(*, num_steps: int) -> Estimator:
    """Truncated iterative differentiation: k more steps of Φ, and only these are differentiated.

        u₀ = w_t (cut),  uᵢ₊₁ = Φ(uᵢ, λ),  w = u_k,    λ̄ = (∂u_k/∂λ)ᵀ w̄.

    With `num_steps=1` this is one-step differentiation, λ̄ = B(w_t)ᵀ w̄. At a fixed point it equals
    `aid(fp(num_steps=k))`: the error is of order qᵏ however large t is. Any solver will do. The
    gradient with respect to the starting point is zero by construction. Second derivatives apply the
    same truncation to the derivative of w_t.

    Assumed, not checked: w_t is near w(λ), and Φ(·, λ) a contraction there.

    Cost: k more evaluations of Φ forward, as many again and k products backward. Memory: k iterates
    in the backward pass only.
    When not to use it: when the error qᵏ of a small k matters; `aid(cg(...))` costs as much.

    Args:
        num_steps: k, the number of differentiated steps.

    Returns:
        An `Estimator`.

    Raises:
        ValueError: `num_steps` is not a positive integer.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, fg.truncated_itd(num_steps=1))(fg.picard(phi, num_steps=50))
    >>> float(jax.grad(lambda lam: solve(0.0, lam))(1.0))
    1.0

    References:
        Shaban, Cheng, Hatch, Boots, Truncated Back-propagation for Bilevel Optimization, AISTATS
        2019; Bolte, Pauwels, Vaiter, One-step differentiation of iterative algorithms, NeurIPS 2023.
    """
    check_count("truncated_itd", "num_steps", num_steps)

    def refine(equation: Equation, w: PyTree, x: PyTree) -> PyTree:
        return lax.fori_loop(0, num_steps, lambda _, u: equation.phi(u, x), w)

    def vjp(equation: Equation, w: PyTree, x: PyTree, w_bar: PyTree, solve: Solve) -> Backward:
        # The cotangent of u₀ is (Jᵀ)ᵏ w̄, the residual of these k steps as steps of FP.
        del solve
        _, pull = jax.vjp(lambda w, x: refine(equation, w, x), w, x)
        u_bar, x_bar = pull(w_bar)
        space = equation.space(w)
        residual = space.size_of(u_bar)
        idle = residual >= space.size_of(w_bar)
        status = status_where(idle & (residual > 0), Status.NO_PROGRESS, Status.FIXED_STEPS)
        return Backward(x_bar, None, solve_info(num_steps, residual, status))

    def jvp(equation: Equation, w: PyTree, x: PyTree, x_dot: PyTree, solve: Solve) -> PyTree:
        del solve
        return jax.jvp(lambda x: refine(equation, w, x), (x,), (x_dot,))[1]

    return Implicit(vjp, jvp, refine)


@printed
def aid(linear_solver: LinearSolver = _AUTO) -> Estimator:
    """Approximate implicit differentiation: a linear system at the last iterate.

    At the lower-level iterate w ≈ w(λ), with J = ∂₁Φ(w, λ) and B = ∂₂Φ(w, λ),

        reverse   (I − Jᵀ) v = w̄,     λ̄ = Bᵀ v,
        forward   (I − J) ẇ = B λ̇.

    The solver of the lower level is never differentiated: it may be any code. The gradient with
    respect to its starting point is zero by construction: w(λ) does not depend on it. Second and
    higher derivatives are implicit too; they linearise Φ in forward mode, which a `jax.custom_vjp` in
    it does not allow.

    Assumed, not checked: Φ is continuously differentiable at w, I − J is invertible there, and w is
    near w(λ): its distance enters the error (Theorem 2.2). A tolerance of the lower-level solver,
    or `with_tolerance`, has the last of these checked; what the linear solver needs of J it says.

    Cost: the products of the linear solver with Jᵀ (J), one with Bᵀ (B), one linearisation of Φ.
    Memory: w and the vectors of the linear solver, whatever the number of iterations.
    When not to use it: where Φ has no unique fixed point near w, or is far from it and not a
    contraction; there `itd` at least differentiates what was computed.

    Args:
        linear_solver: `fp`, `cg`, `normal_cg`, `gmres`, `bicgstab`, `dense`, or any function of the
            same signature `(matvec, b, x0=None) -> (x, info)`. By default `auto()`: elimination for few
            unknowns, else GMRES.

    Returns:
        An `Estimator`.

    Raises:
        TypeError: `linear_solver` does not take (matvec, b); when called, it does not return a pair
            (x, info) with x like b and info a `SolveInfo`.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, fg.aid(fg.fp(num_steps=3)))(fg.picard(phi, num_steps=50))
    >>> float(jax.grad(lambda lam: solve(0.0, lam))(1.0))  # 1 + 1/2 + 1/4, of 2
    1.75

    References:
        Grazzi et al., ICML 2020, Algorithm 2 and Theorem 2.2; Pedregosa, Hyperparameter
        optimization with approximate gradient, ICML 2016.
    """
    check_linear_solver("aid", linear_solver)

    def vjp(equation: Equation, w: PyTree, x: PyTree, w_bar: PyTree, solve: Solve) -> Backward:
        at = equation.vjp(w, x)
        v, info = solve(linear_solver, at.j, w_bar)
        return Backward(at.b(v), v, info, at.residual)

    def jvp(equation: Equation, w: PyTree, x: PyTree, x_dot: PyTree, solve: Solve) -> PyTree:
        at = equation.jvp(w, x)
        return solve(linear_solver, at.j, at.b(x_dot))[0]

    return Implicit(vjp, jvp, linear_solver=linear_solver)


def forward(estimator: Estimator) -> Estimator:
    """The same estimate with every derivative mode: `jvp`, `jacfwd` and `linearize` work as well.

    `fixed_point` then installs the forward rule as a `jax.custom_jvp`; JAX derives the reverse mode
    by transposing its linear solve, which runs the same linear solver on Jᵀ. So `grad` gives the same
    numbers as without `forward`, to rounding.

    `itd()` has every mode by itself and is returned as it is; the explicit form, `hypergradient`,
    takes reverse mode only and sees no difference.

    Assumed, not checked: the linear solver is as right for J as for Jᵀ; the `jvp` of an estimator
    of your own is linear in the tangents, as JAX must transpose it, and agrees with its `bwd`.

    Cost: as the estimator's; forward mode one solve for each tangent. Memory: as the estimator's in
    reverse mode; `itd` in forward mode holds no iterates.
    When not to use it: where Φ holds a `jax.custom_vjp`, which JAX cannot differentiate in forward
    mode. All derivatives of `forward(aid(...))` are refused then, and of `aid(...)` the second ones;
    `truncated_itd` has both in reverse mode. A solver within Φ, decorated with `forward(...)` itself,
    has every mode.

    Args:
        estimator: `itd()`, `truncated_itd(...)`, `aid(...)` or another `Estimator`.

    Returns:
        An `Estimator`.

    Raises:
        TypeError: `estimator` is not an `Estimator`.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> solve = fg.fixed_point(phi, fg.forward(fg.aid(fg.dense())))(fg.picard(phi, num_steps=50))
    >>> float(jax.jacfwd(lambda lam: solve(0.0, lam))(1.0))
    2.0

    References:
        Grazzi et al., ICML 2020, equation (4); Radul, Paszke, Frostig, Johnson, Maclaurin, You Only
        Linearize Once: Tangents Transpose to Gradients, POPL 2023.
    """
    check_estimator("forward", estimator)
    if isinstance(estimator, Unrolled):
        return estimator
    return estimator._replace(every_mode=True, name=f"forward({estimator!r})")


def check_estimator(where: str, estimator: object) -> None:
    """Raises `TypeError` unless `estimator` is an `Estimator`."""
    if not isinstance(estimator, Implicit | Unrolled):
        raise TypeError(
            f"`estimator` of `{where}` must be an `Estimator` such as `itd()` or `aid(cg(...))`, got "
            f"{show(estimator)}. Call a factory, as in `itd()`; a linear solver goes inside: "
            "`aid(cg(num_steps=10))`."
        )


def check_linear_solver(where: str, linear_solver: object) -> None:
    """Raises `TypeError` unless `linear_solver` is a function that takes (matvec, b)."""
    check_callable(
        where, "linear_solver", linear_solver, "linear_solver(matvec, b, x0=None) -> (x, info)"
    )
    try:
        inspect.signature(linear_solver).bind(None, None)  # pyright: ignore[reportArgumentType]
    except ValueError:  # No signature to be had.
        return
    except TypeError as error:
        raise TypeError(
            f"`linear_solver` of `{where}` must take `(matvec, b, x0=None)`, got "
            f"{show(linear_solver)}: {error}. Call a factory, as in `cg(num_steps=10)`."
        ) from None


AID = aid()
"""What `fixed_point`, `root` and `hypergradient` take by default."""
