"""The explicit form: hypergradient with state, in optax's shape."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .compiled import Compiled
from .errors import check_callable, check_same, hint, shapes_of, show
from .estimators import AID, check_estimator
from .failure import LOWER_STAGE, STAGE, Policy, enforce, passed_over
from .leaves import (
    SOLVED,
    blank,
    check_arrays,
    owned,
    partition,
    split_lam,
    started,
    zeros_like_inexact,
)
from .linear.implicit import implicit_solve
from .linear.system import Kept, Reusable
from .lower import (
    NEWTON,
    ForPhi,
    exact_steps_info,
    held_to_phi,
    iterates,
    sharing,
    solve_with_info,
)
from .mapped_axes import placed_like, run_if
from .monitor import Monitor
from .printing import count, html, member, number, printed, record, shapes_in, values_of
from .problem import Problem
from .signatures import same_arguments
from .starts import COLD, Start, check_start
from .types import (
    Backward,
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
    Unrolled,
    failed,
)

_REVERSE_ITD = (
    "`itd()` differentiates the solver's own loop, in reverse mode here: give the solver `num_steps` "
    "in place of `max_steps`, or take `aid(...)`, which does not differentiate the solver."
)


class HypergradientInfo(NamedTuple):
    """Info of both stages: the lower-level solve, and the linear solve (`None` without one)."""

    lower: SolveInfo
    linear: SolveInfo | None


class HypergradientState(NamedTuple):
    """What the next update needs, and what a person wants to see of the last one.

    Attributes:
        value: E(w, λ) at the last update; infinite before the first.
        w: The lower-level iterate; the starting point before the first update.
        v: The solution of (I − Jᵀ) v = ∇₁E; zero before, `None` where the estimator has none.
        info: `HypergradientInfo` of the last update.
        memory: What the `Start` remembers.
        num_updates: How many updates there were, int32.
        certificate: A `Certificate`, for hypergradients made by `certified` and its like.
        kept: The preconditioner of the linear solver, where it has one that is made from products; that
            of an adaptive form is (I − J)⁻¹ as a matrix, where one pays.
        corrected_value: E − ⟨v, w − Φ(w)⟩, which is f to second order in the errors of w and v, where
            `value` is so to first; of forms that correct the gradient, as they correct it. `None`
            without a v.
    """

    value: jax.Array
    w: PyTree
    v: PyTree | None
    info: HypergradientInfo
    memory: PyTree
    num_updates: jax.Array
    certificate: Any = None
    kept: Any = None
    corrected_value: Any = None

    @property
    def value_error(self) -> jax.Array | None:
        """What `corrected_value` may err by, where there is a certificate: an estimate."""
        return None if self.certificate is None else self.certificate.value_error

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

    def _repr_html_(self) -> str:
        stages = {} if self.info is None else self.info._asdict()
        shown = {"f": self.value, "w": self.w, **stages, "num_updates": self.num_updates}
        return html(type(self).__name__, shown | {"certificate": self.certificate})


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


@printed
def hypergradient(
    outer: Outer,
    phi: Phi,
    solver: Solver | ForPhi = NEWTON,
    estimator: Estimator = AID,
    *,
    start: Start = COLD,
    on_failure: OnFailure = "nan",
    monitor: Monitor | None = None,
) -> Hypergradient:
    """The hypergradient in explicit form: values, diagnostics and warm starts in a state.

        f(λ) = E(w(λ), λ),    ∇f(λ) = ∇₂E + Bᵀ v,    (I − Jᵀ) v = ∇₁E,

    at the solver's w ≈ w(λ), as `estimator` approximates it. Nothing is hidden: `update` is a pure
    function and works under `jit`, `vmap` and `lax.scan`. It is not to be differentiated again: a
    Hessian is that of a decorated solver (`fixed_point`).

    The gradient is with respect to the inexact leaves of the first argument after the state, λ, of
    which there must be one; integers and keys ride along and get `float0` zeros. Further arguments
    are data. What the functions close over is not differentiated.

    Cost: the solver, one E with its gradient, the estimator, and one Φ for the true residual.
    Memory: w, v and the estimator's.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`. For an equation F(w, λ) = 0 it is `from_residual(F)`:
            F itself would be solved as w = F(w, λ), which is another problem.
        solver: `solver(w0, lam, *args, **kwargs) -> w`. By default Newton's method, which needs no
            contraction: `newton`, to a relative residual of 1e-8.
        estimator: `itd()`, `truncated_itd(...)`, `aid(...)`; by default `aid()`.
        start: `cold()`, `warm()`, or another `Start`; `separately` has one for w and one for v.
        on_failure: What becomes of the gradient when a solve failed: "nan", "zero", "warn", "raise" or
            "ignore". The state keeps w, v and info in any case. "warn" and "raise" call back to the
            host, so that `jax.export` refuses `update`.
        monitor: `monitor(stage, info)`, called on the host with the `SolveInfo` of both solves of each
            update, in order; see `fixed_point`. `None` for none.

    Returns:
        The pair (`init`, `update`), a `Hypergradient`.

    Raises:
        TypeError: An argument is not of its kind; when called, Φ(w) differs from w, E is not a real
            scalar, or λ has no inexact leaf.
        ValueError: `on_failure` is none of the five.

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
    if isinstance(solver, ForPhi):
        solver = solver.make(phi)
    check_callable("hypergradient", "solver", solver, "solver(w0, lam, *args) -> w")
    check_estimator("hypergradient", estimator)
    policy = Policy.of("hypergradient", on_failure, monitor)
    check_start("`start` of `hypergradient`", start)
    check = same_arguments("hypergradient", phi, solver)
    implicit = None if isinstance(estimator, Unrolled) else estimator
    reusable = None if implicit is None else Reusable.of(implicit.linear_solver)
    # One preconditioner for both stages, where they name the same: made for v, used on the way to w.
    shared = sharing(solver, reusable)

    def solve_lower(
        kept: Kept | None, w0: PyTree, lam: PyTree, args: tuple[PyTree, ...], kwargs: dict
    ) -> tuple[PyTree, SolveInfo | None]:
        if kept is not None and shared is not None:
            return shared(kept, w0, (lam, *args), kwargs)[:2]
        return solve_with_info(solver, w0, lam, *args, **kwargs)

    @Compiled
    def solved(
        memory: PyTree, kept: Kept | None, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        w0, v0 = start.propose(memory)
        x, join_lam, join_gradient = split_lam("hypergradient", lam)

        def run(x: PyTree) -> tuple[PyTree, tuple[PyTree, SolveInfo | None]]:
            w, info = solve_lower(kept, w0, join_lam(x), args, kwargs)
            check_arrays("hypergradient", "w", w)
            w = jax.tree.map(jnp.asarray, w)
            return partition(w)[0], (w, info)

        w_t, pull, (w, lower) = (
            jax.vjp(run, x, has_aux=True) if implicit is None else _undifferentiated(run, x)
        )
        problem = Problem.of("hypergradient", outer, phi, w, lam, args, kwargs, SOLVED)
        equation = problem.equation
        w_x = w_t if implicit is None else implicit.refine(equation, w_t, x)
        if lower is None:
            lower = exact_steps_info(equation.space(w_x), 0, w_x, equation.residual(w_x, x))
        if not (implicit is None or iterates(solver, phi)):
            lower = held_to_phi(equation, partition(w0)[0], w_x, x, lower)

        value, (w_bar, direct) = jax.value_and_grad(problem.outer, argnums=(0, 1))(w_x, x)
        if implicit is None:
            with hint(ValueError, text=lambda: _REVERSE_ITD):
                back = Backward(pull(w_bar)[0], None, None)
        else:
            x0 = None if v0 is None else partition(v0)[0]
            used: list[Kept] = []

            def solve(
                linear_solver: LinearSolver, matvec: MatVec, b: PyTree
            ) -> tuple[PyTree, SolveInfo]:
                if reusable is None or linear_solver is not reusable.linear_solver:
                    return implicit_solve(policy, linear_solver, matvec, b, x0)
                before = kept or _never(reusable, matvec, b)
                due = before.due(reusable.preconditioner.every)
                state = functools.partial(reusable.state, matvec, b)
                state = run_if(due, state, before.state)
                linear_solver = reusable.using(state, transposed=True)
                v, info = implicit_solve(policy, linear_solver, matvec, b, x0)
                first = jnp.where(due, info.num_steps, before.first)
                uses = jnp.where(failed(info), 0, jnp.where(due, 1, before.uses + 1))
                used.append(Kept(state, uses, first, info.num_steps))
                return v, info

            back = implicit.vjp(equation, w_t, x, w_bar, solve)
            kept = used[0] if used else None
        grad = placed_like(optax.tree.add(direct, back.x_bar), x)
        grad = enforce(policy, LOWER_STAGE, lower, grad)
        grad = enforce(policy, STAGE, back.info, grad)

        w = problem.join_w(w_x)
        v = None if back.v is None else problem.join_w(back.v)
        lost = passed_over(policy, lower, back.info)
        memory = optax.tree.where(lost, memory, start.record(memory, w, v))
        # Of its own, where `record` kept w and v: two leaves of a state must not share a buffer.
        info = HypergradientInfo(lower, back.info)
        memory, kept = owned((memory, kept))
        corrected = None
        if not (back.v is None or back.residual is None):
            corrected = value - equation.space(w_x).pairing(back.v, back.residual).astype(
                value.dtype
            )
        new = HypergradientState(value, w, v, info, memory, jnp.int32(0), None, kept, corrected)
        return join_gradient(grad), new

    def update(
        state: HypergradientState, lam: PyTree, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, HypergradientState]:
        check_state(state)
        check((lam, *args), kwargs)
        grad, new = solved(state.memory, state.kept, lam, *args, **kwargs)
        num_updates, certificate = state.num_updates + 1, state.certificate
        return grad, new._replace(num_updates=num_updates, certificate=certificate)

    @Compiled
    def init(w0: PyTree, lam: PyTree, /, *args: PyTree, **kwargs: PyTree) -> HypergradientState:
        w0 = started("hypergradient", phi, w0, (lam, *args), kwargs)
        memory = start.init(w0, zeros_like_inexact(w0))
        _, shapes = solved.eval_shape(memory, None, lam, *args, **kwargs)
        check_same("hypergradient", w0, shapes.w, "`w0`", SOLVED)
        value, info, kept, corrected = blank(
            (shapes.value, shapes.info, shapes.kept, shapes.corrected_value)
        )
        v = None if shapes.v is None else zeros_like_inexact(w0)
        return owned(
            HypergradientState(value, w0, v, info, memory, jnp.int32(0), None, kept, corrected)
        )

    return Hypergradient(init, update, outer, phi)


def _never(reusable: Reusable, matvec: MatVec, b: PyTree) -> Kept:
    """A preconditioner that is not made yet."""
    state = blank(jax.eval_shape(functools.partial(reusable.state, matvec, b)))
    return Kept(state, *(jnp.int32(0) for _ in range(3)))


def _undifferentiated(run: Callable[[PyTree], tuple[PyTree, PyTree]], x: PyTree) -> Any:
    """As `jax.vjp` with `has_aux`, without a pullback."""
    w, aux = run(x)
    return w, None, aux


def check_state(state: object) -> None:
    """Raises `TypeError` unless `state` is one."""
    if not isinstance(state, HypergradientState):
        raise TypeError(
            "`state` of `update` must be what `init` or the last `update` returned, got "
            f"{show(state)}; the order is `update(state, lam)`."
        )
