"""Interleaved documents: read as they are stored, whatever is broken is told, nothing leaks."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segcompass.data import documents as documents_module
from segcompass.data.documents import DocumentsConfig, DocumentSet
from segcompass.io.errors import DataError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def png(colour: tuple[int, int, int], side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def row(*parts: Any) -> dict[str, list[Any]]:
    """Texts as they are, pictures in a one-element tuple."""
    return {
        "texts": [None if isinstance(part, tuple) else part for part in parts],
        "images": [part[0] if isinstance(part, tuple) else None for part in parts],
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist([{**r, "metadata": "x"} for r in rows])
    parquet.write_table(table, path, row_group_size=group)
    return path


def read(root: Path, seed: int = 0, **settings: Any) -> dict[str, tuple[Any, ...]]:
    """Parts by file and row, with pictures as their first pixel."""
    found = DocumentSet(DocumentsConfig(root=root, **settings), seed)
    result = {}
    for position in range(len(found)):
        document = found.at(position)
        if document is not None:
            result[Path(document.name).name] = tuple(
                part if isinstance(part, str) else tuple(part[0, 0].tolist())
                for part in document.parts
            )
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/red.png").write_bytes(png(RED))
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    return tmp_path


def test_jsonl_keeps_the_reading_order(folder: Path) -> None:
    rows = [
        row("a red square", ("pictures/red.png",), "and", ({"path": "blue.png"},)),
        row(("blue.png",), "only one"),
    ]
    write_jsonl(folder / "a.jsonl", rows)
    assert read(folder) == {
        "a.jsonl:0": ("a red square", RED, "and", BLUE),
        "a.jsonl:1": (BLUE, "only one"),
    }


@pytest.mark.parametrize("form", ["path", "bytes", "mapping of bytes", "mapping of a path"])
def test_parquet_in_every_form_of_pictures(folder: Path, form: str) -> None:
    picture: Any = {
        "path": "pictures/red.png",
        "bytes": png(RED),
        "mapping of bytes": {"bytes": png(RED), "path": "elsewhere.png"},
        "mapping of a path": {"bytes": None, "path": "pictures/red.png"},
    }[form]
    write_parquet(folder / "a.parquet", [row("see", (picture,)) for _ in range(5)])
    found = read(folder)
    assert found == {f"a.parquet:{i}": ("see", RED) for i in range(5)}


def test_a_folder_holds_several_files_and_the_pictures_may_lie_elsewhere(folder: Path) -> None:
    (folder / "shards/deep").mkdir(parents=True)
    write_jsonl(folder / "shards/deep/a.jsonl", [row("x", ("red.png",))])
    write_parquet(folder / "shards/b.parquet", [row(("red.png",), "y")])
    found = read(folder / "shards", images=folder / "pictures")
    assert found == {"a.jsonl:0": ("x", RED), "b.parquet:0": (RED, "y")}


def test_every_document_is_visited_once_and_blocks_are_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "LINES", 3)
    write_jsonl(folder / "a.jsonl", [row(f"a{i}") for i in range(8)])
    write_parquet(folder / "b.parquet", [row(f"b{i}") for i in range(5)])
    take, reads = DocumentSet._read_block, []
    monkeypatch.setattr(
        DocumentSet,
        "_read_block",
        lambda self, number: (reads.append(number), take(self, number))[1],
    )
    found, again = (DocumentSet(DocumentsConfig(root=folder), seed=1) for _ in range(2))
    texts = [document.parts[0] for i in range(len(found)) if (document := found.at(i))]
    assert sorted(texts) == [f"a{i}" for i in range(8)] + [f"b{i}" for i in range(5)]
    assert texts != sorted(texts)
    assert sorted(reads) == list(range(len(found.blocks))) == list(range(3 + 3))
    assert [again.identity(i) for i in range(13)] == [found.identity(i) for i in range(13)]
    assert len({found.identity(i) for i in range(13)}) == 13


def test_another_seed_is_another_order(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [row(f"a{i}") for i in range(30)])
    first, second = (list(read(folder / "a.jsonl", seed=seed)) for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_a_changed_file_changes_the_identity(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", [row("x")])
    config = DocumentsConfig(root=path)
    before = DocumentSet(config).identity(0)
    write_jsonl(path, [row("xy")])
    assert DocumentSet(config).identity(0) != before


def test_a_document_is_cut_before_its_next_picture(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [row(("blue.png",), "a", ("missing.png",), "b")])
    assert read(folder / "a.jsonl", max_images=1) == {"a.jsonl:0": (BLUE, "a")}


def test_empty_places_and_blank_texts_say_nothing(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [{"texts": [None, " \n", "a"], "images": [None, None, None]}])
    assert read(folder / "a.jsonl") == {"a.jsonl:0": ("a",)}


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "no JSON"),
    "not UTF-8": (b"\xff\xfe", "no JSON"),
    "a list": ([1, 2], "no lists texts and images"),
    "no images": ({"texts": ["a"]}, "no lists texts and images"),
    "unequal": ({"texts": ["a"], "images": []}, "1 texts beside 0 images"),
    "both speak": ({"texts": ["a"], "images": ["blue.png"]}, "place 0 holds a text and a picture"),
    "a number": ({"texts": [3], "images": [None]}, "text 0 is int"),
    "half a character": (b'{"texts": ["\\ud800"], "images": [null]}', "half a character"),
    "an address": (row(("http://example.com/a.png",)), "is an address; download it"),
    "a number for a picture": (row((3,)), "a picture is int"),
    "an empty mapping": (row(({"bytes": None},)), "a picture is NoneType"),
    "missing": (row(("nowhere.png",)), "no such file"),
    "no picture": (row(("notes.txt",)), "not a picture"),
    "absolute": (row(("/etc/hostname",)), "lies outside"),
    "upwards": (row(("../secret.png",)), "lies outside"),
    "upwards in the middle": (row(("pictures/../../secret.png",)), "lies outside"),
    "a link out": (row(("link.png",)), "lies outside"),
    "NUL": (row(("a\0b.png",)), "lies outside"),
    "half a name": (b'{"texts": [null], "images": ["\\ud800.png"]}', "lies outside"),
    "too large": (row(("large.png",)), "more than the 100 allowed"),
    "an endless line": (b'{"texts": ["' + b"a" * 5000 + b'"], "images": [null]}', "4,000 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_counted_or_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(documents_module, "MAX_LINE", 4000)
    inside = tmp_path / "set"
    (inside / "pictures").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(RED))
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "blue.png").write_bytes(png(BLUE))
    (inside / "large.png").write_bytes(png(BLUE, side=11))
    (inside / "notes.txt").write_text("no picture")
    broken, message = BROKEN[case]
    path = write_jsonl(inside / "a.jsonl", [row("before"), broken, row("after", ("blue.png",))])
    with caplog.at_level(logging.WARNING):
        assert read(path, max_pixels=100) == {
            "a.jsonl:0": ("before",),
            "a.jsonl:2": ("after", BLUE),
        }
    assert "1 document(s) skipped so far" in caplog.text and message in caplog.text
    with pytest.raises(DataError, match=r"a\.jsonl:1: ") as caught:
        read(path, max_pixels=100, on_error="raise")
    assert message in str(caught.value)


def test_skipped_rows_are_counted_without_flooding_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(folder / "a.jsonl", [b"{"] * 20 + [row("a")])
    found = DocumentSet(DocumentsConfig(root=folder / "a.jsonl"))
    assert sum(found.at(i) is None for i in range(21)) == found.skipped.total() == 20
    assert len(caplog.records) == 5  # 1, 2, 4, 8, 16


def test_what_is_no_set_of_documents_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        DocumentSet(DocumentsConfig(root=folder / "nowhere"))
    with pytest.raises(DataError, match=r"no documents; expected \.parquet or \.jsonl"):
        DocumentSet(DocumentsConfig(root=folder / "pictures"))
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"bad\.parquet is no whole Parquet file"):
        DocumentSet(DocumentsConfig(root=folder / "bad.parquet"))
    with pytest.raises(DataError, match="columns caption, metadata; documents have texts and"):
        path = write_parquet(folder / "other.parquet", [{"caption": "a"}])
        DocumentSet(DocumentsConfig(root=path))


def test_a_damaged_row_group_costs_its_own_rows_only(folder: Path) -> None:
    rows = [row(np.random.default_rng(i).bytes(300).hex()) for i in range(4)]
    path = write_parquet(folder / "a.parquet", rows)
    data = bytearray(path.read_bytes())
    data[4:20] = b"\xff" * 16  # the first page's header
    path.write_bytes(data)
    found = read(path)
    assert {"a.parquet:2", "a.parquet:3"} <= set(found)
    assert "a.parquet:0" not in found


def test_parquet_without_pyarrow_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"install segcompass\[data\]"):
        DocumentSet(DocumentsConfig(root=folder))
