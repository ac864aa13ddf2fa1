"""The renderer against an independent ray caster: geometry to a fraction of a pixel, colours to the bit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from picopose_ros.errors import RenderError
from picopose_ros.templates.headlight import AMBIENT
from picopose_ros.templates.renderer import (
    NEUTRAL_GREY,
    SMOOTH_NORMALS,
    MeshRenderer,
    Shading,
    shows_one_colour,
)

K = np.array([[310.0, 0.0, 78.3], [0.0, 305.0, 61.2], [0.0, 0.0, 1.0]])
WIDTH, HEIGHT = 160, 121


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer() as renderer:
        yield renderer


def coloured_box(extents: tuple[float, float, float] = (0.06, 0.08, 0.1)) -> trimesh.Trimesh:
    box = trimesh.creation.box(extents)
    colours = np.random.default_rng(3).integers(0, 256, (len(box.faces), 4))
    box.visual = trimesh.visual.ColorVisuals(box, face_colors=colours)
    return box


def pose(xyz: tuple[float, float, float], euler: tuple[float, float, float] = (0.4, 0.5, 0.6)) -> np.ndarray:
    transform = trimesh.transformations.euler_matrix(*euler)
    transform[:3, 3] = xyz
    return transform


def cast_rays(
    mesh: trimesh.Trimesh, T_cam_obj: np.ndarray, K: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) and index of the face hit (-1: none) along the rays through integer pixel positions."""
    vertices = mesh.vertices @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ np.linalg.inv(K).T  # z = 1
    best, hit = np.full(len(rays), np.inf), np.full(len(rays), -1)
    for index, (a, b, c) in enumerate(vertices[mesh.faces]):
        normal = np.cross(b - a, c - a)
        depth = (a @ normal) / (rays @ normal)
        point = rays * depth[:, None]
        sides = [np.cross(q - p, point - p) @ normal for p, q in ((a, b), (b, c), (c, a))]
        inside = (np.min(sides, axis=0) >= 0) & (depth > 0) & (depth < best)
        best[inside], hit[inside] = depth[inside], index
    depth = np.where(np.isfinite(best), best, 0.0)
    return depth.reshape(height, width), hit.reshape(height, width)


@pytest.mark.parametrize("size", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("skew", [0.0, 25.0])
def test_every_pixel_is_where_the_intrinsics_put_it(renderer: MeshRenderer, size: float, skew: float) -> None:
    box = coloured_box((0.35 * size, 0.5 * size, 0.8 * size))
    intrinsics = K + [[0, skew, 0], [0, 0, 0], [0, 0, 0]]
    T_cam_obj = pose((0.1 * size, -0.05 * size, 3.0 * size))
    view = renderer.render([box], T_cam_obj, intrinsics, WIDTH, HEIGHT)
    depth, face = cast_rays(box, T_cam_obj, intrinsics, WIDTH, HEIGHT)

    assert view.rgb.dtype == np.uint8 and view.depth.dtype == np.float32
    assert 2000 < view.mask.sum() < WIDTH * HEIGHT / 2
    # The outline is about 250 pixels long: a shift of a twentieth of a pixel would change a dozen of them.
    assert (view.mask != (depth > 0)).sum() <= 4
    both = view.mask & (depth > 0)
    error = np.abs(view.depth - depth)[both] / size
    assert np.median(error) < 1e-5
    assert np.mean(error > 1e-4) < 0.005  # where an edge of the box decides which face is in front
    colours = box.visual.face_colors[face][..., :3]
    assert np.mean((view.rgb != colours).any(axis=-1)[both]) < 0.005
    assert (view.rgb[~view.mask] == 0).all()


def test_points_back_projected_from_depth_lie_on_the_surface(renderer: MeshRenderer) -> None:
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.05)
    T_cam_obj = pose((0.01, 0.02, 0.3))
    view = renderer.render([ball], T_cam_obj, K, WIDTH, HEIGHT)
    v, u = np.nonzero(view.mask)
    points = view.depth[v, u, None] * (np.stack([u, v, np.ones_like(u)], axis=1) @ np.linalg.inv(K).T)
    radius = np.linalg.norm(points - T_cam_obj[:3, 3], axis=1)
    assert len(radius) > 5000
    assert np.abs(radius - 0.05).max() < 5e-5  # the facets of the ball lie this much inside


