"""Masks that might be the answer, from everything that a model looked at on its way to its own.

    direct       the source's own answer: the union of the slots that it accepts
    slot         each slot's own mask
    heatmap      local maxima of the slots' heatmaps, which prompt the segmenter as points
    attention    local maxima of the policy's attention to the picture, likewise

Source: Rea2Seg's first stage takes attention peaks and the direct mask; slots and heatmaps are
what this project's interfaces show besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field, field_validator
from scipy import ndimage
from torch import Tensor

from segcompass.geometry import Frame, masks_to_image, padding_mask, points_to_frame
from segcompass.types import Prediction

Source = Literal["direct", "slot", "heatmap", "attention"]
# From M points (x, y) in px of the segmenter's frame to M low-resolution masks of one picture.
PointPrompt = Callable[[Float[np.ndarray, "M 2"]], Float[Tensor, "M 4h 4w"]]


class CandidateConfig(BaseModel, frozen=True, extra="forbid"):
    """Where candidates come from, and how many."""

    sources: tuple[Source, ...] = ("direct", "slot", "heatmap", "attention")
    each: int = Field(3, ge=1, description="most masks of a source")
    overlap: float = Field(0.8, gt=0, le=1, description="IoU from which two masks are the same")
    apart: int = Field(2, ge=1, description="cells between two peaks of a map")
    floor: float = Field(0.3, ge=0, le=1, description="of a map's maximum; lower ones are no peaks")
    best_of_three: bool = Field(
        True, description="SAM's alternatives for a point; false where it was never taught them"
    )

    @field_validator("sources")
    @classmethod
    def _others_are_compared_with_it(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if "direct" not in value:
            raise ValueError("direct must be among the sources: it stands unless another is better")
        return value


class Candidate(NamedTuple):
    """A mask, where it comes from, and the slots that it stands for."""

    mask: Bool[np.ndarray, "height width"]
    sources: tuple[str, ...]  # "direct", or a source and its rank there: "heatmap 2"
    slots: tuple[int, ...]  # whose masks it unites, or whose map led to it
    low_res: Float[np.ndarray, "4h 4w"] | None = None  # of masks that a peak prompted


class Peak(NamedTuple):
    """A place worth a look."""

    strength: float
    slot: int
    xy: tuple[float, float]  # px of the segmenter's frame


def propose(
    prediction: Prediction,
    prompt: PointPrompt,
    frame: Frame,
    config: CandidateConfig,
) -> list[Candidate]:
    """All distinct candidates for one picture, the direct mask first unless it is empty.

    Args:
        prediction: of any interface; what it does not show is no source.
        prompt: the segmenter, about this picture.
        frame: the picture's place in the segmenter's frame.
        config: which sources, and when two masks are the same.
    """
    found = [direct(prediction)]
    if "slot" in config.sources:
        found += single_slots(prediction)
    peaks = {
        "heatmap": heatmap_peaks(prediction, frame, config),
        "attention": attention_peaks(prediction, frame, config),
    }
    for source, places in peaks.items():
        if source in config.sources:
            found += prompted(source, places, prompt, frame)
    return distinct(found, config.overlap, config.each)


def direct(prediction: Prediction) -> Candidate:
    """The source's own answer, as one mask; empty where it accepts nothing."""
    slots = np.flatnonzero(prediction.accepted)
    return Candidate(np.asarray(prediction.masks.any(axis=0)), ("direct",), tuple(slots.tolist()))


def single_slots(prediction: Prediction) -> list[Candidate]:
    """Every slot's own mask, the most confident first."""
    order = np.argsort(-prediction.slot_scores, kind="stable").tolist()
    return [
        Candidate(prediction.slot_masks[k], (f"slot {rank}",), (k,))
        for rank, k in enumerate(order, start=1)
    ]


