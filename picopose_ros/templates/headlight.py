"""The shaders of a headlight: a light that sits in the camera and shows the shape of what has no colours."""

from __future__ import annotations

from typing import Any

AMBIENT = 0.35
"""Brightness of a surface seen edge-on, of 1 for one that faces the camera."""

DARKEST = 0.3
"""The brightest channel of an albedo is raised to this: black would show no shape. 0..1."""

_VERTEX = """#version 330 core
layout(location = 0) in vec3 position;
#ifdef NORMAL_LOC
layout(location = NORMAL_LOC) in vec3 normal;
out vec3 smooth_normal;
#endif
#ifdef TEXCOORD_0_LOC
layout(location = TEXCOORD_0_LOC) in vec2 texcoord_0;
out vec2 uv_0;
#endif
#ifdef COLOR_0_LOC
layout(location = COLOR_0_LOC) in vec4 color_0;
out vec4 vertex_colour;
#endif
layout(location = INST_M_LOC) in mat4 inst_m;
uniform mat4 M;
uniform mat4 V;
uniform mat4 P;
out vec3 point;  // camera frame

void main()
{
    mat4 model_view = V * M * inst_m;
    point = vec3(model_view * vec4(position, 1.0));
    // The same expression as in the shader without light, so that depths agree to the bit.
    gl_Position = P * V * M * inst_m * vec4(position, 1);
#ifdef NORMAL_LOC
    smooth_normal = transpose(inverse(mat3(model_view))) * normal;
#endif
#ifdef TEXCOORD_0_LOC
    uv_0 = texcoord_0;
#endif
#ifdef COLOR_0_LOC
    vertex_colour = color_0;
#endif
}
"""

_FRAGMENT = """#version 330 core
struct Material {
    vec4 base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    sampler2D base_color_texture;
#endif
};
uniform Material material;
in vec3 point;
#ifdef NORMAL_LOC
in vec3 smooth_normal;
#endif
#ifdef TEXCOORD_0_LOC
in vec2 uv_0;
#endif
#ifdef COLOR_0_LOC
in vec4 vertex_colour;
#endif
out vec4 frag_color;

void main()
{
    vec4 albedo = material.base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    albedo = albedo * texture(material.base_color_texture, uv_0);
#endif
#ifdef COLOR_0_LOC
    albedo *= vertex_colour;
#endif
    vec3 colour = clamp(albedo.rgb, 0.0, 1.0);
    colour += max(DARKEST_ALBEDO - max(colour.r, max(colour.g, colour.b)), 0.0);

    // The face's own normal: the derivatives of the position lie in the face.
    vec3 normal = cross(dFdx(point), dFdy(point));
#ifdef NORMAL_LOC
    if (dot(smooth_normal, smooth_normal) > 1e-12) normal = smooth_normal;
#endif
    // Either side of a face is lit.
    float cosine = abs(dot(normal, point)) / max(length(normal) * length(point), 1e-30);
    frag_color = vec4(colour * mix(AMBIENT_LIGHT, 1.0, clamp(cosine, 0.0, 1.0)), 1.0);
}
"""


def make_shader_cache() -> Any:
    """A pyrender shader cache that gives the headlight's shaders, whatever file names are asked for."""
    from pyrender.shader_program import ShaderProgram, ShaderProgramCache

    class HeadlightProgram(ShaderProgram):
        def _load(self, shader_filename: str) -> str:
            text = _VERTEX if shader_filename.endswith(".vert") else _FRAGMENT
            constants = {**self.defines, "AMBIENT_LIGHT": AMBIENT, "DARKEST_ALBEDO": DARKEST}
            defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
            version, _, rest = text.partition("\n")
            return f"{version}\n{defines}{rest}"

    class HeadlightCache(ShaderProgramCache):
        def get_program(
            self, vertex_shader: str, fragment_shader: str, geometry_shader: Any = None, defines: Any = None
        ) -> Any:
            # One context has one renderer and the renderer one such cache, so the defines are the key.
            key = tuple(sorted((defines or {}).items()))
            if key not in self._program_cache:
                self._program_cache[key] = HeadlightProgram("headlight.vert", "headlight.frag", None, defines)
            return self._program_cache[key]

    return HeadlightCache()