def test_camera_inside_an_object_sees_its_walls(renderer: MeshRenderer) -> None:
    room = coloured_box((3.0, 2.0, 4.0))
    T_cam_obj = pose((0.2, 0.1, 0.3), (0.1, 0.2, 0.3))
    view = renderer.render([room], T_cam_obj, K, WIDTH, HEIGHT)
    depth, _ = cast_rays(room, T_cam_obj, K, WIDTH, HEIGHT)
    assert view.mask.all()
    assert np.median(np.abs(view.depth - depth)) < 1e-3


def test_objects_behind_the_camera_give_an_empty_picture(renderer: MeshRenderer) -> None:
    view = renderer.render([coloured_box()], pose((0, 0, -1)), K, WIDTH, HEIGHT)
    assert not view.mask.any() and not view.rgb.any()


def test_flipped_faces_look_the_same(renderer: MeshRenderer) -> None:
    box = coloured_box()
    flipped = box.copy()
    flipped.faces = box.faces[:, ::-1]
    flipped.visual = trimesh.visual.ColorVisuals(flipped, face_colors=box.visual.face_colors)
    views = [renderer.render([mesh], pose((0, 0, 0.4)), K, WIDTH, HEIGHT) for mesh in (box, flipped)]
    assert np.abs(views[0].depth - views[1].depth).max() < 1e-6
    assert (views[0].rgb == views[1].rgb).all()


def quad(visual: trimesh.visual.base.Visuals | None = None) -> trimesh.Trimesh:
    """A 20 x 20 cm square that faces the camera; its texture's first row is up in the picture."""
    corners = [[-0.1, -0.1, 0], [0.1, -0.1, 0], [0.1, 0.1, 0], [-0.1, 0.1, 0]]
    square = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    if visual is not None:
        square.visual = visual
    return square


QUAD_UV = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
QUADRANTS = np.array([[[250, 10, 20], [10, 240, 30]], [[20, 30, 230], [240, 230, 10]]], np.uint8)


def quadrant_image() -> Image.Image:
    return Image.fromarray(np.kron(QUADRANTS, np.ones((32, 32, 1), np.uint8)))


def quadrant_colours(rgb: np.ndarray) -> np.ndarray:
    """Colours (2, 2, 3) in the middle of the four quadrants of a picture of the quad."""
    return rgb[np.ix_([35, 85], [52, 102])]


@pytest.mark.parametrize(
    "material",
    [
        SimpleMaterial(image=quadrant_image()),
        SimpleMaterial(image=quadrant_image(), diffuse=[102, 102, 102, 255]),
        PBRMaterial(baseColorTexture=quadrant_image()),
        PBRMaterial(baseColorTexture=quadrant_image(), baseColorFactor=[102, 102, 102, 255]),
        PBRMaterial(baseColorTexture=quadrant_image(), baseColorFactor=[0, 0, 0, 255]),
        PBRMaterial(baseColorTexture=quadrant_image(), metallicFactor=1.0, alphaMode="BLEND"),
    ],
    ids=["simple", "simple, grey", "pbr", "pbr, grey", "pbr, black", "pbr, metal"],
)
def test_textures_come_out_as_they_are_and_the_right_way_round(
    renderer: MeshRenderer, material: SimpleMaterial | PBRMaterial
) -> None:
    textured = quad(trimesh.visual.TextureVisuals(uv=QUAD_UV, material=material))
    view = renderer.render([textured], pose((0, 0, 0.6), (0, 0, 0)), K, WIDTH, HEIGHT)
    assert (quadrant_colours(view.rgb) == QUADRANTS).all()


