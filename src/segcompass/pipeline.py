"""THE path: an image and an instruction become explained masks. Read this file first.

This is SegCompass's own interface, `concept_slots`; the others (`interfaces/`) fill in fewer steps.

image, instruction
  -> reasoning   Policy.generate        thought, K concentration tokens, states    Eq. 1
  -> concepts    SparseAutoencoder      (token, concept, activation)               Eq. 4
                 QueryCodebook          K concept vectors                          Fig. 3
  -> grounding   ImageEncoder           image keys                                 Eq. 2
                 SlotMapper             K heatmaps, K confidences                  Eq. 5
  -> masks       MaskDecoder            K masks                                    Eq. 3
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import FramedPictures
from segcompass.interfaces.base import PATHS, Alignment, Interface
from segcompass.interfaces.readout import read_out, read_tokens, to_numpy
from segcompass.io.clock import Clock
from segcompass.io.images import ImageSource, load_image
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Generation, Policy
from segcompass.reasoning.streaming import OnText
from segcompass.types import Prediction, TokenKind


class _Reasoned(NamedTuple):
    """A batch half-way: what was said and seen, before anything is segmented."""

    pictures: list[np.ndarray]
    instructions: list[str]
    visuals: list[VisualInput]
    generation: Generation
    keys: Tensor  # [B, C, h, w]
    frames: list[Frame]
    laps: dict[str, float]  # seconds of the batch, by stage


class SegCompass(nn.Module):
    """The whole model.

    Args:
        policy: Writes the chain of thought.
        encoder: Makes image keys.
        interface: Turns states and keys into slots and masks.
        threshold: Confidence above which a slot's mask counts.
        name: Shown in results.
        fingerprint: Hash of the weights, so that results of different models are never mixed.
    """

    def __init__(
        self,
        policy: Policy,
        encoder: FramedPictures,
        interface: Interface,
        *,
        threshold: float = 0.5,
        name: str = "unnamed",
        fingerprint: str = "",
    ) -> None:
        super().__init__()
        self.policy, self.encoder, self.interface = policy, encoder, interface
        self.threshold, self.name, self.fingerprint = threshold, name, fingerprint

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "nano",
        *,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
    ) -> SegCompass:
        """Load a model.

        Args:
            name: "nano" (bundled), a model folder, a hub id, or the preset of a published
                checkpoint: its name, or its YAML file.
            device: By default CUDA where there is one.
            dtype: Precision of the policy; by default float32, or the preset's own.
            revision: Branch, tag or commit of a hub id; of a preset, its policy's.

        Raises:
            CheckpointError: if the folder is incomplete, damaged or holds parts of two models.
            ConfigError: if a preset cannot be read, or names what it cannot have.
            MissingAssetError: if the model is not here and cannot be fetched.
        """
        from segcompass.model_folder import load_model

        return load_model(name, device=device, dtype=dtype, revision=revision)

    def predict(self, image: ImageSource, instruction: str, **options: Any) -> Prediction:
        """Segment one picture; see :meth:`predict_batch` for the options."""
        return self.predict_batch([image], [instruction], **options)[0]

    @torch.inference_mode()
    def predict_batch(
        self,
        images: Sequence[ImageSource],
        instructions: Sequence[str],
        *,
        force_format: bool = True,
        threshold: float | None = None,
        max_new_tokens: int | None = None,
        paths: str = "both",
        on_text: OnText | None = None,
    ) -> list[Prediction]:
        """Segment several pictures at once, greedily.

        Args:
            images: Paths, bytes, PIL images or uint8 RGB arrays of any size.
            instructions: One for each image.
            force_format: Constrain the answer to its form; off when the form is to be judged.
            threshold: Confidence above which a mask counts, in [0, 1].
            max_new_tokens: Longest answer.
            paths: What the slot queries are made of: tokens, concepts, or both.
            on_text: Told after every token what each answer says so far.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if an instruction is empty or too long, the counts differ, a setting is out
                of range, or one path is asked for where the interface has no two.
        """
        cut = self._checked(threshold, paths)
        told = self._reason(images, instructions, force_format, max_new_tokens, on_text)
        return self._segment(told, cut, paths)

    @torch.inference_mode()
    def predict_paths(
        self,
        images: Sequence[ImageSource],
        instructions: Sequence[str],
        *,
        force_format: bool = True,
        threshold: float | None = None,
    ) -> dict[str, list[Prediction]]:
        """As :meth:`predict_batch`, by ``paths``: one thought, and what each path makes of it.

        An interface without concepts of its own has "both" alone.
        """
        cut = self._checked(threshold, "both")
        told = self._reason(images, instructions, force_format)
        names = PATHS if self.interface.has_concepts else ["both"]
        return {paths: self._segment(told, cut, paths) for paths in names}

    def _checked(self, threshold: float | None, paths: str) -> float:
        """The threshold that counts."""
        cut = self.threshold if threshold is None else threshold
        if not 0 <= cut <= 1 or paths not in PATHS:
            raise ValueError(f"want a threshold in [0, 1] and one of {[*PATHS]}: {cut}, {paths!r}")
        if paths != "both" and not self.interface.has_paths:
            raise ValueError(
                f"paths {paths!r}: a model of the interface {self.interface.name} has no path of "
                "concepts that could be cut off or kept; leave it at 'both', or take a model of "
                "the interface concept_slots"
            )
        return cut

    def _reason(
        self,
        images: Sequence[ImageSource],
        instructions: Sequence[str],
        force_format: bool,
        max_new_tokens: int | None = None,
        on_text: OnText | None = None,
    ) -> _Reasoned:
        """From pictures and instructions to thoughts and image keys (Eq. 1)."""
        clock = Clock()
        pictures = [load_image(image) for image in images]
        visuals = [self.policy.backbone.prepare(picture) for picture in pictures]
        clock.lap("loading")

        generation = self.policy.generate(
            visuals,
            instructions,
            force_form=force_format,
            max_new_tokens=max_new_tokens,
            on_text=on_text,
            attention=self.interface.reads_attention,
        )
        clock.lap("reasoning")

        pixels, frames = self.encoder.preprocess(pictures)
        keys = self.encoder(pixels)
        clock.lap("image keys")
        asked = list(instructions)
        return _Reasoned(pictures, asked, visuals, generation, keys, frames, clock.laps)

    def _segment(self, told: _Reasoned, threshold: float, paths: str) -> list[Prediction]:
        """From states and image keys to masks (Eq. 2 to 5)."""
        clock = Clock()
        alignment = self.interface.align(
            told.generation.states,
            told.keys,
            frames=told.frames,
            answers=told.generation.answers,
            need_attention=True,
            gates=torch.tensor([PATHS[paths]], device=self.policy.model.device),
        )
        clock.lap("concepts and slots")

        low_res = self.interface.decode(told.keys, alignment, frames=told.frames)
        clock.lap("masks")

        laps = told.laps | clock.laps
        timings = {stage: seconds / len(told.pictures) for stage, seconds in laps.items()}
        predictions = [
            self._prediction(told, i, alignment, low_res, threshold, paths, timings)
            for i in range(len(told.pictures))
        ]
        return self.interface.conclude(predictions, told.keys, told.frames)

    def _prediction(
        self,
        told: _Reasoned,
        i: int,
        alignment: Alignment,
        low_res: Tensor,
        threshold: float,
        paths: str,
        timings: dict[str, float],
    ) -> Prediction:
        """Everything about row ``i`` of the batch, on the host."""
        written, visual, frame = told.generation, told.visuals[i], told.frames[i]
        answer, states = written.answers[i], written.states
        real = states.token_kinds[i] != TokenKind.PADDING
        tokens, seen = states.concentration_states[i], written.image_attention
        looks = None if seen is None else seen[i].view(len(seen[i]), *visual.grid)
        return Prediction(
            **read_out(
                alignment, low_res, i, frame=frame, status=answer.status, threshold=threshold
            ),
            **read_tokens(alignment, states.token_kinds, i),
            instruction=told.instructions[i],
            text=written.texts[i],
            reasoning=answer.thought,
            image_rgb=told.pictures[i],
            concentration_states=to_numpy(tokens) if len(tokens) else None,
            tokens=tuple(self.policy.token_texts(states.token_ids[i][real].tolist())),
            token_kinds=to_numpy(states.token_kinds[i][real]),
            token_boxes=visual.boxes,
            model=self.name,
            timings=timings,
            paths=paths,
            interface=self.interface.name,
            fingerprint=self.fingerprint,
            image_attention=None if looks is None else to_numpy(looks),
        )
