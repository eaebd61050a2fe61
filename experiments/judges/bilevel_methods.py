"""The methods of `bilevel_benchmark`: what each is in this library, and what a step of it reads."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fixedgrad as fg

from ..problems.bilevel_benchmark import BenchmarkTask

Sizes = Mapping[str, Any]  # Step sizes by name: numbers, or traced.


class Rows(NamedTuple):
    """What was read: rows of the lower level in Φ and its products, rows of the upper level in E."""

    lower: Any
    upper: Any


class Method(NamedTuple):
    """One method, for one problem.

    Attributes:
        loop: `loop(sizes) -> Bilevel`.
        data: `data(key, lower, upper) -> (lower, upper)`: what stands in the place of the rows.
        read: `read(info) -> Rows` of each step, from the `BilevelInfo` of some.
    """

    loop: Callable[[Sizes], fg.Bilevel]
    data: Callable[[jax.Array, Any, Any], tuple[Any, Any]]
    read: Callable[[fg.BilevelInfo], Rows]


def single_loop(
    task: BenchmarkTask,
    form: Callable[..., fg.Hypergradient],
    *,
    batch: tuple[int, int],
    power: float = 0.0,
) -> Method:
    """SOBA (`power` 1/2) or SABA (0). Sizes: `w`, `v` and `outer`.

    A step reads a batch in Φ, and again in one product with Jᵀ and Bᵀ, both from one linearisation;
    and a batch of E.
    """

    def loop(sizes: Sizes) -> fg.Bilevel:
        of_w, of_v = _sgd(sizes["w"], power), _sgd(sizes["v"], power)
        hypergrad = form(task.objective, task.phi, of_w, of_v)
        return fg.bilevel(hypergrad, _sgd(sizes["outer"], power))

    return Method(loop, _batches(*batch), _always(2 * batch[0], batch[1]))


def stochastic_aid(
    task: BenchmarkTask, *, start: fg.Start, batch: tuple[int, int], steps: int = 10
) -> Method:
    """StocBiO (v from 0) or AmIGO (v from the last one). Sizes: `w`, `v` and `outer`.

    A step reads `steps` batches in Φ, as many in products with Jᵀ, one in that with Bᵀ, and one of E.
    """

    def loop(sizes: Sizes) -> fg.Bilevel:
        hypergrad = fg.stochastic_hypergradient(
            task.objective,
            task.phi,
            _sgd(sizes["w"]),
            _sgd(sizes["v"]),
            lower_steps=steps,
            linear_steps=steps,
            start=start,
        )
        return fg.bilevel(hypergrad, _sgd(sizes["outer"]))

    return Method(loop, _batches(*batch), _always((2 * steps + 1) * batch[0], batch[1]))


def deterministic_aid(
    task: BenchmarkTask,
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    steps: tuple[int, int],
    step_size: float = 1.0,
    box: float = jnp.inf,
) -> Method:
    """Warm AID on all rows: t steps of `anderson`, k of `cg`. Sizes: `outer`, of `optimizer`.

    Φ is a gradient step of `step_size`; λ stays in [−box, box]. A step reads all rows t + 2 times in Φ
    (for the true residual and for the linearisation too), k + 2 times in products with Jᵀ (for the
    residuals of the start and of the end too), once in that with Bᵀ, and once in E. A test counts them.
    """
    t, k = steps
    phi = fg.gradient_descent(
        lambda w, lam, lower, _: task.loss(w, lam, lower), step_size=step_size
    )

    def loop(sizes: Sizes) -> fg.Bilevel:
        hypergrad = fg.hypergradient(
            task.objective,
            phi,
            fg.anderson(phi, num_steps=t),
            fg.aid(fg.cg(num_steps=k)),
            start=fg.warm(),
            # A warm start may be as good as a few steps make it: no failure.
            on_failure="ignore",
        )
        project = (lambda lam: jnp.clip(lam, -box, box)) if box < jnp.inf else None
        return fg.bilevel(hypergrad, optimizer(sizes["outer"]), project=project)

    def all_rows(key: jax.Array, lower: Any, upper: Any) -> tuple[Any, Any]:
        del key
        return lower, upper

    return Method(loop, all_rows, _always((t + k + 5) * task.num_lower, task.num_upper))


def lbfgs(step: Any) -> optax.GradientTransformation:
    """L-BFGS without a line search."""
    return optax.lbfgs(step, memory_size=30, linesearch=None)


def _sgd(step: Any, power: float = 0.0) -> optax.GradientTransformation:
    """Steps of size step / (1 + count)^power."""
    return optax.sgd((lambda count: step / (1.0 + count) ** power) if power else step)


def _always(lower: int, upper: int) -> Callable[[fg.BilevelInfo], Rows]:
    """The same for each step that was taken."""
    return lambda info: Rows(lower * jnp.sum(info.taken), upper * jnp.sum(info.taken))


def _batches(of_lower: int, of_upper: int) -> Callable[[jax.Array, Any, Any], tuple[Any, Any]]:
    """Minibatches of both, in epochs as those of the benchmark's sampler."""

    def data(key: jax.Array, lower: Any, upper: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key)
        return (
            fg.minibatches(lower, of_lower, key=keys[0], replacement=False),
            fg.minibatches(upper, of_upper, key=keys[1], replacement=False),
        )

    return data


class Contestant(NamedTuple):
    """A method and the step sizes that are tried.

    Attributes:
        label: In tables and figures.
        published: Whether it is one of the benchmark's methods, at its batch size or the nearest one.
        method: The method.
        settings: Step sizes by a name: "published" for the benchmark's best, others for ours.
        before: What runs first, and for how many passes; the method goes on from its w and λ. Sizes:
            `first`, the step of λ.
    """

    label: str
    published: bool
    method: Method
    settings: dict[str, Sizes]
    before: tuple[Method, float] | None = None


