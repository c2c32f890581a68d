"""Segmenters from plain Hugging Face folders: SAM, and SAM 2 as it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import tiny_sam2, write_sam2
from safetensors.torch import load_file
from tiny import tiny_sam
from transformers import BertConfig

from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.sam2 import Sam2ImageEncoder, Sam2MaskDecoder
from segcompass.grounding.segmenters import (
    Segmenter,
    as_sam,
    decoder_of,
    encoder_of,
    load_segmenter,
)
from segcompass.io.errors import CheckpointError

MAKERS = [tiny_sam, tiny_sam2]


@pytest.mark.parametrize("make", MAKERS)
def test_pretrained(make: Callable[[], Segmenter], tmp_path: Path) -> None:
    sam = make()
    sam.save_pretrained(tmp_path / "sam")
    loaded = load_segmenter(tmp_path / "sam")
    assert type(loaded) is type(sam)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in sam.state_dict().items())


def test_sam2_is_published_with_the_memory_for_videos(tmp_path: Path) -> None:
    published = load_segmenter(write_sam2(tmp_path / "video"))
    stored = load_file(tmp_path / "video" / "model.safetensors")
    assert any(name.startswith("memory_") for name in stored)
    assert all(torch.equal(value, stored[name]) for name, value in published.state_dict().items())


def test_parts_fit_their_segmenter() -> None:
    first, second = tiny_sam(), tiny_sam2()
    assert encoder_of(first).frame((30, 60)).scaled_hw == (32, 64)
    assert isinstance(encoder_of(second), Sam2ImageEncoder)
    assert isinstance(decoder_of(first), MaskDecoder)
    assert isinstance(decoder_of(second), Sam2MaskDecoder)
    assert as_sam(first, "here") is first
    with pytest.raises(CheckpointError, match=r"here is a SAM 2.*train with a SAM"):
        as_sam(second, "here")


def test_new_by_name() -> None:
    assert load_segmenter("nano").config.vision_config.image_size == 160


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="broken is no usable segmenter folder"):
        load_segmenter(tmp_path / "broken")


def test_other_models_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="holds a 'bert' model; supported segmenters: sam"):
        load_segmenter(tmp_path / "bert")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    sam = tiny_sam()
    sam.save_pretrained(tmp_path / "sam")
    (tmp_path / "sam" / "model.safetensors").unlink()
    torch.save(sam.state_dict(), tmp_path / "sam" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="sam"):
        load_segmenter(tmp_path / "sam")


@pytest.mark.parametrize("make", MAKERS)
def test_missing_parameters(make: Callable[[], Segmenter], tmp_path: Path) -> None:
    sam = make()
    missing = next(name for name in sam.state_dict() if name.startswith("mask_decoder."))
    state = {name: value for name, value in sam.state_dict().items() if name != missing}
    sam.save_pretrained(tmp_path / "sam", state_dict=state)
    with pytest.raises(CheckpointError, match=f"first difference {missing}"):
        load_segmenter(tmp_path / "sam")
