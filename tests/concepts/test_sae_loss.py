"""The fused Eq. 7 equals the plain one, in values and gradients, dense or sparse, in any blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import Tensor

from segcompass.concepts import sae_loss
from segcompass.concepts.sae_loss import fused_loss
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig

WIDTH, LATENTS = 6, 20


def random_sae(seed: int, *, centre: bool = True, threshold: float = 0.0) -> SparseAutoencoder:
    """In float64, with no parameter tied to another or zero."""
    torch.manual_seed(seed)
    config = SparseAutoencoderConfig(
        d_in=WIDTH, d_sae=LATENTS, threshold=threshold, apply_b_dec_to_input=centre
    )
    sae = SparseAutoencoder(config).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae


def gradients(sae: SparseAutoencoder, total: Tensor) -> list[Tensor]:
    sae.zero_grad()
    (3.0 * total).backward()  # a factor, as in a mean over ranks
    return [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 9),
    rows=st.integers(1, 9),
    centre=st.booleans(),
    weigh=st.booleans(),
    sparse=st.booleans(),
    threshold=st.sampled_from([0.0, 0.6]),
)
def test_it_equals_the_plain_loss(
    seed: int, n: int, rows: int, centre: bool, weigh: bool, sparse: bool, threshold: float
) -> None:
    sae = random_sae(seed, centre=centre, threshold=threshold)
    z, groups = torch.randn(n, WIDTH, dtype=torch.float64), torch.randint(2, (n,))
    plain = sae.loss(z, 0.3, weigh_by_decoder=weigh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_loss, "SPARSE_BELOW", 2.0 if sparse else 0.0)
        budget = rows * 2 * LATENTS * 8
        fused = fused_loss(
            sae, z, 0.3, weigh_by_decoder=weigh, groups=groups, n_groups=2, budget=budget
        )
    torch.testing.assert_close(fused.total, plain.total)
    torch.testing.assert_close(fused.reconstruction, plain.reconstruction)
    torch.testing.assert_close(fused.sparsity, plain.sparsity)
    error = (z - plain.output.reconstruction).square().sum(-1)
    torch.testing.assert_close(fused.errors, error)
    active = plain.output.activations > threshold
    expected = [active[groups == g].sum(0).tolist() for g in range(2)]
    assert fused.fired.tolist() == expected
    names = [name for name, _ in sae.named_parameters()]
    pairs = zip(gradients(sae, fused.total), gradients(sae, plain.total), strict=True)
    for name, (found, wanted) in zip(names, pairs, strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bias", [-50.0, 50.0])  # nothing fires, everything fires
def test_extremes(bias: float) -> None:
    sae, z = random_sae(1), torch.randn(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc.fill_(bias)
    plain, fused = sae.loss(z, 0.1), fused_loss(sae, z, 0.1)
    torch.testing.assert_close(fused.total, plain.total)
    assert fused.fired.tolist() == [[4 * (bias > 0)] * LATENTS]
    for found, wanted in zip(gradients(sae, fused.total), gradients(sae, plain.total), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_decoder_row_of_norm_zero_gives_no_nan() -> None:
    sae, z = random_sae(2), torch.randn(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec[3] = 0
    found = gradients(sae, fused_loss(sae, z, 0.1, weigh_by_decoder=True).total)
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def test_buffers_stay_within_the_budget_and_gradients_keep_the_layout() -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=4, d_sae=512))
    z = torch.randn(256, 4)
    with Largest() as largest:
        fused_loss(sae, z, 0.1, budget=16 * 2 * 512 * 4).total.backward()
    assert largest.elements == 16 * 512  # 16 tokens at a time, not 256
    assert sae.W_enc.grad is not None and sae.W_enc.grad.t().is_contiguous()


def test_gradients_are_handed_out_once() -> None:
    sae = random_sae(3)
    loss = fused_loss(sae, torch.randn(2, WIDTH, dtype=torch.float64), 0.1).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()


@pytest.mark.parametrize("shape", [(0, WIDTH), (3, WIDTH + 1), (1, 3, WIDTH)])
def test_wrong_states_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected states \[n, 6\] of at least one token"):
        fused_loss(random_sae(0), torch.zeros(shape, dtype=torch.float64), 0.1)
