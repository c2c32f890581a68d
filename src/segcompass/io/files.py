"""Small files: written whole or not at all, and JSON objects read back with errors that help."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segcompass.io.errors import DataError


def make_folder(path: Path) -> Path:
    """Make a folder to write into, if it is not there; before the work, so that none is lost.

    Raises:
        DataError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be a folder to write into ({error.strerror}); choose another"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise DataError(f"{path} cannot be written to; change its rights, or choose another folder")
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Put ``content`` at ``path`` in one step; a link lying there is replaced, not followed.

    Args:
        path: the file; its folder is there already.
        content: text becomes UTF-8, half characters (from undecodable file names) become "?".
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # left by a killed run of the same process id
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    """What ``write`` writes into the file that it is given."""
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def read_object(path: Path, way_out: str = "delete it, or write it again") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        way_out: what a person can do where it is damaged.

    Raises:
        DataError: it is missing, damaged, or holds something else; names the file.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {way_out}") from error
    return found
