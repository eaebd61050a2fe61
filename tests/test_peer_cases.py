"""Seventeen cases in which libraries in use are silently wrong or refuse: right here, or refused.

Each docstring says what jaxopt 0.8.5, optimistix 0.1.0 with lineax 0.1.1, or `jax.scipy` of JAX 0.10.2
do, as measured on the very problem of the test.
"""

from functools import partial

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fixedgrad as fg

A = np.array([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6], [-0.2, 0.5, 0.3]])
B = np.array([1.0, -0.5, 0.25])
THETA = 0.4
TRUE = 1.353136125293014
START = np.zeros(3)

UNTIL = {"max_steps": 60, "rtol": 1e-9}
LINEAR_SOLVERS = {
    "fp": fg.fp(max_steps=500, rtol=1e-9),
    "normal_cg": fg.normal_cg(**UNTIL),
    "gmres": fg.gmres(**UNTIL),
    "bicgstab": fg.bicgstab(**UNTIL),
    "dense": fg.dense(),
}
AID = fg.aid(fg.dense())


def phi(x: jax.Array, theta: jax.Array) -> jax.Array:
    return jnp.tanh(A @ x + theta * B)


def squared(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x) ** 2)


def solve_by(estimator: fg.Estimator, solver: fg.Solver, **options: object):
    return partial(fg.fixed_point(phi, estimator, **options)(solver), START)


def hypergradient_info(estimator: fg.Estimator, solver: fg.Solver) -> fg.HypergradientInfo:
    """What the explicit form says of x = Φ(x, θ), out of a compiled update."""
    hypergrad = fg.hypergradient(lambda x, _: squared(x), phi, solver, estimator)
    _, state = jax.jit(hypergrad.update)(hypergrad.init(START, THETA), THETA)
    return state.info


CONVERGED = fg.picard(phi, max_steps=300, rtol=1e-13)


def test_the_true_derivative_is_that_of_the_implicit_function() -> None:
    x = START
    for _ in range(400):
        x = np.tanh(A @ x + THETA * B)
    slope = 1 - x**2
    dx = np.linalg.solve(np.eye(3) - slope[:, None] * A, slope * B)
    np.testing.assert_allclose(2 * x @ dx, TRUE, rtol=1e-12)


