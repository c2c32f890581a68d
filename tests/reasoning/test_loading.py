"""Loading policies: what is added, what is ignored, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import policy_config, write_policy
from transformers import AutoTokenizer, BertConfig, BertModel

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.prompts import concentration_tokens


@pytest.fixture
def copy(policy_folder: Path, tmp_path: Path) -> Path:
    """A policy folder that a test may damage."""
    return Path(shutil.copytree(policy_folder, tmp_path / "broken-policy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_concentration_tokens_are_added(policy_folder: Path, policy: Policy) -> None:
    plain = AutoTokenizer.from_pretrained(policy_folder)
    tokens = concentration_tokens(6)
    assert not set(tokens) & set(plain.get_vocab())
    ids = policy.tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(len(plain), len(plain) + 6))
    assert policy.tokenizer.encode("".join(tokens), add_special_tokens=False) == ids
    for module in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings()):
        assert module.weight.shape[0] >= len(policy.tokenizer)
        new = module.weight[ids]
        for number, row in enumerate(new, start=1):
            words = plain.encode(f" object {number}", add_special_tokens=False)
            torch.testing.assert_close(row, torch.stack([module.weight[w] for w in words]).mean(0))
        assert torch.pdist(new).min() > 0  # each its own
    assert policy.model.config.get_text_config().vocab_size >= len(policy.tokenizer)


def test_added_rows_are_the_same_in_every_load(policy_folder: Path, family: str) -> None:
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        policy = load_policy(policy_folder, policy_config(family))
        rows.append(policy.model.get_input_embeddings().weight[policy.prompt.slot_ids])
    assert torch.equal(*rows)


def test_saved_with_its_tokens_it_is_loaded_unchanged(
    policy: Policy, family: str, tmp_path: Path
) -> None:
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy", policy.config)
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    mine, theirs = policy.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_habits_of_a_checkpoint_do_not_change_decoding(copy: Path, family: str) -> None:
    habits = {"num_beams": 3, "repetition_penalty": 1.9, "min_length": 500, "eos_token_id": 7}
    (copy / "generation_config.json").write_text(json.dumps(habits))
    policy = load_policy(copy, policy_config(family))
    found = policy.model.generation_config
    assert found.num_beams in (None, 1)
    assert found.repetition_penalty in (None, 1.0)
    assert not found.min_length
    assert found.eos_token_id == policy.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_a_missing_file_is_named_with_its_folder(copy: Path, family: str, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, -1])
def test_truncated_weights(copy: Path, family: str, keep: float) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_damaged_json(copy: Path, family: str, name: str) -> None:
    (copy / name).write_text('{"a": ')
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


def test_another_architecture(tmp_path: Path) -> None:
    folder = tmp_path / "broken-policy"
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"broken-policy.*'bert'.*qwen2_5_vl, llava"):
        load_policy(folder, policy_config("llava"))


def test_shapes_that_do_not_fit_the_config(copy: Path, family: str) -> None:
    edit_json(copy / "config.json", lambda c: c["text_config"].update(intermediate_size=40))
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_parameters_that_do_not_fit_the_config(copy: Path, family: str, change: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if "down_proj" in n)
    if change == "unknown":
        tensors["language_model.extra.weight"] = tensors[name].clone()
    else:
        del tensors[name]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"broken-policy: .*first difference"):
        load_policy(copy, policy_config(family))


def test_pickled_weights_are_not_read(copy: Path, family: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


def test_code_of_a_checkpoint_is_not_run(copy: Path, family: str) -> None:
    (copy / "evil.py").write_text("raise SystemExit('this ran')")
    edit_json(
        copy / "config.json",
        lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"}),
    )
    with pytest.raises(CheckpointError, match="broken-policy"):
        load_policy(copy, policy_config(family))


def test_a_tokenizer_without_padding(copy: Path, family: str) -> None:
    edit_json(copy / "tokenizer_config.json", lambda c: c.update(pad_token=None))
    with pytest.raises(CheckpointError, match=r"broken-policy.*no padding"):
        load_policy(copy, policy_config(family))


def test_settings_that_do_not_fit(policy_folder: Path, family: str) -> None:
    with pytest.raises(CheckpointError, match=f"{policy_folder}.*layers 0 to 2"):
        load_policy(policy_folder, policy_config(family, sae_layer=9))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_policy(tmp_path / "nowhere", policy_config("llava"))


def test_both_families_are_walked(family: str, tmp_path: Path) -> None:
    policy = load_policy(write_policy(tmp_path / "p", family, seed=5), policy_config(family))
    assert policy.model.config.model_type == family
    assert (policy.width, policy.slots, len(policy.backbone.layers)) == (32, 6, 3)
    assert not policy.training
