"""The table script: a row for every run, under a name that tells it apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import results_table
from oracle import Oracle, make_samples, reader

from segcompass.evaluation import splits
from segcompass.evaluation.benchmark import evaluate


def test_every_run_has_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(tmp_path)
    monkeypatch.setattr(splits, "read_dataset", reader(samples))
    runs = [tmp_path / "both-0/eval", tmp_path / "both-1/eval", tmp_path / "val"]
    for run in runs:
        evaluate(Oracle(samples), tmp_path, "val", out=run)
    results_table.main([str(run) for run in runs])
    table, by_kind, paths = capsys.readouterr().out.split("\n\n")
    names = ["both-0", "both-1", "val"]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {n}" for n in names]
    assert [line.split(" | ")[0] for line in by_kind.splitlines()[2:]] == [f"| {n}" for n in names]
    assert "| val: both | 1.000 | 1.000 | 1.000 | 1.000 |" in paths
    assert "| val: tokens | 0.333 | 0.000 | 1.000 | 0.000 |" in paths


def test_runs_of_one_name_are_not_put_together(tmp_path: Path) -> None:
    for name in ("a/val", "b/val"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({}))
    with pytest.raises(SystemExit, match="two folders of one name"):
        results_table.main([str(tmp_path / "a/val"), str(tmp_path / "b/val")])
