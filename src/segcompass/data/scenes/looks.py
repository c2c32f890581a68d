"""The forms of question about what things look like: discriminative and geometric."""

from __future__ import annotations

from random import Random

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS
from segcompass.data.scenes.drafts import (
    SIMPLE,
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
from segcompass.data.scenes.nouns import (
    ORDER,
    Noun,
    View,
    article,
    extreme,
    is_step,
    noun,
    pick_attribute,
    pick_noun,
    pick_reference,
)
from segcompass.data.scenes.phrasings import BIGGER, LARGEST

FULL = (
    ("colour", "category"),
    ("colour", "category"),
    ("category",),
    ("colour",),
    ("texture",),
    ("texture", "category"),
    ("texture", "colour"),
    ("texture", "colour", "category"),
    ("size", "colour"),
    ("size", "colour", "category"),
)


def described(view: View, rng: Random, want: int) -> Draft | None:
    """The red mug; all striped things."""
    found = pick_noun(view, rng, FULL, want > 0)
    if found is None:
        return None
    many = plural(rng, want)
    return Draft(found.members, found.say(many), (), groups(many), words(found))


def negated(view: View, rng: Random, want: int) -> Draft | None:
    """All mugs that are not red."""
    found = pick_noun(view, rng, (("category",), ("category",), ("texture",), ()), True)
    said = pick_attribute(rng.choice(view.things), rng)
    if found is None or said is None or found.one == f"{said[1]} thing":
        return None
    excluded = view.having(**{said[0]: said[1]})
    targets = tuple(i for i in found.members if i not in excluded)
    many = plural(rng, want)
    sought = f"{found.say(many)} {that(many)} not {said[1]}"
    return Draft(targets, sought, (), groups(many), words(found) | {"attr": said[1]})


def either(view: View, rng: Random, want: int) -> Draft | None:
    """All things that are red or blue."""
    found = pick_noun(view, rng, (("category",), ("category",), ("texture",), ()), True)
    if found is None:
        return None
    if want:
        one, two = (thing.colour for thing in rng.sample(view.things, 2))
    else:
        one, two = rng.sample(list(COLOURS), 2)
    if one == two:
        return None
    targets = tuple(i for i in found.members if view.things[i].colour in (one, two))
    many = plural(rng, want)
    sought = f"{found.say(many)} {that(many)} {one} or {two}"
    return Draft(targets, sought, (), groups(many), words(found) | {"attr": one, "attr2": two})


def both_kinds(view: View, rng: Random, want: int) -> Draft | None:
    """All mugs and bottles."""
    pool = [thing.category for thing in view.things]
    one = rng.choice(pool) if want else rng.choice(list(CATEGORIES))
    two = rng.choice(pool) if want == 2 else rng.choice(list(CATEGORIES))
    if one == two:
        return None
    first, second = noun(view, category=one), noun(view, category=two)
    slots = words(first) | {"one2": two, "many2": second.many, "a2": article(two)}
    targets = tuple(sorted(first.members + second.members))
    return Draft(targets, f"all {first.many} and {second.many}", (), ("many",), slots)


def only(view: View, rng: Random, want: int) -> Draft | None:
    """The only white thing."""
    found = pick_noun(view, rng, (("colour",), ("texture",), ("category",), FULL[0]), want > 0)
    if found is None or len(found.members) > 1:
        return None
    return Draft(found.members, f"the only {found.one}", (), ("one",), words(found))


def but_kind(view: View, rng: Random, want: int) -> Draft | None:
    """All red things that are not mugs."""
    found = pick_noun(view, rng, (("colour",), ("colour",), ("texture",)), True)
    if found is None or not found.members:
        return None
    kind = view.things[rng.choice(found.members)].category
    targets = tuple(i for i in found.members if view.things[i].category != kind)
    many = plural(rng, want)
    other = CATEGORIES[kind].plural if many else article(kind)
    slots = words(found) | {"a2": article(kind), "many2": CATEGORIES[kind].plural}
    return Draft(targets, f"{found.say(many)} {that(many)} not {other}", (), groups(many), slots)


def sized(view: View, rng: Random, want: int) -> Draft | None:
    """All large mugs."""
    patterns = (("size",), ("size", "category"), ("size", "colour"), ("size", "texture"))
    found = pick_noun(view, rng, patterns, want > 0)
    if found is None:
        return None
    many = plural(rng, want)
    size, _, one = found.one.partition(" ")
    slots = {"size": size, "one": one, "many": found.many.partition(" ")[2]}
    return Draft(found.members, found.say(many), (), groups(many), slots)


def biggest(view: View, rng: Random, want: int) -> Draft | None:
    """The largest red thing."""
    found = pick_noun(view, rng, SIMPLE, want > 0)
    if found is None or (want and len(found.members) < 2):
        return None
    most = rng.choice(("largest", "smallest"))
    best = extreme(view, found.members, most)
    if found.members and best is None:
        return None
    shown = rng.choice(LARGEST) if most == "largest" else most
    steps = found.steps(found.members)
    slots = words(found) | {"most": shown}
    return Draft(maybe(best), f"the {most} {found.one}", steps, ("one",), slots)


def bigger(view: View, rng: Random, want: int) -> Draft | None:
    """All things bigger than the mug."""
    picked, found = pick_reference(view, rng), pick_noun(view, rng, SIMPLE, present(rng, want))
    if picked is None or found is None:
        return None
    reference, ref = picked
    size = view.things[reference].size
    sign, than = rng.choice(((1, "bigger than"), (-1, "smaller than")))
    others = without(found.members, reference)
    targets = tuple(i for i in others if sign * (ORDER[view.things[i].size] - ORDER[size]) > 0)
    many = plural(rng, want)
    shown = rng.choice(BIGGER) if sign > 0 else than
    steps = (is_step(ref, reference, view), f"It is {size}.")
    slots = words(found) | {"than": shown, "ref": ref}
    sought = f"{found.say(many)} {than} {ref}"
    return Draft(targets, sought, steps, groups(many, found.bare), slots)


def same_size(view: View, rng: Random, want: int) -> Draft | None:
    """All things as big as the mug."""
    picked, found = pick_reference(view, rng), pick_noun(view, rng, SIMPLE, present(rng, want))
    if picked is None or found is None:
        return None
    reference, ref = picked
    size, found = view.things[reference].size, found.beyond(reference)
    targets = tuple(i for i in found.members if view.things[i].size == size)
    many = plural(rng, want)
    steps = (is_step(ref, reference, view), f"It is {size}.")
    sought = f"{found.say(many)} as big as {ref}"
    return Draft(targets, sought, steps, groups(many), words(found) | {"ref": ref})


def _of_form(view: View, form: str, found: Noun) -> tuple[int, ...]:
    return tuple(i for i in found.members if CATEGORIES[view.things[i].category].form == form)


def _pick_form(view: View, rng: Random) -> str:
    return CATEGORIES[rng.choice(view.things).category].form


def shaped(view: View, rng: Random, want: int) -> Draft | None:
    """All round red things."""
    found = pick_noun(view, rng, ((), ("colour",), ("texture",)), True)
    if found is None:
        return None
    form = _pick_form(view, rng) if want else rng.choice(("round", "tall", "flat", "boxy"))
    steps = () if found.bare else (_of_form(view, form, everything(view)),)
    targets = _of_form(view, form, found)
    many = plural(rng, want)
    sought = f"all {form} {found.many}" if many else f"the {form} {found.one}"
    return Draft(targets, sought, steps, groups(many), words(found) | {"form": form})


def shaped_not(view: View, rng: Random, want: int) -> Draft | None:
    """The tall thing that is not red."""
    form = _pick_form(view, rng)
    shapely = _of_form(view, form, everything(view))
    attributes = {key: getattr(view.things[rng.choice(shapely)], key) for key in ("colour", "size")}
    key = rng.choice(("colour", "colour", "size"))
    word = attributes[key]
    if word == "medium":
        return None
    targets = tuple(i for i in shapely if getattr(view.things[i], key) != word)
    many = plural(rng, want)
    sought = f"all {form} things" if many else f"the {form} thing"
    slots = words(everything(view)) | {"form": form, "attr": word, "an_attr": article(word)}
    return Draft(
        targets,
        f"{sought} {that(many)} not {word}",
        (shapely,),
        groups(many),
        slots,
    )
