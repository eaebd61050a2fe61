"""Every message that the library raises: what is wrong, what it got, what to do instead."""

# Mistakes on purpose: pyright sees them too.
# pyright: reportArgumentType=false

import ast
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import optimistix
import pytest

import fixedgrad as fg
from fixedgrad import compat

AID = fg.aid(fg.fp(num_steps=3))


class Row(NamedTuple):
    """A call that raises `error` with a message that matches `match`."""

    name: str
    error: type[Exception]
    match: str
    call: Callable[[], Any]


def half(w, lam):
    return 0.5 * w + lam


def loss(w, lam):
    return jnp.sum((w - lam) ** 2)


def traced(call: Callable[[jax.Array], Any]) -> Callable[[], Any]:
    """The call inside `jit`, with a traced number."""
    return lambda: jax.jit(lambda x: call(x) and x)(1.0)


# Stopping rules, the same in every factory that has one.

STOPPING: dict[str, Callable[..., Any]] = {
    "picard": lambda **rule: fg.picard(half, **rule),
    "anderson": lambda **rule: fg.anderson(half, **rule),
    "fp": fg.fp,
    "cg": fg.cg,
    "normal_cg": fg.normal_cg,
    "gmres": fg.gmres,
    "bicgstab": fg.bicgstab,
}
BAD_COUNTS = {
    "zero": (0, "got 0 of type `int`"),
    "negative": (-3, "got -3 of type `int`"),
    "fraction": (2.5, "got 2.5 of type `float`"),
    "boolean": (True, "got True of type `bool`"),
    "text": ("ten", "got 'ten' of type `str`"),
    "array": (np.ones(2, int), "got array"),
}
BAD_TOLERANCES = {
    "negative": (-1e-3, "got -0.001 of type `float`"),
    "infinite": (float("inf"), "got inf of type `float`"),
    "nan": (float("nan"), "got nan of type `float`"),
    "text": ("tight", "got 'tight' of type `str`"),
    "vector": (np.ones(2), "got array"),
    "complex": (1j, "got 1j of type `complex`"),
    "boolean": (True, "got True of type `bool`"),
    "none": (None, "got None of type `NoneType`"),
}
STOPPING_ROWS = [
    row
    for where, make in STOPPING.items()
    for row in (
        Row(
            f"{where} without a count",
            ValueError,
            f"`{where}` needs exactly one of `num_steps` .* and `max_steps` .*, got "
            "num_steps=None, max_steps=None",
            lambda make=make: make(),
        ),
        Row(
            f"{where} with both counts",
            ValueError,
            f"`{where}` needs exactly one of .* got num_steps=3, max_steps=4",
            lambda make=make: make(num_steps=3, max_steps=4),
        ),
        Row(
            f"{where} with num_steps and rtol",
            ValueError,
            f"`{where}` with `num_steps` takes exactly that many steps and has no tolerance, got "
            "rtol=0.1; use `max_steps` for early stopping",
            lambda make=make: make(num_steps=3, rtol=0.1),
        ),
        Row(
            f"{where} with num_steps and atol",
            ValueError,
            f"`{where}` with `num_steps` .* has no tolerance, got atol=1",
            lambda make=make: make(num_steps=3, atol=1),
        ),
    )
]
COUNT_ROWS = [
    Row(
        f"cg with {argument} that is {name}",
        ValueError,
        f"`{argument}` of `cg` must be a positive integer known before tracing, {got}",
        lambda argument=argument, value=value: fg.cg(**{argument: value}),
    )
    for argument in ("num_steps", "max_steps")
    for name, (value, got) in BAD_COUNTS.items()
]
TOLERANCE_ROWS = [
    Row(
        f"picard with {argument} that is {name}",
        ValueError,
        rf"`{argument}` of `picard` must be a (number in \[0, 1\)|finite number >= 0), {got}",
        lambda argument=argument, value=value: fg.picard(half, max_steps=3, **{argument: value}),
    )
    for argument in ("rtol", "atol")
    for name, (value, got) in BAD_TOLERANCES.items()
]
TRACED_ROWS = [
    Row(
        "rtol of one",
        ValueError,
        r"`rtol` of `fp` must be a number in \[0, 1\), got 1.0 of type `float`",
        lambda: fg.fp(max_steps=3, rtol=1.0),
    ),
    Row(
        "traced num_steps",
        ValueError,
        r"`num_steps` of `fp` must be a positive integer known before tracing, got a traced ",
        traced(lambda x: fg.fp(num_steps=x)),
    ),
    Row(
        "num_steps with a traced tolerance",
        ValueError,
        "`fp` with `num_steps` .* has no tolerance, got rtol=",
        traced(lambda x: fg.fp(num_steps=3, rtol=x)),
    ),
    Row(
        "traced tolerance of the wrong shape",
        ValueError,
        r"`rtol` of `fp` must be a number in \[0, 1\), got a traced ~?float64\[2\]",
        traced(lambda x: fg.fp(max_steps=3, rtol=jnp.stack([x, x]))),
    ),
]


# Functions, numbers and policies.

