"""States and answers of both families: what is captured, where, and in how many passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WIDTH, policy_config
from torch import Tensor

from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.forced_form import ForcedForm
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Generation, Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import Status, TokenKind

SIZES = ((40, 90), (64, 48), (33, 33))
ASKED = ("the mug", "everything one could drink from, please, left of the plate", "a red plate")
LENGTHS = (20, 33, 9)
THOUGHTS = ("There is a mug at b3.", "None.", "I look for a plate. So the targets are b3 and f6.")


@pytest.fixture(scope="module")
def visuals(policy: Policy) -> list[VisualInput]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [policy.backbone.prepare(picture) for picture in pictures]


@pytest.fixture(scope="module")
def forced(policy: Policy, visuals: list[VisualInput]) -> Generation:
    """Forced answers of unequal lengths, sampled."""
    torch.manual_seed(3)
    with thoughts_of(*LENGTHS):
        return policy.generate(visuals, ASKED, force_form=True, temperature=1.0)


@contextmanager
def thoughts_of(*lengths: int) -> Iterator[None]:
    """Force row r to close its thought after ``lengths[r]`` tokens; random models never do."""

    class Uneven(ForcedForm):
        def _forced(self, row: int, answer: list[int], tail: str) -> list[int] | None:
            self.thought_limit = lengths[row]
            return super()._forced(row, answer, tail)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segcompass.reasoning.policy.ForcedForm", Uneven)
        yield


@contextmanager
def counted(policy: Policy) -> Iterator[list[int]]:
    """Lengths of the inputs of the language model's passes."""
    lengths: list[int] = []
    handle = policy.backbone.final_norm.register_forward_hook(
        lambda _module, inputs, _output: lengths.append(inputs[0].shape[1])
    )
    try:
        yield lengths
    finally:
        handle.remove()


def hooks(policy: Policy) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.modules())


def real(states: Tensor, sequences: Tensor) -> Tensor:
    return states[sequences != TokenKind.PADDING]


