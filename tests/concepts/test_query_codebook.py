"""The codebook equals its dense formulation; padding and order never reach the slots."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from segcompass.concepts.query_codebook import QueryCodebook, QueryCodebookConfig
from segcompass.concepts.sparse_codes import from_dense, spread_rows, to_dense
from segcompass.types import SparseCodes

CONFIG = QueryCodebookConfig(d_sae=12, width=8, slots=3, layers=2, heads=2, ffn=16)


@pytest.fixture(scope="module")
def codebook() -> QueryCodebook:
    torch.manual_seed(0)
    return QueryCodebook(CONFIG)


def random_codes(seed: int, n: int) -> SparseCodes:
    generator = torch.Generator().manual_seed(seed)
    return from_dense(torch.randn(n, 12, generator=generator) * 3, threshold=1.0)


def test_embedding_equals_the_dense_product_in_values_and_gradients(
    codebook: QueryCodebook,
) -> None:
    dense = to_dense(random_codes(1, 7)).requires_grad_()
    upstream = torch.randn(7, 8)
    expected = dense @ codebook.codebook
    found = codebook.embed(from_dense(dense))
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * upstream).sum(), [dense, codebook.codebook])
    given_ = torch.autograd.grad((found * upstream).sum(), [dense, codebook.codebook])
    torch.testing.assert_close(given_[0], wanted[0] * (dense > 0))  # others are not in the codes
    torch.testing.assert_close(given_[1], wanted[1])


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    noise=st.booleans(),
)
def test_padding_never_changes_slots(
    codebook: QueryCodebook, seed: int, left: int, right: int, noise: bool
) -> None:
    codes, valid = random_codes(seed, 5), torch.ones(1, 5, dtype=torch.bool)
    keep = F.pad(valid, (left, right), value=False)
    padded = spread_rows(codes, keep[0])
    if noise:  # even codes that stand on padding are not read
        stray = random_codes(seed + 1, keep.shape[1])
        padded = from_dense(to_dense(padded) + to_dense(stray) * ~keep[0][:, None])
    with torch.no_grad():
        plain = codebook(codes, valid, need_attention=True)
        found = codebook(padded, keep, need_attention=True)
    torch.testing.assert_close(found.vectors, plain.vectors)
    torch.testing.assert_close(
        found.slot_attention[keep[:, None].expand(1, 3, -1)].view(3, 5), plain.slot_attention[0]
    )
    assert not found.slot_attention.masked_select(~keep[:, None]).any()


def test_sequences_of_a_batch_do_not_see_each_other(codebook: QueryCodebook) -> None:
    first, second = random_codes(1, 4), random_codes(2, 4)
    both = from_dense(torch.cat([to_dense(first), to_dense(second)]))
    together = codebook(both, torch.ones(2, 4, dtype=torch.bool)).vectors
    one = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(together[:1], codebook(first, one).vectors)
    torch.testing.assert_close(together[1:], codebook(second, one).vectors)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_slots_read_a_set_of_tokens(codebook: QueryCodebook, seed: int) -> None:
    dense = to_dense(random_codes(seed, 6))
    shuffled = dense[torch.randperm(6, generator=torch.Generator().manual_seed(seed))]
    valid = torch.ones(1, 6, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            codebook(from_dense(shuffled), valid).vectors,
            codebook(from_dense(dense), valid).vectors,
        )


def test_a_sequence_of_padding_alone_gives_finite_slots(codebook: QueryCodebook) -> None:
    valid = torch.tensor([[False, False]])
    result = codebook(from_dense(torch.zeros(2, 12)), valid, need_attention=True)
    assert bool(result.vectors.isfinite().all())
    assert not result.slot_attention.any()


def test_a_valid_token_without_codes_is_still_a_token(codebook: QueryCodebook) -> None:
    codes = from_dense(torch.cat([to_dense(random_codes(4, 2)), torch.zeros(1, 12)]))
    with torch.no_grad():
        read = codebook(codes, torch.tensor([[True, True, True]])).vectors
        left_out = codebook(codes, torch.tensor([[True, True, False]])).vectors
    assert not torch.allclose(read, left_out)


def test_asking_for_attention_changes_nothing_else(codebook: QueryCodebook) -> None:
    codes, valid = random_codes(3, 8), torch.tensor([[True] * 4, [True] * 3 + [False]])
    plain, asked = codebook(codes, valid), codebook(codes, valid, need_attention=True)
    assert plain.slot_attention is None
    torch.testing.assert_close(asked.vectors, plain.vectors)
    assert asked.slot_attention.shape == (2, 3, 4)
    totals = asked.slot_attention.sum(-1)
    assert bool((totals > 0).all() and (totals < 1).all())  # the rest goes to the slots


def reference_encoder(codebook: QueryCodebook) -> nn.TransformerEncoder:
    """PyTorch's own pre-norm encoder with the same weights."""
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    for ours, theirs in zip(codebook.blocks, encoder.layers, strict=True):
        theirs.self_attn.in_proj_weight.data = torch.cat([ours.to_q.weight, ours.to_kv.weight])
        theirs.self_attn.in_proj_bias.data = torch.cat([ours.to_q.bias, ours.to_kv.bias])
        theirs.self_attn.out_proj.load_state_dict(ours.to_out.state_dict())
        theirs.linear1.load_state_dict(ours.ffn_in.state_dict())
        theirs.linear2.load_state_dict(ours.ffn_out.state_dict())
        theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
        theirs.norm2.load_state_dict(ours.ffn_norm.state_dict())
    return encoder


def test_the_encoder_is_the_standard_one_with_slots_prepended(codebook: QueryCodebook) -> None:
    codes, valid = random_codes(9, 10), torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    tokens = codebook.embed(codes).view(2, 5, 8)
    x = torch.cat([codebook.slots.expand(2, -1, -1), tokens], dim=1)
    ignored = ~F.pad(valid, (3, 0), value=True)
    expected: Tensor = reference_encoder(codebook)(x, src_key_padding_mask=ignored)[:, :3]
    torch.testing.assert_close(codebook(codes, valid).vectors, expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_and_the_codes_receive_gradients(codebook: QueryCodebook) -> None:
    codebook.zero_grad()
    dense = to_dense(random_codes(5, 6)).requires_grad_()
    vectors = codebook(from_dense(dense), torch.ones(2, 3, dtype=torch.bool)).vectors
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert dense.grad is not None and bool(dense.grad.any())
    for name, parameter in codebook.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_codes_in_another_precision_are_accepted(codebook: QueryCodebook) -> None:
    codes = random_codes(6, 4)
    half = codes._replace(values=codes.values.bfloat16())
    valid = torch.ones(1, 4, dtype=torch.bool)
    close = codebook(codes, valid).vectors
    torch.testing.assert_close(codebook(half, valid).vectors, close, rtol=0.05, atol=0.05)


def test_codes_that_do_not_fit_are_named(codebook: QueryCodebook) -> None:
    with pytest.raises(ValueError, match=r"4 rows, the batch has \(1, 5\) tokens"):
        codebook(random_codes(0, 4), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="9 concepts, the codebook has 12 rows"):
        codebook(from_dense(torch.ones(2, 9)), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValidationError, match="cannot be divided among 3 heads"):
        QueryCodebookConfig(d_sae=4, width=8, heads=3)
