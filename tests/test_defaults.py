"""What nobody chose: `aid()`, `auto()`, the solver of `hypergradient`, the optimiser of `bilevel`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg

SIZE = 6


def system(*eigenvalues):
    """J, not symmetric, with these eigenvalues and some near 1/2."""
    rng = np.random.default_rng(1)
    basis = rng.normal(size=(SIZE, SIZE))
    values = np.concatenate([eigenvalues, np.linspace(-0.5, 0.5, SIZE - len(eigenvalues))])
    return basis @ np.diag(values) @ np.linalg.inv(basis)


def phi(w, lam, j):
    return j @ w + lam


def outer(w, lam, j):
    del lam, j
    return jnp.sum(jnp.sin(w))


# Contractions, expansions, an ill-conditioned and an indefinite I − J.
SYSTEMS = ((), (3.0, -7.0), (1 + 1e-6,), (40.0, 0.999))


@pytest.mark.parametrize("eigenvalues", SYSTEMS, ids=str)
def test_the_defaults_are_right_for_any_invertible_system(eigenvalues):
    j, lam = system(*eigenvalues), np.linspace(-0.1, 0.2, SIZE)
    inverse = np.linalg.inv(np.eye(SIZE) - j)
    want = inverse.T @ np.cos(inverse @ lam)
    size = np.linalg.norm(want)
    solve = fg.fixed_point(phi)(lambda w0, lam, j: jnp.linalg.solve(jnp.eye(SIZE) - j, lam))
    got = jax.grad(lambda lam: outer(solve(jnp.zeros(SIZE), lam, j), lam, j))(lam)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * size)
    hypergrad = fg.hypergradient(outer, phi)
    got, state = hypergrad.update(hypergrad.init(jnp.zeros(SIZE), lam, j), lam, j)
    assert bool(state.info.lower.converged)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * size)


def test_the_defaults_refuse_a_singular_system():
    j, lam = system(1.0), np.linspace(-0.1, 0.2, SIZE)
    solve = fg.fixed_point(phi)(lambda w0, lam, j: w0 * jnp.nan_to_num(jnp.inf, posinf=1.0))
    w = np.linalg.lstsq(np.eye(SIZE) - j, lam, rcond=None)[0]
    grad = jax.grad(lambda lam: outer(solve(w, lam, j), lam, j))(lam)
    assert np.all(np.isnan(grad))
    hypergrad = fg.hypergradient(outer, phi)
    grad, state = hypergrad.update(hypergrad.init(jnp.zeros(SIZE), lam, j), lam, j)
    assert np.all(np.isnan(grad))
    assert fg.Status(int(state.info.linear.status)) is fg.Status.SINGULAR


def test_auto_eliminates_where_gmres_gets_nowhere():
    # A shift: GMRES makes no way at all before it has taken as many steps as there are unknowns.
    size, b = 80, np.zeros(80)
    b[0] = 1.0
    matvec = lambda u: u - jnp.roll(u, 1)  # noqa: E731
    stuck = fg.auto(at_once=1, max_size=1, max_steps=60)
    _, info = jax.jit(lambda b: stuck(matvec, b))(b)
    assert fg.Status(int(info.status)) is fg.Status.MAX_STEPS
    eliminated = fg.auto(at_once=1, max_size=size, max_steps=60)
    x, info = jax.jit(lambda b: eliminated(matvec, b))(b)
    assert fg.Status(int(info.status)) is fg.Status.CONVERGED
    np.testing.assert_allclose(x, np.roll(b, -1), atol=1e-12)
    x = jax.vmap(lambda b: eliminated(matvec, b)[0])(np.eye(size)[:2])
    np.testing.assert_allclose(x, np.roll(np.eye(size)[:2], -1, axis=1), atol=1e-12)


def test_auto_in_a_shard_map_with_a_sharded_w_is_gmres():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")

    def both(b):
        matvec = lambda u: 0.3 * u + 0.1 * jax.lax.psum(jnp.sum(u), "rows")  # noqa: E731
        return fg.auto()(matvec, b)[0]

    b = jnp.arange(4.0)
    x = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))(b)
    want = np.linalg.solve(0.7 * np.eye(4) - 0.1 * np.ones((4, 4)), b)
    np.testing.assert_allclose(x, want, rtol=1e-7)


def test_bilevel_needs_no_optimiser():
    def loss(w, lam):
        return jnp.sum((w - jnp.arange(3.0)) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2) / 2

    hypergrad = fg.hypergradient(
        lambda w, lam: jnp.sum((w - jnp.array([0.0, 0.8, 1.5])) ** 2),
        fg.gradient_descent(loss, step_size=0.3),
    )
    loop = fg.bilevel(hypergrad)
    state, history = loop.run(loop.init(jnp.zeros(3), 2.0), num_steps=300)
    shrink = (0.8 + 2 * 1.5) / 5  # w = a/(1 + e^λ), a = (0, 1, 2), and E is least for this factor.
    np.testing.assert_allclose(state.lam, np.log(1 / shrink - 1), atol=0.05)
    assert history.value[-1] < history.value[0] / 10
