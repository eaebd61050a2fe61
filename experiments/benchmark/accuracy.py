"""accuracy: the time to a hypergradient error of 1e-3 and of 1e-6, from a cold start.

Each setting of each library is tuned with knowledge of the truth: the loosest tolerance for w that
reaches the goal, then the loosest for v, for that one and for one ten times tighter. `adaptive` is
not: it is asked for the goal. The fastest settings of each library then take turns.
"""

import argparse
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..tools import report
from .contestants import DEFAULTS, OURS, Contestant, contestants, libraries
from .instances import Instance, accuracy_instances, exact_hypergradient, relative_error
from .timing import interleaved, seconds_of

PyTree = Any

_LOWER = [10.0 ** (-0.5 * i) for i in range(2, 25)]
_LINEAR = [10.0**-i for i in range(1, 10)]
_HOPELESS = 4.0  # Times the best so far: a setting that is slower than that is given up.


class Entry(NamedTuple):
    """One setting of a contestant with its tolerances, as it meets a goal."""

    contestant: Contestant
    tolerances: tuple[float, ...]
    error: float
    run: Callable[[], Any]


class Tried(NamedTuple):
    """A contestant compiled: its gradient's error and seconds at given tolerances."""

    contestant: Contestant
    call: Callable[..., PyTree]
    instance: Instance
    exact: PyTree

    def run(self, tolerances: tuple[float, ...]) -> Callable[[], Any]:
        dtype = jax.tree.leaves(self.instance.w0)[0].dtype
        pair = [jnp.asarray(x, dtype) for x in (*tolerances, 0.1, 0.1)[:2]]
        args = self.instance.lam, self.instance.data, *pair
        return lambda: jax.block_until_ready(self.call(*args))

    def entry(self, *tolerances: float) -> tuple[Entry, float]:
        run = self.run(tolerances)
        error = relative_error(run(), self.exact)
        error = error if np.isfinite(error) else np.inf
        return Entry(self.contestant, tolerances, error, run), seconds_of(run)


def tuned(tried: Tried, goals: list[float], best: dict[float, float]) -> dict[float, Entry]:
    """The fastest way to each goal among the tolerances of one setting.

    Args:
        tried: The setting.
        goals: Relative errors of the hypergradient.
        best: The least seconds so far for each goal; updated.
    """
    if tried.contestant.tolerances == 0:
        entry, _ = tried.entry()
        return {goal: entry for goal in goals if entry.error <= goal}
    found: dict[float, Entry] = {}
    if tried.contestant.tolerances == 1:  # It is asked for the goal, whatever it then delivers.
        return {goal: tried.entry(goal)[0] for goal in goals}
    fastest: dict[float, float] = {}
    for goal in goals:
        enough = None
        for i, rtol in enumerate(_LOWER):
            entry, seconds = tried.entry(rtol, _LINEAR[-1])
            if entry.error <= 0.9 * goal:
                enough = i
                break
            if seconds > _HOPELESS * best[goal]:
                break
        if enough is None:
            continue
        for rtol in _LOWER[enough : enough + 3 : 2]:
            for rtol_v in _LINEAR:
                entry, seconds = tried.entry(rtol, rtol_v)
                if entry.error <= goal:
                    if seconds < fastest.get(goal, np.inf):
                        fastest[goal], found[goal] = seconds, entry
                    break
        if goal in fastest:
            best[goal] = min(best[goal], fastest[goal])
    return found


def main(options: argparse.Namespace) -> report.Claims:
    """Measures every instance, and checks the claims."""
    scale = "quick" if options.quick else "full" if options.full else "default"
    rounds = options.rounds or (3 if options.quick else 9)
    instances = accuracy_instances(scale)
    in_float32 = instances if options.full else instances[1:] if options.quick else instances[1::3]
    in_float64 = instances[:1] if options.quick else instances
    runs = [(i, False) for i in in_float64] + [(i, True) for i in in_float32]
    bar = report.progress(len(runs))
    found: dict[str, Any] = {}
    for instance, single in runs:
        name = instance.name + ", float32" * single
        bar.set_description_str(name)
        found[name] = measure(instance, [1e-3] if single else [1e-3, 1e-6], rounds, single=single)
        bar.update()
    bar.close()
    summaries = [s for name, rows in found.items() for s in summarised(name, rows["rows"])]
    print(table(summaries))
    claims = _checked(summaries)
    _draw(options, summaries)
    report.write_results(
        options,
        claims=claims,
        settings={"rounds": rounds, "scale": scale},
        results={"refused": {name: rows["refused"] for name, rows in found.items()}},
        volatile={"rows": {name: rows["rows"] for name, rows in found.items()}},
    )
    return claims


