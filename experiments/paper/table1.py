"""All five methods minimise the three bilevel problems of the paper's Table 1, on real data.

Kernel ridge regression on Parkinson, logistic regression on 20 newsgroup and training-data
optimisation on Fashion MNIST (`parkinson.py`, `news20.py`, `fashion.py`), each by gradient descent on
λ with a step size from a grid. A row has the objective and the test accuracy at w_t, beside them the
paper's, and both at the exact w(λ). `--full` is the paper's size; every run is checkpointed and
resumed, so that `--only`, `--methods` and `--t` fill the table bit by bit.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from ..problems import fashion, news20, parkinson
from ..problems.task import Task
from ..tools import report
from ..tools.checkpointing import LongRun, long_run, run_directory
from .methods import Method, method
from .published import PAPER
from .together import run_together

FLOAT64 = False  # Parkinson switches it on for itself.

_LABELS = {
    "itd": ("itd", "ITD"),
    "fp_t": ("fp_t", "FP k = t"),
    "cg_t": ("cg_t", "CG k = t"),
    "fp_k": ("fp_10", "FP k = {k}"),
    "cg_k": ("cg_10", "CG k = {k}"),
}


_SMALL_RATE = 1e-6
"""On Fashion MNIST: up to it the methods coincide, since ‖X‖ remains small."""


class Plan(NamedTuple):
    """How one data set is run.

    Attributes:
        make: `make(seed=...) -> Task`, at the size of the run.
        make_grid: The same, at the size at which step sizes are compared.
        t: The lower-level steps of its columns.
        k: The linear steps of the methods with a fixed number.
        num_steps: Outer steps.
        chunk: Outer steps in one compiled scan.
        rates: The grid of outer step sizes.
        grid_steps: Outer steps after which these are compared.
        splits: How many random splits, from the seed on.
        float64: Whether in double precision.
    """

    make: Callable[..., Task]
    make_grid: Callable[..., Task]
    t: tuple[int, ...]
    k: int
    num_steps: int
    chunk: int
    rates: tuple[float, ...]
    grid_steps: int
    splits: int = 1
    float64: bool = False


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """The data sets with their sizes."""
    size = 0 if options.quick else 2 if options.full else 1

    def pick(*values: Any) -> Any:
        return values[size]

    images, documents = options.images or pick(500, 2000, 60000), pick(100, 500, None)
    documents_task = functools.partial(news20.task, split=options.split, num_documents=documents)
    clothes = functools.partial(fashion.task, inner_step=options.inner_step)
    kernel_steps = options.steps or pick(20, 300, 1000)
    every = {
        "parkinson": Plan(
            parkinson.task,
            parkinson.task,
            t=pick((100,), (100,), (100, 150)),
            k=10,
            num_steps=kernel_steps,
            chunk=pick(10, 100, 100),
            rates=pick((0.1,), (0.1,), (0.01, 0.03, 0.1, 0.3)),
            grid_steps=kernel_steps,
            splits=pick(1, 1, 3),
            float64=True,
        ),
        "fashion": Plan(
            functools.partial(clothes, num_images=images),
            functools.partial(clothes, num_images=min(images, 10000)),
            t=pick((5,), (5,), (5, 10)),
            k=5,
            num_steps=options.steps or pick(300, 300, 4000),
            chunk=100,
            # So small since ∇f(X₀) is 784 times that of a linear model in w: README.
            rates=pick((3e-7,), (3e-7,), (1e-7, 3e-7, 1e-6)),
            grid_steps=pick(300, 300, 500),
        ),
        "news20": Plan(
            documents_task,
            documents_task,
            t=pick((10,), (10,), (10, 25, 50)),
            k=10,
            num_steps=options.steps or pick(4, 20, 500),
            chunk=pick(2, 10, 10),
            rates=pick((1.0,), (10.0,), (100.0, 300.0, 1000.0)),
            grid_steps=pick(4, 20, 40),
        ),
    }
    rates = {"rates": tuple(options.rates)} if options.rates else {}
    return {name: plan._replace(**rates) for name, plan in every.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--only", nargs="+", choices=("parkinson", "fashion", "news20"))
    parser.add_argument("--methods", nargs="+", choices=tuple(_LABELS))
    parser.add_argument("--t", nargs="+", type=int, help="the columns with these t")
    parser.add_argument("--steps", type=int, help="outer steps instead of the paper's")
    parser.add_argument("--rates", nargs="+", type=float, help="outer step sizes of the grid")
    parser.add_argument("--images", type=int, help="Fashion MNIST: training images")
    parser.add_argument(
        "--inner-step",
        type=lambda text: text if text == "optimal" else float(text),
        default="optimal",
        help="Fashion MNIST: step size of the lower level, or 2/(L + μ) (%(default)s)",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="Fashion MNIST: all rows in one loop, at the first rate of the grid",
    )
    parser.add_argument(
        "--split", choices=("by-date", "thirds"), default="by-date", help="of 20 newsgroup"
    )


def main(options: argparse.Namespace) -> int:
    """Runs the columns that the options leave, and checks their claims."""
    rows: list[dict[str, Any]] = []
    used: dict[str, Any] = {}
    for name, plan in plans(options).items():
        if options.only and name not in options.only:
            continue
        with jax.enable_x64(plan.float64):
            columns = [t for t in options.t or plan.t if (name, t) in PAPER]
            together = {}
            if options.together and name == "fashion":
                together = _together(options, name, plan, columns)
            for t in columns:
                found = _column(options, name, plan, t, together)
                rows += found
                if found:
                    used[name] = found[0].pop("task")
                print(_table(found), flush=True)
    claims = report.Claims()
    _check(claims, rows, options)
    curves = {(r["data"], r["t"]): [] for r in rows}
    for row in rows:
        curves[row["data"], row["t"]].append(row)
    if curves:
        _draw(options.out / "table1.png", curves)
    volatile = [
        {key: row.pop(key) for key in ("seconds_per_step", "temp_bytes")}
        | {key: row[key] for key in ("data", "t", "method")}
        for row in rows
    ]
    for row in rows:
        del row["curve"]
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "tasks": used},
        results={"rows": rows},
        volatile={"costs": volatile},
    )
    return claims.exit_code


def _methods(options: argparse.Namespace, name: str, t: int) -> list[str]:
    return [m for m in options.methods or _LABELS if m in PAPER[name, t]]


def _together(
    options: argparse.Namespace, name: str, plan: Plan, columns: list[int]
) -> dict[tuple[int, str], LongRun]:
    """Every row of one data set, in one loop."""
    task = plan.make(seed=options.seed)
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=plan.rates[0])
    loops = {
        (t, m): fg.bilevel(method(task, m, t, plan.k).hypergrad, sgd)
        for t in columns
        for m in _methods(options, name, t)
    }
    return run_together(
        task,
        loops,
        k=plan.k,
        rate=plan.rates[0],
        num_steps=plan.num_steps,
        chunk=min(plan.chunk, plan.num_steps),
    )


def _column(
    options: argparse.Namespace,
    name: str,
    plan: Plan,
    t: int,
    together: Mapping[tuple[int, str], LongRun],
) -> list[dict[str, Any]]:
    """The rows of one data set and one t; those in `together` are there already."""
    methods = _methods(options, name, t)
    checkpoints = options.out / "checkpoints"
    seeds = range(options.seed, options.seed + plan.splits)
    tasks = [plan.make(seed=seed) for seed in seeds]
    grid_tasks = tasks if plan.make_grid is plan.make else [plan.make_grid(seed=options.seed)]

    @functools.cache
    def prepared(m: str) -> tuple[Method, fg.Bilevel]:
        # The rate is in the state: one compilation serves every rate and every split.
        made = method(tasks[0], m, t, plan.k)
        sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
        return made, fg.bilevel(made.hypergrad, sgd)

    def run(task: Task, m: str, rate: float, num_steps: int) -> LongRun:
        if (t, m) in together:
            return together[t, m]
        made, loop = prepared(m)
        state = loop.init(made.w0, task.lam, *task.data)
        rates = {"learning_rate": jnp.asarray(rate, jax.tree.leaves(task.lam)[0].dtype)}
        state = state._replace(optimizer=state.optimizer._replace(hyperparams=rates))
        title = f"{name}-{m}-t{t}-rate{rate:g}"
        settings = {**task.settings, "k": plan.k, "steps": num_steps, "chunk": plan.chunk}
        return long_run(
            loop,
            state,
            *task.data,
            num_steps=num_steps,
            chunk=plan.chunk,
            directory=run_directory(checkpoints, title, settings),
            name=title,
        )

    def best_rate(by: str) -> tuple[float, dict[str, float]]:
        values = {}
        if len(plan.rates) == 1 or (t, by) in together:
            return plan.rates[0], values
        for rate in plan.rates:
            runs = [run(task, by, rate, plan.grid_steps) for task in grid_tasks]
            values[str(rate)] = float(np.mean([r.history.value[-1] for r in runs]))
        finite = {rate: v for rate, v in values.items() if np.isfinite(v)}
        return float(min(finite, key=finite.__getitem__)), values

    rows = []
    for m in methods:
        rate, grid = best_rate(m)
        evaluate = _evaluator(tasks[0], prepared(m)[0])
        results = [_evaluate(evaluate, task, run(task, m, rate, plan.num_steps)) for task in tasks]
        temp = _temp_bytes(tasks[0], *prepared(m))
        rows.append(
            {
                "data": name,
                "t": t,
                "method": m,
                "label": _LABELS[m][1].format(k=plan.k),
                "rate": rate,
                "grid": grid,
                "steps": plan.num_steps,
                "temp_bytes": temp,
                "seconds_per_step": min(r.pop("seconds_per_step") for r in results),
                "curve": results[0].pop("curve"),
                "splits": [{k: v for k, v in r.items() if k != "curve"} for r in results],
                "task": tasks[0].settings,
            }
        )
    return rows[:1] + [{k: v for k, v in row.items() if k != "task"} for row in rows[1:]]


def _evaluator(task: Task, m: Method) -> Callable[..., dict[str, jax.Array]]:
    """Objective and accuracy at λ, at w_t and at the exact w(λ)."""

    @jax.jit
    def evaluate(state: fg.BilevelState, data: Any) -> dict[str, jax.Array]:
        lam = state.lam
        _, last = m.hypergrad.update(state.hypergrad, lam, *data)
        w = m.read(last.w)
        exact = task.exact(w, lam, *data)
        step = optax.tree.sub(task.descent(exact, *task.prepare(lam, *data)), exact)
        return {
            "objective": last.value,
            "accuracy": 100 * task.accuracy(w, lam, *data),
            "exact_objective": task.outer(exact, lam, *data),
            "exact_accuracy": 100 * task.accuracy(exact, lam, *data),
            "exact_residual": optax.tree.norm(step),
            "lower_residual": last.info.lower.residual,
        }

    return evaluate


def _evaluate(
    evaluate: Callable[..., dict[str, jax.Array]], task: Task, run: LongRun
) -> dict[str, Any]:
    """What one run came to."""
    return {
        **{key: float(x) for key, x in evaluate(run.state, task.data).items()},
        "initial": float(run.history.value[0]),
        "lowest": float(np.nanmin(run.history.value)),
        "steps_taken": len(run.history.value),
        "stopped": bool(run.state.stopped),
        "curve": run.history.value.tolist(),
        "seconds_per_step": run.seconds_per_step,
    }


def _temp_bytes(task: Task, m: Method, loop: fg.Bilevel) -> int:
    """Temporary memory of one outer step, by the compiler's own account."""
    state = loop.init(m.w0, task.lam, *task.data)
    step = jax.jit(lambda state, data: loop.run(state, *data, num_steps=1))
    analysis: Any = step.lower(state, task.data).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _mean(row: dict[str, Any], key: str) -> float:
    return float(np.mean([split[key] for split in row["splits"]]))


