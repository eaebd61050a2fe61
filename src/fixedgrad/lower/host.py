"""Solvers on the host, such as SciPy's: `from_host`; and how they call back into the program.

A callback of JAX must not call JAX: both wait for the same threads, and a program of 500 by 50 numbers
hangs. So a solver on the host that needs values or gradients runs in a thread of its own, and asks for
them: the program evaluates, in a loop, and every round is a callback with a value, which returns the
next w. Numerical libraries call this reverse communication.
"""

import collections
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..errors import check_callable, check_same
from ..leaves import Layout, check_arrays, split_static
from ..mapped_axes import steady
from ..printing import printed
from ..types import PyTree, Solver


@printed
def from_host(
    function: Callable[..., PyTree], *, calling: Callable[..., PyTree] | None = None
) -> Solver:
    """A solver that is not JAX, such as SciPy's, called on the host with NumPy arrays.

    The call is a `jax.pure_callback`: it works under `jit`, under `vmap` one element after another,
    and under every derivative of `aid` and `truncated_itd`, which never differentiate the solver.

    Where the solver needs JAX, say what for by `calling`: the program then evaluates
    `calling(w, *args, **kwargs)` whenever the function asks for it, on the device, a batch at once.

    Assumed, not checked: the function has no side effects: it may be called more or less often than
    the program seems to say. It calls JAX in no other way: a callback that calls JAX hangs, as soon as
    arrays are more than a few numbers. Its w is a fixed point of Φ (`with_tolerance`).

    Cost: the function, a copy of its arguments to the host and of w back; with `calling` a thread, and
    a tenth of a millisecond or so a value. Memory: these, on the host; with `calling` every w asked
    for, until a thousand more solves have ended.
    When not to use it: for `itd`; on devices without host callbacks; in a program for `jax.export`,
    which exports no host callback; for a solver that could be JAX, since a batch is solved one
    element after another.

    Args:
        function: `function(w0, *args, **kwargs) -> w` on NumPy arrays, w like w0 in structure,
            shapes and dtypes. With `calling`, `function(call, w0, *args, **kwargs) -> w`, where
            `call(w)` is the value at w, in NumPy arrays.
        calling: `calling(w, *args, **kwargs)`, in JAX: such as `jax.value_and_grad(loss)`.

    Returns:
        `solver(w0, *args, **kwargs) -> w`.

    Raises:
        TypeError: `function` or `calling` is not callable; when differentiated itself, as by `itd`.
        jax.errors.JaxRuntimeError: When called: the function raised, or a w of its is not like w0; the
            text holds the reason.

    >>> solver = from_host(lambda w0, lam: (2.0 * lam).astype(w0.dtype))
    >>> float(solver(jnp.zeros(()), 3.0))
    6.0
    >>> import scipy.optimize
    >>> def minimise(value_and_grad, w0, lam):
    ...     return scipy.optimize.minimize(value_and_grad, w0, jac=True, method="L-BFGS-B").x
    >>> loss = lambda w, lam: jnp.sum((w - lam) ** 2)
    >>> solver = from_host(minimise, calling=jax.value_and_grad(loss))
    >>> jnp.round(solver(jnp.zeros(2), 3.0), 6)
    Array([3., 3.], dtype=float64)
    """
    check_callable("from_host", "function", function, "function(w0, *args) -> w")
    if calling is not None:
        check_callable("from_host", "calling", calling, "calling(w, *args) -> value")

    def on_host(w0: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        check_arrays("from_host", "w0", w0)
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, w0))
        layout, arrays = split_static((w0, args, kwargs))

        def like_w0(w: PyTree) -> PyTree:
            check_same("from_host", w, shapes, "`function(w0, ...)`", "`w0`")
            return w

        def call(arrays: list[Any]) -> PyTree:
            w0, args, kwargs = _on_host(layout, arrays)
            return like_w0(function(w0, *args, **kwargs))

        @jax.custom_jvp
        def run(arrays: list[Any]) -> PyTree:
            if calling is None:
                return jax.pure_callback(call, shapes, arrays, vmap_method="sequential")
            return _conversation(function, calling, layout, arrays, shapes, like_w0)

        @run.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            del primals, tangents
            raise TypeError(
                "A solver made by `from_host` is not JAX and cannot be differentiated itself. Decorate "
                "it with `fixed_point(phi, aid(...))` or `truncated_itd(...)`; `itd()` differentiates "
                "the solver."
            )

        return run(arrays)

    return on_host


