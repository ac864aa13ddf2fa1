"""Image in to pose out: the schedules, the optimisations and the precisions."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import get_args

import numpy as np
import torch
from inputs import Image, hypotheses_text, image_of, load_scenes, onboarded
from measure import Found, Options, Table, Times, interleave, matrix_peak, ratio
from networks import random_network, vit_gflop
from simulated import simulated_banks, simulated_image

from picopose_ros.estimator import (
    Backend,
    EstimatorSettings,
    ObjectPose,
    PoseEstimator,
    encode_by,
    resolve_precision,
)
from picopose_ros.evaluation.released_schedule import ReleasedEstimator
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.model import PicoPose, load_model
from picopose_ros.model.fast import Schedule
from picopose_ros.templates.bank import ENCODE_BATCH, Onboarding

STAGES = ("crop", "encode", "match", "regress", "pnp", "refine", "total")


def _schedules(
    released: PoseEstimator, ours: PoseEstimator, images: Sequence[Image], device: str
) -> tuple[dict[str, Times], dict[str, list[str]]]:
    """Every image once by the released schedule, by ours, and by ours again; the first image warms up.

    Returns:
        Times, and the medians of the stages' milliseconds in the order of `STAGES`.
    """
    estimators = {"released": released, "new": ours, "known": ours}
    taken: dict[str, list[float]] = {name: [] for name in estimators}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in estimators}

    def estimate(name: str, image: Image) -> None:
        stages[name].append(estimators[name].estimate(*image).timings)

    for index, image in enumerate(images):
        run = interleave({name: partial(estimate, name, image) for name in estimators}, 1, device, warmup=0)
        for name, times in run.items() if index else ():
            taken[name] += times.rounds
    medians = {
        name: [f"{np.median([timings[stage] for timings in all_timings[1:]]):.0f}" for stage in STAGES]
        for name, all_timings in stages.items()
    }
    return {name: Times(tuple(times)) for name, times in taken.items()}, medians


def network(options: Options) -> Found:
    """The published network: the released schedule against ours."""
    device = options.device
    gpu = device != "cpu"
    model = random_network(options.large, device)
    counts, segments = ((5,), 8) if gpu else ((5, 1), 1)
    banks = simulated_banks(model.config, 1 + options.rounds(3), 42 if options.quick else 162)
    names = list(banks)
    targets, rows, stages = {}, [], []
    for hypotheses in counts:
        settings = EstimatorSettings(hypotheses=hypotheses, refinements=0)
        released = ReleasedEstimator(model, banks, settings, device)
        ours = PoseEstimator(model, banks, settings, device)
        images = [simulated_image([name], segments) for name in names]
        times, medians = _schedules(released, ours, images, device)
        new, known = (ratio(times["released"], times[key]) for key in ("new", "known"))
        targets["large_8" if gpu else f"large_{hypotheses}"] = known
        rows.append(
            [
                f"{segments} segment{'s' * (segments > 1)}, {hypotheses_text(hypotheses)}",
                *(str(times[key]) for key in times),
                f"{new:.2f}",
                f"{known:.2f}",
            ]
        )
        for name, text in (("released", "released"), ("known", "ours, known templates")):
            stages.append([f"{text}, {hypotheses_text(hypotheses)}", *medians[name]])
        del ours, released
    note = (
        f"`{options.large}` with weights of chance, simulated objects of {len(banks[names[0]])} templates, "
        "milliseconds from image in to poses out: median (least-most). *Released*: the released network's "
        "schedule with our modules; their pyramid lacks a branch that influences nothing, so it is 5.5 of "
        "19.4 GFLOP a pass faster than the released code. *New*: no template of the object was a hypothesis "
        "before. *Known*: all of them were, as after a few frames of a stream; the target is about these."
    )
    head = ["", "released", "ours, new", "ours, known", "ratio, new", "ratio, known"]
    title = "The published network: released schedule against ours"
    tables = [
        Table(title, head, rows, note),
        Table(
            "Where its time goes",
            ["", *STAGES],
            stages,
            "Milliseconds, medians. Ours encodes unknown templates within `regress`; `pnp` is what PnP takes "
            "beyond the network's time.",
        ),
    ]
    share, table = _vit_share(options, model)
    return Found({**targets, "vit_share": share}, [*tables, table])


def _vit_share(options: Options, model: PicoPose) -> tuple[float, Table]:
    """Share of the measured matrix-product peak that the ViT's pass reaches."""
    device = options.device
    dtype = resolve_precision("auto", torch.device(device))
    size = 512 if options.quick else 8192 if device != "cpu" else 2048
    flop = {"product": 2 * size**3 / 1e9}
    candidates: dict[str, Callable[[], object]] = {"product": matrix_peak(device, dtype, size)}
    depth = len(model.backbone.vit.blocks)
    for batch in (1, 4) if device == "cpu" else (1, 16):
        crops = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(device)

        def encode(crops: torch.Tensor = crops) -> None:
            with (
                torch.inference_mode(),
                torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32),
            ):
                model.backbone(crops)

        name = f"ViT, {batch} crop{'s' * (batch > 1)}"
        candidates[name] = encode
        flop[name] = batch * vit_gflop(model.config.backbone, depth=depth)
    times = interleave(candidates, options.rounds(3), device)
    rate = {name: flop[name] / min(times[name].rounds) for name in candidates}  # GFLOP/ms = TFLOP/s
    best = max(rate[name] for name in candidates if name != "product") / rate["product"]
    rows = [
        [
            name,
            f"{flop[name]:.1f}",
            str(times[name]),
            f"{rate[name]:.3f}",
            f"{rate[name] / rate['product']:.0%}",
        ]
        for name in candidates
    ]
    note = (
        f"The product is torch.matmul of two {size}x{size} matrices in {str(dtype).removeprefix('torch.')}, "
        "taken in turn with the ViT's pass. Operations of the pass are counted (2 x multiply-adds), not "
        "measured. Rates are those of the quickest round."
    )
    head = ["", "GFLOP", "ms", "TFLOP/s", "share"]
    return best, Table("How close the ViT comes to the machine", head, rows, note)


