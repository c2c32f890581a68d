"""The SegCompass interface: what its gates let through, and what the SAE reads."""

from __future__ import annotations

import pytest
import torch
from tiny import LATENTS, WIDTH, tiny_head, tiny_sae, tiny_sam
from torch import Tensor

from segcompass.concepts.sparse_codes import to_dense
from segcompass.geometry import Frame
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.base import PATHS
from segcompass.interfaces.concept_slots import ConceptSlots, Fusion
from segcompass.types import ReasoningBatch, TokenKind

B, L, K, C = 3, 10, 4, 16
BOTH, TOKENS, CONCEPTS = (torch.tensor([PATHS[name]]) for name in ("both", "tokens", "concepts"))


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    torch.manual_seed(0)
    return Fusion(WIDTH, C)


@pytest.fixture(scope="module")
def interface() -> ConceptSlots:
    torch.manual_seed(0)
    return ConceptSlots(
        tiny_head(), tiny_sae(), MaskDecoder(tiny_sam()), policy_width=WIDTH, slots=K
    )


def paths(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, WIDTH, generator=draw), torch.randn(B, K, C, generator=draw)


def reasoning(seed: int = 0) -> ReasoningBatch:
    """Sequences of every kind of token, the first row padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([1, 2, 2, 3, 4, 4, 5, 5, 5, 5]).expand(B, L).clone()
    kinds[0, :2] = int(TokenKind.PADDING)
    return ReasoningBatch(
        torch.randint(99, (B, L), generator=draw),
        kinds,
        3 * torch.randn(B, L, WIDTH, generator=draw),
        torch.randn(B, K, WIDTH, generator=draw),
        torch.ones(B, dtype=torch.bool),
    )


FRAMES = [Frame.fit((64, 64), 64)] * B


def keys() -> Tensor:
    return torch.randn(B, 32, 8, 8, generator=torch.Generator().manual_seed(9))


def test_open_gates_change_nothing(fusion: Fusion) -> None:
    tokens, concepts = paths()
    plain = fusion(tokens, concepts)
    assert torch.equal(fusion(tokens, concepts, BOTH), plain)
    assert torch.equal(fusion(tokens, concepts, torch.ones(B, 2)), plain)


def test_a_closed_gate_cuts_its_path_off_and_only_that(fusion: Fusion) -> None:
    tokens, concepts = paths()
    other_tokens, other_concepts = paths(1)
    plain = fusion(tokens, concepts)
    for gates, same, changed in (
        (TOKENS, (tokens, other_concepts), (other_tokens, concepts)),
        (CONCEPTS, (other_tokens, concepts), (tokens, other_concepts)),
    ):
        cut = fusion(tokens, concepts, gates)
        assert torch.equal(fusion(*same, gates), cut)
        assert (fusion(*changed, gates) - cut).abs().amax(-1).min() > 1e-3
        assert (plain - cut).abs().amax(-1).min() > 1e-3


def test_without_concepts_not_even_their_bias_is_left(fusion: Fusion) -> None:
    """The gate stands behind the projection: cut off means zero, not the projection of zero."""
    tokens, _ = paths()
    assert fusion.project.bias.abs().max() > 0
    silent = torch.cat([tokens, torch.zeros_like(tokens)], -1)
    expected = torch.nn.functional.silu(fusion.mix(fusion.norm(silent)))
    torch.testing.assert_close(fusion(tokens, torch.zeros(B, K, C), TOKENS), expected)


def test_every_row_has_its_own_gates(fusion: Fusion) -> None:
    tokens, concepts = paths()
    mixed = fusion(tokens, concepts, torch.cat([BOTH, TOKENS, CONCEPTS]))
    for row, gates in enumerate((BOTH, TOKENS, CONCEPTS)):
        alone = fusion(tokens[row : row + 1], concepts[row : row + 1], gates)
        torch.testing.assert_close(mixed[row], alone[0])


def test_no_gradient_passes_a_closed_gate(fusion: Fusion) -> None:
    tokens, concepts = (part.requires_grad_() for part in paths())
    for gates, reached in ((TOKENS, (True, False)), (CONCEPTS, (False, True))):
        gradients = torch.autograd.grad(
            fusion(tokens, concepts, gates).square().sum(), [tokens, concepts]
        )
        assert tuple(bool(g.any()) for g in gradients) == reached


def test_slots_follow_the_path_that_is_left(interface: ConceptSlots) -> None:
    states, others = reasoning(), reasoning(1)
    crossed = {
        "tokens": states._replace(sae_states=others.sae_states),
        "concepts": states._replace(concentration_states=others.concentration_states),
    }
    for name, same in crossed.items():
        other = crossed["concepts" if name == "tokens" else "tokens"]
        gates = torch.tensor([PATHS[name]])
        cut = interface.align(states, keys(), frames=FRAMES, gates=gates)
        again = interface.align(same, keys(), frames=FRAMES, gates=gates)
        assert torch.equal(again.queries, cut.queries)
        for part, expected in zip(again.slots, cut.slots, strict=True):
            assert torch.equal(part, expected)
        moved = interface.align(other, keys(), frames=FRAMES, gates=gates)
        assert (moved.queries - cut.queries).abs().amax((1, 2)).min() > 1e-3


def test_concepts_are_shown_even_where_they_are_cut_off(interface: ConceptSlots) -> None:
    whole, cut = (
        interface.align(reasoning(), keys(), frames=FRAMES, gates=g) for g in (None, TOKENS)
    )
    assert torch.equal(whole.concept_vectors, cut.concept_vectors)
    assert torch.equal(whole.codes.values, cut.codes.values)
    both = interface.align(reasoning(), keys(), frames=FRAMES, gates=BOTH)
    assert torch.equal(both.queries, whole.queries)


def test_the_sae_reads_prompt_and_thought_and_nothing_else(interface: ConceptSlots) -> None:
    states = reasoning()
    codes = interface.align(states, keys(), frames=FRAMES).codes
    dense = to_dense(codes).view(B, L, LATENTS)
    expected = interface.sae.encode(states.sae_states)
    hidden = (states.token_kinds == TokenKind.PADDING) | (
        states.token_kinds == TokenKind.CONCENTRATION
    )
    assert not dense[hidden].any()
    torch.testing.assert_close(dense[~hidden], expected[~hidden])
    noise = torch.where(hidden[..., None], 100.0, states.sae_states)
    again = interface.align(states._replace(sae_states=noise), keys(), frames=FRAMES)
    torch.testing.assert_close(
        again.queries, interface.align(states, keys(), frames=FRAMES).queries
    )


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="reads states of width 8, the policy has 32"):
        ConceptSlots(
            tiny_head(), tiny_sae(width=8), MaskDecoder(tiny_sam()), policy_width=WIDTH, slots=K
        )
