"""Folders go to SAELens and come from it with equal encodings (extra `interop`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig

os.environ.setdefault("WANDB_MODE", "disabled")  # a dependency of SAELens that would log in
sae_lens = pytest.importorskip("sae_lens", reason="pip install segcompass[interop]")

DTYPES = [torch.float32, torch.bfloat16]


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """In bf16, SAELens rounds product and bias apart, and we round them together."""
    half = found.dtype == torch.bfloat16
    tolerances = {"rtol": 0.0, "atol": 2**-6 * float(wanted.abs().max())} if half else {}
    torch.testing.assert_close(found, wanted, **tolerances)


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(dtype) * 3 + 1


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saelens_opens_what_we_write(tmp_path: Path, centre: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(d_in=6, d_sae=20, apply_b_dec_to_input=centre)
    sae = SparseAutoencoder(config).to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.fold_input_scale(0.25)
    sae.save(tmp_path, {"model_name": "nano", "hook_name": "model.language_model.layers.1"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.architecture() == "standard"
    assert theirs.cfg.metadata.hook_name == "model.language_model.layers.1"
    z = states(dtype)
    with torch.no_grad():
        assert_equal(theirs.encode(z), sae.encode(z))
        assert_equal(theirs(z), sae(z).reconstruction)
    assert bool((sae.encode(z) > 0).any())


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_open_what_saelens_writes(tmp_path: Path, centre: bool, dtype: torch.dtype) -> None:
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    config = StandardSAEConfig(d_in=6, d_sae=20, apply_b_dec_to_input=centre, dtype=name)
    theirs = StandardSAE(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    theirs.save_model(str(tmp_path))
    sae = SparseAutoencoder.load(tmp_path)
    assert sae.config.apply_b_dec_to_input is centre and sae.W_enc.dtype == dtype
    z = states(dtype)
    with torch.no_grad():
        assert_equal(sae.encode(z), theirs.encode(z))
        assert_equal(sae(z).reconstruction, theirs(z))


def test_an_sae_trained_by_saelens_is_read(tmp_path: Path) -> None:
    """A training SAE is saved for inference first, as SAELens's runners do."""
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

    torch.manual_seed(0)
    theirs = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=6, d_sae=20))
    theirs.save_inference_model(str(tmp_path))
    sae, z = SparseAutoencoder.load(tmp_path), states()
    with torch.no_grad():
        assert_equal(sae.encode(z), theirs.encode(z))


def test_other_architectures_of_saelens_are_refused_by_name(tmp_path: Path) -> None:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    TopKSAE(TopKSAEConfig(d_in=6, d_sae=20, k=3)).save_model(str(tmp_path))
    with pytest.raises(ValueError, match="architecture is 'topk', only 'standard'"):
        SparseAutoencoder.load(tmp_path)
