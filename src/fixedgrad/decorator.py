"""`fixed_point`: the decorator that gives any solver of w = Φ(w, λ) the derivatives of an estimator.

The only place that gives derivatives by `jax.custom_vjp` and `jax.custom_jvp`; `from_host` has a
`jax.custom_jvp` too, which refuses them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .estimators import check_estimator, run_linear_solver
from .failure import check_on_failure, enforce, enforce_value
from .lower import held_to_phi, iterates, solve_with_info
from .packing import (
    SOLVED,
    Layout,
    check_arrays,
    check_phi,
    closure_converted,
    partition,
    phi_hint,
    split_static,
    zero_tangent,
)
from .replication import casts, hoisted, varying_axes, within_shard_map
from .signatures import same_arguments
from .types import (
    Decorated,
    Estimator,
    LinearSolver,
    MatVec,
    OnFailure,
    Phi,
    PyTree,
    SolveInfo,
    Solver,
    check_callable,
    check_same,
    hint,
    shapes_of,
    show,
)

_BACKWARD = "linear solve of the derivative"
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
    "`jax.custom_jvp`."
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
    as much as w itself is seen (`NOT_FIXED`). Use `checked` or a tolerance in `picard` to have more
    checked. Nor that Φ is a pure function: what it draws from NumPy's or Python's random generators
    is drawn once, while it is traced, and is a constant of the compiled program ever after (pass a key
    of `jax.random` as an argument); NumPy on a traced w is an error of JAX.

    Cost: the solver's, and one Φ where that was not made for this Φ; for derivatives the
    estimator's.
    Memory: w and the arguments are kept for the backward pass, nothing else (`itd`: all iterates).
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
        run = _unrolled if estimator.mode == "unroll" else _implicit

        def call(informed: bool, layout: Layout, arrays: list[jax.Array]) -> PyTree:
            w0, args, kwargs = layout.join(arrays)
            w, aux, info = run(phi, solver, estimator, has_aux, on_failure, w0, args, kwargs)
            aux, info = lax.stop_gradient((aux, info))
            if not informed:  # Who gets the info decides by it.
                w = enforce_value(on_failure, "lower-level solve", info, w)
            out = (w, aux) if has_aux else w
            return (out, info) if informed else out

        # A traced tolerance ties the rule to its trace: a jit of our own inside could not hold it.
        compiled = call if estimator.traced else jax.jit(call, static_argnums=(0, 1))

        def entry(informed: bool) -> Callable[..., PyTree]:
            def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
                check(args, kwargs)
                check_arrays("fixed_point", "w0", w0)
                with _no_custom_vjp(_FORWARD_MODE if estimator.mode == "reverse" else _FORWARD_PHI):
                    return compiled(informed, *split_static((w0, args, kwargs)))

            # Not its attributes: a `with_info` of the solver would go around the rule.
            return functools.wraps(solver, updated=())(solve)

        solve: Any = entry(informed=False)
        # Without it a decorated solver inside another would hide that it failed.
        solve.with_info = entry(informed=True)
        solve.phi = getattr(solver, "phi", None)
        return solve

    return decorate


@contextmanager
def _no_custom_vjp(text: str) -> Iterator[None]:
    """Says what to do instead where JAX refuses forward mode of a `custom_vjp`; once."""
    try:
        yield
    except TypeError as error:
        told = any("fixedgrad.forward(" in note for note in getattr(error, "__notes__", ()))
        if "custom_vjp" in str(error) and not told:
            error.add_note(text)
        raise


def _unrolled(
    phi: Phi,
    solver: Solver,
    estimator: Estimator,
    has_aux: bool,
    on_failure: OnFailure,
    w0: PyTree,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[PyTree, PyTree, SolveInfo | None]:
    """JAX differentiates the solver's own iterations: there is no rule."""
    del estimator, on_failure
    w, aux, info = _run(solver, has_aux, w0, args, kwargs)
    check_phi("fixed_point", phi, w, SOLVED, args, kwargs)
    return w, aux, info