def ablation(options: Options) -> Found:
    """Every optimisation off, one at a time."""
    rows = []
    settings = EstimatorSettings(hypotheses=5, refinements=0)
    segments = 1 if options.device == "cpu" else 8
    cases: list[tuple[str, PicoPose, Mapping, Image, int]] = []
    tiny = load_model("tiny", device=options.device)
    found = onboarded(options, tiny)
    _, scenes = load_scenes(options, found, 1)
    cases.append(("tiny", tiny, found.banks, image_of(scenes[0]), 7))
    large = random_network(options.large, options.device)
    banks = simulated_banks(large.config, 1, 42 if options.quick else 162)
    cases.append((options.large, large, banks, simulated_image(banks, segments), 2))
    names = [field.name for field in fields(Schedule)]
    if options.quick:
        names = names[:1]
    for preset, model, own, image, rounds in cases:
        everything = PoseEstimator(model, own, settings, options.device)
        for _ in range(2):
            everything.estimate(*image)
        for name in names:
            without = PoseEstimator(
                model, own, settings, options.device, schedule=replace(Schedule(), **{name: False})
            )
            without.estimate(*image)  # warms up; the other one was in the round before
            times = interleave(
                {
                    "with": partial(everything.estimate, *image),
                    "without": partial(without.estimate, *image),
                },
                options.rounds(rounds),
                options.device,
                warmup=0,
            )
            rows.append(
                [
                    f"{preset}: `{name}`",
                    str(times["with"]),
                    str(times["without"]),
                    f"{ratio(times['without'], times['with']):.2f}",
                ]
            )
            del without
    note = (
        "One optimisation off at a time, all others on; known templates, 5 hypotheses, "
        f"tiny with 1 segment, {options.large} with {segments}; milliseconds, median (least-most). What each "
        "is: `picopose_ros/model/fast.py`, `Schedule`."
    )
    return Found({}, [Table("What each optimisation brings", ["", "with", "without", "ratio"], rows, note)])


def tiny(options: Options) -> Found:
    """The packaged network: image in to pose out."""
    model = load_model("tiny", device=options.device)
    found = onboarded(options, model)
    _, scenes = load_scenes(options, found, 2 if options.quick else 12)
    rows, stages, rate = [], [], 0.0
    settings_by_name = {
        "5 hypotheses, not refined": EstimatorSettings(5, refinements=0),
        "1 hypothesis, not refined": EstimatorSettings(1, refinements=0),
        "the default": EstimatorSettings(),
    }
    for name, settings in settings_by_name.items():
        ours = PoseEstimator(model, found.banks, settings, options.device)
        released = ReleasedEstimator(model, found.banks, settings, options.device)
        images = [image_of(scene) for scene in scenes]
        times, medians = _schedules(released, ours, images, options.device)
        rate = rate or 1000.0 / times["known"].median
        rows.append(
            [
                name,
                *(str(times[key]) for key in times),
                f"{ratio(times['released'], times['known']):.2f}",
                f"{1000.0 / times['known'].median:.1f}",
            ]
        )
        stages.append([name, *medians["known"]])
    note = (
        "Packaged weights, rendered images of 640x480 with one segment of the demo's objects, 162 templates; "
        "milliseconds, median (least-most) over the images. Columns as above. The default is "
        f"{hypotheses_text(EstimatorSettings().hypotheses)} and {EstimatorSettings().refinements} rounds of "
        "refinement, which both schedules do alike."
    )
    head = ["", "released", "ours, new", "ours, known", "ratio, known", "per second"]
    return Found(
        {"tiny_rate": rate},
        [
            Table("The packaged network: image in to pose out", head, rows, note),
            Table(
                "Where its time goes, `tiny`",
                ["", *STAGES],
                stages,
                "Milliseconds, medians, known templates.",
            ),
        ],
    )


