"""The templates of an object with their features, built once per mesh and kept on disk."""

from picopose_ros.templates.bank.build import ENCODE_BATCH, build_bank
from picopose_ros.templates.bank.cache import default_cache_dir, load_or_build
from picopose_ros.templates.bank.onboarding import OBJECTS_AT_ONCE, Onboarding, Progress, loading, onboard
from picopose_ros.templates.bank.templates import (
    DISTANCE,
    TEMPLATE_K,
    TEMPLATE_SIZE,
    WINDOW,
    TemplateBank,
    TemplateCrop,
    crop_template,
)

__all__ = [
    "DISTANCE",
    "ENCODE_BATCH",
    "OBJECTS_AT_ONCE",
    "TEMPLATE_K",
    "TEMPLATE_SIZE",
    "WINDOW",
    "Onboarding",
    "Progress",
    "TemplateBank",
    "TemplateCrop",
    "build_bank",
    "crop_template",
    "default_cache_dir",
    "load_or_build",
    "loading",
    "onboard",
]
