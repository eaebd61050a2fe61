"""What kind of problem is this, which estimator suits it, and is a gradient right?"""

from .checks import Answer as Answer
from .checks import GradientCheck as GradientCheck
from .checks import check_gradient as check_gradient
from .recommend import Alternative as Alternative
from .recommend import Recommendation as Recommendation
from .recommend import recommend as recommend
