"""What kind of problem is this, which estimator suits it, and is a gradient right?"""

from .gradient_check import Answer as Answer
from .gradient_check import GradientCheck as GradientCheck
from .gradient_check import check_gradient as check_gradient
from .recommend import Alternative as Alternative
from .recommend import Recommendation as Recommendation
from .recommend import recommend as recommend
