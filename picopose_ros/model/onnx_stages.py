"""Stages of the network in ONNX Runtime, and the rest in PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picopose_ros.errors import ConfigError, ExportError
from picopose_ros.model.checkpoint import model_fingerprint
from picopose_ros.model.config import GRIDS
from picopose_ros.model.export import PARTS, input_names, output_names, read_manifest
from picopose_ros.model.fast import FastStages, Prepared, Refining, Schedule
from picopose_ros.model.network import PicoPose

_log = logging.getLogger(__name__)

ONBOARDING = "descriptors"
"""The part that banks are made with."""
FASTER = {"cpu": ("encoder",), "cuda": tuple(part for part in PARTS if part != ONBOARDING)}
"""Other parts that ONNX Runtime computes, by device; on a CPU those that it was measured to be faster at."""


def onnx_providers(device: torch.device, engine_dir: Path) -> list[Any]:
    """ONNX Runtime's execution providers for a device, the preferred first.

    Args:
        device: a CPU or a CUDA device.
        engine_dir: where TensorRT keeps the engines that it builds.

    Raises:
        ConfigError: ONNX Runtime isn't installed, or its build knows no such device.
    """
    if util.find_spec("onnxruntime") is None:
        package = "onnxruntime" if device.type == "cpu" else "onnxruntime-gpu"
        raise ConfigError(
            f"backend is 'onnxruntime', which isn't installed: pip install {package} onnx onnxscript, or "
            "choose the backend 'torch'"
        )
    import onnxruntime

    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    there = onnxruntime.get_available_providers()
    index = device.index or 0
    providers: list[Any] = []
    if "TensorrtExecutionProvider" in there:
        engine_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "device_id": index,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(engine_dir),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(engine_dir),
            "trt_fp16_enable": False,  # the graph says what is computed in half precision
        }
        providers.append(("TensorrtExecutionProvider", options))
    if "CUDAExecutionProvider" in there:
        providers.append(("CUDAExecutionProvider", {"device_id": index}))
    if not providers:
        raise ConfigError(
            f"device is '{device}', but this build of ONNX Runtime knows only {', '.join(there)}: install "
            "onnxruntime-gpu in its place (on a Jetson NVIDIA's build, docs/jetson.md), or choose the device "
            "'cpu' or the backend 'torch'"
        )
    return [*providers, "CPUExecutionProvider"]


class OnnxParts:
    """Exported graphs in ONNX Runtime; tensors in, tensors out, on the network's device."""

    def __init__(self, model: PicoPose, folder: Path, parts: Collection[str], device: torch.device) -> None:
        """Open the graphs.

        Args:
            model: that they were made from.
            folder: of the export.
            parts: which of `PARTS`.
            device: where they run.

        Raises:
            ConfigError: as `onnx_providers`.
            ExportError: the export can't be used, or was made from other weights.
        """
        providers = onnx_providers(device, folder / "engines")
        manifest = read_manifest(folder)
        if manifest["fingerprint"] != model_fingerprint(model):
            raise ExportError(
                f"the export in {folder} was made from other weights (preset {manifest.get('preset')}): run "
                "picopose export again, with the same --preset and --weights"
            )
        absent = [part for part in parts if part not in manifest["parts"]]
        if absent:
            raise ExportError(f"the export in {folder} lacks {', '.join(absent)}: run picopose export again")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # PyTorch's number of threads; two pools that wait actively would take the cores from each other.
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._device = device
        self._aligned = model.offsets.aligned
        self._sessions = {}
        for part in parts:
            path = folder / manifest["parts"][part]["file"]
            try:
                self._sessions[part] = onnxruntime.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # ONNX Runtime's errors share no base class
                raise ExportError(f"{path} can't be opened by ONNX Runtime: {error}") from error
            used = self._sessions[part].get_providers()
            wanted = [one if isinstance(one, str) else one[0] for one in providers]
            if used[0] != wanted[0]:
                _log.warning("%s: ONNX Runtime runs on %s, %s failed to start", part, used[0], wanted[0])

    def __contains__(self, part: str) -> bool:
        return part in self._sessions

    def run(self, part: str, *inputs: Tensor) -> list[Tensor]:
        """The outputs of a part, in the order of `output_names`."""
        names, outputs = input_names(part, self._aligned), output_names(part, self._aligned)
        given = {name: _host(one) for name, one in zip(names, inputs, strict=True)}
        found = self._sessions[part].run(outputs, given)
        return [torch.from_numpy(one).to(self._device) for one in found]


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().contiguous().numpy()


class OnnxStages(FastStages):
    """`FastStages` with some parts in ONNX Runtime."""

    def __init__(self, model: PicoPose, parts: OnnxParts, schedule: Schedule | None = None) -> None:
        super().__init__(model, schedule)
        self._parts = parts

    def features(self, crops: Tensor) -> Prepared:
        if "encoder" not in self._parts:
            return super().features(crops)
        descriptors, *maps = self._parts.run("encoder", crops)
        return Prepared(descriptors, tuple(maps))

    def parts(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if "template_parts" not in self._parts:
            return super().parts(maps)
        return tuple(self._parts.run("template_parts", *maps))

    def affine(
        self,
        query: Prepared,
        template: Prepared,
        query_patches: Tensor,
        template_patches: Tensor,
        centre: Tensor,
    ) -> Tensor:
        if "affine" not in self._parts:
            return super().affine(query, template, query_patches, template_patches, centre)
        pair = query.descriptors, template.descriptors
        return self._parts.run("affine", *pair, query_patches, template_patches, centre)[0]

    def refine(self, level: int, state: Refining, query: Prepared, template: Prepared) -> Refining:
        part = f"offsets{GRIDS[level]}"
        if part not in self._parts:
            return super().refine(level, state, query, template)
        share = (template.parts or self.parts(template.maps))[level]
        before = [state.certainty[:, 0]] if level == 0 else [state.flow, state.certainty]
        if level and state.residual is not None:
            before.append(state.residual)
        maps = query.maps[level], template.maps[level]
        return Refining(state.affine, *self._parts.run(part, state.affine, *before, *maps, share))
