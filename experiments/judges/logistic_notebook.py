"""The loop of the authors' notebook ends at its published loss by FP, CG and reverse mode alike.

The logistic regression of hypertorch's examples: n = 1000, d = 20, half of the rows for validation,
a penalty λ_j ≥ 10⁻⁸ for each weight,

    f(λ) = CE(X' w(λ), y'),    w(λ) = argmin CE(X w, y) + ½ Σ_j λ_j w_j²,

T = 100 steps of gradient descent from 0, K = 10 steps of each method, and 1000 steps of SGD with
momentum on λ. First the errors of the three hypergradients against k at λ = 1, then the loop by
`fg.bilevel`, and the same problem with the defaults of this library.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.model_selection import train_test_split

import fixedgrad as fg

from ..tools import report

FLOAT64 = (
    True  # The notebook ran in single precision; its losses are printed to all digits of that.
)

_LEAST = 1e-8  # The notebook's bound on λ.
_STEP_SIZE, _T, _K = 0.1, 100, 10
_PUBLISHED = {0: 0.5743989944458008, 100: 0.2853544056415558, 990: 0.2805064916610718}
"""The notebook's validation losses by reverse mode, at these outer steps."""
_NOTEBOOK = {"itd": "reverse, last K steps", "fp_10": "FP k = K", "cg_10": "CG k = K"}
_MOST_CG = 10  # Steps of CG that are compiled, each number by itself.
_METHODS = {"itd": "reverse, last k steps", "fp_10": "FP", "cg_10": "CG"}


class Data(NamedTuple):
    """Both halves; labels are 0 and 1."""

    x: jax.Array
    y: jax.Array
    x_val: jax.Array
    y_val: jax.Array


class Ran(NamedTuple):
    """One loop.

    Attributes:
        value: E(w, λ) at its own w before each step.
        exact: f at the last λ, w(λ) solved to rounding.
        lam: The last penalties.
        lower_steps: Steps of the lower level, the mean of all outer steps.
        linear_steps: Of the linear solve, so too.
        seconds: For all steps, compilation apart.
    """

    value: np.ndarray
    exact: float
    lam: np.ndarray
    lower_steps: float
    linear_steps: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""
    del parser


def main(options: argparse.Namespace) -> int:
    """Draws the errors, runs the loops, and holds them against the notebook."""
    num_steps = 120 if options.quick else 1000
    data = _data()
    claims = report.Claims()
    k, errors, floor = _errors(data)
    _check_errors(claims, k, errors)
    exact = _exact(data)
    runs = {
        name: _run(loop, lam, num_steps, exact, log="log" in name)
        for name, (loop, lam) in _loops(data).items()
        if not options.quick or name not in ("exact, SGD", "defaults, λ")
    }
    published = _PUBLISHED[max(step for step in _PUBLISHED if step < num_steps)]
    level = float(np.ceil(1e3 * published) / 1e3)
    _check_runs(claims, runs, num_steps)
    rows = [
        (
            name,
            f"{ran.value[0]:.4f}",
            f"{ran.value.min():.4f}",
            f"{ran.value[-1]:.4f}",
            f"{ran.exact:.4f}",
            _first(ran.value, level),
            f"{ran.lower_steps:.1f}",
            f"{ran.linear_steps:.1f}",
            f"{1e3 * ran.seconds / num_steps:.2f}",
        )
        for name, ran in runs.items()
    ]
    header = (
        "loop",
        "first E(w, λ)",
        "lowest",
        "last",
        "f at the last λ",
        f"steps to {level:g}",
        "lower steps",
        "linear steps",
        "ms a step",
    )
    text = report.table(header, rows)
    print(f"\n{text}")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    _draw(options.out / "logistic_notebook.png", k, errors, runs)
    report.write_results(
        options,
        claims=claims,
        settings={"T": _T, "K": _K, "steps": num_steps, "published": _PUBLISHED},
        results={
            "steps": num_steps,
            "level": level,
            "errors": {
                name: {str(i): e[i - 1] for i in (1, 10, 50, 99)} for name, e in errors.items()
            },
            "error_of_exact_linear_solve_at_w_T": floor,
            "loops": {
                name: {
                    "first": ran.value[0],
                    "last": ran.value[-1],
                    "lowest": ran.value.min(),
                    "exact": ran.exact,
                    "steps_to_level": _first(ran.value, level),
                    "zero_penalties": int(np.sum(ran.lam <= 1.01 * _LEAST)),
                    "lower_steps": ran.lower_steps,
                    "linear_steps": ran.linear_steps,
                }
                for name, ran in runs.items()
            },
        },
        volatile={"seconds": {name: ran.seconds for name, ran in runs.items()}},
    )
    return claims.exit_code


def _data() -> Data:
    """The notebook's own numbers: its seed is 1, and of NumPy's old generator."""
    random = np.random.RandomState(1)
    weights = random.randn(20)
    x = random.randn(1000, 20)
    y = (x @ weights + 0.1 * random.randn(1000) > 0.0).astype(float)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.5, random_state=random)
    return Data(*(jnp.asarray(part) for part in (x, y, x_val, y_val)))


