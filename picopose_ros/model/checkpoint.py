"""Reading and writing network weights; every key remap lives here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from picopose_ros.errors import CheckpointError
from picopose_ros.model.config import preset
from picopose_ros.model.network import PicoPose

_CALIBRATION = "calibration"
"""Key of the metadata that holds slope and offset of the confidence."""

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"

# Tensors of the released checkpoint that influence no output.
_DEAD = re.compile(
    r"^(feature_extractor\.dinov2\.(norm\.|mask_token$)"
    r"|offset_regressor\.dpt_head\.(projects\.0\.|resize_layers\.0\.)"
    r"|offset_regressor\.dpt_head\.scratch\.(layer1_rn|refinenet1|refinenet4\.resConfUnit1|output_conv\d)\.?)"
)
_DPT, _SCRATCH = r"^offset_regressor\.dpt_head\.", r"^offset_regressor\.dpt_head\.scratch\."
_FLOW = r"^offset_regressor\.flow_decoder\."
_BLOCK = r"offsets.blocks.\1."
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^feature_extractor\.dinov2\.", "backbone.vit."),
    (r"^affine_regressor\.(translation|scale|inplane)_predictor\.", r"affine.\1."),
    (r"^affine_regressor\.", "affine."),
    (_DPT + r"projects\.1\.", "pyramid.project.0."),
    (_DPT + r"projects\.2\.", "pyramid.project.1."),
    (_DPT + r"projects\.3\.", "pyramid.project.2."),
    (_DPT + r"resize_layers\.1\.", "pyramid.resize.0."),
    (_DPT + r"resize_layers\.3\.", "pyramid.resize.2."),
    (_SCRATCH + r"layer2_rn\.", "pyramid.reduce.0."),
    (_SCRATCH + r"layer3_rn\.", "pyramid.reduce.1."),
    (_SCRATCH + r"layer4_rn\.", "pyramid.reduce.2."),
    (_SCRATCH + r"refinenet4\.", "pyramid.fuse.0."),
    (_SCRATCH + r"refinenet3\.", "pyramid.fuse.1."),
    (_SCRATCH + r"refinenet2\.", "pyramid.fuse.2."),
    (r"(pyramid\.fuse\.\d)\.resConfUnit1\.", r"\1.skip_unit."),
    (r"(pyramid\.fuse\.\d)\.resConfUnit2\.", r"\1.unit."),
    (_FLOW + r"proj\.(\d)\.", _BLOCK + "proj."),
    (_FLOW + r"encoder\.(\d)\.(corr|flow)_net\.(\d)\.conv\.", _BLOCK + r"encoder.\2.\3."),
    (_FLOW + r"encoder\.(\d)\.out_net\.0\.conv\.", _BLOCK + "encoder.out."),
    (_FLOW + r"flow_pred\.(\d)\.layers\.(\d)\.conv\.", _BLOCK + r"flow_head.layers.\2."),
    (_FLOW + r"flow_pred\.(\d)\.predict_layer\.", _BLOCK + "flow_head.predict."),
    (_FLOW + r"mask_pred\.(\d)\.layers\.(\d)\.conv\.", _BLOCK + r"certainty_head.layers.\2."),
    (_FLOW + r"mask_pred\.(\d)\.predict_layer\.", _BLOCK + "certainty_head.predict."),
)


def resample_pos_embed(pos_embed: Tensor, side: int = 16) -> Tensor:
    """Resample DINOv2's position embedding as the released network does.

    Bicubic with an explicit scale factor (side + 0.1) / old side and no antialiasing: resampling by
    target size, as timm does, is not equivalent.

    Args:
        pos_embed: (1, 1 + n^2, C), CLS first.
    Returns:
        (1, 1 + side^2, C).
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == side:
        return pos_embed
    grid = patches.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic", antialias=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], 1)


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map a state dict with the released network's keys to this package's keys.

    Accepts the prefixes `network.` and `module.`; drops the tensors that influence no output;
    resamples the position embedding once. A state dict with this package's keys passes unchanged.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        key = re.sub(r"^((network|module|model)\.)+", "", key)
        if _DEAD.match(key):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if key == "backbone.vit.pos_embed":
            value = resample_pos_embed(value)
        converted[key] = value
    return converted


