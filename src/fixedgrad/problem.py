"""The bilevel problem at one λ, on inexact leaves alone: Φ and E, the adjoint system, the Lagrangian.

L(w, λ, v) = E(w, λ) + ⟨v, Φ(w, λ) − w⟩,
∇_w L = r_v = ∇₁E − (I − Jᵀ)v,    ∇_λ L = ĝ = ∇₂E + Bᵀv,    J = ∂₁Φ, B = ∂₂Φ.
"""

import enum
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .compiled import Compiled, compiled_for
from .errors import check_callable, check_same, check_scalar
from .leaves import fresh, partition, phi_hint, settled_lam, split_lam, started, traced_once
from .real_form import Space, norm, norms, pairing, random_signs, real_dtype
from .types import Jacobian, MatVec, Outer, Phi, PyTree, ResidualMap

tree = optax.tree


class Linearised(NamedTuple):
    """Products with the derivatives of Φ at (w, x), all from one linearisation.

    Attributes:
        j: u ↦ J u, or in reverse mode u ↦ Jᵀ u.
        b: ẋ ↦ B ẋ, or in reverse mode v ↦ Bᵀ v.
        residual: w − Φ(w).
    """

    j: Jacobian
    b: MatVec
    residual: PyTree


class Form(enum.Enum):
    """What an `Equation` evaluates: Φ; F = w − Φ of a `ResidualMap`; such an F of any scale."""

    IMAGE = enum.auto()
    RESIDUAL = enum.auto()
    ANY_SCALE = enum.auto()


class Terms(NamedTuple):
    """What an F of any scale is small beside.

    Attributes:
        of_w: ∂₁F w, to which a relative tolerance is relative; for F = Aw − b it is b at the solution.
        rounded: ∂₁F (±w), with signs as if at random so that its terms do not cancel: what of F is
            rounded.
    """

    of_w: PyTree
    rounded: PyTree


class Equation(NamedTuple):
    """The equation w = Φ(w, x) on inexact leaves: w, and x for all that Φ depends on beside w.

    Attributes:
        function: `(w, x)` to Φ(w, x), or to F(w, x) = w − Φ(w, x) for a `ResidualMap`.
        form: Which of the two.
        jaxpr: Of `function`: what collectives Φ holds.
    """

    function: Callable[[PyTree, PyTree], PyTree]
    form: Form
    jaxpr: Any

    @property
    def by_residual(self) -> bool:
        """Whether F is what is evaluated."""
        return self.form is not Form.IMAGE

    @classmethod
    def of(
        cls,
        where: str,
        phi: Phi,
        w: PyTree,
        x: PyTree,
        call: Callable[[PyTree], tuple[tuple[PyTree, ...], dict[str, PyTree]]],
        name: str = "`w`",
    ) -> "Equation":
        """The equation of a w like this one; `call` makes of x what Φ gets beside w, args and kwargs.

        Raises:
            TypeError: Φ(w) is not like w.
        """
        w_x, w_rest, join_w = partition(w)
        function, form = precise(where, phi)

        def on_leaves(w_x: PyTree, x: PyTree) -> PyTree:
            args, kwargs = call(x)
            return function(join_w(w_x, w_rest), *args, **kwargs)

        at, image, jaxpr = traced_once(on_leaves, w_x, x)
        check_same(where, image, w, "`phi(w, ...)`", name)
        return cls(lambda w_x, x: partition(at(w_x, x))[0], form, jaxpr)

    def phi(self, w: PyTree, x: PyTree) -> PyTree:
        """Φ(w, x)."""
        value = self.function(w, x)
        return tree.sub(w, value) if self.by_residual else value

    def residual(self, w: PyTree, x: PyTree) -> PyTree:
        """F(w, x) = w − Φ(w, x)."""
        value = self.function(w, x)
        return value if self.by_residual else tree.sub(w, value)

    def with_terms(self, w: PyTree, x: PyTree, least: PyTree) -> tuple[PyTree, Terms]:
        """F(w, x) of any scale, and what it is small beside; entries of w count as at least `least`."""
        r, product = jax.linearize(lambda w: self.function(w, x), w)

        def entries(x: jax.Array, least: jax.Array) -> jax.Array:
            return jnp.where(jnp.abs(x) > least, x, least.astype(x.dtype))

        size = jax.tree.map(entries, w, least)
        return r, Terms(product(size), product(tree.mul(random_signs(size), size)))

    def jacobian(self, product: MatVec, *, transposed: bool = False) -> Jacobian:
        """M = J or Jᵀ, of products with I − M = ∂₁F."""
        return Jacobian.from_complement(product, transposed, self.form is Form.ANY_SCALE)

    def space(self, w: PyTree) -> Space:
        """Where norms of pytrees like w are taken."""
        return Space.of(self.jaxpr, w)

    def vjp(self, w: PyTree, x: PyTree) -> Linearised:
        """Products with Jᵀ and Bᵀ."""
        value, pull = jax.vjp(self.function, w, x)
        residual = value if self.by_residual else tree.sub(w, value)
        return self._linearised(
            lambda u: pull(u)[0], lambda u: pull(u)[1], residual, transposed=True
        )

    def jvp(self, w: PyTree, x: PyTree) -> Linearised:
        """Products with J and B."""
        value, push = jax.linearize(self.function, w, x)
        residual = value if self.by_residual else tree.sub(w, value)
        w_zero, x_zero = tree.zeros_like((w, x))
        return self._linearised(
            lambda u: push(u, x_zero), lambda x_dot: push(w_zero, x_dot), residual, transposed=False
        )

    def _linearised(
        self, first: MatVec, second: MatVec, residual: PyTree, *, transposed: bool
    ) -> Linearised:
        if not self.by_residual:
            return Linearised(Jacobian(first, transposed=transposed), second, residual)
        # I − J = ∂₁F and B = −∂₂F.
        j = self.jacobian(first, transposed=transposed)
        return Linearised(j, lambda u: tree.scale(-1, second(u)), residual)


