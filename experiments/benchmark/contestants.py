"""How each library computes a hypergradient: its defaults, and every sensible setting of it.

A contestant takes tolerances for w and for v as arrays, so that a grid of them needs one compilation.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

import fixedgrad as fg

from .instances import Instance

PyTree = Any


class Updates(NamedTuple):
    """Hypergradients one after the other, each from where the last one ended.

    Attributes:
        init: `init(lam, data, rtol_w, rtol_v) -> state`.
        update: `update(state, lam, data, rtol_w, rtol_v) -> (gradient, state)`.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]

    def once(self, lam: PyTree, data: PyTree, rtol_w: jax.Array, rtol_v: jax.Array) -> PyTree:
        """One hypergradient from a cold start."""
        state = self.init(lam, data, rtol_w, rtol_v)
        return self.update(state, lam, data, rtol_w, rtol_v)[0]


OURS = "fixedgrad"
DEFAULTS = "adaptive, defaults"
_MANY = 2000  # Steps of any iteration: enough that a tolerance ends it.


class Contestant(NamedTuple):
    """A setting of a library.

    Attributes:
        library: Its name.
        setting: What was chosen.
        make: `make(instance) -> Updates`.
        tolerances: How many of the two tolerances it takes: 0 for defaults, 1 for `adaptive`, whose
            tolerance is on the hypergradient itself.
    """

    library: str
    setting: str
    make: Callable[[Instance], Updates]
    tolerances: int = 2

    @property
    def name(self) -> str:
        return f"{self.library}: {self.setting}"


def differentiated(
    solve: Callable[[Instance, PyTree, PyTree, jax.Array, jax.Array], PyTree],
) -> Callable[[Instance], Updates]:
    """The gradient of E(w, θ), w = `solve(instance, theta, data, rtol_w, rtol_v)` from the last w."""

    def make(instance: Instance) -> Updates:
        def update(
            w0: PyTree, lam: PyTree, data: PyTree, rtol_w: jax.Array, rtol_v: jax.Array
        ) -> tuple[PyTree, PyTree]:
            def objective(lam: PyTree) -> tuple[jax.Array, PyTree]:
                theta = instance.prepare(lam, data)
                w = solve(instance._replace(w0=w0), theta, data, rtol_w, rtol_v)
                return instance.outer(w, theta, data), w

            return jax.grad(objective, has_aux=True)(lam)

        return Updates(lambda *_: instance.w0, update)

    return make


def contestants(instance: Instance) -> list[Contestant]:
    """All that can solve this instance, the libraries that are installed."""
    found = _ours(instance)
    if importlib.util.find_spec("jaxopt"):
        found += _jaxopt(instance)
    if importlib.util.find_spec("optimistix"):
        found += _optimistix(instance)
    return found


def libraries() -> list[str]:
    """Ours, and the peers that are installed."""
    return [OURS, *(name for name in ("jaxopt", "optimistix") if importlib.util.find_spec(name))]


def _settings(
    library: str,
    solve: Callable[..., PyTree],
    defaults: list[str],
    pairs: list[tuple[str, str]],
) -> list[Contestant]:
    """A peer's solvers with their defaults, and pairs of a solver and a linear solver to be tuned."""
    by_default = [
        Contestant(library, f"{s}, defaults", differentiated(partial(solve, s, None)), 0)
        for s in defaults
    ]
    return by_default + [
        Contestant(library, f"{s} + {linear}", differentiated(partial(solve, s, linear)))
        for s, linear in pairs
    ]


# --- fixedgrad


