"""Made-up records for tests: random but plausible, and quick to make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segcompass.types import BoxPrompts, Candidates, Prediction, SparseCodes, Status, TokenKind

GRID = 8  # image tokens per side
LATENTS = 2048
SLOTS = 6
SIZE = 256
THOUGHT = (
    "I look for something to drink from. There is a large red mug at b3, left of the plate. "
    "Another, small and blue, stands at f6, half in the shadow of the bottle. "
    "So the targets are the red mug at b3 and the blue mug at f6."
)
INSTRUCTION = "Segment everything one could drink from."
DISCS = (((88, 84), 44, (208, 52, 48)), ((180, 172), 28, (54, 112, 200)))  # (x, y), radius, colour
_CONCEPTS = ("codes", "slot_attention", "concept_vectors")
_HEATMAPS = ("slot_heatmaps", "heatmap_logits", "head_scores")
WITHOUT = {  # what each interface has nothing to show for
    "concept_slots": (),
    "concentration_token": _CONCEPTS,
    "latent_query": (*_CONCEPTS, *_HEATMAPS),
    "text_readout": (*_CONCEPTS, *_HEATMAPS, "concentration_states", "slot_queries"),
    "candidate_rerank": (),  # of concept_slots
}
INTERFACES = tuple(WITHOUT)


def make_prediction(seed: int = 0, interface: str = "concept_slots", **changes: Any) -> Prediction:
    """Two coloured discs, both found by slots 0 and 2; every array has its real shape.

    ``interface`` says which fields there are.
    """
    full = _everything(seed)
    own: dict[str, Any] = {"interface": interface, **dict.fromkeys(WITHOUT[interface])}
    if interface == "text_readout":
        own |= _named(full)
    if interface == "candidate_rerank":
        looks = np.abs(full.slot_queries).reshape(SLOTS, GRID, GRID)
        own |= {"candidates": _candidates(full), "image_attention": looks}
    return replace(full, **own | changes)


def _named(full: Prediction) -> dict[str, Any]:
    """Boxes of the discs in the answer's text, two points for the first and none for the second."""
    boxes, points = np.full((SLOTS, 4), np.nan), np.full((SLOTS, 2, 2), np.nan)
    for k, ((x, y), radius, _) in zip((0, 2), DISCS, strict=True):
        boxes[k] = (x - radius - 2.5, y - radius, x + radius, y + radius + 3.2)
    points[0] = (91.3, 80.0), (70.0, 88.5)
    answer = '[{"bbox_2d":[41,40,132,131],"point_2d":[91,80]},{"bbox_2d":[150,144,208,203]}]'
    tokens = (*full.tokens[:-SLOTS], "<answer>", "[", "]", "</answer>")
    return {
        "prompts": BoxPrompts(boxes.astype(np.float32), points.astype(np.float32)),
        "text": f"<think>{THOUGHT}</think><answer>{answer}</answer>",
        "tokens": tokens,
        "token_kinds": np.append(full.token_kinds[:-SLOTS], [TokenKind.TEMPLATE] * 4),
    }


def _candidates(full: Prediction) -> Candidates:
    """The right answer, its halves, and something else."""
    first, second = full.slot_masks[0], full.slot_masks[2]
    return Candidates(
        masks=np.stack([first, first | second, second, full.slot_masks[4]]),
        scores=np.array([0.6, 0.9, 0.4, 0.1], dtype=np.float32),
        sources=("slot 1", "direct", "slot 2, heatmap 1", "attention 1"),
        thoughts=(
            "The mask shows the red mug. The blue one is missing.",
            "The mask shows both mugs and nothing else.",
            "The mask shows the small blue mug at f6, half in the shadow of the bottle, but the "
            "instruction asks for everything one could drink from, and the large one is missing.",
            "",
        ),
        chosen=1,
    )


