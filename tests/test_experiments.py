"""Every experiment at its smallest size, and the machinery that they share."""

import argparse
import contextlib
import functools
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from sklearn import datasets

from experiments.__main__ import FOLDERS, main
from experiments.benchmark import accuracy, contestants, instances, outer
from experiments.judges import bilevel_methods, elastic_net, logistic_notebook
from experiments.problems import bilevel_benchmark, data
from experiments.tools import collectives, convergence, report

pytestmark = pytest.mark.slow

# What makes an experiment smaller still than `--quick` does.
SMALLER = {
    "figure1": ["--settings", "lr", "br"],
    "table1": ["--methods", "itd", "cg_k"],
    "benchmark": [
        "kernel",
        "hypergradient",
        "itd",
        "compile",
        "batch",
        "scale",
    ],  # Below for the others: with few contestants.
}
# The data sets that an experiment loads, but those inside scikit-learn, which are always there.
NEEDS = {
    "table1": ("parkinsons", "fashion_mnist", "news20"),
    "memory": ("news20",),
    "sparse_products": ("news20",),
    "figure2": ("mnist",),
    "conv_eqm": ("mnist",),
    "bilevel_benchmark": ("mnist",),
}


@pytest.fixture(autouse=True, scope="module")
def _optimised() -> Iterator[None]:
    """Programs that run for a while are compiled as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def is_here(dataset: str) -> bool:
    try:
        data.load(dataset)
    except FileNotFoundError:
        return False
    return True


def run(name: str, out: Path, *options: str) -> dict:
    """The results of an experiment; a skip where it stops for want of a data set, and only there."""
    errors = io.StringIO()
    # As a user runs them: optax's Adam does not pass the strict promotion of these tests.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stderr(errors),
    ):
        smaller = SMALLER.get(name, []) if name != "benchmark" or not options else []
        code = main([name, "--quick", "--out", str(out), *smaller, *options])
    if code == 2 and f"`{name}` stops: " in errors.getvalue():
        absent = [dataset for dataset in NEEDS.get(name, ()) if not is_here(dataset)]
        if absent:
            pytest.skip(f"`{name}` needs the data of {', '.join(absent)}: set FIXEDGRAD_DATA")
    assert code == 0, errors.getvalue()
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def offline(monkeypatch):
    """No test downloads anything: data is read from where it is, or the test is skipped."""

    def refuse(*args, **kwargs):
        raise OSError(f"no network in tests: {args} {kwargs}")

    monkeypatch.setattr(datasets, "fetch_openml", refuse)
    monkeypatch.setattr(datasets, "fetch_20newsgroups", refuse)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("offline")
def test_quick_run_keeps_its_claims_and_writes_its_results(name, tmp_path, capsys):
    record = run(name, tmp_path)
    assert set(record) == {"settings", "claims", "results", "volatile"}
    assert all(claim["holds"] or not claim["required"] for claim in record["claims"])
    assert record["volatile"]["environment"]["packages"]["jax"] == jax.__version__
    assert list(tmp_path.rglob("*.png"))
    printed = capsys.readouterr().out
    assert record["claims"]
    assert all(claim["claim"] in printed for claim in record["claims"])


@pytest.fixture
def few(monkeypatch):
    """Few contestants, and one small instance."""
    settings = {
        "newton(cg) + dense",
        "newton(cg) + cg",
        "anderson + cg, extrapolated()",
        contestants.DEFAULTS,
        "Newton + direct",
    }
    for name in ("contestants", "outer_contestants"):
        every = getattr(contestants, name)
        chosen = lambda instance, every=every: [  # noqa: E731
            c for c in every(instance) if c.setting in settings
        ]
        for module in (contestants, accuracy, outer):
            monkeypatch.setattr(module, name, chosen, raising=False)
    monkeypatch.setattr(
        accuracy, "accuracy_instances", lambda _: [instances.logistic_regression(60, 10, 1e2)] * 2
    )


@pytest.mark.parametrize("part", ["accuracy", "outer"])
@pytest.mark.usefixtures("few")
def test_contestants_reach_what_the_benchmark_asks_for(part, tmp_path):
    run("benchmark", tmp_path, part)
    rows = json.loads((tmp_path / part / "results.json").read_text())["volatile"]["rows"]
    for found in rows.values():
        assert {row["library"] for row in found} >= {"fixedgrad", "optimistix"}
        assert any(row["asked"] for row in found)
    assert list((tmp_path / part).glob("*.png"))


@pytest.mark.usefixtures("few")
def test_the_script_for_an_accelerator_runs_on_a_cpu_and_keeps_to_its_time(tmp_path):
    run("benchmark", tmp_path, "gpu")
    found = json.loads((tmp_path / "gpu" / "results.json").read_text())["volatile"]
    kinds = {name.partition(",")[0] for name in found["measured"]}
    assert kinds == {"roofline", "hypergradient", "accuracy", "outer", "batch"}
    assert found["ratios"]
    assert not found["left_out"]
    code = main(["benchmark", "gpu", "--quick", "--limit", "0", "--out", str(tmp_path)])
    assert code == 1  # All of it comes too late, and it says so.


@pytest.mark.usefixtures("offline")
def test_table1_runs_in_parts(tmp_path):
    part = ("--only", "parkinson", "--steps", "4", "--methods")
    for methods in (["cg_k"], ["fp_k", "cg_k"]):  # The second run goes on from the first one's end.
        rows = run("table1", tmp_path, *part, *methods)["results"]["rows"]
        assert {row["data"] for row in rows} == {"parkinson"}
        assert sorted(row["method"] for row in rows) == sorted(methods)


def test_table1_rows_run_together_are_those_run_by_themselves(tmp_path):
    few = ("--only", "fashion", "--steps", "20", "--methods", "itd", "fp_t", "cg_t")
    alone, together = (
        run("table1", tmp_path / str(len(more)), *few, *more)["results"]["rows"]
        for more in ((), ("--together",))
    )
    assert len(alone) == 3
    for ours, same in zip(alone, together, strict=True):
        for key in ("initial", "objective", "exact_objective"):
            np.testing.assert_allclose(ours["splits"][0][key], same["splits"][0][key], rtol=1e-5)


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    monkeypatch.delenv("FIXEDGRAD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline", "no_data")
def test_only_absent_data_is_a_reason_to_skip(tmp_path, monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="the data of news20: set FIXEDGRAD_DATA"):
        run("memory", tmp_path)

    def stops(arguments):
        print(f"`{arguments[0]}` stops: no such file", file=sys.stderr)
        return 2

    def refuses(arguments):
        print(f"`{arguments[0]}` needs the package `orbax`", file=sys.stderr)
        return 2

    # A package that is missing, whether data are or not.
    monkeypatch.setattr(sys.modules[__name__], "main", refuses)
    with pytest.raises(AssertionError, match="needs the package"):
        run("memory", tmp_path)
    # A file that is no data set, of an experiment that needs none, or where the data are all there.
    monkeypatch.setattr(sys.modules[__name__], "main", stops)
    with pytest.raises(AssertionError, match="no such file"):
        run("quickstart", tmp_path)
    monkeypatch.setattr(data, "load", lambda name: None)
    with pytest.raises(AssertionError, match="no such file"):
        run("memory", tmp_path)


def test_the_same_seed_gives_the_same_results(tmp_path):
    small = ("--settings", "br", "--num-lam", "1", "--seed", "1")
    records = [run("figure1", tmp_path / name, *small) for name in ("a", "b")]
    first, again = ({**record, "volatile": None} for record in records)
    assert first == again


def test_curves_are_what_the_explicit_form_computes_for_each_t(problem_of_two_maps):
    problem, lam = problem_of_two_maps
    grid, t, k = convergence.Grid(3, 2), 6, 4
    estimators = {
        "itd": fg.itd(),
        "fp_t": fg.aid(fg.fp(num_steps=t)),
        "fp_10": fg.aid(fg.fp(num_steps=k)),
        "cg_t": fg.aid(fg.cg(num_steps=t)),
        "cg_10": fg.aid(fg.cg(num_steps=k)),
    }
    w = jax.jit(lambda lam: convergence.iterates(problem, lam, grid))(lam)
    run_solver = fg.picard(problem.phi, num_steps=t)
    for method, estimator in estimators.items():
        curve = functools.partial(convergence.hypergradients, method, problem, grid=grid, k=k)
        rows = jax.jit(curve)(lam, w)
        by_cg = method.startswith("cg")
        outer = problem.outer_cg if by_cg else problem.outer
        phi = problem.phi_cg if by_cg else problem.phi

        def solver(w0, lam, by_cg=by_cg):
            state = run_solver(problem.w0 if by_cg else w0, lam)
            return problem.to_cg(state) if by_cg else state

        hypergrad = fg.hypergradient(outer, phi, solver, estimator)
        w0 = problem.to_cg(problem.w0) if by_cg else problem.w0
        grad, _ = jax.jit(hypergrad.update)(hypergrad.init(w0, lam), lam)
        assert grid.t[2] == t
        np.testing.assert_allclose(rows[2], grad, rtol=1e-12, err_msg=method)


@pytest.fixture
def problem_of_two_maps():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 4))
    y, lam = jax.random.normal(keys[1], (6,)), jax.random.uniform(keys[2], (4,))

    def loss(w, lam):
        return jnp.sum(jnp.logaddexp(0.0, -y * (x @ w))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def outer(w, lam):
        return jnp.sum(w**2) + jnp.sum(lam**2)

    zero = jnp.zeros(4)
    problem = convergence.Problem(
        outer=lambda state, lam: outer(state.w, lam),
        phi=fg.heavy_ball(loss, step_size=0.1, momentum=0.3),
        w0=fg.Momentum(zero, zero),
        outer_cg=outer,
        phi_cg=fg.gradient_descent(loss, step_size=0.05),
        to_cg=lambda state: state.w,
    )
    return problem, lam


def test_the_textbooks_cg_is_that_of_the_library_where_a_matrix_is_symmetric():
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 6)))[0]
    m, b = q @ jnp.diag(jnp.linspace(-0.5, 0.9, 6)) @ q.T, jnp.arange(1.0, 7.0)
    for k in (1, 3, 6):
        x, _ = jax.jit(lambda k: elastic_net._plain_cg(k, 1e-15)(lambda u: m @ u, b))(k)
        np.testing.assert_allclose(x, fg.cg(num_steps=k)(lambda u: m @ u, b)[0], rtol=1e-9)


def test_reverse_mode_through_the_last_steps_is_truncated_itd():
    sample = logistic_notebook._data()
    _, errors, _ = logistic_notebook._errors(sample)
    outer, phi = logistic_notebook._problem(sample)
    lam, w0, k = jnp.ones(20), jnp.zeros(20), 10
    exact = fg.hypergradient(outer, phi, fg.newton(phi, max_steps=50, rtol=1e-14))
    solver = fg.picard(phi, num_steps=logistic_notebook._T - k)
    cut = fg.hypergradient(outer, phi, solver, fg.truncated_itd(num_steps=k))
    truth, g = (h.update(h.init(w0, lam), lam)[0] for h in (exact, cut))
    error = jnp.linalg.norm(g - truth) / jnp.linalg.norm(truth)
    np.testing.assert_allclose(errors["itd"][k - 1], error, rtol=1e-9)


def test_an_unknown_method_is_refused(problem_of_two_maps):
    problem, lam = problem_of_two_maps
    grid = convergence.Grid(1, 1)
    with pytest.raises(ValueError, match=r"`method` must be a key of `report.METHODS`"):
        convergence.hypergradients("gmres", problem, lam, (problem.w0,), grid)


def test_without_a_name_the_experiments_are_listed_with_their_claims(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in FOLDERS)
    assert "CG errs less than FP" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure9"], "There is no experiment `figure9`; there are: quickstart"),
        (["quickstart", "--seed", "-1"], "a seed is an integer"),
        (["quickstart", "--seed", "one"], "a seed is an integer"),
        (["quickstart", "--quick", "--full"], "not allowed with argument"),
        (["quickstart", "--out", "/dev/null/out"], "`--out` cannot be made a folder"),
        (["figure1", "--num-lam", "0"], "an integer of at least 1"),
        (["figure1", "--settings", "svm"], "invalid choice: 'svm'"),
        (["distributed", "--num-processes", "2"], "above 1 needs `--coordinator`"),
        (["distributed", "--coordinator", "host:1"], "`--coordinator` needs `--num-processes`"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_says_why(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:  # How argparse ends.
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_package_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "quickstart" in done.stdout


def test_collectives_are_found_in_loops_branches_and_calls():
    text = """HloModule jit_f, is_scheduled=true

