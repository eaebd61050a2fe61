"""A dual-weighted estimate tells a hypergradient's error within a factor, far from and near to w(λ).

For each family of `families.py`, over data × t × k, with `v` by k fixed-point steps or by a Krylov
method to a tolerance: `fixedgrad.certify` at (w_t, v), and the truth by dense algebra in float64.

    error/true   the estimate over the true error, where the certificate says that it is valid
    coverage     how often that is at least 1, with its 95 % Clopper–Pearson interval
    polished     the error of the corrected hypergradient over that of the plain one
    value        the same of L(w, v) = E − ⟨v, w − Φ(w)⟩ as a value of f
    cost         products of the certificate over those of a CG (or GMRES) hypergradient at 10⁻³:
                 Picard steps and linear solve, each to that tolerance; then over the latter alone

`--full` takes all families, at least 300 cases of each, two of them in float32 as well, and the
adaptive form on four.
Not counted are cases whose relative error is below 10⁻¹¹ (float32: 10⁻⁶), where the truth ends; for
values 10⁻¹³ (10⁻⁵).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import lax
from jax.flatten_util import ravel_pytree

import fixedgrad as fg

from ..problems import families, synthetic
from ..problems.families import FAMILIES, Family
from ..tools import report

FLOAT64 = True
PyTree = Any

_TOLERANCES = (1e-1, 1e-3, 1e-6)
_REQUESTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_FLOOR = {"float64": 1e-11, "float32": 1e-6}
_VALUE_FLOOR = {"float64": 1e-13, "float32": 1e-5}
_DEFAULT = ("logistic regression", "heavy-ball map", "tanh equilibrium", "quadratic")
_ADAPTIVE = ("logistic regression", "heavy-ball map", "tanh equilibrium", "Poisson regression")
_SINGLE = ("logistic regression", "tanh equilibrium")
_HEADER = (
    "family",
    "dtype",
    "cases",
    "relative error",
    "error/true 0 5 50 95 100 %",
    "coverage [95 %]",
    "valid",
    "polished",
    "cost",
)
_VALUE_HEADER = (
    "family",
    "dtype",
    "cases",
    "E − f, relative",
    "corrected",
    "error/true 0 5 50 95 100 %",
    "coverage [95 %]",
    "polished covered",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--only", default="", help="families whose names contain this")


def main(options: argparse.Namespace) -> int:
    """Runs all parts, checks the claims, writes table, figure and `results.json`."""
    chosen = [f for f in FAMILIES if options.full or options.only or f.name in _DEFAULT]
    chosen = [f for f in chosen if options.only in f.name][: 1 if options.quick else None]
    key = jax.random.key(options.seed)
    seconds: dict[str, float] = {}
    cases, rows, adaptive = {}, [], {}
    for family in chosen:
        single = options.full and family.name in _SINGLE
        for dtype in ("float64", "float32") if single else ("float64",):
            start = time.perf_counter()
            per_seed = len(family.t) * (len(family.k) + len(_TOLERANCES))
            seeds = 2 if options.quick else -(-(450 if options.full else 100) // per_seed)
            found = measure(family, jax.random.split(key, seeds), dtype)
            cases[family.name, dtype] = found
            rows.append(summary(family, found, dtype))
            seconds[f"{family.name} {dtype}"] = time.perf_counter() - start
            print("  ".join(map(str, cells(rows[-1]))), flush=True)
        wanted = _ADAPTIVE if options.full else _DEFAULT[:1]
        if family.name in wanted and not options.quick:
            start = time.perf_counter()
            adaptive[family.name] = requests(family, jax.random.split(key, 4))
            seconds[f"{family.name} adaptive"] = time.perf_counter() - start
            print(f"  adaptive, {family.name}: {adaptive[family.name]}", flush=True)
    bounds = literature(key, rows=1000 if options.full else 100) if not options.quick else {}

    text = report.table(_HEADER, [cells(row) for row in rows])
    of_values = report.table(_VALUE_HEADER, [value_cells(row) for row in rows])
    text += f"\n\nvalues\n{of_values}"
    print(f"\n{text}\n")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    claims = report.Claims()
    check_families(claims, rows)
    check_adaptive(claims, adaptive)
    check_bounds(claims, bounds)
    draw(options.out / "certificates.png", chosen, cases, bounds)
    report.write_results(
        options,
        claims=claims,
        settings={"seed": options.seed, "full": options.full, "quick": options.quick},
        results={"families": rows, "adaptive": adaptive, "bounds": bounds},
        volatile={"seconds": seconds},
    )
    return claims.exit_code


def measure(family: Family, keys: jax.Array, dtype: str) -> dict[str, np.ndarray]:
    """A certificate at every (data, t, k), beside the truth; arrays over all cases."""
    steps = jnp.array([*family.k, *(0 for _ in _TOLERANCES)], jnp.int32)
    rtols = jnp.array([*(1e-3 for _ in family.k), *_TOLERANCES])
    t, i = jnp.meshgrid(
        jnp.array(family.t, jnp.int32), jnp.arange(steps.size, dtype=jnp.int32), indexing="ij"
    )
    krylov = fg.cg if family.symmetric else fg.gmres

    def one(key: jax.Array) -> dict[str, jax.Array]:
        problem = family.make(key)
        if dtype == "float32":
            problem = families.single(problem)
        w0, lam, data = problem
        exact = families.truth(family, *families.double(problem), steps=20_000)
        size = _norm(exact.gradient)
        doubled = families.double((lam, data))
        rest = jax.tree.map(jnp.subtract, exact.w, family.phi(exact.w, *doubled))
        f = family.outer(exact.w, *doubled) - jnp.vdot(
            *(ravel_pytree(x)[0] for x in (exact.v, rest))
        )
        picard = fg.picard(family.phi, max_steps=100_000, rtol=1e-3, on_failure="ignore")
        _, lower = picard.with_info(w0, lam, data)

        def error(gradient: PyTree) -> jax.Array:
            difference = jax.tree.map(jnp.subtract, families.double(gradient), exact.gradient)
            return _norm(difference) / size

        def case(place: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
            t, i = place
            w = families.iterate(family, w0, lam, data, t)
            b = jax.grad(family.outer)(w, lam, data)
            _, vjp = jax.vjp(lambda w: family.phi(w, lam, data), w)

            def solve(rtol: jax.Array) -> tuple[PyTree, jax.Array]:
                v, info = krylov(max_steps=3000, rtol=rtol)(lambda u: vjp(u)[0], b)
                return v, info.num_steps

            both = lax.map(solve, jnp.stack([rtols[i], jnp.full((), 1e-3)]))
            by_krylov, (_, num_steps) = jax.tree.map(lambda x: x[0], both[0]), both[1]
            by_fp = lax.fori_loop(
                0,
                steps[i],
                lambda _, v: jax.tree.map(jnp.add, b, vjp(v)[0]),
                jax.tree.map(jnp.zeros_like, b),
            )
            v = jax.tree.map(lambda x, y: jnp.where(steps[i] > 0, x, y), by_fp, by_krylov)
            c = fg.certify(family.outer, family.phi, w, v, lam, data)
            plain, polished = error(c.gradient), error(c.polished)
            products = jnp.asarray(sum(c.products), float)
            linear = (num_steps + 2).astype(float)
            value = jnp.abs(c.value.astype(float) - f)
            uncorrected = jnp.abs(family.outer(w, lam, data).astype(float) - f)
            beyond = jnp.abs(c.polished_value.astype(float) - f)
            return {
                "true": plain,
                "ratio": c.error.astype(float) / size / plain,
                "polished": polished / plain,
                "value": value / jnp.abs(f),
                "value_ratio": c.value_error.astype(float) / value,
                "value_plain": uncorrected / jnp.abs(f),
                "value_remainder": c.value_remainder.astype(float) / beyond,
                "value_beyond": beyond / jnp.abs(f),
                "valid": c.valid,
                "reason": c.status,
                # One linearisation and one product with Bᵀ besides the solve.
                "cost": products / (linear + lower.num_steps.astype(float)),
                "cost_linear": products / linear,
                "trusted": exact.residual < 1e-12,
            }

        return lax.map(case, (t.ravel(), i.ravel()))

    found = _run(lambda keys: lax.map(one, keys), keys)
    return {name: np.asarray(x).ravel() for name, x in found.items()}


def summary(family: Family, found: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """The row of one family."""
    usable = found["trusted"] & (found["true"] > _FLOOR[dtype])
    valid = usable & found["valid"]
    covered, count = int((found["ratio"][valid] >= 1).sum()), int(valid.sum())
    of_value = valid & (found["value"] > _VALUE_FLOOR[dtype])
    beyond = valid & (found["value_beyond"] > _VALUE_FLOOR[dtype])
    values, value_covered = int(of_value.sum()), int((found["value_ratio"][of_value] >= 1).sum())
    reasons, counts = np.unique(found["reason"][usable], return_counts=True)
    return {
        "family": family.name,
        "dtype": dtype,
        "smooth": family.smooth,
        "convex": family.convex,
        "cases": int(usable.sum()),
        "relative_error": _percentiles(found["true"][usable], (0, 100)),
        "ratio": _percentiles(found["ratio"][valid], (0, 5, 50, 95, 100)),
        "covered": covered,
        "coverage": covered / max(count, 1),
        "interval": _interval(covered, count),
        "valid": count / max(int(usable.sum()), 1),
        "polished": _percentiles(found["polished"][valid], (50, 95)),
        "cost": _percentiles(found["cost"][usable], (50, 95)),
        "cost_linear": _percentiles(found["cost_linear"][usable], (50, 95)),
        "values": {
            "cases": values,
            "relative_error": _percentiles(found["value_plain"][of_value], (0, 100)),
            "corrected": _percentiles(
                found["value"][of_value] / found["value_plain"][of_value], (50, 95)
            ),
            "ratio": _percentiles(found["value_ratio"][of_value], (0, 5, 50, 95, 100)),
            "coverage": value_covered / max(values, 1),
            "interval": _interval(value_covered, values),
            "polished_covered": float((found["value_remainder"][beyond] >= 1).mean())
            if beyond.any()
            else 1.0,
        },
        "reasons": {
            fg.CertificateStatus(int(r)).name: int(n) for r, n in zip(reasons, counts, strict=True)
        },
    }


def cells(row: dict[str, Any]) -> list[str]:
    """The row as the table shows it."""
    low, high = row["relative_error"]
    return [
        row["family"],
        row["dtype"],
        str(row["cases"]),
        f"{low:.0e} to {high:.1g}",
        " ".join(f"{x:.2f}" for x in row["ratio"]),
        f"{row['coverage']:.1%} [{row['interval'][0]:.1%}, {row['interval'][1]:.1%}]",
        f"{row['valid']:.0%}",
        f"{row['polished'][0]:.1g}",
        f"{row['cost'][0]:.2f}, {row['cost_linear'][0]:.1f}",
    ]


def value_cells(row: dict[str, Any]) -> list[str]:
    """The row of the table of values."""
    of = row["values"]
    low, high = of["relative_error"]
    return [
        row["family"],
        row["dtype"],
        str(of["cases"]),
        f"{low:.0e} to {high:.1g}",
        f"{of['corrected'][0]:.1g}",
        " ".join(f"{x:.2f}" for x in of["ratio"]),
        f"{of['coverage']:.1%} [{of['interval'][0]:.1%}, {of['interval'][1]:.1%}]",
        f"{of['polished_covered']:.1%}",
    ]


def requests(family: Family, keys: jax.Array) -> dict[str, Any]:
    """`adaptive_hypergradient` from 10⁻¹ to 10⁻⁶, beside the best fixed (t, k) by search.

    The search knows the truth: over t Picard steps and a Krylov method to any of many tolerances it
    takes the pair of least t + k + 2 whose true relative error is below the request.
    """
    t = jnp.array(families.log_grid(1, 3 * max(family.t), 30), jnp.int32)
    rtols = jnp.logspace(-0.5, -10.0, 20)
    krylov = fg.cg if family.symmetric else fg.gmres

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        w0, lam, data = family.make(key)
        exact = families.truth(family, w0, lam, data, steps=20_000)
        size = _norm(exact.gradient)

        def error(gradient: PyTree) -> jax.Array:
            return _norm(jax.tree.map(jnp.subtract, gradient, exact.gradient)) / size

        def by_request(rtol: jax.Array) -> tuple[jax.Array, jax.Array]:
            adaptive = fg.adaptive_hypergradient(
                family.outer,
                lambda w, lam, data: family.phi(w, lam, data),
                rtol=rtol,
                on_failure="ignore",
            )
            gradient, state = adaptive.update(adaptive.init(w0, lam, data), lam, data)
            return error(gradient), jnp.asarray(sum(state.certificate.products))

        def by_pair(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            w = families.iterate(family, w0, lam, data, t)
            b, direct = jax.grad(family.outer, argnums=(0, 1))(w, lam, data)
            _, vjp = jax.vjp(lambda w, lam: family.phi(w, lam, data), w, lam)

            def solve(rtol: jax.Array) -> tuple[jax.Array, jax.Array]:
                v, info = krylov(max_steps=3000, rtol=rtol)(lambda u: vjp(u)[0], b)
                gradient = jax.tree.map(jnp.add, direct, vjp(v)[1])
                return error(gradient), t + info.num_steps + 2

            return lax.map(solve, rtols)

        return *lax.map(by_request, jnp.array(_REQUESTS)), *lax.map(by_pair, t), exact.residual

    errors, products, searched, costs, residual = _run(lambda keys: lax.map(one, keys), keys)
    errors, products = errors[residual < 1e-12], products[residual < 1e-12]
    searched, costs = (x.reshape(x.shape[0], -1)[residual < 1e-12] for x in (searched, costs))
    wanted = np.array(_REQUESTS)
    best = np.stack([np.where(searched <= r, costs, np.inf).min(axis=1) for r in wanted], axis=1)
    relative = products / best
    return {
        "requests": int(errors.size),
        "met": int((errors <= wanted).sum()),
        "relative_cost": [float(np.median(relative[:, j])) for j in range(wanted.size)],
        "median_cost": float(np.median(relative)),
        "worst_cost": float(relative.max()),
    }


def literature(key: jax.Array, rows: int) -> dict[str, Any]:
    """Bounds from constants beside the estimate: the quadratic of Ehrhardt and Roberts, and LR."""
    return {
        "quadratic": _bounds_quadratic(key, rows),
        "logistic": _bounds_logistic(key),
    }


def _bounds_quadratic(key: jax.Array, rows: int) -> dict[str, list[float]]:
    """With A₁ᵀA₁ etc.: Φ affine, E quadratic, ν₁ = ν₂ = 0; the bound is Ehrhardt and Roberts'."""
    w0, lam, data = families.make_quadratic(key, rows=rows, size=10, spread=0.0)
    family = next(f for f in FAMILIES if f.name == "quadratic")
    spectrum = jnp.linalg.eigvalsh(data["a1"].T @ data["a1"])
    step = data["step"]
    exact = families.truth(family, w0, lam, data, steps=1000)
    spectral = lambda m: jnp.linalg.norm(m, 2)  # noqa: E731
    c = fg.bounds.Constants(
        D=_norm(exact.w),
        L_E=spectral(data["a3"]) * _norm((data["a4"] @ lam - data["b2"], data["a3"] @ exact.w)) * 2,
        L_Phi=step * spectral(data["a1"].T @ data["a2"]),
        nu1=0.0,
        nu2=0.0,
        eta1=spectral(data["a3"]) ** 2,
        eta2=spectral(data["a4"].T @ data["a3"]),
        mu=step * spectrum[0],
        q=1 - step * spectrum[0],
    )
    t = families.log_grid(3, 3000, 8)
    return _beside(family, w0, lam, data, exact.gradient, c, t)


