"""jaxopt's names for implicit differentiation, on the rules of this library.

jaxopt is no longer maintained. Its decorators and linear solvers have their signatures here, so that
one line changes:

    from jaxopt import implicit_diff, linear_solve           # before
    from fixedgrad.compat import implicit_diff, linear_solve  # after

What changes with it:

- A solver that is nowhere near a root and a linear solve that missed its tolerance give NaN, where
  jaxopt gives a number. `on_failure="ignore"` of the decorators gives numbers.
- Hessians work: `hessian`, `grad(grad(...))`, `jacfwd(jacrev(...))`.
- What the functions close over is differentiated, where jaxopt raises `UnexpectedTracerError`.
- A decorated solver is traced once for given shapes, not at every call.

New code takes `fixedgrad.root` and `fixedgrad.fixed_point`, which have forward mode, statuses and
tolerances as well.
"""

from . import implicit_diff as implicit_diff
from . import linear_solve as linear_solve
from .implicit_diff import custom_fixed_point as custom_fixed_point
from .implicit_diff import custom_root as custom_root
from .implicit_diff import root_jvp as root_jvp
from .implicit_diff import root_vjp as root_vjp
