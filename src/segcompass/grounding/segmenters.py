"""Promptable segmenters by folder, hub id or size name: SAM, and SAM 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Sam2Config, Sam2Model, SamConfig, SamModel

from segcompass.grounding.image_encoder import SIZES, ImageEncoder, sam_config
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.sam2 import Sam2ImageEncoder, Sam2MaskDecoder
from segcompass.io.errors import CheckpointError

Segmenter = SamModel | Sam2Model
_CLASSES: dict[str, tuple[Any, Any]] = {
    "sam": (SamModel, SamConfig),
    "sam2": (Sam2Model, Sam2Config),
    "sam2_video": (Sam2Model, Sam2Config),  # what SAM 2 is published as; the memory is left out
}


def load_segmenter(source: str | Path) -> Segmenter:
    """A segmenter from a folder or hub id, or a new one by size name (nano, vit-b, …).

    Raises:
        CheckpointError: naming the folder, what is wrong with it, and the way out.
    """
    if str(source) in SIZES:
        return SamModel(sam_config(str(source)))
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
        kind = settings.pop("model_type", None)
        if kind not in _CLASSES:
            raise CheckpointError(
                f"{source} holds a {kind!r} model; supported segmenters: {', '.join(_CLASSES)}"
            )
        model_class, config_class = _CLASSES[kind]
        loaded: Any = model_class.from_pretrained(
            source,
            config=config_class.from_dict(settings),
            output_loading_info=True,
            use_safetensors=True,
        )
        sam, report = loaded
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} is no usable segmenter folder ({type(error).__name__}: {error}); "
            "it needs config.json and safetensors weights of a SamModel or a Sam2Model"
        ) from error
    odd = {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    if odd:
        raise CheckpointError(
            f"{source}: the weights do not fit the config, first difference "
            f"{sorted(map(str, odd))[0]}; get a complete copy of the checkpoint"
        )
    assert isinstance(sam, SamModel | Sam2Model)
    return sam


def encoder_of(sam: Segmenter) -> ImageEncoder | Sam2ImageEncoder:
    """The image encoder of a segmenter."""
    return ImageEncoder(sam) if isinstance(sam, SamModel) else Sam2ImageEncoder(sam)


def decoder_of(sam: Segmenter) -> MaskDecoder | Sam2MaskDecoder:
    """The mask decoder of a segmenter."""
    return MaskDecoder(sam) if isinstance(sam, SamModel) else Sam2MaskDecoder(sam)


def as_sam(segmenter: Segmenter, source: object) -> SamModel:
    """The segmenter, if it is one that can be trained with.

    Raises:
        CheckpointError: naming its source.
    """
    if not isinstance(segmenter, SamModel):
        raise CheckpointError(
            f"{source} is a SAM 2, which only draws what finished models name; train with a SAM, "
            "such as nano or facebook/sam-vit-huge"
        )
    return segmenter
