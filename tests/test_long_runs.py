"""Long runs: chunks, checkpoints, and resuming after SIGKILL; the experiments at `--quick` size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A ridge problem whose every number depends on every earlier one: momentum, and a warm start.
SCRIPT = """
import hashlib, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
import fixedgrad as fg
from experiments.checkpointing import long_run

x = jax.random.normal(jax.random.key(0), (40, 8))
y = x @ jnp.arange(8.0) + jax.random.normal(jax.random.key(1), (40,))

def loss(w, lam, x, y):
    return jnp.mean((x[:20] @ w - y[:20]) ** 2) + jnp.exp(lam) @ w**2

def outer(w, lam, x, y):
    return jnp.mean((x[20:] @ w - y[20:]) ** 2)

phi = fg.gradient_descent(loss, step_size=0.1)
hypergrad = fg.hypergradient(
    outer, phi, fg.picard(phi, num_steps=5), fg.aid(fg.cg(num_steps=3)), start=fg.warm())
loop = fg.bilevel(hypergrad, optax.adam(1e-2))
pause = float(sys.argv[2])
run = long_run(
    loop, loop.init(jnp.zeros(8), jnp.zeros(8), x, y), x, y, num_steps=95, chunk=10,
    directory=Path(sys.argv[1]), save_seconds=0.0, measure=lambda state: time.sleep(pause) or {})
bits = hashlib.sha256()
for leaf in jax.tree.leaves((run.state, run.history)):
    bits.update(np.asarray(leaf).tobytes())
print(bits.hexdigest(), len(run.history.value), len(run.log))
"""


def python(directory: Path, pause: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SCRIPT, str(directory), str(pause)]
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def steps_saved(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())


def test_a_run_killed_in_the_middle_and_resumed_gives_the_same_bits(tmp_path: Path):
    straight = python(tmp_path / "straight", 0.0)
    expected, errors = straight.communicate(timeout=300)
    assert straight.returncode == 0, errors

    killed = python(tmp_path / "killed", 0.5)
    deadline = time.monotonic() + 300
    while not any(step >= 30 for step in steps_saved(tmp_path / "killed")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    printed, _ = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert printed == ""
    assert 30 <= steps_saved(tmp_path / "killed")[-1] < 95

    resumed = python(tmp_path / "killed", 0.0)
    got, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert "0/95" not in errors.partition("\r")[0].partition("|")[0]
    assert got == expected
    assert got.split()[1:] == ["95", "10"]


DATA = os.environ.get("FIXEDGRAD_DATA")


@pytest.mark.skipif(not DATA, reason="needs the data sets: set FIXEDGRAD_DATA")
@pytest.mark.parametrize(
    "arguments",
    [
        ["table1", "--only", "parkinson", "--methods", "itd", "cg_k"],
        ["table1", "--only", "fashion", "--methods", "fp_t"],
        ["table1", "--only", "news20", "--methods", "cg_t"],
        ["memory"],
        ["figure2"],
        ["conv_eqm"],
    ],
    ids=lambda arguments: "-".join(a for a in arguments if not a.startswith("--")),
)
def test_an_experiment_runs_at_quick_size_and_its_claims_hold(arguments: list[str], tmp_path: Path):
    name, *rest = arguments
    command = [sys.executable, "-m", "experiments", name, "--quick", "--out", str(tmp_path), *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["claims"]
    assert all(claim["holds"] for claim in results["claims"])
    assert list(tmp_path.glob("*.png"))
