"""Offscreen rendering of meshes: unlit albedo and metric depth, on EGL or, where that is missing, on OSMesa."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import trimesh

from picopose_ros.errors import RenderError

if TYPE_CHECKING:
    from picopose_ros.templates.meshes import ObjectMesh

NEUTRAL_GREY: tuple[int, int, int] = (153, 153, 153)
"""Colour of a mesh that brings none, 8-bit RGB."""

INSTALL_HINT = "install one with: sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"


@dataclass(frozen=True)
class Rendering:
    """One rendered view."""

    rgb: np.ndarray
    """(H, W, 3) uint8 RGB, unlit albedo on a black background."""
    depth: np.ndarray
    """(H, W) float32 z in the camera frame at the pixel centre, metres; 0 where nothing was hit."""

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, True on the objects."""
        return self.depth > 0


class MeshRenderer:
    """Renders meshes offscreen with a pinhole camera whose pixel centres are integers.

    Surfaces are unlit (their colour is the albedo) and visible from both sides, so that a CAD file with flipped
    faces looks the same. Vertex, face and material colours and textures are kept; a mesh without any is grey.
    Near and far plane are fitted to the objects of every call, so nothing between a millimetre and a kilometre is
    clipped and the depth buffer keeps its precision.

    A mesh is uploaded when it is first rendered and stays until it is garbage collected, `release` or `close`.
    One renderer belongs to one thread (an OpenGL context does).

    Args:
        antialias: 4 samples per pixel for the colours, at about half the speed. Depth and mask are always taken at
            the pixel centre.

    Raises:
        RenderError: neither EGL nor OSMesa works here.
    """

    def __init__(self, antialias: bool = False) -> None:
        self._pyrender = _import_pyrender()
        self.backend: str = os.environ["PYOPENGL_PLATFORM"]
        try:
            self._context = _make_context(self.backend)
        except Exception as error:  # the platform layers raise anything from AssertionError to GLError
            raise RenderError(f"{self.backend} was chosen but gives no OpenGL context ({error!r}); {INSTALL_HINT}") from error
        self._renderer = _make_renderer(antialias)
        self._camera = _make_camera()
        self._scene = self._pyrender.Scene(bg_color=(0.0, 0.0, 0.0, 1.0), ambient_light=(1.0, 1.0, 1.0))
        self._scene.add(self._camera)
        self._uploads: dict[int, _Upload] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def render(
        self,
        mesh: ObjectMesh | Sequence[trimesh.Trimesh],
        T_cam_obj: np.ndarray,
        K: np.ndarray,
        width: int,
        height: int,
    ) -> Rendering:
        """Render one object.

        Args:
            mesh: parts in metres, in the object frame.
            T_cam_obj: (4, 4) object -> camera (OpenCV optical frame), metres.
            K: (3, 3) intrinsics for pixel centres at integers; skew and any principal point are allowed.
            width: of the image, pixels.
            height: of the image, pixels.

        Raises:
            RenderError: the renderer is closed, or an argument has a wrong shape or is not finite.
        """
        return self.render_scene([(mesh, T_cam_obj)], K, width, height)

    def render_scene(
        self,
        items: Sequence[tuple[ObjectMesh | Sequence[trimesh.Trimesh], np.ndarray]],
        K: np.ndarray,
        width: int,
        height: int,
    ) -> Rendering:
        """Render several objects, or several instances of one, into one image. Arguments as in `render`."""
        if self._context is None:
            raise RenderError("this MeshRenderer was closed; make a new one")
        K = _checked(K, (3, 3), "K")
        if K[0, 0] <= 0 or K[1, 1] <= 0 or width < 1 or height < 1:
            raise RenderError(f"cannot render {width}x{height} pixels with K = {K.tolist()}: sizes must be positive")
        self._context.make_current()

        nearest, farthest = np.inf, 0.0
        drawn: dict[int, int] = {}
        for mesh, T_cam_obj in items:
            T_cam_obj = _checked(T_cam_obj, (4, 4), "T_cam_obj")
            for part in _parts(mesh):
                upload = self._upload(part)
                z = T_cam_obj[2, :3] @ upload.centre + T_cam_obj[2, 3]
                # The rotation may carry a scale; its largest row norm bounds how far a point can move.
                radius = upload.radius * np.linalg.norm(T_cam_obj[:3, :3], axis=1).max()
                nearest, farthest = min(nearest, z - radius), max(farthest, z + radius)
                instance = drawn[id(part)] = drawn.get(id(part), 0) + 1
                upload.place(self._scene, instance - 1, T_cam_obj)
        for key, upload in list(self._uploads.items()):
            if upload.dead:
                upload.remove(self._scene)
                del self._uploads[key]
            else:
                upload.show(self._scene, drawn.get(key, 0))

        if farthest <= 0.0:  # nothing, or all of it behind the camera
            return Rendering(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.float32))
        # Inside the objects there is no tight near plane; 1e-4 of the depth range keeps the precision bearable.
        self._camera.K = K
        self._camera.near = max(0.99 * nearest, 1e-4 * farthest)
        self._camera.far = 1.01 * farthest
        self._renderer.viewport_width, self._renderer.viewport_height = width, height
        flags = self._pyrender.RenderFlags
        rgb, depth = self._renderer.render(self._scene, flags.FLAT | flags.SKIP_CULL_FACES | flags.OFFSCREEN)
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
            self._context.make_current()
            self._renderer.delete()
            self._uploads.clear()
            self._context.delete_context()
            self._context = None

    def _upload(self, part: trimesh.Trimesh) -> _Upload:
        upload = self._uploads.get(id(part))
        if upload is not None and upload.dead:  # the id belonged to a mesh that is gone
            upload.remove(self._scene)
            upload = None
        if upload is None:
            upload = self._uploads[id(part)] = _Upload(part, self._pyrender)
        return upload