def _ours(instance: Instance) -> list[Contestant]:
    inverse = fg.inverse(max_size=4096)
    krylov: dict[str, Callable[[Any], fg.LinearSolver]] = {
        "gmres": lambda rtol: fg.gmres(max_steps=_MANY, rtol=rtol, restart=50),
        "bicgstab": lambda rtol: fg.bicgstab(max_steps=_MANY, rtol=rtol),
        "fp": lambda rtol: fg.fp(max_steps=_MANY, rtol=rtol),
        "dense": lambda _: fg.dense(),
        "gmres, inverse": lambda rtol: fg.gmres(
            max_steps=_MANY, rtol=rtol, restart=50, preconditioner=inverse
        ),
    }
    if instance.symmetric:
        krylov = {
            "cg": lambda rtol: fg.cg(max_steps=_MANY, rtol=rtol),
            "cg, inverse": lambda rtol: fg.cg(max_steps=_MANY, rtol=rtol, preconditioner=inverse),
            "dense": lambda _: fg.dense(),
        }
    pairs = [(f"newton({name})", name) for name in krylov if name != "fp"]
    if instance.symmetric:
        pairs += [("newton(cg)", "dense"), ("lbfgs", "cg"), ("lbfgs", "dense")]
        pairs += [("anderson", "cg"), ("anderson", "dense"), ("picard", "cg")]
    else:
        pairs += [("picard", name) for name in ("bicgstab", "gmres", "fp", "dense")]
        pairs += [("anderson", name) for name in ("bicgstab", "gmres", "dense")]
        pairs += [("broyden", "gmres")]

    def solve(
        lower: str,
        linear: str,
        at: Instance,
        theta: PyTree,
        data: PyTree,
        rtol_w: jax.Array,
        rtol_v: jax.Array,
    ) -> PyTree:
        def phi(w: PyTree, theta: PyTree) -> PyTree:
            return at.phi(w, theta, data)

        estimator = fg.aid(krylov[linear](rtol_v))
        solver = _lower(lower, at, phi, data, rtol_w, krylov)
        return fg.fixed_point(phi, estimator)(solver)(at.w0, theta)

    found = [
        Contestant(OURS, f"{lower} + {linear}", differentiated(partial(solve, lower, linear)))
        for lower, linear in pairs
    ]
    found.append(Contestant(OURS, DEFAULTS, _adaptive({}), 1))
    if instance.symmetric:
        options = {"make_linear_solver": krylov["cg"]}
        found.append(Contestant(OURS, "adaptive, cg", _adaptive(options), 1))
    return found


def _lower(
    name: str,
    at: Instance,
    phi: fg.Phi,
    data: PyTree,
    rtol: jax.Array,
    krylov: dict[str, Callable[[Any], fg.LinearSolver]],
) -> fg.Solver:
    if name == "picard":
        return fg.picard(phi, max_steps=_MANY, rtol=rtol)
    if name == "anderson":
        return fg.anderson(phi, max_steps=_MANY, rtol=rtol)
    if name == "broyden":
        return fg.broyden(phi, max_steps=_MANY, rtol=rtol)
    if name == "lbfgs":
        loss = at.loss
        assert loss is not None

        def bound(w: PyTree, theta: PyTree) -> jax.Array:
            return loss(w, theta, data)

        return fg.from_optax(bound, optax.lbfgs(), max_steps=_MANY, rtol=rtol)
    linear = krylov[name.removeprefix("newton(").removesuffix(")")]
    return fg.newton(phi, max_steps=60, rtol=rtol, linear_solver=linear(1e-12))


def explicit(
    make: Callable[[Instance, fg.Outer, fg.Phi, jax.Array, jax.Array], fg.Hypergradient],
) -> Callable[[Instance], Updates]:
    """The explicit form, whose state is what it keeps."""

    def of(instance: Instance) -> Updates:
        def hypergradient(data: PyTree, rtol_w: jax.Array, rtol_v: jax.Array) -> fg.Hypergradient:
            return make(
                instance,
                lambda w, theta: instance.outer(w, theta, data),
                lambda w, theta: instance.phi(w, theta, data),
                rtol_w,
                rtol_v,
            )

        def init(lam: PyTree, data: PyTree, rtol_w: jax.Array, rtol_v: jax.Array) -> PyTree:
            theta = instance.prepare(lam, data)
            return hypergradient(data, rtol_w, rtol_v).init(instance.w0, theta)

        def update(
            state: PyTree, lam: PyTree, data: PyTree, rtol_w: jax.Array, rtol_v: jax.Array
        ) -> tuple[PyTree, PyTree]:
            theta, pull = jax.vjp(lambda lam: instance.prepare(lam, data), lam)
            gradient, state = hypergradient(data, rtol_w, rtol_v).update(state, theta)
            return pull(gradient)[0], state

        return Updates(init, update)

    return of


