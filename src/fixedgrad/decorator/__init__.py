"""Any solver gets derivatives by decoration: `fixed_point`, `root`."""

from .decorators import fixed_point as fixed_point
from .decorators import root as root