class Gradients(NamedTuple):
    """The residuals of both stages at (w, v), and the hypergradient that v gives.

    Attributes:
        value: E.
        r_w: w − Φ(w).
        r_v: ∇₁E − (I − Jᵀ)v.
        gradient: ĝ = ∇₂E + Bᵀv.
        b: ∇₁E.
    """

    value: jax.Array
    r_w: PyTree
    r_v: PyTree
    gradient: PyTree
    b: PyTree

    def lagrangian(self, v: PyTree) -> jax.Array:
        """L = E − ⟨v, r_w⟩ at this v: f, to second order in the errors of w and v."""
        return self.value - pairing(v, self.r_w).astype(self.value.dtype)


class Adjoint(NamedTuple):
    """The adjoint system (I − Jᵀ)v = b at (w, λ), and what its solution gives.

    Attributes:
        value: E(w, λ).
        b: ∇₁E.
        jt: v ↦ Jᵀ v.
        gradient: v ↦ ∇₂E + Bᵀ v.
    """

    value: jax.Array
    b: PyTree
    jt: Jacobian
    gradient: Callable[[PyTree], PyTree]


class Problem(NamedTuple):
    """Φ and E at one λ and its data, as functions of the inexact leaves of w and λ alone.

    Attributes:
        equation: w = Φ(w, x).
        outer: E(w, x).
        w: The inexact leaves of w.
        x: The inexact leaves of λ.
        join_w: From inexact leaves to w.
        join_gradient: From those of a gradient to one like λ.
    """

    equation: Equation
    outer: Callable[[PyTree, PyTree], jax.Array]
    w: PyTree
    x: PyTree
    join_w: Callable[[PyTree], PyTree]
    join_gradient: Callable[[PyTree], PyTree]

    @classmethod
    def of(
        cls,
        where: str,
        outer: Outer,
        phi: Phi,
        w: PyTree,
        lam: PyTree,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        name: str = "`w`",
    ) -> "Problem":
        """The problem; Φ and E are traced once, and checked.

        Raises:
            TypeError: λ has no inexact leaf, Φ(w) is not like w, or E is not one real scalar.
        """
        x, join_lam, join_gradient = split_lam(where, lam)
        w_x, w_rest, join_w = partition(w)

        def call(x: PyTree) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
            return (join_lam(x), *args), kwargs

        def on_leaves(w_x: PyTree, x: PyTree) -> PyTree:
            args, kwargs = call(x)
            return outer(join_w(w_x, w_rest), *args, **kwargs)

        equation = Equation.of(where, phi, w, x, call, name)
        value, shape, _ = traced_once(on_leaves, w_x, x)
        check_scalar(where, shape)
        return cls(equation, value, w_x, x, lambda w_x: join_w(w_x, w_rest), join_gradient)

    @classmethod
    def at(
        cls,
        where: str,
        outer: Outer,
        phi: Phi,
        w: PyTree,
        lam: PyTree,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
    ) -> "Problem":
        """The same at a w of the caller's; numbers in w and λ become arrays.

        Raises:
            TypeError: As `of`; or w is a part of a system that collectives of Φ spread.
        """
        check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
        check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
        w = started(where, phi, w, (lam, *args), kwargs)
        problem = cls.of(where, outer, phi, w, settled_lam(lam, w), args, kwargs)
        spread = problem.equation.space(problem.w).together
        if spread:
            raise TypeError(
                f"`{where}` knows one w, but a collective of `phi` over "
                f"{', '.join(map(repr, spread))} couples it to those of other devices or elements; "
                "call it outside of the `shard_map` or `vmap`, on all of w."
            )
        return problem

    def norm(self, tree: PyTree) -> jax.Array:
        """The norm of a pytree like w or like λ, in the one dtype that holds both."""
        return norm(tree).astype(real_dtype((self.w, self.x)))

    def norms(self, *trees: PyTree) -> tuple[jax.Array, ...]:
        """The norms of pytrees alike, in fewer operations."""
        return tuple(norms(*trees).astype(real_dtype((self.w, self.x))))

    def adjoint(self, w: PyTree) -> Adjoint:
        """The adjoint system at w, from one linearisation of Φ and one gradient of E."""
        value, (b, direct) = jax.value_and_grad(self.outer, argnums=(0, 1))(w, self.x)
        of_phi = self.equation.vjp(w, self.x)
        return Adjoint(value, b, of_phi.j, lambda v: tree.add(direct, of_phi.b(v)))

    def gradients(self, w: PyTree, v: PyTree) -> Gradients:
        """The gradients of the Lagrangian at (w, v), and what they are made of."""
        value, (b, direct) = jax.value_and_grad(self.outer, argnums=(0, 1))(w, self.x)
        image, pull = jax.vjp(self.equation.function, w, self.x)
        of_w, of_x = pull(v)
        if self.equation.by_residual:  # F, (I − Jᵀ)v and −Bᵀv.
            return Gradients(value, image, tree.sub(b, of_w), tree.sub(direct, of_x), b)
        r_v = tree.add(tree.sub(b, v), of_w)
        return Gradients(value, tree.sub(w, image), r_v, tree.add(direct, of_x), b)


