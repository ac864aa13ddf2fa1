"""The demo's objects: modelled by hand or made from seeds, written as mesh files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import trimesh
import yaml

from picopose_ros.synthetic.objects import VALIDATION_SEED, build_object
from picopose_ros.synthetic.shapes import revolve, superquadric_mesh
from picopose_ros.synthetic.textures import project_box, project_cylinder

FONT = cv2.FONT_HERSHEY_DUPLEX


@dataclass(frozen=True)
class DemoObject:
    """One class of the demo."""

    class_id: str
    origin: str  # "training" (a seed the network may have seen), "validation" (a held-out seed) or "handmade"
    make: Callable[[], list[trimesh.Trimesh]]  # textured parts in metres, z up
    suffix: str  # of the mesh file
    unit: str = "m"  # of the numbers in the mesh file

    @property
    def seen_in_training(self) -> bool:
        """Whether the network may have been trained on it."""
        return self.origin == "training"


def _image(colour: tuple[int, int, int], width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def _text(
    image: np.ndarray, text: str, at: tuple[int, int], scale: float, colour: tuple[int, int, int]
) -> None:
    cv2.putText(image, text, at, FONT, scale, colour, max(1, round(2 * scale)), cv2.LINE_AA)


def _cereal_prints() -> dict[str, np.ndarray]:
    """Prints of the six sides of the cereal box; 1000 px per metre times 2."""
    front = _image((214, 60, 44), 380, 540)
    cv2.circle(front, (190, 330), 150, (250, 205, 60), -1, cv2.LINE_AA)
    for index in range(12):
        angle = index * np.pi / 6
        tip = (int(190 + 185 * np.cos(angle)), int(330 + 185 * np.sin(angle)))
        cv2.line(front, (190, 330), tip, (250, 205, 60), 10, cv2.LINE_AA)
    cv2.ellipse(front, (200, 400), (110, 70), 0, 0, 180, (245, 245, 240), -1, cv2.LINE_AA)
    cv2.ellipse(front, (200, 400), (110, 26), 0, 0, 360, (150, 190, 235), -1, cv2.LINE_AA)
    for x, y in ((140, 395), (180, 408), (215, 392), (255, 404), (200, 385)):
        cv2.circle(front, (x, y), 13, (200, 130, 50), 6, cv2.LINE_AA)
    _text(front, "PICO", (40, 90), 2.8, (255, 255, 255))
    _text(front, "rings", (120, 150), 1.7, (255, 240, 200))
    _text(front, "NET WT 375 g", (20, 522), 0.8, (255, 255, 255))

    back = _image((240, 225, 190), 380, 540)
    cv2.rectangle(back, (20, 20), (360, 110), (40, 90, 160), -1)
    _text(back, "SIX DEGREES", (34, 80), 1.3, (255, 255, 255))
    for line in range(9):
        _text(back, "of freedom in every bowl"[line:] + " oats", (30, 150 + 24 * line), 0.6, (60, 50, 40))
    cv2.rectangle(back, (30, 380), (200, 510), (90, 150, 70), -1)
    cv2.circle(back, (290, 440), 60, (214, 60, 44), -1, cv2.LINE_AA)

    left = _image((40, 90, 160), 120, 540)
    for line in range(11):
        width = 30 + (37 * line) % 60
        cv2.rectangle(left, (14, 40 + 40 * line), (14 + width, 56 + 40 * line), (235, 235, 235), -1)
    right = _image((250, 205, 60), 120, 540)
    for line in range(16):
        cv2.line(right, (0, 40 * line), (120, 40 * line - 90), (214, 60, 44), 9, cv2.LINE_AA)
    top = _image((225, 110, 50), 380, 120)
    _text(top, "OPEN HERE", (60, 76), 1.4, (255, 255, 255))
    bottom = _image((120, 120, 125), 380, 120)
    for bar in range(24):
        cv2.rectangle(bottom, (80 + 9 * bar, 20), (80 + 9 * bar + 2 + bar % 5, 90), (15, 15, 15), -1)
    return {"front": front, "back": back, "left": left, "right": right, "top": top, "bottom": bottom}


def cereal_box() -> list[trimesh.Trimesh]:
    """A box of 190 x 60 x 270 mm whose six sides carry different prints, in one texture."""
    half = np.array([0.19, 0.06, 0.27]) / 2
    prints = _cereal_prints()
    atlas = np.zeros((1080, 1000, 3), np.uint8)
    # Per side: outward axis, the direction to the right of someone who looks at it, and up.
    x, y, z = np.eye(3)
    sides = {
        "front": (-y, x, z, (0, 0)),
        "back": (y, -x, z, (380, 0)),
        "left": (-x, -y, z, (760, 0)),
        "right": (x, y, z, (880, 0)),
        "top": (z, x, y, (0, 540)),
        "bottom": (-z, x, -y, (380, 540)),
    }
    vertices, faces, uv = [], [], []
    for name, (out, right, up, (left, upper)) in sides.items():
        height, width, _ = prints[name].shape
        atlas[upper : upper + height, left : left + width] = prints[name]
        base = len(vertices)
        for across, above in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
            vertices.append(half * (out + across * right + above * up))
            pixel = (left + (across + 1) / 2 * (width - 2) + 1, upper + (1 - above) / 2 * (height - 2) + 1)
            uv.append((pixel[0] / 1000, 1 - pixel[1] / 1080))
        faces += [(base, base + 1, base + 2), (base, base + 2, base + 3)]
    return [textured(np.array(vertices), np.array(faces), np.array(uv), atlas)]


def textured(vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, image: np.ndarray) -> trimesh.Trimesh:
    """A mesh with a texture image (H, W, 3) RGB; ``uv`` (V, 2) with v upwards."""
    from PIL import Image

    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(image), metallicFactor=0.0, roughnessFactor=1.0
    )
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(vertices, faces, visual=visual, process=False)


def _panel(colour: tuple[int, int, int], marks: list[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    image = _image(colour, 512, 512)
    for index, (word, ink) in enumerate(marks):
        y = 60 + 128 * index
        cv2.rectangle(image, (0, y + 30), (512, y + 44), ink, -1)
        for repeat in range(3):
            _text(image, word, (10 + 190 * repeat + 40 * (index % 2), y), 1.5, ink)
    return image


def drill() -> list[trimesh.Trimesh]:
    """A cordless drill, 230 mm long: body, chuck, bit, grip, battery."""
    rng = np.random.default_rng(1)
    yellow, black, grey = (235, 180, 30), (45, 45, 50), (150, 155, 160)
    body = superquadric_mesh(np.array([0.075, 0.032, 0.034]), 0.35, 0.4)
    body.apply_translation([0.0, 0, 0.16])
    image = _panel(yellow, [("6D-18", black), ("PICO", (190, 40, 30)), ("TORQUE", black), ("6D-18", black)])
    parts = [project_box(body, image, rng, 0.2, True)]

    profile = np.array([(0, 0), (0.026, 0), (0.026, 0.02), (0.017, 0.045), (0.012, 0.055), (0, 0.055)])
    chuck = revolve(profile, 32)
    chuck.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0]))
    chuck.apply_translation([0.07, 0, 0.16])
    ribs = _image(black, 256, 256)
    for column in range(0, 256, 32):
        cv2.rectangle(ribs, (column, 0), (column + 10, 256), grey, -1)
    parts.append(project_box(chuck, ribs, rng, 0.08, False))

    bit = trimesh.creation.cylinder(radius=0.004, height=0.05, sections=16)
    bit.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0]))
    bit.apply_translation([0.145, 0, 0.16])
    parts.append(project_box(bit, _image((190, 195, 200), 16, 16), rng, 0.1, False))

    grip = superquadric_mesh(np.array([0.022, 0.02, 0.065]), 0.5, 0.6)
    lean = grip.vertices.copy()
    lean[:, 0] += 0.25 * (lean[:, 2] - lean[:, 2].max())
    grip = trimesh.Trimesh(lean, grip.faces, process=False)
    grip.apply_translation([-0.012, 0, 0.085])
    rubber = _image(black, 256, 256)
    for row in range(0, 256, 40):
        cv2.rectangle(rubber, (0, row), (256, row + 12), (90, 90, 95), -1)
    parts.append(project_box(grip, rubber, rng, 0.1, True))

    battery = superquadric_mesh(np.array([0.052, 0.033, 0.022]), 0.15, 0.2)
    battery.apply_translation([-0.028, 0, 0.022])
    label = _panel(
        black, [("18V", yellow), ("Li-ion", (230, 230, 230)), ("4.0Ah", yellow), ("18V", (200, 60, 40))]
    )
    parts.append(project_box(battery, label, rng, 0.16, False))
    return parts


def from_seed(seed: int, diagonal: float) -> list[trimesh.Trimesh]:
    """The procedural object of a seed, scaled to a bounding-box diagonal (m) that suits a table."""
    made = build_object(seed)
    parts = made.centred()
    for part in parts:
        part.apply_scale(diagonal / made.diagonal)
    return parts


def can() -> list[trimesh.Trimesh]:
    """A tin of tomatoes, 75 mm wide and 110 mm high; clutter, not a class of the demo."""
    profile = np.array([(0, 0), (0.036, 0), (0.0375, 0.003), (0.0375, 0.107), (0.036, 0.11), (0, 0.11)])
    label = _image((190, 30, 30), 512, 512)
    for x in range(40, 512, 128):
        cv2.circle(label, (x, 300), 50, (230, 90, 60), -1, cv2.LINE_AA)
    _text(label, "POMODORI", (60, 140), 2.2, (255, 245, 220))
    return [project_cylinder(revolve(profile, 48), label, np.random.default_rng(0), 0.12, False)]


#: Classes of the demo, by name.
OBJECTS: dict[str, DemoObject] = {
    entry.class_id: entry
    for entry in (
        DemoObject("parcel", "training", lambda: from_seed(116, 0.24), ".glb"),
        DemoObject("mug", "training", lambda: from_seed(120, 0.16), ".obj"),
        DemoObject("cluster", "validation", lambda: from_seed(VALIDATION_SEED + 16, 0.24), ".glb"),
        DemoObject("stack", "validation", lambda: from_seed(VALIDATION_SEED + 38, 0.22), ".glb", unit="mm"),
        DemoObject("cereal_box", "handmade", cereal_box, ".obj", unit="mm"),
        DemoObject("drill", "handmade", drill, ".glb"),
    )
}


def write_meshes(folder: Path) -> None:
    """Write every class as a mesh file, the way a user's mesh folder looks.

    Formats and units differ on purpose; ``objects.yaml`` says which unit is whose.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in OBJECTS.values():
        parts = [part.copy() for part in entry.make()]
        for part in parts:
            part.apply_scale({"m": 1.0, "mm": 1000.0}[entry.unit])
        if entry.suffix == ".glb":
            scene = trimesh.Scene()
            for index, part in enumerate(parts):
                scene.add_geometry(part, node_name=f"part_{index}", geom_name=f"part_{index}")
            (folder / f"{entry.class_id}.glb").write_bytes(scene.export(file_type="glb"))
        else:
            (part,) = parts  # an OBJ file here holds one textured part
            inside = folder / entry.class_id
            inside.mkdir(exist_ok=True)
            simple = part.visual.material.to_simple()
            part.visual = trimesh.visual.TextureVisuals(uv=part.visual.uv, material=simple)
            part.export(inside / f"{entry.class_id}.obj", mtl_name=f"{entry.class_id}.mtl")
    units = {entry.class_id: {"unit": entry.unit} for entry in OBJECTS.values()}
    (folder / "objects.yaml").write_text(yaml.safe_dump(units))
