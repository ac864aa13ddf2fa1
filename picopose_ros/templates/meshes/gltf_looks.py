"""The looks of glTF primitives: what materials, textures and vertex colours come to as unlit albedo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from picopose_ros.templates.meshes.colours import linear_from_srgb, srgb_from_linear, to_bytes, unit_range
from picopose_ros.templates.meshes.parts import said

if TYPE_CHECKING:
    from picopose_ros.templates.meshes.gltf import Document

_SPECULAR_GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
_SEE_THROUGH = ("KHR_materials_transmission", "KHR_materials_diffuse_transmission", "KHR_materials_volume")
_REPEAT = 10497


@dataclass(frozen=True)
class _Layer:
    """A picture, the texture coordinates it wants, and how it goes on outside of them."""

    image: Image.Image
    uv: np.ndarray
    wrap: tuple[int, int]


class Looks:
    """Makes the looks of a document's primitives."""

    def __init__(self, document: Document) -> None:
        self._document, self._source = document, document.source
        self._pictures: dict[int, Image.Image | None] = {}
        # trimesh writes the sRGB bytes of vertex colours where the specification wants linear light, and its
        # own default grey beside textures.
        self._by_trimesh = "trimesh" in str(document.tree["asset"].get("generator", ""))

    def of(self, primitive: dict[str, Any], count: int) -> dict[str, Any]:
        """Arguments of `make_part` for a primitive with ``count`` vertices."""
        attributes = primitive["attributes"]
        tint = self._vertex_colours(attributes, count)
        if "material" not in primitive:
            return {} if tint is None else {"vertex_colours": srgb_from_linear(tint)}
        material = self._document.entry("materials", primitive["material"])
        name = material.get("name", f"number {primitive['material']}")
        factor, texture = self._base(material, name)
        emission = np.array(material.get("emissiveFactor", (0, 0, 0)), np.float64)
        emission = emission * material.get("extensions", {}).get("KHR_materials_emissive_strength", {}).get(
            "emissiveStrength", 1.0
        )
        self._check_transparency(material, name, texture)
        if self._by_trimesh and texture is not None and factor.max() > 0:
            factor = factor / factor.max()

        instead = said(srgb_from_linear(factor + emission * ("emissiveTexture" not in material)))
        layer = None if texture is None else self._layer(texture, attributes, count, name, instead)
        glow = material.get("emissiveTexture") if emission.any() else None
        light = None if glow is None else self._layer(glow, attributes, count, name, instead)
        if glow is not None and light is None:
            emission = np.zeros(3)
        if light is not None:
            layer, factor, emission = self._lit(layer, factor, light, emission, name)
        if layer is None:
            if tint is None:
                return {"colour": srgb_from_linear(factor + emission)}
            return {"vertex_colours": srgb_from_linear(tint * factor + emission)}
        look = {"image": _baked(layer.image, factor, emission), "wrap": layer.wrap}
        look["uv"] = np.column_stack([layer.uv[:, 0], 1.0 - layer.uv[:, 1]])
        if tint is not None and not np.allclose(tint, 1.0, atol=1e-3):
            look["vertex_colours"] = srgb_from_linear(tint)
        return look

    def _vertex_colours(self, attributes: dict[str, int], count: int) -> np.ndarray | None:
        """(V, 3) linear."""
        others = [
            name for name in attributes if name.lstrip("_").upper().startswith("COLOR") and name != "COLOR_0"
        ]
        if others:
            self._source.warn(f"the vertex colours {', '.join(sorted(others))} aren't shown, only COLOR_0")
        if "COLOR_0" not in attributes:
            return None
        values = self._document.array(attributes["COLOR_0"])
        if len(values) != count or values.shape[1] not in (3, 4):
            raise ValueError(f"COLOR_0 has {values.shape} values for {count} vertices")
        colours = unit_range(values)
        if colours.shape[1] == 4 and colours[:, 3].min() < 0.98:
            self._source.warn("its vertex colours are transparent in part: they are shown opaque")
        return linear_from_srgb(colours[:, :3]) if self._by_trimesh else colours[:, :3]

    def _base(self, material: dict[str, Any], name: str) -> tuple[np.ndarray, dict[str, Any] | None]:
        """Linear factor (3,) and texture of the albedo."""
        glossy = material.get("extensions", {}).get(_SPECULAR_GLOSSINESS)
        if glossy is None:
            rough = material.get("pbrMetallicRoughness", {})
            factor = np.array(rough.get("baseColorFactor", (1, 1, 1)), np.float64)[:3]
            return factor, rough.get("baseColorTexture")
        factor = np.array(glossy.get("diffuseFactor", (1, 1, 1)), np.float64)[:3]
        texture = glossy.get("diffuseTexture")
        if texture is None and factor.max() < 0.04:  # a metal
            shine = np.array(glossy.get("specularFactor", (1, 1, 1)), np.float64)
            texture = glossy.get("specularGlossinessTexture")
            self._source.warn(
                f"material '{name}' ({_SPECULAR_GLOSSINESS}) is a metal: its specular colour is shown"
            )
            return shine, texture
        return factor, texture

    def _check_transparency(
        self, material: dict[str, Any], name: str, texture: dict[str, Any] | None
    ) -> None:
        mode = material.get("alphaMode", "OPAQUE")
        extensions = material.get("extensions", {})
        rough = extensions.get(_SPECULAR_GLOSSINESS) or material.get("pbrMetallicRoughness", {})
        factor = rough.get("baseColorFactor", rough.get("diffuseFactor", (1, 1, 1, 1)))
        through = [key for key in _SEE_THROUGH if key in extensions]
        if through:
            self._source.warn(f"material '{name}' is see-through ({', '.join(through)}): it is shown opaque")
        elif mode != "OPAQUE" and factor[-1] < 0.98:
            self._source.warn(f"material '{name}' is transparent (alphaMode {mode}): it is shown opaque")

    def _layer(
        self, texture: dict[str, Any], attributes: dict[str, int], count: int, name: str, instead: str
    ) -> _Layer | None:
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        uv_set = transform.get("texCoord", texture.get("texCoord", 0))
        image = self._picture(texture["index"], instead)
        if image is None:
            return None
        if f"TEXCOORD_{uv_set}" not in attributes:
            self._source.warn(
                f"material '{name}' has a texture for TEXCOORD_{uv_set}, but a primitive has none: it is "
                f"shown {instead}"
            )
            return None
        uv = self._document.floats(attributes[f"TEXCOORD_{uv_set}"])
        if uv.shape != (count, 2):
            raise ValueError(f"TEXCOORD_{uv_set} has {uv.shape} values for {count} vertices")
        uv = uv * np.array(transform.get("scale", (1.0, 1.0)), np.float64)
        angle = float(transform.get("rotation", 0.0))
        cos, sin = np.cos(angle), np.sin(angle)
        uv = uv @ np.array([[cos, sin], [-sin, cos]]).T + np.array(transform.get("offset", (0.0, 0.0)))
        entry = self._document.entry("textures", texture["index"])
        sampler = self._document.entry("samplers", entry["sampler"]) if "sampler" in entry else {}
        return _Layer(image, uv, (sampler.get("wrapS", _REPEAT), sampler.get("wrapT", _REPEAT)))

    def _picture(self, index: int, instead: str) -> Image.Image | None:
        """The picture of a texture, the first of its alternatives that can be read."""
        if index not in self._pictures:
            self._pictures[index] = self._read_picture(index, instead)
        return self._pictures[index]

    def _read_picture(self, index: int, instead: str) -> Image.Image | None:
        texture = self._document.entry("textures", index)
        extensions = texture.get("extensions", {})
        sources = {key: extensions[key]["source"] for key in extensions if "source" in extensions[key]}
        unread = {
            key: image for key, image in sources.items() if key.startswith(("KHR_texture_basisu", "MSFT"))
        }
        order = [image for key, image in sources.items() if key not in unread]
        order += [texture["source"]] if "source" in texture else []
        if not order and unread:
            self._source.warn(
                f"texture {index} comes only as {', '.join(unread)}, which isn't read: what has it is "
                f"shown {instead}"
            )
            return None
        if not order:
            self._source.warn(f"texture {index} has no picture: what has it is shown {instead}")
            return None
        for number in order[:-1]:
            image = self._read_image(number, None)
            if image is not None:
                return image
        return self._read_image(order[-1], instead)

    def _read_image(self, number: int, instead: str | None) -> Image.Image | None:
        """A picture; None, and a warning unless another one is tried, if it can't be read."""
        image = self._document.entry("images", number)
        uri = image.get("uri", "")
        before = list(self._source.warnings)
        if "bufferView" in image or uri.startswith("data:"):
            label = f"'{image.get('name', number)}'"
            try:
                data = self._document.uri(uri) if uri else bytes(self._document.view(image["bufferView"])[0])
            except ValueError as error:
                self._source.warn(f"texture {label} can't be read ({error}): what has it is shown {instead}")
                picture = None
            else:
                picture = self._source.decoded(data, label, str(instead))
        else:
            picture = self._source.picture(uri, str(instead), uri=True)
        if picture is None and instead is None:
            self._source.warnings[:] = before
        return picture

    def _lit(
        self, layer: _Layer | None, factor: np.ndarray, light: _Layer, emission: np.ndarray, name: str
    ) -> tuple[_Layer | None, np.ndarray, np.ndarray]:
        """One layer, its factor and a constant: the albedo with the emissive texture on top."""
        if layer is None:
            if factor.max() < 0.04:
                return light, np.minimum(emission, 1.0), np.zeros(3)
            self._source.warn(
                f"material '{name}' shows its emissive texture; its plain base colour isn't shown beside it"
            )
            return light, np.minimum(emission, 1.0), np.zeros(3)
        if layer.wrap != light.wrap or not np.allclose(layer.uv, light.uv, atol=1e-6):
            self._source.warn(
                f"the emissive texture of material '{name}' isn't shown: it lies otherwise than the base"
            )
            return layer, factor, np.zeros(3)
        size = max(layer.image.size, light.image.size)
        base, glow = (np.asarray(one.image.resize(size)) / 255.0 for one in (layer, light))
        both = linear_from_srgb(base) * factor + linear_from_srgb(glow) * emission
        image = Image.fromarray(to_bytes(srgb_from_linear(both)))
        return _Layer(image, layer.uv, layer.wrap), np.ones(3), np.zeros(3)


def _baked(image: Image.Image, factor: np.ndarray, emission: np.ndarray) -> Image.Image:
    """A picture times a linear factor plus linear light, exactly."""
    if np.allclose(factor, 1.0) and not emission.any():
        return image
    levels = linear_from_srgb(np.arange(256) / 255.0)
    pixels = np.asarray(image)
    channels = [
        to_bytes(srgb_from_linear(levels * factor[i] + emission[i]))[pixels[..., i]] for i in range(3)
    ]
    return Image.fromarray(np.stack(channels, axis=-1))
