"""The tables of `experiments/README.md`, from `results/`: `python -m experiments.tools.tables`.

A table stands between `<!-- NAME -->` and `<!-- end -->`; nothing between them is written by hand.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmark.accuracy import summarised
from ..benchmark.contestants import OURS
from ..benchmark.scale import sizes_of
from ..paper.published import PAPER
from ..problems.cleaning import PUBLISHED
from .report import METHODS

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "results"

_MARKED = re.compile(r"(?<=<!-- )(?!end )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
_SETTINGS = ("lr", "krr", "br", "hr")


def rendered(text: str) -> str:
    """`text` with every marked table as the results have it."""
    return _MARKED.sub(lambda m: f"{m[1]}{m[2]}{TABLES[m[1]]()}\n", text)


def _read(name: str) -> tuple[Any, Any]:
    """What was measured and repeats, and what does not."""
    record = json.loads((RESULTS / name).with_suffix(".json").read_text(encoding="utf-8"))
    return record["results"], record["volatile"]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _digits(value: float | None) -> str:
    """Two digits; three between 1 and 1000, and a power of ten outside of 0.01 and 1000."""
    if value is None or not np.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _quickstart() -> str:
    results, volatile = _read("quickstart/results")
    rows = [["(start)", "", f"{results['objective_at_start']:.4f}", "", "", "", ""]]
    for name, method in METHODS.items():
        o = results["optimised"][name]
        rows.append(
            [
                method.label,
                f"{o['objective_at_w_t']:.4f}",
                f"{o['objective']:.4f}",
                f"{100 * o['test_accuracy']:.1f} %",
                _digits(o["relative_error_at_start"]),
                f"{o['products']}",
                f"{volatile['temporary_bytes'][name] / 1024:.0f} KiB",
            ]
        )
    return _markdown(
        (
            "method",
            "E(w_t, λ)",
            "f(λ)",
            "test accuracy",
            "error at λ₀, t = 100",
            "products",
            "temp. memory",
        ),
        rows,
    )


def _figure1_rates() -> str:
    results, _ = _read("figure1/results")
    theory = dict.fromkeys(_SETTINGS, "(√κ−1)/(√κ+1)") | {"lr": "(κ−1)/(κ+1)"}
    methods = ("itd", "fp_t", "cg_t")
    rows = []
    for name in _SETTINGS:
        r = results[name]
        rates = [np.median(r["fitted_rate"][m]) for m in methods]
        rows.append(
            [
                f"{name.upper()}, {theory[name]}",
                f"{np.median(r['kappa']):.0f}",
                *(f"{x:.4f}" for x in (np.median(r["rate_in_theory"]), *rates)),
            ]
        )
    labels = [METHODS[m].label for m in methods]
    return _markdown(("rate a step (median)", "κ", "theory", *labels), rows)


def _figure1_errors() -> str:
    results, _ = _read("figure1/results")
    methods = ("itd", "fp_t", "fp_10", "cg_t", "cg_10")
    rows = []
    for name in _SETTINGS:
        r = results[name]
        errors = (r["error"][m]["mean"][-1] for m in methods)
        size = float(np.mean(r["hypergradient_norm"]))
        rows.append([name.upper(), f"{r['t'][-1]}", _digits(size), *map(_digits, errors)])
    labels = [METHODS[m].label for m in methods]
    return _markdown(("mean error, last t", "t", "‖∇f‖", *labels), rows)


def _table1(name: str, *columns: str) -> str:
    """Objective (accuracy) of the paper, at w_t and at w(λ), for each t; ± over splits."""
    results, volatile = _read(f"table1/{name}")
    data = name.partition("_")[0]
    found = {(r["t"], r["method"]): r for r in results["rows"]}
    costs = {(c["t"], c["method"]): c for c in volatile["costs"]}
    ts = sorted({t for t, _ in found})
    header = [""]
    for t in ts:
        header += [f"t={t} paper", "at w_t", "at w(λ)"]
    rows = []
    for method in ("itd", "fp_t", "cg_t", "fp_k", "cg_k"):
        row = [next(r["label"] for (_, m), r in found.items() if m == method)]
        for t in ts:
            paper = PAPER[data, t].get(method)
            if (t, method) not in found:
                row += ["as k = t", "", ""]
                continue
            splits = found[t, method]["splits"]

            def cell(objective: str, accuracy: str, splits: Any = splits) -> str:
                values = [s[objective] for s in splits]
                spread = f" ± {np.std(values):.2f}" if len(values) > 1 else ""
                digits = 2 if len(values) > 1 else 3
                right = np.mean([s[accuracy] for s in splits])
                return f"{np.mean(values):.{digits}f}{spread} ({right:.1f})"

            steps = found[t, method]["steps"]
            fewer = f", s = {steps}" if steps < max(r["steps"] for r in found.values()) else ""
            row += [
                "" if paper is None else f"{paper[0]:.2f} ({paper[1]:.1f})",
                cell("objective", "accuracy") + fewer,
                cell("exact_objective", "exact_accuracy"),
            ]
        if columns:
            cost = costs[ts[-1], method]
            row += [
                f"{found[ts[-1], method]['rate']:g}",
                f"{cost['seconds_per_step']:.2f}",
                f"{cost['temp_bytes'] / 1e6:.0f}",
            ]
        rows.append(row)
    return _markdown([*header, *columns], rows)


def _parkinson() -> str:
    return _table1("parkinson")


def _fashion() -> str:
    return _table1("fashion")


def _fashion_large_steps() -> str:
    return _table1("fashion_large_steps")


def _news20() -> str:
    return _table1("news20", "step", "s / step, t=50", "temp. MB")


def _sparse_products() -> str:
    _, volatile = _read("sparse_products/results")
    products = volatile["seconds"]
    names = {
        "pieces": "pieces (`problems/sparse.py`)",
        "segment sums": "sorted segment sums, CSR and CSC",
        "BCOO": "BCOO",
        "callback": "SciPy through `pure_callback`",
    }
    rows = [
        [text, *(f"{1e3 * seconds[name]:.1f} ms" for seconds in products.values())]
        for name, text in names.items()
    ]
    return _markdown(("", *products), rows)


def _memory() -> str:
    results, _ = _read("memory/results")
    ts = list(results["bytes"]["itd"])
    rows = [
        [METHODS[m].label, *(f"{by_t[t] / 1e6:.0f}" if t in by_t else "" for t in ts)]
        for m, by_t in results["bytes"].items()
    ]
    return _markdown(("MB in all", *(f"t={t}" for t in ts)), rows)


def _figure2() -> str:
    results, volatile = _read("figure2/results")

    def spread(values: Sequence[float], form: Callable[[float], str] = _digits) -> str:
        return f"{form(float(np.mean(values)))} [{form(min(values))}, {form(max(values))}]"

    rows = [
        [
            r["variant"] + ", projected" * r["projected"],
            spread(r["objective"]),
            spread(r["accuracy"], lambda x: f"{x:.1f}"),
            _digits(float(np.mean(r["norm_a"]))),
            f"{volatile['seconds_per_step'][r['variant']]:.3f}",
        ]
        for r in results["rows"]
    ]
    header = ("mean [range] over seeds", "objective", "test accuracy %", "‖A‖", "s / step")
    return _markdown(header, rows)


def _conv_eqm() -> str:
    results, volatile = _read("conv_eqm/results")
    rows = [
        [
            name.upper(),
            f"{r['objective']:.4f}",
            f"{r['accuracy']:.1f}",
            f"{volatile['seconds_per_step'][name]:.1f}",
        ]
        for name, r in results["rows"].items()
    ]
    return _markdown(("", "objective", "test accuracy %", "s / step"), rows)


def _batch() -> str:
    results, volatile = _read("benchmark/batch/results")
    chunks = (1, 2, 4, 8, 16, 32)
    rows = []
    for size, of in results.items():
        for order, text in (("mixed", "any order"), ("by difficulty", "sorted by difficulty")):
            names = [f"{order}, {c}" for c in chunks]
            steps = (f"{of['steps'][n]:.2f}" for n in names)
            rows.append([f"{size}, steps run, of those needed; {text}", *steps])
            for library in ("fixedgrad", "jaxopt", "optimistix"):
                times = (volatile[size]["seconds"][f"{library}, {n}"] for n in names)
                rows.append([f"time (ms), {library}, {text}", *(f"{1e3 * s:.0f}" for s in times)])
    return _markdown(("lanes in a chunk", *map(str, chunks)), rows)


def _certificates() -> str:
    results, _ = _read("certificates/results")
    rows = []
    for r in results["families"]:
        low, high = r["interval"]
        rows.append(
            [
                r["family"],
                r["dtype"],
                f"{r['cases']}",
                f"{r['relative_error'][0]:.0e} to {r['relative_error'][1]:.1g}",
                " ".join(f"{x:.2f}" for x in r["ratio"]),
                f"{100 * r['coverage']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                f"{100 * r['valid']:.0f}",
                f"{r['polished'][0]:.0e}",
                f"{r['cost'][0]:.2f}, {r['cost_linear'][0]:.1f}",
            ]
        )
    header = (
        "family",
        "dtype",
        "cases",
        "relative error",
        "error / true: 0, 5, 50, 95, 100 %",
        "coverage % [95 %]",
        "valid %",
        "polished",
        "cost",
    )
    return _markdown(header, rows)


def _adaptive() -> str:
    results, _ = _read("certificates/results")
    rows = [
        [
            family,
            f"{r['met']} of {r['requests']}",
            *(f"{x:.1f}" for x in r["relative_cost"]),
            f"{r['median_cost']:.2f}",
            f"{r['worst_cost']:.1f}",
        ]
        for family, r in results["adaptive"].items()
    ]
    requests = ("10⁻¹", "10⁻²", "10⁻³", "10⁻⁴", "10⁻⁵", "10⁻⁶")
    return _markdown(("family", "met", *requests, "median", "worst"), rows)


def _advice() -> str:
    results, volatile = _read("advice/results")
    rows = []
    for problem, chosen in results["chosen"].items():
        seconds, errors = volatile["seconds"][problem], volatile["errors"][problem]
        right = {n: s for n, s in seconds.items() if errors[n] is not None and errors[n] <= 0.01}
        best = min(right, key=lambda name: right[name])
        rows.append(
            [
                problem,
                _short(chosen),
                f"{1e6 * seconds[chosen]:.0f} µs",
                _digits(errors[chosen]),
                _short(best),
                f"{1e6 * seconds[best]:.0f} µs",
            ]
        )
    header = ("problem", "recommended", "its time", "its error", "fastest", "its time")
    return _markdown(header, rows)


def _advice_lower() -> str:
    _, volatile = _read("advice/results")
    rows = []
    for problem, of in volatile["lower"].items():
        times = {name: t for name, (error, t) in of["ways"].items() if error <= 0.01}
        best = min(times, key=lambda name: times[name])
        cells = (
            (f"`{n.replace('phi, ', '')}`", f"{1e6 * times[n]:.0f} µs")
            for n in (of["chosen"], best)
        )
        rows.append([problem, *(x for pair in cells for x in pair)])
    return _markdown(("problem", "recommended", "its time", "fastest", "its time"), rows)


def _bilevel_benchmark() -> str:
    results, volatile = _read("bilevel_benchmark/results")

    def key(row: dict[str, Any]) -> tuple[float, float]:
        return np.inf if row["passes"] is None else row["passes"], row["least"]

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines = []
    for problem, found in results.items():
        for method in dict.fromkeys(row["method"] for row in found["rows"]):
            row = min((r for r in found["rows"] if r["method"] == method), key=key)
            seconds = volatile["seconds"][problem][f"{method}, {row['setting']}"]
            lines.append(
                [
                    problem if method == found["rows"][0]["method"] else "",
                    method,
                    row["setting"],
                    _digits(row["passes"]),
                    _digits(row["rows"]),
                    _digits(seconds),
                    _digits(row["goal"]) if row["goal"] < 1e-3 else f"{row['goal']:.4f}",
                    percent(row.get("validation_error")),
                    percent(row.get("test_error")),
                ]
            )
    header = ("problem", "method", "setting", "passes", "data", "seconds", "at the end")
    return _markdown((*header, "validation error", "test error"), lines)


def _distributed() -> str:
    results, _ = _read("distributed/results")
    rows = [
        [
            name,
            _digits(r["difference"]),
            "yes" if r["same_bits"] else "no",
            f"{r['lower_steps']}, {r['linear_steps']}",
        ]
        for name, r in results["runs"].items()
    ]
    header = ("processes × devices, sums by", "largest difference of λ from one device")
    return _markdown((*header, "bits of 1 process, gloo", "steps: lower level, linear"), rows)


def _distributed_counts() -> str:
    results, _ = _read("distributed/results")
    c = results["counts"]
    steps, ran = c["outer_steps"], c["all_reduces"]
    products = {
        "steps of the lower level": c["lower_steps"],
        "steps of the linear solve": c["linear_steps"],
        "residuals of v": c["passes"] + steps,
        "∇E": steps,
    }
    rows = [[name, f"{n / steps:.1f}"] for name, n in products.items()]
    rows.append(["all-reduces that ran", f"{ran / steps:.1f}"])
    rows.append(["kB that each device gave", f"{c['bytes'] / steps / 1e3:.1f}"])
    return _markdown(("in an outer step", ""), rows)


def _distributed_hosts() -> str:
    results, _ = _read("distributed/results")
    rows = []
    for i, hosts in enumerate(results["hosts"]):
        cells = (
            (_digits(1 / s[i]), f"{100 * s[0] / s[i] / hosts:.0f} %")
            for s in results["model"].values()
        )
        rows.append([str(hosts), *(cell for pair in cells for cell in pair)])
    header = (
        f"{size}: {what}" for size in results["model"] for what in ("steps / s", "efficiency")
    )
    return _markdown(("hosts", *header), rows)


def _accuracy() -> str:
    _, volatile = _read("benchmark/accuracy/results")
    rows = []
    for name, of_instance in volatile["rows"].items():
        for s in summarised(name, of_instance):
            who = [
                f"{r['setting']} ({_digits(1e3 * r['seconds'])})" if r else "none"
                for r in (s.ours, s.peer and {**s.peer, "setting": _named(s.peer)})
            ]
            share = s.adaptive["error"] / s.goal if s.adaptive else None
            ratios = f"{s.ratio(s.ours):.2f}", f"{s.ratio(s.adaptive):.2f}"
            rows.append(
                [s.name, f"{s.goal:.0e}".replace("e-0", "e-"), *who, *ratios, _digits(share)]
            )
    header = ("", "goal", "ours (ms)", "fastest peer, tuned (ms)", "ours / peer", "adaptive / peer")
    return _markdown((*header, "adaptive: error / goal"), rows)


def _named(row: dict[str, Any]) -> str:
    return f"{row['library']} {row['setting']}"


def _outer() -> str:
    _, volatile = _read("benchmark/outer/results")
    rows = []
    for name, found in volatile["rows"].items():
        ours = min((r for r in found if r["library"] == OURS), key=lambda r: r["seconds"])
        asked = min((r for r in found if r["asked"]), key=lambda r: r["seconds"])
        peer = min((r for r in found if r["library"] != OURS), key=lambda r: r["seconds"])
        rows.append(
            [
                name,
                *(f"{r['setting']} ({_digits(1e3 * r['seconds'])})" for r in (ours, asked)),
                f"{_named(peer)} ({_digits(1e3 * peer['seconds'])})",
                *(f"{r['seconds'] / peer['seconds']:.2f}" for r in (ours, asked)),
            ]
        )
    header = ("", "ours (ms)", "adaptive (ms)", "fastest peer, tuned (ms)")
    return _markdown((*header, "ours / peer", "adaptive / peer"), rows)


def _kernel() -> str:
    _, volatile = _read("benchmark/kernel/results")
    rows = [
        [
            shape.strip("()"),
            f"{1e6 * of['bare']['seconds_per_step']:.1f} µs",
            *(f"{of[name]['overhead']:.3f}" for name in ("fp", "cg")),
        ]
        for shape, of in volatile["kernels"].items()
    ]
    return _markdown(
        ("n, d", "one product, by hand", "FP, a step over it", "CG, a step over it"), rows
    )


def _hypergradient() -> str:
    results, volatile = _read("benchmark/hypergradient/results")
    shapes = list(volatile["whole"])
    rows = []
    for name in volatile["whole"][shapes[0]]:
        cells = []
        for shape in shapes:
            times = {n: r["seconds"] for n, r in volatile["whole"][shape].items()}
            taken = results["whole"][shape][name]["temporary_bytes"] / 1024
            cells.append(f"{times[name] / times['by hand']:.2f}, {taken:.0f} KiB")
        rows.append([name, *cells])
    return _markdown(("time over that by hand, memory", *(s.strip("()") for s in shapes)), rows)


def _scale() -> str:
    results, volatile = _read("benchmark/scale/results")
    rows = []
    for what, seconds in volatile["seconds"].items():
        sizes = sizes_of(what, results["shapes"][what])
        for size, s, taken in zip(sizes, seconds, results["bytes"][what], strict=True):
            rows.append([f"{what} = {size:,}", _digits(1e3 * s), _digits(taken / 1e3)])
    return _markdown(("", "ms", "temporary kB"), rows)


def _itd() -> str:
    results, volatile = _read("benchmark/itd/results")
    times = volatile["over_forward"]
    names = list(next(iter(times.values())))
    rows = [
        [case, *(f"{times[case][n]:.2f}, {results['bytes'][case][n] / 1e3:.0f} kB" for n in names)]
        for case in times
    ]
    return _markdown(("time over t steps, memory", *names), rows)


def _compile() -> str:
    _, volatile = _read("benchmark/compile/results")
    rows = [
        [name, *(f"{x:.2f}" for x in (r["trace"], r["compile"], r["trace"] + r["compile"]))]
        for name, r in volatile["seconds"].items()
    ]
    return _markdown(("seconds", "trace", "XLA", "both"), rows)


def _stochastic() -> str:
    results, volatile = _read("stochastic/results")
    rows, seconds = results["rows"], volatile["seconds"]
    names = list(rows["passes"])

    def cells(i: int) -> list[str]:
        return [
            f"{_digits(rows['passes'][name][i])}, {_digits(seconds[name][i])} s" for name in names
        ]

    header = ["rows", *(f"{name}: passes, seconds" for name in names)]
    return _markdown(header, [[f"{n}", *cells(i)] for i, n in enumerate(rows["sizes"])])


def _hyper_cleaning() -> str:
    results, volatile = _read("hyper_cleaning/results")

    def spread(values: Any) -> str:
        deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{deviation}"

    rows = []
    for name, of in results["mls_bench"]["linear"].items():
        seconds = np.mean(volatile["seconds"]["linear"][name])
        steps = of["last"][0][2]
        cells = [
            spread([r[i] for r in of[rule]]) for rule in ("validation", "test") for i in (0, 1)
        ]
        times = _digits(1e3 * seconds / steps), _digits(seconds)
        rows.append([name.strip(), f"{steps}", f"{len(of['last'])}", *cells, *times])
    for name, row in PUBLISHED.items():
        cells = f"{row.accuracy:.2f}", f"{row.f1:.2f}", "", f"{row.seconds:.0f} (GPU)"
        rows.append([f"{name}, published", "", "5", "", "", *cells])
    header = "method", "outer steps", "seeds", "accuracy (%)", "F1 (%)"
    chosen = "by best test: accuracy", "F1", "ms a step", "seconds"
    return _markdown((*header, *chosen), rows)


def _short(name: str) -> str:
    """The linear solver in the name of an estimator."""
    return f"`{name.removeprefix('aid(').partition('(')[0]}`"


def _elastic_net() -> str:
    results, _ = _read("elastic_net/results")
    header = ("", *(f"λ = {lam}" for lam in results))
    columns = []
    for r in results.values():
        linear, solvers, c = r["linear_steps"], r["solvers"]["at_solution"], r["certificate"]
        columns.append(
            [
                f"{r['active']} of 100, {r['condition']:.3g}",
                f"{r['identified']}",
                f"{np.log(r['rate']):.4f}",
                f"{np.log(r['contraction']):.4f}",
                *(f"{np.log(r['rates'][name]):.4f}" for name in ("itd", "fp_t")),
                _digits(r["finite_differences"]["difference"]),
                *(f"{linear[n]['1e-06']}" for n in ("fp_t", "cg_active", "cg_t")),
                *(_solver(solvers[n]) for n in ("fp", "normal_cg", "gmres", "bicgstab", "cg")),
                f"{c['valid_from']}",
                f"{c['covered']} of {c['counted']}",
                " / ".join(f"{x:.3g}" for x in c["ratio"]),
            ]
        )
    names = (
        "active set, condition number of H there",
        "support found at t",
        "log ρ(J)",
        "log q of Φ",
        "log rate of ITD",
        "log rate of FP k = t",
        "hypergradient beside central differences",
        "at w(λ), steps to 10⁻⁶: FP",
        "CG on the active set",
        "CG on I − Jᵀ as it is",
        "at w(λ), to 10⁻¹⁰: `fp`",
        "`normal_cg`",
        "`gmres`",
        "`bicgstab`",
        "`cg`, on I − Jᵀ as it is",
        "certificate: valid from t",
        "of these above the error, or at it",
        "estimate over error: least / median / largest",
    )
    return _markdown(header, [list(row) for row in zip(names, *columns, strict=True)])


def _solver(of: dict[str, Any]) -> str:
    """The steps of a linear solve, and its status where that is a failure."""
    steps = f"{of['steps']} steps, error {_digits(of['error'])}"
    return (
        steps if of["status"] == "CONVERGED" else f"`{of['status']}`, error {_digits(of['error'])}"
    )


def _logistic_notebook() -> str:
    results, volatile = _read("logistic_notebook/results")
    steps = results["steps"]
    rows = [
        [
            name,
            *(f"{r[key]:.4f}" for key in ("first", "lowest", "last", "exact")),
            r["steps_to_level"],
            f"{r['lower_steps']:.1f}, {r['linear_steps']:.1f}",
            f"{1e3 * volatile['seconds'][name] / steps:.2f}",
        ]
        for name, r in results["loops"].items()
    ]
    header = (
        "loop",
        "first E(w, λ)",
        "lowest",
        "last",
        "f at the last λ",
        f"steps to {results['level']:g}",
        "steps: lower, linear",
        "ms a step",
    )
    return _markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__[1:]: f
    for f in (
        _quickstart,
        _figure1_rates,
        _figure1_errors,
        _parkinson,
        _fashion,
        _fashion_large_steps,
        _news20,
        _sparse_products,
        _memory,
        _figure2,
        _conv_eqm,
        _certificates,
        _adaptive,
        _advice,
        _advice_lower,
        _bilevel_benchmark,
        _distributed,
        _distributed_counts,
        _distributed_hosts,
        _elastic_net,
        _stochastic,
        _logistic_notebook,
        _kernel,
        _hypergradient,
        _accuracy,
        _outer,
        _itd,
        _batch,
        _scale,
        _compile,
        _hyper_cleaning,
    )
}
"""One function for each table: no arguments, Markdown."""


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