def _table(rows: list[dict[str, Any]]) -> str:
    """Ours (mean and standard deviation over splits, if several) beside the paper's."""

    def ours(row: dict[str, Any], objective: str, accuracy: str) -> str:
        text = f"{_mean(row, objective):.3f} ({_mean(row, accuracy):.1f})"
        if len(row["splits"]) > 1:
            spread = [np.std([s[key] for s in row["splits"]]) for key in (objective, accuracy)]
            text += f" ± {spread[0]:.2f} ({spread[1]:.1f})"
        return text

    header = ["method", "paper", "at w_t", "at w(λ)", "step size", "s / step", "temp MB"]
    cells = []
    for row in rows:
        value, accuracy = PAPER[row["data"], row["t"]][row["method"]]
        cells.append(
            [
                f"{row['data']} t={row['t']} {row['label']}",
                f"{value:.2f} ({accuracy:.1f})",
                ours(row, "objective", "accuracy"),
                ours(row, "exact_objective", "exact_accuracy"),
                f"{row['rate']:g}",
                f"{row['seconds_per_step']:.3g}",
                f"{row['temp_bytes'] / 1e6:.1f}",
            ]
        )
    return report.table(header, cells)


def _check(claims: report.Claims, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """At every size each method lowers the objective; at full size the paper's findings too."""
    for row in rows:
        first, last = _mean(row, "initial"), _mean(row, "objective")
        stopped = any(split["stopped"] for split in row["splits"])
        title = f"{row['data']} t={row['t']} {row['label']}"
        claims.check(
            f"{title} lowers the objective",
            last < first and not stopped,
            f"{first:.3f} → {last:.3f}",
        )
    if not options.full:
        return
    columns: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        columns.setdefault((row["data"], row["t"]), {})[row["method"]] = row
    for (name, t), column in columns.items():
        values = {m: _mean(row, "objective") for m, row in column.items()}
        measured = ", ".join(f"{_LABELS[m][1].format(k='r')} {v:.3f}" for m, v in values.items())
        if name == "parkinson" and "fp_k" in values and len(values) > 1:
            highest = values["fp_k"] == max(values.values())
            claims.check(f"parkinson t={t}: FP k = 10 ends highest", highest, measured)
        if name == "fashion" and len(values) > 1:
            accuracies = [_mean(row, "accuracy") for row in column.values()]
            claims.check(
                f"fashion t={t}: test accuracies at w_t within 2 points",
                max(accuracies) - min(accuracies) < 2,
                f"{min(accuracies):.1f} to {max(accuracies):.1f} %",
            )
        if name == "fashion":
            far = [
                max(abs(values[m] - PAPER[name, t][m][0]) / 0.02, abs(points))
                for m, row in column.items()
                for points in [_mean(row, "accuracy") - PAPER[name, t][m][1]]
            ]
            small = max(row["rate"] for row in column.values()) <= _SMALL_RATE
            claims.check(
                f"fashion t={t}: every row within 0.02 and 1 point of the paper's",
                max(far) <= 1,
                measured,
                # Other settings are there to show what they change.
                required=small and not (options.images or options.steps),
            )
            if {"itd", "cg_t"} <= set(column) and not small:
                # ITD minimises E(w_t, λ) whatever w_t is of w(λ), AID with CG aims at E(w(λ), λ).
                gaps = {
                    m: abs(_mean(column[m], "exact_objective") - values[m]) for m in ("itd", "cg_t")
                }
                claims.check(
                    f"fashion t={t}: E(w_t, λ) is nearer to E(w(λ), λ) by CG than by ITD",
                    gaps["cg_t"] < gaps["itd"],
                    f"CG {gaps['cg_t']:.3f}, ITD {gaps['itd']:.3f}",
                )
        if name == "news20" and "cg_t" in values and len(values) > 1:
            lowest = values["cg_t"] <= min(values.values()) * 1.001
            claims.check(f"news20 t={t}: CG k = t reaches the lowest objective", lowest, measured)


def _draw(path: Path, curves: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    with report.figure(path, columns=len(curves), size=(3.6 * len(curves) + 0.4, 3.2)) as (_, axes):
        for ax, ((name, t), rows) in zip(axes[0], curves.items(), strict=True):
            for row in rows:
                key, _ = _LABELS[row["method"]]
                report.draw_method(ax, key, np.arange(len(row["curve"])), row["curve"])
                ax.lines[-1].set_label(row["label"])
            ax.set(title=f"{name}, t = {t}", xlabel="outer steps")
            if name == "fashion":
                ax.set(yscale="log")
            ax.legend(fontsize=8)
        axes[0][0].set_ylabel("objective E(w_t, λ)")
