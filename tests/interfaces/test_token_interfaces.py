"""concentration_token and latent_query: what goes in and out, what learns, what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WIDTH, policy_config, tiny_sam
from torch import Tensor
from typer.testing import CliRunner

from segcompass import SegCompass
from segcompass.apps.cli import app
from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.interfaces.registry import find
from segcompass.io import masks
from segcompass.io.checkpoints import PARTS
from segcompass.learning.corpus import target_grid
from segcompass.learning.losses import dice_loss, map_bce
from segcompass.learning.segmentation import segmentation_terms
from segcompass.model_folder import ModelConfig, build_interface, load_parts, save_model
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import ReasoningBatch, Sample

B, GRID, SIDE = 3, 8, 64
HEADS = {
    "concentration_token": {"mapper": {"heads": 2, "head_width": 8}},
    "latent_query": {"confidence_width": 8},
}
FRAMES = [Frame.fit((SIDE, SIDE), SIDE)] * B


@pytest.fixture(params=HEADS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """A model of either interface."""
    name = request.param
    use = policy_config("qwen2_5_vl", slots=1)
    return ModelConfig(name=f"tiny-{name}", interface=name, head=HEADS[name], policy=use)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    """A policy that asks for one token; do not change it."""
    return load_policy(tiny_model / "policy", policy_config("qwen2_5_vl", slots=1))


@pytest.fixture
def interface(config: ModelConfig, policy: Policy) -> Interface:
    torch.manual_seed(0)
    return build_interface(config, policy, tiny_sam(), None)


def states(slots: int = 1) -> ReasoningBatch:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(B, slots, WIDTH, generator=draw).requires_grad_()
    return ReasoningBatch(
        torch.ones(B, 4, dtype=torch.long),
        torch.full((B, 4), 4),
        torch.zeros(B, 4, WIDTH),
        tokens,
        torch.ones(B, dtype=torch.bool),
    )


def keys() -> Tensor:
    return torch.randn(B, 32, GRID, GRID, generator=torch.Generator().manual_seed(2))


def square(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


TWO = (square(0, 0, 16), square(40, 32, 16))


def sample(*targets: np.ndarray) -> Sample:
    rles = tuple(masks.encode(mask) for mask in targets)
    return Sample("s", Path("s.png"), 0, (SIDE, SIDE), "the mugs", rles)


@pytest.mark.parametrize("slots", [1, 3])
def test_shapes(interface: Interface, slots: int) -> None:
    alignment = interface.align(states(slots), keys(), frames=FRAMES)
    assert alignment.confidence_logits.shape == (B, slots)
    assert alignment.queries.shape[:2] == (B, slots)
    assert alignment.codes is alignment.concept_vectors is alignment.prompts is None
    low_res = interface.decode(keys(), alignment, frames=FRAMES)
    assert low_res.shape == (B, slots, 4 * GRID, 4 * GRID)
    rows = (torch.tensor([2, 0]), torch.tensor([slots - 1, 0]))
    chosen = interface.decode(keys(), alignment, frames=FRAMES, select=rows)
    torch.testing.assert_close(chosen, low_res[rows], rtol=1e-4, atol=1e-4)
    if interface.name == "concentration_token":
        assert alignment.slots.heatmap_logits.shape == (B, slots, GRID, GRID)
    else:
        assert alignment.slots is None


def test_masks_follow_their_own_token(interface: Interface) -> None:
    first = states()
    moved = first.concentration_states.detach().clone()
    moved[1] *= -3
    after = first._replace(concentration_states=moved)
    before, now = (
        interface.decode(keys(), interface.align(s, keys(), frames=FRAMES), frames=FRAMES)
        for s in (first, after)
    )
    change = (now - before).detach().abs().flatten(1).amax(1)
    assert change[1] > 1e-3
    torch.testing.assert_close(change[[0, 2]], torch.zeros(2), rtol=0, atol=1e-5)


def test_one_slot_answers_for_all_targets_together(interface: Interface) -> None:
    samples = [sample(*TWO), sample(), sample(TWO[0])]
    own = states()
    alignment = interface.align(own, keys(), frames=FRAMES)
    terms = segmentation_terms(interface, keys(), alignment, samples, FRAMES)
    assert len(terms["dice"]) == 2  # not three: the first sample's targets are one
    union = masks.encode(TWO[0] | TWO[1])
    wanted = torch.cat(
        [target_grid([rle], (SIDE, SIDE), SIDE, 4 * GRID) for rle in (union, samples[2].targets[0])]
    ).float()
    low_res = interface.decode(keys(), alignment, frames=FRAMES)[[0, 2], 0]
    torch.testing.assert_close(terms["dice"], dice_loss(low_res, wanted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["mask_bce"], map_bce(low_res, wanted), rtol=1e-4, atol=1e-5)
    assert ("heatmap_bce" in terms) == (interface.name == "concentration_token")


def test_gradients_reach_every_trained_part_and_the_policy(interface: Interface) -> None:
    own = states()
    alignment = interface.align(own, keys(), frames=FRAMES)
    terms = segmentation_terms(interface, keys(), alignment, [sample(*TWO)] * B, FRAMES)
    torch.stack([value.mean() for value in terms.values()]).sum().backward()
    assert own.concentration_states.grad.abs().amax(-1).min() > 0
    assert {*interface.trained()} == {"head", "decoder"}
    silent = [n for n, p in interface.trained()["head"].named_parameters() if p.grad is None]
    assert not silent
    assert any(p.grad is not None and p.grad.any() for p in interface.decoder.parameters())


def test_a_saved_model_answers_as_before(
    config: ModelConfig, policy: Policy, interface: Interface, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_model(folder, config, policy, tiny_sam(), interface)
    assert not (folder / "sae").exists()
    assert (folder / PARTS["head"]).is_file()
    parts = load_parts(folder)
    assert isinstance(parts.interface, find(config.interface))
    assert parts.config == config
    again = parts.interface.head.state_dict()
    for name, value in interface.head.state_dict().items():
        assert torch.equal(again[name], value), name
    model = SegCompass.from_pretrained(folder, device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    result = model.predict(picture, "the mug")
    assert (result.interface, result.slot_masks.shape) == (config.interface, (1, 48, 64))
    assert result.codes is None
    assert (result.slot_heatmaps is None) == (config.interface == "latent_query")


def test_a_path_alone_is_refused_where_there_are_no_two(
    config: ModelConfig, policy: Policy, interface: Interface, scenes_root: Path, tmp_path: Path
) -> None:
    model = SegCompass(policy, ImageEncoder(tiny_sam()), interface)
    for paths in ("tokens", "concepts"):
        with pytest.raises(ValueError, match=f"'{paths}'.* interface {config.interface} has no"):
            model.predict(np.zeros((8, 8, 3), np.uint8), "the mug", paths=paths)
    save_model(tmp_path / "model", config, policy, tiny_sam(), interface)
    words = ["eval", "--model", str(tmp_path / "model"), "--data", str(scenes_root)]
    result = CliRunner().invoke(app, [*words, "--split", "val", "--paths", "concepts"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: paths 'concepts': a model of the interface" in result.stderr
