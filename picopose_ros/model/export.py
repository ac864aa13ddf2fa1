"""The network's parts as ONNX files, for ONNX Runtime, TensorRT and what else reads them.

The exporter traces the stages as they are arranged for inference (`FastStages`): the same parts, and nothing
that depends on a template alone is in the graphs of pairs. Every file has a batch of any size and is compared
with PyTorch as soon as it is written.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros import __version__
from picopose_ros.errors import ExportError
from picopose_ros.model.checkpoint import model_fingerprint
from picopose_ros.model.config import CROP_SIZE, GRIDS
from picopose_ros.model.fast import FastStages, Prepared, Refining, Schedule
from picopose_ros.model.network import PicoPose

OPSET = 20
"""ONNX operators' version: the first whose GridSample every provider agrees on."""
MANIFEST = "manifest.json"
PARTS = ("descriptors", "encoder", "template_parts", "affine", *(f"offsets{n}" for n in GRIDS))
"""Names of the files, in the order that they are used: the first one is for onboarding."""

ExportPrecision = Literal["fp32", "fp16"]

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest difference from PyTorch in fp32 that is taken for rounding, over the output's largest value."""


@dataclass(frozen=True)
class Difference:
    """How far an output of ONNX Runtime is from PyTorch's.

    Attributes:
        part, output: which one.
        largest: largest absolute difference.
        scale: largest absolute value of PyTorch's.
    """

    part: str
    output: str
    largest: float
    scale: float


def input_names(part: str, aligned: bool) -> list[str]:
    """Inputs of a part's graph.

    Args:
        part: one of `PARTS`.
        aligned: whether the preset's stage 3 refines what an affine leaves (`OffsetConfig.aligned`).
    """
    if part in ("descriptors", "encoder"):
        return ["crops"]
    if part == "template_parts":
        return [f"map{n}" for n in GRIDS]
    if part == "affine":
        return [
            "query_descriptors",
            "template_descriptors",
            "query_patches",
            "template_patches",
            "template_centres",
        ]
    state = ["template_patches"] if part == f"offsets{GRIDS[0]}" else ["flow", "certainty"]
    if part != f"offsets{GRIDS[0]}" and aligned:
        state.append("residual")
    return ["affines", *state, "query_map", "template_map", "template_part"]


def output_names(part: str, aligned: bool) -> list[str]:
    """Outputs of a part's graph; arguments as of `input_names`."""
    if part == "descriptors":
        return ["descriptors"]
    if part == "encoder":
        return ["descriptors", *(f"map{n}" for n in GRIDS)]
    if part == "template_parts":
        return [f"part{n}" for n in GRIDS]
    if part == "affine":
        return ["affines"]
    return ["flow_out", "certainty_out", *(["residual_out"] if aligned else [])]


class _Part(nn.Module):
    """A function of tensors as a module, in mixed precision where asked for."""

    def __init__(self, stages: FastStages, function: Callable[..., tuple[Tensor, ...]], half: bool) -> None:
        super().__init__()
        self.held = nn.ModuleList([stages.model, *stages.folded])  # whose weights become the graph's
        self._function = function
        self._half = half

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16, enabled=self._half):
            return tuple(output.float() for output in self._function(*inputs))


