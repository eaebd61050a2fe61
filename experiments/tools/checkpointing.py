"""Long runs of the outer loop: chunks of one compiled scan, a progress bar, checkpoints, resuming."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import fixedgrad as fg


class LongRun(NamedTuple):
    """What a long run gives.

    Attributes:
        state: The last state of the outer loop.
        history: A `fg.BilevelInfo` of NumPy arrays, one row for each outer step that was taken,
            and one for a step that failed.
        log: One entry for each chunk: its last `step`, its `seconds`, and what `measure` gave.
        resumed_at: The outer steps that a checkpoint had; 0 without one.
    """

    state: fg.BilevelState
    history: fg.BilevelInfo
    log: list[dict[str, float]]
    resumed_at: int = 0

    @property
    def seconds_per_step(self) -> float:
        """That of the fastest chunk: compilation and other processes only add."""
        steps = np.diff([0, *(entry["step"] for entry in self.log)])
        seconds = [e["seconds"] / n for e, n in zip(self.log, steps, strict=True)]
        return float(min(seconds))


def run_directory(root: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """The folder of a run's checkpoints: other settings, another folder, so that none are mixed."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def long_run(
    loop: fg.Bilevel,
    state: fg.BilevelState,
    /,
    *args: Any,
    num_steps: int,
    chunk: int,
    directory: Path | None = None,
    name: str = "outer steps",
    measure: Callable[[fg.BilevelState], Mapping[str, float]] | None = None,
    save_seconds: float = 60.0,
) -> LongRun:
    """`num_steps` outer steps, resumed from the last checkpoint in `directory` if there is one.

    Every chunk is one call of `loop.run`. A checkpoint is a chunk's end, so that a run that was killed
    and resumed goes through the same chunks as one that was not, and gives the same bits.

    Args:
        loop: The result of `fg.bilevel`.
        state: Its first state.
        *args: Data, passed on.
        num_steps: Outer steps in all.
        chunk: Outer steps in one compiled scan; the bar moves and checkpoints happen in between.
        directory: Where checkpoints go; `None` for none.
        name: What the progress bar says.
        measure: Numbers to log after each chunk, such as a test accuracy; its time is not counted.
        save_seconds: A checkpoint is written once that many seconds have passed since the last, and
            at the end. Zero where there are several processes: they write together, and their clocks
            differ.

    Returns:
        A `LongRun`. It ends early where the loop stopped, at a hypergradient that is not finite.
    """
    _, row = jax.eval_shape(lambda s: loop.step(s, *args), state)
    history = [np.zeros((num_steps, *r.shape), r.dtype) for r in jax.tree.leaves(row)]
    log: list[dict[str, float]] = []
    manager = None if directory is None else _manager(directory)
    if manager is not None and manager.latest_step() is not None:
        state, history, log = _restore(manager, state, history)
    done = resumed_at = int(log[-1]["step"]) if log else 0
    saved = time.monotonic()
    hidden = jax.process_index() > 0
    with tqdm(total=num_steps, initial=done, desc=name, disable=hidden) as bar:
        while done < num_steps and not bool(state.stopped):
            length = min(chunk, num_steps - done)
            start = time.perf_counter()
            state, record = jax.block_until_ready(loop.run(state, *args, num_steps=length))
            seconds = time.perf_counter() - start
            for rows, new in zip(history, jax.tree.leaves(record), strict=True):
                rows[done : done + length] = new
            done += length
            log.append({"step": done, "seconds": seconds, **(measure(state) if measure else {})})
            bar.set_postfix(objective=f"{float(record.value[-1]):.4g}", refresh=False)
            bar.update(length)
            ended = done == num_steps or bool(state.stopped)
            if manager is not None and (ended or time.monotonic() - saved >= save_seconds):
                _save(manager, done, state, history, log)
                saved = time.monotonic()
    if manager is not None:
        manager.close()
    shown = int(state.num_steps) + (int(state.reason) > fg.StopReason.RULE)
    rows = jax.tree.unflatten(jax.tree.structure(row), [x[:shown] for x in history])
    return LongRun(state, rows, log, resumed_at)


def _manager(directory: Path) -> ocp.CheckpointManager:
    # One checkpoint is kept. A save that was cut off leaves a temporary folder, which is ignored.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.resolve(), options=options)


def _save(
    manager: ocp.CheckpointManager,
    step: int,
    state: fg.BilevelState,
    history: list[np.ndarray],
    log: list[dict[str, float]],
) -> None:
    # The leaves only: the structure is known to whoever resumes.
    arrays = {"state": jax.tree.leaves(state), "history": history}
    manager.save(
        step,
        args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), log=ocp.args.JsonSave(log)),  # pyright: ignore
    )


def _restore(
    manager: ocp.CheckpointManager, state: fg.BilevelState, history: list[np.ndarray]
) -> tuple[fg.BilevelState, list[np.ndarray], list[dict[str, float]]]:
    leaves, treedef = jax.tree.flatten(state)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": leaves, "history": history})
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(like),  # pyright: ignore
            log=ocp.args.JsonRestore(),  # pyright: ignore
        ),
    )
    arrays = restored["arrays"]
    rows = [np.array(x) for x in arrays["history"]]
    return jax.tree.unflatten(treedef, arrays["state"]), rows, list(restored["log"])
