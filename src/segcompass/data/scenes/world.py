"""What stands where: a scene is sampled so that its things share attributes and hide each other."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

from PIL import Image, ImageDraw

from segcompass.data.scenes.catalog import (
    CATEGORIES,
    COLOURS,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    reading_order,
)
from segcompass.data.scenes.shapes import TINTS, extent, placed

BACKGROUNDS = ("wall", "table", "tiles", "cloth", "paper", "meadow", "terrazzo", "room")
SPLITS = ("train", "val", "testA", "testB")

FEWEST, MOST = 3, 8
OVERLAPPING = 0.4  # share of scenes in which things may stand in front of each other
VISIBLE = 0.62  # of every thing's area on the planning grid; above 0.55 in the picture
MARGIN = 0.008  # share of the image kept free at its border
GRID = 96  # cells along a side of the planning grid
TRIES = 40  # places tried for one thing before the scene is begun anew


def is_held_out(colour: str, category: str) -> bool:
    """Whether the pair is kept for testB: about one pair in ten, the same ones for ever."""
    digest = hashlib.sha256(f"unseen pair:{colour}:{category}".encode()).digest()
    return digest[0] % 10 == 0


def sample_scene(rng: random.Random, *, split: str) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of chance; equal states give equal scenes.
        split: "train", "val", "testA" or "testB". Only testB holds held-out (colour, category)
            pairs, and there at least one.

    Returns:
        A scene of 3 to 8 things in reading order, no two in one map cell, no two of equal
        category and colour in cells that touch, each at least about 60 % visible.

    Raises:
        ValueError: for a split of another name.
    """
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; choose one of {', '.join(SPLITS)}")
    seed, background = rng.randrange(2**32), rng.choice(BACKGROUNDS)
    count, overlapping = rng.randint(FEWEST, MOST), rng.random() < OVERLAPPING
    while True:
        things = _arrange(rng, _looks(rng, count, split), overlapping)
        if things is not None:
            return Scene(seed, background, reading_order(things))


def _looks(rng: random.Random, count: int, split: str) -> list[Thing]:
    """What the things are, before they have a place; the largest first, as they are placed."""
    categories = rng.sample(sorted(CATEGORIES), rng.randint(3, 5))
    colours = rng.sample(sorted(COLOURS), rng.randint(3, 4))
    pairs: list[tuple[str, str]] = []
    if split == "testB":
        pairs.append(rng.choice(_held_out_pairs()))
        colours[0], categories[0] = _first(colours, pairs[0][0]), _first(categories, pairs[0][1])
    allowed = [
        (c, k) for c in colours for k in categories if split == "testB" or not is_held_out(c, k)
    ]
    pairs += [rng.choice(allowed) for _ in range(count - len(pairs))]
    things = [_look(rng, colour, category) for colour, category in pairs]
    return sorted(things, key=lambda thing: -SIZES[thing.size])


def _first(pool: list[str], wanted: str) -> str:
    """The wanted value for the head of the pool; a value already further on leaves its place."""
    if wanted in pool:
        pool[pool.index(wanted)] = pool[0]
    return wanted


def _held_out_pairs() -> list[tuple[str, str]]:
    return [(c, k) for c in COLOURS for k in CATEGORIES if is_held_out(c, k)]


def _look(rng: random.Random, colour: str, category: str) -> Thing:
    size = rng.choices(list(SIZES), (25, 50, 25))[0]
    texture = rng.choices(TEXTURES, (60, 20, 20))[0]
    widest = 15.0 if rng.random() < 0.85 else 40.0
    angle = round(rng.uniform(-widest, widest), 1)
    return Thing(category, colour, size, texture, 0.5, 0.5, angle, 0)


def _arrange(rng: random.Random, looks: list[Thing], overlapping: bool) -> list[Thing] | None:
    """Give every thing a place and a depth; None when one of them found no place."""
    things: list[Thing] = []
    areas: list[int] = []  # bit sets over the planning grid
    order = rng.sample(range(len(looks)), len(looks))
    for look, depth in zip(looks, order, strict=True):
        left, top, right, bottom = extent(placed(look))
        half_w, half_h = (right - left) / 2 + MARGIN, (bottom - top) / 2 + MARGIN
        for _ in range(TRIES):
            x, y = rng.uniform(half_w, 1 - half_w), rng.uniform(half_h, 1 - half_h)
            if overlapping and things and rng.random() < 0.35:
                x, y = _beside(rng, rng.choice(things), half_w, half_h)
            thing = replace(look, x=round(x, 4), y=round(y, 4), depth=depth)
            if any(_too_alike(thing, other) for other in things):
                continue
            area = _area(thing)
            if _fits([*things, thing], [*areas, area], overlapping):
                things.append(thing)
                areas.append(area)
                break
        else:
            return None
    return things


def _beside(rng: random.Random, other: Thing, half_w: float, half_h: float) -> tuple[float, float]:
    """A place near another thing, inside the picture."""
    reach = SIZES[other.size] * 0.75
    x, y = other.x + rng.uniform(-reach, reach), other.y + rng.uniform(-reach, reach)
    return min(max(x, half_w), 1 - half_w), min(max(y, half_h), 1 - half_h)


def _too_alike(thing: Thing, other: Thing) -> bool:
    """Whether words could confuse the two: one cell, or one look in cells that touch."""
    rows = abs(ord(thing.cell[0]) - ord(other.cell[0]))
    columns = abs(ord(thing.cell[1]) - ord(other.cell[1]))
    same_look = (thing.category, thing.colour) == (other.category, other.colour)
    return max(rows, columns) < (2 if same_look else 1)


def _area(thing: Thing) -> int:
    """The grid cells a thing covers, as a bit set."""
    grid = Image.new("1", (GRID, GRID))
    draw = ImageDraw.Draw(grid)
    for part in placed(thing):
        if part.role not in TINTS:
            draw.polygon((part.points * GRID - 0.5).ravel().tolist(), fill=1)
    return int.from_bytes(grid.tobytes(), "big")


def _fits(things: list[Thing], areas: list[int], overlapping: bool) -> bool:
    """Whether the newest thing leaves enough of all things in sight."""
    new = areas[-1]
    met = [i for i, area in enumerate(areas[:-1]) if area & new]
    if not met:
        return True
    if not overlapping:
        return False
    for i in [*met, len(things) - 1]:
        covered = 0
        for j, area in enumerate(areas):
            if things[j].depth > things[i].depth:
                covered |= area
        if (areas[i] & ~covered).bit_count() < VISIBLE * areas[i].bit_count():
            return False
    return True
