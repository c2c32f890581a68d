"""The clock of latents, and what wakes the dead ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.io.errors import CheckpointError
from segcompass.learning.activations.latents import LatentClock, modality_of, new_latents, push_up
from segcompass.types import TokenKind


def test_pictures_are_one_modality_and_everything_else_the_other() -> None:
    kinds = torch.tensor(
        [TokenKind.TEMPLATE, TokenKind.IMAGE, TokenKind.THOUGHT], dtype=torch.uint8
    )
    assert modality_of(kinds).tolist() == [0, 1, 0]


def test_the_clock_counts_tokens_since_a_latent_fired() -> None:
    clock = LatentClock(3)
    text, image = [1, 0, 0], [0, 2, 0]
    clock.update(torch.tensor([text, image]), torch.tensor([4, 6]))
    assert clock.since.tolist() == [[0, 4, 4], [6, 0, 6], [0, 0, 10]]
    clock.update(torch.tensor([[0, 1, 0], [0, 0, 0]]), torch.tensor([5, 0]))
    assert clock.since.tolist() == [[5, 0, 9], [6, 0, 6], [5, 0, 15]]
    assert clock.seen == 15
    assert clock.dead(6).tolist() == [False, False, True]
    assert clock.dead(5).tolist() == [True, False, True]
    clock.restart(torch.tensor([2]))
    assert clock.since[:, 2].tolist() == [0, 0, 0] and clock.dead(5).tolist()[0]


def test_the_clock_survives_on_disk_and_names_what_does_not_fit(tmp_path: Path) -> None:
    clock = LatentClock(3)
    clock.update(torch.tensor([[1, 0, 0], [0, 0, 1]]), torch.tensor([4, 6]))
    clock.save(tmp_path / "clock.safetensors")
    again = LatentClock(3)
    again.load(tmp_path / "clock.safetensors")
    assert torch.equal(again.since, clock.since) and again.seen == 10
    with pytest.raises(CheckpointError, match="counts 3 latents, the config has 4"):
        LatentClock(4).load(tmp_path / "clock.safetensors")
    (tmp_path / "clock.safetensors").write_bytes(b"half")
    for name in ("clock", "none"):
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors is missing or damaged"):
            again.load(tmp_path / f"{name}.safetensors")


@pytest.fixture
def sae() -> SparseAutoencoder:
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(d_in=4, d_sae=8, apply_b_dec_to_input=True)
    sae = SparseAutoencoder(config, mean=torch.randn(4))
    with torch.no_grad():
        sae.b_enc[:3] = -20.0  # these never fire
    return sae


DEAD = torch.arange(8) < 3


def test_the_ordinary_loss_cannot_wake_the_dead_and_the_push_does(sae: SparseAutoencoder) -> None:
    z = torch.randn(64, 4)
    sae.loss(z, 0.0).total.backward()
    assert sae.b_enc.grad is not None and not sae.b_enc.grad[DEAD].any()
    optimiser = torch.optim.SGD(sae.parameters(), lr=1.0)
    for _ in range(400):
        optimiser.zero_grad()
        push_up(sae, z, DEAD).backward()
        optimiser.step()
    assert bool((sae.encode(z) > 0).any(0)[DEAD].all())


def test_the_push_is_the_distance_below_zero_and_moves_nothing_else(sae: SparseAutoencoder) -> None:
    z = torch.randn(5, 4)
    found = push_up(sae, z, DEAD)
    before = ((z - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    norms = sae.W_dec.detach().norm(dim=-1)
    expected = sum(
        max(0.0, -float(before[t, j])) * float(norms[j]) for t in range(5) for j in range(3)
    )
    assert float(found.detach()) == pytest.approx(expected / 5, rel=1e-5)
    found.backward()
    assert sae.W_dec.grad is None and sae.b_dec.grad is None
    assert sae.b_enc.grad is not None and not sae.b_enc.grad[~DEAD].any()


def test_new_latents_point_at_the_worst_tokens(sae: SparseAutoencoder) -> None:
    z, errors = torch.randn(6, 4), torch.zeros(6)
    errors[[1, 4]] = 3.0
    new = new_latents(
        sae, z, errors, DEAD, decoder_norm=0.1, generator=torch.Generator().manual_seed(0)
    )
    assert new.latents.tolist() == [0, 1, 2]
    centred = torch.nn.functional.normalize(z - sae.b_dec, dim=-1)
    matches = (new.decoder / 0.1) @ centred.t()
    assert set(matches.argmax(1)[:2].tolist()) == {1, 4}  # drawn by squared loss, no token twice
    torch.testing.assert_close(matches.max(1).values, torch.ones(3))
    size = 0.2 * sae.W_enc[:, ~DEAD].norm(dim=0).mean()
    torch.testing.assert_close(new.encoder.norm(dim=-1), size.detach().expand(3))


def test_no_more_latents_restart_than_there_are_tokens(sae: SparseAutoencoder) -> None:
    new = new_latents(
        sae, torch.randn(2, 4), torch.ones(2), DEAD, decoder_norm=0.1, generator=torch.Generator()
    )
    assert new.latents.tolist() == [0, 1] and new.decoder.shape == (2, 4)
