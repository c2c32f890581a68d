"""Rollouts: what comes with them equals what further passes would compute, for both families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forced import answers_of
from pydantic import ValidationError
from tiny import policy_config
from torch import Tensor

from segcompass.learning.grpo import answer_log_probs
from segcompass.learning.rollouts import RolloutConfig, Rollouts, sample_answers
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind

SIZES = ((40, 90), (64, 48), (33, 33), (64, 64))
ASKED = ("the mug", "all that one could drink from, left of the plate", "a red plate", "the mug")
LENGTHS = (20, 33, 9, None)
LIMIT = 52


@pytest.fixture(scope="module")
def visuals(policy: Policy) -> list[VisualInput]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [policy.backbone.prepare(picture) for picture in pictures]


def sample(policy: Policy, visuals: list[VisualInput], **options: Any) -> Rollouts:
    """Three whole answers of unequal lengths, and one that is cut off."""
    temperature = options.pop("temperature", 1.0)
    torch.manual_seed(options.pop("seed", 3))
    config = RolloutConfig(temperature=temperature, max_new_tokens=LIMIT)
    with answers_of(*LENGTHS):
        return sample_answers(policy, visuals, ASKED, config, **options)


@pytest.fixture(scope="module")
def rollouts(policy: Policy, visuals: list[VisualInput]) -> Rollouts:
    return sample(policy, visuals)


def said_alone(policy: Policy, visual: VisualInput, ids: list[int], answer: int) -> Tensor:
    """Log-probability of the last ``answer`` tokens of one sequence without padding."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = (
            policy.model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                **policy.backbone.image_arguments([visual]),
                **policy.backbone.position_arguments(tokens),
            )
            .logits[0]
            .double()
        )
    logits[:, policy.backbone.placeholder_ids] = -torch.inf
    said = logits[-answer - 1 : -1].log_softmax(-1)
    return said.gather(1, tokens[0, -answer:, None])[:, 0]


def test_answers_end_at_different_lengths(policy: Policy, rollouts: Rollouts) -> None:
    """Else the tests below would not be about padding behind an answer."""
    lengths = [len(ids) for ids in rollouts.ids]
    assert len(set(lengths)) == 4 and lengths[3] == max(lengths) == LIMIT
    assert rollouts.well_formed.tolist() == [True, True, True, False]
    end = policy.prompt.eos_token_id
    assert [ids[-1] == end for ids in rollouts.ids] == [True, True, True, False]
    assert all(ids[:-1].count(end) == 0 for ids in rollouts.ids)
    for ids, text, whole in zip(rollouts.ids, rollouts.texts, rollouts.well_formed, strict=True):
        assert policy.prompt.decode(ids[:-1] if whole else ids) == text


def test_answers_stand_behind_their_prompts(
    policy: Policy, visuals: list[VisualInput], rollouts: Rollouts
) -> None:
    for row, answer in enumerate(rollouts.ids):
        prompt = policy.encode([visuals[row]], [ASKED[row]]).ids[0].tolist()
        ids, at = rollouts.sequences.ids[row].tolist(), rollouts.is_answer[row]
        start = int(at.nonzero()[0])
        assert ids[start - len(prompt) : start + len(answer)] == prompt + answer
        assert at.tolist() == [start <= i < start + len(answer) for i in range(len(ids))]
        kinds = rollouts.sequences.kinds[row]
        assert (kinds[: start - len(prompt)] == TokenKind.PADDING).all()
        assert (kinds[start + len(answer) :] == TokenKind.PADDING).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_a_teacher_forced_pass(
    policy: Policy, visuals: list[VisualInput], temperature: float
) -> None:
    found = sample(policy, visuals, temperature=temperature)
    _, hidden = policy(found.sequences, visuals)
    again = answer_log_probs(policy, hidden, found.sequences.ids, found.is_answer, temperature)
    torch.testing.assert_close(found.log_probs, again.detach(), atol=1e-4, rtol=1e-4)
    assert not found.log_probs[~found.is_answer].any()
    assert not found.log_probs.requires_grad


def test_log_probs_are_those_of_each_answer_alone(
    policy: Policy, visuals: list[VisualInput], rollouts: Rollouts
) -> None:
    for row, answer in enumerate(rollouts.ids):
        prompt = policy.encode([visuals[row]], [ASKED[row]]).ids[0].tolist()
        expected = said_alone(policy, visuals[row], prompt + answer, len(answer))
        found = rollouts.log_probs[row][rollouts.is_answer[row]]
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_states_are_those_of_the_pass_with_gradient(
    policy: Policy, visuals: list[VisualInput], rollouts: Rollouts
) -> None:
    states, _ = policy(rollouts.sequences, visuals)
    good = rollouts.well_formed
    assert torch.equal(states.well_formed, good)
    read = rollouts.states.token_kinds.shape[1]  # the very last token was never read
    kinds = states.token_kinds[:, :read]
    assert torch.equal(rollouts.states.token_kinds, kinds)
    assert (states.token_kinds[:, read:][good] == TokenKind.PADDING).all()
    torch.testing.assert_close(
        rollouts.states.concentration_states, states.concentration_states, atol=1e-5, rtol=1e-4
    )
    real = kinds != TokenKind.PADDING
    torch.testing.assert_close(
        rollouts.states.sae_states[real], states.sae_states[:, :read][real], atol=1e-5, rtol=1e-4
    )
    assert states.concentration_states[good].any(-1).all()
    assert not rollouts.states.concentration_states[~good].any()


