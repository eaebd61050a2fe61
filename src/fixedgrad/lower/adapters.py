"""Solvers that are not made here: `with_tolerance`, `from_host`, `from_optax`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ..errors import check_callable, check_count, check_inexact, check_same, check_scalar, show
from ..failure import check_on_failure
from ..iteration import stopping, verdict
from ..leaves import SOLVED, check_arrays, eval_shape, split_static, strongly_typed
from ..printing import printed
from ..real_form import steepest_ascent
from ..signatures import same_arguments
from ..types import OnFailure, Phi, PyTree, Scalar, SolveInfo, Solver
from .solver import CheckedSolver, lower_level

tree = optax.tree


@printed
def with_tolerance(
    solver: Solver,
    phi: Phi,
    *,
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    on_failure: OnFailure = "nan",
) -> CheckedSolver:
    """Any solver, held to a tolerance: ‖Φ(w) − w‖ ≤ max(rtol ‖Φ(w)‖, atol) at the w it returns.

    For solvers that do not say whether they succeeded: a `while_loop` of your own, optax, SciPy. The
    solver may have nothing to do with Φ but the fixed point. Without a tolerance w must be a fixed
    point to rounding.

    Assumed, not checked: that a small residual is a small error. For a contraction with constant q,
    ‖w − w(λ)‖ ≤ ‖Φ(w) − w‖/(1 − q).

    Cost: one Φ. Memory: one w.
    When not to use it: on `picard` and `anderson` with a tolerance, which say it themselves, and
    whose info would be lost; on a few steps that are meant to be few, which would count as a
    failure.

    Args:
        solver: `solver(w0, *args, **kwargs) -> w`.
        phi: The map whose fixed point the solver should have found.
        rtol: Relative tolerance on the residual.
        atol: Absolute tolerance on the residual.
        on_failure: "nan", "warn", "raise" or "ignore", for direct calls that miss the tolerance.

    Returns:
        A solver with `with_info`; `info.num_steps` is 0, since nobody knows it.

    Raises:
        TypeError: `solver` or `phi` is not callable, or the two name their parameters in another
            order or with other defaults; when called, Φ(w) does not look like w.
        ValueError: `rtol` is not in [0, 1), `atol` is negative or not finite, or `on_failure` is
            none of the four.

    >>> solver = with_tolerance(lambda w0, lam: w0 + lam, lambda w, lam: 0.5 * w + lam, rtol=1e-6)
    >>> w, info = solver.with_info(0.0, 1.0)
    >>> bool(info.converged), float(info.residual)
    (False, 0.5)
    """
    check_callable("with_tolerance", "solver", solver, "solver(w0, *args) -> w")
    check_callable("with_tolerance", "phi", phi, "phi(w, *args) -> w")
    check_on_failure("with_tolerance", on_failure)
    stop = stopping("with_tolerance", None, 1, rtol, atol)
    check = same_arguments("with_tolerance", phi, solver)

    def with_info(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, SolveInfo]:
        check(args, kwargs)
        w = solver(w0, *args, **kwargs)
        lower = lower_level("with_tolerance", phi, w, args, kwargs, SOLVED)
        measured = lower.measured(stop, lower.w0, lower.phi(lower.w0), nudged=True)
        return w, verdict(0, measured, jnp.full_like(measured.norm, jnp.inf))

    return CheckedSolver(with_info, on_failure, phi)


@printed
def from_host(function: Callable[..., PyTree]) -> Solver:
    """A solver that is not JAX, such as SciPy's, called on the host with NumPy arrays.

    The call is a `jax.pure_callback`: it works under `jit`, under `vmap` one element after another,
    and under every derivative of `aid` and `truncated_itd`, which never differentiate the solver.

    Assumed, not checked: the function has no side effects: it may be called more or less often than
    the program seems to say. It does not call JAX, and its w is a fixed point of Φ (`with_tolerance`).

    Cost: the function, a copy of its arguments to the host and of w back. Memory: these, on the
    host.
    When not to use it: for `itd`; on devices without host callbacks; in a program for `jax.export`,
    which exports no host callback; for a solver that could be JAX, since a batch is solved one
    element after another.

    Args:
        function: `function(w0, *args, **kwargs) -> w` on NumPy arrays, w like w0 in structure,
            shapes and dtypes.

    Returns:
        `solver(w0, *args, **kwargs) -> w`.

    Raises:
        TypeError: `function` is not callable; when differentiated itself, as by `itd`.
        jax.errors.JaxRuntimeError: When called: the function raised, or its w is not like w0; the
            text holds the reason.

    >>> solver = from_host(lambda w0, lam: (2.0 * lam).astype(w0.dtype))
    >>> float(solver(jnp.zeros(()), 3.0))
    6.0
    """
    check_callable("from_host", "function", function, "function(w0, *args) -> w")

    def on_host(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        check_arrays("from_host", "w0", w0)
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, w0))
        layout, arrays = split_static((w0, args, kwargs))

        def call(arrays: list[Any]) -> PyTree:
            w0, args, kwargs = layout.join([_to_numpy(x) for x in arrays])
            w = function(w0, *args, **kwargs)
            check_same("from_host", w, shapes, "`function(w0, ...)`", "`w0`")
            return w

        @jax.custom_jvp
        def run(arrays: list[Any]) -> PyTree:
            return jax.pure_callback(call, shapes, arrays, vmap_method="sequential")

        @run.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            del primals, tangents
            raise TypeError(
                "A solver made by `from_host` is not JAX and cannot be differentiated itself. Decorate "
                "it with `fixed_point(phi, aid(...))` or `truncated_itd(...)`; `itd()` differentiates "
                "the solver."
            )

        return run(arrays)

    return on_host


@printed
def from_optax(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
) -> Solver:
    """A solver that minimises `loss` with an optax optimiser, exactly `num_steps` steps.

    Give AID the `gradient_descent` map of the same loss as Φ: it has the same fixed points. Under
    `itd` beware of optimisers that divide by moments at zero gradient.

    Assumed, not checked: that the steps suffice (`with_tolerance` with that map tells).

    Cost: one gradient a step. Memory: w and the state of the optimiser (all of them under `itd`).
    When not to use it: to stop by a tolerance, which `picard` and `anderson` do.

    Args:
        loss: `loss(w, *args, **kwargs) -> scalar`.
        optimizer: An optax optimiser; a line search, as in `optax.lbfgs`, gets value and loss too, and
            takes several evaluations of the loss a step.
        num_steps: The number of steps.

    Returns:
        `solver(w0, *args, **kwargs) -> w`.

    Raises:
        TypeError: `loss` is not callable, `optimizer` not an optimiser; when called, the loss is
            not a real scalar, or w0 has a leaf that is not inexact.
        ValueError: `num_steps` is not a positive integer.

    >>> solver = from_optax(lambda w, lam: (w - lam) ** 2, optax.sgd(0.25), num_steps=30)
    >>> round(float(solver(0.0, 3.0)), 6)
    3.0
    """
    check_callable("from_optax", "loss", loss, "loss(w, *args) -> scalar")
    check_count("from_optax", "num_steps", num_steps)
    check_optimizer("from_optax", optimizer)
    full = optax.with_extra_args_support(optimizer)

    def solver(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        check_inexact("from_optax", "w0", w0)
        value = eval_shape(loss, w0, *args, **kwargs)
        check_scalar("from_optax", value, "loss")
        w0 = strongly_typed(w0, jax.tree.map(lambda _: value, w0))

        def scalar_loss(w: PyTree) -> jax.Array:
            return loss(w, *args, **kwargs)

        def step(_: jax.Array, carry: Any) -> Any:
            w, state = carry
            value, grad = jax.value_and_grad(scalar_loss)(w)
            ascent = steepest_ascent(grad)
            updates, state = full.update(
                ascent, state, w, value=value, grad=ascent, value_fn=scalar_loss
            )
            return optax.apply_updates(w, updates), state

        return lax.fori_loop(0, num_steps, step, (w0, strongly_typed(full.init(w0))))[0]

    return solver


def check_optimizer(where: str, optimizer: object) -> None:
    """Raises `TypeError` unless `optimizer` looks like one of optax."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"`optimizer` of `{where}` must be an optax optimiser, got {show(optimizer)}; call it, as "
            "in `optax.adam(1e-2)`."
        )


def _to_numpy(x: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)
