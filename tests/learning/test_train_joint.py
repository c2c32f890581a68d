"""The joint step: what its loss is made of, and where gradients go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forced import answers_of
from joint import (
    LENGTHS,
    MASKS,
    Parts,
    answered,
    micro_batches,
    reached,
    stage,
    step_and_backward,
    take,
)
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from segcompass.learning import teachers
from segcompass.learning.answers import Answers
from segcompass.learning.engine.loop import Losses, grouped_indices
from segcompass.learning.engine.lora import adapted
from segcompass.learning.grpo import advantages
from segcompass.learning.questions import Questions, key_memo
from segcompass.learning.rollouts import Rollouts, evaluating
from segcompass.learning.train_joint import JointStep, freeze, train_joint
from segcompass.learning.train_warmup import answer_losses
from segcompass.types import ReasoningBatch


def assert_gradients(step: JointStep, *, upper: bool = True) -> None:
    """They reach all that is trained, and nothing that is frozen."""
    policy, interface = step.policy, step.interface
    layers, norm = policy.backbone.layers, policy.backbone.final_norm
    if upper:
        assert all(reached(layers[2]).values()) and all(reached(norm).values())
    for part in (interface.fusion, interface.mapper, interface.decoder.prompt_encoder.mask_embed):
        assert all(reached(part).values()), part
    codebook = reached(interface.codebook)
    assert all(codebook.values()), [name for name, found in codebook.items() if not found]
    assert sum(reached(interface.decoder.mask_decoder.transformer).values()) > 10
    trained: set[int] = set()
    if upper:
        parts = (layers[2], norm, policy.token_rows)
        trained = {id(p) for part in parts for p in part.parameters()}
    frozen = [p for p in policy.parameters() if id(p) not in trained]
    frozen += [*step.encoder.parameters(), *interface.sae.parameters()]
    frozen += interface.decoder.shared_image_embedding.parameters()
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("oracle", [0, 1])
def test_gradients_reach_what_is_trained_and_nothing_else(
    family: str, oracle: int, joint: Callable[..., JointStep]
) -> None:
    step = joint(family, oracle_steps=oracle, batch=4)
    step_and_backward(step)
    assert_gradients(step)


def test_upper_layers_can_be_frozen_too(joint: Callable[..., JointStep]) -> None:
    step = joint(train_upper_layers=False, batch=4)
    step_and_backward(step)
    assert not any(reached(step.policy).values())
    assert_gradients(step, upper=False)


SETTINGS = {
    "both": {},
    "reinforcement only": {"seg_weight": 0.0, "conf_weight": 0.0},
    "supervision only": {"rl_weight": 0.0},
    "every term": {
        "rl_weight": 0.9,
        "seg_weight": 3.0,
        "conf_weight": 0.7,
        "dice_weight": 0.4,
        "heatmap_dice_weight": 0.2,
        "focal_weight": 2.0,
        "place_weight": 0.3,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_the_weighted_sum_of_eq_6(name: str, joint: Callable[..., JointStep]) -> None:
    chosen = joint(**SETTINGS[name])
    values = take(chosen)
    w = {"rl_weight": 1.0, "seg_weight": 1.0, "conf_weight": 0.2, "dice_weight": 0.6}
    w |= {"heatmap_dice_weight": 0.0, "focal_weight": 0.0, "place_weight": 0.0} | SETTINGS[name]
    masks = (
        values["heatmap_bce"]
        + w["heatmap_dice_weight"] * values["heatmap_dice"]
        + w["dice_weight"] * values["dice"]
        + w["focal_weight"] * values["focal"]
    )
    by_hand = w["rl_weight"] * values["policy"] + w["seg_weight"] * masks
    by_hand = by_hand + w["conf_weight"] * values["confidence"]
    if w["place_weight"]:
        by_hand = by_hand + w["place_weight"] * values["place"]
    torch.testing.assert_close(values["loss"].detach(), by_hand)
    assert not any(part.requires_grad for key, part in values.items() if key != "loss")


def test_one_half_trains_without_the_other(joint: Callable[..., JointStep]) -> None:
    """Table 4: reinforcement alone never moves the head, supervision alone moves both."""
    alone = joint(seg_weight=0.0, conf_weight=0.0)
    step_and_backward(alone)
    assert not any(reached(alone.interface).values())
    supervised = joint(rl_weight=0.0)
    step_and_backward(supervised)
    assert_gradients(supervised)
    assert supervised.reference is None


def test_supervision_alone_is_blind_to_rewards(
    joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for score in (0.0, 1.0):
        flips = iter([score, 1 - score] * 4)
        monkeypatch.setattr(teachers, "format_score", lambda *_, flips=flips: next(flips))
        step = joint(rl_weight=0.0)
        step_and_backward(step)
        gradients.append([p.grad for p in step.policy.backbone.layers[2].parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_means_are_over_answers_slots_and_matched_masks(joint: Callable[..., JointStep]) -> None:
    step = joint()
    terms: dict[str, Tensor] = {}
    plain = step.losses

    def seen(found: dict[str, Tensor], *rest: Any) -> Losses:
        terms.update(found)
        return plain(found, *rest)

    step.losses = seen  # type: ignore[method-assign]
    values = take(step)
    for name, found in terms.items():
        expected = sum(found.tolist()) / len(found)
        assert values[name].item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    assert len(terms["policy"]) == 4 and len(terms["groups_that_teach"]) == 2


def test_language_is_learnt_only_where_asked(joint: Callable[..., JointStep]) -> None:
    values = take(joint(oracle_steps=1))
    weighted = take(joint(oracle_steps=1, language_weight=0.5))
    assert weighted["language"].item() == pytest.approx(values["language"].item(), rel=1e-5)
    expected = values["loss"] + 0.5 * values["language"]
    torch.testing.assert_close(weighted["loss"], expected)
    assert "language" not in take(joint(language_weight=0.5))


def test_rehearsal_teaches_the_given_answers_beside_the_written(
    joint: Callable[..., JointStep],
) -> None:
    step = joint(rehearse=True, language_weight=0.5)
    written, given = micro_batches(step)
    assert (written["answers"], given["answers"]) == (4, 2)
    assert written["language"] == 0 and given["policy"] == 0 and given["kl"] == 0
    chosen = grouped_indices(0, 2, step.lengths, 1, step.seed)
    questions = step.questions([step.samples[i] for i in chosen])
    (told,) = step.given(questions)
    _, hidden = step.policy(told.sequences, questions.visuals, questions.features)
    losses, _ = answer_losses(step.policy, told.sequences, hidden)
    torch.testing.assert_close(given["language"], losses.mean().detach())
    assert written["dice"] > 0 and given["dice"] > 0  # shares of one mean over all six


def test_oracle_steps_come_first(joint: Callable[..., JointStep]) -> None:
    step = joint(oracle_steps=2)
    asked: list[int] = []
    plain = step.questions
    step.questions = lambda s: asked.append(len(s)) or plain(s)  # type: ignore[method-assign]
    with answers_of(*LENGTHS) as calls:
        rows = [values for number in range(3) for values in step(number)]
        told = [("language" in row, "reward" in row) for row in rows]
        assert told == [(True, False), (True, False), (False, True)]
        assert asked == [4, 4, 2]  # batch·G answers either way
        assert len(calls) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"rl_weight": 0.0}, {"train_upper_layers": False}, {"grpo": {"kl": 0.0}}]
)
def test_a_run_survives_batches_without_any_whole_answer(
    changes: dict[str, Any], assemble: Callable[..., Parts], tmp_path: Path
) -> None:
    parts = assemble()
    with answers_of(None):
        train_joint(*parts, stage(steps=2, **changes), tmp_path / "stage")
    rows = [json.loads(r) for r in (tmp_path / "stage" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["well_formed"] == 0 and row["reward"] == 0 for row in rows)


def swapped(states: ReasoningBatch, field: str) -> ReasoningBatch:
    """The states of one half of Eq. 2 exchanged for noise."""
    value = getattr(states, field)
    return states._replace(**{field: torch.randn_like(value)})


@pytest.mark.parametrize(("order", "place"), [(0.0, 0.0), (0.05, 0.1)])
def test_order_and_place_are_used_where_asked(
    order: float, place: float, joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    plain = teachers.segmentation_terms
    monkeypatch.setattr(
        teachers,
        "segmentation_terms",
        lambda *a, **options: given.append(options) or plain(*a, **options),
    )
    step = joint(order_weight=order, place_weight=place)
    take(step)
    assert given == [{"order": order, "place": step.place if place else None}]


@pytest.mark.parametrize(
    ("dropped", "deaf", "heard"),
    [
        ("drop_tokens", "concentration_states", "sae_states"),
        ("drop_concepts", "sae_states", "concentration_states"),
    ],
)
def test_a_dropped_path_cannot_be_leant_on(
    dropped: str, deaf: str, heard: str, joint: Callable[..., JointStep]
) -> None:
    step = joint(**{dropped: 1.0})
    _, questions, states, _ = answered(step)
    terms = step.teacher.supervise(states, questions)
    same = step.teacher.supervise(swapped(states, deaf), questions)
    other = step.teacher.supervise(swapped(states, heard), questions)
    for name in ("confidence", *MASKS):
        torch.testing.assert_close(same[name], terms[name], atol=0, rtol=0)
    assert (other["confidence"] - terms["confidence"]).abs().max() > 1e-4


def test_gates_close_one_path_at_most_at_their_rates(joint: Callable[..., JointStep]) -> None:
    step = joint(drop_tokens=0.3, drop_concepts=0.5)
    torch.manual_seed(0)
    gates = step.teacher.gates(4000, torch.device("cpu"))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert gates.sum(1).min() == 1
    assert (1 - gates.mean(0)).tolist() == pytest.approx([0.3, 0.5], abs=0.03)
    assert joint().teacher.gates(7, torch.device("cpu")).tolist() == [[1, 1]] * 7
    with pytest.raises(ValidationError, match="shares of the same answers"):
        stage(drop_tokens=0.6, drop_concepts=0.5)


def test_freezing_names_its_parts(assemble: Callable[..., Parts]) -> None:
    policy, encoder, interface, _ = assemble()
    named = freeze(policy, encoder, interface, stage())
    assert named.keys() == stage().multipliers.model_dump().keys()
    owned = [id(p) for part in named.values() for p in part.parameters()]
    assert len(owned) == len(set(owned))  # no weight is moved twice in a step


def test_lower_layers_may_train_as_well(joint: Callable[..., JointStep]) -> None:
    """The autoencoder stays as it is, and passes gradients on to the layers before it."""
    step = joint(train_lower_layers=True, rl_weight=0.0, drop_tokens=1.0, place_weight=0.0)
    step_and_backward(step)
    below = [reached(layer) for layer in step.policy.backbone.layers[:2]]
    assert all(any(found.values()) for found in below)
    assert not any(p.requires_grad for p in step.interface.sae.parameters())
    above = reached(step.policy.backbone.layers[2])
    assert not any(above.values())  # concepts alone, read below it
    with pytest.raises(ValidationError, match="train_upper_layers"):
        stage(train_lower_layers=True, train_upper_layers=False)
    with pytest.raises(ValidationError, match="adapters"):
        stage(train_lower_layers=True, lora={"rank": 2})


def test_keys_are_those_of_predict(assemble: Callable[..., Parts], tmp_path: Path) -> None:
    """The padding of a picture that is not square is blank for both."""
    encoder = assemble().encoder
    image = np.random.default_rng(0).integers(0, 255, (30, 61, 3), dtype=np.uint8)
    path = tmp_path / "wide.png"
    Image.fromarray(image).save(path)
    with torch.no_grad():
        wanted = encoder(encoder.preprocess([image])[0])[0]
    found = key_memo(encoder, [path])(path)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), atol=0, rtol=0)


def forced_answers(rollouts: Rollouts, questions: Questions, rewards: Tensor) -> Answers:
    sequences, is_answer, log_probs, _, good, *_ = rollouts
    gains = advantages(rewards.view(2, 2)).flatten()
    return Answers(questions, sequences, is_answer, good, log_probs, gains, forced=True)


def test_a_model_that_never_writes_the_form_is_shown_it(joint: Callable[..., JointStep]) -> None:
    """While the form is forced it is taught; afterwards it has to be earned."""
    step = joint(batch=2, rollout={"forced_steps": 1})
    torch.manual_seed(0)
    taught, alone = (values for number in range(2) for values in step(number))
    assert taught["well_formed"] == 1 and alone["well_formed"] < 1  # a random policy
    assert "form" not in alone
    rollouts, questions, _, hidden = answered(step)
    terms = step.reinforcement(forced_answers(rollouts, questions, torch.rand(4)), hidden)
    opening, ending = len(step.policy.prompt.open_ids), len(step.policy.prompt.ending)
    assert len(terms["form"]) == 4 * (opening + ending)
    logits = step.policy.language_logits(hidden[:, :-1]).float()
    logits[..., step.policy.backbone.placeholder_ids] = -torch.inf
    ids, row = rollouts.sequences.ids, 1  # its answer is the longest: it ends with the sequence
    told = logits[row].log_softmax(-1).gather(1, ids[row, 1:, None])[:, 0]
    first = int(rollouts.is_answer[row].nonzero()[0]) - 1
    wanted = torch.cat([told[first : first + opening], told[-ending:]])
    torch.testing.assert_close(terms["form"].view(4, -1)[row], -wanted)


def test_a_forced_form_is_no_merit(joint: Callable[..., JointStep]) -> None:
    """Its tokens were not the policy's choice: their reward moves nothing."""
    step = joint(batch=2, grpo={"kl": 0.0})
    rollouts, questions, _, hidden = answered(step)
    hidden = hidden.detach().requires_grad_()
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])
    terms = step.reinforcement(forced_answers(rollouts, questions, rewards), hidden)
    terms["policy"].sum().backward()
    opening, ending = len(step.policy.prompt.open_ids), len(step.policy.prompt.ending)
    reached = hidden.grad.abs().sum(-1) > 0
    first = int(rollouts.is_answer[1].nonzero()[0]) - 1  # where its first token is decided
    assert reached[1, first + opening : -ending - 1].all()
    assert not reached[1, : first + opening].any() and not reached[1, -ending - 1 :].any()


