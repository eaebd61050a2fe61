"""The nouns: Φ, solvers, the estimator, the outer objective, and what a solve says of itself."""

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

PyTree = Any
Scalar = float | jax.Array | np.ndarray
OnFailure = Literal["nan", "zero", "warn", "raise", "ignore"]
MatVec = Callable[[PyTree], PyTree]


class Phi(Protocol):
    """The fixed-point map Φ: `phi(w, *args, **kwargs) -> w`, structure, shapes, dtypes of `w`."""

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


class Solver(Protocol):
    """The lower-level solver: `solver(w0, *args, **kwargs) -> w` with w ≈ Φ(w, λ)."""

    def __call__(self, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


class Decorated(Protocol):
    """A solver under `fixed_point`: it also tells what the solver says of itself."""

    __name__: str
    phi: Phi | None

    def __call__(self, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree: ...

    def with_info(self, w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


class Outer(Protocol):
    """The outer objective E: `outer(w, *args, **kwargs) -> scalar`."""

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> jax.Array: ...


class Status(enum.IntEnum):
    """How a solve ended. An array of it is int32; `Status(int(info.status))` names it.

    Up to `AT_FLOOR` the result is what was asked for; from `NO_PROGRESS` on the solve failed, and
    `on_failure` decides what becomes of derivatives that depend on it.

    - `NOT_RUN`: Nothing was solved yet (the state before the first update).
    - `CONVERGED`: The true residual meets the tolerance.
    - `FIXED_STEPS`: Exactly `num_steps` steps were taken, as asked; their accuracy is not judged.
    - `AT_FLOOR`: The tolerance lies below what the dtype can resolve; the residual is at that floor.
    - `NO_PROGRESS`: Exactly `num_steps` steps, after which the residual is as large as before them:
      ρ(J) ≥ 1, a cycle, or stagnation. The result is no better than none.
    - `MAX_STEPS`: `max_steps` steps, or stagnation, short of the tolerance.
    - `DIVERGED`: Short of the tolerance, with a residual larger than at the start: ρ(J) ≥ 1?
    - `INDEFINITE`: `cg` met a direction with pᵀ(I − M)p < 0: I − M is not positive definite.
    - `NOT_SYMMETRIC`: `cg` was given a matrix M that is not symmetric.
    - `SINGULAR`: I − M is singular to working precision.
    - `NON_FINITE`: NaN or infinity in the products, the right-hand side or the iterates.
    - `NOT_FIXED`: Φ(w) is nothing like w at the w that a solver without a tolerance returned: is `phi`
      the function F whose root is sought? Then Φ = w − F.
    """

    NOT_RUN = 0
    CONVERGED = 1
    FIXED_STEPS = 2
    AT_FLOOR = 3
    NO_PROGRESS = 4
    MAX_STEPS = 5
    DIVERGED = 6
    INDEFINITE = 7
    NOT_SYMMETRIC = 8
    SINGULAR = 9
    NON_FINITE = 10
    NOT_FIXED = 11


def is_failure(status: jax.Array) -> jax.Array:
    """Whether a solve with this `Status` failed, element by element."""
    # As an `int`: with `jax.disable_jit` the enumeration would count as int64.
    return status >= int(Status.NO_PROGRESS)


def status_where(
    condition: jax.Array, then: jax.Array | Status, otherwise: jax.Array | Status
) -> jax.Array:
    """`then` where the condition holds, else `otherwise`, as int32."""
    return jnp.where(condition, jnp.asarray(then, jnp.int32), jnp.asarray(otherwise, jnp.int32))


class SolveInfo(NamedTuple):
    """What a solve says of itself; a pytree of arrays, readable under `jit` and `vmap`.

    Attributes:
        num_steps: Steps taken, int32.
        residual: The true residual norm, ‖Φ(w) − w‖ or ‖b − (I − M)x‖, computed at the result.
        converged: The solve did what was asked: met its tolerance, or took its exact number of
            steps without a breakdown.
        status: A `Status`, int32: why it ended. `NOT_RUN` from a solver of your own that does not
            say; then `converged` decides.
        tolerance: What the residual was to fall below; 0 where exact `num_steps` were asked for.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    status: Any = 0
    tolerance: Any = 0.0

    def __repr__(self) -> str:
        from . import printing  # Which shows shapes by `shapes_of`, below.

        known = printing.values_of(*self)
        if known is None:
            return printing.shapes_in(self)
        num_steps, residual, converged, status, tolerance = known
        unnamed = {True: "converged", False: "NOT_RUN"}
        names = [
            printing.member(Status, s) if s else unnamed[bool(c)]
            for s, c in zip(
                *(x.ravel() for x in np.broadcast_arrays(status, converged)), strict=True
            )
        ]
        if max(x.ndim for x in known):
            return printing.record(self, printing.tally("solve", names))
        text = f"residual {printing.number(residual)}"
        if tolerance > 0:
            sign = "<=" if residual <= tolerance else ">"
            text += f" {sign} {printing.number(tolerance)}"
        return printing.record(self, f"{names[0]} after {printing.count(num_steps, 'step')}", text)


def solve_info(
    num_steps: Scalar, residual: Scalar, status: Scalar, tolerance: Scalar = 0.0
) -> SolveInfo:
    """A `SolveInfo` whose `converged` follows from its `status`."""
    status, residual = jnp.asarray(status, jnp.int32), jnp.asarray(residual)
    converged = (status >= int(Status.CONVERGED)) & (status <= int(Status.AT_FLOOR))
    tolerance = jnp.asarray(tolerance, residual.dtype)
    return SolveInfo(jnp.asarray(num_steps, jnp.int32), residual, converged, status, tolerance)


def failed(info: SolveInfo) -> jax.Array:
    """Whether a solve failed, element by element."""
    unnamed = jnp.asarray(info.status) == int(Status.NOT_RUN)
    return is_failure(jnp.asarray(info.status)) | (unnamed & ~jnp.asarray(info.converged))


class LinearSolver(Protocol):
    """Solves (I − M) x = b from products with M alone."""

    def __call__(
        self, matvec: MatVec, b: PyTree, x0: PyTree | None = None
    ) -> tuple[PyTree, SolveInfo]: ...


class Backward(NamedTuple):
    """What the reverse rule of an estimator gives.

    Attributes:
        w0_bar: Cotangent of the solver's starting point; `None` where it is zero by construction.
        args_bar: Cotangent of `args`.
        v: The solution of (I − Jᵀ) v = w̄; `None` for an estimator that solves no such system.
        info: Of that solve; `None` without it.
    """

    w0_bar: PyTree | None
    args_bar: PyTree
    v: PyTree | None
    info: SolveInfo | None


class Forward(NamedTuple):
    """What the forward rule of an estimator gives: w, its tangent, and the solver's `extra`."""

    w: PyTree
    w_dot: PyTree
    extra: PyTree


Solve = Callable[[LinearSolver, MatVec, PyTree], tuple[PyTree, SolveInfo | None]]
"""How a rule runs a linear solver: `(linear_solver, matvec, b) -> (x, info)`.

The decorator gives the solve a derivative and a policy for failure; the explicit form gives it a
start vector, and lets the info out.
"""


class Estimator(NamedTuple):
    """The pure functions that a derivative rule of w(λ) needs.

    `phi(w, args) -> w` and `solver(w0, args) -> (w, extra)` take everything that they depend on in
    the one pytree `args`; w and `args` have inexact leaves only. `extra` is passed through. A rule
    runs its linear solver through `solve`, never by itself.

    Attributes:
        fwd: `(phi, solver, w0, args) -> (w, extra, residuals)`.
        bwd: `(phi, residuals, w_bar, solve) -> Backward`.
        jvp: `(phi, solver, (w0, args), (w0_dot, args_dot), solve) -> Forward`.
        mode: The rule that `fixed_point` installs: "unroll" leaves the solver to JAX, "reverse"
            installs `fwd` and `bwd` as a `jax.custom_vjp`, "forward" installs `jvp` as a
            `jax.custom_jvp`, from which JAX derives the reverse mode by transposition.
        traced: Whether the functions close over traced values (a tolerance). The decorated solver
            then belongs to that trace, and has no `jit` of its own.
        name: How it prints: as the call that made it.
    """

    fwd: Callable[..., tuple[PyTree, PyTree, PyTree]]
    bwd: Callable[..., Backward]
    jvp: Callable[..., Forward]
    mode: Literal["unroll", "reverse", "forward"]
    traced: bool = False
    name: str = "Estimator(...)"

    def __repr__(self) -> str:
        return self.name


class Stopping(NamedTuple):
    """Exactly `num_steps`; or, where that is `None`, at most `max_steps` with a tolerance."""

    num_steps: int | None
    max_steps: int
    rtol: Scalar
    atol: Scalar

    @property
    def traced(self) -> bool:
        """Whether a tolerance is traced."""
        return isinstance(self.rtol, Tracer) or isinstance(self.atol, Tracer)

    def tolerance(self, scale: jax.Array) -> jax.Array:
        """The residual norm to reach: max(rtol · scale, atol)."""
        rtol, atol = (jnp.asarray(x, scale.dtype) for x in (self.rtol, self.atol))
        return jnp.maximum(rtol * scale, atol)


def stopping(
    where: str, num_steps: int | None, max_steps: int | None, rtol: Scalar, atol: Scalar
) -> Stopping:
    """Checks the stopping rule of the factory `where`.

    Raises:
        ValueError: None or both of `num_steps` and `max_steps`, a count that is not a positive
            integer, a tolerance together with `num_steps`, `rtol` outside [0, 1), a negative or
            infinite `atol`.
    """
    if (num_steps is None) == (max_steps is None):
        raise ValueError(
            f"`{where}` needs exactly one of `num_steps` (that many steps) and `max_steps` (at most "
            f"that many, with `rtol`, `atol`), got num_steps={num_steps!r}, max_steps={max_steps!r}."
        )
    for name, count in (("num_steps", num_steps), ("max_steps", max_steps)):
        if count is not None:
            check_count(where, name, count)
    # With a relative tolerance of 1 or more, zero would solve every system.
    check_number(where, "rtol", rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")
    check_number(where, "atol", atol, lambda x: 0 <= x < jnp.inf, "a finite number >= 0")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        concrete = not isinstance(tolerance, Tracer)
        if num_steps is not None and not (concrete and float(tolerance) == 0):
            raise ValueError(
                f"`{where}` with `num_steps` takes exactly that many steps and has no tolerance, "
                f"got {name}={tolerance!r}; use `max_steps` for early stopping."
            )
    # A tolerance that depends on λ is no way in which the solution does.
    rtol, atol = (lax.stop_gradient(x) if isinstance(x, Tracer) else x for x in (rtol, atol))
    return Stopping(num_steps, max_steps or 0, rtol, atol)


def check_count(where: str, name: str, count: object) -> None:
    """Raises `ValueError` unless `count` is a positive Python integer."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(
            f"`{name}` of `{where}` must be a positive integer known before tracing, got "
            f"{show(count)}."
        )


def check_number(
    where: str, name: str, value: object, accept: Callable[[float], bool], wanted: str
) -> None:
    """Raises `ValueError` unless `value` is a real scalar, acceptable if it is concrete."""
    shape, dtype = np.shape(value), jnp.result_type(value) if _is_numeric(value) else None  # pyright: ignore
    if (
        dtype is None
        or shape != ()
        or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    ):
        raise ValueError(f"`{name}` of `{where}` must be {wanted}, got {show(value)}.")
    if not isinstance(value, Tracer) and not accept(float(value)):  # pyright: ignore
        raise ValueError(f"`{name}` of `{where}` must be {wanted}, got {show(value)}.")


def check_callable(where: str, name: str, value: object, signature: str) -> None:
    """Raises `TypeError` unless `value` is callable."""
    if not callable(value):
        raise TypeError(
            f"`{name}` of `{where}` must be a function `{signature}`, got {show(value)}."
        )


def check_same(where: str, got: PyTree, wanted: PyTree, got_name: str, wanted_name: str) -> None:
    """Raises `TypeError` unless two pytrees agree in structure, shapes and dtypes."""
    # Not as text: a class need not have a `repr`, nor one that shows what it holds.
    if _described(got) != _described(wanted):
        both = shapes_of(wanted), shapes_of(got)
        one, other = both if both[0] != both[1] else (_in_full(wanted), _in_full(got))
        raise TypeError(
            f"`{where}`: {got_name} must have the structure, shapes and dtypes of {wanted_name}.\n"
            f"  {wanted_name}: {one}\n"
            f"  {got_name}: {other}\n"
            "Make the two agree; where only dtypes differ, cast one of them with `.astype`."
        )


def check_inexact(where: str, name: str, tree: PyTree) -> None:
    """Raises `TypeError` unless every leaf of `tree` is a floating-point or complex array."""
    if not all(
        _is_numeric(x, complex) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        for x in jax.tree.leaves(tree)
    ):
        raise TypeError(
            f"`{name}` of `{where}` must hold floating-point or complex arrays only, got "
            f"{shapes_of(tree)}; cast integers, as in `1.0` for `1`, and keep keys elsewhere."
        )


def check_scalar(where: str, value: PyTree, name: str = "outer") -> None:
    """Raises `TypeError` unless `value` (an array or its shape) is one real scalar."""
    numeric = _is_numeric(value) or isinstance(value, jax.ShapeDtypeStruct)
    real = numeric and jnp.issubdtype(jnp.result_type(value), jnp.floating)  # pyright: ignore
    if not real or np.shape(value) != ():
        raise TypeError(
            f"`{name}` of `{where}` must return one real scalar, got {shapes_of(value)}; sum or "
            "average the losses, and return auxiliary output elsewhere."
        )


@contextmanager
def hint(*exceptions: type[Exception], text: Callable[[], str]) -> Iterator[None]:
    """Adds a note to an exception of code that is not ours: what was going on, what to do."""
    try:
        yield
    except exceptions as error:
        error.add_note(text())
        raise


def _is_numeric(value: object, *more: type) -> bool:
    kinds = (int, float, np.ndarray, np.generic, jax.Array, *more)
    return isinstance(value, kinds) and not isinstance(value, bool)


def show(value: object) -> str:
    """A value and its type, for an error message."""
    if isinstance(value, Tracer):
        return f"a traced {jax.typeof(value)}"
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} of type `{type(value).__name__}`"


def shapes_of(tree: PyTree) -> str:
    """One line with the shapes and dtypes of a pytree, such as `{'a': float32[3]}`."""
    treedef, leaves = _described(tree)
    try:
        text = str(jax.tree.unflatten(treedef, [_Bare(leaf) for leaf in leaves]))
    except Exception:  # A class that looks at its leaves.
        text = ""
    return text if text and " object at 0x" not in text else _in_full(tree)


def _in_full(tree: PyTree) -> str:
    """The same, in JAX's words for the structure."""
    treedef, leaves = _described(tree)
    return f"{treedef} of ({', '.join(leaves)})"


def _described(tree: PyTree) -> tuple[Any, list[str]]:
    """The structure of a pytree, and shape and dtype of each leaf."""

    def leaf(x: Any) -> str:
        if isinstance(x, _Bare):
            return x
        if not hasattr(x, "dtype"):
            x = jnp.asarray(x) if _is_numeric(x) or isinstance(x, bool | complex) else x
        if not hasattr(x, "dtype"):
            return type(x).__name__
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"

    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [leaf(x) for x in leaves]


class _Bare(str):
    """A string that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
