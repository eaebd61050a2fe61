"""Batches in the place of data: `minibatches` draws rows, `given_batches` takes what a loader made.

A value of either kind stands among the arguments where Φ and E expect data with a leading axis of rows.
Each evaluation of Φ or E then gets a batch in its place, and the next evaluation another one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..errors import check_count, shapes_of, show
from ..leaves import check_arrays
from ..types import PyTree

_STATIC = {"static": True}


class Drawing(NamedTuple):
    """Where a source is.

    Attributes:
        key: The data of the key of the draws to come, which any checkpoint can hold; `()` without one.
        order: A permutation of the rows, for draws without replacement; else `()`.
        position: Rows of `order`, or batches, that were drawn, int32.
    """

    key: Any
    order: Any
    position: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Minibatches:
    """Data of which each evaluation gets random rows.

    Attributes:
        data: A pytree of arrays with a leading axis of rows.
        key: Of all draws.
        batch_size: Rows a draw.
        replacement: Whether rows are drawn anew each time.
    """

    data: PyTree
    key: jax.Array
    batch_size: int = dataclasses.field(metadata=_STATIC)
    replacement: bool = dataclasses.field(metadata=_STATIC)

    def __repr__(self) -> str:
        drawn = "" if self.replacement else ", replacement=False"
        return f"minibatches({shapes_of(self.data)}, {self.batch_size}{drawn})"

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return _leading(self.data)

    def first(self, stream: int) -> Drawing:
        """The state before the first draw of an independent stream."""
        n = self.num_rows
        # A permutation that is used up: the first draw makes one.
        order = () if self.replacement else jnp.arange(n, dtype=jnp.int32)
        key = jax.random.key_data(jax.random.fold_in(self.key, stream))
        return Drawing(key, order, jnp.int32(n))

    def resumed(self, drawing: Drawing) -> Drawing:
        """The state at the beginning of an update."""
        return drawing

    def draw(self, drawing: Drawing) -> tuple[PyTree, Drawing]:
        """A batch, and the state after it."""
        n, size = self.num_rows, self.batch_size
        if self.replacement:
            key, now = self._split(drawing.key)
            rows = jax.random.randint(now, (size,), 0, n, dtype=jnp.int32)
            return take(self.data, rows), drawing._replace(key=key)

        def shuffled() -> Drawing:
            key, now = self._split(drawing.key)
            order = jax.random.permutation(now, jnp.arange(n, dtype=jnp.int32))
            return Drawing(key, order, jnp.int32(0))

        now = lax.cond(drawing.position + size > n, shuffled, lambda: drawing)
        rows = lax.dynamic_slice_in_dim(now.order, now.position, size)
        return take(self.data, rows), now._replace(position=now.position + size)

    def _split(self, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The data of the key for later, and the key for now."""
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(self.key))
        later, now = jax.random.split(key)
        return jax.random.key_data(later), now

    def population(self) -> tuple[PyTree, int]:
        """All rows, and how many rows there are in the whole."""
        return self.data, self.num_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class GivenBatches:
    """Batches of the caller's, in the order in which evaluations get them.

    Attributes:
        batches: A pytree of arrays with leading axes of batches, then of rows.
    """

    batches: PyTree

    def __repr__(self) -> str:
        return f"given_batches({shapes_of(self.batches)})"

    @property
    def num_batches(self) -> int:
        """Batches that are there."""
        return _leading(self.batches)

    def first(self, stream: int) -> Drawing:
        """The state before the first batch: every stream gets the batches from the first on."""
        del stream
        return Drawing((), (), jnp.int32(0))

    def resumed(self, drawing: Drawing) -> Drawing:
        """The state at the beginning of an update, to which new batches were given."""
        return drawing._replace(position=jnp.int32(0))

    def draw(self, drawing: Drawing) -> tuple[PyTree, Drawing]:
        """The next batch, and the state after it."""
        i = drawing.position
        batch = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), self.batches)
        return batch, drawing._replace(position=i + 1)

    def population(self) -> tuple[PyTree, None]:
        """All rows, of a whole without end."""
        return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), self.batches), None


