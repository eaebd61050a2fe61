"""How things print in a notebook: as the call that made them, or as what they say; never weights."""

import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fixedgrad as fg
from fixedgrad import CertificateStatus, Status, StopReason


def phi(w, lam):
    return 0.5 * w + lam


def outer(w, lam):
    return jnp.sum((w - 3.0) ** 2) + 0.0 * jnp.sum(lam)


SOLVER = fg.picard(phi, max_steps=60, rtol=1e-9)
PLAIN = fg.hypergradient(outer, phi, SOLVER, fg.aid(fg.dense()), start=fg.warm())
PLAIN_TEXT = (
    "hypergradient(outer, phi, picard(phi, max_steps=60, rtol=1e-09), aid(dense()), start=warm())"
)

CALLS = {
    "fp(num_steps=3)": fg.fp(num_steps=3),
    "cg(max_steps=9, rtol=1e-06)": fg.cg(max_steps=9, rtol=1e-6, atol=0.0),
    "normal_cg(num_steps=3)": fg.normal_cg(num_steps=3),
    "gmres(num_steps=3)": fg.gmres(num_steps=3),
    "bicgstab(num_steps=3)": fg.bicgstab(num_steps=3),
    "dense(max_size=9)": fg.dense(max_size=9),
    "picard(phi, num_steps=3)": fg.picard(phi, num_steps=3),
    "picard(phi, num_steps=3, checkpoints=nested())": fg.picard(
        phi, num_steps=3, checkpoints=fg.nested()
    ),
    "recursive(num_checkpoints=4)": fg.recursive(num_checkpoints=4),
    "anderson(phi, num_steps=3, window=2)": fg.anderson(phi, num_steps=3, window=2),
    "from_host(phi)": fg.from_host(phi),
    "picard(gradient_descent(outer, step_size=0.5), num_steps=2)": fg.picard(
        fg.gradient_descent(outer, step_size=0.5), num_steps=2
    ),
    "damped(phi, damping=0.5)": fg.damped(phi, damping=0.5),
    "itd()": fg.forward(fg.itd()),
    "truncated_itd(num_steps=2)": fg.truncated_itd(num_steps=2),
    "aid(cg(num_steps=3))": fg.aid(fg.cg(num_steps=3)),
    "forward(aid(fp(num_steps=3)))": fg.forward(fg.aid(fg.fp(num_steps=3))),
    "cold()": fg.cold(),
    PLAIN_TEXT: PLAIN,
    f"certified({PLAIN_TEXT}, every=2)": fg.certified(PLAIN, every=2),
    f"polished({PLAIN_TEXT}, safety=2)": fg.polished(PLAIN, safety=2.0),
    "adaptive_hypergradient(outer, phi, rtol=0.001)": fg.adaptive_hypergradient(
        outer, phi, rtol=1e-3
    ),
    f"bilevel({PLAIN_TEXT}, GradientTransformationExtraArgs)": fg.bilevel(PLAIN, optax.sgd(0.1)),
    "patience(num_steps=3, atol=0.1)": fg.patience(num_steps=3, atol=0.1),
}


@pytest.mark.parametrize("text", CALLS)
def test_what_a_factory_made_prints_as_the_call_that_made_it(text):
    assert repr(CALLS[text]) == text


def test_a_traced_tolerance_prints_as_such():
    texts = []
    jax.eval_shape(lambda rtol: texts.append(repr(fg.cg(max_steps=3, rtol=rtol))), 1e-3)
    assert texts == ["cg(max_steps=3, rtol=traced ~float64[])"]


def info(status, *, residual=1.25e-5, tolerance=0.0, converged=True):
    return fg.SolveInfo(jnp.int32(68), jnp.asarray(residual), converged, status, tolerance)


