"""The real form as one vector, which it is where JAX has one device; these tests have eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixedgrad as fg
from fixedgrad import real_form
from problems import LINEAR, PROBLEM, assert_close, named

MIXED = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.asarray([1 + 2j]), "c": jnp.asarray(3.0)}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert real_form.joined(MIXED)


def test_a_vector_holds_all_leaves_and_gives_them_back():
    to_real, from_real = real_form.realified(MIXED)
    (vector,) = to_real(MIXED)
    assert vector.shape == (9,)
    back = from_real([vector])
    for name, leaf in MIXED.items():
        assert back[name].dtype == leaf.dtype
        assert jnp.array_equal(back[name], leaf)


def test_a_leaf_keeps_its_own_largest_entry():
    space = real_form.Space.of(jax.make_jaxpr(lambda w: w)(MIXED).jaxpr, MIXED)
    assert space.entries(real_form.realified(MIXED)[0](MIXED)).tolist() == [1.0, 2.0, 3.0]


NAMES = ("fp rtol", "cg rtol", "normal_cg rtol", "gmres rtol", "bicgstab rtol", "dense", "lineax")


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem", [PROBLEM["pytree"], PROBLEM["mixed dtypes"]], ids=["pytree", "mixed"]
)
@pytest.mark.parametrize("row", [LINEAR[name] for name in NAMES], ids=named)
def test_linear_solvers_solve_on_a_vector(row, problem):
    solve = fg.fixed_point(problem.phi, fg.aid(row.solver))(
        fg.anderson(problem.phi, max_steps=100, rtol=1e-9)
    )
    got = jax.grad(lambda lam: problem.outer(solve(problem.w0, lam), lam))(problem.lam)
    assert_close(got, problem.gradient(), max(1e3 * problem.eps, 1e-6))


def test_a_complex_leaf_beside_a_real_one_is_solved_on_a_vector():
    def phi(w, lam):
        turned = (0.3 + 0.4j) * w["z"] + (lam * w["x"]).astype(complex)
        return {"z": turned, "x": 0.2 * w["x"] + lam + 0.1 * jnp.abs(w["z"])}

    w0 = {"z": jnp.zeros((), complex), "x": jnp.zeros(())}
    f = lambda solver: lambda lam: jnp.abs(solver(w0, lam)["z"]) ** 2  # noqa: E731
    solve = fg.fixed_point(phi, fg.aid(fg.gmres(max_steps=20, rtol=1e-12)))(
        fg.picard(phi, max_steps=400, rtol=1e-14)
    )
    exact = fg.fixed_point(phi, fg.truncated_itd(num_steps=200))(fg.picard(phi, num_steps=200))
    want = jax.grad(f(exact))(0.7)
    assert float(jax.grad(f(solve))(0.7)) == pytest.approx(float(want), rel=1e-9)


def test_random_signs_are_balanced_and_of_no_pattern():
    signs = real_form.random_signs({"a": jnp.zeros((100, 50)), "b": jnp.zeros(3, jnp.float32)})
    a = np.asarray(signs["a"])
    assert set(np.unique(a)) == {-1.0, 1.0}
    assert signs["b"].dtype == jnp.float32
    for product in (a, a[1:] * a[:-1], a[:, 1:] * a[:, :-1], a[2:, 2:] * a[:-2, :-2]):
        assert abs(product.mean()) < 4 / np.sqrt(product.size)
    # The position counts, in whatever shape.
    np.testing.assert_array_equal(real_form.random_signs(jnp.zeros(5000)), a.ravel())


def test_norms_of_several_trees_are_taken_together_whatever_their_scale():
    x = [jnp.array([3e-300, 4e-300])], [jnp.array([3e200, 4e200])], [jnp.zeros(2)]
    space = real_form.Space(((),), ())
    np.testing.assert_allclose(space.sizes(*x), [5e-300, 5e200, 0.0], rtol=1e-15)
    np.testing.assert_allclose(space.size(x[1]), 5e200, rtol=1e-15)
