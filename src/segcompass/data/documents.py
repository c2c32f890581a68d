"""Interleaved documents, text and pictures in reading order, in OBELICS's layout.

A row has two columns, ``texts`` and ``images``, lists of one length: where one holds something, the
other holds None. A picture is a path relative to the image folder, its encoded bytes, or a mapping
with ``bytes`` or ``path``. Files are Parquet (extra ``data``) or JSONL, whose pictures are paths.
OBELICS itself stores addresses; nothing is fetched here: the pictures have to be on disk already.

Files are read in blocks (a row group, or some lines), and documents are visited block by block, so
that a large set is shuffled without being read whole.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from segcompass.io import parquet
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.images import UInt8Array, load_image

COLUMNS = ("texts", "images")
SUFFIXES = (parquet.SUFFIX, ".jsonl")
LINES = 256  # of a JSONL file in one block
MAX_LINE = 1 << 24  # bytes; a longer line of text and paths is no document
logger = logging.getLogger(__name__)


class DocumentsConfig(BaseModel, frozen=True, extra="forbid"):
    """Which documents are read."""

    root: Path = Field(description="a .parquet or .jsonl file, or a folder that holds some")
    images: Path | None = Field(None, description="folder of the pictures; by default root's own")
    max_images: int = Field(8, ge=1, description="a document is cut before its next picture")
    max_pixels: int = Field(16_000_000, ge=1, description="of one picture")
    on_error: Literal["skip", "raise"] = Field("skip", description="what a broken row does")


class Document(NamedTuple):
    """One row: texts and decoded pictures in reading order."""

    name: str  # file and row
    parts: tuple[str | UInt8Array, ...]


class _Block(NamedTuple):
    path: Path
    number: int  # row group of a Parquet file, place of the first line of a JSONL file
    first: int  # its first row's number in the file
    rows: int


class DocumentSet:
    """Documents of one or several files, by number.

    Args:
        config: Where they are, and what a broken row does.
        seed: Of the order in which :meth:`at` visits them.

    Raises:
        DataError: if there are no files, or one is no document file.
    """

    def __init__(self, config: DocumentsConfig, seed: int = 0) -> None:
        self.config = config
        root = config.root
        if not root.exists():
            raise DataError(f"{root} does not exist; give a folder or file of documents")
        self.folder = config.images or (root if root.is_dir() else root.parent)
        files = (
            sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES) if root.is_dir() else [root]
        )
        blocks = [block for path in files for block in _blocks_of(path)]
        if not blocks:
            raise DataError(f"{root} holds no documents; expected {' or '.join(SUFFIXES)} files")
        self.blocks = blocks
        self.seed = seed
        self._order = np.random.default_rng(seed).permutation(len(blocks))
        sizes = np.array([blocks[i].rows for i in self._order])
        self._ends = sizes.cumsum()
        self.skipped: Counter[str] = Counter()  # reason -> rows
        # One block stays in memory: documents are visited block by block.
        self._rows: Callable[[int], list[Any]] = lru_cache(maxsize=1)(self._read_block)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, position: int) -> Document | None:
        """The document at a position of the shuffled order; None for a row that is skipped.

        Raises:
            DataError: if the row is broken and ``on_error`` is ``raise``.
        """
        block, row = self._locate(position)
        name = f"{self.blocks[block].path}:{self.blocks[block].first + row}"
        try:
            return Document(name, self._parts(self._rows(block)[row]))
        except SegCompassError as error:
            if self.config.on_error == "raise":
                raise DataError(f"{name}: {error}") from error
            self._skip(name, error)
            return None

    def identity(self, position: int) -> str:
        """Names file and row, and changes with the file; reads nothing."""
        block, row = self._locate(position)
        path = self.blocks[block].path
        facts = path.stat()
        row += self.blocks[block].first
        cut = (self.config.max_images, self.config.max_pixels, str(self.folder))
        return f"{path.name}:{row}:{facts.st_size}:{facts.st_mtime_ns}:{cut}"

    def _locate(self, position: int) -> tuple[int, int]:
        """Block and row in it; blocks are shuffled, and rows within their block."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} documents")
        place = int(np.searchsorted(self._ends, position, side="right"))
        block = int(self._order[place])
        rows = self.blocks[block].rows
        inside = position - (int(self._ends[place]) - rows)
        return block, int(np.random.default_rng((self.seed, block)).permutation(rows)[inside])

    def _read_block(self, number: int) -> list[Any]:
        block = self.blocks[number]
        read = _read_row_group if block.path.suffix == parquet.SUFFIX else _read_lines
        return read(block)

    def _parts(self, row: Any) -> tuple[str | UInt8Array, ...]:
        parts: list[str | UInt8Array] = []
        pictures = 0
        for text, image in _pairs(row):
            if image is None:
                parts.append(text or "")
                continue
            pictures += 1
            if pictures > self.config.max_images:
                break
            parts.append(load_image(self._source(image), max_pixels=self.config.max_pixels))
        return tuple(part for part in parts if not isinstance(part, str) or part.strip())

    def _source(self, image: Any) -> Path | bytes:
        """What `load_image` takes; raises DataError for anything that is no picture's place."""
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str) or not image:
            raise DataError(f"a picture is {type(image).__name__}; expected a path or bytes")
        if "://" in image:
            raise DataError(f"{image:.80} is an address; download it and store its path")
        inside = PurePosixPath(image)
        path = self.folder / inside
        leaves = inside.is_absolute() or ".." in inside.parts
        leaves |= "\0" in image or not _is_unicode(image)  # no file can be called so
        if leaves or not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"the picture {image!r:.80} lies outside {self.folder}; move it inside")
        return path

    def _skip(self, name: str, error: SegCompassError) -> None:
        reason = type(error.__cause__ or error).__name__
        self.skipped[reason] += 1
        count = self.skipped.total()
        if count & (count - 1) == 0:  # 1, 2, 4, 8, …: every broken row would flood the log
            logger.warning("%d document(s) skipped so far; the latest: %s: %s", count, name, error)