def test_without_help_a_random_policy_is_cut_off(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    torch.manual_seed(0)
    config = RolloutConfig(max_new_tokens=5)
    found = sample_answers(policy, visuals, ASKED, config)
    assert [len(ids) for ids in found.ids] == [5] * 4
    assert not found.well_formed.any()
    _, hidden = policy(found.sequences, visuals)
    again = answer_log_probs(policy, hidden, found.sequences.ids, found.is_answer)
    torch.testing.assert_close(found.log_probs, again.detach(), atol=1e-4, rtol=1e-4)


@contextmanager
def logits_of(policy: Policy, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the language head say something else."""
    head = policy.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _inputs, logits: change(logits))
    try:
        yield
    finally:
        handle.remove()


def test_equal_logits_are_equal_chances(policy: Policy, visuals: list[VisualInput]) -> None:
    with logits_of(policy, torch.zeros_like):
        found = sample_answers(policy, visuals, ASKED, RolloutConfig(max_new_tokens=3))
    rows = len(policy.model.get_output_embeddings().weight)
    said = found.log_probs[found.is_answer]
    allowed = rows - len(policy.backbone.placeholder_ids)
    torch.testing.assert_close(said, torch.full_like(said, -math.log(allowed)))


def test_an_end_at_once_is_an_answer_too(policy: Policy, visuals: list[VisualInput]) -> None:
    end = policy.prompt.eos_token_id
    sure = torch.nn.functional.one_hot(torch.tensor(end), len(policy.model.lm_head.weight))
    with logits_of(policy, lambda logits: logits + 1e4 * sure):
        found = sample_answers(policy, visuals, ASKED, RolloutConfig())
        _, hidden = policy(found.sequences, visuals)
        again = answer_log_probs(policy, hidden, found.sequences.ids, found.is_answer)
    assert found.ids == [[end]] * 4 and found.texts == [""] * 4
    assert found.is_answer.sum(1).tolist() == [1] * 4
    assert not found.well_formed.any()
    torch.testing.assert_close(again.detach(), found.log_probs)


def test_precomputed_features_give_the_same_answers(
    policy: Policy, visuals: list[VisualInput], rollouts: Rollouts
) -> None:
    with torch.no_grad():
        features = policy.backbone.embed_images(visuals)
    found = sample(policy, visuals, features=features)
    assert found.ids == rollouts.ids
    torch.testing.assert_close(found.log_probs, rollouts.log_probs)
    torch.testing.assert_close(found.states.sae_states, rollouts.states.sae_states)
    scrambled = sample(policy, visuals, features=[f.flip(0) for f in features])
    assert scrambled.ids != rollouts.ids  # they are what the policy sees


def test_the_seed_decides(policy: Policy, visuals: list[VisualInput], rollouts: Rollouts) -> None:
    assert sample(policy, visuals).ids == rollouts.ids
    assert sample(policy, visuals, seed=4).ids != rollouts.ids


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(
    policy_folder: Path, family: str, visuals: list[VisualInput], training: bool
) -> None:
    """Checkpointing, which training needs, would forbid the cache that sampling needs."""
    policy = load_policy(policy_folder, policy_config(family)).train(training)
    policy.model.gradient_checkpointing_enable()
    seen: list[bool] = []
    with answers_of(4):
        hook = policy.backbone.final_norm.register_forward_hook(
            lambda module, *_: seen.append(module.training)
        )
        config = RolloutConfig(max_new_tokens=24)
        checkpointed = sample_answers(policy, visuals, ASKED, config)
        hook.remove()
    assert not any(seen)
    assert all(module.training == training for module in policy.modules())
    assert len(checkpointed.ids) == 4
    with pytest.raises(ValueError, match="empty"):
        sample_answers(policy, visuals, ["", *ASKED[1:]], RolloutConfig())
    assert policy.training == training


def test_settings_reach_the_policy(policy: Policy, visuals: list[VisualInput]) -> None:
    with answers_of(3) as calls:
        found = sample_answers(policy, visuals, ASKED, RolloutConfig(temperature=0.5))
    assert [(c["temperature"], c["max_new_tokens"]) for c in calls] == [(0.5, None)]
    assert found.well_formed.all()


@pytest.mark.parametrize("wrong", [{"group": 0}, {"temperature": 0}, {"max_new_tokens": 0}])
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RolloutConfig.model_validate(wrong)
