"""All objects of a mesh directory at once; one that can't be used does not stop the others."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from picopose_ros.errors import MeshError
from picopose_ros.model import PicoPose, model_fingerprint
from picopose_ros.templates.bank.cache import load_or_build
from picopose_ros.templates.bank.templates import TemplateBank
from picopose_ros.templates.meshes import ObjectSpec, discover_objects
from picopose_ros.templates.renderer import Shading

OBJECTS_AT_ONCE = min(4, max(2, (os.cpu_count() or 1) // 4))
"""Objects that are onboarded at the same time: one is rendered, read or written while another is encoded."""

Progress = Callable[[str, int, int], None]
"""Called with a class id, the number of objects done and the number of objects; what it raises ends all."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Onboarding:
    """What became of the objects of a mesh directory."""

    banks: dict[str, TemplateBank]
    """By class id: the objects that can be estimated."""
    specs: dict[str, ObjectSpec]
    """By class id: all objects found."""
    failed: dict[str, str]
    """By class id: why an object has no bank."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong with the objects that have one."""


@contextlib.contextmanager
def loading(
    specs: Sequence[ObjectSpec],
    model: PicoPose,
    count: int = 162,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    fingerprint: str | None = None,
    shading: Shading | None = None,
) -> Iterator[list[Future[TemplateBank]]]:
    """`load_or_build` of several objects at once: a future for each, in their order.

    Whoever leaves the context gives up those that are not done yet.
    """
    fingerprint = model_fingerprint(model) if fingerprint is None else fingerprint
    stop = threading.Event()
    pool = ThreadPoolExecutor(OBJECTS_AT_ONCE, "onboard")
    try:
        yield [
            pool.submit(
                load_or_build, spec, model, count, cache_dir, device, progress, fingerprint, stop, shading
            )
            for spec in specs
        ]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def onboard(
    mesh_dir: str | Path,
    model: PicoPose,
    count: int = 162,
    unit: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool | Progress = False,
    shading: Shading | None = None,
) -> Onboarding:
    """Make the banks of all objects of a mesh directory. A mesh that cannot be used does not stop the others.

    Args:
        mesh_dir: see `discover_objects`; ``unit`` is its default unit.
        model, count, cache_dir, device, shading: see `load_or_build`.
        progress: True to show it; or called as each object is waited for and done.

    Raises:
        MeshError: the directory cannot be used, or not one of its meshes.
        ConfigError: no such number of viewpoints.
        RenderError: nothing can be rendered on this machine.
    """
    specs = {spec.class_id: spec for spec in discover_objects(mesh_dir, unit)}
    result = Onboarding({}, specs, {})
    tell = progress if callable(progress) else lambda *step: None
    bars = progress is True
    with loading(list(specs.values()), model, count, cache_dir, device, bars, shading=shading) as banks:
        for done, (class_id, bank) in enumerate(zip(specs, banks)):
            tell(class_id, done, len(specs))
            try:
                result.banks[class_id] = bank.result()
            except MeshError as error:
                result.failed[class_id] = str(error)
                _log.error("object '%s' is left out: %s", class_id, error)
            else:
                result.warnings.extend(result.banks[class_id].warnings)
                for warning in result.banks[class_id].warnings:
                    _log.warning("%s", warning)
            tell(class_id, done + 1, len(specs))
    if not result.banks:
        raise MeshError(f"no object of {mesh_dir} can be used: " + "; ".join(result.failed.values()))
    return result
