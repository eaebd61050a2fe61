"""The outer loop: its records, rules for its end, and the loop."""

from .loop import Bilevel as Bilevel
from .loop import bilevel as bilevel
from .records import BilevelInfo as BilevelInfo
from .records import BilevelState as BilevelState
from .records import StopReason as StopReason
from .runs import LoopStoppedWarning as LoopStoppedWarning
from .stop_rules import StopRule as StopRule
from .stop_rules import patience as patience
