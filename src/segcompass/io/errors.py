"""The errors a user can cause: each names the file, what was found, and the way out."""

from __future__ import annotations


class SegCompassError(Exception):
    """Anything the program refuses or cannot do, told in words a user can act on."""


class DataError(SegCompassError, ValueError):
    """A data set that is missing, incomplete, or in another layout than expected."""


class ImageError(SegCompassError, ValueError):
    """A picture that cannot be read or is not acceptable."""


class UnsafeFileError(SegCompassError, ValueError):
    """A file that could run code or exhaust the machine, and was therefore not opened."""


class CheckpointError(SegCompassError, ValueError):
    """A checkpoint folder that is incomplete, damaged, or whose parts do not belong together."""


class ConfigError(SegCompassError, ValueError):
    """A run's configuration that cannot be read or does not make sense."""
