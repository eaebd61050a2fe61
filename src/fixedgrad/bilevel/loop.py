"""The loop itself: hypergradient, optax optimiser and projection, in one jitted scan."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..compiled import Compiled
from ..errors import check_callable, check_same, hint, shapes_of
from ..failure import zero_where
from ..hypergradient import Hypergradient, HypergradientState
from ..leaves import check_arrays, is_weak, owned, partition, settled_lam, strongly_typed
from ..lower.optimisers import check_optimizer
from ..monitor import OUTER_STEP, Monitor, check_monitor, emit
from ..printing import by_name, printed
from ..real_form import norm, pairing, steepest_ascent
from ..types import PyTree, failed, status_of
from .records import BilevelInfo, BilevelState, StopReason
from .runs import run_of

_ASKED = (
    "`bilevel` gives the optimiser gradients, its state, λ, the `value` and `grad` at λ, and a "
    "`value_fn` of λ. This one asks for more."
)


Info = TypeVar("Info")


class Bilevel(NamedTuple, Generic[Info]):
    """The pure functions of the outer loop; an `Info` is what a step shows.

    Attributes:
        init: `init(w0, lam, *args, **kwargs) -> state`.
        step: `step(state, *args, **kwargs) -> (state, info)`, one step.
        run: `run(state, *args, num_steps=, stop=, metrics=, batches=, **kwargs) -> (state, history)`,
            many steps in one compiled scan; see `bilevel`.
        name: How it prints: as the call that made it.
    """

    init: Callable[..., BilevelState]
    step: Callable[..., tuple[BilevelState, Info]]
    run: Callable[..., tuple[BilevelState, Info]]
    name: str = "Bilevel(...)"

    def __repr__(self) -> str:
        return self.name


_ADAM = optax.GradientTransformation(*map(by_name, optax.adam(0.1)))  # pyright: ignore


@printed
def bilevel(
    hypergrad: Hypergradient,
    optimizer: optax.GradientTransformation = _ADAM,
    *,
    project: Callable[[PyTree], PyTree] | None = None,
    monitor: Monitor | None = None,
) -> Bilevel[BilevelInfo]:
    """The outer loop min over λ of f(λ): λ ← P(λ + updates), the updates by optax from g(λ).

    All three are pure, and each is compiled once: called again with the same shapes it does not compile
    again, `run` for about as many steps neither. So a long run is a Python loop over chunks, with a
    progress bar and a checkpoint of the state between them. What was compiled is kept by the loop, and
    goes with it.

    A hypergradient that is not finite (a failed solve, by the policy of `hypergradient`), or a λ that
    would overflow, moves nothing: the loop ends with the last good λ in its state, and with its
    `reason`. `run` of a state that has ended takes no step, and warns outside `jit`.

    Options of `run`:

    - `num_steps`: The number of steps.
    - `stop`: `stop(info) -> bool` array of the `BilevelInfo` of a step; true ends the loop after it.
      A `StopRule`, such as `patience(...)`, remembers more than one step. `run` traces the function,
      as `jit` does: Python variables that it changes do not change from step to step.
      Pass the same object again to avoid compiling again.
    - `metrics`: `metrics(state) -> pytree` of arrays, of the state after each step, such as
      `lambda state: state.lam`; `history.metrics` has them stacked.
    - `batches`: A pytree whose leaves have a leading axis of length `num_steps`. Step i gets slice i as
      its first data argument, before `*args`; hand a slice to `init` in the same place.

    The state is a pytree of arrays: `pickle` or `orbax` saves it, and a loop that is made by the same
    calls goes on from it. Histories join by `jax.tree.map(lambda *x: jnp.concatenate(x), h1, h2)`.

    Rows of the history after the end hold infinity and zeros, with `taken` false and `reason` set.

    Assumed, not checked: `project` is the projection that the optimiser's updates ask for; for
    gradient descent on a convex set it is the Euclidean one.

    Cost: one hypergradient update a step; none once stopped (under `vmap` a stopped loop waits, and
    computes). Memory: the state's, the estimator's, and one `BilevelInfo` a step.
    An optimiser with a line search, such as `optax.lbfgs()`, gets f as `value_fn`: to second order in
    the errors of w and v where there is a v, infinite where an update failed. Each trial is one update,
    from the w and v at λ where `start` is `warm()`.
    When not to use it: to have no step size to choose at all, and a line search that knows how wrong
    its values are: `descent`.

    Args:
        hypergrad: The result of `hypergradient` (or anything with the same `init` and `update`).
        optimizer: An optax optimiser; those that need values get `value`, `grad` and `value_fn`. By
            default `optax.adam(0.1)`, for λ of which a change by 0.1 is small, as for logarithms of
            penalties.
        project: P, `project(lam) -> lam`, such as `optax.projections.projection_box` partially
            applied; `None` for none.
        monitor: `monitor(stage, info)`, called on the host with the `BilevelInfo` of each step, in
            order: `progress_bar(total)`, `print_info`, or a function of yours; `None` for none.

    Returns:
        The functions (`init`, `step`, `run`), a `Bilevel`.

    Raises:
        TypeError: An argument is not of its kind; when called, λ has a leaf that is neither array nor
            number, the projection changes λ's structure, shapes or dtypes, the state is that of a loop
            with another optimiser, `stop` does not return one boolean computed from `info`, or
            `batches` have no common leading axis of `num_steps`.
        ValueError: `num_steps` of `run` is not a positive integer.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> hypergrad = fg.hypergradient(
    ...     lambda w, lam: (w - 3.0) ** 2, phi, fg.picard(phi, num_steps=50), fg.aid(fg.dense()))
    >>> loop = fg.bilevel(hypergrad, optax.sgd(0.1))
    >>> state, history = loop.run(loop.init(0.0, 0.0), num_steps=20)
    >>> round(float(state.lam), 3), round(float(history.value[0]), 3)
    (1.5, 9.0)
    >>> state, history = loop.run(
    ...     loop.init(0.0, 0.0), num_steps=100, stop=lambda info: info.value < 1e-6)
    >>> int(state.num_steps), fg.StopReason(int(state.reason)).name
    (6, 'RULE')

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
    check_monitor("bilevel", monitor)
    full = optax.with_extra_args_support(optimizer)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> BilevelState:
        lam, hyper = begun("bilevel", hypergrad.init, w0, lam, args, kwargs)
        optimizer_state = strongly_typed(full.init(partition(lam)[0]))
        running = jnp.int32(StopReason.RUNNING)
        return BilevelState(owned(lam), hyper, owned(optimizer_state), jnp.int32(0), running)

    def value_fn(
        hyper: HypergradientState,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        join: Callable[[PyTree, PyTree], PyTree],
        rest: PyTree,
    ) -> Callable[[PyTree], jax.Array]:
        """The objective for line searches, with the hypergradient as its derivative."""
        promotion = jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]

        def value(x: PyTree) -> jax.Array:
            fixed = lax.stop_gradient(x)
            with jax.numpy_dtype_promotion(promotion):
                grad, at = hypergrad.update(hyper, join(fixed, rest), *args, **kwargs)
            grad, value = lax.stop_gradient((partition(grad)[0], _value_of(at)))
            failed = ~jnp.isfinite(norm(grad))
            # Infinite where a trial failed: no line search takes it, nor shall a NaN go into the next.
            grad = zero_where(failed, grad)
            slope = pairing(grad, optax.tree.sub(x, fixed)).astype(value.dtype)
            return jnp.where(failed, jnp.inf, value) + slope

        return value

    @Compiled
    def step(
        state: BilevelState, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[BilevelState, BilevelInfo]:
        _check_optimizer_state(full, state)
        grad, hyper = hypergrad.update(state.hypergrad, state.lam, *args, **kwargs)
        finite = jnp.isfinite(norm(grad))
        # The optimiser sees what has a gradient; `None` stands for integers and keys.
        x, rest, join = partition(state.lam)
        ascent = steepest_ascent(partition(grad)[0])
        # Standard promotion, as optax promotes its own counts.
        with hint(TypeError, text=lambda: _ASKED), jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = full.update(
                ascent,
                state.optimizer,
                x,
                value=_value_of(hyper),
                grad=ascent,
                value_fn=value_fn(hyper, args, kwargs, join, rest),
            )
        lam = join(optax.apply_updates(x, updates), rest)
        if project is not None:
            projected = project(lam)
            check_same("bilevel", projected, lam, "`project(lam)`", "`lam`")
            lam = projected
        lower, linear = hyper.info
        stays = _stays_finite(state.lam, lam)
        reason = status_of(
            StopReason.RUNNING,
            (stays, StopReason.OVERFLOW),
            (finite, StopReason.NON_FINITE),
            (finite | (linear is None or ~failed(linear)), StopReason.LINEAR_FAILED),
            (finite | ~failed(lower), StopReason.LOWER_FAILED),
        )
        taken = finite & stays
        lam, optimizer_state = optax.tree.where(
            taken, (lam, optimizer_state), (state.lam, state.optimizer)
        )
        nothing = jnp.full_like(lower.residual, jnp.inf)
        info = BilevelInfo(
            value=hyper.value,
            gradient_norm=norm(grad),
            lower_residual=lower.residual,
            linear_residual=nothing if linear is None else linear.residual,
            lower_steps=lower.num_steps,
            linear_steps=jnp.int32(0) if linear is None else linear.num_steps,
            lower_status=jnp.asarray(lower.status, jnp.int32),
            linear_status=jnp.int32(0 if linear is None else linear.status),
            taken=taken,
            reason=reason,
        )
        emit(monitor, OUTER_STEP, info)
        num_steps = state.num_steps + taken.astype(jnp.int32)
        return BilevelState(lam, hyper, optimizer_state, num_steps, reason, state.memory), info

    return Bilevel(init, step, run_of(step))


def begun(
    where: str,
    init: Callable[..., HypergradientState],
    w0: PyTree,
    lam: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> tuple[PyTree, HypergradientState]:
    """λ as arrays of settled dtypes, and the first state of the hypergradient there."""
    check_arrays(where, "lam", lam)
    hyper = init(w0, lam, *args, **kwargs)
    if any(map(is_weak, jax.tree.leaves(lam))):  # Python numbers, as wide as w: known only now.
        lam = settled_lam(lam, hyper.w)
        hyper = init(w0, lam, *args, **kwargs)
    return strongly_typed(lam), hyper


def _value_of(hyper: HypergradientState) -> jax.Array:
    """The objective, to second order in the errors of w and v where there is a v."""
    return hyper.value if hyper.corrected_value is None else hyper.corrected_value


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
