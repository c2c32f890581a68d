"""Train the `sae` stage at several L1 weights and print how fidelity trades against sparsity.

    python scripts/sae_frontier.py CONFIG --l1 1 2 3 5 8 [--model DIR] [--limit N] [--set a.b=c]…

Wants the policy of an earlier `segcompass train warmup CONFIG`. Each weight gets a folder
RUN/frontier/l1-WEIGHT with log, report and the finished SAE (SAELens layout, in `sae/`); states are
computed once and cached in RUN/frontier/states, unless the config names a cache. A run that was cut
off is continued. The table is markdown, all figures are those of held-out sequences.

With a finished model of the same policy, the table also says what is left of its masks when its
head reads each SAE's reconstruction of the states: gIoU over questions of val with a target, with
both paths to the queries and with the concepts alone. The last row reads the states themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.concepts.sparse_codes import SparseCodes
from segcompass.evaluation.benchmark import evaluate
from segcompass.interfaces.concept_slots import with_concepts
from segcompass.io.errors import ConfigError
from segcompass.io.progress import progress
from segcompass.learning import train
from segcompass.learning.config import load_config
from segcompass.learning.engine.distributed import World
from segcompass.learning.train_sae import REPORT, train_sae
from segcompass.pipeline import SegCompass

COLUMNS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead": "dead share",
    "loss_recovered": "loss recovered",
    "text_only": "text only",
    "image_only": "image only",
    "shared": "shared",
}
PATHS = {"both": "gIoU", "concepts": "gIoU, concepts alone"}


def sweep(config_path: Path, weights: Sequence[float], overrides: Sequence[str]) -> list[Path]:
    """Train one SAE for each weight; returns their folders."""
    config = load_config(config_path, list(overrides))
    if config.train_sae is None:
        raise ConfigError(
            f"{config_path} has no section train_sae; it says how the autoencoders are trained"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    train.write_data(config)
    policy = train.warm_policy(config).to(World.current().device)
    cache = config.train_sae.cache or config.run / "frontier/states"
    folders = []
    for weight in weights:
        folder = config.run / f"frontier/l1-{weight:g}"
        stage = config.train_sae.model_copy(update={"l1": weight, "cache": cache})
        sae = train_sae(policy, config, stage, folder)
        sae.save(folder / "sae", {**train.sae_metadata(config), "l1": weight})
        folders.append(folder)
    return folders


def mask_quality(model: SegCompass, folder: Path, data: Path, limit: int) -> dict[str, float]:
    """gIoU by path where the head reads the reconstruction of FOLDER/sae, if there is one."""
    head = with_concepts(model.interface).sae
    plain = head.encode_sparse
    if (folder / "sae").is_dir():
        sae = SparseAutoencoder.load(folder / "sae").to(head.W_enc.device)

        def rebuilt(z: torch.Tensor) -> SparseCodes:
            return plain(sae.decode_sparse(sae.encode_sparse(z)))

        head.encode_sparse = rebuilt
    try:
        found = {}
        for paths in PATHS:
            with progress(f"{folder.name}, {paths}") as moved:
                out = folder / f"eval-{paths}"
                figures = evaluate(
                    model, data, "val", limit=limit, out=out, paths=paths, progress=moved
                )
            found[paths] = figures["giou_target"]
    finally:
        head.encode_sparse = plain
    return found


def table(folders: Sequence[Path], masks: Sequence[dict[str, float]] = ()) -> str:
    """The frontier as markdown; ``masks`` are of each folder, and at last of the plain states."""
    titles = [*COLUMNS.values(), *(PATHS.values() if masks else ())]
    rows = [f"| L1 weight | {' | '.join(titles)} |", "|---:" * (len(titles) + 1) + "|"]
    for number, folder in enumerate(folders):
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        cells = [_number(report.get(column)) for column in COLUMNS]
        cells += [_number(masks[number][paths]) for paths in PATHS if masks]
        rows.append(f"| {report['l1']:g} | {' | '.join(cells)} |")
    if masks:
        cells = ["–"] * len(COLUMNS) + [_number(masks[-1][paths]) for paths in PATHS]
        rows.append(f"| none | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--l1", type=float, nargs="+", required=True, help="weights to try")
    parser.add_argument("--model", type=Path, help="a finished model whose masks are judged")
    parser.add_argument("--limit", type=int, default=300, help="questions that it is asked")
    parser.add_argument("--set", action="append", default=[], help="a.b=value, repeatable")
    options = parser.parse_args(arguments)
    folders = sweep(options.config, options.l1, options.set)
    masks = []
    if options.model is not None:
        config = load_config(options.config, options.set)
        model = SegCompass.from_pretrained(options.model)
        masks = [
            mask_quality(model, folder, config.data.root, options.limit)
            for folder in (*folders, config.run / "frontier/none")
        ]
    print(table(folders, masks))


if __name__ == "__main__":
    main()