NOT_CALLABLE = {
    ("gradient_descent", "loss"): lambda: fg.gradient_descent(3, step_size=1.0),
    ("heavy_ball", "loss"): lambda: fg.heavy_ball(3, step_size=1.0, momentum=0.5),
    ("nesterov", "loss"): lambda: fg.nesterov(3, step_size=1.0, momentum=0.5),
    ("proximal_gradient", "loss"): lambda: fg.proximal_gradient(3, half, step_size=1.0),
    ("proximal_gradient", "prox"): lambda: fg.proximal_gradient(loss, 3, step_size=1.0),
    ("damped", "phi"): lambda: fg.damped(3, damping=0.5),
    ("picard", "phi"): lambda: fg.picard(3, num_steps=2),
    ("anderson", "phi"): lambda: fg.anderson(3, num_steps=2),
    ("broyden", "phi"): lambda: fg.broyden(3, max_steps=2),
    ("newton", "phi"): lambda: fg.newton(3, max_steps=2),
    ("newton", "linear_solver"): lambda: fg.newton(half, max_steps=2, linear_solver=3),
    ("with_tolerance", "solver"): lambda: fg.with_tolerance(3, half),
    ("with_tolerance", "phi"): lambda: fg.with_tolerance(half, 3),
    ("from_host", "function"): lambda: fg.from_host(3),
    ("from_host", "calling"): lambda: fg.from_host(half, calling=3),
    ("from_optimistix", "function"): lambda: fg.from_optimistix(3, None, max_steps=2),
    ("from_optax", "loss"): lambda: fg.from_optax(3, optax.sgd(0.1), num_steps=2),
    ("aid", "linear_solver"): lambda: fg.aid(3),
    ("fixed_point", "phi"): lambda: fg.fixed_point(3, AID),
    ("fixed_point", "solver"): lambda: fg.fixed_point(half, AID)(3),
    ("hypergradient", "outer"): lambda: fg.hypergradient(3, half, half, AID),
    ("hypergradient", "phi"): lambda: fg.hypergradient(loss, 3, half, AID),
    ("hypergradient", "solver"): lambda: fg.hypergradient(loss, half, 3, AID),
    ("descent", "outer"): lambda: fg.descent(3, half),
    ("descent", "phi"): lambda: fg.descent(loss, 3),
    ("descent", "project"): lambda: fg.descent(loss, half, project=3),
    ("descent", "monitor"): lambda: fg.descent(loss, half, monitor=3),
}
CALLABLE_ROWS = [
    Row(
        f"{where} with {argument} that is no function",
        TypeError,
        rf"`{argument}` of `{where}` must be a function `.*\(.*`, got 3 of type `int`",
        call,
    )
    for (where, argument), call in NOT_CALLABLE.items()
]
NUMBER_ROWS = [
    *(
        Row(
            f"{where} with a step size that is {value}",
            ValueError,
            f"`step_size` of `{where}` must be a finite number > 0 or a function .*, got {value}",
            lambda make=make, value=value: make(step_size=value),
        )
        for where, make in {
            "gradient_descent": lambda **s: fg.gradient_descent(loss, **s),
            "heavy_ball": lambda **s: fg.heavy_ball(loss, momentum=0.5, **s),
            "nesterov": lambda **s: fg.nesterov(loss, momentum=0.5, **s),
            "proximal_gradient": lambda **s: fg.proximal_gradient(loss, half, **s),
        }.items()
        for value in (0.0, -1.0)
    ),
    *(
        Row(
            f"{where} with a momentum of {value}",
            ValueError,
            rf"`momentum` of `{where}` must be a number in \[0, 1\), got {value}",
            lambda make=make, value=value: make(loss, step_size=0.1, momentum=value),
        )
        for where, make in {"heavy_ball": fg.heavy_ball, "nesterov": fg.nesterov}.items()
        for value in (1.0, -0.1)
    ),
    *(
        Row(
            f"damped with a damping of {value}",
            ValueError,
            rf"`damping` of `damped` must be a number in \[0, 1\), got {value}",
            lambda value=value: fg.damped(half, damping=value),
        )
        for value in (1.0, -0.1)
    ),
    Row(
        "anderson without regularisation",
        ValueError,
        "`regularisation` of `anderson` must be a number > 0, got 0.0",
        lambda: fg.anderson(half, num_steps=2, regularisation=0.0),
    ),
    Row(
        "anderson without a window",
        ValueError,
        "`window` of `anderson` must be a positive integer known before tracing, got 0",
        lambda: fg.anderson(half, num_steps=2, window=0),
    ),
    Row(
        "gmres with a restart of zero",
        ValueError,
        "`restart` of `gmres` must be a positive integer known before tracing, got 0",
        lambda: fg.gmres(num_steps=2, restart=0),
    ),
    Row(
        "root without a function",
        TypeError,
        r"`residual` of `root` must be a function .*, got 1.0",
        lambda: fg.root(1.0),
    ),
    Row(
        "root of an F that is not like w",
        TypeError,
        r"`root`: `residual\(w, ...\)` must have the structure",
        lambda: fg.root(lambda w, lam: (w, lam))(lambda w0, lam: w0)(1.0, 2.0),
    ),
    Row(
        "from_residual of an F that is not like w",
        TypeError,
        r"`from_residual`: `residual\(w, ...\)` must have the structure",
        lambda: fg.from_residual(lambda w, lam: (w, lam))(1.0, 2.0),
    ),
    Row(
        "a monitor that is none",
        TypeError,
        "`monitor` of `fixed_point` must be a function .*, got 'print' of type `str`",
        lambda: fg.fixed_point(half, monitor="print"),
    ),
    Row(
        "auto with a size of zero",
        ValueError,
        "`at_once` of `auto` must be a positive integer known before tracing, got 0",
        lambda: fg.auto(at_once=0),
    ),
    Row(
        "citation of what is not ours",
        TypeError,
        "`citation` looks up what factories of `fixedgrad` made, got 1.0 of type `float`",
        lambda: fg.citation(1.0),
    ),
    Row(
        "root_jvp with too few tangents",
        ValueError,
        "`tangents` of `root_jvp` must be as many as `args`, got 0 for 1",
        lambda: compat.root_jvp(lambda w, lam: w - lam, 1.0, (1.0,), ()),
    ),
    Row(
        "plot of one step",
        TypeError,
        "`plot` draws the history that `run` returns, got one step: float",
        lambda: fg.BilevelInfo(*[np.zeros(())] * 10).plot(),
    ),
    Row(
        "dense with a size of zero",
        ValueError,
        "`max_size` of `dense` must be a positive integer known before tracing, got 0",
        lambda: fg.dense(max_size=0),
    ),
    Row(
        "dense with blocks of zero",
        ValueError,
        "`block_size` of `dense` must be a positive integer known before tracing, got 0",
        lambda: fg.dense(block_size=0),
    ),
    Row(
        "truncated_itd of no steps",
        ValueError,
        "`num_steps` of `truncated_itd` must be a positive integer known before tracing, got 0",
        lambda: fg.truncated_itd(num_steps=0),
    ),
    Row(
        "from_optax of no steps",
        ValueError,
        "`num_steps` of `from_optax` must be a positive integer known before tracing, got 0",
        lambda: fg.from_optax(loss, optax.sgd(0.1), num_steps=0),
    ),
    *(
        Row(
            f"{constants.__name__} with L={L}, mu={mu}",
            ValueError,
            f"`{constants.__name__}` needs 0 < `mu` <= `L`, both finite, got L={L}, mu={mu}",
            lambda constants=constants, L=L, mu=mu: constants(L, mu),
        )
        for constants in (fg.optimal_step_size, fg.optimal_heavy_ball)
        for L, mu in ((1.0, 2.0), (1.0, 0.0), (float("nan"), 1.0))
    ),
]
POLICY_ROWS = [
    Row(
        f"{where} with an unknown policy",
        ValueError,
        rf"`on_failure` of `{where}` must be one of \('nan', 'zero', 'warn', 'raise', 'ignore'\), "
        "got 'skip'",
        call,
    )
    for where, call in {
        "picard": lambda: fg.picard(half, num_steps=2, on_failure="skip"),
        "anderson": lambda: fg.anderson(half, num_steps=2, on_failure="skip"),
        "with_tolerance": lambda: fg.with_tolerance(half, half, on_failure="skip"),
        "fixed_point": lambda: fg.fixed_point(half, AID, on_failure="skip"),
        "hypergradient": lambda: fg.hypergradient(loss, half, half, AID, on_failure="skip"),
    }.items()
]
ESTIMATOR_ROWS = [
    Row(
        f"{where} with {name} for an estimator",
        TypeError,
        rf"`estimator` of `{where}` must be an `Estimator` such as .*, got {got}.*\. Call a factory, "
        r"as in `itd\(\)`; a linear solver goes inside: `aid\(cg\(num_steps=10\)\)`",
        lambda use=use, value=value: use(value),
    )
    for where, use in {
        "forward": fg.forward,
        "fixed_point": lambda estimator: fg.fixed_point(half, estimator),
        "hypergradient": lambda estimator: fg.hypergradient(loss, half, half, estimator),
    }.items()
    for name, value, got in (
        ("a factory", fg.itd, "<function itd"),
        ("a linear solver", fg.cg(num_steps=2), r"cg\(num_steps=2\)"),
        ("text", "aid", "'aid' of type `str`"),
    )
]