class _Upload:
    """A mesh part in the scene: one pyrender mesh, and a node for every instance that was ever drawn at once."""

    def __init__(self, part: trimesh.Trimesh, pyrender: Any) -> None:
        self._pyrender = pyrender
        self._part = weakref.ref(part)
        low, high = np.asarray(part.bounds, dtype=np.float64)
        self.centre: np.ndarray = (low + high) / 2.0
        self.radius = float(np.linalg.norm(high - low) / 2.0)
        self._mesh = pyrender.Mesh(primitives=[_primitive(part, pyrender)])
        self._nodes: list[Any] = []
        self._shown = 0

    @property
    def dead(self) -> bool:
        return self._part() is None

    def place(self, scene: Any, instance: int, pose: np.ndarray) -> None:
        if instance == len(self._nodes):
            self._nodes.append(self._pyrender.Node(mesh=self._mesh))
        if instance >= self._shown:
            scene.add_node(self._nodes[instance])
            self._shown += 1
        scene.set_pose(self._nodes[instance], pose)

    def show(self, scene: Any, count: int) -> None:
        """Leave ``count`` instances in the picture. The first node stays in the scene, which keeps the upload."""
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


def _primitive(part: trimesh.Trimesh, pyrender: Any) -> Any:
    """The part's geometry with its albedo, opaque. pyrender's own conversion darkens OBJ materials and blends."""
    positions, faces = np.asarray(part.vertices), np.asarray(part.faces)
    colours = uv = image = None
    factor = np.ones(4)
    visual = part.visual
    if visual.kind == "texture":
        image, factor[:3] = _material_albedo(visual.material)
        uv = None if visual.uv is None or len(visual.uv) != len(positions) else np.asarray(visual.uv)
        if uv is None:
            image = None
    elif visual.kind == "vertex":
        colours = np.asarray(visual.vertex_colors)
    elif visual.kind == "face":
        positions, faces = positions[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
        colours = np.repeat(np.asarray(visual.face_colors), 3, axis=0)
    else:
        factor[:3] = np.array(NEUTRAL_GREY) / 255.0
    if colours is not None:
        colours = np.concatenate([colours[:, :3] / 255.0, np.ones((len(colours), 1))], axis=1)
    texture = None
    if image is not None:
        texture = pyrender.Texture(source=image, source_channels="RGBA")
    material = pyrender.MetallicRoughnessMaterial(
        baseColorFactor=factor, baseColorTexture=texture, alphaMode="OPAQUE", doubleSided=True
    )
    return pyrender.Primitive(
        positions=positions,
        indices=faces,
        color_0=colours,
        texcoord_0=None if texture is None else uv,
        material=material,
        mode=pyrender.GLTF.TRIANGLES,
    )


def _material_albedo(material: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Texture (H, W, 4) uint8 with full alpha, or None, and the RGB factor (3,) in 0..1 of a trimesh material."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        image, colour = material.baseColorTexture, material.baseColorFactor
    else:
        image, colour = getattr(material, "image", None), getattr(material, "diffuse", None)
        if image is not None:
            colour = None  # an OBJ's diffuse colour beside a texture is the exporter's default, not a tint
    if image is not None:
        image = np.array(image.convert("RGBA"))
        image[..., 3] = 255
    if colour is None:
        return image, np.ones(3) if image is not None else np.array(NEUTRAL_GREY) / 255.0
    colour = np.asarray(colour)
    scale = 255.0 if colour.dtype.kind in "ui" else 1.0
    return image, np.clip(colour[:3] / scale, 0.0, 1.0)


# --- OpenGL ---------------------------------------------------------------------------------------------------


def _import_pyrender() -> Any:
    """pyrender, with an OpenGL platform that works here: PyOpenGL fixes it for the process when it is imported."""
    if "OpenGL.platform" not in sys.modules and not os.environ.get("PYOPENGL_PLATFORM"):
        reasons = {}
        for name, probe in (("egl", _probe_egl), ("osmesa", _probe_osmesa)):
            reasons[name] = probe()
            if reasons[name] is None:
                os.environ["PYOPENGL_PLATFORM"] = name
                break
        else:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise RenderError(f"no offscreen OpenGL on this machine ({why}); {INSTALL_HINT}")
    if os.environ.get("PYOPENGL_PLATFORM") not in ("egl", "osmesa"):
        raise RenderError(
            f"PYOPENGL_PLATFORM is {os.environ.get('PYOPENGL_PLATFORM')!r} and OpenGL may already be loaded with it; "
            "offscreen rendering needs egl or osmesa, set before OpenGL is imported"
        )
    if not hasattr(np, "infty"):
        np.infty = np.inf  # pyrender 0.1.45 still uses the name that NumPy 2 dropped
    try:
        import pyrender
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        platform = os.environ["PYOPENGL_PLATFORM"]
        raise RenderError(f"pyrender does not load on the {platform} platform ({error}); {INSTALL_HINT}") from error
    return pyrender


def _probe_egl() -> str | None:
    """Why EGL cannot give an offscreen OpenGL 4.1 core context, or None if it can. Does not touch PyOpenGL."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        return str(error)
    pointer, integers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
    egl.eglGetProcAddress.restype = egl.eglCreateContext.restype = pointer
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl.eglChooseConfig.argtypes = [pointer, integers, pointer, ctypes.c_int32, integers]
    egl.eglCreateContext.argtypes = [pointer, pointer, pointer, integers]
    egl.eglDestroyContext.argtypes = [pointer, pointer]
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return "the EGL library cannot list devices"
    devices, count = (pointer * 16)(), ctypes.c_int32()
    if not ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int32, pointer, integers)(query)(16, devices, count) or not count.value:
        return "EGL knows no device"
    index = int(os.environ.get("EGL_DEVICE_ID", "0"))
    if index >= count.value:
        return f"EGL_DEVICE_ID is {index}, but EGL knows {count.value} devices"
    display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32, pointer, pointer)(display_of)(0x313F, devices[index], None)
    if not display or not egl.eglInitialize(display, None, None):
        return "EGL does not initialise"
    # 8-bit RGB pbuffer with 24-bit depth, desktop OpenGL; then a 4.1 core context
    wanted = (ctypes.c_int32 * 13)(
        0x3033, 1, 0x3022, 8, 0x3023, 8, 0x3024, 8, 0x3025, 24, 0x3040, 8, 0x3038
    )
    config, found = pointer(), ctypes.c_int32()
    if not egl.eglChooseConfig(display, wanted, ctypes.byref(config), 1, found) or not found.value:
        return "EGL offers no RGB and depth configuration"
    egl.eglBindAPI(0x30A2)
    version = (ctypes.c_int32 * 7)(0x3098, 4, 0x30FB, 1, 0x30FD, 1, 0x3038)
    context = egl.eglCreateContext(display, config, None, version)
    if not context:
        return "EGL creates no OpenGL 4.1 context"
    egl.eglDestroyContext(display, context)
    return None


def _probe_osmesa() -> str | None:
    """Why OSMesa cannot be used, or None if it can."""
    name = ctypes.util.find_library("OSMesa")
    if name is None:
        return "libOSMesa is not installed"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return None if hasattr(library, "OSMesaCreateContextAttribs") else f"{name} is older than Mesa 13"


def _make_context(backend: str) -> Any:
    """An OpenGL context that is current, with ``make_current`` and ``delete_context``."""
    if backend == "osmesa":
        return _OSMesaContext()
    from pyrender.platforms import egl

    class EGLContext(egl.EGLPlatform):
        def delete_context(self) -> None:
            # pyrender also terminates the display, which kills every other context of this process.
            from OpenGL import EGL

            EGL.eglMakeCurrent(self._egl_display, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, EGL.EGL_NO_CONTEXT)
            EGL.eglDestroyContext(self._egl_display, self._egl_context)

    context = EGLContext(16, 16, device=egl.get_device_by_index(int(os.environ.get("EGL_DEVICE_ID", "0"))))
    context.init_context()
    return context


class _OSMesaContext:
    """Software OpenGL without any display. pyrender's own needs a PyOpenGL newer than the one it asks for."""

    def __init__(self) -> None:
        from OpenGL.platform import PLATFORM

        # PyOpenGL keeps data per context in a dict, but its own context type cannot be hashed before 3.1.6.
        PLATFORM.GetCurrentContext.restype = ctypes.c_void_p
        self._library = PLATFORM.OSMesa
        self._library.OSMesaCreateContextAttribs.restype = ctypes.c_void_p
        self._library.OSMesaMakeCurrent.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int] * 3
        self._library.OSMesaDestroyContext.argtypes = [ctypes.c_void_p]
        # RGBA, 24-bit depth, core profile, version 3.3; the frames go to framebuffer objects, this buffer is unused
        attributes = (ctypes.c_int * 11)(0x22, 0x1908, 0x30, 24, 0x33, 0x34, 0x36, 3, 0x37, 3, 0)
        self._context = ctypes.c_void_p(self._library.OSMesaCreateContextAttribs(attributes, None))
        self._buffer = np.zeros((16, 16, 4), np.uint8)
        if not self._context:
            raise RenderError("OSMesa creates no OpenGL 3.3 context")
        self.make_current()

    def make_current(self) -> None:
        if not self._library.OSMesaMakeCurrent(self._context, self._buffer.ctypes.data, 0x1401, 16, 16):
            raise RenderError("OSMesa cannot make its context current")

    def delete_context(self) -> None:
        self._library.OSMesaDestroyContext(self._context)


def _make_camera() -> Any:
    """A pyrender camera for OpenCV conventions: it sits at the origin, looks along +z, and y points down."""
    import pyrender

    class PinholeCamera(pyrender.Camera):
        def __init__(self) -> None:
            super().__init__(znear=0.1, zfar=10.0)
            self.K, self.near, self.far = np.eye(3), 0.1, 10.0

        def get_projection_matrix(self, width: int, height: int) -> np.ndarray:
            P = np.zeros((4, 4))
            # Integer pixel centres: column u covers [u - 1/2, u + 1/2], so that -1/2 maps to the left edge (-1).
            P[0, :3] = 2.0 * self.K[0] / width
            P[0, 2] += 1.0 / width - 1.0
            # Row 0 of the framebuffer is read back as the first image row, so y is not flipped.
            P[1, :3] = 2.0 * self.K[1] / height
            P[1, 2] += 1.0 / height - 1.0
            P[2, 2] = (self.far + self.near) / (self.far - self.near)
            P[2, 3] = -2.0 * self.far * self.near / (self.far - self.near)
            P[3, 2] = 1.0
            return P

    return PinholeCamera()


def _make_renderer(antialias: bool) -> Any:
    """A pyrender Renderer with our framebuffers: pyrender's has always 4 samples, whose depth is off-centre."""
    from OpenGL import GL
    from pyrender.renderer import Renderer

    class FlatRenderer(Renderer):
        def __init__(self) -> None:
            self._plain: _Framebuffer | None = None
            self._smooth: _Framebuffer | None = None
            super().__init__(16, 16)

        def _configure_main_framebuffer(self) -> None:
            size = (self.viewport_width, self.viewport_height)
            if self._plain is None or self._plain.size != size:
                self._delete_main_framebuffer()
                self._plain = _Framebuffer(GL, size, samples=0)
                self._smooth = _Framebuffer(GL, size, samples=4) if antialias else None
            self._main_fb_ms = self._plain.name

        def _delete_main_framebuffer(self) -> None:
            for buffer in (self._plain, self._smooth):
                if buffer is not None:
                    buffer.delete()
            self._plain = self._smooth = None

        def _read_main_framebuffer(self, scene: Any, flags: int) -> tuple[np.ndarray, np.ndarray]:
            width, height = self._plain.size
            depth = np.empty((height, width), np.float32)
            rgb = np.empty((height, width, 3), np.uint8)
            GL.glPixelStorei(GL.GL_PACK_ALIGNMENT, 1)
            GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self._plain.name)
            GL.glReadPixels(0, 0, width, height, GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT, depth)
            near, far = scene.main_camera_node.camera.near, scene.main_camera_node.camera.far
            background = depth == 1.0
            depth *= near - far
            depth += far
            np.divide(near * far, depth, out=depth)
            depth[background] = 0.0
            if antialias:
                self._draw_smooth(scene, flags, (width, height))
            GL.glReadPixels(0, 0, width, height, GL.GL_RGB, GL.GL_UNSIGNED_BYTE, rgb)
            return rgb, depth

        def _draw_smooth(self, scene: Any, flags: int, size: tuple[int, int]) -> None:
            """Draw again with 4 samples and average them into the plain framebuffer's colours."""
            GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, self._smooth.name)
            GL.glClear(GL.GL_COLOR_BUFFER_BIT | GL.GL_DEPTH_BUFFER_BIT)
            self._forward_pass_no_reset(scene, flags)
            GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self._smooth.name)
            GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, self._plain.name)
            GL.glBlitFramebuffer(0, 0, *size, 0, 0, *size, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST)
            GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self._plain.name)

    return FlatRenderer()


