"""Rows of the concentration tokens train while the tables around them stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tiny import policy_config
from torch import Tensor

from segcompass.learning.engine.freezing import freeze, frozen_copy
from segcompass.learning.engine.lora import trained_weights
from segcompass.learning.engine.token_rows import TokenRows, with_token_rows
from segcompass.learning.rollouts import sample_answers
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.reasoning.policy import Policy

if TYPE_CHECKING:
    from joint import Parts

    from segcompass.learning.train_joint import JointStep

FAMILIES = ["qwen2_5_vl", "llava"]


@pytest.fixture(params=[f"{f}{t}" for f in FAMILIES for t in ("", " tied")])
def policy(request: pytest.FixtureRequest, plain_policies: dict[str, Path]) -> Policy:
    """A policy that was given its tokens just now, frozen."""
    family, _, tied = request.param.partition(" ")
    policy = load_policy(plain_policies[family], policy_config(family))
    if tied:
        policy.model.config.tie_word_embeddings = True
        policy.model.config.get_text_config().tie_word_embeddings = True
        policy.model.tie_weights()
    return policy.requires_grad_(False)


def asked(policy: Policy) -> tuple[Tensor, Tensor]:
    """The last states of an answer, and the logits that follow from them."""
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    visual = policy.backbone.prepare(image)
    sequences = policy.encode([visual], ["the red mug"], ["There is a red mug at b3."])
    _, hidden = policy(sequences, [visual])
    return hidden, policy.language_logits(hidden[0])


@torch.no_grad()
def moved(rows: TokenRows) -> TokenRows:
    for number, parameter in enumerate(rows.parameters()):
        torch.manual_seed(number)
        parameter.add_(torch.randn_like(parameter))
    return rows


def test_nothing_changes_until_they_are_moved(policy: Policy) -> None:
    before = asked(policy)
    rows = TokenRows(policy)
    for found, wanted in zip(asked(policy), before, strict=True):
        torch.testing.assert_close(found, wanted)
    tied = policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
    assert len(list(rows.parameters())) == (1 if tied else 2)
    moved(rows)
    after = asked(policy)
    assert not torch.allclose(after[0], before[0])  # of tokens behind the first of them
    with rows.off():
        for found, wanted in zip(asked(policy), before, strict=True):
            torch.testing.assert_close(found, wanted)


def test_only_they_get_gradients(policy: Policy) -> None:
    rows = TokenRows(policy)
    hidden, logits = asked(policy)
    (hidden.square().sum() + logits.log_softmax(-1)[:, policy.prompt.slot_ids].sum()).backward()
    trained = {id(p) for p in rows.parameters()}
    for parameter in policy.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained)
    for parameter in rows.parameters():
        reached = parameter.grad.abs().sum(1) > 0
        # As input the last one is read too; its state is what the head gets.
        assert reached.all()


def test_saved_they_are_rows_of_the_tables(policy: Policy, tmp_path: Path) -> None:
    rows = moved(TokenRows(policy))
    frozen = {name: value.clone() for name, value in policy.model.state_dict().items()}
    wanted = asked(policy)
    state = with_token_rows(policy, policy.model.state_dict())
    save_policy(policy, tmp_path / "saved", state=state)
    again = load_policy(tmp_path / "saved", policy.config)
    for found, expected in zip(asked(again), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, frozen[name])  # the policy itself stays as it was
    told = dict(trained_weights(policy))
    assert {*told} == {name for name, _, _ in rows.tables(policy)}
    for name, table in told.items():
        assert torch.equal(table, again.model.state_dict()[name])
        others = torch.ones(len(table), dtype=torch.bool)
        others[policy.prompt.slot_ids] = False
        assert torch.equal(table[others], frozen[name][others])


def test_the_reference_keeps_the_rows_it_began_with(policy: Policy) -> None:
    rows = TokenRows(policy)
    before, reference = asked(policy), frozen_copy(policy)
    moved(rows)
    for found, wanted in zip(asked(reference), before, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not any(p.requires_grad for p in reference.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_they_train_with_the_policy(family: str, assemble: Callable[..., Parts]) -> None:
    from joint import stage

    parts = freeze(*assemble(family)[:3], stage())
    assert isinstance(parts["tokens"], TokenRows)
    assert "tokens" not in freeze(*assemble(family)[:3], stage(train_upper_layers=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruct_model_learns_to_write_its_tokens(
    family: str, joint: Callable[..., JointStep]
) -> None:
    """The form is forced, its ending taught; then the policy closes an answer by itself."""
    from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig

    rollout = {"forced_steps": 40, "max_new_tokens": 24}
    step = joint(family, batch=2, rollout=rollout, place_weight=0.0)
    settings = OptimizerConfig(steps=40, learning_rate=0.02, warmup=0.0)
    weights = MasterWeights({"tokens": step.policy.token_rows}, settings)

    def chosen() -> Tensor:
        """Whether each token of a forced ending but the first is the likeliest at its place."""
        questions = step.questions(step.samples[:2])
        texts = [s.instruction for s in questions.samples]
        answers = sample_answers(
            step.policy, questions.visuals, texts, step.stage.rollout, force_form=True
        )
        _, hidden = step.policy(answers.sequences, questions.visuals)
        likeliest = step.policy.language_logits(hidden).argmax(-1)
        wanted = torch.tensor(step.policy.prompt.slot_ids[1:])
        later = torch.isin(answers.sequences.ids, wanted) & answers.is_answer
        assert later.sum() == 2 * len(wanted)
        return likeliest[:, :-1][later[:, 1:]] == answers.sequences.ids[later]

    torch.manual_seed(0)
    assert not chosen().any()  # a mean of words is never the likeliest word
    for number in range(settings.steps):
        for values in step(number):
            values["loss"].backward()
        weights.step(number)
    assert chosen().all()