# Structure, shapes and dtypes, found while tracing.


def decorated(phi, solver=None, **settings):
    return fg.fixed_point(phi, AID, **settings)(solver or (lambda w0, lam: w0 + 0.0 * lam))


def shorter(w, lam):
    return (0.5 * w + lam)[:1]


def as_pair(w, lam):
    return 0.5 * w + lam, lam


def as_float32(w, lam):
    return (0.5 * w + lam).astype(jnp.float32)


ONES = jnp.ones(2)
MISMATCHES = {
    "shape": (shorter, r"float64\[1\]"),
    "structure": (as_pair, r"\(float64\[2\], float64\[2\]\)"),
    "dtype": (as_float32, r"float32\[2\]"),
}
STRUCTURE_ROWS = [
    *(
        Row(
            f"{where} with a map of another {name}",
            TypeError,
            rf"`{where}`: `phi\(.*\)` must have the structure, shapes and dtypes of `w0?`.*\n"
            rf"  `w0?`.*: float64\[2\]\n"
            rf"  `phi\(.*\)`: {got}\n"
            "Make the two agree; where only dtypes differ, cast one of them with `.astype`",
            lambda use=use, phi=phi: use(phi),
        )
        for where, use in {
            "picard": lambda phi: fg.picard(phi, num_steps=2)(ONES, ONES),
            "anderson": lambda phi: fg.anderson(phi, num_steps=2)(ONES, ONES),
            "with_tolerance": lambda phi: fg.with_tolerance(lambda w0, lam: w0 + 0.0 * lam, phi)(
                ONES, ONES
            ),
            "fixed_point": lambda phi: decorated(phi)(ONES, ONES),
            "hypergradient": lambda phi: fg.hypergradient(
                loss, phi, lambda w0, lam: w0 + 0.0 * lam, AID
            ).init(ONES, ONES),
        }.items()
        for name, (phi, got) in MISMATCHES.items()
    ),
    Row(
        "unrolled solver with a map of another shape",
        TypeError,
        r"`fixed_point`: `phi\(w, ...\)` must have the structure, shapes and dtypes of `w`",
        lambda: fg.fixed_point(shorter, fg.itd())(lambda w0, lam: w0 + lam)(ONES, ONES),
    ),
    Row(
        "solver that returns another structure than w0",
        TypeError,
        r"`hypergradient`: `w0` must have the structure, .* of `w` \(the solver's result\)",
        lambda: fg.hypergradient(
            lambda w, lam: jnp.sum(w["w"] + lam),
            lambda w, lam: {"w": 0.5 * w["w"] + lam},
            lambda w0, lam: {"w": w0 + lam},
            AID,
        ).init(ONES, ONES),
    ),
    Row(
        "product of another shape than b",
        TypeError,
        r"`cg`: `matvec\(b\)` must have the structure, shapes and dtypes of `b`.\n"
        r"  `b`: float64\[2\]\n  `matvec\(b\)`: float64\[1\]",
        lambda: fg.cg(num_steps=2)(lambda v: v[:1], ONES),
    ),
    Row(
        "start of another dtype than b",
        TypeError,
        r"`fp`: `x0` must have the structure, shapes and dtypes of `b`.\n"
        r"  `b`: float64\[2\]\n  `x0`: float32\[2\]",
        lambda: fg.fp(num_steps=2)(lambda v: 0.5 * v, ONES, ONES.astype(jnp.float32)),
    ),
    Row(
        "dense system that is too large",
        ValueError,
        "`dense` would materialise a 5 by 5 matrix, more than its `max_size`=4; use `cg`, `gmres` "
        "or `fp`, or raise `max_size`",
        lambda: fg.dense(max_size=4)(lambda v: 0.5 * v, jnp.ones(5)),
    ),
    *(
        Row(
            f"outer objective that returns {name}",
            TypeError,
            rf"`outer` of `hypergradient` must return one real scalar, got {got}; sum or average",
            lambda outer=outer: fg.hypergradient(
                outer, half, lambda w0, lam: w0 + 0.0 * lam, AID
            ).init(ONES, ONES),
        )
        for name, outer, got in (
            ("a vector", lambda w, lam: w + lam, r"float64\[2\]"),
            (
                "a complex number",
                lambda w, lam: jnp.sum(w + lam).astype(complex),
                r"complex128\[\]",
            ),
            ("an integer", lambda w, lam: jnp.sum(w > lam), r"int64\[\]"),
            ("a pair", lambda w, lam: (jnp.sum(w), lam), r"\(float64\[\], float64\[2\]\)"),
            ("a list", lambda w, lam: [jnp.sum(w + lam)], r"\[float64\[\]\]"),
        )
    ),
    Row(
        "has_aux without a pair",
        TypeError,
        r"The solver under `fixed_point` must return the pair `\(w, aux\)`, since `has_aux=True`, got "
        r"float64\[2\]",
        lambda: decorated(half, has_aux=True)(ONES, ONES),
    ),
    Row(
        "argument that is neither an array nor hashable",
        TypeError,
        r"An argument holds \{1\} of type `set`, which is neither numeric nor "
        "hashable; pass arrays, numbers or registered pytrees, or close over it",
        lambda: decorated(half)(ONES, {1}),
    ),
    Row(
        "starting point that holds text",
        TypeError,
        r"`w0` of `fixed_point` must hold arrays and numbers only, got 'zero' of type `str` at "
        r"`w0\['w'\]`; keep it elsewhere: as a further argument, or in a closure",
        lambda: decorated(half)({"w": "zero"}, ONES),
    ),
]


