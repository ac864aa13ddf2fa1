"""Exception types of the package: one per kind, so that a caller can tell what to do about it.

Every message says what is wrong, where (file, topic, entry) and what to do about it.
"""


class PicoPoseError(Exception):
    """Base class of everything this package raises on bad input."""


class ConfigError(PicoPoseError):
    """A parameter or configuration value that cannot work."""


class MeshError(PicoPoseError):
    """A mesh directory or mesh file that cannot be used."""


class RenderError(PicoPoseError):
    """No offscreen renderer could be started, or a render failed."""


class CacheError(PicoPoseError):
    """A bank cache entry that is corrupt or stale (callers rebuild it)."""


class CheckpointError(PicoPoseError):
    """Network weights that cannot be read or do not fit the preset."""


class ImageError(PicoPoseError):
    """An image whose size, encoding or data cannot be used."""


class CameraError(PicoPoseError):
    """Camera intrinsics or a distortion model that cannot be used."""


class SegmentError(PicoPoseError):
    """A segment or segmentation file that cannot be used."""


class BagError(PicoPoseError):
    """A rosbag2 file that cannot be read or written."""


class DatasetError(PicoPoseError):
    """A BOP dataset or a results file that cannot be used."""


class ExportError(PicoPoseError):
    """A network that cannot be exported, or an exported one that cannot be used."""
