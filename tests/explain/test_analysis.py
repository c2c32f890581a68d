"""The whole analysis on a tiny model: the same from live answers as from saved ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.data.samples import read_dataset
from segcompass.explain.analysis import Analysis, answers, panel_ids
from segcompass.io.errors import DataError
from segcompass.pipeline import SegCompass

pytest.importorskip("matplotlib")
TABLES = ("activation_patterns", "instance_coverage", "samples", "heatmap", "sae_error")


@pytest.fixture(scope="module")
def run(tiny_model: Path, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the command, the second of which reads what the first one saved."""
    folder = tmp_path_factory.mktemp("analyze")
    saved = ["--predictions", str(folder / "answers")]
    common = ["analyze", "--model", str(tiny_model), "--data", str(scenes_root), "--json"]
    for name, more in (("live", []), ("first", saved), ("second", saved)):
        result = CliRunner().invoke(app, [*common, "--out", str(folder / name), "--cards", *more])
        assert result.exit_code == 0, result.output
        (folder / f"{name}.json").write_text(result.stdout)
    return folder


def test_saved_answers_give_what_live_ones_give(run: Path) -> None:
    for name in (*(f"{table}.csv" for table in TABLES), "summary.json", "concepts.csv"):
        live = (run / "live" / name).read_bytes()
        assert (run / "first" / name).read_bytes() == live
        assert (run / "second" / name).read_bytes() == live
    page = (run / "live" / "concepts.html").read_bytes()
    assert (run / "second" / "concepts.html").read_bytes() == page


def test_every_figure_has_its_data_beside_it(run: Path) -> None:
    drawn = sorted(path.stem for path in (run / "live").glob("*.svg"))
    assert {"activation_patterns", "instance_coverage", "heatmap", "panels"} <= set(drawn)
    for stem in drawn:
        assert (run / "live" / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
        assert (run / "live" / f"{stem}.csv").is_file()
    with (run / "live" / "samples.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == 4


def test_the_summary_is_what_is_printed(run: Path) -> None:
    summary = json.loads((run / "live.json").read_text())
    assert summary == json.loads((run / "live" / "summary.json").read_text())
    assert summary["samples"] == 4
    assert {"n"} <= set(summary["correlations"]["heatmap"])
    assert summary["concepts"]["concepts"] == 64


def test_answers_of_another_model_are_refused(run: Path, scenes_root: Path) -> None:
    class Other:
        name, fingerprint = "other", "1"

    samples = read_dataset(scenes_root, "val")
    with pytest.raises(DataError, match="another model's"):
        next(answers(Other(), samples, saved=run / "answers"))  # type: ignore[arg-type]


def test_no_hook_outlives_an_analysis(tiny_model: Path, scenes_root: Path) -> None:
    model = SegCompass.from_pretrained(tiny_model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    samples = read_dataset(scenes_root, "val", limit=2)
    analysis = Analysis(panel_ids(samples))
    for sample, prediction in answers(model, samples):
        analysis.add(sample, prediction)
    assert len(analysis.qualities) == 2
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
