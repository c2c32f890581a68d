"""Questions: answers that follow from the thought's words, shares, phrasings, the closing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, Scene, Thing, reading_order
from segcompass.data.scenes.grammar import NOTHING, closing, describe, entry, name, resolve
from segcompass.data.scenes.phrasings import HELD_OUT_MARK, PARTS, PHRASINGS, PURPOSES
from segcompass.data.scenes.questions import FORMS, KINDS, Question, ask
from segcompass.data.scenes.world import sample_scene

PLURALS = {kind.plural: kind.name for kind in CATEGORIES.values()}
FORM_WORDS = {kind.form for kind in CATEGORIES.values()}
RANKS = {"small": 0, "medium": 1, "large": 2}


@cache
def asked(split: str = "train", pictures: int = 200) -> tuple[tuple[Scene, Question], ...]:
    pairs = []
    for i in range(pictures):
        scene = sample_scene(Random(f"{split}/{i}"), split=split)
        pairs += [(scene, ask(scene, Random(f"{i}/{j}"), split=split)) for j in range(5)]
    return tuple(pairs)


def thing(words: str, **changes: object) -> Thing:
    """A thing from its name, "red mug b4", in the middle of its cell."""
    colour, category, cell = words.split()
    x, y = (int(cell[1]) - 0.5) / 8, (ord(cell[0]) - ord("a") + 0.5) / 8
    return Thing(category, colour, "medium", "plain", x, y, 0.0, 0, **changes)  # type: ignore[arg-type]


# -- an independent reader of thoughts: it sees the text and nothing else -------------------------


@dataclass(frozen=True)
class Seen:
    name: str
    size: str
    texture: str
    colour: str
    category: str
    row: int
    column: int


def read_listing(sentence: str) -> list[Seen]:
    seen = []
    for text in sentence.removeprefix("I see ").rstrip(".").split(", "):
        *extra, colour, category, cell = text.split(" ")
        size = next((word for word in extra if word in RANKS), "medium")
        texture = next((word for word in extra if word not in RANKS), "plain")
        full = f"{colour} {category} {cell}"
        place = ord(cell[0]) - ord("a"), int(cell[1]) - 1
        seen.append(Seen(full, size, texture, colour, category, *place))
    return seen


def beside(one: Seen, side: str, other: Seen) -> bool:
    return {
        "left of": one.column < other.column,
        "right of": one.column > other.column,
        "above": one.row < other.row,
        "below": one.row > other.row,
    }[side]


def in_half(one: Seen, side: str) -> bool:
    return {
        "left": one.column < 4,
        "right": one.column >= 4,
        "top": one.row < 4,
        "bottom": one.row >= 4,
    }[side]


def in_corner(one: Seen, down: str, across: str) -> bool:
    rows, columns = (0, 1) if down == "top" else (6, 7), (0, 1) if across == "left" else (6, 7)
    return one.row in rows and one.column in columns


def distance(one: Seen, other: Seen) -> int:
    return (one.row - other.row) ** 2 + (one.column - other.column) ** 2


KEYS = {
    "leftmost": lambda one: one.column,
    "rightmost": lambda one: -one.column,
    "topmost": lambda one: one.row,
    "bottommost": lambda one: -one.row,
    "largest": lambda one: -RANKS[one.size],
    "smallest": lambda one: RANKS[one.size],
}
SIDE = "(left of|right of|above|below)"


def best(pool: list[Seen], key: object) -> list[Seen]:
    """The unique minimum; a tie would be an ill-posed question."""
    values = sorted(map(key, pool))  # type: ignore[arg-type]
    assert len(values) < 2 or values[0] < values[1]
    return [one for one in pool if key(one) == values[0]]  # type: ignore[operator]


def evaluate(sought: str, seen: list[Seen]) -> list[Seen]:
    """Everything that the canonical meaning fits."""
    sought = re.sub(r"^(all|the only|the) ", "", sought)
    if m := re.fullmatch(
        r"other things of the same (kind|colour) as the thing closest to (.*)", sought
    ):
        ref = the(m[2], seen)
        (near,) = best([one for one in seen if one != ref], lambda one: distance(one, ref))
        key = "category" if m[1] == "kind" else "colour"
        return [one for one in seen if getattr(one, key) == getattr(near, key) and one != near]
    if m := re.fullmatch(rf"(.*?) {SIDE} (the .*?) and {SIDE} (the .*)", sought):
        refs = the(m[3], seen), the(m[5], seen)
        pool = [one for one in nouns(m[1], seen) if one not in refs]
        return [one for one in pool if beside(one, m[2], refs[0]) and beside(one, m[4], refs[1])]
    if m := re.fullmatch(rf"(.*?) {SIDE} (the .*)", sought):
        ref = the(m[3], seen)
        return [one for one in nouns(m[1], seen) if beside(one, m[2], ref) and one != ref]
    if m := re.fullmatch(r"(.*?) (closest to|farthest from) (the .*)", sought):
        ref, sign = the(m[3], seen), 1 if m[2] == "closest to" else -1
        pool = [one for one in nouns(m[1], seen) if one != ref]
        return best(pool, lambda one: sign * distance(one, ref))
    if m := re.fullmatch(
        r"(.*?) (bigger than|smaller than|as big as|of the same colour as) (the .*)", sought
    ):
        ref = the(m[3], seen)
        fits = {
            "bigger than": lambda one: RANKS[one.size] > RANKS[ref.size],
            "smaller than": lambda one: RANKS[one.size] < RANKS[ref.size],
            "as big as": lambda one: one.size == ref.size,
            "of the same colour as": lambda one: one.colour == ref.colour,
        }[m[2]]
        return [one for one in nouns(m[1], seen) if fits(one) and one != ref]
    if m := re.fullmatch(r"(.*) in the (\w+) half", sought):
        return [one for one in evaluate(m[1], seen) if in_half(one, m[2])]
    if m := re.fullmatch(r"(.*) in the (\w+) (\w+) corner", sought):
        return [one for one in nouns(m[1], seen) if in_corner(one, m[2], m[3])]
    if m := re.fullmatch(r"(.*) that (?:is|are) (.*)", sought):
        return [one for one in evaluate(m[1], seen) if fits_words(one, m[2])]
    if m := re.fullmatch(r"(\w+) and (\w+)", sought):
        return [one for one in seen if one.category in (PLURALS[m[1]], PLURALS[m[2]])]
    return nouns(sought, seen)


def the(phrase: str, seen: list[Seen]) -> Seen:
    (found,) = nouns(phrase.removeprefix("the "), seen)
    return found


def fits_words(one: Seen, words: str) -> bool:
    own = {one.size, one.texture, one.colour, one.category, CATEGORIES[one.category].plural}
    if words.startswith("not "):
        return words.removeprefix("not ").removeprefix("a ").removeprefix("an ") not in own
    return any(word in own for word in words.split(" or "))


def nouns(phrase: str, seen: list[Seen]) -> list[Seen]:
    """The things that "[leftmost] [large] [round] [red] mugs [to eat | with a handle]" fits."""
    pool = list(seen)
    for use, todo in PURPOSES.items():
        if phrase.endswith(f" {todo}"):
            pool = [one for one in pool if use in CATEGORIES[one.category].uses]
            phrase = phrase.removesuffix(f" {todo}")
    for part, words in PARTS.items():
        if phrase.endswith(f" with {words}"):
            pool = [one for one in pool if part in CATEGORIES[one.category].parts]
            phrase = phrase.removesuffix(f" with {words}")
    key = None
    for word in phrase.split(" "):
        if word in KEYS:
            key = KEYS[word]
        elif word in FORM_WORDS:
            pool = [one for one in pool if CATEGORIES[one.category].form == word]
        elif word not in ("thing", "things", "other"):
            pool = [one for one in pool if fits_words(one, word)]
    return best(pool, key) if key else pool


def sentences(thought: str) -> list[str]:
    return re.findall(r"[^.]+\.", thought.replace(". ", "."))


# -- truth ----------------------------------------------------------------------------------------


def test_every_answer_follows_from_the_words_of_its_thought() -> None:
    forms = Counter()
    for scene, question in asked("train") + asked("val") + asked("testB", 100):
        first, listing, *_, last = sentences(question.thought)
        seen = read_listing(listing)
        assert listing == describe(scene)
        assert [one.name for one in seen] == [name(t) for t in scene.things]
        answer = evaluate(first.removeprefix("I look for ").rstrip("."), seen)
        assert [one.name for one in answer] == [name(scene.things[i]) for i in question.targets], (
            question
        )
        assert last == closing(scene.things[i] for i in question.targets)
        forms[question.form] += 1
    assert set(forms) == {form for kind in FORMS.values() for form in kind}


def test_every_step_is_true() -> None:
    """What a step says of a thing holds, and every look picks from exactly what is left."""
    for scene, question in asked("train"):
        first, listing, *steps, _ = sentences(question.thought)
        seen = read_listing(listing)
        targets = [name(scene.things[i]) for i in question.targets]
        left, looks = [one.name for one in seen], 0
        said: Seen | None = None
        for step in steps:
            if m := re.fullmatch(r"(I find|Of these) (.*)\.", step):
                found = [] if m[2] == "nothing" else m[2].split(", ")
                assert found == [thing for thing in left if thing in found]
                assert (m[1] == "Of these") == (looks > 0)
                left, looks = found, looks + 1
                assert set(targets) <= set(left), question
            elif m := re.fullmatch(r"Closest is (.*)\.", step):
                assert said is not None
                here = said
                others = [one for one in seen if one != here]
                assert best(others, lambda one: distance(one, here))[0].name == m[1]  # noqa: B023
            elif m := re.fullmatch(r"The (.*) is (.*)\.", step):
                said = the(m[1], seen)
                assert said.name == m[2] and f"the {m[1]}" in first
            elif m := re.fullmatch(r"It is (.*)\.", step):
                assert said is not None and said.size == m[1]
            else:
                m = re.fullmatch(r"Things (to|with) (.*) are (.*)\.", step)
                assert m is not None, step
                pool = nouns(f"things {m[1]} {m[2]}", seen)
                kinds = {PLURALS[word] for word in re.split(", | and ", m[3])}
                assert pool == [one for one in seen if one.category in kinds]
        assert looks in (1, 2) and left == targets, question
        assert len(question.thought.split()) <= 150


def test_limits_of_length_number_and_likeness() -> None:
    for scene, question in asked("val"):
        assert 3 <= len(question.text.split()) <= 14
        assert len(question.targets) <= 6 and list(question.targets) == sorted(question.targets)
        assert "{" not in question.text + question.thought
        if question.targets:
            targets = [scene.things[i] for i in question.targets]
            others = [t for i, t in enumerate(scene.things) if i not in question.targets]
            alike = [
                other
                for other in others
                if any(
                    getattr(other, key) == getattr(target, key)
                    for key in ("category", "colour", "size", "texture")
                    for target in targets
                )
            ]
            assert len(alike) >= 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_shares_of_kinds_and_classes(split: str) -> None:
    questions = [question for _, question in asked(split)]
    classes = Counter(min(len(question.targets), 2) for question in questions)
    for wanted, (size, share) in zip((0.15, 0.60, 0.25), sorted(classes.items()), strict=True):
        assert abs(share / len(questions) - wanted) < 0.05, (size, share)
    for kind in KINDS:
        of_kind = [question for question in questions if question.kind == kind]
        assert abs(len(of_kind) / len(questions) - 0.2) < 0.05
        assert {min(len(question.targets), 2) for question in of_kind} == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_can_be_asked_for_and_the_same_seed_asks_the_same(kind: str) -> None:
    scene = sample_scene(Random(3), split="val")
    question = ask(scene, Random(4), split="val", kind=kind)
    assert question.kind == kind and question.form in FORMS[kind]
    assert question == ask(scene, Random(4), split="val", kind=kind)


def test_every_small_picture_can_be_asked_about() -> None:
    scenes = [sample_scene(Random(i), split="train") for i in range(120)]
    for scene in (scene for scene in scenes if len(scene.things) == 3):
        for kind in KINDS:
            assert ask(scene, Random(1), split="train", kind=kind).kind == kind


def test_wrong_arguments_are_named() -> None:
    scene = sample_scene(Random(3), split="val")
    with pytest.raises(ValueError, match="testC"):
        ask(scene, Random(0), split="testC")
    with pytest.raises(ValueError, match="odd"):
        ask(scene, Random(0), split="val", kind="odd")


# -- phrasings ------------------------------------------------------------------------------------


def template_of(phrasing: str) -> str:
    form, group, number = phrasing.split(".")
    return PHRASINGS[form][group][int(number)]


def words_of(template: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"\{\w+\}", "", template)))


def test_phrasings_are_many_distinct_and_partly_held_out() -> None:
    templates = [t for groups in PHRASINGS.values() for group in groups.values() for t in group]
    assert len({t.removeprefix(HELD_OUT_MARK) for t in templates}) == len(templates) >= 240
    assert set(PHRASINGS) == {form for kind in FORMS.values() for form in kind}
    held_out = [t for t in templates if t.startswith(HELD_OUT_MARK)]
    assert 0.1 < len(held_out) / len(templates) < 0.25
    for form, groups in PHRASINGS.items():
        assert sum(map(len, groups.values())) >= 4, form
        for group in groups.values():
            assert any(not t.startswith(HELD_OUT_MARK) for t in group), form
    known = {w for t in templates if t not in held_out for w in words_of(t)}
    for template in held_out:
        assert words_of(template) <= known, template


def test_held_out_phrasings_are_for_val_and_tests_only() -> None:
    def share(split: str) -> float:
        ids = [question.phrasing for _, question in asked(split)]
        return sum(template_of(p).startswith(HELD_OUT_MARK) for p in ids) / len(ids)

    assert share("train") == 0
    assert 0.24 < share("val") < 0.34


def test_words_are_few_and_articles_right() -> None:
    texts = [text for _, q in asked("train") + asked("val") for text in (q.text, q.thought)]
    assert len({word for text in texts for word in re.findall(r"\w+", text)}) < 420
    for text in texts:
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text


# -- the closing grammar --------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=40)
def test_closing_names_exactly_its_things(seed: int, data: st.DataObject) -> None:
    scene = sample_scene(Random(seed), split=data.draw(st.sampled_from(["train", "testB"])))
    chosen = data.draw(st.sets(st.integers(0, len(scene.things) - 1)))
    thought = closing(scene.things[i] for i in sorted(chosen))
    assert resolve(f"{describe(scene)} {thought}", scene.things) == tuple(sorted(chosen))


def test_grammar_by_hand() -> None:
    mug, book = thing("red mug b4"), Thing("book", "blue", "small", "striped", 0.9, 0.3, 0.0, 1)
    assert entry(mug) == "red mug b4" and entry(book) == "small striped blue book c8"
    scene = Scene(0, "wall", reading_order([book, mug]))
    assert describe(scene) == "I see red mug b4, small striped blue book c8."
    assert closing([]) == NOTHING
    assert closing([mug]) == "So the answer is red mug b4."
    assert closing([mug, book]) == "So the answer is red mug b4 and blue book c8."
    assert closing([mug, mug, book]).endswith("red mug b4, red mug b4 and blue book c8.")


OBJECTS = [thing(words) for words in ("red mug b4", "red mug b7", "blue book c7", "red mug f2")]


@pytest.mark.parametrize(
    ("thought", "found"),
    [
        ("So nothing matches.", ()),
        ("So the answer is red mug b4.", (0,)),
        ("So the answer is red mug c5.", (0,)),  # one cell off, also diagonally
        ("So the answer is red mug f2, red mug b7 and blue book c7.", (1, 2, 3)),
        ("So nothing matches. So the answer is red mug b4.", (0,)),  # the last one counts
        ("So the answer is red mug b4. So nothing matches.", ()),
        ("So the answer is red mug b4. So what", None),
        ("", None),
        ("I see red mug b4.", None),
        ("So the answer is red mug b4", None),  # no full stop
        ("So the answer is red mug.", None),
        ("So the answer is small red mug b4.", None),
        ("So the answer is red mug b9.", None),
        ("So the answer is red mug b4, blue book c7.", None),  # "and" is missing
        ("So the answer is red mug b4 and blue book c7 and red mug f2.", None),
        ("So the answer is pink mug b4.", None),
        ("So the answer is green mug b4.", None),  # no such thing
        ("So the answer is red mug d4.", None),  # two cells off
        ("So the answer is red mug b4 and red mug b4.", None),
        ("So the answer is red mug b4 and red mug b5.", None),  # both mean the same mug
        ("So nothing.", None),
        ("Also the answer is red mug b4.", None),
    ],
)
def test_resolve_by_hand(thought: str, found: tuple[int, ...] | None) -> None:
    assert resolve(thought, OBJECTS) == found


def test_resolve_refuses_a_name_that_fits_two_things() -> None:
    pair = [thing("red mug b4"), thing("red mug b6")]
    assert resolve("So the answer is red mug b5.", pair) is None
    assert resolve("So the answer is red mug b4.", pair) == (0,)


def test_colours_and_categories_are_single_words() -> None:
    """The grammar splits names at blanks."""
    assert not any(" " in word for word in (*COLOURS, *CATEGORIES))
