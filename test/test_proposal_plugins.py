"""Sam, Sam 2 and FastSAM through the packages' own networks and interfaces, small and with random weights.

None of the packages is installed with this one. ``make plugins`` installs them apart and runs these tests.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picopose_ros.errors import ConfigError
from picopose_ros.model import PRESETS  # declares torchvision's operators where its build lacks them
from picopose_ros.segmentation.proposals import Picture, SourceOptions, check_proposals, proposal_source

SIZE = 120, 160
assert PRESETS


@pytest.fixture(scope="module")
def picture() -> Picture:
    rgb = np.full((*SIZE, 3), 120, np.uint8)
    rgb[30:70, 20:55] = 200, 40, 30
    rgb[45:75, 90:135] = 30, 160, 60
    return Picture(rgb)


@pytest.fixture(autouse=True)
def suppression(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's suppression of doubles, where its build has no operators for this build of torch."""
    boxes = pytest.importorskip("torchvision.ops.boxes")
    from torchvision.extension import _has_ops

    if _has_ops():
        return

    def nms(corners: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        overlap, kept = boxes.box_iou(corners, corners), []
        for row in scores.argsort(descending=True).tolist():
            if not kept or overlap[row, kept].max() <= iou_threshold:
                kept.append(row)
        return torch.tensor(kept, dtype=torch.long)

    for module in (boxes, sys.modules["torchvision.ops"]):
        monkeypatch.setattr(module, "nms", nms)


def all_kept(kind: type, points: int = 4) -> Any:
    """A mask generator that asks at few points and keeps what an untrained network is unsure of."""
    return partial(kind, points_per_side=points, pred_iou_thresh=0.0, stability_score_thresh=0.0)


def check(masks: list[np.ndarray], picture: Picture) -> None:
    good, wrong = check_proposals(masks, picture.rgb)
    assert good and wrong == ""
    assert all(mask.shape == SIZE and mask.dtype == bool for mask in masks)


def test_sam(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("segment_anything", reason="segment-anything is not installed")
    # Its smallest network is large; one of the same interface with two small blocks is enough here.
    from segment_anything.build_sam import _build_sam

    def build_tiny(checkpoint: str | None = None) -> torch.nn.Module:
        return _build_sam(
            encoder_embed_dim=32,
            encoder_depth=2,
            encoder_num_heads=2,
            encoder_global_attn_indexes=[],
            checkpoint=checkpoint,
        )

    monkeypatch.setitem(package.sam_model_registry, "tiny", build_tiny)
    kind = package.SamAutomaticMaskGenerator
    monkeypatch.setattr(package, "SamAutomaticMaskGenerator", all_kept(kind))
    torch.manual_seed(0)
    weights = tmp_path / "sam.pth"
    torch.save(build_tiny().state_dict(), weights)
    source = proposal_source("sam", SourceOptions(weights, "tiny"))
    check(source(picture), picture)
    with pytest.raises(ConfigError, match="no weights of SAM's model 'vit_b'"):
        proposal_source("sam", SourceOptions(weights, "vit_b"))
    with pytest.raises(ConfigError, match="SAM has no model 'vit_x'"):
        proposal_source("sam", SourceOptions(weights, "vit_x"))


def test_sam2(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("sam2", reason="sam2 is not installed")
    from hydra import initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from sam2 import automatic_mask_generator
    from sam2.build_sam import build_sam2

    own = Path(package.__path__[0]) / "configs/sam2.1/sam2.1_hiera_t.yaml"
    text = own.read_text()
    for what, instead in {
        "embed_dim: 96": "embed_dim: 8",
        "stages: [1, 2, 7, 2]": "stages: [1, 1, 1, 1]",
        "global_att_blocks: [5, 7, 9]": "global_att_blocks: []",
        "[768, 384, 192, 96]": "[64, 32, 16, 8]",
        "num_layers: 4": "num_layers: 1",
    }.items():
        assert what in text
        text = text.replace(what, instead)
    (tmp_path / "small.yaml").write_text(text)
    monkeypatch.setattr(
        automatic_mask_generator,
        "SAM2AutomaticMaskGenerator",
        all_kept(automatic_mask_generator.SAM2AutomaticMaskGenerator),
    )
    GlobalHydra.instance().clear()
    try:
        initialize_config_dir(str(tmp_path), version_base="1.2")
        torch.manual_seed(0)
        network, weights = build_sam2("small.yaml", device="cpu"), tmp_path / "sam2.pt"
        torch.save({"model": network.state_dict()}, weights)
        source = proposal_source("sam2", SourceOptions(weights, "small.yaml"))
        check(source(picture), picture)
        with pytest.raises(ConfigError, match="no weights of SAM 2's model 'none.yaml'"):
            proposal_source("sam2", SourceOptions(weights, "none.yaml"))
        torch.save({"model": {"another": torch.zeros(1)}}, weights)
        with pytest.raises(ConfigError, match="no weights of SAM 2's model 'small.yaml'"):
            proposal_source("sam2", SourceOptions(weights, "small.yaml"))
    finally:
        GlobalHydra.instance().clear()
        initialize_config_module("sam2", version_base="1.2")


def test_fastsam(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    torch.manual_seed(0)
    network = ultralytics.YOLO("yolov8n-seg.yaml")
    for branch in network.model.model[-1].cv3:  # sure that there is something everywhere
        torch.nn.init.constant_(branch[-1].bias, 4.0)
    weights = tmp_path / "FastSAM-s.pt"
    network.save(weights)
    check(proposal_source("fastsam", SourceOptions(weights))(picture), picture)
    empty = ultralytics.YOLO("yolov8n-seg.yaml")
    empty.save(weights)
    assert proposal_source("fastsam", SourceOptions(weights))(picture) == []

    for wrong in ({"another": torch.zeros(1)}, ultralytics.YOLO("yolov8n-cls.yaml")):
        if isinstance(wrong, dict):
            torch.save(wrong, weights)
        else:
            wrong.save(weights)
        with pytest.raises(ConfigError, match="no weights of FastSAM"):
            proposal_source("fastsam", SourceOptions(weights))
