"""Several ways of aligning in one table: the same samples, one judge, figures over seeds.

A figure is that of all seeds' answers put together, which for a mean is the mean over seeds. Its
interval is a 95 % bootstrap over samples, in which a sample is drawn with the answers of all seeds:
how far it would move with other samples. How far it moves with the seed is told beside it, from the
lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segcompass.evaluation.candidates import Weighed, summary
from segcompass.evaluation.footprint import Footprint
from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.run_log import ROWS, read_rows, read_scores
from segcompass.evaluation.tables import percent

FIGURES = {"giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc", "t_acc": "T-acc"}
SHARES = {"reasoning_target_accuracy": "thought right", "format_valid": "well-formed"}
CHOICE = {"oracle": "best candidate", "best_source": "best source"}
MEGABYTE = 1e6


class Judged(NamedTuple):
    """One model of an interface: what was trained with one seed, or loaded."""

    rows: Path  # folder that an evaluation wrote to its end
    footprint: Footprint
    parameters: int | None  # trained; None where it was loaded


def compare(name: str, runs: Sequence[Judged]) -> dict[str, Any]:
    """One interface's row, from its runs with different seeds on the same samples.

    Returns:
        Ready for JSON: name, interface, seeds, samples, the figures of `metrics.Metrics` with
        intervals, seeds' giou, seconds and memory (bytes) for one picture, trained parameters,
        explanations; and where candidates were chosen from, oracle, best_source and by_source.
    """
    scores = [list(read_scores(run.rows / ROWS)) for run in runs]
    figures = Metrics([score for own in scores for score in own]).result()
    kept = ("samples", *FIGURES, *SHARES, "by_kind")
    return {
        "name": name,
        "interface": runs[0].footprint.interface,
        "seeds": len(runs),
        **{key: figures[key] for key in kept},
        "samples": len(scores[0]),
        "intervals": {key: figures["intervals"][key] for key in FIGURES},
        "giou_by_seed": [Metrics(own).result(resamples=0)["giou"] for own in scores],
        "seconds": sum(run.footprint.seconds for run in runs) / len(runs),
        "memory": max(run.footprint.memory for run in runs),
        "parameters": runs[0].parameters,
        "explanations": runs[0].footprint.explanations,
        **_choices(runs),
    }


def _choices(runs: Sequence[Judged]) -> dict[str, Any]:
    """How good the choice among candidates was, if there was one."""
    rows = [row for run in runs for row in read_rows(run.rows / ROWS)]
    if not any("weighed" in row for row in rows):
        return {}
    found = summary(map(_weighed, rows))
    return {name: found[name] for name in ("oracle", "best_source", "by_source")}


def _weighed(row: Mapping[str, Any]) -> Weighed:
    """An answer without candidates is the direct one, as in ``candidates.weigh``."""
    if "weighed" in row:
        return Weighed(**row["weighed"])
    iou, well_formed = row["iou"], row["status"] in ("ok", "no_target")
    nothing = float(well_formed and not row["has_target"])
    return Weighed(iou, max(iou, nothing), nothing, {"direct": iou})


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table for people: a row for every figure, a column for every interface."""
    kinds = sorted({kind for row in rows for kind in row["by_kind"]})
    lines: dict[str, list[str]] = {}
    for key, title in FIGURES.items():
        lines[title] = [percent(row[key], row["intervals"][key]) for row in rows]
    lines["gIoU, seeds"] = [_span(row["giou_by_seed"]) for row in rows]
    for kind in kinds:
        lines[f"gIoU {kind}"] = [percent(row["by_kind"].get(kind)) for row in rows]
    for key, title in SHARES.items():
        lines[title] = [percent(row[key]) for row in rows]
    if any("oracle" in row for row in rows):
        lines[f"gIoU {CHOICE['oracle']}"] = [percent(row.get("oracle")) for row in rows]
        lines[f"gIoU {CHOICE['best_source']}"] = [_best_source(row) for row in rows]
    lines["s per picture"] = [f"{row['seconds']:.2f}" for row in rows]
    lines["MB"] = [f"{row['memory'] / MEGABYTE:,.1f}" for row in rows]
    lines["trained parameters"] = [_count(row["parameters"]) for row in rows]
    lines["seeds × samples"] = [f"{row['seeds']} × {row['samples']:,}" for row in rows]
    lines["shows"] = [", ".join(row["explanations"]) or "–" for row in rows]
    names = [row["name"] for row in rows]
    return [{"": title, **dict(zip(names, cells, strict=True))} for title, cells in lines.items()]


def flat(row: Mapping[str, Any]) -> dict[str, object]:
    """One interface's row with a column for every number, for CSV."""
    bounds = {
        f"{key}_{end}": None if span is None else span[i]
        for key, span in row["intervals"].items()
        for i, end in enumerate(("low", "high"))
    }
    plain = ("name", "interface", "seeds", "samples", *FIGURES, *SHARES)
    return {
        **{key: row[key] for key in plain},
        **bounds,
        **{f"giou_{kind}": value for kind, value in row["by_kind"].items()},
        **{key: row.get(key) for key in CHOICE},
        **{key: row[key] for key in ("seconds", "memory", "parameters")},
        "explanations": "; ".join(row["explanations"]),
    }


def _span(values: Sequence[float]) -> str:
    """From the lowest to the highest."""
    low, high = percent(min(values)), percent(max(values))
    return low if len(values) == 1 else f"{low}–{high}"


def _best_source(row: Mapping[str, Any]) -> str:
    name = row.get("best_source")
    return "–" if name is None else f"{percent(row['by_source'][name])} ({name})"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
