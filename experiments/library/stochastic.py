"""Stochastic hypergradients err as theory says, know it, and pay off from some thousand rows on.

Three parts, of logistic regression with one penalty for each feature:

- orders: the bias of stochastic AID against k, its variance against J and the batch size, beside the
  slopes of theory, from thousands of samples;
- certificate: the error that `certify_stochastic` estimates, over the true one;
- rows: seconds and passes over the data until f(λ) has come down by 99 % of the way to its minimum,
  with full and with stochastic hypergradients, against the number of rows.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.ticker import NullLocator

import fixedgrad as fg

from ..benchmark.timing import seconds_of
from ..tools import report

FLOAT64 = True
_STEP = 0.5
_REACHED = 0.01  # Of the way from f(λ₀) to its minimum, what may be left.
_BATCH = 64
_COLORS = {"full": "#0072b2", "stochastic": "#d55e00", "saba": "#007a55"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""
    del parser


def loss(w: jax.Array, lam: jax.Array, train: Any, validation: Any) -> jax.Array:
    """Mean logistic loss, and a penalty for each feature."""
    del validation
    return _mean_logistic(w, train) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def outer(w: jax.Array, lam: jax.Array, train: Any, validation: Any) -> jax.Array:
    """Mean logistic loss of the validation rows."""
    del lam, train
    return _mean_logistic(w, validation)


def _mean_logistic(w: jax.Array, rows: Any) -> jax.Array:
    x, y = rows
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


PHI = fg.gradient_descent(loss, step_size=_STEP)


class _Problem(NamedTuple):
    train: Any
    validation: Any
    lam: jax.Array


def _problem(seed: int, n: int, p: int, dtype: Any) -> _Problem:
    """Half of the features tell nothing; as many validation rows as training rows."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=p) * (np.arange(p) < p // 2)

    def rows() -> Any:
        x = rng.normal(size=(n, p))
        y = np.sign(x @ weights / np.sqrt(p / 8) + rng.normal(size=n))
        return jnp.asarray(x, dtype), jnp.asarray(y, dtype)

    return _Problem(rows(), rows(), jnp.full(p, -1.0, dtype))


def main(options: argparse.Namespace) -> int:
    """Runs the three parts."""
    claims = report.Claims()
    orders = _orders(options, claims)
    coverage = _certificates(options, claims)
    rows, seconds = _rows(options, claims)
    _draw(options.out / "stochastic.png", orders, coverage, rows, seconds)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "full": options.full, "batch_size": _BATCH},
        results={"orders": orders, "certificate": coverage, "rows": rows},
        volatile={"seconds": seconds},
    )
    return claims.exit_code


