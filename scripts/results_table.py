"""Print evaluation runs as a markdown table.

    python scripts/results_table.py RUN…

A RUN is a folder that `segcompass eval --out RUN` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "giou_target",
    "giou",
    "ciou",
    "n_acc",
    "t_acc",
    "format_valid",
    "reasoning_target_accuracy",
)
KINDS = ("discriminative", "spatial", "geometric", "multi-step", "commonsense")


def number(value: float | None) -> str:
    """Three decimals; a dash where the figure is not defined."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(figures: dict[str, Any], name: str) -> str:
    """A figure with its 95 % bootstrap interval, if it has one."""
    interval = (figures.get("intervals") or {}).get(name)
    text = number(figures.get(name))
    return text if interval is None else f"{text} ({interval[0]:.3f}–{interval[1]:.3f})"


def main(folders: list[str]) -> None:
    """Print one table of figures and one of gIoU by kind of question."""
    runs = {Path(f).name: json.loads((Path(f) / "metrics.json").read_text()) for f in folders}
    print("| run | samples | " + " | ".join(COLUMNS) + " |")
    print("|---|---:|" + "---:|" * len(COLUMNS))
    for name, figures in runs.items():
        cells = [with_interval(figures, column) for column in COLUMNS]
        print(f"| {name} | {figures['samples']} | " + " | ".join(cells) + " |")
    print("\n| run | " + " | ".join(KINDS) + " |")
    print("|---|" + "---:|" * len(KINDS))
    for name, figures in runs.items():
        kinds = figures["by_kind"]
        print(f"| {name} | " + " | ".join(number(kinds.get(kind)) for kind in KINDS) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
