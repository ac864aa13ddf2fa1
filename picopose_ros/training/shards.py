"""The paper's data: pairs from BOP/MegaPose shards (`train_pbr_web`), mixed with other sources by weight.

A shard is an uncompressed tar of images in the BOP-webdataset format (bop_toolkit's `bop_imagewise` names,
written with webdataset; MegaPose-GSO and MegaPose-ShapeNetCore come as ``shard-000000.tar`` to
``shard-001039.tar`` of about 1000 images each). The files of an image share a key and lie side by side:

- ``KEY.rgb.jpg`` or ``KEY.rgb.png``: the image.
- ``KEY.depth.png``: 16 bit; times the camera's ``depth_scale`` it is millimetres.
- ``KEY.camera.json``: ``cam_K`` (9 numbers, row by row), ``depth_scale``.
- ``KEY.gt.json``: a list, per instance ``obj_id``, ``cam_R_m2c`` (9), ``cam_t_m2c`` (3, millimetres).
- ``KEY.gt_info.json``: a list in the same order, ``px_count_valid``, ``visib_fract`` and more.
- ``KEY.mask_visib.json``: instance number -> visible mask as COCO run lengths ``{size: [h, w], counts}``.

(MegaPose's own first release named its files otherwise; that form is not read.) ``key_to_shard.json`` is not
needed: the headers of a tar say what it holds.

Shards are usually streamed. Here they are read at random, so that a batch is a pure function of (seed, step,
share) and resuming needs no state: webdataset's own grouping builds a small index of each shard from its
headers, and a sample's files are then read by offset. Neighbouring steps draw from the same few shards, each
slot of a batch from its own, so the index of a shard serves hundreds of samples.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from picopose_ros.errors import ConfigError, PicoPoseError, RenderError, SegmentError
from picopose_ros.geometry.crops import CROP_SIZE, crop_box_from_mask, crop_mask
from picopose_ros.segmentation import rle_decode, rle_decode_compressed
from picopose_ros.training.augment import degrade_mask, photometric
from picopose_ros.training.data import Batch, assemble, concatenate
from picopose_ros.training.pairs import Difficulty, QueryCrop, Sample
from picopose_ros.training.pool import QUERY_SIZE, QueryView
from picopose_ros.training.released import PAPER, ReleasedFlaws, visibility_labels
from picopose_ros.training.template_sources import (
    MESH_UPS,
    FolderTemplates,
    MeshTemplates,
    TemplateSource,
    read_image,
)

MIN_VALID_PX = 1024
"""An instance counts from this many pixels with depth (the released filter)."""
MIN_VISIBLE = 0.3
"""... and this share of its silhouette visible."""
MIN_CROP_PX = 32
"""... and this many mask pixels in its 224-pixel crop."""
NEAREST_TEMPLATES = 5
"""A query's template is one of this many nearest views."""

_VISIT = 256
"""Steps for which a slot of the batch stays with one shard."""
_TRIES = 100
"""Samples in a row that may be unusable before the source gives up."""
_KEPT_INDICES = 48
_CANVAS, _MARGIN = 384, (QUERY_SIZE - CROP_SIZE) // 2
_CHECKED_PAIRS = 24
_LEAST_AGREEMENT = 0.5
_SUFFIXES = ("depth.png", "camera.json", "gt.json", "gt_info.json", "mask_visib.json")

Source = Callable[[int, int, int, int], Batch]
"""``source(seed, step, share, pairs)``: a batch of exactly that many queries, a function of these alone."""


