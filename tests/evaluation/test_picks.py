"""What a page shows of a run: bounded groups, by hand and against sorting everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from segcompass.evaluation.picks import GROUPS, Pick, pick


def write(path: Path, rows: list[tuple[float, int, list[float]]]) -> Path:
    """Rows of (IoU, union, confidences)."""
    lines = [
        json.dumps({"sample_id": f"s{i}", "iou": iou, "union": union, "confidences": sure})
        for i, (iou, union, sure) in enumerate(rows)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def members(picks: list[Pick], group: str) -> set[str]:
    """Ids of a group."""
    return {p.row["sample_id"] for p in picks if group in p.groups}


def test_groups_by_hand(tmp_path: Path) -> None:
    rows: list[tuple[float, int, list[float]]] = [
        (0.0, 10, [0.9, 0.1]),
        (1.0, 0, [0.45]),  # a right "nothing": IoU 1, no area; 0.05 from the threshold
        (0.0, 90, []),  # malformed: nothing to doubt
        (1.0, 50, [0.52, 0.3]),  # 0.02 from it
        (0.5, 20, [0.95, 0.53]),
    ]
    picks = pick(write(tmp_path / "rows.jsonl", rows), 0.5, each=2)
    assert members(picks, "worst") == {"s0", "s2"}
    assert members(picks, "best") == {"s1", "s3"}
    assert members(picks, "doubtful") == {"s3", "s4"}
    assert len(members(picks, "random")) == 2
    assert [p.row["sample_id"] for p in picks] == sorted(p.row["sample_id"] for p in picks)
    assert {p.row["sample_id"]: p.margin for p in picks}["s2"] is None
    one = pick(tmp_path / "rows.jsonl", 0.5, each=1)
    assert (members(one, "worst"), members(one, "best")) == ({"s2"}, {"s3"})  # the largest area


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.25, 0.5, 1.0]),
            st.integers(0, 99),
            st.lists(st.floats(0, 1), max_size=3),
        ),
        max_size=30,
    ),
    each=st.integers(1, 8),
    threshold=st.floats(0, 1),
)
def test_groups_are_bounded_and_nothing_outside_is_more_extreme(
    rows: list[tuple[float, int, list[float]]],
    each: int,
    threshold: float,
    tmp_path_factory: Any,
) -> None:
    path = write(tmp_path_factory.mktemp("picks") / "rows.jsonl", rows)
    picks = pick(path, threshold, each=each)
    ious = {f"s{i}": iou for i, (iou, _, _) in enumerate(rows)}
    for group in ("worst", "best", "random"):
        assert len(members(picks, group)) == min(each, len(rows))
    for group, sign in (("worst", 1), ("best", -1)):
        inside = members(picks, group)
        outside = [sign * iou for name, iou in ious.items() if name not in inside]
        assert all(sign * ious[name] <= min(outside, default=2) for name in inside)
    assert all(p.groups and set(p.groups) <= set(GROUPS) for p in picks)
