"""Switch SegCompass's concepts off, ask for one slot, and CoPRS is what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import WIDTH, policy_config, tiny_head, tiny_sae, tiny_sam
from torch import Tensor

from segcompass.data.samples import read_dataset
from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.base import Interface
from segcompass.interfaces.concentration_token import ConcentrationToken, ConcentrationTokenConfig
from segcompass.interfaces.concept_slots import ConceptSlots, Fusion
from segcompass.learning.segmentation import segmentation_terms
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy
from segcompass.types import ReasoningBatch, Sample

L = 7


class TokenItself(Fusion):
    """Eq. 2 without concepts: the query is the concentration token's state."""

    def forward(self, tokens: Tensor, concepts: Tensor, gates: Tensor | None = None) -> Tensor:
        return tokens


@pytest.fixture
def pair() -> tuple[ConceptSlots, ConcentrationToken]:
    """Both interfaces around one segmenter, with one slot and mappers of equal weights."""
    torch.manual_seed(0)
    decoder, head = MaskDecoder(tiny_sam()), tiny_head()
    concepts = ConceptSlots(head, tiny_sae(), decoder, policy_width=WIDTH, slots=1)
    concepts.fusion = TokenItself(WIDTH, head.codebook_width)
    token = ConcentrationToken(ConcentrationTokenConfig(mapper=head.mapper), decoder, WIDTH)
    token.mapper.load_state_dict(concepts.mapper.state_dict())
    return concepts, token


@pytest.fixture(scope="module")
def samples(scenes_root: Path) -> list[Sample]:
    """Questions with none, one and several targets."""
    found = read_dataset(scenes_root, "train") + read_dataset(scenes_root, "val")
    assert {min(len(s.targets), 2) for s in found} == {0, 1, 2}
    return found


def asked(samples: list[Sample]) -> tuple[ReasoningBatch, Tensor, list[Frame]]:
    """States of answers, image keys and frames, random but the same every time."""
    draw, count = torch.Generator().manual_seed(3), len(samples)
    kinds = torch.tensor([0, 1, 2, 3, 4, 4, 5]).expand(count, L)
    states = ReasoningBatch(
        torch.randint(99, (count, L), generator=draw),
        kinds,
        3 * torch.randn(count, L, WIDTH, generator=draw),
        3 * torch.randn(count, 1, WIDTH, generator=draw),
        torch.ones(count, dtype=torch.bool),
    )
    keys = torch.randn(count, 32, 8, 8, generator=draw)
    return states, keys, [Frame.fit(s.image_hw, 64) for s in samples]


def test_slots_and_masks_are_equal(
    pair: tuple[ConceptSlots, ConcentrationToken], samples: list[Sample]
) -> None:
    states, keys, frames = asked(samples)
    ours, theirs = (side.align(states, keys, frames=frames) for side in pair)
    assert ours.codes is not None and theirs.codes is None
    for part, expected in zip(theirs.slots, ours.slots, strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(theirs.confidence_logits, ours.confidence_logits)
    masks = [
        side.decode(keys, alignment, frames=frames)
        for side, alignment in zip(pair, (ours, theirs), strict=True)
    ]
    assert torch.equal(*masks)


def test_losses_and_their_gradients_are_equal(
    pair: tuple[ConceptSlots, ConcentrationToken], samples: list[Sample]
) -> None:
    states, keys, frames = asked(samples)

    def learn(side: Interface) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        alignment = side.align(states, keys, frames=frames)
        terms = segmentation_terms(side, keys, alignment, samples, frames)
        torch.stack([t.mean() for t in terms.values()]).sum().backward()
        grads = {n: p.grad.clone() for n, p in side.mapper.named_parameters() if p.grad is not None}
        side.decoder.zero_grad()
        return terms, grads

    (ours, our_grads), (theirs, their_grads) = map(learn, pair)
    assert ours.keys() == theirs.keys() >= {"confidence", "heatmap_bce", "dice", "focal", "iou"}
    for name, values in ours.items():
        assert torch.equal(theirs[name], values), name
    assert {*our_grads} == {*their_grads} == {n for n, _ in pair[0].mapper.named_parameters()}
    for name, gradient in our_grads.items():
        assert torch.equal(their_grads[name], gradient), name
        assert gradient.any(), name


def test_predictions_are_equal(
    pair: tuple[ConceptSlots, ConcentrationToken],
    samples: list[Sample],
    tiny_model: Path,
) -> None:
    policy = load_policy(tiny_model / "policy", policy_config("qwen2_5_vl", slots=1))
    encoder = ImageEncoder(tiny_sam())
    pictures = [s.image_path for s in samples[:3]]
    questions = [s.instruction for s in samples[:3]]
    answers = [
        SegCompass(policy, encoder, side, threshold=0.3).eval().predict_batch(pictures, questions)
        for side in pair
    ]
    for ours, theirs in zip(*answers, strict=True):
        assert ours.text == theirs.text
        assert ours.slot_masks.shape == (1, *ours.image_rgb.shape[:2])
        for field in ("slot_masks", "slot_scores", "accepted", "low_res_logits", "heatmap_logits"):
            assert (getattr(ours, field) == getattr(theirs, field)).all(), field
        assert ours.codes is not None and ours.slot_attention is not None
        assert theirs.codes is theirs.slot_attention is theirs.concept_vectors is None
