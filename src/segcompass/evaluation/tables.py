"""Lay runs of ``segcompass eval`` beside one another, and beside what has been published."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segcompass.evaluation.published import PUBLISHED, Published
from segcompass.evaluation.run_log import read_figures

FIGURES = ("giou", "ciou", "n_acc", "t_acc")
MEASURED, PRINTED = "measured", "published"


def table(runs: Sequence[Path], benchmark: str | None = None) -> list[dict[str, Any]]:
    """One row per run, then one per published result.

    Args:
        runs: folders that ``segcompass eval --out`` wrote.
        benchmark: refcoco, grefcoco or reasonseg; None takes the published results of all.

    Returns:
        Rows ready for JSON: ``origin`` ("measured" or "published"), ``name``, ``data``, ``split``,
        ``samples``, ``giou``, ``ciou``, ``n_acc``, ``t_acc`` in [0, 1] or None, ``intervals`` and
        ``source``. Published figures have no samples and no intervals.

    Raises:
        DataError: a folder holds no figures.
    """
    return [_measured(run) for run in runs] + [
        _published(row) for row in PUBLISHED if benchmark in (None, row.benchmark)
    ]


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of ``table`` as text; intervals stand beside their figures."""
    return [
        {
            "origin": row["origin"],
            "name": row["name"],
            "data": row["data"],
            "split": row["split"],
            "samples": "–" if row["samples"] is None else f"{row['samples']:,}",
            **{name: _figure(row, name) for name in FIGURES},
        }
        for row in rows
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of ``table`` as a Markdown table."""
    return as_markdown(shown(rows))


def as_markdown(cells: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(cells[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in cells)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def as_csv(cells: Sequence[Mapping[str, object]]) -> str:
    """Rows of equal keys as CSV; what is None stays empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return out.getvalue()


def _measured(run: Path) -> dict[str, Any]:
    figures = read_figures(run)
    return {
        "origin": MEASURED,
        "name": run.name,
        "data": figures["data"],
        "split": figures["split"],
        "samples": figures["samples"],
        **{name: figures[name] for name in FIGURES},
        "intervals": {name: figures["intervals"].get(name) for name in FIGURES},
        "source": figures["model"],
    }


def _published(row: Published) -> dict[str, Any]:
    giou, ciou = (None if value is None else value / 100 for value in (row.giou, row.ciou))
    return {
        "origin": PRINTED,
        "name": row.model,
        "data": row.dataset,
        "split": row.split,
        "samples": None,
        **dict.fromkeys(FIGURES),
        "giou": giou,
        "ciou": ciou,
        "intervals": {},
        "source": row.source,
    }


def _figure(row: Mapping[str, Any], name: str) -> str:
    return percent(row[name], row["intervals"].get(name))


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """In percent, as papers print it; with its interval where there is one."""
    if value is None:
        return "–"
    beside = "" if interval is None else f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
    return f"{100 * value:.1f}{beside}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
