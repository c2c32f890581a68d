"""The benchmark of reading: its made-up set is whole, and both sides read the same."""

from __future__ import annotations

from pathlib import Path

import reading

from segcompass.data.check_coco import check_coco
from segcompass.data.findings import Problem, Sort
from segcompass.data.refcoco import REFCOCO


def test_both_sides_read_the_same(tmp_path: Path) -> None:
    root = tmp_path / "refcoco"
    reading.write_annotations(root, images=10, sentences=24)
    ours = list(reading.ours(root))
    assert ours == list(reading.baseline(root))
    assert len({text for text, _ in ours}) == 24
    problems: list[Problem] = []
    check_coco(root, REFCOCO, problems.append, lambda done, total: None)
    assert {problem.sort for problem in problems} == {Sort.BROKEN_IMAGE}  # empty files
