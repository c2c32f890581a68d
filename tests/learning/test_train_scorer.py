"""The scorer's stage: balanced draws, the margin it finds, and a run killed and resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import write_preset
from recipes import stage, write_config
from safetensors.torch import load_file
from tiny import tiny_llava_policy

from segcompass import SegCompass
from segcompass.data.samples import read_dataset
from segcompass.interfaces.candidate_rerank import CandidateRerank
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning import train
from segcompass.learning.config import load_config
from segcompass.learning.engine.loop import Loop
from segcompass.learning.train_scorer import balanced_indices, source_of
from segcompass.reasoning.backbones import LlavaBackbone, QwenBackbone
from segcompass.reasoning.prompts import SCORE_TEMPLATES
from segcompass.reasoning.scorer import PolicyScorer

SCORER = "scorer/model.safetensors"


def test_every_score_is_drawn_about_equally_often_and_by_step_alone() -> None:
    scores = [0] * 90 + [5] * 9 + [9]
    drawn = [i for step in range(300) for i in balanced_indices(step, 4, scores, seed=1)]
    shares = Counter(scores[i] for i in drawn)
    assert set(shares) == {0, 5, 9}
    # 1200 draws, a third each: four standard deviations are 65
    assert all(abs(count - 400) < 65 for count in shares.values())
    assert balanced_indices(7, 4, scores, 1) == balanced_indices(7, 4, scores, 1)
    assert balanced_indices(7, 4, scores, 1) != balanced_indices(8, 4, scores, 1)


def recipe(folder: Path, data: Path, start: Path | None, **changes: Any) -> Path:
    """A config of the scorer's stage alone."""
    sources = ["direct", "slot", "heatmap"]
    head = {"candidates": {"sources": sources, "best_of_three": False}}
    start_at = None if start is None else str(start)
    scorer = stage(samples=5, together=2, held_out=0.2, start=start_at)
    changes = {"interface": "candidate_rerank", "head": head, "train_scorer": scorer, **changes}
    return write_config(folder, data, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path, tiny_model: Path) -> Path:
    """The run's folder; do not write to it."""
    path = recipe(tmp_path_factory.mktemp("scorer"), scenes_root, tiny_model)
    train.run("all", path, [], resume=False)
    return path.parent / "run"


def test_the_judge_has_learned_and_the_source_is_as_it_was(
    finished: Path, tiny_model: Path
) -> None:
    for part in ("policy/model.safetensors", "segmenter/model.safetensors", "head.safetensors"):
        mine, was = load_file(finished / "model" / part), load_file(tiny_model / part)
        same = (torch.equal(tensor, was[name].to(tensor.dtype)) for name, tensor in mine.items())
        assert all(same) and mine.keys() == was.keys(), part
    judge = load_file(finished / "model" / SCORER)
    was = load_file(tiny_model / "policy/model.safetensors")
    assert sum(not torch.equal(judge[name].float(), was[name].float()) for name in was) > 10
    model = SegCompass.from_pretrained(finished / "model", device="cpu")
    assert isinstance(model.interface, CandidateRerank) and model.interface.source.sae is not None
    image = np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    assert model.predict(image, "the red mug").candidates is not None


def test_the_margin_is_saved_with_the_model_and_the_source_stands(finished: Path) -> None:
    told = json.loads((finished / "stages/scorer/margin.json").read_text())
    model = SegCompass.from_pretrained(finished / "model", device="cpu")
    assert isinstance(model.interface, CandidateRerank)
    # One question apart is too little to show that a judge is worth anything.
    assert (told["questions"], told["given"], told["margin"]) == (1, False, 1.0)
    assert model.interface.config.margin == 1.0
    assert 0 <= told["source"] == told["chosen"] <= told["best_candidate"] <= 1
    image = np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    mine = model.predict(image, "the red mug", threshold=0.4)
    source = SegCompass(model.policy, model.encoder, model.interface.source)
    plain = source.predict(image, "the red mug", threshold=0.4)
    assert np.array_equal(mine.slot_masks, plain.slot_masks)
    assert np.array_equal(mine.slot_scores, plain.slot_scores) and mine.status == plain.status


def test_a_margin_that_is_given_wins(scenes_root: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, scenes_root, tiny_model)
    train.run("scorer", path, ["head.margin=0.25", "train_scorer.steps=1"], resume=False)
    told = json.loads((tmp_path / "run/stages/scorer/margin.json").read_text())
    assert (told["margin"], told["given"]) == (0.25, True)
    bound = json.loads((tmp_path / "run/model/segcompass.json").read_text())["config"]
    assert bound["head"]["margin"] == 0.25


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    finished: Path, scenes_root: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = recipe(tmp_path, scenes_root, tiny_model)
    folder, whole = tmp_path / "run/stages/scorer", finished / "stages/scorer"
    with monkeypatch.context() as patch:  # while candidates are collected …
        patch.setattr(SegCompass, "predict_batch", _fails_after(2, SegCompass.predict_batch))
        with pytest.raises(KeyboardInterrupt):
            train.run("scorer", path, [], resume=False)
    part = folder / "candidates.rank0.jsonl"
    assert len(part.read_text().splitlines()) == 4
    with part.open("a") as file:
        file.write('{"index": 4, "sample": "torn')
    for kind, name, calls in ((Loop, "save", 1), (PolicyScorer, "score", 0)):  # … learns, judges
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, _fails_after(calls, getattr(kind, name)))
            with pytest.raises(KeyboardInterrupt):
                train.run("scorer", path, [], resume=True)
    train.run("scorer", path, [], resume=True)
    for name in ("candidates.jsonl", "margin.json"):
        assert (folder / name).read_text() == (whole / name).read_text()
    mine, other = (load_file(run / "model" / SCORER) for run in (tmp_path / "run", finished))
    assert all(torch.equal(mine[name], other[name]) for name in other)


