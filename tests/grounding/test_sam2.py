"""SAM 2 behind SAM's methods, against `Sam2Model.forward` in the picture's own pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import SIDE, normalised, sam2_mask, tiny_sam2
from torch.nn.functional import interpolate
from transformers import Sam2Model

from segcompass.geometry import boxes_to_frame, masks_to_image, points_to_frame
from segcompass.grounding.sam2 import Sam2ImageEncoder, Sam2Keys, Sam2MaskDecoder

SIZES = ((50, 90), (64, 64), (97, 31))
BOXES = np.array([[2, 3, 25, 28], [5, 1, 30, 20], [0, 0, 31, 31]], dtype=np.float32)
POINTS = np.array([[[10, 12]], [[20, 9]], [[15, 15]]], dtype=np.float32)
ROWS = torch.tensor([0, 2, 0])  # which picture each prompt is for: not in order, one has none


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def sam() -> Sam2Model:
    return tiny_sam2()


def test_pictures_are_stretched_as_torch_does_it(sam: Sam2Model) -> None:
    pixels, _ = Sam2ImageEncoder(sam).preprocess(pictures())
    for ours, picture in zip(pixels, pictures(), strict=True):
        colours = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        scaled = interpolate(colours, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        one_grey_value = 1 / 255 / 0.224  # Pillow rounds to whole ones, twice
        torch.testing.assert_close(ours, normalised(scaled), atol=1.1 * one_grey_value, rtol=0)


@pytest.mark.parametrize("prompted", ["box", "point", "both"])
def test_prompts_give_the_masks_of_transformers(sam: Sam2Model, prompted: str) -> None:
    images, encoder, decoder = pictures(), Sam2ImageEncoder(sam), Sam2MaskDecoder(sam)
    pixels, frames = encoder.preprocess(images)
    framed = [frames[row] for row in ROWS]
    boxes = np.stack([boxes_to_frame(b, f) for b, f in zip(BOXES, framed, strict=True)])
    points = np.stack([points_to_frame(p, f) for p, f in zip(POINTS, framed, strict=True)])
    with_box, with_point = prompted != "point", prompted != "box"
    with torch.no_grad():
        logits, iou = decoder.rated_prompts(
            encoder(pixels),
            ROWS,
            boxes=torch.from_numpy(boxes) if with_box else None,
            points=torch.from_numpy(points) if with_point else None,
            best_of_three=True,
        )
    assert logits.shape == (3, decoder.mask_side, decoder.mask_side)
    for i, row in enumerate(ROWS):
        mask, score = sam2_mask(
            sam, images[row], BOXES[i] if with_box else None, POINTS[i] if with_point else None
        )
        ours = masks_to_image(logits[i], framed[i])
        assert ours.shape == images[row].shape[:2]
        torch.testing.assert_close(ours, mask, atol=1e-3, rtol=1e-4)
        assert float(iou[i]) == pytest.approx(score, abs=1e-5)


def test_a_single_mask_is_what_sam2_gives(sam: Sam2Model) -> None:
    encoder, decoder = Sam2ImageEncoder(sam), Sam2MaskDecoder(sam)
    pixels, _ = encoder.preprocess(pictures())
    points = torch.tensor([[[9.0, 20.0], [30.0, 11.0]]] * 3)
    labels = torch.tensor([[1, 0]] * 3)
    with torch.no_grad():
        keys = encoder(pixels)
        logits = decoder.decode_prompts(keys, torch.arange(3), points=points, labels=labels)
        expected = sam(
            pixel_values=pixels,
            input_points=points[:, None],
            input_labels=labels[:, None],
            multimask_output=False,
        )
    torch.testing.assert_close(logits, expected.pred_masks[:, 0, 0])


def test_keys_are_indexed_by_rows(sam: Sam2Model) -> None:
    encoder = Sam2ImageEncoder(sam)
    keys: Sam2Keys = encoder(encoder.preprocess(pictures())[0])
    assert len(keys) == 3
    assert [m.shape[1:] for m in keys.maps] == [(4, 16, 16), (8, 8, 8), (32, 4, 4)]
    chosen = keys[torch.tensor([2, 2, 0])]
    for whole, part in zip(keys.maps, chosen.maps, strict=True):
        assert torch.equal(part, torch.stack([whole[2], whole[2], whole[0]]))


def test_prompts_are_checked(sam: Sam2Model) -> None:
    encoder, decoder = Sam2ImageEncoder(sam), Sam2MaskDecoder(sam)
    keys, nobody = encoder(encoder.preprocess(pictures())[0]), torch.zeros(0, dtype=torch.long)
    logits, iou = decoder.rated_prompts(keys, nobody, boxes=torch.zeros(0, 4))
    assert logits.shape == (0, 16, 16)
    assert iou.shape == (0,)
    with pytest.raises(ValueError, match="pass any of points, boxes"):
        decoder.rated_prompts(keys, ROWS)
    with pytest.raises(
        ValueError, match=r"3 prompts are announced by rows, got \{'boxes': \(2, 4\)\}"
    ):
        decoder.rated_prompts(keys, ROWS, boxes=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="labels only"):
        decoder.rated_prompts(keys, ROWS, boxes=torch.zeros(3, 4), labels=torch.ones(3, 1))
