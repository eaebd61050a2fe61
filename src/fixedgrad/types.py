"""The nouns: Φ, solvers, the estimator, the outer objective, and what a solve says of itself."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Scalar = float | jax.Array | np.ndarray
OnFailure = Literal["nan", "zero", "warn", "raise", "ignore"]
MatVec = Callable[[PyTree], PyTree]


class Phi(Protocol):
    """The fixed-point map Φ: `phi(w, *args, **kwargs) -> w`, structure, shapes, dtypes of `w`."""

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree: ...


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ResidualMap:
    """A map Φ that knows F(w, λ) = w − Φ(w, λ) better than by subtraction.

    A step of gradient descent has F = α ∇₁ℓ. Where the system is ill-conditioned I − J = ∂₁F is small
    on some u, and u − J u has lost the digits that a product with ∂₁F has.

    Attributes:
        phi: Φ.
        residual: F, with the arguments of Φ; leaves that are not inexact may be anything.
        any_scale: Whether F may be multiplied by any factor, since only its root matters. How small F
            is then shows beside its derivative, not beside w.
        name: How it prints: as the call that made it.
    """

    phi: Callable[..., PyTree]
    residual: Callable[..., PyTree]
    any_scale: bool = False
    name: str = "ResidualMap(...)"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.phi(w, *args, **kwargs)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ComposedMap:
    """A map Φ(w, λ) = G(T(w, λ), λ) of which T alone is a mean over data.

    A proximal gradient step is one: T is the gradient step, G the proximal map. The mean over batches
    of G(T) is not G of the mean of T, so whoever averages over data averages T.

    Attributes:
        inner: T, with the arguments of Φ; its result u may be any pytree.
        after: G, `after(u, *args, **kwargs) -> w`.
        name: How it prints: as the call that made it.
    """

    inner: Callable[..., PyTree]
    after: Callable[..., PyTree]
    name: str = "ComposedMap(...)"

    def __repr__(self) -> str:
        return self.name

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.after(self.inner(w, *args, **kwargs), *args, **kwargs)


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
    - `TOO_FEW_STEPS`: Steps that a tolerance on w ended, from a start too near to the solution, are too
      few for the derivative of w.
    - `NOT_A_MEAN`: Φ or E of a batch twice is not that of the batch: a sum over rows, or otherwise no
      mean over them, of which a batch tells nothing about all data.
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
    TOO_FEW_STEPS = 12
    NOT_A_MEAN = 13


def is_failure(status: jax.Array) -> jax.Array:
    """Whether a solve with this `Status` failed, element by element."""
    # As an `int`: with `jax.disable_jit` the enumeration would count as int64.
    return status >= int(Status.NO_PROGRESS)


def status_where(
    condition: jax.Array, then: jax.Array | Status, otherwise: jax.Array | Status
) -> jax.Array:
    """`then` where the condition holds, else `otherwise`, as int32."""
    return jnp.where(condition, jnp.asarray(then, jnp.int32), jnp.asarray(otherwise, jnp.int32))


def status_of(fine: enum.IntEnum, *tests: tuple[jax.Array, enum.IntEnum]) -> jax.Array:
    """`fine`, or the status beside the last test that does not hold, as int32."""
    status = jnp.int32(fine)
    for holds, otherwise in tests:
        status = jnp.where(holds, status, jnp.int32(otherwise))
    return status


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
        from . import printing  # Which needs types itself.

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

    def _repr_html_(self) -> str:
        from . import printing

        return printing.html(type(self).__name__, self._asdict(), status=Status)


class Products(NamedTuple):
    """Counts of evaluations of Φ, of products with J, and of products with Jᵀ; int32."""

    phi: jax.Array
    j: jax.Array
    jt: jax.Array

    def __repr__(self) -> str:
        from . import printing

        known = printing.values_of(*self)
        if known is None or max(x.ndim for x in known):
            return printing.shapes_in(self)
        names = zip(("Φ", "J", "Jᵀ"), known, strict=True)
        return printing.record(self, *(f"{count} {name}" for name, count in names))


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


class Jacobian(NamedTuple):
    """Products with M = J or Jᵀ, as a linear solver is given them.

    Attributes:
        product: u ↦ M u.
        complement: u ↦ (I − M) u, where it is known more accurately than as u − M u; else `None`.
        transposed: Whether M is Jᵀ, and not J.
        any_scale: Whether I − M is that of a `ResidualMap` of any scale: its size is not about 1.
    """

    product: MatVec
    complement: MatVec | None = None
    transposed: bool = False
    any_scale: bool = False

    def __call__(self, u: PyTree) -> PyTree:
        return self.product(u)

    @property
    def a(self) -> MatVec:
        """U ↦ A u, A = I − M, by the one that is known."""
        return self.complement or (lambda u: jax.tree.map(jnp.subtract, u, self.product(u)))

    @property
    def known(self) -> MatVec:
        """The one of the two from which the other follows."""
        return self.complement or self.product

    def replaced(self, known: MatVec) -> "Jacobian":
        """The same of another matrix, given the same one of the two."""
        if self.complement is None:
            return Jacobian(known, None, self.transposed)
        return self.with_complement(known)

    def with_complement(self, complement: MatVec) -> "Jacobian":
        """The same kind of M, of other products with I − M."""
        return Jacobian.from_complement(complement, self.transposed, self.any_scale)

    @classmethod
    def from_complement(
        cls, complement: MatVec, transposed: bool = False, any_scale: bool = False
    ) -> "Jacobian":
        """Of products with I − M."""
        product = lambda u: jax.tree.map(jnp.subtract, u, complement(u))  # noqa: E731
        return cls(product, complement, transposed, any_scale)


def jacobian(matvec: MatVec) -> Jacobian:
    """Products with M from any function that gives them."""
    return matvec if isinstance(matvec, Jacobian) else Jacobian(matvec)


class LinearSolver(Protocol):
    """Solves (I − M) x = b from products with M alone."""

    def __call__(
        self, matvec: MatVec, b: PyTree, x0: PyTree | None = None
    ) -> tuple[PyTree, SolveInfo]: ...


class Solve(Protocol):
    """How a derivative rule runs a linear solver: its caller decides on start and policy."""

    def __call__(
        self, linear_solver: LinearSolver, matvec: MatVec, b: PyTree
    ) -> tuple[PyTree, SolveInfo]: ...


class Backward(NamedTuple):
    """What the reverse rule of an estimator gives.

    Attributes:
        x_bar: Cotangent of x, all that Φ depends on beside w.
        v: The solution of (I − Jᵀ) v = w̄; `None` for an estimator that solves no such system.
        info: Of that solve; `None` without it.
        residual: w − Φ(w), which the linearisation at w has at hand; `None` for whoever has not.
    """

    x_bar: PyTree
    v: PyTree | None
    info: SolveInfo | None
    residual: PyTree | None = None


class ReverseRule(Protocol):
    """w̄ ↦ w'(λ)ᵀ w̄ at the solver's w; `equation` is a `fixedgrad.problem.Equation`."""

    def __call__(
        self, equation: Any, w: PyTree, x: PyTree, w_bar: PyTree, solve: Solve
    ) -> Backward: ...


class ForwardRule(Protocol):
    """ẋ ↦ w'(λ) ẋ at the solver's w; linear in `x_dot`, as JAX has to transpose it."""

    def __call__(
        self, equation: Any, w: PyTree, x: PyTree, x_dot: PyTree, solve: Solve
    ) -> PyTree: ...


class Unrefined(NamedTuple):
    """The solver's w as it is."""

    def __call__(self, equation: Any, w: PyTree, x: PyTree) -> PyTree:
        del equation, x
        return w


