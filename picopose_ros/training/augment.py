"""Disturbances of rendered queries: light, occluders, imperfect masks, backgrounds, camera."""

from __future__ import annotations

import cv2
import numpy as np

from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.synthetic.disturbances import normals_from_depth, occluder


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """A random field (h, w) float32 of about N(0, 1) that varies over `cells` cells."""
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _shadow(side: int, rng: np.random.Generator) -> np.ndarray:
    """A shadow that falls across a square, (side, side) float32: 1 in the light, less in the shade."""
    if rng.uniform() < 0.5:  # of a straight edge
        y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
        angle = rng.uniform(0, 2 * np.pi)
        inside = (
            x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) - np.float32(rng.uniform(-0.3, 0.3))
        )
    else:
        inside = smooth_field(rng, (side, side), int(rng.integers(2, 5))) * np.float32(0.2)
    edge = 1 / (1 + np.exp(-np.clip(inside * np.float32(rng.uniform(8, 120)), -30, 30)))
    return 1 - np.float32(rng.uniform(0.25, 0.7)) * edge


def relight(
    rgb: np.ndarray, depth: np.ndarray, mask: np.ndarray, focal: float, rng: np.random.Generator
) -> np.ndarray:
    """Light an unlit albedo image as rooms do: coloured lamps, surroundings, highlights, shadows; float32.

    The surroundings are a smooth random function of the normal, so that sides that face the table or a wall
    take its colour.
    """
    albedo = rgb.astype(np.float32)
    if rng.uniform() < 0.1:
        return albedo
    normal = cv2.GaussianBlur(normals_from_depth(depth, mask, focal), (0, 0), 0.8)
    ambient = np.float32(rng.uniform(0.25, 0.8))
    light = np.empty_like(normal)
    light[:] = ambient * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    if rng.uniform() < 0.6:  # light that surfaces around give back, by direction
        side = rng.normal(size=(3, 3)).astype(np.float32) * np.float32(0.25 * ambient)
        grey = side.mean(1, keepdims=True)
        light += normal @ (grey + 0.4 * (side - grey)).T
    lamps = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    shine = None
    for _ in range(lamps):
        lamp = rng.normal(size=3)
        lamp[2] = abs(lamp[2]) + 0.2
        lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
        facing = np.maximum(normal @ lamp, 0)
        colour = rng.uniform(0.88, 1.12, 3).astype(np.float32)
        light += facing[..., None] * (np.float32(rng.uniform(0.1, 0.9) / lamps) * colour)
        if rng.uniform() < 0.45:
            half = lamp + np.array([0, 0, 1], np.float32)
            half /= np.linalg.norm(half)
            power = np.float32(np.exp(rng.uniform(np.log(6), np.log(150))))
            glint = np.maximum(normal @ half, 0) ** power * np.float32(255 * rng.uniform(0.1, 0.9))
            shine = glint if shine is None else shine + glint
    if rng.uniform() < 0.3:
        light *= _shadow(len(rgb), rng)[..., None]
    lit = albedo * np.maximum(light, 0.04)
    if rng.uniform() < 0.15:  # a film of haze, as glossy plastic and foil have
        lit += np.float32(rng.uniform(10, 60)) * np.maximum(1 - normal[..., 2:], 0)
    return lit if shine is None else lit + shine[..., None]


