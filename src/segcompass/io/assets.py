"""What ships inside the package: the bundled model and the pictures of the demo."""

from __future__ import annotations

from pathlib import Path

from segcompass.io.errors import SegCompassError

ASSETS = Path(__file__).parents[1] / "assets"


class MissingAssetError(SegCompassError):
    """Weights or pictures that are not on this machine and cannot be fetched now."""


def bundled(name: str) -> Path:
    """The folder of a bundled asset.

    Args:
        name: "nano" (the bundled model) or "demo" (its pictures and instructions).

    Raises:
        MissingAssetError: this installation has it not.
    """
    folder = ASSETS / name
    if not folder.is_dir():
        raise MissingAssetError(
            f"{folder}: the bundled {name!r} is not in this installation; install the released "
            "package again (pip install --force-reinstall segcompass), or name a model folder"
        )
    return folder