def _orders(options: argparse.Namespace, claims: report.Claims) -> dict[str, Any]:
    """Bias against k at w(λ); variance against J and against the batch size."""
    n, p, samples = (64, 4, 200) if options.quick else (256, 5, 4000)
    problem = _problem(options.seed, n, p, jnp.float64)
    data = problem.train, problem.validation
    w = fg.newton(PHI, max_steps=50, rtol=1e-13)(jnp.zeros(p), problem.lam, *data)
    full = fg.hypergradient(outer, PHI, lambda w0, *_: w0, fg.aid(fg.dense()))
    truth, _ = full.update(full.init(w, problem.lam, *data), problem.lam, *data)
    stay = optax.sgd(0.0)

    def gradients(batch_size: int, k: int, j: int) -> np.ndarray:
        hypergrad = fg.stochastic_hypergradient(
            outer, PHI, stay, lower_steps=1, linear_steps=k, num_batches=j, start=fg.cold()
        )

        def one(key: jax.Array) -> jax.Array:
            of_phi, of_outer = jax.random.split(key)
            sources = (
                fg.minibatches(problem.train, batch_size, key=of_phi),
                fg.minibatches(problem.validation, batch_size, key=of_outer),
            )
            state = hypergrad.init(w, problem.lam, *sources)
            return hypergrad.update(state, problem.lam, *sources)[0]

        keys = jax.random.split(jax.random.key(options.seed), samples)
        return np.asarray(jax.jit(jax.vmap(one))(keys))

    steps, sizes = ((2, 4), (2, 8)) if options.quick else ((2, 4, 8, 16), (2, 8, 32))
    of_k = [gradients(32, k, 16) for k in steps]
    bias = [float(np.linalg.norm(g.mean(0) - truth)) for g in of_k]
    noise = [float(np.sqrt(g.var(0).sum() / samples)) for g in of_k]
    exact = []
    for k in steps:
        fp = fg.hypergradient(
            outer, PHI, lambda w0, *_: w0, fg.aid(fg.fp(num_steps=k)), on_failure="ignore"
        )
        grad, _ = fp.update(fp.init(w, problem.lam, *data), problem.lam, *data)
        exact.append(float(np.linalg.norm(np.asarray(grad - truth))))
    of_j = [float(gradients(8, 12, j).var(0).sum()) for j in sizes]
    of_batch = [float(gradients(b, 12, 4).var(0).sum()) for b in sizes]
    # The mean over samples is known to its standard error: no more can be asked.
    worst = max(abs(b - e) / s for b, e, s in zip(bias, exact, noise, strict=True))
    claims.check(
        "the bias against k is that of k exact steps, within five standard errors",
        worst < 5,
        f"{worst:.1f}",
    )
    slopes = [float(np.polyfit(np.log(sizes), np.log(x), 1)[0]) for x in (of_j, of_batch)]
    claims.check(
        "the variance falls as 1/(batch size)",
        -1.15 < slopes[1] < -0.85,
        f"slope {slopes[1]:.2f}",
        required=not options.quick,
    )
    claims.check(
        "the variance falls with J, at most as 1/J: that of v stays",
        -1.15 < slopes[0] < 0,
        f"slope {slopes[0]:.2f}",
        required=not options.quick,
    )
    return {
        "steps": steps,
        "bias": bias,
        "standard_error": noise,
        "exact_bias": exact,
        "sizes": sizes,
        "variance_of_j": of_j,
        "variance_of_batch": of_batch,
        "slopes": slopes,
    }


def _certificates(options: argparse.Namespace, claims: report.Claims) -> dict[str, Any]:
    """Estimated over true errors of single updates, for three numbers of steps."""
    n, p, runs = (400, 4, 4) if options.quick else (4000, 10, 100 if options.full else 40)
    full = fg.hypergradient(outer, PHI)
    ratios: dict[str, list[float]] = {}
    for t in (20,) if options.quick else (5, 20, 80):
        hypergrad = fg.stochastic_hypergradient(
            outer, PHI, lower_steps=t, linear_steps=t, num_batches=4
        )
        found = []
        for run in range(runs):
            problem = _problem(options.seed + run, n, p, jnp.float64)
            data = problem.train, problem.validation
            sources = tuple(fg.minibatches(x, 32, key=run) for x in data)
            w0, lam = jnp.zeros(p), problem.lam
            grad, state = hypergrad.update(hypergrad.init(w0, lam, *sources), lam, *sources)
            truth, _ = full.update(full.init(w0, lam, *data), lam, *data)
            certificate = fg.certify_stochastic(
                outer,
                PHI,
                state.w,
                state.v,
                lam,
                *sources,
                gradient=grad,
                group_size=n // 40,
                key=run,
            )
            if certificate.valid:
                found.append(float(certificate.error / jnp.linalg.norm(grad - truth)))
        ratios[f"t = k = {t}"] = found
    every = np.concatenate([np.array(x) for x in ratios.values()])
    claims.check(
        "the certificate, of a fifth of the rows, covers the error 19 times in 20",
        float(np.mean(every >= 1)) >= 0.95,
        f"{np.mean(every >= 1):.3f} of {len(every)}, {len(ratios) * runs - len(every)} not valid",
    )
    claims.check(
        "and overstates it by less than 3 in the median",
        float(np.median(every)) < 3,
        f"{np.median(every):.2f}",
        required=not options.quick,  # Of few rows the noise is most of it.
    )
    return ratios


