"""What the SAE is trained on, and that it is handed on in the policy's own scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import stage
from tiny import policy_config, tiny_qwen_policy

from segcompass.data.samples import read_dataset
from segcompass.learning import train_sae as train_sae_module
from segcompass.learning.config import RunConfig, SaeStage
from segcompass.learning.corpus import visual_memo
from segcompass.learning.train_sae import collect_states, train_sae
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(tiny_qwen_policy(tmp_path / "policy"), policy_config("qwen2_5_vl"))


def test_states_are_those_of_prompt_and_thought(policy: Policy, scenes_root: Path) -> None:
    samples = read_dataset(scenes_root, "train")[:3]
    visuals = visual_memo(policy.backbone)
    rows = []
    for sample in samples:  # alone, so that nothing is padded
        pictures = [visuals(sample.image_path)]
        sequences = policy.encode(pictures, [sample.instruction], [sample.thought or ""])
        first = sequences.kinds[0].tolist().index(TokenKind.CONCENTRATION)
        with torch.no_grad():
            rows.append(policy(sequences, pictures)[0].sae_states[0, :first])
    found = collect_states(policy, samples, batch=2)
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-4, rtol=1e-4)


def test_the_sae_reads_unscaled_states(
    policy: Policy, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained on inputs of norm sqrt(D); afterwards it explains the states as they are."""
    torch.manual_seed(0)
    states = 40 + 7 * torch.randn(600, 3) @ torch.randn(3, policy.width)
    monkeypatch.setattr(train_sae_module, "collect_states", lambda *_: states)
    plan = SaeStage.model_validate(stage(200, batch=64, latents=96, l1=0.01))
    once = {"train_sae": stage(1), "train_joint": stage(1)}
    config = RunConfig.model_validate({"run": tmp_path, "data": {"root": scenes_root}, **once})
    sae = train_sae(policy, config, plan, tmp_path / "sae")
    with torch.no_grad():
        error = (sae(states).reconstruction - states).square().sum()
    assert error < 0.1 * (states - states.mean(0)).square().sum()
