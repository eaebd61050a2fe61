"""Is the gradient of a decorated solver right? `check_gradient` holds it against three answers."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import real_form as norms
from ..certificate.certificate import Certificate, CertificateStatus
from ..certificate.certify import Options, certificate_of
from ..certificate.options import NO_KWARGS, check_kwargs, krylov
from ..compiled import compiled_for
from ..decorator import fixed_point
from ..errors import check_callable, check_same
from ..estimators import truncated_itd
from ..leaves import check_arrays, check_concrete, fresh, partition, split_lam, strongly_typed
from ..problem import Problem
from ..real_form import COMPUTATION, DIFFERENCE, resolution, steepest_ascent
from ..types import Outer, Phi, PyTree
from .numbers import difference, inner, norm
from .spectrum import solve_lower

Verdict = Literal["agrees", "disagrees", "inconclusive"]

_FAR = 0.1  # From this ‖Φ(w) − w‖ on, relative to ‖w‖, w is no fixed point of Φ.
_SMALLER = 0.25  # The second step of the finite differences, over the first.
_OPTIONS = Options(0.01, 1.25, krylov)


class Answer(NamedTuple):
    """One answer, beside the gradient that is checked.

    Attributes:
        verdict: "agrees", "disagrees", or "inconclusive" where the answer cannot tell.
        difference: The relative difference; NaN where there is no answer.
        why: The reason why it is inconclusive, else empty.
    """

    verdict: Verdict
    difference: float
    why: str


class GradientCheck(NamedTuple):
    """What `check_gradient` found; print it.

    Attributes:
        gradient: The decorated solver's gradient of E(solve(w₀, λ), λ).
        certificate: The `Certificate` at its w.
        polished: `Answer` of ‖g − g⁺‖ / ‖g⁺‖, with the corrected gradient of the certificate.
        itd: `Answer` of ‖g − g_itd‖ / ‖g_itd‖, steps of Φ differentiated from its w.
        finite_difference: `Answer` of |⟨g, d⟩ − finite difference of f along d|, relative to the larger
            of the two; d is the direction of g⁺.
        warnings: Dangers that were seen, in sentences.
    """

    gradient: PyTree
    certificate: Certificate
    polished: Answer
    itd: Answer
    finite_difference: Answer
    warnings: tuple[str, ...]

    @property
    def agree(self) -> tuple[str, ...]:
        """The names of the answers that agree."""
        return self._with("agrees")

    @property
    def disagree(self) -> tuple[str, ...]:
        """The names of the answers that disagree."""
        return self._with("disagrees")

    @property
    def inconclusive(self) -> tuple[str, ...]:
        """The names of the answers that cannot tell."""
        return self._with("inconclusive")

    def _with(self, verdict: Verdict) -> tuple[str, ...]:
        return tuple(name for name, a in self._answers().items() if a.verdict == verdict)

    def _answers(self) -> dict[str, Answer]:
        return {
            "polished": self.polished,
            "ITD": self.itd,
            "finite difference": self.finite_difference,
        }

    def __repr__(self) -> str:
        found = {
            "disagrees with": self.disagree,
            "agrees with": self.agree,
            "inconclusive": self.inconclusive,
        }
        parts = [f"{verdict}: {', '.join(names)}" for verdict, names in found.items() if names]
        lines = ["all agree" if len(self.agree) == 3 else "; ".join(parts)]
        for name, a in self._answers().items():
            why = f" ({a.why})" if a.why else ""
            lines.append(f"  {name}: {a.verdict}, relative difference {a.difference:.2e}{why}")
        reason = CertificateStatus(int(self.certificate.status)).name
        relative = float(self.certificate.relative_error)
        lines.append(f"  certificate: relative error {relative:.2e} ({reason})")
        return "\n".join(lines + [f"  warning: {text}" for text in self.warnings])


def check_gradient(
    solve: Callable[..., PyTree],
    outer: Outer,
    phi: Phi,
    w0: PyTree,
    lam: PyTree,
    /,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    rtol: float = 1e-2,
    num_steps: int = 200,
) -> GradientCheck:
    """Does the gradient of a decorated solver agree with three independent answers?

    With g the gradient of E(solve(w₀, λ), λ): the polished gradient of a certificate at its w; ITD over
    `num_steps` further steps of Φ; a central difference of f(λ) = E(w(λ), λ) along the polished
    gradient, with w(λ) solved by Newton–Krylov from the solver's w to the floor of the dtype. The last
    one knows nothing of derivative rules.

    Each answer agrees, disagrees, or is inconclusive: the polished one where the certificate is not
    valid; ITD where half as many steps give something else, as where Φ contracts slowly or not at all;
    the difference where steps of h and of h/4 give something else, or its two sides do, as at kinks;
    every one where it agrees only because rounding hides all.

    Where Φ(w) is not near w at the solver's result, Φ is not the map that the solver solves, or the
    solver stopped early. A warning says so, no answer from Φ counts as agreement, and the difference is
    one of the solver's own results. Another warning tells where Φ is no function: called again, it
    gives something else.

    Cost: some hundreds of products, and five runs of the solver; it compiles. Not under `jit`.

    Args:
        solve: The decorated solver.
        outer: `outer(w, lam, *args, **kwargs) -> scalar`.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w0: Where the solver starts.
        lam: λ.
        *args: Data.
        kwargs: Data by keyword, `kwargs={"x": x}` for `phi(w, lam, x=x)`: other keywords are options.
        rtol: What counts as agreement; at least the root of the dtype's resolution does.
        num_steps: Steps of Φ that ITD differentiates.

    Returns:
        A `GradientCheck`; print it.

    Raises:
        TypeError: An argument is not of its kind or shape, or is traced; an option that there is not,
            or that could be meant for a parameter of `phi`, `outer` or `solve`.

    >>> import fixedgrad as fg
    >>> phi = lambda w, lam: 0.5 * jnp.cos(w) + lam
    >>> solve = fg.fixed_point(phi, fg.aid(fg.dense()))(fg.picard(phi, num_steps=60))
    >>> check_gradient(solve, lambda w, lam: w**2, phi, 0.0, 0.3).agree
    ('polished', 'ITD', 'finite difference')
    """
    where = "check_gradient"
    check_callable(where, "solve", solve, "solve(w0, lam, *args) -> w")
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    functions = {"phi": phi, "outer": outer, "solve": solve}
    options = {"rtol": rtol, "num_steps": num_steps}
    data = check_kwargs(check_gradient, functions, 2 + len(args), kwargs, options)
    check_arrays(where, "w0", w0)
    check_concrete(where, (w0, lam, args, data))
    w0, lam = strongly_typed((w0, lam))
    functions = (outer, phi, solve)
    answers = compiled_for(functions, (where, num_steps), functools.partial(_answers, num_steps))
    g, w, unrolled, halfway, repeated = answers(w0, lam, args, data)
    certificate = certificate_of(
        where, outer, phi, w, None, lam, args, data, partition(g)[0], _OPTIONS
    )
    valid = bool(certificate.valid)
    polished = certificate.polished
    size, gap = norm(polished), norm(difference(g, polished))
    # Two right answers may differ by so much.
    rounding = float(certificate.rounding) if valid else 0.0
    length = norm(w)
    x = partition(lam)[0]
    eps = resolution((w, x))
    scale = max(length, norm(difference(w, w0)), COMPUTATION * resolution(w) * norm(x))
    near = float(certificate.residual_w) <= _FAR * scale
    rtol = max(rtol, eps**0.5)

    def answer(gap: float, size: float, noise: float, nothing: str, counts: bool = near) -> Answer:
        relative = gap / size if size > 0 else gap
        if not nothing and not math.isfinite(gap):
            nothing, relative = "it is not finite", math.nan
        if nothing:
            return Answer("inconclusive", relative, nothing)
        if gap > rtol * size + noise:
            return Answer("disagrees", relative, "")
        if noise > rtol * size:
            return Answer("inconclusive", relative, "rounding hides it")
        if not counts:
            return Answer("inconclusive", relative, "phi(w) is not near w")
        return Answer("agrees", relative, "")

    settled = norm(difference(unrolled, halfway)) <= 0.1 * rtol * norm(unrolled) + rounding
    direction = _direction(polished if valid else g, random=not valid or not size > 0)
    along = inner(steepest_ascent(partition(g)[0]), direction)
    whole = norm(x)
    step = eps ** (1 / 3) * (whole if whole > 0 else 1.0)
    values = compiled_for(functions, where, _values)
    nothing = ""

    def along_by(h: float) -> float:
        """The function f at λ + h d."""
        nonlocal nothing
        own, residual, length, exact, unsolved = values(w0, lam, args, data, direction, h)
        if near and float(residual) > _FAR * max(float(length), scale):
            nothing = "the solver does not follow lam: phi(w) is not near w beside it"
        elif near and bool(unsolved):
            nothing = "the lower level could not be solved beside lam"
        return float(exact if near else own)

    here, found, bends = along_by(0.0), [], []
    for h in (step, _SMALLER * step):
        plus, minus = along_by(h), along_by(-h)
        found.append((plus - minus) / (2 * h))
        bends.append(abs(plus - 2 * here + minus) / h)  # O(h), but for a kink within h.
    spread = abs(found[0] - found[1])
    size_along = max(abs(along), *map(abs, found))
    noise = DIFFERENCE * eps * abs(here) / (_SMALLER * step)  # E itself is rounded.
    if not nothing and not spread <= 0.5 * rtol * size_along + noise:
        nothing = (
            f"steps of {step:.1e} and {_SMALLER * step:.1e} give {found[0]:.3g}, {found[1]:.3g}"
        )
    elif not nothing and bends[1] > max(0.6 * bends[0], rtol * size_along + 4 * noise):
        nothing = "f has a kink nearby: its one-sided differences do not approach each other"
    reason = CertificateStatus(int(certificate.status)).name
    invalid = "" if valid else f"the certificate is not valid: {reason}"
    early = f"ITD has not converged after {num_steps} steps" if not settled else ""
    warnings: tuple[str, ...] = ()
    if not near:
        residual = float(certificate.residual_w)
        warnings = (
            f"phi(w) is not near w at the solver's result (|phi(w) - w| = {residual:.2g}, |w| = "
            f"{length:.2g}): is `phi` the residual F(w, lam)? Then Phi = w - F. Or did the solver "
            "stop early?",
        )
    if norm(difference(*repeated)) > 0:
        warnings += (
            "phi(w) is another when it is called again with the same arguments: does `phi` draw from "
            "a random generator? Compiled, it draws once; give it a key of `jax.random` instead.",
        )
    return GradientCheck(
        g,
        certificate,
        answer(gap, size, rounding, invalid),
        answer(norm(difference(g, unrolled)), norm(unrolled), rounding, early),
        answer(abs(found[0] - along), size_along, spread + noise, nothing, counts=True),
        warnings,
    )


def _answers(
    num_steps: int, outer: Outer, phi: Phi, solve: Callable[..., PyTree]
) -> Callable[..., tuple[PyTree, ...]]:
    """Of `(w0, lam, args, kwargs)`: the gradient, w, ITD by all and by half the steps, Φ(w) twice."""

    def answers(w0: PyTree, lam: PyTree, args: PyTree, data: PyTree) -> tuple[PyTree, ...]:
        x, join, join_gradient = split_lam("check_gradient", lam)

        def objective(solver: Callable[..., PyTree], x: PyTree) -> tuple[jax.Array, PyTree]:
            w = solver(w0, join(x), *args, **data)
            return outer(w, join(x), *args, **data), w

        def gradient(solver: Callable[..., PyTree]) -> tuple[PyTree, PyTree]:
            g, w = jax.grad(functools.partial(objective, solver), has_aux=True)(x)
            return join_gradient(g), w

        g, w = gradient(solve)
        check_same("check_gradient", w, w0, "`solve(w0, ...)`", "`w0`")

        # ITD from the solver's own w, so that only the derivative rule differs.
        def itd(steps: int) -> PyTree:
            unrolled = fixed_point(phi, truncated_itd(num_steps=steps))
            return gradient(unrolled(lambda *_, **__: w))[0]

        twice = [fresh(phi)(w, lam, *args, **data) for _ in range(2)]
        return g, w, itd(num_steps), itd(max(num_steps // 2, 1)), twice

    return answers


def _values(outer: Outer, phi: Phi, solve: Callable[..., PyTree]) -> Callable[..., Any]:
    """Values at λ + h d, of `(w0, lam, args, kwargs, d, h)`.

    At the solver's w: E, ‖Φ(w) − w‖, ‖w‖; E at the fixed point from there; whether that failed.
    """

    def values(
        w0: PyTree, lam: PyTree, args: PyTree, data: PyTree, direction: PyTree, h: jax.Array
    ) -> tuple[jax.Array, ...]:
        x, join, _ = split_lam("check_gradient", lam)
        lam = join(jax.tree.map(lambda x, d: x + jnp.asarray(h, x.dtype) * d, x, direction))
        w = solve(w0, lam, *args, **data)
        problem = Problem.at("check_gradient", outer, phi, w, lam, args, data)
        solved = solve_lower(problem, 0.0)
        exact = problem.outer(partition(solved.w)[0], problem.x)
        residual = norms.norm(problem.equation.residual(problem.w, problem.x))
        return problem.outer(problem.w, problem.x), residual, norms.norm(w), exact, solved.failed

    return values


def _direction(gradient: PyTree, random: bool) -> PyTree:
    """The unit vector of steepest ascent; with a random one added, so that it is never 0."""
    inexact = partition(gradient)[0]

    def unit(d: PyTree) -> PyTree:
        size = norm(d)
        return jax.tree.map(lambda d: np.asarray(d / size if size > 0 else d, d.dtype), d)

    d = unit(jax.tree.map(lambda g: np.nan_to_num(np.asarray(g)), steepest_ascent(inexact)))
    if random:
        generator = np.random.default_rng(0)

        def draw(d: np.ndarray) -> np.ndarray:
            real, imaginary = generator.normal(size=(2, *d.shape))
            return np.asarray(real + 1j * imaginary if np.iscomplexobj(d) else real, d.dtype)

        other = unit(jax.tree.map(draw, d))
        d = unit(jax.tree.map(np.add, d, other))
    return d
