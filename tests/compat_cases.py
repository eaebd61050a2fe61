"""The same lines on jaxopt and on `fixedgrad.compat`: `python tests/compat_cases.py` prints both.

Each case takes the modules `implicit_diff` and `linear_solve` of one of the two libraries, and returns
what they give and what is true.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4))
Y = X @ np.array([1.0, -2.0, 0.3, 0.0]) + 0.1 * RNG.normal(size=30)
LABELS = np.sign(Y)
LINEAR_SOLVES = (
    "solve_lu",
    "solve_cholesky",
    "solve_inv",
    "solve_cg",
    "solve_normal_cg",
    "solve_gmres",
    "solve_bicgstab",
)


class Case(NamedTuple):
    """`run(implicit_diff, linear_solve) -> (got, want)`; `theirs` is whether jaxopt is right."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    theirs: bool = True


def ridge_loss(w, lam, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * lam * jnp.sum(w**2)


def ridge_matrix(lam):
    return X.T @ X / len(X) + lam * np.eye(4)


def ridge_by(implicit_diff, solve, **options):
    @implicit_diff.custom_root(jax.grad(ridge_loss), solve=solve, **options)
    def ridge(init_params, lam, x, y):
        del init_params
        return jnp.linalg.solve(x.T @ x / len(x) + lam * jnp.eye(4), x.T @ y / len(x))

    return ridge


def ridge_slope(lam):
    inverse = np.linalg.inv(ridge_matrix(lam))
    return -inverse @ inverse @ X.T @ Y / len(X)


def ridge(solve_name):
    def run(implicit_diff, linear_solve):
        solver = ridge_by(implicit_diff, getattr(linear_solve, solve_name))
        return jax.jacrev(solver, argnums=1)(None, 0.1, X, Y), ridge_slope(0.1)

    return run


def ridge_with_options(implicit_diff, linear_solve):
    solve = functools.partial(linear_solve.solve_cg, tol=1e-9, maxiter=50)
    solver = ridge_by(implicit_diff, solve)
    return jax.jacrev(solver, argnums=1)(None, 0.1, X, Y), ridge_slope(0.1)


def ridge_with_a_solver_of_ones_own(implicit_diff, linear_solve):
    del linear_solve

    def solve(matvec, b):
        return jnp.linalg.solve(jax.jacobian(matvec)(b), b)

    solver = ridge_by(implicit_diff, solve)
    return jax.jacrev(solver, argnums=1)(None, 0.1, X, Y), ridge_slope(0.1)


def ridge_of_data(implicit_diff, linear_solve):
    solver = ridge_by(implicit_diff, linear_solve.solve_lu)
    w = solver(None, 0.1, X, Y)
    got = jax.grad(lambda y: jnp.sum(jnp.asarray(solver(None, 0.1, X, y)) ** 2))(jnp.asarray(Y))
    return got, X @ np.linalg.solve(ridge_matrix(0.1), 2 * np.asarray(w)) / len(X)


def keywords_and_defaults(implicit_diff, linear_solve):
    @implicit_diff.custom_root(jax.grad(ridge_loss), solve=linear_solve.solve_cg)
    def solver(init_params, strength=0.1, x=X, y=Y):  # Named otherwise than in the loss.
        del init_params
        return jnp.linalg.solve(x.T @ x / len(x) + strength * jnp.eye(4), x.T @ y / len(x))

    got = jax.jacrev(lambda lam: solver(init_params=None, strength=lam))(0.1)
    return got, ridge_slope(0.1)


def a_reference_signature(implicit_diff, linear_solve):
    def optimality(*args):
        return jax.grad(ridge_loss)(*args)

    @implicit_diff.custom_root(
        optimality, solve=linear_solve.solve_cg, reference_signature=ridge_loss
    )
    def solver(init_params, lam, *, y, x):
        del init_params
        return jnp.linalg.solve(x.T @ x / len(x) + lam * jnp.eye(4), x.T @ y / len(x))

    return jax.jacrev(lambda lam: solver(None, lam, y=Y, x=X))(0.1), ridge_slope(0.1)


class OptStep(NamedTuple):
    params: Any
    state: Any


def has_aux(implicit_diff, linear_solve):
    @implicit_diff.custom_root(jax.grad(ridge_loss), has_aux=True, solve=linear_solve.solve_cg)
    def solver(init_params, lam, x, y):
        del init_params
        w = jnp.linalg.solve(x.T @ x / len(x) + lam * jnp.eye(4), x.T @ y / len(x))
        return OptStep(w, {"error": jnp.sum(w), "steps": 3})

    out = solver(None, 0.1, X, Y)
    assert isinstance(out, OptStep)
    assert int(out.state["steps"]) == 3
    return jax.jacrev(lambda lam: solver(None, lam, X, Y).params)(0.1), ridge_slope(0.1)


def logistic_loss(w, lam):
    return jnp.mean(jax.nn.softplus(-LABELS * (X @ w))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def newton(gradient, w, *args):
    for _ in range(30):
        w = w - jnp.linalg.solve(jax.jacobian(gradient)(w, *args), gradient(w, *args))
    return w


def logistic_regression(implicit_diff, linear_solve):
    gradient = jax.grad(logistic_loss)

    @implicit_diff.custom_root(gradient, solve=linear_solve.solve_cg)
    def solver(init_params, lam):
        return newton(gradient, init_params, lam)

    lam = np.linspace(-3.0, -2.0, 4)
    got = jax.jacrev(solver, argnums=1)(jnp.zeros(4), lam)
    w = np.asarray(newton(gradient, np.zeros(4), lam))
    hessian = np.asarray(jax.hessian(logistic_loss)(w, lam))
    return got, -np.linalg.solve(hessian, np.diag(np.exp(lam) * w))


def fixed_point_of(phi, implicit_diff, solve):
    @implicit_diff.custom_fixed_point(phi, solve=solve)
    def solver(init_params, *args):
        return jax.lax.fori_loop(0, 3000, lambda _, w: phi(w, *args), init_params)

    return solver


GRAM, RIGHT = X.T @ X / len(X), X.T @ Y / len(X)
STEP = 1.0 / np.linalg.eigvalsh(GRAM)[-1]


def projected_gradient(implicit_diff, linear_solve):
    def phi(w, shift):  # Nonnegative least squares.
        return jax.nn.relu(w - STEP * (GRAM @ w - RIGHT - shift))

    solver = fixed_point_of(phi, implicit_diff, linear_solve.solve_gmres)
    got = jax.jacrev(solver, argnums=1)(jnp.zeros(4), np.zeros(4))
    active = np.asarray(solver(jnp.zeros(4), np.zeros(4))) > 0
    want = np.zeros((4, 4))
    want[np.ix_(active, active)] = np.linalg.inv(GRAM[np.ix_(active, active)])
    return got, want


def proximal_gradient(implicit_diff, linear_solve):
    def phi(w, penalty):  # The lasso.
        u = w - STEP * (GRAM @ w - RIGHT)
        return jnp.sign(u) * jax.nn.relu(jnp.abs(u) - STEP * penalty)

    solver = fixed_point_of(phi, implicit_diff, linear_solve.solve_normal_cg)
    got = jax.jacrev(solver, argnums=1)(jnp.zeros(4), 0.2)
    w = np.asarray(solver(jnp.zeros(4), 0.2))
    active, want = w != 0, np.zeros(4)
    want[active] = -np.linalg.solve(GRAM[np.ix_(active, active)], np.sign(w[active]))
    return got, want


def kkt_of_a_quadratic_programme(implicit_diff, linear_solve):
    q, a = np.diag([1.0, 2.0, 3.0]) + 0.3, np.array([[1.0, 1.0, 1.0]])
    full = np.block([[q, a.T], [a, np.zeros((1, 1))]])

    def kkt(params, c, d):
        x, nu = params
        return q @ x + c + a.T @ nu, a @ x - d

    @implicit_diff.custom_root(kkt, solve=linear_solve.solve_normal_cg)
    def solver(init_params, c, d):
        del init_params
        solution = jnp.linalg.solve(full, jnp.concatenate([-c, d]))
        return solution[:3], solution[3:]

    c, d = np.array([1.0, -1.0, 0.5]), np.ones(1)
    got = jax.jacrev(lambda c, d: solver(None, c, d)[0], argnums=(0, 1))(c, d)
    inverse = np.linalg.inv(full)
    return got, (-inverse[:3, :3], inverse[:3, 3:])


def tanh_map(w, lam):
    return jnp.tanh(0.5 * jnp.roll(w, 1) + lam)


def tanh_truth(lam):
    w = np.zeros_like(lam)
    for _ in range(200):
        w = np.asarray(tanh_map(w, lam))
    slope = np.diag(1 - w**2)
    return np.linalg.solve(np.eye(len(w)) - slope @ (0.5 * np.roll(np.eye(len(w)), 1, 0)), slope)


def anderson(implicit_diff, linear_solve):
    import jaxopt

    @implicit_diff.custom_fixed_point(tanh_map, solve=linear_solve.solve_gmres)
    def solver(init_params, lam):
        by = jaxopt.AndersonAcceleration(tanh_map, maxiter=60, tol=1e-12, implicit_diff=False)
        return by.run(init_params, lam).params

    lam = np.linspace(-0.5, 0.8, 4)
    return jax.jacrev(solver, argnums=1)(jnp.zeros(4), lam), tanh_truth(lam)


def jit_of_vmap_of_jacobians(implicit_diff, linear_solve):
    solver = fixed_point_of(tanh_map, implicit_diff, linear_solve.solve_gmres)
    lams = np.linspace(-0.5, 0.8, 12).reshape(3, 4)
    got = jax.jit(jax.vmap(lambda lam: jax.jacrev(solver, argnums=1)(jnp.zeros(4), lam)))(lams)
    return got, np.stack([tanh_truth(lam) for lam in lams])


def hessian(implicit_diff, linear_solve):
    solver = ridge_by(implicit_diff, linear_solve.solve_cg)
    got = jax.hessian(lambda lam: jnp.sum(solver(None, lam, X, Y)))(0.1)
    inverse = np.linalg.inv(ridge_matrix(0.1))
    return got, np.sum(2 * inverse @ inverse @ inverse @ X.T @ Y / len(X))


def closure(implicit_diff, linear_solve):
    def f(lam):
        def phi(w):
            return tanh_map(w, lam)

        return jnp.sum(fixed_point_of(phi, implicit_diff, linear_solve.solve_gmres)(jnp.zeros(4)))

    lam = np.linspace(-0.5, 0.8, 4)
    return jax.grad(f)(jnp.asarray(lam)), tanh_truth(lam).sum(0)


def root_products(implicit_diff, linear_solve):
    lam = 0.1
    w = np.linalg.solve(ridge_matrix(lam), X.T @ Y / len(X))
    gradient, bar = jax.grad(ridge_loss), np.array([1.0, 2.0, -1.0, 0.5])
    solve = linear_solve.solve_cg
    vjp = implicit_diff.root_vjp(gradient, jnp.asarray(w), (lam, X, Y), jnp.asarray(bar), solve)
    zeros = np.zeros_like(X), np.zeros_like(Y)
    jvp = implicit_diff.root_jvp(gradient, jnp.asarray(w), (lam, X, Y), (1.0, *zeros), solve)
    return (vjp[0], jvp), (ridge_slope(lam) @ bar, ridge_slope(lam))


def linear_solves_with_a_ridge(implicit_diff, linear_solve):
    del implicit_diff
    a, b = ridge_matrix(0.1), np.array([1.0, 2.0, -1.0, 0.5])
    names = [name for name in LINEAR_SOLVES if name != "solve_normal_cg"]
    got = [getattr(linear_solve, name)(lambda u: a @ u, b, ridge=0.3) for name in names]
    got.append(linear_solve.solve_normal_cg(lambda u: a @ u, b, ridge=0.3))
    want = [np.linalg.solve(a + 0.3 * np.eye(4), b)] * len(names)
    return got, [*want, np.linalg.solve(a @ a + 0.3 * np.eye(4), a @ b)]


def least_squares(implicit_diff, linear_solve):
    del implicit_diff
    got = linear_solve.solve_normal_cg(lambda u: X @ u, jnp.asarray(Y), init=jnp.zeros(4), tol=1e-9)
    return got, np.linalg.lstsq(X, Y, rcond=None)[0]


CASES = {
    **{f"ridge regression, {name}": Case(ridge(name)) for name in LINEAR_SOLVES},
    "ridge regression, partial(solve_cg, tol=, maxiter=)": Case(ridge_with_options),
    "ridge regression, a `solve` of one's own": Case(ridge_with_a_solver_of_ones_own),
    "ridge regression, derivative in the data": Case(ridge_of_data),
    "keywords and defaults": Case(keywords_and_defaults),
    "reference_signature": Case(a_reference_signature),
    "has_aux, a named tuple": Case(has_aux),
    "logistic regression": Case(logistic_regression),
    "projected gradient": Case(projected_gradient),
    "proximal gradient": Case(proximal_gradient),
    "KKT conditions of a QP": Case(kkt_of_a_quadratic_programme),
    "jaxopt's AndersonAcceleration": Case(anderson),
    "jit of vmap of Jacobians": Case(jit_of_vmap_of_jacobians),
    "root_vjp, root_jvp": Case(root_products),
    "linear_solve with a ridge": Case(linear_solves_with_a_ridge),
    "solve_normal_cg, not square": Case(least_squares),
    "Hessian": Case(hessian, theirs=False),
    "closure over a traced λ": Case(closure, theirs=False),
}


def jaxopts():
    """The modules `implicit_diff` and `linear_solve` of jaxopt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # It says that it is not maintained.
        from jaxopt import implicit_diff, linear_solve
    return implicit_diff, linear_solve


def error(case: Case, modules: tuple[Any, Any]) -> float:
    """The error of what a library gives, relative to the largest entry of what is true."""
    got, want = (
        np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])
        for tree in case.run(*modules)
    )
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def main() -> None:
    """Prints the table."""
    from fixedgrad.compat import implicit_diff, linear_solve

    jax.config.update("jax_enable_x64", True)
    print(f"{'case':<54} {'jaxopt':>12} {'fixedgrad':>12}")
    for name, case in CASES.items():
        cells = []
        for modules in (jaxopts(), (implicit_diff, linear_solve)):
            try:
                cells.append(f"{error(case, modules):.1e}")
            except Exception as e:
                cells.append(type(e).__name__[:12])
        print(f"{name:<54} {cells[0]:>12} {cells[1]:>12}")


if __name__ == "__main__":
    main()
