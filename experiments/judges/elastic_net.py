"""On the authors' elastic net ITD and FP converge at the rate of the active set once it is found.

The deterministic experiment of Grazzi, Pontil and Salzo (ICML 2024): an elastic net, λ = (λ₁, λ₂),

    w(λ) = argmin ‖X w − y‖²/2n + λ₁ ‖w‖₁ + ½ λ₂ ‖w‖²,    f(λ) = ‖X' w(λ) − y'‖²/2n',

by proximal gradient steps of the length 2/(L + μ + 2λ₂). The soft threshold gives J = D (I − αH), D
diagonal of zeros and ones: not symmetric, and I − Jᵀ is αH on the active set with rows below it that
no hypergradient depends on. Beside the errors of ITD, FP and CG with k = t there are what this
library's solvers make of the same systems, and the certificate along the same iterates.
"""

import argparse
import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.datasets import make_regression
from sklearn.model_selection import train_test_split

import fixedgrad as fg

from ..tools import convergence, report

FLOAT64 = True

_FLOOR = 1e-12  # Relative errors below it may be rounding.
_CG_STOPS = 1e-10  # The residual at which the CG of the authors' library ends.
_FIXED_STEPS = (1, 2, 100)  # Of `fg.cg`, to see what it says of itself.
_STRIDE = 2  # Of FP's updates; it divides those of all grids, so that one program serves them.
_LINEAR_STEPS = 300  # The k of the linear solves at w(λ).
_LABELS = {
    "itd": "ITD",
    "fp_t": "FP k = t",
    "cg_t": "CG on I − Jᵀ as it is",
    "cg_active": "CG on the active set",
    "default": "fg.aid()",
}


class Data(NamedTuple):
    """Training and validation, and the extreme eigenvalues of XᵀX/n."""

    x: jax.Array
    y: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    smallest: float
    largest: float


class Panel(NamedTuple):
    """One λ, and the t at which hypergradients are evaluated."""

    lam: tuple[float, float]
    grid: convergence.Grid


class Truth(NamedTuple):
    """The closed form on the active set.

    Attributes:
        w: w(λ).
        gradient: ∇f(λ).
        rate: ρ(J) = max |1 − α h|, h the eigenvalues of H on the active set.
        condition: Condition number of H there.
    """

    w: np.ndarray
    gradient: np.ndarray
    rate: float
    condition: float


class Programs(NamedTuple):
    """Compiled functions of λ, and of w where it is given; each serves all λ."""

    problem: convergence.Problem
    curves: Callable[..., Any]
    linear_solves: Callable[..., Any]
    by_tolerance: Callable[..., Any]
    cg_says: Callable[..., Any]
    by_many_steps: Callable[..., Any]
    solved: Callable[..., Any]