def _pairs(row: Any) -> list[tuple[str | None, Any]]:
    """(text, picture) of every place, of which one is None."""
    if isinstance(row, SegCompassError):
        raise row
    texts, images = (row.get(c) if isinstance(row, Mapping) else None for c in COLUMNS)
    if not isinstance(texts, list) or not isinstance(images, list):
        raise DataError(f"the row has no lists {' and '.join(COLUMNS)}")
    if len(texts) != len(images):
        raise DataError(f"{len(texts)} texts beside {len(images)} images; write None where silent")
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise DataError(f"place {place} holds a text and a picture; one of them must be None")
        if not isinstance(text, str | None):
            raise DataError(f"text {place} is {type(text).__name__}; expected text or None")
        if text is not None and not _is_unicode(text):
            raise DataError(f"text {place} holds half a character; store it as valid Unicode")
    return list(zip(texts, images, strict=True))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _blocks_of(path: Path) -> list[_Block]:
    return _row_groups(path) if path.suffix == parquet.SUFFIX else _line_blocks(path)


def _row_groups(path: Path) -> list[_Block]:
    names = set(parquet.columns(path))
    if not set(COLUMNS) <= names:
        raise DataError(
            f"{path} has the columns {', '.join(sorted(names)) or 'none'}; "
            f"documents have {' and '.join(COLUMNS)}"
        )
    sizes = parquet.group_sizes(path)
    firsts = np.cumsum([0, *sizes])
    return [_Block(path, i, int(firsts[i]), n) for i, n in enumerate(sizes) if n]


def _read_row_group(block: _Block) -> list[Any]:
    try:
        return list(parquet.read_group(block.path, block.number, list(COLUMNS)).to_pylist())
    except ValueError as error:  # damaged pages, broken UTF-8
        broken = DataError(f"row group {block.number} cannot be read ({error})")
        return [broken] * block.rows


def _line_blocks(path: Path) -> list[_Block]:
    blocks: list[_Block] = []
    start = first = rows = 0
    try:
        with path.open("rb") as file:
            while _next_line(file):
                rows += 1
                if rows == LINES:
                    blocks.append(_Block(path, start, first, rows))
                    start, first, rows = file.tell(), first + rows, 0
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check the file") from error
    return [*blocks, _Block(path, start, first, rows)] if rows else blocks


def _read_lines(block: _Block) -> list[Any]:
    with block.path.open("rb") as file:
        file.seek(block.number)
        return [_parse(_next_line(file)) for _ in range(block.rows)]


def _next_line(file: IO[bytes]) -> bytes:
    """The next line, or the beginning of one that is too long; the file stands after it."""
    line = rest = file.readline(MAX_LINE + 1)
    while len(rest) == MAX_LINE + 1 and not rest.endswith(b"\n"):
        rest = file.readline(MAX_LINE + 1)
    return line


def _parse(line: bytes) -> Any:
    """A row, or the error that reading it gave."""
    if len(line) > MAX_LINE:
        return DataError(f"the line has more than {MAX_LINE:,} bytes")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"the line is no JSON ({error})")