LINEAR_SOLVER_ROWS = [
    Row(
        "aid with a solver that takes something else",
        TypeError,
        r"`linear_solver` of `aid` must take `\(matvec, b, x0=None\)`, got .*too many positional "
        r"arguments. Call a factory, as in `cg\(num_steps=10\)`",
        lambda: fg.aid(lambda matvec: matvec),
    ),
    *(
        Row(
            f"aid with a solver that returns {name}",
            TypeError,
            r"`linear_solver` of `aid` must return a pair `\(x, info\)` with info a `SolveInfo`, got "
            r".*It solves \(I - M\) x = b from products with M: the solvers of `jax.scipy` do "
            "something else, those of lineax go through `from_lineax`",
            lambda solver=solver: _one_gradient(fg.aid(solver)),
        )
        for name, solver in (
            ("x alone", lambda _, b, __=None: b),
            ("no info", lambda _, b, __=None: (b, None)),
        )
    ),
    Row(
        "aid with a solver whose x is not like b",
        TypeError,
        r"`aid`: `x`, of the linear solver's `\(x, info\)` must have the structure, .* of `b`",
        lambda: _one_gradient(
            fg.aid(lambda _, b, __=None: fg.fp(num_steps=2)(lambda v: v, b["w"]))
        ),
    ),
    Row(
        "product that is a matrix",
        TypeError,
        r"`matvec` of `cg` must be a function `matvec\(x\) -> M x`, got .*Array",
        lambda: fg.cg(num_steps=2)(jnp.eye(2), ONES),
    ),
    Row(
        "right-hand side of integers",
        TypeError,
        r"`b` of `cg` must hold floating-point or complex arrays only, got int64\[2\]; cast integers",
        lambda: fg.cg(num_steps=2)(lambda v: v, jnp.ones(2, int)),
    ),
    Row(
        "from_lineax with a class",
        TypeError,
        "`solver` of `from_lineax` must be a `lineax.AbstractLinearSolver`, got .*; make one, as in "
        r"`lineax.GMRES\(rtol=1e-6, atol=1e-6\)`",
        lambda: fg.from_lineax(lineax.GMRES),
    ),
]
OTHER_ROWS = [
    Row(
        "picard with a factory for its checkpoints",
        TypeError,
        r"`checkpoints` of `picard` must be `every_iterate\(\)`, .* or `recursive\(\)`, got <function",
        lambda: fg.picard(half, num_steps=2, checkpoints=fg.nested),
    ),
    Row(
        "recursive with no checkpoint",
        ValueError,
        "`num_checkpoints` of `recursive` must be a positive integer known before tracing, got 0",
        lambda: fg.recursive(num_checkpoints=0),
    ),
    Row(
        "forward mode of recursive checkpoints",
        TypeError,
        "custom_vjp",
        lambda: jax.jvp(
            lambda lam: fg.picard(half, num_steps=2, checkpoints=fg.recursive())(ONES, lam),
            (ONES,),
            (ONES,),
        ),
    ),
    Row(
        "itd through a host solver",
        TypeError,
        "A solver made by `from_host` is not JAX and cannot be differentiated itself. Decorate it "
        r"with `fixed_point\(phi, aid\(...\)\)` or `truncated_itd\(...\)`",
        lambda: jax.grad(lambda lam: fg.fixed_point(half, fg.itd())(fg.from_host(half))(1.0, lam))(
            1.0
        ),
    ),
    Row(
        "reverse-mode itd through a while_loop",
        ValueError,
        r"(?s)while_loop.*`itd\(\)` differentiates the solver's own loop, in reverse mode here: give "
        r"the solver `num_steps` in place of `max_steps`, or take `aid\(...\)`",
        lambda: fg.hypergradient(
            loss,
            half,
            lambda w0, lam: jax.lax.while_loop(lambda w: w[0] < 1.0, lambda w: half(w, lam), w0),
            fg.itd(),
        ).init(ONES, ONES),
    ),
    *(
        Row(
            f"{mode.__name__} of steps that a tolerance ends, in {make.__name__}",
            TypeError,
            f"`{make.__name__}` with `max_steps` ends by the residual of w, which says nothing of the "
            r"derivative of w: .* Give `num_steps`, .*, or decorate .* with `fixed_point\(phi, aid",
            lambda make=make, mode=mode: mode(
                lambda lam: fg.fixed_point(half, fg.itd())(make(half, max_steps=9, rtol=0.1))(
                    2.0, lam
                )
            )(1.0),
        )
        for make in (fg.picard, fg.anderson)
        for mode in (jax.grad, jax.jacfwd)
    ),
    Row(
        "solver that needs concrete values",
        jax.errors.TracerArrayConversionError,
        "(?s)`fixed_point` traces the solver, as `jax.jit` does. A solver in NumPy or SciPy, or Python "
        "code that needs concrete values, goes through `fixedgrad.from_host`",
        lambda: decorated(half, lambda w0, lam: np.asarray(w0) + np.asarray(lam))(ONES, ONES),
    ),
    Row(
        "map that does not take what the solver takes",
        TypeError,
        r"(?s)unexpected keyword.*`fixed_point` called `phi` with w = float64\[2\], args = "
        r"\(float64\[2\], float64\[\]\), kwargs = \{'c': float64\[\]\}: `phi` gets what the "
        "solver gets",
        lambda: decorated(half, lambda w0, *_, **__: w0)(ONES, ONES, 1.0, c=2.0),
    ),
    Row(
        "an extrapolation of the third order",
        ValueError,
        "`order` of `extrapolated` must be 0, 1 or 2, got 3",
        lambda: fg.extrapolated(order=3),
    ),
    Row(
        "a preconditioner that is none",
        TypeError,
        "`preconditioner` of `cg` must be a `Preconditioner`, got 3 of type `int`; write",
        lambda: fg.cg(num_steps=2, preconditioner=3),
    ),
    Row(
        "a preconditioner for a direct solver of lineax",
        TypeError,
        "`from_lineax` has a `preconditioner` for `CG`, `GMRES` and `BiCGStab`, got",
        lambda: fg.from_lineax(lineax.LU(), preconditioner=fg.inverse()),
    ),
    Row(
        "an inverse of too many unknowns",
        ValueError,
        "`inverse` would materialise a 2 by 2 matrix, more than its `max_size`=1; take `nystrom`",
        lambda: fg.cg(num_steps=2, preconditioner=fg.inverse(max_size=1))(lambda u: 0.5 * u, ONES),
    ),
    Row(
        "an inverse of a part of a system",
        TypeError,
        "`inverse` makes a matrix of one system, but a collective .* along 'i'; take `nystrom`",
        lambda: jax.vmap(
            lambda b: fg.cg(num_steps=2, preconditioner=fg.inverse())(
                lambda u: 0.1 * jax.lax.psum(u, "i"), b
            )[0],
            axis_name="i",
        )(jnp.ones((2, 2))),
    ),
    Row(
        "a negative ridge",
        ValueError,
        "`ridge` of `gmres` must be a finite number >= 0, got -1",
        lambda: fg.gmres(num_steps=2, ridge=-1.0),
    ),
    Row(
        "from_optimistix with a factory",
        TypeError,
        "`solver` of `from_optimistix` must be a solver of optimistix, got .*; make one, as in ",
        lambda: fg.from_optimistix(half, optimistix.Newton, max_steps=2),
    ),
    Row(
        "from_optax with a factory",
        TypeError,
        "`optimizer` of `from_optax` must be an optax optimiser, got .*; call it, as in "
        r"`optax.adam\(1e-2\)`",
        lambda: fg.from_optax(loss, optax.sgd, num_steps=2),
    ),
    *(
        Row(
            f"{make.__name__} on a state without momentum",
            TypeError,
            rf"The map of `{make.__name__}` acts on a state `Momentum\(w, previous\)`, got "
            r"float64\[2\]; start from `Momentum\(w0, w0\)`, and take `.w` of the result",
            lambda make=make: make(loss, step_size=0.1, momentum=0.1)(ONES, ONES),
        )
        for make in (fg.heavy_ball, fg.nesterov)
    ),
    Row(
        "solver that is a method of no object",
        TypeError,
        r"`fixed_point`: the solver's first argument must be w0, got the method .*, whose first is "
        r"`self`. Decorate within a method, as in `fixed_point\(phi, estimator\)\(self.solve\)`",
        lambda: decorated(half, lambda self, w0, lam: w0),
    ),
    Row(
        "solver with its arguments in another order",
        TypeError,
        r"`fixed_point`: the solver and `phi` get the same arguments in the same places, .*: the "
        r"solver has \(w0, mu, lam\), `phi` has \(w, lam, mu\); give both the same order",
        lambda: decorated(lambda w, lam, mu: w, lambda w0, mu, lam: w0),
    ),
    Row(
        "solver with another default",
        TypeError,
        "`fixed_point`: the parameter `c` has the default 3.0 .* in the solver and 1.0 .* in `phi`, "
        "and the call does not give it; give it in the call, or make the defaults equal",
        lambda: decorated(lambda w, lam, c=1.0: w, lambda w0, lam, c=3.0: w0)(ONES, ONES),
    ),
    Row(
        "step with the state of another optimiser",
        TypeError,
        r"(?s)`state` of `step` holds the state of another optimiser .*: \(EmptyState.*"
        r"ScaleByAdamState.*\nTake the state from this loop's `init`, as in `init\(w0, state.lam\)`",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd(0.1)).step(
            fg.bilevel(HYPERGRAD, optax.adam(0.1)).init(ONES, ONES)
        ),
    ),
    Row(
        "has_aux that is a function",
        TypeError,
        "`has_aux` of `fixed_point` must be a bool, got .* of type `function`",
        lambda: decorated(half, has_aux=half),
    ),
    Row(
        "start that is a factory",
        TypeError,
        r"`start` of `hypergradient` must be a `Start`, got .*; call a factory, as in `warm\(\)`",
        lambda: fg.hypergradient(loss, half, half, AID, start=fg.warm),
    ),
    Row(
        "update with its arguments in the wrong order",
        TypeError,
        "`state` of `update` must be what `init` or the last `update` returned, got .*; the order is "
        r"`update\(state, lam\)`",
        lambda: HYPERGRAD.update(ONES, HYPERGRAD.init(ONES, ONES)),
    ),
    Row(
        "lam of integers",
        TypeError,
        r"`lam` of `hypergradient` has no floating-point leaf to differentiate, got int64\[\]; write "
        "`1.0` for `1`",
        lambda: HYPERGRAD.init(ONES, jnp.asarray(1)),
    ),
]