@dataclass(frozen=True)
class ShardSource:
    """One data set of shards; an entry of the training config's `shards`."""

    shards: str
    """A folder of .tar files, one of them, or a name with braces (``shard-{000000..001039}.tar``)."""
    models: str = ""
    """Folder of the meshes (see `find_meshes`); templates are rendered when needed. Or:"""
    templates: str = ""
    """Folder of rendered templates (see `FolderTemplates`)."""
    weight: float = 1.0
    """Among all sources of a training."""
    models_up: str = "z"
    """See `MeshTemplates`."""
    template_scale: float = 1e-4
    """Metres per unit of the template folder."""

    @staticmethod
    def from_dict(entry: Any, where: str) -> ShardSource:
        """Read and check an entry.

        Args:
            where: file and key, for the messages.
        Raises:
            ConfigError: unknown key, or a value that cannot work. Whether the files are there is not asked.
        """
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must be a mapping with shards, and models or templates")
        known = {f.name: f for f in fields(ShardSource)}
        if unknown := sorted(set(map(str, entry)) - set(known)):
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
        for name, value in entry.items():
            number = known[name].type == "float"
            if not (isinstance(value, int | float) if number else isinstance(value, str)) or value is True:
                raise ConfigError(
                    f"{where}: {name} must be a {'number' if number else 'text'}, not {value!r}"
                )
        if not entry.get("shards"):
            raise ConfigError(
                f"{where}: shards is missing; give a folder of .tar files or a name with braces"
            )
        source = ShardSource(**entry)
        if bool(source.models) == bool(source.templates):
            raise ConfigError(f"{where}: give either models (meshes) or templates (rendered ones)")
        if not (0 <= source.weight < float("inf") and 0 < source.template_scale < float("inf")):
            raise ConfigError(f"{where}: weight must not be negative, template_scale must be positive")
        if source.models_up not in MESH_UPS:
            raise ConfigError(f"{where}: models_up is {source.models_up!r}; use one of {', '.join(MESH_UPS)}")
        return source


class _Unusable(Exception):
    """A sample that is passed over."""

    def __init__(self, reason: str, broken: bool = True) -> None:
        super().__init__(reason)
        self.broken = broken
        """False: nothing is wrong with it, it only has no instance that the filters let through."""


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise PicoPoseError(
            "training on shards needs the package webdataset: pip install --requirement "
            "requirements/training.txt"
        ) from error
    return webdataset


def list_shards(shards: str) -> list[Path]:
    """The shards that an entry names, each known to begin as a tar does.

    Raises:
        ConfigError: none there, one is missing, or one is not an uncompressed tar.
    """
    if Path(shards).expanduser().is_dir():
        paths = sorted(Path(shards).expanduser().glob("*.tar"))
        if not paths:
            raise ConfigError(f"shards {shards}: no .tar file in this folder")
    else:
        _webdataset()
        from webdataset.shardlists import expand_urls

        paths = [Path(name).expanduser() for name in expand_urls(shards)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"shards {shards}: {missing[0]} does not exist ({len(missing)} of {len(paths)} are missing); "
            "shards are read at random, so they have to be files on this machine"
        )
    for path in paths:
        try:
            tarfile.open(path, "r:").close()
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(
                f"shard {path} is not an uncompressed tar archive ({error}): download it again, unpack its "
                "compression, or move it away"
            ) from error
    return paths


ShardIndex = dict[str, dict[str, tuple[int, int]]]
"""Sample's key -> file's suffix -> (offset, length) in the shard, bytes."""


