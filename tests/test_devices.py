"""Several devices: sharded arrays under `jit`, explicit meshes, `shard_map` with collectives."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fixedgrad as fg
from problems import ESTIMATORS, PROBLEM, assert_close, named

pytestmark = pytest.mark.slow

N, D = 32, 8
NUM_STEPS = 80  # Of gradient descent on the loss below, from zero to rounding: q < 0.56.

_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.normal(size=(N, D)) / 2)
Y = jnp.asarray(np.sign(_RNG.normal(size=N)))
LAM = jnp.linspace(-0.5, 0.5, D)

TOTALS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def logistic(w, lam, x, y):
    margins = -y * jnp.einsum("nd,d->n", x, w, out_sharding=_sharding_of(y))
    return jnp.mean(jnp.logaddexp(0.0, margins)) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def _sharding_of(y):
    # Only where the sharding is part of the type does a contraction have to say its own.
    sharding = jax.typeof(y).sharding
    explicit = any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
    return sharding if explicit else None


def objective(loss, estimator, **stopping):
    """f(λ, x, y) = Σ (1 + i) wᵢ(λ)²."""
    phi = fg.gradient_descent(loss, step_size=0.75)
    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, **(stopping or {"num_steps": NUM_STEPS})))

    def f(lam, x, y):
        w = solve(jnp.zeros_like(lam), lam, x, y)
        return jnp.sum(jnp.arange(1.0, D + 1) * w**2)

    return f


@pytest.fixture(scope="module")
def on_one_device():
    """The gradient with respect to λ and x, and the Hessian with respect to λ."""
    f = objective(logistic, fg.aid(fg.dense()))
    return (
        jax.jit(jax.grad(f, argnums=(0, 1)))(LAM, X, Y),
        jax.jit(jax.hessian(f))(LAM, X, Y),
    )


def placed(kind, mesh):
    """(λ, x, y): data sharded and w replicated, or the other way round."""
    specs = {"data": (P(), P("data"), P("data")), "w": (P("data"), P(None, "data"), P())}[kind]
    return [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip((LAM, X, Y), specs, strict=True)
    ]


def collectives(compiled):
    """How often each collective stands in the compiled program, by computation (loop body)."""
    text = compiled.as_text()
    counts = []
    for computation in re.split(r"\n(?=\S)", text):
        found = Counter(
            name for name in TOTALS for _ in re.findall(rf"\s{name}(?:-start)?\(", computation)
        )
        if found:
            counts.append(dict(found))
    return counts


# All-reduces in each computation: the loop of the lower level, then those of the linear solve. One
# for each product with Φ or its Jacobians, and nothing else.
ONE_A_PRODUCT = {
    "fp": (fg.fp(num_steps=60), [1, 1]),
    "fp rtol": (fg.fp(max_steps=60, rtol=1e-8), [1, 1]),
    "cg": (fg.cg(num_steps=8), [1, 1]),
    "cg rtol": (fg.cg(max_steps=20, rtol=1e-8), [1, 1, 1]),  # One more for the true residual.
    "normal_cg": (fg.normal_cg(num_steps=16), [1, 1, 2]),  # Two products a step, one before.
    "gmres": (fg.gmres(num_steps=8), [1, 1]),
    "bicgstab": (fg.bicgstab(num_steps=16), [1, 2]),  # Two products a step.
    "dense": (fg.dense(), [1, 2]),  # One for all products together, one for the true residual.
}


@pytest.mark.parametrize("name", ONE_A_PRODUCT)
def test_sharded_data_costs_one_all_reduce_a_product_and_stays_sharded(name, on_one_device):
    linear_solver, expected = ONE_A_PRODUCT[name]
    args = placed("data", mesh())
    gradient = jax.jit(jax.grad(objective(logistic, fg.aid(linear_solver)), argnums=(0, 1)))
    compiled = gradient.lower(*args).compile()
    got = compiled(*args)
    assert_close(got, on_one_device[0], 1e-6 if "rtol" in name else 1e-11)
    lam_bar, x_bar = got
    assert lam_bar.sharding.is_fully_replicated
    assert x_bar.sharding.is_equivalent_to(args[1].sharding, 2)
    found = collectives(compiled)
    assert all(set(computation) == {"all-reduce"} for computation in found), found
    assert sorted(computation["all-reduce"] for computation in found) == expected


def test_sharded_data_under_itd_costs_one_all_reduce_a_product(on_one_device):
    args = placed("data", mesh())
    gradient = jax.jit(jax.grad(objective(logistic, fg.itd()), argnums=(0, 1)))
    compiled = gradient.lower(*args).compile()
    got = compiled(*args)
    assert_close(got, on_one_device[0], 1e-11)
    assert got[1].sharding.is_equivalent_to(args[1].sharding, 2)
    assert collectives(compiled) == [{"all-reduce": 1}, {"all-reduce": 1}]


# With w sharded, all-reduces in each step: the product's own, and one for each group of inner
# products. Then those outside the loops, once: products, norms and the verdict.
WITH_W_SHARDED = {
    "fp": (fg.fp(num_steps=60), 1, 5),
    "cg": (fg.cg(num_steps=8), 3, 5),
    "normal_cg": (fg.normal_cg(num_steps=16), 4, 6),  # One more for the system's other side, Aᵀb.
}


@pytest.mark.parametrize("name", WITH_W_SHARDED)
def test_sharded_w_is_right_and_its_collectives_are_counted(name, on_one_device):
    linear_solver, per_step, once = WITH_W_SHARDED[name]
    args = placed("w", mesh())
    gradient = jax.jit(jax.grad(objective(logistic, fg.aid(linear_solver)), argnums=(0, 1)))
    compiled = gradient.lower(*args).compile()
    got = compiled(*args)
    assert_close(got, on_one_device[0], 1e-11)
    assert all(
        g.sharding.is_equivalent_to(a.sharding, a.ndim) for g, a in zip(got, args, strict=False)
    )
    found = collectives(compiled)
    assert all(set(computation) == {"all-reduce"} for computation in found), found
    loops, entry = found[:-1], found[-1]
    assert sorted(computation["all-reduce"] for computation in loops) == [1, per_step]
    assert entry["all-reduce"] == once


def test_a_sharded_matrix_of_unknowns_is_not_gathered_by_inner_products():
    # Inner products that flatten w would have to gather it when its second axis is sharded.
    def loss(w, lam):
        return 0.5 * jnp.sum((w - lam) ** 2) + 0.1 * jnp.sum(jnp.cos(w))

    phi = fg.gradient_descent(loss, step_size=0.75)
    lam = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh(), P(None, "data")))
    for linear_solver in (fg.cg(num_steps=3), fg.gmres(num_steps=3), fg.bicgstab(num_steps=3)):
        solve = fg.fixed_point(phi, fg.aid(linear_solver))(fg.picard(phi, num_steps=60))
        gradient = jax.jit(jax.grad(lambda lam, solve=solve: jnp.sum(solve(lam * 0, lam) ** 2)))
        compiled = gradient.lower(lam).compile()
        assert {name for found in collectives(compiled) for name in found} == {"all-reduce"}
        assert compiled(lam).sharding.is_equivalent_to(lam.sharding, 2)


@pytest.mark.parametrize("kind", ["data", "w"])
@pytest.mark.parametrize(
    "estimator",
    [
        fg.itd(),
        fg.truncated_itd(num_steps=NUM_STEPS),
        fg.aid(fg.fp(num_steps=NUM_STEPS)),
        fg.aid(fg.cg(max_steps=20, rtol=1e-12)),
        fg.aid(fg.gmres(num_steps=8)),
        fg.aid(fg.bicgstab(num_steps=16)),
        fg.forward(fg.aid(fg.normal_cg(num_steps=16))),
    ],
    ids=["itd", "truncated_itd", "fp", "cg", "gmres", "bicgstab", "forward-normal_cg"],
)
def test_shardings_that_are_part_of_the_type(kind, estimator, on_one_device):
    explicit = mesh(AxisType.Explicit)
    args = placed(kind, explicit)
    with jax.set_mesh(explicit):
        got = jax.jit(jax.grad(objective(logistic, estimator), argnums=(0, 1)))(*args)
    assert [jax.typeof(g).sharding.spec for g in got] == [
        jax.typeof(a).sharding.spec for a in args[:2]
    ]
    assert_close(got, on_one_device[0], 1e-11)


def summed_logistic(w, lam, x, y):
    """The loss of all devices together, computed on one device's share of the data."""
    loss = jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))
    return lax.pmean(loss, "data") + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def mapped(function):
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh(),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=True,
        )
    )


