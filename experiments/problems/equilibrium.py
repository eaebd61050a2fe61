"""Equilibrium models: the state of each image is a fixed point, trained by three hypergradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from ..tools.checkpointing import LongRun, long_run, run_directory
from . import data

PyTree = Any

LABELS = {"itd": "ITD", "fp": "FP", "cg": "CG on the normal equations"}
KEYS = {"itd": "itd", "fp": "fp_t", "cg": "cg_t"}
"""How `report.METHODS` calls them."""


class Model(NamedTuple):
    """An equilibrium model, w = Φ(w, λ) for all images at once.

    Attributes:
        init: `init(key) -> lam`.
        state: `state(num_images)`, the shape of w.
        inject: `inject(lam, x)`, what the images add inside Φ, computed once for each solve.
        cell: `cell(w, lam, injected) -> w`.
        logits: `logits(w, lam)`.
        project: Makes Φ a contraction, `project(lam) -> lam`.
    """

    init: Callable[[jax.Array], PyTree]
    state: Callable[[int], tuple[int, ...]]
    inject: Callable[[PyTree, jax.Array], jax.Array]
    cell: Callable[[jax.Array, PyTree, jax.Array], jax.Array]
    logits: Callable[[jax.Array, PyTree], jax.Array]
    project: Callable[[PyTree], PyTree]


class Images(NamedTuple):
    """Training and test images with their labels."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


class Variant(NamedTuple):
    """One curve: a method, with the projection or without."""

    name: str
    projected: bool

    @property
    def label(self) -> str:
        """For legends."""
        return LABELS[self.name] + ("" if self.projected else ", unprojected")


VARIANTS = tuple(Variant(name, projected) for projected in (True, False) for name in LABELS)


def images(*, seed: int, num_train: int, num_test: int) -> Images:
    """Random images of MNIST's training part for training, of its test part for testing."""
    mnist = data.load("mnist")
    x = np.asarray(mnist.x, np.float32)
    (train,) = data.split(seed, mnist.n_train, (num_train,))
    (test,) = data.split(seed, len(mnist.y) - mnist.n_train, (num_test,))
    parts = (train, mnist.n_train + test)
    return Images(*(jnp.asarray(a[part]) for part in parts for a in (x, mnist.y)))


class Trainer:
    """The runs of one variant: compiled once for all seeds and learning rates."""

    def __init__(self, model: Model, variant: Variant, train: Images, num_steps: int) -> None:
        """`num_steps` is t = k."""
        self.model, self.variant, self.train, self.num_steps = model, variant, train, num_steps
        estimator = {
            "itd": fg.itd(),
            "fp": fg.aid(fg.fp(num_steps=num_steps)),
            "cg": fg.aid(fg.normal_cg(num_steps=num_steps)),
        }[variant.name]
        iterate = fg.picard(model.cell, num_steps=num_steps)

        def phi(w: jax.Array, lam: PyTree, x: jax.Array, *_: jax.Array) -> jax.Array:
            return model.cell(w, lam, model.inject(lam, x))

        def solve(w: jax.Array, lam: PyTree, x: jax.Array, *_: jax.Array) -> jax.Array:
            return iterate(w, lam, model.inject(lam, x))

        def outer(w: jax.Array, lam: PyTree, _: jax.Array, y: jax.Array) -> jax.Array:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels
            return jnp.mean(losses(model.logits(w, lam), y))

        @jax.jit
        def accuracy(lam: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
            w = solve(jnp.zeros(model.state(len(x)), x.dtype), lam, x)
            return 100 * jnp.mean(jnp.argmax(model.logits(w, lam), axis=1) == y)

        # Estimates that failed are used as they are, as the paper does without a projection; the
        # loop itself stops where a hypergradient is not finite.
        hypergrad = fg.hypergradient(outer, phi, solve, estimator, on_failure="ignore")
        sgd = optax.inject_hyperparams(optax.sgd, static_args=("nesterov",))(
            learning_rate=1.0, momentum=0.9, nesterov=True
        )
        self.loop = fg.bilevel(hypergrad, sgd, project=model.project if variant.projected else None)
        self.accuracy = accuracy

    def start(self, seed: int, rate: float) -> fg.BilevelState:
        """The first state of a run."""
        lam = self.model.init(jax.random.key(seed))
        if self.variant.projected:
            lam = self.model.project(lam)
        x, y, *_ = self.train
        state = self.loop.init(jnp.zeros(self.model.state(len(x)), x.dtype), lam, x, y)
        hyperparams = {**state.optimizer.hyperparams, "learning_rate": jnp.asarray(rate, x.dtype)}
        return state._replace(optimizer=state.optimizer._replace(hyperparams=hyperparams))

    def run(
        self, seed: int, rate: float, *, steps: int, chunk: int, out: Path, settings: dict[str, Any]
    ) -> LongRun:
        """`steps` outer steps, with the test accuracy after each chunk."""
        x, y, x_test, y_test = self.train

        def measure(state: fg.BilevelState) -> dict[str, float]:
            return {"accuracy": float(self.accuracy(state.lam, x_test, y_test))}

        kind = "projected" if self.variant.projected else "free"
        title = f"{self.variant.name}-{kind}-seed{seed}-rate{rate:g}"
        return long_run(
            self.loop,
            self.start(seed, rate),
            x,
            y,
            num_steps=steps,
            chunk=chunk,
            directory=run_directory(out / "checkpoints", title, {**settings, "steps": steps}),
            name=title,
            measure=measure,
        )


def clip_singular_values(matrix: jax.Array, highest: float) -> jax.Array:
    """The nearest matrix, or batch of them, with singular values in [0, highest]."""
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return (u * jnp.minimum(s, highest)[..., None, :].astype(u.dtype)) @ vh
