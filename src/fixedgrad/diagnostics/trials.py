"""Every method that applies is tried on the problem at hand: what it takes to the hypergradient."""

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax

from ..certificate.options import krylov
from ..estimators import aid, itd
from ..leaves import partition
from ..linear import bicgstab, cg, dense, fp, gmres, inverse, normal_cg
from ..lower import anderson, newton, picard
from ..problem import Problem, compiled_at
from ..real_form import COMPUTATION, resolution
from ..types import (
    Estimator,
    LinearSolver,
    Outer,
    Phi,
    PyTree,
    Scalar,
    SolveInfo,
    Solver,
    Status,
    failed,
)
from .numbers import difference, norm
from .spectrum import Spectrum

MAX_STEPS = 5000
ITD = "itd()"

_DIRECT = 2048  # Unknowns up to which a direct solve is tried.
_DENSE = "aid(dense())"

_NEWTON_STEPS = 60
_FEW = 64  # Unknowns up to which Newton's method makes a matrix in each step.
_SOME = 1024  # Unknowns up to which it is tried with one in all.
_NEWTON = {
    name: functools.partial(newton, linear_solver=linear_solver)
    for name, linear_solver in {
        "dense()": dense(),
        "cg(max_steps=1000)": cg(max_steps=1000),
        "gmres(max_steps=1000)": gmres(max_steps=1000),
        "cg(max_steps=1000, preconditioner=inverse())": cg(
            max_steps=1000, preconditioner=inverse()
        ),
        "gmres(max_steps=1000, preconditioner=inverse())": gmres(
            max_steps=1000, preconditioner=inverse()
        ),
    }.items()
}


class Alternative(NamedTuple):
    """One way to the hypergradient, measured on this problem.

    Attributes:
        name: The call that makes it.
        estimator: The estimator, ready to use.
        usable: Whether it reached the tolerance without a breakdown (`itd`: whether ρ(J) < 1).
        products: Products with J or Jᵀ that it took (`itd`: predicted from ρ(J)).
        seconds: The least time of some compiled runs on this machine; NaN where not
            usable, and for `itd`.
        memory: Memory in units of w.
        why: The reason for or against it, one clause.
    """

    name: str
    estimator: Estimator
    usable: bool
    products: int
    seconds: float
    memory: int
    why: str


class Way(NamedTuple):
    """One way to w(λ), measured on this problem from w₀.

    Attributes:
        name: The call that makes it.
        solver: The solver, ready to use.
        usable: Whether the hypergradient at its w is right to the tolerance.
        steps: Its steps.
        seconds: As in `Alternative`.
        why: The reason for or against it, one clause.
    """

    name: str
    solver: Solver
    usable: bool
    steps: int
    seconds: float
    why: str


class On(NamedTuple):
    """Functions of the problem at any w, compiled once for these functions and shapes."""

    outer: Outer
    phi: Phi
    lam: PyTree
    args: tuple[PyTree, ...]
    data: dict[str, PyTree]

    def __call__(
        self,
        function: Callable[..., PyTree],
        w: PyTree,
        *operands: PyTree,
        options: tuple[Hashable, ...] = (),
    ) -> PyTree:
        run = compiled_at("recommend", function, (self.outer, self.phi), *options)
        return run(w, self.lam, self.args, self.data, *operands)


class Truth(NamedTuple):
    """The hypergradient to be found.

    Attributes:
        gradient: It.
        enough: How far from it one may be.
        make: The linear solver by which it was found.
        spent: Products that it took.
    """

    gradient: PyTree
    enough: float
    make: Callable[..., LinearSolver]
    spent: int

    def reached(self, gradient: PyTree) -> bool:
        """Whether this is near enough."""
        return norm(difference(gradient, self.gradient)) <= self.enough


def truth(compute: On, w: PyTree, spectrum: Spectrum, rtol: float) -> Truth:
    """That at w, to a relative error of `rtol`."""
    make = _direct if spectrum.size <= _DIRECT else _reference
    gradient, info = compute(_hypergradient, w, 1e-3 * rtol, options=(make, MAX_STEPS))
    # What may be missed: of the tolerance, and of rounding.
    eps = resolution((w, partition(compute.lam)[0]))
    enough = rtol * norm(gradient) + COMPUTATION * eps * norm(w)
    return Truth(gradient, enough, make, int(info.num_steps))