def _one_gradient(estimator):
    def phi(w, lam):
        return {"w": 0.5 * w["w"] + lam}

    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, num_steps=2))
    return jax.eval_shape(jax.grad(lambda lam: solve({"w": 1.0}, lam)["w"]), 1.0)


# The outer loop.

HYPERGRAD = fg.hypergradient(loss, half, fg.picard(half, num_steps=3), AID)
COLLECTIVE_ROWS = [
    Row(
        f"{name} of a system that a collective spreads over an axis",
        TypeError,
        f"`{name}` solves one system on its own, but a collective over `i` makes one of all",
        lambda solver=solver: jax.vmap(
            lambda b: solver(lambda u: jax.lax.pmean(u, "i"), b)[0], axis_name="i"
        )(jnp.ones((2, 3))),
    )
    for name, solver in {
        "dense": fg.dense(),
        "from_lineax": fg.from_lineax(lineax.GMRES(1e-6, 1e-6)),
    }.items()
]
COLLECTIVE_ROWS.append(
    Row(
        "certificate of a part",
        TypeError,
        "`certify` knows one w, but a collective of `phi` over 'i' couples it",
        lambda: jax.vmap(
            lambda lam: (
                fg.certify(
                    loss, lambda w, lam: 0.5 * jax.lax.pmean(w, "i") + lam, lam, None, lam
                ).error
            ),
            axis_name="i",
        )(jnp.ones((2, 3))),
    )
)


def _in_box(bounds):
    objective = lambda w, lam: jnp.sum(w * lam)  # noqa: E731
    return fg.descent(objective, lambda w, lam: 0.5 * w + lam, bounds=bounds).init(ONES, ONES)