def _bounds_logistic(key: jax.Array) -> dict[str, list[float]]:
    """The paper's LR with the constants of `problems/synthetic.py`."""
    setting = synthetic.logistic_regression(key, synthetic.Sizes(30, 40))
    lam = setting.sample(jax.random.fold_in(key, 1))
    step, _ = fg.optimal_step_size(*setting.curvature(lam))
    descent = fg.gradient_descent(setting.loss, step_size=step)
    family = FAMILIES[0]._replace(
        phi=lambda w, lam, _: descent(w, lam), outer=lambda w, lam, _: setting.outer(w, lam)
    )
    assert setting.constants is not None
    c = setting.constants(lam)
    w0 = jnp.zeros(setting.dimension)
    return _beside(family, w0, lam, {}, setting.exact(lam), c, families.log_grid(3, 3000, 8))


def _beside(
    family: Family,
    w0: PyTree,
    lam: PyTree,
    data: PyTree,
    exact: PyTree,
    c: fg.bounds.Constants,
    t: Sequence[int],
) -> dict[str, list[float]]:
    """True errors of AID-FP with k = t, the a-priori bound, the proved tier, and the estimate."""

    def case(t: jax.Array) -> tuple[jax.Array, ...]:
        w = families.iterate(family, w0, lam, data, t)
        b = jax.grad(family.outer)(w, lam, data)
        _, vjp = jax.vjp(lambda w: family.phi(w, lam, data), w)
        v = lax.fori_loop(
            0, t, lambda _, v: jax.tree.map(jnp.add, b, vjp(v)[0]), jax.tree.map(jnp.zeros_like, b)
        )
        proved = fg.certify_proved(family.outer, family.phi, w, v, lam, data, constants=c)
        estimate = fg.certify(family.outer, family.phi, w, v, lam, data)
        true = _norm(jax.tree.map(jnp.subtract, proved.gradient, exact))
        return true, proved.error, estimate.error, proved.valid, estimate.valid

    found = _run(lambda t: lax.map(case, t), jnp.array(t, jnp.int32))
    prior = [float(fg.bounds.aid_fp(n, n, c)) for n in t]
    names = ("true", "proved", "estimate", "proved_valid", "estimate_valid")
    return {"t": list(t), "prior": prior} | {
        name: x.tolist() for name, x in zip(names, found, strict=True)
    }


