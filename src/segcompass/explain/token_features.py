"""What is known about each token without asking the model, as features of concept labels.

Words, places and targets are known for every data set; looks and relations for scenes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from segcompass.data.samples import ImageRecord
from segcompass.data.scenes.catalog import cell_of
from segcompass.explain.token_regions import INSTANCE, on_instance, shares
from segcompass.explain.token_words import word_features
from segcompass.explain.vocabulary import Feature
from segcompass.io import masks
from segcompass.types import NamedObject, Prediction, Sample, TokenKind

_KINDS = {
    TokenKind.TEMPLATE: "template",
    TokenKind.IMAGE: "picture",
    TokenKind.INSTRUCTION: "question",
    TokenKind.THOUGHT: "thought",
}
_NEAR = 2  # cells of the map, across or along, between neighbours


def token_features(
    sample: Sample, prediction: Prediction, scenes: Mapping[int, ImageRecord]
) -> Iterator[tuple[int, Feature]]:
    """Every (token, feature) of an answer.

    Args:
        sample: what was asked.
        prediction: the answer, with its tokens.
        scenes: pictures of which everything is known, by image id; empty for real data sets.
    """
    for token, kind in enumerate(prediction.token_kinds.tolist()):
        if kind in _KINDS:
            yield token, Feature("kind", _KINDS[TokenKind(kind)])
        if kind == TokenKind.TEMPLATE:
            yield token, Feature("mark", prediction.tokens[token].strip())
    scene = scenes.get(sample.image_id)
    yield from word_features(prediction, looks=scene is not None)
    image = np.flatnonzero(prediction.token_kinds == TokenKind.IMAGE).tolist()
    cells = _cells(sample, prediction)
    yield from _of_places(sample, prediction, image, cells)
    if scene is not None:
        yield from _of_things(sample, scene, prediction, image, cells)


def _cells(sample: Sample, prediction: Prediction) -> list[str]:
    """The cell of the map in which each image token has its middle."""
    height, width = sample.image_hw
    return [
        cell_of((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
        for x0, y0, x1, y1 in prediction.token_boxes
    ]


def _of_places(
    sample: Sample, prediction: Prediction, image: Sequence[int], cells: Sequence[str]
) -> Iterator[tuple[int, Feature]]:
    target = on_instance(prediction.token_boxes, masks.union(sample.targets, sample.image_hw))
    for token, cell, wanted in zip(image, cells, target, strict=True):
        yield token, Feature("row", cell[0])
        yield token, Feature("column", cell[1])
        yield token, Feature("cell", cell)
        yield token, Feature("place anywhere", cell)
        yield token, Feature("target", "the target" if wanted else "the rest")


def _of_things(
    sample: Sample,
    scene: ImageRecord,
    prediction: Prediction,
    image: Sequence[int],
    cells: Sequence[str],
) -> Iterator[tuple[int, Feature]]:
    """Of the thing that covers most of a patch: its look, and how it stands to the target."""
    parts = shares(prediction.token_boxes, np.stack([masks.decode(rle) for rle in scene.masks]))
    centres = (prediction.token_boxes[:, :2] + prediction.token_boxes[:, 2:]) / 2
    middles = [np.average(centres, axis=0, weights=part + 1e-9) for part in parts]
    targets = [thing for thing in scene.objects if thing.ann_id in sample.target_ids]
    relations = [[*_relations(thing, targets)] for thing in scene.objects]
    for token, cell, covered, centre in zip(image, cells, parts.T, centres, strict=True):
        best = int(covered.argmax())
        if covered[best] < INSTANCE:
            yield token, Feature("thing", "the background")
            yield token, Feature("filled", f"the background at {cell}")
            continue
        yield token, Feature("thing", "things")
        yield token, Feature("filled", f"things at {cell}")
        yield token, Feature("part", _part(centre - middles[best], prediction))
        features = [*_looks(scene.objects[best], cell), *relations[best]]
        yield from ((token, feature) for feature in features)


def _looks(thing: NamedObject, cell: str) -> Iterator[Feature]:
    for family in ("category", "colour", "size", "texture"):
        yield Feature(family, getattr(thing, family))
    yield Feature("look", f"{thing.colour} {thing.category}")
    yield Feature("build", f"{thing.size} {thing.colour} {thing.texture}")
    yield Feature("colour in row", f"{thing.colour} things in row {cell[0]}")
    yield Feature("colour in column", f"{thing.colour} things in column {cell[1]}")
    yield Feature("colour anywhere", thing.colour)
    yield Feature("category anywhere", thing.category)


def _part(offset: np.ndarray, prediction: Prediction) -> str:
    """On which side of its thing a patch lies."""
    x, y = offset / (prediction.token_boxes[0, 2:] - prediction.token_boxes[0, :2])
    if max(abs(x), abs(y)) < 0.5:
        return "middle"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _relations(thing: NamedObject, targets: Sequence[NamedObject]) -> Iterator[Feature]:
    """How a thing stands to all targets; nothing where it is one, or where there are none."""
    if not targets or any(thing.ann_id == target.ann_id for target in targets):
        return
    rows = {ord(thing.cell[0]) - ord(target.cell[0]) for target in targets}
    columns = {int(thing.cell[1]) - int(target.cell[1]) for target in targets}
    if max(columns) < 0 or min(columns) > 0:
        side = "left" if max(columns) < 0 else "right"
        yield Feature("beside", f"{side} of the target")
    if max(rows) < 0 or min(rows) > 0:
        yield Feature("above", f"{'above' if max(rows) < 0 else 'below'} the target")
    near = any(
        abs(ord(thing.cell[0]) - ord(t.cell[0])) <= _NEAR
        and abs(int(thing.cell[1]) - int(t.cell[1])) <= _NEAR
        for t in targets
    )
    yield Feature("nearness", "near the target" if near else "far from the target")
    colour = any(thing.colour == target.colour for target in targets)
    category = any(thing.category == target.category for target in targets)
    if colour or category:
        shared = " and ".join(["colour"] * colour + ["category"] * category)
        yield Feature("likeness", f"of the target's {shared}")
