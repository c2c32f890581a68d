"""Single columns and cells of Parquet files (extra ``data``), one row group at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from segcompass.io.errors import DataError

SUFFIX = ".parquet"


def columns(path: Path) -> list[str]:
    """Names of the columns; raises DataError without pyarrow or where the file is damaged."""
    return list(_opened(*_state(path)).schema_arrow.names)


def group_sizes(path: Path) -> list[int]:
    """Rows of every row group; raises DataError as ``columns``."""
    facts = _opened(*_state(path)).metadata
    return [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]


def read_group(path: Path, number: int, names: list[str]) -> Any:
    """Some columns of a row group, as a ``pyarrow.Table``; raises DataError where it is damaged."""
    try:
        return _opened(*_state(path)).read_row_group(number, columns=names)
    except (import_module("pyarrow").ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}, row group {number} cannot be read ({error})") from error


def read_cell(path: Path, column: str, row: int) -> bytes:
    """The bytes of a cell that holds bytes, or a mapping with ``bytes`` as pictures are stored.

    Raises:
        FileNotFoundError: there is no such cell, or it is empty.
        DataError: the file is damaged, or the cell holds something else.
    """
    first = 0
    for number, size in enumerate(group_sizes(path)):
        if first <= row < first + size and column in columns(path):
            value = _column(*_state(path), number, column)[row - first]
            value = value.get("bytes") if isinstance(value, Mapping) else value
            if isinstance(value, bytes):
                return value
            raise DataError(f"{path}, {column} {row} holds no bytes; store pictures embedded")
        first += size
    raise FileNotFoundError(2, f"no {column} {row}", str(path))


def has_cell(path: Path, column: str, row: int) -> bool:
    """Whether there is such a cell."""
    return 0 <= row < sum(group_sizes(path)) and column in columns(path)


def _state(path: Path) -> tuple[Path, int, int, int]:
    """The file, and what tells one state of it, and the process that reads it, from another."""
    facts = path.stat()
    return path, facts.st_size, facts.st_mtime_ns, os.getpid()


@lru_cache(maxsize=8)
def _opened(path: Path, *state: int) -> Any:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("Parquet files need pyarrow; install segcompass[data]") from error
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file ({error}); fetch it again") from error


@lru_cache(maxsize=1)  # pictures are large, and mostly asked for in order
def _column(path: Path, size: int, changed: int, process: int, number: int, name: str) -> Any:
    return read_group(path, number, [name]).column(0).to_pylist()