def test_transparent_texture_and_odd_sizes_are_drawn_opaque(renderer: MeshRenderer) -> None:
    pixels = np.full((5, 7, 4), (200, 100, 50, 0), np.uint8)  # rows of 7 pixels are not 4-byte aligned in RGB
    material = PBRMaterial(baseColorTexture=Image.fromarray(pixels), alphaMode="BLEND")
    square = quad(trimesh.visual.TextureVisuals(uv=QUAD_UV, material=material))
    view = renderer.render([square], pose((0, 0, 0.6), (0, 0, 0)), K, WIDTH, HEIGHT)
    assert (view.rgb[view.mask] == (200, 100, 50)).all()


@pytest.mark.parametrize(
    ("visual", "colour"),
    [
        (None, NEUTRAL_GREY),
        (trimesh.visual.ColorVisuals(vertex_colors=[[200, 60, 30, 255]] * 4), (200, 60, 30)),
        (trimesh.visual.ColorVisuals(face_colors=[[20, 160, 30, 128]] * 2), (20, 160, 30)),
        (
            trimesh.visual.TextureVisuals(uv=QUAD_UV, material=SimpleMaterial(diffuse=[10, 60, 230, 255])),
            (10, 60, 230),
        ),
        (
            trimesh.visual.TextureVisuals(material=PBRMaterial(baseColorFactor=[90, 60, 130, 255])),
            (90, 60, 130),
        ),
    ],
    ids=["none", "vertex", "face", "simple", "pbr"],
)
def test_plain_colours_come_out_as_they_are(
    renderer: MeshRenderer, visual: trimesh.visual.base.Visuals | None, colour: tuple[int, int, int]
) -> None:
    view = renderer.render([quad(visual)], pose((0, 0, 0.6), (0, 0, 0)), K, WIDTH, HEIGHT)
    assert view.mask.sum() > 5000
    assert np.abs(view.rgb[view.mask].astype(int) - colour).max() <= 1


def test_scene_of_several_instances_is_the_nearest_of_each_alone(renderer: MeshRenderer) -> None:
    box, ball = coloured_box(), trimesh.creation.icosphere(radius=0.03)
    items = [
        ([box], pose((0.02, 0.0, 0.5))),
        ([box], pose((-0.02, 0.02, 0.45), (1.0, 0.2, 0.3))),
        ([ball], pose((0.0, -0.03, 0.48))),
    ]
    scene = renderer.render_scene(items, K, WIDTH, HEIGHT)
    alone = [renderer.render(mesh, T_cam_obj, K, WIDTH, HEIGHT) for mesh, T_cam_obj in items]
    depths = np.stack([np.where(view.mask, view.depth, np.inf) for view in alone])
    nearest = np.where(np.isfinite(depths.min(axis=0)), depths.min(axis=0), 0.0)
    assert np.abs(scene.depth - nearest).max() < 1e-5
    assert len(set(depths.argmin(axis=0)[scene.mask])) == 3, "all three have to be in the picture"
    expected = np.take_along_axis(
        np.stack([view.rgb for view in alone]), depths.argmin(0)[None, ..., None], 0
    )[0]
    assert np.mean((scene.rgb != expected).any(axis=-1)) < 0.002

    again = renderer.render(*items[0], K, WIDTH, HEIGHT)
    assert (again.depth == alone[0].depth).all(), "the others have left the picture"


