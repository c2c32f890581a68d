"""RefCOCO and gRefCOCO: hand-made folders, odd annotations, and files that must be refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_sets import HW, STRIP, reference, write_grefs, write_pickle, write_set

from segcompass.data import refcoco
from segcompass.data.refcoco import read_grefcoco, read_images, read_refcoco
from segcompass.io import masks
from segcompass.io.errors import DataError, UnsafeFileError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_set(tmp_path / "refcoco")


def test_one_sample_per_sentence(root: Path) -> None:
    samples = read_refcoco(root, "val")
    assert [s.instruction for s in samples] == ["left one", "the café"]
    assert [s.sample_id for s in samples] == ["1-10", "1-11"]
    first = samples[0]
    assert (first.image_path, first.image_id, first.image_hw) == (root / "images/p.jpg", 7, HW)
    assert first.target_ids == (11,)
    expected = np.zeros(HW, dtype=bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(masks.decode(first.targets[0]), expected)
    assert first.objects == () and first.kind is None


def test_limit_counts_sentences(root: Path) -> None:
    assert [len(read_refcoco(root, "val", limit=n)) for n in (0, 1, 5)] == [0, 1, 2]


def test_pictures_may_lie_beside_the_references(root: Path) -> None:
    shared = root.parent / "images" / "train2014"
    shared.mkdir(parents=True)
    (root / "images" / "p.jpg").rename(shared / "p.jpg")
    assert read_refcoco(root, "testA")[0].image_path == shared / "p.jpg"


def test_the_split_may_name_its_author(root: Path) -> None:
    references = pickle.dumps([reference(5, 12), reference(6, 11)], protocol=2)
    (root / "refs(google).p").write_bytes(references)
    ids = {split: read_refcoco(root, split)[0].sample_id for split in ("val", "google:val")}
    assert ids == {"val": "1-10", "google:val": "5-50"}
    with pytest.raises(DataError, match=r"no refs\(umd\)\.p; authors there: unc, google"):
        read_refcoco(root, "umd:val")


def test_grefcoco_has_several_one_or_no_target(root: Path) -> None:
    write_grefs(root, [reference(1, [11, 12]), reference(2, [12]), reference(3, [-1])])
    samples = read_grefcoco(root, "val")[::2]
    assert [s.target_ids for s in samples] == [(11, 12), (12,), ()]
    assert [len(s.targets) for s in samples] == [2, 1, 0]
    np.testing.assert_array_equal(masks.decode(samples[1].targets[0]), STRIP)


def test_crowds_are_skipped_and_never_become_no_target(root: Path) -> None:
    write_grefs(root, [reference(1, [11, 13]), reference(2, [13])])
    assert [s.target_ids for s in read_grefcoco(root, "val")] == [(11,), (11,)]


def test_python_2_text_is_read(root: Path) -> None:
    plain = pickle.dumps([reference(1, 11)], protocol=2)
    old = plain.replace(b"X\x08\x00\x00\x00left one", b"U\x08left one")
    assert old != plain
    (root / "refs(unc).p").write_bytes(old)
    assert read_refcoco(root, "val")[0].instruction == "left one"


class Runs:
    """Pickles into a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_something_is_refused_unopened(root: Path, tmp_path: Path) -> None:
    write_pickle(root, [reference(1, 11), Runs(tmp_path / "owned")])
    with pytest.raises(UnsafeFileError, match=r"refs\(unc\)\.p asks for .*mkdir"):
        read_refcoco(root, "val")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("harmless", [{1, 2}, np.float64(1), Path("x"), b"bytes"])
def test_a_pickle_with_anything_but_plain_data_is_refused(root: Path, harmless: Any) -> None:
    write_pickle(root, [harmless])
    with pytest.raises(UnsafeFileError):
        read_refcoco(root, "val")


