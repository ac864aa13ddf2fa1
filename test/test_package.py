"""The package as a package: it declares what it uses, and pip takes all of it along."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

import picopose_ros
from picopose_ros import msg

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "picopose_ros").rglob("*.py"))

# Imported name -> (distribution in pyproject.toml, keys of which package.xml has one). timm and trimesh bring
# what has no rosdep key.
THIRD_PARTY = {
    "cv2": ("opencv-python-headless", ("python3-opencv",)),
    "numpy": ("numpy", ("python3-numpy",)),
    "OpenGL": ("pyrender", ("python3-pyrender-pip",)),
    "PIL": ("pyrender", ("python3-pyrender-pip",)),
    "pyrender": ("pyrender", ("python3-pyrender-pip",)),
    "rosbags": ("rosbags", ("python3-rosbags-pip",)),
    "safetensors": ("safetensors", ("python3-timm-pip",)),
    "scipy": ("scipy", ("python3-scipy",)),
    "timm": ("timm", ("python3-timm-pip",)),
    "torch": ("torch", ("python3-torch",)),
    "torchvision": ("timm", ("python3-timm-pip",)),
    "tqdm": ("tqdm", ("python3-tqdm",)),
    "trimesh": ("trimesh", ("python3-trimesh-pip",)),
    "yaml": ("PyYAML", ("python3-yaml",)),
}
# What only training needs: an extra of pyproject.toml, and nothing that a robot installs.
OPTIONAL = {"webdataset": "webdataset"}
BY_HAND = {"bop_toolkit_lib": "docs/bop.md"}
"""Optional, and on no package index: the document that says how to install it."""
ROS = {
    "ament_index_python",
    "builtin_interfaces",
    "cv_bridge",
    "diagnostic_msgs",
    "geometry_msgs",
    "lifecycle_msgs",
    "rcl_interfaces",
    "rclpy",
    "sensor_msgs",
    "std_msgs",
    "std_srvs",
    "tf2_msgs",
    "tf2_ros",
    "vision_msgs",
    "visualization_msgs",
}
# Packages that others of the list always bring along.
IMPLIED_ROS = {"builtin_interfaces": "rclpy", "rcl_interfaces": "rclpy", "tf2_ros": "tf2_ros_py"}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def run_dependencies() -> set[str]:
    return {e.text or "" for tag in ("depend", "exec_depend") for e in manifest().iter(tag)}


def test_every_import_is_a_declared_dependency() -> None:
    required = importlib.metadata.requires("picopose_ros") or []
    distributions = {re.match(r"[\w.-]+", line).group().lower() for line in required}
    keys = run_dependencies()
    used = set().union(*(top_level(imports(path)) for path in SOURCES))
    used -= set(sys.stdlib_module_names) | {"picopose_ros", "__future__"}
    assert {"torch", "cv2", "rclpy"} <= used, "the sources were not read"
    problems = []
    for name in sorted(used):
        if name in ROS:
            if IMPLIED_ROS.get(name, name) not in keys:
                problems.append(f"package.xml lacks {IMPLIED_ROS.get(name, name)}")
        elif name in THIRD_PARTY:
            distribution, rosdep = THIRD_PARTY[name]
            if distribution.lower() not in distributions:
                problems.append(f"pyproject.toml lacks {distribution}")
            if not keys & set(rosdep):
                problems.append(f"package.xml lacks one of {rosdep}")
        elif name in OPTIONAL:
            if OPTIONAL[name] not in distributions:
                problems.append(f"no extra of pyproject.toml names {OPTIONAL[name]}")
        elif name in BY_HAND:
            if "pip install" not in (ROOT / BY_HAND[name]).read_text():
                problems.append(f"{BY_HAND[name]} doesn't say how to install {name}")
        else:
            problems.append(f"{name} is imported and not declared anywhere")
    assert not problems, problems


def test_imports_only_go_down() -> None:
    home = ROOT / "picopose_ros"

    def used_in(*rooms: str) -> dict[str, set[str]]:
        paths = [path for room in rooms for path in SOURCES if path.is_relative_to(home / room)]
        assert paths, rooms
        return {str(path.relative_to(ROOT)): imports(path) for path in paths}

    everything_but_node = {p.relative_to(home).parts[0] for p in SOURCES} - {"node"}
    wrong = [
        (path, name)
        for path, names in used_in(*everything_but_node).items()
        for name in names
        if name.split(".")[0] in ROS - {"ament_index_python"} or name.startswith("picopose_ros.msg")
        # The demo plays a bag into the node, so it is a ROS program itself.
        if not path.startswith("picopose_ros/demo/")
    ]
    assert not wrong, "ROS is imported outside picopose_ros/node"

    def own(names: set[str]) -> set[str]:
        return {name.split(".")[1] for name in names if name.startswith("picopose_ros.")}

    allowed = {
        "geometry": {"geometry", "errors"},
        "segmentation.py": {"errors"},
        "model": {"model", "errors"},
        "templates": {"templates", "model", "geometry", "errors"},
        "estimation": {"estimation", "templates", "model", "geometry", "segmentation", "errors"},
        "estimator.py": {"estimation"},
    }
    for room, below in allowed.items():
        for path, names in used_in(room).items():
            extra = own(names) - below - {"__version__"}
            assert not extra, f"{path} imports {sorted(extra)} of picopose_ros"
    for path, names in used_in("model").items():
        assert not top_level(names) & {"cv2", "scipy", "trimesh", "pyrender"}, path


def test_one_version_everywhere() -> None:
    assert manifest().findtext("version") == picopose_ros.__version__
    assert importlib.metadata.version("picopose_ros") == picopose_ros.__version__


@pytest.mark.parametrize("name", ["Segment", "SegmentArray"])
def test_messages_are_documented_field_by_field(name: str) -> None:
    text = (ROOT / "msg" / f"{name}.msg").read_text()
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n", text)]
    fields = getattr(msg, name).get_fields_and_field_types()
    for field in fields:
        block = next(b for b in blocks if any(re.match(rf"[\w/\[\]]+ {field}$", line) for line in b))
        # height and width share one comment.
        assert block[0].startswith("# "), f"{name}.{field} has no comment"


def test_pins_are_exact_and_complete() -> None:
    def names(path: Path) -> set[str]:
        lines = [line.split("#")[0].split(";")[0].strip() for line in path.read_text().splitlines()]
        found = [re.match(r"[A-Za-z0-9._-]+", line).group() for line in lines if line]
        return {re.sub(r"[-_.]+", "-", name).lower() for name in found}

    folder = ROOT / "requirements"
    core = names(folder / "core.txt") | names(folder / "torch.txt")
    for name in ("core", "dev", "kilted", "jazzy"):
        pinned = names(folder / f"{name}.txt") | core
        assert names(folder / f"{name}.in") <= pinned, f"requirements/lock.sh was not run after {name}.in"
    exact = re.compile(r"#.*|[a-z0-9._-]+==[0-9][\w.]*( ;.*)?")
    for path in folder.glob("*.txt"):
        for line in path.read_text().splitlines():
            assert exact.fullmatch(line), f"{path}: {line}"


def test_wheel_holds_modules_weights_and_the_command(tmp_path: Path) -> None:
    """What pip installs on a machine without ROS, built from a copy so that no old build is picked up."""
    source = tmp_path / "source"
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "picopose_ros", source / "picopose_ros", ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("picopose_ros-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= names
    weights = {str(path.relative_to(ROOT)) for path in ROOT.glob("picopose_ros/weights/*.safetensors")}
    assert weights and weights <= names
    assert "picopose = picopose_ros.cli.main:main" in entry_points
    assert not [n for n in names if n.startswith(("test/", "plain_ros/"))]
