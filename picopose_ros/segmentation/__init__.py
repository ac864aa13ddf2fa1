"""Segments: instance masks with a class and a score, and the forms they arrive in.

`Segment` and label images (segments.py), COCO run lengths (rle.py), JSON files of this package (files.py) and
of CNOS (cnos.py).
"""

from picopose_ros.segmentation.cnos import (
    ClassNames,
    CnosDetections,
    Detection,
    Problems,
    bop_class_name,
    read_cnos,
    segments_from_cnos,
)
from picopose_ros.segmentation.files import segments_from_json, segments_to_json
from picopose_ros.segmentation.rle import rle_decode, rle_decode_compressed, rle_encode
from picopose_ros.segmentation.segments import Segment, mask_roi, segments_from_label_image

__all__ = [
    "ClassNames",
    "CnosDetections",
    "Detection",
    "Problems",
    "Segment",
    "bop_class_name",
    "mask_roi",
    "read_cnos",
    "rle_decode",
    "rle_decode_compressed",
    "rle_encode",
    "segments_from_cnos",
    "segments_from_json",
    "segments_from_label_image",
    "segments_to_json",
]
