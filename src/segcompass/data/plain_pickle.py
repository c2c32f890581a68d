"""Pickles of plain data: lists, dicts, text and numbers, and nothing that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from segcompass.io.errors import DataError, UnsafeFileError


class _PlainUnpickler(pickle.Unpickler):
    """Refuses a pickle that names any class or function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UnsafeFileError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UnsafeFileError(f"asks for the outside object {pid!r}")


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data, also one that Python 2 wrote.

    Raises:
        DataError: the file is missing or damaged.
        UnsafeFileError: it asks for anything but plain data; nothing of it was called.
    """
    try:
        with path.open("rb") as file:
            # the published files were written by Python 2, whose text is bytes
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} {error}; a list of references is plain data. "
            "It was not opened: get the file from where the data set is published"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is a damaged pickle ({error}); download it again") from error
