"""The outer loop: hypergradient, optax optimiser and projection, in one jitted scan."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .hypergradient import Hypergradient, HypergradientState
from .lower.adapters import check_optimizer
from .packing import blank, check_arrays, partition, strongly_typed
from .realify import norm, steepest_ascent
from .types import PyTree, check_callable, check_count, check_same, hint, shapes_of

_ASKED = (
    "`bilevel` gives the optimiser gradients, its state, λ, and the `value` and `grad` at λ. One that "
    "asks for `value_fn`, such as `optax.lbfgs`, needs a line search in which each trial is a lower "
    "level solved anew: take `optax.adam`, or `optax.sgd` with momentum."
)


class BilevelState(NamedTuple):
    """Everything the outer loop needs to go on: a pytree of arrays, for any checkpoint library.

    Attributes:
        lam: The outer variable λ.
        hypergrad: The state of the hypergradient; its w, v, value and info are of the λ before `lam`.
        optimizer: The state of the optax optimiser.
        num_steps: Outer steps taken, int32.
        stopped: Whether the loop has ended: a rule said so, or a hypergradient or λ was not finite.
    """

    lam: PyTree
    hypergrad: HypergradientState
    optimizer: PyTree
    num_steps: jax.Array
    stopped: jax.Array


class Record(NamedTuple):
    """What one outer step shows; `run` stacks these to a history.

    Attributes:
        value: f = E(w, λ) at the λ before the step.
        gradient_norm: ‖g(λ)‖, the norm of the hypergradient (before the projection).
        lower_residual: ‖Φ(w) − w‖.
        linear_residual: ‖∇₁E − (I − Jᵀ)v‖; NaN for an estimator without a linear system.
        lower_steps: Steps of the lower-level solver.
        linear_steps: Steps of the linear solver; 0 without one.
        taken: Whether the step was taken; rows after an early stop were not.
    """

    value: jax.Array
    gradient_norm: jax.Array
    lower_residual: jax.Array
    linear_residual: jax.Array
    lower_steps: jax.Array
    linear_steps: jax.Array
    taken: jax.Array


class Bilevel(NamedTuple):
    """The pair of pure functions of the outer loop.

    Attributes:
        init: `init(w0, lam, *args, **kwargs) -> state`.
        step: `step(state, *args, **kwargs) -> (state, record)`.
    """

    init: Callable[..., BilevelState]
    step: Callable[..., tuple[BilevelState, Record]]


def bilevel(
    hypergrad: Hypergradient,
    optimizer: optax.GradientTransformation,
    *,
    project: Callable[[PyTree], PyTree] | None = None,
) -> Bilevel:
    """The outer loop min over λ of f(λ): λ ← P(λ + updates), the updates by optax from g(λ).

    A hypergradient that is not finite (a failed solve, by the policy of `hypergradient`), or a λ that
    would overflow, moves nothing: the loop stops with the last good λ in its state. Both functions
    are pure and unjitted; `run` puts many steps into one compiled scan.

    Assumed, not checked: `project` is the projection that the optimiser's updates ask for; for
    gradient descent on a convex set it is the Euclidean one.

    Cost: one hypergradient update a step. Memory: the state's, and the estimator's.
    When not to use it: for a line search that evaluates f by itself, as in `optax.lbfgs`: it asks for
    `value_fn`, which is not there.

    Args:
        hypergrad: The result of `hypergradient` (or anything with the same `init` and `update`).
        optimizer: An optax optimiser; those that need the value get it as `value`.
        project: P, `project(lam) -> lam`, such as `optax.projections.projection_box` partially
            applied; `None` for none.

    Returns:
        The pair (`init`, `step`), a `Bilevel`.

    Raises:
        TypeError: An argument is not of its kind; when called, λ has a leaf that is neither array nor
            number, the projection changes λ's structure, shapes or dtypes, or the state is that of a
            loop with another optimiser.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> hypergrad = fg.hypergradient(
    ...     lambda w, lam: (w - 3.0) ** 2, phi, fg.picard(phi, num_steps=50), fg.aid(fg.dense()))
    >>> loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    >>> state, history = fg.run(loop, loop.init(0.0, 0.0), num_steps=20)
    >>> round(float(state.lam), 3), round(float(history.value[0]), 3)
    (1.5, 9.0)

    References:
        Grazzi et al., ICML 2020, section 3.2; Pedregosa, Hyperparameter optimization with
        approximate gradient, ICML 2016.
    """
    if not (hasattr(hypergrad, "init") and hasattr(hypergrad, "update")):
        raise TypeError(
            "`hypergrad` of `bilevel` must have `init` and `update`, as `hypergradient(...)` returns "
            f"them, got {hypergrad!r}."
        )
    check_optimizer("bilevel", optimizer)
    if project is not None:
        check_callable("bilevel", "project", project, "project(lam) -> lam")
    full = optax.with_extra_args_support(optimizer)

    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> BilevelState:
        check_arrays("bilevel", "lam", lam)
        lam = strongly_typed(lam)
        hyper = hypergrad.init(w0, lam, *args, **kwargs)
        return BilevelState(
            lam,
            hyper,
            strongly_typed(full.init(partition(lam)[0])),
            jnp.int32(0),
            jnp.asarray(False),
        )

    def step(
        state: BilevelState, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[BilevelState, Record]:
        _check_optimizer_state(full, state)
        grad, hyper = hypergrad.update(state.hypergrad, state.lam, *args, **kwargs)
        finite = jnp.isfinite(norm(grad))
        # The optimiser sees what has a gradient; `None` stands for integers and keys.
        x, rest, join = partition(state.lam)
        ascent = steepest_ascent(partition(grad)[0])
        with hint(TypeError, text=lambda: _ASKED):
            updates, optimizer_state = full.update(
                ascent, state.optimizer, x, value=hyper.value, grad=ascent
            )
        lam = join(optax.apply_updates(x, updates), rest)
        if project is not None:
            projected = project(lam)
            check_same("bilevel", projected, lam, "`project(lam)`", "`lam`")
            lam = projected
        finite &= _stays_finite(state.lam, lam)
        lam, optimizer_state = optax.tree.where(
            finite, (lam, optimizer_state), (state.lam, state.optimizer)
        )
        lower, linear = hyper.info
        nothing = jnp.full_like(lower.residual, jnp.nan)
        record = Record(
            hyper.value,
            norm(grad),
            lower.residual,
            nothing if linear is None else linear.residual,
            lower.num_steps,
            jnp.int32(0) if linear is None else linear.num_steps,
            jnp.asarray(True),
        )
        return BilevelState(lam, hyper, optimizer_state, state.num_steps + 1, ~finite), record

    return Bilevel(init, step)


def run(
    loop: Bilevel,
    state: BilevelState,
    /,
    *args: PyTree,
    num_steps: int,
    stop: Callable[[Record], jax.Array] | None = None,
    **kwargs: PyTree,
) -> tuple[BilevelState, Record]:
    """`num_steps` outer steps in one jitted `lax.scan`, with their history.

    Called again with the same loop and shapes it does not compile again, so a long run is a Python
    loop over chunks, with a progress bar and a checkpoint of the state between them.

    Cost: `num_steps` outer steps; none once stopped (under `vmap` a stopped loop waits, and
    computes).
    Memory: the state's, the estimator's, and one `Record` a step.
    When not to use it: for a new batch of data at each step, as all steps get the same `args`; scan
    over `loop.step` there. For a loop or a `stop` made anew for each call, which compiles anew.

    Args:
        loop: The result of `bilevel`.
        state: Its state.
        *args: Data, passed on to outer objective, Φ and solver after λ.
        num_steps: The number of steps.
        stop: `stop(record) -> bool` array; true ends the loop after that step. Pass the same function
            object again to avoid compiling again.
        **kwargs: More data.

    Returns:
        The state after the steps, and a `Record` of arrays with one row for each step. Rows with
        `taken` false, after an early stop, hold NaN and zeros.

    Raises:
        TypeError: `stop` is not a function, or does not return one boolean.
        ValueError: `num_steps` is not a positive integer.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> hypergrad = fg.hypergradient(
    ...     lambda w, lam: (w - 3.0) ** 2, phi, fg.picard(phi, num_steps=50), fg.aid(fg.dense()))
    >>> loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    >>> state, history = fg.run(
    ...     loop, loop.init(0.0, 0.0), num_steps=100, stop=lambda record: record.value < 1e-6)
    >>> int(state.num_steps), int(history.taken.sum())
    (6, 6)
    """
    check_count("run", "num_steps", num_steps)
    if stop is not None:
        check_callable("run", "stop", stop, "stop(record) -> bool array")
    return _scan(loop, stop, num_steps, state, args, kwargs)


def _check_optimizer_state(optimizer: optax.GradientTransformation, state: BilevelState) -> None:
    """Raises `TypeError` where the state's optimiser is of another kind than this one."""
    wanted = jax.eval_shape(optimizer.init, partition(state.lam)[0])
    if jax.tree.structure(state.optimizer) != jax.tree.structure(wanted):
        raise TypeError(
            "`state` of `step` holds the state of another optimiser than that of this `bilevel`.\n"
            f"  this optimiser's: {shapes_of(wanted)}\n"
            f"  `state.optimizer`: {shapes_of(state.optimizer)}\n"
            "Take the state from this loop's `init`, as in `init(w0, state.lam)`."
        )


