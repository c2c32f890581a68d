"""Files that lie in two places at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot (another disk, or no links)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