def check_families(claims: report.Claims, rows: list[dict[str, Any]]) -> None:
    """The claims on the families; those on kinks and on float32 are reported, not required."""
    for row in rows:
        name = f"{row['family']} ({row['dtype']})"
        required = row["smooth"] and row["dtype"] == "float64"
        low = row["interval"][0]
        enough = row["valid"] * row["cases"] >= 183  # The limit of fewer cannot be that high.
        claims.check(
            f"{name}: coverage at least 99 % where valid",
            row["coverage"] >= 0.99 and (low >= 0.98 or not enough),
            f"{row['coverage']:.2%}, lower limit {low:.2%}",
            required=required,
        )
        claims.check(
            f"{name}: error/true has its median in [0.8, 1.6] and its 95 % point below 3",
            0.8 <= row["ratio"][2] <= 1.6 and row["ratio"][3] <= 3,
            f"{row['ratio'][2]:.2f}, {row['ratio'][3]:.2f}",
            required=required,
        )
        of = row["values"]
        few = of["cases"] < 183
        claims.check(
            f"{name}: values are covered in at least 99 %, with error/true in [0.8, 2] in the median",
            of["coverage"] >= 0.99
            and (of["interval"][0] >= 0.98 or few)
            and 0.8 <= of["ratio"][2] <= 2,
            f"{of['coverage']:.2%}, {of['ratio'][2]:.2f}",
            required=required,
        )
        if row["convex"]:
            claims.check(
                f"{name}: valid in at least 90 % of the cases",
                row["valid"] >= 0.9,
                f"{row['valid']:.1%}",
                required=required,
            )
        claims.check(
            f"{name}: the polished error is at most a fifth of the plain one, in the median",
            row["polished"][0] <= 0.2,
            f"{row['polished'][0]:.2g}",
            required=required,
        )
    for name, what, required in (
        ("cost", "a CG hypergradient at 10⁻³", True),
        ("cost_linear", "its linear solve alone", False),
    ):
        smooth = [row[name][0] for row in rows if row["smooth"]]
        if not smooth:  # With `--only`.
            continue
        cost = float(np.median(smooth))
        claims.check(
            f"a certificate costs at most twice {what}, median over families",
            cost <= 2,
            f"{cost:.2f}",
            required=required,
        )


