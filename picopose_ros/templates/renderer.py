"""Offscreen rendering of meshes to albedo, unlit or under a headlight, and metric depth."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import trimesh

from picopose_ros.errors import RenderError
from picopose_ros.templates import opengl

if TYPE_CHECKING:
    from picopose_ros.templates.meshes import ObjectMesh

NEUTRAL_GREY: tuple[int, int, int] = (153, 153, 153)
"""Colour of a mesh that brings none, 8-bit RGB."""

Shading = Literal["flat", "headlight", "auto"]
"""How surfaces are lit. ``flat``: not at all, the colour is the albedo. ``headlight``: by a light in the
camera, so that brightness falls with the angle between the surface's normal and the viewing direction.
``auto``: a mesh that shows more than one colour is flat; any other would be a silhouette with nothing inside
and has the headlight."""

SMOOTH_NORMALS = "smooth_normals"
"""Key in a part's metadata: true where the file brings vertex normals, by which the headlight then shades.
Other parts are shaded by the normals of their faces."""

TINT = "tint"
"""Vertex attribute (V, 3) of a part with a texture: sRGB 0..1 that its colours are multiplied with."""

WRAP = "wrap"
"""Key in a part's metadata: how its texture goes on outside of itself in both directions, as OpenGL names."""

_ONE_COLOUR = 8
"""Colours that differ by no more than this in each channel (of 255) count as one."""

_SETTING_UP = threading.Lock()
"""Contexts of several threads work side by side, but displays and libraries are set up one after another."""


