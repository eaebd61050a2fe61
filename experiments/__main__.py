"""`python -m experiments NAME`: runs one experiment; without a name it lists them all."""

import argparse
import ast
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

FOLDERS = {
    "quickstart": "library",
    "figure1": "paper",
    "table1": "paper",
    "memory": "paper",
    "sparse_products": "library",
    "figure2": "paper",
    "conv_eqm": "paper",
    "certificates": "library",
    "stochastic": "library",
    "advice": "library",
    "distributed": "library",
    "elastic_net": "judges",
    "logistic_notebook": "judges",
    "hyper_cleaning": "judges",
    "bilevel_benchmark": "judges",
    "benchmark": "benchmark",
}
"""The experiments in reading order, and the folder of each. Each is a module with

- a docstring whose first line is the claim that the experiment checks,
- `FLOAT64`: whether it needs double precision,
- `add_arguments(parser)` for options of its own,
- `main(options) -> int`: 0 where the claim held; `options` has `out`, `seed`, `quick`, `full` and
  `command`, which goes into the results.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment that the arguments name.

    Args:
        arguments: The command line without the program; `None` takes that of the process.

    Returns:
        The exit code: 0 where the experiment's claim held, 1 where it did not, 2 where it could not
        run.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0].startswith("-"):
        return _list_experiments(arguments)
    name, rest = arguments[0], arguments[1:]
    if name not in FOLDERS:
        print(f"There is no experiment `{name}`; there are: {', '.join(FOLDERS)}.", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(_module(name))
    except ModuleNotFoundError as error:
        print(
            f"`{name}` needs the package `{error.name}`: pip install -e '.[experiments]'.",
            file=sys.stderr,
        )
        return 2
    options = _parser(name, module).parse_args(rest)
    options.command = shlex.join(["python", "-m", "experiments", *arguments])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"`--out` cannot be made a folder: {error}.", file=sys.stderr)
        return 2
    try:
        with jax.enable_x64(module.FLOAT64):
            return module.main(options)
    except FileNotFoundError as error:  # A data set that is not there and cannot be fetched.
        print(f"`{name}` stops: {error}", file=sys.stderr)
        return 2


def _list_experiments(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs one experiment: python -m experiments NAME [options].",
        epilog="\n".join(["experiments:", *(f"  {name:<16}{_claim(name)}" for name in FOLDERS)]),
    )
    parser.add_argument("NAME", nargs="?", help="which one; `NAME --help` shows its options")
    parser.parse_args(arguments)
    parser.print_help()
    return 0


def _module(name: str) -> str:
    return f"experiments.{FOLDERS[name]}.{name}"


def _claim(name: str) -> str:
    """The first line of a module's docstring, without importing it."""
    spec = importlib.util.find_spec(_module(name))
    if spec is None or spec.origin is None:
        return "(missing)"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def _parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=module.__doc__,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out") / name, help="where results go (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of every random choice (%(default)s)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tiny size, for tests")
    size.add_argument("--full", action="store_true", help="the largest size, the paper's if any")
    module.add_arguments(parser)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a seed is an integer in [0, 2³²), got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
