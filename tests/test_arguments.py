"""What may be w, λ and further data: numbers, arrays, keys, modules, and what rides along."""

from typing import Any

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg
from problems import ESTIMATOR, LINEAR_SOLVERS, RULES, LinearRow, named


# One row for each rule, and one that ravels w. All of `ESTIMATORS` would take a minute and a half more.
@pytest.fixture(params=[*RULES, ESTIMATOR["forward aid dense"]], ids=named)
def estimator(request: pytest.FixtureRequest) -> fg.Estimator:
    return request.param.estimator


def solver_of(phi: fg.Phi, estimator: fg.Estimator, num_steps: int = 60):
    return fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=num_steps))


def halved(w: Any, lam: Any) -> Any:
    """w = w/2 + λ, hence w = 2λ, for any pytree."""
    return jax.tree.map(lambda x, y: jnp.asarray(0.5, x.dtype) * x + y, w, lam)


def total(tree: Any) -> jax.Array:
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), jnp.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lam",
    [1.5, np.float64(1.5), np.asarray(1.5), jnp.asarray(1.5), jnp.asarray(1.5) * 1.0],
    ids=["float", "numpy-scalar", "numpy-array", "weak-array", "array"],
)
def test_any_kind_of_number_is_differentiated(estimator: fg.Estimator, lam: Any) -> None:
    solve = solver_of(halved, estimator)
    value, gradient = jax.value_and_grad(lambda lam: solve(0.0, lam) ** 2)(lam)
    np.testing.assert_allclose(value, 9.0, rtol=1e-12)
    np.testing.assert_allclose(gradient, 12.0, rtol=1e-6)


def _in_float32(w: Any, lam: Any) -> Any:
    return 0.5 * w + jnp.float32(1.0) * lam


def _squared(w: Any, lam: Any) -> Any:
    return w**2 + 0.0 * lam


_EXPLICIT = fg.hypergradient(
    _squared, _in_float32, fg.picard(_in_float32, num_steps=40), fg.aid(fg.dense())
)


# From a Python number for w0 and, where it can be, for λ: what comes out.
IN_FLOAT32 = {
    "picard": lambda w0: fg.picard(_in_float32, num_steps=40)(w0, 1.0),
    "picard rtol": lambda w0: fg.picard(_in_float32, max_steps=40, rtol=1e-6)(w0, 1.0),
    "in a dict": lambda w0: fg.picard(lambda w, lam: {"w": _in_float32(w["w"], lam)}, num_steps=40)(
        {"w": w0}, 1.0
    )["w"],
    "anderson": lambda w0: fg.anderson(_in_float32, max_steps=9, rtol=1e-6)(w0, 1.0),
    "broyden": lambda w0: fg.broyden(_in_float32, max_steps=9, rtol=1e-6)(w0, 1.0),
    "newton": lambda w0: fg.newton(_in_float32, max_steps=9, rtol=1e-6)(w0, 1.0),
    "from_optax": lambda w0: fg.from_optax(
        lambda w, lam: jnp.sum((w - jnp.float32(2.0) * lam) ** 2), optax.sgd(0.25), num_steps=30
    )(w0, 1.0),
    "decorator": lambda w0: solver_of(_in_float32, fg.aid(fg.dense()))(w0, 1.0),
    "itd": lambda w0: solver_of(_in_float32, fg.itd())(w0, 1.0),
    "hypergradient": lambda w0: _EXPLICIT.update(_EXPLICIT.init(w0, 1.0), 1.0)[1].w,
    "adaptive": lambda w0: _ADAPTIVE.update(_ADAPTIVE.init(w0, 1.0), 1.0)[1].w,
    "bilevel": lambda w0: _LOOP.run(_LOOP.init(w0, 1.0), num_steps=1)[0].hypergrad.w,
    "bilevel, its lam": lambda w0: _LOOP.run(_LOOP.init(w0, 2.0), num_steps=1)[0].lam,
}
_ADAPTIVE = fg.adaptive_hypergradient(_squared, _in_float32, rtol=1e-3)
_LOOP = fg.bilevel(_EXPLICIT, optax.sgd(0.125))  # f = 4 λ².


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_python_number_to_start_from_takes_the_dtype_of_phi(name: str) -> None:
    w = IN_FLOAT32[name](0.0)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, 0.0 if "lam" in name else 2.0, atol=1e-3)


