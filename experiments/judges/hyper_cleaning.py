"""A step of warm AID cleans data in a fraction of the time of a step of RHG; beside published figures.

(1) MLS-Bench's hyper-cleaning: 5000 MNIST images, half of their labels drawn anew, a weight σ(λ_i) for
each. Test accuracy and F1 of the detection (λ_i ≥ 0), of RHG and V-PBGD with their published settings
and of this library, with an ablation. A record is chosen by the validation loss; MLS-Bench's own rule,
the best test accuracy, stands beside it. (2) Ehrhardt and Roberts: 20000 images, 10 % noise; gradients
and products until the validation loss is theirs. All in float32.

`--full` has all seeds, RHG's 100 and V-PBGD's 40,000 steps, and a perceptron 784-300-10: hours on CPUs.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

import fixedgrad as fg

from ..problems import cleaning
from ..problems.cleaning import PUBLISHED, Cleaning
from ..tools import report
from . import cleaning_methods, ehrhardt_roberts
from .cleaning_methods import Penalty, Run, Setting, descent, lbfgs
from .ehrhardt_roberts import GOAL, PRODUCTS, START, Judged

FLOAT64 = False

_OUTER_STEPS = 100  # MLS-Bench's.
_OURS, _LONG = "AID, warm, Adam", "AID, warm, longer"
_ACCURATE = "  k = 10"
_ALONE = "  γ = 0: validation alone"
_FITTED = "validation alone, to the end"
_RULES = ("validation", "test", "last")


class Size(NamedTuple):
    """How much of it is run."""

    data: str
    sizes: tuple[int, int, int]
    second: tuple[int, int, int]
    seeds: int
    peer_seeds: int
    outer_steps: int
    unrolled: int  # RHG's T.
    rhg_steps: int
    pbgd_steps: int
    long_steps: int  # At most so many of ours, up to RHG's time.
    second_steps: int
    needed: tuple[str, ...] = ()  # The settings to be run; all where there are none.


_SIZES = {
    "quick": Size(
        "digits",
        (200, 200, 400),
        (300, 200, 1),
        1,
        1,
        5,
        10,
        3,
        20,
        10,
        5,
        ("RHG", _OURS, _ACCURATE),
    ),
    "default": Size(
        "mnist", (5000, 5000, 10000), (20000, 5000, 1), 5, 1, 100, 500, 3, 300, 400, 250
    ),
    "full": Size(
        "mnist", (5000, 5000, 10000), (20000, 5000, 1), 5, 5, 100, 500, 100, 40_000, 2000, 200
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--seeds", type=int, help="how many, of the methods of this library")


def main(options: argparse.Namespace) -> int:
    """Runs both judges, and checks the claims."""
    name = "quick" if options.quick else "full" if options.full else "default"
    size = _SIZES[name]
    size = size._replace(seeds=options.seeds or size.seeds)
    seeds = range(options.seed, options.seed + max(size.seeds, size.peer_seeds))
    tasks = [cleaning.make(size.data, seed, size.sizes, 0.5) for seed in seeds]
    models = {"linear": []} | ({"perceptron": [300]} if options.full else {})
    runs = {m: _first_judge(options, size, tasks, hidden) for m, hidden in models.items()}
    second = cleaning.make(size.data, options.seed, size.second, 0.1)
    judged = ehrhardt_roberts.judge(second, size.second_steps, 10 if options.quick else 60)
    text = "\n\n".join(f"{m}\n{_table(found)}" for m, found in runs.items())
    text += f"\n\nEhrhardt and Roberts\n{_second_table(judged)}"
    print(f"\n{text}\n")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    _draw(options.out / "curves.png", runs["linear"])
    _draw_second(options.out / "products.png", judged)
    claims = report.Claims()
    _check(claims, runs["linear"], judged, name)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, **size._asdict(), "second": ehrhardt_roberts.settings()},
        results={
            "mls_bench": {
                m: {k: {rule: [r.at(rule) for r in rs] for rule in _RULES} for k, rs in of.items()}
                for m, of in runs.items()
            },
            "ehrhardt_roberts": judged._asdict(),
        },
        volatile={
            "seconds": {
                m: {k: [r.seconds for r in rs] for k, rs in of.items()} for m, of in runs.items()
            }
        },
    )
    return claims.exit_code


def _settings(size: Size, step_size: float) -> dict[str, tuple[Setting, int, int]]:
    """The settings with their numbers of outer steps and of seeds."""
    rhg = Setting(
        optax.sgd(1e-3), descent(size.unrolled), step_size, fg.itd(), fg.cold(), fresh=True
    )
    ours = Setting(optax.adam(0.1), lbfgs(5), 0.5, _aid(1), penalty=1e-3)
    n, one = size.outer_steps, size.peer_seeds
    changed = {
        "  lr 0.001": {"optimizer": optax.sgd(1e-3)},
        "  SGD 1000": {"optimizer": optax.sgd(1000.0, momentum=0.9)},
        "  cold": {"start": fg.cold()},
        "  descent, t = 20": {"solver": descent(20)},
        "  descent, t = 5": {"solver": descent(5)},
        _ACCURATE: {"estimator": _aid(10)},
        "  no penalty": {"penalty": 0.0},
    }
    found = {
        "RHG": (rhg, size.rhg_steps, one),
        "RHG, Adam": (rhg._replace(optimizer=optax.adam(0.1)), size.rhg_steps, one),
        _OURS: (ours, n, size.seeds),
        **{
            name: (ours._replace(**fields), n, size.seeds if name == _ACCURATE else one)
            for name, fields in changed.items()
        },
    }
    return {name: of for name, of in found.items() if not size.needed or name in size.needed}


def _aid(k: int) -> fg.Estimator:
    return fg.aid(fg.cg(num_steps=k))


def _first_judge(
    options: argparse.Namespace, size: Size, tasks: list[Cleaning], hidden: list[int]
) -> dict[str, list[Run]]:
    """All methods on MLS-Bench's problem."""
    widths = [tasks[0].x.shape[0], *hidden, cleaning.CLASSES]
    settings = _settings(size, 0.4 if hidden else 0.1)
    runs = {}
    for name, (setting, steps, seeds) in settings.items():
        runs[name] = cleaning_methods.run(setting, tasks[:seeds], widths, options.seed, steps)
        print(_line(name, runs[name]), flush=True)
    # As many steps as RHG's published number takes, by the time of those that were run.
    each = np.mean([r.seconds for r in runs["RHG"]]) / size.rhg_steps
    ours, steps, _ = settings[_OURS]
    of_ours = np.mean([r.seconds for r in runs[_OURS]]) / steps
    longer = int(min(size.long_steps, max(1, size.outer_steps * each / of_ours)))
    runs[_LONG] = cleaning_methods.run(
        ours._replace(optimizer=optax.sgd(1000.0, momentum=0.9), solver=descent(5)),
        tasks[: size.seeds],
        widths,
        options.seed,
        longer,
    )
    print(_line(_LONG, runs[_LONG]), flush=True)
    penalty = Penalty(w=0.01, gamma=0.1, ramp=10_000) if hidden else Penalty()
    steps = 2 * size.pbgd_steps if hidden else size.pbgd_steps
    for name, of in (("V-PBGD", penalty), (_ALONE, penalty._replace(gamma=0.0))):
        runs[name] = cleaning_methods.penalty_run(
            of, tasks[: size.peer_seeds], widths, options.seed, steps
        )
        print(_line(name, runs[name]), flush=True)
    runs[_FITTED] = cleaning_methods.validation_run(1e-3, tasks, widths, options.seed)
    print(_line(_FITTED, runs[_FITTED]), flush=True)
    return runs


