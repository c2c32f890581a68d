"""What a question speaks of: a scene as the listing shows it, nouns, references and relations.

Everything is decided by the words of the listing (cells, size words). The exact positions serve
only to leave out questions whose answer would look doubtful in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot
from random import Random

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES, Thing
from segcompass.data.scenes.grammar import name
from segcompass.data.scenes.world import is_held_out

ORDER = {size: rank for rank, size in enumerate(SIZES)}
POLES = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
EXTREMES = (*POLES, "largest", "smallest")
CLEAR = 0.05  # share of the image by which places must differ where a question compares them
SAME = 0.09  # and may differ at most where it takes them for the same row or column


@dataclass(frozen=True)
class View:
    """A scene's things with their map rows and columns, 0 to 7."""

    things: tuple[Thing, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, things: Sequence[Thing]) -> View:
        cells = [thing.cell for thing in things]
        return cls(
            tuple(things),
            tuple(ord(cell[0]) - ord("a") for cell in cells),
            tuple(int(cell[1]) - 1 for cell in cells),
        )

    def having(self, **attributes: str) -> tuple[int, ...]:
        """Indices of the things with all these attributes; an empty word asks for nothing."""
        wanted = [(key, word) for key, word in attributes.items() if word]
        return tuple(
            i
            for i, thing in enumerate(self.things)
            if all(getattr(thing, key) == word for key, word in wanted)
        )

    def places(self, axis: str) -> tuple[Sequence[int], list[float]]:
        """Map columns and exact x for the axis "x", map rows and exact y for "y"."""
        if axis == "x":
            return self.columns, [thing.x for thing in self.things]
        return self.rows, [thing.y for thing in self.things]


Step = str | tuple[int, ...]
"""A sentence of a thought, or the things that are left after a look at each."""


@dataclass(frozen=True)
class Noun:
    """Words for a set of things, "striped red mug(s)", and the things in the picture they fit."""

    one: str
    many: str
    members: tuple[int, ...]

    @property
    def bare(self) -> bool:
        """Whether it is just "things", which fits everything."""
        return self.one == "thing"

    def say(self, many: bool) -> str:
        return f"all {self.many}" if many else f"the {self.one}"

    def beyond(self, index: int) -> Noun:
        """The same without one thing: "other things" where the thing was among them."""
        if index not in self.members:
            return self
        members = tuple(i for i in self.members if i != index)
        return Noun(f"other {self.one}", f"other {self.many}", members)

    def steps(self, members: Iterable[int]) -> tuple[Step, ...]:
        """The thought's step that picks the noun's things out of the listing."""
        return () if self.bare else (tuple(members),)


def noun(
    view: View, size: str = "", texture: str = "", colour: str = "", category: str = ""
) -> Noun:
    """Build a noun from attributes, each of which may be empty."""
    before = "".join(f"{word} " for word in (size, texture, colour) if word)
    one, many = (category, CATEGORIES[category].plural) if category else ("thing", "things")
    members = view.having(size=size, texture=texture, colour=colour, category=category)
    return Noun(before + one, before + many, members)


def pick_noun(
    view: View, rng: Random, patterns: Sequence[tuple[str, ...]], present: bool
) -> Noun | None:
    """Choose a noun by one of the attribute patterns.

    Args:
        view: the scene.
        rng: source of the choice.
        patterns: attribute names to choose a set from.
        present: take the words from one thing, so that something matches; otherwise mix the words
            of several things, now and then with one that does not occur at all.

    Returns:
        The noun, or None where the choice fell on an attribute that goes without saying, or
        something matches that should not.
    """
    pattern = rng.choice(patterns)
    if not pattern:
        return Noun("thing", "things", tuple(range(len(view.things))))
    source = rng.choice(view.things)
    words: dict[str, str] = {}
    for key in pattern:
        words[key] = getattr(source, key)
        if not present:
            source = rng.choice(view.things)
    if not present and rng.random() < (0.25 if len(pattern) > 1 else 1.0):
        key = rng.choice(pattern)
        words[key] = rng.choice(VOCABULARY[key])
    if "plain" in words.values() or "medium" in words.values():
        return None
    found = noun(view, **words)
    if present:
        return found
    # A pair that training never shows must not be learnt as one that never matches.
    unseen = (
        "colour" in words and "category" in words and _unseen(words["colour"], words["category"])
    )
    return None if found.members or unseen else found


@cache
def _unseen(colour: str | None, category: str | None) -> bool:
    return colour is not None and category is not None and is_held_out(colour, category)


