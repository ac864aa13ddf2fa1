"""The objects of the mesh directory, and what has become of them when it is looked at again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from picopose_ros.errors import MeshError
from picopose_ros.model import PicoPose, model_fingerprint
from picopose_ros.templates.bank import TemplateBank, load_or_build
from picopose_ros.templates.meshes import ObjectSpec, discover_objects, mesh_digest
from picopose_ros.templates.renderer import Shading

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a class id, the number of objects done and the number of objects; what it raises ends all."""


@dataclass(frozen=True)
class ObjectSet:
    """Objects that can be estimated.

    Attributes:
        banks, specs, digests: by class id; the digest is that of the mesh files.
        failed: by class id, why an object of the directory has no bank, or has still its old one.
    """

    banks: Mapping[str, TemplateBank] = field(default_factory=dict)
    specs: Mapping[str, ObjectSpec] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def aliases(self) -> dict[str, str]:
        """Further class ids of segments -> class id of a bank."""
        return {alias: class_id for class_id, spec in self.specs.items() for alias in spec.aliases}

    def class_of(self, name: str) -> str | None:
        """Class id of a bank for a class id or an alias; None if there is none."""
        class_id = self.aliases.get(name, name)
        return class_id if class_id in self.banks else None


@dataclass(frozen=True)
class MeshFolder:
    """Where objects come from and how they are onboarded.

    Attributes:
        path: mesh directory. unit: of meshes that nothing else says it of.
        viewpoints: templates per object. cache_dir: of the banks; None for the user's cache folder.
        shading: how templates are lit.
    """

    path: Path
    unit: str
    viewpoints: int
    cache_dir: Path | None
    shading: Shading | Literal["preset"] = "preset"

    def load(
        self, model: PicoPose, device: str | torch.device, tell: Progress, known: ObjectSet | None = None
    ) -> ObjectSet:
        """Onboard the objects of the folder; those of ``known`` that have not changed are taken over.

        A mesh that can't be used does not stop the others; an object that ``known`` has keeps its old bank.

        Raises:
            MeshError: the folder can't be used, or not one of its meshes.
            RenderError: nothing can be rendered on this machine.
        """
        known = known or ObjectSet()
        found = {spec.class_id: spec for spec in discover_objects(self.path, self.unit)}
        fingerprint = model_fingerprint(model)
        banks: dict[str, TemplateBank] = {}
        specs, digests, failed = {}, {}, {}
        for done, (class_id, spec) in enumerate(found.items()):
            tell(class_id, done, len(found))
            try:
                digest = mesh_digest(spec)
                old = known.specs.get(class_id)
                if old is not None and (digest, spec.unit) == (known.digests[class_id], old.unit):
                    bank = known.banks[class_id]
                else:
                    bank = load_or_build(
                        spec,
                        model,
                        self.viewpoints,
                        self.cache_dir,
                        device,
                        fingerprint=fingerprint,
                        shading=None if self.shading == "preset" else self.shading,
                    )
                    for warning in bank.warnings:
                        _log.warning("%s", warning)
            except MeshError as error:
                failed[class_id] = str(error)
                kept = class_id in known.banks
                became = "kept as it was" if kept else "left out"
                # Not the error itself: whoever keeps the record would keep the network, by the traceback.
                _log.error("object '%s' is %s: %s", class_id, became, failed[class_id])
                if not kept:
                    continue
                spec, digest, bank = (part[class_id] for part in (known.specs, known.digests, known.banks))
            specs[class_id], digests[class_id], banks[class_id] = spec, digest, bank
            tell(class_id, done + 1, len(found))
        if not banks:
            raise MeshError(f"no object of {self.path} can be used: " + "; ".join(failed.values()))
        return ObjectSet(banks, specs, digests, failed)


def describe_change(old: ObjectSet, new: ObjectSet) -> str:
    """What a second look at the folder has brought, in one line."""
    both = [name for name in new.banks if name in old.banks]
    parts = {
        "added": [name for name in new.banks if name not in old.banks],
        "changed": [name for name in both if new.banks[name] is not old.banks[name]],
        "removed": [name for name in old.banks if name not in new.banks],
    }
    said = [f"{what} {', '.join(names)}" for what, names in parts.items() if names] or ["nothing changed"]
    for name, reason in new.failed.items():
        said.append(f"{name} {'kept as it was' if name in new.banks else 'left out'} ({reason})")
    count = len(new.banks)
    return f"{count} object{'s' if count != 1 else ''}: " + "; ".join(said)
