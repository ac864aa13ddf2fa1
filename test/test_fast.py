"""What is done to be fast changes nothing, or what it says it changes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch._dynamo
import trimesh
from parity import parity_model

from picopose_ros.errors import ConfigError
from picopose_ros.estimator import EstimatorSettings, Hypothesis, PoseEstimator, resolve_precision
from picopose_ros.evaluation.released_schedule import ReleasedEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import make_transform, rotation_angle_deg
from picopose_ros.model import load_model
from picopose_ros.model.fast import Schedule
from picopose_ros.model.matching import bank_scores, match_scores_masked, match_scores_released
from picopose_ros.model.packed import PackedConv
from picopose_ros.model.winograd import WinogradConv
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank, build_bank
from picopose_ros.templates.meshes import ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

SIZE = (640, 480)
K = np.array([[600.0, 0, 325], [0, 605, 238], [0, 0, 1]])
CAMERA = CameraModel(K, *SIZE)


class World:
    """Two objects, three segments of them in one picture, banks for two networks."""

    def __init__(self, folder: Path) -> None:
        self.tiny = load_model("tiny")
        self.vits = parity_model()
        self.banks: dict[str, TemplateBank] = {}
        meshes = {}
        for name, extents in {"brick": (0.06, 0.08, 0.11), "bar": (0.03, 0.04, 0.14)}.items():
            mesh = trimesh.creation.box(extents).subdivide().subdivide()
            colours = np.random.default_rng(len(name)).integers(0, 255, (len(mesh.vertices), 3))
            mesh.visual.vertex_colors = np.c_[colours, np.full(len(colours), 255)].astype(np.uint8)
            mesh.export(folder / f"{name}.ply")
            meshes[name] = load_object(ObjectSpec(name, folder / f"{name}.ply"))
            self.banks[name] = build_bank(meshes[name], self.tiny, 42)
        placed = [
            ("brick", make_transform(turn((0.4, -0.8, 0.5)), (-0.12, 0.02, 0.5))),
            ("bar", make_transform(turn((-1.2, 0.3, 0.1)), (0.02, -0.06, 0.5))),
            ("brick", make_transform(turn((2.0, 0.5, -0.7)), (0.15, 0.06, 0.6))),
        ]
        with MeshRenderer() as renderer:
            self.rgb = renderer.render_scene([(meshes[n], T) for n, T in placed], K, *SIZE).rgb
            self.segments = [
                Segment(n, 1.0, renderer.render(meshes[n], T, K, *SIZE).mask) for n, T in placed
            ]
        self.vits_banks = {}
        for name, bank in self.banks.items():
            few = bank.select(range(0, 40, 8))
            with torch.inference_mode():
                descriptors = self.vits.encode(few.crops(range(5))).descriptors
            self.vits_banks[name] = replace(few, descriptors=descriptors.half().numpy())

    def make(self, kind: type[PoseEstimator], preset: str, schedule: Schedule | None = None, **settings):
        """An estimator, in fp32 unless said: what "auto" means depends on the processor."""
        model, banks = (self.tiny, self.banks) if preset == "tiny" else (self.vits, self.vits_banks)
        options = {} if schedule is None else {"schedule": schedule}
        settings = {"precision": "fp32", "refinements": 0, **settings}
        return kind(model, banks, EstimatorSettings(**settings), **options)


def turn(vector: tuple[float, float, float]) -> np.ndarray:
    return cv2.Rodrigues(np.array(vector))[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fast"))


def hypotheses(
    estimator: PoseEstimator, world: World, which: slice = slice(None), **options
) -> list[list[Hypothesis]]:
    """Per segment, what the network says, best match first."""
    queries, skipped = estimator._crop(world.rgb, world.segments[which])
    assert not skipped
    with torch.inference_mode():
        encoded = estimator._encode(queries)
        queries, encoded, chosen = estimator._retrieve(queries, encoded)
        found = dict(estimator._regress(queries, encoded, chosen, **options))
    return [[found[i] for i, choice in enumerate(chosen) if choice[0] == row] for row in range(len(queries))]


def assert_equal(a: list[list[Hypothesis]], b: list[list[Hypothesis]], rtol: float = 1e-4) -> None:
    """The same templates, and all maps within the parity tests' tolerance of their scale.

    But for a hundredth of the cells, ten times that: where several places match equally well, rounding counts
    for more, how much is up to the weights.
    """
    for own, others in zip(a, b, strict=True):
        assert [h.template for h in own] == [h.template for h in others]
        for one, other in zip(own, others):
            assert one.match_score == pytest.approx(other.match_score, rel=rtol)
            for name in ("affine", "flow", "certainty"):
                x, y = getattr(one, name), getattr(other, name)
                off, scale = np.abs(x - y), np.abs(y).max()
                assert np.quantile(off, 0.99) <= rtol * scale and off.max() <= 10 * rtol * scale, name


@pytest.fixture(scope="module")
def released(world: World) -> dict[str, list[list[Hypothesis]]]:
    return {
        "vits": hypotheses(world.make(ReleasedEstimator, "vits", hypotheses=2, rerank=0), world, slice(0, 2)),
        "tiny": hypotheses(world.make(ReleasedEstimator, "tiny", hypotheses=2, rerank=0), world),
    }


@pytest.mark.parametrize("preset", ["vits", "tiny"])
def test_all_that_is_fast_equals_the_released_schedule(world, released, preset):
    segments = slice(0, len(released[preset]))
    fast = world.make(PoseEstimator, preset, hypotheses=2, rerank=0, precision="fp32")
    first = hypotheses(fast, world, segments)
    assert_equal(first, released[preset])
    # Now from memory; and a segment alone says what it says among others.
    assert_equal(hypotheses(fast, world, slice(1, 2)), first[1:2], 1e-5)


def test_poses_are_those_of_the_released_schedule(world):
    a, b = (
        world.make(kind, "tiny", hypotheses=3, rerank=0).estimate(world.rgb, CAMERA, world.segments)
        for kind in (ReleasedEstimator, PoseEstimator)
    )
    assert [p.segment for p in a.poses] == [p.segment for p in b.poses] == [0, 1, 2]
    for one, other in zip(a.poses, b.poses):
        assert (one.source, one.template) == (other.source, other.template)
        np.testing.assert_allclose(one.T_cam_obj, other.T_cam_obj, atol=1e-4)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-3)
    assert set(a.timings) == set(b.timings)


@pytest.mark.parametrize("preset", ["vits", "tiny"])
@pytest.mark.parametrize("name", [field.name for field in fields(Schedule)])
def test_each_way_of_being_fast_can_be_left_out(world, released, preset, name):
    schedule = replace(Schedule(), **{name: False})
    fast = world.make(PoseEstimator, preset, schedule, hypotheses=1, rerank=0, precision="fp32")
    assert_equal(hypotheses(fast, world, slice(0, 1)), [released[preset][0][:1]])



def test_memory_for_templates_is_bounded_and_changes_nothing(world, released):
    wide = world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0)
    narrow = world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0, template_cache_mb=2)
    none = world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0, template_cache_mb=0)
    for estimator, most in ((wide, 512), (narrow, 2), (none, 0)):
        for _ in range(2):
            assert_equal(hypotheses(estimator, world), released["tiny"])
            assert estimator.resident_bytes()["cache"] <= most * 2**20
    sizes = [estimator.resident_bytes()["cache"] for estimator in (wide, narrow, none)]
    assert sizes[0] > sizes[1] > sizes[2] == 0
    bank = world.banks["brick"]
    assert wide.resident_bytes()["descriptors"] == 2 * bank.descriptors.nbytes


def test_other_objects_keep_what_is_known_of_those_that_stay(world, released):
    estimator = world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0)
    hypotheses(estimator, world)
    before = estimator.resident_bytes()["cache"]
    fewer = estimator.with_banks({"bar": world.banks["bar"]}, {"7": "bar"})
    assert 0 < fewer.resident_bytes()["cache"] < before == estimator.resident_bytes()["cache"]
    segments = [*world.segments[:2], replace(world.segments[1], class_id="7")]
    result = fewer.estimate(world.rgb, CAMERA, segments)
    assert [p.segment for p in result.poses] == [1, 2] and [i for i, _ in result.skipped] == [0]
    again = fewer.with_banks({"bar": replace(world.banks["bar"]), "brick": world.banks["brick"]})
    assert again.resident_bytes()["cache"] == 0, "a new bank of a known name is another one"
    assert_equal(hypotheses(again, world), released["tiny"])


@pytest.mark.parametrize("trace", [False, True])
def test_only_the_promising_reach_the_last_grid(world, trace):
    full = world.make(PoseEstimator, "tiny", hypotheses=4, rerank=0)
    every = hypotheses(full, world, trace=trace)
    some = hypotheses(full, world, trace=trace, keep=2)
    for own, others in zip(some, every):
        assert [h.template for h in own] == [h.template for h in others]
        assert sum(h.pruned for h in own) == 2 and not any(h.pruned for h in others)
        for one, other in zip(own, others):
            assert one.flow.shape == (2, 64, 64) and one.certainty.shape == (64, 64)
            assert len(one.coarse) == (2 if trace else 0)
            if not one.pruned:
                assert_equal([[one]], [[other]])
            elif trace:  # the grid before, enlarged: fine indices are twice the coarse, and a half
                mean = one.flow.reshape(2, 32, 2, 32, 2).mean((2, 4))
                assert np.abs(np.median(mean - (2 * one.coarse[-1][0] - 0.5), (1, 2))).max() < 0.05
            for (f, c), (g, d) in zip(one.coarse, other.coarse):
                np.testing.assert_allclose(f, g, atol=1e-3)
                np.testing.assert_allclose(c, d, atol=1e-3)
    # Asked for more than there are, nothing is given up.
    assert_equal(hypotheses(full, world, keep=9), every)


def test_poses_come_from_hypotheses_that_reached_the_last_grid(world):
    full, pruned = (
        world.make(PoseEstimator, "tiny", hypotheses=4, rerank=0, prune=prune) for prune in (0, 1)
    )
    plain = pruned.estimate(world.rgb, CAMERA, world.segments)
    traced = pruned.estimate(world.rgb, CAMERA, world.segments, trace=True)
    every = full.estimate(world.rgb, CAMERA, world.segments, trace=True)
    for pose, trace, all_of_it in zip(plain.poses, traced.traces, every.traces):
        (kept,) = [h for h in trace.hypotheses if not h.hypothesis.pruned]
        assert pose.template == kept.hypothesis.template and pose.source == "offsets"
        np.testing.assert_array_equal(pose.T_cam_obj, trace.answers[-1].T_cam_obj)
        (same,) = [h for h in all_of_it.hypotheses if h.hypothesis.template == pose.template]
        np.testing.assert_allclose(pose.T_cam_obj, same.T_offsets, atol=1e-4)
        assert all(h.T_offsets is None for h in trace.hypotheses if h.hypothesis.pruned)


# -- the image's border ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", range(4))
def test_what_the_border_cuts_is_tried_in_crops_that_reach_out(world, side):
    """Half of a brick is outside the image: the crop is of more than what is seen, and the pose is right."""
    number, T = 2, make_transform(turn((2.0, 0.5, -0.7)), (0.15, 0.06, 0.6))
    mask = world.segments[number].mask
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    (left, top), (right, bottom) = ((i, j) for i, j in zip(columns[[0, -1]], rows[[0, -1]]))
    middle = int(0.55 * left + 0.45 * right), int(0.55 * top + 0.45 * bottom)
    x0, y0, x1, y1 = 0, 0, *SIZE
    if side < 2:
        x0, x1 = ((middle[0], x1), (x0, left + right - middle[0]))[side]
    else:
        y0, y1 = ((middle[1], y1), (y0, top + bottom - middle[1]))[side - 2]
    shifted = K - np.array([[0, 0, x0], [0, 0, y0], [0, 0, 0]])
    camera = CameraModel(shifted, x1 - x0, y1 - y0)
    rgb, cut = world.rgb[y0:y1, x0:x1], Segment("brick", 1.0, mask[y0:y1, x0:x1])

    def found(**settings):
        estimator = world.make(PoseEstimator, "tiny", hypotheses=2, refinements=2, **settings)
        result = estimator.estimate(rgb, camera, [cut, cut], trace=True)
        assert [pose.segment for pose in result.poses] == [0, 1]
        boxes = [trace.query.box for trace in result.traces]
        assert boxes[0] == boxes[1]
        low, high = np.array([boxes[0].left, boxes[0].top]), [camera.width, camera.height]
        return result.poses[0], np.stack([low < 0, low + boxes[0].side > high], 1).ravel()

    pose, out = found()
    assert out[side] and sum(out) == 1
    assert rotation_angle_deg(pose.T_cam_obj[:3, :3], T[:3, :3]) < 5
    assert np.linalg.norm(pose.T_cam_obj[:3, 3] - T[:3, 3]) < 0.02
    for as_released in ({"border_crops": False}, {"decode": "reference"}):
        assert not found(**as_released)[1].any()


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(world, precision):
    amx_forbidden = torch.cpu._is_amx_tile_supported() and torch.backends.cpu.get_cpu_capability() != "AVX512"
    if precision == "bf16" and amx_forbidden:  # PyTorch's attention fails there, so it is refused
        with pytest.raises(ConfigError, match="ATEN_CPU_CAPABILITY"):
            EstimatorSettings(precision=precision)
        return
    full, half = (
        world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0, precision=p) for p in ("fp32", precision)
    )
    a, b = (estimator.estimate(world.rgb, CAMERA, world.segments) for estimator in (full, half))
    assert [p.segment for p in b.poses] == [0, 1, 2]
    for one, other in zip(a.poses, b.poses):
        if one.template == other.template:  # near ties may be broken otherwise
            assert rotation_angle_deg(one.T_cam_obj[:3, :3], other.T_cam_obj[:3, :3]) < 5
        assert abs(one.confidence - other.confidence) < 0.1
    # It does compute in that type: what is remembered of templates takes half of the memory.
    ratio = half.resident_bytes()["cache"] / full.resident_bytes()["cache"]
    assert ratio < 0.75


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("DEFAULT", torch.float32)])
def test_bf16_needs_what_pytorch_may_use_of_the_processor(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert resolve_precision("auto", torch.device("cpu")) == dtype
    if dtype == torch.float32:
        with pytest.raises(ConfigError, match="forbids: unset it"):
            resolve_precision("bf16", torch.device("cpu"))


@pytest.mark.parametrize(("there", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_instructions_for_bf16_are_used_without_matrix_units(monkeypatch, there, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert resolve_precision("auto", torch.device("cpu")) == dtype
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32


def test_precision_suits_the_device(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert resolve_precision("auto", torch.device("cuda")) == torch.float16
    assert resolve_precision("bf16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="precision is 'int8'"):
        EstimatorSettings(precision="int8")
    with pytest.raises(ConfigError, match="prune"):
        EstimatorSettings(prune=-1)


# -- compilation -----------------------------------------------------------------------------------


def counting(count: list) -> str:
    """The name of a backend that only records and replays, for the code generators take minutes."""

    def backend(graph, inputs):
        count.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, f"count{id(count)}")
    return f"count{id(count)}"


def test_a_compiled_network_says_the_same(world, released):
    count: list = []
    options = {"hypotheses": 1, "rerank": 0, "precision": "fp32", "compile": counting(count)}
    # Three crops and three pairs, each filled up to four.
    compiled = world.make(PoseEstimator, "tiny", max_batch=4, **options)
    assert_equal(hypotheses(compiled, world), [own[:1] for own in released["tiny"]])
    assert len(count) > 0


def test_once_warm_nothing_is_compiled_any_more(world, released):
    count: list = []
    options = {"hypotheses": 2, "rerank": 0, "compile": counting(count)}
    estimator = world.make(PoseEstimator, "tiny", max_batch=1, **options)
    estimator.warm_up()
    before = len(count)
    assert before > 0
    assert_equal(hypotheses(estimator, world), released["tiny"])
    assert len(count) == before


def test_only_what_is_compiled_is_warmed_up_in_every_size(world, monkeypatch):
    estimator = world.make(PoseEstimator, "tiny", max_batch=4)
    network, sizes = estimator._network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda crops: (sizes.append(len(crops)), encode(crops))[1])
    estimator.warm_up()
    assert sizes == [1]
    network.compiles = True
    estimator.warm_up()
    assert sizes[1:] == [1, 2, 4]


def test_where_it_cannot_be_compiled_it_goes_on_with_a_warning(world, released, caplog):
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.register_backend(broken, "broken")
    estimator = world.make(PoseEstimator, "tiny", hypotheses=2, rerank=0, compile="broken")
    assert_equal(hypotheses(estimator, world, slice(0, 1)), released["tiny"][:1])
    assert "can't be compiled by 'broken'" in caplog.text and "g++" in caplog.text
    with pytest.raises(ConfigError, match="compile is 'abacus'.*inductor"):
        EstimatorSettings(compile="abacus")


# -- stage 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts_at_zero", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.6, 1.0])
def test_one_product_gives_the_scores_of_all_crops(starts_at_zero, share):
    generator = torch.Generator().manual_seed(3)

    def unit(count: int) -> torch.Tensor:
        values = torch.randn(count, 24, 256, generator=generator)
        return torch.nn.functional.normalize(values, dim=1)

    query, bank = unit(3), unit(20).half()
    masks = (torch.rand(3, 256, generator=generator) < share).float()
    masks[:, 0] = float(starts_at_zero)
    masks[2] = 0
    inside = (torch.rand(20, 256, generator=generator) < 0.5).float()
    # A crop's patch 0 that is everybody's best match: the released network's sentinel.
    bank[3] = query[0][:, :1].half()
    plain = torch.stack([match_scores_released(q, m, bank.float()) for q, m in zip(query, masks)])
    torch.testing.assert_close(bank_scores(query, masks, bank), plain, atol=1e-6, rtol=1e-5)
    plain = torch.stack([match_scores_masked(q, m, bank.float(), inside) for q, m in zip(query, masks)])
    torch.testing.assert_close(bank_scores(query, masks, bank, inside), plain, atol=1e-6, rtol=1e-5)


# -- Winograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "side"), [(1, 8), (3, 16)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_winograds_convolution_is_a_convolution(batch, side, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 20, side, side, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(7, 20, 3, 3, generator=generator)
    for bias in (None, torch.randn(7, generator=generator)):
        double = [None if t is None else t.double() for t in (x, weight, bias)]
        plain = torch.nn.functional.conv2d(*double, padding=1)
        found = WinogradConv(weight, bias)(x)
        assert (found - plain).abs().max() < 3e-5 * plain.abs().max()


# -- packed convolutions ---------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("groups", "kernel", "stride"), [(1, 1, 1), (1, 3, 2), (8, 3, 1)])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_a_packed_convolution_is_a_convolution_with_its_activation(groups, kernel, stride, activation, bf16):
    generator = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(16, 8 // groups, kernel, kernel, generator=generator)
    bias = torch.randn(16, generator=generator)
    how = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "groups": groups}
    conv = PackedConv(weight, bias, activation=activation, **how)
    end = {"none": lambda x: x, "relu": torch.relu, "relu6": torch.nn.functional.relu6}[activation]
    for batch, side in ((1, 12), (3, 7)):  # the weight was laid out for the first
        x = torch.randn(batch, 8, side, side, generator=generator)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = conv(x)
            assert found.dtype == (torch.bfloat16 if bf16 else torch.float32)
        plain = end(torch.nn.functional.conv2d(x, weight, bias, **how))
        assert (found.float() - plain).abs().max() <= (0.03 if bf16 else 1e-5) * plain.abs().max()
    trained = torch.randn(1, 8, 12, 12, requires_grad=True)
    conv(trained).sum().backward()  # what oneDNN can't, PyTorch does
    assert trained.grad is not None
