"""What kind of problem is this, and which estimator suits it? `recommend` measures.

It runs outside `jit`, prints well, and measures rather than guesses: products are counted by solving
the linear system at hand with every method that applies.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple

import jax

from ..certificate.options import NO_KWARGS, check_kwargs, krylov
from ..errors import check_callable, check_count, check_number, check_same
from ..estimators import aid, itd
from ..leaves import check_concrete, partition, strongly_typed
from ..linear import bicgstab, cg, dense, fp, gmres, normal_cg
from ..lower import solve_with_info
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
from .spectrum import Spectrum, judge_lower, measure, solve_lower

_MAX_STEPS = 5000
_DIRECT = 2048  # Unknowns up to which a direct solve is tried.
_NEAR = 1.2  # Methods within this factor of the least time are equally fast.


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


class Recommendation(NamedTuple):
    """What `recommend` found.

    Attributes:
        estimator: The recommended estimator, ready to use; `None` where nothing works here.
        name: The call that makes it; "nothing" where nothing works.
        reasons: Reasons for the choice, in sentences.
        warnings: Dangers that were seen, in sentences.
        alternatives: Every method tried, the fastest first.
        size: Real unknowns d in w.
        spectral_radius: ρ(J) at the solution, estimated from below by power iteration.
        norm: ‖J‖, the same way; the local contraction constant in the Euclidean norm.
        symmetric: Whether J is symmetric to the precision of random probes.
        definite: Whether I − J is positive definite (its symmetric part, estimated).
        condition: Condition number of I − J where J is symmetric, else NaN; estimated from below.
        residual: ‖Φ(w) − w‖ where all of this was measured.
    """

    estimator: Estimator | None
    name: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    size: int
    spectral_radius: float
    norm: float
    symmetric: bool
    definite: bool
    condition: float
    residual: float

    def __repr__(self) -> str:
        works = "" if self.estimator is not None else " works here"
        lines = [f"recommended: {self.name}{works}", *(f"  because {r}" for r in self.reasons)]
        lines += [f"  warning: {w}" for w in self.warnings]
        symmetric = "symmetric" if self.symmetric else "not symmetric"
        lines.append(
            f"  d = {self.size}, rho(J) = {self.spectral_radius:.4g}, |J| = {self.norm:.4g}, "
            f"J {symmetric}, condition of I - J = {self.condition:.3g}, "
            f"|Phi(w) - w| = {self.residual:.2g}"
        )
        lines.append(f"  {'method':<46} {'usable':<7} {'products':>8} {'ms':>8} {'memory/w':>9}")
        for a in self.alternatives:
            usable = "yes" if a.usable else "no"
            products = f"{a.products}" if a.products < _MAX_STEPS else "-"
            ms = "-" if math.isnan(a.seconds) else f"{1e3 * a.seconds:.3g}"
            lines.append(f"  {a.name:<46} {usable:<7} {products:>8} {ms:>8} {a.memory:>9}  {a.why}")
        return "\n".join(lines)


def recommend(
    outer: Outer,
    phi: Phi,
    w0: PyTree,
    lam: PyTree,
    /,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    rtol: float = 1e-3,
    seed: int = 0,
    solver: Solver | None = None,
    max_products: int = 20_000,
) -> Recommendation:
    """Which estimator suits this problem, why, and at what cost.

    Solves the lower level (Newton–Krylov, or your `solver`), estimates ρ(J) and ‖J‖ by power
    iteration, the symmetry of J by random probes, the extreme eigenvalues where it is symmetric, and
    then computes the hypergradient at w(λ) to `rtol` by the methods that apply, and times them: to
    residuals of `rtol`, and of less by factors of ten where the hypergradient needs it. Once `cg` has
    succeeded, the methods for any I − J are not tried; `normal_cg` is where no other succeeded.

    The rule: the fastest that succeeded, or the one that takes least memory among those within a fifth
    of its time. `itd` where the lower level was not solved, or nothing else succeeded, and Φ contracts:
    it differentiates what your solver computes.
    Where Φ does not contract either, nothing works: `estimator` is `None`, and the reasons say why.

    Estimates from power iteration are lower bounds of what they estimate. What cannot be measured:
    whether λ enters the solver in other ways than through Φ; then use `itd`.

    The times are of this machine and of this moment: where two methods are equally fast, either may be
    recommended.

    Cost: some hundreds of products as a rule, and at most `max_products` and seven hundred for the
    spectrum, and some runs of each method that succeeds; it compiles, the first time. Not under `jit`.
    Memory: that of `gmres`, and of `dense` for d ≤ 2048.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w0: Where the lower-level solve starts.
        lam: λ.
        *args: Data.
        kwargs: Data by keyword, `kwargs={"x": x}` for `phi(w, lam, x=x)`: other keywords are options.
        rtol: Relative tolerance on the hypergradient at w(λ).
        seed: Of the random probes.
        solver: `solver(w0, lam, *args, **kwargs) -> w`, yours, whose w is taken; `None` for
            Newton–Krylov steps on Φ.
        max_products: Bound on products and evaluations of Φ: half of them to solve the lower level,
            what is left to the methods in equal shares, 5000 steps each at most. A linear solve or a
            Newton step that has begun may exceed its share.

    Returns:
        A `Recommendation`; print it.

    Raises:
        TypeError: An argument is not of its kind or shape, or is traced; an option that there is not,
            or that could be meant for a parameter of `phi` or `outer`.
        ValueError: `rtol` is not in (0, 1), or `max_products` not a positive integer.

    >>> import jax.numpy as jnp
    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> advice = recommend(lambda w, lam: jnp.sum(w**2), phi, jnp.zeros(3), jnp.ones(3))
    >>> advice.symmetric, round(advice.spectral_radius, 3), advice.warnings
    (True, 0.5, ())
    """
    check_number("recommend", "rtol", rtol, lambda x: 0 < x < 1, "a number in (0, 1)")
    check_callable("recommend", "phi", phi, "phi(w, lam, *args) -> w")
    check_count("recommend", "max_products", max_products)
    functions: dict[str, Callable[..., PyTree]] = {"phi": phi, "outer": outer}
    if solver is not None:
        check_callable("recommend", "solver", solver, "solver(w0, lam, *args) -> w")
        functions["solver"] = solver
    options = {"rtol": rtol, "seed": seed, "solver": solver, "max_products": max_products}
    data = check_kwargs(recommend, functions, 2 + len(args), kwargs, options)
    check_concrete("recommend", (w0, lam, args, data))
    compute = _On(outer, phi, lam, args, data)
    w = strongly_typed(w0)
    if solver is None:
        lower = compute(solve_lower, w0, min(rtol, 1e-6), max_products // 2)
    else:
        w, _ = solve_with_info(solver, w, lam, *args, **data)
        check_same("recommend", w, strongly_typed(w0), "`solver(w0, ...)`", "`w0`")
        lower = compute(judge_lower, w, rtol)
    w, residual, unsolved = lower.w, lower.residual, bool(lower.failed)
    *found, size = compute(measure, w, jax.random.key(seed))
    spectrum = Spectrum(*map(float, found), size=int(size))
    unrolled = _unrolled(spectrum, rtol)
    alternatives = [unrolled]
    if not unsolved:
        alternatives += _tried(compute, w, spectrum, rtol, max_products - int(lower.products))
    alternatives.sort(key=lambda a: (not a.usable, math.isnan(a.seconds), a.seconds))
    usable = [a for a in alternatives if a.usable]
    fast = [a for a in usable if a.seconds <= _NEAR * usable[0].seconds] or usable
    best = min(fast, key=lambda a: a.memory, default=None)
    warnings = _warnings(spectrum, residual, unsolved)
    missing = "the lower level was not solved" if unsolved else "no linear method succeeded"
    if best is None:
        reasons = [f"{missing}, and Phi does not contract (rho(J) = {spectrum.radius:.3g})"]
        if unsolved:
            reasons.append("every method needs a fixed point: start closer, or give your `solver`")
    elif best.name == _ITD:
        reasons = [f"{missing} here; it differentiates what your solver computes"]
    else:
        reasons = [
            f"it took {1e3 * best.seconds:.3g} ms and {best.products} products to {rtol:g}, "
            "the fastest that succeeded or nearly so"
        ]
        reasons += [best.why] * bool(best.why)
    return Recommendation(
        best.estimator if best else None,
        best.name if best else _NOTHING,
        tuple(reasons),
        tuple(warnings),
        tuple(alternatives),
        spectrum.size,
        spectrum.radius,
        spectrum.norm,
        spectrum.symmetric,
        spectrum.definite,
        spectrum.condition,
        float(residual),
    )


_ITD = "itd()"
_NOTHING = "nothing"
_DENSE = "aid(dense())"


class _On(NamedTuple):
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


def _tried(
    compute: _On, w: PyTree, spectrum: Spectrum, rtol: float, left: int
) -> list[Alternative]:
    """Every method that applies, within `left` products."""
    make = _direct if spectrum.size <= _DIRECT else _reference
    reference, info = compute(_hypergradient, w, 1e-3 * rtol, options=(make, _MAX_STEPS))
    left -= int(info.num_steps)
    # What may be missed: of the tolerance, and of rounding.
    eps = resolution((w, partition(compute.lam)[0]))
    enough = rtol * norm(reference) + COMPUTATION * eps * norm(w)
    candidates = list(_candidates(spectrum))
    found: list[Alternative] = []
    succeeded = set()
    for i, candidate in enumerate(candidates):
        if succeeded & set(candidate.unless):
            continue
        share = max(left, 0) // (len(candidates) - i)
        one, spent = _try(compute, w, candidate, spectrum.size, rtol, reference, enough, share)
        found.append(one)
        if one.usable:
            succeeded.add(candidate.make)
        left -= spent
    return found


def _try(
    compute: _On,
    w: PyTree,
    c: _Candidate,
    size: int,
    rtol: float,
    reference: PyTree,
    enough: float,
    share: int,
) -> tuple[Alternative, int]:
    """The hypergradient by one method, to the first of some tolerances that gets it right.

    Returns:
        What came of it, and the products spent.
    """
    direct = c.make is _direct
    max_steps = _MAX_STEPS if direct else max(1, min(_MAX_STEPS, share // c.products))
    spent = 0

    def solve(rtol: float) -> tuple[PyTree, SolveInfo]:
        return compute(_hypergradient, w, rtol, options=(c.make, max_steps))

    for tightened in (rtol, 0.1 * rtol, 0.01 * rtol, 1e-3 * rtol):
        gradient, info = solve(tightened)
        lost = bool(failed(info))
        usable = not lost and norm(difference(gradient, reference)) <= enough
        products = size if direct else c.products * (int(info.num_steps) + 1)
        spent += products
        if usable or direct or lost or spent >= share:
            break
    if direct:
        name, solver = _DENSE, dense()
    else:
        name = f"aid({c.make.__name__}(max_steps={_MAX_STEPS}, rtol={tightened:g}))"
        solver = c.make(max_steps=_MAX_STEPS, rtol=tightened)
    missed = Status(int(info.status)).name if lost else "does not get the gradient right"
    why = c.why if usable else missed
    seconds = _least_time(lambda: solve(tightened)) if usable else math.nan
    return Alternative(name, aid(solver), usable, products, seconds, c.memory, why), spent


def _least_time(run: Callable[[], PyTree], most: float = 0.02) -> float:
    """The least time of a run in seconds, from as many as take `most` together, ten at most."""
    times: list[float] = []
    while len(times) < 10 and sum(times) < most:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def _unrolled(spectrum: Spectrum, rtol: float) -> Alternative:
    contracts = 0 < spectrum.radius < 1
    steps = math.ceil(math.log(rtol) / math.log(spectrum.radius)) if contracts else _MAX_STEPS
    steps = max(steps, 1)
    why = "reverse mode through a loop of static length; holds all iterates"
    return Alternative(_ITD, itd(), spectrum.radius < 1, steps, math.nan, steps, why)


def _warnings(spectrum: Spectrum, residual: jax.Array, failed: bool) -> list[str]:
    found = []
    if failed:
        found.append(
            f"the lower level was not solved (|Phi(w) - w| = {float(residual):.2g}); what follows "
            "holds at the point reached"
        )
    if spectrum.radius >= 1:
        found.append(
            f"Phi is not a contraction here (rho(J) = {spectrum.radius:.3g}): `picard` and `fp` diverge"
        )
    elif spectrum.norm >= 1:
        found.append(
            f"Phi does not contract in the Euclidean norm (|J| = {spectrum.norm:.3g}): errors may grow "
            "before they shrink"
        )
    if not spectrum.symmetric:
        found.append("J is not symmetric: `cg` would be wrong")
    elif spectrum.smallest < -1:
        text = f"J has the eigenvalue {spectrum.smallest:.3g} below -1: a step size above 2/L"
        # With J = I − αH and c times the step, the eigenvalues are 1 − c (1 − s) for s of J.
        if spectrum.largest < 1:
            highest = 2 / (1 - spectrum.smallest)
            best = 2 / (2 - spectrum.smallest - spectrum.largest)
            text += (
                f". Phi contracts below {highest:.2g} times this step, and best at {best:.2g} times "
                f"(of a map that is no gradient step: `damped(phi, damping={1 - best:.2g})`)"
            )
        found.append(text)
    if spectrum.largest >= 1:
        found.append("I - J is not positive definite: is the lower level at a minimum?")
    return found