Source = Minibatches | GivenBatches


def minibatches(
    data: PyTree, batch_size: int, *, key: jax.Array | int = 0, replacement: bool = True
) -> Minibatches:
    """Data of which every evaluation of Φ or E gets `batch_size` random rows.

        ℓ(w, λ) = mean over rows i of ℓ_i(w, λ)      in place of which      mean over i in a batch.

    It is given to `stochastic_hypergradient`, `soba` and `saba` where Φ and E expect the data; the same
    functions run on all of the data when the data itself is given. Streams for Φ and for E are
    independent, and so are those of several `minibatches` among the arguments of one call. Where
    λ has an entry for each row, put the row numbers, `jnp.arange(n)`, into the data: the batch holds
    those of its rows.

    Without replacement every row comes once in an epoch, in a new order each time; the rest of an epoch
    that is shorter than a batch is left out. Batches of one epoch are not independent: means of
    products of several, as v is made of, are then no longer exactly those that are stated for
    independent ones.

    Φ and E have to be means over the rows, but for terms that do not depend on data; of
    a `proximal_gradient` map it is the loss.

    Cost: a gather of the rows at each draw; without replacement one permutation an epoch. Memory: the
    data once, wherever it lies; without replacement n integers for each stream.
    When not to use it: where a product over all rows is cheap beside its compilation, for some thousand
    rows: `hypergradient` on the data has no noise.

    Args:
        data: A pytree of arrays with a common leading axis.
        batch_size: Rows a batch.
        key: A key of `jax.random`, or an integer as its seed.
        replacement: Whether each draw is from all rows.

    Returns:
        A pytree, for the place of the data.

    Raises:
        ValueError: `batch_size` is not a positive integer, or exceeds the number of rows.
        TypeError: `data` has no array, or leaves of different lengths.

    >>> import fixedgrad as fg
    >>> fg.minibatches(jnp.arange(100), 10).batch_size
    10
    """
    check_count("minibatches", "batch_size", batch_size)
    check_arrays("minibatches", "data", data)
    data = jax.tree.map(jnp.asarray, data)
    n = _checked_leading("minibatches", "data", data, "rows")
    if batch_size > n:
        raise ValueError(
            f"`batch_size` of `minibatches` must be at most the number of rows, {n}, got {batch_size}; "
            "give the data itself where all of it is wanted."
        )
    return Minibatches(data, as_key(key), int(batch_size), bool(replacement))


def as_key(key: Any) -> jax.Array:
    """A typed key, of one, of an integer as its seed, or of an old key, which is integers."""
    if isinstance(key, int | np.integer):
        return jax.random.key(key)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def given_batches(batches: PyTree) -> GivenBatches:
    """Batches from a data loader of your own, one for each evaluation of Φ or E in an update.

    An update takes them in order, from the first on: Φ for the steps on w, the steps of the linear
    system and the mixed product, t + k + J of them; E the first J. Give every update new ones.

    Assumed, not checked: the batches are independent.

    Cost: none. Memory: the batches.
    When not to use it: where all data are in memory: `minibatches` draws inside the program.

    Args:
        batches: A pytree of arrays with leading axes (number of batches, rows).

    Returns:
        A pytree, for the place of the data.

    Raises:
        TypeError: `batches` has no array, or leaves of different lengths.

    >>> import fixedgrad as fg
    >>> fg.given_batches(jnp.zeros((21, 8, 3), jnp.float32))
    given_batches(float32[21,8,3])
    """
    check_arrays("given_batches", "batches", batches)
    batches = jax.tree.map(jnp.asarray, batches)
    _checked_leading("given_batches", "batches", batches, "batches")
    return GivenBatches(batches)