def _is_torch(path: Path) -> bool:
    """Whether a file is a torch checkpoint; what isn't has to be safetensors."""
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; give the path of a .safetensors file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error}") from error
    return head[:2] == b"PK" or head[:1] == b"\x80"  # zip archives and bare pickles


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"weights file {path} is not a complete .safetensors file ({error}); download or convert it again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if _is_torch(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"weights file {path} is a torch checkpoint that is cut short or holds more than tensors, "
                f"and is not unpickled for safety ({type(error).__name__}); convert it with picopose convert"
            ) from error
        return _state_dict(content, path), {}
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what a torch checkpoint holds."""
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"weights file {path} holds no state dict of tensors")
    return state


def _fit(model: PicoPose, state: dict[str, Tensor], source: Path) -> None:
    wanted = model.state_dict()
    # BatchNorm's step counter has no influence in evaluation and is often absent.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or extra or shapes:
        listed = [f"missing {k}" for k in missing] + [f"unknown {k}" for k in extra] + shapes
        raise CheckpointError(
            f"weights file {source} does not fit preset '{model.config.name}': {len(missing)} missing, "
            f"{len(extra)} unknown and {len(shapes)} misshapen tensors (first: {'; '.join(listed[:3])}); "
            "check the preset parameter"
        )
    model.load_state_dict(state, strict=False)


def weights_path(preset_name: str, weights: str | Path | None = None) -> Path:
    """The weights file: the given one, or the one of the preset in the package.

    Raises:
        CheckpointError: none is given and the package has none.
    """
    if weights:
        return Path(weights).expanduser()
    path = WEIGHTS_DIR / f"{preset_name}.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"preset '{preset_name}' has no packaged weights; give a checkpoint file as weights"
        )
    return path


def preset_of(weights: str | Path | None) -> str:
    """The preset that a weights file was made for, as it says itself; `tiny` for the packaged one.

    Raises:
        CheckpointError: the file can't be read, or doesn't say.
    """
    if weights is None:
        return "tiny"
    path = Path(weights).expanduser()
    if _is_torch(path):
        name = None
    else:
        with _opened(path) as file:
            name = (file.metadata() or {}).get("preset")
    if name is None:
        raise CheckpointError(
            f"weights file {path} does not say for which preset it was made; name it with --preset, or "
            "convert the file with picopose convert"
        )
    return name


def load_model(
    preset_name: str = "tiny", weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> PicoPose:
    """A network in evaluation mode with its weights.

    Args:
        preset_name: `vitl`, `tiny`, ... . weights: a .safetensors file or a torch checkpoint of tensors only,
            with this package's or the released network's keys; None takes the preset's packaged weights.
        device: torch device.
    Raises:
        ConfigError: unknown preset. CheckpointError: unreadable weights, or weights of another preset.
    """
    config = preset(preset_name)
    path = weights_path(preset_name, weights)
    state, metadata = _read(path)
    if metadata.get("preset", preset_name) != preset_name:
        raise CheckpointError(
            f"weights file {path} was made for preset '{metadata['preset']}', not for '{preset_name}'; "
            "change the preset or the weights parameter"
        )
    with torch.device("meta"):
        model = PicoPose(config)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    state = {k: v.float() if v.is_floating_point() else v for k, v in convert_released(state).items()}
    _fit(model, state, path)
    model.calibration = _calibration(metadata, path)
    return model.to(device).eval()


def save_model(
    model: PicoPose, path: str | Path, half: bool = False, metadata: dict[str, str] | None = None
) -> None:
    """Write weights atomically as safetensors, in fp16 where `half`; BatchNorm's statistics stay fp32."""
    path = Path(path)
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        value = value.detach().cpu()
        # A variance may be smaller than fp16 can say.
        halved = half and value.is_floating_point() and not key.endswith(("running_mean", "running_var"))
        state[key] = (value.half() if halved else value).contiguous()
    info = {"preset": model.config.name, "config": json.dumps(model.config.to_dict()), **(metadata or {})}
    if model.calibration != (1.0, 0.0):
        info[_CALIBRATION] = json.dumps(model.calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, state, info)


def save_calibration(path: str | Path, slope: float, offset: float) -> None:
    """Keep a calibration of the confidence in a weights file; its tensors stay as they are.

    Raises:
        CheckpointError: the file can't be read, is no .safetensors file, or can't be written.
    """
    path = Path(path).expanduser()
    state, metadata = _read(path)
    if "preset" not in metadata:
        raise CheckpointError(f"weights file {path} is not one that this package wrote; convert it first")
    try:
        _replace(path, state, {**metadata, _CALIBRATION: json.dumps([slope, offset])})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights file {path} cannot be written: {error}") from error


def _calibration(metadata: dict[str, str], path: Path) -> tuple[float, float]:
    try:
        slope, offset = json.loads(metadata.get(_CALIBRATION, "[1.0, 0.0]"))
        if not (0 < float(slope) < math.inf and math.isfinite(float(offset))):
            raise ValueError("numbers that can't be")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"weights file {path} has a calibration that can't be used ({metadata[_CALIBRATION]!r}: "
            f"{error}); measure it again with picopose eval synthetic --calibrate"
        ) from error
    return float(slope), float(offset)


def _replace(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, partial, metadata=metadata)
    os.replace(partial, path)


def model_fingerprint(model: PicoPose) -> str:
    """A hex digest of the architecture and every weight: equal digests give equal features."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