def test_of_surfaces_in_the_same_place_the_first_one_given_is_seen(renderer: MeshRenderer) -> None:
    colours = ((200, 0, 0, 255), (0, 200, 0, 255), (0, 0, 200, 255))
    quads = [quad(trimesh.visual.ColorVisuals(vertex_colors=[colour] * 4)) for colour in colours]
    T_cam_obj = pose((0, 0, 0.6), (0, 0, 0))
    for order in ((0, 1, 2), (2, 1, 0), (1, 1, 0), (0, 2), (2, 2, 1)):  # also with others left from before
        view = renderer.render_scene([(quads[i : i + 1], T_cam_obj) for i in order], K, 40, 30)
        assert (view.rgb[view.mask] == colours[order[0]][:3]).all()


def test_sizes_may_change_from_call_to_call(renderer: MeshRenderer) -> None:
    box = coloured_box()
    for width, height in ((40, 30), (200, 150), (33, 47), (40, 30)):
        view = renderer.render([box], pose((0, 0, 0.4)), K, width, height)
        depth, _ = cast_rays(box, pose((0, 0, 0.4)), K, width, height)
        assert view.rgb.shape == (height, width, 3)
        assert (view.mask != (depth > 0)).sum() <= 4


def test_released_mesh_is_uploaded_again(renderer: MeshRenderer) -> None:
    box = coloured_box()
    before = renderer.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    renderer.release([box])
    box.apply_scale(0.5)
    after = renderer.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    assert after.mask.sum() < 0.5 * before.mask.sum()


def test_meshes_that_are_gone_are_not_mistaken_for_new_ones(renderer: MeshRenderer) -> None:
    for shade in range(60, 72):  # python gives the same id to one after the other
        square = quad(trimesh.visual.ColorVisuals(vertex_colors=[[shade, 0, 0, 255]] * 4))
        view = renderer.render([square], pose((0, 0, 0.6), (0, 0, 0)), K, 40, 30)
        assert view.rgb[view.mask][:, 0].mean() == pytest.approx(shade, abs=1)
        del square
        gc.collect()


def test_a_renderer_that_is_collected_while_another_draws_takes_nothing_away(
    renderer: MeshRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = renderer.render([coloured_box()], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    lost = MeshRenderer()
    lost.render([coloured_box()], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    freed: list[bool] = []
    delete = lost._context.delete_context
    lost._context.delete_context = lambda: (delete(), freed.append(True))
    lost.itself = lost  # only the collector finds it
    del lost
    draw = renderer._renderer.render

    def collect_first(*arguments: object, **named: object) -> object:
        gc.collect()
        return draw(*arguments, **named)

    monkeypatch.setattr(renderer._renderer, "render", collect_first)
    box = coloured_box()  # has yet to be uploaded
    view = renderer.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    assert (view.rgb == expected.rgb).all() and (view.depth == expected.depth).all()
    assert freed == [True]


def test_antialiasing_changes_colours_on_edges_and_no_depth(renderer: MeshRenderer) -> None:
    box, T_cam_obj = coloured_box(), pose((0, 0, 0.4))
    plain = renderer.render([box], T_cam_obj, K, WIDTH, HEIGHT)
    with MeshRenderer(antialias=True) as smooth_renderer:
        smooth = smooth_renderer.render([box], T_cam_obj, K, WIDTH, HEIGHT)
    assert (smooth.depth == plain.depth).all()
    changed = (smooth.rgb != plain.rgb).any(axis=-1)
    assert 100 < changed.sum() < 0.3 * plain.mask.sum()
    palette = {tuple(colour) for colour in plain.rgb.reshape(-1, 3)}
    assert any(tuple(colour) not in palette for colour in smooth.rgb[changed]), "edges are blended"


def test_closing_one_renderer_leaves_the_other(renderer: MeshRenderer) -> None:
    box = coloured_box()
    before = renderer.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)
    other = MeshRenderer()
    assert (other.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT).depth == before.depth).all()
    other.close()
    other.close()
    assert (renderer.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT).rgb == before.rgb).all()
    with pytest.raises(RenderError, match="closed"):
        other.render([box], pose((0, 0, 0.4)), K, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("T_cam_obj", "intrinsics", "width"),
    [
        (np.full((4, 4), np.nan), K, 40),
        (np.eye(3), K, 40),
        (np.eye(4), np.zeros((3, 3)), 40),
        (np.eye(4), K[:2], 40),
        (np.eye(4), K, 0),
    ],
)
def test_malformed_arguments_are_refused(
    renderer: MeshRenderer, T_cam_obj: np.ndarray, intrinsics: np.ndarray, width: int
) -> None:
    with pytest.raises(RenderError):
        renderer.render([coloured_box()], T_cam_obj, intrinsics, width, 30)


