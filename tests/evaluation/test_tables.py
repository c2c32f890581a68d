"""Runs beside published results: what is whose is never in doubt, and no figure is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segcompass.evaluation.published import PUBLISHED
from segcompass.evaluation.tables import as_csv, markdown, shown, table
from segcompass.io.errors import DataError

FIGURES: dict[str, Any] = {
    "model": "mine|v2",
    "data": "data/grefcoco",
    "split": "val",
    "samples": 1234,
    "giou": 0.5,
    "ciou": 0.25,
    "n_acc": None,
    "t_acc": 1.0,
    "intervals": {"giou": [0.4375, 0.5625], "ciou": None},
}


def run_folder(folder: Path, **changes: Any) -> Path:
    """A run that has come to its end."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(FIGURES | changes))
    return folder


def test_runs_come_first_and_published_rows_are_marked(tmp_path: Path) -> None:
    rows = table([run_folder(tmp_path / "a"), run_folder(tmp_path / "b", giou=0.75)])
    assert [(row["name"], row["origin"]) for row in rows[:2]] == [
        ("a", "measured"),
        ("b", "measured"),
    ]
    assert len(rows) == 2 + len(PUBLISHED)
    assert {row["origin"] for row in rows[2:]} == {"published"}
    assert all(row["samples"] is None and not row["intervals"] for row in rows[2:])
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(("benchmark", "count"), [("refcoco", 25), ("grefcoco", 9)])
def test_one_benchmark_alone(benchmark: str, count: int) -> None:
    """Three models on 8 splits and one average; three models on 3 splits."""
    assert len(table([], benchmark)) == count


# The headline of the paper's three tables: 13B, gIoU and cIoU in percent.
@pytest.mark.parametrize(
    ("data", "split", "giou", "ciou"),
    [
        ("RefCOCO", "testB", None, 84.1),
        ("RefCOCO+", "val", None, 80.5),
        ("RefCOCOg", "test", None, 81.3),
        ("gRefCOCO", "val", 76.8, 72.2),
        ("ReasonSeg", "val", 67.4, 67.2),
        ("ReasonSeg", "test", 64.2, 66.5),
    ],
)
def test_the_headline_figures_are_in_their_places(
    data: str, split: str, giou: float | None, ciou: float
) -> None:
    found = [p for p in PUBLISHED if (p.dataset, p.split) == (data, split) and "13B" in p.model]
    assert [(p.giou, p.ciou) for p in found] == [(giou, ciou)]


def test_as_text_in_percent_with_intervals(tmp_path: Path) -> None:
    first = shown(table([run_folder(tmp_path / "a")], "reasonseg"))[0]
    assert first == {
        "origin": "measured",
        "name": "a",
        "data": "data/grefcoco",
        "split": "val",
        "samples": "1,234",
        "giou": "50.0 (43.8–56.2)",
        "ciou": "25.0",
        "n_acc": "–",
        "t_acc": "100.0",
    }


def test_markdown_keeps_its_columns(tmp_path: Path) -> None:
    lines = markdown(table([run_folder(tmp_path / "a|b")], "grefcoco")).splitlines()
    assert lines[0].startswith("| origin | name | data | split | samples | giou |")
    assert len(lines) == 2 + 1 + 9
    assert {line.replace("\\|", "").count("|") for line in lines} == {10}
    assert lines[-1].startswith("| published | SegCompass-13B (LLaVA-1.5) | gRefCOCO | testB |")


@pytest.mark.parametrize("text", [None, "{}", "[]", "no JSON"])
def test_a_folder_without_figures_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.json"):
        table([tmp_path])


def test_csv_leaves_what_is_none_empty() -> None:
    rows = [{"name": 'a "b", c', "giou": 0.5}, {"name": "d", "giou": None}]
    assert as_csv(rows) == 'name,giou\n"a ""b"", c",0.5\nd,\n'
