"""Objects in an answer's text: how they are written, and a reader that survives anything.

The reader takes the spellings that published checkpoints use: ``bbox_2d``, ``bbox`` or ``box``;
``point_2d``, ``point``, or ``points_1`` and ``points_2``; one object without a list around it;
text or a code fence around the JSON; single quotes; fractions; corners in any order. Everything
else is refused by an `ObjectsError` that names what is wrong, and nothing is ever evaluated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

BOX_KEYS = ("bbox_2d", "bbox", "box")
POINT_KEYS = ("point_2d", "point", "points_1", "points_2")
MOST_OBJECTS = 64
_LONGEST, _DEEPEST = 20_000, 8  # characters; brackets inside brackets


class ObjectsError(ValueError):
    """An answer that names no readable objects; the message says why."""


class TextObject(NamedTuple):
    """One object, in px of the canvas."""

    box: tuple[float, float, float, float]  # x0 y0 x1 y1, x0 <= x1 and y0 <= y1
    points: tuple[tuple[float, float], ...] = ()  # (x, y) each; mostly one


def write_objects(objects: Iterable[TextObject], side: int) -> str:
    """Objects as an answer states them, each with its first point.

    Coordinates are rounded to whole px in [0, side), so that all have at most as many digits as
    ``side - 1``.

    Args:
        objects: In px of the canvas.
        side: Of the canvas.
    """

    def whole(values: Iterable[float]) -> list[int]:
        return [min(max(round(v), 0), side - 1) for v in values]

    items = []
    for found in objects:
        item = {"bbox_2d": whole(found.box)}
        if found.points:
            item["point_2d"] = whole(found.points[0])
        items.append(item)
    return json.dumps(items, separators=(",", ":"))


def read_objects(text: str) -> list[TextObject]:
    """The objects that a conclusion names; none if it says ``[]``.

    Raises:
        ObjectsError: naming what is wrong with it.
    """
    return [read_object(item) for item in read_items(text)]


def read_items(text: str) -> list[dict[str, Any]]:
    """The JSON objects that a conclusion holds, whatever they say; errors of `read_objects`."""
    start = re.search(r"[\[{]", text)
    if start is None:
        raise ObjectsError(f"no list of objects in {text[:40]!r}")
    if len(text) > _LONGEST or _depth(text) > _DEEPEST:
        raise ObjectsError(
            f"{len(text)} characters, {_depth(text)} brackets deep; "
            f"at most {_LONGEST} and {_DEEPEST} are read"
        )
    value, rest = _first_value(text[start.start() :])
    if re.search(r"[\[{}\]]", rest):
        raise ObjectsError(f"more than one list of objects: {rest[:40]!r} follows")
    items = [value] if isinstance(value, dict) else value
    strays = [type(item).__name__ for item in items if not isinstance(item, dict)]
    if strays or len(items) > MOST_OBJECTS:
        raise ObjectsError(
            f"want at most {MOST_OBJECTS} objects, got {len(items)}"
            + (f", among them {strays[0]}" if strays else "")
        )
    return items


def read_object(item: dict[str, Any]) -> TextObject:
    """One JSON object as box and points; errors of `read_objects`."""
    boxes = [item[key] for key in BOX_KEYS if key in item]
    if len(boxes) != 1:
        raise ObjectsError(f"want one of {', '.join(BOX_KEYS)}, got {sorted(item)[:8]}")
    x0, y0, x1, y1 = read_numbers(boxes[0], 4)
    points = [read_numbers(item[key], 2) for key in POINT_KEYS if key in item]
    return TextObject(
        (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), tuple((x, y) for x, y in points)
    )


def read_numbers(value: Any, count: int) -> Sequence[float]:
    """A list of ``count`` finite numbers; errors of `read_objects`."""
    if not isinstance(value, list) or len(value) != count:
        raise ObjectsError(f"want {count} coordinates, got {str(value)[:40]}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise ObjectsError(f"want {count} numbers, got {str(value)[:40]}")
    if any(abs(v) > 1e6 or math.isnan(v) for v in value):  # infinity too; no canvas is as large
        raise ObjectsError(f"coordinates out of all bounds: {str(value)[:40]}")
    return [float(v) for v in value]


def _first_value(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what follows it."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    try:
        value, end = decoder.raw_decode(text)
    except ValueError:  # once more, as Python would spell it
        try:
            value, end = decoder.raw_decode(text.replace("'", '"'))
        except ValueError as error:
            raise ObjectsError(f"no JSON: {error}") from None
    return value, text[end:]


def _depth(text: str) -> int:
    depth = deepest = 0
    for mark in re.findall(r"[\[{}\]]", text):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _refuse(constant: str) -> NoReturn:
    raise ObjectsError(f"{constant} is no coordinate")
