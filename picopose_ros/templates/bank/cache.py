"""Banks on disk: made once, and believed only if they are exactly what would be made now."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from picopose_ros import __version__
from picopose_ros.errors import CacheError, ConfigError, MeshError, PicoPoseError
from picopose_ros.model import PicoPose, model_fingerprint
from picopose_ros.templates.bank.build import Stopped, build_bank
from picopose_ros.templates.bank.templates import (
    ARRAYS,
    DISTANCE,
    TEMPLATE_K,
    TEMPLATE_SIZE,
    WINDOW,
    TemplateBank,
)
from picopose_ros.templates.headlight import AMBIENT, DARKEST
from picopose_ros.templates.meshes import ObjectSpec, load_object, mesh_digest, shown
from picopose_ros.templates.renderer import Shading

_FORMAT = 2
"""Raise it when the meaning or the making of a bank changes: every cached bank is then rebuilt."""

_log = logging.getLogger(__name__)


def load_or_build(
    spec: ObjectSpec,
    model: PicoPose,
    count: int = 162,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    fingerprint: str | None = None,
    stop: threading.Event | None = None,
    shading: Shading | None = None,
) -> TemplateBank:
    """The bank of an object, from the cache where that holds exactly this one.

    An entry counts only if it was made from the same mesh bytes (and files the mesh refers to), unit,
    viewpoints, render settings, weights, preset and package version, and if its checksum is right; otherwise
    it is rebuilt and replaced, and the log says why. Processes that want the same entry wait for the one that
    builds it. Without a usable cache folder the bank is built every time, with a warning.

    Args:
        spec, model, count, device, progress, stop, shading: as in `build_bank`.
        cache_dir: None: ``picopose_ros`` in the user's cache folder.
        fingerprint: of the model, where it is known (`model_fingerprint` reads every weight).

    Raises:
        MeshError: the mesh cannot be used, for whatever reason.
        ConfigError: no such number of viewpoints, or a cache folder in a home that nobody knows.
        RenderError: nothing can be rendered on this machine.
    """
    try:
        return _load_or_build(spec, model, count, cache_dir, device, progress, fingerprint, stop, shading)
    except (PicoPoseError, Stopped):
        raise
    except Exception as error:  # whatever is wrong with one object, the others go on
        raise MeshError(
            f"object '{spec.class_id}' ({shown(spec.path)}) can't be onboarded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _load_or_build(
    spec: ObjectSpec,
    model: PicoPose,
    count: int,
    cache_dir: str | Path | None,
    device: str | torch.device | None,
    progress: bool,
    fingerprint: str | None,
    stop: threading.Event | None,
    shading: Shading | None,
) -> TemplateBank:
    shading = model.config.template_shading if shading is None else shading
    recipe = _recipe(spec, model, count, fingerprint, shading)
    folder = _folder(cache_dir)
    path = folder / _entry_name(spec, model, count)
    bank = _cached(path, recipe, logging.DEBUG) or _moved(path, spec, recipe)
    if bank is not None:  # else the entry is looked at again under the lock
        return replace(bank, spec=spec)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder / f".{path.name}.lock", stop))
        except OSError as error:
            _log.warning("cache folder %s cannot be used (%s): the bank is not kept", folder, error)
            return build_bank(load_object(spec), model, count, device, progress, stop, shading)
        bank = _cached(path, recipe, logging.WARNING)  # another process may have built it meanwhile
        if bank is None:
            bank = build_bank(load_object(spec), model, count, device, progress, stop, shading)
            try:
                _write_entry(path, bank, recipe)
            except (OSError, SafetensorError) as error:
                _log.warning("the bank of '%s' cannot be kept in %s: %s", spec.class_id, path, error)
    return bank if bank.spec is not None else replace(bank, spec=spec)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/picopose_ros``, or ``~/.cache/picopose_ros``.

    A user without a home, as in some containers, has a folder for temporary files.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "picopose_ros"
    try:
        return Path.home() / ".cache" / "picopose_ros"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"picopose_ros-{os.getuid()}"


def _folder(cache_dir: str | Path | None) -> Path:
    try:
        return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"cache folder {cache_dir}: the home folder is unknown ({error}); write the whole path"
        ) from error


def _recipe(
    spec: ObjectSpec, model: PicoPose, count: int, fingerprint: str | None, shading: Shading
) -> dict[str, str]:
    """Everything that a bank depends on, by the name under which the log speaks of it."""
    settings = [TEMPLATE_K.tolist(), TEMPLATE_SIZE, DISTANCE, WINDOW, "antialiased", _FORMAT]
    return {
        "mesh": mesh_digest(spec),
        "unit": spec.unit,
        "viewpoints": str(count),
        "render settings": json.dumps(settings),
        "shading": json.dumps([shading, AMBIENT, DARKEST]),
        "weights": model_fingerprint(model) if fingerprint is None else fingerprint,
        "preset": model.config.name,
        "package version": __version__,
    }


def _entry_name(spec: ObjectSpec, model: PicoPose, count: int) -> str:
    """One entry per mesh file, preset and number of viewpoints, so that a stale one is replaced, not kept."""
    place = hashlib.sha256(os.fsencode(spec.path.resolve())).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", spec.class_id)[:60]
    return f"{readable}-{place}-{model.config.name}-{count}.safetensors"


def _checksum(arrays: dict[str, np.ndarray], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in ARRAYS:
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold the lock file; the kernel frees it if this process dies."""
    with path.open("a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    _log.info("waiting for another process that builds the same bank (%s)", path)
                waiting = True
                if stop is not None and stop.is_set():
                    raise Stopped(path.name) from None
                time.sleep(0.1)
        yield


def _cached(path: Path, recipe: dict[str, str], level: int) -> TemplateBank | None:
    """The entry, or None; why it does not count is logged at that level."""
    if not path.is_file():
        return None
    try:
        return _read_entry(path, recipe)
    except CacheError as error:
        _log.log(level, "%s", error)
        return None


def _moved(path: Path, spec: ObjectSpec, recipe: dict[str, str]) -> TemplateBank | None:
    """The entry of the same mesh in another place: the folder was moved, copied or is mounted elsewhere."""
    place = re.compile(re.sub(r"-[0-9a-f]{12}-", "-[0-9a-f]{12}-", path.name))
    try:
        others = [one for one in sorted(path.parent.iterdir()) if place.fullmatch(one.name) and one != path]
    except OSError:
        return None
    for other in others:
        bank = _cached(other, recipe, logging.DEBUG)
        if bank is not None:
            return replace(bank, class_id=spec.class_id)
    return None


def _read_entry(path: Path, recipe: dict[str, str]) -> TemplateBank:
    """Raises CacheError if the entry is of another recipe or not intact."""
    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            about: dict[str, Any] = json.loads(metadata["about"])
            differing = [name for name in recipe if about["recipe"].get(name) != recipe[name]]
            if differing:
                raise CacheError(
                    f"the cached bank {path} is stale: {', '.join(differing)} changed; rebuilding"
                )
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
        if metadata["checksum"] != _checksum(arrays, metadata["about"]):
            raise CacheError(f"the cached bank {path} is damaged (wrong checksum): rebuilding")
        return TemplateBank(
            class_id=about["class_id"],
            diameter=about["diameter"],
            warnings=tuple(about["warnings"]),
            shading=about["shading"],
            **arrays,
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the cached bank {path} is damaged ({error}): rebuilding") from error


def _write_entry(path: Path, bank: TemplateBank, recipe: dict[str, str]) -> None:
    """Write atomically, under the lock: readers see the old entry or the whole new one, whatever crashes."""
    for leftover in path.parent.glob(f".{path.name}.*.partial"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    about = json.dumps(
        {
            "class_id": bank.class_id,
            "diameter": bank.diameter,
            "warnings": bank.warnings,
            "shading": bank.shading,
            "recipe": recipe,
        }
    )
    arrays = {name: np.ascontiguousarray(getattr(bank, name)) for name in ARRAYS}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata={"about": about, "checksum": _checksum(arrays, about)})
        partial.chmod(0o644)  # other users may have the same cache folder
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
