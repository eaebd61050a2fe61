"""The explicit form: hypergradient with state, in optax's shape, and how the next solve starts."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .estimators import check_estimator, run_linear_solver
from .failure import check_on_failure, enforce
from .lower import fixed_point_info, held_to_phi, iterates, solve_with_info
from .packing import (
    SOLVED,
    blank,
    check_arrays,
    check_phi,
    eval_shape,
    fresh,
    owned,
    partition,
    split_lam,
    started,
    zeros_like_inexact,
)
from .printing import count, member, number, printed, record, shapes_in, values_of
from .replication import placed_like
from .signatures import same_arguments
from .types import (
    Estimator,
    LinearSolver,
    MatVec,
    OnFailure,
    Outer,
    Phi,
    PyTree,
    SolveInfo,
    Solver,
    Status,
    check_callable,
    check_same,
    check_scalar,
    failed,
    shapes_of,
    show,
)


class HypergradientInfo(NamedTuple):
    """Info of both stages: the lower-level solve, and the linear solve (`None` without one)."""

    lower: SolveInfo
    linear: SolveInfo | None


class HypergradientState(NamedTuple):
    """What the next update needs, and what a person wants to see of the last one.

    Attributes:
        value: f = E(w, λ) at the last update; infinite before the first.
        w: The lower-level iterate; the starting point before the first update.
        v: The solution of (I − Jᵀ) v = ∇₁E; zero before, `None` where the estimator has none.
        info: `HypergradientInfo` of the last update.
        memory: What the `Start` remembers.
        num_updates: How many updates there were, int32.
        certificate: A `Certificate`, for hypergradients made by `certified` and its like.
    """

    value: jax.Array
    w: PyTree
    v: PyTree | None
    info: HypergradientInfo
    memory: PyTree
    num_updates: jax.Array
    certificate: Any = None

    def __repr__(self) -> str:
        # Inside JAX a state may hold anything in the place of its leaves.
        info = self.info if isinstance(self.info, HypergradientInfo) else ()
        stages = [x for x in info if isinstance(x, SolveInfo)]
        known = values_of(self.value, self.num_updates, *(x.status for x in stages))
        if known is None or max(x.ndim for x in known):
            return shapes_in(self)
        value, num_updates, *statuses = known
        names = zip(("lower", "linear"), statuses, strict=False)
        return record(
            self,
            count(num_updates, "update"),
            f"f {number(value)}",
            f"w {shapes_of(self.w)}",
            *(f"{stage} {member(Status, status)}" for stage, status in names),
            *(() if self.certificate is None else (repr(self.certificate),)),
        )


class Hypergradient(NamedTuple):
    """The pair of pure functions of the explicit form.

    Attributes:
        init: `init(w0, lam, *args, **kwargs) -> state`.
        update: `update(state, lam, *args, **kwargs) -> (grad, state)`.
        outer: E, for transformations such as `certified`.
        phi: Φ, for the same.
        name: How it prints: as the call that made it.
    """

    init: Callable[..., HypergradientState]
    update: Callable[..., tuple[PyTree, HypergradientState]]
    outer: Outer
    phi: Phi
    name: str = "Hypergradient(...)"

    def __repr__(self) -> str:
        return self.name


class Start(NamedTuple):
    """Where the two solves of an update start, as three pure functions.

    Attributes:
        init: `init(w0, v_zero) -> memory`; `v_zero` is `None` where the estimator has no v.
        propose: `propose(memory) -> (w, v)`; `None` for v starts at zero.
        record: `record(memory, w, v) -> memory`, called with results of solves that succeeded.
        name: How it prints: as the call that made it.
    """

    init: Callable[[PyTree, PyTree], PyTree]
    propose: Callable[[PyTree], tuple[PyTree, PyTree | None]]
    record: Callable[[PyTree, PyTree, PyTree], PyTree]
    name: str = "Start(...)"

    def __repr__(self) -> str:
        return self.name


@printed
def cold() -> Start:
    """Every update starts at w₀ and at v = 0, as in the paper's analysis.

    When not to use it: in an outer loop with small steps and a tolerance, where `warm` takes fewer
    steps.

    Returns:
        A `Start` that remembers w₀, as `init` was given it, and nothing else.

    >>> cold().propose(cold().init(1.0, 0.0))
    (1.0, None)
    """
    return Start(lambda w0, _: w0, lambda memory: (memory, None), lambda memory, *_: memory)


_COLD = cold()


@printed
def warm() -> Start:
    """Every update starts at the w and v of the last one that succeeded.

    With a tolerance both solves then need fewer steps; with exact `num_steps` they come closer. The
    error bounds of the paper hold with ‖w₀ − w(λ)‖ in place of ‖w(λ)‖, so they depend on how fast λ
    moves.

    Cost: one more product with Jᵀ, for the residual of the start. Memory: w and v.
    When not to use it: where the error bound of each update shall not depend on the updates before.

    Returns:
        A `Start` that remembers w and v.

    >>> warm().propose(warm().record(warm().init(1.0, 0.0), 2.0, 3.0))
    (2.0, 3.0)
    """

    def record(memory: PyTree, w: PyTree, v: PyTree) -> PyTree:
        return w, memory[1] if v is None else v

    return Start(lambda w0, v: (w0, v), lambda memory: memory, record)


@printed
def hypergradient(
    outer: Outer,
    phi: Phi,
    solver: Solver,
    estimator: Estimator,
    *,
    start: Start = _COLD,
    on_failure: OnFailure = "nan",
) -> Hypergradient:
    """The hypergradient in explicit form: values, diagnostics and warm starts in a state.

        f(λ) = E(w(λ), λ),    ∇f(λ) = ∇₂E + Bᵀ v,    (I − Jᵀ) v = ∇₁E,

    at the solver's w ≈ w(λ), as `estimator` approximates it. Nothing is hidden: `update` is a pure
    function and works under `jit`, `vmap` and `lax.scan`.

    The gradient is with respect to the inexact leaves of the first argument after the state, λ, of
    which there must be one; integers and keys ride along and get `float0` zeros. Further arguments
    are data. What the functions close over is not differentiated.

    Cost: the solver, one E with its gradient, the estimator, and one Φ for the true residual.
    Memory: w, v and the estimator's.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        solver: `solver(w0, lam, *args, **kwargs) -> w`.
        estimator: `itd()`, `truncated_itd(...)`, `aid(...)`.
        start: `cold()` or `warm()`, or another `Start`.
        on_failure: What becomes of the gradient when a solve failed: "nan", "warn", "raise" or
            "ignore". The state keeps w, v and info in any case. "warn" and "raise" call back to the
            host, so that `jax.export` refuses `update`.

    Returns:
        The pair (`init`, `update`), a `Hypergradient`.

    Raises:
        TypeError: An argument is not of its kind; when called, Φ(w) differs from w, E is not a real
            scalar, or λ has no inexact leaf.
        ValueError: `on_failure` is none of the four.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> hypergrad = fg.hypergradient(
    ...     lambda w, lam: 0.5 * w**2, phi, fg.picard(phi, num_steps=50), fg.aid(fg.dense()))
    >>> state = hypergrad.init(0.0, 1.0)
    >>> grad, state = hypergrad.update(state, 1.0)  # f = 2 λ²
    >>> round(float(state.value), 6), round(float(grad), 6)
    (2.0, 4.0)

    References:
        Grazzi et al., ICML 2020, Algorithms 1 and 2.
    """
    check_callable("hypergradient", "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable("hypergradient", "phi", phi, "phi(w, lam, *args) -> w")
    check_callable("hypergradient", "solver", solver, "solver(w0, lam, *args) -> w")
    check_estimator("hypergradient", estimator)
    check_on_failure("hypergradient", on_failure)
    if not isinstance(start, Start):
        raise TypeError(
            f"`start` of `hypergradient` must be a `Start`, got {show(start)}; call a factory, as in "
            "`warm()`."
        )
    unrolled = estimator.mode == "unroll"
    check = same_arguments("hypergradient", phi, solver)

    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        check_state(state)
        check((lam, *args), kwargs)
        w0, v0 = start.propose(state.memory)
        x, join_lam, join_gradient = split_lam("hypergradient", lam)

        def packed_solver(w0: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            w, info = solve_with_info(solver, w0, join_lam(x), *args, **kwargs)
            check_arrays("hypergradient", "w", w)
            w = jax.tree.map(jnp.asarray, w)
            check_phi("hypergradient", phi, w, SOLVED, (lam, *args), kwargs)
            w_x, w_rest, _ = partition(w)
            return w_x, (w_rest, info, w)

        if unrolled:
            run = packed_solver
        else:  # The solver is not differentiated: run it first, and pass its result.
            solved = packed_solver(w0, x)
            w_rest, join_w = solved[1][0], partition(solved[1][2])[2]
            run = functools.partial(_constant, solved)

        def packed_phi(w_x: PyTree, x: PyTree) -> PyTree:
            with jax.default_matmul_precision("highest"):
                image = fresh(phi)(join_w(w_x, w_rest), join_lam(x), *args, **kwargs)
            return partition(image)[0]

        w_x, (w_rest, lower, w), residuals = estimator.fwd(packed_phi, run, w0, x)
        _, _, join_w = partition(w)
        w = join_w(w_x, w_rest)
        if lower is None:
            lower = fixed_point_info(phi, 0, w, lam, *args, **kwargs)
        if not (unrolled or iterates(solver, phi)):
            start_x = partition(w0)[0]
            lower = held_to_phi(lambda w_x: packed_phi(w_x, x), start_x, w_x, lower)

        def packed_outer(w_x: PyTree, x: PyTree) -> jax.Array:
            value = outer(join_w(w_x, w_rest), join_lam(x), *args, **kwargs)
            check_scalar("hypergradient", value)
            return value

        value, (w_bar, direct) = jax.value_and_grad(packed_outer, argnums=(0, 1))(w_x, x)

        def solve(linear_solver: LinearSolver, matvec: MatVec, b: PyTree) -> Any:
            x0 = () if v0 is None else (partition(v0)[0],)
            return run_linear_solver(linear_solver, matvec, b, *x0)

        back = estimator.bwd(packed_phi, residuals, w_bar, solve)
        grad = placed_like(optax.tree.add(direct, back.args_bar), x)
        grad = enforce(on_failure, "lower-level solve", lower, grad)
        grad = enforce(on_failure, "linear solve of the derivative", back.info, grad)

        v = None if back.v is None else join_w(back.v, w_rest)
        lost = failed(lower)
        if back.info is not None:
            lost |= failed(back.info)
        # Of their own, where `record` kept w and v: outside `jit` they would be the same buffers.
        recorded = owned(start.record(state.memory, w, v))
        memory = optax.tree.where(lost, state.memory, recorded)
        info = HypergradientInfo(lower, back.info)
        return join_gradient(grad), HypergradientState(
            value, w, v, info, memory, state.num_updates + 1, state.certificate
        )

    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        w0 = started("hypergradient", phi, w0, (lam, *args), kwargs)
        memory = start.init(w0, zeros_like_inexact(w0))
        start_state = HypergradientState(jnp.nan, w0, None, None, memory, jnp.int32(0))  # pyright: ignore
        shapes = eval_shape(lambda *a, **k: update(*a, **k)[1], start_state, lam, *args, **kwargs)
        check_same("hypergradient", w0, shapes.w, "`w0`", SOLVED)
        value, info = blank((shapes.value, shapes.info))
        v = None if shapes.v is None else zeros_like_inexact(w0)
        return owned(HypergradientState(value, w0, v, info, memory, jnp.int32(0)))

    return Hypergradient(init, update, outer, phi)


def check_state(state: object) -> None:
    """Raises `TypeError` unless `state` is one."""
    if not isinstance(state, HypergradientState):
        raise TypeError(
            "`state` of `update` must be what `init` or the last `update` returned, got "
            f"{show(state)}; the order is `update(state, lam)`."
        )


def _constant(value: PyTree, *_: PyTree) -> PyTree:
    return value
