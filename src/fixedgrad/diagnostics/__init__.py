"""What kind of problem is this, which estimator suits it, and is a gradient right?"""

from .checks import Check as Check
from .checks import check as check
from .recommend import Alternative as Alternative
from .recommend import Recommendation as Recommendation
from .recommend import recommend as recommend
