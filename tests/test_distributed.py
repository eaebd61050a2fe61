"""Two processes on one host, each with half of the data: both get the whole hypergradient."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distributed_worker

pytestmark = pytest.mark.slow

SECONDS = 240  # Each of the two waits for the other; a busy machine is slow to start them.


def test_two_processes_compute_the_same_hypergradient():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(distributed_worker.__file__)), str(port)]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    workers = [
        subprocess.Popen(
            [*command, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | devices,
        )
        for process in range(distributed_worker.NUM_PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()  # Does nothing to a process that has ended.
            worker.wait()
    for worker, (_, stderr) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, stderr.decode()[-2000:]
    results = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    assert results[0] == results[1]
    assert results[0]["devices"] == 4
    x, y, f = distributed_worker.problem()
    want = jax.jit(jax.grad(f))(jnp.linspace(-0.5, 0.5, 4), x, y)
    np.testing.assert_allclose(results[0]["gradient"], want, rtol=1e-10)