def _implicit(
    phi: Phi,
    solver: Solver,
    estimator: Estimator,
    has_aux: bool,
    on_failure: OnFailure,
    w0: PyTree,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[PyTree, PyTree, SolveInfo | None]:
    """The estimator's rule, on functions that depend on nothing but their arguments.

    The rule is installed on `apply(w0, x, rest)`: `x` are the inexact leaves of the arguments and of
    what Φ closes over, `rest` everything else. The solution map `implicit` below has the forward rule
    in every mode, since second derivatives differentiate the iterate w in the residuals.
    """
    # What Φ and the solver close over becomes an argument, so that it is differentiated, and so
    # that Python code runs once.
    *given, join_given = partition((args, kwargs))

    def run_given(w0: PyTree, x: PyTree, rest: PyTree) -> PyTree:
        args, kwargs = join_given(x, rest)
        return _run(solver, has_aux, w0, args, kwargs)

    def phi_given(w: PyTree, x: PyTree, rest: PyTree) -> PyTree:
        args, kwargs = join_given(x, rest)
        with phi_hint("fixed_point", w, args, kwargs):
            return phi(w, *args, **kwargs)

    run, run_closure = closure_converted(run_given, w0, *given)
    w_like = jax.eval_shape(lambda: run(w0, *given, *run_closure)[0])
    with jax.default_matmul_precision("highest"):
        image, phi_closure = closure_converted(phi_given, w_like, *given)
    closed, got = jax.make_jaxpr(image, return_shape=True)(w_like, *given, *phi_closure)
    check_same("fixed_point", got, w_like, "`phi(w, ...)`", SOLVED)

    x, rest, join = partition((given, phi_closure, run_closure))
    _, _, join_w = partition(w_like)

    def run_packed(w0: PyTree, x: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        given, _, closure = join(x, rest)
        w, aux, info = run(w0, *given, *closure)
        w_x, w_rest, _ = partition(w)
        if not iterates(solver, phi):
            start = partition(w0)[0]
            info = held_to_phi(lambda w_x: phi_packed(rest, w_rest)(w_x, x), start, w_x, info)
        return w_x, (w_rest, aux, info)

    def phi_packed(rest: PyTree, w_rest: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
        def packed(w_x: PyTree, x: PyTree) -> PyTree:
            given, closure, _ = join(x, rest)
            return partition(image(join_w(w_x, w_rest), *given, *closure))[0]

        return packed

    solve = functools.partial(_implicit_solve, on_failure)

    @jax.custom_jvp
    def implicit(w0: PyTree, x: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        return run_packed(w0, x, rest)  # Never differentiated.

    def tangent(primals: Any, tangents: Any) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        (w0, x, rest), (_, x_dot, _) = primals, tangents
        w_t, extra = solved = implicit(w0, x, rest)
        primals, tangents = (w0, x), (zero_tangent(w0), x_dot)
        phi = phi_packed(rest, extra[0])
        with _no_custom_vjp(_FORWARD_PHI):
            out = estimator.jvp(phi, lambda *_: solved, primals, tangents, solve)
        return w_t, out.w, extra, (out.w_dot, zero_tangent(extra))

    @implicit.defjvp
    def implicit_jvp(primals: Any, tangents: Any) -> Any:
        w_t, _, extra, extra_dot = tangent(primals, tangents)
        return (w_t, extra), extra_dot

    def fwd(w0: PyTree, x: PyTree, rest: PyTree) -> Any:
        _, extra = solved = implicit(w0, x, rest)
        phi = phi_packed(rest, extra[0])
        w, extra, residuals = estimator.fwd(phi, lambda *_: solved, w0, x)
        return (w, extra), (residuals, rest, extra[0])

    def bwd(kept: Any, bars: Any) -> Any:
        (residuals, rest, w_rest), (w_bar, _) = kept, bars
        back = estimator.bwd(phi_packed(rest, w_rest), residuals, w_bar, solve)
        return None, enforce(on_failure, _BACKWARD, back.info, back.args_bar), None

    # JAX runs the `bwd` of a `custom_vjp` outside a `vmap` within which it differentiates, where the
    # name of its axis is not bound any more. The transpose of a `custom_jvp` does not need the name.
    in_batch = any(hasattr(effect, "name") for effect in closed.effects) and not within_shard_map()
    if estimator.mode == "reverse" and not in_batch:
        apply = jax.custom_vjp(lambda *operands: fwd(*operands)[0])
        apply.defvjp(fwd, bwd)
    else:
        apply = jax.custom_jvp(lambda *operands: fwd(*operands)[0])

        @apply.defjvp
        def apply_jvp(primals: Any, tangents: Any) -> Any:
            _, w, extra, out_dot = tangent(primals, tangents)
            return (w, extra), out_dot

    w_x, (w_rest, aux, info) = apply(w0, x, rest)
    return join_w(w_x, w_rest), aux, info


def _run(
    solver: Solver, has_aux: bool, w0: PyTree, args: PyTree, kwargs: PyTree
) -> tuple[PyTree, PyTree, SolveInfo | None]:
    """(w, aux, info) of a solver; `aux` is `()` without `has_aux`."""
    with hint(*_NEEDS_VALUES, text=lambda: _FROM_HOST):
        out, info = solve_with_info(solver, w0, *args, **kwargs)
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
    return jax.tree.map(jnp.asarray, w), aux, info


def _implicit_solve(
    on_failure: OnFailure, linear_solver: LinearSolver, matvec: MatVec, b: PyTree
) -> tuple[PyTree, None]:
    """(I − M) x = b with its own derivative rule, in both modes, and with the policy inside.

    From (I − M) x = b follows (I − M) ẋ = ḃ + Ṁ x; `lax.custom_linear_solve` differentiates so, and
    transposes to (I − Mᵀ). The policy is applied within each of these solves: outside, its factor
    would depend on the tangent, and JAX could not transpose the tangent map any more.
    """

    def solve_with(matvec: MatVec) -> Callable[[PyTree], PyTree]:
        def solve(rhs: PyTree) -> PyTree:
            # M, not the I − M that `custom_linear_solve` offers: x − (x − M x) would lose digits.
            x, info = run_linear_solver(linear_solver, matvec, rhs)
            return enforce(on_failure, _BACKWARD, info, x)

        return solve

    def transpose(matvec: MatVec) -> MatVec:
        return lambda u: jax.linear_transpose(matvec, b)(u)[0]

    def residual(matvec: MatVec) -> MatVec:
        return lambda u: jax.tree.map(jnp.subtract, u, matvec(u))

    if not within_shard_map():
        x = lax.custom_linear_solve(
            residual(matvec),
            b,
            lambda _, rhs: solve_with(matvec)(rhs),
            lambda _, rhs: solve_with(transpose(matvec))(rhs),
        )
        return x, None

    # With sharded data and replicated w, the products vary over devices inside and end in a sum over
    # them. `custom_linear_solve` knows one type only: if anything varies, everything does. So all
    # that enters or leaves it wears that type, and is taken back to its own inside, where the
    # products are: one collective a solve for each array, none more a product.
    apply, consts = hoisted(matvec, b)
    axes = varying_axes((consts, b))
    of_consts, of_b = casts(consts, axes), casts(b, axes)
    consts = of_consts.varying(consts)

    def inside(rule: Callable[[MatVec], MatVec]) -> MatVec:
        def wrapped(u: PyTree) -> PyTree:
            matvec = functools.partial(apply, of_consts.own(consts))
            return of_b.varying(rule(matvec)(of_b.own(u)))

        return wrapped

    x = lax.custom_linear_solve(
        inside(residual),
        of_b.varying(b),
        lambda _, rhs: inside(solve_with)(rhs),
        lambda _, rhs: inside(lambda matvec: solve_with(transpose(matvec)))(rhs),
    )
    return of_b.own(x), None
