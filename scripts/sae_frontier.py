"""Train the `sae` stage at several L1 weights and print how fidelity trades against sparsity.

    python scripts/sae_frontier.py CONFIG --l1 1 2 3 5 8 [--set a.b=c]…

Wants the policy of an earlier `segcompass train warmup CONFIG`. Each weight gets a folder
RUN/frontier/l1-WEIGHT with log, report and the finished SAE (SAELens layout, in `sae/`); states are
computed once and cached in RUN/frontier/states, unless the config names a cache. A run that was cut
off is continued. The table is markdown, all figures are those of held-out sequences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segcompass.learning import train
from segcompass.learning.config import load_config
from segcompass.learning.train_sae import REPORT, train_sae

COLUMNS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead": "dead share",
    "loss_recovered": "loss recovered",
    "text_only": "text only",
    "image_only": "image only",
    "shared": "shared",
}


def sweep(config_path: Path, weights: Sequence[float], overrides: Sequence[str]) -> list[Path]:
    """Train one SAE for each weight; returns their folders."""
    config = load_config(config_path, list(overrides))
    if config.threads:
        torch.set_num_threads(config.threads)
    train.write_data(config)
    policy = train.warm_policy(config)
    cache = config.train_sae.cache or config.run / "frontier/states"
    folders = []
    for weight in weights:
        folder = config.run / f"frontier/l1-{weight:g}"
        stage = config.train_sae.model_copy(update={"l1": weight, "cache": cache})
        sae = train_sae(policy, config, stage, folder)
        sae.save(folder / "sae", {**train.sae_metadata(config), "l1": weight})
        folders.append(folder)
    return folders


def table(folders: Sequence[Path]) -> str:
    """The frontier as markdown."""
    rows = [f"| L1 weight | {' | '.join(COLUMNS.values())} |", "|---:" * (len(COLUMNS) + 1) + "|"]
    for folder in folders:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        cells = [_number(report.get(column)) for column in COLUMNS]
        rows.append(f"| {report['l1']:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--l1", type=float, nargs="+", required=True, help="weights to try")
    parser.add_argument("--set", action="append", default=[], help="a.b=value, repeatable")
    options = parser.parse_args(arguments)
    print(table(sweep(options.config, options.l1, options.set)))


if __name__ == "__main__":
    main()
