"""Logistic regression on 20 newsgroup with one regularisation parameter for each of 101631 words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse import csr_array

import fixedgrad as fg

from . import data, sparse
from .task import PAPER_START, Task

CLASSES = 20

_STEP_SIZE = 100.0
_MOMENTUM = 0.9


def task(*, seed: int, split: str = "by-date", num_documents: int | None = None) -> Task:
    """The problem on a random split.

    min over λ of CE(X' w(λ), y') where w(λ) minimises CE(X w, y) + 1/(2cp) Σ exp(λ_j) w_ij².

    Rows are word counts without headers, footers and quotes, scaled to norm 1. λ₀ = 0, w₀ = 0 and no
    bias. Heavy ball for the lower level, started at the last w; CG sees a gradient step of size 1.

    Args:
        seed: Of the split.
        split: "by-date" halves the training documents at random and tests on those the data set
            gives as test; "thirds" splits all documents at random.
        num_documents: At most so many documents in each part, for a quick look.
    """
    corpus = data.load("news20")
    rows = data.by_date(seed, corpus) if split == "by-date" else data.thirds(seed, corpus)
    parts = [part[:num_documents] for part in rows[:2]]
    # The published test part is not shuffled: a few documents of it are drawn at random.
    order = data.split(seed, len(rows.test), (num_documents or len(rows.test),))[0]
    parts.append(rows.test[order])
    x = data.normalise_rows(csr_array(corpus.x))
    arrays = [a for part in parts for a in (sparse.from_csr(x[part]), jnp.asarray(corpus.y[part]))]
    p = np.shape(corpus.x)[1]
    return Task(
        lam=jnp.zeros(p, jnp.float32),
        w=jnp.zeros((p, CLASSES), jnp.float32),
        data=tuple(arrays),
        prepare=lambda lam, x, y, *_: (lam, x, y),
        solver_map=fg.heavy_ball(_loss, step_size=_STEP_SIZE, momentum=_MOMENTUM),
        descent=fg.gradient_descent(_loss, step_size=1.0),
        momentum=True,
        outer=_outer,
        accuracy=_accuracy,
        exact=_exact,
        start=PAPER_START,
        settings={
            "seed": seed,
            "split": split,
            "documents": [len(part) for part in parts],
            "features": p,
            "inner": f"heavy ball, step {_STEP_SIZE}, momentum {_MOMENTUM}",
            "dtype": "float32",
        },
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _loss(w: jax.Array, lam: jax.Array, x: sparse.Matrix, y: jax.Array) -> jax.Array:
    penalty = jnp.exp(lam) @ jnp.sum(w**2, axis=1) / (2 * w.size)
    return _cross_entropy(sparse.matmul(x, w), y) + penalty


def _outer(w: jax.Array, lam: jax.Array, *arrays: Any) -> jax.Array:
    del lam
    return _cross_entropy(sparse.matmul(arrays[2], w), arrays[3])


def _accuracy(w: jax.Array, lam: jax.Array, *arrays: Any) -> jax.Array:
    del lam
    return jnp.mean(jnp.argmax(sparse.matmul(arrays[4], w), axis=1) == arrays[5])


def _exact(w: jax.Array, lam: jax.Array, x: sparse.Matrix, y: jax.Array, *_: Any) -> jax.Array:
    # The same heavy ball with more momentum, from the w at hand.
    phi = fg.heavy_ball(_loss, step_size=_STEP_SIZE, momentum=0.99)
    return fg.picard(phi, num_steps=1000)(fg.Momentum(w, w), lam, x, y).w