def part_functions(stages: FastStages) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Per part what it computes of its inputs (`input_names`), in PyTorch."""
    aligned = stages.model.offsets.aligned

    def encoder(crops: Tensor) -> tuple[Tensor, ...]:
        prepared = stages.query(stages.encode(crops))
        return prepared.descriptors, *prepared.maps

    def affine(
        query: Tensor, template: Tensor, query_patches: Tensor, template_patches: Tensor, centres: Tensor
    ) -> tuple[Tensor, ...]:
        pair = Prepared(query, ()), Prepared(template, ())
        return (stages.affine(*pair, query_patches, template_patches, centres),)

    def offsets(level: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(affines: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            *state, query, template, part = inputs
            before = Refining(affines, *state) if level else stages.start(affines, state[0])
            maps = [(), (), ()]
            places = [tuple(one if i == level else maps[i] for i in range(3)) for one in (query, template)]
            of_template = tuple(part if i == level else maps[i] for i in range(3))
            after = stages.refine(
                level, before, Prepared(query, places[0]), Prepared(template, places[1], of_template)
            )
            found = (after.flow, after.certainty)
            return (*found, after.residual) if aligned else found

        return run

    return {
        "descriptors": lambda crops: (stages.encode(crops).descriptors,),
        "encoder": encoder,
        "template_parts": lambda *maps: stages.parts(maps),
        "affine": affine,
        **{f"offsets{n}": offsets(level) for level, n in enumerate(GRIDS)},
    }


def export_onnx(
    model: PicoPose,
    folder: str | Path,
    precision: ExportPrecision = "fp32",
    parts: Sequence[str] = PARTS,
    tell: Callable[[Difference], None] | None = None,
) -> dict[str, Any]:
    """Write a network's parts as ONNX, each compared with PyTorch, and a manifest.

    Args:
        model: the network; it is brought to the CPU and into evaluation mode.
        folder: made where it isn't there; files of an earlier export are replaced, the manifest last.
        precision: what the graphs compute products in. Inputs and outputs are float32 in any case.
        parts: which of `PARTS`.
        tell: called with every output's difference.

    Returns:
        The manifest.

    Raises:
        ExportError: a package is missing, there is no such part, the folder can't be written, or ONNX
            Runtime says something else than PyTorch.
    """
    missing = [name for name in _PACKAGES if util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting the network needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ExportError(f"there is no part '{unknown[0]}' to export, choose among {', '.join(PARTS)}")
    folder = Path(folder)
    fingerprint = model_fingerprint(model)
    model = model.to("cpu").eval()
    lookups = model.config.offsets.lookup
    # How convolutions are computed is up to the runtime.
    schedule = Schedule(local_lookup="local" in lookups, winograd=False, packed=False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    aligned = model.offsets.aligned
    written: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.requires_grad_(False)
        stages = model.fast(schedule)
        functions = part_functions(stages)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            examples = _examples(functions)
            # The encoder first: the graph of the descriptors alone is a piece of its graph.
            for part in sorted(parts, key=lambda part: part != "encoder"):
                path = Path(scratch) / f"{part}.onnx"
                names, outputs = input_names(part, aligned), output_names(part, aligned)
                if part == "descriptors" and "encoder" in written:
                    _extract(Path(scratch) / "encoder.onnx", path, names, outputs)
                else:
                    module = _Part(stages, functions[part], half=precision == "fp16").eval()
                    _write(module, examples[part], path, names, outputs)
                function, inputs = functions[part], examples[part]
                written[part] = _checked(part, path, function, inputs, aligned, precision, tell)
            manifest = {
                "format": 1,
                "preset": model.config.name,
                "fingerprint": fingerprint,
                "precision": precision,
                "opset": OPSET,
                "crop_size": CROP_SIZE,
                "aligned": aligned,
                "versions": {
                    "picopose_ros": __version__,
                    **{name: metadata.version(name) for name in ("torch", *_PACKAGES)},
                },
                "parts": {part: written[part] for part in parts},
                "config": model.config.to_dict(),
            }
            (Path(scratch) / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (*(f"{part}.onnx" for part in parts), MANIFEST):
                os.replace(Path(scratch) / name, folder / name)
    except OSError as error:
        raise ExportError(f"folder {folder} can't be written: {error}") from error
    finally:
        for parameter, before in zip(model.parameters(), trained):
            parameter.requires_grad_(before)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        ExportError: there is none, or it can't be read.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != 1:
            raise ValueError(f"format {manifest['format']}")
        for key in ("fingerprint", "parts", "precision"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path} is not the manifest of an export ({error!r}): run picopose export {folder}"
        ) from error
    return manifest


def _examples(functions: dict[str, Callable[..., tuple[Tensor, ...]]]) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of every part for a batch of three, made of smooth noise."""
    generator = torch.Generator().manual_seed(0)
    count = 3
    coarse = torch.randn(2 * count, 3, 32, 32, generator=generator)
    crops = F.interpolate(coarse, size=CROP_SIZE, mode="bilinear")
    patches = torch.ones(count, *(GRIDS[0],) * 2)
    patches[:, :2] = 0
    with torch.inference_mode():
        descriptors, *maps = functions["encoder"](crops)
        template_maps = [level[count:] for level in maps]
        parts = functions["template_parts"](*template_maps)
        centres = torch.full((count, 2), CROP_SIZE / 2)
        examples: dict[str, tuple[Tensor, ...]] = {
            "descriptors": (crops[:count],),
            "encoder": (crops[:count],),
            "template_parts": tuple(template_maps),
            "affine": (descriptors[:count], descriptors[count:], patches, patches, centres),
        }
        # Not stage 2's of noise, which may be anything.
        affines = torch.eye(3).repeat(count, 1, 1)
        affines[:, 0, 1], affines[:, 1, 0] = -0.1, 0.1
        affines[:, :2, 2] = torch.tensor([3.3, -4.7])
        state: tuple[Tensor, ...] = (patches,)
        for n, query, template, part in zip(GRIDS, maps, template_maps, parts):
            inputs = (affines, *state, query[:count], template, part)
            examples[f"offsets{n}"] = inputs
            state = functions[f"offsets{n}"](*inputs)
    return {name: tuple(one.clone() for one in inputs) for name, inputs in examples.items()}


