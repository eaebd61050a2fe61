"""The tables behind the tests: `PROBLEMS`, `LOWER_SOLVERS`, `LINEAR_SOLVERS`, `ESTIMATORS`.

A new problem, solver or estimator joins every test by one row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

import fixedgrad as fg

PyTree = Any


class Problem(NamedTuple):
    """w = Φ(w, λ) with a closed form.

    `q` is the rate at which wᵢ₊₁ = Φ(wᵢ, λ) converges, the spectral radius of J or a bound for it;
    `symmetric` says that J is symmetric as a real linear map, so that CG applies.
    """

    name: str
    phi: Callable[..., PyTree]
    solution: Callable[[PyTree], PyTree]
    lam: PyTree
    w0: PyTree
    q: float
    symmetric: bool
    affine: bool
    outer: Callable[..., jax.Array]

    @property
    def num_steps(self) -> int:
        """Iterations that bring any of these problems from w0 to rounding in float64."""
        return math.ceil(math.log(1e-19) / math.log(self.q))

    @property
    def eps(self) -> float:
        """The coarsest resolution among the dtypes of w and λ."""
        return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves((self.w0, self.lam)))

    def gradient(self, lam: PyTree | None = None) -> PyTree:
        """∇f(λ) through the closed form."""
        return _gradient(self.outer, self.solution)(self.lam if lam is None else lam)


@functools.cache
def _gradient(outer: Callable[..., jax.Array], solution: Callable[[PyTree], PyTree]) -> Any:
    return jax.jit(jax.grad(lambda lam: outer(solution(lam), lam)))


class LinearRow(NamedTuple):
    """A configured linear solver.

    `accuracy` bounds its relative error where that is not rounding; `everywhere` says that its
    estimator meets every problem, and not, as one more setting of the same method, a few of them.
    """

    name: str
    solver: fg.LinearSolver
    symmetric_only: bool = False
    accuracy: float = 0.0
    everywhere: bool = False


class LowerRow(NamedTuple):
    """A lower-level solver with a tolerance, `make(phi, max_steps=, rtol=, atol=)`.

    `steps` says that it needs no more than that many on any of these problems.
    """

    name: str
    make: Callable[..., fg.CheckedSolver]
    steps: int


class EstimatorRow(NamedTuple):
    """A configured estimator, exact up to `accuracy` and rounding at a converged w.

    `rule` says that it stands for its rule of differentiation in tests where a linear solver makes no
    difference: what arguments may be, what is traced and how often, what fails.
    """

    name: str
    estimator: fg.Estimator
    symmetric_only: bool = False
    accuracy: float = 0.0
    everywhere: bool = False
    rule: bool = False


def named(row: Any) -> str:
    """The test id of a row."""
    return row.name.replace(" ", "-")


def like(constant: Any, x: jax.Array) -> jax.Array:
    """A constant in the dtype of `x`, so that a problem can be cast to another precision."""
    return jnp.asarray(constant).astype(x.dtype)


def matrix(
    seed: int, spectral_norm: float, *shape: int, symmetric: bool = False, is_complex: bool = False
) -> np.ndarray:
    """A fixed dense matrix of the given spectral norm."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape)
    if is_complex:
        a = a + 1j * rng.normal(size=shape)
    if symmetric:
        a = a + a.conj().T
    return spectral_norm * a / np.linalg.norm(a, 2)


def to_single(tree: PyTree) -> PyTree:
    """The pytree of inexact arrays in float32 and complex64."""
    return jax.tree.map(
        lambda x: x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32), tree
    )


def single(problem: Problem) -> Problem:
    """The problem in float32 or complex64."""
    return problem._replace(lam=to_single(problem.lam), w0=to_single(problem.w0))


def outer(w: PyTree, lam: PyTree) -> jax.Array:
    """½‖w‖² + Σ Re(c w) + ⅕‖λ‖², with different weights c for the entries of w."""

    def squares(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.real(x) ** 2 + jnp.imag(x) ** 2)

    def weighted(x: jax.Array) -> jax.Array:
        c = jnp.cos(jnp.arange(x.size, dtype=x.real.dtype)).reshape(x.shape)
        return jnp.sum(c * jnp.real(x) - c**2 * jnp.imag(x))

    leaves = jax.tree.leaves(w)
    total = [0.5 * squares(x) + weighted(x) for x in leaves]
    total += [0.2 * squares(x) for x in jax.tree.leaves(lam)]
    widest = max((x.dtype for x in total), key=lambda dtype: jnp.finfo(dtype).bits)
    return sum((x.astype(widest) for x in total), jnp.zeros((), widest))


