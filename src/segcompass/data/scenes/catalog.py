"""The vocabulary of the world: what things there are, what they are for, and what a scene is."""

from __future__ import annotations

from dataclasses import dataclass

MAP_SIDE = 8  # a picture is spoken of as a map of 8 rows (a–h, from the top) by 8 columns (1–8)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 52, 48),
    "orange": (240, 138, 36),
    "yellow": (246, 208, 60),
    "green": (72, 158, 78),
    "blue": (54, 112, 200),
    "purple": (134, 78, 172),
    "white": (244, 242, 236),
    "black": (52, 52, 58),
}
# longest side as a share of the image's side
SIZES: dict[str, float] = {"small": 0.15, "medium": 0.215, "large": 0.30}
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted")


@dataclass(frozen=True)
class Category:
    """A kind of everyday thing."""

    name: str
    plural: str
    uses: tuple[str, ...]  # keys of USES
    parts: tuple[str, ...]  # what one can point at on it
    form: str  # round | tall | flat | boxy


USES: dict[str, str] = {
    "drink": "drinking",
    "eat": "eating",
    "read": "reading",
    "time": "telling the time",
    "light": "giving light",
    "sit": "sitting",
    "cut": "cutting",
    "carry": "carrying things",
    "wear": "wearing",
    "play": "playing",
    "open": "opening a lock",
    "rain": "keeping dry in the rain",
    "pour": "pouring",
    "grow": "growing",
}

CATEGORIES: dict[str, Category] = {
    c.name: c
    for c in (
        Category("mug", "mugs", ("drink",), ("handle",), "boxy"),
        Category("bottle", "bottles", ("drink", "pour"), ("cap", "neck"), "tall"),
        Category("glass", "glasses", ("drink",), ("stem",), "tall"),
        Category("teapot", "teapots", ("pour",), ("handle", "spout", "lid"), "round"),
        Category("apple", "apples", ("eat",), ("leaf",), "round"),
        Category("banana", "bananas", ("eat",), (), "flat"),
        Category("book", "books", ("read",), ("pages",), "boxy"),
        Category("clock", "clocks", ("time",), ("hands",), "round"),
        Category("lamp", "lamps", ("light",), ("shade",), "tall"),
        Category("candle", "candles", ("light",), ("flame",), "tall"),
        Category("chair", "chairs", ("sit",), ("legs",), "tall"),
        Category("knife", "knives", ("cut",), ("handle", "blade"), "flat"),
        Category("bag", "bags", ("carry",), ("handle",), "boxy"),
        Category("hat", "hats", ("wear",), ("brim",), "flat"),
        Category("shoe", "shoes", ("wear",), ("laces",), "flat"),
        Category("ball", "balls", ("play",), (), "round"),
        Category("key", "keys", ("open",), ("teeth",), "flat"),
        Category("umbrella", "umbrellas", ("rain",), ("handle",), "round"),
        Category("plant", "plants", ("grow",), ("pot", "leaves"), "tall"),
    )
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene. (x, y) is the middle of its full outline, as a share of the image."""

    category: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    angle: float  # degrees, counter-clockwise; a nuisance, not asked about
    depth: int  # drawn in ascending order: the highest lies on top

    @property
    def cell(self) -> str:
        """Its place on the map, "b4"."""
        return cell_of(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. ``things`` stand in reading order: by map row, then by x."""

    seed: int  # of everything the renderer chooses by itself
    background: str
    things: tuple[Thing, ...]


def cell_of(x: float, y: float) -> str:
    """The map cell of a point given as shares of width and height."""
    row = min(MAP_SIDE - 1, max(0, int(y * MAP_SIDE)))
    column = min(MAP_SIDE - 1, max(0, int(x * MAP_SIDE)))
    return f"{'abcdefgh'[row]}{column + 1}"


def reading_order(things: list[Thing]) -> tuple[Thing, ...]:
    """Rows of the map from the top, left to right in a row: the order of every description."""
    return tuple(sorted(things, key=lambda t: (t.cell[0], t.x)))
