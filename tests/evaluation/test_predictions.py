"""Predictions of other tools: both forms judged as a model is, every fault named by its line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import HW, Oracle, make_samples, reader, square

from segcompass.evaluation import splits
from segcompass.evaluation.benchmark import evaluate
from segcompass.evaluation.predictions import judge_predictions
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Sample

FIGURES = ("samples", "giou", "ciou", "giou_target", "n_acc", "t_acc", "ap", "intervals")
OUTLINE = [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]  # square(1): 4x4 px, upper left at (2, 1)


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Six samples; the third and the last have no target."""
    made = make_samples(tmp_path)
    monkeypatch.setattr(splits, "read_dataset", reader(made))
    return made


def rle(index: int) -> dict[str, Any]:
    """The square of a sample, as run lengths."""
    return dict(masks.encode(square(index)))


def write(path: Path, items: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_our_own_rows_are_predictions(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = evaluate(Oracle(samples), tmp_path, "val", out=out)
    found = judge_predictions(out / "samples.jsonl", tmp_path, "val")
    assert {name: found[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    assert (found["missing"], found["broken"]) == ([], [])


def test_coco_results(samples: list[Sample], tmp_path: Path) -> None:
    """Right about 0; half of 1 (its square and one as large); 3 and 4 missing: IoU 0."""
    path = tmp_path / "results.json"
    results = [
        {"image_id": 0, "segmentation": rle(0), "score": 0.9},
        {"image_id": 1, "sample_id": "s1", "segmentation": OUTLINE, "score": 0.75},
        {"sample_id": "s1", "segmentation": rle(9), "score": 0.5},
    ]
    path.write_text(json.dumps(results))
    found = judge_predictions(path, tmp_path, "val", out=tmp_path / "out")
    rows = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["iou"] for row in rows] == [1, 0.5, 1, 0, 0, 1]
    assert found["giou"] == 3.5 / 6
    assert found["ciou"] == 32 / (16 + 32 + 16 + 16)
    assert found["missing"] == ["s2", "s3", "s4", "s5"]
    assert judge_predictions(path, tmp_path, "val", threshold=0.5)["giou"] == 4 / 6


def test_no_picture_is_opened(samples: list[Sample], tmp_path: Path) -> None:
    for sample in samples:
        sample.image_path.unlink()
    path = write(tmp_path / "p.jsonl", [{"id": "s0", "masks": [rle(0)]}])
    assert judge_predictions(path, tmp_path, "val")["t_acc"] == 0.25


def test_a_malformed_answer_is_never_right(samples: list[Sample], tmp_path: Path) -> None:
    items = [
        {"id": "s0", "masks": [rle(0)], "scores": [0.5], "status": "malformed"},
        {"id": "s2", "masks": [], "status": "truncated"},
    ]
    found = judge_predictions(write(tmp_path / "p.jsonl", items), tmp_path, "val")
    assert found["format_valid"] == 4 / 6
    assert (found["giou"], found["n_acc"]) == (1 / 6, 0.5)  # s5 alone: nothing, rightly


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"id": "s0", "masks": []}, r"'s0' was predicted before, in .*p\.jsonl:1"),
        ({"id": "s9", "masks": []}, "'s9' is no sample of this split"),
        ({"id": "s1"}, "lacks 'masks'"),
        ({"masks": []}, "lacks 'id'"),
        ({"id": ["s1"], "masks": []}, "unhashable"),
        ({"id": "s1", "masks": {"size": [1, 1]}}, "masks are a list"),
        ({"id": "s1", "masks": [], "status": "fine"}, "'fine' is not a valid Status"),
        (["s1"], "is no JSON object"),
        ({"id": "s1", "masks": [{"size": [3, 3], "counts": "9"}]}, r"run lengths of size \[3, 3\]"),
        ({"id": "s1", "masks": [{"size": list(HW), "counts": "12"}]}, "damaged: its runs make"),
        ({"id": "s1", "masks": [rle(1)], "scores": [1, 2]}, "1 masks, but 2 confidences"),
        ({"id": "s1", "masks": [rle(1)], "scores": [1.5]}, r"lies in \[0, 1\]"),
        ({"id": "s1", "masks": [rle(1)], "scores": [float("nan")]}, r"lies in \[0, 1\]"),
        ({"id": "s1", "masks": [rle(1)], "scores": [None]}, "float"),
    ],
)
def test_a_fault_is_named_by_its_line(
    item: Any, said: str, samples: list[Sample], tmp_path: Path
) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": "s0", "masks": [rle(0)]}, item])
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{said}"):
        judge_predictions(path, tmp_path, "val")
    found = judge_predictions(path, tmp_path, "val", skip_broken=True)
    assert len(found["broken"]) == 1
    assert found["samples"] in (5, 6)


def test_a_line_that_is_nested_too_deeply(samples: list[Sample], tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": "s0", "masks": [rle(0)]}])
    with path.open("a") as file:
        file.write('{"id": "s1", "masks": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:2: "):
        judge_predictions(path, tmp_path, "val")
    assert judge_predictions(path, tmp_path, "val", skip_broken=True)["samples"] == 6


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"image_id": 0, "segmentation": rle(0), "score": 0.5}, "repeats a mask of 's0'"),
        ({"image_id": 77, "segmentation": rle(0), "score": 0.5}, "0 samples of this split"),
        ({"sample_id": "x", "segmentation": rle(0), "score": 0.5}, "'x' is no sample"),
        ({"image_id": 1, "segmentation": rle(0)}, "lacks 'score'"),
        ({"segmentation": rle(0), "score": 1}, "lacks 'image_id'"),
        (7, "is no JSON object"),
    ],
)
def test_a_fault_is_named_by_its_result(
    result: Any, said: str, samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"image_id": 0, "segmentation": rle(0), "score": 0.9}, result]))
    with pytest.raises(DataError, match=rf"r\.json, result 2: .*{said}"):
        judge_predictions(path, tmp_path, "val")


def test_an_image_of_several_sentences_needs_sample_ids(
    samples: list[Sample], tmp_path: Path
) -> None:
    samples[1] = replace(samples[1], image_id=0)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"image_id": 0, "segmentation": rle(0), "score": 0.9}]))
    with pytest.raises(DataError, match="2 samples of this split are about image 0"):
        judge_predictions(path, tmp_path, "val")


def test_another_file_is_another_run(samples: list[Sample], tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    judge_predictions(write(path, [{"id": "s0", "masks": [rle(0)]}]), tmp_path, "val", out=out)
    write(path, [{"id": "s0", "masks": []}])
    with pytest.raises(DataError, match="another fingerprint"):
        judge_predictions(path, tmp_path, "val", out=out)


def test_the_outline_is_the_square() -> None:
    """So that the polygon of the COCO test stands for what it says."""
    drawn = masks.decode(masks.from_segmentation(OUTLINE, HW))
    assert np.array_equal(drawn, square(1))
