"""Proposals of Segment Anything 2 (package ``sam2``), with weights that the user names."""

from __future__ import annotations

import numpy as np

from picopose_ros.errors import ConfigError
from picopose_ros.segmentation.proposals import Picture, SourceOptions, need_weights


class Sam2Source:
    """`SAM2AutomaticMaskGenerator` over the whole image.

    Args:
        options: ``model`` is one of sam2's configurations (``configs/sam2.1/sam2.1_hiera_t.yaml``).

    Raises:
        ConfigError: the package is not installed, or the weights are not there or of another model.
    """

    def __init__(self, options: SourceOptions) -> None:
        path = need_weights(options, "sam2", "sam2.1_hiera_tiny.pt")
        try:
            from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
            from sam2.build_sam import build_sam2
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"proposals 'sam2' need the package sam2 ({error})") from error
        name = options.model or "configs/sam2.1/sam2.1_hiera_t.yaml"
        try:
            network = build_sam2(name, str(path), device=options.device)  # loads with weights_only
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{path} holds no weights of SAM 2's model '{name}': {reason}") from error
        self._generate = SAM2AutomaticMaskGenerator(network).generate

    def __call__(self, picture: Picture) -> list[np.ndarray]:
        """Masks (H, W) bool."""
        return [found["segmentation"] > 0 for found in self._generate(np.ascontiguousarray(picture.rgb))]
