"""Linear solvers whose options can be changed: the same method, to another tolerance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax.numpy as jnp

from ..types import LinearSolver, MatVec, PyTree, Scalar, SolveInfo

Factory = TypeVar("Factory", bound=Callable[..., LinearSolver])


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Tunable:
    """A linear solver that remembers what it was made from.

    Not a `NamedTuple`: a value that `jax.jit` and closures hold is no pytree of its options.

    Attributes:
        solve: The solver itself.
        factory: What made it.
        options: With which options.
        unjudged: The same without a verdict, which may cost as much as the solve, for steps that their
            own residual judges; `None` where it is the same.
        name: How it prints: as the call that made it.
    """

    solve: LinearSolver
    factory: Callable[..., LinearSolver]
    options: dict[str, Any]
    unjudged: LinearSolver | None = None
    name: str = "Tunable(...)"

    def __repr__(self) -> str:
        return self.name

    def __call__(
        self, matvec: MatVec, b: PyTree, x0: PyTree | None = None
    ) -> tuple[PyTree, SolveInfo]:
        return self.solve(matvec, b, x0)

    def replaced(self, **options: Any) -> LinearSolver:
        """The same method with these options in the place of its own."""
        return self.factory(**{**self.options, **options})


def tunable(factory: Factory) -> Factory:
    """The factory, whose results are `Tunable`."""

    @functools.wraps(factory)
    def make(**options: Any) -> LinearSolver:
        return Tunable(factory(**options), make, options)

    return cast(Factory, make)


def loosened(linear_solver: LinearSolver, rtol: Scalar) -> LinearSolver:
    """The solver for a step that need not be more accurate than `rtol`, and is judged by its result.

    A tolerance that is tighter gives way, and so does a verdict. A solver of the user's own is left as
    it is.
    """
    if not isinstance(linear_solver, Tunable):
        return linear_solver
    if not linear_solver.options.get("max_steps"):
        return linear_solver.unjudged or linear_solver
    own = linear_solver.options.get("rtol", 0.0)
    return linear_solver.replaced(rtol=jnp.maximum(rtol, jnp.asarray(own, jnp.result_type(rtol))))