@dataclass(frozen=True)
class Rendering:
    """One rendered view."""

    rgb: np.ndarray
    """(H, W, 3) uint8 RGB, albedo on a black background, lit as the shading says."""
    depth: np.ndarray
    """(H, W) float32 z in the camera frame at the pixel centre, metres; 0 where nothing was hit."""

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, True on the objects."""
        return self.depth > 0


class MeshRenderer:
    """Renders meshes offscreen with a pinhole camera whose pixel centres are integers.

    Surfaces are unlit (their colour is the albedo) unless a shading asks for a headlight, and visible from
    both sides, so that a CAD file with flipped faces looks the same. Vertex, face and material colours and
    textures are kept, transparency is not; a mesh without colours is grey. Near and far plane are fitted to
    the objects of every call, so nothing is clipped, whatever its size, and the depth buffer keeps its
    precision.

    A mesh is uploaded when it is first rendered and stays until it is garbage collected, `release` or
    `close`; after changing a mesh, release it. One renderer belongs to one thread, as an OpenGL context does.
    It runs on EGL or, where that gives no context, on OSMesa; the environment variable PYOPENGL_PLATFORM
    (egl or osmesa) decides instead where it is set.

    Args:
        antialias: 4 samples per pixel for the colours, as the released network's templates have, at about
            40 % of the speed. Depth and mask are always taken at the pixel centre.
        shading: how surfaces are lit where a call says nothing else, see `Shading`.

    Attributes:
        backend: "egl" or "osmesa".

    Raises:
        RenderError: neither EGL nor OSMesa works here, or no such shading.
    """

    def __init__(self, antialias: bool = False, shading: Shading = "flat") -> None:
        self.shading = _checked_shading(shading)
        with _SETTING_UP, _uninterrupted():
            self._pyrender, self.backend = opengl.import_pyrender()
            self._context = opengl.make_context(self.backend)
            try:
                self._renderer = opengl.make_renderer(antialias)
            except BaseException:
                self._context.delete_context()
                raise
        self._gl_error: type[Exception] = opengl.gl_error_type()
        self._camera = opengl.make_camera()
        self._scene = self._pyrender.Scene(bg_color=(0.0, 0.0, 0.0, 1.0), ambient_light=(1.0, 1.0, 1.0))
        self._scene.add(self._camera)
        self._uploads: dict[int, _Upload] = {}

    def __enter__(self) -> MeshRenderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if _busy.depth and self._context is not None:
                _busy.left.append((self._context, self._renderer, self._uploads))
                self._context = None
            self.close()

    def render(
        self,
        mesh: ObjectMesh | Sequence[trimesh.Trimesh],
        T_cam_obj: np.ndarray,
        K: np.ndarray,
        width: int,
        height: int,
        shading: Shading | None = None,
    ) -> Rendering:
        """Render one object.

        Args:
            mesh: parts in metres, in the object frame.
            T_cam_obj: (4, 4) object -> camera (OpenCV optical frame), metres.
            K: (3, 3) intrinsics for pixel centres at integers; skew and any principal point are allowed.
            width: of the image, pixels.
            height: of the image, pixels.
            shading: see `Shading`; None for the renderer's own.

        Raises:
            RenderError: the renderer is closed, an argument is malformed or not finite, or OpenGL fails.
        """
        return self.render_scene([(mesh, T_cam_obj)], K, width, height, shading)

    def render_scene(
        self,
        items: Sequence[tuple[ObjectMesh | Sequence[trimesh.Trimesh], np.ndarray]],
        K: np.ndarray,
        width: int,
        height: int,
        shading: Shading | None = None,
    ) -> Rendering:
        """Render several objects, or several instances of one, into one image. Arguments as in `render`."""
        if self._context is None:
            raise RenderError("this MeshRenderer was closed; make a new one")
        shading = self.shading if shading is None else _checked_shading(shading)
        K = _checked(K, (3, 3), "K")
        if K[0, 0] <= 0 or K[1, 1] <= 0 or width < 1 or height < 1:
            raise RenderError(f"sizes must be positive: {width}x{height} pixels, K = {K.tolist()}")
        nearest, farthest = np.inf, 0.0
        drawn: dict[int, int] = {}
        order = 0
        for mesh, T_cam_obj in items:
            T_cam_obj = _checked(T_cam_obj, (4, 4), "T_cam_obj")
            uploads = [(part, self._upload(part)) for part in _parts(mesh)]
            lit = shading == "headlight" or (
                shading == "auto" and _one_colour([upload.colours for _, upload in uploads])
            )
            for part, upload in uploads:
                upload.shade(lit)
                z = T_cam_obj[2, :3] @ upload.centre + T_cam_obj[2, 3]
                # The rotation may carry a scale; its largest row norm bounds how far a point can move.
                radius = upload.radius * np.linalg.norm(T_cam_obj[:3, :3], axis=1).max()
                nearest, farthest = min(nearest, z - radius), max(farthest, z + radius)
                instance = drawn[id(part)] = drawn.get(id(part), 0) + 1
                upload.place(self._scene, instance - 1, T_cam_obj, order)
                order += 1
        for key, upload in list(self._uploads.items()):
            if upload.dead:
                upload.remove(self._scene)
                del self._uploads[key]
            else:
                upload.show(self._scene, drawn.get(key, 0))

        if farthest <= 0.0:  # nothing, or all of it behind the camera
            empty = np.zeros((height, width), np.float32)
            return Rendering(np.zeros((height, width, 3), np.uint8), empty)
        # From inside an object's bounds there is no tight near plane; 1e-4 keeps the precision bearable.
        self._camera.K = K
        self._camera.near = max(0.99 * nearest, 1e-4 * farthest)
        self._camera.far = 1.01 * farthest
        self._renderer.viewport_width, self._renderer.viewport_height = width, height
        flags = self._pyrender.RenderFlags
        try:
            with _uninterrupted():
                self._context.make_current()
                rgb, depth = self._renderer.render(
                    self._scene, flags.FLAT | flags.SKIP_CULL_FACES | flags.OFFSCREEN
                )
        except self._gl_error as error:
            raise RenderError(
                f"OpenGL ({self.backend}) cannot render {width}x{height} pixels: {error}"
            ) from error
        return Rendering(rgb, depth)

    def release(self, mesh: ObjectMesh | Sequence[trimesh.Trimesh]) -> None:
        """Free what was uploaded for a mesh. It is uploaded again if it is rendered again."""
        for part in _parts(mesh):
            upload = self._uploads.pop(id(part), None)
            if upload is not None:
                upload.remove(self._scene)

    def close(self) -> None:
        """Free the OpenGL context and everything in it. Closing twice is allowed."""
        if self._context is not None:
            context, self._context = self._context, None
            _free(context, self._renderer, self._uploads)

    def _upload(self, part: trimesh.Trimesh) -> _Upload:
        upload = self._uploads.get(id(part))
        if upload is not None and upload.dead:  # the id belonged to a mesh that is gone
            upload.remove(self._scene)
            upload = None
        if upload is None:
            upload = self._uploads[id(part)] = _Upload(part, self._pyrender)
        return upload


class _Busy(threading.local):
    """What a thread is doing with OpenGL: how deep it is in it, and what was left to be freed after that."""

    def __init__(self) -> None:
        self.depth = 0
        self.left: list[tuple[Any, Any, dict[int, _Upload]]] = []


_busy = _Busy()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """No renderer that is garbage collected meanwhile takes the thread's context away: it is freed after."""
    _busy.depth += 1
    try:
        yield
    finally:
        _busy.depth -= 1
        while _busy.left and not _busy.depth:
            with contextlib.suppress(Exception):  # as in a destructor
                _free(*_busy.left.pop())