class Curves(NamedTuple):
    """What is measured at the t of the grid, but t = 0.

    Attributes:
        fp_t: Hypergradients of FP, k = t.
        cg_t: Of CG on I − Jᵀ as it is, k = t.
        cg_active: Of CG on the active set, k = t.
        default: Of `fg.aid()`, exact at wₜ.
        certificate: The `fg.Certificate` of `fp_t`.
    """

    fp_t: jax.Array
    cg_t: jax.Array
    cg_active: jax.Array
    default: jax.Array
    certificate: fg.Certificate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument(
        "--validation",
        choices=("rest", "all"),
        default="rest",
        help="40 %% of which rows validate: of those that the test leaves, or of all (%(default)s)",
    )
    parser.add_argument(
        "--scale",
        choices=("none", "features", "both"),
        default="features",
        help="what is standardised by the training rows (%(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Draws the curves of both λ, and checks what is said of them."""
    panels = [
        Panel((0.02, 0.002), convergence.Grid(2, 250)),
        Panel((0.002, 0.002), convergence.Grid(4, 250)),
    ]
    if options.quick:
        panels = [Panel((0.02, 0.002), convergence.Grid(4, 50))]
    data = _data(options)
    programs = _programs(_problem(data))
    claims = report.Claims()
    drawn, results = [], {}
    for panel in panels:
        found, seen = _measure(data, programs, panel, claims)
        drawn.append(found)
        results[str(panel.lam)] = seen
    text = "\n\n".join(
        f"λ = {name}\n" + report.table(_HEADER, _rows(seen)) for name, seen in results.items()
    )
    print(f"\n{text}")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    _draw(options.out / "elastic_net.png", drawn)
    report.write_results(
        options,
        claims=claims,
        settings={
            "seed": options.seed,
            "rows": [len(data.y), len(data.y_val)],
            "validation": options.validation,
            "scale": options.scale,
            "grids": {str(p.lam): p.grid._asdict() for p in panels},
        },
        results=results,
        volatile={},
    )
    return claims.exit_code


def _data(options: argparse.Namespace) -> Data:
    """The authors' recipe; `seed` is that of the split, which theirs does not name."""
    made: Any = make_regression(
        n_samples=500,
        n_features=100,
        n_informative=30,
        effective_rank=30,
        noise=0.1,
        shuffle=False,
        random_state=3,
    )
    x, y = made

    def split(rows: np.ndarray, share: float | int) -> tuple[np.ndarray, np.ndarray]:
        first, second = train_test_split(rows, test_size=share, random_state=options.seed)
        return np.asarray(first), np.asarray(second)

    rest, test = split(np.arange(500), 0.4)
    train, val = split(rest, 0.4 if options.validation == "rest" else len(test))
    if options.scale != "none":
        x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    if options.scale == "both":
        y = (y - y[train].mean()) / y[train].std()
    eigenvalues = np.linalg.eigvalsh(x[train].T @ x[train] / len(train))
    return Data(
        jnp.asarray(x[train]),
        jnp.asarray(y[train]),
        jnp.asarray(x[val]),
        jnp.asarray(y[val]),
        float(max(eigenvalues[0], 0.0)),
        float(eigenvalues[-1]),
    )


def _problem(data: Data) -> convergence.Problem:
    """E and Φ; the λ of both is the array (λ₁, λ₂)."""

    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean((data.x @ w - data.y) ** 2) + 0.5 * lam[1] * jnp.sum(w**2)

    def soft(v: jax.Array, step_size: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step_size * lam[0], 0.0)

    def outer(w: jax.Array, lam: jax.Array) -> jax.Array:
        del lam
        return 0.5 * jnp.mean((data.x_val @ w - data.y_val) ** 2)

    def step_size(lam: jax.Array) -> jax.Array:
        # Not a function of λ in derivatives: w(λ) does not depend on it.
        return 2.0 / (data.largest + data.smallest + 2.0 * lax.stop_gradient(lam[1]))

    phi = fg.proximal_gradient(loss, soft, step_size=step_size)
    return convergence.Problem(outer, phi, jnp.zeros(data.x.shape[1]), outer, phi, lambda w: w)


def _programs(problem: convergence.Problem) -> Programs:
    """Everything that is compiled once, for all λ."""
    return Programs(
        problem,
        jax.jit(functools.partial(_curves, problem)),
        jax.jit(functools.partial(_linear_solves, problem)),
        jax.jit(functools.partial(_by_tolerance, problem)),
        jax.jit(functools.partial(_cg_says, problem)),
        jax.jit(functools.partial(_by_many_steps, problem)),
        jax.jit(functools.partial(_solved, problem)),
    )


def _measure(
    data: Data, programs: Programs, panel: Panel, claims: report.Claims
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is drawn of one λ, and what goes into the results."""
    problem, lam, grid = programs.problem, jnp.asarray(panel.lam), panel.grid
    last, t = grid.t[-1], np.array(grid.t[1:])
    w = jax.jit(lambda lam: convergence.iterates(problem, lam, convergence.Grid(1, last)))(lam)
    far, by_steps = programs.by_many_steps(lam)
    truth = _closed_form(data, np.asarray(far), panel.lam)
    found = _identified(np.asarray(w), truth.w)
    states = w[grid.stride :: grid.stride]
    by_itd = functools.partial(convergence.hypergradients, "itd", problem, grid=grid)
    itd = jax.jit(by_itd)(lam, w[:1])[1:]
    curves = programs.curves(lam, states, jnp.asarray(t))
    size = float(np.linalg.norm(truth.gradient))

    def errors_of(gradients: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        return {
            name: np.linalg.norm(np.asarray(g) - truth.gradient, axis=1) / size
            for name, g in gradients.items()
        }

    errors = errors_of({"itd": itd, **{n: getattr(curves, n) for n in _LABELS if n != "itd"}})
    linear = errors_of(programs.linear_solves(far, lam))
    k = np.arange(1, _LINEAR_STEPS + 1)
    seen = {
        "gradient": truth.gradient,
        "active": int(np.sum(truth.w != 0)),
        "identified": found,
        "rate": truth.rate,
        "contraction": (data.largest - data.smallest)
        / (data.largest + data.smallest + 2 * panel.lam[1]),
        "condition": truth.condition,
        "by_many_steps": _distance(by_steps, truth.gradient),
        "rates": {name: _rate(t, e, found) for name, e in errors.items()},
        "errors_at_last_t": {name: float(e[-1]) for name, e in errors.items()},
        "lowest_errors": {name: float(e.min()) for name, e in errors.items()},
        "linear_steps": {
            name: {f"{tol:g}": _reached(k, e, tol) for tol in (1e-6, 1e-10)}
            for name, e in linear.items()
        },
        "finite_differences": _finite_differences(programs, truth, panel.lam),
        "certificate": _coverage(t, errors["fp_t"], curves.certificate, size),
        "solvers": _solvers(programs, lam, far, states, truth.gradient),
    }
    _check(claims, panel.lam, seen)
    return {
        "lam": panel.lam,
        "t": t,
        "errors": errors,
        "linear": (k, linear),
        "identified": found,
        "estimate": np.asarray(curves.certificate.error) / size,
        "valid": np.asarray(curves.certificate.valid),
    }, seen


def _curves(
    problem: convergence.Problem, lam: jax.Array, states: jax.Array, t: jax.Array
) -> Curves:
    """All methods but ITD at all t, in one program."""
    outer, phi = problem.outer, problem.phi
    by_fp = _hypergradient(problem, fg.aid(fg.fp(num_steps=_STRIDE)), start=fg.warm())

    def at(point: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        w, t = point
        # FP has no memory but its last iterate: t/s warm updates of s steps are one of t steps.
        carry = jnp.zeros_like(lam), by_fp.init(w, lam)
        fp_t, state = lax.fori_loop(0, t // _STRIDE, lambda _, c: by_fp.update(c[1], lam), carry)
        plain = _plain_cg(t, _CG_STOPS)
        solvers = (plain, _restricted(plain, _active(problem, w, lam)), fg.auto())
        others = (_gradient(problem, solver, w, lam) for solver in solvers)
        return fp_t, *others, fg.certify(outer, phi, w, state.v, lam)

    return Curves(*lax.map(at, (states, t)))


def _linear_solves(
    problem: convergence.Problem, w: jax.Array, lam: jax.Array
) -> dict[str, jax.Array]:
    """Hypergradients at one w after k = 1, 2, ... steps of each linear solve."""
    by_fp = _hypergradient(problem, fg.aid(fg.fp(num_steps=1)), start=fg.warm())

    def update(state: fg.HypergradientState, _: None) -> tuple[Any, jax.Array]:
        gradient, state = by_fp.update(state, lam)
        return state, gradient

    active = _active(problem, w, lam)

    def by_cg(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        plain = _plain_cg(k, 1e-15)
        solvers = plain, _restricted(plain, active)
        return tuple(_gradient(problem, solver, w, lam) for solver in solvers)  # pyright: ignore

    fp = lax.scan(update, by_fp.init(w, lam), length=_LINEAR_STEPS)[1]
    cg, cg_active = lax.map(by_cg, jnp.arange(1, _LINEAR_STEPS + 1))
    return {"fp_t": fp, "cg_t": cg, "cg_active": cg_active}


def _active(problem: convergence.Problem, w: jax.Array, lam: jax.Array) -> jax.Array:
    """The diagonal of D at w."""
    return jnp.where(problem.phi(w, lam) != 0.0, 1.0, 0.0)


def _hypergradient(
    problem: convergence.Problem, estimator: fg.Estimator, start: fg.Start | None = None
) -> fg.Hypergradient:
    """Of an estimator at a w that is given."""
    return fg.hypergradient(
        problem.outer,
        problem.phi,
        lambda w0, lam: w0,  # noqa: ARG005
        estimator,
        start=start or fg.cold(),
        on_failure="ignore",
    )


def _solve(
    problem: convergence.Problem, solver: fg.LinearSolver, w: jax.Array, lam: jax.Array
) -> tuple[jax.Array, Any]:
    """The hypergradient at w by a linear solver, and what that says."""
    hypergrad = _hypergradient(problem, fg.aid(solver))
    gradient, state = hypergrad.update(hypergrad.init(w, lam), lam)
    return gradient, state.info.linear


def _gradient(
    problem: convergence.Problem, solver: fg.LinearSolver, w: jax.Array, lam: jax.Array
) -> jax.Array:
    return _solve(problem, solver, w, lam)[0]


def _plain_cg(num_steps: jax.Array, least: float) -> fg.LinearSolver:
    """The textbook's recurrence, for a traced number of steps or until a residual of `least`.

    `fg.cg` differs in two ways: its number of steps is static, and a matrix that it sees not to be
    symmetric is a failure.
    """

    def solve(
        matvec: Callable[[jax.Array], jax.Array], b: jax.Array, x0: jax.Array | None = None
    ) -> tuple[jax.Array, fg.SolveInfo]:
        del x0  # It starts at 0.

        def step(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, r, p = carry
            rr = r @ r
            going = jnp.sqrt(rr) > least
            ap = p - matvec(p)
            alpha = jnp.where(going, rr / jnp.where(going, p @ ap, 1.0), 0.0)
            x, r_next = x + alpha * p, r - alpha * ap
            p = jnp.where(going, r_next + (r_next @ r_next) / jnp.where(going, rr, 1.0) * p, p)
            return x, r_next, p

        x, r, _ = lax.fori_loop(0, num_steps, step, (jnp.zeros_like(b), b, b))
        return x, fg.SolveInfo(jnp.int32(num_steps), jnp.linalg.norm(r), jnp.array(True))

    return solve


def _restricted(solver: fg.LinearSolver, active: jax.Array) -> fg.LinearSolver:
    """The same solver on the active set, where I − Jᵀ is αH: symmetric and positive definite.

    Rows of B outside are zero, so that g does not depend on the entries of v there; they are left 0.
    """

    def solve(
        matvec: Callable[[jax.Array], jax.Array], b: jax.Array, x0: jax.Array | None = None
    ) -> tuple[jax.Array, fg.SolveInfo]:
        del x0
        return solver(lambda u: active * matvec(active * u), active * b)

    return solve


def _by_many_steps(problem: convergence.Problem, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The authors' truth: 10,000 steps for w, and as many of FP."""
    w = fg.picard(problem.phi, num_steps=10_000)(problem.w0, lam)
    return w, _gradient(problem, fg.fp(num_steps=10_000), w, lam)


def _closed_form(data: Data, near: np.ndarray, lam: tuple[float, float]) -> Truth:
    """w(λ) and ∇f(λ), given w with the signs s of w(λ).

    On the active set H w = Xᵀy/n − λ₁ s, so that ∂w/∂λ₁ = −H⁻¹ s and ∂w/∂λ₂ = −H⁻¹ w.
    """
    x, y = np.asarray(data.x), np.asarray(data.y)
    signs, active = np.sign(near), near != 0
    n = len(y)
    hessian = x[:, active].T @ x[:, active] / n + lam[1] * np.eye(int(active.sum()))
    w = np.zeros_like(near)
    w[active] = np.linalg.solve(hessian, x[:, active].T @ y / n - lam[0] * signs[active])
    residual = np.asarray(data.x_val) @ w - np.asarray(data.y_val)
    b = np.asarray(data.x_val)[:, active].T @ residual / len(residual)
    v = np.linalg.solve(hessian, b)
    gradient = -np.array([v @ signs[active], v @ w[active]])
    # The conditions of optimality, which make it the solution: signs, and |Xᵀ(y − Xw)/n| ≤ λ₁.
    slope = x.T @ (y - x @ w) / n
    if not (np.array_equal(np.sign(w), signs) and np.all(np.abs(slope[~active]) <= lam[0])):
        raise RuntimeError("the active set after 10,000 steps is not that of w(λ)")
    eigenvalues = np.linalg.eigvalsh(hessian)
    alpha = 2.0 / (data.largest + data.smallest + 2.0 * lam[1])
    rate = float(np.max(np.abs(1.0 - alpha * eigenvalues)))
    return Truth(w, gradient, rate, float(eigenvalues[-1] / eigenvalues[0]))


def _identified(w: np.ndarray, exact: np.ndarray) -> int:
    """The first t from which on wₜ has the signs of w(λ)."""
    wrong = np.flatnonzero(np.any(np.sign(w) != np.sign(exact), axis=1))
    return int(wrong[-1]) + 1 if len(wrong) else 0


def _rate(t: np.ndarray, error: np.ndarray, found: int) -> float | None:
    """The factor a step of errors between the identification and rounding, by least squares."""
    end = int(np.argmax(error < 10 * _FLOOR)) if np.any(error < 10 * _FLOOR) else len(t)
    use = (np.arange(len(t)) < end) & (t >= found)
    if use.sum() < 5:
        return None
    return float(np.exp(np.polyfit(t[use], np.log(error[use]), 1)[0]))


def _reached(t: np.ndarray, error: np.ndarray, tolerance: float) -> int | None:
    """The first t from which on the relative error is below the tolerance."""
    above = np.flatnonzero(~(error < tolerance))
    if len(above) and above[-1] == len(t) - 1:
        return None
    return int(t[above[-1] + 1] if len(above) else t[0])


def _distance(g: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(g) - exact) / np.linalg.norm(exact))


def _solved(problem: convergence.Problem, lam: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W(λ) by steps of Φ until rounding, f(λ), and ∇f(λ) by the default linear solver."""
    w = fg.picard(problem.phi, max_steps=100_000, rtol=1e-15, on_failure="ignore")(problem.w0, lam)
    return w, problem.outer(w, lam), _gradient(problem, fg.auto(), w, lam)


def _finite_differences(
    programs: Programs, truth: Truth, lam: tuple[float, float]
) -> dict[str, Any]:
    """Central differences of f of the problem solved to rounding, beside two hypergradients.

    The step is 10⁻⁴ of each λᵢ; `kinks` counts ends whose active set is not that of λ. `difference`
    is that of `fg.aid()` at the same solution, `default_error` is the error where the lower level is
    left to the default as well: Newton's method, to a residual of 10⁻⁸.
    """
    steps = 1e-4 * np.diag(lam)
    ends = [programs.solved(jnp.asarray(x)) for x in (*(lam + steps), *(lam - steps))]
    values = np.array([value for _, value, _ in ends])
    quotients = (values[:2] - values[2:]) / (2e-4 * np.array(lam))
    gradient = programs.solved(jnp.asarray(lam))[2]
    default = fg.hypergradient(programs.problem.outer, programs.problem.phi)
    by_default, state = default.update(
        default.init(programs.problem.w0, jnp.asarray(lam)), jnp.asarray(lam)
    )
    return {
        "quotients": quotients,
        "difference": _distance(gradient, quotients),
        "kinks": sum(not np.array_equal(np.sign(w), np.sign(truth.w)) for w, _, _ in ends),
        "default_error": _distance(by_default, truth.gradient),
        "newton_steps": int(state.info.lower.num_steps),
    }


def _coverage(
    t: np.ndarray, error: np.ndarray, certificate: fg.Certificate, size: float
) -> dict[str, Any]:
    """How the certificate's estimates stand to true errors, where these are above rounding."""
    estimate = np.asarray(certificate.error) / size
    valid = np.asarray(certificate.valid)
    counted = valid & (error > _FLOOR)
    ratios = estimate[counted] / error[counted]
    statuses = collections.Counter(
        fg.CertificateStatus(int(s)).name for s in np.asarray(certificate.status)
    )
    return {
        "valid_from": _since(t[error > _FLOOR], valid[error > _FLOOR]),
        "first_valid": int(t[np.argmax(valid)]) if valid.any() else None,
        "statuses": dict(statuses),
        "counted": int(counted.sum()),
        "covered": int((ratios >= 1).sum()),
        "ratio": [float(x) for x in np.quantile(ratios, (0, 0.5, 1))] if len(ratios) else [],
    }


def _since(t: np.ndarray, valid: np.ndarray) -> int | None:
    """The first t from which on all are valid."""
    return _reached(t, np.where(valid, 0.0, 1.0), 0.5)


def _solvers(
    programs: Programs, lam: jax.Array, w: jax.Array, states: jax.Array, exact: np.ndarray
) -> dict[str, Any]:
    """What linear solvers say and reach: at w(λ) by a tolerance, and `fg.cg` along the iterates."""
    at_solution = {
        name: {
            "status": fg.Status(int(info.status)).name,
            "steps": int(info.num_steps),
            "error": _distance(gradient, exact),
        }
        for name, (gradient, info) in programs.by_tolerance(w, lam).items()
    }
    statuses, active = programs.cg_says(states, lam)
    proper = np.asarray(active) < w.size
    said = {}
    for k, of in zip(_FIXED_STEPS, statuses, strict=True):
        for kind, use in (("J not symmetric", proper), ("J symmetric", ~proper)):
            names = (fg.Status(int(s)).name for s in np.asarray(of)[use])
            said[f"cg(num_steps={k}), {kind}"] = dict(collections.Counter(names))
    return {"at_solution": at_solution, "said": said}


def _by_tolerance(
    problem: convergence.Problem, w: jax.Array, lam: jax.Array
) -> dict[str, tuple[jax.Array, fg.SolveInfo]]:
    """Hypergradients by the library's linear solvers, and what these say."""
    stop = {"max_steps": 1000, "rtol": 1e-10}
    linear_solvers = {
        "fp": fg.fp(**stop),
        "cg": fg.cg(**stop),
        "cg, active set": _restricted(fg.cg(**stop), _active(problem, w, lam)),
        "normal_cg": fg.normal_cg(**stop),
        "bicgstab": fg.bicgstab(**stop),
        "gmres": fg.gmres(**stop),
        "auto": fg.auto(),
    }
    return {name: _solve(problem, solver, w, lam) for name, solver in linear_solvers.items()}


def _cg_says(
    problem: convergence.Problem, states: jax.Array, lam: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """The statuses of `fg.cg` at all w, for each fixed number of steps, and the sizes of active sets.

    Where an active set is the whole, J is symmetric.
    """

    def status(w: jax.Array, k: int) -> jax.Array:
        return _solve(problem, fg.cg(num_steps=k), w, lam)[1].status

    statuses = [jax.vmap(functools.partial(status, k=k))(states) for k in _FIXED_STEPS]
    return statuses, jax.vmap(lambda w: jnp.sum(_active(problem, w, lam)))(states)


def _check(claims: report.Claims, lam: tuple[float, float], seen: dict[str, Any]) -> None:
    at = f"λ = {lam}"
    claims.check(
        f"{at}: the authors' truth, 10,000 steps each, is the closed form on the active set",
        seen["by_many_steps"] < 1e-9,
        f"relative difference {seen['by_many_steps']:.1e}",
    )
    fd = seen["finite_differences"]
    claims.check(
        f"{at}: the library's hypergradient is that of central differences",
        fd["kinks"] == 0 and fd["difference"] < 1e-6,
        f"relative difference {fd['difference']:.1e}, {fd['kinks']} active sets differ; error with "
        f"Newton's method by default {fd['default_error']:.1e}",
    )
    for name in ("itd", "fp_t"):
        rate = seen["rates"][name]
        held = rate is not None and abs(np.log(rate) / np.log(seen["rate"]) - 1) < 0.1
        claims.check(
            f"{at}: {_LABELS[name]} falls at the rate ρ(J) of the active set, within 10 % of its log",
            held,
            f"log rate {np.log(rate or np.nan):.4f}, log ρ {np.log(seen['rate']):.4f}, "
            f"log q of Φ {np.log(seen['contraction']):.4f}",
        )
    steps = seen["linear_steps"]
    claims.check(
        f"{at}: at w(λ) CG on the active set comes to 10⁻⁶ with fewer steps than FP",
        steps["cg_active"]["1e-06"] < (steps["fp_t"]["1e-06"] or np.inf),
        f"{steps['cg_active']['1e-06']} and {steps['fp_t']['1e-06']}",
    )
    claims.check(
        f"{at}: at w(λ) CG on I − Jᵀ as it is stays below 10⁻¹⁰ within {_LINEAR_STEPS} steps",
        steps["cg_t"]["1e-10"] is not None,
        f"from k = {steps['cg_t']['1e-10']} on; below 10⁻⁶ from k = {steps['cg_t']['1e-06']} on",
        required=False,
    )
    said = {
        k: v
        for k, v in seen["solvers"]["said"].items()
        if k.endswith("not symmetric") and not k.startswith("cg(num_steps=1)")
    }
    silent = sum(v.get("FIXED_STEPS", 0) for v in said.values())
    claims.check(
        f"{at}: `fg.cg` of two steps or more objects wherever J is not symmetric",
        silent == 0,
        f"{silent} of {sum(sum(v.values()) for v in said.values())} solves without objection",
    )
    at_solution = seen["solvers"]["at_solution"]
    right = {name: v for name, v in at_solution.items() if name != "cg"}
    claims.check(
        f"{at}: `fg.cg` by a tolerance fails, and every other linear solver is right",
        at_solution["cg"]["status"] == "NOT_SYMMETRIC"
        and all(v["error"] < 1e-7 and v["status"] == "CONVERGED" for v in right.values()),
        ", ".join(f"{name} {v['error']:.0e}" for name, v in at_solution.items()),
    )
    c = seen["certificate"]
    claims.check(
        f"{at}: no valid certificate is below the true error",
        c["counted"] > 0 and c["covered"] == c["counted"],
        f"{c['covered']} of {c['counted']}, estimate over error (least, median, largest) "
        + ", ".join(f"{x:.4g}" for x in c["ratio"]),
    )
    claims.check(
        f"{at}: certificates are valid from some t on",
        c["valid_from"] is not None,
        f"from t = {c['valid_from']} on; the support is found at {seen['identified']}",
    )


_HEADER = ("linear solver at w(λ)", "says", "steps", "error")


def _rows(seen: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, v["status"], f"{v['steps']}", f"{v['error']:.1e}")
        for name, v in seen["solvers"]["at_solution"].items()
    ]


def _draw(path: Any, drawn: list[dict[str, Any]]) -> None:
    """The authors' curves, the linear solves alone, the certificate: a column for each λ."""
    columns = len(drawn)
    size = (5.2 * columns + 0.6, 10.6)
    with report.figure(path, rows=3, columns=columns, size=size) as (_, axes):
        for i, found in enumerate(drawn):
            first, second, third = axes[0][i], axes[1][i], axes[2][i]
            t, (k, linear) = found["t"], found["linear"]
            _draw_methods(first, t, found["errors"], ("itd", "fp_t", "cg_t", "cg_active"))
            first.set(title=f"λ = {found['lam']}: g at wₜ, k = t", xlim=(0, t[-1]))
            _draw_methods(second, k, linear, ("fp_t", "cg_t", "cg_active"))
            second.set(title="g at w(λ)", xlabel="k", xlim=(0, k[-1]))
            error, valid, estimate = found["errors"]["fp_t"], found["valid"], found["estimate"]
            fp = report.METHODS["fp_t"]
            third.plot(t, error, color=fp.color, lw=2.6, label="true error, FP k = t")
            third.plot(t, np.where(valid, estimate, np.nan), color="#d55e00", lw=1.2)
            third.lines[-1].set_label("its certificate, where valid")
            third.plot(t[~valid], estimate[~valid], "x", color="#b58900", ms=4)
            third.lines[-1].set_label("its certificate, said not to be valid")
            third.plot(t, found["errors"]["default"], "--", color="#007a55", lw=1.2)
            third.lines[-1].set_label("true error, fg.aid()")
            third.set(title="g at wₜ, and its certificate", xlim=(0, t[-1]))
            for panel in (first, third):
                panel.axvline(found["identified"], color="#999999", lw=1, label="support found")
                panel.set(xlabel="t")
            for panel in (first, second, third):
                panel.set(yscale="log", ylabel="‖∇f(λ) − g(λ)‖ / ‖∇f(λ)‖")
                panel.legend(fontsize=8)


def _draw_methods(
    axes: Any, x: np.ndarray, errors: dict[str, np.ndarray], names: tuple[str, ...]
) -> None:
    for name in names:
        if name == "cg_active":
            axes.plot(x, errors[name], ":", color="#555555", lw=1.5)
        else:
            report.draw_method(axes, name, x, errors[name])
        axes.lines[-1].set_label(_LABELS[name].removesuffix(" k = t"))
