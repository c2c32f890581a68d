"""The release's recipe, value by value, and how it goes together with a file's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from segcompass.interfaces.concept_slots import HeadConfig
from segcompass.io.errors import ConfigError
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.stages import JointStage


def written(folder: Path, **joint: Any) -> Path:
    settings = {
        "run": "runs/x",
        "data": {"root": "d"},
        "train_sae": {"steps": 2, "learning_rate": 0.001},
        "train_joint": {"steps": 100, **joint},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def release(folder: Path, *overrides: str, **joint: Any) -> RunConfig:
    return load_config(written(folder, recipe="release", **joint), list(overrides))


def confidence_of(config: RunConfig) -> str:
    assert isinstance(config.head, HeadConfig)
    return config.head.mapper.confidence


def losses(joint: JointStage, step: int) -> tuple[float, float, float]:
    """Weights of dice on the masks, dice on the heatmaps and focal loss, within L_seg."""
    told = joint.weights(step)
    names = ("dice", "heatmap_dice", "focal")
    return tuple(round(told[name] / told["heatmap_bce"], 6) for name in names)  # type: ignore[return-value]


def test_the_release_is_another_recipe_than_the_paper(tmp_path: Path) -> None:
    found, paper = release(tmp_path), load_config(written(tmp_path, learning_rate=2e-6))
    assert (confidence_of(found), confidence_of(paper)) == ("query", "scores")
    assert (found.policy.use.prompt.slots, paper.policy.use.prompt.slots) == (4, 6)
    assert found.train_sae and paper.train_sae
    assert (found.train_sae.threshold, paper.train_sae.threshold) == (2.0, 0.0)
    ours, theirs = found.train_joint, paper.train_joint
    assert ours.learning_rate == 1.6e-6
    assert (ours.seg_weight, theirs.seg_weight) == (0.3, 1.0)
    assert losses(ours, 0) == losses(ours, 49) == (0.8, 0.8, 0.0)
    assert losses(ours, 50) == losses(ours, 99) == (2.0, 2.0, 5.0)
    assert losses(theirs, 0) == losses(theirs, 99) == (0.6, 0.0, 0.0)
    assert (ours.rewards.single, ours.rewards.several) == ("blend", "size")
    assert (theirs.rewards.single, ours.rewards.mask) == ("soft_iou", 0.7)


def test_what_the_file_says_goes_before_the_recipe(tmp_path: Path) -> None:
    settings = ["policy.use.prompt.slots=6", "head.codebook_width=64", "train_sae.threshold=0.5"]
    mine = {"seg_weight": 0.5, "rewards": {"several": "matched"}, "late": {"from_step": 10}}
    found = release(tmp_path, *settings, **mine)
    assert found.policy.use.prompt.slots == 6
    assert found.train_sae and found.train_sae.threshold == 0.5
    assert isinstance(found.head, HeadConfig) and found.head.codebook_width == 64
    joint = found.train_joint
    assert (confidence_of(found), joint.seg_weight) == ("query", 0.5)
    assert (joint.rewards.single, joint.rewards.several) == ("blend", "matched")
    assert (losses(joint, 9), losses(joint, 10)) == ((0.8, 0.8, 0.0), (2.0, 2.0, 5.0))
    assert release(tmp_path, late=None).train_joint.late is None
    for config in (found, release(tmp_path)):
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_model_to_start_from_keeps_its_parts(tmp_path: Path) -> None:
    found = release(tmp_path, start="some/model")
    assert (found.train_joint.seg_weight, found.train_joint.rewards.single) == (0.3, "blend")
    assert "head" not in found.model_fields_set and "policy" not in found.model_fields_set


def test_a_run_without_an_sae_stage_gets_none(tmp_path: Path) -> None:
    assert release(tmp_path, "train_sae=null").train_sae is None


def test_the_recipe_is_of_one_interface(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"release is that of concept_slots.*latent_query"):
        release(tmp_path, "interface=latent_query")


def test_a_mistake_is_named_as_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_joint.steps is missing"):
        path = written(tmp_path, recipe="release")
        path.write_text(path.read_text().replace("steps: 100", "seg_weight: 1"))
        load_config(path)
    with pytest.raises(ConfigError, match=r"did you mean 'seg_weight'"):
        release(tmp_path, seg_wait=1)