class _Contestant(NamedTuple):
    """A loop, its data, and the passes over the training rows that one step takes."""

    name: str
    loop: fg.Bilevel
    data: Any
    passes: float


def _contestants(problem: _Problem, n: int, rate: float) -> list[_Contestant]:
    data = problem.train, problem.validation
    sources = tuple(fg.minibatches(x, _BATCH, key=3) for x in data)
    full = fg.hypergradient(
        outer,
        PHI,
        fg.picard(PHI, num_steps=10),
        fg.aid(fg.cg(num_steps=5)),
        start=fg.warm(),
    )
    stochastic = fg.stochastic_hypergradient(
        outer, PHI, optax.sgd(rate), optax.sgd(rate), lower_steps=4, linear_steps=4, num_batches=1
    )
    saba = fg.saba(outer, PHI, optax.sgd(rate), optax.sgd(rate))

    # Each evaluation of Φ, each product and each linearisation reads the rows once; of the full method
    # also the residual of w, and that of the warm start of v.
    of_full = 10 + 1 + 1 + 1 + 5 + 1
    of_stochastic, of_saba = (4 + 2 * 4 + 2) * _BATCH / n, 2 * _BATCH / n

    def loop(hypergrad: fg.Hypergradient, rate: float) -> fg.Bilevel:
        return fg.bilevel(hypergrad, optax.adam(rate), project=_in_box)

    return [
        _Contestant("full", loop(full, 0.2), data, of_full),
        _Contestant("stochastic", loop(stochastic, 0.03), sources, of_stochastic),
        _Contestant("saba", loop(saba, 0.01), sources, of_saba),
    ]


def _in_box(lam: jax.Array) -> jax.Array:
    """Penalties so large that the step of Φ would not contract are kept out."""
    return jnp.clip(lam, -7.0, 0.7)