def _sizes(step: float, ratio: float) -> Sizes:
    """The benchmark's two numbers: the step of w and v, and what it is divided by for that of λ."""
    return {"w": step, "v": step, "outer": step / ratio}


def _grid(*pairs: tuple[float, float], published: tuple[float, float] | None = None) -> Any:
    found = {f"step {a:g}, ratio {b:g}": _sizes(a, b) for a, b in pairs}
    return found if published is None else {"published": _sizes(*published), **found}


def for_quadratics(task: BenchmarkTask, *, batch: int = 64, small: int = 16) -> list[Contestant]:
    """The contestants on the simulated quadratics.

    The published steps are those of `quadratics_021424_best_params.yml`, for 32,768 rows and 10 λ;
    SOBA has none there.
    """
    pair = (batch, batch)
    stocbio = stochastic_aid(task, start=_STOCBIO, batch=pair)
    amigo = stochastic_aid(task, start=fg.warm(), batch=pair)
    outer = (0.08, 0.11, 0.14)
    return [
        Contestant(
            "SOBA",
            True,
            single_loop(task, fg.soba, batch=pair, power=0.5),
            _grid((0.1, 0.1), (0.3, 0.3), (1.0, 1.0), (1.0, 0.5), (2.0, 2.0), (2.0, 1.0)),
        ),
        Contestant(
            "SABA",
            True,
            single_loop(task, fg.saba, batch=pair),
            _grid((0.2, 1.0), (0.3, 1.0), (0.4, 1.0), (0.3, 2.0), (0.1, 0.5), published=(0.1, 1.0)),
        ),
        Contestant(
            "stocBiO",
            True,
            stocbio,
            _grid((0.01, 0.1), (0.03, 0.1), (0.1, 0.3), published=(0.1, 1.0)),
        ),
        Contestant(
            "AmIGO",
            True,
            amigo,
            _grid((0.01, 0.03), (0.03, 0.1), (0.1, 1.0), published=(0.01, 0.1)),
        ),
        Contestant(
            f"SABA, batches of {small}",
            False,
            single_loop(task, fg.saba, batch=(small, small)),
            {f"0.1, 0.1, {x:g}": {"w": 0.1, "v": 0.1, "outer": x} for x in outer},
        ),
        Contestant(
            "AID on all rows, L-BFGS",
            False,
            deterministic_aid(task, lbfgs, steps=(3, 3)),
            {f"outer {x:g}": {"outer": x} for x in (0.7, 1.0)},
        ),
    ]


def for_cleaning(
    task: BenchmarkTask,
    published: Mapping[str, tuple[float, float]],
    *,
    batch: tuple[int, int] = (64, 64),
    blocks: tuple[int, int] = (200, 125),
    unequal: tuple[int, int] = (128, 32),
) -> list[Contestant]:
    """The contestants on the cleaning of MNIST; `published` has (step, ratio) by method.

    SABA has larger batches than the published 64, which divide the numbers of rows and keep its tables
    small.
    """
    stocbio = stochastic_aid(task, start=_STOCBIO, batch=batch)
    amigo = stochastic_aid(task, start=fg.warm(), batch=batch)
    aid = deterministic_aid(task, optax.adam, steps=(3, 2), step_size=0.1, box=8.0)
    quick_adam = deterministic_aid(task, _quick_adam, steps=(2, 2), step_size=0.1, box=8.0)
    first = single_loop(task, fg.soba, batch=unequal, power=0.5)
    return [
        Contestant(
            "SOBA",
            True,
            single_loop(task, fg.soba, batch=batch, power=0.5),
            _grid((0.5, 5e-5), published=published["SOBA"]),
        ),
        Contestant(
            "SABA",
            True,
            single_loop(task, fg.saba, batch=blocks),
            _grid((0.1, 3e-5), (0.1, 1e-5), published=published["SABA"]),
        ),
        Contestant("stocBiO", True, stocbio, _grid((0.03, 1e-5), published=published["stocBiO"])),
        Contestant("AmIGO", True, amigo, _grid((0.03, 1e-5), published=published["AmIGO"])),
        Contestant("AID on all rows, Adam", False, aid, {"outer 1": {"outer": 1.0}}),
        Contestant(
            "SOBA, then AID on all rows",
            False,
            quick_adam,
            {
                f"first {x:g}, outer 1": {"w": 1.0, "v": 1.0, "first": x, "outer": 1.0}
                for x in (1e4,)
            },
            before=(first, 12.0),
        ),
    ]


def _quick_adam(step: Any) -> optax.GradientTransformation:
    """Adam that forgets fast, for hypergradients without noise."""
    return optax.adam(step, b1=0.5)


_STOCBIO = fg.separately(w=fg.warm(), v=fg.cold())

PUBLISHED = {
    0.5: {
        "SOBA": (1.0, 1e-4),
        "SABA": (0.1, 1e-3),
        "stocBiO": (0.01, 1e-5),
        "AmIGO": (0.001, 1e-5),
    },
    0.7: {
        "SOBA": (1.0, 1e-4),
        "SABA": (0.01, 1e-4),
        "stocBiO": (0.01, 1e-5),
        "AmIGO": (0.001, 1e-5),
    },
    0.9: {
        "SOBA": (1.0, 1e-3),
        "SABA": (0.1, 1e-3),
        "stocBiO": (0.01, 1e-5),
        "AmIGO": (0.001, 1e-5),
    },
}
"""(step, ratio) of `datacleaning0_*_best_params.yml`, by the corruption of the labels."""