def test_numbers_alone_are_as_wide_as_jax_makes_them() -> None:
    for w0 in (0.0, np.float64(0.0), jnp.asarray(0.0)):
        assert fg.picard(lambda w, lam: 0.5 * w + lam, num_steps=2)(w0, 1.0).dtype == jnp.float64


def test_an_integer_lam_has_a_value_and_no_gradient(estimator: fg.Estimator) -> None:
    solve = solver_of(halved, estimator)
    assert solve(0.0, 3) == 6.0
    assert jax.grad(lambda n: solve(0.0, n), allow_int=True)(3).dtype == jax.dtypes.float0


def test_a_batch_of_keys_gives_a_batch_of_gradients(
    estimator: fg.Estimator, key: jax.Array
) -> None:
    def phi(w: jax.Array, lam: jax.Array, key: jax.Array) -> jax.Array:
        return 0.5 * w + lam * jax.random.normal(key)

    solve = solver_of(phi, estimator)
    keys = jax.random.split(key, 3)
    got = jax.vmap(jax.grad(lambda lam, key: solve(0.0, lam, key)), (None, 0))(1.0, keys)
    np.testing.assert_allclose(got, 2 * jax.vmap(jax.random.normal)(keys), rtol=1e-6)


def test_none_and_empty_containers_are_carried(estimator: fg.Estimator) -> None:
    def phi(w: dict, lam: jax.Array, nothing: None, *, empty: dict, also: tuple) -> dict:
        assert nothing is None
        assert empty == {"inner": []}
        assert also == ()
        return {"x": 0.5 * w["x"] + lam, "none": None, "empty": ()}

    solve = solver_of(phi, estimator)
    w0 = {"x": 0.0, "none": None, "empty": ()}
    gradient = jax.grad(lambda lam: solve(w0, lam, None, empty={"inner": []}, also=())["x"])(1.0)
    np.testing.assert_allclose(gradient, 2.0, rtol=1e-6)


@pytest.mark.parametrize("w0", [{}, np.zeros((0, 3))], ids=["no-leaf", "no-number"])
def test_an_empty_w_does_no_harm(estimator: fg.Estimator, w0: Any) -> None:
    solve = solver_of(lambda w, _: w, estimator, num_steps=3)
    assert jax.grad(lambda lam: lam + total(solve(w0, lam)))(2.0) == 1.0


def test_integers_and_keys_within_w_are_kept(estimator: fg.Estimator, key: jax.Array) -> None:
    def phi(w: dict, lam: jax.Array) -> dict:
        return {**w, "x": 0.5 * w["x"] + lam * w["n"].astype(float)}

    solve = solver_of(phi, estimator)
    w0 = {"x": np.zeros(2), "n": np.array([1, 3]), "key": key}

    def weighted(lam: jax.Array) -> tuple[jax.Array, Any]:
        w = solve(w0, lam)
        return total(w["x"]), w

    gradient, w = jax.jit(jax.grad(weighted, has_aux=True))(1.0)
    np.testing.assert_allclose(gradient, 8.0, rtol=1e-6)
    np.testing.assert_array_equal(w["n"], [1, 3])
    assert w["key"] == key


def test_a_shared_leaf_gathers_what_flows_into_each_of_its_places(estimator: fg.Estimator) -> None:
    solve = solver_of(halved, estimator)

    def weighted(lam: jax.Array) -> jax.Array:
        w = solve({"a": 0.0, "b": 0.0}, {"a": lam, "b": lam})
        return w["a"] + 10 * w["b"]

    np.testing.assert_allclose(jax.grad(weighted)(1.0), 22.0, rtol=1e-6)


