"""Are covariances calibrated? True errors compared with the errors that the covariances predict.

An error ``e`` of a pose whose covariance is ``C`` lies inside the 95 % ellipsoid where ``e' C^-1 e`` is at
most the 95 % point of the chi-squared distribution with six degrees of freedom. With calibrated
covariances 95 % of the errors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from picopose_ros.geometry.covariance import pose_error
from picopose_ros.instances import SymmetryGroup
from picopose_ros.templates.meshes import Symmetries

GROSS_DEG = 30.0
"""A rotation farther off is a mistake, not an error: no covariance describes those."""

AXES = ("x", "y", "z", "rotation x", "rotation y", "rotation z")
_HALF_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class Share:
    """How many errors are inside an ellipsoid, for all six numbers or a part of them.

    Attributes:
        inside: share of errors inside the 95 % ellipsoid.
        factor: the covariances times this would have 95 % of the errors inside.
        factor_at_half: times this, half of the errors inside the 50 % ellipsoid. The two factors are equal
            where the errors are normal, as covariances assume; a larger first one means outliers.
    """

    inside: float
    factor: float
    factor_at_half: float

    def __str__(self) -> str:
        return (
            f"{100 * self.inside:.1f} % of the errors inside the 95 % ellipsoid; times {self.factor:.3g} it "
            f"would be 95 % (times {self.factor_at_half:.3g} by the median)"
        )


@dataclass(frozen=True)
class Consistency:
    """How true errors compare with their covariances.

    Attributes:
        count: poses compared. gross: poses left out, because their rotation is altogether wrong.
        pose: all six numbers. position, rotation: three of them each.
        spread: (6,) sizes of the errors in standard deviations (the median's, times 1.48); 1 is calibrated.
        bias: (6,) median errors in standard deviations; far from 0 is a systematic error.
    """

    count: int
    gross: int
    pose: Share
    position: Share
    rotation: Share
    spread: np.ndarray
    bias: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        for name in ("spread", "bias"):
            values[name] = dict(zip(AXES, getattr(self, name).tolist(), strict=True))
        return values

    def lines(self) -> list[str]:
        """As text."""
        rows = [
            f"{self.count} poses, {self.gross} more left out (rotation off by over {GROSS_DEG:g} degrees)"
        ]
        for name, share in (("pose", self.pose), ("position", self.position), ("rotation", self.rotation)):
            rows.append(f"{name:10} {share}")
        for name, spread, bias in zip(AXES, self.spread, self.bias, strict=True):
            rows.append(f"{name:10} errors of {spread:.2f} standard deviations, median {bias:+.2f}")
        return rows


def consistency(
    T_est: np.ndarray,
    covariances: np.ndarray,
    T_true: np.ndarray,
    symmetries: Sequence[Symmetries | None] | None = None,
    gross_deg: float = GROSS_DEG,
) -> Consistency:
    """Compare errors with covariances.

    Args:
        T_est: (n, 4, 4) estimated T_cam_obj. covariances: (n, 6, 6) of them, in ROS's order.
        T_true: (n, 4, 4) true T_cam_obj.
        symmetries: of the objects, per pose; the true pose is taken in the form nearest to the estimate. None
            where there are none.
        gross_deg: poses with a larger rotation error are counted and left out.

    Raises:
        ValueError: shapes that don't fit, nothing left to compare, or a covariance that isn't positive
            definite.
    """
    T_est, T_true = np.asarray(T_est, np.float64), np.array(T_true, np.float64)
    covariances = np.asarray(covariances, np.float64)
    n = len(T_est)
    if T_est.shape != (n, 4, 4) or T_true.shape != (n, 4, 4) or covariances.shape != (n, 6, 6):
        raise ValueError(
            f"poses of shape {T_est.shape} and {T_true.shape} with covariances of shape {covariances.shape}: "
            "give (n, 4, 4), (n, 4, 4) and (n, 6, 6)"
        )
    for k, one in enumerate(symmetries or ()):
        if one is not None:
            T_true[k] = SymmetryGroup(one).nearest(T_true[k], T_est[k, :3, :3])
    errors = pose_error(T_est, T_true) if n else np.zeros((0, 6))
    kept = np.linalg.norm(errors[:, 3:], axis=1) <= np.radians(gross_deg)
    errors, covariances = errors[kept], covariances[kept]
    if not len(errors):
        raise ValueError(
            f"of {n} poses none is within {gross_deg:g} degrees of the truth: nothing to compare"
        )
    variances = np.einsum("nii->ni", covariances)
    if not (variances > 0).all():
        raise ValueError("a covariance isn't positive definite")
    scale = np.sqrt(variances)  # metres and radians differ by orders of magnitude
    if not (np.linalg.eigvalsh(covariances / _outer(scale)) > 0).all():
        raise ValueError("a covariance isn't positive definite")
    return Consistency(
        count=len(errors),
        gross=int(n - kept.sum()),
        pose=_share(errors, covariances, slice(0, 6)),
        position=_share(errors, covariances, slice(0, 3)),
        rotation=_share(errors, covariances, slice(3, 6)),
        spread=np.median(np.abs(errors) / scale, 0) / _HALF_OF_NORMAL,
        bias=np.median(errors / scale, 0),
    )


def squared_distances(errors: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """(n,) squared Mahalanobis distances of errors (n, d) under covariances (n, d, d)."""
    scale = np.sqrt(np.einsum("nii->ni", covariances))
    weighed = errors / scale
    return np.einsum(
        "ni,ni->n", weighed, np.linalg.solve(covariances / _outer(scale), weighed[..., None])[..., 0]
    )


def _share(errors: np.ndarray, covariances: np.ndarray, part: slice) -> Share:
    distances = squared_distances(errors[:, part], covariances[:, part, part])
    freedom = errors[:, part].shape[1]
    limit = chi2.ppf(0.95, freedom)
    return Share(
        inside=float((distances <= limit).mean()),
        factor=float(np.quantile(distances, 0.95) / limit),
        factor_at_half=float(np.median(distances) / chi2.ppf(0.5, freedom)),
    )


def _outer(scale: np.ndarray) -> np.ndarray:
    return scale[:, :, None] * scale[:, None, :]