def index_shard(path: Path) -> tuple[ShardIndex, list[str]]:
    """Where the files of each sample lie in a shard.

    Returns:
        The index, and what is wrong with the shard: one that is cut short gives its whole samples.
    """
    _webdataset()
    from webdataset.tariterators import group_by_keys

    problems: list[str] = []

    def members() -> Any:
        end = 0
        try:
            length = path.stat().st_size
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    end = member.offset_data + member.size
                    if member.isreg() and end <= length:
                        place = (member.offset_data, member.size)
                        yield {"fname": member.name, "data": place, "__url__": str(path)}
        except (tarfile.TarError, OSError) as error:
            problems.append(f"the shard is damaged or cut short: {error}")
            return
        # tarfile takes a cut within a header for the end; a whole tar ends with an empty block.
        if length < -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
            problems.append("the shard is cut short")

    def note(error: Exception) -> bool:
        problems.append(str(error.args[0]))
        return True

    index = {}
    for sample in group_by_keys(members(), handler=note):
        index[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return index, problems


def _read(path: Path, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    with path.open("rb") as file:
        content = {}
        for suffix, (offset, length) in sorted(places.items(), key=lambda item: item[1]):
            file.seek(offset)
            content[suffix] = file.read(length)
    return content


@dataclass(frozen=True)
class Instance:
    """An object in an image."""

    number: int
    """Of the object."""
    T_cam_obj: np.ndarray
    """(4, 4) metres."""
    mask: np.ndarray
    """(h, w) bool, its visible pixels."""


@dataclass(frozen=True)
class SceneImage:
    """An image of a shard, with one instance that passed the filters."""

    rgb: np.ndarray
    """(h, w, 3) uint8."""
    depth: np.ndarray
    """(h, w) float32 metres, 0 where unknown."""
    K: np.ndarray
    """(3, 3)."""
    instance: Instance


def _numbers(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        array = np.array(value, np.float64).reshape(shape)
    except (TypeError, ValueError) as error:
        wanted = f"{' x '.join(map(str, shape))} numbers" if shape else "a number"
        raise _Unusable(f"{name} is not {wanted}") from error
    if not np.isfinite(array).all():
        raise _Unusable(f"{name} is not finite")
    return array


def _pose(entry: Mapping[str, Any]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = _numbers(entry["cam_R_m2c"], (3, 3), "gt.json: cam_R_m2c")
    pose[:3, 3] = _numbers(entry["cam_t_m2c"], (3,), "gt.json: cam_t_m2c") / 1000
    rotation = pose[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise _Unusable("gt.json: cam_R_m2c is not a rotation")
    if pose[2, 3] <= 0:
        raise _Unusable("gt.json: the object is behind the camera")
    return pose


def _mask(entry: Any, size: tuple[int, int]) -> np.ndarray:
    if list(entry["size"]) != list(size):
        raise _Unusable(f"mask_visib.json: a mask is {entry['size']}, the image {list(size)}")
    counts = entry["counts"]
    decode = rle_decode_compressed if isinstance(counts, str) else rle_decode
    try:
        return decode(counts, *size)
    except SegmentError as error:
        raise _Unusable(f"mask_visib.json: {error}") from error


def decode_sample(
    sample: Mapping[str, bytes], rng: np.random.Generator, known: Callable[[int], bool]
) -> SceneImage:
    """One random instance of a sample that passes the released filters, and the image around it.

    Args:
        sample: suffix -> bytes. known: whether an object's templates can be had.
    Raises:
        _Unusable: something is missing or wrong, or no instance passes.
    """
    suffix = "rgb.png" if "rgb.png" in sample else "rgb.jpg"
    if missing := [name for name in (suffix, *_SUFFIXES) if name not in sample]:
        raise _Unusable(f"{missing[0]} is missing")
    name = ""  # of the file being looked at, for the message
    try:
        parsed = {}
        for name in ("camera.json", "gt.json", "gt_info.json", "mask_visib.json"):
            parsed[name] = json.loads(sample[name])
        camera, truth, infos, masks = parsed.values()
        name = "gt.json"
        numbers = [int(entry["obj_id"]) for entry in truth]
        name = "gt_info.json"
        if len(truth) != len(infos):
            raise _Unusable(f"gt.json has {len(truth)} instances, gt_info.json {len(infos)}")
        eligible = [
            i
            for i, info in enumerate(infos)
            if info["px_count_valid"] >= MIN_VALID_PX
            and info["visib_fract"] >= MIN_VISIBLE
            and known(numbers[i])
        ]
        if not eligible:
            raise _Unusable("no instance passes the filters", broken=False)
        chosen = int(rng.choice(eligible))
        name = "gt.json"
        pose = _pose(truth[chosen])
        name = "camera.json"
        K = _numbers(camera["cam_K"], (3, 3), "camera.json: cam_K")
        scale = float(_numbers(camera["depth_scale"], (), "camera.json: depth_scale"))
        if min(K[0, 0], K[1, 1], scale) <= 0:
            raise _Unusable("camera.json: focal lengths and depth_scale must be positive")
        name = suffix
        rgb = read_image(sample[suffix])
        rgb = np.repeat(rgb[..., None], 3, 2) if rgb.ndim == 2 else np.ascontiguousarray(rgb[..., :3])
        name = "depth.png"
        depth = read_image(sample[name])
        if rgb.shape[2] != 3 or rgb.dtype != np.uint8 or depth.shape != rgb.shape[:2]:
            raise _Unusable(f"the image is {rgb.shape} {rgb.dtype}, its depth {depth.shape}")
        name = "mask_visib.json"
        mask = _mask(masks[str(chosen)], rgb.shape[:2])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise _Unusable(f"{name}: {reason}") from error
    metres = depth.astype(np.float32) * np.float32(scale / 1000)
    return SceneImage(rgb, metres, K, Instance(numbers[chosen], pose, mask))


def crop_query(
    image: SceneImage, T_obj_ctr: np.ndarray, difficulty: Difficulty, rng: np.random.Generator
) -> QueryCrop:
    """Crop an instance as the network sees it at test time, disturbed as `difficulty` says.

    Of a `Difficulty` only what suits a finished image is used: the chance of a degraded mask, of a background
    that stays, and of photometric noise (`photometric`: this package's list, not the paper's imgaug one).
    What covers the object is in the image; it is not turned.

    Args:
        T_obj_ctr: (4, 4) from the templates' centred frame to the data set's object frame.
    Raises:
        _Unusable: too little of the instance is visible in its crop.
    """
    visible = image.instance.mask.astype(np.uint8)
    if not visible.any():
        raise _Unusable("mask_visib.json: the mask is empty", broken=False)
    segment = degrade_mask(visible, rng) if rng.uniform() < difficulty.degrade else visible
    box = crop_box_from_mask(segment)
    mask = crop_mask(segment, box)
    if mask.sum() < MIN_CROP_PX or crop_mask(visible, box).sum() < MIN_CROP_PX:
        raise _Unusable("too little of the instance is visible", broken=False)
    size = (CROP_SIZE, CROP_SIZE)
    rgb = cv2.resize(image.rgb[box.slices], size, interpolation=cv2.INTER_LINEAR)
    keep_background = rng.uniform() < difficulty.keep_background
    if rng.uniform() < difficulty.photometric:
        rgb = np.clip(photometric(rgb.astype(np.float32), rng), 0, 255).astype(np.uint8)
    if not keep_background:
        rgb = rgb * mask[..., None]

    # The labels want a view of 256 pixels: the crop's scale, and 16 pixels more on every side. Depth and mask
    # are sampled where the view's pixel centres fall in the image, so that they fit the view's camera.
    affine = box.affine().astype(np.float64)
    to_view = affine.copy()
    to_view[:2, 2] += _MARGIN
    inverse = np.linalg.inv(to_view)[:2]

    def sampled(array: np.ndarray, side: int, offset: float, how: int = cv2.INTER_NEAREST) -> np.ndarray:
        back = inverse.copy()
        back[:, 2] -= inverse[:, :2] @ np.full(2, offset)
        return cv2.warpAffine(array, back, (side, side), flags=how | cv2.WARP_INVERSE_MAP)

    pose = image.instance.T_cam_obj @ T_obj_ctr
    view = QueryView(
        rgb=sampled(image.rgb, QUERY_SIZE, 0, cv2.INTER_LINEAR),
        depth=sampled(image.depth, QUERY_SIZE, 0),
        T_cam_ctr=pose.astype(np.float32),
        K=(to_view @ image.K).astype(np.float32),
    )
    border = (_CANVAS - QUERY_SIZE) // 2
    turn = np.array([[1.0, 0, border], [0, 1, border]])
    shift = np.eye(3)
    shift[:2, 2] = border
    to_crop = np.eye(3)
    to_crop[:2, 2] = -border - _MARGIN
    shown = visible if keep_background else visible & segment
    return QueryCrop(
        rgb=rgb,
        mask=mask,
        T_cam_ctr=pose,
        K=shift @ to_view @ image.K,
        M_crop_img=to_crop,
        view=view,
        turn=turn,
        shown=sampled(shown, _CANVAS, border),
    )


def nearest_templates(T_cam_ctr: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """All templates (N,) by how near their direction of view is to a query's, nearest first.

    The direction is that from the object's centre to the camera. (The released code compares optical axes;
    for an object at an image's border they differ from what is seen by up to half the field of view.)

    Args:
        T_cam_ctr: (4, 4). poses: (N, 4, 4) of the templates.
    """
    to_camera = -np.einsum("nji,nj->ni", poses[:, :3, :3], poses[:, :3, 3])
    query = -T_cam_ctr[:3, :3].T @ T_cam_ctr[:3, 3]
    cosine = to_camera @ query / np.linalg.norm(to_camera, axis=1)
    return np.argsort(-cosine, kind="stable")


class ShardPairs:
    """Pairs of shards: a `Source`, and picklable for DataLoader workers.

    Every query has an own template, one of the 5 nearest, and another one of the same object, any of the
    rest. A sample that is broken is passed over and named in the batch's `skipped`.

    Args:
        source: where the shards and the templates are.
        difficulty: see `crop_query`.
        flaws: `self_occluded` leaves the labels' depth check out.
    Raises:
        ConfigError: see `list_shards`, `MeshTemplates`, `FolderTemplates`.
        PicoPoseError: webdataset is missing.
    """

    def __init__(
        self, source: ShardSource, difficulty: Difficulty, flaws: ReleasedFlaws = PAPER.flaws
    ) -> None:
        _webdataset()
        self.source, self.difficulty, self.flaws = source, difficulty, flaws
        self.paths = list_shards(source.shards)
        self._open()

    def _open(self) -> None:
        near = self.paths[0].parent
        if self.source.models:
            models = Path(self.source.models).expanduser()
            self.templates: TemplateSource = MeshTemplates(models, near, self.source.models_up)
        else:
            folder = Path(self.source.templates).expanduser()
            self.templates = FolderTemplates(folder, self.source.template_scale)
        self._indices: dict[int, ShardIndex] = {}
        self._agreements: list[float] = []
        self._checked: list[SceneImage] = []

    def __getstate__(self) -> dict[str, Any]:
        # What is open stays in its process: an OpenGL context, above all.
        return {
            "source": self.source,
            "difficulty": self.difficulty,
            "flaws": self.flaws,
            "paths": self.paths,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __call__(self, seed: int, step: int, share: int, pairs: int) -> Batch:
        """The pairs of a share of a step.

        Raises:
            PicoPoseError: 100 samples in a row could not be used; names the last.
            ConfigError: poses and templates do not fit together.
        """
        skipped: list[str] = []
        samples = [self._slot(seed, step, share, slot, skipped) for slot in range(pairs)]
        return assemble(samples, skipped)

    def _slot(self, seed: int, step: int, share: int, slot: int, skipped: list[str]) -> Sample:
        rng = np.random.default_rng([seed, step, share, slot, 0x5A])
        visit, place = divmod(step, _VISIT)
        epoch, turn = divmod(visit, len(self.paths))
        order = np.random.default_rng([seed, share, slot, epoch, 0x5B]).permutation(len(self.paths))
        shard, reason = int(order[turn]), ""
        for attempt in range(_TRIES):
            if attempt and attempt % 20 == 0:  # this shard seems to be of no use
                shard = int(rng.integers(len(self.paths)))
            path = self.paths[shard]
            index = self._index(shard, skipped)
            if not index:
                shard, reason = int(rng.integers(len(self.paths))), f"{path}: no whole sample in it"
                continue
            keys = list(index)
            if attempt == 0:
                shuffled = np.random.default_rng([seed, share, slot, visit, 0x5C]).permutation(len(keys))
                key = keys[shuffled[place % len(keys)]]
            else:
                key = keys[int(rng.integers(len(keys)))]
            try:
                return self.sample(path, index[key], rng)
            except _Unusable as error:
                reason = f"{path}: {key}: {error}"
                if error.broken:
                    skipped.append(reason)
            except (ConfigError, RenderError):  # of the machine or the settings, not of the sample
                raise
            except (PicoPoseError, OSError, ArithmeticError, cv2.error) as error:
                reason = f"{path}: {key}: {error}"
                skipped.append(reason)
        raise PicoPoseError(
            f"{_TRIES} samples in a row of shards {self.source.shards} cannot be used; the last: {reason}"
        )

    def _index(self, shard: int, skipped: list[str]) -> ShardIndex:
        if shard not in self._indices:
            while len(self._indices) >= _KEPT_INDICES:
                del self._indices[next(iter(self._indices))]
            self._indices[shard], problems = index_shard(self.paths[shard])
            skipped += [f"{self.paths[shard]}: {problem}" for problem in problems]
        return self._indices[shard]

    def sample(self, path: Path, places: Mapping[str, tuple[int, int]], rng: np.random.Generator) -> Sample:
        """A query of one sample with its two templates and the labels against either."""
        image = decode_sample(_read(path, places), rng, self.templates.__contains__)
        number = image.instance.number
        T_obj_ctr = np.eye(4)
        T_obj_ctr[:3, 3] = self.templates.centre(number)
        query = crop_query(image, T_obj_ctr, self.difficulty, rng)
        near = nearest_templates(query.T_cam_ctr, self.templates.poses(number))
        chosen = near[int(rng.integers(NEAREST_TEMPLATES))], near[rng.integers(NEAREST_TEMPLATES, len(near))]
        templates = tuple(self.templates.view(number, int(index)) for index in chosen)
        diagonal = self.templates.diagonal(number)
        own, cross = (visibility_labels(t, query, diagonal, self.flaws) for t in templates)
        if len(self._agreements) < _CHECKED_PAIRS:
            self._check(image, query, int(chosen[0]))
        return Sample(templates, [query], [0], [own], [cross])

    def _agreement(self, templates: TemplateSource, number: int, query: QueryCrop, index: int) -> float:
        """Share of a near template's points on the visible mask that the depth image confirms."""
        template, diagonal = templates.view(number, index), templates.diagonal(number)
        seen = visibility_labels(template, query, diagonal).valid.sum()
        projected = visibility_labels(
            template, query, diagonal, ReleasedFlaws(self_occluded=True)
        ).valid.sum()
        return float(seen / max(projected, 20))

    def _check(self, image: SceneImage, query: QueryCrop, index: int) -> None:
        """Tell meshes in another scale or frame than the poses: nothing else would notice them."""
        self._agreements.append(self._agreement(self.templates, image.instance.number, query, index))
        if len(self._checked) < 8:
            self._checked.append(image)
        if len(self._agreements) < _CHECKED_PAIRS:
            return
        checked, self._checked = self._checked, []
        middle = float(np.median(self._agreements))
        if middle >= _LEAST_AGREEMENT:
            return
        advice = "check template_scale" if self.source.templates else "check the meshes' scale"
        if isinstance(self.templates, MeshTemplates):
            found = {up: self._median_agreement(checked, up) for up in MESH_UPS}
            advice += "; by models_up: " + ", ".join(f"{up} {share:.0%}" for up, share in found.items())
        raise ConfigError(
            f"shards {self.source.shards}: only {middle:.0%} of the templates' points lie where the depth "
            f"images have them; poses and {self.source.models or self.source.templates} do not fit together: "
            f"{advice}"
        )

    def _median_agreement(self, checked: Sequence[SceneImage], up: str) -> float:
        templates = self.templates.turned(up)
        plain = Difficulty(occlusion=0, keep_background=1, degrade=0, photometric=0)
        found = []
        for image in checked:
            number = image.instance.number
            T_obj_ctr = np.eye(4)
            T_obj_ctr[:3, 3] = templates.centre(number)
            query = crop_query(image, T_obj_ctr, plain, np.random.default_rng(0))
            near = int(nearest_templates(query.T_cam_ctr, templates.poses(number))[0])
            found.append(self._agreement(templates, number, query, near))
        return float(np.median(found))


class Mixed:
    """A source that draws each of its pairs from one of several sources, by weight.

    Raises:
        ConfigError: no source has a weight.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]) -> None:
        weights = np.array([weight for _, weight in sources], np.float64)
        if not (len(weights) and (weights >= 0).all() and 0 < weights.sum() < np.inf):
            raise ConfigError("the weights of the training's sources must not be negative, and one positive")
        self.sources = [source for source, _ in sources]
        self.shares = weights / weights.sum()

    def __call__(self, seed: int, step: int, share: int, pairs: int) -> Batch:
        counts = np.random.default_rng([seed, step, share, 0x317]).multinomial(pairs, self.shares)
        batches = [
            source(seed, step, share, int(count))
            for source, count in zip(self.sources, counts, strict=True)
            if count
        ]
        return concatenate(batches)