def another_look(
    rgb: np.ndarray, shaded: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A template's colours as another scan or drawing of the same object has them, uint8.

    Softer, of another gamma, saturation and tone, with shading in the texture, with print that is shifted by
    a few pixels or partly missing. Shape, mask and labels stay.

    Args:
        rgb: (224, 224, 3) uint8 template. shaded: (224, 224) uint8. mask: (224, 224) bool.
    """
    out = rgb.astype(np.float32)
    side = len(out)
    if rng.uniform() < 0.3:  # print that is shifted
        reach = rng.uniform(0.5, 3.0)
        dx, dy = (smooth_field(rng, mask.shape, 3) * np.float32(reach * 0.6) for _ in range(2))
        y, x = np.mgrid[:side, :side].astype(np.float32)
        moved = cv2.remap(out, x + dx, y + dy, cv2.INTER_LINEAR)
        known = cv2.remap(mask.astype(np.float32), x + dx, y + dy, cv2.INTER_LINEAR)[..., None] > 0.99
        out = np.where(known, moved, out)
    if rng.uniform() < 0.2:  # print that is missing: the surroundings' colour instead
        weight = mask.astype(np.float32)[..., None]
        size = (0, 0), rng.uniform(8, 25)
        mean = (
            cv2.GaussianBlur(out * weight, *size)
            / np.maximum(cv2.GaussianBlur(weight[..., 0], *size), 1e-3)[..., None]
        )
        above = smooth_field(rng, mask.shape, 4) - rng.uniform(0.8, 1.6)
        gone = 1 / (1 + np.exp(-np.clip(12 * above, -30, 30)))
        out += gone[..., None].astype(np.float32) * (mean - out)
    if rng.uniform() < 0.5:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.4, 2.2))
    if rng.uniform() < 0.5:
        out = 255 * np.power(np.maximum(out, 0) / 255, np.float32(np.exp(rng.uniform(-0.5, 0.5))))
    if rng.uniform() < 0.5:
        grey = out.mean(-1, keepdims=True)
        out = grey + (out - grey) * np.float32(rng.uniform(0.3, 1.4))
    if rng.uniform() < 0.5:
        out = out * rng.uniform(0.8, 1.2, 3).astype(np.float32) + rng.uniform(-12, 18, 3).astype(np.float32)
    if rng.uniform() < 0.35:
        share = np.float32(rng.uniform(0.2, 0.8))
        out = out * (1 - share + share * shaded[..., None].astype(np.float32) / 140)
    return np.where(mask[..., None], np.clip(out, 1, 255), rgb).astype(np.uint8)


def grey_look(shaded: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A template as that of a mesh without colours, (224, 224, 3) uint8."""
    tone = np.float32(rng.uniform(0.9, 1.5)) * shaded.astype(np.float32) + np.float32(rng.uniform(-10, 10))
    return np.where(mask, np.clip(tone, 8, 255), 0).astype(np.uint8)[..., None].repeat(3, axis=2)


def degrade_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask as a segmenter gives it: grown, shrunk, ragged, a box, pieces missing or added, holes."""
    size = max(1, int(np.sqrt(mask.sum())))
    out = mask
    kind = rng.uniform()
    if kind < 0.3:
        k = int(rng.integers(1, max(2, size // 25) + 1)) * 2 + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
        out = cv2.dilate(out, kernel) if rng.uniform() < 0.55 else cv2.erode(out, kernel)
    elif kind < 0.65:  # off by a few pixels that change along the border
        soft = cv2.GaussianBlur(out.astype(np.float32), (0, 0), max(0.8, size * rng.uniform(0.01, 0.03)))
        wave = smooth_field(rng, out.shape, int(rng.integers(8, 40))) * np.float32(rng.uniform(0.05, 0.35))
        out = (soft + wave * (np.abs(soft - 0.5) < 0.45) > rng.uniform(0.25, 0.7)).astype(np.uint8)
    elif kind < 0.75:
        coarse = max(4, int(size / rng.uniform(3, 10)))
        small = cv2.resize(out.astype(np.float32), (coarse * 2, coarse * 2), interpolation=cv2.INTER_AREA)
        out = (cv2.resize(small, out.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5).astype(np.uint8)
    elif kind < 0.95:
        patch = occluder(mask, rng)
        patch = cv2.erode(patch, np.ones((3, 3), np.uint8))
        out = out & ~patch if rng.uniform() < 0.6 else out | patch
    else:
        out = out.copy()
        rows, cols = np.nonzero(mask)
        out[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] = 1
    if rng.uniform() < 0.1:  # holes, as at highlights
        rows, cols = np.nonzero(mask)
        out = out.copy()
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(rows)))
            cv2.circle(
                out, (int(cols[at]), int(rows[at])), max(2, int(size * rng.uniform(0.02, 0.08))), 0, -1
            )
    return out if out.sum() > 0.3 * mask.sum() else mask


def cut_off(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What hides up to three quarters of an object from one side, as a uint8 mask of the same size.

    The edge of a larger object in front, straight or bulging, or the image's border; now and then with a blob
    or a bar beside it. The hidden share is drawn evenly, which :func:`occluder` alone does not give: that
    seldom hides more than a third.
    """
    rows, cols = np.nonzero(mask)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
    size = np.float32(max(np.ptp(rows), np.ptp(cols)) + 1)
    x, y = (x - cols.mean(dtype=np.float32)) / size, (y - rows.mean(dtype=np.float32)) / size
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    if rng.uniform() < 0.5:
        across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        along = along + across**2 * np.float32(rng.uniform(-1, 1))
    cover = (along < np.quantile(along[rows, cols], rng.uniform(0.1, 0.75))).astype(np.uint8)
    return cover | occluder(mask, rng) if rng.uniform() < 0.2 else cover


def background(scenery: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(224, 224, 3) float32: plain, a soft gradient field, or a magnified piece of another object."""
    kind = rng.integers(3)
    if kind == 0:
        return np.tile(rng.uniform(0, 255, 3).astype(np.float32), (CROP_SIZE, CROP_SIZE, 1))
    if kind == 1:
        coarse = rng.uniform(0, 255, (*rng.integers(2, 20, 2), 3)).astype(np.float32)
        return cv2.resize(coarse, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)
    half = scenery.shape[0] // 2
    y, x = rng.integers(0, half, 2)
    piece = scenery[y : y + half, x : x + half].astype(np.float32)
    return cv2.resize(piece, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)


def _motion(rng: np.random.Generator) -> np.ndarray:
    """Kernel of a camera that moves while it exposes."""
    length = rng.uniform(2, 7)
    angle = rng.uniform(0, np.pi)
    kernel = np.zeros((9, 9), np.float32)
    for t in np.linspace(-0.5, 0.5, 17) * length:
        x, y = 4 + t * np.cos(angle), 4 + t * np.sin(angle)
        kernel[int(np.clip(round(y), 0, 8)), int(np.clip(round(x), 0, 8))] += 1
    return kernel / kernel.sum()


def photometric(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera does to (224, 224, 3) float32: blur, tone, vignette, noise, sharpening, JPEG."""
    blur = rng.uniform()
    if blur < 0.35:
        rgb = cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.3, 1.8))
    elif blur < 0.45:
        rgb = cv2.filter2D(rgb, -1, _motion(rng))
    if rng.uniform() < 0.35:
        side = int(rng.uniform(50, 200))
        small = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mean = rgb.mean()
    exposure = rng.uniform(0.4, 2.0) if rng.uniform() < 0.15 else rng.uniform(0.65, 1.3)
    rgb = (rgb - mean) * np.float32(exposure * rng.uniform(0.7, 1.25)) + np.float32(mean * exposure)
    if rng.uniform() < 0.4:
        rgb = 255 * np.power(np.clip(rgb, 0, 255) / 255, np.float32(np.exp(rng.uniform(-0.45, 0.45))))
    if rng.uniform() < 0.45:
        grey = rgb.mean(-1, keepdims=True)
        rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.2, 1.5))
    if rng.uniform() < 0.45:
        rgb = rgb * rng.uniform(0.82, 1.18, 3).astype(np.float32)
    if rng.uniform() < 0.15:  # a vignette, or haze on one side: a slow ramp
        rgb = rgb * (1 + smooth_field(rng, rgb.shape[:2], 1)[..., None] * np.float32(0.15))
    if rng.uniform() < 0.6:
        noise = rng.standard_normal(rgb.shape, dtype=np.float32)
        if rng.uniform() < 0.2:
            noise += rng.standard_normal((len(rgb), 1, 1), dtype=np.float32) * np.float32(0.5)
        if rng.uniform() < 0.5:  # what compression and resizing leave of a sensor's noise is coarser
            noise = cv2.GaussianBlur(noise, (0, 0), 0.8) * np.float32(1.8)
        rgb = rgb + noise * np.float32(rng.uniform(0, 8))
    if rng.uniform() < 0.35:  # sharpening, with its halos
        soft = cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.8, 2.0))
        rgb = rgb + (rgb - soft) * np.float32(rng.uniform(0.3, 1.6))
    if rng.uniform() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(30, 95))]
        coded = cv2.imencode(".jpg", np.clip(rgb, 0, 255).astype(np.uint8), quality)[1]
        rgb = cv2.imdecode(coded, cv2.IMREAD_COLOR).astype(np.float32)
    return rgb
