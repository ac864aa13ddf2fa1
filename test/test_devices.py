"""Another device than the CPU, without one: the stages on PyTorch's meta device, the host on a stand-in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from device_standin import DEVICE, DeviceStandIn

from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import make_transform
from picopose_ros.model import PRESETS, PicoPose, load_model, offsets
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import build_bank
from picopose_ros.templates.meshes import ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

PAIRS = 2


@pytest.fixture(scope="module", params=["tiny", "vits"])
def network(request: pytest.FixtureRequest) -> PicoPose:
    with torch.device("meta"):
        return PicoPose(PRESETS[request.param]).eval()


def test_every_stage_stays_on_its_device(network: PicoPose) -> None:
    """A CPU tensor that meets one of the meta device raises: constants, grids, masks made in the forward."""
    meta = {"device": "meta"}
    with torch.inference_mode():
        features = network.encode(torch.empty(PAIRS, 3, 224, 224, **meta))
        masks = torch.empty(PAIRS, 224, 224, **meta)
        bank = torch.empty(5, *features.descriptors.shape[1:], dtype=torch.float16, **meta)
        if not network.config.masked_matching:  # the masked matching picks patches, which needs data
            scores = network.match(features.descriptors, masks, bank, torch.empty(5, 224, 224, **meta))
            assert scores.shape == (PAIRS, 5) and scores.device.type == "meta"
        found = network.regress(features, features, masks, masks, torch.empty(PAIRS, 2, **meta))
    assert found.flow.shape == (PAIRS, 2, 64, 64) and found.flow.device.type == "meta"
    assert found.certainty.device.type == "meta"


def test_a_cpu_tensor_among_those_of_a_device_is_noticed(network: PicoPose) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError):
        features = network.encode(torch.empty(PAIRS, 3, 224, 224, device="meta"))
        masks = torch.empty(PAIRS, 224, 224, device="meta")
        network.regress(features, features, masks, masks, torch.zeros(PAIRS, 2))


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    host = torch.arange(4.0)
    with DeviceStandIn():
        there = host.to(DEVICE)
        assert (there.device, host.device) == (DEVICE, torch.device("cpu"))
        assert (2 * there + torch.tensor(1.0)).device == DEVICE
        assert torch.zeros(3, device=there.device).device == DEVICE
        assert there[torch.tensor([1, 2])].device == DEVICE
        for mixed in (lambda: there + host, lambda: torch.stack([host, there]), lambda: there @ host):
            with pytest.raises(RuntimeError, match="all must be on one device"):
                mixed()
        for read in (lambda: there.numpy(), lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="bring it to the host first"):
                read()
        np.testing.assert_array_equal(there.cpu().numpy(), [0, 1, 2, 3])
        np.testing.assert_array_equal(there.to("cpu") + host, [0, 2, 4, 6])
        assert there.tolist() == [0, 1, 2, 3]
    assert (there + host).tolist() == [0, 2, 4, 6]


def test_the_estimator_and_refinement_bring_to_the_host_what_the_host_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a picture to its poses, once on the CPU and once on the stand-in: the poses are the same."""
    # What is for CPUs alone goes the accelerator's way: the stand-in says that it is one.
    monkeypatch.setattr(
        offsets._SparseDots,
        "apply",
        lambda rows, table, index: (F.embedding(index, table) @ rows[:, :, None])[..., 0],
    )
    trimesh.creation.box((0.1, 0.07, 0.05)).export(tmp_path / "box.ply")
    mesh = load_object(ObjectSpec("box", tmp_path / "box.ply"))
    model = load_model("tiny")
    bank = build_bank(mesh, model, 42)
    truth = make_transform(cv2.Rodrigues(np.array([0.5, 0.6, 0.1]))[0], np.array([0.02, 0.0, 0.6]))
    K = np.array([[600.0, 0, 319.5], [0, 600, 239.5], [0, 0, 1]])
    with MeshRenderer(antialias=True, shading="auto") as renderer:
        view = renderer.render(mesh, truth, K, 640, 480)
    asked = EstimatorSettings(hypotheses=3, prune=1, refinements=1, precision="fp32")
    found = []
    for device in (torch.device("cpu"), DEVICE):
        with DeviceStandIn() if device == DEVICE else contextlib.nullcontext() as standin:
            if standin is not None:
                standin.take([*model.parameters(), *model.buffers()])
            estimator = PoseEstimator(model, {"box": bank}, asked, device)
            if standin is not None:  # making a parameter of a tensor hides where it came from
                standin.take(p for part in estimator._network._stages.folded for p in part.parameters())
            result = estimator.estimate(view.rgb, CameraModel(K, 640, 480), [Segment("box", 1.0, view.mask)])
            assert standin is None or standin.taken > 1000
        assert len(result.poses) == 1, result.failures
        found.append(result.poses[0])
    np.testing.assert_allclose(found[1].T_cam_obj, found[0].T_cam_obj, atol=1e-4)
    assert found[1].refinements == 1
