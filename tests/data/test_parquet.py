"""Parquet files with embedded pictures: every form of mask, and rows that cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segcompass.data.check import check_dataset
from segcompass.data.samples import read_dataset
from segcompass.io import masks
from segcompass.io.errors import DataError, ImageError
from segcompass.io.images import load_image

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
HW = (4, 6)
MASK = np.zeros(HW, dtype=bool)
MASK[1:3, 2:5] = True


def png(pixels: np.ndarray) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": "a.png"}


def picture(value: int) -> dict[str, Any]:
    return png(np.full((*HW, 3), value, dtype=np.uint8))


def write(folder: Path, name: str = "test-00000-of-00001", **columns: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    parquet.write_table(arrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "mask",
    [
        png(MASK.astype(np.uint8) * 255),
        MASK.tolist(),
        {"size": list(HW), "counts": masks.encode(MASK)["counts"]},
        {"size": list(HW), "counts": [9, 2, 2, 2, 2, 2, 5]},
    ],
    ids=["picture", "rows", "compressed", "runs"],
)
def test_every_form_of_mask_is_read(tmp_path: Path, mask: Any) -> None:
    path = write(
        tmp_path / "data",
        image=[picture(10), picture(20), picture(30)],
        text=["the mug", "a cup", "it"],
        mask=[mask] * 3,
        dimension=["spatial", "geometric", "spatial"],
    )
    samples = read_dataset(tmp_path, "test")
    assert [s.instruction for s in samples] == ["the mug", "a cup", "it"]
    assert [s.kind for s in samples] == ["spatial", "geometric", "spatial"]
    for value, sample in zip((10, 20, 30), samples, strict=True):
        assert sample.image_hw == HW
        np.testing.assert_array_equal(masks.decode(sample.targets[0]), MASK)
        assert (load_image(sample.image_path) == value).all()
    assert samples[2].image_path == path / "image" / "2"  # of the second row group
    assert len(read_dataset(tmp_path, "test", limit=2)) == 2
    assert check_dataset(tmp_path).problems == []


def test_nothing_and_several_texts(tmp_path: Path) -> None:
    write(tmp_path, "validation", image=[picture(1)], text=[["a", "b"]], mask=[(MASK & 0).tolist()])
    (sample,) = read_dataset(tmp_path, "val")
    assert (sample.instruction, sample.targets, sample.kind) == ("a", (), None)


def test_broken_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    ragged = [[True, False, True], [True]]  # as many as two rows of two
    path = write(
        tmp_path,
        image=[picture(1)] * 3 + [{"bytes": b"none", "path": ""}],
        text=["good", " ", "ragged", "no picture"],
        mask=[MASK.tolist(), MASK.tolist(), ragged, MASK.tolist()],
    )
    with pytest.raises(DataError, match=r"row 1: a text is needed"):
        read_dataset(tmp_path, "test")
    named: list[str] = []
    samples = read_dataset(tmp_path, "test", on_broken=lambda name, _: named.append(name))
    assert named == [f"{path.stem}-1", f"{path.stem}-2"]
    assert [s.instruction for s in samples] == ["good", "no picture"]
    findings = check_dataset(tmp_path)
    assert findings.counts == {"broken entry": 2, "broken image": 1}
    assert [split.samples for split in findings.splits] == [1]
    with pytest.raises(ImageError, match="no image 9"):
        load_image(path / "image" / "9")


@pytest.mark.parametrize("size", [[0, 4], [4], [100_000, 100_000], [-2, -3]])
def test_run_lengths_of_no_picture_are_refused(tmp_path: Path, size: list[int]) -> None:
    """Before any memory is taken for them."""
    pixels = size[0] * size[-1]
    mask = {"size": size, "counts": [max(0, pixels)]}
    write(tmp_path, image=[picture(1)], text=["x"], mask=[mask])
    with pytest.raises(DataError, match="a mask of size"):
        read_dataset(tmp_path, "test")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    write(tmp_path, image=[picture(1)], text=["x"])
    with pytest.raises(DataError, match="lacks mask; it holds: image, text"):
        read_dataset(tmp_path, "test")
    with pytest.raises(DataError, match="no split 'val'; it holds: test"):
        read_dataset(tmp_path, "val")
    (tmp_path / "val.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no whole Parquet file"):
        read_dataset(tmp_path, "val")
    assert check_dataset(tmp_path).counts == {"unreadable file": 2}
