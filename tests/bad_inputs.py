"""Inputs that must be refused, and the words that the refusal must hold.

`python tests/bad_inputs.py` prints every message, to be read through as a user would.
"""

# A wrong function has the signature of the right one, and need not use all of it.

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax

import fixedgrad as fg


class BadInput(NamedTuple):
    """A call, the exception that it must raise, and what its message must say.

    `words` are the name of the argument, what was got, what to do.
    """

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def message(error: BaseException) -> str:
    """What a user reads: the text of the exception, and the notes under it that are not JAX's."""
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX has removed" not in note]
    return "\n".join([str(error), *notes])


W, LAM = np.zeros(3), np.ones(3)
AID = fg.aid(fg.cg(num_steps=3))


def phi(w: Any, lam: Any) -> Any:
    return 0.5 * w + lam


def _scaled(w: Any, lam: Any, scale: Any = 1.0) -> Any:
    return 0.5 * w + scale * lam


class _Module:
    def solve(self, w0: Any, lam: Any) -> Any:
        return w0 + lam


@jax.tree_util.register_pytree_node_class
class _Hidden:
    """A pytree class that does not show what it holds."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __repr__(self) -> str:
        return "hidden"

    def tree_flatten(self) -> Any:
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "_Hidden":
        return cls(*leaves)


def loss(w: Any, lam: Any) -> jax.Array:
    return jnp.sum((w - lam) ** 2)


PICARD = fg.picard(phi, num_steps=5)
UNTIL = fg.picard(phi, max_steps=5, rtol=1e-3)


def _while(w0: Any, lam: Any) -> Any:
    """A `while_loop` of one's own."""
    return jax.lax.while_loop(lambda w: jnp.any(w < 0.5), lambda w: phi(w, lam), w0)


def _solved(
    solver: Any = PICARD,
    *,
    phi: Any = phi,
    estimator: fg.Estimator = AID,
    has_aux: Any = False,
    w0: Any = W,
    lam: Any = LAM,
) -> Any:
    """A call of a decorated solver."""
    return fg.fixed_point(phi, estimator, has_aux=has_aux)(solver)(w0, lam)


def _gradient(solver: Any = PICARD, **options: Any) -> Any:
    """A gradient through a decorated solver."""
    return jax.grad(lambda lam: jnp.sum(_solved(solver, lam=lam, **options)))(LAM)


def _made(outer: Any = loss, phi: Any = phi, solver: Any = PICARD, **options: Any) -> Any:
    return fg.hypergradient(outer, phi, solver, options.pop("estimator", AID), **options)


def _updated(outer: Any = loss, w0: Any = W, lam: Any = LAM, **options: Any) -> Any:
    """The first update of a hypergradient."""
    hypergrad = _made(outer, **options)
    return hypergrad.update(hypergrad.init(w0, lam), lam)


def _with(linear_solver: Any) -> Any:
    return _gradient(estimator=fg.aid(linear_solver))


_COUNT = ("positive integer known before tracing",)
_EITHER = ("exactly one of `num_steps`", "`max_steps`")
_STEP = ("`step_size` of", "finite number > 0 or a function")

