"""What kind of problem is this, and which estimator suits it? `recommend` measures.

It runs outside `jit`, prints well, and measures rather than guesses: products are counted by solving
the linear system at hand with every method that applies.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..certificate.options import NO_KWARGS, check_kwargs, krylov
from ..errors import check_callable, check_count, check_number, check_same
from ..estimators import aid, itd
from ..leaves import check_concrete, strongly_typed
from ..linear import bicgstab, cg, dense, fp, gmres, normal_cg
from ..lower import solve_with_info
from ..problem import Problem
from ..real_form import norm, realified, resolution
from ..types import Estimator, LinearSolver, Outer, Phi, PyTree, SolveInfo, Solver, Status, failed
from .spectrum import Spectrum, judge_lower, measure, solve_lower

tree = optax.tree

_MAX_STEPS = 5000
_DIRECT = 2048  # Unknowns up to which a direct solve is tried.


class Alternative(NamedTuple):
    """One way to the hypergradient, measured on this problem.

    Attributes:
        name: How it is written.
        estimator: It, ready to use.
        usable: Whether it reached the tolerance without a breakdown (`itd`: whether ρ(J) < 1).
        products: Products with J or Jᵀ that it took (`itd`: predicted from ρ(J)).
        cost: Operations that it should take: those of the products, of its own vectors, of starting.
        memory: Memory in units of w.
        why: One clause.
    """

    name: str
    estimator: Estimator
    usable: bool
    products: int
    cost: float
    memory: int
    why: str


class Recommendation(NamedTuple):
    """What `recommend` found.

    Attributes:
        estimator: The recommended estimator, ready to use; `None` where nothing works here.
        name: How it is written; "nothing" where nothing works.
        reasons: Why, in sentences.
        warnings: What to beware of, in sentences.
        alternatives: Every method tried, cheapest first.
        size: Real unknowns d in w.
        spectral_radius: ρ(J) at the solution, estimated from below by power iteration.
        norm: ‖J‖, the same way; the local contraction constant in the Euclidean norm.
        symmetric: Whether J is symmetric to the precision of random probes.
        definite: Whether I − J is positive definite (its symmetric part, estimated).
        condition: Condition number of I − J where J is symmetric, else NaN; estimated from below.
        residual: ‖Φ(w) − w‖ where all of this was measured.
        flops: Floating-point operations of Φ and of one product with Jᵀ, by the compiler's count.
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
    flops: tuple[float, float]

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
        lines.append(
            f"  operations: {self.flops[0]:.3g} for Phi, {self.flops[1]:.3g} for a product with J^T"
        )
        lines.append(f"  {'method':<46} {'usable':<7} {'products':>8} {'cost':>8} {'memory/w':>9}")
        for a in self.alternatives:
            usable = "yes" if a.usable else "no"
            products = f"{a.products}" if a.products < _MAX_STEPS else "-"
            lines.append(
                f"  {a.name:<46} {usable:<7} {products:>8} {a.cost:>8.1e} {a.memory:>9}  {a.why}"
            )
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
    then computes the hypergradient at w(λ) to `rtol` by every method that applies, counting products:
    to residuals of `rtol`, and of less by factors of ten where the hypergradient needs it. The rule:
    the cheapest that succeeded, by operations: products by the compiler's count (`dense`: a quarter of
    one a column, and 2d³/3 for the factors), what a method does with its own vectors each step, and
    what starting it amounts to; the last two as measured on a CPU. `itd` where the lower level was not
    solved, or nothing else succeeded, and Φ contracts: it differentiates what your solver computes.
    Where Φ does not contract either, nothing works: `estimator` is `None`, and the reasons say why.

    Estimates from power iteration are lower bounds of what they estimate. What cannot be measured:
    whether λ enters the solver in other ways than through Φ; then use `itd`.

    Cost: some hundreds of products as a rule, and at most `max_products` and seven hundred for the
    spectrum; it compiles. Not under `jit`. Memory: that of `gmres`, and of `dense` for d ≤ 2048.

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
    if solver is None:
        problem = Problem.at("recommend", outer, phi, w0, lam, args, data)
        lower = solve_lower(problem, min(rtol, 1e-6), max_products // 2)
    else:
        solved, _ = solve_with_info(solver, strongly_typed(w0), lam, *args, **data)
        check_same("recommend", solved, strongly_typed(w0), "`solver(w0, ...)`", "`w0`")
        problem = Problem.at("recommend", outer, phi, solved, lam, args, data)
        lower = judge_lower(problem, problem.w, rtol)
    w, residual, unsolved = lower.w, lower.residual, bool(lower.failed)
    spectrum = measure(problem, w, jax.random.key(seed))
    size = int(tree.size(realified(w)[0](w)))
    unrolled = _unrolled(spectrum, rtol)
    alternatives = [unrolled]
    if not unsolved:
        left = max_products - int(lower.products)
        alternatives += _tried(problem, w, spectrum, size, rtol, left)
    alternatives.sort(key=lambda a: (not a.usable, a.cost))
    usable = [a for a in alternatives if a.usable]
    best = next((a for a in usable if a.name != _ITD), usable[0] if usable else None)
    warnings = _warnings(spectrum, residual, unsolved)
    missing = "the lower level was not solved" if unsolved else "no linear method succeeded"
    if best is None:
        reasons = [f"{missing}, and Phi does not contract (rho(J) = {spectrum.radius:.3g})"]
        if unsolved:
            reasons.append("every method needs a fixed point: start closer, or give your `solver`")
    elif best.name == _ITD:
        reasons = [f"{missing} here; it differentiates what your solver computes"]
    else:
        reasons = [f"it took {best.products} products to {rtol:g}, the cheapest that succeeded"]
        reasons += [best.why] * bool(best.why)
    return Recommendation(
        best.estimator if best else None,
        best.name if best else _NOTHING,
        tuple(reasons),
        tuple(warnings),
        tuple(alternatives),
        size,
        spectrum.radius,
        spectrum.norm,
        spectrum.symmetric,
        spectrum.definite,
        spectrum.condition,
        float(residual),
        (spectrum.flops_phi, spectrum.flops_product),
    )


_ITD = "itd()"
_NOTHING = "nothing"
_DENSE = "aid(dense())"


class _Candidate(NamedTuple):
    """A linear solver and what it costs beside its products.

    Attributes:
        make: It, from a relative tolerance.
        memory: In units of w.
        why: One clause.
        products: A step.
        vectors: Operations on vectors a step, in multiply-adds for each unknown.
        start: What a solve costs before its first step, in operations; as those of the vectors read
            off solves of 20 and of 200 unknowns, at 2000 operations a microsecond.
    """

    make: Callable[..., LinearSolver]
    memory: int
    why: str
    products: int
    vectors: int
    start: float


def _candidates(spectrum: Spectrum, size: int) -> Iterator[_Candidate]:
    """The methods that apply."""
    if size <= _DIRECT:
        yield _Candidate(dense, size, "d is small enough for a direct solve", 1, 0, 2e4)
    if spectrum.symmetric and spectrum.definite:
        yield _Candidate(cg, 5, "J is symmetric and I - J positive definite", 1, 10, 2e4)
    if spectrum.radius < 1:
        why = f"fixed-point steps contract by about {spectrum.radius:.3g}"
        yield _Candidate(fp, 2, why, 1, 3, 3e3)
    yield _Candidate(gmres, 34, "right for any invertible I - J", 1, 4 * 31, 4e4)
    why = "right for any invertible I - J, in little memory"
    yield _Candidate(bicgstab, 8, why, 2, 14, 4e4)
    yield _Candidate(normal_cg, 5, why, 2, 10, 3e4)


def _hypergradient(
    problem: Problem, solver: LinearSolver
) -> Callable[[PyTree], tuple[PyTree, SolveInfo]]:
    """`w ↦ (∇₂E + Bᵀv, info)` with v by one linear solver."""

    def compute(w: PyTree) -> tuple[PyTree, SolveInfo]:
        at = problem.adjoint(w)
        v, info = solver(at.jt, at.b)
        return at.gradient(v), info

    return compute


def _tried(
    problem: Problem, w: PyTree, spectrum: Spectrum, size: int, rtol: float, left: int
) -> list[Alternative]:
    """Every method that applies, within `left` products."""
    reference, info = _hypergradient(problem, dense() if size <= _DIRECT else krylov(1e-3 * rtol))(
        w
    )
    left -= int(info.num_steps)
    candidates = list(_candidates(spectrum, size))
    found = []
    for i, candidate in enumerate(candidates):
        share = max(left, 0) // (len(candidates) - i)
        one, spent = _try(
            problem, w, candidate, size, rtol, spectrum.flops_product, reference, share
        )
        found.append(one)
        left -= spent
    return found


def _try(
    problem: Problem,
    w: PyTree,
    c: _Candidate,
    size: int,
    rtol: float,
    flops_product: float,
    reference: PyTree,
    share: int,
) -> tuple[Alternative, int]:
    """The hypergradient by one method, to the first of some tolerances that gets it right.

    Returns:
        What came of it, and the products spent.
    """
    direct = c.make is dense
    max_steps = max(1, min(_MAX_STEPS, share // c.products))
    spent = 0

    @jax.jit
    def compute(w: PyTree, rtol: jax.Array) -> tuple[jax.Array, SolveInfo]:
        solver = dense() if direct else c.make(max_steps=max_steps, rtol=rtol)
        gradient, info = _hypergradient(problem, solver)(w)
        return norm(tree.sub(gradient, reference)), info

    enough = rtol * float(norm(reference)) + 64 * resolution((w, problem.x)) * float(norm(w))
    for tightened in (rtol, 0.1 * rtol, 0.01 * rtol, 1e-3 * rtol):
        error, info = compute(w, jnp.asarray(tightened, norm(w).dtype))
        usable = not bool(failed(info)) and float(error) <= enough
        spent += size if direct else c.products * (int(info.num_steps) + 1)
        if usable or direct or bool(failed(info)) or spent >= share:
            break
    product = max(flops_product, 2.0 * size) if math.isfinite(flops_product) else 2.0 * size**2
    if direct:
        name, solver, products = _DENSE, dense(), size
        cost = 0.25 * size * product + (2 / 3) * size**3
    else:
        name = f"aid({c.make.__name__}(max_steps={_MAX_STEPS}, rtol={tightened:g}))"
        solver = c.make(max_steps=_MAX_STEPS, rtol=tightened)
        products = c.products * (int(info.num_steps) + 1)
        cost = products * product + int(info.num_steps) * c.vectors * 2.0 * size
    missed = (
        Status(int(info.status)).name if bool(failed(info)) else "does not get the gradient right"
    )
    why = c.why if usable else missed
    return Alternative(name, aid(solver), usable, products, c.start + cost, c.memory, why), spent


def _unrolled(spectrum: Spectrum, rtol: float) -> Alternative:
    contracts = 0 < spectrum.radius < 1
    steps = math.ceil(math.log(rtol) / math.log(spectrum.radius)) if contracts else _MAX_STEPS
    steps = max(steps, 1)
    cost = steps * (spectrum.flops_phi + spectrum.flops_product)
    why = "reverse mode through a loop of static length; holds all iterates"
    return Alternative(_ITD, itd(), spectrum.radius < 1, steps, cost, steps, why)


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
