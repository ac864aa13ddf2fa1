"""One data set of shards in a training's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from picopose_ros.errors import ConfigError
from picopose_ros.training.template_sources import MESH_UPS


@dataclass(frozen=True)
class ShardSource:
    """One data set of shards; an entry of the training config's `shards`."""

    shards: str
    """A folder of .tar files, one of them, or a name with braces (``shard-{000000..001039}.tar``)."""
    models: str = ""
    """Folder of the meshes (see `find_meshes`); templates are rendered when needed. Or:"""
    templates: str = ""
    """Folder of rendered templates (see `FolderTemplates`)."""
    weight: float = 1.0
    """Among all sources of a training."""
    models_up: str = "z"
    """See `MeshTemplates`."""
    template_scale: float = 1e-4
    """Metres per unit of the template folder."""

    @staticmethod
    def from_dict(entry: Any, where: str) -> ShardSource:
        """Read and check an entry.

        Args:
            where: file and key, for the messages.
        Raises:
            ConfigError: unknown key, or a value that cannot work. Whether the files are there is not asked.
        """
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must be a mapping with shards, and models or templates")
        known = {f.name: f for f in fields(ShardSource)}
        if unknown := sorted(set(map(str, entry)) - set(known)):
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
        for name, value in entry.items():
            number = known[name].type == "float"
            if not (isinstance(value, int | float) if number else isinstance(value, str)) or value is True:
                raise ConfigError(
                    f"{where}: {name} must be a {'number' if number else 'text'}, not {value!r}"
                )
        if not entry.get("shards"):
            raise ConfigError(
                f"{where}: shards is missing; give a folder of .tar files or a name with braces"
            )
        source = ShardSource(**entry)
        if bool(source.models) == bool(source.templates):
            raise ConfigError(f"{where}: give either models (meshes) or templates (rendered ones)")
        if not (0 <= source.weight < float("inf") and 0 < source.template_scale < float("inf")):
            raise ConfigError(f"{where}: weight must not be negative, template_scale must be positive")
        if source.models_up not in MESH_UPS:
            raise ConfigError(f"{where}: models_up is {source.models_up!r}; use one of {', '.join(MESH_UPS)}")
        return source
