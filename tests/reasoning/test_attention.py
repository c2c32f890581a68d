"""What the concentration tokens look at: read while generating, against a plain second pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from forced import answers_of

from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind

SIZES = ((40, 90), (64, 48))
ASKED = ("the mug", "everything one could drink from, please, left of the plate")


@pytest.fixture(scope="module")
def visuals(policy: Policy) -> list[VisualInput]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [policy.backbone.prepare(picture) for picture in pictures]


@pytest.fixture
def eager(policy: Policy) -> Iterator[Policy]:
    before = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    yield policy
    policy.model.set_attn_implementation(before)


def test_attention_is_that_of_a_plain_pass(eager: Policy, visuals: list[VisualInput]) -> None:
    with answers_of(5, 11):
        written = eager.generate(visuals, ASKED, attention=True)
    assert written.image_attention is not None
    sequences = written.sequences
    with torch.no_grad():
        output = eager.model.model(
            input_ids=sequences.ids,
            attention_mask=sequences.attention,
            use_cache=False,
            output_attentions=True,
            **eager.backbone.image_arguments(visuals),
            **eager.backbone.position_arguments(sequences.ids),
        )
    mean = torch.stack(output.attentions).mean(dim=(0, 2))  # over layers and heads
    for row, found in enumerate(written.image_attention):
        kinds = sequences.kinds[row]
        wanted = mean[row][kinds == TokenKind.CONCENTRATION][:, kinds == TokenKind.IMAGE]
        assert wanted.shape == (6, np.prod(visuals[row].grid))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_an_answer_without_tokens_looks_at_nothing(
    eager: Policy, visuals: list[VisualInput]
) -> None:
    written = eager.generate(visuals, ASKED, max_new_tokens=4, attention=True)
    assert written.image_attention is not None
    for found, visual in zip(written.image_attention, visuals, strict=True):
        assert found.shape == (0, np.prod(visual.grid))


def test_there_is_none_unless_asked_for_and_shown(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    assert policy.model.config._attn_implementation == "sdpa"
    assert policy.generate(visuals, ASKED, max_new_tokens=2, attention=True).image_attention is None
    policy.model.set_attn_implementation("eager")
    try:
        assert policy.generate(visuals, ASKED, max_new_tokens=2).image_attention is None
    finally:
        policy.model.set_attn_implementation("sdpa")
