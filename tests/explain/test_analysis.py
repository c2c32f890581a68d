"""The whole analysis on a tiny model: the same from live answers as from saved ones."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import policy_config, tiny_sam
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.apps.console import ASSET_MISSING
from segcompass.data.samples import read_dataset
from segcompass.explain import concept_cards
from segcompass.explain.analysis import Analysis, answers, panel_ids
from segcompass.explain.concept_cards import Card
from segcompass.explain.deletion import CHANGED
from segcompass.explain.figures import save_figure, write_csv
from segcompass.explain.intervene import Edit, intervene
from segcompass.explain.provenance import provenance
from segcompass.io.errors import DataError
from segcompass.io.outputs import save
from segcompass.model_folder import ModelConfig, build_interface, save_model
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy
from segcompass.types import Prediction, Sample

Figure = pytest.importorskip("matplotlib.figure").Figure
TABLES = ("activation_patterns", "instance_coverage", "samples", "heatmap", "sae_error")
OTHERS = {  # interfaces without concepts: head, and how the policy is asked
    "concentration_token": ({"mapper": {"heads": 2, "head_width": 8}}, {"slots": 1}),
    "latent_query": ({"confidence_width": 8}, {"slots": 1}),
    "text_readout": (
        {"canvas": {"side": 100}},
        {"slots": 2, "form": "objects", "canvas_side": 100},
    ),
}


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


def test_a_damaged_note_of_whose_answers_they_are(
    tiny_model: Path, scenes_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "answers.json").write_text("{")
    model = SegCompass.from_pretrained(tiny_model)
    with pytest.raises(DataError, match=r"answers\.json cannot be read .*another folder"):
        next(answers(model, read_dataset(scenes_root, "val"), saved=tmp_path))


def test_links_among_the_figures_are_replaced_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "precious.txt", tmp_path / "out"
    outside.write_text("keep me")
    out.mkdir()
    names = ["samples.csv", "figure.svg", "figure.png"]
    for name in names:
        (out / name).symlink_to(outside)
    write_csv(out / "samples.csv", [{"a": 1}])
    save_figure(Figure(), out / "figure")
    assert outside.read_text() == "keep me"
    assert not any((out / name).is_symlink() for name in names)


def test_without_matplotlib_nothing_is_answered(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(SegCompass, "from_pretrained", None)  # is not reached
    asked = ["analyze", "--data", str(scenes_root), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == ASSET_MISSING
    assert "pip install 'segcompass[viz]'" in result.stderr


def test_no_hook_outlives_an_analysis(tiny_model: Path, scenes_root: Path) -> None:
    model = SegCompass.from_pretrained(tiny_model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    samples = read_dataset(scenes_root, "val", limit=2)
    analysis = Analysis(panel_ids(samples))
    for sample, prediction in answers(model, samples):
        analysis.add(sample, prediction)
    assert len(analysis.qualities) == 2
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_cards_and_faithfulness_in_one_run(
    tiny_model: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random model's answers are held to their form beforehand, and saved."""
    model = SegCompass.from_pretrained(tiny_model, device="cpu")
    answered: list[tuple[Prediction, list[int]]] = []
    wanted: dict[str, list[int]] = {}
    for sample in read_dataset(scenes_root, "val", limit=3):
        prediction = model.predict(sample.image_path, sample.instruction, threshold=0.0)
        prediction = replace(prediction, source=str(sample.image_path))
        save(prediction, tmp_path / "answers")
        active = sorted(set(prediction.codes.columns.tolist()))
        wanted[sample.sample_id] = [active, active[:1], []][len(wanted)]
        if sample.targets:
            answered.append((prediction, wanted[sample.sample_id]))

    def naming(cards: list[Card]) -> Callable[[Sample], list[int]]:
        live = {card.concept for card in cards}
        assert live >= {concept for concepts in wanted.values() for concept in concepts}
        return lambda sample: wanted[sample.sample_id]

    monkeypatch.setattr(concept_cards, "naming", naming)
    asked = ["analyze", "--model", str(tiny_model), "--data", str(scenes_root), "--limit", "3"]
    asked += ["--predictions", str(tmp_path / "answers"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*asked, "--cards", "--faithfulness"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["faithfulness"]

    ious = [
        intervene(model, prediction, [Edit.ablate(concept) for concept in concepts]).answer_iou
        for prediction, concepts in answered
        if concepts
    ]
    assert found["named_concepts"]["judged"] == len(ious)
    assert found["named_concepts"]["changed"] == sum(iou < CHANGED for iou in ious) / len(ious)
    shares = [
        slot.confidence.residual_share
        for prediction, _ in answered
        for slot in provenance(model, prediction)
    ]
    figures = {"slots": len(shares), "mean": sum(shares) / len(shares), "largest": max(shares)}
    assert found["residual"]["confidence"] == pytest.approx(figures, abs=1e-5)
    with (tmp_path / "out" / "residuals.csv").open() as rows:
        mean = {row["scalar"]: float(row["mean"]) for row in csv.DictReader(rows)}
    assert mean == {scalar: figures["mean"] for scalar, figures in found["residual"].items()}
    told = {words[0] for line in result.stdout.splitlines() if (words := line.split())}
    assert {"residual.confidence.mean", "residual.mask.largest", "named_concepts.changed"} <= told


def write_other(name: str, tiny_model: Path, folder: Path) -> Path:
    """A model folder of an interface without concepts, around the tiny policy."""
    head, asked = OTHERS[name]
    use = policy_config("qwen2_5_vl", max_new_tokens=120)
    use = use.model_copy(update={"prompt": use.prompt.model_copy(update=asked)})
    config = ModelConfig(name=f"tiny-{name}", interface=name, head=head, policy=use)
    policy, sam = load_policy(tiny_model / "policy", use), tiny_sam()
    save_model(folder, config, policy, sam, build_interface(config, policy, sam, None))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_other_interfaces_are_analysed_as_far_as_they_show_anything(
    name: str, tiny_model: Path, scenes_root: Path, tmp_path: Path
) -> None:
    """Answers are held to their form beforehand, so that there is something to correlate."""
    folder, out = write_other(name, tiny_model, tmp_path / "model"), tmp_path / "out"
    model, samples = SegCompass.from_pretrained(folder), read_dataset(scenes_root, "val")
    for sample in samples:
        made = model.predict(sample.image_path, sample.instruction, threshold=0.0)
        save(replace(made, source=str(sample.image_path)), tmp_path / "answers")
    asked = ["analyze", "--model", str(folder), "--data", str(scenes_root), "--out", str(out)]
    result = CliRunner().invoke(app, [*asked, "--predictions", str(tmp_path / "answers")])
    assert result.exit_code == 0, result.output

    summary = json.loads((out / "summary.json").read_text())
    absent = {"concepts": ["activation_patterns", "instance_coverage", "sae_error"]}
    pairs = {"thought_mask", "answer_mask"}
    heatmaps = {"heatmap", "thought_heatmap", "answer_heatmap"}
    if name == "concentration_token":
        pairs |= heatmaps
    else:
        absent["heatmaps"] = ["heatmap", "thought_heatmap", "answer_heatmap"]
    assert summary["absent"] == absent
    assert {path.stem for path in out.glob("*.svg")} == pairs | {"panels", "answer_ranges"}
    with_target = sum(bool(sample.targets) for sample in samples)
    assert {pair: facts["n"] for pair, facts in summary["correlations"].items()} == dict.fromkeys(
        pairs, with_target
    )
    for row in summary["answer_ranges"]:
        assert ("heatmap_iou" in row) == (name == "concentration_token")
    for part, figures in absent.items():
        assert f"the answers show no {part}: {', '.join(figures)}\n" in result.stdout


@pytest.mark.parametrize("option", ["--cards", "--faithfulness"])
def test_what_needs_concepts_is_refused_before_anything_is_answered(
    option: str, tiny_model: Path, scenes_root: Path, tmp_path: Path
) -> None:
    folder = write_other("latent_query", tiny_model, tmp_path / "model")
    asked = ["analyze", "--model", str(folder), "--data", str(scenes_root), option]
    asked += ["--out", str(tmp_path / "out"), "--predictions", str(tmp_path / "answers")]
    result = CliRunner().invoke(app, asked)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: a model of the interface latent_query has no concepts" in result.stderr
    assert not (tmp_path / "answers").exists() and not (tmp_path / "out").exists()
