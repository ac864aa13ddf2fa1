"""Reading and writing network weights; every key remap lives here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from picopose_ros.errors import CheckpointError
from picopose_ros.model.backbone import ViTBackbone
from picopose_ros.model.config import ModelConfig, preset
from picopose_ros.model.network import PicoPose
from picopose_ros.model.torch_file import open_torch_file

_CALIBRATION = "calibration"
"""Key of the metadata that holds slope and offset of the confidence."""

_COUNTER = "num_batches_tracked"

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"

# Tensors of the released checkpoint that influence no output.
_DEAD = re.compile(
    r"^(feature_extractor\.dinov2\.(norm\.|mask_token$)"
    r"|offset_regressor\.dpt_head\.(projects\.0\.|resize_layers\.0\.)"
    r"|offset_regressor\.dpt_head\.scratch\.(layer1_rn|refinenet1|refinenet4\.resConfUnit1|output_conv\d)\.?)"
)
_DINO = "feature_extractor.dinov2."
_BACKBONE = "backbone.vit."
_POS_EMBED = _BACKBONE + "pos_embed"
_DPT, _SCRATCH = r"^offset_regressor\.dpt_head\.", r"^offset_regressor\.dpt_head\.scratch\."
_FLOW = r"^offset_regressor\.flow_decoder\."
_BLOCK = r"offsets.blocks.\1."
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^feature_extractor\.dinov2\.", _BACKBONE),
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
    if old == side or old * old != patches.shape[1]:  # the latter is of another network and won't fit
        return pos_embed
    grid = patches.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic", antialias=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], 1)


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map a state dict with the released network's keys to this package's keys.

    Accepts the prefixes `network.` and `module.`, and DINOv2's own keys, which are those of the backbone;
    drops the tensors that influence no output; resamples the position embedding once. A state dict with this
    package's keys passes unchanged.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _own_key(key)
        if name is not None:
            converted[name] = resample_pos_embed(value) if name == _POS_EMBED else value
    return converted


def _own_key(key: str) -> str | None:
    """This package's name of a tensor, or None for one that influences no output."""
    key = re.sub(r"^((network|module|model)\.)+", "", key)
    key = re.sub(r"^(?=(cls_token|pos_embed|mask_token|patch_embed|blocks|norm)\b)", _DINO, key)
    if _DEAD.match(key):
        return None
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


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
    """Tensors and metadata of a weights file of any kind; nothing that it says is run."""
    if not _is_torch(path):
        with _opened(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    try:
        if zipfile.is_zipfile(path):
            with open_torch_file(path) as file:
                return file.tensors(_state_dict(file.content)), {}
        content = torch.load(path, map_location="cpu", weights_only=True)  # the form of before PyTorch 1.6
        state = _state_dict(content)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors")
        return dict(state), {}
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"weights file {path} is not a torch checkpoint that can be used ({reason}); download it again, "
            "and check that it is the right file"
        ) from error


def _state_dict(content: Any) -> Mapping[str, Any]:
    """The state dict in what a torch checkpoint holds: `state_dict`, or the whole of it."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError("it holds no state dict")
    return state


@dataclass(frozen=True)
class Differences:
    """What a state dict lacks of a model, or has beside it."""

    missing: list[str]
    extra: list[str]
    misshapen: list[str]

    @property
    def lines(self) -> list[str]:
        """One per tensor."""
        return [f"missing {k}" for k in self.missing] + [f"unknown {k}" for k in self.extra] + self.misshapen


def _differences(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Differences:
    return Differences(
        # BatchNorm's step counter has no influence in evaluation and is often absent.
        missing=[k for k in wanted if k not in state and not k.endswith(_COUNTER)],
        extra=[k for k in state if k not in wanted],
        misshapen=[
            f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
            for k, v in wanted.items()
            if k in state and state[k].shape != v.shape
        ],
    )


def _fit(model: PicoPose, state: dict[str, Tensor], source: Path) -> None:
    found = _differences(model.state_dict(), state)
    if found.lines:
        if not found.misshapen and all(not key.startswith(_BACKBONE) for key in found.missing):
            if not any(key in state for key in model.state_dict() if not key.startswith(_BACKBONE)):
                raise CheckpointError(
                    f"weights file {source} holds DINOv2's backbone only: train with it (backbone_weights), "
                    "or give the weights of the whole network"
                )
        raise CheckpointError(
            f"weights file {source} does not fit preset '{model.config.name}': {len(found.missing)} missing, "
            f"{len(found.extra)} unknown and {len(found.misshapen)} misshapen tensors (first: "
            f"{'; '.join(found.lines[:3])}); check the preset"
        )
    model.load_state_dict(state, strict=False)


def load_backbone(model: PicoPose, path: str | Path) -> None:
    """Put DINOv2's published weights into a network's backbone.

    Args:
        model: of a preset with DINOv2's ViT.
        path: `dinov2_vitl14_pretrain.pth`, timm's file of the same network, or what `picopose convert` made
            of either.

    Raises:
        CheckpointError: the file can't be read, or does not fit the preset's backbone.
    """
    path = Path(path).expanduser()
    if not isinstance(model.backbone, ViTBackbone):
        raise CheckpointError(
            f"backbone weights {path}: preset '{model.config.name}' has no DINOv2 backbone; leave them out"
        )
    state = {k.removeprefix(_BACKBONE): v.float() for k, v in convert_released(_read(path)[0]).items()}
    wrong = _differences(model.backbone.vit.state_dict(), state).lines
    if wrong:
        raise CheckpointError(
            f"backbone weights {path} do not fit preset '{model.config.name}' ({len(wrong)} tensors, first: "
            f"{wrong[0]}); it takes DINOv2's plain ViT without registers, {model.config.backbone.timm_name}"
        )
    model.backbone.vit.load_state_dict(state)


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
            "change the preset or the weights"
        )
    model = _unfilled(config).to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    state = {k: v.float() if v.is_floating_point() else v for k, v in convert_released(state).items()}
    _fit(model, state, path)
    model.calibration = _calibration(metadata, path)
    return model.to(device).eval()


def _unfilled(config: ModelConfig) -> PicoPose:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return PicoPose(config)


def save_model(
    model: PicoPose, path: str | Path, half: bool = False, metadata: dict[str, str] | None = None
) -> None:
    """Write weights atomically as safetensors, in fp16 where `half`; BatchNorm's statistics stay fp32."""
    path = Path(path)
    info = {**_about(model.config), **(metadata or {})}
    if model.calibration != (1.0, 0.0):
        info[_CALIBRATION] = json.dumps(model.calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, _packed(model.state_dict(), half), info)


