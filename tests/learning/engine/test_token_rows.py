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

from segcompass.learning import teachers
from segcompass.learning.engine.freezing import freeze, frozen_copy
from segcompass.learning.engine.lora import trained_weights
from segcompass.learning.engine.token_rows import TokenRows, with_token_rows
from segcompass.learning.rollouts import Rollouts, sample_answers
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


@pytest.fixture(params=[False, True], ids=["written", "embedded"])
def embedded(request: pytest.FixtureRequest) -> bool:
    """Whether the embedding's rows train as well."""
    return bool(request.param)


def tied(policy: Policy) -> bool:
    read, write = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    return write.weight is read.weight


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


def test_nothing_changes_until_they_are_moved(policy: Policy, embedded: bool) -> None:
    before, one = asked(policy), tied(policy)
    rows = TokenRows(policy, embedded=embedded)
    for found, wanted in zip(asked(policy), before, strict=True):
        torch.testing.assert_close(found, wanted)
    assert tied(policy) == (one and embedded)
    assert len(list(rows.parameters())) == (2 if embedded and not one else 1)
    moved(rows)
    after = asked(policy)
    assert torch.equal(after[0], before[0]) != embedded  # the states know what was read
    changed = (after[1] != before[1]).any(0).nonzero().flatten()
    assert set(policy.prompt.slot_ids) <= set(changed.tolist())
    with rows.off():
        for found, wanted in zip(asked(policy), before, strict=True):
            torch.testing.assert_close(found, wanted)


def test_only_they_get_gradients(policy: Policy, embedded: bool) -> None:
    rows = TokenRows(policy, embedded=embedded)
    hidden, logits = asked(policy)
    (hidden.square().sum() + logits.log_softmax(-1)[:, policy.prompt.slot_ids].sum()).backward()
    trained = {id(p) for p in rows.parameters()}
    for parameter in policy.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained)
    for parameter in rows.parameters():
        reached = parameter.grad.abs().sum(1) > 0
        # As input the last one is read too; its state is what the head gets.
        assert reached.all()


def test_saved_they_are_rows_of_the_tables(policy: Policy, embedded: bool, tmp_path: Path) -> None:
    rows = moved(TokenRows(policy, embedded=embedded))
    frozen = {name: value.clone() for name, value in policy.model.state_dict().items()}
    wanted = asked(policy)
    state = with_token_rows(policy, policy.model.state_dict())
    save_policy(policy, tmp_path / "saved", state=state)
    again = load_policy(tmp_path / "saved", policy.config)
    assert tied(again) == tied(policy)
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
    read = again.model.get_input_embeddings().weight
    assert torch.equal(read, policy.model.get_input_embeddings().weight) != embedded


@pytest.mark.parametrize("trains", [False, True])
def test_what_the_sae_reads_is_held_unless_its_layers_train(policy: Policy, trains: bool) -> None:
    """Also where the prompt names the tokens, and where both tables were one."""
    assert set(policy.prompt.slot_ids) <= set(policy.prompt.encode("the red mug", 4).ids)
    TokenRows(policy, embedded=trains)
    seen: list[Tensor] = []
    policy.sae_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    for layer in policy.backbone.layers[policy.config.sae_layer + 1 :]:
        layer.requires_grad_(True)
    hidden, logits = asked(policy)
    assert seen[0].requires_grad == trains and hidden.requires_grad
    logits.log_softmax(-1)[:, policy.prompt.slot_ids].sum().backward()
    with torch.no_grad():
        for parameter in policy.token_rows.parameters():
            parameter.sub_(parameter.grad)
    asked(policy)
    assert torch.equal(*seen) != trains


def test_the_reference_keeps_the_rows_it_began_with(policy: Policy, embedded: bool) -> None:
    rows = TokenRows(policy, embedded=embedded)
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
def test_an_instruct_model_learns_to_write_the_form(
    family: str, joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is forced and taught; then the policy opens and closes an answer by itself."""
    from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig

    monkeypatch.setattr(teachers.MaskTeacher, "supervise", lambda *_: {})
    monkeypatch.setattr(teachers.MaskTeacher, "counts", lambda *_: {})
    room = 18 if family == "qwen2_5_vl" else 11  # its `<think>` takes several tokens
    rollout = {"forced_steps": 40, "max_new_tokens": room, "group": 8, "temperature": 0.5}
    step = joint(family, rollout=rollout, rl_weight=0.0)
    policy, prompt = step.policy, step.policy.prompt
    trained = {"tokens": policy.token_rows, "layers": policy.backbone.layers[2:]}
    settings = OptimizerConfig(steps=40, learning_rate=0.03, warmup=0.0)
    weights = MasterWeights(trained, settings)
    asked = step.questions(step.samples[:2]).take([0, 1] * 8)

    def answers(force_form: bool) -> Rollouts:
        torch.manual_seed(0)
        texts = [s.instruction for s in asked.samples]
        return sample_answers(
            policy, asked.visuals, texts, step.stage.rollout, force_form=force_form
        )

    def chosen() -> Tensor:
        """Whether each concentration token but the first is the likeliest at its place."""
        ids, is_answer = (forced := answers(True)).sequences.ids, forced.is_answer
        _, hidden = policy(forced.sequences, asked.visuals)
        likeliest = policy.language_logits(hidden).argmax(-1)
        later = torch.isin(ids, torch.tensor(prompt.slot_ids[1:])) & is_answer
        assert later.sum() == len(ids) * (len(prompt.slot_ids) - 1)
        return likeliest[:, :-1][later[:, 1:]] == ids[later]

    def opened() -> float:
        """Share of free answers that begin as they should."""
        begin = len(prompt.open_ids)
        return float(np.mean([ids[:begin] == prompt.open_ids for ids in answers(False).ids]))

    assert not chosen().any()  # a mean of words is never the likeliest word
    assert opened() == 0
    for number in range(settings.steps):
        for values in step(number):
            values["loss"].backward()
        weights.step(number)
    assert chosen().float().mean() > 0.9
    assert opened() > 0.8
    if family == "llava":  # the other still writes control tokens into its thought
        assert answers(False).well_formed.float().mean() > 0.2
