"""Score one answer against its target: the gRefCOCO rules, and what later figures need of a pair.

Source: the gRefCOCO protocol. Prediction and target are unions of instances. Where nothing is to be
found, predicting nothing scores IoU 1 and adds nothing to the sums, predicting anything scores 0
and adds its area to the union. An answer that is not well-formed scores IoU 0, and is never a
correct "nothing matches". docs/evaluation.md states every convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco

from segcompass.evaluation.detection import MAX_DETECTIONS, match_targets
from segcompass.io import masks
from segcompass.types import Rle, Sample, Status

CocoRle = dict[str, Any]  # an Rle as pycocotools wants it: ``counts`` in bytes


@dataclass(frozen=True, slots=True)
class PairScore:
    """How one answer about one (image, instruction) pair did: small numbers, no masks.

    Fields with a default may be left out by a judge that cannot know them; the figures that need
    them are then undefined.
    """

    sample_id: str
    intersection: int  # px
    union: int  # px
    iou: float  # in [0, 1]
    has_target: bool
    predicted_any: bool  # a well-formed answer with at least one pixel
    status: Status = Status.OK
    kind: str | None = None
    reasoning_correct: bool | None = None  # the thought names exactly the targets; None: unjudged
    targets: int | None = None  # target instances that have a pixel outside what is ignored
    target_share: float | None = None  # of the pixels that are not ignored, in [0, 1]
    words: int | None = None  # of the instruction, split at white space
    confidences: tuple[float, ...] = ()  # of all slots of a well-formed answer, descending
    # (intersection, union) of the k most confident slots, k = 0 … K; empty unless well-formed
    prefixes: tuple[tuple[int, int], ...] = ()
    # of the 100 most confident slots, in that order: bit t is set where the slot matched a target
    # at IoU 0.50 + 0.05 t
    detections: tuple[int, ...] = ()
    # (intersection, union) of the same thought along one path alone, by the path's name
    paths: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def well_formed(self) -> bool:
        """Whether the answer had the form that was asked for."""
        return self.status.well_formed

    @property
    def presence_correct(self) -> bool:
        """Whether the answer was right about there being something or nothing."""
        return self.well_formed and self.predicted_any == self.has_target

    def at(self, threshold: float) -> PairScore:
        """The score this answer gets when the slots with a confidence above ``threshold`` count.

        Raises:
            ValueError: the score was made from a union mask, without the single slots.
        """
        return self.with_slots(sum(confidence > threshold for confidence in self.confidences))

    def with_slots(self, count: int) -> PairScore:
        """The score this answer gets when its ``count`` most confident slots count.

        Raises:
            ValueError: as in ``at``.
        """
        if not self.well_formed:
            return self
        if not self.prefixes:
            raise ValueError(f"{self.sample_id}: was scored as one mask, without single slots")
        intersection, union = self.prefixes[count]
        return replace(
            self,
            intersection=intersection,
            union=union,
            iou=_iou(intersection, union, well_formed=True),
            predicted_any=self.prefixes[count] != self.prefixes[0],
            status=Status.OK if count else Status.NO_TARGET,
        )

    def along(self, path: str) -> PairScore:
        """The score of the same thought with masks of one path alone; not for average precision.

        Raises:
            KeyError: the path was not measured.
        """
        intersection, union = self.paths[path]
        return replace(
            self,
            intersection=intersection,
            union=union,
            iou=_iou(intersection, union, self.well_formed),
            predicted_any=self.well_formed and (intersection, union) != self.prefixes[0],
            confidences=(),
            prefixes=(),
            detections=(),
            paths={},
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PairScore:
        """Read a score back from its JSON object; keys that are no field are passed over.

        Raises:
            TypeError, ValueError, KeyError: the object is no score.
        """
        names = [one.name for one in fields(cls)]
        known = {name: row[name] for name in names if name in row}
        known["status"] = Status(known["status"])
        for name in ("confidences", "detections"):
            known[name] = tuple(known.get(name, ()))
        known["prefixes"] = tuple((int(i), int(u)) for i, u in known.get("prefixes", ()))
        paths = known.get("paths", {})
        known["paths"] = {name: (int(i), int(u)) for name, (i, u) in paths.items()}
        return cls(**known)


def score_pair(
    prediction: Bool[np.ndarray, "H W"],
    target: Bool[np.ndarray, "H W"],
    ignore: Bool[np.ndarray, "H W"] | None = None,
    *,
    status: Status = Status.OK,
) -> PairScore:
    """Score one union mask by the gRefCOCO rules, at the image's own size.

    Args:
        prediction: union of the accepted slots; not looked at unless the answer is well-formed.
        target: union of the target instances; empty when nothing matches.
        ignore: pixels left out of both (ReasonSeg).
        status: how the answer ended.

    Returns:
        The score of a nameless sample, without what needs single instances; an empty union counts
        as IoU 1 where the answer is well-formed.

    Raises:
        ValueError: the masks differ in shape.
    """
    for name, mask in (("target", target), ("ignore", ignore)):
        if mask is not None and mask.shape != prediction.shape:
            raise ValueError(f"{name} has shape {mask.shape}, the prediction {prediction.shape}")
    well_formed = status.well_formed
    predicted = prediction if well_formed else np.zeros_like(prediction)
    if ignore is not None:
        predicted, target = predicted & ~ignore, target & ~ignore
    intersection = int(np.count_nonzero(predicted & target))
    union = int(np.count_nonzero(predicted | target))
    visible = target.size - (0 if ignore is None else int(np.count_nonzero(ignore)))
    return PairScore(
        sample_id="",
        intersection=intersection,
        union=union,
        iou=_iou(intersection, union, well_formed),
        has_target=bool(target.any()),
        predicted_any=bool(predicted.any()),
        status=status,
        target_share=_share(int(np.count_nonzero(target)), visible),
    )


def score_sample(
    sample: Sample,
    slots: Sequence[Rle],
    confidences: Sequence[float],
    *,
    threshold: float,
    status: Status = Status.OK,
    reasoning_correct: bool | None = None,
) -> PairScore:
    """Score one answer, instance by instance, from run lengths alone: nothing is decoded.

    Args:
        sample: targets, ignored pixels, instruction and size of the image.
        slots: all masks of the answer, accepted or not, at the image's own size, in any order;
            not looked at unless the answer is well-formed. Their runs must be sound.
        confidences: one for each slot, in [0, 1].
        threshold: slots whose confidence is above it are the answer.
        status: how the answer ended.
        reasoning_correct: whether the thought names exactly the targets, where that can be judged.

    Returns:
        The score, with what it takes to judge any other threshold and average precision. Slots of
        equal confidence keep their order.

    Raises:
        ValueError: a mask has another size than the image, or confidences and slots differ in
            number.
    """
    if len(slots) != len(confidences):
        raise ValueError(f"{len(slots)} slots, but {len(confidences)} confidences")
    well_formed = status.well_formed
    scores = np.asarray(confidences if well_formed else (), dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    visible = _complement(sample.ignore)
    ranked = _read([slots[i] for i in order], sample.image_hw, visible)
    targets = [t for t in _read(sample.targets, sample.image_hw, visible) if coco.area(t)]
    prefixes = _prefixes(ranked, targets, sample.image_hw)
    intersection, union = prefixes[int(np.count_nonzero(scores > threshold))]
    target_area = prefixes[0][1]
    return PairScore(
        sample_id=sample.sample_id,
        intersection=intersection,
        union=union,
        iou=_iou(intersection, union, well_formed),
        has_target=target_area > 0,
        predicted_any=(intersection, union) != prefixes[0],
        status=status,
        kind=sample.kind,
        reasoning_correct=reasoning_correct,
        targets=len(targets),
        target_share=_share(target_area, _pixels(sample.image_hw, visible)),
        words=len(sample.instruction.split()),
        confidences=tuple(float(score) for score in scores[order]),
        prefixes=prefixes if well_formed else (),
        detections=_detections(ranked[:MAX_DETECTIONS], targets),
    )


def _iou(intersection: int, union: int, well_formed: bool) -> float:
    return intersection / union if union else float(well_formed)


def _share(area: int, pixels: int) -> float:
    return area / pixels if pixels else 0.0


def _read(rles: Sequence[Rle], hw: tuple[int, int], visible: CocoRle | None) -> list[CocoRle]:
    """Masks for pycocotools, without the ignored pixels."""
    wrong = next((rle["size"] for rle in rles if tuple(rle["size"]) != hw), None)
    if wrong is not None:
        raise ValueError(f"a mask of (height, width) {wrong} for an image of {hw}")
    read = [_bytes(rle) for rle in rles]
    return read if visible is None else [_intersect(mask, visible) for mask in read]


def _bytes(rle: Rle) -> CocoRle:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _complement(ignore: Rle | None) -> CocoRle | None:
    return None if ignore is None else _bytes(masks.encode(~masks.decode(ignore)))


def _intersect(first: CocoRle, second: CocoRle) -> CocoRle:
    both: CocoRle = coco.merge([first, second], intersect=True)
    return both


def _pixels(hw: tuple[int, int], visible: CocoRle | None) -> int:
    return hw[0] * hw[1] if visible is None else int(coco.area(visible))


def _prefixes(
    ranked: Sequence[CocoRle], targets: Sequence[CocoRle], hw: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Intersection and union with the target of the union of the first k masks, k = 0 … K."""
    target = coco.merge(targets) if targets else _nothing(hw)
    owed = int(coco.area(target))
    found, so_far = [(0, owed)], None
    for mask in ranked:
        so_far = mask if so_far is None else coco.merge([so_far, mask])
        intersection = int(coco.area(_intersect(so_far, target)))
        found.append((intersection, owed + int(coco.area(so_far)) - intersection))
    return tuple(found)


def _nothing(hw: tuple[int, int]) -> CocoRle:
    empty: CocoRle = coco.frPyObjects({"size": hw, "counts": [hw[0] * hw[1]]}, *hw)
    return empty


def _detections(ranked: Sequence[CocoRle], targets: Sequence[CocoRle]) -> tuple[int, ...]:
    if not ranked or not targets:
        return (0,) * len(ranked)
    return match_targets(coco.iou(ranked, targets, [0] * len(targets)))
