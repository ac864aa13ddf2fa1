"""The OpenGL under the renderer: platforms that work here, contexts without a window, framebuffers."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from typing import Any

import numpy as np

from picopose_ros.errors import RenderError
from picopose_ros.templates.headlight import make_shader_cache

INSTALL_HINT = "install one with: sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"


def import_pyrender() -> tuple[Any, str]:
    """Load pyrender on an OpenGL platform that works here; PyOpenGL fixes it for the process on its import.

    Returns:
        the pyrender module, and "egl" or "osmesa".

    Raises:
        RenderError: neither works, or PyOpenGL was already loaded for windows.
    """
    platform = os.environ.get("PYOPENGL_PLATFORM", "")
    if "OpenGL.platform" not in sys.modules and platform in ("", *_PROBES):
        reasons = {}
        for name in (platform,) if platform else _PROBES:
            reasons[name] = _PROBES[name]()
            if reasons[name] is None:
                platform = os.environ["PYOPENGL_PLATFORM"] = name
                break
        else:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise RenderError(f"no offscreen OpenGL on this machine ({why}); {INSTALL_HINT}")
    if platform not in _PROBES:
        raise RenderError(
            f"offscreen rendering needs OpenGL on egl or osmesa, but PYOPENGL_PLATFORM is {platform!r}; "
            "unset it or set it to one of them before anything imports OpenGL"
        )
    if not hasattr(np, "infty"):
        np.infty = np.inf  # pyrender 0.1.45 still uses the name that NumPy 2 dropped
    try:
        _teach_pyopengl()
        # pyrender imports its window viewer too, and that would look for X11 libraries that a server lacks.
        os.environ.setdefault("PYGLET_HEADLESS", "true")
        import pyrender
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        raise RenderError(f"pyrender does not load on {platform} ({error}); {INSTALL_HINT}") from error
    return pyrender, platform


def _probe_egl() -> str | None:
    """Why EGL gives no offscreen OpenGL context, or None if it does; PyOpenGL stays unloaded.

    Without an EGL_DEVICE_ID in the environment, it is set to the first device that works: the first of all
    may be a graphics card that this user must not open, with Mesa's software device behind it.
    """
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        return str(error)
    pointer, integers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
    egl.eglGetProcAddress.restype = pointer
    query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_devices or not get_display:
        return "the EGL library cannot list devices"
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_int32, pointer, integers)(query_devices)
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32, pointer, pointer)(get_display)
    devices, count = (pointer * 16)(), ctypes.c_int32()
    if not query_devices(16, devices, count) or not count.value:
        return "EGL knows no device"

    chosen = os.environ.get("EGL_DEVICE_ID")
    indices = [str(index) for index in range(count.value)]
    if chosen is not None and chosen not in indices:
        return f"EGL_DEVICE_ID is {chosen}, but EGL knows the devices {', '.join(indices)}"
    reasons = []
    for index in indices if chosen is None else [chosen]:
        display = get_display(0x313F, devices[int(index)], None)  # EGL_PLATFORM_DEVICE_EXT
        reason = _probe_egl_display(egl, display)
        if reason is None:
            os.environ["EGL_DEVICE_ID"] = index
            return None
        reasons.append(f"device {index} {reason}")
    return ", ".join(reasons)


def _probe_egl_display(egl: ctypes.CDLL, display: int | None) -> str | None:
    """Why a display gives no OpenGL 4.1 core context, or None if it does."""
    pointer, integers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl.eglChooseConfig.argtypes = [pointer, integers, pointer, ctypes.c_int32, integers]
    egl.eglCreateContext.argtypes = [pointer, pointer, pointer, integers]
    egl.eglCreateContext.restype = pointer
    egl.eglDestroyContext.argtypes = [pointer, pointer]
    if not display or not egl.eglInitialize(display, None, None):
        return "does not initialise"
    # 8-bit RGB pbuffer with 24-bit depth, desktop OpenGL; then a 4.1 core context: what pyrender asks for
    wanted = (ctypes.c_int32 * 13)(0x3033, 1, 0x3022, 8, 0x3023, 8, 0x3024, 8, 0x3025, 24, 0x3040, 8, 0x3038)
    config, found = pointer(), ctypes.c_int32()
    if not egl.eglChooseConfig(display, wanted, ctypes.byref(config), 1, found) or not found.value:
        return "offers no RGB and depth configuration"
    egl.eglBindAPI(0x30A2)
    version = (ctypes.c_int32 * 7)(0x3098, 4, 0x30FB, 1, 0x30FD, 1, 0x3038)
    context = egl.eglCreateContext(display, config, None, version)
    if not context:
        return "creates no OpenGL 4.1 context"
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


def _teach_pyopengl() -> None:
    """Let PyOpenGL 3.1.0, which is what pyrender asks for, know what Python 3.12 calls a pointer argument."""
    from OpenGL.plugins import FormatHandler

    argument = type(ctypes.byref(ctypes.c_int()))
    handler = FormatHandler.by_name("ctypesparameter")
    name = f"{argument.__module__}.{argument.__name__}"
    if handler is not None and handler.check is not None and name not in handler.check:
        handler.check.append(name)


_PROBES = {"egl": _probe_egl, "osmesa": _probe_osmesa}
"""Platforms that need no window, the preferred one first."""


def make_context(backend: str) -> Any:
    """An OpenGL context without a window, made current; it has ``make_current`` and ``delete_context``.

    Raises:
        RenderError: the platform gives none.
    """
    try:
        return _OSMesaContext() if backend == "osmesa" else _make_egl_context()
    except Exception as error:  # the platform layers raise anything from AssertionError to GLError
        raise RenderError(f"{backend} gives no OpenGL context ({error!r}); {INSTALL_HINT}") from error


def _make_egl_context() -> Any:
    from pyrender.platforms import egl

    class EGLContext(egl.EGLPlatform):
        def delete_context(self) -> None:
            # pyrender also terminates the display, which kills every other context of this process.
            from OpenGL import EGL

            EGL.eglMakeCurrent(self._egl_display, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, EGL.EGL_NO_CONTEXT)
            EGL.eglDestroyContext(self._egl_display, self._egl_context)

        def __del__(self) -> None:
            """pyrender's would take away whichever context is current; who made this one deletes it."""

    device = egl.get_device_by_index(int(os.environ.get("EGL_DEVICE_ID", "0")))
    context = EGLContext(16, 16, device=device)
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
        # RGBA, 24-bit depth, core profile, version 3.3. Frames go to framebuffer objects, not to _buffer.
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