def _problem(data: Data, log: bool = False) -> tuple[fg.Outer, fg.Phi]:
    """E and Φ; λ is the penalties, or their logarithms."""

    def cross_entropy(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(x @ w) - y * (x @ w))

    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        penalty = jnp.exp(lam) if log else lam
        return cross_entropy(w, data.x, data.y) + 0.5 * jnp.sum(penalty * w**2)

    def outer(w: jax.Array, lam: jax.Array) -> jax.Array:
        del lam
        return cross_entropy(w, data.x_val, data.y_val)

    return outer, fg.gradient_descent(loss, step_size=_STEP_SIZE)


def _errors(data: Data) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Relative errors at λ = 1 and w_T after k = 1, ..., T − 1 steps of each method.

    Reverse mode goes through the last k of the T steps. Where FP or CG have solved the linear system
    what remains is the error of w_T, returned last.
    """
    outer, phi = _problem(data)
    lam, w0, count = jnp.ones(20), jnp.zeros(20), _T - 1
    exact = fg.hypergradient(outer, phi, fg.newton(phi, max_steps=50, rtol=1e-14))
    gradient = exact.update(exact.init(w0, lam), lam)[0]

    def given(w: jax.Array, lam: jax.Array) -> jax.Array:
        del lam
        return w

    def at(w: jax.Array, estimator: fg.Estimator) -> jax.Array:
        hypergrad = fg.hypergradient(outer, phi, given, estimator, on_failure="ignore")
        return hypergrad.update(hypergrad.init(w, lam), lam)[0]

    def reverse(lam: jax.Array) -> Any:
        """Of E(w_T): B_iᵀ a_i of all steps i, the last first, summed from the last on."""

        def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return phi(w, lam), w

        w, before = lax.scan(step, w0, length=_T)

        def back(carry: tuple[jax.Array, jax.Array], w: jax.Array) -> Any:
            w_bar, total = carry
            w_bar, lam_bar = jax.vjp(phi, w, lam)[1](w_bar)
            return (w_bar, total + lam_bar), total + lam_bar

        start = jax.grad(outer)(w, lam), jnp.zeros_like(lam)
        return w, lax.scan(back, start, before[::-1])[1][:count]

    @jax.jit
    def curves() -> tuple[dict[str, jax.Array], jax.Array]:
        w, by_reverse = reverse(lam)
        fp = fg.hypergradient(outer, phi, given, fg.aid(fg.fp(num_steps=1)), start=fg.warm())

        def update(state: fg.HypergradientState, _: None) -> tuple[Any, jax.Array]:
            g, state = fp.update(state, lam)
            return state, g

        by_fp = lax.scan(update, fp.init(w, lam), length=count)[1]
        # After a few steps nothing is left but the error of w_T.
        by_cg = jnp.stack([at(w, fg.aid(fg.cg(num_steps=k))) for k in range(1, _MOST_CG + 1)])
        by_cg = jnp.concatenate([by_cg, jnp.repeat(by_cg[-1:], count - _MOST_CG, axis=0)])
        return {"itd": by_reverse, "fp_10": by_fp, "cg_10": by_cg}, at(w, fg.aid())

    found, solved = curves()
    size = float(jnp.linalg.norm(gradient))
    errors = {
        name: np.linalg.norm(np.asarray(found[name] - gradient[None]), axis=1) / size
        for name in _NOTEBOOK  # In its order: that of `found` is by name.
    }
    return np.arange(1, count + 1), errors, float(jnp.linalg.norm(solved - gradient)) / size


def _loops(data: Data) -> dict[str, tuple[fg.Bilevel, jax.Array]]:
    """The notebook's loop by each method, and this library's with its defaults; with their first λ."""
    outer, phi = _problem(data)
    sgd = optax.sgd(1.0, momentum=0.9)

    def clamp(lam: jax.Array) -> jax.Array:
        return jnp.maximum(lam, _LEAST)

    def notebook(num_steps: int, estimator: fg.Estimator) -> fg.Bilevel:
        solver = fg.picard(phi, num_steps=num_steps)
        return fg.bilevel(fg.hypergradient(outer, phi, solver, estimator), sgd, project=clamp)

    ones, zeros = jnp.ones(20), jnp.zeros(20)  # log 1 is 0: all loops start at the same penalties.
    return {
        # The last K of the T steps belong to the estimator.
        _NOTEBOOK["itd"]: (notebook(_T - _K, fg.truncated_itd(num_steps=_K)), ones),
        _NOTEBOOK["fp_10"]: (notebook(_T, fg.aid(fg.fp(num_steps=_K))), ones),
        _NOTEBOOK["cg_10"]: (notebook(_T, fg.aid(fg.cg(num_steps=_K))), ones),
        "exact, SGD": (fg.bilevel(fg.hypergradient(outer, phi), sgd, project=clamp), ones),
        "defaults, λ": (fg.bilevel(fg.hypergradient(outer, phi), project=clamp), ones),
        "defaults, log λ": (fg.bilevel(fg.hypergradient(*_problem(data, log=True))), zeros),
    }


def _exact(data: Data) -> Callable[[jax.Array], jax.Array]:
    """F of penalties: E at w(λ) solved to rounding."""
    outer, phi = _problem(data)
    solve = fg.newton(phi, max_steps=100, rtol=1e-13, on_failure="ignore")
    return jax.jit(lambda lam: outer(solve(jnp.zeros(20), lam), lam))


def _run(
    loop: fg.Bilevel,
    lam: jax.Array,
    num_steps: int,
    exact: Callable[[jax.Array], jax.Array],
    *,
    log: bool,
) -> Ran:
    """A loop from w = 0, compiled before it is timed."""
    state = loop.init(jnp.zeros(20), lam)
    run: Callable[[], Any] = lambda: jax.block_until_ready(loop.run(state, num_steps=num_steps))  # noqa: E731
    run()
    start = time.perf_counter()
    last, history = run()
    seconds = time.perf_counter() - start
    lower, linear = (float(jnp.mean(x)) for x in (history.lower_steps, history.linear_steps))
    penalties = jnp.exp(last.lam) if log else last.lam
    value, f = np.asarray(history.value), float(exact(penalties))
    return Ran(value, f, np.asarray(penalties), lower, linear, seconds)


def _first(value: np.ndarray, level: float) -> str:
    """The first step at which E(w, λ) is at the level or below."""
    reached = np.flatnonzero(value <= level)
    return str(int(reached[0])) if len(reached) else "-"


def _check_errors(claims: report.Claims, k: np.ndarray, errors: dict[str, np.ndarray]) -> None:
    reverse, fp, cg = (errors[name][_K - 1] for name in _NOTEBOOK)
    claims.check(
        "with k = 10 CG errs less than FP and reverse mode",
        cg < min(fp, reverse),
        f"CG {cg:.1e}, FP {fp:.1e}, reverse {reverse:.1e}",
    )
    claims.check(
        f"with k = {k[-1]} all three are right",
        all(e[-1] < 1e-3 for e in errors.values()),
        ", ".join(f"{_METHODS[name]} {e[-1]:.1e}" for name, e in errors.items()),
    )


def _check_runs(claims: report.Claims, runs: dict[str, Ran], num_steps: int) -> None:
    by_reverse = runs[_NOTEBOOK["itd"]].value
    for step, published in _PUBLISHED.items():
        if step < num_steps:
            off = abs(by_reverse[step] - published)
            claims.check(
                f"reverse mode is at the notebook's loss at step {step}, within 2·10⁻⁶",
                off < 2e-6,
                f"{by_reverse[step]:.6f}, the notebook's {published:.6f}",
            )
    lasts = [runs[name].value[-1] for name in _NOTEBOOK.values()]
    within = 1e-3 if num_steps >= 1000 else 5e-3  # Earlier CG is ahead.
    claims.check(
        f"reverse mode, FP and CG end within {within:g} of each other",
        max(lasts) - min(lasts) < within,
        ", ".join(f"{_NOTEBOOK[n]} {x:.6f}" for n, x in zip(_NOTEBOOK, lasts, strict=True)),
    )
    ours, theirs = runs["defaults, log λ"], runs[_NOTEBOOK["itd"]]
    claims.check(
        "the defaults of this library, on log λ, end at a lower f than the notebook's loop",
        ours.exact < theirs.exact and ours.value[-1] < theirs.value[-1],
        f"f {ours.exact:.4f} and {theirs.exact:.4f}, at the w of the loop {ours.value[-1]:.4f} and "
        f"{theirs.value[-1]:.4f}",
    )
    if "defaults, λ" in runs:
        raw = runs["defaults, λ"]
        claims.check(
            "the defaults of this library, on λ itself, do so too",
            raw.exact < theirs.exact,
            f"f {raw.exact:.4f}, the lowest on the way {raw.value.min():.4f}",
            required=False,
        )


def _draw(path: Any, k: np.ndarray, errors: dict[str, np.ndarray], runs: dict[str, Ran]) -> None:
    with report.figure(path, columns=2, size=(11, 4.2)) as (_, axes):
        left, right = axes[0]
        for name, error in errors.items():
            report.draw_method(left, name, k, error)
            left.lines[-1].set_label(_METHODS[name])
        left.set(yscale="log", xlabel="k", ylabel="‖∇f(λ) − g(λ)‖ / ‖∇f(λ)‖")
        left.set(title=f"λ = 1, w at t = {_T}", xlim=(0, k[-1]))
        styles = {label: name for name, label in _NOTEBOOK.items()}
        others = iter((("#555555", ":"), ("#cc79a7", "-"), ("#000000", "-")))
        for name, ran in runs.items():
            steps = np.arange(len(ran.value))
            if name in styles:
                report.draw_method(right, styles[name], steps, ran.value)
                right.lines[-1].set_label(name)
            else:
                color, line = next(others)
                right.plot(steps, ran.value, line, color=color, lw=1.3, label=name)
        right.set(yscale="log", xlabel="outer step", ylabel="E(w, λ)")
        right.set(
            title="validation loss, at the w of each loop",
            xlim=(0, len(next(iter(runs.values())).value)),
        )
        for panel in (left, right):
            panel.legend(fontsize=8)
