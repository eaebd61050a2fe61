"""What becomes of a result whose solve failed: one policy for every stage, under every transform.

"nan" (the default), "zero" and "ignore" are a product, a selection and nothing; "warn" and "raise"
call back to the host while the program runs. So a program that obeys one of the last two cannot be
exported by `jax.export`, which exports no host callback, and needs a device that has them.
"""

import warnings
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .leaves import is_inexact
from .monitor import Monitor, check_monitor, emit
from .types import OnFailure, PyTree, SolveInfo, Status, failed


class SolveFailedError(RuntimeError):
    """A solve failed under `on_failure="raise"`.

    It is raised on the host while a compiled program runs, so JAX hands it on as a
    `jax.errors.JaxRuntimeError`; the message is in its text.
    """


class SolveFailedWarning(UserWarning):
    """A solve failed under `on_failure="warn"`."""


class Policy(NamedTuple):
    """What becomes of a result whose solve failed, and who is told how each solve ended."""

    on_failure: OnFailure
    monitor: Monitor | None = None

    @classmethod
    def of(cls, where: str, on_failure: object, monitor: object = None) -> "Policy":
        """Of the options of `where`.

        Raises:
            ValueError: `on_failure` is none of the policies.
            TypeError: `monitor` is not a function.
        """
        check_on_failure(where, on_failure)
        check_monitor(where, monitor)
        return cls(on_failure, monitor)  # pyright: ignore[reportArgumentType]


LOWER_STAGE = "lower-level solve"
STAGE = "linear solve of the derivative"

_REMEDY = {
    Status.NO_PROGRESS: "these exact steps have led nowhere: is rho(J) >= 1? Use `cg`, `gmres` or "
    '`dense`, more steps, or `on_failure="ignore"` where such a number is wanted',
    Status.MAX_STEPS: "raise `max_steps`, take a method that needs fewer (`newton`, `dense`), loosen "
    "`rtol`/`atol` where they are finer than you need, or start closer",
    Status.DIVERGED: "the map is not a contraction here: damp it (`fixedgrad.damped`), shorten its "
    "step, or use `cg`, `gmres` or `dense`, which do not need rho(J) < 1",
    Status.INDEFINITE: "I - M is not positive definite: use `gmres`, `bicgstab`, `normal_cg` or "
    "`dense`, and check that the lower level is at a minimum",
    Status.NOT_SYMMETRIC: "M is not symmetric: use `gmres`, `bicgstab`, `normal_cg`, `fp` or "
    "`dense`, or give AID the plain gradient-descent map",
    Status.SINGULAR: "I - M is singular: w(lambda) is not differentiable or not unique here; "
    "regularise the lower level",
    Status.NOT_RUN: "the solver says that it did not converge",
    Status.NOT_FIXED: "phi(w) is nothing like the solver's w: is `phi` the residual F(w, lambda) whose "
    "root is sought? Then phi = w - F",
    Status.TOO_FEW_STEPS: "the steps that `w` needed are too few for its derivative: start further "
    "from the solution, give `num_steps`, or use `aid`, whose derivative does not depend on the start",
    Status.NOT_A_MEAN: "phi or outer of a batch twice is not that of the batch: divide sums over rows "
    'by their number, as `jnp.mean` does, or say `on_failure="ignore"` where that is meant',
    Status.NON_FINITE: "NaN or infinity appeared: check `phi` and the solver at this point",
}


def check_on_failure(where: str, on_failure: object) -> None:
    """Raises `ValueError` unless `on_failure` is one of the policies."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(
            f"`on_failure` of `{where}` must be one of {get_args(OnFailure)}, got {on_failure!r}."
        )


def describe(stage: str, info: SolveInfo) -> str:
    """One sentence about a failed solve: which, why, residual, tolerance, steps, what to try."""
    status = Status(int(info.status))
    wanted = f" (tolerance {float(info.tolerance):.3g})" if info.tolerance > 0 else ""
    return (
        f"the {stage} failed: {status.name} after {int(info.num_steps)} steps, residual "
        f"{float(info.residual):.3g}{wanted}; {_REMEDY[status]}."
    )


def enforce(policy: Policy, stage: str, info: SolveInfo | None, tree: PyTree) -> PyTree:
    """`tree`, made to obey the policy where the solve behind it failed; the monitor is told.

    The inexact leaves are multiplied by 1, or by NaN where the solve failed: a product, not a
    selection, so that tangents and cotangents of a failed result are NaN too. Under "zero" they become
    zero, so that a failed element takes no part in what all share.
    """
    if info is None:
        return tree
    on_failure = policy.on_failure
    info = SolveInfo(*(jax.lax.stop_gradient(jnp.asarray(x)) for x in info))
    emit(policy.monitor, stage, info)
    if on_failure == "ignore":
        return tree
    lost = failed(info)
    if on_failure == "zero":
        return zero_where(lost, tree)
    if on_failure == "nan":
        factor = jnp.where(lost, jnp.nan, 1.0)
    else:
        # The callback's result is used, so that it can be neither dropped nor delayed.
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        factor = jax.pure_callback(
            _reporter(on_failure, stage), shape, info, vmap_method="sequential"
        )

    def poison(x: jax.Array) -> jax.Array:
        return x * factor.astype(x.dtype) if is_inexact(x) else x

    return jax.tree.map(poison, tree)


def passed_over(policy: Policy, *infos: SolveInfo | None) -> jax.Array:
    """Whether the next update is not to start from what these solves left, as they failed.

    Under "ignore" the caller takes what there is, unless it is not finite.
    """
    lost = jnp.asarray(False)
    for info in infos:
        if info is None:
            continue
        if policy.on_failure == "ignore":
            lost |= (info.status == int(Status.NON_FINITE)) | ~jnp.isfinite(info.residual)
        else:
            lost |= failed(info)
    return lost


def zero_where(lost: jax.Array, tree: PyTree) -> PyTree:
    """`tree` with zeros in the place of its inexact leaves where a solve failed."""

    def selected(x: jax.Array) -> jax.Array:
        return jnp.where(lost, jnp.zeros_like(x), x) if is_inexact(x) else x

    return jax.tree.map(selected, tree)


def enforce_value(policy: Policy, stage: str, info: SolveInfo | None, w: PyTree) -> PyTree:
    """The value w of a solve under the policy of its derivative.

    Under "zero" w stays as the solver left it, as a constant: there is no zero of a value.
    """
    if info is None or policy.on_failure != "zero":
        return enforce(policy, stage, info, w)
    emit(policy.monitor, stage, info)
    lost = failed(info)
    return jax.tree.map(
        lambda x: jnp.where(lost, jax.lax.stop_gradient(x), x) if is_inexact(x) else x, w
    )


def _reporter(on_failure: OnFailure, stage: str):
    def report(info: SolveInfo) -> np.ndarray:
        info = jax.tree.map(np.asarray, info)
        unnamed = info.status == Status.NOT_RUN and not info.converged
        if info.status >= Status.NO_PROGRESS or unnamed:
            message = describe(stage, info)
            if on_failure == "raise":
                raise SolveFailedError(message)
            warnings.warn(message, SolveFailedWarning, stacklevel=2)
        return np.ones((), np.float32)

    return report
