"""The methods of `hyper_cleaning`: any hypergradient in the library's loop, and V-PBGD."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from ..problems import cleaning
from ..problems.cleaning import Cleaning

PyTree = Any


class Setting(NamedTuple):
    """One way to clean by the gradient of the validation loss.

    Attributes:
        optimizer: Of λ.
        solver: `solver(loss, phi)`, a solver of the lower level.
        step_size: Of the gradient descent Φ.
        estimator: How f is differentiated.
        start: Where w and v of an outer step start.
        penalty: Of the lower level, ½ penalty ‖w‖².
        fresh: Whether each outer step starts at random weights of its own, as RHG does.
    """

    optimizer: optax.GradientTransformation
    solver: Callable[..., fg.Solver]
    step_size: float
    estimator: fg.Estimator
    start: fg.Start = fg.warm()
    penalty: float = 0.0
    fresh: bool = False


def descent(num_steps: int) -> Callable[..., fg.Solver]:
    """So many steps of Φ."""
    return lambda _, phi: fg.picard(phi, num_steps=num_steps)


def lbfgs(num_steps: int) -> Callable[..., fg.Solver]:
    """So many steps of L-BFGS, which begins anew in each outer step."""
    return lambda loss, _: fg.from_optax(loss, optax.lbfgs(), num_steps=num_steps)


class Run(NamedTuple):
    """What one run of a method left behind.

    Attributes:
        steps: The outer steps taken at each record.
        value: E(w), the validation loss, which selects a record.
        accuracy: On the test images, in %.
        f1: Of the detection, in %.
        seconds: Of the whole run, compiled before.
    """

    steps: np.ndarray
    value: np.ndarray
    accuracy: np.ndarray
    f1: np.ndarray
    seconds: float

    def at(self, rule: str) -> tuple[float, float, int]:
        """Accuracy, F1 and the number of steps at the record of a rule.

        Args:
            rule: "validation" (the least E), "test" (MLS-Bench's, the best accuracy) or "last".
        """
        at = {
            "validation": np.argmin(self.value),
            "test": np.argmax(self.accuracy),
            "last": len(self.value) - 1,
        }[rule]
        return float(self.accuracy[at]), float(self.f1[at]), int(self.steps[at])


def run(
    setting: Setting, tasks: list[Cleaning], widths: list[int], seed: int, num_steps: int
) -> list[Run]:
    """Runs `num_steps` of one setting on every task: one compilation serves them all."""
    of_w = cleaning.lower_loss(setting.penalty)

    def loss(w: PyTree, lam: jax.Array, fresh: PyTree, task: Cleaning) -> jax.Array:
        del fresh
        return of_w(w, lam, task)

    phi = fg.gradient_descent(loss, step_size=setting.step_size)
    descend = setting.solver(loss, phi)

    def from_fresh(w0: PyTree, lam: jax.Array, fresh: PyTree, task: Cleaning) -> PyTree:
        return descend(fresh if setting.fresh else w0, lam, fresh, task)

    # Steps of an exact number stop early by intention: what they leave is no failure.
    hypergrad = fg.hypergradient(
        lambda w, lam, _, task: cleaning.outer(w, lam, task),
        phi,
        from_fresh if setting.fresh else descend,
        setting.estimator,
        start=setting.start,
        on_failure="ignore",
    )
    loop = fg.bilevel(hypergrad, setting.optimizer)

    def started(task: Cleaning, key: jax.Array) -> tuple[fg.BilevelState, PyTree]:
        keys = jax.random.split(key, num_steps)
        batches = (
            jax.vmap(lambda key: cleaning.initial(key, widths))(keys) if setting.fresh else None
        )
        if batches is None:
            batches = jnp.zeros((num_steps, 1))
        first = jax.tree.map(lambda x: x[0], batches)
        lam = jnp.zeros(len(task.y), jnp.float32)
        return loop.init(cleaning.initial(key, widths), lam, first, task), batches

    def go(state: fg.BilevelState, batches: PyTree, task: Cleaning) -> fg.BilevelInfo:
        # Weights are recorded, and tested afterwards: the clock runs for the method alone.
        return loop.run(state, task, num_steps=num_steps, batches=batches, metrics=_recorded)[1]

    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(tasks))]
    compiled = jax.jit(go).lower(*started(tasks[0], keys[0]), tasks[0]).compile()
    runs = []
    for task, key in zip(tasks, keys, strict=True):
        state, batches = jax.block_until_ready(started(task, key))
        begun = time.perf_counter()
        history = jax.block_until_ready(compiled(state, batches, task))
        seconds = time.perf_counter() - begun
        steps = np.arange(1, num_steps + 1)
        runs.append(_run(steps, history.metrics, task, seconds))
    return runs


def _recorded(state: fg.BilevelState) -> tuple[PyTree, jax.Array]:
    """The weights at which the hypergradient was taken, and λ after the step that it made."""
    return state.hypergrad.w, state.lam


def _run(
    steps: np.ndarray, records: tuple[PyTree, jax.Array], task: Cleaning, seconds: float
) -> Run:
    value, accuracy, f1 = map(np.asarray, tested(*records, task))
    return Run(steps, value, accuracy, f1, seconds)


@jax.jit
def tested(w: PyTree, lam: jax.Array, task: Cleaning) -> tuple[jax.Array, ...]:
    """E, accuracy and F1 of stacked weights and λ."""

    def one(record: tuple[PyTree, jax.Array]) -> tuple[jax.Array, ...]:
        w, lam = record
        found = cleaning.outer(w, lam, task), cleaning.accuracy(w, task)
        return *found, cleaning.detection(lam, task.clean)

    return jax.lax.map(one, (w, lam))


class Penalty(NamedTuple):
    """The step sizes of V-PBGD, and γ's schedule: from 0 to `gamma` in `ramp` steps."""

    lam: float = 0.1
    w: float = 0.1
    inner: float = 0.01
    gamma: float = 0.2
    ramp: int = 30_000


def penalty_run(
    setting: Penalty, tasks: list[Cleaning], widths: list[int], seed: int, num_steps: int
) -> list[Run]:
    """V-PBGD as MLS-Bench has it: descent on E + γ (ℓ(w, λ) − ℓ(u, λ)) in w and λ, u descends on ℓ.

    E is in the objective of w: the w that is tested has been trained on the validation images.
    A record every 10 steps.
    """
    loss = cleaning.lower_loss(0.0)

    def step(c: PyTree, i: jax.Array, task: Cleaning) -> PyTree:
        w, u, lam = c
        u = _descended(u, jax.grad(loss)(u, lam, task), setting.inner)
        gamma = jnp.minimum(setting.gamma * i / setting.ramp, setting.gamma)
        decay = jnp.where(gamma > 1, 1 / gamma, 1.0)

        def objective(w: PyTree, lam: jax.Array) -> jax.Array:
            gap = loss(w, lam, task) - loss(u, lam, task)
            return decay * (cleaning.outer(w, lam, task) + gamma * gap)

        by_w, by_lam = jax.grad(objective, argnums=(0, 1))(w, lam)
        return _descended(w, by_w, setting.w), u, lam - setting.lam * by_lam

    def go(w0: PyTree, task: Cleaning) -> PyTree:
        def ten(c: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
            c = jax.lax.fori_loop(0, 10, lambda j, c: step(c, 10 * i + j, task), c)
            return c, (c[0], c[2])

        lam = jnp.zeros(len(task.y), jnp.float32)
        return jax.lax.scan(ten, (w0, w0, lam), jnp.arange(num_steps // 10))[1]

    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(tasks))]
    starts = [cleaning.initial(key, widths) for key in keys]
    compiled = jax.jit(go).lower(starts[0], tasks[0]).compile()
    runs = []
    for task, w0 in zip(tasks, starts, strict=True):
        begun = time.perf_counter()
        records = jax.block_until_ready(compiled(w0, task))
        seconds = time.perf_counter() - begun
        steps = 10 * np.arange(1, num_steps // 10 + 1)
        runs.append(_run(steps, records, task, seconds))
    return runs


def validation_run(
    penalty: float, tasks: list[Cleaning], widths: list[int], seed: int
) -> list[Run]:
    """No bilevel method: w fitted to the validation images alone, which then judges labels.

    A label counts as clean where its cross-entropy is at most that of a guess, ln 10: the difference
    stands for λ_i.
    """

    def loss(w: PyTree, task: Cleaning) -> jax.Array:
        size = sum(jnp.sum(weight**2) for weight, _ in w)
        return cleaning.outer(w, task.clean, task) + 0.5 * penalty * size

    fit = jax.jit(fg.from_optax(loss, optax.lbfgs(), num_steps=150))

    def judged(w: PyTree, task: Cleaning) -> jax.Array:
        return np.log(cleaning.CLASSES) - cleaning.cross_entropies(
            cleaning.logits(w, task.x), task.y
        )

    runs = []
    for i, task in enumerate(tasks):
        w0 = cleaning.initial(jax.random.fold_in(jax.random.key(seed), i), widths)
        jax.block_until_ready(fit(w0, task))  # Compiled before it is timed.
        begun = time.perf_counter()
        w = jax.block_until_ready(fit(w0, task))
        seconds = time.perf_counter() - begun
        records = jax.tree.map(lambda x: x[None], (w, judged(w, task)))
        runs.append(_run(np.array([1]), records, task, seconds))
    return runs


def _descended(w: PyTree, grad: PyTree, step_size: float) -> PyTree:
    return jax.tree.map(lambda x, g: x - step_size * g, w, grad)