def plain(colour: tuple[int, int, int] | None = None) -> trimesh.Trimesh:
    box = trimesh.creation.box((0.06, 0.08, 0.1))
    if colour is not None:
        box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.tile([*colour, 255], (8, 1)))
    return box


def expected_headlight(mesh: trimesh.Trimesh, T_cam_obj: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness (H, W) by the normals of the faces that rays hit, and where they hit one."""
    _, face = cast_rays(mesh, T_cam_obj, K, WIDTH, HEIGHT)
    u, v = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    normals = mesh.face_normals[face] @ T_cam_obj[:3, :3].T
    cosine = np.abs((rays * normals).sum(axis=-1))
    return AMBIENT + (1.0 - AMBIENT) * cosine, face >= 0


@pytest.mark.parametrize("inside_out", [False, True])
@pytest.mark.parametrize("colour", [None, (40, 200, 90)])
def test_headlight_shades_by_the_angle_to_the_normals_of_faces(
    renderer: MeshRenderer, colour: tuple[int, int, int] | None, inside_out: bool
) -> None:
    box, T_cam_obj = plain(colour), pose((0.0, 0.0, 0.35))
    if inside_out:
        box.invert()
    view = renderer.render([box], T_cam_obj, K, WIDTH, HEIGHT, shading="headlight")
    brightness, hit = expected_headlight(box, T_cam_obj)
    both = view.mask & hit
    expected = brightness[..., None] * (NEUTRAL_GREY if colour is None else colour)
    assert np.percentile(np.abs(view.rgb - expected)[both], 98) <= 1
    assert np.ptp(view.rgb[both], axis=0).max() > 30, "the sides of the box can be told apart"
    flat = renderer.render([box], T_cam_obj, K, WIDTH, HEIGHT)
    assert np.array_equal(flat.depth, view.depth)
    assert (flat.rgb[flat.mask] == (NEUTRAL_GREY if colour is None else colour)).all()


def test_headlight_uses_smooth_normals_where_the_file_has_them(renderer: MeshRenderer) -> None:
    faceted = trimesh.creation.icosphere(subdivisions=1, radius=0.05)
    smooth = faceted.copy()
    smooth.metadata[SMOOTH_NORMALS] = True
    steps = []
    for ball in (faceted, smooth):
        view = renderer.render([ball], pose((0, 0, 0.35)), K, WIDTH, HEIGHT, shading="headlight")
        core = view.mask & (view.depth < np.median(view.depth[view.mask]))
        beside = core[:, 1:] & core[:, :-1]
        steps.append(np.abs(np.diff(view.rgb[..., 0].astype(int), axis=1))[beside].max())
    assert steps[0] > 8 and steps[1] <= 4, "brightness jumps from face to face, or does not"


@pytest.mark.parametrize(
    ("shading", "colours", "shaded"),
    [
        ("auto", [None], True),
        ("auto", [(200, 30, 30), (203, 28, 33)], True),
        ("auto", [(200, 30, 30), None], False),
        ("flat", [None], False),
        ("headlight", [(200, 30, 30), None], True),
    ],
)
def test_auto_shades_a_mesh_of_one_colour(
    renderer: MeshRenderer, shading: Shading, colours: list[tuple[int, int, int] | None], shaded: bool
) -> None:
    parts = [plain(colour) for colour in colours]
    for shift, part in enumerate(parts):
        part.apply_translation([0.03 * shift, 0, 0])
    view = renderer.render(parts, pose((0, 0, 0.35)), K, WIDTH, HEIGHT, shading=shading)
    assert (len(np.unique(view.rgb[view.mask], axis=0)) > 10) == shaded
    assert shows_one_colour(parts) == (len({colour is None for colour in colours}) == 1)


@pytest.mark.parametrize("black", [True, False])
def test_a_texture_counts_as_colours_unless_it_is_even(renderer: MeshRenderer, black: bool) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    if not black:
        image[:, 4:] = 250
    box = plain()
    box.visual = trimesh.visual.TextureVisuals(
        uv=np.linspace(0, 1, 16).reshape(8, 2), material=SimpleMaterial(image=Image.fromarray(image))
    )
    view = renderer.render([box], pose((0, 0, 0.35)), K, WIDTH, HEIGHT, shading="auto")
    assert shows_one_colour([box]) == black
    # A black mesh is raised, so that templates of it show its shape.
    assert (view.rgb[view.mask].min() > 20) == black


def test_no_such_shading_is_an_error(renderer: MeshRenderer) -> None:
    with pytest.raises(RenderError, match="'phong'.*flat, headlight, auto"):
        renderer.render([plain()], pose((0, 0, 0.35)), K, WIDTH, HEIGHT, shading="phong")


SUBPROCESS = """
import sys
import numpy as np, trimesh
from picopose_ros.templates import opengl
from picopose_ros.templates.renderer import MeshRenderer
if "no-osmesa" in sys.argv:
    opengl._PROBES["osmesa"] = lambda: "libOSMesa is not installed"
T = np.eye(4); T[2, 3] = 0.4
with MeshRenderer() as renderer:
    view = renderer.render([trimesh.creation.icosphere(radius=0.05)], T, np.diag([300, 300, 1.0]), 50, 40)
print(renderer.backend, view.mask.sum(), view.rgb[0, 0].tolist())
"""


def render_elsewhere(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Render in a fresh process: the OpenGL platform is fixed for a process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYOPENGL_PLATFORM", "EGL_DEVICE_ID")}
    return subprocess.run(
        [sys.executable, "-c", SUBPROCESS, *arguments],
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


NO_EGL = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent"}


@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        ({}, "egl"),
        (NO_EGL, "osmesa"),
        ({"EGL_DEVICE_ID": "99"}, "osmesa"),
        ({"PYOPENGL_PLATFORM": "osmesa"}, "osmesa"),
    ],
    ids=["as it is", "EGL without a driver", "EGL without the device", "asked for OSMesa"],
)
def test_platform_is_chosen_by_what_works(environment: dict[str, str], backend: str) -> None:
    result = render_elsewhere(**environment)
    assert result.returncode == 0, result.stderr
    name, pixels, colour = result.stdout.split(maxsplit=2)
    assert name == backend
    assert int(pixels) > 1000
    assert colour.strip() == str(list(NEUTRAL_GREY))


def test_no_platform_at_all_says_what_to_install() -> None:
    result = render_elsewhere("no-osmesa", **NO_EGL)
    assert result.returncode != 0
    assert "RenderError" in result.stderr
    assert "apt-get install -y libegl1" in result.stderr
    assert "libOSMesa is not installed" in result.stderr


def test_egl_that_was_asked_for_and_fails_is_not_replaced() -> None:
    result = render_elsewhere(PYOPENGL_PLATFORM="egl", **NO_EGL)
    assert result.returncode != 0
    assert "RenderError" in result.stderr and "egl: EGL knows no device" in result.stderr


def test_a_platform_with_windows_is_refused() -> None:
    result = render_elsewhere(PYOPENGL_PLATFORM="glx")
    assert result.returncode != 0
    assert "RenderError" in result.stderr and "'glx'" in result.stderr
