"""How wrong is a hypergradient? A certificate, a corrected hypergradient, a tolerance to ask for.

`certify` answers at one pair (w, v); `certified` and `polished` put the answer and the correction into
the explicit form; `adaptive_hypergradient` works until the answer is below a tolerance.
"""

from .adaptive import adaptive_hypergradient as adaptive_hypergradient
from .certified import certified as certified
from .certified import polished as polished
from .certify import Certificate as Certificate
from .certify import CertificateStatus as CertificateStatus
from .certify import Level as Level
from .certify import certify as certify
from .lagrangian import Products as Products