def compiled_at(
    where: str,
    function: Callable[..., PyTree],
    functions: tuple[Callable[..., Any], ...],
    *options: Hashable,
) -> Compiled:
    """`function(problem, *functions[2:], *options, *operands)` at `(w, lam, args, kwargs, *operands)`.

    It is compiled once for the functions, E and Φ the first of them, and the options.
    """

    def made(outer: Outer, phi: Phi, *others: Callable[..., Any]) -> Callable[..., PyTree]:
        def call(w: PyTree, lam: PyTree, args: PyTree, kwargs: PyTree, *operands: PyTree) -> PyTree:
            problem = Problem.at(where, outer, phi, w, lam, args, kwargs)
            return function(problem, *others, *options, *operands)

        return call

    return compiled_for(functions, (where, function, *options), made)


def precise(where: str, phi: Phi) -> tuple[Callable[..., PyTree], Form]:
    """What an `Equation` evaluates, and which of the two that is: of Φ, at the highest precision.

    The default precision of some accelerators keeps ten bits of a product, and linear solvers stall
    near 1e-3.
    """
    form, function = Form.IMAGE, fresh(phi)
    if isinstance(phi, ResidualMap):
        form = Form.ANY_SCALE if phi.any_scale else Form.RESIDUAL
        function = fresh(phi.residual)

    def at_highest(w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        with jax.default_matmul_precision("highest"), phi_hint(where, w, args, kwargs):
            return function(w, *args, **kwargs)

    return at_highest, form
