"""How pictures reach each family, and where its image tokens look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import policy_config

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.backbones import FAMILIES, family_of
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind

SIZES = [(1, 1), (37, 211), (640, 480), (1, 300), (300, 1), (2, 5000)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_shape(policy: Policy, size: tuple[int, int]) -> None:
    visual = policy.backbone.prepare(picture(*size))
    rows, columns = visual.grid
    assert visual.boxes.shape == (rows * columns, 4)
    assert visual.boxes.min() >= 0
    assert (visual.boxes[:, 2:] <= np.array(size)[::-1]).all()
    covered = np.prod(visual.boxes[:, 2:] - visual.boxes[:, :2], axis=1).sum()
    assert covered == pytest.approx(size[0] * size[1], rel=1e-3)
    (features,) = policy.backbone.embed_images([visual])
    assert features.shape == (rows * columns, policy.width)


def test_a_long_thin_picture_does_not_exhaust_the_memory(policy: Policy) -> None:
    """On its own square it would take 1.2 TB."""
    visual = policy.backbone.prepare(np.zeros((1, 640_000, 3), np.uint8))
    assert visual.boxes[:, 2].max() == 640_000


def test_qwen_keeps_proportions_and_llava_does_not_crop(policy: Policy, family: str) -> None:
    wide = policy.backbone.prepare(picture(32, 128))
    if family == "qwen2_5_vl":
        assert wide.grid[1] == 4 * wide.grid[0]
        return
    assert wide.grid == (4, 4)
    # The picture lies in the middle rows of its square; both its ends are seen.
    seen = wide.boxes[np.prod(wide.boxes[:, 2:] - wide.boxes[:, :2], axis=1) > 0]
    assert (seen[:, 0].min(), seen[:, 2].max()) == (0, 128)
    left, right = np.zeros((20, 80, 3), np.uint8), np.zeros((20, 80, 3), np.uint8)
    left[:, :4], right[:, -4:] = 255, 255
    black = policy.backbone.prepare(np.zeros((20, 80, 3), np.uint8)).pixels
    for image in (left, right):
        assert not torch.equal(policy.backbone.prepare(image).pixels, black)


def test_image_tokens_stand_in_reading_order(policy: Policy) -> None:
    """A bright corner changes the features of the token whose box holds it most."""
    dark, bright = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    bright[48:, :16] = 255
    visuals = [policy.backbone.prepare(image) for image in (dark, bright)]
    pixels = [v.pixels.flatten(1) for v in visuals]
    assert not torch.equal(*pixels)
    first, second = policy.backbone.embed_images(visuals)
    change = (first - second).norm(dim=1)
    box = visuals[0].boxes[int(change.argmax())]
    assert (box[0], box[3]) == (0, 64)


def test_image_tokens_of_qwen_have_rows_and_columns(policy: Policy, family: str) -> None:
    """Without token types their positions would silently be those of plain text."""
    if family != "qwen2_5_vl":
        pytest.skip("LLaVA numbers all tokens alike")
    seen: list[torch.Tensor] = []
    handle = policy.model.model.language_model.register_forward_pre_hook(
        lambda _module, _inputs, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    visual = policy.backbone.prepare(picture(48, 64))
    try:
        batch = policy.encode([visual], ["the mug"], ["A mug."])
        policy(batch, [visual])
        policy.generate([visual], ["the mug"], max_new_tokens=2)
    finally:
        handle.remove()
    for positions in seen[:2]:  # the pass of training, and the first of generation
        at = batch.kinds[0, : positions.shape[-1]] == TokenKind.IMAGE
        _, rows, columns = positions[-3:, 0, at]
        assert (rows.unique().numel(), columns.unique().numel()) == visual.grid
    last, new = seen[1][-3:, 0, -1], seen[2][-3:, 0, -1]
    assert (new == last + 1).all()


def test_several_pictures_of_unequal_size(policy: Policy) -> None:
    visuals = [policy.backbone.prepare(picture(h, w)) for h, w in [(40, 90), (64, 48), (33, 33)]]
    together = policy.backbone.embed_images(visuals)
    for visual, features in zip(visuals, together, strict=True):
        (alone,) = policy.backbone.embed_images([visual])
        torch.testing.assert_close(alone, features, atol=1e-5, rtol=1e-4)


def test_parts_are_found_by_name(policy: Policy) -> None:
    names = {module: name for name, module in policy.model.named_modules()}
    assert names[policy.backbone.layers] == "model.language_model.layers"
    assert names[policy.backbone.final_norm] == "model.language_model.norm"
    assert policy.tokenizer.decode([policy.backbone.image_token_id]) in {"<image>", "<|image_pad|>"}
    assert policy.backbone.image_token_id in policy.backbone.placeholder_ids


def test_qwen_can_be_squared_too(tmp_path: Path) -> None:
    from tiny import tiny_qwen_policy

    folder = tiny_qwen_policy(tmp_path / "policy")
    policy = load_policy(folder, policy_config("qwen2_5_vl", pad_to_square=True))
    visual = policy.backbone.prepare(picture(20, 80))
    assert visual.grid[0] == visual.grid[1]
    assert (visual.boxes[:, 3] <= 20).all()


@pytest.mark.parametrize("size", [(20, 80), (64, 64), (300, 1)])
def test_qwen_can_be_shown_a_stretched_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    from tiny import tiny_qwen_policy

    folder = tiny_qwen_policy(tmp_path / "policy")
    policy = load_policy(folder, policy_config("qwen2_5_vl", stretch_to=64))
    image = picture(*size)
    visual = policy.backbone.prepare(image)
    rows, columns = visual.grid
    assert rows == columns == 4  # cells of 16 px
    scaled = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    square = load_policy(folder, policy_config("qwen2_5_vl")).backbone.prepare(np.array(scaled))
    torch.testing.assert_close(visual.pixels, square.pixels)
    np.testing.assert_allclose(visual.boxes[0], [0, 0, size[1] / 4, size[0] / 4])
    np.testing.assert_allclose(visual.boxes[-1, 2:], [size[1], size[0]])


def test_llava_must_be_squared_and_without_its_class_token(tmp_path: Path) -> None:
    from tiny import tiny_llava_policy

    folder = tiny_llava_policy(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="pad_to_square: true"):
        load_policy(folder, policy_config("llava", pad_to_square=False))
    content = json.loads((folder / "config.json").read_text())
    content["vision_feature_select_strategy"] = "full"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy"):
        load_policy(folder, policy_config("llava"))


def test_families() -> None:
    assert {family_of(name) for name in FAMILIES} == {"qwen2_5_vl", "llava"}
    with pytest.raises(ValueError, match=r"'bert'.*qwen2_5_vl, llava"):
        family_of("bert")
