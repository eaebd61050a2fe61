"""The runs of `distributed`: processes on this host that are started, waited for, killed, resumed."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .distributed_worker import Size

NOTICED = 120.0  # Seconds for a process to end whose peer was killed.

_ROOT = Path(__file__).parents[2]
_LIMIT = 600.0  # Seconds for a run: simulated devices are slow where cores are busy.
_HEARTBEAT = 10  # Seconds without a sign of life after which a process counts as gone.


class Plan(NamedTuple):
    """A run: how many processes, simulated devices of each, and what adds up."""

    processes: int
    devices: int
    by: str

    def __str__(self) -> str:
        return f"{self.processes} × {self.devices}" + f", {self.by}" * bool(self.by)


class Process(NamedTuple):
    """One that was started, and the files that have what it says."""

    popen: subprocess.Popen[bytes]
    out: Path
    err: Path


def finished(
    options: argparse.Namespace, plan: Plan, folder: Path, extra: Sequence[str]
) -> list[dict[str, Any]]:
    """What each process of a run comes to.

    Args:
        options: Those of the experiment, for its size and seed.
        plan: The run.
        folder: Where the processes write; it is made.
        extra: Further options of each process.

    Raises:
        RuntimeError: One of them failed, or not all ended in time.
    """
    with _started(options, plan, folder, extra, {}) as processes:
        _wait(processes, lambda: all(p.popen.poll() == 0 for p in processes))
        return [json.loads(p.out.read_text(encoding="utf-8").splitlines()[-1]) for p in processes]


def killed_and_resumed(
    options: argparse.Namespace, plan: Plan, folder: Path, size: Size
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kills process 1 after a checkpoint, and starts all again.

    Returns:
        What became of process 0, and what each process came to in the end.
    """
    folder.mkdir()
    checkpoints = folder / "checkpoints"
    step = size.num_steps // (2 * size.chunk) * size.chunk
    extra = ["--checkpoints", str(checkpoints), "--heartbeat", str(_HEARTBEAT)]
    halted = {1: ["--halt-after", str(step)]}
    with _started(options, plan, folder / "first", extra, halted) as processes:
        survivor, victim = processes
        _wait(processes, lambda: "halted" in victim.out.read_text(encoding="utf-8"))
        victim.popen.send_signal(signal.SIGKILL)
        start = time.monotonic()
        try:
            code = survivor.popen.wait(NOTICED)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - start
        gone = re.search(r"unhealthy[^\n]*\n(\d+)\n", survivor.err.read_text(encoding="utf-8"))
    killed = {
        "step": step,
        "exit_code": code,
        "seconds": seconds,
        "named": gone and int(gone[1]),
        "saved": sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()),
    }
    return killed, finished(options, plan, folder / "second", extra)


@contextmanager
def _started(
    options: argparse.Namespace,
    plan: Plan,
    folder: Path,
    extra: Sequence[str],
    of_one: Mapping[int, Sequence[str]],
) -> Iterator[list[Process]]:
    """The processes of a run; none is left at the end of the block."""
    folder.mkdir()
    command = [sys.executable, "-m", "experiments", "distributed", "--out", str(folder)]
    command += ["--seed", str(options.seed), "--num-processes", str(plan.processes), *extra]
    command += [flag for flag in ("--quick", "--full") if getattr(options, flag[2:])]
    if plan.by == "gloo":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}"]
    flags = {
        "xla_force_host_platform_device_count": plan.devices,
        "xla_cpu_collective_call_terminate_timeout_seconds": int(_LIMIT),
    }
    xla_flags = " ".join(f"--{name}={value}" for name, value in flags.items())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    if options.quick:  # Nearly all of the time is compilation.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    processes = []
    try:
        for i in range(plan.processes):
            out, err = folder / f"{i}.out", folder / f"{i}.err"
            with out.open("wb") as stdout, err.open("wb") as stderr:
                popen = subprocess.Popen(
                    [*command, "--process-id", str(i), *of_one.get(i, ())],
                    cwd=_ROOT,
                    env=environment,
                    stdout=stdout,
                    stderr=stderr,
                )
            processes.append(Process(popen, out, err))
        yield processes
    finally:
        for process in processes:
            process.popen.kill()  # Does nothing to a process that has ended.
            process.popen.wait()


def _wait(processes: Sequence[Process], ready: Callable[[], bool]) -> None:
    """Until it is `ready`; `RuntimeError` where a process fails before, or it takes too long."""
    deadline = time.monotonic() + _LIMIT
    while not ready():
        failed = [i for i, process in enumerate(processes) if process.popen.poll()]
        if failed or time.monotonic() > deadline:
            what = f"processes {failed} failed" if failed else f"not ready after {_LIMIT:.0f} s"
            said = (
                f"\n--- process {i}\n{process.err.read_text(encoding='utf-8')[-2000:]}"
                for i, process in enumerate(processes)
            )
            raise RuntimeError(f"A run of {len(processes)} processes: {what}.{''.join(said)}")
        time.sleep(0.05)
