"""Several ways of aligning in one table: the same samples, one judge, figures over seeds.

A figure is that of all seeds' answers put together, which for a mean is the mean over seeds. Its
interval is a 95 % bootstrap over samples, in which a sample is drawn with the answers of all seeds:
how far it would move with other samples. How far it moves with the seed is told beside it, from the
lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from segcompass.evaluation.candidates import Weighed, summary
from segcompass.evaluation.footprint import Footprint
from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.run_log import ROWS, read_rows
from segcompass.evaluation.scoring import PairScore
from segcompass.evaluation.tables import percent
from segcompass.io.errors import DataError

FIGURES = {"giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc", "t_acc": "T-acc"}
SHARES = {"reasoning_target_accuracy": "thought right", "format_valid": "well-formed"}
CHOICE = {"oracle": "best candidate", "best_source": "best source"}
MEGABYTE = 1e6


class Judged(NamedTuple):
    """One model of an interface: what was trained with one seed, or loaded."""

    rows: Path  # folder that an evaluation wrote to its end
    footprint: Footprint
    parameters: int | None  # trained; None where it was loaded


def compare(name: str, runs: Sequence[Judged], samples: Sequence[str]) -> dict[str, Any]:
    """One interface's row, from its runs with different seeds on the same samples.

    Args:
        name: Of the row.
        runs: One for each seed.
        samples: Ids of the samples that count; rows of others, of an earlier run, do not.

    Returns:
        Ready for JSON: name, interface, seeds, samples, the figures of `metrics.Metrics` with
        intervals and (by_kind) for each kind of question, seeds' giou, seconds and memory (bytes)
        for one picture, trained parameters, explanations; and where candidates were chosen from,
        oracle, best_source, by_source and gain (of the choice over best_source, with an interval).

    Raises:
        DataError: if a run lacks one of the samples.
    """
    rows = [_rows_of(run.rows, samples) for run in runs]
    scores = [[PairScore.from_row(row) for row in own] for own in rows]
    together = [score for own in scores for score in own]
    figures = Metrics(together).result()
    return {
        "name": name,
        "interface": runs[0].footprint.interface,
        "seeds": len(runs),
        **{key: figures[key] for key in (*FIGURES, *SHARES)},
        "by_kind": _by_kind(together),
        "samples": len(samples),
        "intervals": {key: figures["intervals"][key] for key in FIGURES},
        "giou_by_seed": [Metrics(own).result(resamples=0)["giou"] for own in scores],
        "seconds": sum(run.footprint.seconds for run in runs) / len(runs),
        "memory": max(run.footprint.memory for run in runs),
        "parameters": runs[0].parameters,
        "explanations": runs[0].footprint.explanations,
        **_choices(rows),
    }


def _rows_of(run: Path, samples: Sequence[str]) -> list[dict[str, Any]]:
    """A run's rows of these samples, in their order."""
    known = {row["sample_id"]: row for row in read_rows(run / ROWS)}
    if lacking := [sample for sample in samples if sample not in known]:
        raise DataError(
            f"{run / ROWS} lacks {len(lacking):,} of {len(samples):,} samples, the first is "
            f"{lacking[0]}; delete {run} to judge it again"
        )
    return [known[sample] for sample in samples]


def _by_kind(scores: Sequence[PairScore]) -> dict[str, dict[str, float | None]]:
    """The figures of each kind of question, over samples with and without a target."""
    kinds = sorted({score.kind for score in scores if score.kind is not None})
    found = {k: Metrics([s for s in scores if s.kind == k]).result(resamples=0) for k in kinds}
    return {kind: {key: figures[key] for key in FIGURES} for kind, figures in found.items()}


def _choices(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """How good the choice among candidates was, if there was one."""
    rows = [row for own in runs for row in own]
    if not any("weighed" in row for row in rows):
        return {}
    weighed = [_weighed(row) for row in rows]
    found = summary(weighed)
    best = found["best_source"]
    gains = [one.chosen - one.by_source.get(best, one.nothing) for one in weighed]
    by_sample = np.array(gains).reshape(len(runs), -1).mean(axis=0)
    gain = {"mean": float(by_sample.mean()), "interval": _spread(by_sample)}
    return {**{name: found[name] for name in ("oracle", "best_source", "by_source")}, "gain": gain}


def _spread(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean over samples; of equal ones, themselves."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    found = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return [float(found.low), float(found.high)]


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
    for kind, (key, title) in product(kinds, FIGURES.items()):
        lines[f"{title} {kind}"] = [percent(row["by_kind"].get(kind, {}).get(key)) for row in rows]
    for key, title in SHARES.items():
        lines[title] = [percent(row[key]) for row in rows]
    if any("oracle" in row for row in rows):
        lines[f"gIoU {CHOICE['oracle']}"] = [percent(row.get("oracle")) for row in rows]
        lines[f"gIoU {CHOICE['best_source']}"] = [_best_source(row) for row in rows]
        lines["gain over it"] = [_gain(row) for row in rows]
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
        **{
            f"{key}_{kind}": value
            for kind, figures in row["by_kind"].items()
            for key, value in figures.items()
        },
        **{key: row.get(key) for key in CHOICE},
        "gain": row.get("gain", {}).get("mean"),
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


def _gain(row: Mapping[str, Any]) -> str:
    gain = row.get("gain")
    return "–" if gain is None else percent(gain["mean"], gain["interval"])


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
