"""How wrong can a hypergradient be? The a-priori bounds of the paper, each naming its theorem.

At one λ: w = w(λ) is the fixed point, J = ∂₁Φ and B = ∂₂Φ; subscript t means "at w_t"; norms are
Euclidean or spectral. c₁, c₂, c₃ come from `constants`, ρ(t) and σ(k) are the two solvers' rates.

    ITD                ‖∇f_t − ∇f‖ ≤ (c₁ + c₂ t/q + c₃) qᵗ                         `itd`
    AID                ‖∇̂f − ∇f‖   ≤ (c₁ + c₂/(1−q)) ρ(t) + c₃ σ(k)                `aid`
    AID-FP             ‖∇̂f − ∇f‖   ≤ (c₁ + c₂ (1−qᵏ)/(1−q)) ρ(t) + c₃ qᵏ           `aid_fp`

Python numbers give Python floats, in double precision. A JAX array in any place gives an array:
`t`, `k` and the fields of `Constants` broadcast, and jit, vmap and grad apply. `..._steps` invert
the bounds on the host, not under jit. Known values are validated; traced ones cannot be.

Cost: a few operations on scalars. Φ and E are never evaluated: what holds of them, the caller says.
When not to use them: for the error of a hypergradient that was computed. These are worst cases over
a ball, before the computation; `certify` estimates the error at the w and v at hand.

References:
    R. Grazzi, L. Franceschi, M. Pontil, S. Salzo, "On the Iteration Complexity of Hypergradient
    Computation", ICML 2020. Theorem, assumption and equation numbers below are this paper's.
    Y. Saad, "Iterative Methods for Sparse Linear Systems", 2003, section 6.11.3: CG's rate.
    M. Hestenes, E. Stiefel, "Methods of Conjugate Gradients", 1952, Theorem 6:3: no error grows.
"""

from .constants import Coefficients as Coefficients
from .constants import Constants as Constants
from .constants import constants as constants
from .constants import contraction_constants as contraction_constants
from .iterations import aid_cg_steps as aid_cg_steps
from .iterations import aid_fp_steps as aid_fp_steps
from .iterations import cg_steps as cg_steps
from .iterations import itd_steps as itd_steps
from .rates import Rate as Rate
from .rates import cg_rate as cg_rate
from .rates import fp_rate as fp_rate
from .rates import gradient_descent_rate as gradient_descent_rate
from .theorems import aid as aid
from .theorems import aid_fp as aid_fp
from .theorems import itd as itd
from .theorems import iterate as iterate
from .theorems import jacobian as jacobian