def _free(context: Any, renderer: Any, uploads: dict[int, _Upload]) -> None:
    with _uninterrupted():
        context.make_current()
        renderer.delete()
        uploads.clear()
        context.delete_context()


class _Upload:
    """A mesh part in the scene: one pyrender mesh, and a node for every instance drawn at once."""

    def __init__(self, part: trimesh.Trimesh, pyrender: Any) -> None:
        self._pyrender = pyrender
        self._part = weakref.ref(part)
        low, high = np.asarray(part.bounds, dtype=np.float64)
        self.centre: np.ndarray = (low + high) / 2.0
        self.radius = float(np.linalg.norm(high - low) / 2.0)
        primitive, self.colours = _primitive(part, pyrender)
        self._mesh = pyrender.Mesh(primitives=[primitive])
        self._nodes: list[Any] = []
        self._shown = 0

    @property
    def dead(self) -> bool:
        return self._part() is None

    def shade(self, lit: bool) -> None:
        """Under the headlight from now on, or unlit."""
        for primitive in self._mesh.primitives:
            primitive.shaded = lit

    def place(self, scene: Any, instance: int, pose: np.ndarray, order: int) -> None:
        if instance == len(self._nodes):
            self._nodes.append(self._pyrender.Node(mesh=self._mesh))
        if instance >= self._shown:
            scene.add_node(self._nodes[instance])
            self._shown += 1
        scene.set_pose(self._nodes[instance], pose)
        self._nodes[instance].order = order  # the renderer draws by it

    def show(self, scene: Any, count: int) -> None:
        """Leave ``count`` instances in the picture. The first node stays in the scene: it holds the mesh."""
        while self._shown > max(count, 1):
            self._shown -= 1
            scene.remove_node(self._nodes[self._shown])
        self._mesh.is_visible = count > 0

    def remove(self, scene: Any) -> None:
        for node in self._nodes[: self._shown]:
            scene.remove_node(node)
        self._shown = 0


def _parts(mesh: ObjectMesh | Sequence[trimesh.Trimesh]) -> Sequence[trimesh.Trimesh]:
    return getattr(mesh, "parts", mesh)


def _checked(matrix: np.ndarray, shape: tuple[int, int], name: str) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != shape or not np.isfinite(matrix).all():
        raise RenderError(f"{name} must be a finite {shape[0]}x{shape[1]} matrix, got {matrix.tolist()}")
    return matrix


def shows_one_colour(mesh: ObjectMesh | Sequence[trimesh.Trimesh]) -> bool:
    """Whether a mesh, rendered flat, is a mere silhouette: what ``auto`` puts a headlight on."""
    return _one_colour([_range_of_colours(*_albedo(part)) for part in _parts(mesh)])


def _one_colour(ranges: Sequence[np.ndarray]) -> bool:
    """Of the lowest and highest colours (2, 3) of all parts, 0..255."""
    if not ranges:
        return False
    low, high = np.min([low for low, _ in ranges], axis=0), np.max([high for _, high in ranges], axis=0)
    return bool((high - low <= _ONE_COLOUR).all())


