"""How time and memory grow with segments, objects, hypotheses, templates and the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from measure import Curve, Found, Options, Plot, Table, interleave
from networks import random_network
from simulated import simulated_banks, simulated_image

from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.model import PicoPose, load_model

MB = 1e6
SIZES = ((640, 480), (1280, 720), (1920, 1080), (3840, 2160))


def _device_mb(estimator: PoseEstimator, device: str) -> float:
    """What is held on the device: by PyTorch on a GPU, at its peak; else what the estimator tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    return sum(estimator.resident_bytes().values()) / MB


def _measure(
    options: Options,
    model: PicoPose,
    rounds: int,
    segments: int = 1,
    objects: int = 1,
    hypotheses: int = 5,
    templates: int = 162,
    size: tuple[int, int] = SIZES[0],
) -> tuple[float, float]:
    """Milliseconds of an estimate with known templates, and MB on the device."""
    banks = simulated_banks(model.config, objects, templates)
    estimator = PoseEstimator(model, banks, EstimatorSettings(hypotheses=hypotheses), options.device)
    if torch.device(options.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    image = simulated_image(banks, segments, *size)
    times = interleave({"": lambda: estimator.estimate(*image)}, options.rounds(rounds), options.device)[""]
    return float(np.median(times.rounds)), _device_mb(estimator, options.device)


def _scaling(
    options: Options, model: PicoPose, rounds: int, points: dict[str, Sequence[int]], megapixels: bool
) -> Found:
    name = model.config.name
    axes: dict[str, tuple[str, Callable[[int], dict[str, int]]]] = {
        "segments": ("segments in the image, one object", lambda n: {"segments": n}),
        "objects": ("objects, one segment of each", lambda n: {"objects": n, "segments": n}),
        "hypotheses": ("hypotheses", lambda n: {"hypotheses": n}),
        "templates": ("templates per object", lambda n: {"templates": n}),
    }
    plots, rows = [], []
    known: dict[tuple[int, ...], tuple[float, float]] = {}

    def point(**arguments: int) -> tuple[float, float]:
        """The axes meet in one point, which is measured once."""
        usual = {"segments": 1, "objects": 1, "hypotheses": 5, "templates": 162}
        key = tuple((usual | arguments).values())
        if key not in known:
            known[key] = _measure(options, model, rounds, **arguments)
        return known[key]

    for axis, (text, arguments) in axes.items():
        found = [(n, *point(**arguments(n))) for n in points[axis]]
        for index, (what, unit) in enumerate((("time", "milliseconds"), ("memory", "MB on the device")), 1):
            curve = Curve(name, [(float(row[0]), row[index]) for row in found])
            plots.append(Plot(f"{axis}_{what}", f"{name}: {what} by {axis}", text, unit, [curve]))
        rows += [[f"{n} {axis}", f"{ms:.0f}", f"{mb:.0f}"] for n, ms, mb in found]
    if megapixels:
        found_sizes = [(size, *_measure(options, model, rounds, size=size)) for size in SIZES]
        curve = Curve(name, [(w * h / 1e6, ms) for (w, h), ms, _ in found_sizes])
        plots.append(Plot("image_time", f"{name}: time by image size", "megapixels", "milliseconds", [curve]))
        rows += [[f"{w}x{h} pixels", f"{ms:.0f}", f"{mb:.0f}"] for (w, h), ms, mb in found_sizes]
    note = (
        "Simulated objects, known templates; 1 segment, 1 object, 5 hypotheses, 162 templates, 640x480 "
        "but for what the row names. The image's size counts for little: only crops of 224x224 go through "
        "the network. Memory: descriptors, masks and the cache; on a GPU PyTorch's peak."
    )
    return Found({}, [Table(f"Scaling, `{name}`", ["", "ms", "MB"], rows, note)], plots)


def curves_tiny(options: Options) -> Found:
    """The packaged network."""
    points = {
        "segments": (1, 2, 4, 8, 16, 32),
        "objects": (1, 3, 10, 30),
        "hypotheses": (1, 2, 5, 10),
        "templates": (42, 162, 642),
    }
    if options.quick:
        points = {axis: values[:2] for axis, values in points.items()}
    model = load_model("tiny", device=options.device)
    return _scaling(options, model, 3, points, not options.quick)


def curves_large(options: Options) -> Found:
    """The published network; on a CPU only few points of it."""
    points = {
        "segments": (1, 2, 4),
        "objects": (1, 2),
        "hypotheses": (1, 5, 10),
        "templates": (42, 162, 642),
    }
    if options.device != "cpu":
        points |= {"segments": (1, 2, 4, 8, 16, 32), "objects": (1, 3, 10, 30)}
    if options.quick:
        points = {axis: values[:2] for axis, values in points.items()}
    return _scaling(options, random_network(options.large, options.device), 1, points, False)


def hundreds(options: Options) -> Found:
    """Hundreds of objects at once, by random banks."""
    model = load_model("tiny", device=options.device)
    counts = (2, 4) if options.quick else (1, 10, 30, 100, 300)
    banks = simulated_banks(model.config, max(counts), 42 if options.quick else 162)
    rows, known = [], []
    for count in counts:
        some = {name: banks[name] for name in list(banks)[:count]}
        estimator = PoseEstimator(model, some, EstimatorSettings(), options.device)
        image = simulated_image(some, 2 if options.quick else 8, classes=min(count, 8))
        estimator.estimate(*image)
        results = [estimator.estimate(*image).timings for _ in range(options.rounds(3))]
        match, total = (float(np.median([r[key] for r in results])) for key in ("match", "total"))
        resident = estimator.resident_bytes()
        held = (resident["descriptors"] + resident["masks"]) / MB
        rows.append([str(count), f"{held:.0f}", f"{match:.0f}", f"{total:.0f}"])
        known.append((float(count), held))
    large = 162 * 1024 * 256 * 2 / MB
    note = (
        "`tiny`, 8 segments in the image, random banks. *MB*: on the device for all objects, without the "
        "cache. A segment is matched with the templates of its own class alone: more objects cost memory, "
        "not time. "
        f"`vitl` holds {large:.0f} MB of descriptors per object instead."
    )
    plot = Plot(
        "objects_memory", "tiny: memory by objects", "objects", "MB on the device", [Curve("tiny", known)]
    )
    return Found(
        {}, [Table("Hundreds of objects", ["objects", "MB", "match, ms", "total, ms"], rows, note)], [plot]
    )
