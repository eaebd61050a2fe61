"""Processes that share the data find the same λ, bit for bit, by one all-reduce of d numbers a product.

Penalties exp(λⱼ) of logistic regression, one for each of d features, by `fg.hypergradient` with warm
starts and `fg.bilevel`. The rows of the data lie on the devices; w, v and λ are everywhere. The same
steps are taken on one device, and on 8 (`--quick`: 4) simulated ones of 1, 2 and 4 processes. Each
process is this command, with

    --coordinator HOST:PORT --num-processes N --process-id I

of machines of which HOST is the one with process 0; `--pod` where JAX finds the others by itself, as on
TPU; `--num-processes 1` for one process with all of its devices. It prints one line of JSON.

Collectives and their bytes are read off the compiled program, and a profile says how often each ran.
These counts make a model of H hosts, with all-reduces in a ring: 2(H − 1) messages of bytes/H each.
One of two processes is killed, and both are started again, from the last checkpoint.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..tools import report
from . import distributed_worker as worker
from .distributed_runs import NOTICED, Plan, finished, killed_and_resumed

FLOAT64 = True

HOSTS = (1, 2, 4, 8, 16, 32, 64)
MODELLED = {"8 GB": (10**6, 10**3), "800 GB": (10**6, 10**5)}  # Rows and features, float64.


class Machine(NamedTuple):
    """What the model assumes: seconds a message, bytes/s between hosts, bytes/s that a host reads."""

    latency: float
    bandwidth: float
    memory: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of one process, and of the model."""
    one = parser.add_argument_group("one process of a run")
    one.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    one.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    one.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    one.add_argument("--pod", action="store_true", help="JAX finds the processes by itself")
    one.add_argument("--checkpoints", type=Path, help="a folder that all processes see")
    one.add_argument(
        "--heartbeat", type=int, default=100, help="seconds until a process is gone (%(default)s)"
    )
    one.add_argument("--halt-after", type=int, metavar="STEPS", help="to be killed there, in tests")
    one.add_argument(
        "--check", action="store_true", help="count collectives, and take jax.grad at the start"
    )
    model = parser.add_argument_group("assumptions of the model")
    model.add_argument("--latency", type=float, default=10e-6, help="s a message (%(default)s)")
    model.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s (%(default).3g)")
    model.add_argument(
        "--memory", type=float, default=1e12, help="bytes/s that a host reads (%(default).3g)"
    )