def test_an_equinox_module_with_an_activation_is_a_lam(
    estimator: fg.Estimator, key: jax.Array
) -> None:
    x = np.array([0.3, -0.2])
    model = eqx.nn.MLP(2, 2, width_size=3, depth=1, activation=jnp.tanh, key=key)
    solve = solver_of(lambda w, model: 0.5 * w + model(x), estimator)
    got = eqx.filter_grad(lambda model: jnp.sum(solve(jnp.zeros(2), model) ** 2))(model)
    want = eqx.filter_grad(lambda model: jnp.sum((2 * model(x)) ** 2))(model)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), got, want)


def test_an_equinox_module_is_a_w(estimator: fg.Estimator, key: jax.Array) -> None:
    w0 = eqx.nn.Linear(2, 3, key=key)

    def phi(w: eqx.nn.Linear, lam: jax.Array) -> eqx.nn.Linear:
        return jax.tree.map(lambda x: 0.5 * x + lam, w)

    solve = solver_of(phi, estimator)
    assert isinstance(solve(w0, 1.0), eqx.nn.Linear)
    got = jax.grad(lambda lam: jnp.sum(solve(w0, lam)(jnp.array([1.0, 2.0]))))(1.0)
    np.testing.assert_allclose(got, 3 * 2 * (1 + 2 + 1), rtol=1e-6)


@pytest.mark.slow
def test_parameters_of_flax_are_a_lam_and_a_w(estimator: fg.Estimator, key: jax.Array) -> None:
    x = np.array([0.3, -0.2])
    module = flax.linen.Dense(2, param_dtype=float)
    parameters = module.init(key, x)

    def model(parameters: Any) -> jax.Array:
        return jnp.asarray(module.apply(parameters, x))

    solve = solver_of(lambda w, lam: 0.5 * w + model(lam), estimator)
    got = jax.grad(lambda lam: jnp.sum(solve(jnp.zeros(2), lam) ** 2))(parameters)
    want = jax.grad(lambda lam: jnp.sum((2 * model(lam)) ** 2))(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)

    inner = solver_of(halved, estimator)
    w0 = jax.tree.map(jnp.zeros_like, parameters)
    got = jax.grad(lambda lam: jnp.sum(model(inner(w0, lam)) ** 2))(parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_nested_dicts_as_of_haiku_are_a_lam_and_a_w(estimator: fg.Estimator) -> None:
    lam = {"net/~/linear": {"w": np.ones((2, 2)), "b": np.ones(2)}, "net/~/scale": {"s": 1.0}}
    solve = solver_of(halved, estimator)
    w0 = jax.tree.map(np.zeros_like, lam)
    got = jax.grad(lambda lam: total(jax.tree.map(lambda x: 0.5 * x**2, solve(w0, lam))))(lam)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 4 * b, rtol=1e-6), got, lam)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "complex128"])
def test_values_and_gradients_keep_the_dtype(estimator: fg.Estimator, dtype: str) -> None:
    kind = jnp.dtype(dtype)
    solve = solver_of(halved, estimator, num_steps=40)
    lam = jnp.asarray([1.0, -0.5], kind) * jnp.asarray(1j if "complex" in dtype else 1.0, kind)
    w0 = jnp.zeros(2, kind)

    def squares(lam: jax.Array) -> jax.Array:
        w = solve(w0, lam)
        assert w.dtype == kind
        return jnp.sum(jnp.real(w) ** 2 + jnp.imag(w) ** 2)

    gradient = jax.grad(squares)(lam)
    assert gradient.dtype == kind
    tolerance = max(8 * float(jnp.finfo(kind).eps), 1e-6)
    want = 8 * np.conj(np.asarray(lam, complex))
    np.testing.assert_allclose(np.asarray(gradient, complex), want, rtol=tolerance)


def test_the_explicit_form_gives_integers_in_lam_no_gradient() -> None:
    def phi(w: jax.Array, lam: dict) -> jax.Array:
        return 0.5 * w + lam["x"] * lam["n"].astype(float) + lam["link"](0.0)

    hypergrad = fg.hypergradient(
        lambda w, lam: w * lam["x"], phi, fg.picard(phi, num_steps=60), fg.aid(fg.dense())
    )
    lam = {"x": 1.5, "n": np.asarray(3), "link": jnp.sin}
    gradient, _ = hypergrad.update(hypergrad.init(0.0, lam), lam)
    np.testing.assert_allclose(gradient["x"], 12 * 1.5, rtol=1e-12)  # Of 6 x².
    assert gradient["n"].dtype == jax.dtypes.float0
    assert gradient["link"] is jnp.sin