def measure(
    instance: Instance,
    goals: list[float],
    rounds: int,
    *,
    single: bool = False,
    among: Collection[str] | None = None,
) -> dict[str, Any]:
    """Every contestant on one instance, in float32 where `single`; the truth is of float64.

    With `among` only the settings of these names.

    Returns:
        `rows`: for each goal the settings that reached it, the fast ones of each library, with error
        and seconds; for the goal 0 the defaults of each peer, whatever their error. `refused`: the
        peers' settings that raised.
    """
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, exact_hypergradient(instance))
    with jax.enable_x64(not single):
        at = instance.single() if single else instance
        chosen = [c for c in contestants(at) if among is None or c.setting in among]
        return _measured(at, chosen, exact, goals, rounds)


class Summary(NamedTuple):
    """One instance at one goal: the fastest of ours, `adaptive`, the fastest peer; seconds."""

    name: str
    goal: float
    ours: dict[str, Any] | None
    adaptive: dict[str, Any] | None
    peer: dict[str, Any] | None

    def ratio(self, of: dict[str, Any] | None) -> float:
        """Its seconds over those of the fastest peer; NaN where there is none of either."""
        if of is None or self.peer is None:
            return float("nan")
        return of["seconds"] / self.peer["seconds"]


def summarised(name: str, rows: list[dict[str, Any]]) -> list[Summary]:
    """One `Summary` for each goal."""

    def fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(rows, key=lambda r: r["seconds"], default=None)

    summaries = []
    for goal in sorted({r["goal"] for r in rows} - {0.0}, reverse=True):
        # JSON has no infinity: what ran away has no error there.
        at = [r for r in rows if r["goal"] == goal and r["error"] is not None]
        at = [r for r in at if r["error"] <= goal]
        ours = [r for r in at if r["library"] == OURS]
        summaries.append(
            Summary(
                name,
                goal,
                fastest([r for r in ours if not r["asked"]]),
                fastest([r for r in ours if r["setting"] == DEFAULTS]),
                fastest([r for r in at if r["library"] != OURS]),
            )
        )
    return summaries


def table(summaries: list[Summary]) -> str:
    """The table of a terminal."""
    header = [
        "",
        "goal",
        "ours",
        "ms",
        "peer",
        "ms",
        "ours/peer",
        "adaptive/peer",
        "its error/goal",
    ]
    rows = []
    for s in summaries:
        cells = [
            (r["setting"] if r is s.ours else f"{r['library']}: {r['setting']}", 1e3 * r["seconds"])
            if r is not None
            else ("none", float("nan"))
            for r in (s.ours, s.peer)
        ]
        share = s.adaptive["error"] / s.goal if s.adaptive else float("nan")
        rows.append(
            [
                s.name,
                f"{s.goal:.0e}",
                *(text for name, ms in cells for text in (name, f"{ms:.3g}")),
                f"{s.ratio(s.ours):.2f}",
                f"{s.ratio(s.adaptive):.2f}",
                f"{share:.1g}",
            ]
        )
    return report.table(header, rows)


