"""``--camera``: the intrinsics of one image, from numbers or from the files that are in use.

| given | from |
|---|---|
| ``fx fy cx cy`` | four numbers in pixels |
| ``{"K", "width", "height", "distortion_model", "D"}`` | this package's JSON |
| ``{"fx", "fy", "cx", "cy", "width", "height"}`` | BOP's camera.json |
| ``{"cam_K", ...}`` by image id, or alone | BOP's scene_camera.json |
| ``{"K", "resolution": [height, width]}`` | MegaPose's and happypose's camera_data.json |
| ``image_width``, ``camera_matrix``, ... | YAML of ROS's camera_calibration |
| ``height``, ``width``, ``k``, ``d``, ... | YAML of ``ros2 topic echo --once .../camera_info`` |

What states no image size has that of the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from picopose_ros.arguments import numbers
from picopose_ros.errors import CameraError
from picopose_ros.geometry.cameras import CameraModel, is_rectified_topic

FORMS = (
    "fx fy cx cy in pixels; JSON with K (BOP's camera.json or scene_camera.json, MegaPose's "
    "camera_data.json, or K, width, height, distortion_model, D); YAML of a ROS camera_info"
)


def read_camera(text: str, size: tuple[int, int], image: Path) -> CameraModel:
    """The camera of an image.

    Args:
        text: four numbers, or the path of a file in one of the forms above.
        size: height and width of the image.
        image: its file; the number in its name chooses the entry of a scene_camera.json.

    Raises:
        CameraError: the file can't be read, is of no known form, or is of another image size.
    """
    words = text.replace(",", " ").split()
    values = numbers(words)
    if len(values) == len(words) and not Path(text).exists():
        if len(values) != 4:
            raise CameraError(f"{text!r} has {len(values)} numbers; give four, fx fy cx cy, or a file")
        return _finished(_matrix(*values), size, {}, text)
    path = Path(text).expanduser()
    entry = _read(path)
    try:
        return _camera(entry, size, image, str(path))
    except CameraError as error:
        raise CameraError(f"{path}: {error}") from error
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise CameraError(f"{path}: can't be used as a camera ({error}); give {FORMS}") from error


def _camera(entry: Mapping[str, Any], size: tuple[int, int], image: Path, source: str) -> CameraModel:
    if "camera_matrix" in entry:
        return _calibration(entry, size, source)
    if {"k", "height", "width"} <= set(entry) or {"K", "P", "R", "height", "width"} <= set(entry):
        return _camera_info(entry, size, image, source)
    if "camera" in entry and isinstance(entry["camera"], Mapping):
        return _camera(entry["camera"], size, image, source)
    if {"fx", "fy", "cx", "cy"} <= set(entry):
        return _finished(_matrix(*(entry[name] for name in ("fx", "fy", "cx", "cy"))), size, entry, source)
    for name in ("K", "cam_K", "k"):
        if name in entry:
            return _finished(entry[name], size, entry, source)
    if entry and all(re.fullmatch(r"\d+", str(key)) for key in entry):
        return _camera(_of_image(entry, image), size, image, source)
    raise CameraError(f"holds no intrinsics (its keys: {', '.join(map(str, list(entry)[:8]))}); give {FORMS}")


def _of_image(scene: Mapping[Any, Any], image: Path) -> Mapping[str, Any]:
    """The entry of a scene_camera.json that belongs to the image."""
    entries = {int(key): value for key, value in scene.items()}
    if image.stem.isdigit() and int(image.stem) in entries:
        return entries[int(image.stem)]
    different = {json.dumps(entry.get("cam_K")) for entry in entries.values()}
    if len(different) == 1:
        return next(iter(entries.values()))
    raise CameraError(
        f"holds {len(entries)} images with {len(different)} different cameras, and the name of {image.name} "
        "is the number of none of them: name the image like 000012.png, or give the four numbers fx fy cx cy"
    )


def _calibration(entry: Mapping[str, Any], size: tuple[int, int], source: str) -> CameraModel:
    """What ROS's camera_calibration writes and camera_info_manager reads."""
    distortion = entry.get("distortion_coefficients") or {}
    model = entry.get("distortion_model") or entry.get("camera_model") or ""
    about = {
        "width": entry.get("image_width"),
        "height": entry.get("image_height"),
        "D": distortion.get("data"),
        "distortion_model": model,
    }
    return _finished(entry["camera_matrix"]["data"], size, about, source)


def _camera_info(entry: Mapping[str, Any], size: tuple[int, int], image: Path, source: str) -> CameraModel:
    """A message sensor_msgs/CameraInfo as YAML, with the names of ROS 2 or ROS 1."""
    fields = {str(key).lower(): value for key, value in entry.items()}
    roi = {"x_offset": 0, "y_offset": 0, "width": 0, "height": 0, **(fields.get("roi") or {})}
    message = SimpleNamespace(
        width=int(fields["width"]),
        height=int(fields["height"]),
        distortion_model=fields.get("distortion_model") or "",
        d=[float(value) for value in fields.get("d") or ()],
        k=[float(value) for value in fields["k"]],
        p=[float(value) for value in fields.get("p") or [0.0] * 12],
        roi=SimpleNamespace(**roi),
        binning_x=fields.get("binning_x") or 0,
        binning_y=fields.get("binning_y") or 0,
    )
    camera = CameraModel.from_camera_info(message, is_rectified_topic(image.stem))
    _check_size((camera.height, camera.width), size, source)
    return camera


def _finished(K: Any, size: tuple[int, int], about: Mapping[str, Any], source: str) -> CameraModel:
    height, width = about.get("height"), about.get("width")
    if about.get("resolution") is not None:
        height, width = about["resolution"]
    stated = (int(size[0] if height is None else height), int(size[1] if width is None else width))
    K = [float(value) for row in K for value in (row if isinstance(row, Sequence) else (row,))]
    camera = CameraModel(
        K=K,
        width=stated[1],
        height=stated[0],
        distortion_model=str(about.get("distortion_model") or ""),
        D=tuple(float(value) for value in about.get("D", about.get("d")) or ()),
    )
    camera.validate()
    _check_size(stated, size, source)
    return camera


def _check_size(stated: tuple[int, int], size: tuple[int, int], source: str) -> None:
    if stated != size:
        raise CameraError(
            f"the camera is of {stated[1]}x{stated[0]} pixels, the image has {size[1]}x{size[0]}: give the "
            "intrinsics of this image size"
        )


def _matrix(fx: Any, fy: Any, cx: Any, cy: Any) -> list[float]:
    return [float(fx), 0.0, float(cx), 0.0, float(fy), float(cy), 0.0, 0.0, 1.0]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise CameraError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CameraError(f"{path}: is no text file; give {FORMS}") from error
    try:
        # YAML may hold several documents: `ros2 topic echo` ends with ---.
        if path.suffix.lower() == ".json":
            entry = json.loads(text)
        else:
            entry = next((document for document in yaml.safe_load_all(text) if document is not None), None)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML or JSON"
        reason = " ".join(str(error).split())
        raise CameraError(f"{path}: is no {kind} file ({reason}); give {FORMS}") from error
    if isinstance(entry, list) and len(entry) in (3, 9):  # a bare K
        entry = {"K": entry}
    if not isinstance(entry, Mapping):
        raise CameraError(f"{path}: holds no intrinsics; give {FORMS}")
    return entry
