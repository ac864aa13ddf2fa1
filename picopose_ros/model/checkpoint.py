"""Reading and writing network weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from picopose_ros.errors import CheckpointError
from picopose_ros.model.backbone import ViTBackbone
from picopose_ros.model.config import ModelConfig, preset
from picopose_ros.model.network import PicoPose
from picopose_ros.model.released_keys import BACKBONE, convert_released
from picopose_ros.model.torch_file import open_torch_file

CALIBRATION = "calibration"
"""Key of the metadata that holds slope and offset of the confidence."""

COUNTER = "num_batches_tracked"
"""BatchNorm's step counter, which has no influence in evaluation."""

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"


def _is_torch(path: Path) -> bool:
    """Whether a file is a torch checkpoint; what isn't has to be safetensors."""
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; give the path of a .safetensors file")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error}") from error
    if head[8:] == b"{":  # safetensors: JSON after the number of its bytes, which may begin as the others do
        return False
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


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file of any kind; nothing in it is executed."""
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
    """Keys that a state dict lacks, has in addition, or has in another shape."""

    missing: list[str]
    extra: list[str]
    misshapen: list[str]

    @property
    def lines(self) -> list[str]:
        """One per tensor."""
        return [f"missing {k}" for k in self.missing] + [f"unknown {k}" for k in self.extra] + self.misshapen


def differences(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Differences:
    """What a state dict lacks of the wanted one, has beside it, or has in another shape."""
    return Differences(
        # BatchNorm's step counter has no influence in evaluation and is often absent.
        missing=[k for k in wanted if k not in state and not k.endswith(COUNTER)],
        extra=[k for k in state if k not in wanted],
        misshapen=[
            f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
            for k, v in wanted.items()
            if k in state and state[k].shape != v.shape
        ],
    )


def _fit(model: PicoPose, state: dict[str, Tensor], source: Path) -> None:
    found = differences(model.state_dict(), state)
    if found.lines:
        if not found.misshapen and all(not key.startswith(BACKBONE) for key in found.missing):
            if not any(key in state for key in model.state_dict() if not key.startswith(BACKBONE)):
                raise CheckpointError(
                    f"weights file {source} holds DINOv2's backbone only: train with it (backbone_weights), "
                    "or give the weights of the whole network"
                )
        raise CheckpointError(
            f"weights file {source} does not fit preset '{model.config.name}': {len(found.missing)} missing, "
            f"{len(found.extra)} unknown and {len(found.misshapen)} misshapen tensors (first: "
            f"{'; '.join(found.lines[:3])}); check the preset"
        )
    # The network was built without memory: a tensor that no file brings would hold whatever was there.
    carried = model.state_dict().keys()
    left = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in carried]
    if left:
        raise CheckpointError(
            f"preset '{model.config.name}' has tensors that weights files do not carry ({', '.join(left)}): "
            "register them as persistent buffers"
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
    state = {k.removeprefix(BACKBONE): v.float() for k, v in convert_released(read_weights(path)[0]).items()}
    wrong = differences(model.backbone.vit.state_dict(), state).lines
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
    state, metadata = read_weights(path)
    if metadata.get("preset", preset_name) != preset_name:
        raise CheckpointError(
            f"weights file {path} was made for preset '{metadata['preset']}', not for '{preset_name}'; "
            "change the preset or the weights"
        )
    model = model_without_weights(config).to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()
    state = {k: v.float() if v.is_floating_point() else v for k, v in convert_released(state).items()}
    _fit(model, state, path)
    model.calibration = _calibration(metadata, path)
    return model.to(device).eval()


def model_without_weights(config: ModelConfig) -> PicoPose:
    """A network without memory for its weights."""
    with torch.device("meta"), _Undrawn():
        return PicoPose(config)


class _Undrawn(TorchFunctionMode):
    """Random numbers are not drawn for what has no memory: torch would import its compiler for that."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def save_model(
    model: PicoPose, path: str | Path, half: bool = False, metadata: dict[str, str] | None = None
) -> None:
    """Write weights atomically as safetensors, in fp16 where `half`; BatchNorm's statistics stay fp32."""
    path = Path(path)
    info = {**preset_metadata(model.config), **(metadata or {})}
    if model.calibration != (1.0, 0.0):
        info[CALIBRATION] = json.dumps(model.calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, packed_state(model.state_dict(), half), info)


def preset_metadata(config: ModelConfig) -> dict[str, str]:
    """Metadata that a weights file says its preset with."""
    return {"preset": config.name, "config": json.dumps(config.to_dict())}


def packed_state(state: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """The tensors as they are written."""
    packed = {}
    for key, value in state.items():
        if key.endswith(COUNTER):
            continue
        value = value.detach().cpu()
        if value.is_floating_point():
            # A variance may be smaller than fp16 can say.
            halved = half and not key.endswith(("running_mean", "running_var"))
            value = value.half() if halved else value.float()
        packed[key] = value.contiguous()
    return packed


def save_calibration(path: str | Path, slope: float, offset: float) -> None:
    """Keep a calibration of the confidence in a weights file; its tensors stay as they are.

    Raises:
        CheckpointError: the file can't be read, is no .safetensors file, or can't be written.
    """
    path = Path(path).expanduser()
    state, metadata = read_weights(path)
    if "preset" not in metadata:
        raise CheckpointError(f"weights file {path} is not one that this package wrote; convert it first")
    try:
        write_weights(path, state, {**metadata, CALIBRATION: json.dumps([slope, offset])})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights file {path} cannot be written: {error}") from error


def _calibration(metadata: dict[str, str], path: Path) -> tuple[float, float]:
    try:
        slope, offset = json.loads(metadata.get(CALIBRATION, "[1.0, 0.0]"))
        if not (0 < float(slope) < math.inf and math.isfinite(float(offset))):
            raise ValueError("numbers that can't be")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"weights file {path} has a calibration that can't be used ({metadata[CALIBRATION]!r}: "
            f"{error}); measure it again with picopose eval synthetic --calibrate"
        ) from error
    return float(slope), float(offset)


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file in one step; equal weights give equal bytes.

    Raises:
        OSError, SafetensorError: it can't be written; an old file is still there.
    """
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
        if key.endswith(COUNTER):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
