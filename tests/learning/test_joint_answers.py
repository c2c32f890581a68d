"""The joint step and its answers: passes, memory, rewards, the reference, and what is learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forced import answers_of
from joint import (
    HALF_WHOLE,
    LENGTHS,
    MASKS,
    Parts,
    answered,
    micro_batches,
    reached,
    sharpen,
    stage,
    step_and_backward,
    take,
)
from largest import Largest
from tiny import WIDTH
from torch import Tensor, nn

from segcompass.geometry import Frame
from segcompass.io.errors import CheckpointError
from segcompass.learning import teachers
from segcompass.learning import train_joint as module
from segcompass.learning.corpus import target_grid
from segcompass.learning.engine import reference
from segcompass.learning.rewards import RewardConfig, mask_score
from segcompass.learning.rollouts import Rollouts
from segcompass.learning.train_joint import JointStep, Questions, frozen_copy, train_joint
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import ReasoningBatch


@contextmanager
def passes(step: JointStep) -> Iterator[dict[str, list[tuple[tuple[int, int], bool]]]]:
    """(rows, tokens) of every pass of policy and reference, and whether it had a gradient."""
    seen: dict[str, list[tuple[tuple[int, int], bool]]] = {"policy": [], "reference": []}
    handles = []
    for name, policy in (("policy", step.policy), ("reference", step.reference)):
        if policy is not None:

            def hook(_module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                shape = (inputs[0].shape[0], inputs[0].shape[1])
                seen[name].append((shape, output.requires_grad))

            handles.append(policy.backbone.final_norm.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_one_rollout_one_pass_with_gradient_one_of_the_reference(
    family: str, joint: Callable[..., JointStep]
) -> None:
    step = joint(family)
    batches: list[Sequences] = []
    forward = Policy.forward
    with passes(step) as seen, pytest.MonkeyPatch.context() as patch, answers_of(*LENGTHS) as calls:

        def counted(self: Policy, sequences: Sequences, *rest: Any) -> Any:
            batches.append(sequences)
            return forward(self, sequences, *rest)

        patch.setattr(Policy, "forward", counted)
        (values,) = step(0)
        values["loss"].backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 1  # one generation
    length = batches[0].ids.shape[1]
    assert batches[0] is batches[1]
    prefill, *written, graded = seen["policy"]
    assert prefill[0][0] == 4 and prefill[0][1] < length
    assert [found for found, _ in written] == [(4, 1)] * (length - prefill[0][1] - 1)
    assert not any(graph for _, graph in [prefill, *written])
    assert graded == ((4, length), True)  # what is taught, and nothing is passed twice
    assert seen["reference"] == [((4, length), False)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"oracle_steps": 1}, (1, 0)),
        ({"grpo": {"kl": 0}}, (1, 0)),
        ({"rl_weight": 0}, (1, 0)),
        ({"rehearse": True}, (2, 1)),
        ({}, (1, 1)),
    ],
)
def test_no_pass_is_made_for_nothing(
    changes: dict[str, Any], wanted: tuple[int, int], joint: Callable[..., JointStep]
) -> None:
    step = joint(**changes)
    with passes(step) as seen:
        list(micro_batches(step))
    graded = [entry for entry in seen["policy"] if entry[1]]
    assert (len(graded), len(seen["reference"])) == wanted
    if "oracle_steps" in changes:
        assert len(seen["policy"]) == 1  # nothing is written either


def test_no_tensor_of_tokens_by_latents(joint: Callable[..., JointStep]) -> None:
    latents = 8192
    step = joint(latents=latents)
    take(step)  # fills the memories of pictures
    with Largest() as watch:
        step_and_backward(step)
    tokens = answered(step)[0].sequences.ids.numel()
    assert watch.elements < tokens * latents / 2, watch.shape
    with Largest() as watch:  # a watch that sees one when there is one
        step.interface.sae.encode(torch.zeros(tokens, WIDTH))
    assert watch.elements == tokens * latents


def test_malformed_answers_earn_and_teach_nothing(joint: Callable[..., JointStep]) -> None:
    step = joint()
    rollouts, questions, _, _ = answered(step, HALF_WHOLE)
    assert rollouts.well_formed.tolist() == [True, False, True, False]
    rewards = step.teacher.rewards(rollouts, questions)
    assert not any(values[~rollouts.well_formed].any() for values in rewards.values())
    assert rewards["reward_format"][rollouts.well_formed].tolist() == [1, 1]
    values = take(step, 0, HALF_WHOLE)
    assert values["well_formed"].item() == 0.5


def test_no_mask_gradient_through_malformed_answers(
    joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = joint(rl_weight=0.0)
    kept: list[Tensor] = []
    forward = Policy.forward

    def tapped(self: Policy, *arguments: Any) -> tuple[ReasoningBatch, Tensor]:
        states, hidden = forward(self, *arguments)
        kept.append(states.concentration_states)
        kept[-1].retain_grad()
        return states, hidden

    monkeypatch.setattr(Policy, "forward", tapped)
    step_and_backward(step, 0, HALF_WHOLE)
    (states,) = kept
    assert states.grad is not None
    assert states.grad[0].any() and states.grad[2].any()
    assert not states.grad[1].any() and not states.grad[3].any()


def test_masks_cost_what_they_cost_without_the_malformed(joint: Callable[..., JointStep]) -> None:
    step = joint()
    rollouts, questions, states, _ = answered(step, HALF_WHOLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample_answers", lambda *_, **__: rollouts)
        (answers,), figures = step.written(questions.take([0, 2]), forced=False)
        terms, _ = step.terms(answers)
    alone = ReasoningBatch(*(part[[0, 2]] for part in states))
    expected = step.teacher.supervise(alone, questions.take([0, 2]))
    assert terms["confidence"].numel() == 2 * step.policy.slots
    for name in ("confidence", *MASKS):
        torch.testing.assert_close(terms[name], expected[name])
    assert terms["policy"].shape == figures["reward"].shape == (4,)


def test_a_batch_without_any_whole_answer_still_trains(
    joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = iter([0.0, 1.0, 1.0, 0.0] * 2)
    monkeypatch.setattr(teachers, "format_score", lambda *_: next(earned))
    step = joint()
    values = step_and_backward(step, 0, (None,))
    assert values["well_formed"].item() == 0 and "dice" not in values
    assert torch.isfinite(values["loss"])
    layer = step.policy.backbone.layers[2]
    assert all(reached(layer).values())
    assert not any(reached(step.interface).values())


def test_questions_that_nothing_matches_are_asked_more_often(
    joint: Callable[..., JointStep],
) -> None:
    once = [s.sample_id for s in joint(every=True).samples]
    step = joint(every=True, no_target_repeats=3)
    asked = [s.sample_id for s in step.samples]
    assert len(set(once)) == len(once) < len(asked)
    for sample in step.samples:
        assert asked.count(sample.sample_id) == (1 if sample.targets else 3)


@pytest.mark.parametrize("threshold", [0.0, 0.47, 1.0])
def test_rewards_are_those_of_each_answer_alone(
    threshold: float, joint: Callable[..., JointStep]
) -> None:
    """Masks of slots above the threshold, decoded one answer at a time."""
    weights = RewardConfig(format=0.2, mask=0.9, threshold=threshold)
    step = joint(every=True, rewards=weights.model_dump())
    chosen = {len(s.targets): s for s in step.samples}  # every number of targets once
    questions = step.questions(list(chosen.values()))
    torch.manual_seed(5)
    config = step.stage.rollout
    with answers_of(*LENGTHS[: len(chosen)]):
        rollouts = module.sample_answers(
            step.policy, questions.visuals, [s.instruction for s in questions.samples], config
        )
    assert rollouts.well_formed.all() and len(chosen) > 1
    sharpen(step)
    found = step.teacher.rewards(rollouts, questions)
    interface, side, scores = step.interface, step.teacher.side, []
    for row, sample in enumerate(questions.samples):
        states = ReasoningBatch(*(part[row : row + 1] for part in rollouts.states))
        keys, frame = questions.keys[row : row + 1], Frame.fit(sample.image_hw, side)
        alignment = interface.align(states, keys, frames=[frame])
        masks = interface.decode(keys, alignment, frames=[frame])[0]
        sure = alignment.confidence_logits[0].sigmoid() > threshold
        wanted = target_grid(sample.targets, sample.image_hw, side, masks.shape[-1])
        expected = mask_score(masks[sure], wanted, weights)
        assert found["reward_mask"][row].item() == pytest.approx(expected, rel=1e-4)
        scores.append(alignment.confidence_logits[0].sigmoid())
        if threshold == 1.0:
            assert expected == float(not sample.targets)
    assert torch.stack(scores).std(0).min() > 1e-3  # no two answers see alike
    total = 0.2 * found["reward_format"] + 0.9 * found["reward_mask"]
    torch.testing.assert_close(found["reward"], total)


@pytest.mark.parametrize("cut", ["tokens", "concepts"])
def test_a_path_that_never_trains_earns_nothing(cut: str, joint: Callable[..., JointStep]) -> None:
    step = joint(rewards={"threshold": 0.0}, **{f"drop_{cut}": 1.0})
    sharpen(step)
    rollouts, questions, _, _ = answered(step)
    states = rollouts.states
    states = states._replace(
        concentration_states=states.concentration_states + 5 * (cut == "tokens"),
        sae_states=states.sae_states + 5 * (cut == "concepts"),
    )
    found = step.teacher.rewards(rollouts._replace(states=states), questions)
    right = step.teacher.rewards(rollouts, questions)
    assert torch.equal(found["reward_mask"], right["reward_mask"])
    assert right["reward_mask"].max() > 0


def test_rewards_are_judged_with_both_paths(joint: Callable[..., JointStep]) -> None:
    """What is dropped is for learning; an answer is judged as it will be used."""
    found = []
    for changes in ({}, {"drop_tokens": 0.5, "drop_concepts": 0.5}):
        step = joint(rewards={"threshold": 0.0}, **changes)
        sharpen(step)
        rollouts, questions, _, _ = answered(step)
        found.append(step.teacher.rewards(rollouts, questions)["reward_mask"])
    assert torch.equal(*found)
    silent = torch.zeros_like(rollouts.states.concentration_states)
    deaf = rollouts._replace(states=rollouts.states._replace(concentration_states=silent))
    other = step.teacher.rewards(deaf, questions)["reward_mask"]
    assert (other - found[0]).abs().max() > 1e-4  # else there would be nothing to notice


def test_the_policy_term_is_grpo_on_what_was_sampled(
    joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old log-probabilities of the rollout, new ones of the pass, the reference's, and gains."""
    caught: list[tuple[Any, ...]] = []
    plain = module.grpo_loss
    monkeypatch.setattr(module, "grpo_loss", lambda *a: caught.append(a) or plain(*a))
    earned = iter([0.0, 1.0, 0.5, 0.5])
    monkeypatch.setattr(teachers, "format_score", lambda *_: next(earned))
    step = joint(rewards={"mask": 0.0}, rollout={"temperature": 0.8})
    values = take(step)
    (arguments,) = caught
    new, old, before, mask, gains, _ = arguments
    torch.testing.assert_close(new.detach(), old, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before, old, atol=1e-4, rtol=1e-4)
    assert new.requires_grad and not old.requires_grad and not before.requires_grad
    assert mask.sum(1).float().mean().item() == pytest.approx(values["length"].item())
    assert gains.tolist() == pytest.approx([-1, 1, 0, 0])
    assert values["groups_that_teach"].item() == 0.5
    loss = plain(*arguments).loss.mean()
    torch.testing.assert_close(values["policy"], loss.detach())