def _fails_after(calls: int, function: Any) -> Any:
    """The function, interrupted when it is called once more than ``calls`` times."""
    left = [calls]

    def limited(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*arguments, **options)

    return limited


def candidates_of(run: Path) -> list[str]:
    """The lines that a finished run has kept."""
    return (run / "stages/scorer/candidates.jsonl").read_text().splitlines()


def keep(folder: Path, *lines: str) -> Path:
    """Put kept lines where a run in a folder will find them; returns the stage's folder."""
    stage_folder = folder / "run/stages/scorer"
    stage_folder.mkdir(parents=True)
    (stage_folder / "candidates.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return stage_folder


def test_candidates_of_another_choice_are_refused(
    finished: Path, scenes_root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, scenes_root, tiny_model)
    keep(tmp_path, *candidates_of(finished))
    with pytest.raises(ConfigError, match="another model or choice"):
        train.run("scorer", path, ["head.candidates.each=1"], resume=False)


def test_candidates_of_a_judge_that_was_trained_on_other_questions_are_refused(
    finished: Path, scenes_root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, scenes_root, tiny_model)
    head, *rows = candidates_of(finished)
    drawn = {name: value for name, value in json.loads(head).items() if name != "held_out"}
    folder = keep(tmp_path, json.dumps(drawn), *rows)
    with pytest.raises(ConfigError, match=f"another model or choice .* delete {folder}"):
        train.run("scorer", path, [], resume=False)


def test_the_margin_is_found_on_the_last_questions(
    finished: Path, scenes_root: Path, tiny_model: Path
) -> None:
    lines = (finished / "stages/scorer/candidates.jsonl").read_text().splitlines()
    ids = [sample.sample_id for sample in read_dataset(scenes_root, "train")]
    assert [json.loads(line)["sample"] for line in lines[1:]] == [*ids[:4], *ids[-1:]]
    assert json.loads(lines[0])["held_out"] == 1


def test_a_second_policy_of_another_family_judges(
    scenes_root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    judge = tiny_llava_policy(tmp_path / "llava", seed=5)
    path = recipe(tmp_path, scenes_root, tiny_model)
    changes = [f"train_scorer.judge={judge}", "train_scorer.steps=1"]
    slow = "train_scorer.learning_rate=0.000001"
    train.run("scorer", path, [*changes, slow, "policy.dtype=float32"], resume=False)
    mine, was = load_file(tmp_path / "run/model" / SCORER), load_file(judge / "model.safetensors")
    assert mine.keys() == was.keys()
    assert all(torch.allclose(mine[name], was[name], atol=1e-4) for name in was)
    model = SegCompass.from_pretrained(tmp_path / "run/model", device="cpu")
    assert isinstance(model.interface, CandidateRerank) and model.interface.judge is not None
    assert isinstance(model.interface.judge.backbone, LlavaBackbone)
    assert isinstance(model.policy.backbone, QwenBackbone)
    asked = model.interface.judge.config
    assert asked == model.interface.config.scorer
    assert asked.prompt.template == SCORE_TEMPLATES["llava"]
    image = np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    assert model.predict(image, "the red mug").candidates is not None


def test_a_judge_that_is_not_there_is_named(
    scenes_root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, scenes_root, tiny_model)
    with pytest.raises(CheckpointError, match="nowhere is no usable policy"):
        train.run("scorer", path, [f"train_scorer.judge={tmp_path}/nowhere"], resume=False)


def test_a_preset_finds_candidates_for_a_copy_of_its_policy(
    scenes_root: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path / "preset")
    path = recipe(tmp_path, scenes_root, preset)
    train.run("scorer", path, ["train_scorer.steps=1", "policy.dtype=float32"], resume=False)
    mine = load_file(tmp_path / "run/model" / SCORER)
    was = load_file(tmp_path / "preset/Seg-Zero-tiny/model.safetensors")
    policy = load_file(tmp_path / "run/model/policy/model.safetensors")
    assert any(not torch.equal(mine[name], was[name]) for name in was)
    assert all(torch.equal(policy[name], was[name]) for name in was)
    model = SegCompass.from_pretrained(tmp_path / "run/model", device="cpu")
    assert isinstance(model.interface, CandidateRerank) and model.interface.judge is not None
    assert model.interface.source.name == "text_readout"
    assert model.interface.judge.config.prompt.template == SCORE_TEMPLATES["qwen2_5_vl"]


def test_stages_and_the_config_of_the_source(scenes_root: Path, tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path, scenes_root, None))
    assert train.stages_of(config) == ["segmenter", "warmup", "sae", "joint", "scorer"]
    assert source_of(config).interface == "concept_slots"
    assert source_of(config).head == config.head.head
    given = load_config(tmp_path / "tiny.yaml", [f"train_scorer.start={tmp_path}"])
    assert train.stages_of(given) == ["scorer"]
    with pytest.raises(ConfigError, match="train joint"):
        train.run_scorer(config)
    plain = config.model_copy(update={"train_scorer": None})
    with pytest.raises(ConfigError, match="no section train_scorer"):
        train.run_scorer(plain)