def _range_of_colours(factor: np.ndarray, colours: np.ndarray | None, image: np.ndarray | None) -> np.ndarray:
    """(2, 3) lowest and highest colour that a part can show, 0..255."""
    pixels = colours if image is None else image
    if pixels is None or not pixels.size:
        return np.tile(255.0 * factor, (2, 1))
    # Channel by channel, each in one piece: over the pixels of all three at once it takes ten times as long.
    channels = [np.ascontiguousarray(pixels[..., channel]) for channel in range(3)]
    return np.array([[one.min() for one in channels], [one.max() for one in channels]]) * factor


def _checked_shading(shading: Shading) -> Shading:
    if shading not in get_args(Shading):
        raise RenderError(f"shading is {shading!r}; use one of {', '.join(get_args(Shading))}")
    return shading


def _albedo(part: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """RGB factor (3,) in 0..1, colours (n, 4) uint8 per vertex or face, and texture (H, W, 4) uint8."""
    visual = part.visual
    if visual.kind == "texture":
        image, factor = _material_albedo(visual.material)
        if visual.uv is None or len(visual.uv) != len(part.vertices):
            image = None
        return factor, None, image
    if visual.kind == "vertex":
        return np.ones(3), np.asarray(visual.vertex_colors), None
    if visual.kind == "face":
        return np.ones(3), np.asarray(visual.face_colors), None
    return np.array(NEUTRAL_GREY) / 255.0, None, None


def _primitive(part: trimesh.Trimesh, pyrender: Any) -> tuple[Any, np.ndarray]:
    """The part's geometry with its albedo, opaque (pyrender's own conversion darkens OBJ materials).

    Returns:
        it, and the range of its colours (2, 3).
    """
    positions, faces = np.asarray(part.vertices), np.asarray(part.faces)
    normals = np.asarray(part.vertex_normals) if part.metadata.get(SMOOTH_NORMALS) else None
    factor, colours, image = _albedo(part)
    shown = _range_of_colours(factor, colours, image)
    if part.visual.kind == "face":
        normals = None if normals is None else normals[faces].reshape(-1, 3)
        positions, faces = positions[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
        colours = np.repeat(colours, 3, axis=0)
    if colours is not None:
        colours = np.concatenate([colours[:, :3] / 255.0, np.ones((len(colours), 1))], axis=1)
    texture = None
    if image is not None:
        wrap_s, wrap_t = part.metadata.get(WRAP) or (pyrender.GLTF.REPEAT, pyrender.GLTF.REPEAT)
        sampler = pyrender.Sampler(wrapS=wrap_s, wrapT=wrap_t)
        texture = pyrender.Texture(source=image, source_channels="RGBA", sampler=sampler)
        tint = part.vertex_attributes.get(TINT)
        if tint is not None:
            colours = np.concatenate([tint, np.ones((len(tint), 1))], axis=1)
    material = pyrender.MetallicRoughnessMaterial(
        baseColorFactor=np.append(factor, 1.0),
        baseColorTexture=texture,
        alphaMode="OPAQUE",
        doubleSided=True,
    )
    primitive = pyrender.Primitive(
        positions=positions,
        normals=normals,
        indices=faces,
        color_0=colours,
        texcoord_0=None if texture is None else np.asarray(part.visual.uv),
        material=material,
        mode=pyrender.GLTF.TRIANGLES,
    )
    return primitive, shown


def _material_albedo(material: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Texture ((H, W, 4) uint8, opaque, or None) and RGB factor ((3,) in 0..1) of a trimesh material."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        image, colour = material.baseColorTexture, material.baseColorFactor
    else:
        image, colour = getattr(material, "image", None), getattr(material, "diffuse", None)
    if image is not None:
        image = np.array(image.convert("RGBA"))
        image[..., 3] = 255
    if colour is None:
        return image, np.ones(3) if image is not None else np.array(NEUTRAL_GREY) / 255.0
    colour = np.asarray(colour)
    colour = np.clip(colour[:3] / (255.0 if colour.dtype.kind in "ui" else 1.0), 0.0, 1.0)
    if image is not None:
        # Beside a texture only the tint counts: exporters write their default grey there, or black.
        colour = colour / colour.max() if colour.max() > 0 else np.ones(3)
    return image, colour
