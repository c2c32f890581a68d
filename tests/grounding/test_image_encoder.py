"""Sizes of the segmenter, preprocessing against transformers' own, and keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SamModel

from segcompass.grounding.image_encoder import PIXEL_MEAN, ImageEncoder, sam_config


@pytest.fixture(scope="module")
def sam() -> SamModel:
    torch.manual_seed(0)
    return SamModel(sam_config("nano")).eval()


@pytest.mark.parametrize(
    ("name", "millions"), [("vit-b", 93.7), ("vit-l", 312.3), ("vit-h", 641.1), ("nano", 0.74)]
)
def test_parameter_counts(name: str, millions: float) -> None:
    """SAM's published sizes are 94, 312 and 641 M; nothing is allocated here."""
    with torch.device("meta"):
        model = SamModel(sam_config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    encoder = ImageEncoder(model)
    assert (encoder.side, encoder.grid) == ((160, 20) if name == "nano" else (1024, 64))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"nano.*vit-b"):
        sam_config("vit-x")


def test_a_new_model_starts_trainable(sam: SamModel) -> None:
    """By default vision weights start at 1e-10 and position frequencies far too high."""
    assert sam.vision_encoder.layers[0].mlp.lin1.weight.std() > 0.01
    assert sam.shared_image_embedding.positional_embedding.std() < 2
    first, second = ImageEncoder(sam)(torch.randn(2, 3, 160, 160))
    assert (first - second).abs().max() > 0.1  # keys depend on the picture


def test_shapes_and_frames_for_images_of_any_shape(sam: SamModel) -> None:
    encoder = ImageEncoder(sam)
    images = [np.full((h, w, 3), 90, np.uint8) for h, w in [(40, 300), (300, 40), (1, 1)]]
    pixels, frames = encoder.preprocess(images)
    assert pixels.shape == (3, 3, 160, 160)
    assert [frame.scaled_hw for frame in frames] == [(21, 160), (160, 21), (160, 160)]
    assert encoder(pixels).shape == (3, 64, 20, 20)
    assert not pixels[0, :, 21:].any()
    assert not pixels[1, :, :, 21:].any()
    assert (pixels[0, :, :21] != 0).all()


def test_padding_is_zero_after_normalising(sam: SamModel) -> None:
    """A picture of the mean colour looks like padding; a black one does not."""
    encoder = ImageEncoder(sam)
    mean = np.broadcast_to(np.rint(PIXEL_MEAN).astype(np.uint8), (10, 20, 3)).copy()
    pixels, _ = encoder.preprocess([mean, np.zeros_like(mean)])
    assert pixels[0].abs().max() < 0.02
    assert pixels[1, :, 0, 0].tolist() == pytest.approx([-2.118, -2.036, -1.804], abs=1e-3)


def test_preprocessing_equals_transformers(sam: SamModel) -> None:
    processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    processor = processing.SamImageProcessorPil(
        size={"longest_edge": 160}, pad_size={"height": 160, "width": 160}
    )
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in [(97, 131), (200, 90)]]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    pixels, _ = ImageEncoder(sam).preprocess(images)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=1e-5)


def test_no_images_and_wrong_sizes(sam: SamModel) -> None:
    encoder = ImageEncoder(sam)
    with pytest.raises(ValueError, match="at least one"):
        encoder.preprocess([])
    with pytest.raises(ValueError, match="160"):
        encoder(torch.zeros(1, 3, 96, 160))


def test_the_folder_stays_a_plain_hugging_face_one(sam: SamModel, tmp_path: Path) -> None:
    encoder = ImageEncoder(sam)
    sam.save_pretrained(tmp_path)
    loaded, info = SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(ImageEncoder(loaded.eval())(pixels), encoder(pixels))
