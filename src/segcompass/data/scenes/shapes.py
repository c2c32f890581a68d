"""What each kind of thing looks like: flat-design drawings made of polygons in a unit box.

A drawing is a tuple of parts, painted in order. ``shape_of`` centres it on its own bounding box and
scales it so that the longest side spans [-1, 1] exactly; y points down, as in an image. Drawings
below are written in whatever units are handy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

from segcompass.data.scenes.catalog import SIZES, Thing

Points = Float[np.ndarray, "P 2"]

# A shape's role is one of these, or follows the colour of the thing ("body", which alone carries
# the texture, "plain", "dark", "light"), or only tints.
MATERIALS: dict[str, tuple[int, int, int]] = {
    "wood": (150, 104, 66),
    "metal": (176, 182, 190),
    "paper": (246, 240, 226),
    "ink": (58, 56, 64),
    "leaf": (96, 150, 84),
    "leaf2": (74, 126, 72),
    "flame": (250, 172, 56),
    "glow": (255, 232, 142),
    "tip": (104, 80, 52),
}
TINTS = ("shade", "shine")  # translucent, clipped to what was painted before; never outline

STROKE = 1 / 256  # width of the outline round a thing, as a share of the image side


@dataclass(frozen=True)
class Part:
    """One polygon of a drawing."""

    role: str
    points: Points


def ellipse(cx: float, cy: float, rx: float, ry: float, n: int = 30) -> Points:
    """A closed ellipse."""
    t = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> Points:
    """An open arc; degrees, clockwise on screen from the positive x axis."""
    t = np.radians(np.linspace(start, stop, max(5, int(abs(stop - start) / 11))))
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float, r: float = 0.0) -> Points:
    """A rectangle with round corners of radius ``r``."""
    if r == 0.0:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)
    corners = (
        (x1 - r, y1 - r, 0),
        (x0 + r, y1 - r, 90),
        (x0 + r, y0 + r, 180),
        (x1 - r, y0 + r, 270),
    )
    return np.concatenate([arc(cx, cy, r, r, a, a + 90) for cx, cy, a in corners])


def polygon(*points: tuple[float, float]) -> Points:
    """Straight edges through the points."""
    return np.array(points, dtype=float)


def smooth(*points: tuple[float, float], steps: int = 6) -> Points:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points, dtype=float)
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = a[:, None], b[:, None], c[:, None], d[:, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.asarray(curve.reshape(-1, 2))


def band(line: Points, width: float, end: float | None = None) -> Points:
    """A ribbon along an open line, from ``width`` at its start to ``end`` (the same when None)."""
    ahead = np.gradient(line, axis=0)
    normal = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    half = np.linspace(width, width if end is None else end, len(line))[:, None] / 2
    return np.concatenate([line + normal * half, (line - normal * half)[::-1]])


def turned(*profile: tuple[float, float]) -> Points:
    """A shape symmetric about x = 0, from (half width, y) pairs read from the top."""
    right = np.array(profile, dtype=float)
    return np.concatenate([right, (right * (-1, 1))[::-1]])


Drawing = list[tuple[str, Points]]


def _mug() -> Drawing:
    cup = (polygon((-0.68, -0.72), (0.58, -0.72)), *_feet(0.58, -0.68, 0.8, 0.25))
    return [
        ("plain", band(arc(0.5, 0.05, 0.42, 0.42, -85, 85), 0.2)),
        ("body", np.concatenate(cup)),
        ("light", ellipse(-0.05, -0.72, 0.64, 0.16)),
        ("dark", ellipse(-0.05, -0.7, 0.53, 0.1)),
        ("shine", box(-0.5, -0.42, -0.38, 0.4, 0.06)),
    ]


def _feet(right: float, left: float, bottom: float, r: float) -> tuple[Points, Points]:
    """The round lower corners of an outline, from the right one to the left one."""
    return arc(right - r, bottom - r, r, r, 0, 90), arc(left + r, bottom - r, r, r, 90, 180)


def _bottle() -> Drawing:
    neck, shoulder = polygon((0.15, -0.8), (0.15, -0.45)), arc(0.17, -0.12, 0.24, 0.3, -80, 0)
    right = np.concatenate([neck, shoulder])
    left = (right * (-1, 1))[::-1]
    return [
        ("body", np.concatenate([right, *_feet(0.41, -0.41, 1.0, 0.11), left])),
        ("dark", box(-0.2, -1.0, 0.2, -0.78, 0.05)),
        ("light", box(-0.41, 0.2, 0.41, 0.56)),
        ("dark", box(-0.24, 0.33, 0.24, 0.43, 0.04)),
        ("shine", box(-0.31, -0.12, -0.22, 0.84, 0.04)),
    ]


def _glass() -> Drawing:
    return [
        ("plain", turned((0.09, 0.1), (0.07, 0.5), (0.1, 0.76), (0.44, 0.87), (0.46, 0.95),
                         (0.4, 1))),
        ("body", turned((0.52, -1), (0.57, -0.7), (0.56, -0.4), (0.47, -0.12), (0.3, 0.08),
                        (0.1, 0.17))),
        ("light", ellipse(0, -0.98, 0.52, 0.12)),
        ("dark", ellipse(0, -0.97, 0.42, 0.075)),
        ("shine", smooth((-0.43, -0.72), (-0.33, -0.72), (-0.34, -0.35), (-0.22, -0.1),
                         (-0.38, -0.3))),
    ]  # fmt: skip


def _teapot() -> Drawing:
    return [
        ("plain", band(arc(0.62, 0.08, 0.42, 0.4, -100, 100), 0.17)),
        ("plain", smooth((-0.45, 0.42), (-0.8, 0.1), (-0.88, -0.3), (-1.08, -0.42), (-0.82, -0.5),
                         (-0.66, -0.22), (-0.4, -0.1))),
        ("body", ellipse(0, 0.12, 0.72, 0.62, 40)),
        ("dark", box(-0.4, 0.64, 0.4, 0.78, 0.06)),
        ("light", arc(0, -0.38, 0.42, 0.25, 180, 360)),
        ("dark", ellipse(0, -0.7, 0.13, 0.12, 18)),
        ("shine", smooth((-0.5, 0.0), (-0.34, -0.24), (-0.27, -0.2), (-0.4, 0.02), (-0.44, 0.22))),
    ]  # fmt: skip


def _apple() -> Drawing:
    return [
        ("wood", band(polygon((0.12, -1.0), (0.04, -0.8), (0.0, -0.5)), 0.13, 0.09)),
        ("leaf", smooth((0.06, -0.72), (0.3, -1.02), (0.7, -1.0), (0.46, -0.7))),
        ("body", smooth((0, -0.52), (0.32, -0.66), (0.7, -0.5), (0.84, -0.05), (0.66, 0.5),
                        (0.32, 0.82), (0, 0.74), (-0.32, 0.82), (-0.66, 0.5), (-0.84, -0.05),
                        (-0.7, -0.5), (-0.32, -0.66))),
        ("shine", smooth((-0.62, -0.1), (-0.48, -0.38), (-0.32, -0.42), (-0.44, -0.18),
                         (-0.5, 0.1))),
    ]  # fmt: skip


def _banana() -> Drawing:
    return [
        ("body", smooth((-1.0, -0.42), (-0.86, -0.5), (-0.62, -0.14), (-0.2, 0.08), (0.3, 0.06),
                        (0.7, -0.22), (0.9, -0.56), (1.02, -0.5), (0.98, 0.02), (0.62, 0.42),
                        (0.05, 0.58), (-0.52, 0.44), (-0.88, 0.06))),
        ("shade", smooth((-0.92, -0.1), (-0.5, 0.3), (0.05, 0.42), (0.6, 0.24), (0.95, -0.15),
                         (1.05, 0.2), (0.6, 0.6), (0, 0.7), (-0.7, 0.5))),
        ("shine", smooth((-0.66, -0.02), (-0.3, 0.19), (0.2, 0.2), (-0.2, 0.25), (-0.5, 0.14))),
        ("tip", polygon((0.86, -0.5), (0.9, -0.82), (1.08, -0.8), (1.04, -0.46))),
        ("tip", ellipse(-0.95, -0.42, 0.1, 0.12, 16)),
    ]  # fmt: skip


def _book() -> Drawing:
    return [
        ("dark", box(-0.72, -0.9, 0.72, 1.0, 0.1)),
        ("paper", box(-0.6, 0.6, 0.66, 0.9)),
        ("metal", box(-0.55, 0.78, 0.66, 0.81)),
        ("body", box(-0.72, -1.0, 0.72, 0.72, 0.08)),
        ("dark", box(-0.72, -1.0, -0.48, 0.98, 0.08)),
        ("light", box(-0.26, -0.72, 0.52, -0.3, 0.06)),
        ("dark", box(-0.14, -0.6, 0.4, -0.54)),
        ("dark", box(-0.14, -0.47, 0.26, -0.41)),
    ]


def _clock() -> Drawing:
    feet = [("dark", band(polygon((s * 0.45, 0.6), (s * 0.68, 1.0)), 0.2)) for s in (-1, 1)]
    bell = arc(0, 0, 0.36, 0.3, 180, 360)
    bells = [("plain", _lean(bell, s * 42, s * 0.52, -0.66)) for s in (-1, 1)]
    turns = [np.array((math.cos(a), math.sin(a))) for a in np.radians((0, 90, 180, 270))]
    ticks = [("ink", band(_lean(np.stack([0.43 * t, 0.51 * t]), 0, 0, 0.12), 0.06)) for t in turns]
    return [
        *feet,
        *bells,
        ("dark", box(-0.09, -1.0, 0.09, -0.6, 0.05)),
        ("body", ellipse(0, 0.12, 0.84, 0.84, 40)),
        ("dark", ellipse(0, 0.12, 0.59, 0.59)),
        ("paper", ellipse(0, 0.12, 0.54, 0.54)),
        *ticks,
        ("ink", band(polygon((0, 0.12), (0.02, -0.3)), 0.08)),
        ("ink", band(polygon((-0.02, 0.1), (0.28, 0.28)), 0.09)),
    ]


def _lean(points: Points, degrees: float, dx: float, dy: float) -> Points:
    """The points turned clockwise on screen about the origin, then moved."""
    a = math.radians(degrees)
    turn = np.array(((math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))))
    return np.asarray(points @ turn + (dx, dy))


def _lamp() -> Drawing:
    return [
        ("metal", box(-0.07, 0.1, 0.07, 0.85)),
        ("plain", turned((0.1, 0.72), (0.34, 0.84), (0.44, 0.93), (0.44, 1.0))),
        ("glow", ellipse(0, 0.2, 0.22, 0.18, 20)),
        ("body", polygon((-0.4, -1.0), (0.4, -1.0), (0.82, 0.2), (-0.82, 0.2))),
        ("dark", polygon((-0.4, -1.0), (0.4, -1.0), (0.435, -0.9), (-0.435, -0.9))),
        ("dark", polygon((-0.785, 0.1), (0.785, 0.1), (0.82, 0.2), (-0.82, 0.2))),
        ("shine", polygon((-0.3, -0.82), (-0.2, -0.82), (-0.42, 0.02), (-0.58, 0.02))),
    ]


def _candle() -> Drawing:
    wax = (
        arc(0, -0.4, 0.36, 0.1, 180, 360),
        polygon((0.36, -0.16)),
        arc(0.27, -0.14, 0.08, 0.1, 0, 180),
        polygon((0.1, -0.26)),
        arc(-0.02, 0.02, 0.1, 0.12, 0, 180),
        polygon((-0.18, -0.28)),
        arc(-0.27, -0.24, 0.08, 0.08, 0, 180),
    )
    return [
        ("metal", arc(0, 0.78, 0.62, 0.24, 0, 180)),
        ("metal", ellipse(0, 0.78, 0.62, 0.1)),
        ("body", box(-0.36, -0.4, 0.36, 0.8, 0.05)),
        ("light", np.concatenate(wax)),
        ("ink", box(-0.035, -0.62, 0.035, -0.42)),
        ("flame", smooth((0, -1.08), (0.17, -0.8), (0.2, -0.64), (0, -0.5), (-0.2, -0.64),
                         (-0.14, -0.82))),
        ("glow", smooth((0, -0.84), (0.09, -0.68), (0, -0.56), (-0.09, -0.68))),
    ]  # fmt: skip


def _chair() -> Drawing:
    return [
        ("wood", polygon((-0.5, 0.2), (-0.36, 0.2), (-0.36, 0.8), (-0.46, 0.8))),
        ("wood", polygon((0.36, 0.2), (0.5, 0.2), (0.46, 0.8), (0.36, 0.8))),
        ("wood", polygon((-0.7, 0.2), (-0.5, 0.2), (-0.56, 1.0), (-0.7, 1.0))),
        ("wood", polygon((0.5, 0.2), (0.7, 0.2), (0.7, 1.0), (0.56, 1.0))),
        ("wood", box(-0.42, -0.2, -0.28, 0.12)),
        ("wood", box(0.28, -0.2, 0.42, 0.12)),
        ("body", box(-0.56, -1.0, 0.56, -0.14, 0.2)),
        ("body", smooth((-0.54, 0.02), (0, -0.02), (0.54, 0.02), (0.72, 0.22), (0.7, 0.36),
                        (0, 0.4),
                        (-0.7, 0.36), (-0.72, 0.22))),
        ("dark", smooth((-0.74, 0.26), (0, 0.32), (0.74, 0.26), (0.7, 0.4), (0, 0.44),
                        (-0.7, 0.4))),
        ("shine", box(-0.42, -0.86, 0.1, -0.78, 0.04)),
    ]  # fmt: skip


def _knife() -> Drawing:
    back = arc(0.1, 0.3, 0.9, 0.6, -90, -2)
    return [
        ("body", np.concatenate([polygon((-0.16, -0.3)), back, polygon((0.9, 0.34),
                                         (-0.16, 0.34))])),
        ("metal", polygon((-0.16, 0.2), (0.2, 0.23), (0.6, 0.21), (0.97, 0.26), (0.8, 0.34),
                          (-0.16, 0.34))),
        ("dark", box(-1.0, -0.29, -0.2, 0.07, 0.13)),
        ("metal", box(-0.28, -0.32, -0.14, 0.34)),
        ("metal", ellipse(-0.8, -0.11, 0.06, 0.06, 12)),
        ("metal", ellipse(-0.48, -0.11, 0.06, 0.06, 12)),
        ("shine", band(arc(0.1, 0.3, 0.78, 0.5, -90, -35), 0.06)),
    ]  # fmt: skip


def _bag() -> Drawing:
    strap = (polygon((-0.42, -0.1)), arc(0, -0.5, 0.42, 0.45, 180, 360), polygon((0.42, -0.1)))
    return [
        ("dark", band(np.concatenate(strap), 0.15)),
        ("body", smooth((-0.66, -0.32), (0, -0.36), (0.66, -0.32), (0.8, 0.2), (0.9, 0.7),
                        (0.74, 0.86),
                        (0, 0.9), (-0.74, 0.86), (-0.9, 0.7), (-0.8, 0.2))),
        ("light", smooth((-0.67, -0.33), (0, -0.36), (0.67, -0.33), (0.7, -0.08), (0.4, 0.14),
                         (0, 0.2),
                         (-0.4, 0.14), (-0.7, -0.08))),
        ("metal", box(-0.12, 0.08, 0.12, 0.32, 0.05)),
    ]  # fmt: skip


def _hat() -> Drawing:
    ribbon = (arc(0, 0.02, 0.56, 0.12, 180, 0), arc(0, 0.26, 0.57, 0.13, 0, 180))
    return [
        ("plain", smooth((-1.0, 0.3), (-0.7, 0.14), (0, 0.08), (0.7, 0.14), (1.0, 0.3), (0.7, 0.5),
                         (0, 0.58), (-0.7, 0.5))),
        ("body", smooth((-0.56, 0.24), (-0.52, -0.3), (-0.34, -0.62), (0, -0.54), (0.34, -0.62),
                        (0.52, -0.3), (0.56, 0.24), (0.3, 0.36), (0, 0.38), (-0.3, 0.36))),
        ("dark", np.concatenate(ribbon)),
        ("shine", smooth((-0.4, -0.2), (-0.3, -0.46), (-0.22, -0.46), (-0.3, -0.16))),
    ]  # fmt: skip


def _shoe() -> Drawing:
    lace = polygon((0.02, -0.2), (-0.16, 0.0))
    return [
        ("paper", box(-1.0, 0.3, 1.0, 0.56, 0.12)),
        ("body", smooth((-0.96, 0.4), (-0.98, 0.0), (-0.94, -0.46), (-0.8, -0.52), (-0.5, -0.42),
                        (-0.16, -0.44), (0.04, -0.3), (0.4, 0.02), (0.78, 0.1), (0.96, 0.26),
                        (0.96, 0.4), (0, 0.42))),
        ("dark", smooth((-0.96, -0.44), (-0.8, -0.54), (-0.5, -0.43), (-0.16, -0.45), (-0.3, -0.3),
                        (-0.7, -0.3))),
        ("light", smooth((0.56, 0.06), (0.8, 0.1), (0.96, 0.26), (0.97, 0.4), (0.54, 0.41),
                         (0.46, 0.2))),
        ("paper", polygon((-0.99, 0.37), (0.99, 0.37), (0.97, 0.48), (-0.97, 0.48))),
        *(("paper", band(_lean(lace, 0, 0.17 * i, 0.11 * i), 0.09)) for i in range(3)),
    ]  # fmt: skip


def _ball() -> Drawing:
    seams = (
        band(arc(-1.35, 0, 1.0, 1.2, -48, 48), 0.09),
        band(arc(1.35, 0, 1.0, 1.2, 132, 228), 0.09),
        band(arc(0, -1.9, 2.1, 2.0, 63, 117), 0.09),
    )
    reach = [np.maximum(1, np.linalg.norm(seam, axis=1, keepdims=True)) for seam in seams]
    return [
        ("body", ellipse(0, 0, 1, 1, 44)),
        *(("dark", seam / far) for seam, far in zip(seams, reach, strict=True)),
        ("shine", smooth((-0.66, -0.36), (-0.44, -0.66), (-0.2, -0.76), (-0.26, -0.6),
                         (-0.48, -0.42), (-0.6, -0.2))),
    ]  # fmt: skip


def _key() -> Drawing:
    return [
        ("body", box(-0.3, -0.14, 1.0, 0.14, 0.06)),
        ("body", box(0.42, 0.0, 0.62, 0.5, 0.04)),
        ("body", box(0.76, 0.0, 0.99, 0.42, 0.04)),
        ("body", band(arc(-0.56, 0, 0.31, 0.35, 0, 360), 0.28)),
        ("dark", box(-0.16, -0.19, -0.04, 0.19, 0.03)),
        ("shine", box(0.04, -0.08, 0.85, -0.02)),
    ]


def _umbrella() -> Drawing:
    scallops = [arc(x, 0.12, 0.25, 0.16, 0, -180) for x in (0.75, 0.25, -0.25, -0.75)]
    stick = (polygon((0, -0.1), (0, 0.4), (0, 0.76)), arc(-0.16, 0.8, 0.16, 0.17, 0, 180))
    rib = band(arc(0, 0.12, 0.48, 0.96, 184, 268), 0.06)
    return [
        ("metal", box(-0.05, -1.0, 0.05, -0.7)),
        ("wood", band(np.concatenate(stick), 0.11)),
        ("body", np.concatenate([arc(0, 0.12, 1.0, 0.98, 180, 360), *scallops])),
        ("dark", rib),
        ("dark", rib * (-1, 1)),
        ("dark", box(-0.03, -0.84, 0.03, 0.02)),
        ("shine", smooth((-0.82, -0.2), (-0.66, -0.52), (-0.5, -0.62), (-0.62, -0.4),
                         (-0.68, -0.16))),
    ]  # fmt: skip


def _plant() -> Drawing:
    def leaf(role: str, degrees: float, length: float, width: float) -> tuple[str, Points]:
        blade = smooth((0, 0), (width, -0.5 * length), (0.02, -length), (-width, -0.5 * length))
        return role, _lean(blade, degrees, 0, 0.05)

    return [
        leaf("leaf2", 60, 0.7, 0.15),
        leaf("leaf2", -60, 0.7, 0.15),
        leaf("leaf", 32, 0.82, 0.16),
        leaf("leaf", -32, 0.82, 0.16),
        leaf("leaf2", -2, 0.9, 0.16),
        ("body", polygon((-0.62, 0.1), (0.62, 0.1), (0.48, 1.0), (-0.48, 1.0))),
        ("body", box(-0.74, -0.12, 0.74, 0.24, 0.06)),
        ("shade", polygon((-0.7, 0.24), (0.7, 0.24), (0.64, 0.32), (-0.64, 0.32))),
        ("shine", polygon((-0.44, 0.4), (-0.32, 0.4), (-0.26, 0.88), (-0.35, 0.88))),
    ]


_DRAWINGS = {
    "mug": _mug, "bottle": _bottle, "glass": _glass, "teapot": _teapot, "apple": _apple,
    "banana": _banana, "book": _book, "clock": _clock, "lamp": _lamp, "candle": _candle,
    "chair": _chair, "knife": _knife, "bag": _bag, "hat": _hat, "shoe": _shoe, "ball": _ball,
    "key": _key, "umbrella": _umbrella, "plant": _plant,
}  # fmt: skip


@cache
def shape_of(category: str) -> tuple[Part, ...]:
    """The drawing of a category, centred, its longest side spanning [-1, 1].

    Raises:
        KeyError: when no drawing has that name.
    """
    drawing = _DRAWINGS[category]()
    solid = np.concatenate([points for role, points in drawing if role not in TINTS])
    low, high = solid.min(axis=0), solid.max(axis=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2
    return tuple(Part(role, (points - middle) / half) for role, points in drawing)


def placed(thing: Thing) -> Sequence[Part]:
    """The drawing where the thing stands, in shares of the image side.

    The rotated outline's bounding box is centred on (x, y); the outline stroke is added outside
    the polygons, so these are drawn one stroke smaller than the size of the thing says.
    """
    parts = shape_of(thing.category)
    angle = math.radians(thing.angle)
    scale = SIZES[thing.size] / 2 - STROKE
    turn = scale * np.array(
        ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle)))
    )
    moved = [part.points @ turn for part in parts]
    solid = np.concatenate([m for m, p in zip(moved, parts, strict=True) if p.role not in TINTS])
    shift = (thing.x, thing.y) - (solid.min(axis=0) + solid.max(axis=0)) / 2
    return [Part(p.role, m + shift) for m, p in zip(moved, parts, strict=True)]


def extent(parts: Sequence[Part]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a placed drawing with its outline, in shares of the image."""
    solid = np.concatenate([part.points for part in parts if part.role not in TINTS])
    left, top = (solid.min(axis=0) - STROKE).tolist()
    right, bottom = (solid.max(axis=0) + STROKE).tolist()
    return left, top, right, bottom
