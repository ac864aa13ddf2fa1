"""What is measured, part by part; each is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, Found, Options, Table, Times, interleave, matrix_peak, ratio
from networks import random_network, vit_gflop
from simulated import simulated_banks, simulated_image

from picopose_ros.demo.objects import write_meshes
from picopose_ros.errors import PicoPoseError
from picopose_ros.estimator import EstimatorSettings, PoseEstimator, resolve_precision
from picopose_ros.evaluation.metrics import (
    MISSING,
    VsdScorer,
    bop_errors,
    bop_recalls,
    bop_symmetries,
    evaluation_points,
    pose_errors,
)
from picopose_ros.evaluation.released_schedule import ReleasedEstimator
from picopose_ros.evaluation.scenes import Scene, make_scenes
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import PicoPose, load_model, model_fingerprint
from picopose_ros.model.fast import Schedule
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Onboarding, build_bank, load_or_build, onboard
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

Image = tuple[np.ndarray, CameraModel, Sequence[Segment]]
MB = 1e6


def _demo_meshes(options: Options) -> Path:
    folder = options.folder / "meshes"
    if not (folder / "objects.yaml").is_file():  # written last
        write_meshes(folder)
    return folder


def _onboarded(options: Options, model: PicoPose) -> Onboarding:
    views = 42 if options.quick else 162
    return onboard(
        _demo_meshes(options), model, views, cache_dir=options.folder / "cache", device=options.device
    )


def _scenes(options: Options, found: Onboarding, count: int) -> tuple[dict[str, ObjectMesh], list[Scene]]:
    meshes = {name: load_object(found.specs[name]) for name in sorted(found.banks)}
    return meshes, [s for s in make_scenes(list(meshes.values()), count, 11) if s.instances]


def _image_of(scene: Scene) -> Image:
    return scene.rgb, scene.camera, [Segment(one.class_id, 1.0, one.visible) for one in scene.instances]


def _hypotheses(count: int) -> str:
    return f"{count} hypothes{'i' if count == 1 else 'e'}s"


STAGES = ("crop", "encode", "match", "regress", "pnp", "total")


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
        settings = EstimatorSettings(hypotheses=hypotheses)
        released = ReleasedEstimator(model, banks, settings, device)
        ours = PoseEstimator(model, banks, settings, device)
        images = [simulated_image([name], segments) for name in names]
        times, medians = _schedules(released, ours, images, device)
        new, known = (ratio(times["released"], times[key]) for key in ("new", "known"))
        targets["large_8" if gpu else f"large_{hypotheses}"] = known
        rows.append(
            [
                f"{segments} segment{'s' * (segments > 1)}, {_hypotheses(hypotheses)}",
                *(str(times[key]) for key in times),
                f"{new:.2f}",
                f"{known:.2f}",
            ]
        )
        for name, text in (("released", "released"), ("known", "ours, known templates")):
            stages.append([f"{text}, {_hypotheses(hypotheses)}", *medians[name]])
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
    settings = EstimatorSettings(hypotheses=5)
    segments = 1 if options.device == "cpu" else 8
    cases: list[tuple[str, PicoPose, Mapping, Image, int]] = []
    tiny = load_model("tiny", device=options.device)
    found = _onboarded(options, tiny)
    _, scenes = _scenes(options, found, 1)
    cases.append(("tiny", tiny, found.banks, _image_of(scenes[0]), 7))
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
    found = _onboarded(options, model)
    _, scenes = _scenes(options, found, 2 if options.quick else 12)
    rows, stages, rate = [], [], 0.0
    for hypotheses in (5, 1):
        settings = EstimatorSettings(hypotheses=hypotheses)
        ours = PoseEstimator(model, found.banks, settings, options.device)
        released = ReleasedEstimator(model, found.banks, settings, options.device)
        images = [_image_of(scene) for scene in scenes]
        times, medians = _schedules(released, ours, images, options.device)
        if hypotheses == 5:
            rate = 1000.0 / times["known"].median
        rows.append(
            [
                _hypotheses(hypotheses),
                *(str(times[key]) for key in times),
                f"{ratio(times['released'], times['known']):.2f}",
                f"{1000.0 / times['known'].median:.1f}",
            ]
        )
        stages.append([_hypotheses(hypotheses), *medians["known"]])
    note = (
        "Packaged weights, rendered images of 640x480 with one segment of the demo's objects, 162 templates; "
        "milliseconds, median (least-most) over the images. Columns as above."
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


def accuracy(options: Options) -> Found:
    """What precision, pruning, hypotheses and the second look cost and bring."""
    model = load_model("tiny", device=options.device)
    found = _onboarded(options, model)
    meshes, scenes = _scenes(options, found, 2 if options.quick else 36)
    normal = EstimatorSettings(hypotheses=5)
    variants = {
        "5 hypotheses, fp32": replace(normal, precision="fp32"),
        "bf16": replace(normal, precision="bf16"),
        "prune 1": replace(normal, prune=1),
        "prune 2": replace(normal, prune=2),
        "1 hypothesis": replace(normal, hypotheses=1),
        "3 hypotheses": replace(normal, hypotheses=3),
        "10 hypotheses": replace(normal, hypotheses=10),
    }
    if options.device != "cpu":
        variants["fp16"] = replace(normal, precision="fp16")
    if options.quick:
        variants = dict(list(variants.items())[:2])
    estimators = {name: PoseEstimator(model, found.banks, s, options.device) for name, s in variants.items()}
    errors: dict[str, list] = {name: [] for name in variants}
    correct: dict[str, list[bool]] = {name: [] for name in variants}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    points = {name: evaluation_points(mesh) for name, mesh in meshes.items()}
    with MeshRenderer() as renderer:
        for scene in scenes:
            (one,) = scene.instances
            mesh = meshes[one.class_id]
            symmetries = bop_symmetries(mesh.spec.symmetries)
            scorer = VsdScorer(renderer, mesh, one.T_cam_obj, scene.depth, scene.camera.K)
            own = points[one.class_id]
            for name, estimator in estimators.items():
                poses = estimator.estimate(*_image_of(scene)).poses
                result = estimator.estimate(*_image_of(scene))  # with known templates
                taken[name].append(result.timings["total"])
                if not poses:
                    errors[name].append(MISSING)
                    correct[name].append(False)
                    continue
                T = poses[0].T_cam_obj
                truth, K, width = one.T_cam_obj, scene.camera.K, scene.camera.width
                errors[name].append(
                    bop_errors(own.extreme, mesh.diameter, T, truth, symmetries, K, width, scorer)
                )
                off = pose_errors(own.surface, mesh.diameter, T, truth, symmetries)
                correct[name].append(off.correct)
    base = next(iter(variants))
    median = {name: Times(tuple(times)).median for name, times in taken.items()}
    recall = {name: bop_recalls(found_errors)["ar"] for name, found_errors in errors.items()}
    rows = [
        [
            name,
            f"{100 * recall[name]:.1f}",
            f"{100 * (recall[name] - recall[base]):+.1f}",
            f"{100 * np.mean(correct[name]):.1f}",
            f"{median[name]:.0f}",
            f"{median[base] / median[name]:.2f}",
        ]
        for name in variants
    ]
    note = (
        f"`tiny`, packaged weights, {len(scenes)} rendered scenes of the demo's objects, true masks; AR is "
        "the mean of BOP's three average recalls. Every scene goes through all settings one after the other. "
        f"A pose more or less is {100 / max(len(scenes), 1):.1f} points of ADD. docs/accuracy.md has more."
    )
    head = ["", "AR", "less the first", "ADD(-S) < 0.1 d", "ms, median", "times as fast"]
    return Found({}, [Table("Accuracy against time", head, rows, note)])


def precision(options: Options) -> Found:
    """Time in every precision."""
    names = ("fp32", "bf16") if options.device == "cpu" else ("fp32", "bf16", "fp16")
    rows = []
    for preset, rounds in ((options.large, 1 if options.device == "cpu" else 7), ("tiny", 7)):
        model = random_network(preset, options.device)
        banks = simulated_banks(model.config, 1, 42 if options.quick else 162)
        image = simulated_image(banks, 1 if options.device == "cpu" else 8)
        estimators = {
            name: PoseEstimator(model, banks, EstimatorSettings(precision=name), options.device)
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


def memory(options: Options) -> Found:
    """What stays on the device per object, and the bound of the cache."""
    rows, targets = [], {}
    for preset in (options.large, "tiny"):
        model = random_network(preset, options.device)
        objects, templates = 2, 42 if options.quick else 162
        banks = simulated_banks(model.config, objects, templates)
        one = PoseEstimator(model, banks, EstimatorSettings(hypotheses=1), options.device)
        one.estimate(*simulated_image(["object_0"]))
        entry = one.resident_bytes()["cache"] / MB
        # So many hypotheses that the cache has to forget.
        limit = 64 if preset == options.large else 8
        settings = EstimatorSettings(hypotheses=6, template_cache_mb=limit)
        estimator = PoseEstimator(model, banks, settings, options.device)
        for name in banks:
            estimator.estimate(*simulated_image([name]))
        resident = estimator.resident_bytes()
        per_object = (resident["descriptors"] + resident["masks"]) / objects / MB
        if preset == options.large:
            targets["object_mb"] = per_object
        on_host = sum(
            getattr(banks["object_0"], name).nbytes
            for name in ("images", "masks", "points_nearest", "points_consistent", "descriptors")
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        rows.append(
            [
                preset,
                f"{weights / MB:.0f}",
                f"{per_object:.1f}",
                f"{entry:.1f}",
                f"{resident['cache'] / MB:.0f} of {limit * 2**20 / MB:.0f}",
                f"{on_host / MB:.0f}",
            ]
        )
    note = (
        f"MB, {templates} templates per object. *On the device per object*: descriptors in half precision "
        "and patch masks. *Per template*: what the cache keeps of a template that was a "
        "hypothesis. *Cache*: its size after more hypotheses than fit, and its bound. *On the host*: the "
        "whole bank, descriptors included (on a CPU those are the same memory)."
    )
    head = [
        "",
        "weights (fp32)",
        "on the device per object",
        "per template",
        "cache",
        "on the host per object",
    ]
    return Found(targets, [Table("Memory", head, rows, note)])


def onboarding(options: Options) -> Found:
    """Meshes to banks, cold and from the cache."""
    model = load_model("tiny", device=options.device)
    views = 42 if options.quick else 162
    specs = discover_objects(_demo_meshes(options))[: 2 if options.quick else 4]
    mesh = load_object(specs[0])
    fingerprint = model_fingerprint(model)
    cold, cached, parts = [], [], []
    build_bank(mesh, model, 42, options.device)  # OpenGL is loaded, kernels are chosen
    for _ in range(options.rounds(3)):
        with tempfile.TemporaryDirectory() as folder:
            for times in (cold, cached):
                begin = time.perf_counter()
                load_or_build(specs[0], model, views, folder, options.device, fingerprint=fingerprint)
                times.append(1000.0 * (time.perf_counter() - begin))
        parts.append(_apart(mesh, model, views, options))
    rows = [
        ["one object, cold", f"{Times(tuple(cold)).median / 1000:.2f}"],
        ["one object, from the cache", f"{Times(tuple(cached)).median / 1000:.2f}"],
        ["of the cold one: rendering and cropping alone", f"{np.median([p[0] for p in parts]):.2f}"],
        ["of the cold one: encoding alone", f"{np.median([p[1] for p in parts]):.2f}"],
    ]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for spec in specs:
            load_or_build(
                spec, model, views, Path(folder) / "single", options.device, fingerprint=fingerprint
            )
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        onboard(_demo_meshes(options), model, views, cache_dir=Path(folder) / "all", device=options.device)
        together = time.perf_counter() - begin
        begin = time.perf_counter()
        again = onboard(
            _demo_meshes(options), model, views, cache_dir=Path(folder) / "all", device=options.device
        )
        known = time.perf_counter() - begin
    rows += [
        [f"{len(specs)} objects, one after the other, per object", f"{alone / len(specs):.2f}"],
        [f"{len(again.banks)} objects at once, per object", f"{together / len(again.banks):.2f}"],
        [f"{len(again.banks)} objects from the cache, per object", f"{known / len(again.banks):.2f}"],
    ]
    note = (
        f"`tiny`, {views} templates, seconds, medians; rendered by {_backend()}. From the cache means "
        "read, with the checksum of every byte verified."
    )
    targets = {
        "onboard_cold": Times(tuple(cold)).median / 1000,
        "onboard_cached": Times(tuple(cached)).median / 1000,
    }
    return Found(targets, [Table("Onboarding", ["", "s"], rows, note)])


def _apart(mesh: ObjectMesh, model: PicoPose, views: int, options: Options) -> tuple[float, float]:
    """Seconds that rendering and encoding take where they don't overlap."""
    from picopose_ros.geometry.crops import crop_rgb
    from picopose_ros.templates import bank
    from picopose_ros.templates.viewpoints import viewpoint_rotations

    K = bank.TEMPLATE_K.copy()
    K[:2, 2] = bank.WINDOW / 2
    T_cam_ctr, T_ctr_obj = np.eye(4), np.eye(4)
    T_cam_ctr[2, 3], T_ctr_obj[:3, 3] = bank.DISTANCE * mesh.diagonal, -mesh.centre
    begin = time.perf_counter()
    inputs = []
    with MeshRenderer(antialias=True) as renderer:
        for rotation in viewpoint_rotations(views):
            T_cam_ctr[:3, :3] = rotation
            view = renderer.render(mesh, T_cam_ctr @ T_ctr_obj, K, bank.WINDOW, bank.WINDOW)
            inputs.append(crop_rgb(view.rgb, bank.crop_template(view, K).box))
    middle = time.perf_counter()
    with torch.inference_mode():
        for part in torch.from_numpy(np.stack(inputs)).split(bank.ENCODE_BATCH):
            model.encode(part.to(options.device)).descriptors.half().cpu()
    return middle - begin, time.perf_counter() - middle


