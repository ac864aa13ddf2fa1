"""The network: three stages, two presets, checkpoints."""

from picopose_ros.model.checkpoint import load_model, model_fingerprint, save_model
from picopose_ros.model.config import PRESETS, ModelConfig, preset
from picopose_ros.model.features import Features
from picopose_ros.model.network import PicoPose, Refinement
from picopose_ros.model.released_keys import convert_released

__all__ = [
    "PRESETS",
    "Features",
    "ModelConfig",
    "PicoPose",
    "Refinement",
    "convert_released",
    "load_model",
    "model_fingerprint",
    "preset",
    "save_model",
]