def tried(
    compute: On, w: PyTree, spectrum: Spectrum, rtol: float, left: int, true: Truth
) -> list[Alternative]:
    """Every method for the linear system that applies, within `left` products."""
    candidates = list(_candidates(spectrum))
    found: list[Alternative] = []
    succeeded = set()
    for i, candidate in enumerate(candidates):
        if succeeded & set(candidate.unless):
            continue
        share = max(left, 0) // (len(candidates) - i)
        one, spent = _try(compute, w, candidate, spectrum.size, rtol, true, share)
        found.append(one)
        if one.usable:
            succeeded.add(candidate.make)
        left -= spent
    return found


class _Candidate(NamedTuple):
    """A linear solver, its memory, and when it is tried.

    Attributes:
        make: The factory, of `max_steps` and `rtol`.
        memory: Memory in units of w.
        why: The reason to take it, one clause.
        products: Products a step.
        unless: Methods that do the same for less. This one is tried where none of them succeeded.
    """

    make: Callable[..., LinearSolver]
    memory: int
    why: str
    products: int = 1
    unless: tuple[Callable[..., LinearSolver], ...] = ()


def _candidates(spectrum: Spectrum) -> Iterator[_Candidate]:
    """The methods that apply."""
    if spectrum.size <= _DIRECT:
        yield _Candidate(_direct, spectrum.size, "d is small enough for a direct solve")
    if spectrum.symmetric and spectrum.definite:
        yield _Candidate(cg, 5, "J is symmetric and I - J positive definite")
    if spectrum.radius < 1:
        yield _Candidate(fp, 2, f"fixed-point steps contract by about {spectrum.radius:.3g}")
    yield _Candidate(gmres, 34, "right for any invertible I - J", 1, (cg,))
    why = "right for any invertible I - J, in little memory"
    yield _Candidate(bicgstab, 8, why, 2, (cg,))
    yield _Candidate(normal_cg, 5, why, 2, (cg, gmres, bicgstab))


def _direct(*, max_steps: int, rtol: Scalar) -> LinearSolver:
    """`dense`, which has no steps."""
    del max_steps, rtol
    return dense()


def _reference(*, max_steps: int, rtol: Scalar) -> LinearSolver:
    """The default solver of certificates, which has its own bound on steps."""
    del max_steps
    return krylov(rtol)


def _hypergradient(
    problem: Problem, make: Callable[..., LinearSolver], max_steps: int, rtol: jax.Array
) -> tuple[PyTree, SolveInfo]:
    """(∇₂E + Bᵀv, info) with v by one linear solver."""
    at = problem.adjoint(problem.w)
    v, info = make(max_steps=max_steps, rtol=rtol)(at.jt, at.b)
    return at.gradient(v), info


