"""What an object takes in memory."""

from __future__ import annotations

from measure import Found, Options, Table
from networks import random_network
from simulated import simulated_banks, simulated_image

from picopose_ros.estimator import EstimatorSettings, PoseEstimator

MB = 1e6


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
