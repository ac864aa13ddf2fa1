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
    "collada": ("pycollada", ("python3-collada",)),
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
# Extras of pyproject.toml: what only training needs, and the other backend.
OPTIONAL = {"onnx": "onnx", "onnxruntime": "onnxruntime", "webdataset": "webdataset"}
BY_HAND = {
    "bop_toolkit_lib": "docs/bop.md",
    "sam2": "docs/segmenters.md",
    "segment_anything": "docs/segmenters.md",
    "ultralytics": "docs/segmenters.md",
}
"""Optional, and for users to install by hand: the document that says how."""
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


# Room (a folder or a file of the package) -> the rooms it may import beside itself; from the bottom up.
BASE = {"errors", "files", "progress", "tf_names"}
CORE = BASE | {"geometry", "model", "templates", "segmentation", "estimation", "estimator", "instances"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "tf_names": set(),
    "launching": {"errors"},
    "libraries": set(),
    "files": {"errors"},
    "progress": set(),
    "geometry": BASE,
    "model": BASE,
    "templates": BASE | {"geometry", "model"},
    "segmentation": BASE | {"geometry", "model", "templates"},
    "estimation": BASE | {"geometry", "model", "templates", "segmentation"},
    "estimator": {"estimation"},
    "instances": BASE | {"geometry", "templates", "estimator"},
    "messages": BASE | {"geometry", "templates", "segmentation", "estimator", "instances"},
    "bags": {"messages"},
    "images": {"messages"},
    "arguments": CORE | {"libraries"},
    "synthetic": BASE | {"geometry", "templates"},
    "training": BASE | {"arguments", "geometry", "model", "templates", "segmentation", "synthetic"},
    "evaluation": CORE | {"arguments", "synthetic"},
    "demo": CORE | {"messages", "arguments", "synthetic", "evaluation", "libraries"},
    "cli": CORE | {"messages", "arguments", "synthetic", "training", "evaluation", "demo", "libraries"},
    "node": CORE | {"messages", "libraries"},
}
# Imports that go up or sideways and are on their way out: this list only gets shorter.
EXCEPTIONS = {
    ("cli", "node"),  # `picopose segments` publishes over ROS
}
# Imports of types that close a circle, on their way out: this list only gets shorter.
CIRCLES = {
    ("picopose_ros.templates.renderer", "picopose_ros.templates.meshes"),
    ("picopose_ros.templates.meshes.gltf_looks", "picopose_ros.templates.meshes.gltf"),
}
LARGEST_FILE = 500
# Files that are being split: this list only gets shorter.
LARGER_FILES: set[str] = set()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it; a name that is no module is its module."""
    found = {name for name in imports(path) if name.startswith("picopose_ros.")}
    modules = set()
    for name in found:
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        modules.add(name)
    # `from package import module` names both; the package itself is meant only where it is all there is.
    return {name for name in modules if not any(m.startswith(f"{name}.") for m in modules)}


def room_of(module: str) -> str:
    return module.split(".")[1]


IMPORTS = {module: own_imports(path) - {module, "picopose_ros"} for module, path in MODULES.items()}


def test_imports_only_go_down() -> None:
    assert {room_of(module) for module in MODULES if "." in module} == set(ROOMS), "a room without a place"
    for room, below in ROOMS.items():
        later = list(ROOMS)[list(ROOMS).index(room) :]
        assert not below & set(later), f"{room} may import what stands above it"
    used = {
        (room_of(module), room_of(other)): (module, other)
        for module, others in IMPORTS.items()
        if module != "picopose_ros"
        for other in others
    }
    wrong = {
        (room, other): names
        for (room, other), names in used.items()
        if room != other and other not in ROOMS[room]
    }
    assert not {pair: names for pair, names in wrong.items() if pair not in EXCEPTIONS}
    assert EXCEPTIONS <= set(wrong), f"no longer needed: {EXCEPTIONS - set(wrong)}"


def test_no_import_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(IMPORTS[module]):
            # A package's own modules are imported through it only by others.
            if not module.startswith(f"{other}.") and (module, other) not in CIRCLES:
                visit(other, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_what_the_node_runs_imports_no_training_or_evaluation() -> None:
    reached: set[str] = set()
    rest = [module for module in MODULES if module.startswith("picopose_ros.node")]
    assert rest
    while rest:
        module = rest.pop()
        if module not in reached:
            reached.add(module)
            rest += IMPORTS[module]
    assert not {"training", "evaluation", "synthetic", "demo"} & {room_of(module) for module in reached}


def test_ros_and_heavy_libraries_stay_where_they_belong() -> None:
    ros = ROS - {"ament_index_python"}
    for module, path in MODULES.items():
        if module == "picopose_ros":
            continue
        room, names = room_of(module), imports(path)
        # The demo plays a bag into the node, so it is a ROS program itself.
        if room not in ("node", "demo"):
            messages = {name for name in names if name.startswith("picopose_ros.msg")}
            assert not messages | (top_level(names) & ros), f"{path} imports ROS"
        if room == "model":
            assert not top_level(names) & {"cv2", "trimesh", "pyrender"}, path


def test_files_are_of_a_readable_size() -> None:
    paths = [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]
    larger = {
        str(path.relative_to(ROOT)) for path in paths if len(path.read_text().splitlines()) > LARGEST_FILE
    }
    assert larger <= LARGER_FILES, f"split {sorted(larger - LARGER_FILES)}: more than {LARGEST_FILE} lines"


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
