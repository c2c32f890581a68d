"""The frontier script trains one SAE per L1 weight and prints them side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sae_frontier
import torch
from recipes import stage, write_llava_config

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.interfaces.concept_slots import with_concepts
from segcompass.io.errors import ConfigError
from segcompass.learning.engine.distributed import World
from segcompass.pipeline import SegCompass
from segcompass.reasoning.policy import Policy


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


def test_masks_are_judged_through_each_autoencoder(
    tiny_model: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head gets codes of the reconstruction; without an autoencoder, of the states."""
    model = SegCompass.from_pretrained(tiny_model)
    head = with_concepts(model.interface).sae
    width = head.config.d_in
    blind = SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=8))
    with torch.no_grad():
        for parameter in blind.parameters():
            parameter.zero_()
    blind.save(tmp_path / "blind/sae")
    seen: list[list[float]] = []

    def judged(_model: SegCompass, *_: object, paths: str, **options: object) -> dict[str, float]:
        codes = head.encode_sparse(torch.eye(width)[:2])
        seen.append(head.decode_sparse(codes).flatten().tolist())
        return {"giou_target": 0.5 if paths == "both" else 0.25}

    monkeypatch.setattr(sae_frontier, "evaluate", judged)
    states, nothing = torch.eye(width)[:2], torch.zeros(2, width)
    wanted = [
        head.decode_sparse(head.encode_sparse(z)).flatten().tolist() for z in (nothing, states)
    ]
    assert wanted[0] != wanted[1]
    for name in ("blind", "none"):
        found = sae_frontier.mask_quality(model, tmp_path / name, scenes_root, 2)
        assert found == {"both": 0.5, "concepts": 0.25}
    assert seen == [wanted[0], wanted[0], wanted[1], wanted[1]]
    table = sae_frontier.table([], [found])
    assert table.splitlines()[-1].endswith("| 0.500 | 0.250 |")


def test_the_policy_is_read_on_the_worlds_device(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is a GPU where there is one; meta stands in for it."""
    devices: list[str] = []

    def seen(policy: Policy, *_: object) -> SparseAutoencoder:
        devices.append(policy.model.device.type)
        return SparseAutoencoder(SparseAutoencoderConfig(d_in=4, d_sae=8))

    there = World(0, 1, torch.device("meta"))
    monkeypatch.setattr(World, "current", classmethod(lambda _cls: there))
    monkeypatch.setattr(sae_frontier, "train_sae", seen)
    sae_frontier.sweep(write_llava_config(tmp_path, scenes_root), [1.0], [])
    assert devices == ["meta"]


def test_a_config_without_the_stage_is_named(scenes_root: Path, tmp_path: Path) -> None:
    path = write_llava_config(tmp_path, scenes_root, train_sae=None)
    with pytest.raises(ConfigError, match=rf"{path} has no section train_sae"):
        sae_frontier.main([str(path), "--l1", "1"])
