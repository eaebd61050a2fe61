"""With the same t, CG errs less than FP and FP less than ITD; all five lower the validation loss.

Logistic regression on the breast-cancer data of scikit-learn (569 tumours, 30 features), with one
ℓ₂ regulariser exp(λ_j) for each feature, chosen by the loss on a validation set:

    min over λ of  f(λ) = CE(X' w(λ), y'),    w(λ) = argmin CE(X w, y) + ½ Σ_j exp(λ_j) w_j²

solved by t steps of gradient descent. First the error of the five methods' hypergradients at λ₀
against the exact one (Newton's method and a dense solve) as t grows; then f minimised over λ by each.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_breast_cancer
from tqdm import tqdm

import fixedgrad as fg

from ..tools import convergence, report

FLOAT64 = True

_LOWEST, _HIGHEST, _START = -4.0, 1.0, -2.0  # The box of the λ_j, and λ₀.
_K = 10  # The fixed k of FP and CG.
_FLOOR = 1e-12  # Relative errors below it are rounding.


class Split(NamedTuple):
    """Standardised features and labels ±1."""

    features: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """The three splits."""

    train: Split
    validation: Split
    test: Split


class Sizes(NamedTuple):
    """The numbers of lower-level steps on the figure, and the length of the optimisation."""

    grid: convergence.Grid
    num_steps: int
    chunk: int
    chunks: int

    @property
    def outer_steps(self) -> int:
        """The number of steps of the optimisation, in compiled chunks."""
        return self.chunk * self.chunks


class Trained(NamedTuple):
    """What the optimisation by one method gave.

    Attributes:
        lam: The last λ.
        w: The last w_t, at the λ before.
        history: The `fixedgrad.BilevelInfo` of all steps.
        products: Products with Jᵀ, over all steps.
        seconds: The time they took, compilation excluded.
        memory: The temporary memory of the compiled optimisation, in bytes.
    """

    lam: jax.Array
    w: jax.Array
    history: fg.BilevelInfo
    products: int
    seconds: float
    memory: int


class Outcome(NamedTuple):
    """All that was measured.

    Attributes:
        start: f(λ₀).
        values: f at the last λ of each method.
        curves: Relative errors of the hypergradients at λ₀, over t.
        gradients: These hypergradients.
        trained: The optimisations.
    """

    start: float
    values: dict[str, float]
    curves: dict[str, np.ndarray]
    gradients: dict[str, jax.Array]
    trained: dict[str, Trained]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="of Adam on λ (%(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Runs the experiment; 0 where its claims held."""
    started = time.perf_counter()
    sizes = _sizes(options)
    data = load(options.seed)
    phi = gradient_descent_map(data.train)
    lam = jnp.full(data.train.features.shape[1], _START)
    exact = jax.jit(functools.partial(exact_hypergradient, data))
    methods = estimators(sizes.num_steps)

    with report.progress(len(methods) * (1 + sizes.chunks)) as bar:
        gradients = {}
        for name in methods:
            bar.set_description(f"error of {report.METHODS[name].label}")
            gradients[name] = hypergradients(name, data, phi, lam, sizes.grid)
            bar.update()
        trained = {}
        for name, estimator in methods.items():
            bar.set_description(f"training by {report.METHODS[name].label}")
            hypergrad = fg.hypergradient(
                functools.partial(_outer, data.validation),
                phi,
                fg.picard(phi, num_steps=sizes.num_steps),
                estimator,
            )
            trained[name] = train(hypergrad, lam, sizes, options.learning_rate, bar)

    start, gradient = exact(lam)
    size = jnp.linalg.norm(gradient)
    curves = {
        name: np.asarray(convergence.errors(g, gradient) / size) for name, g in gradients.items()
    }
    outcome = Outcome(
        float(start),
        {name: float(exact(result.lam)[0]) for name, result in trained.items()},
        curves,
        gradients,
        trained,
    )
    print(_summary(data, sizes, outcome))
    claims = report.Claims()
    _check(claims, sizes, outcome)
    _draw(options.out / "error.png", curves, sizes)
    seconds = time.perf_counter() - started
    path = _write(options, claims, sizes, outcome, data, seconds)
    print(f"\n{options.out / 'error.png'} and {path}, {seconds:.0f} s in all")
    return claims.exit_code