BILEVEL_ROWS = [
    Row(
        "bilevel with a function for a hypergradient",
        TypeError,
        r"`hypergrad` of `bilevel` must have `init` and `update`, as `hypergradient\(...\)` returns",
        lambda: fg.bilevel(loss, optax.sgd(0.1)),
    ),
    Row(
        "bilevel with a factory for an optimiser",
        TypeError,
        "`optimizer` of `bilevel` must be an optax optimiser, got .*; call it, as in "
        r"`optax.adam\(1e-2\)`",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd),
    ),
    Row(
        "bilevel with a projection that is no function",
        TypeError,
        r"`project` of `bilevel` must be a function `project\(lam\) -> lam`, got 1.0 of type `float`",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd(0.1), project=1.0),
    ),
    Row(
        "bilevel with a projection to another shape",
        TypeError,
        r"`bilevel`: `project\(lam\)` must have the structure, shapes and dtypes of `lam`",
        lambda: _one_step(fg.bilevel(HYPERGRAD, optax.sgd(0.1), project=lambda lam: lam[:1])),
    ),
    Row(
        "run of no steps",
        ValueError,
        "`num_steps` of `run` must be a positive integer known before tracing, got 0",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd(0.1)).run(None, num_steps=0),
    ),
    Row(
        "bilevel with a function in lam",
        TypeError,
        r"`lam` of `bilevel` must hold arrays and numbers only, got .* at `lam\[1\]`; keep it",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd(0.1)).init(ONES, (ONES, jnp.tanh)),
    ),
    Row(
        "run with a number as its rule",
        TypeError,
        r"`stop` of `run` must be a function `stop\(info\) -> bool array`, got 1e-06",
        lambda: _run(stop=1e-6),
    ),
    Row(
        "run with a rule that gives a number",
        TypeError,
        r"`stop` of `run` must return one boolean, got float64\[\]; compare, as in",
        lambda: _run(stop=lambda info: info.value),
    ),
    Row(
        "run with a rule that gives a Python bool",
        TypeError,
        r"`stop` of `run` must compute its answer from `info` alone, got .* `run` traces `stop`",
        lambda: _run(stop=lambda info: False),
    ),
    Row(
        "run from no state",
        TypeError,
        "`state` of `run` must be what `init` or the last `run` returned, got None",
        lambda: fg.bilevel(HYPERGRAD, optax.sgd(0.1)).run(None, num_steps=1),
    ),
    Row(
        "run with too few batches",
        TypeError,
        r"`batches` of `run` must have a leading axis of length `num_steps`=2 in every leaf, got "
        r"float64\[3\]",
        lambda: _run(stop=None, batches=jnp.ones(3)),
    ),
    Row(
        "run with a number for metrics",
        TypeError,
        r"`metrics` of `run` must be a function `metrics\(state\) -> pytree of arrays`, got 1.0",
        lambda: _run(stop=None, metrics=1.0),
    ),
    Row(
        "patience without end",
        ValueError,
        "`num_steps` of `patience` must be a positive integer known before tracing, got inf",
        lambda: fg.patience(num_steps=jnp.inf),
    ),
    Row(
        "patience that gives way to nothing",
        ValueError,
        r"`rtol` of `patience` must be a number in \[0, 1\), got 1.0",
        lambda: fg.patience(num_steps=1, rtol=1.0),
    ),
    Row(
        "descent by a method that is none",
        ValueError,
        '`method` of `descent` must be "lbfgs" or "gradient", got .adam.',
        lambda: fg.descent(loss, half, method="adam"),
    ),
    Row(
        "descent in a box and by a projection",
        ValueError,
        "`descent` takes one of `bounds` and `project`, got both; a box is best given by `bounds`",
        lambda: fg.descent(loss, half, bounds=(0.0, 1.0), project=half),
    ),
    Row(
        "descent in a box with one side",
        TypeError,
        r"`bounds` of `descent` must be a pair \(lower, upper\) of .*, got 1.0 .*; write `-jnp.inf`",
        lambda: fg.descent(loss, half, bounds=1.0),
    ),
    Row(
        "descent in an empty box",
        ValueError,
        r"`bounds` of `descent` must be \(lower, upper\) with lower <= upper, got \(1.0 .*, 0.0",
        lambda: fg.descent(loss, half, bounds=(1.0, 0.0)),
    ),
    Row(
        "descent in a box that is not like lam",
        TypeError,
        r"`bounds` of `descent` must have the structure of `lam`, or be numbers, got .* for float64\[2",
        lambda: _in_box(((0.0, 0.0), (1.0, 1.0))),
    ),
    Row(
        "descent to a tolerance of one",
        ValueError,
        r"`rtol` of `descent` must be a number in \[0, 1\), got 1.0",
        lambda: fg.descent(loss, half, rtol=1.0),
    ),
    Row(
        "descent to a negative tolerance",
        ValueError,
        "`atol` of `descent` must be a number >= 0, got -1.0",
        lambda: fg.descent(loss, half, atol=-1.0),
    ),
    Row(
        "descent without memory",
        ValueError,
        "`memory` of `descent` must be a positive integer known before tracing, got 0",
        lambda: fg.descent(loss, half, memory=0),
    ),
]