def _affine_symmetric() -> Problem:
    a, b = matrix(0, 0.6, 4, 4, symmetric=True), matrix(1, 1.0, 4, 3)

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return like(a, w) @ w + like(b, w) @ lam

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(like(np.eye(4) - a, lam), like(b, lam) @ lam)

    lam = jnp.array([1.0, -0.5, 2.0])
    return Problem("affine symmetric", phi, solution, lam, jnp.zeros(4), 0.6, True, True, outer)


def _affine_non_symmetric() -> Problem:
    # λ is in J too: λ₀ scales the matrix.
    a, b = matrix(2, 0.7, 4, 4), matrix(3, 1.0, 4, 3)

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return lam[0] * (like(a, w) @ w) + like(b, w) @ lam

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(like(np.eye(4), lam) - lam[0] * like(a, lam), like(b, lam) @ lam)

    lam = jnp.array([0.8, -0.5, 2.0])
    return Problem("affine non-symmetric", phi, solution, lam, jnp.ones(4), 0.6, False, True, outer)


def _ridge() -> Problem:
    # Gradient descent on ½‖Xw − y‖² + ½ Σ exp(λᵢ) wᵢ².
    x, y = matrix(4, 1.0, 6, 4), np.cos(np.arange(6.0))
    lam = jnp.array([-1.0, 0.0, -0.5, 0.3])

    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        fit = like(x, w) @ w - like(y, w)
        return 0.5 * jnp.sum(fit**2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(
            like(x.T @ x, lam) + jnp.diag(jnp.exp(lam)), like(x.T, lam) @ like(y, lam)
        )

    curvatures = np.linalg.eigvalsh(x.T @ x + np.diag(np.exp(lam)))
    step_size, q = fg.optimal_step_size(curvatures[-1], curvatures[0])
    phi = fg.gradient_descent(loss, step_size=step_size)
    return Problem("ridge", phi, solution, lam, jnp.zeros(4), float(q), True, True, outer)


def _square_root() -> Problem:
    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return w - 0.25 * (w**2 - lam)

    lam = jnp.array([1.0, 2.0, 3.5])
    return Problem("square root", phi, jnp.sqrt, lam, jnp.ones(3), 0.5, True, False, outer)


def _conjugated() -> Problem:
    # z = A z + Bλ in the coordinates w = sinh z: dense, not symmetric, not linear. J is similar to A.
    a, b = matrix(5, 0.5, 3, 3), matrix(6, 1.0, 3, 2)

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.sinh(like(a, w) @ jnp.arcsinh(w) + like(b, w) @ lam)

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.sinh(jnp.linalg.solve(like(np.eye(3) - a, lam), like(b, lam) @ lam))

    lam = jnp.array([0.7, -1.1])
    return Problem("nonlinear", phi, solution, lam, jnp.zeros(3), 0.5, False, False, outer)


def _pytree() -> Problem:
    w0 = {"a": jnp.zeros(3), "b": [jnp.zeros(()), jnp.zeros((2, 2))]}
    _, unravel = ravel_pytree(w0)
    a = matrix(7, 0.8, 8, 8, symmetric=True)

    def phi(w: PyTree, lam: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(w)
        mixed = lam["rate"] * (like(a, flat) @ flat)
        return jax.tree.map(jnp.add, unravel(mixed), lam["drift"])

    def solution(lam: PyTree) -> PyTree:
        drift, unravel = ravel_pytree(lam["drift"])
        return unravel(
            jnp.linalg.solve(like(np.eye(8), drift) - lam["rate"] * like(a, drift), drift)
        )

    lam = {"drift": unravel(jnp.cos(jnp.arange(8.0))), "rate": jnp.asarray(0.7)}
    return Problem("pytree", phi, solution, lam, w0, 0.6, True, True, outer)


def _mixed_dtypes() -> Problem:
    # (h, d) ← (.3 h + .2 d + p, .2 h + .4 d + r) with h, p in float32 and d, r in float64.
    def phi(w: PyTree, lam: PyTree) -> PyTree:
        h, d = w["single"], w["double"]
        return {
            "single": 0.3 * h + 0.2 * d.astype(h.dtype) + lam["single"],
            "double": 0.2 * h.astype(d.dtype) + 0.4 * d + lam["double"],
        }

    def solution(lam: PyTree) -> PyTree:
        p, r = lam["single"].astype(lam["double"].dtype), lam["double"]
        h, d = (0.6 * p + 0.2 * r) / 0.38, (0.2 * p + 0.7 * r) / 0.38
        return {"single": h.astype(lam["single"].dtype), "double": d}

    lam = {"single": jnp.array([1.0, -2.0], jnp.float32), "double": jnp.array([0.5, 3.0])}
    w0 = {"single": jnp.zeros(2, jnp.float32), "double": jnp.zeros(2)}
    return Problem("mixed dtypes", phi, solution, lam, w0, 0.6, True, True, outer)


def _hermitian() -> Problem:
    a = matrix(8, 0.6, 3, 3, symmetric=True, is_complex=True)

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return like(a, w) @ w + lam

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(like(np.eye(3) - a, lam), lam)

    lam = jnp.array([1.0 + 2.0j, -0.5j, 0.7])
    w0 = jnp.zeros(3, complex)
    return Problem("complex Hermitian", phi, solution, lam, w0, 0.6, True, True, outer)


def _holomorphic() -> Problem:
    a = matrix(9, 0.4, 3, 3, is_complex=True)

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return lam[0] * (like(a, w) @ w) + lam

    def solution(lam: jax.Array) -> jax.Array:
        return jnp.linalg.solve(like(np.eye(3), lam) - lam[0] * like(a, lam), lam)

    lam = jnp.array([0.8 + 0.9j, -0.5j, 0.7])
    w0 = jnp.zeros(3, complex)
    return Problem("complex holomorphic", phi, solution, lam, w0, 0.5, False, True, outer)


def _non_holomorphic() -> Problem:
    # w = a w + c w̄ + λ, entry by entry: ((1 − ā) λ + c λ̄) / (|1 − a|² − |c|²).
    a, c = np.array([0.3 + 0.2j, -0.1 + 0.3j]), np.array([0.1 - 0.2j, 0.25 + 0.05j])

    def phi(w: jax.Array, lam: jax.Array) -> jax.Array:
        return like(a, w) * w + like(c, w) * jnp.conj(w) + lam

    def solution(lam: jax.Array) -> jax.Array:
        scale = 1 / (abs(1 - a) ** 2 - abs(c) ** 2)
        return like(scale * (1 - a.conj()), lam) * lam + like(scale * c, lam) * jnp.conj(lam)

    lam, w0 = jnp.array([1.0 + 2.0j, -0.5j]), jnp.zeros(2, complex)
    return Problem("complex non-holomorphic", phi, solution, lam, w0, 0.6, False, True, outer)


PROBLEMS = (
    _affine_symmetric(),
    _affine_non_symmetric(),
    _ridge(),
    _square_root(),
    _conjugated(),
    _pytree(),
    _mixed_dtypes(),
    _hermitian(),
    _holomorphic(),
    _non_holomorphic(),
)
PROBLEM = {problem.name: problem for problem in PROBLEMS}

LINEAR_SOLVERS = (
    LinearRow("fp num_steps", fg.fp(num_steps=90), everywhere=True),
    LinearRow("fp rtol", fg.fp(max_steps=200, rtol=1e-8), accuracy=1e-7),
    LinearRow("fp atol", fg.fp(max_steps=200, atol=1e-9), accuracy=1e-7),
    LinearRow("cg num_steps", fg.cg(num_steps=10), symmetric_only=True, everywhere=True),
    LinearRow("cg rtol", fg.cg(max_steps=20, rtol=1e-8), symmetric_only=True, accuracy=1e-7),
    LinearRow("cg atol", fg.cg(max_steps=20, atol=1e-9), symmetric_only=True, accuracy=1e-7),
    LinearRow("normal_cg num_steps", fg.normal_cg(num_steps=16), everywhere=True),
    LinearRow("normal_cg rtol", fg.normal_cg(max_steps=40, rtol=1e-8), accuracy=1e-7),
    LinearRow("normal_cg atol", fg.normal_cg(max_steps=40, atol=1e-9), accuracy=1e-7),
    LinearRow("gmres num_steps", fg.gmres(num_steps=8), everywhere=True),
    LinearRow("gmres rtol", fg.gmres(max_steps=24, rtol=1e-8), accuracy=1e-7),
    LinearRow("gmres atol restart", fg.gmres(max_steps=90, atol=1e-9, restart=3), accuracy=1e-7),
    LinearRow("bicgstab num_steps", fg.bicgstab(num_steps=16), everywhere=True),
    LinearRow("bicgstab rtol", fg.bicgstab(max_steps=40, rtol=1e-8), accuracy=1e-7),
    LinearRow("bicgstab atol", fg.bicgstab(max_steps=40, atol=1e-9), accuracy=1e-7),
    LinearRow("dense", fg.dense(), everywhere=True),
    LinearRow("dense blocks", fg.dense(max_size=16, block_size=3)),
    LinearRow(
        "cg nystrom",
        fg.cg(max_steps=20, rtol=1e-8, preconditioner=fg.nystrom(rank=2)),
        symmetric_only=True,
        accuracy=1e-7,
    ),
    LinearRow(
        "cg preconditioned",
        fg.cg(num_steps=10, preconditioner=lambda u: jax.tree.map(lambda x: 1.5 * x, u)),
        symmetric_only=True,
    ),
    LinearRow(
        "normal_cg inverse",
        fg.normal_cg(max_steps=40, rtol=1e-8, preconditioner=fg.inverse(block_size=3)),
        accuracy=1e-7,
    ),
    LinearRow(
        "fp preconditioned",
        fg.fp(
            max_steps=200, rtol=1e-8, preconditioner=lambda u: jax.tree.map(lambda x: 0.9 * x, u)
        ),
        accuracy=1e-7,
    ),
    LinearRow("fp inverse", fg.fp(num_steps=2, preconditioner=fg.inverse(max_size=16))),
    LinearRow("gmres inverse", fg.gmres(num_steps=3, preconditioner=fg.inverse(max_size=16))),
    LinearRow(
        "bicgstab nystrom",
        fg.bicgstab(max_steps=40, rtol=1e-8, preconditioner=fg.nystrom(rank=2, seed=3)),
        accuracy=1e-7,
    ),
    LinearRow(
        "lineax inverse",
        fg.from_lineax(lineax.BiCGStab(1e-10, 1e-10), preconditioner=fg.inverse()),
        accuracy=1e-7,
    ),
    LinearRow("auto", fg.auto()),
    LinearRow(
        "auto by GMRES", fg.auto(at_once=1, max_size=1, max_steps=40, rtol=1e-9), accuracy=1e-8
    ),
    LinearRow("lineax", fg.from_lineax(lineax.BiCGStab(1e-10, 1e-10)), accuracy=1e-7),
)
LINEAR = {row.name: row for row in LINEAR_SOLVERS}

LOWER_SOLVERS = (
    LowerRow("picard", fg.picard, 60),
    LowerRow("picard recursive", functools.partial(fg.picard, checkpoints=fg.recursive()), 60),
    LowerRow("anderson", fg.anderson, 30),
    LowerRow("anderson window", functools.partial(fg.anderson, window=2, regularisation=1e-8), 30),
    LowerRow("broyden", fg.broyden, 30),
    LowerRow("broyden window", functools.partial(fg.broyden, window=2), 40),
    LowerRow("newton", fg.newton, 8),
    LowerRow("newton dense", functools.partial(fg.newton, linear_solver=fg.dense()), 8),
    LowerRow(
        "newton bicgstab",
        functools.partial(fg.newton, linear_solver=fg.bicgstab(max_steps=40, rtol=1e-3)),
        12,
    ),
)

ESTIMATORS = (
    EstimatorRow("itd", fg.itd(), everywhere=True, rule=True),
    EstimatorRow("truncated_itd", fg.truncated_itd(num_steps=90), everywhere=True, rule=True),
    *(
        EstimatorRow(f"aid {name}", fg.aid(solver), symmetric_only, accuracy, everywhere, i == 0)
        for i, (name, solver, symmetric_only, accuracy, everywhere) in enumerate(LINEAR_SOLVERS)
    ),
    EstimatorRow("forward truncated_itd", fg.forward(fg.truncated_itd(num_steps=90)), rule=True),
    *(
        EstimatorRow(
            f"forward aid {name}", fg.forward(fg.aid(solver)), symmetric_only, accuracy, rule=rule
        )
        for (name, solver, symmetric_only, accuracy, _), rule in (
            (LINEAR["fp num_steps"], True),
            (LINEAR["cg rtol"], False),
            (LINEAR["gmres num_steps"], False),
            (LINEAR["dense"], False),
        )
    ),
)
ESTIMATOR = {row.name: row for row in ESTIMATORS}
RULES = tuple(row for row in ESTIMATORS if row.rule)


def solver_of(problem: Problem) -> fg.CheckedSolver:
    """Picard iteration to rounding, in a loop that `itd` can differentiate."""
    return fg.picard(problem.phi, num_steps=problem.num_steps)


def assert_close(got: PyTree, want: PyTree, relative: float) -> None:
    """The same pytree, up to `relative` times the norm of what is wanted."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = jax.tree.map(np.asarray, (got, want))
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    scale = scipy.linalg.norm(np.concatenate([b.ravel() for _, b in pairs]))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * scale)