def _try(
    compute: On,
    w: PyTree,
    c: _Candidate,
    size: int,
    rtol: float,
    true: Truth,
    share: int,
) -> tuple[Alternative, int]:
    """The hypergradient by one method, to the first of some tolerances that gets it right.

    Returns:
        What came of it, and the products spent.
    """
    direct = c.make is _direct
    max_steps = MAX_STEPS if direct else max(1, min(MAX_STEPS, share // c.products))
    spent = 0

    def solve(rtol: float) -> tuple[PyTree, SolveInfo]:
        return compute(_hypergradient, w, rtol, options=(c.make, max_steps))

    for tightened in (rtol, 0.1 * rtol, 0.01 * rtol, 1e-3 * rtol):
        gradient, info = solve(tightened)
        lost = bool(failed(info))
        usable = not lost and true.reached(gradient)
        products = size if direct else c.products * (int(info.num_steps) + 1)
        spent += products
        if usable or direct or lost or spent >= share:
            break
    if direct:
        name, solver = _DENSE, dense()
    else:
        name = f"aid({c.make.__name__}(max_steps={MAX_STEPS}, rtol={tightened:g}))"
        solver = c.make(max_steps=MAX_STEPS, rtol=tightened)
    missed = Status(int(info.status)).name if lost else "does not get the gradient right"
    why = c.why if usable else missed
    seconds = _least_time(lambda: solve(tightened)) if usable else math.nan
    return Alternative(name, aid(solver), usable, products, seconds, c.memory, why), spent


def ways(
    compute: On, w0: PyTree, spectrum: Spectrum, rtol: float, max_steps: int, true: Truth
) -> list[Way]:
    """Every method for the lower level that applies, the simplest first; see `_way`."""
    candidates = list(_lower_candidates(spectrum))
    return [_way(compute, w0, c, rtol, max_steps, true) for c in candidates]


class _LowerCandidate(NamedTuple):
    """A solver of the lower level.

    Attributes:
        make: The factory, of Φ, `max_steps` and `rtol`.
        name: The call, with places for `max_steps` and `rtol`.
        why: The reason to take it, one clause.
        max_steps: At most that many.
    """

    make: Callable[..., Any]
    name: str
    why: str
    max_steps: int = MAX_STEPS


def _lower_candidates(spectrum: Spectrum) -> Iterator[_LowerCandidate]:
    """The methods that apply, the simplest first."""
    if spectrum.radius < 1:
        why = f"steps of Phi contract by about {spectrum.radius:.3g}"
        yield _LowerCandidate(picard, "picard(phi, max_steps={}, rtol={:g})", why)
    why = "fewer steps of Phi, by looking back at some"
    yield _LowerCandidate(anderson, "anderson(phi, max_steps={}, rtol={:g})", why)
    krylov = "cg" if spectrum.symmetric and spectrum.definite else "gmres"
    linear_solvers = {f"{krylov}(max_steps=1000)": "few steps, of a linear solve each"}
    if spectrum.size <= _FEW:
        linear_solvers = {"dense()": "few steps, and d is small"}
    elif spectrum.size <= _SOME:
        with_inverse = f"{krylov}(max_steps=1000, preconditioner=inverse())"
        linear_solvers[with_inverse] = "few steps, with one matrix in all"
    for linear_solver, why in linear_solvers.items():
        name = f"newton(phi, max_steps={{}}, rtol={{:g}}, linear_solver={linear_solver})"
        yield _LowerCandidate(_NEWTON[linear_solver], name, why, _NEWTON_STEPS)


def _arrived(
    problem: Problem, make: Callable[..., Any], max_steps: int, rtol: jax.Array
) -> tuple[PyTree, SolveInfo]:
    """Where a solver of the lower level comes to from w."""
    phi = lambda w: problem.equation.phi(w, problem.x)  # noqa: E731
    w, info = make(phi, max_steps=max_steps, rtol=rtol).with_info(problem.w)
    return problem.join_w(w), info


def _way(
    compute: On, w0: PyTree, c: _LowerCandidate, rtol: float, max_steps: int, true: Truth
) -> Way:
    """The lower level by one method, to the first of some tolerances that gets the gradient right."""
    max_steps = min(c.max_steps, max_steps)

    def solve(rtol: float) -> tuple[PyTree, SolveInfo]:
        return compute(_arrived, w0, rtol, options=(c.make, max_steps))

    for tightened in (rtol, 0.1 * rtol, 0.01 * rtol, 1e-3 * rtol, 1e-4 * rtol):
        w, info = solve(tightened)
        lost = bool(failed(info))
        gradient, _ = compute(_hypergradient, w, 1e-3 * rtol, options=(true.make, MAX_STEPS))
        usable = not lost and true.reached(gradient)
        if usable or lost:
            break
    name = c.name.format(c.max_steps, tightened)
    solver = c.make(compute.phi, max_steps=c.max_steps, rtol=tightened)
    missed = Status(int(info.status)).name if lost else "does not get the gradient right"
    seconds = _least_time(lambda: solve(tightened)) if usable else math.nan
    return Way(name, solver, usable, int(info.num_steps), seconds, c.why if usable else missed)


def _least_time(run: Callable[[], PyTree], most: float = 0.02) -> float:
    """The least time of a run in seconds, from as many as take `most` together, ten at most."""
    times: list[float] = []
    while len(times) < 10 and sum(times) < most:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def unrolled(spectrum: Spectrum, rtol: float) -> Alternative:
    """`itd`, by what it would take."""
    contracts = 0 < spectrum.radius < 1
    steps = math.ceil(math.log(rtol) / math.log(spectrum.radius)) if contracts else MAX_STEPS
    steps = max(steps, 1)
    why = "reverse mode through a loop of static length; holds all iterates"
    return Alternative(ITD, itd(), spectrum.radius < 1, steps, math.nan, steps, why)