TRUST_ROWS = [
    Row(
        "certify_proved from nothing",
        TypeError,
        "`constants` of `certify_proved` must be a `fixedgrad.bounds.Constants`, got None .*They must "
        "come from you",
        lambda: fg.certify_proved(loss, half, ONES, ONES, ONES, constants=None),
    ),
    Row(
        "certify with a v of another shape",
        TypeError,
        "`certify`: `v` must have the structure, shapes and dtypes of `w`",
        lambda: fg.certify(loss, half, ONES, ONES[:1], ONES),
    ),
    Row(
        "certify of a gradient of another shape",
        TypeError,
        r"`certify`: `gradient` must have the structure, shapes and dtypes of `lam`",
        lambda: fg.certify(loss, half, ONES, ONES, ONES, gradient=ONES[:1]),
    ),
    Row(
        "certify without anything to differentiate",
        TypeError,
        "`lam` of `certify` has no floating-point leaf to differentiate, got .*; write `1.0` for `1`",
        lambda: fg.certify(loss, half, ONES, ONES, 2),
    ),
    Row(
        "certify with a finished linear solver",
        TypeError,
        r"(?s)`make_linear_solver` of `certify` must be a function `make_linear_solver\(rtol\) -> "
        r"LinearSolver`.* Write `lambda rtol: cg\(",
        lambda: fg.certify(
            loss, half, ONES, ONES, ONES, make_linear_solver=fg.cg(max_steps=9, rtol=0.1)
        ),
    ),
    Row(
        "certify of a map that changes its state",
        TypeError,
        r"(?s)`certify`: `phi\(w, ...\)` must have the structure, shapes and dtypes of `w`",
        lambda: fg.certify(loss, lambda w, lam: w[:1] + lam[:1], ONES, ONES, ONES),
    ),
    Row(
        "certified of something else",
        TypeError,
        r"`hypergrad` of `certified` must be the result of `hypergradient\(...\)`, got ",
        lambda: fg.certified(half),
    ),
    Row(
        "certified with a misspelt option",
        TypeError,
        "unexpected keyword argument 'solve_rtoll'",
        lambda: fg.certified(HYPERGRAD, solve_rtoll=0.1),
    ),
    Row(
        "certified with a bad number, before anything runs",
        ValueError,
        r"`solve_rtol` of `certified` must be a number in \(0, 1\), got 2.0",
        lambda: fg.certified(HYPERGRAD, solve_rtol=2.0),
    ),
    Row(
        "certify with a misspelt option",
        TypeError,
        "unexpected keyword argument 'solve_rtoll'",
        lambda: fg.certify(loss, half, ONES, ONES, ONES, solve_rtoll=0.1),
    ),
    Row(
        "certify with keyword data that is no mapping",
        TypeError,
        r'`kwargs` of `certify` must be a mapping from names to data, got 3 .* write kwargs={"x": x}',
        lambda: fg.certify(loss, half, ONES, ONES, ONES, kwargs=3),
    ),
    Row(
        "certify with an option that may be data",
        TypeError,
        r'`safety` is an option of `certify` and a parameter of `phi` .* write kwargs={"safety": ...}',
        lambda: fg.certify(
            loss, lambda w, lam, safety=1.0: safety * half(w, lam), ONES, ONES, ONES, safety=3.0
        ),
    ),
    Row(
        "check_gradient with a misspelt option",
        TypeError,
        "unexpected keyword argument 'steps'",
        lambda: fg.check_gradient(half, loss, half, ONES, ONES, steps=3),
    ),
    Row(
        "recommend with a misspelt option",
        TypeError,
        "unexpected keyword argument 'tol'",
        lambda: fg.recommend(loss, half, ONES, ONES, tol=1e-3),
    ),
    Row(
        "adaptive update with its arguments exchanged",
        TypeError,
        r"`state` of `update` must be what `init` or the last `update` returned, got ",
        lambda: fg.adaptive_hypergradient(loss, half, rtol=0.1).update(ONES, ONES),
    ),
    Row(
        "check without an objective",
        TypeError,
        r"`outer` of `check_gradient` must be a function `outer\(w, lam, \*args\) -> scalar`, got None",
        lambda: fg.check_gradient(lambda w0, lam: w0, None, half, ONES, ONES),
    ),
    Row(
        "check under jit",
        TypeError,
        r"`check_gradient` looks at numbers .* got a traced float64\[2\]; call it outside `jit`",
        lambda: jax.jit(lambda lam: fg.check_gradient(half, loss, half, ONES, lam))(ONES),
    ),
    Row(
        "recommend under vmap",
        TypeError,
        r"`recommend` looks at numbers .* got a traced float64\[\]; call it outside `jit`",
        lambda: jax.vmap(lambda lam: fg.recommend(loss, half, ONES, lam))(ONES),
    ),
    Row(
        "recommend to no accuracy",
        ValueError,
        r"`rtol` of `recommend` must be a number in \(0, 1\), got 2.0",
        lambda: fg.recommend(loss, half, ONES, ONES, rtol=2.0),
    ),
]


ROWS_OF_DATA = jnp.ones((6, 2))
BATCHES = fg.minibatches(ROWS_OF_DATA, 3)


def mean_loss(w, lam, x):
    return jnp.mean((x @ w - 1.0) ** 2) + jnp.sum(lam * w**2)


MEAN_MAP = fg.gradient_descent(mean_loss, step_size=0.1)
PROX_MAP = fg.proximal_gradient(mean_loss, lambda v, step, lam, x: v, step_size=0.1)


def stochastic(**options):
    return fg.stochastic_hypergradient(mean_loss, MEAN_MAP, **options)


def _first(hypergrad, *data):
    return hypergrad.init(ONES, ONES, *data)


def _certify(*data, **options):
    return fg.certify_stochastic(mean_loss, MEAN_MAP, ONES, ONES, ONES, *data, **options)


STOCHASTIC_ROWS = [
    Row(
        "minibatches larger than the data",
        ValueError,
        "`batch_size` of `minibatches` must be at most the number of rows, 6, got 7; give the data",
        lambda: fg.minibatches(ROWS_OF_DATA, 7),
    ),
    Row(
        "minibatches of arrays of different lengths",
        TypeError,
        r"`data` of `minibatches` must be arrays with one leading axis of rows, got \(float64\[6,2\]",
        lambda: fg.minibatches((ROWS_OF_DATA, ONES), 2),
    ),
    Row(
        "given batches of nothing",
        TypeError,
        r"`batches` of `given_batches` must be arrays with one leading axis of batches, got \(\)",
        lambda: fg.given_batches(()),
    ),
    Row(
        "no batches among the arguments",
        TypeError,
        r"`stochastic_hypergradient` got no batches: none of its arguments after `lam` is `minibatches",
        lambda: _first(stochastic(), ROWS_OF_DATA),
    ),
    Row(
        "too few given batches",
        ValueError,
        "`stochastic_hypergradient` evaluates `phi` 21 times an update and was given 4 batches; give ",
        lambda: _first(stochastic(), fg.given_batches(jnp.ones((4, 3, 2)))),
    ),
    Row(
        "given batches with a schedule",
        ValueError,
        "`stochastic_hypergradient` with `given_batches` needs numbers of steps and batches that are ",
        lambda: _first(stochastic(lower_steps=lambda n: n), fg.given_batches(jnp.ones((4, 3, 2)))),
    ),
    Row(
        "a number of steps that is none",
        ValueError,
        "`lower_steps` of `stochastic_hypergradient` must be a positive integer or a function of the "
        "number of updates, got 1.5 of type `float`",
        lambda: stochastic(lower_steps=1.5),
    ),
    Row(
        "saba of a proximal map",
        TypeError,
        "`saba` needs a `phi` that is a mean over rows, got a `proximal_gradient` map",
        lambda: fg.saba(mean_loss, PROX_MAP),
    ),
    Row(
        "saba of given batches",
        TypeError,
        r"`saba` needs one or two `minibatches` among the arguments, .* got \[given_batches\(",
        lambda: _first(fg.saba(mean_loss, MEAN_MAP), fg.given_batches(jnp.ones((4, 3, 2)))),
    ),
    Row(
        "saba of a batch size that does not divide the rows",
        ValueError,
        "`saba` cuts 6 rows into blocks of 4, which does not divide them; take a batch size of 3 or 6",
        lambda: _first(fg.saba(mean_loss, MEAN_MAP), fg.minibatches(ROWS_OF_DATA, 4)),
    ),
    Row(
        "chunks of no size",
        ValueError,
        r"`chunked` needs one of `chunk_size` \(rows\) and `memory` \(bytes\), got none",
        lambda: fg.chunked(MEAN_MAP),
    ),
    Row(
        "chunks of a memory that is no size",
        ValueError,
        "`memory` of `chunked` must be a number of bytes, or a text such as .256 MiB. .* got 'a lot'",
        lambda: fg.chunked(MEAN_MAP, memory="a lot"),
    ),
    Row(
        "chunks of a memory that is too small",
        ValueError,
        "`memory`=1 bytes of `chunked` are too few: a product over chunks of 1 rows takes .* bytes",
        lambda: fg.chunked(MEAN_MAP, memory=1)(ONES, ONES, ROWS_OF_DATA),
    ),
    Row(
        "chunks of what has no rows",
        TypeError,
        r"`chunked` averages over a common leading axis of the arguments \(2,\), got \['float64\[\]'\]",
        lambda: fg.chunked(MEAN_MAP, chunk_size=2)(ONES, ONES, jnp.ones(())),
    ),
    Row(
        "a certificate of more groups than rows",
        ValueError,
        r"`num_groups` of `certify_stochastic` must be at least 2 and at most the number of rows, 6, ",
        lambda: _certify(BATCHES, num_groups=7),
    ),
    Row(
        "a stochastic certificate without batches",
        TypeError,
        "`certify_stochastic` got no batches: none of its arguments after `lam` is",
        lambda: _certify(ROWS_OF_DATA),
    ),
    Row(
        "a stochastic certificate with a misspelt option",
        TypeError,
        "unexpected keyword argument 'groups'",
        lambda: _certify(BATCHES, groups=3),
    ),
]


