"""Proposals of Segment Anything (package ``segment-anything``), with weights that the user names."""

from __future__ import annotations

import numpy as np

from picopose_ros.errors import ConfigError
from picopose_ros.segmentation.proposals import Picture, SourceOptions, need_weights


class SamSource:
    """`SamAutomaticMaskGenerator` over the whole image.

    Args:
        options: ``model`` is a key of segment_anything's registry (``vit_b``, ``vit_l``, ``vit_h``; vit_b).

    Raises:
        ConfigError: the package is not installed, or the weights are not there or of another model.
    """

    def __init__(self, options: SourceOptions) -> None:
        path = need_weights(options, "sam", "sam_vit_b_01ec64.pth")
        try:
            from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"proposals 'sam' need the package segment-anything ({error})") from error
        import torch

        name = options.model or "vit_b"
        if name not in sam_model_registry:
            raise ConfigError(f"SAM has no model '{name}': choose one of {', '.join(sam_model_registry)}")
        network = sam_model_registry[name]()
        try:
            # weights_only: a checkpoint is data, not code.
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ConfigError(f"{path} holds no weights of SAM's model '{name}': {_first(error)}") from error
        self._generate = SamAutomaticMaskGenerator(network.to(options.device).eval()).generate

    def __call__(self, picture: Picture) -> list[np.ndarray]:
        """Masks (H, W) bool."""
        return [found["segmentation"] for found in self._generate(np.ascontiguousarray(picture.rgb))]


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
