"""Eq. 5: scores by hand, heatmaps, confidences, and what must not change them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from segcompass.grounding.slot_mapper import (
    MAP_BIAS,
    SlotMapper,
    SlotMapperConfig,
    axis_waves,
)


def make(
    confidence: Literal["scores", "query"] = "scores", seed: int = 0, waves: int = 2
) -> SlotMapper:
    torch.manual_seed(seed)
    config = SlotMapperConfig(
        heads=3, head_width=8, confidence=confidence, position_frequencies=waves
    )
    return SlotMapper(config, query_width=10, key_width=12).eval()


def inputs(seed: int = 0, slots: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, slots, 10, generator=rng), torch.randn(2, 12, 5, 7, generator=rng)


@pytest.mark.parametrize("confidence", ["scores", "query"])
def test_shapes(confidence: Literal["scores", "query"]) -> None:
    slots = make(confidence)(*inputs())
    assert slots.scores.shape == (2, 4, 3, 5, 7)
    assert slots.heatmap_logits.shape == (2, 4, 5, 7)
    assert slots.confidence_logits.shape == (2, 4)


@pytest.mark.parametrize("waves", [0, 2])
def test_scores_are_equation_five(waves: int) -> None:
    mapper = make(waves=waves)
    queries, keys = inputs()
    scores = mapper(queries, keys).scores
    keys = torch.cat([keys, axis_waves(5, 7, waves).expand(2, -1, -1, -1)], dim=1)
    for head in range(3):
        rows = slice(head * 8, head * 8 + 8)
        w_q, w_k = mapper.to_q.weight[rows].T, mapper.to_k.weight[rows, :, 0, 0].T
        for b in range(2):
            flat = keys[b].flatten(1).T  # (h*w, C)
            expected = (queries[b] @ w_q) @ (flat @ w_k).T / 8**0.5
            torch.testing.assert_close(scores[b, :, head].flatten(1), expected)


def test_waves_tell_rows_from_columns() -> None:
    waves = axis_waves(4, 2, 1)  # sine and cosine of half a turn down, then across
    assert waves.shape == (4, 4, 2)
    angles = torch.pi * torch.tensor([1, 3, 5, 7]) / 8
    torch.testing.assert_close(waves[0, :, 0], angles.sin())
    torch.testing.assert_close(waves[1, :, 1], angles.cos())
    torch.testing.assert_close(waves[2, 0], torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(waves[3, 3], torch.tensor([0.5**0.5, -(0.5**0.5)]))


def test_without_scores_the_heatmap_is_its_prior() -> None:
    """Queries of zero give scores of zero; the convolutions' own biases are all that is left."""
    mapper = make()
    queries, keys = inputs()
    for parameter in mapper.map_head[0].parameters():
        torch.nn.init.zeros_(parameter)
    slots = mapper(torch.zeros_like(queries), keys)
    torch.testing.assert_close(slots.heatmap_logits, torch.full((2, 4, 5, 7), MAP_BIAS))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(4)))
def test_slots_and_images_do_not_mix(seed: int, order: list[int]) -> None:
    mapper = make(seed=seed)
    queries, keys = inputs(seed)
    slots = mapper(queries, keys)
    for whole, part in zip(slots, mapper(queries[:, order], keys), strict=True):
        torch.testing.assert_close(part, whole[:, order])
    for whole, part in zip(slots, mapper(queries[1:], keys[1:]), strict=True):
        torch.testing.assert_close(part, whole[1:])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16))
def test_padding_never_reaches_the_confidence(seed: int) -> None:
    mapper = make(seed=seed, waves=0)  # with positions a cropped picture is another picture
    queries, keys = inputs(seed)
    padding = torch.zeros(2, 5, 7, dtype=torch.bool)
    padding[0, 3:] = True
    padding[1, :, 4:] = True
    changed = torch.where(padding[:, None], 50 * keys + 3, keys)
    before, after = (mapper(queries, k, padding).confidence_logits for k in (keys, changed))
    torch.testing.assert_close(before, after)
    cropped = mapper(queries[:1], keys[:1, :, :3]).confidence_logits
    torch.testing.assert_close(before[:1], cropped)
    assert not torch.allclose(mapper(queries, keys).confidence_logits, before)


@pytest.mark.parametrize("confidence", ["scores", "query"])
def test_every_output_teaches_the_queries(confidence: Literal["scores", "query"]) -> None:
    mapper = make(confidence)
    queries, keys = inputs()
    queries.requires_grad_()
    for output in mapper(queries, keys):
        (gradient,) = torch.autograd.grad(output.square().sum(), queries, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ((2, 4, 9), (2, 12, 5, 7), r"queries \(B, K, 10\)"),
        ((2, 4, 10), (2, 10, 5, 7), r"image keys \(B, 12, h, w\)"),
        ((2, 4, 10), (12, 5, 7), "image keys"),
        ((3, 4, 10), (2, 12, 5, 7), "3 images, keys of 2"),
    ],
)
def test_disagreeing_widths(queries: tuple[int, ...], keys: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(queries), torch.zeros(keys))


def test_config_refuses_unknown_keys_and_sizes() -> None:
    with pytest.raises(ValidationError):
        SlotMapperConfig(head=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        SlotMapperConfig(heads=0)
