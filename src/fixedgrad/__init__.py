"""fixedgrad: the gradient of an objective that depends on the solution of a fixed-point equation.

    min over λ of  f(λ) = E(w(λ), λ)      where   w(λ) = Φ(w(λ), λ)

With J = ∂₁Φ, B = ∂₂Φ and b = ∇₁E at w(λ), the hypergradient is

    ∇f(λ) = ∇₂E + Bᵀ v      where   (I − Jᵀ) v = b.

Iterative differentiation (`itd`) differentiates the iterates w_t of a solver. Approximate implicit
differentiation (`aid`) takes w_t from any solver, solves the linear system by k steps of a linear
solver (`fp`, `cg`, ...), and forms ∇₂E + Bᵀ v. For a contraction with constant q both err by O(qᵗ);
`aid` needs memory for one iterate only. `fixed_point` gives any solver one of these by decoration.
"""

from importlib.metadata import version

from . import bounds as bounds
from .bilevel import Bilevel as Bilevel
from .bilevel import BilevelInfo as BilevelInfo
from .bilevel import BilevelState as BilevelState
from .bilevel import LoopStoppedWarning as LoopStoppedWarning
from .bilevel import StopReason as StopReason
from .bilevel import StopRule as StopRule
from .bilevel import bilevel as bilevel
from .bilevel import patience as patience
from .certificate import Certificate as Certificate
from .certificate import CertificateStatus as CertificateStatus
from .certificate import adaptive_hypergradient as adaptive_hypergradient
from .certificate import certified as certified
from .certificate import certify as certify
from .certificate import certify_proved as certify_proved
from .certificate import polished as polished
from .citation import citation as citation
from .decorator import fixed_point as fixed_point
from .decorator import root as root
from .descent import DescentInfo as DescentInfo
from .descent import descent as descent
from .diagnostics import GradientCheck as GradientCheck
from .diagnostics import Recommendation as Recommendation
from .diagnostics import check_gradient as check_gradient
from .diagnostics import recommend as recommend
from .estimators import aid as aid
from .estimators import forward as forward
from .estimators import itd as itd
from .estimators import truncated_itd as truncated_itd
from .failure import SolveFailedError as SolveFailedError
from .failure import SolveFailedWarning as SolveFailedWarning
from .hypergradient import Hypergradient as Hypergradient
from .hypergradient import HypergradientInfo as HypergradientInfo
from .hypergradient import HypergradientState as HypergradientState
from .hypergradient import hypergradient as hypergradient
from .linear import Preconditioner as Preconditioner
from .linear import auto as auto
from .linear import bicgstab as bicgstab
from .linear import cg as cg
from .linear import dense as dense
from .linear import fp as fp
from .linear import from_lineax as from_lineax
from .linear import gmres as gmres
from .linear import inverse as inverse
from .linear import normal_cg as normal_cg
from .linear import nystrom as nystrom
from .lower import CheckedSolver as CheckedSolver
from .lower import Checkpoints as Checkpoints
from .lower import anderson as anderson
from .lower import broyden as broyden
from .lower import every_iterate as every_iterate
from .lower import from_host as from_host
from .lower import from_optax as from_optax
from .lower import from_optimistix as from_optimistix
from .lower import nested as nested
from .lower import newton as newton
from .lower import picard as picard
from .lower import recursive as recursive
from .lower import rematerialised as rematerialised
from .lower import with_tolerance as with_tolerance
from .maps import Momentum as Momentum
from .maps import damped as damped
from .maps import from_residual as from_residual
from .maps import gradient_descent as gradient_descent
from .maps import heavy_ball as heavy_ball
from .maps import nesterov as nesterov
from .maps import optimal_heavy_ball as optimal_heavy_ball
from .maps import optimal_step_size as optimal_step_size
from .maps import proximal_gradient as proximal_gradient
from .monitor import print_info as print_info
from .monitor import progress_bar as progress_bar
from .monitor import unordered as unordered
from .starts import Start as Start
from .starts import cold as cold
from .starts import extrapolated as extrapolated
from .starts import separately as separately
from .starts import warm as warm
from .stochastic import StochasticCertificate as StochasticCertificate
from .stochastic import certify_stochastic as certify_stochastic
from .stochastic import chunked as chunked
from .stochastic import given_batches as given_batches
from .stochastic import minibatches as minibatches
from .stochastic import saba as saba
from .stochastic import soba as soba
from .stochastic import stochastic_hypergradient as stochastic_hypergradient
from .types import Backward as Backward
from .types import Estimator as Estimator
from .types import Implicit as Implicit
from .types import LinearSolver as LinearSolver
from .types import Outer as Outer
from .types import Phi as Phi
from .types import SolveInfo as SolveInfo
from .types import Solver as Solver
from .types import Status as Status
from .types import Unrolled as Unrolled

__all__ = [
    "Backward",
    "Bilevel",
    "BilevelInfo",
    "BilevelState",
    "Certificate",
    "CertificateStatus",
    "CheckedSolver",
    "Checkpoints",
    "DescentInfo",
    "Estimator",
    "GradientCheck",
    "Hypergradient",
    "HypergradientInfo",
    "HypergradientState",
    "Implicit",
    "LinearSolver",
    "LoopStoppedWarning",
    "Momentum",
    "Outer",
    "Phi",
    "Preconditioner",
    "Recommendation",
    "SolveFailedError",
    "SolveFailedWarning",
    "SolveInfo",
    "Solver",
    "Start",
    "Status",
    "StochasticCertificate",
    "StopReason",
    "StopRule",
    "Unrolled",
    "adaptive_hypergradient",
    "aid",
    "anderson",
    "auto",
    "bicgstab",
    "bilevel",
    "bounds",
    "broyden",
    "certified",
    "certify",
    "certify_proved",
    "certify_stochastic",
    "cg",
    "check_gradient",
    "chunked",
    "citation",
    "cold",
    "damped",
    "dense",
    "descent",
    "every_iterate",
    "extrapolated",
    "fixed_point",
    "forward",
    "fp",
    "from_host",
    "from_lineax",
    "from_optax",
    "from_optimistix",
    "from_residual",
    "given_batches",
    "gmres",
    "gradient_descent",
    "heavy_ball",
    "hypergradient",
    "inverse",
    "itd",
    "minibatches",
    "nested",
    "nesterov",
    "newton",
    "normal_cg",
    "nystrom",
    "optimal_heavy_ball",
    "optimal_step_size",
    "patience",
    "picard",
    "polished",
    "print_info",
    "progress_bar",
    "proximal_gradient",
    "recommend",
    "recursive",
    "rematerialised",
    "root",
    "saba",
    "separately",
    "soba",
    "stochastic_hypergradient",
    "truncated_itd",
    "unordered",
    "warm",
    "with_tolerance",
]

__version__ = version("fixedgrad")
