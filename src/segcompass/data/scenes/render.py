"""Draw a scene: a picture in flat-design style and the exact visible mask of every thing.

Everything is painted at twice the size and averaged down; masks come from the same polygons. All
chance comes from ``scene.seed``, so one scene always gives the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from segcompass.data.scenes.catalog import COLOURS, Scene, Thing
from segcompass.data.scenes.shapes import MATERIALS, STROKE, TINTS, Part, extent, placed

RGB = tuple[int, int, int]
FINE = 2  # supersampling
PAPERS: tuple[RGB, ...] = (  # backgrounds: mid-light and greyish, so that all colours stand out
    (214, 200, 180), (180, 199, 211), (190, 205, 178), (220, 193, 182),
    (198, 189, 214), (176, 202, 194), (222, 206, 166), (200, 200, 197),
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """A picture and where its things can be seen, in the order of ``scene.things``."""

    image: UInt8[np.ndarray, "H W 3"]
    visible: Bool[np.ndarray, "N H W"]  # mutually exclusive


def render(scene: Scene, size: int = 256) -> Rendered:
    """Draw a scene as a square picture.

    Args:
        scene: what to draw.
        size: side in pixels, at least 32.

    Returns:
        The picture, and one mask per thing: the pixels at least half of which show it.

    Raises:
        ValueError: for a side below 32 pixels or a background of unknown name.
    """
    if size < 32:
        raise ValueError(f"a picture needs a side of at least 32 pixels, not {size}")
    if scene.background not in _PAINTERS:
        known = ", ".join(_PAINTERS)
        raise ValueError(f"no background is called {scene.background!r}; choose one of {known}")
    rng = random.Random(scene.seed)
    canvas = _background(scene.background, rng, size * FINE)
    labels = Image.new("L", canvas.size)
    order = sorted(range(len(scene.things)), key=lambda i: scene.things[i].depth)
    bounds = [(i, _stamp(canvas, labels, scene.things[i], i + 1, rng)) for i in order]
    image = _lit(canvas.reduce(FINE), rng)
    return Rendered(np.array(image), _visible(np.asarray(labels), bounds, len(scene.things)))


def _visible(
    labels: UInt8[np.ndarray, "h w"],
    bounds: list[tuple[int, tuple[int, int, int, int]]],
    count: int,
) -> Bool[np.ndarray, "N H W"]:
    """Exclusive masks at picture size; the upper thing wins a pixel that two things halve."""
    side = len(labels) // FINE
    owner = np.zeros((side, side), np.uint8)
    for index, (left, top, right, bottom) in bounds:
        mine = labels[top:bottom, left:right] == index + 1
        rows, columns = mine.shape[0] // FINE, mine.shape[1] // FINE
        share = mine.reshape(rows, FINE, columns, FINE).sum(axis=(1, 3), dtype=np.uint8)
        window = (slice(top // FINE, bottom // FINE), slice(left // FINE, right // FINE))
        owner[window][share >= FINE * FINE // 2] = index + 1
    return np.equal(owner, np.arange(1, count + 1, dtype=np.uint8)[:, None, None])


def _mix(colour: RGB, other: RGB, share: float) -> RGB:
    """``share`` of the other colour in this one."""
    r, g, b = (round(c + (o - c) * share) for c, o in zip(colour, other, strict=True))
    return r, g, b


@cache
def _tones(colour: str) -> dict[str, RGB]:
    """The shades of a colour, by role, its outline, and the fixed materials."""
    base, deep, pale = COLOURS[colour], (24, 18, 34), (255, 252, 244)
    tones = {
        "body": base,
        "plain": base,
        "dark": _mix(base, deep, 0.34),
        "light": _mix(base, pale, 0.26),
        "outline": _mix(base, deep, 0.62),
        "texture": _mix(base, pale, 0.4),
    }
    if colour == "white":  # lighter is impossible, and darker is soon grey
        tones |= {"dark": _mix(base, deep, 0.16), "light": (255, 255, 252)}
        tones |= {"outline": _mix(base, deep, 0.45), "texture": _mix(base, deep, 0.2)}
    elif colour == "orange":  # lighter would be yellow
        tones |= {"light": _mix(base, (255, 214, 190), 0.26), "texture": _mix(base, deep, 0.22)}
    elif colour == "yellow":  # darker would be orange
        tones |= {"dark": _mix(base, (60, 66, 20), 0.3), "texture": _mix(base, pale, 0.46)}
    return MATERIALS | tones


def _stamp(
    canvas: Image.Image, labels: Image.Image, thing: Thing, label: int, rng: random.Random
) -> tuple[int, int, int, int]:
    """Paint one thing with its shadow; returns the window of the fine picture that holds it."""
    parts, side = placed(thing), canvas.width
    stroke = max(1, round(STROKE * side))
    left, top, right, bottom = (share * side for share in extent(parts))
    x0, y0 = (math.floor(edge) // FINE * FINE - FINE for edge in (left, top))
    x1, y1 = (math.ceil(edge) // FINE * FINE + 2 * FINE for edge in (right, bottom))
    tile, shape, body = _paint(parts, thing, rng, side, (x0, y0, x1, y1))
    outline = _grown(shape, stroke)
    _cast_shadow(canvas, outline, (x0, y0))
    tones = _tones(thing.colour)
    canvas.paste(tones["outline"], (x0, y0), outline)
    step = max(1, round(side * 0.006))
    edge = ImageChops.subtract(body, ImageChops.offset(body, -step, -step))
    tile.paste((20, 12, 36), (0, 0), edge.point(_ALPHA[36]))
    canvas.paste(tile, (x0, y0), shape)
    labels.paste(label, (x0, y0), outline)
    return max(0, x0), max(0, y0), max(0, min(side, x1)), max(0, min(side, y1))


def _paint(
    parts: Sequence[Part],
    thing: Thing,
    rng: random.Random,
    side: int,
    window: tuple[int, int, int, int],
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The thing alone: its colours, its solid area and the area of its body."""
    x0, y0, x1, y1 = window
    tones = _tones(thing.colour)
    tile = Image.new("RGB", (x1 - x0, y1 - y0), tones["plain"])
    shape, body = Image.new("L", tile.size), Image.new("L", tile.size)
    draw, draw_shape, draw_body = ImageDraw.Draw(tile), ImageDraw.Draw(shape), ImageDraw.Draw(body)
    last_body = max(i for i, part in enumerate(parts) if part.role == "body")
    for i, part in enumerate(parts):
        points = (part.points * side - (x0 + 0.5, y0 + 0.5)).ravel().tolist()
        if part.role in TINTS:
            _tint(tile, shape, points, part.role)
            continue
        draw.polygon(points, fill=tones[part.role])
        draw_shape.polygon(points, fill=255)
        draw_body.polygon(points, fill=255 if part.role == "body" else 0)
        if i == last_body and thing.texture != "plain":
            _texture(tile, body, thing, rng, side, (x0, y0))
    return tile, shape, body