def test_padding_does_not_change_states(policy: Policy, visuals: list[VisualInput]) -> None:
    batch = policy.encode(visuals, ASKED, THOUGHTS)
    states, hidden = policy(batch, visuals)
    assert (batch.kinds[:, 0] == TokenKind.PADDING).any()
    assert states.well_formed.all()
    for row, visual in enumerate(visuals):
        alone = policy.encode([visual], [ASKED[row]], [THOUGHTS[row]])
        single, single_hidden = policy(alone, [visual])
        length = alone.ids.shape[1]
        assert torch.equal(batch.ids[row, -length:], alone.ids[0])
        torch.testing.assert_close(
            states.sae_states[row, -length:], single.sae_states[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(hidden[row, -length:], single_hidden[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            states.concentration_states[row], single.concentration_states[0], atol=1e-5, rtol=1e-5
        )


def test_states_are_those_of_the_sae_layer_and_after_the_last_norm(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    batch = policy.encode(visuals[:1], ASKED[:1], THOUGHTS[:1])
    states, hidden = policy(batch, visuals[:1])
    output = policy.model.model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        output_hidden_states=True,
        **policy.backbone.image_arguments(visuals[:1]),
        **policy.backbone.position_arguments(batch.ids),
    )
    layer = policy.config.sae_layer
    torch.testing.assert_close(states.sae_states, output.hidden_states[layer + 1])
    torch.testing.assert_close(hidden, output.last_hidden_state)
    consumed = slice(-1 - policy.slots, -1)  # where they are read, not where they are predicted
    assert batch.ids[0, consumed].tolist() == policy.prompt.slot_ids
    torch.testing.assert_close(
        states.concentration_states[0], output.last_hidden_state[0, consumed]
    )


def test_states_of_generation_are_those_of_a_second_pass(
    policy: Policy, visuals: list[VisualInput], forced: Generation
) -> None:
    """The heart of promise 2: no pass is needed to know what the answer was written with."""
    states = forced.states
    lengths = (states.token_kinds == TokenKind.THOUGHT).sum(1)
    assert len(set(lengths.tolist())) == 3
    sequences = Sequences(states.token_ids, states.token_kinds)
    again, _ = policy(sequences, visuals)
    kinds = states.token_kinds
    assert torch.equal(again.token_kinds, kinds)
    torch.testing.assert_close(
        real(states.sae_states, kinds), real(again.sae_states, kinds), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        states.concentration_states, again.concentration_states, atol=1e-5, rtol=1e-4
    )
    assert states.well_formed.all()
    assert again.well_formed.all()


def test_generation_takes_one_pass_per_token_and_leaves_no_hook(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    before = hooks(policy)
    prompts = policy.encode(visuals, ASKED)
    with counted(policy) as lengths, thoughts_of(*LENGTHS):
        result = policy.generate(visuals, ASKED, force_form=True)
    width = prompts.ids.shape[1]
    answers = result.states.token_ids[:, width:]
    said = int((result.states.token_kinds[:, width:] != TokenKind.PADDING).sum(1).max()) + 1
    assert answers.shape[1] == said - 1  # the longest row's end-of-text is never consumed
    assert lengths == [width] + [1] * (said - 1)  # `said` passes for as many tokens
    assert hooks(policy) == before


def test_a_failing_pass_leaves_no_hook(policy: Policy, visuals: list[VisualInput]) -> None:
    before = hooks(policy)
    batch = policy.encode(visuals, ASKED, THOUGHTS)
    with pytest.raises((ValueError, RuntimeError)):
        policy(batch, visuals[:1])  # more places than pictures
    assert hooks(policy) == before


def test_forced_answers_are_well_formed_whatever_the_weights_say(
    policy: Policy, visuals: list[VisualInput], forced: Generation
) -> None:
    greedy = policy.generate(visuals, ASKED, force_form=True)
    for result in (greedy, forced):
        assert [answer.status for answer in result.answers] == [Status.OK] * 3
        assert all(text.count("<|slot_6|>") == 1 for text in result.texts)
        kinds = result.states.token_kinds
        assert ((kinds == TokenKind.CONCENTRATION).sum(1) == policy.slots).all()
        assert not (result.states.token_ids == policy.prompt.eos_token_id)[
            kinds >= TokenKind.THOUGHT
        ].any()


@pytest.mark.parametrize("room", [0, 5])
def test_forced_answers_respect_the_limit(
    policy: Policy, visuals: list[VisualInput], room: int
) -> None:
    limit = len(policy.prompt.encode_answer("").ids) + 1 + room
    result = policy.generate(visuals, ASKED, force_form=True, max_new_tokens=limit)
    width = policy.encode(visuals, ASKED).ids.shape[1]
    assert result.states.token_ids.shape[1] - width < limit
    assert [answer.status for answer in result.answers] == [Status.OK] * 3


def test_an_answer_without_its_form_has_no_concentration_states(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    result = policy.generate(visuals, ASKED, max_new_tokens=4)
    assert {answer.status for answer in result.answers} <= {Status.TRUNCATED, Status.MALFORMED}
    assert not result.states.well_formed.any()
    assert result.states.concentration_states.shape == (3, policy.slots, WIDTH)
    assert not result.states.concentration_states.any()


def test_answers_never_hold_a_picture(policy: Policy, visuals: list[VisualInput]) -> None:
    """A placeholder in an answer would ask the next pass for a picture there is not."""
    head = policy.model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[policy.backbone.placeholder_ids] = 50 * head.abs().sum(0)
        result = policy.generate(visuals, ASKED, temperature=5.0, max_new_tokens=12)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    width = policy.encode(visuals, ASKED).ids.shape[1]
    answer = result.states.token_ids[:, width:]
    assert not torch.isin(answer, torch.tensor(policy.backbone.placeholder_ids)).any()


def test_sampling_differs_by_seed_and_repeats_with_the_same(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    def texts(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return policy.generate(visuals, ASKED, temperature=1.0, max_new_tokens=12).texts

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_greedy_is_deterministic_and_ignores_the_seed(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        texts.append(policy.generate(visuals, ASKED, max_new_tokens=8).texts)
    assert texts[0] == texts[1]


def test_a_batch_answers_like_its_rows_alone(policy: Policy, visuals: list[VisualInput]) -> None:
    with thoughts_of(*LENGTHS):
        together = policy.generate(visuals, ASKED, force_form=True)
    for row, visual in enumerate(visuals):
        with thoughts_of(LENGTHS[row]):
            alone = policy.generate([visual], [ASKED[row]], force_form=True)
        assert alone.texts[0] == together.texts[row]
        kinds = together.states.token_kinds[row]
        mine = kinds != TokenKind.PADDING
        single = alone.states.token_kinds[0]
        assert torch.equal(single[single != TokenKind.PADDING], kinds[mine])
        torch.testing.assert_close(
            together.states.sae_states[row][mine],
            real(alone.states.sae_states, alone.states.token_kinds),
            atol=1e-5,
            rtol=1e-4,
        )


def test_cached_image_features_give_the_same_states(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    batch = policy.encode(visuals, ASKED, THOUGHTS)
    with torch.no_grad():
        features = policy.backbone.embed_images(visuals)
    assert [len(f) for f in features] == [v.grid[0] * v.grid[1] for v in visuals]
    states, _ = policy(batch, visuals)
    cached, _ = policy(batch, visuals, features)
    torch.testing.assert_close(states.sae_states, cached.sae_states)
    torch.testing.assert_close(states.concentration_states, cached.concentration_states)


def test_the_picture_and_the_question_matter(policy: Policy, visuals: list[VisualInput]) -> None:
    """Else every equality above would be empty."""
    thoughts = THOUGHTS[:1] * 2
    same = policy.encode([visuals[2]] * 2, ["the mug", "the mug"], thoughts)
    other = visuals[2]._replace(pixels=visuals[2].pixels.flip(0).neg())
    first, second = policy(same, [visuals[2], other])[0].concentration_states
    assert (first - second).abs().max() > 1e-3
    asked = policy.encode([visuals[2]] * 2, ["the mug", "the cup"], thoughts)
    first, second = policy(asked, [visuals[2]] * 2)[0].concentration_states
    assert (first - second).abs().max() > 1e-3


def test_gradients_reach_the_layers_above_the_sae(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    states, _ = policy(policy.encode(visuals, ASKED, THOUGHTS), visuals)
    last = policy.backbone.layers[-1].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(states.concentration_states.square().sum(), [last])
    assert gradient.abs().max() > 0


def test_tokens_as_a_reader_sees_them(policy: Policy, visuals: list[VisualInput]) -> None:
    ids = policy.encode(visuals[:1], ASKED[:1], THOUGHTS[:1]).ids[0].tolist()
    texts = policy.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts).lstrip() == policy.prompt.decode(ids).lstrip()


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (0, 0)])
def test_counts_must_agree(
    policy: Policy, visuals: list[VisualInput], counts: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="one of each for every row"):
        policy.generate(visuals[: counts[0]], ASKED[: counts[1]])


def test_there_is_a_conclusion_for_every_thought(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    with pytest.raises(ValueError, match="one of each for every row"):
        policy.encode(visuals, ASKED, THOUGHTS, ["", ""])
    told = policy.encode(visuals, ASKED, THOUGHTS, ["", "", ""])
    assert told.ids.equal(policy.encode(visuals, ASKED, THOUGHTS).ids)


@pytest.mark.parametrize("limit", [0, -3])
def test_an_answer_needs_room(policy: Policy, visuals: list[VisualInput], limit: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        policy.generate(visuals, ASKED, max_new_tokens=limit)


def test_an_sae_layer_must_exist(policy: Policy) -> None:
    family = policy.model.config.model_type
    config = policy_config(family, sae_layer=3)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        Policy(policy.backbone, policy.tokenizer, config)


def test_half_precision(policy_folder: Path, family: str, visuals: list[VisualInput]) -> None:
    policy = load_policy(policy_folder, policy_config(family), dtype=torch.bfloat16)
    result = policy.generate(visuals, ASKED, force_form=True)
    assert result.states.sae_states.dtype == torch.bfloat16
    assert result.states.well_formed.all()