def check_adaptive(claims: report.Claims, adaptive: dict[str, dict[str, Any]]) -> None:
    """The claims on the adaptive form."""
    if not adaptive:
        return
    met, asked = (sum(a[name] for a in adaptive.values()) for name in ("met", "requests"))
    claims.check("every request from 10⁻¹ to 10⁻⁶ is met", met == asked, f"{met} of {asked}")
    cost = float(np.median([a["median_cost"] for a in adaptive.values()]))
    claims.check(
        "at most twice the products of the best fixed (t, k), median over families",
        cost <= 2,
        f"{cost:.2f}",
        required=False,
    )


def check_bounds(claims: report.Claims, bounds: dict[str, Any]) -> None:
    """The claims on the tier with constants."""
    for name, b in bounds.items():
        true = np.array(b["true"])
        seen = true > 1e-11 * max(true.max(), 1.0)
        proved, prior = (np.array(b[x])[seen] / true[seen] for x in ("proved", "prior"))
        held = bool(np.all(np.array(b["proved_valid"])[seen])) and bool((proved >= 1).all())
        claims.check(
            f"{name}: the proved tier is never below the error", held, f"{seen.sum()} cases"
        )
        estimate = np.array(b["estimate"])[seen] / true[seen]
        claims.check(
            f"{name}: the estimate is closer than the bounds",
            bool(np.median(estimate) < min(np.median(proved), np.median(prior))),
            f"over true: estimate {np.median(estimate):.2f}, a posteriori {np.median(proved):.3g}, "
            f"a priori {np.median(prior):.3g}",
        )