# lineax calls `lax.custom_linear_solve` by itself, which knows no mixture of replicated and varying.
# An absolute tolerance takes the way of a relative one.
MAPPED = [row for row in ESTIMATORS if "lineax" not in row.name and "atol" not in row.name]


@pytest.mark.parametrize("row", MAPPED, ids=map(named, MAPPED))
def test_a_collective_inside_the_loss_within_shard_map(row, on_one_device):
    gradient = mapped(jax.grad(objective(summed_logistic, row.estimator)))
    assert_close(gradient(LAM, X, Y), on_one_device[0][0], max(1e-11, row.accuracy))


@pytest.mark.parametrize(
    "estimator",
    [
        fg.itd(),
        fg.aid(fg.cg(max_steps=20, rtol=1e-12)),
        fg.forward(fg.aid(fg.fp(num_steps=NUM_STEPS))),
    ],
    ids=["itd", "cg", "forward-fp"],
)
def test_the_gradient_of_a_shard_map(estimator, on_one_device):
    gradient = jax.jit(jax.grad(mapped(objective(summed_logistic, estimator)), argnums=(0, 1)))
    assert_close(gradient(LAM, X, Y), on_one_device[0], 1e-11)


def test_the_hessian_within_and_of_a_shard_map(on_one_device):
    f = objective(summed_logistic, fg.aid(fg.cg(max_steps=20, rtol=1e-12)))
    assert_close(mapped(jax.hessian(f))(LAM, X, Y), on_one_device[1], 1e-9)
    assert_close(jax.jit(jax.hessian(mapped(f)))(LAM, X, Y), on_one_device[1], 1e-9)