def test_a_forced_form_is_no_drift(joint: Callable[..., JointStep]) -> None:
    """Nor does the reference have a say in it."""
    step = joint(batch=2, rl_weight=1.0, grpo={"kl": 0.5})
    rollouts, questions, _, hidden = answered(step)
    hidden = hidden.detach().requires_grad_()
    former = step.reference.backbone.final_norm.weight
    former.copy_(1 + torch.rand_like(former))
    terms = step.reinforcement(forced_answers(rollouts, questions, torch.ones(4)), hidden)
    terms["policy"].sum().backward()
    opening, ending = len(step.policy.prompt.open_ids), len(step.policy.prompt.ending)
    first = int(rollouts.is_answer[1].nonzero()[0]) - 1
    reached = hidden.grad[1].abs().sum(-1) > 0
    assert reached[first + opening : -ending - 1].all()
    assert reached.sum() == len(reached[first + opening : -ending - 1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_drop_out_in_the_pass_with_gradient_only(
    dropout: float, joint: Callable[..., JointStep]
) -> None:
    step = joint(lora={"rank": 2, "dropout": dropout})
    with torch.no_grad():
        for layer in adapted(step.policy):  # they start at zero, where nothing shows
            for matrix in layer.lora_B.values():
                matrix.weight.normal_()
    rollouts, questions, states, _ = answered(step)
    written = rollouts.states.concentration_states
    told = states.concentration_states
    assert torch.allclose(told, written, rtol=1e-4, atol=1e-4) == (dropout == 0)
    with evaluating(step.policy):
        plain, _ = step.policy(rollouts.sequences, questions.visuals, questions.features)
    torch.testing.assert_close(plain.concentration_states, written, rtol=1e-4, atol=1e-4)
