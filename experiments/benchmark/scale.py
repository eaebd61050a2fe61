"""scale: time and memory grow like the data, w and λ, and a product on devices has one collective.

One hypergradient of logistic regression, t = 20 steps and k = 10 of CG, for growing n, d, and numbers
of λ (one regulariser for each weight). The *exponent* is that of a power of the size, fitted to the
larger half of the sizes. Then the same linear solve on 1, 2, 4 and 8 simulated devices, in a process of
its own: collectives a step of CG, and temporary memory of a device.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fixedgrad as fg

from ..tools import report
from ..tools.collectives import collectives
from .timing import compiled, interleaved

T, K = 20, 10
_DEVICES = (1, 2, 4, 8)
_SHAPES = {  # (n, d) as n, d, or the number of λ, which is d, grows.
    "n": [(n, 100) for n in (500, 2_000, 8_000, 32_000)],
    "d": [(1_000, d) for d in (50, 200, 800, 3_200)],
    "number of λ": [(16, d) for d in (1_000, 10_000, 100_000, 1_000_000)],
}
_TINY = {
    "n": [(n, 20) for n in (50, 100, 200, 400)],
    "d": [(50, d) for d in (10, 20, 40, 80)],
    "number of λ": [(4, d) for d in (100, 200, 400, 800)],
}


def main(options: argparse.Namespace) -> report.Claims:
    """Measures every size and every number of devices, and checks the claims."""
    rounds = options.rounds or (2 if options.quick else 7)
    shapes = _TINY if options.quick else _SHAPES
    found = {what: _grown(options.seed, sizes, rounds) for what, sizes in shapes.items()}
    devices = _on_devices(8 if options.quick else 128)
    print(_table(shapes, found))
    print(_table_of_devices(devices))
    claims = _checked(shapes, found, devices)
    _draw(options, shapes, found)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "rounds": rounds, "t": T, "k": K},
        results={
            "shapes": shapes,
            "bytes": {what: rows["bytes"] for what, rows in found.items()},
            "devices": devices,
        },
        volatile={"seconds": {what: rows["seconds"] for what, rows in found.items()}},
    )
    return claims


def _loss(w: jax.Array, lam: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
    fit = jnp.mean(jnp.logaddexp(0.0, -data["y"] * (data["x"] @ w)))
    return fit + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


_PHI = fg.gradient_descent(_loss, step_size=1.0)


def _data(seed: int, n: int, d: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x *= np.sqrt(n) / (np.sqrt(n) + np.sqrt(d))  # So that ‖X‖²/(4n) is below 1.
    return {"x": jnp.asarray(x), "y": jnp.sign(jnp.asarray(rng.normal(size=n)))}


def _grown(seed: int, shapes: list[tuple[int, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds and temporary bytes of a hypergradient at each size."""
    solve = fg.fixed_point(_PHI, fg.aid(fg.cg(num_steps=K)))(fg.picard(_PHI, num_steps=T))

    def outer(lam: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
        w = solve(jnp.zeros_like(lam), lam, data)
        return jnp.mean(jnp.logaddexp(0.0, data["y"] * (data["x"] @ w)))

    runs = {}
    for n, d in shapes:
        runs[n, d] = compiled(jax.grad(outer), jnp.full(d, np.log(1e-2)), _data(seed, n, d))
    seconds = interleaved({shape: run.run for shape, run in runs.items()}, rounds)
    return {
        "seconds": [float(np.median(seconds[shape])) for shape in runs],
        "bytes": [run.temporary_bytes for run in runs.values()],
    }


def _exponent(sizes: list[int], values: list[float]) -> float:
    """P of values ~ sizeᵖ over the larger half."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def sizes_of(what: str, shapes: list[tuple[int, int]]) -> list[int]:
    """What grows, of shapes (n, d)."""
    return [n if what == "n" else d for n, d in shapes]


# --- devices


def _on_devices(d: int) -> list[dict[str, Any]]:
    """What `_count` finds, in a process that has the devices."""
    flags = f"--xla_force_host_platform_device_count={max(_DEVICES)}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(d)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"The process with {max(_DEVICES)} devices failed: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout)


def _count(d: int) -> list[dict[str, Any]]:
    """All-reduces in a step of CG, and temporary bytes of a device: the data sharded, then w."""
    rows = []
    for number in _DEVICES:
        mesh = Mesh(np.array(jax.devices()[:number]), ("batch",))

        def placed(x: jax.Array, *parts: str | None, mesh: Mesh = mesh) -> jax.Array:
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*parts)))

        data = _data(0, 8 * d, d)
        for spread in ("data", "w"):
            rows_of_x, of_w = ("batch", None) if spread == "data" else (None, "batch")
            at = {"x": placed(data["x"], rows_of_x, of_w), "y": placed(data["y"], rows_of_x)}
            lam = placed(jnp.full(d, np.log(1e-2)), of_w)
            w, b = placed(jnp.zeros(d), of_w), placed(jnp.ones(d), of_w)

            def solve(w: jax.Array, lam: jax.Array, at: Any, b: jax.Array) -> jax.Array:
                _, pull = jax.vjp(lambda w: _PHI(w, lam, at), w)
                return fg.cg(num_steps=K)(lambda u: pull(u)[0], b)[0]

            program = jax.jit(solve).lower(w, lam, at, b).compile()
            analysis = program.memory_analysis()
            rows.append(
                {
                    "devices": number,
                    "sharded": spread,
                    "collectives": sum(bool(c.loops) for c in collectives(program.as_text() or "")),
                    "bytes": analysis.temp_size_in_bytes if analysis else 0,
                }
            )
    return rows


# --- what is claimed and shown


def _checked(shapes: Any, found: Any, devices: list[dict[str, Any]]) -> report.Claims:
    claims = report.Claims()
    for what, rows in found.items():
        sizes = sizes_of(what, shapes[what])
        in_time, in_memory = (_exponent(sizes, rows[key]) for key in ("seconds", "bytes"))
        claims.check(
            f"{what} up to {sizes[-1]}: memory grows like its first power",
            in_memory <= 1.05,
            f"exponent {in_memory:.2f}",
        )
        claims.check(
            f"{what} up to {sizes[-1]}: time grows like its first power",
            in_time <= 1.2,
            f"exponent {in_time:.2f}",
            required=False,  # Caches: a step in memory bandwidth counts as growth.
        )
    by_data = {r["collectives"] for r in devices if r["sharded"] == "data" and r["devices"] > 1}
    claims.check(
        "Sharded data: one collective a product, on any number of devices",
        by_data == {1},
        f"{sorted(by_data)}",
    )
    by_w = {r["collectives"] for r in devices if r["sharded"] == "w" and r["devices"] > 1}
    claims.check(
        "Sharded w: at most three collectives a step of CG",
        max(by_w) <= 3,
        f"{sorted(by_w)}",
    )
    return claims


def _table(shapes: Any, found: Any) -> str:
    rows = []
    for what, of in found.items():
        sizes = sizes_of(what, shapes[what])
        for size, seconds, taken in zip(sizes, of["seconds"], of["bytes"], strict=True):
            rows.append([f"{what} = {size}", f"{1e3 * seconds:.3g}", f"{taken / 1e3:.4g}"])
        exponents = (f"{_exponent(sizes, of[key]):.2f}" for key in ("seconds", "bytes"))
        rows.append(["  exponent", *exponents])
    return report.table(["", "ms", "temporary kB"], rows)


def _table_of_devices(devices: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{r['devices']}, {r['sharded']} sharded",
            f"{r['collectives']}",
            f"{r['bytes'] / 1e3:.4g}",
        ]
        for r in devices
    ]
    return report.table(["devices", "collectives a step of CG", "temporary kB of one"], rows)


def _draw(options: argparse.Namespace, shapes: Any, found: Any) -> None:
    with report.figure(options.out / "scale.png", columns=3, size=(8.4, 3.2)) as (_, axes):
        for panel, (what, rows) in zip(axes[0], found.items(), strict=True):
            sizes, seconds = sizes_of(what, shapes[what]), np.array(rows["seconds"])
            panel.plot(sizes, 1e3 * seconds, "o-", color="#007a55", label="measured")
            line = 1e3 * seconds[-1] * np.array(sizes) / sizes[-1]
            panel.plot(sizes, line, ":", color="0.4", label="∝ size")
            panel.set(xscale="log", yscale="log", xlabel=what)
        axes[0][0].set_ylabel("one hypergradient (ms)")
        axes[0][0].legend()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(_count(int(sys.argv[1]))))
