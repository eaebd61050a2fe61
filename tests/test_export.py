"""Programs for CPU, CUDA and TPU, lowered here without any of the last two; their precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import fixedgrad as fg
from problems import LINEAR_SOLVERS, matrix, named

pytestmark = pytest.mark.slow

PLATFORMS = ("cpu", "cuda", "tpu")
A = matrix(11, 1.0, 6, 4).astype(np.float32)
LAM = jnp.linspace(-0.5, 0.5, 4, dtype=jnp.float32)


def loss(w, lam, **dot):
    return jnp.sum(jnp.log(jnp.cosh(jnp.dot(A, w, **dot)))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


PHI = fg.gradient_descent(loss, step_size=0.3)
EXACT = fg.picard(PHI, num_steps=30)
TOLERANCE = fg.picard(PHI, max_steps=30, rtol=1e-5)


def gradient(estimator, solver, phi=PHI, **options):
    solve = fg.fixed_point(phi, estimator, **options)(solver)
    return jax.jit(jax.grad(lambda lam: jnp.sum(solve(jnp.zeros_like(lam), lam) ** 2)))


def export_to(platforms, function):
    return export.export(function, platforms=platforms)(LAM)


@pytest.mark.parametrize("solver", [EXACT, TOLERANCE], ids=["exact", "tolerance"])
@pytest.mark.parametrize(
    "estimator",
    [
        fg.truncated_itd(num_steps=5),
        fg.forward(fg.truncated_itd(num_steps=5)),
        fg.aid(fg.cg(num_steps=4)),
    ],
    ids=["truncated_itd", "forward-truncated_itd", "cg"],
)
def test_estimators_lower_for_every_platform(estimator, solver):
    assert export_to(PLATFORMS, gradient(estimator, solver)).platforms == PLATFORMS


def test_itd_lowers_for_every_platform():
    assert export_to(PLATFORMS, gradient(fg.itd(), EXACT)).platforms == PLATFORMS


@pytest.mark.parametrize("mode", [lambda e: e, fg.forward], ids=["reverse", "forward"])
@pytest.mark.parametrize("row", LINEAR_SOLVERS, ids=map(named, LINEAR_SOLVERS))
def test_linear_solvers_lower_for_every_platform(row, mode):
    exported = export_to(PLATFORMS, gradient(mode(fg.aid(row.solver)), EXACT))
    assert exported.platforms == PLATFORMS


@pytest.mark.parametrize("linear_solver", [fg.cg(max_steps=9, rtol=1e-5), fg.dense()])
def test_an_exported_program_gives_the_same_gradient(linear_solver):
    direct = gradient(fg.aid(linear_solver), TOLERANCE)
    exported = export_to(PLATFORMS, direct)
    np.testing.assert_allclose(exported.call(LAM), direct(LAM), rtol=1e-6)


@pytest.mark.parametrize(
    ("solver", "on_failure"),
    [
        (fg.from_host(lambda w0, lam: np.zeros_like(w0 + lam)), "nan"),
        (EXACT, "warn"),
        (EXACT, "raise"),
    ],
    ids=["from_host", "warn", "raise"],
)
def test_programs_that_call_the_host_cannot_be_exported(solver, on_failure):
    # JAX exports no host callback, so no solver on the host and no report from there; `on_failure`
    # "nan" and "ignore" need none.
    function = gradient(fg.aid(fg.dense()), solver, on_failure=on_failure)
    with pytest.raises(NotImplementedError, match="callback"):
        export_to(PLATFORMS, function)


# With the solution as its start nothing but the derivative computes, so that every product in the
# program is one of Φ's, or of the linear solver's own.
SOLVED = lambda w0, lam: w0 + 0 * lam  # noqa: E731
PRECISION = {
    "truncated_itd": fg.truncated_itd(num_steps=3),
    "fp": fg.aid(fg.fp(num_steps=3)),
    "cg": fg.aid(fg.cg(num_steps=3)),
    "cg rtol": fg.aid(fg.cg(max_steps=3, rtol=1e-3)),
    "normal_cg": fg.aid(fg.normal_cg(num_steps=3)),
    "gmres": fg.aid(fg.gmres(num_steps=3)),
    "gmres rtol": fg.aid(fg.gmres(max_steps=3, rtol=1e-3)),
    "bicgstab": fg.aid(fg.bicgstab(num_steps=3)),
    "dense": fg.aid(fg.dense()),
}


def precisions(function):
    """The precision of every product in the program for TPU, whose default is bfloat16 passes."""
    text = export_to(("tpu",), function).mlir_module()
    dots = re.findall(r"stablehlo\.dot_general.*", text)
    found = [re.search(r"precision = \[(\w+), (\w+)\]", dot) for dot in dots]
    return [m.groups() if m else ("DEFAULT", "DEFAULT") for m in found]


@pytest.mark.parametrize("name", PRECISION)
def test_products_of_the_derivative_are_at_highest_precision(name):
    found = precisions(gradient(PRECISION[name], SOLVED))
    assert found
    assert set(found) == {("HIGHEST", "HIGHEST")}


def test_second_derivatives_are_at_highest_precision():
    solve = fg.fixed_point(PHI, PRECISION["cg"])(SOLVED)
    hessian = jax.jit(jax.hessian(lambda lam: jnp.sum(solve(jnp.zeros_like(lam), lam) ** 2)))
    assert set(precisions(hessian)) == {("HIGHEST", "HIGHEST")}


def test_the_explicit_form_is_at_highest_precision():
    hypergrad = fg.hypergradient(lambda w, lam: jnp.sum(w**2), PHI, SOLVED, PRECISION["cg"])

    def update(lam):
        # Of the products only those behind the gradient remain: nobody reads the residuals.
        return hypergrad.update(hypergrad.init(jnp.zeros_like(lam), lam), lam)[0]

    assert ("HIGHEST", "HIGHEST") in precisions(jax.jit(update))


def explicitly(w, lam):
    return loss(w, lam, precision="high")


def in_a_context(w, lam):
    with jax.default_matmul_precision("default"):
        return loss(w, lam)


@pytest.mark.parametrize(
    ("own", "kept"), [(explicitly, "HIGH"), (in_a_context, "DEFAULT")], ids=["dot", "context"]
)
@pytest.mark.parametrize("name", ["fp", "cg", "dense"])
def test_the_precision_that_phi_asks_for_is_kept(name, own, kept):
    phi = fg.gradient_descent(own, step_size=0.3)
    assert set(precisions(gradient(PRECISION[name], SOLVED, phi))) == {(kept, kept)}