def _stays_finite(before: PyTree, after: PyTree) -> jax.Array:
    """Whether no entry has become infinite or NaN; those that were so may stay."""
    pairs = zip(*(jax.tree.leaves(partition(x)[0]) for x in (before, after)), strict=True)
    kept = [jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)) for old, new in pairs]
    return jnp.all(jnp.stack(kept))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    loop: Bilevel,
    stop: Callable[[Record], jax.Array] | None,
    num_steps: int,
    state: BilevelState,
    args: PyTree,
    kwargs: PyTree,
) -> tuple[BilevelState, Record]:
    _, record_like = jax.eval_shape(lambda s: loop.step(s, *args, **kwargs), state)

    def take(state: BilevelState) -> tuple[BilevelState, Record]:
        state, record = loop.step(state, *args, **kwargs)
        if stop is not None:
            now = jnp.asarray(stop(record))
            if now.shape != () or now.dtype != jnp.bool_:
                raise TypeError(
                    f"`stop` of `run` must return one boolean, got {shapes_of(now)}; compare, as in "
                    "`record.value < 1e-6`."
                )
            state = state._replace(stopped=state.stopped | now)
        return state, record

    def skip(state: BilevelState) -> tuple[BilevelState, Record]:
        return state, blank(record_like)

    def body(state: BilevelState, _: None) -> tuple[BilevelState, Record]:
        return lax.cond(state.stopped, skip, take, state)

    return lax.scan(body, state, None, length=num_steps)
