"""One row per interface: figures over seeds, and how good a choice among candidates was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from segcompass.evaluation.comparison import Judged, compare, flat, shown
from segcompass.evaluation.footprint import Footprint
from segcompass.evaluation.run_log import ROWS
from segcompass.evaluation.scoring import PairScore
from segcompass.io.errors import DataError
from segcompass.types import Status

SAMPLES = ["s0", "s1", "s2"]


def judged(folder: Path, ious: list[float], seconds: float, **more: dict[str, Any]) -> Judged:
    """A run on samples s0, s1, … of which the last has no target."""
    folder.mkdir()
    lines = []
    for i, iou in enumerate(ious):
        last = i == len(ious) - 1
        status = Status.NO_TARGET if last and iou else Status.OK
        score = PairScore(
            f"s{i}",
            int(100 * iou),
            100,
            iou,
            not last,
            status == Status.OK,
            status,
            kind="ab"[i % 2],
        )
        lines.append(json.dumps(asdict(score) | more.get(f"s{i}", {})) + "\n")
    (folder / ROWS).write_text("".join(lines))
    return Judged(folder, Footprint("concept_slots", seconds, 3_000_000, ["heatmaps"]), 7)


def test_a_row_by_hand(tmp_path: Path) -> None:
    runs = [
        judged(tmp_path / "0", [0.4, 0.6, 1.0], 1.0),
        judged(tmp_path / "1", [0.2, 0.8, 0.0], 3.0),
    ]
    row = compare("ours", runs, SAMPLES)
    assert row["giou"] == pytest.approx((0.4 + 0.6 + 1 + 0.2 + 0.8 + 0) / 6)
    assert row["giou_by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert (row["n_acc"], row["t_acc"], row["seconds"]) == (0.5, 1.0, 2.0)
    assert (row["samples"], row["seeds"], row["parameters"]) == (3, 2, 7)
    # Of kind a are the first sample and the one without a target, of kind b the second.
    assert row["by_kind"]["a"] == {
        "giou": pytest.approx((0.4 + 1 + 0.2 + 0) / 4),
        "ciou": pytest.approx((40 + 100 + 20 + 0) / 400),
        "n_acc": 0.5,
        "t_acc": 1.0,
    }
    assert (row["by_kind"]["b"]["giou"], row["by_kind"]["b"]["n_acc"]) == (pytest.approx(0.7), None)
    assert "oracle" not in row
    (first, *_), text = shown([row]), flat(row)
    assert first[""] == "gIoU" and first["ours"].startswith("50.0 (")
    assert text["giou_low"] <= text["giou"] <= text["giou_high"]
    assert (text["oracle"], text["explanations"]) == (None, "heatmaps")
    assert (text["n_acc_a"], text["n_acc_b"]) == (0.5, None)


def test_only_the_samples_asked_for_count(tmp_path: Path) -> None:
    """An earlier run may have gone further than this one asks."""
    far = judged(tmp_path / "0", [0.4, 0.6, 1.0], 1.0)
    row = compare("ours", [far], SAMPLES[:2])
    assert (row["samples"], row["giou"]) == (2, pytest.approx(0.5))
    with pytest.raises(DataError, match=r"samples.jsonl lacks 1 of 4 samples, the first is s3"):
        compare("ours", [far], [*SAMPLES, "s3"])


def test_candidates_are_weighed_and_answers_without_them_are_the_direct_one(tmp_path: Path) -> None:
    weighed = {
        "chosen": 0.4,
        "oracle": 0.9,
        "nothing": 0.0,
        "by_source": {"direct": 0.4, "slot": 0.7},
    }
    runs = [judged(tmp_path / "0", [0.4, 0.6, 1.0], 1.0, s0={"weighed": weighed})]
    row = compare("rerank", runs, SAMPLES)
    # The second answer had no candidates: only its own. Rejecting them all is right in the third.
    assert row["oracle"] == pytest.approx((0.9 + 0.6 + 1.0) / 3)
    assert row["by_source"]["direct"] == pytest.approx((0.4 + 0.6 + 1.0) / 3)
    assert row["by_source"]["slot"] == pytest.approx((0.7 + 0.0 + 1.0) / 3)
    assert row["best_source"] == "direct"
    cells = {line[""]: line["rerank"] for line in shown([row])}
    assert cells["gIoU best candidate"] == "83.3"
    assert cells["gIoU best source"] == "66.7 (direct)"
    # The answers are the direct ones: choosing gained nothing over them.
    assert row["gain"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert cells["gain over it"] == "0.0 (0.0–0.0)"
    assert cells["MB"] == "3.0"


def test_a_gain_is_paired_by_sample(tmp_path: Path) -> None:
    """Each sample's gain is averaged over seeds; the interval is over samples."""

    def chosen(iou: float, direct: float) -> dict[str, Any]:
        sources = {"direct": direct}
        return {"weighed": {"chosen": iou, "oracle": 1.0, "nothing": 0.0, "by_source": sources}}

    runs = [
        judged(tmp_path / "0", [0.5, 0.7], 1.0, s0=chosen(0.5, 0.3), s1=chosen(0.7, 0.6)),
        judged(tmp_path / "1", [0.5, 0.7], 1.0, s0=chosen(0.5, 0.1), s1=chosen(0.7, 0.8)),
    ]
    gain = compare("rerank", runs, SAMPLES[:2])["gain"]
    # s0 gains 0.2 and 0.4, s1 0.1 and -0.1: means 0.3 and 0.0, and those of resamples of the two.
    assert gain["mean"] == pytest.approx(0.15)
    assert gain["interval"] == pytest.approx([0.0, 0.3])
