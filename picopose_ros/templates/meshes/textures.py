"""Pictures that a mesh names: found, checked before they are decoded, and brought to 8-bit RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

LARGEST_SIDE = 16384
"""Pixels: what OpenGL drivers take at least, and what fits into memory."""
LARGEST_AREA = 1 << 27
"""Pixels: 134 million, 400 MB."""
SIDE = 4096
"""Pixels: larger pictures are reduced to this side; a template shows an object 300 pixels wide."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the picture (run: git lfs pull)"),
    (b"/annex/objects", "is a git-annex pointer, not the picture (run: git annex get)"),
    (b"../.git/annex", "is a git-annex pointer, not the picture (run: git annex get)"),
    (b"\xabKTX 20\xbb", "is a KTX2 (Basis Universal) file, which isn't read (convert it to PNG)"),
    (b"\xabKTX 11\xbb", "is a KTX file, which isn't read (convert it to PNG)"),
    (b"\x76\x2f\x31\x01", "is an OpenEXR file, which isn't read (convert it to PNG)"),
    (b"#?RADIANCE", "is a Radiance HDR file, which isn't read (convert it to PNG)"),
    (b"<!DOCTYPE", "is a web page, not a picture (download it again)"),
    (b"<html", "is a web page, not a picture (download it again)"),
    (b"<svg", "is an SVG drawing, which isn't read (convert it to PNG)"),
)


class TextureError(ValueError):
    """Why a picture can't be used, as the end of a sentence that begins with its name."""


def decode(data: bytes) -> tuple[Image.Image, bool]:
    """A picture as 8-bit RGB, and whether some of it was transparent.

    16-bit and floating-point pictures are scaled, palettes, grey levels and CMYK converted, transparency is
    dropped, and a picture larger than `SIDE` is reduced.

    Raises:
        TextureError: it can't be read, is cut short or too large; the size is looked at before decoding.
    """
    if not data.strip(b"\0 \r\n\t"):
        raise TextureError("is empty")
    for magic, reason in _MAGIC:
        if data.lstrip()[: len(magic)].lower() == magic.lower():
            raise TextureError(reason)
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
            raise TextureError(
                f"has {width}x{height} pixels, more than {LARGEST_SIDE} a side or {LARGEST_AREA >> 20} "
                "million in all (reduce it)"
            )
        if max(width, height) > 2 * SIDE:
            image.draft("RGB", (SIDE, SIDE))  # JPEG decodes a smaller one at once
        image.load()
        transparent = _has_transparency(image)
        image = _rgb(image)
    except TextureError:
        raise
    except Image.DecompressionBombError:
        raise TextureError(
            f"is too large, more than {LARGEST_AREA >> 20} million pixels (reduce it)"
        ) from None
    except Exception as error:  # decoders raise anything on broken data
        reason = " ".join(str(error).split())[:120]
        reason = reason if "cannot identify" not in reason else "no known picture format"
        raise TextureError(f"can't be read as a picture ({reason or type(error).__name__})") from error
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return image, transparent


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        if image.mode == "F":
            values = 255.0 * values if values.max(initial=0.0) <= 2.0 else values
        elif image.mode != "I" or values.max(initial=0.0) > 255.0:
            values = values / 257.0
        values = np.clip(np.round(np.nan_to_num(values)), 0, 255).astype(np.uint8)
        return Image.fromarray(np.repeat(values[..., None], 3, axis=-1))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return Image.fromarray(np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3]))
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 250


def find_file(folder: Path, name: str, uri: bool = False) -> Path:
    """The file that a mesh file in ``folder`` means by a name, or where it should be if there is none.

    Backslashes, quotes, percent-encoding (of a URI, or where it helps) and ``file://`` are understood. If the
    path doesn't exist, a file of that name beside the mesh is meant, in any case of letters: paths of the
    computer on which it was exported are seldom right elsewhere.
    """
    name = name.strip().strip('"').removeprefix("file://")
    plain = [unquote(name, errors="surrogateescape"), name] if uri or "%" in name else [name]
    for text in plain:
        path = folder / Path(text.replace("\\", "/"))
        if _is_file(path):
            return path
    wanted = folder / Path(plain[0].replace("\\", "/"))
    for beside in (wanted, folder / wanted.name):
        try:
            for entry in sorted(os.scandir(beside.parent), key=lambda entry: entry.name):
                if entry.name.lower() == beside.name.lower() and entry.is_file():
                    return Path(entry.path)
        except (OSError, ValueError):
            continue
    return wanted


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
