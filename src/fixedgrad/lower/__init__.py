"""Lower-level solvers, w ≈ w(λ) = Φ(w(λ), λ): `picard`, `anderson`, and adapters for any other code.

A lower-level solver is any function `solver(w0, *args, **kwargs) -> w`. Those made here also know
whether they succeeded: `solver.with_info(w0, *args, **kwargs) -> (w, info)`. The decorator and the
explicit form use that; called directly, a solver that missed its tolerance follows its own
`on_failure`, which by default answers NaN.
"""

from .adapters import checked as checked
from .adapters import from_host as from_host
from .adapters import from_optax as from_optax
from .anderson import anderson as anderson
from .frame import CheckedSolver as CheckedSolver
from .frame import fixed_point_info as fixed_point_info
from .frame import held_to_phi as held_to_phi
from .frame import iterates as iterates
from .frame import solve_with_info as solve_with_info
from .picard import picard as picard
