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
from segcompass.types import Status


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
    row = compare("ours", runs)
    assert row["giou"] == pytest.approx((0.4 + 0.6 + 1 + 0.2 + 0.8 + 0) / 6)
    assert row["giou_by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert (row["n_acc"], row["t_acc"], row["seconds"]) == (0.5, 1.0, 2.0)
    assert (row["samples"], row["seeds"], row["parameters"]) == (3, 2, 7)
    assert row["by_kind"] == {"a": pytest.approx(0.3), "b": pytest.approx(0.7)}
    assert "oracle" not in row
    (first, *_), text = shown([row]), flat(row)
    assert first[""] == "gIoU" and first["ours"].startswith("50.0 (")
    assert text["giou_low"] <= text["giou"] <= text["giou_high"]
    assert (text["oracle"], text["explanations"]) == (None, "heatmaps")


def test_candidates_are_weighed_and_answers_without_them_are_the_direct_one(tmp_path: Path) -> None:
    weighed = {
        "chosen": 0.4,
        "oracle": 0.9,
        "nothing": 0.0,
        "by_source": {"direct": 0.4, "slot": 0.7},
    }
    runs = [judged(tmp_path / "0", [0.4, 0.6, 1.0], 1.0, s0={"weighed": weighed})]
    row = compare("rerank", runs)
    # The second answer had no candidates: only its own. Rejecting them all is right in the third.
    assert row["oracle"] == pytest.approx((0.9 + 0.6 + 1.0) / 3)
    assert row["by_source"]["direct"] == pytest.approx((0.4 + 0.6 + 1.0) / 3)
    assert row["by_source"]["slot"] == pytest.approx((0.7 + 0.0 + 1.0) / 3)
    assert row["best_source"] == "direct"
    cells = {line[""]: line["rerank"] for line in shown([row])}
    assert cells["gIoU best candidate"] == "83.3"
    assert cells["gIoU best source"] == "66.7 (direct)"
    assert cells["MB"] == "3.0"