%add (x: f64[], y: f64[]) -> f64[] {
  ROOT %sum = f64[] add(%x, %y)
}

%inner (c: (s32[], f64[4,2])) -> (s32[], f64[4,2]) {
  %all-reduce.2 = f64[4,2]{1,0} all-reduce(%a), to_apply=%add
}

%outer (c: (s32[], f64[4,2])) -> (s32[], f64[4,2]) {
  %all-reduce.1 = (f64[3]{0}, pred[]) all-reduce-start(%a, %b), to_apply=%add
  %done = (f64[3]{0}, pred[]) all-reduce-done(%all-reduce.1)
  ROOT %while.2 = (s32[], /*index=1*/f64[4,2]{1,0}) while(%t), condition=%test, body=%inner
}

%test (c: (s32[], f64[4,2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%left (c: f32[5]) -> f32[5] {
  ROOT %gathered = bf16[5]{0} all-gather(%a), dimensions={0}
}

ENTRY %main (a: f64[4,2]) -> f64[4,2] {
  %while.1 = (s32[], f64[4,2]{1,0}) while(%t), condition=%test, body=%outer
  ROOT %choice = f32[5] conditional(%p, %a, %b), branch_computations={%left, %add}
}
"""
    assert [tuple(found) for found in collectives.collectives(text)] == [
        ("all-reduce.1", "all-reduce", (3, 1), 25, ("outer",)),
        ("all-reduce.2", "all-reduce", (8,), 64, ("outer", "inner")),
        ("gathered", "all-gather", (5,), 10, ()),
    ]


def test_a_table_is_aligned():
    text = report.table(("method", "error"), [("ITD", "1e-3"), ("CG k = t", "1")])
    assert text.splitlines() == [
        "method    error",
        "--------  -----",
        "ITD        1e-3",
        "CG k = t      1",
    ]


@pytest.mark.parametrize(("required", "code"), [(True, 1), (False, 0)])
def test_only_required_claims_decide_the_exit_code(required, code, capsys):
    claims = report.Claims()
    claims.check("one is one", True, "1")
    assert claims.exit_code == 0
    claims.check("one is two", False, "1", required=required)
    assert claims.exit_code == code
    assert ("[NO]" if required else "[no]") in capsys.readouterr().out


def test_results_are_strict_json_with_none_for_what_is_not_finite(tmp_path):
    values = {"a": np.array([1.0, np.nan]), "b": jnp.inf, "c": np.int64(3), "d": (True, "x")}
    path = report.write_results(
        argparse.Namespace(out=tmp_path, command="none"),
        claims=report.Claims(),
        settings={},
        results=values,
        volatile={},
    )
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert record["results"] == {"a": [1.0, None], "b": None, "c": 3, "d": [True, "x"]}


def test_rows_that_deterministic_aid_reads_are_those_that_are_counted():
    counts = {"phi": 0, "products": 0}

    def count(name: str) -> None:
        counts[name] += 1

    @jax.custom_vjp
    def phi(w, lam):
        return forward(w, lam)[0]

    def forward(w, lam):
        jax.debug.callback(lambda: count("phi"))
        return jnp.linspace(0.1, 0.9, 8) * w + lam, None

    def backward(_, v):
        jax.debug.callback(lambda: count("products"))
        return jnp.linspace(0.1, 0.9, 8) * v, v

    phi.defvjp(forward, backward)
    t, k, n = 3, 2, 4
    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sum((w - 1.0) ** 2),
        phi,
        fg.anderson(phi, num_steps=t),
        fg.aid(fg.cg(num_steps=k)),
        start=fg.warm(),
    )
    loop = fg.bilevel(hypergrad, optax.sgd(1e-3))
    state = loop.init(jnp.zeros(8), jnp.zeros(8))
    jax.effects_barrier()
    counts.update(phi=0, products=0)
    _, history = jax.block_until_ready(loop.run(state, num_steps=n))
    jax.effects_barrier()
    task = bilevel_benchmark.quadratics(num_rows=(64, 64), dimensions=(4, 3))
    method = bilevel_methods.deterministic_aid(task, optax.sgd, steps=(t, k))
    assert float(method.read(history).lower) == 64 * (counts["phi"] + counts["products"])