@pytest.mark.parametrize("content", [b"", b"\x80\x02]q", b"garbage", b"\x80\x02}."])
def test_damaged_pickles_are_named(root: Path, content: bytes) -> None:
    (root / "refs(unc).p").write_bytes(content)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p"):
        read_refcoco(root, "val")


def test_a_name_that_leaves_the_folder_is_refused(root: Path) -> None:
    tables = json.loads((root / "instances.json").read_text())
    tables["images"][0]["file_name"] = "../secret.jpg"
    (root / "instances.json").write_text(json.dumps(tables))
    with pytest.raises(UnsafeFileError, match=r"\.\./secret"):
        read_refcoco(root, "val")


def test_errors_name_file_and_way_out(root: Path) -> None:
    with pytest.raises(DataError, match="no split 'train'; it holds: testA, val"):
        read_refcoco(root, "train")
    with pytest.raises(DataError, match=r"none of grefs\(unc\)\.json"):
        read_grefcoco(root, "val")
    write_grefs(root, [reference(1, [99])])
    with pytest.raises(DataError, match=r"instances\.json lacks annotation 99"):
        read_grefcoco(root, "val")
    write_grefs(root, [reference(1, [11], image_id=8)])
    with pytest.raises(DataError, match="does not describe image 8"):
        read_grefcoco(root, "val")
    write_grefs(root, [{"split": "val", "ref_id": 5}])
    with pytest.raises(DataError, match="reference 5"):
        read_grefcoco(root, "val")
    with pytest.raises(DataError, match=r"no scenes\.json"):
        read_images(root, "val")
    (root / "images" / "p.jpg").unlink()
    with pytest.raises(DataError, match=r"p\.jpg is missing; looked in"):
        read_refcoco(root, "val")
    (root / "instances.json").write_text("{")
    with pytest.raises(DataError, match=r"instances\.json is no valid JSON"):
        read_refcoco(root, "val")
    (root / "instances.json").unlink()
    with pytest.raises(DataError, match=r"instances\.json is missing"):
        read_refcoco(root, "val")


@pytest.mark.parametrize("tables", [[], {"images": []}, {"images": [{}], "annotations": []}])
def test_instances_that_are_no_coco_file(root: Path, tables: Any) -> None:
    (root / "instances.json").write_text(json.dumps(tables))
    with pytest.raises(DataError, match="is no COCO file"):
        read_refcoco(root, "val")


def test_a_damaged_mask_names_its_annotation(root: Path) -> None:
    tables = json.loads((root / "instances.json").read_text())
    tables["annotations"][0]["segmentation"] = {"size": [3, 3], "counts": [9]}
    (root / "instances.json").write_text(json.dumps(tables))
    with pytest.raises(DataError, match="annotation 11"):
        read_refcoco(root, "val")


@pytest.mark.parametrize("hw", [("300000", "300000"), ("0", "8"), ("6", "-8"), ("6", "Infinity")])
def test_a_picture_of_an_impossible_size_is_named_before_it_takes_memory(
    root: Path, hw: tuple[str, str]
) -> None:
    tables = json.loads((root / "instances.json").read_text())
    tables["annotations"][0]["segmentation"] = []
    stated = '"height": {}, "width": {}'.format(*hw)
    text = json.dumps(tables).replace('"height": 6, "width": 8', stated)
    (root / "instances.json").write_text(text)
    with pytest.raises(DataError, match=r"instances\.json.* image 7"):
        read_refcoco(root, "val")


def test_real_sets_are_compared_with_their_published_size(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=refcoco.__name__):
        read_refcoco(root, "val")
        assert not caplog.records  # not COCO's pictures
        tables = json.loads((root / "instances.json").read_text())
        tables["images"][0]["file_name"] = "COCO_train2014_7.jpg"
        (root / "instances.json").write_text(json.dumps(tables))
        (root / "images" / "p.jpg").rename(root / "images" / "COCO_train2014_7.jpg")
        read_refcoco(root, "val")
    assert "2 sentences, the published set has 10834" in caplog.text