def _write(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str], outputs: list[str]
) -> None:
    """Export one graph with a batch of any size."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    noisy = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with torch.no_grad():
            torch.onnx.export(
                module,
                inputs,
                str(path),
                input_names=names,
                output_names=outputs,
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        for logger, level in zip(noisy, levels):
            logger.setLevel(level)


def _extract(source: Path, path: Path, names: list[str], outputs: list[str]) -> None:
    """Write the piece of a graph that some of its outputs need; to trace the network again takes as long."""
    import onnx
    from onnx.utils import Extractor

    onnx.save(Extractor(onnx.load(source)).extract_model(names, outputs), path)


def _checked(
    part: str,
    path: Path,
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    aligned: bool,
    precision: ExportPrecision,
    tell: Callable[[Difference], None] | None,
) -> dict[str, Any]:
    """Compare a file with PyTorch for batches of three and of one; what the manifest says of it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, outputs = input_names(part, aligned), output_names(part, aligned)
    worst = {name: Difference(part, name, -1.0, 0.0) for name in outputs}
    for count in (len(inputs[0]), 1):
        given = [one[:count] for one in inputs]
        with torch.inference_mode():
            expected = [one.numpy() for one in function(*given)]
        found = session.run(outputs, dict(zip(names, (one.numpy() for one in given))))
        for name, a, b in zip(outputs, expected, found):
            largest, scale = float(np.abs(a - b).max()), float(np.abs(a).max())
            if not largest <= worst[name].largest:
                worst[name] = Difference(part, name, largest, scale)
    for one in worst.values():
        if tell is not None:
            tell(one)
        if not one.largest <= _TOLERANCE[precision] * max(one.scale, 1e-6):
            raise ExportError(
                f"{part}: ONNX Runtime's {one.output} differs from PyTorch's by {one.largest:.3g} (largest "
                f"value {one.scale:.3g}); this pair of versions can't be used, try others of torch and onnx"
            )
    return {
        "file": path.name,
        "inputs": {name: ["batch", *one.shape[1:]] for name, one in zip(names, inputs)},
        "outputs": outputs,
        "largest_difference": {name: one.largest for name, one in worst.items()},
    }
