"""The decorators: `fixed_point` for solvers of w = Φ(w, λ), `root` for solvers of F(w, λ) = 0."""

from collections.abc import Callable

from ..errors import check_callable
from ..estimators import AID
from ..failure import Policy
from ..maps import from_residual
from ..monitor import Monitor
from ..types import Decorated, Estimator, OnFailure, Phi, Solver
from .rule import decorator


def fixed_point(
    phi: Phi,
    estimator: Estimator = AID,
    *,
    has_aux: bool = False,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Callable[[Solver], Decorated]:
    """Gives a solver of w = Φ(w, λ) the derivatives of w(λ), as `estimator` approximates them.

        w(λ) = Φ(w(λ), λ),    w'(λ) = (I − J)⁻¹ B,    J = ∂₁Φ, B = ∂₂Φ at the solver's w.

    The decorated solver computes what the solver computes. `grad`, `vjp`, `jacrev`, `hessian`, `jit`
    and `vmap` of it work, in any nesting; with `forward(estimator)` or `itd()` also `jvp`, `jacfwd`
    and `linearize`.

    - All arguments after `w0`, positional or by keyword, go to Φ as they go to the solver, and are
      differentiated: any pytrees. Integers, booleans, PRNG keys and `None` ride along without a
      gradient; leaves that are not arrays (functions, strings) are static. Φ and the solver may
      name them differently; where both give one name to another place or to another default, the
      call is refused.
    - What Φ closes over is differentiated like an argument.
    - `aid` and `truncated_itd` never differentiate the solver: a `while_loop`, a host callback or a
      call of another library will do. The gradient with respect to `w0` is then zero by construction.
    - The decorated solver is compiled once for given shapes. So jit's rule for closures holds: what Φ
      and the solver close over is fixed, or traced by the transformation in which the decorated
      solver is made. Python that needs concrete values goes through `from_host`.
    - Within a `vmap` with an `axis_name` Φ may hold collectives over that axis. The rule is then that
      of `forward(estimator)`.
    - On several devices, arrays that are sharded stay so, and so do their gradients. Within a
      `shard_map` Φ may hold collectives, w replicated or spread along their axes; where it is spread,
      norms and inner products are sums over these axes.
    - Under `vmap` a solve with a tolerance runs until its slowest element is done, the others waiting;
      `jax.lax.map(..., batch_size=...)` runs them one after another, or in chunks of like difficulty.
    - Products with Φ's Jacobians are taken at `jax.default_matmul_precision("highest")`, since the
      default of some accelerators stalls linear solvers near 1e-3. A `precision` that Φ gives
      explicitly is kept.

    Φ must have what the derivative asks of it. Reverse mode, always: no `while_loop` and no
    `jax.custom_batching.custom_vmap`, which have none; a solver within Φ is decorated by itself.
    Forward mode too, for `forward(estimator)` and for second derivatives of `aid`: no
    `jax.custom_vjp`; a solver within Φ is decorated with `forward(...)`. And `vmap` for `dense`.

    Assumed, not checked: that Φ has the fixed point which the solver approaches; a w that Φ moves by
    as much as w itself is seen (`NOT_FIXED`). A tolerance in `picard`, or `with_tolerance`, has more
    checked. Nor that Φ is a pure function: what it draws from NumPy's or Python's random generators
    is drawn once, while it is traced, and is a constant of the compiled program ever after (pass a key
    of `jax.random` as an argument); NumPy on a traced w is an error of JAX.

    Cost: the solver's, and one Φ where that was not made for this Φ; for derivatives the
    estimator's.
    Memory: w and the arguments are kept for the backward pass, nothing else (`itd`: all iterates; a
    `preconditioner` that `newton` and the estimator's linear solver share: its state).
    When not to use it: where the value of f, warm starts or the info of the solves are wanted
    beside the gradient (`hypergradient`); for a cheap loop of a few steps that JAX may as well
    differentiate.
    Programs that call back to the host cannot be exported by `jax.export`: a solver of `from_host`,
    and derivatives under `on_failure` "warn" or "raise".

    Args:
        phi: `phi(w, *args, **kwargs) -> w`.
        estimator: `itd()`, `truncated_itd(...)`, `aid(...)`, `forward(...)`. By default `aid()`, which
            is right for any invertible I − J that it can solve with, and says where it cannot.
        has_aux: The solver returns `(w, aux)`; so does the decorated solver, with `aux` detached: its
            derivative is zero by construction. An `aux` that is a `SolveInfo` is the solver's verdict
            on itself too.
        on_failure: What becomes of w and of its derivatives when a solve behind them failed, that is
            missed its tolerance or broke down (`Status`): "nan" (each element of a batch by itself),
            "zero", "warn", "raise" or "ignore". Exact `num_steps` fail where they have led nowhere, not
            for lack of accuracy. Under "zero" the derivatives of a failed element are zero and its w
            stays as it is, so that one element of a batch does not ruin what all share. "warn" and
            "raise" call back to the host.
        monitor: `monitor(stage, info)`, called on the host with the `SolveInfo` of each solve in its
            order, also in a derivative, where nothing else shows it: `print_info`, or a function of
            yours. `unordered(...)` on several devices. `None` for none.

    Returns:
        A decorator of solvers `solver(w0, *args, **kwargs) -> w`. The decorated solver has a
        `with_info(w0, *args, **kwargs) -> (w, info)`, with `has_aux` `((w, aux), info)`: what the
        solver says of itself, detached; the residual alone where it says nothing, `None` under `itd`.
        This w is the solver's even where it failed, and not NaN: who gets the info decides by it.

    Raises:
        TypeError: `phi`, the solver or `monitor` is not callable, `estimator` is not an `Estimator`,
            `has_aux` not a bool; Φ and the solver name their parameters in another order; when called,
            a parameter that is not given has another default in Φ than in the solver, or Φ(w) differs
            from w in structure, shapes or dtypes.
        ValueError: `on_failure` is none of the five.

    >>> import jax, jax.numpy as jnp, fixedgrad as fg
    >>> def phi(w, lam):
    ...     return jnp.tanh(0.5 * w + lam)
    >>> @fg.fixed_point(phi, fg.aid(fg.cg(num_steps=5)))
    ... def solve(w0, lam):
    ...     return jax.lax.fori_loop(0, 60, lambda _, w: phi(w, lam), w0)
    >>> round(float(jax.grad(lambda lam: solve(jnp.zeros(()), lam))(0.3)), 6)
    1.19787

    References:
        Grazzi et al., ICML 2020, equations (4), (9) and (10).
    """
    check_callable("fixed_point", "phi", phi, "phi(w, *args) -> w")
    policy = Policy.of("fixed_point", on_failure, monitor)
    return decorator("fixed_point", phi, phi, estimator, has_aux, policy)


def root(
    residual: Phi,
    estimator: Estimator = AID,
    *,
    has_aux: bool = False,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Callable[[Solver], Decorated]:
    """Gives any solver of F(w, λ) = 0 the derivatives of w(λ): the implicit function theorem.

        F(w(λ), λ) = 0,    w'(λ) = −(∂₁F)⁻¹ ∂₂F at the solver's w.

    F may be the gradient of a loss, the KKT conditions of a programme, Kepler's equation. This is
    `fixed_point` of Φ = w − F (`from_residual`), with I − J = ∂₁F: all that `fixed_point` says holds
    here, and `cg` serves where F is the gradient of a loss at a minimum, with ∂₁F its Hessian. F may be
    multiplied by any factor.

    Assumed, not checked: that the solver's w is near a root. A w at which F is more than a tenth of the
    terms that it is made of is seen (`NOT_FIXED`), which is no more than the first digit of w;
    `with_tolerance(solver, from_residual(residual), ...)` has a tolerance on ‖F(w)‖ checked.

    Cost: the solver's, and one F with two products of its derivative; for derivatives the estimator's.
    Memory: w and the arguments are kept for the backward pass, nothing else.
    When not to use it: where w = Φ(w, λ) is at hand, whose Φ the solver iterates (`fixed_point`); with
    `fp` and `truncated_itd`, which need w − F(w) to be a contraction.

    Args:
        residual: F, `residual(w, *args, **kwargs)` with structure, shapes and dtypes of w.
        estimator: As in `fixed_point`.
        has_aux: As in `fixed_point`.
        on_failure: As in `fixed_point`.
        monitor: As in `fixed_point`.

    Returns:
        A decorator of solvers `solver(w0, *args, **kwargs) -> w`, as that of `fixed_point`.

    Raises:
        TypeError: `residual` is not callable; else as `fixed_point`.
        ValueError: `on_failure` is none of the five.

    >>> import jax, jax.numpy as jnp, fixedgrad as fg
    >>> def kepler(w, e, m):  # w the eccentric anomaly, e the eccentricity, m the mean anomaly
    ...     return w - e * jnp.sin(w) - m
    >>> solver = fg.newton(fg.from_residual(kepler), max_steps=20, rtol=1e-12)
    >>> solve = fg.root(kepler)(solver)
    >>> w, w_dot = solve(1.0, 0.5, 1.0), jax.grad(solve, argnums=2)(1.0, 0.5, 1.0)
    >>> bool(jnp.isclose(w_dot, 1 / (1 - 0.5 * jnp.cos(w))))
    True

    References:
        Krantz, Parks, The Implicit Function Theorem, 2002; Blondel et al., Efficient and Modular
        Implicit Differentiation, NeurIPS 2022.
    """
    check_callable("root", "residual", residual, "residual(w, *args) -> F(w, lam)")
    policy = Policy.of("root", on_failure, monitor)
    phi = from_residual(residual)
    return decorator("root", phi, residual, estimator, has_aux, policy)
