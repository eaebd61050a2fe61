"""What kind of problem is this, and which estimator suits it? `recommend` measures.

It runs outside `jit`, prints well, and measures rather than guesses: products are counted by solving
the linear system at hand with every method that applies.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..certificate.lagrangian import Packed, krylov, pack
from ..estimators import aid, itd
from ..linear import bicgstab, cg, dense, fp, gmres, normal_cg
from ..packing import check_concrete
from ..realify import norm, realified, resolution
from ..types import (
    Estimator,
    LinearSolver,
    Outer,
    Phi,
    PyTree,
    SolveInfo,
    Status,
    check_number,
    failed,
)
from .spectrum import Facts, measure, solve_lower

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
        estimator: The recommended estimator, ready to use.
        name: How it is written.
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

    estimator: Estimator
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
        lines = [f"recommended: {self.name}", *(f"  because {r}" for r in self.reasons)]
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
    rtol: float = 1e-3,
    seed: int = 0,
    **kwargs: PyTree,
) -> Recommendation:
    """Which estimator suits this problem, why, and at what cost.

    Solves the lower level (Newton–Krylov), estimates ρ(J) and ‖J‖ by power iteration, the symmetry of
    J by random probes, the extreme eigenvalues where it is symmetric, and then computes the
    hypergradient at w(λ) to `rtol` by every method that applies, counting products: to residuals of
    `rtol`, and of less by factors of ten where the hypergradient needs it. The rule: the cheapest
    that succeeded, by operations: products by the compiler's count (`dense`: a quarter of one a column,
    and 2d³/3 for the factors), what a method does with its own vectors each step, and what starting it
    amounts to; the last two as measured on a CPU. `itd` where the lower level was not solved, or
    nothing else succeeded: it differentiates what your solver computes.

    Estimates from power iteration are lower bounds of what they estimate. What cannot be measured:
    whether λ enters the solver in other ways than through Φ; then use `itd`.

    Cost: some hundreds of products; it compiles. Not under `jit`. Memory: that of `gmres`, and of
    `dense` for d ≤ 2048.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w0: Where the lower-level solve starts.
        lam: λ.
        *args: Data.
        rtol: Relative tolerance on the hypergradient at w(λ).
        seed: Of the random probes.
        **kwargs: More data.

    Returns:
        A `Recommendation`; print it.

    Raises:
        TypeError: An argument is not of its kind or shape, or is traced.
        ValueError: `rtol` is not in (0, 1).

    >>> phi = lambda w, lam: 0.5 * w + lam
    >>> advice = recommend(lambda w, lam: jnp.sum(w**2), phi, jnp.zeros(3), jnp.ones(3))
    >>> advice.symmetric, round(advice.spectral_radius, 3), advice.warnings
    (True, 0.5, ())
    """
    check_number("recommend", "rtol", rtol, lambda x: 0 < x < 1, "a number in (0, 1)")
    check_concrete("recommend", (w0, lam, args, kwargs))
    packed = pack("recommend", outer, phi, w0, lam, args, kwargs)
    w, residual, unsolved = solve_lower(packed, min(rtol, 1e-6))
    failed = bool(unsolved)
    facts = measure(packed, w, jax.random.key(seed))
    size = int(tree.size(realified(w)[0](w)))
    reference, _ = _hypergradient(packed, dense() if size <= _DIRECT else krylov(1e-3 * rtol))(w)
    alternatives = [
        _try(packed, w, candidate, size, rtol, facts.flops_product, reference)
        for candidate in _candidates(facts, size)
    ]
    alternatives.append(_unrolled(facts, rtol))
    alternatives.sort(key=lambda a: (not a.usable, a.cost))
    implicit = [a for a in alternatives if a.usable and a.name != _ITD]
    unrolled = next(a for a in alternatives if a.name == _ITD)
    best = implicit[0] if implicit and not failed else unrolled
    warnings = _warnings(facts, residual, failed)
    reasons = [f"it took {best.products} products to {rtol:g}, the cheapest that succeeded"]
    if best.name == _ITD:
        missing = "the lower level was not solved" if failed else "no linear method succeeded"
        reasons = [f"{missing} here; it differentiates what your solver computes"]
    elif best.why:
        reasons.append(best.why)
    return Recommendation(
        best.estimator,
        best.name,
        tuple(reasons),
        tuple(warnings),
        tuple(alternatives),
        size,
        facts.radius,
        facts.norm,
        facts.symmetric,
        facts.definite,
        facts.condition,
        float(residual),
        (facts.flops_phi, facts.flops_product),
    )


_ITD = "itd()"
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


def _candidates(facts: Facts, size: int) -> Iterator[_Candidate]:
    """The methods that apply."""
    if size <= _DIRECT:
        yield _Candidate(dense, size, "d is small enough for a direct solve", 1, 0, 2e4)
    if facts.symmetric and facts.definite:
        yield _Candidate(cg, 5, "J is symmetric and I - J positive definite", 1, 10, 2e4)
    if facts.radius < 1:
        why = f"fixed-point steps contract by about {facts.radius:.3g}"
        yield _Candidate(fp, 2, why, 1, 3, 3e3)
    yield _Candidate(gmres, 34, "right for any invertible I - J", 1, 4 * 31, 4e4)
    why = "right for any invertible I - J, in little memory"
    yield _Candidate(bicgstab, 8, why, 2, 14, 4e4)
    yield _Candidate(normal_cg, 5, why, 2, 10, 3e4)


def _hypergradient(
    packed: Packed, solver: LinearSolver
) -> Callable[[PyTree], tuple[PyTree, SolveInfo]]:
    """`w ↦ (∇₂E + Bᵀv, info)` with v by one linear solver."""

    def compute(w: PyTree) -> tuple[PyTree, SolveInfo]:
        b, direct = jax.grad(packed.outer, argnums=(0, 1))(w, packed.x)
        _, vjp = jax.vjp(packed.phi, w, packed.x)
        v, info = solver(lambda u: vjp(u)[0], b)
        return tree.add(direct, vjp(v)[1]), info

    return compute


def _try(
    packed: Packed,
    w: PyTree,
    c: _Candidate,
    size: int,
    rtol: float,
    flops_product: float,
    reference: PyTree,
) -> Alternative:
    """The hypergradient by one method, to the first of some tolerances that gets it right."""
    direct = c.make is dense

    @jax.jit
    def compute(w: PyTree, rtol: jax.Array) -> tuple[jax.Array, SolveInfo]:
        solver = dense() if direct else c.make(max_steps=_MAX_STEPS, rtol=rtol)
        gradient, info = _hypergradient(packed, solver)(w)
        return norm(tree.sub(gradient, reference)), info

    enough = rtol * float(norm(reference)) + 64 * resolution((w, packed.x)) * float(norm(w))
    for tightened in (rtol, 0.1 * rtol, 0.01 * rtol, 1e-3 * rtol):
        error, info = compute(w, jnp.asarray(tightened, norm(w).dtype))
        usable = not bool(failed(info)) and float(error) <= enough
        if usable or direct or bool(failed(info)):
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
    return Alternative(name, aid(solver), usable, products, c.start + cost, c.memory, why)


def _unrolled(facts: Facts, rtol: float) -> Alternative:
    contracts = 0 < facts.radius < 1
    steps = math.ceil(math.log(rtol) / math.log(facts.radius)) if contracts else _MAX_STEPS
    steps = max(steps, 1)
    cost = steps * (facts.flops_phi + facts.flops_product)
    why = "reverse mode through a loop of static length; holds all iterates"
    return Alternative(_ITD, itd(), facts.radius < 1, steps, cost, steps, why)


def _warnings(facts: Facts, residual: jax.Array, failed: bool) -> list[str]:
    found = []
    if failed:
        found.append(
            f"the lower level was not solved (|Phi(w) - w| = {float(residual):.2g}); what follows "
            "holds at the point reached"
        )
    if facts.radius >= 1:
        found.append(
            f"Phi is not a contraction here (rho(J) = {facts.radius:.3g}): `picard` and `fp` diverge"
        )
    elif facts.norm >= 1:
        found.append(
            f"Phi does not contract in the Euclidean norm (|J| = {facts.norm:.3g}): errors may grow "
            "before they shrink"
        )
    if not facts.symmetric:
        found.append("J is not symmetric: `cg` would be wrong")
    elif facts.smallest < -1:
        found.append(f"J has the eigenvalue {facts.smallest:.3g} below -1: a step size above 2/L")
    if facts.largest >= 1:
        found.append("I - J is not positive definite: is the lower level at a minimum?")
    return found
