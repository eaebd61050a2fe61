"""`fixed_point`: the decorator that gives any solver of w = Φ(w, λ) the derivatives of an estimator.

The only place that gives derivatives of w(λ) by `jax.custom_vjp` and `jax.custom_jvp`. `recursive` has
a `jax.custom_vjp` for its own steps; `from_host` and solvers with a tolerance have a `jax.custom_jvp`
that refuses them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .compiled import Compiled
from .errors import check_callable, check_same, hint, no_custom_vjp, shapes_of, show
from .estimators import check_estimator
from .failure import check_on_failure, enforce, enforce_value
from .leaves import (
    SOLVED,
    check_arrays,
    check_phi,
    closes_over_tracers,
    closure_converted,
    partition,
    within_shard_map,
    zero_tangent,
)
from .linear.implicit import STAGE, implicit_solve, linear_solve
from .linear.system import Reusable
from .lower import held_to_phi, iterates, sharing, solve_with_info
from .mapped_axes import run_if
from .problem import Equation, precise
from .signatures import same_arguments
from .types import (
    Decorated,
    Estimator,
    Implicit,
    LinearSolver,
    MatVec,
    OnFailure,
    Phi,
    PyTree,
    Solve,
    SolveInfo,
    Solver,
    Unrolled,
    solve_info,
)

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_FROM_HOST = (
    "`fixed_point` traces the solver, as `jax.jit` does. A solver in NumPy or SciPy, or Python code "
    "that needs concrete values, goes through `fixedgrad.from_host`."
)
_FORWARD_MODE = (
    "`fixed_point` was given an estimator that has reverse mode alone: for `jvp`, `jacfwd` and "
    "`linearize`, and for second derivatives of what holds this solver, decorate it with "
    "`fixedgrad.forward(estimator)`."
)
_FORWARD_PHI = (
    "`fixed_point` differentiates `phi` in forward mode here, as `forward(...)`, `itd()` in a `jvp` "
    "and second derivatives of `aid` do, and a `jax.custom_vjp` in `phi` does not allow it: decorate a "
    "solver in `phi` with `fixedgrad.forward(...)` of its estimator, and write a function as a "
    "`jax.custom_jvp`. The solver may hold one as well: `picard` with `checkpoints=recursive()` does, "
    "and with `nested()` it does not."
)


def fixed_point(
    phi: Phi, estimator: Estimator, *, has_aux: bool = False, on_failure: OnFailure = "nan"
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
        estimator: `itd()`, `truncated_itd(...)`, `aid(...)`, `forward(...)`.
        has_aux: The solver returns `(w, aux)`; so does the decorated solver, with `aux` detached: its
            derivative is zero by construction. An `aux` that is a `SolveInfo` is the solver's verdict
            on itself too.
        on_failure: What becomes of w and of its derivatives when a solve behind them failed, that is
            missed its tolerance or broke down (`Status`): "nan" (each element of a batch by itself),
            "zero", "warn", "raise" or "ignore". Exact `num_steps` fail where they have led nowhere, not
            for lack of accuracy. Under "zero" the derivatives of a failed element are zero and its w
            stays as it is, so that one element of a batch does not ruin what all share. "warn" and
            "raise" call back to the host.

    Returns:
        A decorator of solvers `solver(w0, *args, **kwargs) -> w`. The decorated solver has a
        `with_info(w0, *args, **kwargs) -> (w, info)`, with `has_aux` `((w, aux), info)`: what the
        solver says of itself, detached; the residual alone where it says nothing, `None` under `itd`.

    Raises:
        TypeError: `phi` or the solver is not callable, `estimator` is not an `Estimator`, `has_aux`
            not a bool; Φ and the solver name their parameters in another order; when called, a
            parameter that is not given has another default in Φ than in the solver, or Φ(w) differs
            from w in structure, shapes or dtypes.
        ValueError: `on_failure` is none of the four.

    >>> import fixedgrad as fg
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
    check_estimator("fixed_point", estimator)
    check_on_failure("fixed_point", on_failure)
    if not isinstance(has_aux, bool):
        raise TypeError(f"`has_aux` of `fixed_point` must be a bool, got {show(has_aux)}.")

    def decorate(solver: Solver) -> Decorated:
        check_callable("fixed_point", "solver", solver, "solver(w0, *args) -> w")
        check = same_arguments("fixed_point", phi, solver)
        reusable = None
        if isinstance(estimator, Implicit):
            reusable = Reusable.of(estimator.linear_solver)

        def call(informed: bool, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
            if isinstance(estimator, Unrolled):
                w, aux, info, _ = _run(solver, has_aux, None, w0, args, kwargs)
                check_phi("fixed_point", phi, w, SOLVED, args, kwargs)
            else:
                run = functools.partial(_run, solver, has_aux, reusable)
                judged = not iterates(solver, phi)
                w, aux, info = _implicit(
                    phi, run, judged, estimator, reusable, on_failure, w0, args, kwargs
                )
            aux, info = lax.stop_gradient((aux, info))
            if not informed:  # Who gets the info decides by it.
                w = enforce_value(on_failure, "lower-level solve", info, w)
            out = (w, aux) if has_aux else w
            return (out, info) if informed else out

        refused = _FORWARD_PHI
        if isinstance(estimator, Implicit) and not estimator.every_mode:
            refused = _FORWARD_MODE

        def entry(informed: bool) -> Callable[..., PyTree]:
            run = Compiled(functools.partial(call, informed))

            def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
                check(args, kwargs)
                check_arrays("fixed_point", "w0", w0)
                with no_custom_vjp(refused):
                    return run(w0, *args, **kwargs)

            # Not its attributes: a `with_info` of the solver would go around the rule.
            return functools.wraps(solver, updated=())(solve)

        solve: Any = entry(informed=False)
        # Without it a decorated solver inside another would hide that it failed.
        solve.with_info = entry(informed=True)
        solve.phi = getattr(solver, "phi", None)
        return solve

    return decorate


def _implicit(
    phi: Phi,
    run: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, SolveInfo | None, PyTree]],
    judged: bool,
    estimator: Implicit,
    reusable: Reusable | None,
    on_failure: OnFailure,
    w0: PyTree,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[PyTree, PyTree, SolveInfo | None]:
    """The estimator's rule, on functions that depend on nothing but their arguments.

    The rule is installed on `apply(w0, x, rest, held)`: `x` are the inexact leaves of the arguments and
    of what Φ and the solver close over, `rest` everything else, `held` what the estimator closes over,
    such as a tolerance, which is constant. The solution map `implicit` below has the forward rule in
    every mode, since second derivatives differentiate the iterate w in the residuals.

    Args:
        phi: Φ.
        run: `(w0, args, kwargs) -> (w, aux, info, made)`, the solver.
        judged: Whether w is to be held to Φ, since the solver may not have been.
        estimator: Whose rule it is.
        reusable: Its linear solver, where the solver may have `made` the state of its preconditioner.
        on_failure: The policy of solves for derivatives.
        w0: The start.
        args: The arguments after it.
        kwargs: Those by keyword.
    """
    # What Φ and the solver close over becomes an argument, so that it is differentiated, and so
    # that Python code runs once.
    *given, join_given = partition((args, kwargs))
    solver = closure_converted(lambda w0, *given: run(w0, *join_given(*given)), w0, *given)
    w_like = solver.shapes[0]
    function, by_residual = precise("fixed_point", phi)

    def at_given(w: PyTree, *given: PyTree) -> PyTree:
        args, kwargs = join_given(*given)
        return function(w, *args, **kwargs)

    image = closure_converted(at_given, w_like, *given)
    check_same("fixed_point", image.shapes, w_like, "`phi(w, ...)`", SOLVED)
    x, rest, join = partition((given, image.values, solver.values))
    *_, join_w = partition(w_like)

    def run_packed(w0: PyTree, x: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        given, _, closure = join(x, rest)
        w, aux, info, made = solver.function(w0, *given, *closure)
        w_x, w_rest, _ = partition(w)
        if judged:
            info = held_to_phi(equation(rest, w_rest), partition(w0)[0], w_x, x, info)
        return w_x, ((w_rest, made), aux, info)

    def equation(rest: PyTree, w_rest: PyTree) -> Equation:
        def packed(w_x: PyTree, x: PyTree) -> PyTree:
            given, closure, _ = join(x, rest)
            return partition(image.function(join_w(w_x, w_rest), *given, *closure))[0]

        return Equation(packed, by_residual, image.jaxpr)

    def solve_linearly(
        linear_solver: LinearSolver, matvec: MatVec, b: PyTree
    ) -> tuple[PyTree, SolveInfo]:
        unknown = solve_info(0, jnp.zeros(()), 0)
        return linear_solve(on_failure, linear_solver, matvec, b), unknown

    def at_found(
        solve: Solve, w: PyTree, x: PyTree, rest: PyTree, found: PyTree
    ) -> tuple[Equation, Solve]:
        """The equation, and `solve` with the preconditioner that was made on the way to w.

        Where that was of no use at the end of the way, it is made anew at w.
        """
        w_rest, made = found
        at = equation(rest, w_rest)

        def solve_sharing(
            linear_solver: LinearSolver, matvec: MatVec, b: PyTree
        ) -> tuple[PyTree, SolveInfo]:
            known = reusable
            if known is None or made is None or linear_solver is not known.linear_solver:
                return solve(linear_solver, matvec, b)
            u, y, (state, useful) = lax.stop_gradient((w, x, made))
            state = run_if(~useful, lambda: known.state(at.vjp(u, y).j, u), state)
            return solve(known.using(state, transposed=True), matvec, b)

        return at, solve_sharing

    def pull_at(w: PyTree, x: PyTree, rest: PyTree, found: PyTree, w_bar: PyTree) -> PyTree:
        at, solve = at_found(functools.partial(implicit_solve, on_failure), w, x, rest, found)
        back = estimator.vjp(at, w, x, w_bar, solve)
        return enforce(on_failure, STAGE, back.info, back.x_bar)

    def push_at(w: PyTree, x: PyTree, rest: PyTree, found: PyTree, x_dot: PyTree) -> PyTree:
        at, solve = at_found(solve_linearly, w, x, rest, found)
        with no_custom_vjp(_FORWARD_PHI):
            return estimator.jvp(at, w, x, x_dot, solve)

    pull: Callable[..., PyTree] = pull_at
    push: Callable[..., PyTree] = push_at
    held: tuple[list[Any], list[Any]] = [], []
    if closes_over_tracers(estimator):
        # A rule runs when JAX comes to it, maybe after the trace that it closes over has ended.
        w_x, w_rest, _ = partition(w_like)
        found = w_rest, solver.shapes[3]
        converted = (
            closure_converted(pull_at, w_x, x, rest, found, w_x),
            closure_converted(push_at, w_x, x, rest, found, x),
        )
        pull, push = (c.function for c in converted)
        held = lax.stop_gradient((converted[0].values, converted[1].values))

    @jax.custom_jvp
    def implicit(w0: PyTree, x: PyTree, rest: PyTree, held: PyTree) -> tuple[PyTree, PyTree]:
        del held
        return run_packed(w0, x, rest)  # Never differentiated.

    def refined(w: PyTree, x: PyTree, rest: PyTree, extra: PyTree) -> PyTree:
        return estimator.refine(equation(rest, extra[0][0]), w, x)

    def solved(w0: PyTree, x: PyTree, rest: PyTree, held: PyTree) -> tuple[PyTree, PyTree]:
        w, extra = implicit(w0, x, rest, held)
        return refined(w, x, rest, extra), extra

    def fwd(w0: PyTree, x: PyTree, rest: PyTree, held: PyTree) -> Any:
        w, extra = implicit(w0, x, rest, held)
        return (refined(w, x, rest, extra), extra), (w, x, rest, extra[0], held)

    def bwd(kept: Any, bars: Any) -> Any:
        *at, (held_pull, _) = kept
        return None, pull(*at, bars[0], *held_pull), None, None

    def forward_rule(refine: Callable[..., PyTree], primals: Any, tangents: Any) -> Any:
        (_, x, rest, (_, held_push)), (_, x_dot, *_) = primals, tangents
        w, extra = implicit(*primals)
        w_dot = push(w, x, rest, extra[0], x_dot, *held_push)
        return (refine(w, x, rest, extra), extra), (w_dot, zero_tangent(extra))

    implicit.defjvp(functools.partial(forward_rule, lambda w, *_: w))

    # JAX runs the `bwd` of a `custom_vjp` outside a `vmap` within which it differentiates, where the
    # name of its axis is not bound any more. The transpose of a `custom_jvp` does not need the name.
    effects = image.jaxpr.effects
    in_batch = any(hasattr(effect, "name") for effect in effects) and not within_shard_map()
    if estimator.every_mode or in_batch:
        apply = jax.custom_jvp(solved)
        apply.defjvp(functools.partial(forward_rule, refined))
    else:
        apply = jax.custom_vjp(solved)
        apply.defvjp(fwd, bwd)

    w_x, ((w_rest, _), aux, info) = apply(w0, x, rest, held)
    return join_w(w_x, w_rest), aux, info


def _run(
    solver: Solver,
    has_aux: bool,
    reusable: Reusable | None,
    w0: PyTree,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[PyTree, PyTree, SolveInfo | None, PyTree]:
    """(w, aux, info, made) of a solver; `aux` is `()` without `has_aux`.

    What it `made` is for the preconditioner that it shares with the estimator, or `None`.
    """
    shared, made = None if has_aux else sharing(solver, reusable), None
    with hint(*_NEEDS_VALUES, text=lambda: _FROM_HOST):
        if shared is None:
            out, info = solve_with_info(solver, w0, *args, **kwargs)
        else:
            out, info, made = shared(None, w0, args, kwargs)
    if out is None or (has_aux and not (isinstance(out, tuple) and len(out) == 2)):
        wanted = "the pair `(w, aux)`, since `has_aux=True`" if has_aux else "w"
        raise TypeError(
            f"The solver under `fixed_point` must return {wanted}, got {shapes_of(out)}."
        )
    w, aux = out if has_aux else (out, ())
    check_arrays("fixed_point", "w", w)
    check_arrays("fixed_point", "aux", aux)
    if info is None and isinstance(aux, SolveInfo):  # As `with_info` of `picard` has it.
        info = aux
    return jax.tree.map(jnp.asarray, w), aux, info, made