def _rows(
    options: argparse.Namespace, claims: report.Claims
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Until f has come down, against the number of rows."""
    p = 10 if options.quick else 50
    sizes = (512,) if options.quick else (1024, 4096, 16_384, 65_536)
    sizes = (*sizes, 262_144) if options.full else sizes
    passes: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for n in sizes:
        problem = _problem(options.seed, n, p, jnp.float32)
        value = _value_of(problem)
        best, start = _minimum(problem), value(problem.lam)
        wanted = best + _REACHED * (start - best)
        for c in _contestants(problem, n, 0.5):
            chunk = 4 if c.name == "full" else 100
            used, taken = _until(c, problem, value, wanted, chunk, 20 if options.quick else 200)
            passes.setdefault(c.name, []).append(used)
            seconds.setdefault(c.name, []).append(taken)
            print(f"  {n:>7} rows, {c.name:<10} {used:9.1f} passes {taken:8.3f} s", flush=True)
    break_even = _crossing(sizes, seconds["full"], seconds["stochastic"])
    claims.check(
        "with enough rows stochastic hypergradients take less time than full ones",
        seconds["stochastic"][-1] < seconds["full"][-1],
        f"from about {break_even:.0f} rows on",
        required=False,
    )
    return {"sizes": sizes, "passes": passes}, {**seconds, "break_even": break_even}


def _value_of(problem: _Problem) -> Callable[[jax.Array], float]:
    """f(λ), by Newton's method on all rows."""
    solver = fg.newton(PHI, max_steps=50, rtol=1e-5, linear_solver=fg.cg(max_steps=200))

    @jax.jit
    def value(lam: jax.Array, train: Any, validation: Any) -> jax.Array:
        w = solver(jnp.zeros_like(lam), lam, train, validation)
        return outer(w, lam, train, validation)

    return lambda lam: float(value(lam, problem.train, problem.validation))


def _minimum(problem: _Problem) -> float:
    """The least f that 300 steps of Adam on full hypergradients find."""
    full = fg.hypergradient(
        outer,
        PHI,
        fg.newton(PHI, max_steps=50, rtol=1e-5, linear_solver=fg.cg(max_steps=200)),
        fg.aid(fg.cg(max_steps=200, rtol=1e-4)),
        start=fg.warm(),
    )
    decay = optax.adam(optax.cosine_decay_schedule(0.2, 300))
    loop = fg.bilevel(full, decay, project=_in_box)
    data = problem.train, problem.validation
    start = loop.init(jnp.zeros_like(problem.lam), problem.lam, *data)
    _, history = loop.run(start, *data, num_steps=300)
    return float(np.min(np.asarray(history.value)))


def _until(
    c: _Contestant,
    problem: _Problem,
    value: Callable[[jax.Array], float],
    wanted: float,
    chunk: int,
    chunks: int,
) -> tuple[float, float]:
    """Passes and seconds of steps until f(λ) is at most `wanted`; infinite where it never is."""
    start = c.loop.init(jnp.zeros_like(problem.lam), problem.lam, *c.data)
    run = functools.partial(c.loop.run, num_steps=chunk)
    jax.block_until_ready(run(start, *c.data))  # Compiled before it is timed.
    state, used, taken = start, 0.0, 0.0
    for _ in range(chunks):
        results: list[Any] = []
        before = state

        def step(before: Any = before, results: list[Any] = results) -> None:
            results.append(jax.block_until_ready(run(before, *c.data)))

        taken += seconds_of(step)
        state, _ = results[0]
        used += chunk * c.passes
        if value(state.lam) <= wanted:
            return used, taken
    return float("inf"), float("inf")


def _crossing(sizes: tuple[int, ...], one: list[float], other: list[float]) -> float:
    """The number of rows at which two times are equal, between the sizes on a log scale."""
    apart = np.log(one) - np.log(other)
    above = [i for i, x in enumerate(apart) if x > 0]
    if not above:
        return float("inf")
    i = above[0]
    if i == 0:
        return float(sizes[0])
    share = -apart[i - 1] / (apart[i] - apart[i - 1])
    return float(np.exp(np.interp(share, [0, 1], np.log([sizes[i - 1], sizes[i]]))))


def _draw(
    path: Any,
    orders: dict[str, Any],
    coverage: dict[str, Any],
    rows: dict[str, Any],
    seconds: dict[str, Any],
) -> None:
    with report.figure(path, columns=4, size=(15, 3.4)) as (_, axes):
        bias, variance, certificate, time = axes[0]
        steps = np.array(orders["steps"])
        bias.errorbar(
            steps, orders["bias"], 2 * np.array(orders["standard_error"]), fmt="o", label="measured"
        )
        bias.plot(steps, orders["exact_bias"], "-", color="#555555", label="k exact steps")
        bias.set(yscale="log", xlabel="k", ylabel="‖E g − ∇f‖", title="bias")
        bias.set_xticks(steps)
        bias.legend()
        sizes = np.array(orders["sizes"])
        for name, label in (("variance_of_batch", "batch size"), ("variance_of_j", "J")):
            variance.plot(sizes, orders[name], "o-", label=f"against {label}")
        guide = orders["variance_of_batch"][0] * sizes[0] / sizes
        variance.plot(sizes, guide, ":", color="#555555", label="slope −1")
        variance.set(
            xscale="log",
            yscale="log",
            xlabel="batch size, J",
            ylabel="E‖g − E g‖²",
            title="variance",
        )
        variance.set_xticks(sizes, [str(x) for x in sizes])
        variance.xaxis.set_minor_locator(NullLocator())
        variance.legend()
        certificate.boxplot(list(coverage.values()))
        certificate.set_xticks(
            range(1, len(coverage) + 1), [x.removeprefix("t = k = ") for x in coverage]
        )
        certificate.axhline(1, color="#555555", linestyle=":")
        certificate.set(
            yscale="log", xlabel="t = k", ylabel="estimated / true error", title="certificate"
        )
        for name, color in _COLORS.items():
            time.plot(rows["sizes"], seconds[name], "o-", color=color, label=name)
        time.set(
            xscale="log", yscale="log", xlabel="rows n", ylabel="seconds to 99 %", title="time"
        )
        time.legend()
