"""The templates of a mesh, rendered and encoded at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from picopose_ros.errors import MeshError, RenderError
from picopose_ros.geometry.crops import CropBox, crop_rgb
from picopose_ros.model import PicoPose
from picopose_ros.progress import progress_bar
from picopose_ros.templates.bank.templates import (
    DISTANCE,
    TEMPLATE_K,
    TEMPLATE_SIZE,
    WINDOW,
    TemplateBank,
    TemplateCrop,
    crop_template,
)
from picopose_ros.templates.meshes import ObjectMesh, shown
from picopose_ros.templates.renderer import MeshRenderer, Shading
from picopose_ros.templates.viewpoints import viewpoint_rotations

ENCODE_BATCH = 16
"""Templates per forward pass of the network."""

_ENCODING = threading.Lock()
"""Two passes at once through a network that has every core would only be in each other's way."""


class Stopped(Exception):
    """Nobody waits for this bank any more."""


def build_bank(
    mesh: ObjectMesh,
    model: PicoPose,
    count: int = 162,
    device: str | torch.device | None = None,
    progress: bool = False,
    stop: threading.Event | None = None,
    shading: Shading | None = None,
) -> TemplateBank:
    """Render an object from all sides and encode the views, both at the same time.

    Args:
        mesh: in metres.
        model: in evaluation mode.
        count: viewpoints: 42, 162 or 642.
        device: where the network runs; None: where it is.
        progress: show it.
        stop: once it is set, the work ends with an exception.
        shading: how the templates are lit; None: as the preset has it (``auto`` for tiny, ``flat`` for the
            released network).

    Raises:
        ConfigError: no such number of viewpoints.
        MeshError: the object is invisible from one of them.
        RenderError: nothing can be rendered on this machine.
    """
    rotations = viewpoint_rotations(count)
    shading = model.config.template_shading if shading is None else shading
    device = next(model.parameters()).device if device is None else torch.device(device)
    model = model.to(device)
    width, height = TEMPLATE_SIZE
    left, top = (width - WINDOW) // 2, (height - WINDOW) // 2
    K = TEMPLATE_K.copy()
    K[:2, 2] -= left, top
    T_ctr_obj = np.eye(4)
    T_ctr_obj[:3, 3] = -mesh.centre
    T_cam_ctr = np.tile(np.eye(4), (count, 1, 1))
    T_cam_ctr[:, :3, :3] = rotations
    T_cam_ctr[:, 2, 3] = DISTANCE * mesh.diagonal

    crops: list[TemplateCrop] = []
    descriptors: list[np.ndarray] = []
    describe = model.describer()
    poses = T_cam_ctr @ T_ctr_obj
    with (
        _bar(mesh.spec.class_id, count, progress) as bar,
        _rendered(mesh, poses, K, shading) as parts,
    ):
        for part, batch in parts:
            if stop is not None and stop.is_set():
                raise Stopped(mesh.spec.class_id)
            with _ENCODING, torch.inference_mode():
                descriptors.append(describe(batch.to(device)).half().cpu().numpy())
            crops += part
            bar.update(len(part))

    boxes = [CropBox(left + crop.box.left, top + crop.box.top, crop.box.side) for crop in crops]
    images = np.zeros((count, *(max(box.side for box in boxes),) * 2, 3), np.uint8)
    for image, crop in zip(images, crops, strict=True):
        image[: crop.box.side, : crop.box.side] = crop.pixels
    return TemplateBank(
        class_id=mesh.spec.class_id,
        images=images,
        boxes=np.array([(box.left, box.top, box.side) for box in boxes], np.int32),
        masks=np.stack([crop.mask for crop in crops]),
        points_nearest=np.stack([crop.points_nearest for crop in crops]),
        points_consistent=np.stack([crop.points_consistent for crop in crops]),
        T_cam_ctr=T_cam_ctr.astype(np.float32),
        centre=mesh.centre,
        M_crop_img=np.stack([box.affine() for box in boxes]),
        K=TEMPLATE_K.copy(),
        descriptors=np.concatenate(descriptors),
        extents=mesh.extents,
        diameter=mesh.diameter,
        warnings=tuple(mesh.warnings),
        shading=shading,
        spec=mesh.spec,
    )


@contextlib.contextmanager
def _rendered(
    mesh: ObjectMesh, poses: np.ndarray, K: np.ndarray, shading: Shading
) -> Iterator[Iterator[tuple[list[TemplateCrop], torch.Tensor]]]:
    """Crops and network inputs (n, 3, 224, 224) of all poses (N, 4, 4), `ENCODE_BATCH` at a time, in order.

    They are rendered by a thread of its own, to which the OpenGL context belongs, two batches ahead.
    """
    renderers: list[MeshRenderer] = []

    def render(start: int) -> tuple[list[TemplateCrop], torch.Tensor]:
        if not renderers:
            renderers.append(MeshRenderer(antialias=True, shading=shading))
        crops, inputs = [], []
        for index, pose in enumerate(poses[start : start + ENCODE_BATCH], start):
            try:
                view = renderers[0].render(mesh, pose, K, WINDOW, WINDOW)
            except RenderError as error:  # the renderer works, so it is this mesh
                raise MeshError(f"mesh {shown(mesh.spec.path)} can't be rendered: {error}") from error
            if not view.mask.any():
                raise MeshError(
                    f"mesh {shown(mesh.spec.path)} cannot be seen from viewpoint {index}: its faces have no "
                    "area there; give it some thickness"
                )
            crops.append(crop_template(view, K))
            inputs.append(crop_rgb(view.rgb, crops[-1].box))
        return crops, torch.from_numpy(np.stack(inputs))

    ahead: deque[Future[tuple[list[TemplateCrop], torch.Tensor]]] = deque()

    def batches() -> Iterator[tuple[list[TemplateCrop], torch.Tensor]]:
        starts = deque(range(0, len(poses), ENCODE_BATCH))
        while ahead or starts:
            while starts and len(ahead) < 3:
                ahead.append(thread.submit(render, starts.popleft()))
            yield ahead.popleft().result()

    with ThreadPoolExecutor(1, "render") as thread:
        try:
            yield batches()
        finally:
            for batch in ahead:
                batch.cancel()
            for renderer in renderers:
                thread.submit(renderer.close).result()


def _bar(class_id: str, count: int, progress: bool) -> Any:
    return progress_bar(None, count, f"onboarding {class_id}", "view", hidden=not progress)
