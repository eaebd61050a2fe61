"""Lower-level solvers, w ≈ w(λ) = Φ(w(λ), λ): `picard`, `anderson`, and adapters for any other code.

A lower-level solver is any function `solver(w0, *args, **kwargs) -> w`. Those made here also know
whether they succeeded: `solver.with_info(w0, *args, **kwargs) -> (w, info)`. The decorator and the
explicit form use that; called directly, a solver that missed its tolerance follows its own
`on_failure`, which by default answers NaN.
"""

from .adapters import from_optimistix as from_optimistix
from .adapters import with_tolerance as with_tolerance
from .anderson import anderson as anderson
from .broyden import broyden as broyden
from .checkpoints import Checkpoints as Checkpoints
from .checkpoints import every_iterate as every_iterate
from .checkpoints import nested as nested
from .checkpoints import recursive as recursive
from .checkpoints import rematerialised as rematerialised
from .host import from_host as from_host
from .newton import NEWTON as NEWTON
from .newton import newton as newton
from .optimisers import from_optax as from_optax
from .picard import picard as picard
from .solver import CheckedSolver as CheckedSolver
from .solver import ForPhi as ForPhi
from .solver import exact_steps_info as exact_steps_info
from .solver import held_to_phi as held_to_phi
from .solver import iterates as iterates
from .solver import sharing as sharing
from .solver import solve_with_info as solve_with_info
