"""A collective in Φ makes one system of what looks like one on each device or batch element."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import collectives_worker

pytestmark = pytest.mark.slow

SECONDS = 600  # Devices that leave a loop at different steps would wait for each other for ever.


@pytest.fixture(scope="module")
def answers() -> dict[str, list[float] | str]:
    command = [sys.executable, str(Path(collectives_worker.__file__))]
    devices = f"--xla_force_host_platform_device_count={collectives_worker.DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    done = subprocess.run(
        command, capture_output=True, timeout=SECONDS, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


def truth() -> np.ndarray:
    a, lam, c = collectives_worker.data()
    return np.linalg.solve(np.eye(len(lam)) - a.T, c)


@pytest.mark.parametrize("where", ["shard_map", "vmap"])
@pytest.mark.parametrize("rule", ["tolerance", "exact"])
@pytest.mark.parametrize("name", list(collectives_worker.LINEAR))
def test_a_solve_spread_over_an_axis_is_that_of_the_whole_system(answers, name, rule, where):
    np.testing.assert_allclose(answers[f"{name} {rule} {where}"], truth(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["itd", "truncated_itd", "nystrom"])
def test_other_rules_are_those_of_the_whole_system(answers, name):
    np.testing.assert_allclose(answers[f"{name} shard_map"], truth(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("where", ["shard_map", "vmap"])
def test_a_direct_solve_of_a_part_is_refused_and_the_axis_named(answers, where):
    assert "a collective over `i` makes one of all" in answers[f"dense {where}"]


def test_a_leaf_that_all_devices_share_counts_once(answers):
    _, lam, c = collectives_worker.data()
    n = len(lam)
    m = np.zeros((n + 1, n + 1))
    m[:n, :n], m[:n, n], m[n, :n] = 0.4 * np.eye(n), 0.2, 0.1
    want = np.linalg.solve(np.eye(n + 1) - m.T, np.append(c, 0.0))[:n]
    np.testing.assert_allclose(answers["partly shard_map"], want, rtol=1e-9, atol=1e-14)