def _run(**options):
    loop = fg.bilevel(HYPERGRAD, optax.sgd(0.1))
    return loop.run(loop.init(ONES, ONES), num_steps=2, **options)


def _one_step(loop):
    return jax.eval_shape(lambda: loop.step(loop.init(ONES, ONES)))


ROWS = [
    *STOPPING_ROWS,
    *COUNT_ROWS,
    *TOLERANCE_ROWS,
    *TRACED_ROWS,
    *CALLABLE_ROWS,
    *NUMBER_ROWS,
    *POLICY_ROWS,
    *ESTIMATOR_ROWS,
    *STRUCTURE_ROWS,
    *LINEAR_SOLVER_ROWS,
    *COLLECTIVE_ROWS,
    *OTHER_ROWS,
    *BILEVEL_ROWS,
    *TRUST_ROWS,
    *STOCHASTIC_ROWS,
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_mistake_is_explained(row):
    with pytest.raises(row.error, match=row.match):
        row.call()


# Failed solves: their messages come from a callback at run time.

REMEDIES = {
    fg.Status.MAX_STEPS: (
        fg.picard(half, max_steps=2, rtol=1e-9, on_failure="raise"),
        "the lower-level solve failed: MAX_STEPS after 2 steps, residual 0.25.*; raise `max_steps`, "
        r"take a method that needs fewer \(`newton`, `dense`\), loosen `rtol`/`atol` where they are "
        "finer than you need, or start closer",
    ),
    fg.Status.DIVERGED: (
        fg.picard(lambda w, lam: 2.0 * w + lam, max_steps=2, rtol=1e-9, on_failure="raise"),
        r"DIVERGED after 2 steps, residual .*; the map is not a contraction here: damp it "
        r"\(`fixedgrad.damped`\), shorten its step",
    ),
    fg.Status.NON_FINITE: (
        fg.picard(lambda w, lam: w + lam / jnp.zeros(()), num_steps=2, on_failure="raise"),
        "NON_FINITE after 2 steps, residual nan; NaN or infinity appeared: check `phi`",
    ),
}


@pytest.mark.parametrize("status", REMEDIES, ids=lambda status: status.name)
def test_failed_lower_level_names_its_status_and_a_remedy(status):
    solver, match = REMEDIES[status]
    with pytest.raises(Exception, match=f"(?s)SolveFailedError.*{match}"):
        jnp.asarray(solver(0.0, 1.0)).block_until_ready()


MATRICES = {
    fg.Status.INDEFINITE: (
        fg.cg(num_steps=2),
        np.diag([3.0, 0.5]),
        r"INDEFINITE after . steps, residual .*; I - M is not positive definite: use `gmres`",
    ),
    fg.Status.NOT_SYMMETRIC: (
        fg.cg(num_steps=2),
        np.array([[0.5, 0.4], [-0.4, 0.2]]),
        "NOT_SYMMETRIC after 2 steps, residual .*; M is not symmetric: use `gmres`, `bicgstab`",
    ),
    fg.Status.SINGULAR: (
        fg.dense(),
        np.array([[1.0, 0.0], [0.0, 0.5]]),
        r"SINGULAR after 1 steps, residual .*; I - M is singular: w\(lambda\) is not differentiable",
    ),
}


@pytest.mark.parametrize("status", MATRICES, ids=lambda status: status.name)
def test_failed_linear_solve_names_its_status_and_a_remedy(status):
    linear_solver, m, match = MATRICES[status]

    @fg.fixed_point(lambda w, lam: m @ w + lam, fg.aid(linear_solver), on_failure="raise")
    def solve(w0, lam):
        return w0 + 0.0 * lam

    stage = "the linear solve of the derivative failed: "
    with pytest.raises(Exception, match=f"(?s)SolveFailedError: {stage}{match}"):
        jax.grad(lambda lam: solve(ONES, lam) @ jnp.array([2.0, 1.0]))(ONES).block_until_ready()


# No message without a row.

SOURCE = pathlib.Path(fg.__file__).parent
ELSEWHERE = {"bounds"}  # Its own test file checks its messages.
AT_RUN_TIME = {"SolveFailedError"}  # Raised in callbacks: the tests above.


def raised_in(path: pathlib.Path) -> list[ast.Raise]:
    raises = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    return [
        node
        for node in raises
        if isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) not in AT_RUN_TIME
    ]


def where_it_raises(call: Callable[[], Any]) -> tuple[str, int]:
    """File and line of the innermost frame of the library."""
    found = ("nowhere", 0)
    try:
        call()
    except Exception:
        trace = sys.exc_info()[2]
        while trace is not None:
            path = trace.tb_frame.f_code.co_filename
            if path.startswith(str(SOURCE)):
                found = (path, trace.tb_lineno)
            trace = trace.tb_next
    return found


def test_every_raise_in_the_library_has_a_row():
    reached = {where_it_raises(row.call) for row in ROWS}
    missed = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name not in ELSEWHERE
        for node in raised_in(path)
        if not any(
            (str(path), line) in reached for line in range(node.lineno, (node.end_lineno or 0) + 1)
        )
    ]
    assert not missed, "\n".join(missed)