class _Framebuffer:
    """A framebuffer object with 8-bit RGBA and 24-bit depth. ``GL`` is PyOpenGL's module."""

    def __init__(self, GL: Any, size: tuple[int, int], samples: int) -> None:
        self._GL, self.size = GL, size
        self._buffers = GL.glGenRenderbuffers(2)
        self.name = GL.glGenFramebuffers(1)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, self.name)
        formats = ((GL.GL_RGBA8, GL.GL_COLOR_ATTACHMENT0), (GL.GL_DEPTH_COMPONENT24, GL.GL_DEPTH_ATTACHMENT))
        for buffer, (storage, attachment) in zip(self._buffers, formats, strict=True):
            GL.glBindRenderbuffer(GL.GL_RENDERBUFFER, buffer)
            GL.glRenderbufferStorageMultisample(GL.GL_RENDERBUFFER, samples, storage, *size)
            GL.glFramebufferRenderbuffer(GL.GL_DRAW_FRAMEBUFFER, attachment, GL.GL_RENDERBUFFER, buffer)
        if GL.glCheckFramebufferStatus(GL.GL_DRAW_FRAMEBUFFER) != GL.GL_FRAMEBUFFER_COMPLETE:
            raise RenderError(f"OpenGL gives no framebuffer of {size[0]}x{size[1]} pixels; render a smaller image")

    def delete(self) -> None:
        self._GL.glDeleteFramebuffers(1, [self.name])
        self._GL.glDeleteRenderbuffers(len(self._buffers), self._buffers)
