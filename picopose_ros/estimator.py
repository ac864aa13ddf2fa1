"""The public names of `picopose_ros.estimation`: ``from picopose_ros.estimator import PoseEstimator``."""

from picopose_ros.estimation import *  # noqa: F403
from picopose_ros.estimation import __all__ as __all__
