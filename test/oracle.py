"""A network that knows the answer: the estimator's other parts are judged by what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import crop_box_from_mask, crop_mask, crop_rgb, mask_background
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.model import PRESETS, Features
from picopose_ros.model.fast import Prepared, Refining, Schedule
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank

CELLS = 64


@dataclass(frozen=True)
class Placed:
    """An object in the picture: its bank, true pose T_cam_obj (4, 4) and segment."""

    bank: TemplateBank
    T_cam_obj: np.ndarray
    segment: Segment


class OracleModel(nn.Module):
    """Says what a perfect PicoPose would say about crops of one picture.

    It recognises the crops of pictures it was shown and of banks it knows by their pixels.
    """

    reranks = False

    def __init__(self) -> None:
        super().__init__()
        self.config = PRESETS["tiny"]
        self.pairs_at_once = 16
        self.anchor = nn.Parameter(torch.zeros(1))
        self.queries: dict[bytes, Placed] = {}
        self.templates: dict[bytes, tuple[TemplateBank, int]] = {}
        self.frames: dict[bytes, np.ndarray] = {}
        self.camera: CameraModel | None = None
        self.uncertain: set[tuple[str, int]] = set()
        self.scrambled = False
        self.encoded: list[int] = []

    def show(self, rgb: np.ndarray, camera: CameraModel, placed: Sequence[Placed]) -> list[Segment]:
        """Learn the answer for one picture; returns its segments."""
        self.camera = camera
        for one in placed:
            box = crop_box_from_mask(one.segment.mask)
            crop = mask_background(crop_rgb(rgb, box), crop_mask(one.segment.mask, box))
            self.queries[crop.tobytes()] = one
            self.frames[crop.tobytes()] = box.affine().astype(np.float64)
        return [one.segment for one in placed]

    def know(self, bank: TemplateBank) -> None:
        """Learn the templates of a bank."""
        for index, crop in enumerate(bank.crops(range(len(bank)))):
            self.templates[crop.numpy().tobytes()] = (bank, index)

    def encode(self, rgb: Tensor) -> Features:
        """A crop's features are its pixels; its descriptors say the how manieth of the shown ones it is."""
        self.encoded.append(len(rgb))
        shown = list(self.queries)
        numbers = [float(shown.index(key)) if key in shown else -1.0 for key in _keys(rgb)]
        return Features((rgb,), torch.tensor(numbers)[:, None, None].expand(-1, 4, 256))

    def describer(self) -> Callable[[Tensor], Tensor]:
        """The descriptors of :meth:`encode` alone."""
        return lambda rgb: self.encode(rgb).descriptors

    def fast(self, schedule: Schedule | None = None) -> OracleModel:
        """It knows no faster way."""
        self.schedule = replace(schedule or Schedule(), template_parts=False)
        return self

    def features(self, crops: Tensor) -> Prepared:
        """Of crops, in one step."""
        return self.query(self.encode(crops))

    def query(self, features: Features) -> Prepared:
        return Prepared(features.descriptors, features.taps)

    template = query

    def parts(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ()

    def scores(self, descriptors: Tensor, patches: Tensor, bank: Tensor, bank_patches: Tensor) -> Tensor:
        """Minus the angle to the true pose."""
        rows = []
        for number in descriptors[:, 0, 0].int().tolist():
            placed = list(self.queries.values())[number]
            true = placed.T_cam_obj[:3, :3]
            rows.append([1 - rotation_angle_deg(T[:3, :3], true) / 180 for T in placed.bank.T_cam_ctr])
        return torch.tensor(rows)

    def affine(self, query: Prepared, template: Prepared, *masks_and_centres: Tensor) -> Tensor:
        affines = []
        for q, t in zip(_keys(query.maps[0]), _keys(template.maps[0])):
            bank, index = self.templates[t]
            affines.append(self._affine(self.queries[q], bank, index, self.frames[q]))
        return torch.from_numpy(np.stack(affines))

    def start(self, affine: Tensor, template_patches: Tensor) -> Refining:
        return Refining(affine, torch.zeros(len(affine), 2, 16, 16), template_patches[:, None])

    def enlarged(self, state: Refining) -> Refining:
        larger = (torch.kron(m, torch.ones(2, 2)) for m in (2 * state.flow, state.certainty))
        return Refining(state.affine, *larger)

    def refine(self, level: int, state: Refining, query: Prepared, template: Prepared) -> Refining:
        """The answer, on coarse grids every fourth or second cell's."""
        flow, certainty = self._answer(_keys(query.maps[0]), _keys(template.maps[0]))
        step = 2 ** (2 - level)
        return Refining(state.affine, flow[..., ::step, ::step] / step, certainty[..., ::step, ::step])

    def _answer(self, queries: list[bytes], templates: list[bytes]) -> tuple[Tensor, Tensor]:
        """Flow (B, 2, 64, 64) and certainty (B, 1, 64, 64)."""
        flows, certainties = [], []
        for q, t in zip(queries, templates):
            placed, M_query = self.queries[q], self.frames[q]
            bank, index = self.templates[t]
            assert bank is placed.bank, "a query was paired with another object's template"
            points = bank.points_consistent[index].astype(np.float64)
            T_cam_tpl = bank.T_cam_ctr[index].astype(np.float64)
            T_cam_ctr = placed.T_cam_obj @ np.linalg.inv(bank.T_ctr_obj)
            in_query = (points - T_cam_tpl[:3, 3]) @ T_cam_tpl[:3, :3] @ T_cam_ctr[:3, :3].T + T_cam_ctr[
                :3, 3
            ]
            on_object = points[..., 2] > 0
            uv = self.camera.project(np.where(on_object[..., None], in_query, [0, 0, 1]).reshape(-1, 3))
            crop_px = (uv @ M_query[:2, :2].T + M_query[:2, 2]).reshape(CELLS, CELLS, 2)
            grid = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS)), -1)
            flow = (crop_px - 0.5) / 3.5 - grid
            if self.scrambled:
                flow = np.random.default_rng(index).uniform(-20, 20, flow.shape)
            certainty = np.where(on_object, 5.0, -5.0)
            if (bank.class_id, index) in self.uncertain:
                lucky = np.zeros((CELLS, CELLS), bool)
                ys, xs = np.nonzero(on_object)
                some = np.random.default_rng(0).permutation(len(ys))[:5]
                lucky[ys[some], xs[some]] = True
                certainty = np.where(lucky, 5.0, -5.0)
            flows.append(flow.transpose(2, 0, 1))
            certainties.append(certainty[None])
        return torch.tensor(np.stack(flows)), torch.tensor(np.stack(certainties))

    def _affine(self, placed: Placed, bank: TemplateBank, index: int, M_query: np.ndarray) -> np.ndarray:
        """The true scale and place, no turn: template crop px -> query crop px."""
        T_tpl, T_ctr = bank.T_cam_ctr[index], placed.T_cam_obj @ np.linalg.inv(bank.T_ctr_obj)
        M_template = bank.M_crop_img[index]
        scale = (
            T_tpl[2, 3] / T_ctr[2, 3] * self.camera.K[0, 0] / bank.K[0, 0] * M_query[0, 0] / M_template[0, 0]
        )
        uv = self.camera.project(T_ctr[None, :3, 3])[0]
        target = M_query[:2, :2] @ uv + M_query[:2, 2]
        M = np.diag([scale, scale, 1.0])
        M[:2, 2] = target - scale * bank.centres[index]
        return M


def _keys(crops: Tensor) -> list[bytes]:
    return [crop.numpy().tobytes() for crop in crops]
