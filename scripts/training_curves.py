"""Draw what a joint stage went through: rewards, IoU of matched masks and KL over its steps.

    python scripts/training_curves.py RUN [RUN…] [--out docs/images/training] [--window 10]

Reads RUN/stages/joint/log.jsonl and writes OUT.png, OUT.svg and OUT.csv (extra ``viz``). Thin lines
are single steps, thick ones means over ``--window`` steps around them. Steps on the data set's own
answers have no rewards and no KL: their part of these curves is empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segcompass.explain.figures import CHANCE, MAIN, STYLE, save_figure, write_csv

PANELS: list[dict[str, tuple[str, str]]] = [  # fields with label and colour
    {
        "reward": ("reward", MAIN),
        "reward_mask": ("mask score", "#2f7cd6"),
        "reward_format": ("format score", CHANCE),
    },
    {"iou": ("IoU of matched masks", MAIN)},
    {"kl": ("KL from the reference, nats per token", MAIN)},
]
FIELDS = [field for panel in PANELS for field in panel]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The figures of every step; None where a step has none."""
    lines = (run / "stages/joint/log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {"run": run.name, "step": r["step"], **{field: r.get(field) for field in FIELDS}}
        for r in rows
    ]


def smoothed(values: Sequence[float | None], window: int) -> np.ndarray:
    """Means over ``window`` steps around each, of those that have a value."""
    known = np.array([np.nan if v is None else v for v in values], dtype=float)
    sums, counts = (
        np.convolve(part, np.ones(min(window, len(known))), mode="same")
        for part in (np.nan_to_num(known), np.isfinite(known).astype(float))
    )
    return np.where(np.isfinite(known), sums / np.maximum(counts, 1), np.nan)


def draw(logs: Sequence[Sequence[dict[str, Any]]], stem: Path, window: int) -> None:
    """One panel for each group of fields, all runs in each."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(PANELS), 2.6), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, len(PANELS))
        for axis, fields in zip(axes, PANELS, strict=True):
            for log, dash in zip(logs, ("-", "--", ":", "-.") * len(logs), strict=False):
                _curves(axis, log, fields, dash, window)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
            axis.legend(**above, ncols=len(fields), handlelength=1.2, columnspacing=1.2)
        save_figure(figure, stem)


def _curves(
    axis: Axes,
    log: Sequence[dict[str, Any]],
    fields: dict[str, tuple[str, str]],
    dash: str,
    window: int,
) -> None:
    steps = [row["step"] for row in log]
    for field, (label, colour) in fields.items():
        values = [row[field] for row in log]
        single = np.array([np.nan if v is None else v for v in values], dtype=float)
        axis.plot(steps, single, color=colour, linewidth=0.5, alpha=0.3)
        name = label if dash == "-" else f"{label} ({log[0]['run']})"
        mean = smoothed(values, window)
        axis.plot(steps, mean, color=colour, linestyle=dash, linewidth=1.6, label=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, and write the data beside the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("docs/images/training"))
    parser.add_argument("--window", type=int, default=10, help="steps that are averaged")
    options = parser.parse_args(arguments)
    logs = [read_log(run) for run in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(logs, options.out, options.window)
    write_csv(options.out.with_suffix(".csv"), [row for log in logs for row in log])


if __name__ == "__main__":
    main()