def heatmap_peaks(prediction: Prediction, frame: Frame, config: CandidateConfig) -> list[Peak]:
    """Peaks of all slots' heatmaps, by height times the slot's confidence."""
    if prediction.heatmap_logits is None:
        return []
    found = []
    for k, logits in enumerate(prediction.heatmap_logits):
        heat = 1 / (1 + np.exp(-logits.astype(np.float64)))
        heat[padding_mask([frame], len(heat))[0].numpy()] = 0
        cell = frame.side / len(heat)
        for y, x in maxima(heat, config.each, config.apart, config.floor):
            place = ((x + 0.5) * cell, (y + 0.5) * cell)
            found.append(Peak(float(heat[y, x] * prediction.slot_scores[k]), k, place))
    return sorted(found, key=lambda peak: -peak.strength)


def attention_peaks(prediction: Prediction, frame: Frame, config: CandidateConfig) -> list[Peak]:
    """Peaks of the attention from the concentration tokens to the image tokens."""
    if prediction.image_attention is None:
        return []
    found = []
    for k, weights in enumerate(prediction.image_attention):
        boxes = prediction.token_boxes.reshape(*weights.shape, 4)
        shown = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        for y, x in maxima(weights * shown, config.each, config.apart, config.floor):
            centre = (boxes[y, x, :2] + boxes[y, x, 2:]) / 2
            place = points_to_frame(centre, frame)
            found.append(Peak(float(weights[y, x]), k, (float(place[0]), float(place[1]))))
    return sorted(found, key=lambda peak: -peak.strength)


def maxima(
    scores: Float[np.ndarray, "h w"], most: int, apart: int, floor: float
) -> list[tuple[int, int]]:
    """Rows and columns of a map's local maxima, highest first.

    Args:
        scores: at least 0; the lowest value is never a maximum.
        most: of them.
        apart: a maximum is the highest in a square that reaches so many cells to each side, and
            no other one lies in it.
        floor: share of the map's highest value below which nothing counts.
    """
    if scores.size == 0:
        return []
    highest = ndimage.maximum_filter(scores, 2 * apart + 1, mode="nearest") == scores
    stands_out = (scores > scores.min()) & (scores >= floor * scores.max())
    places = np.argwhere(highest & stands_out)
    order = np.argsort(-scores[tuple(places.T)], kind="stable")
    kept: list[tuple[int, int]] = []
    for y, x in places[order].tolist():  # a plateau has several highest cells
        if len(kept) < most and all(max(abs(y - v), abs(x - u)) > apart for v, u in kept):
            kept.append((y, x))
    return kept


def prompted(
    source: str, peaks: Sequence[Peak], prompt: PointPrompt, frame: Frame
) -> list[Candidate]:
    """What the segmenter sees at each of the peaks."""
    if not peaks:
        return []
    low_res = prompt(np.array([peak.xy for peak in peaks], dtype=np.float32))
    masks = (masks_to_image(low_res, frame) > 0).cpu().numpy()
    return [
        Candidate(mask, (f"{source} {rank}",), (peak.slot,), logits)
        for rank, (peak, mask, logits) in enumerate(
            zip(peaks, masks, low_res.float().cpu().numpy(), strict=True), start=1
        )
    ]


def distinct(candidates: Iterable[Candidate], overlap: float, each: int) -> list[Candidate]:
    """Leave out empty masks and those that are there already; these lend their source's name.

    Args:
        candidates: in order of preference.
        overlap: IoU from which two masks are the same.
        each: most new masks of one source.
    """
    kept: list[Candidate] = []
    room: dict[str, int] = {}
    for candidate in candidates:
        family = candidate.sources[0].partition(" ")[0]
        twin = next(
            (i for i, other in enumerate(kept) if iou(candidate.mask, other.mask) >= overlap), None
        )
        if twin is not None:
            kept[twin] = kept[twin]._replace(sources=kept[twin].sources + candidate.sources)
        elif candidate.mask.any() and room.setdefault(family, each):
            room[family] -= 1
            kept.append(candidate)
    return kept


def iou(first: Bool[np.ndarray, "H W"], second: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0