LOOP = fg.bilevel(PLAIN, optax.sgd(0.1))
START = LOOP.init(jnp.zeros(2), jnp.zeros(2))
# λ − 3/2 shrinks by 1 − 0.1 · 8.
STATE, HISTORY = LOOP.run(START, num_steps=9, stop=lambda info: info.value < 1.0)


def ended(reason, lower=Status.CONVERGED, linear=Status.CONVERGED):
    """Three steps, of which the last failed."""
    rows = np.arange(3)
    return fg.BilevelInfo(
        value=np.where(rows < 2, 0.5 - 0.25 * rows, np.nan),
        gradient_norm=rows * 1.0,
        lower_residual=rows * 1.0,
        linear_residual=rows * 1.0,
        lower_steps=rows,
        linear_steps=rows,
        lower_status=np.where(rows < 2, 1, lower),
        linear_status=np.where(rows < 2, 1, linear),
        taken=rows < 2,
        reason=np.where(rows < 2, 0, reason),
    )


RECORDS = [
    (
        info(Status.CONVERGED, tolerance=1.3e-5),
        "SolveInfo(CONVERGED after 68 steps, residual 1.25e-05 <= 1.3e-05)",
    ),
    (
        info(Status.MAX_STEPS, residual=0.5, tolerance=1e-9),
        "SolveInfo(MAX_STEPS after 68 steps, residual 0.5 > 1e-09)",
    ),
    (info(0), "SolveInfo(converged after 68 steps, residual 1.25e-05)"),
    (
        info(jnp.array([1, 5, 1]), converged=jnp.array([True, False, True])),
        "SolveInfo(3 solves: 2 CONVERGED, 1 MAX_STEPS)",
    ),
    (START, "BilevelState(0 steps, lam float64[2])"),
    (STATE, "BilevelState(2 steps, lam float64[2], ended: RULE)"),
    (
        START.hypergrad,
        "HypergradientState(0 updates, f inf, w float64[2], lower NOT_RUN, linear NOT_RUN)",
    ),
    (
        STATE.hypergrad,
        "HypergradientState(2 updates, f 0.72, w float64[2], lower CONVERGED, linear CONVERGED)",
    ),
    (HISTORY, "BilevelInfo(2 steps, f 18 -> 0.72, ended: RULE)"),
    (LOOP.step(START)[1], "BilevelInfo(1 step, f 18)"),
    (
        ended(StopReason.LINEAR_FAILED, linear=Status.SINGULAR),
        "BilevelInfo(2 steps, f 0.5 -> 0.25, ended: SINGULAR in the linear solve)",
    ),
    (
        ended(StopReason.LOWER_FAILED, lower=Status.DIVERGED),
        "BilevelInfo(2 steps, f 0.5 -> 0.25, ended: DIVERGED in the lower-level solve)",
    ),
    (ended(StopReason.OVERFLOW), "BilevelInfo(2 steps, f 0.5 -> 0.25, ended: OVERFLOW)"),
    (
        jax.tree.map(lambda x: jnp.stack([x, x]), HISTORY),
        "BilevelInfo(2 loops: 2 RULE)",
    ),
]


@pytest.mark.parametrize(("record", "text"), RECORDS, ids=[text for _, text in RECORDS])
def test_a_record_says_what_it_holds(record, text):
    assert repr(record) == text


def test_a_certificate_prints_its_error_and_its_verdict():
    c = fg.certify(outer, phi, jnp.ones(2), None, jnp.ones(2))
    c = c._replace(relative_error=jnp.asarray(7e-5))
    assert repr(c) == "Certificate(relative error 7e-05, valid)"
    far = c._replace(valid=jnp.asarray(False), status=jnp.int32(CertificateStatus.FAR))
    assert repr(far) == "Certificate(relative error 7e-05, FAR)"
    assert (
        repr(c._replace(proved=jnp.asarray(True))) == "Certificate(relative error <= 7e-05, valid)"
    )
    both = jax.tree.map(lambda *x: jnp.stack(x), c, far, far)
    assert repr(both) == "Certificate(3 certificates: 2 FAR, 1 valid)"
    before = fg.certified(PLAIN).init(jnp.zeros(2), jnp.ones(2)).certificate
    assert repr(before) == "Certificate(relative error inf, none yet)"


