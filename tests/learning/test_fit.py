"""Parts of another backbone are named before they are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import LAYERS, WIDTH, tiny_llava_policy, tiny_qwen_policy, tiny_sae

from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.config import PolicySource
from segcompass.learning.fit import check_policy, check_sae
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
