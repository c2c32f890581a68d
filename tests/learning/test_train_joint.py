"""The joint step: where gradients go, what the loss is made of, what is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import policy_config, tiny_head, tiny_llava_policy, tiny_qwen_policy, tiny_sae, tiny_sam
from torch import Tensor, nn

from segcompass.data.samples import read_dataset
from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.learning.config import JointStage, RunConfig
from segcompass.learning.corpus import target_grid
from segcompass.learning.loop import Loop, Losses
from segcompass.learning.losses import dice_loss, map_bce
from segcompass.learning.train_joint import (
    PlaceHead,
    freeze,
    key_memo,
    segmentation_losses,
    train_joint,
)
from segcompass.model_folder import ModelConfig, build_interface
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import Sample, Slots


class Parts(NamedTuple):
    """The parts of a model, and what its joint stage minimises."""

    policy: Policy
    encoder: ImageEncoder
    interface: ConceptSlots
    losses: Callable[[int], Losses]

    def step(self) -> Losses:
        """Losses of the first step, after their backward pass."""
        values = self.losses(0)
        values["loss"].backward()  # type: ignore[no-untyped-call]
        return values


def stage(**changes: object) -> JointStage:
    settings = {"steps": 1, "batch": 8, "learning_rate": 0.01, "group": 1, **changes}
    return JointStage.model_validate(settings)


@pytest.fixture
def assemble(
    tmp_path: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Parts]:
    """Builds the parts for one family; the loop hands its losses out and does not run."""

    def build(family: str = "qwen2_5_vl", **changes: object) -> Parts:
        write = tiny_qwen_policy if family == "qwen2_5_vl" else tiny_llava_policy
        policy = load_policy(write(tmp_path / family), policy_config(family))
        sam, sae = tiny_sam(), tiny_sae()
        interface = build_interface(
            ModelConfig(policy=policy.config, head=tiny_head()), policy, sam, sae
        )
        once = {"steps": 1, "learning_rate": 0.01}
        config = RunConfig.model_validate(
            {
                "run": tmp_path / "run",
                "data": {"root": scenes_root},
                "train_sae": once,
                "train_joint": once,
            }
        )
        caught: list[Callable[[int], Losses]] = []
        monkeypatch.setattr(Loop, "run", lambda _, losses: caught.append(losses))
        encoder = ImageEncoder(sam)
        train_joint(policy, encoder, interface, config, stage(**changes), tmp_path / "stage")
        return Parts(policy, encoder, interface, caught[0])

    return build


def reached(module: nn.Module) -> dict[str, bool]:
    """Whether each parameter has a gradient that is not all zero."""
    return {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_gradients_reach_what_is_trained_and_nothing_else(
    family: str, assemble: Callable[..., Parts]
) -> None:
    policy, encoder, interface, _ = parts = assemble(family)
    parts.step()
    layers = policy.backbone.layers
    assert all(reached(layers[2]).values()) and all(reached(policy.backbone.final_norm).values())
    for part in (interface.fusion, interface.mapper, interface.decoder.prompt_encoder.mask_embed):
        assert all(reached(part).values()), part
    codebook = reached(interface.codebook)
    assert all(codebook.values()), [name for name, found in codebook.items() if not found]
    assert sum(reached(interface.decoder.mask_decoder.transformer).values()) > 10
    trained = {*map(id, layers[2].parameters()), *map(id, policy.backbone.final_norm.parameters())}
    frozen = [p for p in policy.parameters() if id(p) not in trained]
    frozen += [*encoder.parameters(), *interface.sae.parameters()]
    frozen += interface.decoder.shared_image_embedding.parameters()
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_upper_layers_can_be_frozen_too(assemble: Callable[..., Parts]) -> None:
    parts = assemble(train_upper_layers=False)
    parts.step()
    assert not any(reached(parts.policy).values())
    assert all(reached(parts.interface.fusion).values())


def test_language_is_learnt_only_where_asked(assemble: Callable[..., Parts]) -> None:
    values = assemble().step()
    assert not values["language"].requires_grad
    with_language = assemble(language_weight=0.5).losses(0)
    assert with_language["language"].item() == pytest.approx(values["language"].item(), rel=1e-5)
    expected = values["loss"] + 0.5 * values["language"]
    torch.testing.assert_close(with_language["loss"], expected)


def test_the_loss_is_the_weighted_sum_of_eq_6(assemble: Callable[..., Parts]) -> None:
    values = assemble(
        seg_weight=3.0, conf_weight=0.7, dice_weight=0.4, heatmap_dice_weight=0.2
    ).losses(0)
    by_hand = 3.0 * (values["heatmap_bce"] + 0.2 * values["heatmap_dice"] + 0.4 * values["dice"])
    torch.testing.assert_close(values["loss"].detach(), by_hand + 0.7 * values["confidence"])


def judge(
    assemble: Callable[..., Parts], samples: list[Sample], slots: Slots
) -> tuple[Losses, Callable[[int, int], Tensor]]:
    """Losses of made-up slots, and a way to decode one of them."""
    parts = assemble()
    memo = key_memo(parts.encoder, [s.image_path for s in samples])
    keys = torch.stack([memo(s.image_path).float() for s in samples])
    frames = [Frame.fit(s.image_hw, parts.encoder.side) for s in samples]

    def decode(image: int, slot: int) -> Tensor:
        chosen = (torch.tensor([image]), torch.tensor([slot]))
        return parts.interface.decode(keys, slots, frames=frames, select=chosen)

    found, _ = segmentation_losses(parts.interface, keys, slots, samples, frames, stage())
    return found, decode


def test_pictures_without_a_target_teach_only_doubt(
    assemble: Callable[..., Parts], scenes_root: Path
) -> None:
    sample = next(s for s in read_dataset(scenes_root, "train") if not s.targets)
    doubts = torch.tensor([[-1.0, 0.0, 2.0]])
    slots = Slots(torch.zeros(1, 3, 2, 8, 8), torch.randn(1, 3, 8, 8), doubts)
    found, _ = judge(assemble, [sample], slots)
    assert found.keys() == {"loss", "confidence"}
    by_hand = sum(math.log1p(math.exp(z)) for z in (-1, 0, 2)) / 3
    assert found["loss"].item() == pytest.approx(0.2 * by_hand)


def test_every_mask_is_scored_against_its_own_target(
    assemble: Callable[..., Parts], scenes_root: Path
) -> None:
    """Slots 2 and 0 of the second picture draw its two targets, in this order."""
    samples = read_dataset(scenes_root, "train")
    nothing = next(s for s in samples if not s.targets)
    several = next(s for s in samples if len(s.targets) >= 2)
    several = replace(several, targets=several.targets[:2])
    coarse, fine = (target_grid(several.targets, several.image_hw, 64, g) for g in (8, 32))
    logits = torch.full((2, 3, 8, 8), -9.0)
    logits[1, [2, 0]] = torch.logit(coarse, 1e-4)
    slots = Slots(torch.zeros(2, 3, 2, 8, 8), logits, torch.zeros(2, 3))
    found, decode = judge(assemble, [nothing, several], slots)
    pairs = [(2, 0), (0, 1)]
    masks = torch.cat([decode(1, slot) for slot, _ in pairs])
    torch.testing.assert_close(found["dice"], dice_loss(masks, fine).mean())
    drawn = logits[1, [2, 0]]
    torch.testing.assert_close(found["heatmap_bce"], map_bce(drawn, coarse).mean())
    assert found["confidence"].item() == pytest.approx(math.log(2))


def test_freezing_names_its_parts(assemble: Callable[..., Parts]) -> None:
    parts = assemble()
    named = freeze(parts.policy, parts.encoder, parts.interface, stage())
    assert named.keys() == stage().multipliers.model_dump().keys()
    owned = [id(p) for module in named.values() for p in module.parameters()]
    assert len(owned) == len(set(owned))  # no weight is moved twice in a step


def test_keys_are_those_of_predict(assemble: Callable[..., Parts], tmp_path: Path) -> None:
    """The padding of a picture that is not square is blank for both."""
    encoder = assemble().encoder
    image = np.random.default_rng(0).integers(0, 255, (30, 61, 3), dtype=np.uint8)
    path = tmp_path / "wide.png"
    Image.fromarray(image).save(path)
    with torch.no_grad():
        wanted = encoder(encoder.preprocess([image])[0])[0]
    found = key_memo(encoder, [path])(path)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), atol=0, rtol=0)


def test_the_place_head_wants_the_centre_of_mass() -> None:
    """The loss is that of the right bins, and a step along it makes them likelier."""
    torch.manual_seed(0)
    place = PlaceHead(16)
    queries = torch.zeros(1, 16, requires_grad=True)
    target = torch.zeros(1, 16, 16)
    target[0, 2:4, 4:6] = 1.0  # rows 2–3 and columns 4–5 of 16: row b, column 3 of 8
    loss = place.loss(queries, target)
    loss.backward()
    moved = (queries - queries.grad).detach()
    for head, bin_ in ((place.rows, 1), (place.columns, 2)):
        before, after = head(queries).log_softmax(-1), head(moved).log_softmax(-1)
        assert after[0, bin_] > before[0, bin_]
    expected = -(
        place.rows(queries).log_softmax(-1)[0, 1] + place.columns(queries).log_softmax(-1)[0, 2]
    )
    torch.testing.assert_close(loss, expected)
