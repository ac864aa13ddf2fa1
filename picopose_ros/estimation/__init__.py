"""From the segments of an image to poses: crop, encode, retrieve, regress, solve, choose.

`PoseEstimator` (estimator.py) composes the steps; each has a file of its own: queries, passes (the network on
batches), retrieval, regression, solving, choosing. Settings and results are small data classes.
"""

from picopose_ros.estimation.backends import encode_by
from picopose_ros.estimation.estimator import PoseEstimator
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.results import (
    Choice,
    EstimateResult,
    Hypothesis,
    HypothesisTrace,
    ObjectPose,
    SegmentTrace,
)
from picopose_ros.estimation.settings import (
    Backend,
    EstimatorSettings,
    Precision,
    resolve_precision,
    torch_device,
)

__all__ = [
    "Backend",
    "Choice",
    "EstimateResult",
    "EstimatorSettings",
    "Hypothesis",
    "HypothesisTrace",
    "ObjectPose",
    "PoseEstimator",
    "Precision",
    "Query",
    "SegmentTrace",
    "encode_by",
    "resolve_precision",
    "torch_device",
]