BAD_INPUTS = (
    # The decorator.
    BadInput(
        "a number for phi",
        lambda: fg.fixed_point(3, AID),  # pyright: ignore
        TypeError,
        ("`phi` of `fixed_point`", "got 3 of type `int`", "phi(w, *args) -> w"),
    ),
    BadInput(
        "an estimator that was not called",
        lambda: fg.fixed_point(phi, fg.itd),  # pyright: ignore
        TypeError,
        ("`estimator` of `fixed_point`", "function itd", "Call a factory"),
    ),
    BadInput(
        "a linear solver for the estimator",
        lambda: fg.fixed_point(phi, fg.cg(num_steps=3)),  # pyright: ignore
        TypeError,
        ("`estimator` of `fixed_point`", "got cg(num_steps=3)", "`aid(cg(num_steps=10))`"),
    ),
    BadInput(
        "a linear solver to `forward`",
        lambda: fg.forward(fg.cg(num_steps=3)),  # pyright: ignore
        TypeError,
        ("`estimator` of `forward`", "got cg(num_steps=3)", "`aid(cg(num_steps=10))`"),
    ),
    BadInput(
        "a linear solver that was not called",
        lambda: fg.aid(fg.cg),  # pyright: ignore
        TypeError,
        ("`linear_solver` of `aid`", "function cg", "Call a factory"),
    ),
    BadInput(
        "an estimator for the linear solver",
        lambda: fg.aid(fg.itd()),  # pyright: ignore
        TypeError,
        ("`linear_solver` of `aid`", "of type `Unrolled`", "(matvec, b, x0=None) -> (x, info)"),
    ),
    BadInput(
        "a name for the linear solver",
        lambda: fg.aid("cg"),  # pyright: ignore
        TypeError,
        ("`linear_solver` of `aid`", "got 'cg' of type `str`", "(matvec, b, x0=None)"),
    ),
    BadInput(
        "a lineax solver that is not wrapped",
        lambda: fg.aid(lineax.CG(1e-3, 1e-3)),  # pyright: ignore
        TypeError,
        ("`linear_solver` of `aid`", "of type `CG`", "(matvec, b, x0=None)"),
    ),
    BadInput(
        "a lineax class",
        lambda: fg.from_lineax(lineax.CG),
        TypeError,
        ("`solver` of `from_lineax`", "lineax", "make one"),
    ),
    BadInput(
        "an unknown policy",
        lambda: fg.fixed_point(phi, AID, on_failure="error"),  # pyright: ignore
        ValueError,
        (
            "`on_failure` of `fixed_point`",
            "got 'error'",
            "('nan', 'zero', 'warn', 'raise', 'ignore')",
        ),
    ),
    BadInput(
        "has_aux that is no bool",
        lambda: fg.fixed_point(phi, AID, has_aux="loss"),  # pyright: ignore
        TypeError,
        ("`has_aux` of `fixed_point`", "got 'loss'", "must be a bool"),
    ),
    BadInput(
        "no solver",
        lambda: fg.fixed_point(phi, AID)(None),  # pyright: ignore
        TypeError,
        ("`solver` of `fixed_point`", "got None", "solver(w0, *args) -> w"),
    ),
    BadInput(
        "the solver's result for the solver",
        lambda: fg.fixed_point(phi, AID)(PICARD(W, LAM)),
        TypeError,
        ("`solver` of `fixed_point`", "got Array(", "solver(w0, *args) -> w"),
    ),
    # What Φ returns.
    BadInput(
        "phi of another shape",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w, lam: w[:2]),
        TypeError,
        ("`phi(w, ...)`: float64[2]", "`w` (the solver's result): float64[3]", "agree"),
    ),
    BadInput(
        "phi of another dtype",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w, lam: w.astype("float32")),
        TypeError,
        ("`phi(w, ...)`: float32[3]", "float64[3]", "cast one of them with `.astype`"),
    ),
    BadInput(
        "phi of another structure",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w, lam: {"w": w}),
        TypeError,
        ("`phi(w, ...)`: {'w': float64[3]}", "float64[3]", "agree"),
    ),
    BadInput(
        "phi that forgot to return",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w, lam: None),
        TypeError,
        ("`phi(w, ...)`: None", "float64[3]", "agree"),
    ),
    BadInput(
        "phi of too few arguments",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w: w),
        TypeError,
        ("takes 1 positional argument", "args = (float64[3],)", "`phi` gets what the solver gets"),
    ),
    BadInput(
        "phi of another shape under itd",
        lambda: _solved(lambda w0, lam: w0, phi=lambda w, lam: w[:2], estimator=fg.itd()),
        TypeError,
        ("`phi(w, ...)`: float64[2]", "`w` (the solver's result): float64[3]", "agree"),
    ),
    # Names and defaults.
    BadInput(
        "a solver with the arguments in another order",
        lambda: fg.fixed_point(_scaled, AID)(lambda w0, scale, lam: w0),
        TypeError,
        (
            "the solver has (w0, scale, lam)",
            "`phi` has (w, lam, scale)",
            "give both the same order",
        ),
    ),
    BadInput(
        "a solver with an argument in the place of another",
        lambda: fg.fixed_point(_scaled, AID)(lambda w0, scale: w0)(W, 3.0),
        TypeError,
        ("the solver has (w0, scale)", "`phi` has (w, lam, scale)", "give both the same order"),
    ),
    BadInput(
        "a solver with another default",
        lambda: fg.fixed_point(_scaled, AID)(lambda w0, lam, scale=3.0: w0)(W, LAM),
        TypeError,
        ("parameter `scale`", "default 3.0", "solver and 1.0 of type `float` in `phi`", "give it"),
    ),
    BadInput(
        "a solver with another array for a default",
        lambda: fg.fixed_point(functools.partial(_scaled, scale=LAM), AID)(
            functools.partial(_scaled, scale=2 * LAM)
        )(W, LAM),
        TypeError,
        ("parameter `scale`", "default array([2., 2., 2.])", "array([1., 1., 1.])", "give it"),
    ),
    BadInput(
        "a checked solver with another default",
        lambda: fg.with_tolerance(lambda w0, lam, *, scale=3.0: w0, _scaled)(W, LAM),
        TypeError,
        ("`with_tolerance`: the parameter `scale`", "make the defaults equal"),
    ),
    BadInput(
        "a method decorated in its class",
        lambda: fg.fixed_point(phi, AID)(_Module.solve),
        TypeError,
        ("first argument must be w0", "whose first is `self`", "Decorate within a method"),
    ),
    # Classes with a `repr` of their own.
    BadInput(
        "phi of another dtype behind a repr",
        lambda: _solved(
            lambda w0, lam: w0, phi=lambda w, lam: _Hidden(w.x.astype("float32")), w0=_Hidden(W)
        ),
        TypeError,
        ("_Hidden", "(float32[3])", "(float64[3])", "cast one of them"),
    ),
    # What the solver returns.
    BadInput(
        "a solver that forgot to return",
        lambda: _solved(lambda w0, lam: None),
        TypeError,
        ("solver under `fixed_point`", "got None", "must return w"),
    ),
    BadInput(
        "a solver's w of a wrong shape",
        lambda: _solved(lambda w0, lam: w0[:2]),
        TypeError,
        ("`phi` with w = float64[2]", "args = (float64[3],)", "`phi` gets what the solver gets"),
    ),
    BadInput(
        "a solver with aux, without has_aux",
        lambda: _solved(lambda w0, lam: (w0, {"steps": 3})),
        TypeError,
        ("`phi` with w = (float64[3], {'steps': int64[]})", "say `has_aux=True`"),
    ),
    BadInput(
        "a solver without aux, with has_aux",
        lambda: _solved(has_aux=True),
        TypeError,
        ("solver under `fixed_point`", "got float64[3]", "the pair `(w, aux)`"),
    ),
    BadInput(
        "a solver's triple, with has_aux",
        lambda: _solved(lambda w0, lam: (w0, 1, 2), has_aux=True),
        TypeError,
        ("solver under `fixed_point`", "got (float64[3], int64[], int64[])", "the pair `(w, aux)`"),
    ),
    BadInput(
        "text in aux",
        lambda: _solved(lambda w0, lam: (w0, {"message": "done"}), has_aux=True),
        TypeError,
        ("`aux` of `fixed_point`", "got 'done' of type `str` at `aux['message']`", "elsewhere"),
    ),
    BadInput(
        "a result object with text for w",
        lambda: _solved(lambda w0, lam: {"x": w0, "message": "done"}),
        TypeError,
        ("`w` of `fixed_point`", "got 'done' of type `str` at `w['message']`", "elsewhere"),
    ),
    BadInput(
        "a solver in NumPy",
        lambda: _solved(lambda w0, lam: np.asarray(w0) + 1),
        jax.errors.TracerArrayConversionError,
        ("numpy.ndarray", "`fixed_point` traces the solver", "`fixedgrad.from_host`"),
    ),
    BadInput(
        "a solver that branches on values",
        lambda: _solved(lambda w0, lam: w0 if w0[0] > 0 else lam),
        jax.errors.TracerBoolConversionError,
        ("boolean conversion", "`fixed_point` traces the solver", "`fixedgrad.from_host`"),
    ),
    BadInput(
        "a solver that loops until a float",
        lambda: _solved(lambda w0, lam: w0 * float(lam[0])),
        jax.errors.ConcretizationTypeError,
        ("float", "`fixed_point` traces the solver", "`fixedgrad.from_host`"),
    ),
    # What the decorated solver is given.
    BadInput(
        "an integer for w0",
        lambda: _solved(w0=0, lam=1.0),
        TypeError,
        ("`w0`: int64[]", "`phi(w, ...)`: float64[]", "cast one of them"),
    ),
    BadInput(
        "w0 of another dtype",
        lambda: _solved(fg.picard(lambda w, lam: lam, num_steps=3), w0=np.zeros(3, "float32")),
        TypeError,
        ("`w0`: float32[3]", "`phi(w, ...)`: float64[3]", "cast one of them"),
    ),
    BadInput(
        "w0 of another shape",
        lambda: _solved(w0=np.zeros(2)),
        TypeError,
        ("`picard` called `phi` with w = float64[2]", "args = (float64[3],)"),
    ),
    BadInput(
        "no w0",
        lambda: _solved(w0=None),
        TypeError,
        ("`picard` called `phi` with w = None", "args = (float64[3],)"),
    ),
    BadInput(
        "a function in w0",
        lambda: _solved(w0={"w": W, "activation": jnp.tanh}),
        TypeError,
        ("`w0` of `fixed_point`", "at `w0['activation']`", "keep it elsewhere"),
    ),
    BadInput(
        "a key for w0",
        lambda: _solved(w0=jax.random.key(0)),
        TypeError,
        ("`picard` called `phi` with w = key<fry>[]", "args = (float64[3],)"),
    ),
    BadInput(
        "a key where a float belongs",
        lambda: _solved(lam=jax.random.key(0)),
        TypeError,
        ("`picard` called `phi`", "args = (key<fry>[],)", "`phi` gets what the solver gets"),
    ),
    BadInput(
        "complex lam and real w0",
        lambda: _solved(fg.picard(lambda w, lam: lam, num_steps=3), lam=1j * LAM),
        TypeError,
        ("`w0`: float64[3]", "`phi(w, ...)`: complex128[3]", "cast one of them"),
    ),
    BadInput(
        "text for lam",
        lambda: _solved(lam="ridge"),
        TypeError,
        ("`picard` called `phi`", "args = (str,)", "`phi` gets what the solver gets"),
    ),
    BadInput(
        "an array of text for lam",
        lambda: _solved(lam=np.array(["ridge"])),
        TypeError,
        ("An argument holds", "holds array(['ridge']", "pass arrays, numbers"),
    ),
    BadInput(
        "a set in lam",
        lambda: _solved(lam={"groups": {1, 2}}),
        TypeError,
        ("An argument holds", "holds {1, 2} of type `set`", "pass arrays, numbers"),
    ),
    BadInput(
        "a keyword that phi does not know",
        lambda: fg.fixed_point(phi, AID)(PICARD)(W, LAM, mu=1.0),
        TypeError,
        ("unexpected keyword argument 'mu'", "kwargs = {'mu': float64[]}", "`phi` gets what"),
    ),
    BadInput(
        "an argument that phi misses",
        lambda: fg.fixed_point(phi, AID)(PICARD)(W),
        TypeError,
        ("missing 1 required positional argument: 'lam'", "args = ()", "`phi` gets what"),
    ),
    # Stopping.
    BadInput(
        "no step",
        lambda: fg.cg(num_steps=0),
        ValueError,
        ("`num_steps` of `cg`", "got 0", *_COUNT),
    ),
    BadInput(
        "a negative number of steps",
        lambda: fg.picard(phi, num_steps=-1),
        ValueError,
        ("`num_steps` of `picard`", "got -1", *_COUNT),
    ),
    BadInput(
        "a fraction of steps",
        lambda: fg.fp(num_steps=2.5),  # pyright: ignore
        ValueError,
        ("`num_steps` of `fp`", "got 2.5", *_COUNT),
    ),
    BadInput(
        "a bool for a number of steps",
        lambda: fg.truncated_itd(num_steps=True),
        ValueError,
        ("`num_steps` of `truncated_itd`", "got True", *_COUNT),
    ),
    BadInput(
        "a traced number of steps",
        lambda: jax.jit(lambda k: fg.fp(num_steps=k)(lambda v: v, LAM)[0])(3),
        ValueError,
        ("`num_steps` of `fp`", "got a traced", *_COUNT),
    ),
    BadInput(
        "at most no step",
        lambda: fg.gmres(max_steps=0, rtol=1e-3),
        ValueError,
        ("`max_steps` of `gmres`", "got 0", *_COUNT),
    ),
    BadInput(
        "neither kind of stopping",
        lambda: fg.gmres(),
        ValueError,
        ("`gmres` needs", *_EITHER, "got num_steps=None, max_steps=None"),
    ),
    BadInput(
        "both kinds of stopping",
        lambda: fg.picard(phi, num_steps=3, max_steps=4),
        ValueError,
        ("`picard` needs", *_EITHER, "got num_steps=3, max_steps=4"),
    ),
    BadInput(
        "exact steps with a relative tolerance",
        lambda: fg.cg(num_steps=3, rtol=1e-3),
        ValueError,
        ("`cg` with `num_steps`", "got rtol=0.001", "use `max_steps`"),
    ),
    BadInput(
        "exact steps with an absolute tolerance",
        lambda: fg.anderson(phi, num_steps=3, atol=1e-3),
        ValueError,
        ("`anderson` with `num_steps`", "got atol=0.001", "use `max_steps`"),
    ),
    BadInput(
        "a negative relative tolerance",
        lambda: fg.normal_cg(max_steps=3, rtol=-1e-3),
        ValueError,
        ("`rtol` of `normal_cg`", "got -0.001", "[0, 1)"),
    ),
    BadInput(
        "a relative tolerance that nothing can miss",
        lambda: fg.fp(max_steps=3, rtol=1.0),
        ValueError,
        ("`rtol` of `fp`", "got 1.0", "[0, 1)"),
    ),
    BadInput(
        "NaN for a tolerance",
        lambda: fg.bicgstab(max_steps=3, rtol=float("nan")),
        ValueError,
        ("`rtol` of `bicgstab`", "got nan", "[0, 1)"),
    ),
    BadInput(
        "a negative absolute tolerance",
        lambda: fg.with_tolerance(PICARD, phi, atol=-1.0),
        ValueError,
        ("`atol` of `with_tolerance`", "got -1.0", "finite number >= 0"),
    ),
    BadInput(
        "an infinite absolute tolerance",
        lambda: fg.cg(max_steps=3, atol=float("inf")),
        ValueError,
        ("`atol` of `cg`", "got inf", "finite number >= 0"),
    ),
    BadInput(
        "text for a tolerance",
        lambda: fg.picard(phi, max_steps=3, rtol="1e-3"),  # pyright: ignore
        ValueError,
        ("`rtol` of `picard`", "got '1e-3' of type `str`", "[0, 1)"),
    ),
    BadInput(
        "a vector of tolerances",
        lambda: fg.picard(phi, max_steps=3, rtol=1e-3 * LAM),
        ValueError,
        ("`rtol` of `picard`", "got array(", "[0, 1)"),
    ),
    BadInput(
        "a complex tolerance",
        lambda: fg.cg(max_steps=3, atol=1j),  # pyright: ignore
        ValueError,
        ("`atol` of `cg`", "got 1j", "finite number >= 0"),
    ),
    # Other options of solvers.
    BadInput(
        "no step in a cycle",
        lambda: fg.gmres(num_steps=3, restart=0),
        ValueError,
        ("`restart` of `gmres`", "got 0", *_COUNT),
    ),
    BadInput(
        "an empty window",
        lambda: fg.anderson(phi, num_steps=3, window=0),
        ValueError,
        ("`window` of `anderson`", "got 0", *_COUNT),
    ),
    BadInput(
        "no regularisation",
        lambda: fg.anderson(phi, num_steps=3, regularisation=0.0),
        ValueError,
        ("`regularisation` of `anderson`", "got 0.0", "a number > 0"),
    ),
    BadInput(
        "a negative size",
        lambda: fg.dense(max_size=-1),
        ValueError,
        ("`max_size` of `dense`", "got -1", *_COUNT),
    ),
    BadInput(
        "more unknowns than dense accepts",
        lambda: _with(fg.dense(max_size=2)),
        ValueError,
        ("`max_size`=2", "3 by 3 matrix", "use `cg`"),
    ),
    BadInput(
        "phi of another shape for newton",
        lambda: fg.newton(lambda w, lam: w[:1], max_steps=3)(W, LAM),
        TypeError,
        ("`newton`", "`phi(w, ...)`: float64[1]", "`w0`: float64[3]"),
    ),
    BadInput(
        "a linear solver that was not called, for newton",
        lambda: fg.newton(phi, max_steps=3, linear_solver=fg.cg),  # pyright: ignore
        TypeError,
        ("`linear_solver` of `newton`", "Call a factory"),
    ),
    BadInput(
        "phi of another shape for picard",
        lambda: fg.picard(lambda w, lam: w[:1], num_steps=3)(W, LAM),
        TypeError,
        ("`w0`: float64[3]", "`phi(w, ...)`: float64[1]", "agree"),
    ),
    BadInput(
        "no phi for with_tolerance",
        lambda: fg.with_tolerance(PICARD, None, rtol=1e-3),  # pyright: ignore
        TypeError,
        ("`phi` of `with_tolerance`", "got None", "phi(w, *args) -> w"),
    ),
    BadInput(
        "no function for from_host",
        lambda: fg.from_host(None),  # pyright: ignore
        TypeError,
        ("`function` of `from_host`", "got None", "function(w0, *args) -> w"),
    ),
    BadInput(
        "a host function of another dtype",
        lambda: fg.from_host(lambda w0, lam: w0.astype("float32"))(W, LAM),
        jax.errors.JaxRuntimeError,
        ("`function(w0, ...)`: float32[3]", "`w0`: float64[3]", "cast one of them"),
    ),
    BadInput(
        "itd of a host function",
        lambda: _gradient(fg.from_host(lambda w0, lam: 2 * lam), estimator=fg.itd()),
        TypeError,
        ("`from_host`", "`itd()` differentiates the solver", "`fixed_point(phi, aid(...))`"),
    ),
    BadInput(
        "a host function that asks at another shape",
        lambda: fg.from_host(lambda call, w0, lam: call(w0[:2]), calling=phi)(W, LAM),
        jax.errors.JaxRuntimeError,
        ("`w` of `call(w)`: float64[2]", "`w0`: float64[3]"),
    ),
    BadInput(
        "an optimiser that was not called",
        lambda: fg.from_optax(loss, optax.sgd, num_steps=3),  # pyright: ignore
        TypeError,
        ("`optimizer` of `from_optax`", "function sgd", "call it"),
    ),
    BadInput(
        "a loss that is no scalar, for optax",
        lambda: fg.from_optax(phi, optax.sgd(0.1), num_steps=3)(W, LAM),
        TypeError,
        ("`loss` of `from_optax`", "got float64[3]", "sum or average"),
    ),
    BadInput(
        "an integer w0 for optax",
        lambda: fg.from_optax(loss, optax.sgd(0.1), num_steps=3)(0, 1.0),
        TypeError,
        ("`w0` of `from_optax`", "got int64[]", "cast integers"),
    ),
    # Linear solvers, called directly and those of a user.
    BadInput(
        "a matrix for matvec",
        lambda: fg.cg(num_steps=3)(np.eye(3), LAM),  # pyright: ignore
        TypeError,
        ("`matvec` of `cg`", "got array(", "matvec(x) -> M x"),
    ),
    BadInput(
        "products of another shape",
        lambda: fg.gmres(num_steps=3)(lambda v: v[:2], LAM),
        TypeError,
        ("`b`: float64[3]", "`matvec(b)`: float64[2]", "agree"),
    ),
    BadInput(
        "an integer right-hand side",
        lambda: fg.fp(num_steps=3)(lambda v: v, np.ones(3, int)),
        TypeError,
        ("`b` of `fp`", "got int64[3]", "cast integers"),
    ),
    BadInput(
        "a start vector of another shape",
        lambda: fg.bicgstab(num_steps=3)(lambda v: 0.5 * v, LAM, LAM[:2]),
        TypeError,
        ("`x0`: float64[2]", "`b`: float64[3]", "agree"),
    ),
    BadInput(
        "a linear solver of jax.scipy",
        lambda: _with(jax.scipy.sparse.linalg.cg),
        TypeError,
        ("`linear_solver` of `aid`", "with info a `SolveInfo`, got (", "`from_lineax`"),
    ),
    BadInput(
        "a linear solver without info",
        lambda: _with(lambda matvec, b, x0=None: b),
        TypeError,
        ("`linear_solver` of `aid`", "got a traced float64[3]", "must return a pair"),
    ),
    BadInput(
        "a linear solver's x of another shape",
        lambda: _with(lambda matvec, b, x0=None: (b[:2], fg.dense()(matvec, b)[1])),
        TypeError,
        ("linear solver's `(x, info)`: float64[2]", "`b`: float64[3]", "agree"),
    ),
    # Maps.
    BadInput(
        "no loss",
        lambda: fg.gradient_descent(None, step_size=0.1),  # pyright: ignore
        TypeError,
        ("`loss` of `gradient_descent`", "got None", "loss(w, *args) -> scalar"),
    ),
    BadInput(
        "a loss that is no scalar",
        lambda: fg.gradient_descent(phi, step_size=0.1)(W, LAM),
        TypeError,
        ("`loss` of `gradient_descent`", "got float64[3]", "sum or average"),
    ),
    BadInput(
        "no step size",
        lambda: fg.gradient_descent(loss, step_size=0.0),
        ValueError,
        (*_STEP, "got 0.0"),
    ),
    BadInput(
        "an infinite step size",
        lambda: fg.proximal_gradient(loss, phi, step_size=float("inf")),
        ValueError,
        (*_STEP, "got inf"),
    ),
    BadInput(
        "a step size for each coordinate",
        lambda: fg.gradient_descent(loss, step_size=0.1 * LAM),
        ValueError,
        (*_STEP, "got array("),
    ),
    BadInput(
        "a step size for each coordinate, from a function",
        lambda: fg.gradient_descent(loss, step_size=lambda lam: lam)(W, LAM),
        ValueError,
        (*_STEP, "got array("),
    ),
    BadInput(
        "a complex step size",
        lambda: fg.heavy_ball(loss, step_size=lambda lam: 0.1j, momentum=0.5)(  # pyright: ignore
            fg.Momentum(W, W), LAM
        ),
        ValueError,
        (*_STEP, "got 0.1j"),
    ),
    BadInput(
        "a momentum of one",
        lambda: fg.heavy_ball(loss, step_size=0.1, momentum=1.0),
        ValueError,
        ("`momentum` of `heavy_ball`", "got 1.0", "[0, 1)"),
    ),
    BadInput(
        "a map with momentum, started from w alone",
        lambda: fg.picard(fg.nesterov(loss, step_size=0.1, momentum=0.5), num_steps=3)(W, LAM),
        TypeError,
        ("map of `nesterov`", "got float64[3]", "`Momentum(w0, w0)`"),
    ),
    BadInput(
        "no prox",
        lambda: fg.proximal_gradient(loss, None, step_size=0.1),  # pyright: ignore
        TypeError,
        ("`prox` of `proximal_gradient`", "got None", "prox(v, step_size, *args) -> w"),
    ),
    BadInput(
        "a damping of one",
        lambda: fg.damped(phi, damping=1.0),
        ValueError,
        ("`damping` of `damped`", "got 1.0", "[0, 1)"),
    ),
    BadInput(
        "constants in the wrong order",
        lambda: fg.optimal_step_size(0.5, 2.0),
        ValueError,
        ("`optimal_step_size`", "got L=0.5, mu=2.0", "0 < `mu` <= `L`"),
    ),
    # The explicit form and the outer loop.
    BadInput(
        "no outer objective",
        lambda: _made(None),
        TypeError,
        ("`outer` of `hypergradient`", "got None", "outer(w, lam, *args) -> scalar"),
    ),
    BadInput(
        "an outer objective that is a vector",
        lambda: _updated(lambda w, lam: w),
        TypeError,
        ("`outer` of `hypergradient`", "got float64[3]", "sum or average"),
    ),
    BadInput(
        "an outer objective with auxiliary output",
        lambda: _updated(lambda w, lam: (loss(w, lam), w)),
        TypeError,
        ("`outer` of `hypergradient`", "got (float64[], float64[3])", "elsewhere"),
    ),
    BadInput(
        "a complex outer objective",
        lambda: _updated(lambda w, lam: jax.lax.complex(loss(w, lam), 1.0)),
        TypeError,
        ("`outer` of `hypergradient`", "got complex128[]", "one real scalar"),
    ),
    BadInput(
        "an integer outer objective",
        lambda: _updated(lambda w, lam: 3),
        TypeError,
        ("`outer` of `hypergradient`", "got int64[]", "one real scalar"),
    ),
    BadInput(
        "an integer lam",
        lambda: _updated(lam=1),
        TypeError,
        ("`lam` of `hypergradient`", "got int64[]", "write `1.0` for `1`"),
    ),
    BadInput(
        "a start that was not called",
        lambda: _made(start=fg.warm),
        TypeError,
        ("`start` of `hypergradient`", "function warm", "call a factory"),
    ),
    BadInput(
        "lam in the place of the state",
        lambda: _made().update(W, LAM),
        TypeError,
        ("`state` of `update`", "got array(", "`update(state, lam)`"),
    ),
    BadInput(
        "reverse-mode itd through a while_loop",
        lambda: _updated(solver=_while, estimator=fg.itd()),
        ValueError,
        ("Reverse-mode differentiation", "`num_steps` in place of `max_steps`", "`aid(...)`"),
    ),
    BadInput(
        "a pair from the solver of the explicit form",
        lambda: _updated(solver=lambda w0, lam: (w0, 3)),
        TypeError,
        ("`hypergradient` called `phi` with w = (float64[3], int64[])", "args = (float64[3],)"),
    ),
    BadInput(
        "no hypergradient for the outer loop",
        lambda: fg.bilevel(loss, optax.sgd(0.1)),  # pyright: ignore
        TypeError,
        ("`hypergrad` of `bilevel`", "got <function loss", "`hypergradient(...)`"),
    ),
    BadInput(
        "an optimiser that was not called, for the outer loop",
        lambda: fg.bilevel(_made(), optax.sgd),  # pyright: ignore
        TypeError,
        ("`optimizer` of `bilevel`", "function sgd", "call it"),
    ),
    BadInput(
        "the state of a loop with another optimiser",
        lambda: fg.bilevel(_made(), optax.adam(0.1)).step(
            fg.bilevel(_made(), optax.sgd(0.1)).init(W, LAM)
        ),
        TypeError,
        (
            "`state` of `step`",
            "another optimiser",
            "ScaleByAdamState(",
            "(EmptyState(), Empty",
            "init",
        ),
    ),
    BadInput(
        "a box for a projection",
        lambda: fg.bilevel(_made(), optax.sgd(0.1), project=(0.0, 1.0)),  # pyright: ignore
        TypeError,
        ("`project` of `bilevel`", "got (0.0, 1.0)", "project(lam) -> lam"),
    ),
)


def main() -> int:
    """Prints every message under its name; 1 where an input was accepted."""
    jax.config.update("jax_enable_x64", True)
    accepted = 0
    for number, row in enumerate(BAD_INPUTS, 1):
        try:
            row.call()
        except Exception as error:
            # The traceback that a host callback puts before its message is left out.
            text = message(error).rpartition('.py", line ')[2].partition("\n")[2] or message(error)
            print(f"{number}. {row.name}\n   {type(error).__name__}: ", end="")
            print(text.strip().replace("\n", "\n   "))
        else:
            accepted += 1
            print(f"{number}. {row.name}\n   ACCEPTED")
    print(f"\n{len(BAD_INPUTS)} bad inputs, {accepted} accepted.")
    return 1 if accepted else 0


if __name__ == "__main__":
    sys.exit(main())
