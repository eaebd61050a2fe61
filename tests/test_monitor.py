"""Monitors: who is told of a solve, with what, in which order, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg

LOWER, LINEAR = "lower-level solve", "linear solve of the derivative"


def phi(w, lam):
    return 0.5 * jnp.cos(w) + lam


def outer(w, lam):
    return jnp.sum((w - 1.0) ** 2) + 0.0 * jnp.sum(lam)


class Heard:
    """A monitor that remembers."""

    def __init__(self):
        self.calls = []

    def __call__(self, stage, info):
        self.calls.append((stage, info))

    def stages(self):
        jax.effects_barrier()
        stages, self.calls = [stage for stage, _ in self.calls], []
        return stages


SOLVER = fg.picard(phi, max_steps=60, rtol=1e-10)


def test_a_plain_gradient_tells_of_both_solves_in_order():
    heard = Heard()
    estimator = fg.aid(fg.gmres(max_steps=9, rtol=1e-8))
    solve = fg.fixed_point(phi, estimator, monitor=heard)(SOLVER)
    jax.grad(solve, argnums=1)(0.0, 0.3)
    jax.effects_barrier()
    (_, lower), (_, linear) = heard.calls
    for info in (lower, linear):
        assert isinstance(info, fg.SolveInfo)
        assert all(isinstance(x, np.ndarray) for x in info)
        assert bool(info.converged)
    assert lower.num_steps > linear.num_steps >= 1
    assert heard.stages() == [LOWER, LINEAR]
    # Called again, nothing is traced, and the monitor is.
    jax.grad(solve, argnums=1)(0.0, 0.4)
    assert heard.stages() == [LOWER, LINEAR]


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_every_mode_tells(jit):
    heard = Heard()
    estimator = fg.forward(fg.aid(fg.dense()))
    solve = fg.fixed_point(phi, estimator, monitor=heard)(SOLVER)
    f = lambda lam: solve(jnp.zeros(()), lam)  # noqa: E731
    jit(f)(0.3)
    assert heard.stages() == [LOWER]
    jit(lambda lam: solve.with_info(jnp.zeros(()), lam))(0.3)
    assert heard.stages() == [LOWER]
    for mode in (jax.grad, jax.jacfwd):
        jit(mode(f))(0.3)
        assert heard.stages() == [LOWER, LINEAR]
    jit(jax.hessian(f))(0.3)
    stages = heard.stages()
    assert stages[0] == LOWER
    assert set(stages[1:]) == {LINEAR}
    jit(jax.vmap(jax.grad(f)))(jnp.arange(3.0))
    assert heard.stages() == [LOWER] * 3 + [LINEAR] * 3
    jit(lambda lam: jax.lax.scan(lambda c, _: (c - jax.grad(f)(c), None), lam, length=2))(0.3)
    assert heard.stages() == [LOWER, LINEAR] * 2


def test_a_failed_solve_is_told_of_whatever_becomes_of_its_result():
    for on_failure in ("nan", "zero", "ignore"):
        heard = Heard()
        rushed = fg.picard(phi, max_steps=2, rtol=1e-12)
        solve = fg.fixed_point(phi, on_failure=on_failure, monitor=heard)(rushed)
        jax.grad(solve, argnums=1)(0.0, 0.3)
        jax.effects_barrier()
        assert not bool(heard.calls[0][1].converged)


def test_the_explicit_form_and_the_loop_tell():
    heard = Heard()
    hypergrad = fg.hypergradient(outer, phi, SOLVER, monitor=heard)
    steps = Heard()
    loop = fg.bilevel(hypergrad, optax.sgd(0.1), monitor=steps)
    state = loop.init(jnp.zeros(2), 0.3)
    assert heard.stages() == steps.stages() == []
    state, history = loop.run(state, num_steps=3)
    jax.effects_barrier()
    told = [float(info.value) for _, info in steps.calls]
    np.testing.assert_array_equal(told, history.value)
    assert heard.stages() == [LOWER, LINEAR] * 3
    assert steps.stages() == ["outer step"] * 3
    loop.step(state)
    assert steps.stages() == ["outer step"]
    adaptive = fg.adaptive_hypergradient(outer, phi, rtol=1e-3, monitor=heard)
    adaptive.update(adaptive.init(jnp.zeros(2), 0.3), 0.3)
    assert heard.stages() == [LOWER, LINEAR, "hypergradient to its tolerance"]


def test_on_several_devices_a_monitor_is_unordered():
    heard = Heard()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    lam = jax.device_put(jnp.arange(4.0), spec)
    solve = fg.fixed_point(phi, monitor=fg.unordered(heard))(SOLVER)
    jax.jit(jax.grad(lambda lam: jnp.sum(solve(jnp.zeros(4), lam))))(lam)
    assert sorted(set(heard.stages())) == sorted({LOWER, LINEAR})


def test_a_progress_bar_counts_the_steps_of_several_runs(capsys):
    pytest.importorskip("tqdm")
    bar = fg.progress_bar(6)
    assert bar is fg.progress_bar(6)
    loop = fg.bilevel(fg.hypergradient(outer, phi, SOLVER), optax.sgd(0.1), monitor=bar)
    state = loop.init(jnp.zeros(2), 0.3)
    for _ in range(2):
        state, _ = loop.run(state, num_steps=3)
    jax.effects_barrier()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "|∇f|" in shown
    loop.run(loop.init(jnp.zeros(2), 0.3), num_steps=6)
    jax.effects_barrier()
    assert "6/6" in capsys.readouterr().err  # Begun anew.


def test_print_info_prints_a_line_a_solve(capsys):
    solve = fg.fixed_point(phi, monitor=fg.print_info)(SOLVER)
    jax.grad(solve, argnums=1)(0.0, 0.3)
    jax.effects_barrier()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [LOWER, LINEAR]
    assert "CONVERGED" in lines[0]
