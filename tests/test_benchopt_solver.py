"""The solver for the public bilevel benchmark, against a stand-in of benchopt's base class."""

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "experiments" / "judges" / "benchopt_solver.py"


class BaseSolver:
    """What the solver uses of benchopt's: parameters as attributes, and runs of so many points."""

    parameters: Any = {}  # noqa: RUF012

    def __init__(self, **chosen: Any):
        defaults = {name: values[0] for name, values in self.parameters.items()}
        assert set(chosen) <= set(defaults)
        for name, value in (defaults | chosen).items():
            setattr(self, name, value)

    def run_once(self, stop_val: int = 1) -> None:
        left = iter(range(stop_val))
        self.run(lambda: next(left, None) is not None)  # pyright: ignore


class Criterion:
    """A stopping criterion that records how it was made."""

    def __init__(self, **options: Any):
        self.options = options


@pytest.fixture
def solver_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, from the file as the benchmark loads it: with benchopt there, and by its path."""
    benchopt: Any = types.ModuleType("benchopt")
    benchopt.__spec__ = importlib.util.spec_from_loader("benchopt", None)
    benchopt.BaseSolver = BaseSolver
    criteria: Any = types.ModuleType("benchopt.stopping_criterion")
    criteria.SufficientProgressCriterion = Criterion
    monkeypatch.setitem(sys.modules, "benchopt", benchopt)
    monkeypatch.setitem(sys.modules, "benchopt.stopping_criterion", criteria)
    spec = importlib.util.spec_from_file_location("solvers_fixedgrad", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # As users run it: optax's Adam does not pass the strict promotion of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield module.Solver


def problem() -> tuple[dict[str, Any], Any]:
    """A ridge regression with a penalty exp(λ), in the benchmark's arguments, and f at its w(λ)."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 60, 4)), rng.normal(size=(2, 60))
    y = x @ np.ones(4) + 0.5 * noise

    def mean_of(rows: int, penalised: bool) -> Any:
        features, targets = jnp.asarray(x[rows]), jnp.asarray(y[rows])

        def function(inner_var: Any, outer_var: Any, start: Any = 0, batch_size: int = 1) -> Any:
            a = jax.lax.dynamic_slice(features, (start, 0), (batch_size, 4))
            b = jax.lax.dynamic_slice(targets, (start,), (batch_size,))
            loss = 0.5 * jnp.mean((a @ inner_var - b) ** 2)
            penalty = 0.5 * jnp.sum(jnp.exp(outer_var) * inner_var**2)
            return loss + penalty if penalised else loss

        return function

    def value(lam: np.ndarray) -> float:
        w = np.linalg.solve(x[0].T @ x[0] / 60 + np.diag(np.exp(lam)), x[0].T @ y[0] / 60)
        return 0.5 * float(np.mean((x[1] @ w - y[1]) ** 2))

    objective = {
        "f_inner": mean_of(0, penalised=True),
        "f_outer": mean_of(1, penalised=False),
        "n_inner_samples": 60,
        "n_outer_samples": 60,
        "inner_var0": jnp.zeros(4),
        "outer_var0": jnp.zeros(4),
    }
    return objective, value


def test_solver_lowers_the_objective_through_both_phases(solver_class):
    objective, value = problem()
    sizes = {"step_size": 0.2, "outer_step_size": 0.2, "batch_size": 16, "soba_steps": 16}
    solver = solver_class(**sizes, aid_step_size=0.3, outer_rate=0.2, n_inner_steps=5)
    solver.set_objective(**objective)
    values = []
    for points in (8, 60):  # SOBA alone, then AID too.
        solver.run_once(points)
        result = solver.get_result()
        assert set(result) == {"inner_var", "outer_var"}
        values.append(value(np.asarray(result["outer_var"])))
    start, best = value(np.zeros(4)), value(np.full(4, -20.0))
    assert start > values[0] > values[1]
    assert values[1] - best < 0.1 * (start - best)


def test_a_second_run_starts_anew(solver_class):
    objective, _ = problem()
    solver = solver_class(soba_steps=4, step_size=0.1, outer_step_size=0.1, batch_size=16)
    solver.set_objective(**objective)
    results = []
    for _ in range(2):
        solver.run_once(6)
        results.append(np.asarray(solver.get_result()["outer_var"]))
    np.testing.assert_array_equal(*results)


def test_solver_has_what_the_benchmark_asks_of_one(solver_class: Any):
    assert BaseSolver in solver_class.__mro__
    assert solver_class.name == "fixedgrad"
    assert solver_class.get_next(3) == 4
    assert solver_class.stopping_criterion.options["strategy"] == "callback"
    assert all(isinstance(values, list) for values in solver_class.parameters.values())


def test_module_is_there_without_benchopt():
    pytest.importorskip("matplotlib")
    from experiments.judges import benchopt_solver

    assert benchopt_solver.Solver.name == "fixedgrad"
