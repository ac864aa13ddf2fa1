"""Published weights to a file that this package reads fast and without PyTorch's pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from picopose_ros.errors import CheckpointError
from picopose_ros.model.checkpoint import (
    CALIBRATION,
    differences,
    model_without_weights,
    packed_state,
    preset_metadata,
    read_weights,
    write_weights,
)
from picopose_ros.model.config import preset
from picopose_ros.model.released_keys import BACKBONE, convert_released, own_key


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
    state, metadata = read_weights(source)
    if metadata.get("preset", config.name) != config.name:
        raise CheckpointError(
            f"weights file {source} was made for preset '{metadata['preset']}', not for '{config.name}'; "
            f"convert it with --preset {metadata['preset']}"
        )
    converted = convert_released(state)
    wanted = model_without_weights(config).state_dict()
    part = "network"
    if not any(key in wanted and not key.startswith(BACKBONE) for key in converted):
        part = "backbone"
        wanted = {key: value for key, value in wanted.items() if key.startswith(BACKBONE)}
    found = differences(wanted, converted)
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
    packed = packed_state({key: converted[key] for key in wanted if key in converted}, half)
    endless = [key for key, value in packed.items() if not torch.isfinite(value).all()]
    if endless:
        raise CheckpointError(
            f"weights file {source} has tensors that are not finite{' in fp16' if half else ''}, nothing was "
            "written:\n" + "\n".join(endless)
        )
    source_sha256 = _sha256(source)
    info = {
        **preset_metadata(config),
        "part": part,
        "source": source.name,
        "source_sha256": source_sha256,
        "tensors_sha256": _tensors_sha256(packed),
        **{key: value for key, value in metadata.items() if key == CALIBRATION},
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_weights(target, packed, info)
        sha256 = _sha256(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights file {target} cannot be written: {error}") from error
    dropped = [key for key in state if own_key(key) is None]
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
