"""ITD's memory grows in proportion to t and passes 11 GB on 20 newsgroup; AID's does not grow.

One outer step of Table 1's 20 newsgroup problem is compiled for each t, never run; the figures are the
compiler's own (`compiled.memory_analysis()`): arguments, results and temporary arrays together.
"""

import argparse
import math
from typing import Any

import jax
import numpy as np
import optax

import fixedgrad as fg

from ..problems import news20
from ..problems.task import Task
from ..tools import report
from .methods import method

FLOAT64 = False

LIMIT = 11e9  # Bytes, of the paper's GPU.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--t", nargs="+", type=int, help="the numbers of lower-level steps")


def main(options: argparse.Namespace) -> int:
    """Compiles the methods for every t, and checks the claims."""
    task = news20.task(seed=options.seed, num_documents=100 if options.quick else None)
    steps = options.t or ([4, 8, 16] if options.quick else [10, 50, 100, 400])
    itd = [_bytes(task, "itd", t) for t in steps]
    slope, offset = np.polyfit(steps, itd, 1)
    passes = math.ceil((LIMIT - offset) / slope)
    ends = [steps[0], steps[-1], passes]  # Enough to see that AID does not grow.
    found = {
        "itd": dict(zip(steps, itd, strict=True)) | {passes: _bytes(task, "itd", passes)},
        **{m: {t: _bytes(task, m, t) for t in ends} for m in ("fp_t", "cg_t")},
    }
    rows = [
        [f"t = {t}", *(f"{at[t] / 1e6:.1f}" if t in at else "" for at in found.values())]
        for t in [*steps, passes]
    ]
    print(report.table(["MB in all", *(report.METHODS[m].label for m in found)], rows))
    claims = report.Claims()
    fitted = np.polyval([slope, offset], steps)
    deviation = float(np.max(np.abs(fitted / itd - 1)))
    claims.check(
        "ITD's memory is affine in t, to 2 %",
        deviation < 0.02,
        f"{slope / 1e6:.2f} MB a step, deviation {100 * deviation:.2f} %",
    )
    for name in ("fp_t", "cg_t"):
        growth = found[name][passes] / found[name][steps[0]]
        claims.check(
            f"{report.METHODS[name].label}: no growth from t = {steps[0]} to {passes}",
            growth < 1.01,
            f"× {growth:.4f}",
        )
    claims.check(
        f"ITD needs 11 GB from t = {passes} on",
        abs(found["itd"][passes] / LIMIT - 1) < 0.02,
        f"{found['itd'][passes] / 1e9:.3f} GB there, CG {found['cg_t'][passes] / 1e9:.3f} GB",
    )
    _draw(options, found)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "t": steps, "task": task.settings},
        results={"bytes": found, "itd_bytes_per_step": slope, "passes": passes},
        volatile={},
    )
    return claims.exit_code


def _bytes(task: Task, name: str, t: int) -> int:
    """Arguments, results and temporaries of one outer step, in bytes."""
    m = method(task, name, t, t)
    loop = fg.bilevel(m.hypergrad, optax.sgd(1.0))
    shapes = jax.eval_shape(loop.init, m.w0, task.lam, *task.data)
    step = jax.jit(lambda state, data: loop.step(state, *data))
    analysis: Any = step.lower(shapes, task.data).compile().memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def _draw(options: argparse.Namespace, found: dict[str, dict[int, int]]) -> None:
    with report.figure(options.out / "memory.png", size=(5.2, 3.6)) as (_, axes):
        ax = axes[0][0]
        for name, at in found.items():
            report.draw_method(ax, name, list(at), np.array(list(at.values())) / 1e9)
        ax.axhline(LIMIT / 1e9, color="0.4", linewidth=1, linestyle=":")
        ax.annotate("11 GB", (min(found["itd"]), LIMIT / 1e9), va="bottom", color="0.3")
        ax.axvspan(50, 100, color="0.5", alpha=0.12, linewidth=0)
        ax.annotate("here the paper's\nITD passes 11 GB", (54, 4.0), fontsize=8, color="0.3")
        ax.set(xscale="log", yscale="log", xlabel="t", ylabel="memory of one outer step (GB)")
        ax.legend(loc="center left")
