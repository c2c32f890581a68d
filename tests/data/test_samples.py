"""Finding out which layout a folder has."""

from __future__ import annotations

from pathlib import Path

import pytest

from segcompass.data.samples import LAYOUTS, MANIFEST, locate, read_dataset
from segcompass.io.errors import DataError

MARKS = {
    "refcoco": "refs(unc).p",
    "grefcoco": "grefs(unc).json",
    "reasonseg": "val/a.json",
    "parquet": "data/test-00000-of-00001.parquet",
}


def make(folder: Path, *layouts: str) -> Path:
    for layout in layouts:
        mark = folder / MARKS[layout]
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_known_by_its_files(tmp_path: Path, layout: str) -> None:
    folder = make(tmp_path / "set", layout)
    for root in (folder, tmp_path):  # the folder itself, or one that holds nothing else
        assert locate(root) == (layout, folder)
        assert locate(root, layout) == (layout, folder)


def test_another_author_of_the_references_will_do(tmp_path: Path) -> None:
    (tmp_path / "refs(umd).p").touch()
    assert locate(tmp_path) == ("refcoco", tmp_path)


def test_an_ambiguous_folder_lists_every_possibility(tmp_path: Path) -> None:
    make(tmp_path, "refcoco", "grefcoco")
    with pytest.raises(
        DataError, match=r"several data sets: refcoco in .*, grefcoco in .*--layout"
    ):
        locate(tmp_path)
    assert locate(tmp_path, "grefcoco") == ("grefcoco", tmp_path)


def test_two_sets_of_one_layout_need_a_folder(tmp_path: Path) -> None:
    make(tmp_path / "refcoco", "refcoco")
    make(tmp_path / "refcoco+", "refcoco")
    with pytest.raises(DataError, match="Give one folder"):
        locate(tmp_path, "refcoco")


def test_scenes_hold_all_layouts_and_mean_the_complete_one(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        make(tmp_path / layout, layout)
    with pytest.raises(DataError, match="several data sets"):
        locate(tmp_path)
    (tmp_path / MANIFEST).touch()
    assert locate(tmp_path) == ("grefcoco", tmp_path / "grefcoco")
    assert locate(tmp_path, "reasonseg") == ("reasonseg", tmp_path / "reasonseg")


def test_a_folder_of_nothing_lists_every_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        locate(tmp_path)
    assert all(name in str(caught.value) for name in (*LAYOUTS, *LAYOUTS.values()))
    with pytest.raises(DataError, match="is not a folder"):
        locate(tmp_path / "missing")


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "grefcoco")
    with pytest.raises(DataError, match="choose one of refcoco, grefcoco, reasonseg"):
        read_dataset(tmp_path, "val", layout="voc")
    with pytest.raises(DataError, match="limit must be 0 or more"):
        read_dataset(tmp_path, "val", limit=-1)