_HEADER = (
    "method",
    "steps",
    "seeds",
    "accuracy",
    "F1",
    "best test: accuracy",
    "F1",
    "ms a step",
    "seconds",
)


def _line(name: str, runs: list[Run]) -> str:
    return "  ".join(_row(name, runs))


def _row(name: str, runs: list[Run]) -> list[str]:
    shown = [_spread([r.at(rule)[i] for r in runs]) for rule in _RULES[:2] for i in (0, 1)]
    seconds, steps = np.mean([r.seconds for r in runs]), int(runs[0].steps[-1])
    return [
        name,
        f"{steps}",
        f"{len(runs)}",
        *shown,
        f"{1e3 * seconds / steps:.1f}",
        f"{seconds:.1f}",
    ]


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _table(runs: dict[str, list[Run]]) -> str:
    published = [
        [
            f"{k}, published",
            "",
            "",
            "",
            "",
            f"{p.accuracy:.2f}",
            f"{p.f1:.2f}",
            "",
            f"{p.seconds:.0f}",
        ]
        for k, p in PUBLISHED.items()
    ]
    return report.table(_HEADER, [*(_row(k, rs) for k, rs in runs.items()), *published])


def _second_table(judged: Judged) -> str:
    share = judged.first * GOAL / START
    rows = [
        [f"E = {goal:.5f}, {what}", _count(judged.needed(goal)), theirs]
        for goal, what, theirs in (
            (GOAL, "theirs", f"{PRODUCTS:,}"),
            (share, "their reduction of E(λ₀)", f"{PRODUCTS:,}"),
        )
    ]
    ends = f"E(λ₀) {judged.first:.5f} (published {START}), at the last λ {judged.exact:.5f}"
    return f"{ends}\n{report.table(('products to', 'ours', 'published'), rows)}"


def _count(products: int | None) -> str:
    return "not reached" if products is None else f"{products:,}"


