"""Slot masks and prompted masks against transformers' own SamModel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamConfig, SamModel

from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder, sam_config
from segcompass.grounding.mask_decoder import PADDING_LOGIT, MaskDecoder

B, K, GRID, SIDE = 2, 3, 6, 24


def tiny_config() -> SamConfig:
    return SamConfig(
        vision_config={
            "image_size": 48,
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 32,
            "num_pos_feats": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "initializer_range": 0.1,
            "scale": 1,
        },
        prompt_encoder_config={"image_size": 48, "patch_size": 8, "hidden_size": 32},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 24,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 20,
        },
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def sam() -> SamModel:
    torch.manual_seed(0)
    return SamModel(tiny_config()).eval()


@pytest.fixture
def decoder(sam: SamModel) -> MaskDecoder:
    return MaskDecoder(sam)


@pytest.fixture
def keys(sam: SamModel) -> Tensor:
    pixels = torch.randn(B, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ImageEncoder(sam)(pixels)


@pytest.fixture
def heatmaps() -> Tensor:
    return 4 * torch.randn(B, K, GRID, GRID, generator=torch.Generator().manual_seed(2))


def reference(sam: SamModel, keys: Tensor, **prompts: Tensor) -> Tensor:
    """SamModel's own forward for one image and one prompt."""
    with torch.no_grad():
        output = sam(image_embeddings=keys[None], multimask_output=False, **prompts)
    return output.pred_masks[0, 0, 0]


def test_every_slot_equals_transformers(
    sam: SamModel, decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor
) -> None:
    logits = decoder(keys, heatmaps)
    assert logits.shape == (B, K, SIDE, SIDE)
    for b in range(B):
        for k in range(K):
            prompt = F.interpolate(heatmaps[b, k][None, None], (SIDE, SIDE), mode="bilinear")
            torch.testing.assert_close(
                logits[b, k], reference(sam, keys[b], input_masks=prompt), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kinds", ["p", "b", "m", "pb", "pm", "bm", "pbm"])
def test_prompts_equal_transformers(
    sam: SamModel, decoder: MaskDecoder, keys: Tensor, kinds: str
) -> None:
    rng = torch.Generator().manual_seed(3)
    rows = torch.tensor([1, 0, 1, 1])
    points, labels = 48 * torch.rand(4, 2, 2, generator=rng), torch.tensor([[1, 0]] * 4)
    boxes = 48 * torch.rand(4, 4, generator=rng)
    masks = torch.randn(4, SIDE, SIDE, generator=rng)
    given = {}
    if "p" in kinds:
        given |= {"points": points, "labels": labels}
    if "b" in kinds:
        given["boxes"] = boxes
    if "m" in kinds:
        given["masks"] = masks
    decoded = decoder.decode_prompts(keys, rows, **given)  # type: ignore[arg-type]
    assert decoded.shape == (4, SIDE, SIDE)
    for i, row in enumerate(rows):
        prompts = {}
        if "p" in kinds:
            prompts |= {
                "input_points": points[i][None, None],
                "input_labels": labels[i][None, None],
            }
        if "b" in kinds:
            prompts["input_boxes"] = boxes[i][None, None]
        if "m" in kinds:
            prompts["input_masks"] = masks[i][None, None]
        expected = reference(sam, keys[row], **prompts)
        torch.testing.assert_close(decoded[i], expected, rtol=1e-4, atol=1e-4)


def test_the_best_of_three_is_the_one_sam_rates_best(
    sam: SamModel, decoder: MaskDecoder, keys: Tensor
) -> None:
    points = torch.tensor([[[5.0, 9.0]], [[30.0, 40.0]]])
    decoded, scores = decoder.rated_prompts(
        keys, torch.arange(B), points=points, best_of_three=True
    )
    with torch.no_grad():
        output = sam(image_embeddings=keys, input_points=points[:, None])
    for b in range(B):
        best = int(output.iou_scores[b, 0].argmax())
        torch.testing.assert_close(decoded[b], output.pred_masks[b, 0, best], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores[b], output.iou_scores[b, 0].max(), rtol=1e-4, atol=1e-4)


def test_selected_slots_equal_the_rows_of_a_full_decode(
    decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor
) -> None:
    frames = [Frame.fit((20, 48), 48), Frame.fit((48, 31), 48)]
    select = (torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]))
    full = decoder(keys, heatmaps, frames=frames)
    chosen = decoder(keys, heatmaps, frames=frames, select=select)
    torch.testing.assert_close(chosen, full[select], rtol=1e-4, atol=1e-5)


