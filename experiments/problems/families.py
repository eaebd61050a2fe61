"""Problem families on which certificates are tried: small, random, with a truth by dense algebra.

Of each family `make(key)` draws data and λ, `phi(w, lam, data)` is the lower-level map and
`outer(w, lam, data)` the outer objective; all of them take any floating dtype.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

import fixedgrad as fg

PyTree = Any

SIZE = 30
"""Unknowns of the lower level (of one half of the state for heavy ball)."""


class Family(NamedTuple):
    """A family of bilevel problems.

    Attributes:
        name: Its name in tables.
        make: `make(key) -> (w0, lam, data)`, in float64.
        phi: `phi(w, lam, data) -> w`.
        outer: `outer(w, lam, data) -> scalar`.
        t: Numbers of lower-level steps from far to near.
        k: Numbers of linear steps.
        symmetric: Whether J is symmetric.
        smooth: Whether Φ is.
        convex: Whether it is convex or contractive, so that a certificate should be valid.
    """

    name: str
    make: Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]
    phi: Callable[[PyTree, PyTree, PyTree], PyTree]
    outer: Callable[[PyTree, PyTree, PyTree], jax.Array]
    t: tuple[int, ...]
    k: tuple[int, ...]
    symmetric: bool
    smooth: bool = True
    convex: bool = True


def _descent(loss: Callable[..., jax.Array]) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """Gradient descent with the step that comes with the data."""

    def phi(w: PyTree, lam: PyTree, data: PyTree) -> PyTree:
        gradient = jax.grad(loss)(w, lam, data)
        return jax.tree.map(lambda w, g: w - data["step"] * g, w, gradient)

    return phi


def _regression(key: jax.Array, features: int = SIZE, examples: int = 40) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    truth = jax.random.normal(keys[0], (features,))
    x = jax.random.normal(keys[1], (2 * examples, features))
    y = x @ truth + 0.5 * jax.random.normal(keys[2], (2 * examples,))
    return {"x": x[:examples], "y": y[:examples], "x2": x[examples:], "y2": y[examples:]}


def _logistic_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return jnp.sum(jax.nn.softplus(-data["y"] * (data["x"] @ w))) + 0.5 * jnp.sum(lam * w**2)


def _logistic_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    del lam
    return jnp.sum(jax.nn.softplus(-data["y2"] * (data["x2"] @ w)))


def _make_logistic(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key)
    data |= {"y": jnp.sign(data["y"]), "y2": jnp.sign(data["y2"])}
    lam = jax.random.uniform(jax.random.fold_in(key, 1), (SIZE,), minval=0.01, maxval=10.0)
    big = jnp.linalg.eigvalsh(0.25 * data["x"].T @ data["x"] + jnp.diag(lam))[-1]
    data["step"], _ = fg.optimal_step_size(big, lam.min())
    return jnp.zeros(SIZE), lam, data


def _make_heavy_ball(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    w, lam, data = _make_logistic(key)
    big = jnp.linalg.eigvalsh(0.25 * data["x"].T @ data["x"] + jnp.diag(lam))[-1]
    data["step"], data["momentum"], _ = fg.optimal_heavy_ball(big, lam.min())
    return (w, w), lam, data


def _heavy_ball(w: PyTree, lam: PyTree, data: PyTree) -> PyTree:
    now, before = w
    gradient = jax.grad(_logistic_loss)(now, lam, data)
    return now - data["step"] * gradient + data["momentum"] * (now - before), now


def _kernel(x: jax.Array, z: jax.Array, gamma: jax.Array) -> jax.Array:
    return jnp.exp(-jnp.sum(gamma[None, None] * (x[:, None] - z[None, :]) ** 2, axis=-1))


def _kernel_loss(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
    matrix = _kernel(data["x"], data["x"], lam["gamma"])
    return 0.5 * w @ (matrix @ w) + 0.5 * lam["beta"] * w @ w - w @ data["y"]


def _kernel_outer(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((data["y2"] - _kernel(data["x2"], data["x"], lam["gamma"]) @ w) ** 2)


def _make_kernel(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key, features=8, examples=SIZE)
    keys = jax.random.split(jax.random.fold_in(key, 1))
    lam = {
        "beta": 10 ** jax.random.uniform(keys[0], minval=-3.0, maxval=-1.0),
        "gamma": jax.random.uniform(keys[1], (8,), minval=5e-3, maxval=0.1),
    }
    matrix = _kernel(data["x"], data["x"], lam["gamma"]) + lam["beta"] * jnp.eye(SIZE)
    spectrum = jnp.linalg.eigvalsh(matrix)
    data["step"], _ = fg.optimal_step_size(spectrum[-1], spectrum[0])
    return jnp.zeros(SIZE), lam, data


def _biased_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((data["x"] @ w - data["y"]) ** 2) + 0.5 * jnp.sum((w - lam) ** 2)


def _squares_outer(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
    del lam
    return 0.5 * jnp.sum((data["x2"] @ w - data["y2"]) ** 2)


def _make_biased(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key)
    lam = jax.random.uniform(jax.random.fold_in(key, 1), (SIZE,), minval=-10.0, maxval=10.0)
    spectrum = jnp.linalg.eigvalsh(data["x"].T @ data["x"] + jnp.eye(SIZE))
    data["step"], _ = fg.optimal_step_size(spectrum[-1], spectrum[0])
    return jnp.zeros(SIZE), lam, data


def _representation_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((data["x"] @ (lam @ w) - data["y"]) ** 2) + 0.5 * jnp.sum(w**2)


def _representation_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((data["x2"] @ (lam @ w) - data["y2"]) ** 2)


def _make_representation(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key, features=20, examples=60)
    lam = jax.random.uniform(jax.random.fold_in(key, 1), (20, 12), minval=-1.0, maxval=1.0)
    xh = data["x"] @ lam
    spectrum = jnp.linalg.eigvalsh(xh.T @ xh + jnp.eye(12))
    data["step"], _ = fg.optimal_step_size(spectrum[-1], spectrum[0])
    return jnp.zeros(12), lam, data


def _equilibrium(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
    return jnp.tanh(lam["scale"] * (data["matrix"] @ w) + data["inputs"] @ lam["bias"])


def _target_outer(w: PyTree, lam: PyTree, data: PyTree) -> jax.Array:
    del lam
    return 0.5 * jnp.sum((w - data["target"]) ** 2)


def _make_equilibrium(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    keys = jax.random.split(key, 5)
    matrix = jax.random.normal(keys[0], (SIZE, SIZE))
    data = {
        "matrix": matrix / jnp.linalg.norm(matrix, 2),
        "inputs": jax.random.normal(keys[1], (SIZE, 6)),
        "target": jax.random.normal(keys[2], (SIZE,)),
    }
    lam = {
        "scale": jax.random.uniform(keys[3], minval=0.5, maxval=0.98),
        "bias": 0.3 * jax.random.normal(keys[4], (6,)),
    }
    return jnp.zeros(SIZE), lam, data


def _graph(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
    return jnp.tanh(data["adjacency"] @ (w @ lam["mix"]) + data["features"] @ lam["input"])


def _make_graph(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    keys = jax.random.split(key, 6)
    nodes, channels = 12, 3
    edges = (jax.random.uniform(keys[0], (nodes, nodes)) < 0.3).astype(float) + jnp.eye(nodes)
    mix = jax.random.normal(keys[1], (channels, channels))
    data = {
        "adjacency": edges / jnp.linalg.norm(edges, 2),
        "features": jax.random.normal(keys[2], (nodes, 5)),
        "target": jax.random.normal(keys[3], (nodes, channels)),
    }
    lam = {
        "mix": 0.95 * mix / jnp.linalg.norm(mix, 2),
        "input": 0.3 * jax.random.normal(keys[4], (5, channels)),
    }
    return jnp.zeros((nodes, channels)), lam, data


def _poisson_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    eta = data["x"] @ w
    return jnp.mean(jnp.exp(eta) - data["y"] * eta) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def _poisson_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    del lam
    eta = data["x2"] @ w
    return jnp.mean(jnp.exp(eta) - data["y2"] * eta)


def _make_poisson(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key)
    data |= {name: 0.4 * data[name] for name in ("x", "x2")}
    keys = jax.random.split(jax.random.fold_in(key, 1))
    data["y"], data["y2"] = (
        jax.random.poisson(k, jnp.exp(jnp.clip(0.2 * data[name], -3.0, 3.0))).astype(float)
        for k, name in zip(keys, ("y", "y2"), strict=True)
    )
    lam = jax.random.uniform(jax.random.fold_in(key, 2), (SIZE,), minval=-4.0, maxval=0.0)
    data["step"] = 0.2 / jnp.linalg.norm(data["x"].T @ data["x"] / 40 + jnp.diag(jnp.exp(lam)), 2)
    return jnp.zeros(SIZE), lam, data


def _quadratic_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    fit = data["a1"] @ w + data["a2"] @ lam - data["b1"]
    return 0.5 * jnp.sum(fit**2)


def _quadratic_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((data["a3"] @ w + data["a4"] @ lam - data["b2"]) ** 2)


def make_quadratic(
    key: jax.Array, rows: int = SIZE, size: int = 10, spread: float = 1.0
) -> tuple[PyTree, PyTree, PyTree]:
    """Two linear least-squares problems, as in section 4.1 of Ehrhardt and Roberts.

    Args:
        key: A PRNG key.
        rows: Their n.
        size: Their d.
        spread: Columns of A₁ are scaled by powers of ten from 1 down to 10^−spread.
    """
    keys = jax.random.split(key, 7)
    scale = jnp.logspace(0.0, -spread, size)
    a1 = jax.random.uniform(keys[0], (rows, size)) * scale[None]
    data = {
        "a1": a1,
        "a2": jax.random.uniform(keys[1], (rows, size)),
        "a3": jax.random.uniform(keys[2], (rows, size)),
        "a4": jax.random.uniform(keys[3], (rows, size)),
        "b1": jax.random.uniform(keys[4], (rows,)),
        "b2": jax.random.uniform(keys[5], (rows,)),
    }
    spectrum = jnp.linalg.eigvalsh(a1.T @ a1)
    data["step"], _ = fg.optimal_step_size(spectrum[-1], spectrum[0])
    return jnp.zeros(size), jax.random.uniform(keys[6], (size,)), data


def _lasso(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    u = w - data["step"] * (data["x"].T @ (data["x"] @ w - data["y"]) + 0.1 * w)
    threshold = data["step"] * jnp.exp(lam)
    return jnp.sign(u) * jnp.maximum(jnp.abs(u) - threshold, 0.0)


def _make_lasso(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key)
    lam = jax.random.uniform(jax.random.fold_in(key, 1), (SIZE,), minval=0.0, maxval=4.0)
    data["step"] = 1 / (jnp.linalg.norm(data["x"], 2) ** 2 + 0.1)
    return jnp.zeros(SIZE), lam, data


def _non_negative(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    gradient = data["x"].T @ (data["x"] @ w - data["y"]) + jnp.exp(lam) * w
    return jnp.maximum(w - data["step"] * gradient, 0.0)


def _make_non_negative(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key)
    lam = jax.random.uniform(jax.random.fold_in(key, 1), (SIZE,), minval=-1.0, maxval=2.0)
    data["step"] = 1 / (jnp.linalg.norm(data["x"], 2) ** 2 + jnp.exp(lam).max())
    return jnp.zeros(SIZE), lam, data


_HIDDEN, _INPUTS = 5, 4


def _network(w: jax.Array, x: jax.Array) -> jax.Array:
    cut = _INPUTS * _HIDDEN
    first, bias, last = w[:cut].reshape(_INPUTS, _HIDDEN), w[cut : cut + _HIDDEN], w[-_HIDDEN:]
    return jnp.tanh(x @ first + bias[None]) @ last


def _network_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    return 0.5 * jnp.mean((_network(w, data["x"]) - data["y"]) ** 2) + 0.5 * jnp.sum(
        jnp.exp(lam) * w**2
    )


def _network_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    del lam
    return 0.5 * jnp.mean((_network(w, data["x2"]) - data["y2"]) ** 2)


def _make_network(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key, features=_INPUTS)
    data |= {"y": jnp.sin(data["y"]), "y2": jnp.sin(data["y2"])}
    size = _HIDDEN * (_INPUTS + 2)
    keys = jax.random.split(jax.random.fold_in(key, 1))
    lam = jax.random.uniform(keys[0], (size,), minval=-5.0, maxval=-3.0)
    data["step"] = jnp.asarray(0.3)
    return 0.7 * jax.random.normal(keys[1], (size,)), lam, data


_CLASSES = 4


def _softmax_loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    scores = data["x"] @ w
    fit = jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.sum(data["labels"] * scores, axis=1))
    return fit + 0.5 * jnp.sum(jnp.exp(lam) * jnp.sum(w**2, axis=1))


def _softmax_outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
    del lam
    scores = data["x2"] @ w
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.sum(data["labels2"] * scores, axis=1))


def _make_softmax(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    data = _regression(key, features=10)
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    for name, k in zip(("labels", "labels2"), keys[:2], strict=True):
        data[name] = jax.nn.one_hot(jax.random.randint(k, (40,), 0, _CLASSES), _CLASSES)
    lam = jax.random.uniform(keys[2], (10,), minval=-7.0, maxval=-3.0)
    big = jnp.linalg.norm(data["x"], 2) ** 2 / 80 + jnp.exp(lam).max()
    data["step"], _ = fg.optimal_step_size(big, jnp.exp(lam).min())
    return jnp.zeros((10, _CLASSES)), lam, data


_STEPS = (3, 10, 30, 100, 300)

FAMILIES = (
    Family(
        "logistic regression",
        _make_logistic,
        _descent(_logistic_loss),
        _logistic_outer,
        (10, 30, 100, 300, 2000),
        (3, 30, 300),
        True,
    ),
    Family(
        "heavy-ball map",
        _make_heavy_ball,
        _heavy_ball,
        lambda w, lam, data: _logistic_outer(w[0], lam, data),
        _STEPS,
        (3, 30, 300),
        False,
    ),
    Family(
        "kernel ridge",
        _make_kernel,
        _descent(_kernel_loss),
        _kernel_outer,
        (10, 100, 1000, 10_000),
        (10, 100, 3000),
        True,
    ),
    Family(
        "biased regularisation",
        _make_biased,
        _descent(_biased_loss),
        _squares_outer,
        _STEPS,
        (3, 30, 300),
        True,
    ),
    Family(
        "hyper-representation",
        _make_representation,
        _descent(_representation_loss),
        _representation_outer,
        (10, 100, 500, 3000),
        (10, 100, 3000),
        True,
    ),
    Family(
        "tanh equilibrium",
        _make_equilibrium,
        _equilibrium,
        _target_outer,
        (2, 4, 8, 16, 32),
        (2, 6, 20),
        False,
    ),
    Family(
        "graph equilibrium",
        _make_graph,
        _graph,
        _target_outer,
        (2, 4, 8, 16, 32),
        (2, 6, 20),
        False,
    ),
    Family(
        "Poisson regression",
        _make_poisson,
        _descent(_poisson_loss),
        _poisson_outer,
        (10, 100, 500, 2000),
        (10, 100, 1000),
        True,
    ),
    Family(
        "softmax regression",
        _make_softmax,
        _descent(_softmax_loss),
        _softmax_outer,
        (10, 100, 1000, 5000),
        (10, 100, 1000),
        True,
    ),
    Family(
        "quadratic",
        make_quadratic,
        _descent(_quadratic_loss),
        _quadratic_outer,
        (30, 300, 3000, 10_000),
        (10, 100, 3000),
        True,
    ),
    Family(
        "non-convex network",
        _make_network,
        _descent(_network_loss),
        _network_outer,
        (300, 3000, 6000, 10_000, 14_000),
        (10, 100, 1000),
        True,
        convex=False,
    ),
    Family(
        "elastic net (kinks)",
        _make_lasso,
        _lasso,
        _squares_outer,
        (10, 30, 100, 1000),
        (10, 100, 1000),
        False,
        smooth=False,
    ),
    Family(
        "non-negative least squares (kinks)",
        _make_non_negative,
        _non_negative,
        _squares_outer,
        (10, 30, 100, 1000),
        (10, 100, 1000),
        False,
        smooth=False,
    ),
)


def iterate(family: Family, w: PyTree, lam: PyTree, data: PyTree, steps: Any) -> PyTree:
    """That many steps of Φ, a traced number of them if need be."""
    return lax.fori_loop(0, steps, lambda _, w: family.phi(w, lam, data), w)


class Truth(NamedTuple):
    """The fixed point, v, the hypergradient, and the relative residual of the fixed point."""

    w: PyTree
    v: PyTree
    gradient: PyTree
    residual: jax.Array
    definite: jax.Array


def truth(
    family: Family, w0: PyTree, lam: PyTree, data: PyTree, steps: int, newton: int = 12
) -> Truth:
    """∇f by dense algebra: many steps of Φ, then Newton steps by LU, then one transposed solve."""
    flat, unravel = ravel_pytree(iterate(family, w0, lam, data, steps))

    def phi(u: jax.Array, lam: PyTree) -> jax.Array:
        return ravel_pytree(family.phi(unravel(u), lam, data))[0]

    eye = jnp.eye(flat.size)

    def step(_: Any, u: jax.Array) -> jax.Array:
        a = eye - jax.jacfwd(phi)(u, lam)
        return u - jnp.linalg.solve(a, u - phi(u, lam))

    flat = lax.fori_loop(0, newton, step, flat)
    jacobian = jax.jacfwd(phi)(flat, lam)
    b, direct = jax.grad(lambda u, lam: family.outer(unravel(u), lam, data), argnums=(0, 1))(
        flat, lam
    )
    v = jnp.linalg.solve(eye - jacobian.T, b)
    cotangent = jax.vjp(lambda lam: phi(flat, lam), lam)[1](v)[0]
    gradient = jax.tree.map(jnp.add, direct, cotangent)
    residual = jnp.linalg.norm(flat - phi(flat, lam)) / jnp.maximum(jnp.linalg.norm(flat), 1e-300)
    spectral = jnp.max(jnp.abs(jnp.linalg.eigvals(jacobian)))
    return Truth(unravel(flat), unravel(v), gradient, residual, spectral < 1)


def single(tree: PyTree) -> PyTree:
    """The same arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def double(tree: PyTree) -> PyTree:
    """The same arrays in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def log_grid(start: int, stop: int, count: int) -> list[int]:
    """About `count` different integers, evenly spaced in logarithm."""
    ratio = (stop / start) ** (1 / max(count - 1, 1))
    return sorted({math.ceil(start * ratio**i - 1e-9) for i in range(count)})
