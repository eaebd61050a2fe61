"""First to a given accuracy, first to a given objective: beside jaxopt and optimistix, part by part.

    kernel         a linear solve costs its products and nothing else
    hypergradient  a whole hypergradient with exact t and k, and the backward pass alone
    accuracy       the time to a hypergradient error of 1e-3 and 1e-6, cold
    outer          a whole optimisation, to within 0.1 % of that by exact hypergradients
    itd            reverse mode through t steps: time and memory of every scheme
    compile        the first call
    batch          many lower levels: vmap, one by one, chunks
    scale          growing data, w, λ; several devices
    gpu            the same tables on an accelerator, within minutes; runs where it is named

Times are medians over rounds in which all contestants take turns: compare them within one run only.
Compilation is apart, correctness is checked first. Peers that are not installed are left out:
`pip install -e '.[experiments,bench]'`.
"""

import argparse
import importlib
from types import ModuleType

from ..tools import report

PARTS = ("kernel", "hypergradient", "accuracy", "outer", "itd", "compile", "batch", "scale", "gpu")
FLOAT64 = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument(
        "--limit", type=float, default=420.0, help="of `gpu`: it starts nothing later, in seconds"
    )
    parser.add_argument("--rounds", type=int, help="how often all contestants are timed in turn")


def main(options: argparse.Namespace) -> int:
    """Runs the parts, each with a folder of its own; 1 where a claim of any did not hold."""
    for part in options.parts:
        if part not in PARTS:
            print(f"`benchmark` has no part `{part}`; it has {', '.join(PARTS)}.")
            return 2
    claims = report.Claims()
    parts = options.parts or [part for part in PARTS if part != "gpu"]
    for part in parts:
        module = _module(part)
        print(f"\n=== {(module.__doc__ or '').partition(chr(10))[0]}\n")
        out = options.out / part
        out.mkdir(parents=True, exist_ok=True)
        claims.results += module.main(argparse.Namespace(**(vars(options) | {"out": out}))).results
    settings = {"parts": parts}
    report.write_results(options, claims=claims, settings=settings, results={}, volatile={})
    return claims.exit_code


def _module(part: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{part}")