VOCABULARY: dict[str, tuple[str, ...]] = {
    "size": tuple(size for size in SIZES if size != "medium"),
    "texture": tuple(texture for texture in TEXTURES if texture != "plain"),
    "colour": tuple(COLOURS),
    "category": tuple(CATEGORIES),
}


def pick_attribute(thing: Thing, rng: Random) -> tuple[str, str] | None:
    """Choose something to say of a thing in one word: its colour, or rarely its texture."""
    key = "colour" if rng.random() < 0.75 else "texture"
    word: str = getattr(thing, key)
    return None if word == "plain" else (key, word)


def pick_reference(view: View, rng: Random) -> tuple[int, str] | None:
    """Choose a thing that can be spoken of without doubt: its index, and "the lamp"."""
    index = rng.randrange(len(view.things))
    thing = view.things[index]
    if len(view.having(category=thing.category)) == 1 and rng.random() < 0.85:
        return index, f"the {thing.category}"
    if len(view.having(category=thing.category, colour=thing.colour)) == 1:
        return index, f"the {thing.colour} {thing.category}"
    return None


def pick_superlative(view: View, rng: Random) -> tuple[int, str] | None:
    """Choose a thing that is extreme among its like: its index, and "the largest red thing"."""
    found = pick_noun(view, rng, ((), ("category",), ("colour",)), present=True)
    word = rng.choice(EXTREMES)
    if found is None or len(found.members) < 2:
        return None
    best = extreme(view, found.members, word)
    return None if best is None else (best, f"the {word} {found.one}")


def extreme(view: View, members: Sequence[int], word: str) -> int | None:
    """The one thing that is leftmost, …, largest or smallest; None where that is not clear."""
    if not members:
        return None
    if word in POLES:
        axis, sign = ("x" if word in ("leftmost", "rightmost") else "y"), 1
        cells, exact = view.places(axis)
        if word in ("rightmost", "bottommost"):
            sign = -1
        ranked = sorted(members, key=lambda i: sign * cells[i])
        if len(ranked) > 1:
            first, second = ranked[:2]
            others = min(sign * exact[i] for i in ranked[1:])
            if cells[first] == cells[second] or others - sign * exact[first] < CLEAR:
                return None
        return ranked[0]
    sign = 1 if word == "smallest" else -1
    ranked = sorted(members, key=lambda i: sign * ORDER[view.things[i].size])
    if len(ranked) > 1 and view.things[ranked[0]].size == view.things[ranked[1]].size:
        return None
    return ranked[0]


def beside(view: View, members: Iterable[int], side: str, reference: int) -> tuple[int, ...] | None:
    """Members whose map column (row) lies left, right (above, below); None where doubtful."""
    cells, exact = view.places("x" if side in ("left", "right") else "y")
    sign = 1 if side in ("right", "below") else -1
    chosen = []
    for i in members:
        gap = abs(exact[i] - exact[reference])
        if gap < CLEAR if cells[i] != cells[reference] else gap > SAME:
            return None
        if sign * (cells[i] - cells[reference]) > 0:
            chosen.append(i)
    return tuple(chosen)


def half(view: View, members: Iterable[int], side: str) -> tuple[int, ...] | None:
    """Members in the left, right, top or bottom half of the map; None where doubtful."""
    cells, exact = view.places("x" if side in ("left", "right") else "y")
    members = tuple(members)
    if any(abs(exact[i] - 0.5) < CLEAR / 2 for i in members):
        return None
    return tuple(i for i in members if (cells[i] < 4) == (side in ("left", "top")))


def nearest(view: View, members: Sequence[int], reference: int, far: bool = False) -> int | None:
    """The member nearest to (farthest from) the reference, by a cell's width at least."""
    if not members:
        return None
    sign = -1 if far else 1

    def on_map(i: int) -> float:
        rows, columns = view.rows, view.columns
        return sign * hypot(rows[i] - rows[reference], columns[i] - columns[reference])

    def in_picture(i: int) -> float:
        one, other = view.things[i], view.things[reference]
        return sign * hypot(one.x - other.x, one.y - other.y)

    ranked = sorted(members, key=on_map)
    if len(ranked) > 1:
        if on_map(ranked[1]) - on_map(ranked[0]) < 1:
            return None
        if min(map(in_picture, ranked[1:])) - in_picture(ranked[0]) < CLEAR:
            return None
    return ranked[0]


def is_step(phrase: str, index: int, view: View) -> str:
    """The step that finds what a phrase speaks of: "The lamp is red lamp b3."."""
    return f"{phrase[0].upper()}{phrase[1:]} is {name(view.things[index])}."


def article(word: str) -> str:
    """Put "a" or "an" before a word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
