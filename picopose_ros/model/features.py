"""What the backbone makes of crops: the input of all three stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Features:
    """A batch of encoded crops."""

    taps: tuple[Tensor, ...]
    """Three backbone maps (B, C_i, h_i, w_i) that feed stage 3."""
    descriptors: Tensor
    """(B, C, 256) unit vectors, one per patch, row-major."""

    def select(self, index: Tensor) -> Features:
        """The crops named by index (n,)."""
        return Features(tuple(tap[index] for tap in self.taps), self.descriptors[index])
