"""The network and the objects of a node, and what is done with them. No ROS in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from picopose_ros.errors import ConfigError
from picopose_ros.estimation.threads import choose_threads
from picopose_ros.estimator import EstimateResult, EstimatorSettings, PoseEstimator, encode_by
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages.answers import Judged, judge
from picopose_ros.model import PicoPose, load_model
from picopose_ros.node.objects import MeshFolder, ObjectSet, Progress
from picopose_ros.node.parameters import NodeParameters
from picopose_ros.segmentation import Segment


def resolve_device(name: str) -> str:
    """``auto`` and names of devices to a device that is there.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"parameter device is '{name}', which can't be used here ({reason}): try cpu"
        ) from error
    return name


class Engine:
    """Network and objects, from loading to the poses of a frame. For the worker's thread, where not said
    otherwise.

    Args:
        parameters: what to load.

    Attributes:
        device: where the network runs.
        objects: that can be estimated; replaced as a whole, so any thread may look.

    Raises:
        ConfigError: there is no such device.
    """

    def __init__(self, parameters: NodeParameters) -> None:
        self._parameters = parameters
        self._folder = MeshFolder(
            parameters.mesh_dir,
            parameters.unit,
            parameters.viewpoints,
            parameters.cache_dir,
            parameters.shading,
        )
        self.device = resolve_device(parameters.device)
        self.objects = ObjectSet()
        self._model: PicoPose | None = None
        self._estimator: PoseEstimator | None = None

    def load(self, tell: Progress) -> None:
        """Load the network, onboard the objects, and estimate something that means nothing.

        Raises:
            MeshError, CheckpointError, ConfigError, RenderError: what can't be used, where and what to do.
        """
        p = self._parameters
        self._model = load_model(p.preset, p.weights, torch.device(self.device))
        encode_by(self._model, torch.device(self.device), p.backend, p.onnx_dir, p.precision)
        objects = self._folder.load(self._model, self.device, tell)
        if p.segmentation_input == "mask" and objects.class_of(p.mask_class) is None:
            known = ", ".join(sorted({*objects.banks, *objects.aliases}))
            raise ConfigError(
                f"parameter mask_class is '{p.mask_class}', but no object is called that; onboarded are "
                f"{known}"
            )
        self.take(objects)
        self._warm_up()

    def look_again(self, tell: Progress) -> ObjectSet:
        """Onboard what is new or changed in the mesh directory; for any thread, :meth:`take` is to follow.

        Raises:
            MeshError, RenderError: as :meth:`load`; nothing has changed then.
        """
        return self._folder.load(self._model, self.device, tell, self.objects)

    def take(self, objects: ObjectSet) -> None:
        """From now on estimate these objects."""
        if self._estimator is None:
            p = self._parameters
            settings = EstimatorSettings(
                hypotheses=p.hypotheses,
                prune=p.prune,
                refinements=p.refinements,
                precision=p.precision,
                compile=p.compile,
                backend=p.backend,
                onnx_dir=p.onnx_dir,
                template_cache_mb=p.template_cache_mb,
            )
            self._estimator = PoseEstimator(
                self._model, objects.banks, settings, self.device, objects.aliases
            )
        else:
            self._estimator = self._estimator.with_banks(objects.banks, objects.aliases)
        self.objects = objects

    def estimate(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        segments: Sequence[Segment],
        hypotheses: int,
        prune: int = 0,
        refinements: int = EstimatorSettings.refinements,
        depth: np.ndarray | None = None,
    ) -> EstimateResult:
        """Poses of the segments of an image; see `PoseEstimator.estimate`."""
        settings = self._estimator.settings
        wanted = replace(settings, hypotheses=hypotheses, prune=prune, refinements=refinements)
        if wanted != settings:
            self._estimator.settings = wanted
        return self._estimator.estimate(rgb, camera, segments, depth=depth)

    @property
    def estimator(self) -> PoseEstimator | None:
        """What estimates; another one once :meth:`take` was called."""
        return self._estimator

    def judge(self, result: EstimateResult, segments: Sequence[Segment], min_score: float) -> Judged:
        """Sort out what is good enough to be published. ``segments``: those of the estimate."""
        least = self._estimator.settings.min_mask_pixels
        return judge(result, segments, min_score, least, lambda name: self.objects.class_of(name) is not None)

    def close(self) -> None:
        """Let go of the memory."""
        self._estimator = self._model = None
        self.objects = ObjectSet()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _warm_up(self) -> None:
        """One frame that means nothing: allocations and lazy set-up are done before the first real one."""
        height, width = 480, 640
        rows, cols = np.mgrid[:height, :width]
        rgb = np.stack([rows % 256, cols % 256, (rows + cols) % 256], -1).astype(np.uint8)
        mask = (rows - height / 2) ** 2 + (cols - width / 2) ** 2 < 100**2
        K = np.array([[600.0, 0, width / 2], [0, 600.0, height / 2], [0, 0, 1]])
        segment = Segment(class_id=next(iter(self.objects.banks)), score=1.0, mask=mask)
        self._estimator.warm_up()
        camera = CameraModel(K, width, height, "", ())
        self._estimator.estimate(rgb, camera, [segment])
        if self.device == "cpu":
            choose_threads(lambda: self._estimator.estimate(rgb, camera, [segment]))