def precision(options: Options) -> Found:
    """Time in every precision."""
    names = ("fp32", "bf16") if options.device == "cpu" else ("fp32", "bf16", "fp16")
    rows = []
    for preset, rounds in ((options.large, 1 if options.device == "cpu" else 7), ("tiny", 7)):
        model = random_network(preset, options.device)
        banks = simulated_banks(model.config, 1, 42 if options.quick else 162)
        image = simulated_image(banks, 1 if options.device == "cpu" else 8)
        estimators = {
            name: PoseEstimator(
                model, banks, EstimatorSettings(5, precision=name, refinements=0), options.device
            )
            for name in names
        }
        times = interleave(
            {name: partial(one.estimate, *image) for name, one in estimators.items()},
            options.rounds(rounds),
            options.device,
        )
        for name in names:
            rows.append([f"{preset}, {name}", str(times[name]), f"{ratio(times['fp32'], times[name]):.2f}"])
    auto = str(resolve_precision("auto", torch.device(options.device))).removeprefix("torch.")
    note = f"`auto` is {auto} here. 5 hypotheses, known templates; milliseconds, median (least-most)."
    return Found({}, [Table("Precision", ["", "ms", "times as fast as fp32"], rows, note)])


def backends(options: Options) -> Found:
    """Every stage in PyTorch and with ONNX Runtime, in turn."""
    title = "Backends"
    if importlib.util.find_spec("onnxruntime") is None:
        note = "Not measured: ONNX Runtime isn't installed (`pip install onnxruntime onnx onnxscript`)."
        return Found({}, [Table(title, ["", *get_args(Backend)], [], note)])
    model = load_model("tiny", device=options.device)
    found = onboarded(options, model)
    _, scenes = load_scenes(options, found, 2 if options.quick else 12)
    precision = "fp32" if options.device == "cpu" else "fp16"
    settings = EstimatorSettings(precision=precision)
    estimators = {
        name: PoseEstimator(model, found.banks, replace(settings, backend=name), options.device)
        for name in get_args(Backend)
    }
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in estimators}
    poses: dict[str, list[list[ObjectPose]]] = {name: [] for name in estimators}
    for scene in scenes:
        image = image_of(scene)
        for keep in (False, True):  # known templates count
            for name, one in estimators.items():
                result = one.estimate(*image)
                if keep:
                    laps[name].append(result.timings)
                    poses[name].append(result.poses)
    rows = []
    for stage in STAGES:
        each = [[lap[stage] for lap in own] for own in laps.values()]
        rows.append([f"{stage}, ms", *(f"{np.median(one):.1f}" for one in each), _median_ratio(*each)])
    each = _onboarding_seconds(options, model, found, tuple(estimators), precision)
    rows.append(
        ["encoding one object, s", *(f"{np.median(one):.2f}" for one in each), _median_ratio(*each)]
    )
    pairs = [
        (a.T_cam_obj, b.T_cam_obj)
        for own, others in zip(*poses.values())
        for a, b in zip(own, others)
        if a.segment == b.segment
    ]
    turn = np.median([rotation_angle_deg(a[:3, :3], b[:3, :3]) for a, b in pairs])
    shift = np.median([np.linalg.norm(a[:3, 3] - b[:3, 3]) for a, b in pairs])
    note = (
        f"`tiny` in {precision}, {len(scenes)} rendered images with one segment, "
        f"{hypotheses_text(settings.hypotheses)}, known templates; medians, the backends in turn on every "
        "image; the last column is the median of the ratios. The last row is the encoding of onboarding: "
        f"{len(next(iter(found.banks.values())))} templates. The poses differ by {turn:.4f} degrees and "
        f"{1000 * shift:.4f} mm at the median."
    )
    head = ["", *estimators, "onnxruntime / torch"]
    return Found({}, [Table(title, head, rows, note)])


def _median_ratio(plain: Sequence[float], other: Sequence[float]) -> str:
    return f"{np.median([b / max(a, 1e-3) for a, b in zip(plain, other)]):.2f}"


def _onboarding_seconds(
    options: Options, model: PicoPose, found: Onboarding, names: Sequence[Backend], precision: str
) -> list[list[float]]:
    """Per backend the seconds that encoding all templates of an object takes, in turn."""
    bank = next(iter(found.banks.values()))
    crops = bank.crops(range(len(bank))).to(options.device)
    device = torch.device(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for _ in range(options.rounds(3)):
            for name in names:
                encode_by(model, device, name, "", precision)
                with torch.inference_mode():
                    describe = model.describer()
                    describe(crops[:ENCODE_BATCH])
                    begin = time.perf_counter()
                    for part in crops.split(ENCODE_BATCH):
                        describe(part).half().cpu()
                    seconds[name].append(time.perf_counter() - begin)
    finally:
        encode_by(model, device)
    return [seconds[name] for name in names]
