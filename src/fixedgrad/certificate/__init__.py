"""How wrong is a hypergradient? A certificate, a corrected hypergradient, a tolerance to ask for.

`certify` answers at one pair (w, v) by an estimate, `certify_proved` by an upper bound; `certified` and
`polished` put the answer and the correction into the explicit form; `adaptive_hypergradient` works
until the answer is below a tolerance.
"""

from .adaptive import adaptive_hypergradient as adaptive_hypergradient
from .certificate import Certificate as Certificate
from .certificate import CertificateStatus as CertificateStatus
from .certified import certified as certified
from .certified import polished as polished
from .certify import certify as certify
from .proved import certify_proved as certify_proved