def _adaptive(options: dict[str, Any]) -> Callable[[Instance], Updates]:
    def make(
        at: Instance, outer: fg.Outer, phi: fg.Phi, rtol: jax.Array, _: jax.Array
    ) -> fg.Hypergradient:
        del at
        return fg.adaptive_hypergradient(outer, phi, rtol=rtol, **options)

    return explicit(make)


def outer_contestants(instance: Instance) -> list[Contestant]:
    """All that take part in `outer`: the peers as they are, ours with what it keeps."""
    symmetric = instance.symmetric
    krylov = fg.cg if symmetric else fg.bicgstab

    def with_start(start: fg.Start, lower: str, preconditioner: Any) -> Contestant:
        def make(
            at: Instance, outer: fg.Outer, phi: fg.Phi, rtol_w: jax.Array, rtol_v: jax.Array
        ) -> fg.Hypergradient:
            del at

            def linear(rtol: Any) -> fg.LinearSolver:
                return krylov(max_steps=_MANY, rtol=rtol, preconditioner=preconditioner)

            solver = {
                "newton": lambda: fg.newton(
                    phi, max_steps=60, rtol=rtol_w, linear_solver=linear(1e-12)
                ),
                "anderson": lambda: fg.anderson(phi, max_steps=_MANY, rtol=rtol_w),
                "picard": lambda: fg.picard(phi, max_steps=_MANY, rtol=rtol_w),
            }[lower]()
            return fg.hypergradient(outer, phi, solver, fg.aid(linear(rtol_v)), start=start)

        kept = "" if preconditioner is None else ", inverse kept"
        return Contestant(OURS, f"{lower} + {krylov.__name__}{kept}, {start!r}", explicit(make))

    inverse = fg.inverse(max_size=4096, every=10**6)
    lower = "anderson" if symmetric else "picard"
    ours = [
        with_start(fg.warm(), lower, None),
        with_start(fg.extrapolated(), lower, None),
        with_start(fg.extrapolated(), "newton", inverse),
        Contestant(OURS, DEFAULTS, _adaptive({}), 1),
        Contestant(OURS, "adaptive, extrapolated", _adaptive({"start": fg.extrapolated()}), 1),
    ]
    peers = [c for c in contestants(instance) if c.library != OURS and c.tolerances]
    return ours + peers


# --- jaxopt