def test_selecting_nothing_gives_nothing_and_can_be_trained_on(
    decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor
) -> None:
    none = torch.zeros(0, dtype=torch.long)
    keys, heatmaps = keys.clone().requires_grad_(), heatmaps.requires_grad_()
    logits = decoder(keys, heatmaps, select=(none, none))
    assert logits.shape == (0, SIDE, SIDE)
    logits.sum().backward()
    assert keys.grad is not None
    assert not keys.grad.any()


def test_the_padding_of_a_frame_is_filled(
    sam: SamModel, decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor
) -> None:
    """An image in the upper half: what the heatmap says well below has no effect at all."""
    frames = [Frame.fit((24, 48), 48), Frame.fit((48, 48), 48)]
    changed = heatmaps.clone()
    changed[:, :, 4:] += 7
    before, after = (decoder(keys, maps, frames=frames) for maps in (heatmaps, changed))
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    prompt = F.interpolate(heatmaps[:1, :1], (SIDE, SIDE), mode="bilinear")
    prompt[:, :, SIDE // 2 :] = PADDING_LOGIT
    expected = reference(sam, keys[0], input_masks=prompt)
    torch.testing.assert_close(before[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_heatmaps_keys_and_weights_but_not_the_frequencies(
    sam: SamModel, decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor
) -> None:
    keys, heatmaps = keys.clone().requires_grad_(), heatmaps.requires_grad_()
    select = (torch.tensor([0]), torch.tensor([1]))
    decoder(keys, heatmaps, select=select).square().mean().backward()
    assert heatmaps.grad is not None
    assert keys.grad is not None
    assert heatmaps.grad[0, 1].any()
    assert not heatmaps.grad[1].any()
    assert keys.grad[0].any()
    assert not keys.grad[1].any()
    assert sam.prompt_encoder.mask_embed.conv1.weight.grad.abs().sum() > 0
    assert sam.shared_image_embedding.positional_embedding.grad is None
    sam.zero_grad()


def test_all_parameters_are_the_segmenters_own(sam: SamModel, decoder: MaskDecoder) -> None:
    """Encoder and decoder together cover SamModel exactly: its folder holds all of them."""
    borrowed = {id(p) for part in (ImageEncoder(sam), decoder) for p in part.parameters()}
    assert borrowed == {id(p) for p in sam.parameters()}


def test_nano_end_to_end_through_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    SamModel(sam_config("nano")).save_pretrained(tmp_path)
    model = SamModel.from_pretrained(tmp_path)
    logits = MaskDecoder(model)(
        ImageEncoder(model)(torch.randn(1, 3, 160, 160)), torch.randn(1, 2, 20, 20)
    )
    assert logits.shape == (1, 2, 80, 80)
    logits.sum().backward()
    assert model.vision_encoder.patch_embed.projection.weight.grad.any()


def test_disagreeing_sizes(decoder: MaskDecoder, keys: Tensor, heatmaps: Tensor) -> None:
    rows = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="expected image keys"):
        decoder(keys[:, :5], heatmaps)
    with pytest.raises(ValueError, match="must agree"):
        decoder(keys[:1], heatmaps)
    with pytest.raises(ValueError, match="must agree"):
        decoder(keys, heatmaps, frames=[Frame.fit((4, 4), 48)])
    with pytest.raises(ValueError, match="no prompt"):
        decoder.decode_prompts(keys, rows)
    with pytest.raises(ValueError, match="announced"):
        decoder.decode_prompts(keys, rows, boxes=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="24 px"):
        decoder.decode_prompts(keys, rows, masks=torch.zeros(2, 48, 48))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mask_decoder_config", {"hidden_size": 16}, "widths must all be equal"),
        ("vision_config", {"num_pos_feats": 8}, "widths must all be equal"),
        ("prompt_encoder_config", {"patch_size": 4}, "give both the same"),
    ],
)
def test_segmenters_that_do_not_fit_together(
    part: str, change: dict[str, int], message: str
) -> None:
    parts = tiny_config().to_dict()
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    with torch.device("meta"):
        sam = SamModel(SamConfig(**{n: parts[n] | (change if n == part else {}) for n in names}))
    with pytest.raises(ValueError, match=message):
        MaskDecoder(sam)
