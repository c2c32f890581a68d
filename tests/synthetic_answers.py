"""Answers whose every figure is known because they are built that way: a 4x4 grid of 10 px patches.

Tokens: 16 image tokens, then words. Each concept fires exactly where a test puts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from factories import make_prediction

from segcompass.data.samples import ImageRecord
from segcompass.io import masks
from segcompass.types import NamedObject, Prediction, Sample, SparseCodes, Status, TokenKind

SIDE, GRID = 40, 4
QUESTION, THOUGHT = " the red mug", " I see red mug"


def boxes() -> np.ndarray:
    """Of the 16 image tokens, in reading order."""
    corners = [(x * 10, y * 10) for y in range(GRID) for x in range(GRID)]
    return np.array([(x, y, x + 10, y + 10) for x, y in corners], dtype=np.float32)


def square(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """A mask that is true in a box."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def answer(
    active: Mapping[tuple[int, int], float],
    *,
    concepts: int = 8,
    question: str = QUESTION,
    thought: str = THOUGHT,
    found: np.ndarray | None = None,
    heat: np.ndarray | None = None,
) -> Prediction:
    """A prediction with activations at (token, concept); image tokens are 0 to 15."""
    parts = [("<image>", TokenKind.IMAGE)] * GRID**2
    parts += [(f" {word}", TokenKind.INSTRUCTION) for word in question.split()]
    parts += [(f" {word}", TokenKind.THOUGHT) for word in thought.split()]
    ordered = sorted(active)
    rows = torch.tensor([row for row, _ in ordered], dtype=torch.long)
    columns = torch.tensor([column for _, column in ordered], dtype=torch.long)
    values = torch.tensor([active[key] for key in ordered], dtype=torch.float32)
    found = square(0, 0, 10, 10) if found is None else found
    heat = found.astype(np.float32) if heat is None else heat
    logits = np.where(found[::2, ::2], 8.0, -8.0).astype(np.float32)
    return replace(
        _any_prediction(),
        instruction=question,
        status=Status.OK,
        reasoning=thought.strip(),
        image_rgb=np.full((SIDE, SIDE, 3), 128, dtype=np.uint8),
        slot_masks=found[None],
        slot_scores=np.array([0.9], dtype=np.float32),
        accepted=np.array([True]),
        slot_heatmaps=heat[None].astype(np.float32),
        heatmap_logits=logits[None, ::2, ::2],
        low_res_logits=logits[None],
        head_scores=np.zeros((1, 2, 10, 10), dtype=np.float32),
        slot_queries=np.zeros((1, 4), dtype=np.float32),
        concept_vectors=np.zeros((1, 4), dtype=np.float32),
        concentration_states=np.zeros((1, 4), dtype=np.float32),
        slot_attention=np.full((1, len(parts)), 1 / len(parts), dtype=np.float32),
        codes=SparseCodes(rows, columns, values, len(parts), concepts),
        tokens=tuple(text for text, _ in parts),
        token_kinds=np.array([kind for _, kind in parts]),
        token_boxes=boxes(),
        sae_errors=np.full(len(parts), 0.25, dtype=np.float32),
    )


@cache
def _any_prediction() -> Prediction:
    return make_prediction()


def sample(number: int = 0, *targets: np.ndarray, image: int | None = None) -> Sample:
    """A sample with these targets; without ``image`` it has a picture of its own."""
    return Sample(
        sample_id=str(number),
        image_path=Path(f"picture-{number}.jpg"),
        image_id=number if image is None else image,
        image_hw=(SIDE, SIDE),
        instruction=QUESTION,
        targets=tuple(masks.encode(mask) for mask in targets),
    )


def scene(image_id: int, things: Mapping[str, np.ndarray]) -> ImageRecord:
    """A picture of which everything is known: "red mug" -> its mask."""
    objects = tuple(
        NamedObject(number, name.split()[1], name.split()[0], "medium", "plain", "a1")
        for number, name in enumerate(things)
    )
    coded = tuple(masks.encode(mask) for mask in things.values())
    return ImageRecord(Path("x.jpg"), image_id, (SIDE, SIDE), objects, coded, "")