def test_forward_mode_within_shard_map(on_one_device):
    f = objective(summed_logistic, fg.forward(fg.aid(fg.cg(num_steps=8))))
    assert_close(mapped(jax.jacfwd(f))(LAM, X, Y), on_one_device[0][0], 1e-11)


@pytest.mark.parametrize(
    "solver", [{"max_steps": 200, "rtol": 1e-13}, {"num_steps": NUM_STEPS}], ids=["rtol", "exact"]
)
def test_a_failed_solve_within_shard_map_gives_nan(solver):
    f = objective(summed_logistic, fg.aid(fg.cg(max_steps=1, rtol=1e-12)), **solver)
    assert bool(jnp.isnan(mapped(jax.grad(f))(LAM, X, Y)).all())


def test_the_explicit_form_within_shard_map(on_one_device):
    phi = fg.gradient_descent(summed_logistic, step_size=0.75)
    hypergrad = fg.hypergradient(
        lambda w, lam, x, y: jnp.sum(jnp.arange(1.0, D + 1) * w**2),
        phi,
        fg.picard(phi, max_steps=200, rtol=1e-13),
        fg.aid(fg.cg(max_steps=20, rtol=1e-12)),
        start=fg.warm(),
    )

    def twice(lam, x, y):
        state = hypergrad.init(jnp.zeros(D), lam, x, y)
        _, state = hypergrad.update(state, lam, x, y)
        grad, state = hypergrad.update(state, lam, x, y)
        assert state.info.linear is not None
        return grad, state.info.linear.num_steps

    grad, num_steps = mapped(twice)(LAM, X, Y)
    assert_close(grad, on_one_device[0][0], 1e-11)
    assert int(num_steps) == 0  # Started at the solution.


def mean_map(w, lam):
    return 0.5 * w + jnp.mean(lam)


HARDLY_ON_LAM = {
    "by its mean": (mean_map, lambda w, lam: jnp.sum(w**2)),
    "not at all": (lambda w, lam: 0.5 * w + 1.0, lambda w, lam: jnp.sum(w**2)),
    "directly": (lambda w, lam: 0.5 * w + 1.0, lambda w, lam: jnp.sum(lam) * jnp.sum(w**2)),
}
EXPLICIT_FORMS = {
    "aid": lambda phi, outer: fg.hypergradient(
        outer, phi, fg.picard(phi, num_steps=40), fg.aid(fg.cg(num_steps=3))
    ),
    "itd": lambda phi, outer: fg.hypergradient(outer, phi, fg.picard(phi, num_steps=40), fg.itd()),
    "polished": lambda phi, outer: fg.polished(
        fg.hypergradient(outer, phi, fg.picard(phi, num_steps=40), fg.aid(fg.cg(num_steps=3)))
    ),
    "adaptive": lambda phi, outer: fg.adaptive_hypergradient(outer, phi, rtol=1e-3),
}


@pytest.mark.parametrize("form", EXPLICIT_FORMS)
@pytest.mark.parametrize("dependence", HARDLY_ON_LAM)
def test_the_gradient_of_the_explicit_form_is_where_lam_is_and_sharded_as_it(dependence, form):
    phi, outer = HARDLY_ON_LAM[dependence]
    hypergrad = EXPLICIT_FORMS[form](phi, outer)
    sharded = NamedSharding(mesh(), P("data"))
    for place in (sharded, jax.devices()[1]):
        lam = jax.device_put(LAM, place)
        # w is nobody's: it follows λ, and does not take it to the default device.
        state = hypergrad.init(jnp.zeros(3), lam)
        grad, _ = jax.jit(hypergrad.update)(state, lam)
        assert grad.sharding.is_equivalent_to(lam.sharding, 1)


# In forward mode JAX has no zero tangent for the info's integers where they vary over devices.
PER_DEVICE = [row for row in MAPPED if not row.name.startswith("forward")]


@pytest.mark.parametrize("row", PER_DEVICE, ids=map(named, PER_DEVICE))
def test_one_problem_a_device_within_shard_map(row):
    problem = PROBLEM["ridge"]
    lams = jnp.stack([problem.lam - 0.03 * i for i in range(8)])
    solver = fg.picard(problem.phi, num_steps=problem.num_steps)
    solve = fg.fixed_point(problem.phi, row.estimator)(solver)

    def gradient(lam):  # `zeros_like`, not `zeros`: w varies over devices, as λ does.
        return jax.grad(lambda lam: problem.outer(solve(jnp.zeros_like(lam), lam), lam))(lam)

    each = jax.shard_map(
        lambda lam: gradient(lam[0])[None], mesh=mesh(), in_specs=P("data"), out_specs=P("data")
    )
    want = jax.vmap(problem.gradient)(lams)
    assert_close(jax.jit(each)(lams), want, max(1e-10, row.accuracy))
