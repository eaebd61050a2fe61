"""Full products a few rows at a time: `chunked` bounds the memory of Φ, E and their derivatives."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax

from ..errors import check_callable, check_count, shapes_of, show
from ..leaves import is_inexact, partition
from ..printing import printed
from ..types import ComposedMap, PyTree, ResidualMap

tree = optax.tree

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_TRIALS = 8  # Compilations, at most, to find a chunk that fits.


@printed
def chunked(
    function: Callable[..., PyTree],
    *,
    chunk_size: int | None = None,
    memory: int | str | None = None,
    argnums: int | tuple[int, ...] = 2,
) -> Any:
    """A mean over rows of data, evaluated a chunk of rows at a time.

        h(w, λ, data) = mean over rows i of h_i(w, λ) = Σ over chunks c of (n_c / n) h(w, λ, data_c)

    for h the map Φ, the objective E, or a loss. Values and derivatives of every order and mode are
    those of h, to rounding. The derivative of a chunk is computed anew in each pass, from `w`, λ and
    its rows: nothing is kept for a chunk. So solvers and estimators of all kinds run on data of which
    one product would not fit into memory.

    Of a `proximal_gradient` map the gradient step is averaged, and the proximal map is applied once.

    Where the number of chunks divides that of rows, chunk i has the rows i, i + m, i + 2m, ...: on data
    sharded along the rows each device works on rows of its own.

    Assumed, not checked: h is a mean over rows, plus terms that do not depend on data.

    Cost: that of h; derivatives evaluate each chunk once more. With `memory`, one to ten compilations
    of one product the first time that shapes are met. Memory: that of a chunk, and a few times that of
    w and λ.
    When not to use it: where a product over all rows fits: one large product is faster than many.

    Args:
        function: `function(w, lam, data, ...)`, Φ or E; also a map of `gradient_descent` and its like.
        chunk_size: Rows a chunk.
        memory: A bound on the temporary memory of one product with Jᵀ and Bᵀ, in bytes, or as "256
            MiB"; the largest chunk that obeys it is found by XLA's own account of compiled products.
        argnums: The positions of the data among the arguments of `function`: 2 after w and λ.

    Returns:
        The function, of the same arguments; of a map from this library one of its kind.

    Raises:
        TypeError: `function` is not callable; when called, the data have no common leading axis.
        ValueError: Both or none of `chunk_size` and `memory` are given, or one of them is no size; when
            called, one row needs more than `memory`.

    >>> import fixedgrad as fg
    >>> loss = lambda w, lam, x: 0.5 * jnp.mean((x @ w) ** 2) + 0.5 * lam * jnp.sum(w**2)
    >>> phi = fg.gradient_descent(loss, step_size=0.1)
    >>> w, x = jnp.ones(3), jnp.eye(12, 3)
    >>> bool(jnp.allclose(chunked(phi, chunk_size=4)(w, 1.0, x), phi(w, 1.0, x)))
    True

    References:
        Griewank, Walther, Evaluating Derivatives, 2008, chapter 12 (recomputation).
    """
    check_callable("chunked", "function", function, "function(w, lam, data, ...)")
    if (chunk_size is None) == (memory is None):
        raise ValueError(
            "`chunked` needs one of `chunk_size` (rows) and `memory` (bytes), got "
            f"{'none' if memory is None else 'both'}."
        )
    if chunk_size is not None:
        check_count("chunked", "chunk_size", chunk_size)
    bound = None if memory is None else _bytes(memory)
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def over_chunks(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return _Chunked(function, chunk_size, bound, places)

    if isinstance(function, ResidualMap):
        phi, residual = over_chunks(function.phi), over_chunks(function.residual)
        return dataclasses.replace(function, phi=phi, residual=residual)
    if isinstance(function, ComposedMap):
        return dataclasses.replace(function, inner=over_chunks(function.inner))
    return over_chunks(function)


class _Chunked:
    """A function whose data are cut into chunks; sizes that were found are kept by shapes."""

    def __init__(
        self,
        function: Callable[..., PyTree],
        chunk_size: int | None,
        bound: int | None,
        places: tuple[int, ...],
    ):
        self._function, self._chunk_size, self._bound = function, chunk_size, bound
        self._places, self._found = places, {}

    def __call__(self, w: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        arguments = (w, *args)
        data = {i: arguments[i] for i in self._places if i < len(arguments)}
        lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(data)}
        if len(lengths) != 1 or () in lengths:
            raise TypeError(
                f"`chunked` averages over a common leading axis of the arguments {self._places}, got "
                f"{[shapes_of(x) for x in data.values()]}; name the data by `argnums`."
            )
        n = lengths.pop()[0]
        size = self._chunk_size or self._size(n, arguments, kwargs)
        return self._mean(n, min(size, n), arguments, kwargs)

    def _mean(self, n: int, size: int, arguments: tuple[PyTree, ...], kwargs: PyTree) -> PyTree:
        """The mean over n rows, `size` of them at a time."""
        if size == n:
            return self._function(*arguments, **kwargs)
        count = n // size
        strided = count * size == n
        data = [arguments[i] for i in self._places]

        def rows(i: jax.Array, x: jax.Array) -> jax.Array:
            if not strided:
                return lax.dynamic_slice_in_dim(x, i * size, size)
            apart = jnp.reshape(x, (size, count, *x.shape[1:]))
            return lax.dynamic_index_in_dim(apart, i, axis=1, keepdims=False)

        def of_rows(data: list[PyTree], others: tuple[PyTree, ...], kwargs: PyTree) -> PyTree:
            filled = list(others)
            for i, x in zip(self._places, data, strict=True):
                filled[i] = x
            return self._function(*filled, **kwargs)

        # What a derivative needs of a chunk is computed anew from its number, w, λ and the data; rows
        # that were cut outside of this would be kept, all of them: a copy of the data.
        @jax.checkpoint
        def of_chunk(
            i: jax.Array, data: list[PyTree], others: tuple[PyTree, ...], kwargs: PyTree
        ) -> PyTree:
            return of_rows(jax.tree.map(lambda x: rows(i, x), data), others, kwargs)

        others = tuple(None if i in self._places else x for i, x in enumerate(arguments))

        def weighted(value: PyTree, share: float) -> PyTree:
            return jax.tree.map(lambda x: x * share if is_inexact(x) else x, value)

        # Leaves that are not inexact are no means: they are the same of every chunk.
        value, rest, join = partition(of_chunk(jnp.int32(0), data, others, kwargs))
        total = weighted(value, size / n)

        def add(total: PyTree, i: jax.Array) -> tuple[PyTree, None]:
            return tree.add(
                total, weighted(partition(of_chunk(i, data, others, kwargs))[0], size / n)
            ), None

        total, _ = lax.scan(add, total, jnp.arange(1, count, dtype=jnp.int32))
        if not strided:
            tail = of_rows(jax.tree.map(lambda x: x[count * size :], data), others, kwargs)
            total = tree.add(total, weighted(partition(tail)[0], (n - count * size) / n))
        return join(total, rest)

    def _size(self, n: int, arguments: tuple[PyTree, ...], kwargs: PyTree) -> int:
        """The largest chunk whose product obeys the bound, by XLA's account."""
        leaves, treedef = jax.tree.flatten((arguments, kwargs))
        key = treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if key not in self._found:
            self._found[key] = self._search(n, arguments, kwargs)
        return self._found[key]

    def _search(self, n: int, arguments: tuple[PyTree, ...], kwargs: PyTree) -> int:
        bound = self._bound or 0
        needed: dict[int, int] = {}

        def bytes_of(size: int) -> int:
            if size not in needed:
                needed[size] = self._measured(n, size, arguments, kwargs)
            return needed[size]

        if bytes_of(n) <= bound:
            return n
        # What a product needs grows with the chunk by a line: through two points, then with care.
        small, large = max(1, min(n // 64, 64)), max(1, min(n // 8, 512))
        low, high = bytes_of(small), bytes_of(large)
        slope = max((high - low) / max(large - small, 1), 1e-9)
        size = int(min(max(small + (bound - low) / slope, 1), n))
        for _ in range(_TRIALS):
            size = _even(n, size)
            if bytes_of(size) <= bound:
                return size
            size = max(1, min(size - 1, int(0.9 * size * bound / bytes_of(size))))
        fitting = [size for size, used in needed.items() if used <= bound]
        if fitting:
            return max(fitting)
        raise ValueError(
            f"`memory`={bound} bytes of `chunked` are too few: a product over chunks of "
            f"{min(needed)} rows takes {needed[min(needed)]} bytes beside its arguments; give more."
        )

    def _measured(self, n: int, size: int, arguments: tuple[PyTree, ...], kwargs: PyTree) -> int:
        """Temporary bytes of one product with Jᵀ and Bᵀ in chunks of `size` rows."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (arguments, kwargs)
        )
        leaves, treedef = jax.tree.flatten(shapes)
        names = [i for i, x in enumerate(arguments) for _ in jax.tree.leaves(x)]
        names += [-1] * (len(leaves) - len(names))
        moving = [
            name not in self._places and is_inexact(x)
            for name, x in zip(names, leaves, strict=True)
        ]

        def product(leaves: list[jax.Array]) -> PyTree:
            """The value and the cotangents of all but the data, for a cotangent of ones."""

            def value(moved: list[jax.Array]) -> PyTree:
                waiting = iter(moved)
                full = [next(waiting) if m else x for m, x in zip(moving, leaves, strict=True)]
                arguments, kwargs = jax.tree.unflatten(treedef, full)
                return partition(self._mean(n, size, arguments, kwargs))[0]

            moved = [x for m, x in zip(moving, leaves, strict=True) if m]
            out, pull = jax.vjp(value, moved)
            return out, pull(tree.ones_like(out))

        # What the function closes over may be traced: of constants only the shapes are wanted.
        closed = jax.make_jaxpr(product)(leaves)
        consts = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in closed.consts]

        def run(consts: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
            return jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)

        account: Any = jax.jit(run).lower(consts, leaves).compile().memory_analysis()
        return account.temp_size_in_bytes


def _even(n: int, size: int) -> int:
    """A chunk of at most `size` rows that divides n, unless only much smaller ones do."""
    count = -(-n // size)
    for more in range(count, min(2 * count, n) + 1):
        if n % more == 0:
            return n // more
    return size


def _bytes(memory: object) -> int:
    """A size in bytes.

    Raises:
        ValueError: It is none.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = (
        re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", memory) if isinstance(memory, str) else None
    )
    if found and found[2] in _UNITS and found[1].replace(".", "", 1).isdigit():
        return int(float(found[1]) * _UNITS[found[2]])
    raise ValueError(
        f'`memory` of `chunked` must be a number of bytes, or a text such as "256 MiB" with one of the '
        f"units {', '.join(_UNITS)}, got {show(memory)}."
    )
