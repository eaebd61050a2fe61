"""Optimisers of a lower-level loss: `from_optax`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_callable, check_inexact, check_scalar, show
from ..failure import check_on_failure
from ..iteration import Measured, Progress, first_progress, goes_on, stopping, verdict
from ..leaves import eval_shape, stopped_by_residual, strongly_typed
from ..mapped_axes import run_if, steady
from ..maps import gradient_descent
from ..printing import printed
from ..real_form import EVALUATION, Space, nudged, resolution, steepest_ascent
from ..types import OnFailure, PyTree, Scalar, SolveInfo
from .solver import CheckedSolver, exact_steps_info

tree = optax.tree


@printed
def from_optax(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int | None = None,
    max_steps: int | None = None,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """A solver that minimises `loss` with an optax optimiser; `optax.lbfgs()` above all.

    With `max_steps` it stops where ‖∇ℓ(w)‖ ≤ max(rtol ‖∇ℓ(w₀)‖, atol), or where the gradient is
    rounding and has stopped shrinking. Give AID the `gradient_descent` map of the same loss as Φ: it
    has the same fixed points. Under `itd`, which needs `num_steps`, beware of optimisers that divide by
    moments at zero gradient.

    Assumed, not checked: with exact `num_steps`, that they suffice; `with_info` has ‖∇ℓ‖, for one
    gradient more. That a zero of the gradient is the minimum that is meant.

    Cost: one gradient a step; a line search takes several evaluations, whose last one is used again.
    Memory: w, the gradient and the state of the optimiser (all of them at each step under `itd`).
    When not to use it: for a start that moves to the solution, with `rtol` alone: it is relative to the
    gradient there, and asks for ever more; give `atol`.

    Args:
        loss: `loss(w, *args, **kwargs) -> scalar`.
        optimizer: An optax optimiser; a line search, as in `optax.lbfgs`, gets value and loss too.
        num_steps: Exactly that many steps.
        max_steps: At most that many steps, with `rtol` and `atol`.
        rtol: Tolerance on the norm of the gradient, relative to its norm at w₀.
        atol: Absolute tolerance on the norm of the gradient.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver, `solver(w0, *args, **kwargs) -> w`, with `solver.with_info`; the residual in its info
        is the norm of the gradient.

    Raises:
        TypeError: `loss` is not callable, `optimizer` not an optimiser; when called, the loss is
            not a real scalar, or w0 has a leaf that is not inexact; where JAX differentiates the steps
            that a tolerance ends, as `itd` asks for.
        ValueError: For both or none of `num_steps` and `max_steps`, and bad numbers.

    >>> solver = from_optax(lambda w, lam: (w - lam) ** 2, optax.lbfgs(), max_steps=30, rtol=1e-9)
    >>> w, info = solver.with_info(0.0, 3.0)
    >>> round(float(w), 6), bool(info.converged)
    (3.0, True)

    References:
        Liu, Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
    """
    check_callable("from_optax", "loss", loss, "loss(w, *args) -> scalar")
    check_optimizer("from_optax", optimizer)
    check_on_failure("from_optax", on_failure)
    stop = stopping("from_optax", num_steps, max_steps, rtol, atol)
    full = optax.with_extra_args_support(optimizer)

    @Compiled
    def solve(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        check_inexact("from_optax", "w0", w0)
        value = eval_shape(loss, w0, *args, **kwargs)
        check_scalar("from_optax", value, "loss")
        w0 = strongly_typed(w0, jax.tree.map(lambda _: value, w0))

        def scalar_loss(w: PyTree) -> jax.Array:
            return loss(w, *args, **kwargs)

        evaluate = jax.value_and_grad(scalar_loss)
        start = strongly_typed(full.init(w0))
        space = Space.of_map(lambda w: evaluate(w)[1], w0)
        remembered = _remembers(start, w0)

        def at(w: PyTree, state: Any) -> tuple[Any, PyTree]:
            if remembered:
                return optax.value_and_grad_from_state(scalar_loss)(w, state=state)
            return evaluate(w)

        def stepped(w: PyTree, state: Any, value: jax.Array, grad: PyTree) -> tuple[PyTree, Any]:
            ascent = steepest_ascent(grad)
            with jax.numpy_dtype_promotion("standard"):  # As optax promotes its own counts.
                updates, state = full.update(
                    ascent, state, w, value=value, grad=ascent, value_fn=scalar_loss
                )
            return optax.apply_updates(w, updates), state

        if stop.num_steps is not None:
            step, carry = steady(lambda c: stepped(c[0], c[1], *at(*c)), (w0, start))
            w, _ = lax.fori_loop(0, stop.num_steps, lambda _, c: step(c), carry)
            return w, exact_steps_info(space, stop.num_steps, w, evaluate(w)[1])

        eps = resolution(w0)
        value, grad = evaluate(w0)
        size = space.size_of(grad)
        tolerance = stop.tolerance(size)

        def rounding(w: PyTree, grad: PyTree, wanted: jax.Array) -> jax.Array:
            """What the last digits of w make of the gradient, if `wanted`; else 0."""

            def observed() -> jax.Array:
                return space.size_of(tree.sub(evaluate(nudged(w))[1], grad))

            return run_if(wanted, observed, jnp.zeros_like(size))

        floor = rounding(w0, grad, tree.norm(w0) > 0) + EVALUATION * eps * size

        def measured(grad: PyTree, rounded: jax.Array) -> Measured:
            return Measured(space.size_of(grad), tolerance, floor, rounded)

        def unfinished(c: _Descent) -> jax.Array:
            return goes_on(stop.max_steps, c.i, c.measured, c.progress)

        def step_until(c: _Descent) -> _Descent:
            w, state = stepped(c.w, c.state, c.value, c.grad)
            value, grad = at(w, state)
            now, i = measured(grad, jnp.asarray(False)), c.i + 1
            return _Descent(i, w, state, value, grad, now, c.progress.after(i, now))

        first = measured(grad, jnp.asarray(False))
        carry = _Descent(jnp.int32(0), w0, start, value, grad, first, first_progress(first))
        c = lax.while_loop(unfinished, *steady(step_until, carry))
        # The true one, whatever comes after the line search in a chain.
        grad = evaluate(c.w)[1] if remembered else c.grad
        end = measured(grad, jnp.asarray(False))
        at_rounding = ~end.met & (end.norm <= rounding(c.w, grad, ~end.met))
        info = verdict(c.i, measured(grad, at_rounding), size, c.progress)
        return stopped_by_residual("from_optax", c.w), info

    return CheckedSolver(solve, on_failure, gradient_descent(loss, step_size=1.0))


class _Descent(NamedTuple):
    """The carry of an optimiser with a tolerance."""

    i: jax.Array
    w: PyTree
    state: Any
    value: jax.Array
    grad: PyTree
    measured: Measured
    progress: Progress


def _remembers(state: Any, w: PyTree) -> bool:
    """Whether a line search keeps the last value and gradient in its state, in JAX's convention."""
    if any(map(jnp.iscomplexobj, jax.tree.leaves(w))):
        return False
    try:
        kept = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
    except KeyError:  # More than one of a name.
        return False
    return all(x is not None for x in kept)


def check_optimizer(where: str, optimizer: object) -> None:
    """Raises `TypeError` unless `optimizer` looks like one of optax."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"`optimizer` of `{where}` must be an optax optimiser, got {show(optimizer)}; call it, as "
            "in `optax.adam(1e-2)`."
        )