def _everything(seed: int) -> Prediction:
    """What concept_slots shows: all there is."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:SIZE, :SIZE]
    image = np.stack([226 - yy * 0.12, 219 - yy * 0.15, 205 - xx * 0.1], axis=-1)
    image += rng.normal(0, 2.5, image.shape)
    discs = []
    for (x, y), radius, colour in DISCS:
        disc = (xx - x) ** 2 + (yy - y) ** 2 <= radius**2
        image[disc] = np.array(colour) + rng.normal(0, 4, (int(disc.sum()), 3))
        discs.append(disc)
    scores = np.array([0.94, 0.12, 0.81, 0.04, 0.33, 0.07], dtype=np.float32)
    masks = np.zeros((SLOTS, SIZE, SIZE), dtype=bool)
    masks[0], masks[2], masks[4] = discs[0], discs[1], discs[0] & (xx > 100)
    heatmaps = np.stack([_blob(k, xx, yy, rng) for k in range(SLOTS)]).astype(np.float32)
    tokens, kinds = _tokens()
    codes = _codes(tokens, kinds, rng)
    logits = np.log(np.clip(heatmaps[:, 4::8, 4::8], 1e-3, 0.999) ** -1.0 - 1) * -1
    step = SIZE / GRID
    corners = [(x * step, y * step) for y in range(GRID) for x in range(GRID)]
    return Prediction(
        instruction=INSTRUCTION,
        status=Status.OK,
        text=f"<think>{THOUGHT}</think>" + "<seg>" * SLOTS,
        reasoning=THOUGHT,
        image_rgb=np.clip(image, 0, 255).astype(np.uint8),
        slot_masks=masks,
        slot_scores=scores,
        accepted=scores > 0.5,
        slot_heatmaps=heatmaps,
        heatmap_logits=logits.astype(np.float32),
        head_scores=rng.normal(size=(SLOTS, 4, 32, 32)).astype(np.float32),
        low_res_logits=rng.normal(size=(SLOTS, 64, 64)).astype(np.float32),
        concentration_states=np.zeros((SLOTS, 64), dtype=np.float32),
        slot_queries=rng.normal(size=(SLOTS, 64)).astype(np.float32),
        concept_vectors=rng.normal(size=(SLOTS, 128)).astype(np.float32),
        slot_attention=_attention(kinds, rng),
        codes=codes,
        tokens=tokens,
        token_kinds=kinds,
        token_boxes=np.array([(x, y, x + step, y + step) for x, y in corners], dtype=np.float32),
        threshold=0.5,
        model="nano",
        timings={"reasoning": 1.31, "concepts": 0.012, "grounding": 0.094, "masks": 0.071},
        source=str(Path("pictures") / "kitchen.png"),
    )


def no_target(seed: int = 0) -> Prediction:
    """An answer that says: nothing here matches."""
    thought = "I look for a yellow umbrella. There is none. So there is no target."
    scores = np.full(SLOTS, 0.06, dtype=np.float32)
    return make_prediction(
        seed,
        instruction="the yellow umbrella",
        status=Status.NO_TARGET,
        reasoning=thought,
        text=f"<think>{thought}</think>" + "<seg>" * SLOTS,
        slot_scores=scores,
        accepted=scores > 0.5,
        slot_masks=np.zeros((SLOTS, SIZE, SIZE), dtype=bool),
    )


def malformed(seed: int = 0, interface: str = "concept_slots") -> Prediction:
    """An answer without its form: no mask may be read from it, and no concept was active."""
    text = "The mug, the mug, the mug <seg> the mug"
    nothing = torch.zeros(0, dtype=torch.long)
    full = _everything(seed)
    nowhere = np.full((SLOTS, 4), np.nan, dtype=np.float32)
    empty = {
        "slot_scores": np.zeros(SLOTS, dtype=np.float32),
        "accepted": np.zeros(SLOTS, dtype=bool),
        "slot_masks": np.zeros_like(full.slot_masks),
        "slot_heatmaps": np.zeros_like(full.slot_heatmaps),
        "slot_attention": np.zeros_like(full.slot_attention),
        "codes": SparseCodes(nothing, nothing, torch.zeros(0), len(full.tokens), LATENTS),
        "prompts": BoxPrompts(nowhere, nowhere[:, None, :2]),
        "candidates": None,
    }
    as_made = make_prediction(seed, interface)
    has = {name: value for name, value in empty.items() if getattr(as_made, name) is not None}
    return replace(as_made, status=Status.MALFORMED, reasoning=text, text=text, **has)


def _blob(k: int, xx: np.ndarray, yy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y, radius = (88, 84, 46) if k in (0, 4) else (180, 172, 31)
    if k in (1, 3, 5):
        x, y, radius = (*rng.integers(30, 226, 2), 40)
    peak = (0.97, 0.3, 0.93, 0.15, 0.6, 0.2)[k % SLOTS]
    distance = ((xx - x) ** 2 + (yy - y) ** 2) / radius**2
    return peak / (1 + np.exp(4 * (distance - 1.1)))


def _tokens() -> tuple[tuple[str, ...], np.ndarray]:
    """The sequence as a policy sees it, split into word pieces as a tokenizer would."""
    parts: list[tuple[str, TokenKind]] = [("<|im_start|>", TokenKind.TEMPLATE)] * 3
    parts += [("<|image_pad|>", TokenKind.IMAGE)] * GRID**2
    parts += [(piece, TokenKind.INSTRUCTION) for piece in _pieces(INSTRUCTION)]
    parts += [("<think>", TokenKind.TEMPLATE)]
    parts += [(piece, TokenKind.THOUGHT) for piece in _pieces(THOUGHT)]
    parts += [("</think>", TokenKind.TEMPLATE)]
    parts += [("<seg>", TokenKind.CONCENTRATION)] * SLOTS
    return tuple(text for text, _ in parts), np.array([kind for _, kind in parts], dtype=np.int64)


def _pieces(text: str) -> list[str]:
    """Words with their leading space; long ones in two, punctuation apart."""
    pieces: list[str] = []
    for i, word in enumerate(text.split(" ")):
        body = word.rstrip(".,")
        lead = (" " if i else "") + body
        pieces += [lead[:6], lead[6:]] if len(lead) > 8 else [lead]
        pieces += list(word[len(body) :])
    return pieces


def _codes(tokens: tuple[str, ...], kinds: np.ndarray, rng: np.random.Generator) -> SparseCodes:
    """Concept 100 and 101 mean the discs, in words and picture; the rest is scattered."""
    centres = (np.arange(GRID) + 0.5) * SIZE / GRID
    rows, columns, values = [], [], []
    image = np.flatnonzero(kinds == TokenKind.IMAGE)
    for row in range(len(tokens)):
        active = {int(c): float(rng.gamma(1.5, 0.25)) for c in rng.integers(200, LATENTS, 9)}
        active[200 + int(kinds[row])] = 0.8  # one concept per kind of token
        if kinds[row] == TokenKind.IMAGE:
            y, x = divmod(int(row - image[0]), GRID)
            for number, ((cx, cy), radius, _) in enumerate(DISCS):
                gap = np.hypot(centres[x] - cx, centres[y] - cy) / radius
                if gap < 1.25:
                    active |= {100 + number: 3.1 - 1.5 * gap, 110: 2.2 - gap}
        elif tokens[row].strip() in ("red", "b3", "mug", "drink", "from"):
            active |= {100: 2.4, 110: 1.5}
        elif tokens[row].strip() in ("blue", "f6"):
            active |= {101: 2.6}
        for column in sorted(active):
            rows.append(row)
            columns.append(column)
            values.append(active[column])
    strengths = torch.tensor(values, dtype=torch.float32)
    return SparseCodes(torch.tensor(rows), torch.tensor(columns), strengths, len(tokens), LATENTS)


def _attention(kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slots 0 and 2 look at their discs, every slot a little at the words; rows sum to 1."""
    attention = rng.gamma(0.4, 1.0, (SLOTS, len(kinds)))
    image = np.flatnonzero(kinds == TokenKind.IMAGE)
    step = SIZE / GRID
    for slot, ((cx, cy), radius, _) in zip((0, 2), DISCS, strict=True):
        for i, row in enumerate(image):
            y, x = divmod(i, GRID)
            if np.hypot((x + 0.5) * step - cx, (y + 0.5) * step - cy) < radius:
                attention[slot, row] += 12
    return (attention / attention.sum(axis=1, keepdims=True)).astype(np.float32)