def import_jaxopt() -> Any:
    """The package, without the warning that it is no longer maintained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("jaxopt")


def _jaxopt(instance: Instance) -> list[Contestant]:
    jaxopt = import_jaxopt()
    linear_solve = jaxopt.linear_solve

    def solve(
        solver: str,
        linear: str | None,
        at: Instance,
        theta: PyTree,
        data: PyTree,
        rtol_w: jax.Array,
        rtol_v: jax.Array,
    ) -> PyTree:
        options: dict[str, Any] = {}
        if linear is not None:
            linear_solver = getattr(linear_solve, f"solve_{linear}")
            known = {} if linear == "lu" else {"tol": rtol_v, "maxiter": _MANY}
            options = {
                "maxiter": _MANY,
                "tol": rtol_w,
                "implicit_diff_solve": lambda matvec, b, **_: linear_solver(matvec, b, **known),
            }
        function: Any = at.loss if at.symmetric and solver in minimisers else at.phi
        bound = lambda w, theta: function(w, theta, data)  # noqa: E731
        return getattr(jaxopt, solver)(bound, **options).run(at.w0, theta).params

    minimisers = ("LBFGS", "BFGS", "GradientDescent", "NonlinearCG")
    if instance.symmetric:
        defaults = ["LBFGS", "GradientDescent"]
        pairs = [(s, linear) for s in ("LBFGS", "BFGS") for linear in ("cg", "lu")]
        pairs += [("GradientDescent", "cg"), ("AndersonAcceleration", "cg")]
    else:
        defaults = ["FixedPointIteration", "AndersonAcceleration"]
        pairs = [(s, linear) for s in defaults for linear in ("bicgstab", "gmres", "lu")]
        pairs += [("FixedPointIteration", "normal_cg")]
    return _settings("jaxopt", solve, defaults, pairs)


# --- optimistix


def _optimistix(instance: Instance) -> list[Contestant]:
    import lineax as lx  # pyright: ignore[reportMissingImports]
    import optimistix as optx  # pyright: ignore[reportMissingImports]

    symmetric = instance.symmetric
    tags = frozenset({lx.positive_semidefinite_tag}) if symmetric else frozenset()

    def linear_solver(name: str, rtol: Any) -> Any:
        if name == "direct":  # Cholesky where the tag allows it, else LU.
            return lx.AutoLinearSolver(well_posed=True)
        if name == "gmres":
            return lx.GMRES(rtol=rtol, atol=0.0, restart=50, max_steps=_MANY)
        return {"cg": lx.CG, "bicgstab": lx.BiCGStab}[name](rtol=rtol, atol=0.0, max_steps=_MANY)

    def solve(
        solver: str,
        linear: str | None,
        at: Instance,
        theta: PyTree,
        data: PyTree,
        rtol_w: jax.Array,
        rtol_v: jax.Array,
    ) -> PyTree:
        def phi(w: PyTree, theta: PyTree) -> PyTree:
            return at.phi(w, theta, data)

        def loss(w: PyTree, theta: PyTree) -> jax.Array:
            assert at.loss is not None
            return at.loss(w, theta, data)

        def residual(w: PyTree, theta: PyTree) -> PyTree:
            return jax.grad(loss)(w, theta) if symmetric else w - phi(w, theta)

        options: dict[str, Any] = {"throw": False, "max_steps": _MANY}
        rtol, inner = rtol_w, {}
        if linear is None:
            rtol = 1e-6  # They have no defaults for it.
        else:
            options["adjoint"] = optx.ImplicitAdjoint(linear_solver=linear_solver(linear, rtol_v))
            options["tags"] = tags
            inner = {"linear_solver": linear_solver(linear, 1e-2 * rtol_v)}
        kind = getattr(optx, solver)
        if solver in ("Newton", "Chord"):
            made = kind(rtol=rtol, atol=rtol, **inner)
            return optx.root_find(residual, made, at.w0, theta, **options).value
        made = kind(rtol=rtol, atol=rtol)
        if solver == "FixedPointIteration":
            return optx.fixed_point(phi, made, at.w0, theta, **options).value
        return optx.minimise(loss, made, at.w0, theta, **options).value

    if symmetric:
        defaults = ["LBFGS", "Newton"]
        pairs = [("Newton", "direct"), ("Newton", "cg"), ("Chord", "direct")]
        pairs += [("LBFGS", "cg"), ("LBFGS", "direct"), ("BFGS", "direct")]
    else:
        defaults = ["FixedPointIteration", "Newton"]
        pairs = [("Newton", "direct"), ("Newton", "gmres"), ("Chord", "direct")]
        pairs += [("FixedPointIteration", linear) for linear in ("direct", "gmres", "bicgstab")]
    return _settings("optimistix", solve, defaults, pairs)
