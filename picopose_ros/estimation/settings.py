"""How poses are computed: the estimator's settings, its precision and its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from picopose_ros.errors import ConfigError
from picopose_ros.geometry.correspondences import DecodeMode

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""What the network computes in; see `resolve_precision`."""

MOST_REFINEMENTS = 8
"""Rounds of refinement beyond which nothing was ever gained."""

Backend = Literal["torch", "onnxruntime"]
"""What runs the network; see `EstimatorSettings`."""


@dataclass(frozen=True)
class EstimatorSettings:
    """How poses are computed.

    Attributes:
        hypotheses: templates tried per segment. More than two found no better poses, refined or not
            (docs/performance.md); without reranking (``vitl``) the paper's five do.
        decode: ``subpixel``, or ``reference`` for the released network's decode, PnP and choice.
        ransac_threshold_px: largest reprojection error of an inlier in *crop* pixels, because that is what
            the network's errors scale with; ``reference`` always takes 2 image pixels.
        ransac_iterations: most RANSAC draws; ``reference`` always takes 150.
        correlated_pairs: this many correspondences have a common error and count as one measurement in the
            covariance; measured with the tiny preset on the demo and on synthetic scenes (docs/poses.md),
            depth bias included.
        rerank: this many of the best matching templates are ordered by how well their matches agree on one
            motion (`match_agreement`) before the hypotheses are taken; 0: by the match score alone, as in
            the paper. Only used with presets whose stage 2 starts from such a motion.
        border_crops: a segment at the image's border is also tried in crops that reach out of the image; the
            one that matches a template best is used. Only with the presets of ``rerank``, and not with the
            decode ``reference``.
        refinements: most rounds of refinement (`picopose_ros.estimation.refine`), 0 to 8; none with the
            decode ``reference``. Not in the paper, which refines with MegaPose's network.
        min_mask_pixels: segments with fewer visible pixels are skipped.
        max_batch: most crops or hypotheses that go through the network at once.
        template_cache_mb: memory for the features of recently used templates (stages 2 and 3).
        precision: what the network computes in: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        prune: number of hypotheses per segment that go through the last grid of stage 3, chosen after the
            coarser grids; 0: all of them.
        compile: a backend of `torch.compile` (``inductor``, ``cudagraphs``) for the network, or "" for none.
            Batches are filled up to the sizes that :meth:`PoseEstimator.warm_up` compiles in minutes.
        backend: what runs the network: ``torch``, or ``onnxruntime`` for the parts that it is faster at on
            the device, if it is installed.
        onnx_dir: for ``onnxruntime``, a folder written by ``picopose export`` for this preset and weights; ""
            exports into the user's cache folder when it is first needed.
        keep_background: leave the pixels around a segment as they are, also where the preset blacks them out.
    """

    hypotheses: int = 2
    decode: DecodeMode = "subpixel"
    ransac_threshold_px: float = 4.0
    ransac_iterations: int = 1000
    correlated_pairs: float = 780.0
    rerank: int = 32
    border_crops: bool = True
    refinements: int = 2
    min_mask_pixels: int = 32
    max_batch: int = 16
    template_cache_mb: int = 512
    precision: Precision = "auto"
    prune: int = 0
    compile: str = ""
    backend: Backend = "torch"
    onnx_dir: str = ""
    keep_background: bool = False

    def __post_init__(self) -> None:
        for name in ("hypotheses", "ransac_iterations", "min_mask_pixels", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("ransac_threshold_px", "correlated_pairs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be positive")
        for name in ("template_cache_mb", "prune", "rerank"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must not be negative")
        if not 0 <= self.refinements <= MOST_REFINEMENTS:
            raise ConfigError(f"refinements is {self.refinements}, it must be 0 to {MOST_REFINEMENTS}")
        resolve_precision(self.precision, torch.device("cpu"))
        if self.compile and self.compile not in torch._dynamo.list_backends(()):
            known = ", ".join(torch._dynamo.list_backends())
            raise ConfigError(f"compile is '{self.compile}', choose one of {known}, or '' for none")
        if self.backend not in get_args(Backend):
            raise ConfigError(f"backend is '{self.backend}', choose one of {', '.join(get_args(Backend))}")
        if self.compile and self.backend != "torch":
            raise ConfigError(f"compile is '{self.compile}', which only goes with the backend 'torch'")
        if self.decode not in ("reference", "subpixel"):
            raise ConfigError(f"decode is '{self.decode}', choose 'subpixel' or 'reference'")


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in.

    ``auto`` is fp16 on CUDA, bf16 on a CPU with instructions for it (AMX, AVX512_BF16; without them fp32 is
    faster), and fp32 elsewhere.

    Raises:
        ConfigError: there is no such precision.
    """
    if name not in get_args(Precision):
        raise ConfigError(f"precision is '{name}', choose one of {', '.join(get_args(Precision))}")
    # PyTorch's attention in bf16 fails where the processor has AMX that PyTorch was told not to use.
    units = device.type == "cpu" and _cpu_has("amx_tile")
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        instructions = device.type == "cpu" and (units or _cpu_has("avx512_bf16"))
        return torch.bfloat16 if instructions and allowed else torch.float32
    if name == "bf16" and units and not allowed:
        raise ConfigError("precision is 'bf16', which ATEN_CPU_CAPABILITY forbids: unset it or take 'fp32'")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cpu_has(instructions: str) -> bool:
    """Whether PyTorch knows that the processor has some instructions; older versions can't tell of all."""
    return getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)()


def torch_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' doesn't exist; choose cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device '{name}' isn't there: PyTorch sees {count} CUDA devices; choose cpu")
    return device
