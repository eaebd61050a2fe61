"""The process of `test_collectives.py`: hypergradients where Φ couples w along a mapped axis.

It prints a line of JSON for each case. A wrong one may wait for ever, and takes only this process down.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fixedgrad as fg

SIZE, DEVICES = 6, 2
LINEAR = {
    "fp": (fg.fp, 80),
    "cg": (fg.cg, 6),
    "normal_cg": (fg.normal_cg, 9),
    "gmres": (fg.gmres, 6),
    "bicgstab": (fg.bicgstab, 6),
}

LOWER = {
    "fp": fg.picard,
    "cg": functools.partial(fg.newton, linear_solver=fg.cg(max_steps=9)),
    "normal_cg": fg.broyden,
    "gmres": fg.anderson,
    "bicgstab": fg.newton,
}


def data():
    """A symmetric matrix of norm 0.6, λ and the cotangent of w, on scales that differ by device."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(SIZE, SIZE))
    a = 0.6 * (a + a.T) / np.linalg.norm(a + a.T, 2)
    scale = np.repeat([1.0, 1e-4], SIZE // DEVICES)
    return a, rng.normal(size=SIZE), scale * rng.normal(size=SIZE)


def gathering(w, lam, rows):
    return rows @ lax.all_gather(w, "i", tiled=True) + lam


def scattering(w, lam, columns):  # The matrix is symmetric: its rows are its columns.
    return lax.psum_scatter(columns.T @ w, "i", tiled=True) + lam


def sharing(w, lam, _):  # Each device has its own part of one leaf, and all of the other.
    return {
        "own": 0.4 * w["own"] + 0.2 * w["all"] + lam,
        "all": 0.1 * lax.psum(jnp.sum(w["own"]), "i"),
    }


def objective(solve):
    """⟨c, w(λ)⟩ of one device or element, summed over all."""

    def local(lam, rows, c):
        return lax.psum(jnp.sum(solve(jnp.zeros_like(lam), lam, rows) * c), "i")

    return local


def sharded(local):
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Auto,))
    return jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=P())


def batched(local):
    def f(*operands):
        parts = [x.reshape(DEVICES, SIZE // DEVICES, *x.shape[1:]) for x in operands]
        return jnp.mean(jax.vmap(local, axis_name="i")(*parts))

    return f


def cases():
    """(name, function of λ) for each case."""
    until = fg.picard(gathering, max_steps=200, rtol=1e-13)
    for name, (make, exact) in LINEAR.items():
        for rule in ({"max_steps": 200, "rtol": 1e-10}, {"num_steps": exact}):
            tolerant = "max_steps" in rule
            lower = {"max_steps": 200, "rtol": 1e-13} if tolerant else {"num_steps": 60}
            phi = gathering if tolerant else scattering
            solver = (LOWER[name] if tolerant else fg.picard)(phi, **lower)
            local = objective(fg.fixed_point(phi, fg.aid(make(**rule)))(solver))
            kind = "tolerance" if tolerant else "exact"
            yield f"{name} {kind} shard_map", sharded(local)
            yield f"{name} {kind} vmap", batched(local)
    nystrom = fg.cg(max_steps=9, rtol=1e-10, preconditioner=fg.nystrom(rank=3))
    yield "nystrom shard_map", sharded(objective(fg.fixed_point(gathering, fg.aid(nystrom))(until)))
    itd = fg.fixed_point(gathering, fg.itd())(fg.anderson(gathering, num_steps=25))
    yield "itd shard_map", sharded(objective(itd))
    steps = fg.truncated_itd(num_steps=60)
    yield "truncated_itd shard_map", sharded(objective(fg.fixed_point(gathering, steps)(until)))
    dense = fg.fixed_point(gathering, fg.aid(fg.dense()))(until)
    yield "dense shard_map", sharded(objective(dense))
    yield "dense vmap", batched(objective(dense))
    partly = fg.fixed_point(sharing, fg.aid(fg.gmres(max_steps=30, rtol=1e-12)))(
        fg.picard(sharing, max_steps=200, rtol=1e-13)
    )

    def start_partly(w0, lam, rows):
        return partly({"own": w0, "all": jnp.zeros(())}, lam, rows)["own"]

    yield "partly shard_map", sharded(objective(start_partly))


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    a, lam, c = data()
    for name, f in cases():
        try:
            gradient = jax.jit(jax.grad(f))(jnp.asarray(lam), a, c)
        except TypeError as error:
            print(json.dumps([name, str(error)]), flush=True)
        else:
            print(json.dumps([name, np.asarray(gradient).tolist()]), flush=True)


if __name__ == "__main__":
    main()
