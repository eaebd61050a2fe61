"""Hypergradient errors fall linearly in t; CG k = t errs least, then FP k = t, then ITD.

Figure 1 of the paper: ‖g(λ) − ∇f(λ)‖ against the number t of lower-level iterations, mean and standard
deviation over λ drawn uniformly, in the four synthetic settings of `problems/synthetic.py`.
What the paper leaves open (sizes, ranges of λ, noise, β) is ours. Thin lines are the bounds of
Theorem 2.1 (ITD) and Theorem 2.4 (FP k = t), drawn where their constants are known: for gradient
descent, since heavy ball is not a contraction in the Euclidean norm.
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from ..problems import synthetic
from ..problems.synthetic import Curvature, Setting, Sizes, problem, rate
from ..tools import report
from ..tools.convergence import Grid, errors, hypergradients, iterates

FLOAT64 = True

_FLOOR = 1e-12  # Errors below it, relative to ‖∇f(λ)‖, are rounding.
_TOLERANCE = 1.1  # Of the order between methods, a factor on mean errors.
_K_IS_T = ("itd", "fp_t", "cg_t")
_PAPER = ("lr", "krr", "br", "hr")


class Panel(NamedTuple):
    """What was measured in one setting.

    Attributes:
        setting: The setting.
        grid: The values of t.
        errors: For each method ‖g(λ) − ∇f(λ)‖, λ by t.
        sizes: ‖∇f(λ)‖ for each λ.
        kappa: The condition number of the lower level for each λ.
        rate: The linear rate of the solver for each λ, by theory.
        fitted: For each method with k = t, the rate that the errors show, for each λ.
        power: For each such method the p of error ≈ c tᵖ rᵗ with the rate r of theory.
        bounds: For ITD and FP k = t the bound, λ by t; empty where its constants are unknown.
    """

    setting: Setting
    grid: Grid
    errors: dict[str, np.ndarray]
    sizes: np.ndarray
    kappa: np.ndarray
    rate: np.ndarray
    fitted: dict[str, np.ndarray]
    power: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=(*_PAPER, "hr_narrow"),
        default=list(_PAPER),
        help="the panels: the paper's four by default; hr_narrow is HR with d < p",
    )
    parser.add_argument(
        "--num-lam", type=_positive, help="how many λ are drawn (20 with --full, 5 without)"
    )


def main(options: argparse.Namespace) -> int:
    """Runs the experiment; 0 where its claims held."""
    started = time.perf_counter()
    num_lam = options.num_lam or (20 if options.full else 2 if options.quick else 5)
    panels: dict[str, Panel] = {}
    with report.progress(len(options.settings) * len(report.METHODS)) as bar:
        for name in options.settings:
            setting, grid = make(name, options)
            panels[name] = measure(setting, grid, num_lam, options.seed, bar)
    print(f"\n{num_lam} λ in each setting.\n\n{_tables(panels)}\n")
    claims = report.Claims()
    for name, panel in panels.items():
        _check(claims, name, panel)
    if set(_PAPER) <= set(panels):
        _check_fixed_k(claims, panels)
    _draw(options.out / "figure1.png", panels)
    seconds = time.perf_counter() - started
    path = _write(options, num_lam, claims, panels, seconds)
    print(f"\n{options.out / 'figure1.png'} and {path}, {seconds:.0f} s in all")
    return claims.exit_code


def make(name: str, options: argparse.Namespace) -> tuple[Setting, Grid]:
    """A setting and its values of t, the paper's range unless `options.quick`."""
    key = jax.random.key(options.seed)
    points = 25 if options.full else 10

    def sizes(examples: int, features: int) -> Sizes:
        return Sizes(10, 12) if options.quick else Sizes(examples, features)

    def grid(last: int) -> Grid:
        return Grid(20, 3) if options.quick else Grid(last // points, points)

    match name:
        case "lr":
            return synthetic.logistic_regression(key, sizes(50, 100)), grid(1250)
        case "krr":
            return synthetic.kernel_ridge_regression(key, sizes(50, 50)), grid(200)
        case "br":
            return synthetic.biased_regularization(key, sizes(50, 100)), grid(150)
        case "hr":
            d = 15 if options.quick else 200
            return synthetic.hyper_representation(key, sizes(50, 100), d), grid(500)
        case "hr_narrow":
            d = 6 if options.quick else 40
            narrow = synthetic.hyper_representation(key, sizes(100, 50), d)
            title = f"{narrow.title}, d = {d}"
            return narrow._replace(title=title, short="HR, d < p"), grid(500)
    raise ValueError(f"There is no setting {name!r}.")


def measure(setting: Setting, grid: Grid, num_lam: int, seed: int, bar: Any) -> Panel:
    """The errors of all methods in one setting, each method compiled once for all λ and t."""
    lams = jax.vmap(setting.sample)(jax.random.split(jax.random.key(seed + 1), num_lam))
    exact = jax.jit(jax.vmap(setting.exact))(lams)
    curvature = jax.jit(jax.vmap(setting.curvature))(lams)

    @jax.jit
    @jax.vmap
    def states(lam: Any, c: Curvature) -> Any:
        return iterates(problem(setting, c), lam, grid)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0, 0))
    def curve(method: str, lam: Any, c: Curvature, w: Any, exact: Any) -> jax.Array:
        return errors(hypergradients(method, problem(setting, c), lam, w, grid), exact)

    w = states(lams, curvature)
    curves = {}
    for method in report.METHODS:
        bar.set_description(f"{setting.short}, {_label(method)}")
        curves[method] = np.asarray(curve(method, lams, curvature, w, exact))
        bar.update()
    sizes = np.asarray(jax.vmap(optax.tree.norm)(exact))
    theory = np.asarray(rate(setting, curvature))
    fits = {m: [*map(functools.partial(fit, grid), curves[m], sizes, theory)] for m in _K_IS_T}
    return Panel(
        setting,
        grid,
        curves,
        sizes,
        np.asarray(curvature.L / curvature.mu),
        theory,
        {m: np.array([fitted for fitted, _ in fits[m]]) for m in _K_IS_T},
        {m: np.array([power for _, power in fits[m]]) for m in _K_IS_T},
        bound_curves(setting, grid, lams),
    )


