"""Parts of another backbone are named before they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import LAYERS, WIDTH, policy_config, tiny_llava_policy, tiny_qwen_policy, tiny_sae

from segcompass.io.assets import MissingAssetError
from segcompass.io.checkpoints import BINDING
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.arms import Experiment
from segcompass.learning.config import PolicySource, RunConfig, load_config, read_settings
from segcompass.learning.fit import (
    check_pixels,
    check_policy,
    check_sae,
    check_start,
    picture_limits,
)
from segcompass.learning.train import start_policy, warm_policy
from segcompass.model_folder import ModelConfig
from segcompass.reasoning.from_scratch import ScratchConfig
from segcompass.reasoning.policy import PolicyConfig


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_policy(tmp_path_factory.mktemp("qwen") / "policy")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_policy(tmp_path_factory.mktemp("llava") / "policy")


def source(of: Path | str, layer: int = 1, **scratch: int) -> PolicySource:
    use = PolicyConfig(sae_layer=layer)
    return PolicySource(source=str(of), use=use, scratch=ScratchConfig(**scratch))


def test_a_policy_of_the_same_backbone_fits(qwen: Path, llava: Path) -> None:
    for folder in (qwen, llava):
        check_policy(source(folder), folder)
        check_policy(source(folder))
    check_policy(source("scratch", width=WIDTH, layers=LAYERS), qwen)


def test_a_policy_of_another_family_is_named(qwen: Path, llava: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{qwen} holds a qwen2_5_vl .*llava.* is a llava"):
        check_policy(source(llava), qwen)


@pytest.mark.parametrize("sizes", [{"width": 64, "layers": LAYERS}, {"width": WIDTH, "layers": 4}])
def test_a_policy_of_other_sizes_is_named(sizes: dict[str, int], qwen: Path) -> None:
    wanted = f"is a qwen2_5_vl of width {sizes['width']} with {sizes['layers']} layers"
    with pytest.raises(CheckpointError, match=rf"of width {WIDTH} with {LAYERS} layers.*{wanted}"):
        check_policy(source("scratch", **sizes), qwen)


def test_a_layer_that_is_not_there_is_named(qwen: Path) -> None:
    check_policy(source(qwen, layer=LAYERS - 1))
    with pytest.raises(ConfigError, match=rf"sae_layer is {LAYERS}.*from 0 to {LAYERS - 1}"):
        check_policy(source(qwen, layer=LAYERS))


def test_what_cannot_be_told_is_left_to_loading(tmp_path: Path, qwen: Path) -> None:
    check_policy(source("someone/a-model-that-is-not-here"), qwen)
    check_policy(source(tmp_path / "nothing"), tmp_path / "nothing either")
    check_sae(tmp_path, WIDTH, 1)
    (tmp_path / "cfg.json").write_text("{")
    check_sae(tmp_path, WIDTH, 1)


def test_an_sae_of_another_policy_is_named(tmp_path: Path) -> None:
    tiny_sae().save(tmp_path, {"hook_layer": 1})
    check_sae(tmp_path, WIDTH, 1)
    with pytest.raises(CheckpointError, match=rf"cfg\.json .* width {WIDTH}, .* are 64 wide"):
        check_sae(tmp_path, 64, 1)
    with pytest.raises(CheckpointError, match=r"reads layer 1, .*sae_layer is 2; train the SAE"):
        check_sae(tmp_path, WIDTH, 2)


def test_an_sae_that_does_not_say_its_layer_is_taken(tmp_path: Path) -> None:
    tiny_sae().save(tmp_path)
    assert "hook_layer" not in json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    check_sae(tmp_path, WIDTH, 7)


def limited(pixels: list[int] | None, source: Path | str = "scratch") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": "run",
            "data": {"root": "d", "image_pixels": pixels},
            "policy": {"source": str(source), "use": policy_config("qwen2_5_vl").model_dump()},
            "train_joint": {"steps": 1, "learning_rate": 1e-3},
        }
    )


def test_limits_on_pictures_are_those_of_the_warm_policy(qwen: Path, llava: Path) -> None:
    check_pixels(limited([1024, 4096], qwen), qwen)
    check_pixels(limited([1, 2], qwen))  # to be warmed up: it gets them
    check_pixels(limited(None, qwen), qwen)
    check_pixels(limited(None), qwen)
    with pytest.raises(ConfigError, match=rf"is \[1024, 9999\], but {qwen} .* \[1024, 4096\]; set"):
        check_pixels(limited([1024, 9999], qwen), qwen)
    with pytest.raises(ConfigError, match=rf"is \[1, 2\], but {llava} .* one size for all"):
        check_pixels(limited([1, 2], llava), llava)


def test_a_policy_from_scratch_has_no_limits_on_pictures() -> None:
    with pytest.raises(ConfigError, match=r"scratch sees .* at 128x128 px; take .*pixels out"):
        check_pixels(limited([3136, 705600]))


def test_a_policy_is_never_loaded_with_other_limits(qwen: Path, tmp_path: Path) -> None:
    config = limited([1024, 9999], qwen).model_copy(update={"run": tmp_path})
    assert warm_policy(config).backbone.image_processor.size["longest_edge"] == 9999
    shutil.copytree(qwen, tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"is \[1024, 9999\], but"):
        warm_policy(config)
    with pytest.raises(ConfigError, match="scratch sees"):
        start_policy(limited([1, 2]))


# A model to start from -------------------------------------------------------------------------


def starting(start: Path | str, **settings: Any) -> RunConfig:
    """A config of the joint stage alone, with these settings beside what it has to have."""
    data = settings.pop("data", {})
    joint = {"steps": 1, "learning_rate": 1e-3, "start": str(start)}
    return RunConfig.model_validate(
        {"run": "run", "data": {"root": "d", **data}, "train_joint": joint, **settings}
    )


def test_a_start_without_any_word_on_its_parts_is_taken(
    tiny_model: Path, tiny_llava_model: Path
) -> None:
    for folder in (tiny_model, tiny_llava_model):
        check_start(starting(folder))
        check_start(starting(folder, policy={"source": "scratch", "scratch": {"width": 8}}))


def test_equal_settings_beside_a_start_are_taken(tiny_model: Path) -> None:
    model = ModelConfig.model_validate(json.loads((tiny_model / BINDING).read_text())["config"])
    size = json.loads((tiny_model / "policy/preprocessor_config.json").read_text())["size"]
    check_start(
        starting(
            tiny_model,
            policy={"source": str(tiny_model / "policy"), "use": model.policy.model_dump()},
            head=model.head.model_dump(),
            data={"image_pixels": [size["shortest_edge"], size["longest_edge"]]},
        )
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head": {"codebook_width": 99}}, r"head\.codebook_width is \d+ there, 99 in the config"),
        (
            {"head": {"mapper": {"confidence": "query"}}},
            r"head\.mapper\.confidence is 'scores' there, 'query' in the config",
        ),
        ({"policy": {"use": {"sae_layer": 0}}}, r"policy\.use\.sae_layer is 1 there, 0 in"),
        (
            {"policy": {"use": {"prompt": {"slots": 3}}}},
            r"policy\.use\.prompt\.slots is 6 there, 3 in",
        ),
        (
            {"data": {"image_pixels": [16, 99]}},
            r"data\.image_pixels is \[.*\] there, \[16, 99\] in",
        ),
    ],
)
def test_a_setting_that_a_start_would_ignore_is_named(
    settings: dict[str, Any], told: str, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{tiny_model} keeps its own parts, but {told}"):
        check_start(starting(tiny_model, **settings))


def test_a_start_with_another_policy_is_named(
    tiny_model: Path, tiny_llava_model: Path, llava: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"is a qwen2_5_vl of .* there, {llava} \(llava of"):
        check_start(starting(tiny_model, policy={"source": str(llava)}))
    check_start(starting(tiny_llava_model, policy={"source": str(llava)}))
    check_start(starting(tiny_model, policy={"source": "someone/not-here"}))
    with pytest.raises(ConfigError, match=rf"{llava.parent} \(no policy\)"):
        check_start(starting(tiny_model, policy={"source": str(llava.parent)}))
    with pytest.raises(ConfigError, match=r"is one size for all there, \[1, 2\]"):
        check_start(starting(tiny_llava_model, data={"image_pixels": [1, 2]}))


def test_a_start_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingAssetError, match="nothing is not a folder"):
        check_start(starting(tmp_path / "nothing"))
    for content in ("", "{}", '{"config": {"wrong": 1}}'):
        (tmp_path / BINDING).write_text(content)
        with pytest.raises(CheckpointError, match=BINDING):
            check_start(starting(tmp_path))


def test_a_damaged_image_processor_is_named(tmp_path: Path) -> None:
    assert picture_limits(tmp_path) is None
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"min_pixels": 3, "max_pixels": 9}')  # as Qwen's own checkpoints have them
    assert picture_limits(tmp_path) == (3, 9)
    path.write_text('{"size": {"shortest_edge": 336}}')  # CLIP's: no limit
    assert picture_limits(tmp_path) is None
    path.write_text('{"size": {')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read"):
        picture_limits(tmp_path)


def test_shipped_configs_that_go_on_from_nano_keep_its_parts(tmp_path: Path) -> None:
    """Ablations name nano's own config beside their start: `scratch`, and how it is used."""
    configs = Path(__file__).parents[2] / "configs"
    found = [load_config(configs / "nano-rl.yaml")]
    for path in sorted(configs.glob("ablations/*.yaml")):
        raw = read_settings(path)
        experiment = Experiment.model_validate({**raw, "config": configs / "nano.yaml"})
        found += [RunConfig.model_validate(experiment.settings(n, 0)) for n in experiment.arms]
    starting = [config for config in found if config.train_joint.start is not None]
    assert len(starting) > 5
    for config in starting:
        joint = config.train_joint.model_copy(update={"start": Path("nano")})
        check_start(config.model_copy(update={"train_joint": joint}))
