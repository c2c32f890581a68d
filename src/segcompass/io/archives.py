"""Files inside archives that are left unextracted, named as if the archive were a folder.

``train2014.zip/train2014/a.jpg`` is a member of the archive ``train2014.zip``. Where no archive is
on the way, the functions do what ``Path`` does. Members are read whole, never written to disk.
The bytes in a Parquet file have paths as well: ``test.parquet/image/12`` is column and row.
"""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from segcompass.io import parquet
from segcompass.io.errors import DataError, UnsafeFileError

SUFFIX = ".zip"
SUFFIXES = (SUFFIX, parquet.SUFFIX)
MAX_MEMBER = 1 << 28  # bytes; a larger member is no picture and no annotation of one
_OPEN = 8  # archives kept open: a set has one for each folder


class _Archive(NamedTuple):
    """An opened archive and its directory."""

    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    folders: dict[str, list[str]]  # folder in the archive ("." for its top) -> names of its files


def find_folder(folder: Path) -> Path | None:
    """The folder, or the archive ``FOLDER.zip`` beside it that stands in for it, or None.

    An archive holds its files at the top or in a folder of its own name; either is found.

    Raises:
        DataError, UnsafeFileError: as for ``read_bytes``.
    """
    if folder.is_dir():
        return folder
    archive = folder.with_name(folder.name + SUFFIX)
    if not archive.is_file():
        return None
    return archive / folder.name if folder.name in _open(archive).folders else archive


def list_files(folder: Path) -> list[str]:
    """Names of the files directly in a folder, on disk or in an archive, hidden ones left out."""
    parts = _split(folder)
    if parts is None:
        names = [path.name for path in folder.iterdir()]
    else:
        names = _open(parts[0]).folders.get(parts[1], [])
    return sorted(name for name in names if not name.startswith("."))


def is_file(path: Path) -> bool:
    """Whether there is such a file, on disk or in an archive."""
    try:
        parts = _split(path)
        if parts is None:
            return path.is_file()
    except OSError:  # a name too long for any file
        return False
    if (cell := _cell(*parts)) is not None:
        return parquet.has_cell(*cell)
    return parts[1] in _open(parts[0]).members


def in_archive(path: Path) -> bool:
    """Whether a path leads into an archive, and does not only name one."""
    return path.suffix.lower() not in SUFFIXES and _split(path) is not None


def stat(path: Path) -> os.stat_result:
    """Size and time of a file, or of the archive it lies in; OSError where there is none."""
    parts = _split(path)
    return (path if parts is None else parts[0]).stat()


def read_bytes(path: Path) -> bytes:
    """The content of a file, on disk or in an archive.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the archive is damaged.
        UnsafeFileError: the archive names a path outside itself, or the member unpacks to more
            than ``MAX_MEMBER`` bytes.
    """
    parts = _split(path)
    if parts is None:
        return path.read_bytes()
    if (cell := _cell(*parts)) is not None:
        return parquet.read_cell(*cell)
    archive = _open(parts[0])
    info = archive.members.get(parts[1])
    if info is None:
        raise FileNotFoundError(2, "no such member in the archive", str(path))
    if info.file_size > MAX_MEMBER:
        raise UnsafeFileError(
            f"{path} unpacks to {info.file_size:,} bytes, more than the {MAX_MEMBER:,} allowed; "
            "extract it yourself if you trust it"
        )
    try:
        return archive.file.read(info)  # never more than the size that was stated
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); download the archive again") from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a rare way
        raise DataError(f"{path} cannot be unpacked ({error}); extract the archive") from error


def _split(path: Path) -> tuple[Path, str] | None:
    """Archive and member of a path; None where no archive is on the way."""
    parts = path.parts
    for end, part in enumerate(parts, start=1):
        if part.lower().endswith(SUFFIXES) and (archive := Path(*parts[:end])).is_file():
            return archive, str(PurePosixPath(*parts[end:]))
    return None


def _cell(archive: Path, member: str) -> tuple[Path, str, int] | None:
    """File, column and row, where the archive is a Parquet file."""
    if archive.suffix.lower() != parquet.SUFFIX:
        return None
    column, _, row = member.rpartition("/")
    return archive, column, int(row) if row.isdecimal() else -1


def _open(path: Path) -> _Archive:
    facts = path.stat()
    # Processes that were forked share the file's position: each opens the archive for itself.
    return _opened(path, facts.st_size, facts.st_mtime_ns, os.getpid())


@lru_cache(maxsize=_OPEN)
def _opened(path: Path, size: int, changed: int, process: int) -> _Archive:
    """The arguments beside the path only tell one state of the file from another."""
    try:
        file = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole zip archive ({error}); download it again") from error
    members: dict[str, zipfile.ZipInfo] = {}
    folders: dict[str, list[str]] = {}
    for info in file.infolist():
        name = _safe_name(path, info.filename)
        if not info.is_dir():
            members[str(name)] = info
            folders.setdefault(str(name.parent), []).append(name.name)
    return _Archive(file, members, folders)


def _safe_name(archive: Path, name: str) -> PurePosixPath:
    windows = PureWindowsPath(name)  # knows both kinds of slash
    if windows.anchor or ".." in windows.parts:
        raise UnsafeFileError(
            f"{archive} holds {name!r:.80}, a path outside itself; "
            "it was not read: get the archive from where the data set is published"
        )
    return PurePosixPath(name)