def load(seed: int) -> Data:
    """The data in three equal parts, drawn by `seed`; standardised on the training part."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, *others = np.array_split(order, 3)
    mean, scale = features[train].mean(axis=0), features[train].std(axis=0)

    def split(rows: np.ndarray) -> Split:
        return Split(
            jnp.asarray((features[rows] - mean) / scale), jnp.asarray(2.0 * labels[rows] - 1)
        )

    return Data(*map(split, (train, *others)))


def cross_entropy(w: jax.Array, data: Split) -> jax.Array:
    """The average logistic loss."""
    return jnp.mean(jax.nn.softplus(-data.labels * (data.features @ w)))


def accuracy(w: jax.Array, data: Split) -> float:
    """The fraction classified rightly."""
    return float(jnp.mean(jnp.sign(data.features @ w) == data.labels))


def gradient_descent_map(train: Split) -> fg.Phi:
    """Φ: gradient descent with the optimal step size of case (a), which follows λ.

    0 ≤ ∇²CE ≤ XᵀX/(4n), so L(λ) = λmax(XᵀX)/(4n) + max exp(λ) and μ(λ) = min exp(λ). The step size
    is held fixed in derivatives: at the fixed point its derivative multiplies ∇₁ℓ = 0.
    """
    smoothness = jnp.linalg.norm(train.features, 2) ** 2 / (4 * len(train.labels))

    def step_size(lam: jax.Array) -> jax.Array:
        ridge = jnp.exp(lax.stop_gradient(lam))
        return fg.optimal_step_size(smoothness + ridge.max(), ridge.min()).step_size

    return fg.gradient_descent(functools.partial(_loss, train), step_size=step_size)


def estimators(num_steps: int) -> dict[str, fg.Estimator]:
    """The paper's five, for t = `num_steps`."""
    return {
        "itd": fg.itd(),
        "fp_t": fg.aid(fg.fp(num_steps=num_steps)),
        "cg_t": fg.aid(fg.cg(num_steps=num_steps)),
        "fp_10": fg.aid(fg.fp(num_steps=_K)),
        "cg_10": fg.aid(fg.cg(num_steps=_K)),
    }