def _check(claims: report.Claims, runs: dict[str, list[Run]], judged: Judged, size: str) -> None:
    best = PUBLISHED["V-PBGD"]
    for name in (_OURS, _ACCURATE, _LONG):
        accuracy, f1 = (float(np.mean([r.at("validation")[i] for r in runs[name]])) for i in (0, 1))
        claims.check(
            f"{name.strip()}: accuracy ≥ 90.1 %",
            accuracy >= 90.1,
            f"{accuracy:.2f}",
            required=False,
        )
        claims.check(
            f"{name.strip()}: F1 ≥ 91.7 %",
            f1 >= 91.7,
            f"{f1:.2f}, V-PBGD {best.f1}",
            required=False,
        )
    fitted = [float(np.mean([r.at("last")[i] for r in runs[_FITTED]])) for i in (0, 1)]
    claims.check(
        "No cleaning at all, but w fitted to the validation images, is below V-PBGD's figures",
        fitted[0] < best.accuracy and fitted[1] < best.f1,
        f"accuracy {fitted[0]:.2f}, F1 {fitted[1]:.2f}",
        required=False,
    )
    ours, rhg = (runs[k][0].seconds / int(runs[k][0].steps[-1]) for k in (_OURS, "RHG"))
    # Times and sizes of a test show nothing.
    claims.check(
        "A step of ours takes less time than one of RHG",
        ours < rhg,
        f"{ours / rhg:.3f}",
        required=size != "quick",
    )
    alone = float(np.max(runs[_ALONE][0].accuracy))
    claims.check(
        "V-PBGD, whose w is trained on the validation images too, is better than these alone",
        float(np.max(runs["V-PBGD"][0].accuracy)) > alone,
        f"{np.max(runs['V-PBGD'][0].accuracy):.2f}, {alone:.2f}",
        required=False,
    )
    claims.check(
        "All records are finite",
        all(np.isfinite(r.value).all() for rs in runs.values() for r in rs),
        f"{sum(map(len, runs.values()))} runs",
    )
    for goal, what in ((GOAL, "their E"), (judged.first * GOAL / START, "their reduction of E")):
        spent = judged.needed(goal)
        claims.check(
            f"Ehrhardt and Roberts: {what} in a tenth of their products",
            spent is not None and spent <= PRODUCTS / 10,
            f"{_count(spent)} to {goal:.5f}",
            required=False,
        )


_SHOWN = {
    "RHG": "#d55e00",
    _OURS: "#0072b2",
    _LONG: "#56b4e9",
    _ACCURATE: "#b58900",
    "V-PBGD": "#007a55",
}


def _draw(path: Path, runs: dict[str, list[Run]]) -> None:
    """Accuracy and F1 of the first seed, against time and against outer steps."""
    with report.figure(path, rows=2, columns=2, size=(10, 7)) as (fig, axes):
        for name, color in _SHOWN.items():
            r = runs[name][0]
            times = r.seconds * r.steps / r.steps[-1]
            for row, y in enumerate((r.accuracy, r.f1)):
                for column, x in enumerate((times, r.steps)):
                    label = name.strip() if not row and not column else None
                    marker = "o" if len(x) < 10 else None
                    axes[row][column].plot(
                        x, y, color=color, label=label, marker=marker, markersize=4
                    )
        lines = (("RHG", ":", "RHG, published"), ("V-PBGD", "--", "V-PBGD, published"))
        for row, (title, of) in enumerate(
            (("test accuracy (%)", 0), ("F1 of the detection (%)", 1))
        ):
            for column, axis in enumerate(("time (s)", "outer steps")):
                panel = axes[row][column]
                for name, style, label in lines:
                    label = label if not row and not column else None
                    panel.axhline(
                        PUBLISHED[name][of], color="#555555", linestyle=style, label=label
                    )
                panel.set(xscale="log", xlabel=axis, ylabel=title)
                ends = [float(getattr(runs[k][0], ("accuracy", "f1")[of])[-1]) for k in _SHOWN]
                panel.set_ylim(bottom=min(ends) - 4)
        fig.legend(loc="outside lower center", ncols=4)


def _draw_second(path: Path, judged: Judged) -> None:
    """E against gradients and products."""
    with report.figure(path, size=(6, 4)) as (_, axes):
        panel = axes[0][0]
        panel.plot(judged.products, judged.value, color="#0072b2", label="AID, warm, Adam: E(w, λ)")
        panel.plot(
            judged.products[-1], judged.exact, "o", color="#0072b2", label="E(w(λ)), λ the last"
        )
        panel.plot(
            [PRODUCTS], [GOAL], "s", color="#d55e00", label="Ehrhardt and Roberts, published"
        )
        panel.axhline(GOAL, color="#d55e00", linestyle=":", linewidth=1)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="gradients ∇₁ℓ + products with Jᵀ",
            ylabel="E, validation loss",
        )
        panel.legend()
