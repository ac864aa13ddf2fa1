"""The network's stages by the backend that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from picopose_ros import __version__
from picopose_ros.estimation.settings import Backend, Precision, resolve_precision
from picopose_ros.model import PicoPose, model_fingerprint
from picopose_ros.model.export import MANIFEST, export_onnx
from picopose_ros.model.fast import FastStages, Schedule
from picopose_ros.model.onnx_stages import FASTER, ONBOARDING, OnnxParts, OnnxStages, onnx_providers
from picopose_ros.templates.bank import default_cache_dir


def make_stages(
    model: PicoPose,
    device: torch.device,
    backend: Backend = "torch",
    onnx_dir: str = "",
    precision: Precision = "auto",
    schedule: Schedule | None = None,
) -> FastStages:
    """The stages of a network on ``device``.

    Args:
        model, device, backend, onnx_dir, precision, schedule: as for `Network`.

    Raises:
        ConfigError: ONNX Runtime isn't installed, or its build knows no such device.
        ExportError: the export can't be made or used.
    """
    if backend == "torch":
        return model.fast(schedule)
    return OnnxStages(model, _open(model, device, onnx_dir, precision, FASTER[device.type]), schedule)


def encode_by(
    model: PicoPose,
    device: torch.device,
    backend: Backend = "torch",
    onnx_dir: str = "",
    precision: Precision = "auto",
) -> None:
    """From now on onboard with this backend (`PicoPose.describer`); arguments as of `make_stages`.

    Raises:
        ConfigError, ExportError: as `make_stages`.
    """
    model.encoder = None
    if backend != "torch":
        parts = _open(model, device, onnx_dir, precision, [ONBOARDING])
        model.encoder = lambda crops: parts.run(ONBOARDING, crops)[0]


def _open(
    model: PicoPose, device: torch.device, onnx_dir: str, precision: Precision, parts: Sequence[str]
) -> OnnxParts:
    onnx_providers(device, Path())  # before the long work
    folder = Path(onnx_dir).expanduser() if onnx_dir else _exported(model, device, precision)
    return OnnxParts(model, folder, parts, device)


def _exported(model: PicoPose, device: torch.device, precision: Precision) -> Path:
    """The folder of the export in the cache, which is made if it isn't there."""
    # ONNX Runtime has no half precision worth the name on a CPU.
    half = device.type == "cuda" and resolve_precision(precision, device) == torch.float16
    kind = "fp16" if half else "fp32"
    made_by = f"{__version__}-torch{metadata.version('torch').split('+')[0]}"
    name = f"{model.config.name}-{model_fingerprint(model)[:16]}-{kind}-{made_by}"
    folder = default_cache_dir() / "onnx" / name
    if not (folder / MANIFEST).is_file():
        try:
            export_onnx(model, folder, kind, (ONBOARDING, *FASTER[device.type]))
        finally:
            model.to(device)
    return folder