@pytest.mark.parametrize("record", [STATE, STATE.hypergrad, HISTORY, info(1)])
def test_arrays_without_values_print_as_shapes(record):
    texts = []
    jax.eval_shape(lambda x: texts.append(repr(x)), record)
    texts.append(repr(jax.eval_shape(lambda x: x, record)))
    donated = jax.tree.map(jnp.array, record)
    for leaf in jax.tree.leaves(donated):
        leaf.delete()
    texts.append(repr(donated))
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"{type(record).__name__}(")
    assert "int32[" in texts[0]


@pytest.mark.parametrize("record", [STATE, STATE.hypergrad, HISTORY, info(1)])
def test_a_record_of_anything_else_prints(record):
    leaves, treedef = jax.tree.flatten(record)
    anything = treedef.unflatten([object()] * len(leaves))
    assert "object" in repr(anything)
    nothing = type(record)(*[object()] * len(record))
    assert "object" in repr(nothing)


@pytest.mark.parametrize("name", fg.__all__)
def test_help_shows_no_addresses(name):
    assert " at 0x" not in pydoc.render_doc(getattr(fg, name))


@pytest.mark.parametrize("kind", [Status, StopReason])
def test_help_says_what_each_member_means(kind):
    text = pydoc.render_doc(kind)
    for member in kind:
        assert f"- `{member.name}`: " in text


def test_results_have_an_html_form():
    state = PLAIN.init(jnp.zeros(2), 1.0)
    assert "num_updates</th><td style" in state._repr_html_()  # pyright: ignore
    _, state = PLAIN.update(state, 1.0)
    info = state.info.lower
    for text in ("<table>", "CONVERGED", f"{int(info.num_steps)}"):
        assert text in info._repr_html_()
    certificate = fg.certify(outer, phi, state.w, state.v, 1.0)
    assert "Products(" in certificate._repr_html_()
    assert certificate._repr_html_().count("<tr>") == len(certificate)
    assert "JitTracer" not in jax.jit(lambda w: w)(info)._repr_html_()
    # What holds no numbers, as within `jit`, shows shapes.
    traced = []
    jax.jit(lambda info: traced.append(info._repr_html_()))(info)
    assert "int32[]" in traced[0]


def test_a_history_shows_its_first_and_last_steps():
    loop = fg.bilevel(PLAIN, optax.sgd(0.1))
    state, history = loop.run(loop.init(jnp.zeros(2), 1.0), num_steps=9)
    text = history._repr_html_()
    assert [f'em 0">{i}<' in text for i in range(9)] == [True] * 3 + [False] * 3 + [True] * 3
    assert "f(λ)" in text
    assert "RUNNING" in state._repr_html_()
    _, info = loop.step(state)
    assert info._repr_html_().startswith("<table>")  # One step.


def test_a_history_draws_itself():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loop = fg.bilevel(PLAIN, optax.sgd(0.1))
    _, history = loop.run(loop.init(jnp.zeros(2), 1.0), num_steps=5)
    objective, residuals, steps = history.plot()
    np.testing.assert_array_equal(objective.lines[0].get_ydata(), history.value)
    assert residuals.get_yscale() == "log"
    assert [text.get_text() for text in steps.get_legend().get_texts()] == [
        "lower level",
        "linear system",
    ]
    # Several loops are several lines, in axes of one's own.
    _, histories = jax.vmap(lambda lam: loop.run(loop.init(jnp.zeros(2), lam), num_steps=5))(
        jnp.arange(3.0)
    )
    _, axes = plt.subplots(3)
    assert len(histories.plot(axes)[0].lines) == 3
    plt.close("all")
