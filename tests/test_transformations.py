"""A part of the matrix transformation × solver × estimator; `python tests/matrix.py` has all of it."""

import jax
import pytest

import fixedgrad as fg
import matrix

REVERSE = ("grad", "vjp", "jacrev", "grad(grad)", "hessian", "jacfwd(jacrev)", "grad(grad(grad))")
FORWARD = ("jvp", "jacfwd", "linearize", "jacfwd(jacfwd)")

# (estimator, solver, transformations, variants): every name of the matrix occurs.
CELLS = (
    ("aid(cg)", "while_loop", REVERSE, ("vmap",)),
    ("aid(dense)", "pure_callback", ("grad", "hessian"), ("plain", "jit")),
    ("aid(fp)", "fori_loop", ("grad", "grad(grad)"), ("jit", "vmap")),
    ("aid(normal_cg)", "while_loop", ("grad(grad)",), ("jit",)),
    ("aid(gmres)", "pure_callback", ("grad(grad)",), ("vmap",)),
    ("aid(bicgstab)", "scan", ("grad(grad)",), ("jit",)),
    ("aid(from_lineax)", "while_loop", ("grad(grad)",), ("vmap",)),
    ("truncated_itd", "pure_callback", ("grad", "hessian"), ("jit", "vmap")),
    ("truncated_itd", "while_loop", ("grad(grad(grad))",), ("jit",)),
    ("itd", "fori_loop", ("grad", "hessian", *FORWARD), ("vmap",)),
    ("itd", "while_loop", FORWARD, ("jit",)),
    ("itd", "scan", ("vjp", "grad(grad)", "jacfwd(jacrev)", "jvp"), ("vmap",)),
    ("forward(aid(fp))", "scan", ("grad", "jvp"), ("jit",)),
    ("forward(aid(dense))", "pure_callback", (*REVERSE[:4], *FORWARD), ("vmap",)),
    ("forward(aid(cg))", "while_loop", ("jvp", "hessian"), ("plain",)),
    ("forward(truncated_itd)", "scan", ("vjp", *FORWARD), ("jit", "vmap")),
    ("forward(aid(gmres))", "while_loop", ("jacfwd",), ("vmap",)),
)

REFUSED = (
    ("aid(cg)", "while_loop", FORWARD, "refused: needs `forward`"),
    ("truncated_itd", "fori_loop", FORWARD, "refused: needs `forward`"),
    ("itd", "while_loop", REVERSE, "refused: no reverse mode of a `while`"),
    ("itd", "pure_callback", REVERSE + FORWARD, "refused: the solver is not JAX"),
)


def cases(table: tuple) -> list:
    return [
        pytest.param(estimator, solver, name, rest, id=f"{name}-of-{estimator}-of-{solver}")
        for estimator, solver, names, rest in table
        for name in names
    ]


@pytest.mark.slow(
    but=("grad-of-*", "jvp-of-*", "grad(grad)-of-itd-*", "hessian-of-truncated_itd-*")
)
@pytest.mark.parametrize(("estimator", "solver", "transformation", "variants"), cases(CELLS))
def test_a_transformation_equals_that_of_the_closed_form(
    estimator: str, solver: str, transformation: str, variants: tuple[str, ...]
) -> None:
    assert str(matrix.cell(estimator, solver, transformation, variants)) == "ok"


@pytest.mark.parametrize(("estimator", "solver", "transformation", "reason"), cases(REFUSED))
def test_a_transformation_that_cannot_be_is_refused_with_its_reason(
    estimator: str, solver: str, transformation: str, reason: str
) -> None:
    assert str(matrix.cell(estimator, solver, transformation, ("jit",))) == reason


def test_the_part_names_all_transformations_and_solvers_of_the_matrix() -> None:
    assert {name for row in CELLS for name in row[2]} == set(matrix.TRANSFORMATIONS)
    assert {row[1] for row in CELLS} == set(matrix.SOLVERS)
    assert set(matrix.ESTIMATORS) >= {row[0] for row in CELLS}


def test_the_matrix_shows_a_wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matrix.ESTIMATORS, "aid(fp)", fg.aid(fg.fp(num_steps=2)))
    wrong = matrix.cell("aid(fp)", "fori_loop", "grad", ("jit",))
    assert wrong.verdict == "WRONG"
    assert wrong.detail.startswith("relative error")


def test_an_exception_that_nobody_announced_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(w0: jax.Array, lam: jax.Array) -> jax.Array:
        raise ValueError(f"{w0.shape} {lam.shape}")

    monkeypatch.setitem(matrix.SOLVERS, "fori_loop", fails)
    assert matrix.cell("itd", "fori_loop", "grad", ("jit",)).verdict == "WRONG"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["itd", "truncated_itd", "aid(cg)", "forward(aid(gmres))"])
def test_no_tracer_outlives_its_trace(name: str) -> None:
    with jax.checking_leaks():
        assert str(matrix.cell(name, "fori_loop", "grad", ("plain",))) == "ok"


@pytest.mark.parametrize(
    "name", ["aid(fp)", "aid(cg)", "aid(normal_cg)", "aid(gmres)", "aid(dense)"]
)
def test_a_solve_that_succeeds_meets_no_nan_on_its_way(name: str) -> None:
    with jax.debug_nans(True):
        assert str(matrix.cell(name, "while_loop", "grad", ("plain",))) == "ok"


@pytest.mark.slow
def test_derivatives_can_be_stepped_through_without_jit() -> None:
    with jax.disable_jit():
        assert str(matrix.cell("aid(gmres)", "fori_loop", "grad", ("plain",))) == "ok"
