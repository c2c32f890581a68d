"""The sparse way to encode equals the dense one, in values and gradients; Eq. 7 by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from pydantic import ValidationError

from segcompass.concepts import sparse_autoencoder
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.concepts.sparse_codes import to_dense


def random_sae(
    seed: int, d_in: int = 6, d_sae: int = 20, threshold: float = 0.0, centre: bool = False
) -> SparseAutoencoder:
    """An SAE in which no parameter is tied to another or zero."""
    torch.manual_seed(seed)
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=d_in, d_sae=d_sae, threshold=threshold, apply_b_dec_to_input=centre
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 5),
    chunk=st.integers(1, 25),
    threshold=st.sampled_from([0.0, 0.7, 1e6]),
    centre=st.booleans(),
)
def test_sparse_equals_dense_in_values_and_gradients(
    seed: int, n: int, chunk: int, threshold: float, centre: bool
) -> None:
    sae = random_sae(seed, threshold=threshold, centre=centre)
    z = torch.randn(n, 6, requires_grad=True)
    upstream = torch.randn(n, 20)

    activations = sae.encode(z)
    dense = activations * (activations > threshold)
    codes = sae.encode_sparse(z, chunk=chunk)

    torch.testing.assert_close(to_dense(codes), dense)
    keys = codes.rows * 20 + codes.columns
    assert bool((keys.diff() > 0).all())  # by token, then by concept; no entry twice
    (expected,) = torch.autograd.grad((dense * upstream).sum(), z)
    (found,) = torch.autograd.grad((to_dense(codes) * upstream).sum(), z)
    torch.testing.assert_close(found, expected)


def test_blocks_of_rows_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, z = random_sae(3), torch.randn(11, 6)
    whole = sae.encode_sparse(z)
    monkeypatch.setattr(sparse_autoencoder, "_MIN_ROWS", 4)
    monkeypatch.setattr(sparse_autoencoder, "_BUFFER_ELEMENTS", 1)
    blocks = sae.encode_sparse(z)
    assert blocks.rows.tolist() == whole.rows.tolist()
    assert blocks.columns.tolist() == whole.columns.tolist()
    torch.testing.assert_close(blocks.values, whole.values)


def test_gradients_agree_with_finite_differences() -> None:
    sae = random_sae(1, threshold=0.3).double()
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sae.encode_sparse(x, chunk=7).values, (z,))


def test_encoding_sparsely_leaves_the_autoencoder_frozen() -> None:
    sae = random_sae(2)
    z = torch.randn(4, 6, requires_grad=True)
    sae.encode_sparse(z).values.sum().backward()
    assert z.grad is not None
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_no_tensor_of_tokens_by_latents_is_ever_made() -> None:
    sae = random_sae(0, d_in=4, d_sae=512, threshold=4.0)
    z = torch.randn(128, 4, requires_grad=True)
    with Largest() as largest:
        sae.encode_sparse(z, chunk=16).values.sum().backward()
    assert largest.elements <= 512 * 32  # the weights and the sparse entries, not 128 × 512


def test_start_is_tied_small_and_centred() -> None:
    mean = torch.arange(4.0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=4, d_sae=10), mean=mean)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((10,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.t())
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.b_dec.data, mean)
    assert not sae.b_enc.any()


@pytest.mark.parametrize("weigh", [False, True])
def test_loss_is_equation_7(weigh: bool) -> None:
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=2, d_sae=2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    loss = sae.loss(torch.tensor([[1.0, 4.0], [3.0, -1.0]]), 0.1, weigh_by_decoder=weigh)
    # activations (1, 4) and (3, 0); reconstructions (2, 2) and (6, 0)
    reconstruction = ((1 + 4) + (9 + 1)) / 2
    sparsity = ((2 + 2) + 6) / 2 if weigh else ((1 + 4) + 3) / 2
    assert math.isclose(loss.reconstruction.item(), reconstruction)
    assert math.isclose(loss.sparsity.item(), sparsity)
    assert math.isclose(loss.total.item(), reconstruction + 0.1 * sparsity, rel_tol=1e-6)


def test_training_reduces_the_loss_and_keeps_the_memory_layout() -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=32))
    optimiser = torch.optim.AdamW(sae.parameters(), lr=1e-2)
    z = torch.randn(64, 8)
    first = sae.loss(z, 0.01).total.item()
    for _ in range(50):
        optimiser.zero_grad()
        sae.loss(z, 0.01).total.backward()
        optimiser.step()
    assert sae.loss(z, 0.01).total.item() < 0.5 * first
    assert sae.W_enc.t().is_contiguous()


@pytest.mark.parametrize("centre", [False, True])
def test_folding_the_input_scale_changes_units_only(centre: bool) -> None:
    sae, z = random_sae(5, centre=centre), torch.randn(4, 6)
    before = sae(3.0 * z)
    sae.fold_input_scale(3.0)
    after = sae(z)
    torch.testing.assert_close(after.activations, before.activations)
    torch.testing.assert_close(after.reconstruction, before.reconstruction / 3.0)


def test_folding_decoder_norms_keeps_the_reconstruction() -> None:
    sae, z = random_sae(6), torch.randn(4, 6)
    before, norms = sae(z), sae.W_dec.norm(dim=-1)
    sae.fold_decoder_norms()
    after = sae(z)
    torch.testing.assert_close(after.activations, before.activations * norms)
    torch.testing.assert_close(after.reconstruction, before.reconstruction)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20))


def test_wrong_inputs_are_named() -> None:
    sae = random_sae(0)
    with pytest.raises(ValueError, match=r"width 6, got shape \(2, 5\)"):
        sae.encode_sparse(torch.randn(2, 5))
    with pytest.raises(ValueError, match="flatten batch and tokens"):
        sae.encode_sparse(torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="positive chunk"):
        sae.encode_sparse(torch.randn(2, 6), chunk=0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        SparseAutoencoderConfig(d_in=2, d_sae=2, threshold=-1.0)
