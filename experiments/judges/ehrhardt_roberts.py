"""The second judge of `hyper_cleaning`: Ehrhardt and Roberts, products to a validation loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fixedgrad as fg

from ..problems import cleaning
from ..problems.cleaning import Cleaning

START, GOAL, PRODUCTS = 0.56882, 0.45535, 85_864 + 14_136
"""Published: E at λ₀, E at the end, gradients of the lower level plus products with Jᵀ."""

PENALTY = 2e-3
"""½ · 2·10⁻³ ‖w‖² = 10⁻³ ‖w‖²: of the four readings tried the one with the largest E at λ₀."""
_LOWER, _LINEAR, _RATE = 10, 5, 0.1


class Judged(NamedTuple):
    """What a run left behind.

    Attributes:
        products: Gradients and products spent before each record.
        value: E at the w at hand.
        first: E at λ₀, the lower level solved well.
        exact: E at the last λ, the lower level solved well.
        change: ‖∇ℓ‖ at which these two were taken.
    """

    products: np.ndarray
    value: np.ndarray
    first: float
    exact: float
    change: float

    def needed(self, goal: float) -> int | None:
        """The products after which E has met a goal; `None` where it has not."""
        met = np.flatnonzero(self.value <= goal)
        return int(self.products[met[0]]) if len(met) else None


def judge(task: Cleaning, num_steps: int, solve_steps: int) -> Judged:
    """Warm AID: gradient descent for w, conjugate gradients for v, Adam for λ."""
    loss = cleaning.lower_loss(PENALTY)
    phi = fg.gradient_descent(loss, step_size=0.3)
    optimum = fg.from_optax(
        loss, optax.lbfgs(), max_steps=solve_steps, atol=1e-4, on_failure="ignore"
    )
    hypergrad = fg.hypergradient(
        cleaning.outer,
        phi,
        fg.picard(phi, num_steps=_LOWER),
        fg.aid(fg.cg(num_steps=_LINEAR)),
        start=fg.warm(),
        on_failure="ignore",
    )
    loop = fg.bilevel(hypergrad, optax.adam(_RATE))
    features = task.x.shape[0]
    zero = jnp.zeros((cleaning.CLASSES, features)), jnp.zeros((cleaning.CLASSES, 1))
    w0, lam = [zero], jnp.zeros(len(task.y), jnp.float32)

    def exact(lam: jax.Array) -> tuple[float, float]:
        w, info = optimum.with_info(w0, lam, task)
        return float(cleaning.outer(w, lam, task)), float(info.residual)

    first, _ = exact(lam)
    state, history = loop.run(loop.init(w0, lam, task), task, num_steps=num_steps)
    last, change = exact(state.lam)
    # A step: t gradients for w, one for the residual; k products for v, one for the residual of its
    # start and one for that of its end, and the one with Bᵀ that comes with Jᵀ.
    each = _LOWER + 1 + _LINEAR + 3
    products = each * np.arange(1, num_steps + 1)
    return Judged(products, np.asarray(history.value), first, last, change)


def settings() -> dict[str, Any]:
    """What a reader needs to repeat it."""
    return {
        "penalty": PENALTY,
        "lower_steps": _LOWER,
        "linear_steps": _LINEAR,
        "optimizer": f"adam({_RATE})",
    }