def _checked(summaries: list[Summary]) -> report.Claims:
    claims = report.Claims()
    # In float32 what may be rounding is above 1e-3 where κ is 1e4, and `adaptive` says so: NaN.
    by_rounding = [s.name for s in summaries if s.adaptive is None and s.name.endswith("float32")]
    missing = [s.name for s in summaries if s.ours is None or s.adaptive is None]
    missing = [name for name in missing if name not in by_rounding]
    claims.check(
        "Ours reaches every goal, `adaptive` every one in float64",
        not missing,
        (", ".join(missing) or "all")
        + "; in float32 it refuses: " * bool(by_rounding)
        + ", ".join(by_rounding),
    )
    if not any(s.peer for s in summaries):
        return claims  # None is installed.
    for name, which, bounds in (
        ("Our best configuration", "ours", (0.8, 1.0)),
        ("`adaptive` with defaults", "adaptive", (1.0, 2.0)),
    ):
        ratios = [s.ratio(getattr(s, which)) for s in summaries]
        ratios = [r for r in ratios if np.isfinite(r)]
        claims.check(
            f"{name}: median of its time over the best tuned peer's at most {bounds[0]}, the worst "
            f"at most {bounds[1]}",
            bool(np.median(ratios) <= bounds[0] and max(ratios) <= bounds[1]),
            f"{np.median(ratios):.2f}, {max(ratios):.2f}",
            required=False,  # Times: a busy machine is no defect.
        )
    shares = [s.adaptive["error"] / s.goal for s in summaries if s.adaptive]
    claims.check(
        "`adaptive` delivers between 0.1 and 1 times the error asked for, in the median",
        bool(0.1 <= np.median(shares) <= 1),
        f"{np.median(shares):.1g}",
        required=False,
    )
    return claims


def _draw(options: argparse.Namespace, summaries: list[Summary]) -> None:
    height = 1.2 + 0.22 * len(summaries)
    with report.figure(options.out / "accuracy.png", size=(7.5, height)) as (_, axes):
        panel, names = axes[0][0], [f"{s.name}, {s.goal:.0e}" for s in summaries]
        for which, label, color, marker in (
            ("adaptive", "adaptive, asked for the goal", "#d55e00", "s"),
            ("ours", "ours, best setting", "#007a55", "o"),
        ):
            ratios = [s.ratio(getattr(s, which)) for s in summaries]
            panel.plot(ratios, names, marker, color=color, label=label)
        panel.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
        panel.set(xscale="log", xlabel="time over that of the fastest peer, tuned")
        ticks = (0.5, 1, 2, 5, 10)
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.minorticks_off()
        panel.invert_yaxis()
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def _measured(
    instance: Instance, chosen: list[Contestant], exact: PyTree, goals: list[float], rounds: int
) -> dict[str, Any]:
    best = dict.fromkeys(goals, np.inf)
    candidates: dict[float, list[tuple[float, Entry]]] = {goal: [] for goal in goals}
    defaults, failed = [], {}
    for contestant in chosen:
        call = jax.jit(contestant.make(instance).once)
        tried = Tried(contestant, call, instance, exact)
        try:
            found = tuned(tried, goals, best)
            if contestant.tolerances == 0:
                defaults.append(tried.entry()[0])
        except Exception as error:  # A peer that refuses a problem is a result.
            if contestant.library == OURS:
                raise
            failed[contestant.name] = f"{type(error).__name__}: {error}"[:200]
            continue
        for goal, entry in found.items():
            candidates[goal].append((seconds_of(entry.run), entry))
    # Who is within three times the fastest of its library takes part in the final.
    runs: dict[tuple[float, str], Entry] = {}
    for goal, entries in candidates.items():
        for library in libraries():
            of = [(s, e) for s, e in entries if e.contestant.library == library]
            tuned_ones = [s for s, e in of if e.contestant.tolerances != 1]
            least = min(tuned_ones, default=0.0)
            for s, e in of:
                if e.contestant.tolerances == 1 or s <= 3 * least:
                    runs[goal, e.contestant.name] = e
    for e in defaults:
        runs[0.0, e.contestant.name] = e
    seconds = interleaved({key: e.run for key, e in runs.items()}, rounds)
    rows = [
        {
            "goal": goal,
            "library": e.contestant.library,
            "setting": e.contestant.setting,
            "tolerances": list(e.tolerances),
            "asked": e.contestant.tolerances == 1,
            "error": e.error,
            "seconds": float(np.median(seconds[goal, name])),
        }
        for (goal, name), e in runs.items()
    ]
    return {"rows": rows, "refused": failed}