def _conversation(
    function: Callable[..., PyTree],
    calling: Callable[..., PyTree],
    layout: Layout,
    arrays: list[Any],
    shapes: PyTree,
    like_w0: Callable[[PyTree], PyTree],
) -> PyTree:
    """The w of `function(call, w0, ...)`, whose calls the program answers one after another."""

    def question(w: PyTree) -> PyTree:
        # SciPy works in float64, whatever it was given.
        w = jax.tree.map(lambda x, s: np.asarray(x, s.dtype), w, shapes)
        check_same("from_host", w, shapes, "`w` of `call(w)`", "`w0`")
        return w

    def begin(arrays: list[Any]) -> tuple[np.int32, np.bool, PyTree]:
        w0, args, kwargs = _on_host(layout, arrays)
        session = _Session(lambda call: like_w0(function(call, w0, *args, **kwargs)), question)
        number = _SESSIONS.add(session)
        return np.int32(number), *_SESSIONS.message(number, 0, None)

    def answer(number: Any, step: Any, done: Any, w: PyTree, value: PyTree) -> Any:
        if done:  # An element of a batch that waits for the others.
            return np.bool(True), w
        value = jax.tree.map(np.asarray, value)
        return _SESSIONS.message(int(number), int(step), value)

    word = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool)
    number, done, w = jax.pure_callback(begin, (*word, shapes), arrays, vmap_method="sequential")

    def exchange(carry: Any) -> Any:
        number, step, done, w = carry
        _, args, kwargs = layout.join(arrays)
        said = number, step + 1, done, w, calling(w, *args, **kwargs)
        out = jax.pure_callback(answer, (word[1], shapes), *said, vmap_method="sequential")
        return number, step + 1, *out

    carry = number, jnp.int32(0), done, w
    return lax.while_loop(lambda carry: ~carry[2], *steady(exchange, carry))[3]


def _on_host(layout: Layout, arrays: list[Any]) -> Any:
    return layout.join([_to_numpy(x) for x in arrays])


def _to_numpy(x: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)


class _Message(NamedTuple):
    """What a solve on the host says: a w whose value it asks for, its result, or what it raised."""

    done: bool
    w: PyTree
    error: BaseException | None = None


class _Session:
    """One solve on the host, in a thread of its own."""

    def __init__(
        self,
        solve: Callable[[Callable[[PyTree], PyTree]], PyTree],
        question: Callable[[PyTree], PyTree],
    ):
        self.lock = threading.Lock()
        self.messages: list[_Message] = []
        self._said: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._values: queue.SimpleQueue[PyTree] = queue.SimpleQueue()

        def call(w: PyTree) -> PyTree:
            self._said.put(_Message(False, question(w)))
            return self._values.get()

        def run() -> None:
            try:
                self._said.put(_Message(True, solve(call)))
            except BaseException as error:  # The program raises it.
                self._said.put(_Message(True, None, error))

        threading.Thread(target=run, daemon=True).start()

    def message(self, step: int, value: PyTree) -> _Message:
        """What it says after `step` values, of which this is the last."""
        with self.lock:
            # A callback is pure, and may come twice with the same.
            if step == len(self.messages):
                if step:
                    self._values.put(value)
                self.messages.append(self._said.get())
            return self.messages[step]


class _Sessions:
    """The solves that run, and the last ones that have ended."""

    def __init__(self, most_ended: int = 1000):
        self._numbers = itertools.count()
        self._sessions: dict[int, _Session] = {}
        self._ended: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._lock, self._most_ended = threading.Lock(), most_ended

    def add(self, session: _Session) -> int:
        with self._lock:
            number = next(self._numbers) % 2**31
            self._sessions[number] = session
            return number

    def message(self, number: int, step: int, value: PyTree) -> tuple[np.bool, PyTree]:
        """Whether the solve is done, and its w; raises what it raised."""
        message = self._sessions[number].message(step, value)
        if message.done:
            with self._lock:
                self._ended[number] = None
                while len(self._ended) > self._most_ended:
                    del self._sessions[self._ended.popitem(last=False)[0]]
        if message.error is not None:
            raise message.error
        return np.bool(message.done), message.w


_SESSIONS = _Sessions()