def exact_hypergradient(data: Data, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f(λ) and ∇f(λ), without `fixedgrad`: Newton's method, and the implicit function theorem."""
    loss, outer = functools.partial(_loss, data.train), functools.partial(_outer, data.validation)

    def newton(_: Any, w: jax.Array) -> jax.Array:
        return w - jnp.linalg.solve(jax.hessian(loss)(w, lam), jax.grad(loss)(w, lam))

    w = lax.fori_loop(0, 30, newton, jnp.zeros_like(lam))
    v = jnp.linalg.solve(jax.hessian(loss)(w, lam), jax.grad(outer)(w, lam))
    _, cross = jax.vjp(lambda x: jax.grad(loss)(w, x), lam)
    return outer(w, lam), -cross(v)[0]


def hypergradients(
    method: str, data: Data, phi: fg.Phi, lam: jax.Array, grid: convergence.Grid
) -> jax.Array:
    """The hypergradients of one method at λ, a row for every t of the grid."""
    outer = functools.partial(_outer, data.validation)
    problem = convergence.Problem(outer, phi, jnp.zeros_like(lam), outer, phi, lambda w: w)

    @jax.jit
    def rows(lam: jax.Array) -> jax.Array:
        w = convergence.iterates(problem, lam, grid)
        return convergence.hypergradients(method, problem, lam, w, grid, _K)

    return rows(lam)


def train(
    hypergrad: fg.Hypergradient, lam: jax.Array, sizes: Sizes, learning_rate: float, bar: tqdm
) -> Trained:
    """Minimises f over the box by Adam."""
    box: Callable = functools.partial(
        optax.projections.projection_box, lower=_LOWEST, upper=_HIGHEST
    )
    loop = fg.bilevel(hypergrad, optax.adam(learning_rate), project=box)
    state = loop.init(jnp.zeros_like(lam), lam)
    chunk = jax.jit(lambda state: loop.run(state, num_steps=sizes.chunk))
    chunk = chunk.lower(state).compile()
    memory = chunk.memory_analysis()
    histories, seconds = [], 0.0
    for _ in range(sizes.chunks):
        started = time.perf_counter()
        state, history = jax.block_until_ready(chunk(state))
        seconds += time.perf_counter() - started
        histories.append(history)
        bar.update()
        bar.set_postfix(f=f"{float(history.value[-1]):.4f}")
    history: fg.BilevelInfo = jax.tree.map(lambda *x: np.concatenate(x), *histories)
    # An estimator without a linear system is ITD: its backward pass has t products with Jᵀ.
    linear = history.linear_steps if state.hypergrad.info.linear else history.lower_steps
    return Trained(
        state.lam,
        state.hypergrad.w,
        history,
        int(linear.sum()),
        seconds,
        memory.temp_size_in_bytes if memory is not None else 0,
    )


def _sizes(options: argparse.Namespace) -> Sizes:
    if options.quick:
        return Sizes(convergence.Grid(40, 3), 40, 5, 2)
    if options.full:
        return Sizes(convergence.Grid(10, 30), 100, 25, 20)
    return Sizes(convergence.Grid(25, 12), 100, 20, 10)


def _loss(train: Split, w: jax.Array, lam: jax.Array) -> jax.Array:
    return cross_entropy(w, train) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def _outer(validation: Split, w: jax.Array, lam: jax.Array) -> jax.Array:
    del lam
    return cross_entropy(w, validation)


def _summary(data: Data, sizes: Sizes, outcome: Outcome) -> str:
    """The table, with a line above and the meaning of its columns below."""
    parts = ", ".join(f"{len(part.labels)} {name}" for name, part in data._asdict().items())
    header = (
        *("method", "E(w_t, λ)", "f(λ)", "test accuracy"),
        *("error at λ₀", "products", "time", "temp. memory"),
    )
    rows = [
        (
            report.METHODS[name].label,
            f"{result.history.value[-1]:.4f}",
            f"{outcome.values[name]:.4f}",
            f"{100 * accuracy(result.w, data.test):.1f} %",
            f"{_error(outcome, sizes, name):.1e}",
            f"{result.products}",
            f"{result.seconds:.2f} s",
            f"{result.memory / 1024:.1f} KiB",
        )
        for name, result in outcome.trained.items()
    ]
    return (
        f"\nBreast cancer: {parts}. t = {sizes.num_steps}, {sizes.outer_steps} steps of Adam "
        f"from λ₀ = {_START:g}, where f = {outcome.start:.4f}.\n\n{report.table(header, rows)}\n\n"
        "E(w_t, λ): validation objective at the last w_t; f(λ): at the exact w(λ).\n"
        f"error at λ₀: ‖g(λ₀) − ∇f(λ₀)‖ / ‖∇f(λ₀)‖ with t = {sizes.num_steps}.\n"
        "products: with Jᵀ in the optimisation. time: of it, without compiling it.\n"
    )


def _error(outcome: Outcome, sizes: Sizes, method: str) -> float:
    return float(outcome.curves[method][sizes.grid.t.index(sizes.num_steps)])


def _check(claims: report.Claims, sizes: Sizes, outcome: Outcome) -> None:
    for better, worse in (("cg_t", "fp_t"), ("fp_t", "itd")):
        ratio = np.maximum(outcome.curves[better], _FLOOR) / np.maximum(
            outcome.curves[worse], _FLOOR
        )
        labels = [report.METHODS[name].label for name in (better, worse)]
        claims.check(
            f"{labels[0]} errs at most as much as {labels[1]}",
            bool(ratio.max() <= 1 + 1e-6),
            f"ratio of the errors {ratio.min():.2g} to {ratio.max():.2g} over t",
        )
    at = sizes.grid.t.index(sizes.num_steps)
    norms = {name: jnp.linalg.norm(rows[at]) for name, rows in outcome.gradients.items()}
    apart = max(
        abs(result.history.gradient_norm[0] / norms[name] - 1)
        for name, result in outcome.trained.items()
    )
    claims.check(
        "the curves show the hypergradients that `loop.run` uses",
        bool(apart < _FLOOR),
        f"norms at λ₀ apart by {apart:.1e}, relatively",
    )
    values = outcome.values.values()
    claims.check(
        "all five lower f",
        max(values) < outcome.start,
        f"from {outcome.start:.4f} to {min(values):.4f} up to {max(values):.4f}",
    )


def _write(
    options: argparse.Namespace,
    claims: report.Claims,
    sizes: Sizes,
    outcome: Outcome,
    data: Data,
    seconds: float,
) -> Path:
    trained = outcome.trained
    return report.write_results(
        options,
        claims=claims,
        settings={
            "seed": options.seed,
            "learning_rate": options.learning_rate,
            "lam": {"start": _START, "box": [_LOWEST, _HIGHEST]},
            "num_steps": sizes.num_steps,
            "k": _K,
            "outer_steps": sizes.outer_steps,
        },
        results={
            "objective_at_start": outcome.start,
            "t": sizes.grid.t,
            "relative_error": outcome.curves,
            "optimised": {
                name: {
                    "objective_at_w_t": result.history.value[-1],
                    "objective": outcome.values[name],
                    "test_accuracy": accuracy(result.w, data.test),
                    "relative_error_at_start": _error(outcome, sizes, name),
                    "products": result.products,
                    "lam": result.lam,
                    "objective_history": result.history.value,
                }
                for name, result in trained.items()
            },
        },
        volatile={
            "seconds": seconds,
            "optimisation_seconds": {name: result.seconds for name, result in trained.items()},
            "temporary_bytes": {name: result.memory for name, result in trained.items()},
        },
    )


def _draw(path: Path, curves: dict[str, np.ndarray], sizes: Sizes) -> None:
    with report.figure(path, size=(6.4, 4.2)) as (_, axes):
        (ax,) = axes.flat
        for name in report.METHODS:
            report.draw_method(ax, name, sizes.grid.t, curves[name])
        ax.set_yscale("log")
        ax.set_xlabel("t")
        ax.set_ylabel("‖g(λ) − ∇f(λ)‖ / ‖∇f(λ)‖")
        ax.set_title("Hypergradient error at λ₀, breast cancer")
        ax.legend()
