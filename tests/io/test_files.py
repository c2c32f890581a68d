"""Files written whole, links that are not followed, and JSON that is damaged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import segcompass
from segcompass.io.errors import ConfigError, DataError
from segcompass.io.files import make_folder, read_object, write_whole
from segcompass.io.settings import read_yaml


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a longer text than what follows")
    write_whole(path, "Käse \udc80\n")
    assert path.read_bytes() == "Käse ?\n".encode()
    write_whole(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("there", [True, False], ids=["link", "dangling link"])
def test_a_link_is_replaced_not_followed(tmp_path: Path, there: bool) -> None:
    outside, path = tmp_path / "precious.txt", tmp_path / "out" / "a.txt"
    path.parent.mkdir()
    if there:
        outside.write_text("keep me")
    path.symlink_to(outside)
    write_whole(path, "new")
    assert not path.is_symlink() and path.read_text() == "new"
    assert outside.exists() == there
    assert not there or outside.read_text() == "keep me"


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that appears after the old temporary file was cleared away."""
    outside, path = tmp_path / "precious.txt", tmp_path / "a.txt"
    plain = Path.unlink

    def meanwhile(self: Path, missing_ok: bool = False) -> None:
        plain(self, missing_ok)
        if not outside.exists():
            outside.write_text("keep me")
            self.symlink_to(outside)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    with pytest.raises(FileExistsError):
        write_whole(path, "new")
    assert outside.read_text() == "keep me" and not path.exists()


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("floor", ["apps", "explain", "evaluation"])
def test_what_commands_write_is_written_whole(floor: str) -> None:
    sources = sorted((Path(segcompass.__file__).parent / floor).glob("*.py"))
    otherwise = re.compile(r"\.write_(text|bytes)\(|\.savefig\([^,)]*(stem|path|out)\b")
    assert sources and [p.name for p in sources if otherwise.search(p.read_text("utf-8"))] == []


def test_an_object_is_read_back(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", '{"é": [1]}')
    assert read_object(tmp_path / "a.json") == {"é": [1]}


DEEP = "[" * 100_000
DAMAGED = {"cut": b'{"a": ', "list": b"[]", "latin": b'{"a": "\xe9"}', "deep": DEEP.encode()}


@pytest.mark.parametrize("name", [*DAMAGED, "missing"])
def test_what_holds_no_object_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.json"
    if name in DAMAGED:
        path.write_bytes(DAMAGED[name])
    with pytest.raises(DataError, match=rf"{name}\.json cannot be read .*; buy another"):
        read_object(path, "buy another")


def test_settings_that_are_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"a\.yaml is no valid YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_a_folder_to_write_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a") == tmp_path / "a"  # there already
    (tmp_path / "file").write_text("keep me")
    for place in ("file", "file/inside", "n" * 300):
        with pytest.raises(DataError, match="cannot be a folder"):
            make_folder(tmp_path / place)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(DataError, match="cannot be written to"):
        make_folder(tmp_path / "a")
