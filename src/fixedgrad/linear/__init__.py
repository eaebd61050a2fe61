"""Linear solvers for (I − M) x = b from products with M: `fp`, `cg`, `normal_cg`, `gmres`, ...

Every factory returns a `LinearSolver`, `(matvec, b, x0=None) -> (x, info)`. M is Jᵀ in reverse mode
and J in forward mode. All of them

- work on any pytree, complex leaves as real pairs, low precision in float32 (see `real_form`);
- report the *true* residual ‖b − (I − M)x‖, computed at the x that is returned;
- answer a zero right-hand side with zero;
- take exactly `num_steps` steps, or at most `max_steps` until the residual is below
  max(rtol · ‖b‖, atol), and in each leaf below rtol times what b and x have there, or until it shrinks
  no further at the floor of what the dtype can resolve.

M itself takes its products in the dtype of `b`, and at the precision at which it was traced.

Assumed, not checked, by all of them: `matvec` is linear. I − M is invertible, where b happens to
lie in its range: the answer is then one of many, and only `dense` sees it. Exact `num_steps`
suffice: nothing but `info.residual` tells. ‖I − M‖ ≤ 2, as for a contraction, where a residual is
judged to be at the floor.

Along a mapped axis, of a `shard_map` or of a `vmap` with an `axis_name`, over which M has a
collective, the system is that of all devices or elements together: norms, inner products and stopping
tests are sums over that axis. `dense` and `from_lineax` refuse there.
"""

from .automatic import auto as auto
from .conjugate import cg as cg
from .conjugate import normal_cg as normal_cg
from .direct import dense as dense
from .direct import from_lineax as from_lineax
from .fixed_point import fp as fp
from .krylov import bicgstab as bicgstab
from .krylov import gmres as gmres
from .preconditioner import Preconditioner as Preconditioner
from .preconditioner import inverse as inverse
from .preconditioner import nystrom as nystrom
