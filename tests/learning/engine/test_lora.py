"""Adapters: zero at the start, off for the reference, gone after merging."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import launch
from tiny import policy_config, write_policy
from torch import Tensor
from torch.distributed.tensor import DTensor

from segcompass.io.errors import ConfigError
from segcompass.learning.engine import lora
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.engine.lora import (
    LoraSettings,
    add_lora,
    merge_lora,
    merged_state,
    reference,
    upper_layers,
)
from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig
from segcompass.learning.engine.sharding import full_state, shard
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences

pytest.importorskip("peft")
SETTINGS = LoraSettings(rank=2, alpha=6.0)


@pytest.fixture
def policy(family: str, policy_folder: Path) -> Policy:
    """A policy of three layers; the last one reads the SAE layer."""
    made = load_policy(policy_folder, policy_config(family))
    made.requires_grad_(False)
    return made


def question(policy: Policy) -> tuple[Sequences, list[VisualInput]]:
    visual = policy.backbone.prepare(np.full((40, 60, 3), 90, dtype=np.uint8))
    return policy.encode([visual], ["the red mug"], ["There is a mug."]), [visual]


def states(policy: Policy) -> tuple[Tensor, Tensor]:
    """Of the SAE layer and the last one."""
    sequences, visuals = question(policy)
    found, hidden = policy(sequences, visuals)
    return found.sae_states, hidden


def disturb(policy: Policy) -> None:
    """Let the adapters say something, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_adapters_start_at_zero_and_only_they_train(policy: Policy) -> None:
    with torch.no_grad():
        before = states(policy)
        layers = list(policy.backbone.layers)
        add_lora(policy, SETTINGS)
        after = states(policy)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    assert all(a is b for a, b in zip(layers, policy.backbone.layers, strict=True))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "layers.2." in name for name in trained)
    inside = {n for n, _ in policy.backbone.layers[2].named_parameters() if "lora_" in n}
    assert len(inside) == 7 * 2  # seven matrices of the only upper layer; CLIP has none


def test_hooks_generation_and_gradients_work_as_before(policy: Policy) -> None:
    with torch.no_grad():
        before, _ = states(policy)
    add_lora(policy, SETTINGS)
    disturb(policy)
    sae, hidden = states(policy)
    assert torch.equal(sae, before)  # nothing below the SAE layer's output is touched
    hidden.sum().backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    _, visuals = question(policy)
    written = policy.generate(visuals, ["the red mug"], max_new_tokens=4)
    assert written.states.sae_states.shape[-1] == policy.width


def test_the_reference_is_the_policy_as_it_was(policy: Policy) -> None:
    with torch.no_grad():
        _, before = states(policy)
        add_lora(policy, SETTINGS)
        disturb(policy)
        _, now = states(policy)
        with reference(policy):
            _, then = states(policy)
        _, again = states(policy)
    assert torch.equal(then, before)
    assert (now - before).abs().max() > 1e-2
    assert torch.equal(again, now)


def test_the_reference_leaves_what_trains_alone(policy: Policy) -> None:
    """Inside too: a sharded layer takes over what trains in its first pass, whichever it is."""
    add_lora(policy, SETTINGS)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    expected = {n: p.requires_grad for n, p in policy.named_parameters()}
    with reference(policy):
        assert {n: p.requires_grad for n, p in policy.named_parameters()} == expected
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == expected


def test_an_error_switches_the_adapters_on_again(policy: Policy) -> None:
    add_lora(policy, SETTINGS)
    disturb(policy)
    with torch.no_grad():
        _, now = states(policy)
        with pytest.raises(KeyError), reference(policy):
            raise KeyError
        assert torch.equal(states(policy)[1], now)


def test_merged_equals_adapted_and_is_a_plain_folder_again(
    policy: Policy, family: str, tmp_path: Path
) -> None:
    names = set(policy.model.state_dict())
    add_lora(policy, SETTINGS)
    disturb(policy)
    with torch.no_grad():
        _, adapted = states(policy)
        merge_lora(policy)
        _, merged = states(policy)
        torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
        assert set(policy.model.state_dict()) == names
        save_policy(policy, tmp_path / "saved")
        loaded = load_policy(tmp_path / "saved", policy_config(family))
        assert torch.equal(states(loaded)[1], merged)
    merge_lora(policy)  # nothing is left to do


