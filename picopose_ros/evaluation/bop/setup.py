"""What `eval bop` and `eval tables` share: arguments, the run that they describe, its loop over images."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from picopose_ros import __version__
from picopose_ros.arguments import add_network_arguments, add_refinements, positive, refinements
from picopose_ros.errors import DatasetError, MeshError
from picopose_ros.estimator import EstimatorSettings, PoseEstimator, torch_device
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.bop.detections import BopDetections
from picopose_ros.evaluation.bop.journal import ImageRecord, Journal
from picopose_ros.model import PicoPose, load_model, model_fingerprint
from picopose_ros.model.checkpoint import preset_of
from picopose_ros.progress import progress_bar
from picopose_ros.templates.bank import onboard
from picopose_ros.templates.meshes import mesh_digest
from picopose_ros.templates.renderer import Shading

MIN_MASK_PIXELS = 9
"""Segments with fewer visible pixels are skipped. (Of those the released code makes a crop of the detection's
box whose affine is wrong.)"""


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Which dataset."""
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="folder of the BOP datasets' folders"
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="the dataset's folder: lmo, tless")
    parser.add_argument("--split", default="test", help="folder of its scenes (test)")


def add_estimation_arguments(parser: argparse.ArgumentParser) -> None:
    """What is estimated, and how."""
    add_dataset_arguments(parser)
    parser.add_argument(
        "--detections", type=Path, required=True, metavar="CNOS.json", help="what CNOS found in its images"
    )
    parser.add_argument("--preset", help="size of the network; by default the one the weights are made for")
    add_network_arguments(parser)
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    add_refinements(parser)
    parser.add_argument(
        "--decode",
        choices=("subpixel", "reference"),
        default=EstimatorSettings().decode,
        help="how correspondences become a pose; reference: as the released code (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default=EstimatorSettings().precision,
        help="what the network computes in (%(default)s); the released code: fp32",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")


@dataclass(frozen=True, eq=False)
class BopRun:
    """Everything that a run over a dataset is made of.

    Attributes:
        dataset, detections: what to estimate. images: (scene, image) of all processes.
        settings: of the estimator. preset, model: the network.
        device, viewpoints, cache_dir, shading: as in ``PoseEstimator.from_mesh_dir``.
        about: all that the results depend on, in types that JSON knows. A run with another ``about`` is
            another run.
    """

    dataset: BopDataset
    detections: BopDetections
    images: Sequence[tuple[int, int]]
    settings: EstimatorSettings
    preset: str
    model: PicoPose
    device: str
    viewpoints: int
    cache_dir: Path | None
    shading: Shading | None
    about: Mapping[str, Any]

    @classmethod
    def prepare(cls, args: argparse.Namespace, device: str | None = None) -> BopRun:
        """Read what `add_estimation_arguments` asks for, all but the objects.

        Args:
            args: the command line. device: instead of the one it names.
        Raises:
            DatasetError: dataset or detections can't be used, nothing is asked for, or an object that is
                asked for has no model.
            ConfigError, WeightsError: the network can't be loaded.
        """
        device = device or args.device
        dataset = BopDataset(args.root, args.dataset, args.split)
        detections = BopDetections(args.detections)
        images = dataset.images[: args.limit]
        if not images:
            raise DatasetError(f"{dataset.targets_path}: asks for nothing")
        check_objects(dataset)
        settings = EstimatorSettings(
            args.hypotheses,
            args.decode,
            min_mask_pixels=MIN_MASK_PIXELS,
            precision=args.precision,
            **refinements(args),
        )
        preset = args.preset or preset_of(args.weights)
        model = load_model(preset, args.weights, torch_device(device))
        about = {
            "version": __version__,
            "preset": preset,
            "weights": model_fingerprint(model),
            "models": _digest("".join(mesh_digest(spec) for spec in dataset.models.values()).encode()),
            "dataset": dataset.name,
            "split": dataset.split_dir.name,
            "targets": _digest(dataset.targets_path.read_bytes()),
            "detections": _digest(args.detections.read_bytes()),
            "viewpoints": args.viewpoints,
            "shading": args.shading,
            **asdict(settings),
        }
        return cls(
            dataset,
            detections,
            images,
            settings,
            preset,
            model,
            device,
            args.viewpoints,
            args.cache_dir,
            args.shading,
            about,
        )

    def estimator(self) -> PoseEstimator:
        """Of the dataset's objects, whose templates are made or taken from the cache.

        Raises:
            MeshError: a model that the targets ask for can't be used.
            ConfigError, RenderError: as ``PoseEstimator.from_mesh_dir``.
        """
        onboarding = onboard(
            self.dataset.models_dir,
            self.model,
            self.viewpoints,
            "mm",
            self.cache_dir,
            self.device,
            progress=True,
            shading=self.shading,
        )
        asked = {self.dataset.models[target.obj_id].class_id for target in self.dataset.targets}
        failed = {name: reason for name, reason in onboarding.failed.items() if name in asked}
        if failed:
            raise MeshError(f"the targets ask for objects that can't be used: {'; '.join(failed.values())}")
        return PoseEstimator(self.model, onboarding.banks, self.settings, self.device)

    def complete(
        self,
        journal: Journal,
        images: Sequence[tuple[int, int]],
        measure_with: Callable[[PoseEstimator], Callable[[int, int], ImageRecord]],
        quiet: bool = False,
    ) -> None:
        """Measure the images that the journal lacks or whose record failed, and keep each at once.

        Args:
            images: of this process. measure_with: gives, for the estimator, what makes the record of an
                image (scene, image); called only if an image is missing. quiet: no progress bar.
        Raises:
            PicoPoseError: see :meth:`estimator`, or the journal can't be written.
        """
        done = {key for key, record in journal.read().items() if not record.failed}
        missing = [key for key in images if key not in done]
        if not missing:
            return
        measure = measure_with(self.estimator())
        before = len(images) - len(missing)
        bar = progress_bar(None, len(images), self.dataset.name, "image", before, hidden=quiet)
        with bar:
            for scene_id, image_id in missing:
                journal.add(measure(scene_id, image_id))
                bar.update()


def check_objects(dataset: BopDataset) -> None:
    """Look whether there is a model of everything that is asked for.

    Raises:
        DatasetError: there isn't; names the entry.
    """
    for index, target in enumerate(dataset.targets):
        if target.obj_id not in dataset.models:
            known = ", ".join(map(str, sorted(dataset.models)))
            raise DatasetError(
                f"{dataset.targets_path}, entry {index}: asks for object {target.obj_id}, but "
                f"{dataset.models_dir} holds {known}"
            )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