def complex_map(w: jax.Array, lam: jax.Array) -> jax.Array:
    """Neither linear nor holomorphic: w ↦ C sin w + D w̄ + λ."""
    c = np.array([[0.3 + 0.2j, 0.1 - 0.2j], [-0.2j, 0.25]])
    d = np.array([[0.15, 0.1j], [0.1, -0.1 + 0.1j]])
    return c @ jnp.sin(w) + d @ jnp.conj(w) + lam


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in LINEAR_SOLVERS if not row.symmetric_only], ids=named
)
def test_a_complex_fixed_point_agrees_with_unrolled_differentiation(row: LinearRow) -> None:
    lam, w0 = jnp.array([0.3 + 0.4j, -0.2j]), jnp.zeros(2, complex)

    def gradient(estimator: fg.Estimator) -> jax.Array:
        solve = solver_of(complex_map, estimator, num_steps=150)
        return jax.grad(lambda lam: jnp.sum(jnp.abs(solve(w0, lam)) ** 2 + jnp.imag(lam)))(lam)

    want = gradient(fg.itd())
    error = np.linalg.norm(gradient(fg.aid(row.solver)) - want) / np.linalg.norm(want)
    assert error <= max(row.accuracy, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in LINEAR_SOLVERS if r.symmetric_only], ids=named)
def test_a_complex_gradient_step_agrees_with_unrolled_differentiation(row: LinearRow) -> None:
    # A real loss of complex w: the gradient step has a symmetric J over the reals.
    def loss(w: jax.Array, lam: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(w - lam) ** 2 + 0.3 * jnp.cos(jnp.real(w)) * jnp.imag(w))

    phi = fg.gradient_descent(loss, step_size=0.4)
    lam, w0 = jnp.array([0.3 + 0.4j, -0.2j]), jnp.zeros(2, complex)

    def gradient(estimator: fg.Estimator) -> jax.Array:
        solve = solver_of(phi, estimator, num_steps=150)
        return jax.grad(lambda lam: jnp.sum(jnp.real(solve(w0, lam)) ** 3))(lam)

    want = gradient(fg.itd())
    error = np.linalg.norm(gradient(fg.aid(row.solver)) - want) / np.linalg.norm(want)
    assert error <= max(row.accuracy, 1e-12)


def _scaled(w: Any, lam: Any, scale: Any = 1.0, *, rest: Any = None) -> Any:
    del rest
    return 0.5 * w + scale * lam


@pytest.mark.parametrize(
    ("solver", "call"),
    [
        (lambda w0, theta, size=3.0: 0 * w0 + 2 * size * theta, lambda solve: solve(0.0, 1.0, 3.0)),
        (lambda w0, lam, scale=3.0: 0 * w0 + 2 * scale * lam, lambda solve: solve(0.0, 1.0, 3.0)),
        (lambda w0, *, scale=9.0, lam: 2 * scale * lam, lambda s: s(0.0, scale=3.0, lam=1.0)),
        (lambda w0, *args, rest=None: 6 * args[0], lambda solve: solve(0.0, 1.0, 3.0)),
    ],
    ids=["other-names", "default-not-used", "keywords", "variadic"],
)
def test_names_and_defaults_that_make_no_difference_are_accepted(solver: Any, call: Any) -> None:
    solve = fg.fixed_point(_scaled, fg.aid(fg.dense()))(solver)
    assert call(solve) == 6.0
    assert jax.grad(lambda scale: call(lambda *a, **k: scale * solve(*a, **k)))(1.0) == 6.0


