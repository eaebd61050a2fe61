"""Problems of a given size and condition number, with the hypergradient by dense algebra.

    LR, Poisson   w = argmin mean ψ(x_iᵀw, y_i) + ½ Σ exp(λ_j) w_j²
    KRR           w = argmin ½ wᵀ(K(γ) + βI)w − wᵀy,            λ = (log β, log γ)
    BR            w = argmin ½‖Xw − y‖²/n + β/2 ‖w − λ‖²
    HR            w = argmin ½‖XHw − y‖²/n + β/2 ‖w‖²,          λ = H
    tanh, graph   w = tanh(s·Mw + Ub),  W = tanh(ÂWM + Zb),     λ = (s, b), (M, b)

E is the loss on other data. Each instance is a value: its functions take all arrays as arguments, so
that no contestant has its data compiled in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

PyTree = Any


class Instance(NamedTuple):
    """A bilevel problem: w(θ) with θ = prepare(λ, data), made once for each λ as a user would.

    Attributes:
        name: Its name in tables.
        w0: The start.
        lam: λ.
        data: Arrays that λ does not change.
        prepare: `prepare(lam, data) -> theta`; a kernel matrix, or λ itself.
        loss: `loss(w, theta, data)`, which w(θ) minimises; `None` for an equilibrium.
        phi: `phi(w, theta, data) -> w`.
        outer: `outer(w, theta, data) -> scalar`.
    """

    name: str
    w0: PyTree
    lam: PyTree
    data: dict[str, Any]
    prepare: Callable[[PyTree, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree, PyTree], jax.Array] | None
    phi: Callable[[PyTree, PyTree, PyTree], PyTree]
    outer: Callable[[PyTree, PyTree, PyTree], jax.Array]

    @property
    def symmetric(self) -> bool:
        """Whether J is symmetric."""
        return self.loss is not None

    @property
    def size(self) -> int:
        """The number of unknowns, d."""
        return sum(x.size for x in jax.tree.leaves(self.w0))

    def single(self) -> "Instance":
        """The same in float32."""
        w0, lam, data = jax.tree.map(
            lambda x: x.astype(jnp.float32), (self.w0, self.lam, self.data)
        )
        return self._replace(w0=w0, lam=lam, data=data)


def _plain(lam: PyTree, data: PyTree) -> PyTree:
    del data
    return lam


def _minimised(
    name: str,
    lam: PyTree,
    data: dict[str, Any],
    loss: Callable[..., jax.Array],
    outer: Callable[..., jax.Array],
    curvature: float,
    size: int,
    prepare: Callable[..., PyTree] = _plain,
) -> Instance:
    """The instance of a loss whose largest curvature is at most `curvature`."""

    def phi(w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return w - data["step"] * jax.grad(loss)(w, theta, data)

    arrays = {key: jnp.asarray(x) for key, x in (data | {"step": 1 / curvature}).items()}
    w0, lam = jnp.zeros(size), jax.tree.map(jnp.asarray, lam)
    return Instance(name, w0, lam, arrays, prepare, loss, phi, outer)


def _ill_conditioned(rng: np.random.Generator, n: int, d: int, kappa: float) -> np.ndarray:
    """X with singular values √n geomspaced from 1 to κ^(−½)."""
    u, _, v = np.linalg.svd(rng.normal(size=(n, d)), full_matrices=False)
    return (u * np.geomspace(1.0, kappa**-0.5, d) * np.sqrt(n)) @ v


def logistic_regression(n: int, d: int, kappa: float, seed: int = 0) -> Instance:
    """LR with one regulariser for each feature, of about 1/κ."""
    rng = np.random.default_rng(seed)
    x = _ill_conditioned(rng, n, d, kappa)
    y = np.sign(x @ rng.normal(size=d) * 3 + 0.3 * rng.normal(size=n))
    lam = np.log(rng.uniform(0.5, 1.5, size=d) / kappa)
    data = {"x": x, "y": y, "x2": rng.normal(size=(n, d)), "y2": np.sign(rng.normal(size=n))}

    def loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        fit = jnp.mean(jnp.logaddexp(0.0, -data["y"] * (data["x"] @ w)))
        return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        del lam
        return jnp.mean(jnp.logaddexp(0.0, -data["y2"] * (data["x2"] @ w)))

    curvature = 0.25 + float(np.exp(lam.max()))
    return _minimised(f"LR {n} × {d}, κ = {kappa:.0e}", lam, data, loss, outer, curvature, d)


def poisson_regression(n: int, d: int, kappa: float, seed: int = 0) -> Instance:
    """Poisson regression: no bound on the curvature, as exp(xᵀw) has none."""
    rng = np.random.default_rng(seed)
    x = 0.5 * _ill_conditioned(rng, n, d, kappa)
    truth = rng.normal(size=d)
    y = rng.poisson(np.exp(np.clip(x @ truth / np.linalg.norm(x @ truth) * np.sqrt(n), -3, 3)))
    lam = np.log(rng.uniform(0.5, 1.5, size=d) / kappa)
    data = {"x": x, "y": y.astype(float), "x2": x[::-1] * rng.choice([-1.0, 1.0], size=d)}
    data["y2"] = rng.poisson(1.0, size=n).astype(float)

    def deviance(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        eta = x @ w
        return jnp.mean(jnp.exp(eta) - y * eta)

    def loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        return deviance(w, data["x"], data["y"]) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        del lam
        return deviance(w, data["x2"], data["y2"])

    curvature = 4 * 0.25 + float(np.exp(lam.max()))
    return _minimised(f"Poisson {n} × {d}, κ = {kappa:.0e}", lam, data, loss, outer, curvature, d)


def kernel_ridge_regression(n: int, kappa: float, seed: int = 0) -> Instance:
    """KRR on 5 features; β is the largest eigenvalue of K over κ. Kernels are made once for each λ."""
    rng = np.random.default_rng(seed)
    x, x2, truth = rng.normal(size=(n, 5)), rng.normal(size=(n, 5)), rng.normal(size=5)
    data = {
        "x": x,
        "y": np.sin(x @ truth) + 0.1 * rng.normal(size=n),
        "x2": x2,
        "y2": np.sin(x2 @ truth),
    }

    def kernel(x: Any, z: Any, gamma: Any) -> jax.Array:
        return jnp.exp(-jnp.sum(gamma * (x[:, None] - z[None]) ** 2, axis=-1))

    gamma = np.full(5, 0.1)
    largest = float(np.linalg.norm(np.asarray(kernel(x, x, gamma)), 2))

    def prepare(lam: PyTree, data: PyTree) -> PyTree:
        gamma = jnp.exp(lam["gamma"])
        return {
            "beta": jnp.exp(lam["beta"]),
            "k": kernel(data["x"], data["x"], gamma),
            "k2": kernel(data["x2"], data["x"], gamma),
        }

    def loss(w: jax.Array, theta: PyTree, data: PyTree) -> jax.Array:
        return 0.5 * w @ (theta["k"] @ w + theta["beta"] * w) - w @ data["y"]

    def outer(w: jax.Array, theta: PyTree, data: PyTree) -> jax.Array:
        return 0.5 * jnp.mean((theta["k2"] @ w - data["y2"]) ** 2)

    lam = {"beta": np.log(largest / kappa), "gamma": np.log(gamma)}
    name, curvature = f"KRR {n}, κ = {kappa:.0e}", largest * (1 + 1 / kappa)
    return _minimised(name, lam, data, loss, outer, curvature, n, prepare)


def biased_regularization(n: int, d: int, kappa: float, seed: int = 0) -> Instance:
    """BR: Φ is affine in w and in λ."""
    rng = np.random.default_rng(seed)
    x, truth = _ill_conditioned(rng, n, d, 100 * kappa), rng.normal(size=d)
    x2 = rng.normal(size=(n, d))
    data = {"x": x, "y": x @ truth + 0.1 * rng.normal(size=n), "x2": x2, "y2": x2 @ truth}
    data["beta"] = np.asarray(1 / kappa)

    def loss(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        fit = 0.5 * jnp.mean((data["x"] @ w - data["y"]) ** 2)
        return fit + 0.5 * data["beta"] * jnp.sum((w - lam) ** 2)

    def outer(w: jax.Array, lam: jax.Array, data: PyTree) -> jax.Array:
        del lam
        return 0.5 * jnp.mean((data["x2"] @ w - data["y2"]) ** 2)

    lam = rng.normal(size=d)
    name = f"BR {n} × {d}, κ = {kappa:.0e}"
    return _minimised(name, lam, data, loss, outer, 1 + 1 / kappa, d)


def hyper_representation(n: int, p: int, d: int, kappa: float, seed: int = 0) -> Instance:
    """HR: λ = H, a p × d matrix; β = ‖XH‖²/(nκ)."""
    rng = np.random.default_rng(seed)
    x, h, truth = rng.normal(size=(n, p)), rng.normal(size=(p, d)) / np.sqrt(p), rng.normal(size=p)
    x2, largest = rng.normal(size=(n, p)), np.linalg.norm(x @ h, 2) ** 2 / n
    data = {"x": x, "y": x @ truth, "x2": x2, "y2": x2 @ truth, "beta": np.asarray(largest / kappa)}

    def loss(w: jax.Array, h: jax.Array, data: PyTree) -> jax.Array:
        fit = 0.5 * jnp.mean((data["x"] @ (h @ w) - data["y"]) ** 2)
        return fit + 0.5 * data["beta"] * jnp.sum(w**2)

    def outer(w: jax.Array, h: jax.Array, data: PyTree) -> jax.Array:
        return 0.5 * jnp.mean((data["x2"] @ (h @ w) - data["y2"]) ** 2)

    name = f"HR {n} × {d}, κ = {kappa:.0e}"
    return _minimised(name, h, data, loss, outer, float(largest * (1 + 1 / kappa)), d)


def tanh_equilibrium(size: int, rho: float, seed: int = 0) -> Instance:
    """The solution of w = tanh(s M w + U b) with ‖sM‖ = ρ and M not symmetric."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(size, size))
    data = {
        "matrix": matrix / np.linalg.norm(matrix, 2),
        "inputs": rng.normal(size=(size, 6)),
        "target": rng.normal(size=size),
    }
    lam = {"scale": np.asarray(rho), "bias": 0.3 * rng.normal(size=6)}

    def phi(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
        return jnp.tanh(lam["scale"] * (data["matrix"] @ w) + data["inputs"] @ lam["bias"])

    return _equilibrium(f"tanh {size}, ρ = {rho:g}", jnp.zeros(size), lam, data, phi)


def graph_equilibrium(nodes: int, channels: int, rho: float, seed: int = 0) -> Instance:
    """The solution of W = tanh(Â W M + Z B), with 5 % of all edges, ‖Â‖ = 1 and ‖M‖ = ρ."""
    rng = np.random.default_rng(seed)
    edges = (rng.uniform(size=(nodes, nodes)) < 0.05).astype(float) + np.eye(nodes)
    mix = rng.normal(size=(channels, channels))
    data = {
        "adjacency": edges / np.linalg.norm(edges, 2),
        "features": rng.normal(size=(nodes, 5)),
        "target": rng.normal(size=(nodes, channels)),
    }
    lam = {
        "mix": rho * mix / np.linalg.norm(mix, 2),
        "input": 0.3 * rng.normal(size=(5, channels)),
    }

    def phi(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
        return jnp.tanh(data["adjacency"] @ (w @ lam["mix"]) + data["features"] @ lam["input"])

    w0 = jnp.zeros((nodes, channels))
    return _equilibrium(f"graph {nodes} × {channels}, ρ = {rho:g}", w0, lam, data, phi)


def _equilibrium(
    name: str, w0: jax.Array, lam: PyTree, data: PyTree, phi: Callable[..., jax.Array]
) -> Instance:
    def outer(w: jax.Array, lam: PyTree, data: PyTree) -> jax.Array:
        del lam
        return 0.5 * jnp.mean((w - data["target"]) ** 2)

    lam, data = jax.tree.map(jnp.asarray, (lam, data))
    return Instance(name, w0, lam, data, _plain, None, phi, outer)


class Exact(NamedTuple):
    """f(λ) and ∇f(λ)."""

    value: jax.Array
    gradient: PyTree


def exact_hypergradient(instance: Instance) -> PyTree:
    """∇f(λ) by dense algebra."""
    return exact(instance, instance.lam).gradient


def exact(instance: Instance, lam: PyTree) -> Exact:
    """The values of f and ∇f at λ, by damped Newton steps and LU factors of I − J.

    Raises:
        RuntimeError: Newton's method left a residual.
    """
    flat, unravel = ravel_pytree(instance.w0)

    @jax.jit
    def solved(lam: PyTree, data: PyTree) -> tuple[Exact, jax.Array]:
        theta = instance.prepare(lam, data)

        def residual(u: jax.Array, theta: PyTree) -> jax.Array:
            return u - ravel_pytree(instance.phi(unravel(u), theta, data))[0]

        def newton(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            i, u, _ = carry
            e = jnp.linalg.solve(jax.jacfwd(residual)(u, theta), residual(u, theta))
            steps = 0.5 ** jnp.arange(8.0)
            sizes = lax.map(lambda a: jnp.linalg.norm(residual(u - a * e, theta)), steps)
            best = jnp.argmin(jnp.where(jnp.isfinite(sizes), sizes, jnp.inf))
            return i + 1, u - steps[best] * e, sizes[best] / jnp.linalg.norm(u)

        start = jnp.int32(0), flat, jnp.asarray(jnp.inf)
        unfinished = lambda carry: (carry[2] > 1e-14) & (carry[0] < 40)  # noqa: E731
        _, u, left = lax.while_loop(unfinished, newton, start)
        value, (b, direct) = jax.value_and_grad(
            lambda u, theta: instance.outer(unravel(u), theta, data), argnums=(0, 1)
        )(u, theta)
        v = jnp.linalg.solve(jax.jacfwd(residual)(u, theta).T, b)
        cotangent = jax.vjp(lambda theta: residual(u, theta), theta)[1](-v)[0]
        theta_bar = jax.tree.map(jnp.add, direct, cotangent)
        lam_bar = jax.vjp(lambda lam: instance.prepare(lam, data), lam)[1](theta_bar)[0]
        return Exact(value, lam_bar), left

    found, left = solved(lam, instance.data)
    if not left < 1e-9:
        raise RuntimeError(f"{instance.name}: Newton's method left a residual of {left:.1e}.")
    return found


def relative_error(gradient: PyTree, exact: PyTree) -> float:
    """‖g − ∇f‖/‖∇f‖ over all leaves, in double precision whatever JAX is set to."""
    pairs = [
        (np.asarray(g, np.float64), np.asarray(e, np.float64))
        for g, e in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True)
    ]
    error = sum(np.sum((g - e) ** 2) for g, e in pairs)
    return float(np.sqrt(error / sum(np.sum(e**2) for _, e in pairs)))


def accuracy_instances(scale: str) -> list[Instance]:
    """What `accuracy` runs on: "quick", "default" or "full"."""
    if scale == "quick":
        return [logistic_regression(100, 20, 1e2), tanh_equilibrium(50, 0.9)]
    made = [
        logistic_regression(100, 20, 1e2),
        logistic_regression(500, 50, 1e2),
        logistic_regression(500, 50, 1e4),
        logistic_regression(2000, 500, 1e2),
        logistic_regression(2000, 500, 1e4),
        kernel_ridge_regression(400, 1e4),
        biased_regularization(1000, 200, 1e2),
        biased_regularization(1000, 200, 1e4),
        hyper_representation(500, 100, 40, 1e2),
        poisson_regression(1000, 200, 1e2),
        tanh_equilibrium(100, 0.9),
        tanh_equilibrium(400, 0.99),
        graph_equilibrium(50, 8, 0.95),
    ]
    if scale == "full":
        made += [
            logistic_regression(4000, 2000, 1e2),
            logistic_regression(4000, 2000, 1e4),
            kernel_ridge_regression(100, 1e2),
            kernel_ridge_regression(1000, 1e2),
            biased_regularization(100, 20, 1e2),
            biased_regularization(4000, 2000, 1e4),
            hyper_representation(1000, 400, 200, 1e4),
            poisson_regression(500, 50, 1e4),
            poisson_regression(2000, 500, 1e2),
            tanh_equilibrium(20, 0.99),
            tanh_equilibrium(2000, 0.99),
            graph_equilibrium(200, 10, 0.99),
        ]
    return made
