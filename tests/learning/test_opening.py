"""What a run refuses before its first stage, and what it does not look for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from recipes import write_config, write_llava_config
from tiny import tiny_model_folder, tiny_qwen_policy

from segcompass.data.instances import SIDE_FILE
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import CheckpointError, ConfigError, DataError
from segcompass.learning import opening, train
from segcompass.learning.config import load_config


@pytest.fixture
def no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins a stage has not looked well enough."""
    for name in train.STAGES:
        monkeypatch.setitem(train.STAGES, name, lambda _: pytest.fail("a stage was begun"))


def run(path: Path, *settings: str, stage: str = "all") -> None:
    train.run(stage, path, list(settings), resume=False)


@pytest.mark.usefixtures("no_stage")
@pytest.mark.parametrize("kind", ["scratch", "folder"])
def test_an_instruction_over_the_limit_ends_a_run_at_once(
    kind: str, scenes_root: Path, tmp_path: Path
) -> None:
    write = write_config if kind == "scratch" else write_llava_config
    path = write(tmp_path, scenes_root)
    with pytest.raises(DataError, match=r"instruction\).*has \d+ tokens, the limit is 2"):
        run(path, "policy.use.prompt.max_instruction_tokens=2")


def test_the_stages_do_not_look_again(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt that is made beforehand is the one that warm-up makes."""
    config = load_config(write_config(tmp_path, scenes_root))
    opening.check_data(config, list(train.STAGES))
    found = (config.run / "checked.json").read_text()
    policy = train.start_policy(config)
    train.training_samples(config.data, policy.prompt, config.run)
    assert (config.run / "checked.json").read_text() == found
    assert found.count('": []') == 2  # one look with, one without a prompt; nothing was found


@pytest.mark.usefixtures("no_stage")
@pytest.mark.parametrize(
    ("package", "setting"),
    [("peft", "train_joint.lora={rank: 2}"), ("vllm", "train_joint.rollout.backend=vllm")],
)
def test_a_package_that_a_later_stage_needs_is_missed_at_once(
    package: str,
    setting: str,
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    path = write_config(tmp_path, scenes_root)
    with pytest.raises(ConfigError, match=f"needs {package}, which is not installed: pip install"):
        run(path, setting)
    assert not (tmp_path / "run").exists()
    opening.check_settings(load_config(path, [setting]), ["segmenter"])  # which does not need it


@pytest.mark.usefixtures("no_stage")
def test_a_start_that_will_not_do_is_named_at_once(scenes_root: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, scenes_root)
    with pytest.raises(MissingAssetError, match="nothing is not a folder"):
        run(path, f"train_joint.start={tmp_path / 'nothing'}")
    start = f"train_joint.start={tiny_model_folder(tmp_path / 'model')}"
    with pytest.raises(ConfigError, match="is a model of the interface concept_slots"):
        run(path, start, "interface=latent_query", "head={}", "train_sae=null")
    with pytest.raises(ConfigError, match=r"keeps its own parts, but head\.codebook_width"):
        run(path, start, "head.codebook_width=99")


@pytest.mark.usefixtures("no_stage")
def test_an_answer_that_the_interface_cannot_read_is_named_at_once(
    scenes_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"reads answers of the form slots, .* asks for objects"):
        run(write_config(tmp_path, scenes_root), "policy.use.prompt.form=objects")


@pytest.mark.usefixtures("no_stage")
def test_documents_that_are_not_there_are_missed_at_once(scenes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-documents does not exist"):
        run(
            write_config(tmp_path, scenes_root),
            f"train_sae.documents.root={tmp_path / 'no-documents'}",
        )


@pytest.mark.usefixtures("no_stage")
def test_a_policy_without_a_tokenizer_is_named_at_once(scenes_root: Path, tmp_path: Path) -> None:
    path = write_llava_config(tmp_path, scenes_root)
    (tmp_path / "llava/tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="llava has no usable tokenizer"):
        run(path)


def test_what_is_there_already_is_read_with_its_own_tokenizer(
    warm_config: Path, tmp_path: Path
) -> None:
    """Of the warm policy, or of the model to start from; without either a stage says what lacks."""
    tight = ["policy.use.prompt.max_instruction_tokens=2"]
    with pytest.raises(DataError, match="the limit is 2"):
        opening.check_data(load_config(warm_config, tight), ["joint"])
    alone = load_config(warm_config, [*tight, f"run={tmp_path}"])
    opening.check_data(alone, ["joint"])
    start = tiny_model_folder(tmp_path / "model")
    opening.check_data(load_config(warm_config, [f"train_joint.start={start}"]), ["joint"])


# Data without chains of thought ----------------------------------------------------------------


@pytest.fixture
def bare(scenes_root: Path, tmp_path: Path) -> Path:
    """The scenes as RefCOCO would have them: questions and masks, and nobody's reasons."""
    root = tmp_path / "bare"
    shutil.copytree(scenes_root, root)
    for side in root.rglob(SIDE_FILE):
        side.unlink()
    return root


@pytest.mark.usefixtures("no_stage")
def test_data_without_thoughts_has_nothing_for_the_language_stage(
    bare: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, bare, train_vision=None)
    with pytest.raises(ConfigError, match=rf"none of the \d+ samples of {bare} has one; take"):
        run(path)
    opening.check_data(load_config(path, ["train_language=null"]), ["warmup", "joint"])


@pytest.mark.usefixtures("no_stage")
@pytest.mark.parametrize("teaches", ["oracle_steps=1", "rehearse=true"])
def test_an_empty_thought_is_never_taught(teaches: str, bare: Path, tmp_path: Path) -> None:
    joint = {"steps": 2, "batch": 2, "learning_rate": 1e-3}
    path = write_config(tmp_path, bare, train_language=None, train_joint=joint)
    settings = ["train_joint.language_weight=0.5", f"train_joint.{teaches}"]
    with pytest.raises(ConfigError, match=rf"is 0\.5, .* of {bare} have no chain .*_weight: 0"):
        run(path, *settings)
    for harmless in settings:  # no language loss, or the policy's own answers alone
        opening.check_data(load_config(path, [harmless]), ["joint"])


def test_only_the_samples_that_are_trained_on_need_a_thought(
    bare: Path, scenes_root: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, scenes_root)
    mixed = [f"data.also=[{{root: {bare}, limit: 3}}]", "train_joint.language_weight=1"]
    opening.check_data(load_config(path, mixed), ["warmup"])  # which leaves the others out
    with pytest.raises(ConfigError, match=rf"3 of \d+ samples of {scenes_root}, {bare} have no"):
        opening.check_data(load_config(path, mixed), ["joint"])
    opening.check_data(load_config(path, [*mixed, "train_joint.samples=4"]), ["joint"])


# Limits on pictures ----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_stage")
def test_limits_on_pictures_that_would_change_nothing_are_named_at_once(
    scenes_root: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, scenes_root)
    with pytest.raises(ConfigError, match=r"is \[1024, 4096\], but .*scratch .* 64x64 px"):
        run(path, "data.image_pixels=[1024,4096]")
    folder = tiny_qwen_policy(tmp_path / "run/policy")  # as warm-up left it
    wide = [f"policy.source={folder}", "data.image_pixels=[1024,16384]"]
    told = rf"\[1024, 16384\], but {folder} was trained with \[1024, 4096\]"
    for stage in ("sae", "joint"):
        with pytest.raises(ConfigError, match=told):
            run(path, *wide, stage=stage)
    same = load_config(path, [wide[0], "data.image_pixels=[1024,4096]"])
    opening.check_settings(same, ["sae", "joint"])
    opening.check_settings(load_config(path, wide), ["segmenter", "warmup"])  # warms up anew
