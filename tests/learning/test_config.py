"""Configs: what is read, and what a person is told who mistypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from segcompass.io.errors import ConfigError
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.stages import JointStage

SMALLEST = """
run: runs/x
data: {root: d}
train_sae: {steps: 2, learning_rate: 0.001}
train_joint: {steps: 2, learning_rate: 0.001}
"""


def write(folder: Path, text: str = SMALLEST) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str = SMALLEST, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.run == Path("runs/x")
    assert config.train_joint.multipliers.decoder == 1.0
    assert config.train_vision is None


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["train_vision.steps=5", "train_vision.learning_rate=1"])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_shipped_config_is_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert "nano.yaml" in [path.name for path in paths]
    for path in paths:
        assert load_config(path).run.name == path.stem


@pytest.mark.parametrize("text", ["3e-5", "3E-5", "3.0e-5", "0.00003", "'3e-5'"])
def test_small_numbers_are_numbers_however_written(text: str, tmp_path: Path) -> None:
    """PyYAML takes 3e-5 for text."""
    path = write(tmp_path, SMALLEST.replace("0.001", text, 1))
    assert load_config(path).train_sae.learning_rate == 3e-5
    changed = load_config(path, [f"train_joint.learning_rate={text}"])
    assert changed.train_joint.learning_rate == 3e-5


def test_yaml_really_has_that_trap() -> None:
    assert yaml.safe_load("3e-5") == "3e-5"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("steps", "stpes", r"train_sae.stpes: unknown key; did you mean 'steps'?"),
        ("run:", "Run: y\nrun:", r"Run: unknown key; did you mean 'run'?"),
        ("root", "rot", "data.rot: unknown key; did you mean 'root'?"),
        ("{root: d}", "{root: d, zzz: 1}", "data.zzz: unknown key; known are root, layout, split"),
        ("data: {root: d}", "", "data is missing"),
        ("steps: 2", "steps: 0", "train_sae.steps: Input should be greater than or equal to 1"),
        ("steps: 2", "steps: two", "got 'two'"),
        ("steps: 2", "steps: 2.5", "got 2.5"),
        ("0.001", "fast", "train_sae.learning_rate: Input should be a valid number"),
        ("0.001", ".inf", "train_sae.learning_rate: Input should be a finite number, got inf"),
        ("0.001", "-1", "got -1"),
    ],
)
def test_a_mistake_is_named_with_its_place(old: str, new: str, told: str, tmp_path: Path) -> None:
    message = complaint(tmp_path, SMALLEST.replace(old, new, 1))
    assert message.startswith(str(tmp_path / "run.yaml"))
    assert told in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "train_joint={steps: 1, learning_rate: 1, drop_tokens: 1, drop_concepts: 1}",
            "of the same",
        ),
        ("interface=candidate_rerank", "train_scorer go together"),
    ],
)
def test_settings_that_do_not_go_together_are_not_all_printed(
    override: str, told: str, tmp_path: Path
) -> None:
    message = complaint(tmp_path, SMALLEST, override)
    assert told in message
    assert not any(word in message for word in ("Value error", ", got {", ": :"))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("policy.scratch.widht=4", "width"),
        ("policy.use.prompt.slot=4", "slots"),
        ("head.mapper.head=4", "heads"),
        ("data.scenes.testa=4", "testA"),
        ("train_joint.multipliers.polcy=0.1", "policy"),
    ],
)
def test_a_typo_deep_inside_gets_the_key_of_that_section(
    typo: str, meant: str, tmp_path: Path
) -> None:
    key = typo.partition("=")[0]
    assert f"{key}: unknown key; did you mean {meant!r}?" in complaint(tmp_path, SMALLEST, typo)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["interface=candidate_rerank", "head.head.codebook_widht=3"],
            "head.head.codebook_widht: unknown key; did you mean 'codebook_width'?",
        ),
        (
            ["interface=candidate_rerank", "head.head.mapper.head=3"],
            "head.head.mapper.head: unknown key; did you mean 'heads'?",
        ),
        (
            [
                *("interface=candidate_rerank", "head.interface=latent_query"),
                "head.head.confidence_widht=3",
            ],
            "head.head.confidence_widht: unknown key; did you mean 'confidence_width'?",
        ),
        (
            ["interface=candidate_rerank", "head.scorer.prompt.slot=3"],
            "head.scorer.prompt.slot: unknown key; did you mean 'slots'?",
        ),
        (
            ["interface=text_readout", "head.canvas={sied: 3}"],
            "head.canvas.sied: unknown key; did you mean 'side'?",
        ),
    ],
)
def test_so_does_a_typo_among_the_settings_of_an_interface(
    overrides: list[str], told: str, tmp_path: Path
) -> None:
    """Whose settings they are depends on the interface that is named beside them."""
    assert told in complaint(tmp_path, SMALLEST, *overrides)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, SMALLEST, "sed=1", "train_joint.steps=-1")
    assert "did you mean 'seed'" in message and "train_joint.steps" in message


def test_overrides_go_before_the_file(tmp_path: Path) -> None:
    changes = ["train_sae.steps=7", "policy.source=a/b", "threads=null", "run=elsewhere"]
    config = load_config(write(tmp_path), [*changes, "data.scenes={train: 3}"])
    assert config.train_sae.steps == 7
    assert config.policy.source == "a/b"
    assert config.data.scenes is not None and config.data.scenes.train == 3
    assert config.run == Path("elsewhere")


def test_an_override_may_hold_an_equals_sign_and_open_an_empty_section(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "policy:\n")
    assert load_config(path, ["policy.source=a=b"]).policy.source == "a=b"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "not of the form a.b=value"),
        ("=4", "not of the form a.b=value"),
        ("run.x=4", "run is not a section"),
        ("seed=[1", "'[1' is no valid YAML value"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
    ],
)
def test_an_override_that_cannot_be_applied(override: str, told: str, tmp_path: Path) -> None:
    assert told in complaint(tmp_path, SMALLEST, override)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: [", "is no valid YAML"),
        ("- a\n- b", "holds list, expected a mapping"),
        ("", "holds NoneType, expected a mapping"),
        ("!!python/object/apply:os.system ['true']", "is no valid YAML"),
    ],
)
def test_a_file_that_is_no_config(text: str, told: str, tmp_path: Path) -> None:
    assert told in complaint(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist; give the path"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml is no valid YAML"):
        load_config(tmp_path / "latin.yaml")


def test_weights_of_masks_have_a_second_phase() -> None:
    """CoPRS: (dice, focal) from (0.8, 0) to (2, 5); what is not named stays."""
    stage = JointStage.model_validate(
        {
            **{"steps": 9, "learning_rate": 1e-3, "seg_weight": 0.5, "conf_weight": 0.3},
            **{"dice_weight": 0.8, "heatmap_dice_weight": 0.8, "late": {"from_step": 4}},
        }
    )
    names = ("heatmap_bce", "dice", "heatmap_dice", "focal", "confidence")
    assert [stage.weights(3)[n] for n in names] == [0.5, 0.4, 0.4, 0.0, 0.3]
    assert [stage.weights(4)[n] for n in names] == [0.5, 1.0, 1.0, 2.5, 0.3]


def test_a_scorer_and_its_interface_go_together(tmp_path: Path) -> None:
    with_scorer = SMALLEST + "train_scorer: {steps: 2, learning_rate: 0.001}\n"
    assert "go together" in complaint(tmp_path, with_scorer)
    assert "go together" in complaint(tmp_path, SMALLEST, "interface=candidate_rerank")
    assert load_config(write(tmp_path, with_scorer), ["interface=candidate_rerank"]).train_scorer


def test_an_interface_that_there_is_not(tmp_path: Path) -> None:
    told = complaint(tmp_path, SMALLEST, "interface=concept_slot")
    assert "did you mean concept_slots?" in told
    mistakes = ("interface=latent_qery", "head.confidence_width=3", "sed=1")
    told = complaint(tmp_path, SMALLEST, *mistakes)
    assert "did you mean latent_query?" in told and "did you mean 'seed'?" in told
    assert "confidence_width" not in told  # whose settings these are cannot be known
    assert "head.codebook_widht" in complaint(tmp_path, SMALLEST, "head.codebook_widht=3")