def _about(config: ModelConfig) -> dict[str, str]:
    """Metadata that a weights file says its preset with."""
    return {"preset": config.name, "config": json.dumps(config.to_dict())}


def _packed(state: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """The tensors as they are written."""
    packed = {}
    for key, value in state.items():
        if key.endswith(_COUNTER):
            continue
        value = value.detach().cpu()
        if value.is_floating_point():
            # A variance may be smaller than fp16 can say.
            halved = half and not key.endswith(("running_mean", "running_var"))
            value = value.half() if halved else value.float()
        packed[key] = value.contiguous()
    return packed


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did.

    Attributes:
        part: `network`, or `backbone` where the file holds DINOv2 only.
        preset: whose tensors they are. tensors: how many were written.
        dropped: tensors that influence no output. extra: unknown tensors, left out.
        source_sha256, sha256: of the file that was read and of the one that was written.
    """

    part: str
    preset: str
    tensors: int
    dropped: list[str]
    extra: list[str]
    source_sha256: str
    sha256: str


def convert_checkpoint(
    source: str | Path, target: str | Path, preset_name: str = "vitl", half: bool = False
) -> Conversion:
    """Write the weights of a published file as this package reads them.

    Args:
        source: a checkpoint of the released network, or DINOv2's of facebookresearch or timm.
        target: the .safetensors file; replaced in one step.
        preset_name: whose tensors it must hold, every one of its size.
        half: write fp16, BatchNorm's statistics excepted.

    Raises:
        CheckpointError: the source can't be read, lacks a tensor, has one of another size or one that is not
            finite (names all of them); or the target can't be written.
        ConfigError: unknown preset.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    config = preset(preset_name)
    if target.suffix != ".safetensors" or target.is_dir():
        raise CheckpointError(f"{target} is no name for a weights file; let it end in .safetensors")
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the file that is converted; write to another one")
    state, metadata = _read(source)
    if metadata.get("preset", config.name) != config.name:
        raise CheckpointError(
            f"weights file {source} was made for preset '{metadata['preset']}', not for '{config.name}'; "
            f"convert it with --preset {metadata['preset']}"
        )
    converted = convert_released(state)
    wanted = _unfilled(config).state_dict()
    part = "network"
    if not any(key in wanted and not key.startswith(_BACKBONE) for key in converted):
        part = "backbone"
        wanted = {key: value for key, value in wanted.items() if key.startswith(_BACKBONE)}
    found = _differences(wanted, converted)
    if len(found.missing) == len(wanted) or not wanted:
        first = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"weights file {source} is of another network: it holds nothing of preset '{config.name}' (its "
            f"first tensors: {first})"
        )
    if found.missing or found.misshapen:
        raise CheckpointError(
            f"weights file {source} does not fit the {part} of preset '{config.name}', nothing was written:\n"
            + "\n".join(found.lines)
        )
    packed = _packed({key: converted[key] for key in wanted if key in converted}, half)
    endless = [key for key, value in packed.items() if not torch.isfinite(value).all()]
    if endless:
        raise CheckpointError(
            f"weights file {source} has tensors that are not finite{' in fp16' if half else ''}, nothing was "
            "written:\n" + "\n".join(endless)
        )
    source_sha256 = _sha256(source)
    info = {
        **_about(config),
        "part": part,
        "source": source.name,
        "source_sha256": source_sha256,
        "tensors_sha256": _tensors_sha256(packed),
        **{key: value for key, value in metadata.items() if key == _CALIBRATION},
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, packed, info)
        sha256 = _sha256(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights file {target} cannot be written: {error}") from error
    dropped = [key for key in state if _own_key(key) is None]
    return Conversion(part, config.name, len(packed), dropped, found.extra, source_sha256, sha256)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Of names and values, whatever order a file has them in."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


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
    try:
        save_file(state, partial, metadata=metadata)
        _order_metadata(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which come in random order: equal weights, equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        data = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) <= length:
            file.seek(8)
            file.write(data.ljust(length))


def model_fingerprint(model: PicoPose) -> str:
    """A hex digest of the architecture and every weight: equal digests give equal features."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        if key.endswith(_COUNTER):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