_ALPHA = {a: [v * a // 255 for v in range(256)] for a in (36, 92)}


def _tint(tile: Image.Image, shape: Image.Image, points: list[float], role: str) -> None:
    """Darken or lighten what was already painted inside the polygon."""
    area = Image.new("L", tile.size)
    shade = role == "shade"
    ImageDraw.Draw(area).polygon(points, fill=44 if shade else 84)
    tile.paste((20, 12, 36) if shade else (255, 255, 255), (0, 0), ImageChops.darker(area, shape))


def _texture(
    tile: Image.Image,
    body: Image.Image,
    thing: Thing,
    rng: random.Random,
    side: int,
    corner: tuple[int, int],
) -> None:
    """Stripes or dots in another tone of the colour, on the body only."""
    pattern = Image.new("L", tile.size)
    draw = ImageDraw.Draw(pattern)
    unit = max(tile.size) / 2
    cx, cy = thing.x * side - corner[0], thing.y * side - corner[1]
    turn = math.radians(-thing.angle)
    if thing.texture == "striped":
        turn += rng.choice((0.0, math.pi / 4, math.pi / 2))
    across = (math.cos(turn), math.sin(turn))
    along = (-across[1], across[0])
    if thing.texture == "striped":
        for i in range(-4, 5):
            u, v, h = i * 0.4 * unit, 2 * unit, 0.075 * unit
            corners = ((u - h, -v), (u + h, -v), (u + h, v), (u - h, v))
            draw.polygon([(cx + a * across[0] + b * along[0], cy + a * across[1] + b * along[1])
                          for a, b in corners], fill=255)  # fmt: skip
    else:
        r = 0.115 * unit
        for i in range(-4, 5):
            for j in range(-4, 5):
                a, b = (i + 0.5 * (j % 2)) * 0.4 * unit, j * 0.35 * unit
                x, y = cx + a * across[0] + b * along[0], cy + a * across[1] + b * along[1]
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    tile.paste(_tones(thing.colour)["texture"], (0, 0), ImageChops.darker(pattern, body))


def _grown(shape: Image.Image, stroke: int) -> Image.Image:
    """The area with a rim of ``stroke`` fine pixels round it."""
    for _ in range(stroke):
        wide = shape
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            wide = ImageChops.lighter(wide, ImageChops.offset(shape, dx, dy))
        shape = wide
    return shape


def _cast_shadow(canvas: Image.Image, outline: Image.Image, corner: tuple[int, int]) -> None:
    """A soft shadow to the lower right, made at a quarter of the size."""
    side = canvas.width
    blur, shift = side * 0.012, round(side * 0.012)
    pad = 4 * math.ceil(3 * blur / 4)
    small = outline.reduce(4)
    soft = Image.new("L", (small.width + pad // 2, small.height + pad // 2))
    soft.paste(small, (pad // 4, pad // 4))
    soft = soft.filter(ImageFilter.GaussianBlur(blur / 4)).point(
        [v * 92 // 255 for v in range(256)]
    )
    soft = soft.resize((soft.width * 4, soft.height * 4), Image.Resampling.BILINEAR)
    place = (corner[0] - pad + shift, corner[1] - pad + round(1.4 * shift))
    canvas.paste((38, 30, 52), place, soft)


def _lit(image: Image.Image, rng: random.Random) -> Image.Image:
    """Light falling from the upper left: a gentle gradient over the whole picture."""
    light = Image.new("L", (3, 3))
    light.putdata([10, 0, 6 + rng.randrange(8), 0, 0, 14, rng.randrange(12), 12, 26])
    image.paste((24, 18, 44), (0, 0), light.resize(image.size, Image.Resampling.BICUBIC))
    if rng.random() < 0.4:
        _sunbeams(image, rng)
    return image


def _sunbeams(image: Image.Image, rng: random.Random) -> None:
    """Soft slanting light, as through a window."""
    beams = Image.new("L", (64, 64))
    x, slant = rng.uniform(-20, 30), rng.uniform(15, 45)
    for left, wide in ((x, 11), (x + 15, 11), (x + 34, 5)):
        quad = [(left + slant, -2), (left + slant + wide, -2), (left + wide, 66), (left, 66)]
        ImageDraw.Draw(beams).polygon(quad, fill=22)
    beams = beams.filter(ImageFilter.BoxBlur(1))
    image.paste((255, 250, 232), (0, 0), beams.resize(image.size, Image.Resampling.BILINEAR))


# --- backgrounds: quiet surfaces with some clutter that is no category ------------------------

Painter = Callable[[ImageDraw.ImageDraw, random.Random, RGB, int], None]


def _background(name: str, rng: random.Random, side: int) -> Image.Image:
    tone = rng.choice(PAPERS)
    canvas = Image.new("RGB", (side, side), tone)
    draw = ImageDraw.Draw(canvas)
    _PAINTERS[name](draw, rng, tone, side)
    for _ in range(rng.randrange(5, 16)):
        rng.choice(_CLUTTER)(draw, rng, tone, side)
    return canvas


def _shade(tone: RGB, amount: float) -> RGB:
    """Lighter for a positive amount, darker for a negative one."""
    return _mix(tone, (255, 250, 240) if amount > 0 else (40, 32, 52), abs(amount))


def _spot(rng: random.Random, side: int, low: float, high: float) -> tuple[float, float, float]:
    """A random place and a random radius, in pixels; the bounds are shares of the side."""
    return rng.uniform(0, side), rng.uniform(0, side), rng.uniform(low, high) * side


def _wall(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    pitch, faint = side / rng.randrange(5, 10), _shade(tone, rng.choice((0.09, -0.05)))
    for i in range(0, 10, 2):
        draw.rectangle((i * pitch, 0, (i + 1) * pitch, side), fill=faint)


def _table(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    tone, hair = _mix(tone, (200, 166, 128), 0.6), max(1, side // 256)
    pitch = side / rng.randrange(4, 7)
    for i in range(math.ceil(side / pitch)):
        y, plank = i * pitch, _shade(tone, rng.uniform(-0.07, 0.09))
        draw.rectangle((0, y, side, y + pitch), fill=plank)
        for _ in range(5):
            x, at, length = _spot(rng, side, 0.1, 0.4)
            at = y + pitch * (0.15 + 0.7 * at / side)
            draw.line(
                (x, at, x + length, at + rng.uniform(-3, 3)), fill=_shade(plank, -0.1), width=2
            )
        draw.line((0, y, side, y), fill=_shade(tone, -0.3), width=hair)
        x = rng.uniform(0.1, 0.9) * side
        draw.line((x, y, x, y + pitch), fill=_shade(tone, -0.25), width=hair)


def _tiles(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    count, gap = rng.randrange(4, 7), max(1, side // 170)
    pitch, chequered = side / count, rng.random() < 0.5
    draw.rectangle((0, 0, side, side), fill=_shade(tone, 0.35))
    for i in range(count):
        for j in range(count):
            amount = (-0.08 if (i + j) % 2 else 0.06) if chequered else rng.uniform(-0.05, 0.06)
            x, y, w = i * pitch + gap, j * pitch + gap, pitch - 2 * gap
            draw.rectangle((x, y, x + w, y + w), fill=_shade(tone, amount))


def _cloth(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    count = rng.randrange(5, 9)
    half = side / count / 2
    faint, crossed = _shade(tone, -0.08), _shade(tone, -0.17)
    starts = [2 * half * i for i in range(count)]
    for x in starts:
        draw.rectangle((x, 0, x + half, side), fill=faint)
        draw.rectangle((0, x, side, x + half), fill=faint)
    for x in starts:
        for y in starts:
            draw.rectangle((x, y, x + half, y + half), fill=crossed)


def _paper(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    pitch, squared = side / rng.randrange(10, 16), rng.random() < 0.5
    ink, hair = _shade(tone, -0.13), max(1, side // 256)
    draw.rectangle((0, 0, side, side), fill=_shade(tone, 0.18))
    for i in range(1, 16):
        draw.line((0, i * pitch, side, i * pitch), fill=ink, width=hair)
        if squared:
            draw.line((i * pitch, 0, i * pitch, side), fill=ink, width=hair)
    if not squared:
        x = 0.13 * side
        draw.line((x, 0, x, side), fill=_mix(tone, (200, 120, 120), 0.4), width=hair)


def _meadow(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    tone = _mix(tone, (176, 196, 150), 0.7)
    draw.rectangle((0, 0, side, side), fill=tone)
    for _ in range(6):
        x, y, r = _spot(rng, side, 0.1, 0.3)
        patch = _shade(tone, rng.uniform(-0.06, 0.07))
        draw.ellipse((x - r, y - 0.6 * r, x + r, y + 0.6 * r), fill=patch)
    for _ in range(70):
        x, y, h = _spot(rng, side, 0.014, 0.03)
        blade = _shade(tone, rng.choice((-0.18, -0.12, 0.2)))
        for lean in (-0.5, 0, 0.5):
            draw.line((x, y, x + lean * h, y - h), fill=blade, width=max(1, side // 220))


def _terrazzo(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    draw.rectangle((0, 0, side, side), fill=_shade(tone, 0.12))
    for _ in range(60):
        chip = _shade(_mix(tone, rng.choice(PAPERS), 0.8), rng.uniform(-0.22, 0.2))
        _chip(draw, rng, chip, side, rng.uniform(0.008, 0.024))


def _room(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    edge, middle = rng.uniform(0.35, 0.6) * side, side / 2
    floor = _mix(rng.choice(PAPERS), (190, 166, 140), 0.4)
    draw.rectangle((0, edge, side, side), fill=floor)
    draw.rectangle((0, edge - 0.035 * side, side, edge), fill=_shade(tone, 0.4))
    draw.rectangle((0, edge, side, edge + 0.008 * side), fill=_shade(floor, -0.25))
    for i in range(-12, 13):
        x = i * 0.16 * side
        line = (middle + 0.7 * x, edge, middle + 1.6 * x, side)
        draw.line(line, fill=_shade(floor, -0.09), width=max(1, side // 200))


def _chip(
    draw: ImageDraw.ImageDraw, rng: random.Random, fill: RGB, side: int, reach: float
) -> None:
    """A small irregular polygon anywhere."""
    x, y, turn = _spot(rng, side, 0, math.tau / side)
    step = math.tau / rng.randrange(4, 7)
    radii = [reach * side * rng.uniform(0.6, 1.1) for _ in range(round(math.tau / step))]
    angles = [turn + step * k for k in range(len(radii))]
    corners = zip(radii, angles, strict=True)
    draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in corners], fill=fill)


def _crumbs(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    for _ in range(rng.randrange(3, 8)):
        _chip(draw, rng, _mix(tone, (150, 116, 84), rng.uniform(0.4, 0.8)), side, 0.005)


def _pebble(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    x, y, r = _spot(rng, side, 0.008, 0.018)
    draw.ellipse((x - r, y - 0.6 * r, x + 1.3 * r, y + r), fill=_shade(tone, -0.28))
    draw.ellipse((x - r, y - 0.7 * r, x + r, y + 0.7 * r), fill=_mix(tone, (150, 150, 152), 0.6))


def _scribble(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    x, y, pitch = _spot(rng, side, 0.006, 0.012)
    tall = rng.uniform(1, 2) * pitch
    line = [(x + i * pitch, y + tall * math.sin(1.3 * i + x)) for i in range(rng.randrange(6, 14))]
    draw.line(line, fill=_shade(tone, -0.3), width=max(1, side // 256), joint="curve")


def _petal(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    x, y, r = _spot(rng, side, 0.012, 0.024)
    turn = rng.uniform(0, math.tau)
    fill = _mix(tone, rng.choice(((120, 132, 96), (160, 122, 92), (168, 138, 142))), 0.62)
    u, v = r * math.cos(turn), r * math.sin(turn)
    steps = [math.tau * k / 12 for k in range(12)]
    shape = [(math.cos(t), 0.42 * math.sin(t) ** 3) for t in steps]
    draw.polygon([(x + a * u - b * v, y + a * v + b * u) for a, b in shape], fill=fill)
    draw.line((x - u, y - v, x + u, y + v), fill=_shade(fill, -0.25), width=1)


def _ring(draw: ImageDraw.ImageDraw, rng: random.Random, tone: RGB, side: int) -> None:
    x, y, r = _spot(rng, side, 0.03, 0.06)
    start, stain = rng.uniform(0, 360), _mix(tone, (150, 116, 84), 0.35)
    stop = start + rng.uniform(120, 320)
    draw.arc((x - r, y - r, x + r, y + r), start, stop, fill=stain, width=max(2, side // 128))


_PAINTERS: dict[str, Painter] = {
    "wall": _wall,
    "table": _table,
    "tiles": _tiles,
    "cloth": _cloth,
    "paper": _paper,
    "meadow": _meadow,
    "terrazzo": _terrazzo,
    "room": _room,
}
_CLUTTER: tuple[Painter, ...] = (_crumbs, _crumbs, _pebble, _scribble, _petal, _petal, _ring)