class Implicit(NamedTuple):
    """An estimator that differentiates the equation w = Φ(w, x) at the solver's w, not the solver.

    The rules see inexact leaves only: w, and in x all that Φ depends on beside it. They run a linear
    solver through `solve`, never by themselves.

    Attributes:
        vjp: The reverse rule, `(equation, w, x, w_bar, solve) -> Backward`.
        jvp: The forward rule, `(equation, w, x, x_dot, solve) -> w_dot`.
        refine: `(equation, w, x) -> w`: what becomes of the solver's w.
        every_mode: Whether `fixed_point` installs the forward rule alone, from which JAX derives the
            reverse mode by transposition; else the reverse rule, and no plain `jvp`.
        linear_solver: What the rules run, where that is one; `None` where it is not.
        name: How it prints: as the call that made it.
    """

    vjp: ReverseRule
    jvp: ForwardRule
    refine: Callable[[Any, PyTree, PyTree], PyTree] = Unrefined()
    every_mode: bool = False
    linear_solver: Any = None
    name: str = "Implicit(...)"

    def __repr__(self) -> str:
        return self.name


class Unrolled(NamedTuple):
    """The estimator that says nothing: JAX differentiates the solver's own iterations."""

    name: str = "Unrolled()"

    def __repr__(self) -> str:
        return self.name


Estimator = Implicit | Unrolled
