"""Meshes to banks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from inputs import demo_meshes
from measure import Found, Options, Table, Times

from picopose_ros.model import PicoPose, load_model, model_fingerprint
from picopose_ros.templates.bank import build_bank, load_or_build, onboard
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer


def onboarding(options: Options) -> Found:
    """Meshes to banks, cold and from the cache."""
    model = load_model("tiny", device=options.device)
    views = 42 if options.quick else 162
    specs = discover_objects(demo_meshes(options))[: 2 if options.quick else 4]
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
        onboard(demo_meshes(options), model, views, cache_dir=Path(folder) / "all", device=options.device)
        together = time.perf_counter() - begin
        begin = time.perf_counter()
        again = onboard(
            demo_meshes(options), model, views, cache_dir=Path(folder) / "all", device=options.device
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