def take(data: PyTree, rows: jax.Array) -> PyTree:
    """Rows of data, which are there."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), data)


def _leading(tree: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(tree)[0])[0]


def _checked_leading(where: str, name: str, tree: PyTree, noun: str) -> int:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or () in lengths:
        raise TypeError(
            f"`{name}` of `{where}` must be arrays with one leading axis of {noun}, got "
            f"{shapes_of(tree) if lengths else show(tree)}."
        )
    return lengths.pop()[0]


class Call(NamedTuple):
    """The arguments of Φ or E after λ, and the streams of the sources among them.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]

    @property
    def sources(self) -> list[Source]:
        """The sources, in the order of the arguments."""
        return [x for x in jax.tree.leaves(self, is_leaf=is_source) if is_source(x)]

    def replaced(self, batches: list[PyTree]) -> "Call":
        """The same call with a batch in the place of each source."""
        waiting = iter(batches)

        def batch(x: Any) -> Any:
            return next(waiting) if is_source(x) else x

        return Call(*jax.tree.map(batch, tuple(self), is_leaf=is_source))

    def first(self, role: int) -> tuple[Drawing, ...]:
        """The states of one role, 0 for Φ and 1 for E, before the first draw."""
        return tuple(x.first(2 * i + role) for i, x in enumerate(self.sources))

    def resumed(self, drawings: tuple[Drawing, ...]) -> tuple[Drawing, ...]:
        """These states at the beginning of an update."""
        pairs = zip(self.sources, drawings, strict=True)
        return tuple(source.resumed(drawing) for source, drawing in pairs)

    def draw(self, drawings: tuple[Drawing, ...]) -> tuple["Call", tuple[Drawing, ...]]:
        """The call with batches, and the states after them."""
        pairs = zip(self.sources, drawings, strict=True)
        drawn = [source.draw(drawing) for source, drawing in pairs]
        return self.replaced([batch for batch, _ in drawn]), tuple(after for _, after in drawn)

    def sampler(self, evaluate: Callable[["Call"], PyTree]) -> Callable[[PyTree], PyTree]:
        """`drawings -> (value, drawings)`: what `evaluate` gives of the next batch."""

        def sample(drawings: tuple[Drawing, ...]) -> tuple[PyTree, tuple[Drawing, ...]]:
            batch, after = self.draw(drawings)
            return evaluate(batch), after

        return sample

    def drawn_twice(self, drawings: tuple[Drawing, ...]) -> "Call":
        """The call with each batch of `draw` twice, one after the other."""
        pairs = zip(self.sources, drawings, strict=True)
        drawn = [source.draw(drawing)[0] for source, drawing in pairs]
        return self.replaced([jax.tree.map(lambda x: jnp.concatenate([x, x]), x) for x in drawn])


def is_source(x: Any) -> bool:
    """Whether x stands for batches."""
    return isinstance(x, Minibatches | GivenBatches)


def check_sources(where: str, call: Call) -> None:
    """Raises `TypeError` unless there is a source among the arguments."""
    if not call.sources:
        raise TypeError(
            f"`{where}` got no batches: none of its arguments after `lam` is `minibatches(data, "
            "batch_size)` or `given_batches(batches)`; for all data at once take `hypergradient`."
        )


def check_given(where: str, call: Call, wanted: dict[str, int | None]) -> None:
    """Raises where given batches are fewer than the evaluations of an update, or these not known.

    `wanted` has the evaluations of Φ and of E by name; `None` where a schedule decides while the
    program runs.

    Raises:
        ValueError: There are too few, or a schedule decides how many are needed.
    """
    for source in call.sources:
        if not isinstance(source, GivenBatches):
            continue
        for name, count in wanted.items():
            if count is None:
                raise ValueError(
                    f"`{where}` with `given_batches` needs numbers of steps and batches that are known "
                    "before tracing, got a schedule; draw by `minibatches`, or give integers."
                )
            if source.num_batches < count:
                raise ValueError(
                    f"`{where}` evaluates `{name}` {count} times an update and was given "
                    f"{source.num_batches} batches; give at least {count}."
                )
