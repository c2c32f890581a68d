"""The forms of question about where things are: the spatial kind, and its steps in others."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from segcompass.data.scenes.drafts import (
    SIMPLE,
    Draft,
    groups,
    maybe,
    plural,
    present,
    without,
    words,
)
from segcompass.data.scenes.nouns import (
    POLES,
    View,
    beside,
    extreme,
    half,
    is_step,
    nearest,
    pick_noun,
    pick_reference,
    pick_superlative,
)
from segcompass.data.scenes.phrasings import SIDES

PLAIN = (("category",), ("colour",), ("colour",), ("texture",))


def extreme_of(view: View, rng: Random, want: int) -> Draft | None:
    """The leftmost mug."""
    found = pick_noun(view, rng, SIMPLE, want > 0)
    if found is None or (want and len(found.members) < 2):
        return None
    pole = rng.choice(list(POLES))
    best = extreme(view, found.members, pole)
    if found.members and best is None:
        return None
    slots = words(found) | {"pole": pole, "edge": POLES[pole]}
    steps = found.steps(found.members)
    return Draft(maybe(best), f"the {pole} {found.one}", steps, ("one",), slots)


def beside_reference(view: View, rng: Random, want: int) -> Draft | None:
    """All things left of the plate."""
    return _beside(view, rng, want, pick_reference(view, rng))


def beside_extreme(view: View, rng: Random, want: int) -> Draft | None:
    """The mug right of the largest book."""
    return _beside(view, rng, want, pick_superlative(view, rng))


def _beside(view: View, rng: Random, want: int, picked: tuple[int, str] | None) -> Draft | None:
    found = pick_noun(view, rng, SIMPLE, present(rng, want))
    if picked is None or found is None:
        return None
    reference, ref = picked
    side, others = rng.choice(list(SIDES)), without(found.members, reference)
    targets = beside(view, others, side, reference)
    if targets is None:
        return None
    many = plural(rng, want)
    steps = (is_step(ref, reference, view), *found.steps(others))
    slots = words(found) | {"side": rng.choice(SIDES[side]), "ref": ref}
    sought = f"{found.say(many)} {SIDES[side][0]} {ref}"
    return Draft(targets, sought, steps, groups(many, found.bare), slots)


def in_half(view: View, rng: Random, want: int) -> Draft | None:
    """All things in the top half."""
    found = pick_noun(view, rng, SIMPLE, present(rng, want))
    side = rng.choice(list(POLES.values()))
    targets = None if found is None else half(view, found.members, side)
    if found is None or targets is None:
        return None
    many = plural(rng, want)
    steps = found.steps(found.members)
    sought = f"{found.say(many)} in the {side} half"
    return Draft(targets, sought, steps, groups(many), words(found) | {"half": side})


def in_corner(view: View, rng: Random, want: int) -> Draft | None:
    """What is in the top left corner?"""
    found = pick_noun(view, rng, SIMPLE, present(rng, want, 0.9))
    if found is None:
        return None
    down, across = rng.choice(("top", "bottom")), rng.choice(("left", "right"))
    steps_in = []  # how many cells a thing lies from the corner
    for i in found.members:
        row, column = view.rows[i], view.columns[i]
        steps_in.append(
            max(row if down == "top" else 7 - row, column if across == "left" else 7 - column)
        )
    if 2 in steps_in:  # neither in the corner nor clearly out of it
        return None
    targets = tuple(i for i, far in zip(found.members, steps_in, strict=True) if far < 2)
    many = plural(rng, want)
    corner = f"{down} {across}"
    sought = f"{found.say(many)} in the {corner} corner"
    steps = found.steps(found.members)
    slots = words(found) | {"corner": corner}
    return Draft(targets, sought, steps, groups(many, found.bare), slots)


def closest(view: View, rng: Random, want: int) -> Draft | None:
    """The mug closest to the lamp."""
    return _nearest(view, rng, want, pick_reference(view, rng), SIMPLE, far=False)


def farthest(view: View, rng: Random, want: int) -> Draft | None:
    """The mug farthest from the lamp."""
    return _nearest(view, rng, want, pick_reference(view, rng), SIMPLE, far=True)


def closest_of(view: View, rng: Random, want: int) -> Draft | None:
    """Of the red things, the one closest to the largest mug."""
    hard = rng.random() < 0.5
    picked = pick_superlative(view, rng) if hard else pick_reference(view, rng)
    return _nearest(view, rng, want, picked, PLAIN, far=False)


def _nearest(
    view: View,
    rng: Random,
    want: int,
    picked: tuple[int, str] | None,
    patterns: Sequence[tuple[str, ...]],
    far: bool,
) -> Draft | None:
    found = pick_noun(view, rng, patterns, want > 0)
    if picked is None or found is None:
        return None
    reference, ref = picked
    others = without(found.members, reference)
    if want and len(others) < 2:
        return None
    best = nearest(view, others, reference, far)
    if others and best is None:
        return None
    steps = (is_step(ref, reference, view), *found.steps(others))
    asked = ("one", "thing") if found.bare and not far else ("one",)
    sought = f"the {found.one} {'farthest from' if far else 'closest to'} {ref}"
    return Draft(maybe(best), sought, steps, asked, words(found) | {"ref": ref})