def test_the_reference_is_where_the_stage_began(joint: Callable[..., JointStep]) -> None:
    step = joint(grpo={"kl": 0.5})
    assert step.reference is not None
    _, questions, _, _ = answered(step)
    sequences = step.policy.encode(
        questions.visuals, [s.instruction for s in questions.samples], ["a mug."] * 4
    )
    frozen = dict(step.reference.named_parameters())
    assert not any(p.requires_grad for p in frozen.values())
    for name, p in step.policy.named_parameters():
        shares = frozen[name].data_ptr() == p.data_ptr()
        assert shares != p.requires_grad, name
    _, before = step.reference(sequences, questions.visuals)
    first = step_and_backward(step)
    assert first["kl"].item() == pytest.approx(0, abs=1e-6)
    trained = [p for p in step.policy.parameters() if p.grad is not None]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p), alpha=0.1)
    _, after = step.reference(sequences, questions.visuals)
    assert torch.equal(after, before)
    second = take(step, 1)
    assert second["kl"].item() > 1e-3


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_after_supervised_steps_the_reference_is_what_they_made(
    lora: dict[str, int] | None,
    assemble: Callable[..., Parts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lora:
        pytest.importorskip("peft")

    def rows(folder: str) -> list[dict[str, float]]:
        chosen = stage(oracle_steps=2, steps=4, language_weight=1.0, save_every=1, lora=lora)
        parts = assemble()
        with answers_of(*LENGTHS):
            train_joint(*parts, chosen, tmp_path / folder)
        log = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in log]

    whole = rows("whole")
    assert whole[2]["kl"] == pytest.approx(0, abs=1e-6) and whole[3]["kl"] > 1e-6
    monkeypatch.setattr(reference, "renew", lambda *_: None)
    assert rows("held to the start")[2]["kl"] > 1e-3
    monkeypatch.undo()
    plain = JointStep.written

    def killed(self: JointStep, questions: Questions, forced: bool) -> Any:
        if (tmp_path / "killed/state.safetensors").exists() and len(log()) == 3:
            raise RuntimeError("killed")
        return plain(self, questions, forced)

    def log() -> list[str]:
        return (tmp_path / "killed/log.jsonl").read_text().splitlines()

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(JointStep, "written", killed)
        rows("killed")
    assert [r | {"s": 0} for r in rows("killed")] == [r | {"s": 0} for r in whole]
    shutil.rmtree(tmp_path / "killed/reference")
    (tmp_path / "killed/log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="which policy reinforcement began with"):
        rows("killed")


def test_the_copy_of_a_policy_shares_what_is_frozen(assemble: Callable[..., Parts]) -> None:
    policy = assemble().policy
    policy.requires_grad_(False)
    policy.backbone.final_norm.requires_grad_(True)
    copy = frozen_copy(policy)
    assert copy is not policy and copy.backbone.model is not policy.backbone.model
    assert copy.model is copy.backbone.model
    own = {p.data_ptr() for p in copy.parameters()} - {p.data_ptr() for p in policy.parameters()}
    assert own == {p.data_ptr() for p in copy.backbone.final_norm.parameters()}
    assert all(p.requires_grad for p in policy.backbone.final_norm.parameters())
    assert copy.tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_rewards_rise(
    assemble: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paid for beginning with one half of its vocabulary, the policy begins with it more often."""

    def pay(_teacher: teachers.Teacher, rollouts: Rollouts, _: Questions) -> dict[str, Tensor]:
        earned = torch.tensor([float(ids[0] % 2) for ids in rollouts.ids])
        return {"reward": earned, "reward_format": earned, "reward_mask": 0 * earned}

    monkeypatch.setattr(teachers.MaskTeacher, "rewards", pay)
    settings = stage(
        steps=16,
        batch=4,
        learning_rate=0.02,
        rollout={"group": 8, "max_new_tokens": 2},
        grpo={"kl": 0.02},
    )
    train_joint(*assemble(), settings, tmp_path / "stage")
    rows = [json.loads(r) for r in (tmp_path / "stage" / "log.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.65
    assert np.mean(rewards[-5:]) > max(0.75, rewards[0] + 0.2)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(row["kl"] > 0 for row in rows[1:])