def draw(
    path: Any, chosen: Sequence[Family], cases: dict[Any, Any], bounds: dict[str, Any]
) -> None:
    """error/true against the true relative error, and the bounds against t."""
    colors = ("#0072b2", "#d55e00", "#007a55", "#b58900", "#cc79a7", "#56b4e9", "#5e4fa2")
    with report.figure(path, rows=1, columns=1 + len(bounds), size=(6 + 4.5 * len(bounds), 5)) as (
        fig,
        axes,
    ):
        del fig
        first = axes[0, 0]
        for i, family in enumerate(chosen):
            found = cases[family.name, "float64"]
            keep = found["trusted"] & found["valid"] & (found["true"] > _FLOOR["float64"])
            marker, color = "ox^"[i // len(colors)], colors[i % len(colors)]
            first.plot(
                found["true"][keep],
                found["ratio"][keep],
                marker,
                color=color,
                markersize=3,
                label=family.name,
                alpha=0.6,
            )
        first.axhline(1.0, color="black", linewidth=1)
        first.set(
            xscale="log",
            yscale="log",
            xlabel="true relative error",
            ylabel="estimate / true error",
            title="where the certificate is valid",
        )
        first.legend(fontsize=7)
        for ax, (name, b) in zip(axes[0, 1:], bounds.items(), strict=True):
            ax.plot(b["t"], b["prior"], color="#b58900", label="a priori (Grazzi et al. 2020)")
            ax.plot(b["t"], b["proved"], color="#d55e00", label="a posteriori, `certify_proved`")
            ax.plot(b["t"], b["estimate"], color="#0072b2", label="estimate")
            ax.plot(b["t"], b["true"], "k:", label="true error")
            bottom = 0.1 * min(b["true"])  # A-priori bounds go on where rounding ends all errors.
            ax.set(xscale="log", yscale="log", xlabel="t = k", title=name, ylim=(bottom, None))
            ax.legend(fontsize=7)


def _run(function: Callable[..., Any], *operands: Any) -> Any:
    """Compiled without optimisation, which takes longer than these small problems, and run."""
    options: Any = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(function).lower(*operands).compile(compiler_options=options)
    return jax.tree.map(np.asarray, compiled(*operands))


def _norm(x: PyTree) -> jax.Array:
    return jnp.linalg.norm(ravel_pytree(x)[0])


def _percentiles(x: np.ndarray, points: Sequence[float]) -> list[float]:
    return [float(p) for p in np.percentile(x, points)] if x.size else [float("nan")] * len(points)


def _interval(hits: int, count: int) -> list[float]:
    """Clopper and Pearson's, at 95 %."""
    if not count:
        return [0.0, 1.0]
    return [float(x) for x in scipy.stats.binomtest(hits, count).proportion_ci(method="exact")]
