"""ReasonSeg: drawing order, ignored pixels, encodings, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segcompass.data.reasonseg import read_reasonseg, write_note
from segcompass.io import masks
from segcompass.io.errors import DataError

HW = (20, 30)


def shape(label: str, x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
    return {"label": label, "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}


def area(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def add(root: Path, name: str, note: Any, split: str = "val", encoding: str = "utf-8") -> Path:
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", HW[::-1]).save(folder / f"{name}.jpg")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(note, ensure_ascii=False), encoding=encoding)
    return path


def note(*shapes: dict[str, Any], text: Any = ("what to drink from?",)) -> dict[str, Any]:
    return {"text": text, "is_sentence": True, "shapes": list(shapes)}


def test_small_shapes_stay_visible_on_large_ones(tmp_path: Path) -> None:
    small, middle, large = (10, 8, 12, 10), (8, 6, 16, 14), (2, 2, 25, 17)
    shapes = (shape("target", *small), shape("target", *large), shape("IGNORE this", *middle))
    add(tmp_path, "a", note(*shapes, shape("flag", 0, 0, 29, 19)))
    (sample,) = read_reasonseg(tmp_path, "val")
    ignored = area(*middle) & ~area(*small)
    assert sample.ignore is not None
    np.testing.assert_array_equal(masks.decode(sample.ignore), ignored)
    np.testing.assert_array_equal(masks.decode(sample.targets[0]), area(*large) & ~ignored)
    assert sample.image_hw == HW


def test_only_training_reads_every_text(tmp_path: Path) -> None:
    texts = ["first", "second"]
    for split in ("train", "val"):
        add(tmp_path, "a", note(shape("target", 1, 1, 4, 4), text=texts), split)
        add(tmp_path, "b", note(shape("target", 1, 1, 4, 4), text=texts), split)
    train = read_reasonseg(tmp_path, "train")
    assert [s.sample_id for s in train] == ["a-0", "a-1", "b-0", "b-1"]
    assert [s.instruction for s in read_reasonseg(tmp_path, "val")] == ["first", "first"]
    assert [s.image_id for s in train] == [0, 0, 1, 1]
    assert len(read_reasonseg(tmp_path, "train", limit=3)) == 3


def test_old_encoding_and_byte_order_mark(tmp_path: Path) -> None:
    add(tmp_path, "a", note(text=["the café’s mug"]), encoding="cp1252")
    add(tmp_path, "b", note(text=["das Gefäß"]), encoding="utf-8-sig")
    assert [s.instruction for s in read_reasonseg(tmp_path, "val")] == [
        "the café’s mug",
        "das Gefäß",
    ]


def test_a_picture_without_polygons_has_no_target(tmp_path: Path) -> None:
    add(tmp_path, "a", note() | {"is_sentence": False})
    (sample,) = read_reasonseg(tmp_path, "val")
    assert (sample.targets, sample.ignore, sample.kind) == ((), None, "short")


def test_polygons_lie_on_the_picture_as_displayed(tmp_path: Path) -> None:
    add(tmp_path, "a", note(shape("target", 0, 25, 3, 28)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", HW[::-1]).save(tmp_path / "val" / "a.jpg", exif=exif)
    (sample,) = read_reasonseg(tmp_path, "val")
    assert sample.image_hw == HW[::-1]
    assert masks.area(sample.targets[0]) == 16


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=15)
def test_written_notes_read_back_exactly(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("notes")
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((5, 6)) < 0.5, np.ones((4, 5))).astype(bool)
    mask |= rng.random(HW) < 0.02
    path = add(root, "a", {})
    write_note(path, "the mug?", masks.outlines(mask))
    (sample,) = read_reasonseg(root, "val")
    assert sample.kind == "long"
    np.testing.assert_array_equal(masks.union(sample.targets, HW), mask)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = add(tmp_path, "a", note())
    with pytest.raises(DataError, match=r"train does not exist; splits in .*: val"):
        read_reasonseg(tmp_path, "train")
    path.with_suffix(".jpg").rename(path.with_name("b.jpg"))
    with pytest.raises(DataError, match=r"picture of .*a\.json is missing"):
        read_reasonseg(tmp_path, "val")
    path.unlink()
    with pytest.raises(DataError, match=r"b\.jpg has no b\.json"):
        read_reasonseg(tmp_path, "val")
    path.with_name("b.jpg").unlink()
    with pytest.raises(DataError, match="holds no JSON files"):
        read_reasonseg(tmp_path, "val")


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        {},
        note(text=[]),
        note(text=[3]),
        note({"label": "target"}),
        note({"points": [[1, 1]]}),
        note({"label": "target", "points": [[1, 2], [3]]}),
        note({"label": "target", "points": [[1, 2, 3], [4, 5, 6]]}),
        note({"label": "target", "points": [["a", "b"]]}),
        note({"label": "target", "points": [[1, float("inf")]]}),
        note() | {"shapes": 3},
    ],
)
def test_damaged_notes_are_named(tmp_path: Path, damaged: Any) -> None:
    add(tmp_path, "a", damaged)
    with pytest.raises(DataError, match=r"a\.json"):
        read_reasonseg(tmp_path, "val")


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    path = add(tmp_path, "a", note())
    path.with_suffix(".jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(DataError, match=r"a\.jpg is no readable picture"):
        read_reasonseg(tmp_path, "val")


def test_far_away_points_are_drawn_quickly(tmp_path: Path) -> None:
    add(tmp_path, "a", note(shape("target", -(10**12), -(10**12), 10**12, 10**12)))
    (sample,) = read_reasonseg(tmp_path, "val")
    assert masks.area(sample.targets[0]) == HW[0] * HW[1]


def test_the_real_set_is_compared_with_its_published_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("mine", "ReasonSeg"):
        add(tmp_path / name, "a", note())
        assert not caplog.records
        read_reasonseg(tmp_path / name, "val")
    assert "1 images, the published set has 200" in caplog.text
