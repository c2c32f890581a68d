"""Tables of instructions, CSV or JSON, that tell an import what is asked about which picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

from segcompass.data.json_files import load_json
from segcompass.io.errors import DataError

SEPARATOR = ";"  # between the targets of a CSV's cell


class Instruction(NamedTuple):
    """One row."""

    row: int  # from 1
    image: str  # file name, stem, COCO's id, or path in a LabelMe folder
    text: str
    targets: tuple[str, ...] | None  # ids or names; () nothing matches, None all there is
    split: str | None


def read_instructions(path: Path) -> list[Instruction]:
    """Read ``image, instruction[, targets][, split]`` from CSV, or from a JSON list of objects.

    Targets are ids or names of annotations, in CSV with semicolons between them; an empty cell or
    list means that nothing matches. Without ``targets`` all that is annotated in the picture is
    asked for.

    Raises:
        DataError: the file is missing or damaged, or a row lacks something.
    """
    rows = load_json(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is no list of objects with image and instruction")
    return [_instruction(path, number, row) for number, row in enumerate(rows, start=1)]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give a CSV or JSON file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is of another encoding than UTF-8; convert it") from error
    except csv.Error as error:
        raise DataError(f"{path} is no valid CSV ({error})") from error


def _instruction(path: Path, number: int, row: dict[str, Any]) -> Instruction:
    image, text, targets = (row.get(key) for key in ("image", "instruction", "targets"))
    if image in (None, "") or not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}, row {number}: needs image and instruction, found {row!r:.80}")
    if isinstance(targets, str):
        targets = [part for part in targets.split(SEPARATOR) if part.strip()]
    if not isinstance(targets, list | None):
        raise DataError(f"{path}, row {number}: targets are a list, found {targets!r:.80}")
    wanted = None if targets is None else tuple(str(target).strip() for target in targets)
    split = row.get("split")
    named = None if split in (None, "") else str(split)
    return Instruction(number, str(image), text.strip(), wanted, named)
