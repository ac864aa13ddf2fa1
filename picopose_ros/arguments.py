"""Arguments that several sub-commands share, and their checks before the long work."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from picopose_ros.errors import CheckpointError, ConfigError, MeshError, PicoPoseError
from picopose_ros.libraries import importing

if TYPE_CHECKING:
    import torch

    from picopose_ros.estimator import PoseEstimator
    from picopose_ros.model import PicoPose

DEFAULT_UNIT = "m"
CLASS_HELP = (
    "class of a mask's object, as often as there are masks; or VALUE=NAME for a value of a label image"
)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def add_onboarding_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides how meshes become templates."""
    parser.add_argument(
        "--unit",
        choices=("m", "mm", "cm", "in"),
        help="unit of the meshes that nothing else says it of; without it metres are taken, and a mesh that "
        "would then be too large or too small is an error",
    )
    parser.add_argument("--preset", default="tiny", help="size of the network: tiny (default) or vitl")
    add_network_arguments(parser)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network makes the templates, where, and how many."""
    parser.add_argument("--weights", type=Path, help="checkpoint of the network; the packaged one by default")
    parser.add_argument("--device", default="cpu", help="where the network runs: cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--viewpoints", type=int, default=162, choices=(42, 162, 642), help="templates per object (162)"
    )
    parser.add_argument(
        "--shading",
        choices=("flat", "headlight", "auto"),
        help="how templates are lit: flat (colours as they are), headlight (by a light in the camera), auto "
        "(headlight for meshes of one colour); as the preset has it by default (tiny: auto, vitl: flat)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where templates are kept; the user's cache by default"
    )


def add_refinements(parser: argparse.ArgumentParser) -> None:
    """How often poses are refined; see `refinements`."""
    parser.add_argument(
        "--refinements",
        type=int,
        choices=range(9),
        metavar="N",
        help="rounds of refinement: the object is rendered at its pose and compared with the image again "
        "(0 to 8; without it the package's default)",
    )


def refinements(args: argparse.Namespace) -> dict[str, int]:
    """The estimator's setting that ``--refinements`` asks for; none where it isn't given."""
    return {} if args.refinements is None else {"refinements": args.refinements}


def numbers(words: Sequence[str]) -> list[float]:
    """The words as numbers; empty if one of them isn't."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return []


def join_numbers(argv: Sequence[str], option: str, count: int) -> list[str]:
    """Make the ``count`` numbers behind an option one argument: argparse knows no option of 1 or 4 words."""
    words, index = [], 0
    while index < len(argv):
        words.append(argv[index])
        index += 1
        if words[-1] == option and len(numbers(argv[index : index + count])) == count:
            words.append(" ".join(argv[index : index + count]))
            index += count
    return words


@contextlib.contextmanager
def blaming(option: str, kind: type[PicoPoseError] = PicoPoseError) -> Iterator[None]:
    """Put the option whose value can't be used in front of the message of an error of this kind."""
    try:
        yield
    except kind as error:
        raise type(error)(f"{option}: {error}") from error


def check_output(path: Path, option: str) -> None:
    """Check before the work that a file can be written.

    Raises:
        ConfigError: its folder doesn't exist or can't be written to, or it is a folder itself.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option}: the folder {folder} does not exist; make it first, or name another one")
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{option}: {path} can't be written: permission denied; name another file")


def settle_unit(args: argparse.Namespace, option: str = "--meshes") -> None:
    """Check the mesh folder and settle ``args.unit``, the unit of the meshes that nothing else says it of.

    Where it isn't given metres are taken, and an object whose size makes no sense in metres is an error: a
    pose is worthless where the mesh is a thousand times too large. Giving ``--unit`` skips this check, for
    which the meshes are read.

    Args:
        args: of a command with `add_onboarding_arguments` and ``meshes``.
        option: what the command line calls the mesh folder.

    Raises:
        MeshError: the folder can't be used, or a unit has to be given.
    """
    from picopose_ros.templates.meshes import USUAL_DIAMETER, discover_objects, load_object, unit_advice

    with blaming(option):
        specs = discover_objects(args.meshes, args.unit or DEFAULT_UNIT)
        if args.unit is not None:
            return
        args.unit = DEFAULT_UNIT
        others = discover_objects(args.meshes, "mm")
    # Whose unit is another one under another default, that unit is stated nowhere.
    unstated = [spec for spec, other in zip(specs, others) if spec.unit != other.unit]
    wrong = []
    for spec in unstated:
        try:
            mesh = load_object(spec)
        except MeshError:  # onboarding reports it as that object's failure
            continue
        if not USUAL_DIAMETER[0] <= mesh.diameter <= USUAL_DIAMETER[1]:
            wrong.append(unit_advice(mesh))
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise MeshError(f"--unit is not given, and {wrong[0]}{more}: say which unit it is by --unit")


def known_classes(args: argparse.Namespace) -> list[str]:
    """Class ids of the objects of ``--meshes``, and their aliases.

    Raises:
        MeshError: the folder can't be used.
    """
    from picopose_ros.templates.meshes import discover_objects

    with blaming("--meshes"):
        specs = discover_objects(args.meshes, args.unit or DEFAULT_UNIT)
    return [name for spec in specs for name in (spec.class_id, *spec.aliases)]


def load_estimator(args: argparse.Namespace) -> PoseEstimator:
    """The estimator that the onboarding arguments, `meshes` and `hypotheses` ask for; shows its progress.

    Sets ``args.unit`` (see `settle_unit`).

    Raises:
        PicoPoseError: names the option whose value can't be used.
    """
    with importing():
        from picopose_ros.estimator import PoseEstimator

    settle_unit(args)
    _check_network(args)
    with blaming("--weights", CheckpointError):
        return PoseEstimator.from_mesh_dir(
            args.meshes,
            preset=args.preset,
            weights=args.weights,
            device=args.device,
            unit=args.unit,
            viewpoints=args.viewpoints,
            cache_dir=args.cache_dir,
            hypotheses=args.hypotheses,
            progress=True,
            **refinements(args),
            backend=getattr(args, "backend", "torch"),
            onnx_dir=str(getattr(args, "onnx_dir", None) or ""),
            shading=args.shading,
        )


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """What runs the network."""
    parser.add_argument(
        "--backend",
        default="torch",
        choices=("torch", "onnxruntime"),
        help="what runs the network: torch (default), or onnxruntime where it is faster; installed apart",
    )
    parser.add_argument(
        "--onnx-dir", type=Path, help="folder of `picopose export`; by default made when needed, and cached"
    )


def load_network(args: argparse.Namespace) -> tuple[PicoPose, torch.device]:
    """The network that the arguments ask for, and its device.

    Raises:
        PicoPoseError: names the option whose value can't be used.
    """
    from picopose_ros.model import load_model

    device = _check_network(args)
    with blaming("--weights", CheckpointError):
        return load_model(args.preset, args.weights, device), device


def _check_network(args: argparse.Namespace) -> torch.device:
    from picopose_ros.estimator import torch_device
    from picopose_ros.model import preset

    with blaming("--preset"):
        preset(args.preset)
    with blaming("--device"):
        return torch_device(args.device)
