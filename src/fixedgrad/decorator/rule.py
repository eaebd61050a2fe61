"""The rule behind `fixed_point` and `root`: the derivatives that an estimator gives to any solver.

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

from ..compiled import Compiled
from ..errors import check_callable, check_same, hint, no_custom_vjp, shapes_of, show
from ..estimators import check_estimator
from ..failure import LOWER_STAGE, STAGE, Policy, enforce, enforce_value
from ..leaves import (
    SOLVED,
    check_arrays,
    check_phi,
    closes_over_tracers,
    closure_converted,
    partition,
    within_shard_map,
    zero_tangent,
)
from ..linear.implicit import implicit_solve, linear_solve
from ..linear.system import Reusable
from ..lower import held_to_phi, iterates, sharing, solve_with_info
from ..mapped_axes import run_if
from ..monitor import emit
from ..problem import Equation, Form, precise
from ..signatures import same_arguments
from ..types import (
    Decorated,
    Estimator,
    Implicit,
    LinearSolver,
    MatVec,
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
    "`{where}` traces the solver, as `jax.jit` does. A solver in NumPy or SciPy, or Python code "
    "that needs concrete values, goes through `fixedgrad.from_host`."
)
_FORWARD_MODE = (
    "`{where}` was given an estimator that has reverse mode alone: for `jvp`, `jacfwd` and "
    "`linearize`, and for second derivatives of what holds this solver, decorate it with "
    "`fixedgrad.forward(estimator)`."
)
_FORWARD_PHI = (
    "`{where}` differentiates `phi` in forward mode here, as `forward(...)`, `itd()` in a `jvp` "
    "and second derivatives of `aid` do, and a `jax.custom_vjp` in `phi` does not allow it: decorate a "
    "solver in `phi` with `fixedgrad.forward(...)` of its estimator, and write a function as a "
    "`jax.custom_jvp`. The solver may hold one as well: `picard` with `checkpoints=recursive()` does, "
    "and with `nested()` it does not."
)


def decorator(
    where: str,
    phi: Phi,
    named: Callable[..., Any],
    estimator: Estimator,
    has_aux: bool,
    policy: Policy,
) -> Callable[[Solver], Decorated]:
    """The decorator `where`; the arguments after w have the names that they have in `named`."""
    check_estimator(where, estimator)
    if not isinstance(has_aux, bool):
        raise TypeError(f"`has_aux` of `{where}` must be a bool, got {show(has_aux)}.")

    def decorate(solver: Solver) -> Decorated:
        check_callable(where, "solver", solver, "solver(w0, *args) -> w")
        check = same_arguments(where, named, solver)
        reusable = None
        if isinstance(estimator, Implicit):
            reusable = Reusable.of(estimator.linear_solver)

        def call(informed: bool, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
            run = functools.partial(_run, where, solver, has_aux, reusable)
            if isinstance(estimator, Unrolled):
                w, aux, info, _ = run(w0, args, kwargs)
                emit(policy.monitor, LOWER_STAGE, info)
                check_phi(where, phi, w, SOLVED, args, kwargs)
            else:
                judged = not iterates(solver, phi)
                w, aux, info = _implicit(
                    where, phi, run, judged, estimator, reusable, policy, w0, args, kwargs
                )
            aux, info = lax.stop_gradient((aux, info))
            if not informed:  # Who gets the info decides by it.
                w = enforce_value(Policy(policy.on_failure), LOWER_STAGE, info, w)
            out = (w, aux) if has_aux else w
            return (out, info) if informed else out

        refused = _FORWARD_PHI.format(where=where)
        if isinstance(estimator, Implicit) and not estimator.every_mode:
            refused = _FORWARD_MODE.format(where=where)

        def entry(informed: bool) -> Callable[..., PyTree]:
            run = Compiled(functools.partial(call, informed))

            def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
                check(args, kwargs)
                check_arrays(where, "w0", w0)
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
    where: str,
    phi: Phi,
    run: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, SolveInfo | None, PyTree]],
    judged: bool,
    estimator: Implicit,
    reusable: Reusable | None,
    policy: Policy,
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
        where: The decorator, for messages.
        phi: Φ.
        run: `(w0, args, kwargs) -> (w, aux, info, made)`, the solver.
        judged: Whether w is to be held to Φ, since the solver may not have been.
        estimator: Whose rule it is.
        reusable: Its linear solver, where the solver may have `made` the state of its preconditioner.
        policy: That of solves for derivatives.
        w0: The start.
        args: The arguments after it.
        kwargs: Those by keyword.
    """
    # What Φ and the solver close over becomes an argument, so that it is differentiated, and so
    # that Python code runs once.
    *given, join_given = partition((args, kwargs))
    solver = closure_converted(lambda w0, *given: run(w0, *join_given(*given)), w0, *given)
    w_like = solver.shapes[0]
    function, form = precise(where, phi)

    def at_given(w: PyTree, *given: PyTree) -> PyTree:
        args, kwargs = join_given(*given)
        return function(w, *args, **kwargs)

    image = closure_converted(at_given, w_like, *given)
    name = "`phi(w, ...)`" if form is not Form.ANY_SCALE else "`residual(w, ...)`"
    check_same(where, image.shapes, w_like, name, SOLVED)
    x, rest, join = partition((given, image.values, solver.values))
    *_, join_w = partition(w_like)

    def run_packed(w0: PyTree, x: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        given, _, closure = join(x, rest)
        w, aux, info, made = solver.function(w0, *given, *closure)
        w_x, w_rest, _ = partition(w)
        if judged:
            info = held_to_phi(equation(rest, w_rest), partition(w0)[0], w_x, x, info)
        emit(policy.monitor, LOWER_STAGE, info)  # Before any solve for a derivative.
        return w_x, ((w_rest, made), aux, info)

    def equation(rest: PyTree, w_rest: PyTree) -> Equation:
        def packed(w_x: PyTree, x: PyTree) -> PyTree:
            given, closure, _ = join(x, rest)
            return partition(image.function(join_w(w_x, w_rest), *given, *closure))[0]

        return Equation(packed, form, image.jaxpr)

    def solve_linearly(
        linear_solver: LinearSolver, matvec: MatVec, b: PyTree
    ) -> tuple[PyTree, SolveInfo]:
        unknown = solve_info(0, jnp.zeros(()), 0)
        return linear_solve(policy, linear_solver, matvec, b), unknown

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
        at, solve = at_found(functools.partial(implicit_solve, policy), w, x, rest, found)
        back = estimator.vjp(at, w, x, w_bar, solve)
        return enforce(policy, STAGE, back.info, back.x_bar)

    def push_at(w: PyTree, x: PyTree, rest: PyTree, found: PyTree, x_dot: PyTree) -> PyTree:
        at, solve = at_found(solve_linearly, w, x, rest, found)
        with no_custom_vjp(_FORWARD_PHI.format(where=where)):
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
    where: str,
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
    with hint(*_NEEDS_VALUES, text=lambda: _FROM_HOST.format(where=where)):
        if shared is None:
            out, info = solve_with_info(solver, w0, *args, **kwargs)
        else:
            out, info, made = shared(None, w0, args, kwargs)
    if out is None or (has_aux and not (isinstance(out, tuple) and len(out) == 2)):
        wanted = "the pair `(w, aux)`, since `has_aux=True`" if has_aux else "w"
        raise TypeError(f"The solver under `{where}` must return {wanted}, got {shapes_of(out)}.")
    w, aux = out if has_aux else (out, ())
    check_arrays(where, "w", w)
    check_arrays(where, "aux", aux)
    if info is None and isinstance(aux, SolveInfo):  # As `with_info` of `picard` has it.
        info = aux
    return jax.tree.map(jnp.asarray, w), aux, info, made
