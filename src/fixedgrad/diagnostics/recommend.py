"""What kind of problem is this, and which estimator suits it? `recommend` measures.

It runs outside `jit`, prints well, and measures rather than guesses: products are counted by solving
the linear system at hand with every method that applies.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from ..certificate.options import NO_KWARGS, check_kwargs
from ..errors import check_callable, check_count, check_number, check_same
from ..leaves import check_concrete, strongly_typed
from ..lower import solve_with_info
from ..types import Estimator, Outer, Phi, PyTree, Solver
from .spectrum import Spectrum, judge_lower, measure, solve_lower
from .trials import ITD, MAX_STEPS, Alternative, On, Way, tried, truth, unrolled, ways

_NEAR = 1.2  # Methods within this factor of the least time are equally fast.


class Recommendation(NamedTuple):
    """What `recommend` found.

    Attributes:
        estimator: The recommended estimator, ready to use; `None` where nothing works here.
        name: The call that makes it; "nothing" where nothing works.
        solver: The recommended solver of the lower level, ready to use, or the one that was given:
            `fixed_point(phi, advice.estimator)(advice.solver)`; `None` where none works.
        solver_name: The call that makes it; "yours" for the one given.
        reasons: Reasons for the choice, in sentences.
        warnings: Dangers that were seen, in sentences.
        alternatives: Every method for the linear system that was tried, the fastest first.
        ways: Every method for the lower level that was tried, the fastest first.
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
    solver: Solver | None
    solver_name: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    ways: tuple[Way, ...]
    size: int
    spectral_radius: float
    norm: float
    symmetric: bool
    definite: bool
    condition: float
    residual: float

    def __repr__(self) -> str:
        works = "" if self.estimator is not None else " works here"
        lines = [f"recommended: {self.name}{works}"]
        lines += [f"  at the w of {self.solver_name}"] * (self.solver is not None)
        lines += [f"  because {r}" for r in self.reasons]
        lines += [f"  warning: {w}" for w in self.warnings]
        symmetric = "symmetric" if self.symmetric else "not symmetric"
        lines.append(
            f"  d = {self.size}, rho(J) >= {self.spectral_radius:.4g}, |J| >= {self.norm:.4g}, "
            f"J {symmetric}, condition of I - J >= {self.condition:.3g}, "
            f"|Phi(w) - w| = {self.residual:.2g}"
        )
        lines.append(f"  {'method':<46} {'usable':<7} {'products':>8} {'ms':>8} {'memory/w':>9}")
        for a in self.alternatives:
            usable = "yes" if a.usable else "no"
            products = f"{a.products}" if a.products < MAX_STEPS else "-"
            ms = "-" if math.isnan(a.seconds) else f"{1e3 * a.seconds:.3g}"
            lines.append(f"  {a.name:<46} {usable:<7} {products:>8} {ms:>8} {a.memory:>9}  {a.why}")
        if self.ways:
            lines.append(f"  {'lower level':<46} {'usable':<7} {'steps':>8} {'ms':>8}")
        for way in self.ways:
            usable = "yes" if way.usable else "no"
            ms = "-" if math.isnan(way.seconds) else f"{1e3 * way.seconds:.3g}"
            lines.append(f"  {way.name:<46} {usable:<7} {way.steps:>8} {ms:>8}  {way.why}")
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
    """Which estimator and which solver suit this problem, why, and at what cost.

    Solves the lower level (Newton–Krylov, or your `solver`), estimates ρ(J) and ‖J‖ by power
    iteration, the symmetry of J by random probes, the extreme eigenvalues where it is symmetric, and
    then computes the hypergradient at w(λ) to `rtol` by the methods that apply, and times them: to
    residuals of `rtol`, and of less by factors of ten where the hypergradient needs it. Once `cg` has
    succeeded, the methods for any I − J are not tried; `normal_cg` is where no other succeeded. Without
    a `solver` of yours it solves the lower level from w₀ by the methods that apply to that, in the same
    way.

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
            Newton step that has begun may exceed its share. Each method for the lower level may take
            half as many steps again.

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
    compute = On(outer, phi, lam, args, data)
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
    by_steps = unrolled(spectrum, rtol)
    alternatives, found_ways = [by_steps], []
    if not unsolved:
        true = truth(compute, w, spectrum, rtol)
        left = max_products - int(lower.products) - true.spent
        alternatives += tried(compute, w, spectrum, rtol, left, true)
        if solver is None:
            found_ways = ways(compute, w0, spectrum, rtol, max(max_products // 2, 1), true)
    alternatives.sort(key=lambda a: (not a.usable, math.isnan(a.seconds), a.seconds))
    usable = [a for a in alternatives if a.usable]
    fast = [a for a in usable if a.seconds <= _NEAR * usable[0].seconds] or usable
    best = min(fast, key=lambda a: a.memory, default=None)
    fast_ways = [x for x in found_ways if x.usable]
    least = min((x.seconds for x in fast_ways), default=0.0)
    way = next((x for x in fast_ways if x.seconds <= _NEAR * least), None)  # The simplest of these.
    found_ways.sort(key=lambda x: (not x.usable, math.isnan(x.seconds), x.seconds))
    warnings = _warnings(spectrum, residual, unsolved)
    missing = "the lower level was not solved" if unsolved else "no linear method succeeded"
    if best is None:
        reasons = [f"{missing}, and Phi does not contract (rho(J) = {spectrum.radius:.3g})"]
        if unsolved:
            reasons.append("every method needs a fixed point: start closer, or give your `solver`")
    elif best.name == ITD:
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
        way.solver if way else solver,
        way.name if way else "yours" if solver else _NOTHING,
        tuple(reasons),
        tuple(warnings),
        tuple(alternatives),
        tuple(found_ways),
        spectrum.size,
        spectrum.radius,
        spectrum.norm,
        spectrum.symmetric,
        spectrum.definite,
        spectrum.condition,
        float(residual),
    )


_NOTHING = "nothing"


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
