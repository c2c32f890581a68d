"""Archives that are read where they lie, and those that are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcompass.io import archives
from segcompass.io.errors import DataError, ImageError, UnsafeFileError
from segcompass.io.images import displayed_hw, load_image

BLUE = (10, 20, 200)


def png(size: tuple[int, int] = (5, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, BLUE).save(out, "PNG")
    return out.getvalue()


def write(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_member_is_read_as_if_extracted(tmp_path: Path) -> None:
    archive = write(tmp_path / "val.zip", **{"val/a.png": png(), "val/b.json": b"{}"})
    member = archive / "val" / "a.png"
    assert archives.in_archive(member) and archives.is_file(member)
    assert archives.read_bytes(member) == png()
    assert archives.list_files(archive / "val") == ["a.png", "b.json"]
    assert not archives.is_file(archive / "a.png")
    assert displayed_hw(member) == (3, 5)
    np.testing.assert_array_equal(load_image(member), np.full((3, 5, 3), BLUE))
    with pytest.raises(ImageError, match=r"no such member.*c\.png"):
        load_image(archive / "val" / "c.png")


def test_an_archive_stands_in_for_a_folder(tmp_path: Path) -> None:
    assert archives.find_folder(tmp_path / "val") is None
    flat = write(tmp_path / "flat.zip", **{"a.png": png()})
    nested = write(tmp_path / "nested.zip", **{"nested/a.png": png()})
    assert archives.find_folder(tmp_path / "flat") == flat
    assert archives.find_folder(tmp_path / "nested") == nested / "nested"
    (tmp_path / "flat").mkdir()
    assert archives.find_folder(tmp_path / "flat") == tmp_path / "flat"  # what is extracted wins


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", x=b"1")
    assert archives.read_bytes(path / "x") == b"1"
    write(path, x=b"second")
    assert archives.read_bytes(path / "x") == b"second"


def test_a_folder_may_be_called_zip(tmp_path: Path) -> None:
    folder = tmp_path / "images.zip"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    assert not archives.in_archive(folder / "a.png")
    assert archives.read_bytes(folder / "a.png") == png()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\x\\y"])
def test_a_path_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.zip", **{"good.png": png(), name: b"owned"})
    with pytest.raises(UnsafeFileError, match=r"a\.zip.*a path outside itself"):
        archives.read_bytes(path / "good.png")


def test_a_bomb_is_refused_by_its_stated_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.zip", bomb=bytes(2000), small=bytes(1000))
    monkeypatch.setattr(archives, "MAX_MEMBER", 1000)
    assert len(archives.read_bytes(path / "small")) == 1000
    with pytest.raises(UnsafeFileError, match="2,000 bytes, more than the 1,000"):
        archives.read_bytes(path / "bomb")


def test_a_bomb_that_lies_about_its_size_unpacks_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", bomb=bytes(100_000))
    content = path.read_bytes()
    stated = (100_000).to_bytes(4, "little")
    assert content.count(stated) == 2  # before the member and in the directory
    path.write_bytes(content.replace(stated, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match="damaged"):
        archives.read_bytes(path / "bomb")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", x=bytes(range(256)))
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"????" + whole[44:])
    with pytest.raises(DataError, match=r"a\.zip/x is damaged"):
        archives.read_bytes(path / "x")
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match="no whole zip archive"):
        archives.read_bytes(path / "x")


def test_an_archive_of_the_future_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", x=b"1")
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    path.write_bytes(content[: directory + 6] + b"\xff" + content[directory + 7 :])
    with pytest.raises(DataError, match="no whole zip archive"):
        archives.read_bytes(path / "x")


def test_a_member_damaged_in_its_packing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x", bytes(range(256)))
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"\xff" * 60 + content[110:])
    with pytest.raises(DataError, match=r"a\.zip/x is damaged"):
        archives.read_bytes(path / "x")
