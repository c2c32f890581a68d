"""The forms of question that take several hops or everyday knowledge."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS
from segcompass.data.scenes.drafts import (
    Draft,
    everything,
    groups,
    maybe,
    plural,
    present,
    that,
    without,
    words,
)
from segcompass.data.scenes.grammar import enumerate_words
from segcompass.data.scenes.nouns import (
    POLES,
    View,
    article,
    beside,
    extreme,
    half,
    is_step,
    nearest,
    pick_noun,
    pick_reference,
    pick_superlative,
)
from segcompass.data.scenes.phrasings import PARTS, PURPOSES, SIDES

SHARED_PARTS = tuple(  # "things with pages that are not books" would ask for nothing
    part for part in PARTS if sum(part in kind.parts for kind in CATEGORIES.values()) > 1
)


def same_colour(view: View, rng: Random, want: int) -> Draft | None:
    """The mug that has the colour of the clock."""
    return _in_colour(view, rng, want, pick_reference(view, rng))


def colour_of_extreme(view: View, rng: Random, want: int) -> Draft | None:
    """All things in the colour of the leftmost mug."""
    return _in_colour(view, rng, want, pick_superlative(view, rng))


def _in_colour(view: View, rng: Random, want: int, picked: tuple[int, str] | None) -> Draft | None:
    found = pick_noun(view, rng, ((), ("category",)), present(rng, want))
    if picked is None or found is None:
        return None
    reference, ref = picked
    colour, found = view.things[reference].colour, found.beyond(reference)
    targets = tuple(i for i in found.members if view.things[i].colour == colour)
    many = plural(rng, want)
    sought = f"{found.say(many)} of the same colour as {ref}"
    steps = (is_step(ref, reference, view),)
    return Draft(targets, sought, steps, groups(many), words(found) | {"ref": ref})


def kind_of_closest(view: View, rng: Random, want: int) -> Draft | None:
    """Other things of the same kind as the one closest to the lamp."""
    return _like_closest(view, rng, "category", "kind")


def colour_of_closest(view: View, rng: Random, want: int) -> Draft | None:
    """Other things with the colour of the thing closest to the lamp."""
    return _like_closest(view, rng, "colour", "colour")


def _like_closest(view: View, rng: Random, key: str, word: str) -> Draft | None:
    picked = pick_reference(view, rng)
    if picked is None:
        return None
    reference, ref = picked
    near = nearest(view, without(range(len(view.things)), reference), reference)
    if near is None:
        return None
    value = getattr(view.things[near], key)
    if getattr(view.things[reference], key) == value:  # is the reference one of the others?
        return None
    targets = without(view.having(**{key: value}), near)
    steps = (is_step(ref, reference, view), is_step("closest", near, view))
    sought = f"other things of the same {word} as the thing closest to {ref}"
    return Draft(targets, sought, steps, ("many",), {"ref": ref})


def two_sides(view: View, rng: Random, want: int) -> Draft | None:
    """All things left of the lamp and above the mug."""
    first, second = pick_reference(view, rng), pick_reference(view, rng)
    found = pick_noun(view, rng, ((), (), ("category",), ("colour",)), True)
    if first is None or second is None or first[0] == second[0] or found is None:
        return None
    side, side2 = rng.choice(("left", "right")), rng.choice(("above", "below"))
    if rng.random() < 0.5:
        side, side2 = side2, side
    others = without(found.members, first[0], second[0])
    one, two = beside(view, others, side, first[0]), beside(view, others, side2, second[0])
    if one is None or two is None:
        return None
    many = plural(rng, want)
    open_number = many and found.bare
    sought = f"{found.say(many)} {SIDES[side][0]} {first[1]} and {SIDES[side2][0]} {second[1]}"
    slots = {"side": SIDES[side][0], "ref": first[1], "side2": SIDES[side2][0], "ref2": second[1]}
    return Draft(
        tuple(i for i in one if i in two),
        sought,
        (is_step(first[1], first[0], view), one, is_step(second[1], second[0], view)),
        groups(many, open_number),
        words(found) | slots,
    )


def _users(view: View, use: str) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(view.things) if use in CATEGORIES[t.category].uses)


def _owners(view: View, part: str) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(view.things) if part in CATEGORIES[t.category].parts)


def _pick_use(view: View, rng: Random, known: bool) -> str:
    """Choose a use of something in the picture, or any use."""
    if known:
        return rng.choice(CATEGORIES[rng.choice(view.things).category].uses)
    return rng.choice(list(PURPOSES))


def _pick_part(view: View, rng: Random, known: bool) -> str | None:
    """Choose an asked-for part of something in the picture, or any; None where it has none."""
    if known:
        parts = [p for p in CATEGORIES[rng.choice(view.things).category].parts if p in PARTS]
        return rng.choice(parts) if parts else None
    return rng.choice(list(PARTS))


def _knowledge(subject: str, names: Iterable[str]) -> str:
    """The step that says what is known: "Things to eat are apples and bananas."."""
    return f"{subject} are {enumerate_words([CATEGORIES[name].plural for name in names])}."


def _of_use(use: str) -> str:
    return _knowledge(
        f"Things {PURPOSES[use]}", (n for n, c in CATEGORIES.items() if use in c.uses)
    )


def _with_part(part: str) -> str:
    names = (n for n, c in CATEGORIES.items() if part in c.parts)
    return _knowledge(f"Things with {PARTS[part]}", names)


def use(view: View, rng: Random, want: int) -> Draft | None:
    """Something to drink from; I am thirsty."""
    sake = _pick_use(view, rng, want > 0)
    asked = "any" if rng.random() < 0.4 else sake
    targets, sought = _users(view, sake), f"things {PURPOSES[sake]}"
    return Draft(targets, sought, (_of_use(sake),), (asked,), {"todo": PURPOSES[sake]})


def use_not(view: View, rng: Random, want: int) -> Draft | None:
    """Something to drink from that is not red."""
    sake = _pick_use(view, rng, True)
    users = _users(view, sake)
    colour = view.things[rng.choice(users)].colour
    targets = tuple(i for i in users if view.things[i].colour != colour)
    steps = (_of_use(sake), users)
    slots = {"todo": PURPOSES[sake], "attr": colour, "an_attr": article(colour)}
    return Draft(targets, f"things {PURPOSES[sake]} that are not {colour}", steps, ("any",), slots)


def use_colour(view: View, rng: Random, want: int) -> Draft | None:
    """Something red to drink from."""
    sake = _pick_use(view, rng, present(rng, want))
    users = _users(view, sake)
    colour = view.things[rng.choice(users)].colour if want and users else _any_colour(view, rng)
    targets = tuple(i for i in users if view.things[i].colour == colour)
    steps = (_of_use(sake), users)
    slots = {"todo": PURPOSES[sake], "attr": colour}
    return Draft(targets, f"{colour} things {PURPOSES[sake]}", steps, ("any",), slots)


def _any_colour(view: View, rng: Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(view.things).colour
    return rng.choice(list(COLOURS))


def use_extreme(view: View, rng: Random, want: int) -> Draft | None:
    """The leftmost thing to eat."""
    sake = _pick_use(view, rng, want > 0)
    users, pole = _users(view, sake), rng.choice(list(POLES))
    best = extreme(view, users, pole)
    if (users and best is None) or (want and len(users) < 2):
        return None
    steps = (_of_use(sake), users)
    slots = {"todo": PURPOSES[sake], "pole": pole, "edge": POLES[pole]}
    return Draft(maybe(best), f"the {pole} thing {PURPOSES[sake]}", steps, ("one",), slots)


def use_half(view: View, rng: Random, want: int) -> Draft | None:
    """Something to read in the left half."""
    sake, side = _pick_use(view, rng, present(rng, want)), rng.choice(list(POLES.values()))
    users = _users(view, sake)
    targets = half(view, users, side)
    if targets is None:
        return None
    steps = (_of_use(sake), users)
    sought = f"things {PURPOSES[sake]} in the {side} half"
    return Draft(targets, sought, steps, ("any",), {"todo": PURPOSES[sake], "half": side})


def part(view: View, rng: Random, want: int) -> Draft | None:
    """All things with a handle."""
    named = _pick_part(view, rng, want > 0)
    if named is None:
        return None
    many = plural(rng, want)
    sought = f"{everything(view).say(many)} with {PARTS[named]}"
    slots = {"part": PARTS[named]}
    return Draft(_owners(view, named), sought, (_with_part(named),), groups(many), slots)


def part_colour(view: View, rng: Random, want: int) -> Draft | None:
    """The red thing with a handle."""
    named, colour = _pick_part(view, rng, present(rng, want)), _any_colour(view, rng)
    if named is None:
        return None
    owners = _owners(view, named)
    if want and owners:
        colour = view.things[rng.choice(owners)].colour
    targets = tuple(i for i in owners if view.things[i].colour == colour)
    many = plural(rng, want)
    sought = f"all {colour} things" if many else f"the {colour} thing"
    steps = (_with_part(named), owners)
    slots = {"part": PARTS[named], "attr": colour}
    return Draft(targets, f"{sought} with {PARTS[named]}", steps, groups(many), slots)


def part_not(view: View, rng: Random, want: int) -> Draft | None:
    """Things with a handle that are not mugs."""
    named = rng.choice(SHARED_PARTS)
    owners = _owners(view, named)
    if not owners:
        return None
    kind = view.things[rng.choice(owners)].category
    targets = tuple(i for i in owners if view.things[i].category != kind)
    many = plural(rng, want)
    other = CATEGORIES[kind].plural if many else article(kind)
    sought = f"{everything(view).say(many)} with {PARTS[named]} {that(many)} not {other}"
    slots = {"part": PARTS[named], "a2": article(kind), "many2": CATEGORIES[kind].plural}
    return Draft(targets, sought, (_with_part(named), owners), groups(many), slots)
