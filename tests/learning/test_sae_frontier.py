"""The frontier script trains one SAE per L1 weight and prints them side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sae_frontier
from recipes import stage, write_llava_config

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder


def test_one_row_for_each_weight(
    scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = stage(60, batch=64, latents=48, samples=4, held_out=2, save_every=60)
    path = write_llava_config(tmp_path, scenes_root, train_sae=settings)
    sae_frontier.main([str(path), "--l1", "0", "30", "--set", "train_sae.l1_warmup=0"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    table = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in table] == [0, 30]
    dense, sparse = (dict(zip(columns, row, strict=True)) for row in table)
    assert dense["L0"] > sparse["L0"] and dense["explained variance"] > sparse["explained variance"]
    for weight in ("0", "30"):
        folder = tmp_path / f"run/frontier/l1-{weight}"
        assert SparseAutoencoder.load(folder / "sae").metadata["l1"] == float(weight)
        assert json.loads((folder / "sae_report.json").read_text())["l1"] == float(weight)
    assert len(list((tmp_path / "run/frontier/states").iterdir())) == 1  # one pass, for both
