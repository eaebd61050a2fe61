"""Long runs: chunks, checkpoints, and resuming after SIGKILL."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

# A ridge problem whose every number depends on every earlier one: momentum, and a warm start.
SCRIPT = """
import hashlib, sys, time
from pathlib import Path

import pytest
import jax, jax.numpy as jnp, numpy as np, optax
import fixedgrad as fg
from experiments.tools.checkpointing import long_run

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


def first_step_shown(errors: str) -> int:
    """Where the progress bar began; a bar reads `outer steps:  32%|███▏      | 30/95 [...]`."""
    bars = re.findall(r"(\d+)/95 \[", errors)
    assert bars, errors
    return int(bars[0])


def test_a_run_killed_in_the_middle_and_resumed_gives_the_same_bits(tmp_path: Path):
    straight = python(tmp_path / "straight", 0.0)
    expected, errors = straight.communicate(timeout=300)
    assert straight.returncode == 0, errors
    assert first_step_shown(errors) == 0

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
    saved = steps_saved(tmp_path / "killed")[-1]
    assert 30 <= saved < 95

    resumed = python(tmp_path / "killed", 0.0)
    got, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert first_step_shown(errors) == saved  # A run from scratch would give the same bits too.
    assert got == expected
    assert got.split()[1:] == ["95", "10"]
