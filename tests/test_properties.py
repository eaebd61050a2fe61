"""Random affine maps: the hypergradient equals the closed form, or it is NaN with a code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fixedgrad as fg

SIZE = 3
UNTIL = {"max_steps": 200, "rtol": 1e-10}
LINEAR_SOLVERS = {
    "fp": fg.fp(max_steps=2000, rtol=1e-10),
    "cg": fg.cg(**UNTIL),
    "normal_cg": fg.normal_cg(**UNTIL),
    "gmres": fg.gmres(**UNTIL),
    "gmres of short cycles": fg.gmres(**UNTIL, restart=2),
    "bicgstab": fg.bicgstab(**UNTIL),
    "dense": fg.dense(),
}

# 1 makes I − M singular, 1 − 10⁻⁶ and the like nearly so; beyond ±1 the map expands.
EIGENVALUES = st.one_of(
    st.floats(-0.95, 0.95),
    st.floats(-3.0, 3.0),
    st.sampled_from([0.0, 1.0, -1.0, 1 - 1e-6, 1 - 1e-10, 1 - 1e-13, 1 + 1e-9]),
)
SCALES = st.sampled_from([1e-140, 1e-6, 1.0, 1e6, 1e140])  # Squared beyond double precision.


@st.composite
def maps(draw: Any, eigenvalues: Any = EIGENVALUES, scales: Any = SCALES) -> tuple[Any, Any, bool]:
    """(M, c, whether M is symmetric)."""
    spectrum = np.array([draw(eigenvalues) for _ in range(SIZE)])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    symmetric = draw(st.booleans())
    upper = np.diag(spectrum)
    if not symmetric:  # The same eigenvalues in a Schur form: as far from normal as wanted.
        upper = upper + draw(st.floats(0.1, 2.0)) * np.triu(rng.normal(size=(SIZE, SIZE)), 1)
    return basis @ upper @ basis.T, draw(scales) * rng.normal(size=SIZE), symmetric


@functools.cache
def updated(name: str) -> Any:
    """The compiled update for f(λ) = ⟨c, w⟩ with w = M w + λ; ∇f = (I − Mᵀ)⁻¹ c."""

    def phi(w: jax.Array, lam: jax.Array, m: jax.Array, c: jax.Array) -> jax.Array:
        del c
        return m @ w + lam

    def outer(w: jax.Array, lam: jax.Array, m: jax.Array, c: jax.Array) -> jax.Array:
        del lam, m
        return jnp.vdot(c, w)

    def direct(w0: jax.Array, lam: jax.Array, m: jax.Array, c: jax.Array) -> jax.Array:
        del w0, c
        return jnp.linalg.solve(jnp.eye(SIZE) - m, lam)

    solver = fg.with_tolerance(direct, phi, rtol=1e-6)
    hypergrad = fg.hypergradient(outer, phi, solver, fg.aid(LINEAR_SOLVERS[name]))

    @jax.jit
    def update(m: jax.Array, c: jax.Array) -> Any:
        return hypergrad.update(
            hypergrad.init(np.zeros(SIZE), np.zeros(SIZE), m, c), np.zeros(SIZE), m, c
        )

    return update


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@given(data=maps())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_estimate_is_the_closed_form_or_nan_with_a_code(name: str, data: tuple) -> None:
    m, c, _ = data
    gradient, state = updated(name)(m, c)
    lower, linear = (fg.Status(int(info.status)) for info in state.info)
    if not np.all(np.isfinite(gradient)):
        assert np.all(np.isnan(gradient))
        assert max(lower, linear) >= fg.Status.MAX_STEPS
        return
    assert max(lower, linear) < fg.Status.MAX_STEPS
    a = np.eye(SIZE) - m.T
    size = np.linalg.norm(c)
    residual = np.linalg.norm(c / size - a @ (gradient / size))
    assert residual <= max(1.01e-10, 1e-14 * (1 + np.linalg.norm(gradient / size)))
    closed = np.linalg.solve(a, c / size)
    values = np.linalg.svd(a)[1]
    # The tolerance in b; the rounding of products with M, of some 50 eps ‖x‖; both times ‖A⁻¹‖.
    undecided = 1.01e-10 + 1e-14 * max(1, values[0]) * np.linalg.norm(closed)
    assert values[-1] * np.linalg.norm(gradient / size - closed) <= undecided


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@given(data=maps(st.floats(-0.9, 0.9)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_contraction_is_not_refused(name: str, data: tuple) -> None:
    m, c, symmetric = data
    if (name == "cg" and not symmetric) or np.linalg.norm(m, 2) > 1.5:
        return
    gradient, state = updated(name)(m, c)
    closed = np.linalg.solve(np.eye(SIZE) - m.T, c)
    if name == "gmres of short cycles" and not np.all(np.isfinite(gradient)):
        assert fg.Status(int(state.info.linear.status)) == fg.Status.MAX_STEPS  # It may stagnate.
        return
    np.testing.assert_allclose(gradient, closed, rtol=0, atol=1e-7 * np.linalg.norm(closed))


@given(data=maps(), singular=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cg_never_answers_for_a_matrix_that_it_does_not_fit(data: tuple, singular: bool) -> None:
    m, c, symmetric = data
    if singular:
        m = np.eye(SIZE) + 0 * m
    definite = symmetric and not singular and np.linalg.eigvalsh(np.eye(SIZE) - m)[0] > 0
    gradient, state = updated("cg")(m, c)
    if np.all(np.isfinite(gradient)) and not definite:
        # Only where it happened to solve the system: the true residual says so.
        assert state.info.linear.residual <= 1.01e-10 * np.linalg.norm(c)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e35])
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_entries_whose_squares_leave_the_range_of_the_dtype_are_solved(
    name: str, scale: float
) -> None:
    m = np.array([[0.3, 0.2, 0.1], [0.2, -0.4, 0.0], [0.1, 0.0, 0.2]], np.float32)
    b = np.float32(scale) * np.array([1.0, -0.5, 0.3], np.float32)
    x, info = jax.jit(lambda b: LINEAR_SOLVERS[name](lambda v: m @ v, b))(b)
    assert info.converged
    want = np.linalg.solve(np.eye(3) - m.astype(float), b.astype(float))
    np.testing.assert_allclose(np.asarray(x) / want, np.ones(3), rtol=1e-4)
