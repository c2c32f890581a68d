"""Run an ablation: every arm with every seed, trained, judged, and set side by side.

    python scripts/ablate.py configs/ablations/table4.yaml

The file names a base config, what all arms share, the arms, the seeds and what is judged. Each run
lies in OUT/ARM-SEED; an arm may change how it is judged, too. What is done is not run again, so a
later call goes on. The table (mean and standard deviation over seeds) goes to stdout and to
OUT/table.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from segcompass.evaluation.benchmark import METRICS, evaluate
from segcompass.io.progress import progress
from segcompass.learning import train
from segcompass.pipeline import SegCompass

FIGURES = ("giou_target", "n_acc", "t_acc", "reasoning_target_accuracy", "format_valid")


def settings(changes: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested changes as the command line's ``a.b=value``."""
    found = []
    for key, value in changes.items():
        nested = isinstance(value, dict)
        name = f"{prefix}{key}"
        found += settings(value, f"{name}.") if nested else [f"{name}={json.dumps(value)}"]
    return found


def run_arm(spec: dict[str, Any], arm: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train and judge one arm with one seed, unless that is done already."""
    judged = folder / "eval"
    if (judged / METRICS).exists():
        figures: dict[str, Any] = json.loads((judged / METRICS).read_text())
        return figures
    asked = {**spec["eval"], **arm.get("eval", {})}
    overrides = [f"run={folder}", f"seed={seed}", *settings(spec["common"])]
    overrides += settings({key: value for key, value in arm.items() if key != "eval"})
    model = train.run("joint", Path(spec["config"]), overrides, resume=True)
    with progress(f"eval {folder.name}") as moved:
        return evaluate(SegCompass.from_pretrained(model), **asked, out=judged, progress=moved)


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = []
    for figure in FIGURES:
        values = [run[figure] for run in runs if run[figure] is not None]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
    return f"| {name} | {len(runs)} | " + " | ".join(cells) + " |"


def main(path: Path) -> None:
    """Run what is missing and print the table."""
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec["eval"]["data"] = Path(spec["eval"]["data"])
    out = Path(spec["out"])
    lines = ["| arm | seeds | " + " | ".join(FIGURES) + " |", "|---|---:|" + "---:|" * len(FIGURES)]
    for name, arm in spec["arms"].items():
        runs = [run_arm(spec, arm, seed, out / f"{name}-{seed}") for seed in spec["seeds"]]
        lines.append(row(name, runs))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