def main(options: argparse.Namespace) -> int:
    """Is one process of a run where the options say so; else runs all, and checks the claims."""
    if options.coordinator is not None and None in (options.num_processes, options.process_id):
        print("`--coordinator` needs `--num-processes` and `--process-id`.", file=sys.stderr)
        return 2
    if options.coordinator is None and options.num_processes not in (None, 1):
        print("`--num-processes` above 1 needs `--coordinator`.", file=sys.stderr)
        return 2
    if options.pod or options.num_processes is not None:
        return worker.main(options)

    size = worker.size_of(options)
    total = 4 if options.quick else 8
    alone, own = Plan(1, 1, ""), [] if options.quick else [Plan(1, total, "XLA")]
    joined = [Plan(n, total // n, "gloo") for n in ((1, 2) if options.quick else (1, 2, 4))]
    two = joined[1]
    seconds: dict[str, float] = {}
    runs: dict[Plan, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for plan in (alone, *own, *joined):
            start = time.perf_counter()
            extra = ["--check"] if plan in (alone, two) else []
            runs[plan] = finished(options, plan, Path(folder) / str(plan), extra)
            seconds[str(plan)] = time.perf_counter() - start
            print(f"  {plan}: {seconds[str(plan)]:.0f} s", flush=True)
        start = time.perf_counter()
        killed, resumed = killed_and_resumed(options, two, Path(folder) / "killed", size)
        seconds["killed and resumed"] = time.perf_counter() - start
    one, first = runs[alone][0], runs[joined[0]][0]
    rows = {str(plan): _compared(run, one, first) for plan, run in runs.items()}
    rows[f"{two}, killed and resumed"] = _compared(resumed, one, first)
    counts = _counts(runs[two][0], size.chunk)
    machine = Machine(options.latency, options.bandwidth, options.memory)
    model = _modelled(counts["all_reduces"] / counts["outer_steps"], machine)

    print(f"\n{_table(rows)}\n\n{_table_of_model(model)}\n")
    claims = report.Claims()
    _check_results(claims, size, runs, alone, joined)
    _check_collectives(claims, size, counts)
    _check_killed(claims, killed, resumed, runs[two][0])
    _draw(options.out / "distributed.png", model, machine)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, **size._asdict(), **machine._asdict()},
        results={"runs": rows, "counts": counts, "hosts": HOSTS, "model": model},
        volatile={
            "seconds": seconds,
            "seconds_per_step": {str(p): run[0]["seconds_per_step"] for p, run in runs.items()},
            "killed": killed,
        },
    )
    return claims.exit_code


# --- counts and the model


def _counts(run: dict[str, Any], steps: int) -> dict[str, Any]:
    """The collectives of the first `steps` outer steps, whose run was profiled: totals over them."""
    found = run["collectives"]
    loops = [tuple(c["loops"]) for c in found]  # The outermost is that of outer steps.
    # A loop with another one that sends is that of the linear solve's passes, each by a true residual.
    around = {path[:2] for path in loops if len(path) > 2}
    return {
        "outer_steps": steps,
        "kinds": sorted({c["kind"] for c in found}),
        "numbers": [c["numbers"] for c in found],
        "in_each_loop": [loops.count(path) for path in sorted(set(loops)) if len(path) > 1],
        "lower_steps": sum(run["lower_steps"][:steps]),
        "linear_steps": sum(run["linear_steps"][:steps]),
        "passes": sum(c["executed"] for c, at in zip(found, loops, strict=True) if at in around),
        "all_reduces": sum(c["executed"] for c in found),
        "bytes": sum(c["executed"] * c["bytes"] for c in found),
    }


def _modelled(products: float, machine: Machine) -> dict[str, list[float]]:
    """Seconds of an outer step on `HOSTS`: each product reads the rows twice, and has an all-reduce."""
    hosts = np.array(HOSTS)
    seconds = {}
    for name, (rows, features) in MODELLED.items():
        read = 2 * 8 * rows * features / (hosts * machine.memory)
        message = machine.latency + 8 * features / (hosts * machine.bandwidth)
        seconds[name] = (products * (read + 2 * (hosts - 1) * message)).tolist()
    return seconds


def _compared(
    run: list[dict[str, Any]], alone: dict[str, Any], joined: dict[str, Any]
) -> dict[str, Any]:
    """A run beside that on one device, and beside that of one process whose devices use gloo."""
    return {
        "processes": run[0]["processes"],
        "devices": run[0]["devices"],
        "resumed_at": run[0]["resumed_at"],
        "difference": _difference(run[0], alone),
        "same_bits": all(_bits(found) == _bits(joined) for found in run),
        "objective": run[0]["values"][-1],
        "lower_steps": sum(run[0]["lower_steps"]),
        "linear_steps": sum(run[0]["linear_steps"]),
    }


def _difference(run: dict[str, Any], other: dict[str, Any], what: str = "lam") -> float:
    return float(np.max(np.abs(np.subtract(run[what], other[what]))))


def _bits(run: dict[str, Any]) -> bytes:
    """λ, and the objective at every step."""
    return np.array([*run["lam"], *run["values"]]).tobytes()


# --- what is claimed and shown


def _check_results(
    claims: report.Claims,
    size: worker.Size,
    runs: dict[Plan, list[dict[str, Any]]],
    alone: Plan,
    joined: Sequence[Plan],
) -> None:
    one, first = runs[alone][0], runs[joined[0]][0]
    every = [found for run in runs.values() for found in run]
    agree = all(_bits(found) == _bits(run[0]) for run in runs.values() for found in run)
    claims.check("The processes of a run agree, bit for bit", agree, f"{len(every)} processes")
    numbers = [str(plan.processes) for plan in joined]
    claims.check(
        f"{', '.join(numbers[:-1])} and {numbers[-1]} processes give the same λ, bit for bit",
        all(_bits(runs[plan][0]) == _bits(first) for plan in joined),
        f"after {size.num_steps} steps, λ₀ = {first['lam'][0]:.15f}",
    )
    # What a residual within the tolerance leaves of w, of v, and so of each step.
    left = worker.RTOL / (worker.STEP_SIZE * np.exp(min(one["lam"])))
    rate = worker.RATE / (1 - worker.MOMENTUM)
    allowed = size.num_steps * rate * max(one["gradient_norms"]) * left
    largest = max(_difference(found, one) for found in every)
    claims.check(
        "All of them give that of one device, but for what the tolerances leave",
        largest <= allowed,
        f"largest difference {largest:.1e}, allowed {allowed:.1e}",
    )
    rounding = allowed / worker.RTOL * np.finfo(float).eps
    claims.check(
        "... and where solves take as many steps, but for rounding",
        largest <= rounding,
        f"with eps for the tolerance {rounding:.1e}",
        required=False,  # Rounding may decide whether a residual is within the tolerance.
    )
    two = runs[joined[1]][0]
    error = _difference(two, one, "gradient") / np.linalg.norm(one["gradient"])
    claims.check(
        "2 processes give the hypergradient of all the data, by `jax.grad` of a decorated solver",
        error <= left,
        f"relative difference {error:.1e}, allowed {left:.1e}",
    )
    values = one["values"]
    claims.check(
        "The objective falls", values[-1] < values[0], f"{values[0]:.4f} → {values[-1]:.4f}"
    )


def _check_collectives(claims: report.Claims, size: worker.Size, counts: dict[str, Any]) -> None:
    numbers = counts["numbers"]
    claims.check(
        "Nothing is sent but sums of d numbers, and scalars",
        counts["kinds"] == ["all-reduce"]
        # One message may have several: that of ∇₁E has E and Φ(w) as well.
        and all(size.features in ns and set(ns) <= {1, size.features} for ns in numbers),
        f"d = {size.features}: {', '.join('+'.join(map(str, ns)) for ns in numbers)}",
    )
    claims.check(
        "Each loop inside an outer step has one all-reduce",
        set(counts["in_each_loop"]) == {1},
        f"{len(counts['in_each_loop'])} loops",
    )
    steps, ran = counts["outer_steps"], counts["all_reduces"]
    by_history = counts["lower_steps"] + counts["linear_steps"] + counts["passes"] + 2 * steps
    claims.check(
        "As many ran as there are products: steps of both solves, residuals of v, ∇E",
        ran == by_history,
        f"{ran:g} in {steps} outer steps, {counts['bytes'] / steps / 1e3:.3g} kB a step",
    )


def _check_killed(
    claims: report.Claims,
    killed: dict[str, Any],
    resumed: list[dict[str, Any]],
    two: dict[str, Any],
) -> None:
    code = killed["exit_code"]
    claims.check(
        f"Process 1 killed, process 0 ends within {NOTICED:.0f} s with an error that names it",
        code not in (None, 0) and killed["named"] == 1,
        f"exit code {code} after {killed['seconds']:.0f} s",
    )
    step = killed["step"]
    claims.check(
        "Started again, both go on from the checkpoint, to the same bits",
        killed["saved"] == [step]
        and all(run["resumed_at"] == step and _bits(run) == _bits(two) for run in resumed),
        f"from step {step}",
    )


def _table(rows: dict[str, dict[str, Any]]) -> str:
    header = [
        "processes × devices, sums by",
        "|Δλ| from one device",
        "bits of 1 process, gloo",
        "objective",
    ]
    cells = [
        [
            name,
            f"{r['difference']:.1e}",
            "yes" if r["same_bits"] else "no",
            f"{r['objective']:.6f}",
        ]
        for name, r in rows.items()
    ]
    return report.table(header, cells)


def _table_of_model(model: dict[str, list[float]]) -> str:
    header = [
        "hosts, modelled",
        *(f"{name}: {what}" for name in model for what in ("step", "speed-up")),
    ]
    rows = []
    for i, hosts in enumerate(HOSTS):
        cells = ((f"{1e3 * s[i]:.3g} ms", f"{s[0] / s[i]:.1f}") for s in model.values())
        rows.append([str(hosts), *(cell for pair in cells for cell in pair)])
    return report.table(header, rows)


def _draw(path: Path, model: dict[str, list[float]], machine: Machine) -> None:
    with report.figure(path, size=(5.2, 3.8)) as (_, axes):
        panel = axes[0][0]
        panel.plot(HOSTS, HOSTS, ":", color="0.4", label="ideal")
        for (name, seconds), color in zip(model.items(), ("#0072b2", "#d55e00"), strict=True):
            rows, features = (f"{n:.0e}".replace("e+0", "e") for n in MODELLED[name])
            speed_up = seconds[0] / np.array(seconds)
            label = f"{name}: n = {rows}, d = {features}"
            panel.plot(HOSTS, speed_up, "o-", color=color, label=label)
        panel.set(xscale="log", yscale="log", xlabel="hosts", ylabel="speed-up, modelled")
        panel.set_xticks(HOSTS, map(str, HOSTS))
        panel.set_yticks(HOSTS, map(str, HOSTS))
        panel.minorticks_off()
        panel.set_title(
            f"{1e6 * machine.latency:g} µs a message, {1e-9 * machine.bandwidth:g} GB/s between hosts, "
            f"{1e-9 * machine.memory:g} GB/s from memory",
            fontsize=9,
        )
        panel.legend()