def test_merging_by_hand(policy: Policy) -> None:
    """weight + alpha / rank · B A."""
    layer = policy.backbone.layers[2]
    before = layer.mlp.up_proj.weight.detach().clone()
    add_lora(policy, SETTINGS)
    disturb(policy)
    up, down = (
        next(p for n, p in layer.named_parameters() if f"up_proj.{which}" in n).detach()
        for which in ("lora_B", "lora_A")
    )
    merge_lora(policy)
    expected = before.double() + 3.0 * up.double() @ down.double()
    torch.testing.assert_close(layer.mlp.up_proj.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_bf16_policies_get_bf16_adapters_and_are_merged_in_fp32(
    policy_folder: Path, family: str
) -> None:
    policy = load_policy(policy_folder, policy_config(family), dtype=torch.bfloat16)
    base = policy.backbone.layers[2].self_attn.v_proj.weight.detach().float().clone()
    add_lora(policy, SETTINGS)
    disturb(policy)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    parameters = dict(policy.backbone.layers[2].self_attn.v_proj.named_parameters())
    update = 3.0 * parameters["lora_B.default.weight"].float()
    update = update @ parameters["lora_A.default.weight"].float()
    merge_lora(policy)
    merged = policy.backbone.layers[2].self_attn.v_proj.weight
    assert torch.equal(merged, (base + update).bfloat16())


def test_the_optimizer_moves_the_adapters_and_nothing_else(policy: Policy) -> None:
    add_lora(policy, SETTINGS)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    config = OptimizerConfig(steps=1, learning_rate=0.1, warmup=0)
    weights = MasterWeights({"policy": upper_layers(policy)}, config)
    states(policy)[1].sum().backward()  # type: ignore[no-untyped-call]
    weights.step(0)
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


def test_dropout_is_for_training_only(policy: Policy) -> None:
    add_lora(policy, LoraSettings(rank=2, alpha=6.0, dropout=0.5))
    disturb(policy)
    with torch.no_grad():
        assert torch.equal(states(policy)[1], states(policy)[1])
        policy.train()
        assert not torch.equal(states(policy)[1], states(policy)[1])


def test_wrong_uses_are_named(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="add_lora"), reference(policy):
        pass
    with pytest.raises(ConfigError, match=r"no w_q; choose of down_proj, .*v_proj"):
        add_lora(policy, LoraSettings(targets=("q_proj", "w_q")))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match=r"segcompass\[lora\]"):
            add_lora(policy, SETTINGS)
    add_lora(policy, SETTINGS)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(policy, SETTINGS)


def test_the_settings_need_no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every config would need the extra."""
    monkeypatch.setitem(sys.modules, "peft", None)
    assert lora.__file__ is not None
    spec = importlib.util.spec_from_file_location("fresh_lora", lora.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_lora", module)
    spec.loader.exec_module(module)


def gradients_and_weights(folder: Path, name: str, world: World) -> dict[str, Any]:
    """Of one adapted policy; the reference goes first, as it must not decide what trains."""
    dtype = torch.bfloat16 if name == "half" else torch.float32
    policy = load_policy(folder, policy_config("qwen2_5_vl"), dtype=dtype)
    policy.requires_grad_(False)
    add_lora(policy, SETTINGS)
    disturb(policy)
    shard(policy, world)
    with torch.no_grad(), reference(policy):
        _, before = states(policy)
    _, now = states(policy)
    now.float().square().mean().backward()
    found = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    state = full_state(policy, world, dtype)
    return {
        "states": [before.float().numpy(), now.detach().float().numpy()],
        "gradients": {n: _whole(g).float().numpy() for n, g in found.items()},
        "merged": {n: t.float().numpy() for n, t in merged_state(policy, state).items()},
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_every_rank(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with start("cpu") as world:
        return {name: gradients_and_weights(folder, name, world) for name in ("whole", "half")}


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", "qwen2_5_vl")
    main, other = launch(on_every_rank, 2, folder)
    assert other["whole"]["merged"] == {}  # written by one
    for name, bound in (("whole", 1e-5), ("half", 2e-2)):
        alone = gradients_and_weights(folder, name, World(0, 1, torch.device("cpu")))
        for ours, theirs in zip(main[name]["states"], alone["states"], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=bound * np.abs(theirs).max())
        assert main[name]["gradients"].keys() == alone["gradients"].keys()
        assert len(alone["gradients"]) == 7 * 2
        for key, right in alone["gradients"].items():
            error = np.linalg.norm(main[name]["gradients"][key] - right)
            assert error <= bound * np.linalg.norm(right), key
        plain = load_policy(folder, policy_config("qwen2_5_vl")).model.state_dict()
        assert main[name]["merged"].keys() == plain.keys()
        for key, right in alone["merged"].items():
            assert np.array_equal(main[name]["merged"][key], right), key


def test_the_seed_decides_and_nothing_else_is_drawn(policy_folder: Path, family: str) -> None:
    made = []
    for seed in (0, 0, 1):
        policy = load_policy(policy_folder, policy_config(family))
        torch.manual_seed(len(made))
        expected = torch.rand(1)
        torch.manual_seed(len(made))
        add_lora(policy, SETTINGS, seed)
        assert torch.equal(torch.rand(1), expected)
        parameters = policy.named_parameters()
        made.append(torch.cat([p.flatten() for n, p in parameters if "lora_A" in n]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_merged_states_are_those_of_merged_policies(policy: Policy) -> None:
    add_lora(policy, SETTINGS)
    disturb(policy)
    state = merged_state(policy, policy.model.state_dict())
    merge_lora(policy)
    expected = policy.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