def test_01_jvp_jacfwd_and_hessian_work() -> None:
    """`jaxopt.custom_fixed_point`: TypeError for all three."""
    solve = solve_by(fg.forward(AID), CONVERGED)
    _, tangent = jax.jvp(lambda t: squared(solve(t)), (THETA,), (1.0,))
    np.testing.assert_allclose(tangent, TRUE, rtol=1e-8)
    jacobian = jax.jit(jax.jacfwd(solve))(THETA)
    np.testing.assert_allclose(2 * solve(THETA) @ jacobian, TRUE, rtol=1e-8)
    first = jax.jit(jax.grad(lambda t: squared(solve_by(AID, CONVERGED)(t))))
    second = jax.jit(jax.hessian(lambda t: squared(solve_by(AID, CONVERGED)(t))))(THETA)
    differences = (first(THETA + 1e-4) - first(THETA - 1e-4)) / 2e-4
    np.testing.assert_allclose(second, differences, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_02_phi_may_close_over_a_traced_parameter(wrap) -> None:
    """Jaxopt and banax: UnexpectedTracerError, with and without `jit`."""

    def loss(theta: jax.Array) -> jax.Array:
        def closed(x: jax.Array) -> jax.Array:
            return phi(x, theta)

        solver = fg.picard(closed, max_steps=300, rtol=1e-13)
        return squared(fg.fixed_point(closed, AID)(solver)(START))

    np.testing.assert_allclose(wrap(jax.grad(loss))(THETA), TRUE, rtol=1e-8)


def test_03_a_forward_solve_that_did_not_converge_is_not_differentiated() -> None:
    """Jaxopt after three steps: silently 1.469, where 1.353 is true; after two, 1.320."""

    def three_steps(x: jax.Array, theta: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: phi(x, theta), x)

    own = fg.picard(phi, max_steps=3, rtol=1e-6)
    for solver in (own, fg.with_tolerance(three_steps, phi, rtol=1e-6)):
        solve = solve_by(AID, solver)
        assert jnp.isnan(jax.grad(lambda t, solve=solve: squared(solve(t)))(THETA))
        lower = hypergradient_info(AID, solver).lower
        assert lower.status == fg.Status.MAX_STEPS
        assert lower.residual > lower.tolerance > 0


def test_04_a_solve_of_one_step_is_refused_unless_one_step_was_asked_for() -> None:
    """Optimistix with `max_steps=1, throw=False`: silently 0.907, where 1.353 is true."""
    until = fg.picard(phi, max_steps=1, rtol=1e-6)
    solve = solve_by(AID, until)
    assert jnp.isnan(jax.grad(lambda t: squared(solve(t)))(THETA))
    assert hypergradient_info(AID, until).lower.status == fg.Status.MAX_STEPS
    asked = fg.picard(phi, num_steps=1)
    solve = solve_by(AID, asked)
    np.testing.assert_allclose(jax.grad(lambda t: squared(solve(t)))(THETA), 0.907304, rtol=1e-6)
    lower = hypergradient_info(AID, asked).lower
    assert lower.status == fg.Status.FIXED_STEPS
    once = phi(START, THETA)
    np.testing.assert_allclose(lower.residual, np.linalg.norm(phi(once, THETA) - once), rtol=1e-12)


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_05_a_singular_system_is_refused_with_a_code(name: str) -> None:
    """Jaxopt on x = x + (θ − θ₀) b: silently 0.0. There is no derivative: x is not unique."""

    def shifted(x: jax.Array, theta: jax.Array) -> jax.Array:
        return x + (theta - THETA) * B

    hypergrad = fg.hypergradient(
        lambda x, _: jnp.sum(x),
        shifted,
        fg.picard(shifted, num_steps=1),
        fg.aid(LINEAR_SOLVERS[name]),
    )
    gradient, state = jax.jit(hypergrad.update)(hypergrad.init(START, THETA), THETA)
    assert jnp.isnan(gradient)
    # `fp` and `bicgstab` see no more than that the residual does not go down.
    blind = name in ("fp", "bicgstab")
    expected = fg.Status.MAX_STEPS if blind else fg.Status.SINGULAR
    assert fg.Status(int(state.info.linear.status)) == expected


def test_06_a_diverging_element_of_a_batch_harms_nobody_else() -> None:
    """Jaxopt and optimistix: silently −1.4e66 for the element that diverges."""

    def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * (A @ x) + B

    solve = fg.fixed_point(scaled, AID)(fg.picard(scaled, max_steps=100, rtol=1e-10))
    scales = jnp.array([0.3, 0.5, 3.0])
    got = jax.jit(jax.vmap(jax.grad(lambda s: squared(solve(START, s)))))(scales)
    closed = jax.grad(lambda s: squared(jnp.linalg.solve(jnp.eye(3) - s * A, jnp.asarray(B))))
    np.testing.assert_allclose(got[:2], [closed(0.3), closed(0.5)], rtol=1e-8)
    assert jnp.isnan(got[2])


def test_07_zero_derivatives_are_declared_and_itd_has_the_true_ones() -> None:
    """Jaxopt and optimistix: silently 0.0 through auxiliary output and the initial point."""
    declared = " ".join(str(fg.fixed_point.__doc__).split())  # Python 3.13 dedents docstrings.
    assert "detached: its derivative is zero by construction" in declared
    assert "respect to `w0` is then zero by construction" in declared

    def with_aux(x: jax.Array, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.lax.fori_loop(0, 300, lambda _, x: phi(x, theta), x)
        return x, squared(x)

    solve = fg.fixed_point(phi, AID, has_aux=True)(with_aux)
    assert jax.grad(lambda t: solve(START, t)[1])(THETA) == 0
    # What aux holds has its derivative where it is computed from w outside.
    np.testing.assert_allclose(
        jax.grad(lambda t: squared(solve(START, t)[0]))(THETA), TRUE, rtol=1e-8
    )

    def three_steps(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: phi(x, jnp.asarray(THETA)), x)

    wanted = jax.grad(lambda x: squared(three_steps(x)))(START)
    assert jnp.all(jnp.abs(wanted) > 1e-3)
    short = fg.picard(phi, num_steps=3)
    for estimator, want in ((AID, np.zeros(3)), (fg.itd(), wanted)):
        solve = fg.fixed_point(phi, estimator)(short)
        got = jax.grad(lambda x, solve=solve: squared(solve(x, THETA)))(START)
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "linear_solver",
    [
        fg.gmres(max_steps=1, rtol=1e-9),
        fg.from_lineax(lineax.GMRES(rtol=1e-9, atol=1e-9, max_steps=1, restart=1)),
    ],
    ids=["gmres", "lineax"],
)
def test_08_a_backward_solve_stopped_short_obeys_the_policy(linear_solver: fg.LinearSolver) -> None:
    """Optimistix with `throw=False`, and lineax differentiated, raise anyway."""
    aid = fg.aid(linear_solver)

    def gradient(on_failure: str) -> jax.Array:
        solve = solve_by(aid, CONVERGED, on_failure=on_failure)
        return jax.grad(lambda t: squared(solve(t)))(THETA)

    assert jnp.isnan(gradient("nan"))
    assert jnp.isfinite(gradient("ignore"))
    with pytest.warns(fg.SolveFailedWarning, match="the linear solve of the derivative failed"):
        gradient("warn")
    with pytest.raises(jax.errors.JaxRuntimeError, match="linear solve of the derivative failed"):
        gradient("raise")


def test_09_the_residual_of_gmres_is_the_true_one() -> None:
    """`jax.scipy` with `restart=20, maxiter=2`: `info = 0` at a relative residual of 0.894."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(100, 100)), rng.normal(size=100)
    solve = fg.gmres(max_steps=40, restart=20, rtol=1e-8)
    x, info = jax.jit(lambda b: solve(lambda v: v - a @ v, b))(b)
    assert info.status == fg.Status.MAX_STEPS
    assert not info.converged
    np.testing.assert_allclose(info.residual, np.linalg.norm(b - a @ x), rtol=1e-10)
    assert 0.5 < info.residual / np.linalg.norm(b) < 1


@pytest.mark.parametrize("stop", [{"num_steps": 40}, UNTIL], ids=["num_steps", "rtol"])
def test_10_cg_sees_a_matrix_that_is_not_symmetric(stop: dict) -> None:
    """`jax.scipy`: (−15.0, 7.2, −12.6, −13.6) where (1.3, 0.3, 1.7, 0.5) is true, `info = None`."""
    m = np.array([[0, 0.9, 0, 0], [-0.9, 0, 0.3, 0], [0, 0, 0.2, 0.8], [0.1, 0, -0.5, 0.4]])
    _, info = jax.jit(lambda b: fg.cg(**stop)(lambda v: m @ v, b))(np.ones(4))
    assert info.status in (fg.Status.NOT_SYMMETRIC, fg.Status.INDEFINITE)
    affine = lambda w, lam: m @ w + lam  # noqa: E731
    solve = fg.fixed_point(affine, fg.aid(fg.cg(**stop)))(
        fg.picard(affine, max_steps=800, rtol=1e-12)
    )
    assert jnp.all(jnp.isnan(jax.grad(lambda lam: jnp.sum(solve(np.zeros(4), lam)))(np.ones(4))))


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_11_a_complex_fixed_point_need_not_be_holomorphic(name: str) -> None:
    """Where 11.39983 is true, jaxopt gives 717.3 and optimistix 10.178, both silently."""
    c = np.array([[0.3 + 0.2j, 0.1 - 0.3j], [-0.2j, 0.4]])
    d = np.array([[0.2, 0.1j], [0.1, -0.2 + 0.1j]])

    def affine(z: jax.Array, t: jax.Array) -> jax.Array:
        return c @ z + d @ jnp.conj(z) + t * np.array([1 + 0.5j, -0.5 + 1j])

    solver = fg.picard(affine, num_steps=300)
    solve = fg.fixed_point(affine, fg.aid(LINEAR_SOLVERS[name]))(solver)
    got = jax.grad(lambda t: squared(solve(np.zeros(2, complex), t)))(0.7)
    np.testing.assert_allclose(got, 11.399834632244662, rtol=1e-7)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))


def test_12_a_shard_map_with_a_sum_over_devices_in_phi(mesh: jax.sharding.Mesh) -> None:
    """Jaxopt: ValueError; with replication checks off silently −0.605. Optimistix: ValueError."""
    x = np.linalg.qr(np.arange(24.0).reshape(8, 3) ** 0.5 + np.eye(8, 3))[0]
    y = np.cos(np.arange(8.0))

    def ridge(w: jax.Array, t: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return w - 0.5 * (jax.lax.psum(x.T @ (x @ w - y), "devices") + t * w)

    solver = fg.picard(ridge, max_steps=300, rtol=1e-12)
    solve = fg.fixed_point(ridge, fg.aid(fg.cg(max_steps=10, rtol=1e-10)))(solver)
    gradient = jax.shard_map(
        jax.grad(lambda t, x, y: squared(solve(jnp.zeros(3), t, x, y))),
        mesh=mesh,
        in_specs=(P(), P("devices"), P("devices")),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(gradient)(0.5, x, y), -0.28680606982861334, rtol=1e-8)


def test_13_the_gradient_of_a_sharded_parameter_stays_sharded(mesh: jax.sharding.Mesh) -> None:
    """Optimistix: the gradient comes back replicated. Jaxopt: sharded."""
    sharding = NamedSharding(mesh, P("devices"))
    lam = jax.device_put(jnp.linspace(0.1, 1.0, 64), sharding)
    halved = lambda w, lam: 0.5 * jnp.tanh(w) + lam  # noqa: E731
    solve = fg.fixed_point(halved, fg.aid(fg.cg(max_steps=20, rtol=1e-8)))(
        fg.picard(halved, num_steps=60)
    )
    got = jax.jit(jax.grad(lambda lam: squared(solve(jnp.zeros_like(lam), lam))))(lam)
    assert got.sharding.is_equivalent_to(sharding, 1)
    w = solve(jnp.zeros_like(lam), lam)
    np.testing.assert_allclose(got, 2 * w / (1 - 0.5 / jnp.cosh(w) ** 2), rtol=1e-7)


def temporary_bytes(estimator: fg.Estimator, size: int, num_steps: int) -> int:
    halved = lambda w, lam: 0.5 * jnp.tanh(w) + lam  # noqa: E731
    solve = fg.fixed_point(halved, estimator)(fg.picard(halved, num_steps=num_steps))
    gradient = jax.jit(jax.grad(lambda lam: squared(solve(jnp.zeros_like(lam), lam))))
    compiled = gradient.lower(jax.ShapeDtypeStruct((size,), float)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_14_memory_does_not_grow_with_the_number_of_steps() -> None:
    """At 10⁵ unknowns in double precision, a scan of 1000 steps: jaxopt 1602 MB unrolled, 4 MB
    implicit; optimistix 71 MB with checkpoints. Here 1602 MB by `itd`, 6.4 MB by `aid`.
    """
    size = 10_000
    short, long = (temporary_bytes(fg.aid(fg.cg(num_steps=20)), size, t) for t in (10, 1000))
    assert short == long < 10 * 8 * size
    assert temporary_bytes(fg.itd(), size, 1000) > 1000 * 8 * size


def test_15_no_dense_jacobian_is_made_unless_asked_for() -> None:
    """Optimistix's default adjoint at 3000 unknowns: 144 MB, two dense matrices. Here 0.3 MB."""
    size = 3000
    assert temporary_bytes(fg.aid(LINEAR_SOLVERS["gmres"]), size, 50) < 50 * 8 * size
    assert temporary_bytes(fg.aid(fg.cg(**UNTIL)), size, 50) < 15 * 8 * size


def test_16_a_repeated_eager_gradient_does_not_trace_phi_again() -> None:
    """Jaxopt traces Φ three times a call (0.6 s here), optimistix once (1.0 s)."""

    calls = []

    def counted(x: jax.Array, theta: jax.Array) -> jax.Array:
        calls.append(1)
        return phi(x, theta)

    solve = fg.fixed_point(counted, AID)(fg.picard(counted, num_steps=300))
    gradient = jax.grad(lambda t: squared(solve(START, t)))
    np.testing.assert_allclose(gradient(THETA), TRUE, rtol=1e-8)
    first = len(calls)
    assert 0 < first <= 8
    np.testing.assert_allclose(gradient(THETA), TRUE, rtol=1e-8)
    gradient(2 * THETA)
    assert len(calls) == first


@pytest.mark.slow
def test_17_cg_refuses_a_step_size_for_each_coordinate() -> None:
    """A diagonally preconditioned gradient step: J is not symmetric. Jaxopt with CG: silently 6.8235,
    where 6.8069 is true; lineax's CG asks for a tag, and believes it.
    """
    root = np.random.default_rng(4).normal(size=(4, 4))
    root = root / np.linalg.norm(root, 2)
    hessian, steps = root @ root.T + 0.3 * np.eye(4), np.array([0.1, 0.3, 0.6, 0.9])

    def preconditioned(w: jax.Array, t: jax.Array) -> jax.Array:
        return w - steps * (hessian @ w - t * np.ones(4))

    solver = fg.picard(preconditioned, num_steps=1000)
    true = squared(np.linalg.solve(hessian, np.ones(4)))  # Of ‖w‖² at t = ½: 2 t ‖w/t‖².

    def gradient(linear_solver: fg.LinearSolver) -> jax.Array:
        solve = fg.fixed_point(preconditioned, fg.aid(linear_solver))(solver)
        return jax.grad(lambda t: squared(solve(np.zeros(4), t)))(0.5)

    np.testing.assert_allclose(true, 6.806936998, rtol=1e-9)
    for stop in (UNTIL, {"num_steps": 20}, {"num_steps": 3}):
        assert jnp.isnan(gradient(fg.cg(**stop)))
    for name in ("gmres", "normal_cg", "bicgstab", "dense"):
        np.testing.assert_allclose(gradient(LINEAR_SOLVERS[name]), true, rtol=1e-7)