def fit(grid: Grid, error: np.ndarray, size: float, theory: float) -> tuple[float, float]:
    """The r of error ≈ c rᵗ; and the p of error ≈ c tᵖ rᵗ, where r is the rate of theory.

    Least squares over the later half of what is not rounding; NaN where that is one point.
    """
    rounding = np.flatnonzero(error < 10 * _FLOOR * size)
    end = rounding[0] if rounding.size else len(error)
    rows = slice(end // 2, end)
    t, logarithm = np.asarray(grid.t, float)[rows], np.log(error[rows])
    if len(t) < 2:
        return math.nan, math.nan
    fitted = np.polyfit(t, logarithm, 1)[0]
    power = np.polyfit(np.log(t), logarithm - t * math.log(theory), 1)[0]
    return math.exp(fitted), float(power)


def bound_curves(setting: Setting, grid: Grid, lams: Any) -> dict[str, np.ndarray]:
    """Theorems 2.1 and 2.4 at every λ and t, where the setting knows its constants."""
    known = setting.constants
    if known is None:
        return {}
    t = jnp.asarray(grid.t)

    @jax.jit
    @jax.vmap
    def bounds(lam: Any) -> dict[str, jax.Array]:
        c = known(lam)
        bounds = {"itd": fg.bounds.itd(t, c), "fp_t": fg.bounds.aid_fp(t, t, c)}
        return jax.tree.map(jnp.asarray, bounds)

    return {method: np.asarray(bound) for method, bound in bounds(lams).items()}


def _tables(panels: dict[str, Panel]) -> str:
    rates = [
        (
            panel.setting.short,
            f"{np.median(panel.kappa):.0f}",
            f"{np.median(panel.rate):.4f}",
            *(f"{np.median(panel.fitted[m]):.4f}" for m in _K_IS_T),
        )
        for panel in panels.values()
    ]
    last = [
        (
            panel.setting.short,
            f"{panel.grid.t[-1]}",
            f"{panel.sizes.mean():.1e}",
            f"{max(e.mean(axis=0).max() for e in panel.errors.values()):.1e}",
            *(f"{panel.errors[m][:, -1].mean():.1e}" for m in report.METHODS),
        )
        for panel in panels.values()
    ]
    labels = [_label(m) for m in report.METHODS]
    return (
        "Rate a step, medians over λ: (κ−1)/(κ+1) in LR, (√κ−1)/(√κ+1) elsewhere, and as fitted.\n\n"
        + report.table(("", "κ", "theory", *map(_label, _K_IS_T)), rates)
        + "\n\nMean errors at the last t, and the largest mean error at any t.\n\n"
        + report.table(("", "t", "‖∇f(λ)‖", "largest", *labels), last)
    )


def _check(claims: report.Claims, name: str, panel: Panel) -> None:
    """The claims about one panel."""
    short = panel.setting.short
    _check_rate(claims, panel)
    # With d > n most of HR's curvature is β alone, and the methods' order is lost to the error of
    # w_t, which all AID methods share and a small k damps.
    _check_order(claims, panel, required=name != "hr")
    if name == "br":
        apart = np.abs(panel.errors["itd"] - panel.errors["fp_t"]) / panel.sizes[:, None]
        claims.check(
            f"{short}: ITD and FP k = t coincide",
            bool(apart.max() < _FLOOR),
            f"errors apart by at most {apart.max():.1e} ‖∇f‖",
        )
    if name == "hr":
        rise = panel.errors["itd"].mean(axis=0).max() / panel.sizes.mean()
        claims.check(
            f"{short}: the error of ITD rises first",
            bool(rise > 10),
            f"to {rise:.1e} times that of g = 0, which is t = 0",
        )
    for method, bound in panel.bounds.items():
        ratio = panel.errors[method] / bound
        above_rounding = panel.errors[method] > _FLOOR * panel.sizes[:, None]
        claims.check(
            f"{short}: {_label(method)} obeys its bound",
            bool((ratio[above_rounding] <= 1).all()),
            f"error / bound {ratio.min():.1e} to {ratio.max():.1e}",
        )


def _check_rate(claims: report.Claims, panel: Panel) -> None:
    # Theorem 2.1 has t qᵗ. Heavy ball's matrix has a Jordan block for μ and one for L, so that its
    # powers grow like t rᵗ, and the derivative of t of them like t³ rᵗ.
    largest = 3 if panel.setting.heavy_ball else 1
    powers = {m: panel.power[m] for m in _K_IS_T}
    claims.check(
        f"{panel.setting.short}: the errors fall like tᵖ rᵗ or faster, r of theory, p ≤ {largest}",
        all(bool(np.median(p) <= largest + 0.5) for p in powers.values()),
        "median p: " + ", ".join(f"{_label(m)} {np.median(p):.1f}" for m, p in powers.items()),
    )


def _check_order(claims: report.Claims, panel: Panel, *, required: bool) -> None:
    floor = _FLOOR * panel.sizes.mean()
    for better, worse in (("cg_t", "fp_t"), ("fp_t", "itd")):
        low, high = (np.maximum(panel.errors[m].mean(axis=0), floor) for m in (better, worse))
        ratio = low / high
        later = ratio[len(ratio) // 2 :]
        claims.check(
            f"{panel.setting.short}: {_label(better)} errs no more than {_label(worse)}",
            bool(later.max() <= _TOLERANCE),
            f"ratio of mean errors {ratio.min():.2g} to {ratio.max():.3g}, in the later half of t "
            f"{later.min():.2g} to {later.max():.3g}",
            required=required or worse == "itd",
        )


def _check_fixed_k(claims: report.Claims, panels: dict[str, Panel]) -> None:
    last = {
        panel.setting.short: {m: panel.errors[m][:, -1].mean() for m in report.METHODS}
        for panel in panels.values()
    }
    wins = [short for short, e in last.items() if e["cg_10"] < e["fp_10"]]
    claims.check(
        "CG k = 10 beats FP k = 10 in most settings (the paper: 3 of 4)",
        2 * len(wins) > len(last),
        f"in {len(wins)} of {len(last)}: {', '.join(wins)}",
        required=False,
    )
    far = [short for short, e in last.items() if min(e["cg_10"], e["fp_10"]) > 10 * e["cg_t"]]
    claims.check(
        "both remain far from convergence",
        len(far) == len(last),
        f"at 10 times the error of CG k = t or more in {', '.join(far) or 'none'}",
        required=False,
    )


def _draw(path: Path, panels: dict[str, Panel]) -> None:
    size = (3.5 * len(panels) + 0.3, 3.6)
    with report.figure(path, columns=len(panels), size=size) as (fig, axes):
        for ax, panel in zip(axes.flat, panels.values(), strict=True):
            t = panel.grid.t
            means = {m: error.mean(axis=0) for m, error in panel.errors.items()}
            bottom = 0.2 * min(mean.min() for mean in means.values())
            for method, error in panel.errors.items():
                mean, sd = means[method], error.std(axis=0)
                # Where mean − sd is not positive, the band ends at the smallest error.
                low = np.where(mean > sd, mean - sd, error.min(axis=0))
                report.draw_method(ax, method, t, mean, (np.maximum(low, bottom), mean + sd))
            for method, bound in panel.bounds.items():
                color = report.METHODS[method].color
                ax.plot(t, bound.mean(axis=0), color=color, linewidth=0.6)
            if panel.bounds:
                low = min(bound.mean(axis=0)[-1] for bound in panel.bounds.values())
                ax.annotate("bounds", (t[-1], 0.3 * low), ha="right", va="top")
            ax.set_yscale("log")
            ax.set_ylim(bottom=bottom)
            ax.set_xlabel("t")
            ax.set_title(panel.setting.title)
        axes.flat[0].set_ylabel("‖g(λ) − ∇f(λ)‖")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(5, 2 * len(panels)))


def _write(
    options: argparse.Namespace,
    num_lam: int,
    claims: report.Claims,
    panels: dict[str, Panel],
    seconds: float,
) -> Path:
    def moments(curves: dict[str, np.ndarray]) -> dict[str, Any]:
        return {m: {"mean": e.mean(axis=0), "sd": e.std(axis=0)} for m, e in curves.items()}

    return report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "num_lam": num_lam, "settings": options.settings},
        results={
            name: {
                "t": panel.grid.t,
                "kappa": panel.kappa,
                "hypergradient_norm": panel.sizes,
                "rate_in_theory": panel.rate,
                "fitted_rate": panel.fitted,
                "fitted_power": panel.power,
                "error": moments(panel.errors),
                "bound": moments(panel.bounds),
            }
            for name, panel in panels.items()
        },
        volatile={"seconds": seconds},
    )


def _label(method: str) -> str:
    return report.METHODS[method].label


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed, got {text!r}")
    return int(text)
