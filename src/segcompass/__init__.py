"""SegCompass: interpretable reasoning segmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcompass.pipeline import SegCompass as SegCompass

__version__ = "0.1.0"
__all__ = ["SegCompass", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when the model is asked for."""
    if name == "SegCompass":
        from segcompass.pipeline import SegCompass

        return SegCompass
    raise AttributeError(f"module 'segcompass' has no attribute {name!r}")
