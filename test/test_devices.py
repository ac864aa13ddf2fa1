"""Another device than the CPU, without one: the stages on PyTorch's meta device, the host on a stand-in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device_standin import DEVICE, DeviceStandIn

from picopose_ros.model import PRESETS, PicoPose

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