def gl_error_type() -> type[Exception]:
    """What PyOpenGL raises."""
    from OpenGL.error import Error

    return Error


def make_camera() -> Any:
    """A pyrender camera for OpenCV conventions: it sits at the origin, looks along +z, and y points down."""
    import pyrender

    class PinholeCamera(pyrender.Camera):
        def __init__(self) -> None:
            super().__init__(znear=0.1, zfar=10.0)
            self.K, self.near, self.far = np.eye(3), 0.1, 10.0

        def get_projection_matrix(self, width: int, height: int) -> np.ndarray:
            P = np.zeros((4, 4))
            # Integer pixel centres: column u covers [u - 1/2, u + 1/2], so -1/2 is the left edge, -1.
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


def make_renderer(antialias: bool) -> Any:
    """A pyrender Renderer with framebuffers of our own: pyrender's depth comes from an off-centre sample."""
    from OpenGL import GL
    from pyrender.renderer import Renderer

    class UnlitRenderer(Renderer):
        def __init__(self) -> None:
            self._plain: _Framebuffer | None = None
            self._smooth: _Framebuffer | None = None
            self._headlight = make_shader_cache()
            super().__init__(16, 16)

        def _get_primitive_program(self, primitive: Any, flags: int, program_flags: int) -> Any:
            if not getattr(primitive, "shaded", False):
                return super()._get_primitive_program(primitive, flags, program_flags)
            unlit, self._program_cache = self._program_cache, self._headlight
            try:
                return super()._get_primitive_program(primitive, flags, program_flags)
            finally:
                self._program_cache = unlit

        def delete(self) -> None:
            self._headlight.clear()
            super().delete()

        def __del__(self) -> None:
            """pyrender's would delete names of whichever context is current; who made this one deletes it."""

        def _sorted_mesh_nodes(self, scene: Any) -> list[Any]:
            # pyrender keeps nodes in a set: where two surfaces are equally near, addresses would decide.
            return sorted(scene.mesh_nodes, key=lambda node: getattr(node, "order", 0))

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

    return UnlitRenderer()


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
            raise RenderError(f"OpenGL gives no framebuffer of {size[0]}x{size[1]} pixels; use fewer")

    def delete(self) -> None:
        self._GL.glDeleteFramebuffers(1, [self.name])
        self._GL.glDeleteRenderbuffers(len(self._buffers), self._buffers)
