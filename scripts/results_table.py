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
ALONG = ("giou", "giou_target", "n_acc", "t_acc")
KINDS = ("discriminative", "spatial", "geometric", "multi-step", "commonsense")


def number(value: float | None) -> str:
    """Three decimals; a dash where the figure is not defined."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(figures: dict[str, Any], name: str) -> str:
    """A figure with its 95 % bootstrap interval, if it has one."""
    interval = (figures.get("intervals") or {}).get(name)
    text = number(figures.get(name))
    return text if interval is None else f"{text} ({interval[0]:.3f}–{interval[1]:.3f})"


def name_of(run: Path) -> str:
    """What a run is called: the judged arm of an experiment as its folder, not as `eval` in it."""
    return run.resolve().parent.name if run.name == "eval" else run.name


def main(folders: list[str]) -> None:
    """Print a table of figures, gIoU by kind of question, and what each path carries."""
    runs = {name_of(Path(f)): json.loads((Path(f) / "metrics.json").read_text()) for f in folders}
    if len(runs) < len(folders):
        raise SystemExit(f"two folders of one name among {', '.join(folders)}; print them apart")
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
    paths = {f"{name}: {path}": f for name, run in runs.items() for path, f in along(run).items()}
    if paths:
        print("\n| slot queries from | " + " | ".join(ALONG) + " |")
        print("|---|" + "---:|" * len(ALONG))
    for name, figures in paths.items():
        print(f"| {name} | " + " | ".join(number(figures[column]) for column in ALONG) + " |")


def along(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both paths, and each alone; nothing where that was not measured."""
    alone: dict[str, dict[str, Any]] = figures.get("by_path") or {}
    return {"both": figures, **alone} if alone else {}


if __name__ == "__main__":
    main(sys.argv[1:])
