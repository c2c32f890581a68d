"""Look through a whole data set once, and list everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from segcompass.data.check_coco import check_coco
from segcompass.data.check_parquet import check_parquet
from segcompass.data.check_reasonseg import check_reasonseg
from segcompass.data.findings import Findings
from segcompass.data.refcoco import GREFCOCO, REFCOCO
from segcompass.data.samples import locate


def check_dataset(
    root: Path,
    layout: str | None = None,
    moved: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Look at every entry, mask and picture of a data set.

    Args:
        root: the data set's folder, or one that holds a single data set.
        layout: one of ``samples.LAYOUTS``; None finds out.
        moved: is told how many of how many pictures have been looked at.

    Raises:
        DataError: no layout fits, or several do. All else that is wrong is a finding.
    """
    name, folder = locate(root, layout)
    findings = Findings(name, folder)
    note = findings.problems.append
    if name == "reasonseg":
        findings.splits = check_reasonseg(folder, note, moved)
    elif name == "parquet":
        findings.splits = check_parquet(folder, note, moved)
    else:
        pattern = REFCOCO if name == "refcoco" else GREFCOCO
        findings.splits = check_coco(folder, pattern, note, moved)
    return findings
