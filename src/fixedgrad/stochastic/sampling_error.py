"""How wrong is a stochastic hypergradient? `certify_stochastic` tells its noise from its bias."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..certificate import CertificateStatus
from ..certificate.certificate import relative, the_pair
from ..certificate.certify import MAX_PASSES, Options, assess, check_options
from ..certificate.dual_weighted import RefinedEstimate, refine
from ..certificate.options import NO_KWARGS, check_kwargs, krylov
from ..compiled import compiled_for
from ..errors import check_callable, check_count
from ..printing import html, member, number, record, shapes_in, values_of
from ..problem import Problem
from ..real_form import norm
from ..types import LinearSolver, Outer, Phi, PyTree, Scalar
from .batches import Call, as_key, check_sources, take

tree = optax.tree

_DEVIATIONS = 2.0  # Standard errors that count as error: about 95 %.


class StochasticCertificate(NamedTuple):
    """What is known of a stochastic hypergradient at (w, v); an estimate, from samples of rows.

    Attributes:
        error: An estimate of ‖g − ∇f‖ for the gradient g that was given, of all data.
        relative_error: `error` over the norm of `polished`.
        gradient: ĝ = ∇₂E + Bᵀv at (w, v), the mean over the sampled rows.
        standard_error: The standard error of that mean (a norm), by independent groups of rows.
        bias: ‖ĝ − g⁺‖: what ĝ errs by since (w, v) is not the solution, by adjoint-weighted residuals
            on the sampled rows.
        polished: g⁺, the hypergradient of the sampled rows, corrected; ĝ where `valid` is false.
        sampling_error: The standard error of g⁺ (a norm): its rows are not all rows.
        num_rows: Sampled rows, of the smallest source, int32.
        valid: Whether `error` can be relied on.
        status: A `CertificateStatus`, int32: what speaks against it on the sampled rows.
    """

    error: jax.Array
    relative_error: jax.Array
    gradient: PyTree
    standard_error: jax.Array
    bias: jax.Array
    polished: PyTree
    sampling_error: jax.Array
    num_rows: jax.Array
    valid: jax.Array
    status: jax.Array

    def __repr__(self) -> str:
        known = values_of(
            self.relative_error, self.bias, self.standard_error, self.sampling_error, self.status
        )
        if known is None or max(x.ndim for x in known):
            return shapes_in(self)
        error, bias, standard_error, sampling_error, status = known
        return record(
            self,
            f"relative error {number(error)}",
            f"bias {number(bias)}",
            f"standard error {number(standard_error)}",
            f"of the corrected {number(sampling_error)}",
            member(CertificateStatus, status),
        )

    def _repr_html_(self) -> str:
        return html(type(self).__name__, self._asdict(), status=CertificateStatus)


def certify_stochastic(
    outer: Outer,
    phi: Phi,
    w: PyTree,
    v: PyTree,
    lam: PyTree,
    /,
    *args: PyTree,
    kwargs: Mapping[str, PyTree] = NO_KWARGS,
    gradient: PyTree | None = None,
    num_groups: int = 8,
    group_size: int = 256,
    key: jax.Array | int = 0,
    solve_rtol: Scalar = 0.01,
    safety: Scalar = 1.25,
    make_linear_solver: Callable[[Scalar], LinearSolver] = krylov,
) -> StochasticCertificate:
    """How wrong is a stochastic hypergradient at (w, v), and what of it is noise, what bias?

    Rows are drawn without replacement, in R groups of M. Group r gives ĝ_r = ∇₂E + Bᵀv, and by the
    dual-weighted passes of `certify` on its rows the hypergradient g⁺_r of these rows. All groups
    together give ĝ and g⁺ in the same way, and

        standard_error² = (1 − RM/n) Σ_r ‖ĝ_r − mean‖² / (R (R − 1)),      sampling_error² the same of
        g⁺_r, bias            = ‖ĝ − g⁺‖,
        error           = safety (‖g − g⁺‖ + rest + 2 sampling_error + ‖mean of g⁺_r − g⁺‖ / (R − 1)).

    g is the gradient that was given, such as that of one update, and `rest` what the last pass left.
    The last term is the jackknife's estimate of the bias that few rows alone make, of the order 1/(RM):
    a solution of a sample is no unbiased one. Where the groups hold all n rows no sampling error
    remains.

    All of it is an estimate: a few groups know little of rare rows.

    Assumed, not checked: as in `certify`; rows are independent, and Φ and E means over them. λ with an
    entry for each row is allowed; entries of rows that were not sampled get the gradient 0, which the
    sampling error counts.

    Cost: that of `certify` R times on M rows, and once on RM rows. Memory: RM rows, and that of
    `certify`.
    When not to use it: every update; now and then, to choose batch sizes and numbers of steps.

    Args:
        outer: `outer(w, lam, *args, **kwargs) -> scalar`, a mean over rows.
        phi: `phi(w, lam, *args, **kwargs) -> w`.
        w: The lower-level iterate, `state.w`.
        v: That of the linear system, `state.v`.
        lam: λ.
        *args: What the update got, with `minibatches` or `given_batches` in it.
        kwargs: The same by keyword.
        gradient: The gradient whose error is asked for; `None` for ĝ.
        num_groups: R, at least 2.
        group_size: M; at most the R-th part of the rows.
        key: Of the choice of rows, or a seed.
        solve_rtol: As in `certify`.
        safety: As in `certify`.
        make_linear_solver: As in `certify`.

    Returns:
        A `StochasticCertificate`.

    Raises:
        TypeError: An argument is not of its kind; there are no batches among the arguments.
        ValueError: A number is out of its range, or there are fewer rows than groups.

    >>> import fixedgrad as fg
    >>> x = jax.random.normal(jax.random.key(0), (4000, 3))
    >>> loss = lambda w, lam, x: 0.5 * jnp.mean((x @ w - 1.0) ** 2) + 0.5 * lam * jnp.sum(w**2)
    >>> outer = lambda w, lam, x: 0.5 * jnp.mean((x @ w - 2.0) ** 2)
    >>> phi = fg.gradient_descent(loss, step_size=0.2)
    >>> hypergrad = fg.stochastic_hypergradient(outer, phi, lower_steps=20, linear_steps=20)
    >>> data = fg.minibatches(x, 50)
    >>> grad, state = hypergrad.update(hypergrad.init(jnp.zeros(3), 1.0, data), 1.0, data)
    >>> certificate = certify_stochastic(
    ...     outer, phi, state.w, state.v, 1.0, data, gradient=grad, group_size=500)
    >>> bool(certificate.valid), int(certificate.num_rows)
    (True, 4000)

    References:
        Grazzi, Pontil, Salzo, JMLR 2023 (bias and variance); Efron, Stein, The jackknife estimate of
        variance, 1981; Becker, Rannacher, Acta Numerica 2001 (dual-weighted residuals).
    """
    where = "certify_stochastic"
    check_callable(where, "outer", outer, "outer(w, lam, *args) -> scalar")
    check_callable(where, "phi", phi, "phi(w, lam, *args) -> w")
    given = {
        "gradient": gradient,
        "num_groups": num_groups,
        "group_size": group_size,
        "key": key,
        "solve_rtol": solve_rtol,
        "safety": safety,
        "make_linear_solver": make_linear_solver,
    }
    functions: dict[str, Callable[..., Any]] = {"phi": phi, "outer": outer}
    data = check_kwargs(certify_stochastic, functions, 2 + len(args), kwargs, given)
    check_options(where, Options(solve_rtol, safety, make_linear_solver))
    check_count(where, "group_size", group_size)
    check_count(where, "num_groups", num_groups)
    call = Call(args, data)
    check_sources(where, call)
    rows = min(_num_rows(x.population()[0]) for x in call.sources)
    if not 2 <= num_groups <= rows:
        raise ValueError(
            f"`num_groups` of `{where}` must be at least 2 and at most the number of rows, {rows}, got "
            f"{num_groups}."
        )
    sizes = num_groups, group_size
    made_of = (outer, phi, make_linear_solver)
    compute = compiled_for(made_of, (where, *sizes), _program(*sizes))
    return compute(w, v, lam, args, data, gradient, as_key(key), solve_rtol, safety)


def _num_rows(population: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(population)[0])[0]


def _program(num_groups: int, group_size: int) -> Callable[..., Callable[..., PyTree]]:
    """The computation, made of the functions for `compiled_for`."""

    def made(
        outer: Outer, phi: Phi, make_linear_solver: Callable[[Scalar], LinearSolver]
    ) -> Callable[..., PyTree]:
        def call(
            w: PyTree,
            v: PyTree,
            lam: PyTree,
            args: tuple[PyTree, ...],
            kwargs: dict[str, PyTree],
            gradient: PyTree | None,
            key: jax.Array,
            solve_rtol: Scalar,
            safety: Scalar,
        ) -> StochasticCertificate:
            functions = outer, phi, make_linear_solver
            at = (w, v, lam), Call(args, kwargs)
            sizes = num_groups, group_size
            return _compute(functions, at, sizes, gradient, key, solve_rtol, safety)

        return call

    return made


def _compute(
    functions: tuple[Outer, Phi, Callable[[Scalar], LinearSolver]],
    at: tuple[tuple[PyTree, PyTree, PyTree], Call],
    sizes: tuple[int, int],
    gradient: PyTree | None,
    key: jax.Array,
    solve_rtol: Scalar,
    safety: Scalar,
) -> StochasticCertificate:
    where = "certify_stochastic"
    outer, phi, make_linear_solver = functions
    (w, v, lam), call = at
    num_groups, group_size = sizes
    sampled, share, least = _sampled(call, num_groups, group_size, key)

    def passes(batches: list[PyTree]) -> tuple[Problem, PyTree | None, RefinedEstimate]:
        """The problem on these rows, the gradient that was given, and the passes of `certify`."""
        args, kwargs = call.replaced(batches)
        problem = Problem.at(where, outer, phi, w, lam, args, kwargs)
        v_x, given, _ = the_pair(where, problem, v, gradient, make_linear_solver(solve_rtol))
        s = refine(problem, problem.w, v_x, make_linear_solver, solve_rtol, MAX_PASSES)
        return problem, given, s

    def of_group(batches: list[PyTree]) -> tuple[PyTree, PyTree]:
        _, _, s = passes(batches)
        return s.first.gradient, s.end

    first, end = lax.map(of_group, sampled)
    pooled = [jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), x) for x in sampled]
    problem, given, s = passes(pooled)
    of_pooled = assess(problem, s, given, safety)

    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), end)
    few_rows = norm(tree.sub(mean, s.end)) / (num_groups - 1)
    standard_error, sampling_error = (_standard_error(x, share) for x in (first, end))
    factor = jnp.asarray(safety, of_pooled.error.dtype)
    of_sampling = factor * (_DEVIATIONS * sampling_error + jnp.where(share < 1, few_rows, 0.0))
    error = of_pooled.error + of_sampling.astype(of_pooled.error.dtype)
    best = tree.where(of_pooled.valid, s.end, s.first.gradient)
    return StochasticCertificate(
        error=error,
        relative_error=relative(error, best),
        gradient=problem.join_gradient(s.first.gradient),
        standard_error=standard_error,
        bias=norm(tree.sub(s.first.gradient, s.end)),
        polished=problem.join_gradient(best),
        sampling_error=sampling_error,
        num_rows=jnp.int32(least),
        valid=of_pooled.valid & jnp.isfinite(error),
        status=of_pooled.status,
    )


def _sampled(
    call: Call, num_groups: int, group_size: int, key: jax.Array
) -> tuple[list[PyTree], float, int]:
    """Of each source rows in groups; the smallest share of all rows that they are, and their number."""
    groups, shares, numbers = [], [], []
    for i, source in enumerate(call.sources):
        population, whole = source.population()
        rows = _num_rows(population)
        size = min(group_size, rows // num_groups)
        chosen = jax.random.permutation(jax.random.fold_in(key, i), rows)[: num_groups * size]
        batch = take(population, chosen)
        groups.append(
            jax.tree.map(
                lambda x, size=size: jnp.reshape(x, (num_groups, size, *x.shape[1:])), batch
            )
        )
        shares.append(0.0 if whole is None else num_groups * size / whole)
        numbers.append(num_groups * size)
    return groups, min(shares), min(numbers)


def _standard_error(of_groups: PyTree, share: float) -> jax.Array:
    """The norm of the standard error of the mean over groups that are this share of all rows."""
    num_groups = jax.tree.leaves(of_groups)[0].shape[0]
    apart = jax.tree.map(lambda x: x - jnp.mean(x, axis=0, keepdims=True), of_groups)
    size = norm(apart)
    return size * jnp.sqrt(jnp.asarray((1 - share) / (num_groups * (num_groups - 1)), size.dtype))
