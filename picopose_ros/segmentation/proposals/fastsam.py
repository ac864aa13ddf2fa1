"""Proposals of FastSAM (package ``ultralytics``, AGPL-3.0, never a dependency of this package)."""

from __future__ import annotations

import cv2
import numpy as np

from picopose_ros.errors import ConfigError
from picopose_ros.segmentation.proposals import Picture, SourceOptions, need_weights

CONFIDENCE, IOU = 0.25, 0.8
"""As CNOS asks FastSAM."""


class FastSamSource:
    """`ultralytics.FastSAM` over the whole image.

    ultralytics reads its checkpoints with pickle, which runs what they hold: name only files that you trust.

    Args:
        options: ``model`` is not used.

    Raises:
        ConfigError: the package is not installed, or the weights are not there or no FastSAM.
    """

    def __init__(self, options: SourceOptions) -> None:
        path = need_weights(options, "fastsam", "FastSAM-s.pt")
        try:
            from ultralytics import FastSAM
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"proposals 'fastsam' need the package ultralytics ({error})") from error
        try:
            self._network = FastSAM(str(path))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{path} holds no weights of FastSAM: {reason}") from error
        if self._network.task != "segment":
            raise ConfigError(
                f"{path} holds no weights of FastSAM, but of a network for the task '{self._network.task}'"
            )
        self._device = options.device

    def __call__(self, picture: Picture) -> list[np.ndarray]:
        """Masks (H, W) bool."""
        bgr = cv2.cvtColor(np.ascontiguousarray(picture.rgb), cv2.COLOR_RGB2BGR)
        (result,) = self._network.predict(
            bgr, device=self._device, conf=CONFIDENCE, iou=IOU, retina_masks=True, verbose=False
        )
        return [] if result.masks is None else list(result.masks.data.cpu().numpy() > 0.5)
