"""What every experiment leaves behind: a table, a figure, `results.json`, and its claims checked."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm


class Method(NamedTuple):
    """One of the paper's five methods: its name in every legend, and how it is drawn."""

    label: str
    color: str
    dashed: bool
    width: float


METHODS = {
    # ITD is drawn first and wide, so that it shows behind FP where the two coincide.
    "itd": Method("ITD", "#d55e00", False, 2.6),
    "fp_t": Method("FP k = t", "#0072b2", False, 1.3),
    "fp_10": Method("FP k = 10", "#56b4e9", True, 1.3),
    "cg_t": Method("CG k = t", "#007a55", False, 1.3),
    "cg_10": Method("CG k = 10", "#b58900", True, 1.3),
}
"""The paper's legend; colours after Okabe and Ito, darkened where they were too light for lines."""

_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 100,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


class Claims:
    """The claims of an experiment: each printed as it is checked, all of them in the exit code."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def check(self, claim: str, holds: bool, measured: str, *, required: bool = True) -> None:
        """Notes and prints one claim and what was measured of it.

        Args:
            claim: The claim, one sentence.
            holds: Whether it held.
            measured: The numbers.
            required: Whether the experiment fails where it does not hold. `False` for what the
                paper found and the settings here are known not to show.
        """
        self.results.append(
            {"claim": claim, "holds": bool(holds), "required": required, "measured": measured}
        )
        print(f"  [{'ok' if holds else 'NO' if required else 'no'}] {claim}: {measured}")

    @property
    def exit_code(self) -> int:
        """0 where every required claim held, else 1."""
        return 0 if all(r["holds"] or not r["required"] for r in self.results) else 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def progress(total: int) -> tqdm:
    """A progress bar with the time left, for work in `total` parts."""
    form = "{desc:<24} {percentage:3.0f} %|{bar}| {elapsed} < {remaining}{postfix}"
    return tqdm(total=total, bar_format=form, dynamic_ncols=True)


def environment() -> dict[str, Any]:
    """Versions, platform and devices: what a reader needs to judge the times."""
    packages = ("fixedgrad", "jax", "jaxlib", "optax", "numpy", "scipy", "scikit-learn")
    peers = [n for n in ("jaxopt", "lineax", "optimistix") if importlib.util.find_spec(n)]
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in (*packages, *peers)},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "x64": jax.dtypes.canonicalize_dtype(np.float64) == np.float64,
    }


def write_results(
    options: argparse.Namespace,
    *,
    claims: Claims,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    volatile: Mapping[str, Any],
) -> Path:
    """Writes `results.json`; what differs from run to run of the same code is under `volatile`.

    Args:
        options: Those of the run: `out`, a folder which exists, and `command`, what was typed.
        claims: The claims as checked.
        settings: Sizes and seeds: what would repeat the run.
        results: What was measured and repeats; arrays become lists.
        volatile: Times and the like; the environment and the command join it.

    Returns:
        The path of the file.
    """
    record = {
        "settings": settings,
        "claims": claims.results,
        "results": results,
        "volatile": {
            "command": options.command,
            "environment": environment(),
            **volatile,
        },
    }
    path = options.out / "results.json"
    path.write_text(as_json(record), encoding="utf-8")
    return path


def as_json(record: Mapping[str, Any]) -> str:
    """JSON to be read by people as well: an array of numbers or strings stands on one line."""
    text = json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False)

    def on_one_line(match: re.Match[str]) -> str:  # No string of JSON's holds a line break.
        return "[" + re.sub(r"\s*\n\s*", " ", match[1]).strip() + "]"

    return re.sub(r"\[(\n[^][{}]*)\]", on_one_line, text) + "\n"


@contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float]) -> Iterator:
    """The axes of a new figure in the common style, saved to `path` at the end of the block.

    Yields:
        The pair (figure, axes), the axes as a `rows` by `columns` array.
    """
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=size, layout="constrained")
        yield fig, fig.subplots(rows, columns, squeeze=False)
        # Without the name and version of the program: the same bytes from run to run.
        fig.savefig(path, metadata={"Software": None})


def draw_method(
    axes: Any, name: str, x: Any, y: Any, spread: tuple[Any, Any] | None = None
) -> None:
    """Draws one curve of the method `name` in its colour, with a band where `spread` gives one."""
    method = METHODS[name]
    style = (0, (4, 2)) if method.dashed else "-"
    axes.plot(x, y, color=method.color, linestyle=style, linewidth=method.width, label=method.label)
    if spread is not None:
        axes.fill_between(x, *spread, color=method.color, alpha=0.12, linewidth=0)


def _plain(value: Any) -> Any:
    """JSON's own types: arrays as lists, floats with 6 digits, NaN and infinity as `None`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
