"""One of two processes of `test_distributed.py`: prints the hypergradient of data that neither has.

Arguments: the coordinator's port, this process's number.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fixedgrad as fg

NUM_PROCESSES = 2


def problem():
    """All of the data, and f(λ, x, y) for it."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 4)) / 2, np.sign(rng.normal(size=16))

    def loss(w, lam, x, y):
        fit = jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))
        return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)

    phi = fg.gradient_descent(loss, step_size=0.75)

    estimator = fg.aid(fg.cg(max_steps=20, rtol=1e-12))
    solve = fg.fixed_point(phi, estimator)(fg.picard(phi, max_steps=200, rtol=1e-14))
    return x, y, lambda lam, x, y: jnp.sum(solve(jnp.zeros_like(lam), lam, x, y) ** 2)


def main() -> None:
    port, process = int(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", NUM_PROCESSES, process, initialization_timeout=60
    )
    x, y, f = problem()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    share = len(x) // NUM_PROCESSES
    mine = slice(process * share, (process + 1) * share)
    sharding = NamedSharding(mesh, P("data"))
    x, y = (jax.make_array_from_process_local_data(sharding, a[mine]) for a in (x, y))
    lam = jax.device_put(np.linspace(-0.5, 0.5, 4), NamedSharding(mesh, P()))
    gradient = jax.jit(jax.grad(f))(lam, x, y)
    print(json.dumps({"devices": jax.device_count(), "gradient": np.asarray(gradient).tolist()}))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