def _backend() -> str:
    with MeshRenderer() as renderer:
        return renderer.backend.upper().replace("OSMESA", "OSMesa")


def ros(options: Options) -> Found:
    """What the node adds, by the soak's measurement."""
    if options.quick:
        raise PicoPoseError("the part ros has no quick form: it starts the real node")
    result = options.folder / "ros_layer.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "soak"), "--latency-only", "--asks", "40"]
    command += ["--domain", "115", "--folder", str(options.folder / "soak"), "--json", str(result)]
    if options.device != "cpu":
        command += ["--parameter", f"device:={options.device}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not result.is_file():
        raise PicoPoseError(f"{' '.join(command)} told nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    checks = {check["what"]: check for check in json.loads(result.read_text())["checks"]}
    name = "latency added by the ROS layer, median"
    if checks.get(name, {}).get("value") is None:
        raise PicoPoseError(f"{result} doesn't say '{name}': {sorted(checks)}")
    told = [what for what in checks if "median" in what or "ready" in what]
    rows = [[what, checks[what]["found"]] for what in told]
    note = (
        "The real node over DDS on this machine, images of 640x480 at 30 Hz, four segments, `tiny`, 5 "
        "hypotheses; one segmentation at a time, so that nobody waits for a busy estimator. "
        "`python scripts/soak --latency-only` does it."
    )
    title = "The node end to end"
    return Found({"ros_layer": float(checks[name]["value"])}, [Table(title, ["", "found"], rows, note)])
