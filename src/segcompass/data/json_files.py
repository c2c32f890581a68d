"""JSON files of data sets: UTF-8, read whole, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segcompass.io.errors import DataError


def load_json(path: Path) -> Any:
    """Read a JSON file; raises DataError when it is missing, damaged or not UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some tools write a BOM
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; the layout needs it") from error
    except UnicodeDecodeError as error:
        odd = error.object[error.start]
        raise DataError(
            f"{path} is of another encoding than UTF-8 (0x{odd:02x} at byte {error.start}); "
            "convert it, or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download or write it again") from error


def dump_json(path: Path, value: Any) -> None:
    """Write compact JSON in UTF-8, the same bytes on every system."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Half characters, as of undecodable file names, become JSON's own escapes, and come back.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