def _overwriting(w: dict, lam: dict) -> dict:
    w["a"] = 0.9 * w["a"] + lam["a"]
    lam["a"] = None
    return w


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda phi: fg.picard(phi, max_steps=900, rtol=1e-12),
        lambda phi: fg.picard(phi, num_steps=400),
        lambda phi: fg.anderson(phi, max_steps=20, rtol=1e-12),
        lambda phi: fg.broyden(phi, max_steps=20, rtol=1e-12),
        lambda phi: fg.newton(phi, max_steps=20, rtol=1e-12),
        lambda phi: fg.picard(fg.damped(phi, damping=0.5), max_steps=900, rtol=1e-12),
    ],
    ids=["picard", "exact", "anderson", "broyden", "newton", "damped"],
)
def test_a_map_that_overwrites_its_arguments_is_the_map_that_does_not(make: Any) -> None:
    solver, w0 = make(_overwriting), {"a": jnp.zeros(())}

    def pure(w: dict, lam: dict) -> dict:
        return {"a": 0.9 * w["a"] + lam["a"]}

    _, info = solver.with_info(w0, {"a": jnp.ones(())})
    _, want = make(pure).with_info(w0, {"a": jnp.ones(())})
    assert jax.tree.map(float, info) == jax.tree.map(float, want)
    checked = fg.with_tolerance(solver, _overwriting, rtol=1e-9)
    assert not bool(
        fg.with_tolerance(lambda w0, lam: w0, _overwriting).with_info(w0, {"a": 1.0})[1][2]
    )
    solve = fg.fixed_point(_overwriting, fg.aid(fg.dense()))(checked)
    np.testing.assert_allclose(
        jax.grad(lambda lam: solve(w0, {"a": lam})["a"] ** 2)(1.0), 200.0, rtol=1e-9
    )


@jax.tree_util.register_pytree_node_class
class _Bare:
    """A pytree class without a `repr`, that looks at what it is made of."""

    def __init__(self, x: Any) -> None:
        self.x = 1.0 * x

    def tree_flatten(self) -> Any:
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "_Bare":
        made = object.__new__(cls)
        (made.x,) = leaves
        return made


def test_a_pytree_class_without_a_repr_is_a_w(estimator: fg.Estimator) -> None:
    solve = solver_of(lambda w, lam: _Bare(0.5 * w.x + lam), estimator)
    got = jax.grad(lambda lam: solve(_Bare(0.0), lam).x ** 2)(1.0)
    np.testing.assert_allclose(got, 8.0, rtol=1e-6)


# The names of what the library's own functions take before the data.
NAMES = ("solver", "phi", "w0", "where", "function", "num_steps", "loss", "state", "grad")


def _named_data(w: jax.Array, lam: jax.Array, **data: jax.Array) -> jax.Array:
    return 0.5 * w + lam * sum(data.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        fg.picard(_named_data, num_steps=50),
        fg.anderson(_named_data, max_steps=9, rtol=1e-9),
        fg.with_tolerance(
            lambda start, lam, **data: 0 * start + 2 * lam * sum(data.values()), _named_data
        ),
        fg.from_host(lambda start, lam, **data: 0 * start + 2 * lam * sum(data.values())),
    ],
    ids=["picard", "anderson", "with_tolerance", "host"],
)
def test_data_may_have_any_name(solver: Any) -> None:
    data = dict.fromkeys(NAMES, jnp.asarray(1 / len(NAMES)))
    solve = fg.fixed_point(_named_data, fg.aid(fg.dense()))(solver)
    gradient = jax.grad(lambda lam: solve(jnp.zeros(()), lam, **data))(1.0)
    np.testing.assert_allclose(gradient, 2.0, rtol=1e-6)

    def half_square(w: jax.Array, lam: jax.Array, **data: jax.Array) -> jax.Array:
        return 0.5 * w**2 + 0 * lam * sum(data.values())

    hypergrad = fg.certified(
        fg.hypergradient(half_square, _named_data, solver, fg.aid(fg.dense())), every=1
    )
    state = hypergrad.init(jnp.zeros(()), jnp.asarray(1.0), **data)
    grad, _ = hypergrad.update(state, jnp.asarray(1.0), **data)
    np.testing.assert_allclose(grad, 4.0, rtol=1e-6)
    step = fg.gradient_descent(half_square, step_size=0.5)(1.0, 1.0, **data)
    np.testing.assert_allclose(step, 0.5)
