"""Run an ablation: every arm with every seed, trained, judged, and set side by side.

    python scripts/ablate.py configs/ablations/table4.yaml [--steps N] [--limit N] [--seeds 0 1]
                             [--model DIR]

The file is an experiment as `segcompass compare` takes it (learning/arms.py): a base config, the
run whose finished parts all arms start from, what all arms share, the arms, the seeds and what is
judged. What is done is not run again and what was cut off is continued, so a later call goes on.
The table (mean and standard deviation over seeds) goes to stdout and to OUT/table.md. Its last
column tells how soon rewards converge (Fig. 6): answers sampled until 95 % of the gain was made.

``--steps`` shortens the joint stage, ``--limit`` the judging, ``--seeds`` takes others, ``--model``
is a finished model that all arms start from instead: a cheap look at the same arms, kept in a
folder of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segcompass.learning.arms import load_experiment, run_arm
from segcompass.learning.config import read_settings

FIGURES = ("giou_target", "n_acc", "t_acc", "reasoning_target_accuracy", "format_valid")
CONVERGED = "answers to 95 %"
SMOOTHED = 20  # steps whose mean reward is taken
LOG = Path("stages/joint/log.jsonl")


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = [_cell([run[figure] for run in runs], ".3f") for figure in FIGURES]
    cells.append(_cell([run[CONVERGED] for run in runs], ",.0f"))
    return f"| {name} | {len(runs)} | " + " | ".join(cells) + " |"


def _cell(found: Sequence[float | None], form: str) -> str:
    """Mean and spread of the values that are there."""
    values = [value for value in found if value is not None]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}" if values else "–"


def answers_to_converge(log: Path) -> int | None:
    """Answers sampled until the smoothed reward had made 95 % of the way to its highest value.

    None where it never rose, or nothing was sampled for long enough.
    """
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = [row for row in map(json.loads, lines) if row.get("reward") is not None]
    if len(rows) < SMOOTHED:
        return None
    rewards = np.array([row["reward"] for row in rows])
    smooth = np.convolve(rewards, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    gain = smooth.max() - smooth[0]
    if gain <= 0:
        return None
    steps = SMOOTHED + int((smooth >= smooth[0] + 0.95 * gain).argmax())
    return sum(int(row["answers"]) for row in rows[:steps])


def shortened(options: argparse.Namespace) -> list[str]:
    """What the options change in the file."""
    spec = read_settings(options.file)
    out, changes = str(spec["out"]), []
    if options.seeds:
        changes.append(f"seeds={options.seeds}")
    if options.steps is not None:
        changes += _fewer_steps(spec, options.steps)
        out += f"-steps{options.steps}"
    if options.limit is not None:
        changes.append(f"eval.limit={options.limit}")
        out += f"-limit{options.limit}"
    if options.model is not None:
        start = "from" if "from" in spec else "common.train_joint.start"
        changes.append(f"{start}={options.model}")
        out += f"-{options.model.name}"
    return [*changes, f"out={out}"]


def _fewer_steps(spec: dict[str, Any], steps: int) -> list[str]:
    """The joint stage of all arms in so many steps, as large a share of them on given answers."""
    common = spec.get("common", {}).get("train_joint", {})
    arms = {f"arms.{name}": arm.get("train_joint", {}) for name, arm in spec["arms"].items()}
    changes = []
    for where, joint in {"common": common, **arms}.items():
        if where == "common" or "steps" in joint:
            changes.append(f"{where}.train_joint.steps={steps}")
        if told := joint.get("oracle_steps"):
            whole = joint.get("steps", common.get("steps", told))
            share = min(math.ceil(told * steps / whole), steps)
            changes.append(f"{where}.train_joint.oracle_steps={share}")
    return changes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, help="of the joint stage")
    parser.add_argument("--limit", type=int, help="questions that are judged")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--model", type=Path, help="a finished model to start from")
    options = parser.parse_args(arguments)
    experiment = load_experiment(options.file, shortened(options))
    columns = [*FIGURES, CONVERGED]
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for name in experiment.arms:
        runs = [
            {**run_arm(experiment, name, folder), CONVERGED: answers_to_converge(folder / LOG)}
            for folder in experiment.runs(name)
        ]
        lines.append(row(name, runs))
    (experiment.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
