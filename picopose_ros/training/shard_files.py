"""Shards on disk: tar files of images in the BOP-webdataset format (bop_toolkit's `bop_imagewise` names).

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
needed: webdataset's own grouping builds a small index of each shard from the tar's headers, and the files of
a sample are then read by offset.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.errors import ConfigError, PicoPoseError, SegmentError
from picopose_ros.segmentation import rle_decode, rle_decode_compressed
from picopose_ros.training.template_sources import read_image

MIN_VALID_PX = 1024
"""An instance counts from this many pixels with depth (the released filter)."""
MIN_VISIBLE = 0.3
"""... and this share of its silhouette visible."""
_SUFFIXES = ("depth.png", "camera.json", "gt.json", "gt_info.json", "mask_visib.json")


class UnusableSample(Exception):
    """A sample that is passed over."""

    def __init__(self, reason: str, broken: bool = True) -> None:
        super().__init__(reason)
        self.broken = broken
        """False: nothing is wrong with it, it only has no instance that the filters let through."""


def import_webdataset() -> Any:
    """The package webdataset, which only training on shards needs.

    Raises:
        PicoPoseError: it is not installed.
    """
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
        import_webdataset()
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
    import_webdataset()
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


def read_sample(path: Path, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The files of a sample, by suffix; ``places`` are their offsets and lengths in the shard."""
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
        raise UnusableSample(f"{name} is not {wanted}") from error
    if not np.isfinite(array).all():
        raise UnusableSample(f"{name} is not finite")
    return array


def _pose(entry: Mapping[str, Any]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = _numbers(entry["cam_R_m2c"], (3, 3), "gt.json: cam_R_m2c")
    pose[:3, 3] = _numbers(entry["cam_t_m2c"], (3,), "gt.json: cam_t_m2c") / 1000
    rotation = pose[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise UnusableSample("gt.json: cam_R_m2c is not a rotation")
    if pose[2, 3] <= 0:
        raise UnusableSample("gt.json: the object is behind the camera")
    return pose


def _mask(entry: Any, size: tuple[int, int]) -> np.ndarray:
    if list(entry["size"]) != list(size):
        raise UnusableSample(f"mask_visib.json: a mask is {entry['size']}, the image {list(size)}")
    counts = entry["counts"]
    decode = rle_decode_compressed if isinstance(counts, str) else rle_decode
    try:
        return decode(counts, *size)
    except SegmentError as error:
        raise UnusableSample(f"mask_visib.json: {error}") from error


def decode_sample(
    sample: Mapping[str, bytes], rng: np.random.Generator, known: Callable[[int], bool]
) -> SceneImage:
    """One random instance of a sample that passes the released filters, and the image around it.

    Args:
        sample: suffix -> bytes. known: whether an object's templates can be had.
    Raises:
        UnusableSample: something is missing or wrong, or no instance passes.
    """
    suffix = "rgb.png" if "rgb.png" in sample else "rgb.jpg"
    if missing := [name for name in (suffix, *_SUFFIXES) if name not in sample]:
        raise UnusableSample(f"{missing[0]} is missing")
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
            raise UnusableSample(f"gt.json has {len(truth)} instances, gt_info.json {len(infos)}")
        eligible = [
            i
            for i, info in enumerate(infos)
            if info["px_count_valid"] >= MIN_VALID_PX
            and info["visib_fract"] >= MIN_VISIBLE
            and known(numbers[i])
        ]
        if not eligible:
            raise UnusableSample("no instance passes the filters", broken=False)
        chosen = int(rng.choice(eligible))
        name = "gt.json"
        pose = _pose(truth[chosen])
        name = "camera.json"
        K = _numbers(camera["cam_K"], (3, 3), "camera.json: cam_K")
        scale = float(_numbers(camera["depth_scale"], (), "camera.json: depth_scale"))
        if min(K[0, 0], K[1, 1], scale) <= 0:
            raise UnusableSample("camera.json: focal lengths and depth_scale must be positive")
        name = suffix
        rgb = read_image(sample[suffix])
        rgb = np.repeat(rgb[..., None], 3, 2) if rgb.ndim == 2 else np.ascontiguousarray(rgb[..., :3])
        name = "depth.png"
        depth = read_image(sample[name])
        if rgb.shape[2] != 3 or rgb.dtype != np.uint8 or depth.shape != rgb.shape[:2]:
            raise UnusableSample(f"the image is {rgb.shape} {rgb.dtype}, its depth {depth.shape}")
        name = "mask_visib.json"
        mask = _mask(masks[str(chosen)], rgb.shape[:2])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UnusableSample(f"{name}: {reason}") from error
    metres = depth.astype(np.float32) * np.float32(scale / 1000)
    return SceneImage(rgb, metres, K, Instance(numbers[chosen], pose, mask))
