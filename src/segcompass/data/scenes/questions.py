"""Questions about a scene, with exact targets and an oracle chain of thought.

A thought restates the question in one canonical way, lists the picture in reading order, takes the
steps its kind needs and concludes (``grammar``), so that each sentence follows from those before:

    I look for all things left of the lamp. I see red mug b2, small blue lamp c5, red key f3.
    The lamp is blue lamp c5. I find red mug b2, red key f3.
    So the answer is red mug b2 and red key f3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from segcompass.data.scenes import looks, places, reasons
from segcompass.data.scenes.catalog import Scene
from segcompass.data.scenes.drafts import Draft, Form
from segcompass.data.scenes.grammar import closing, describe, pick, resolve
from segcompass.data.scenes.nouns import Step, View
from segcompass.data.scenes.phrasings import HELD_OUT_MARK, PHRASINGS

__all__ = ["FORMS", "KINDS", "Question", "ask", "closing", "describe", "resolve"]

FORMS: dict[str, dict[str, tuple[Form, float]]] = {  # form and its weight within the kind
    "discriminative": {
        "described": (looks.described, 4),
        "negated": (looks.negated, 1.5),
        "either": (looks.either, 1.5),
        "both_kinds": (looks.both_kinds, 1),
        "only": (looks.only, 1),
        "but_kind": (looks.but_kind, 1),
    },
    "spatial": {
        "extreme": (places.extreme_of, 2),
        "beside": (places.beside_reference, 4),
        "half": (places.in_half, 1.5),
        "closest": (places.closest, 3),
        "farthest": (places.farthest, 1.5),
        "corner": (places.in_corner, 3),
    },
    "geometric": {
        "sized": (looks.sized, 2),
        "biggest": (looks.biggest, 1.2),
        "bigger": (looks.bigger, 2),
        "shaped": (looks.shaped, 1.5),
        "shaped_not": (looks.shaped_not, 1),
        "same_size": (looks.same_size, 1.3),
    },
    "multi-step": {
        "same_colour": (reasons.same_colour, 2),
        "kind_of_closest": (reasons.kind_of_closest, 4),
        "colour_of_closest": (reasons.colour_of_closest, 4),
        "colour_of_extreme": (reasons.colour_of_extreme, 1.5),
        "beside_extreme": (places.beside_extreme, 2),
        "closest_of": (places.closest_of, 1.5),
        "two_sides": (reasons.two_sides, 5),
    },
    "commonsense": {
        "use": (reasons.use, 4),
        "use_not": (reasons.use_not, 1.5),
        "use_colour": (reasons.use_colour, 1.5),
        "use_extreme": (reasons.use_extreme, 1),
        "use_half": (reasons.use_half, 1),
        "part": (reasons.part, 2),
        "part_colour": (reasons.part_colour, 1),
        "part_not": (reasons.part_not, 3),
    },
}
KINDS = tuple(FORMS)
SPLITS = ("train", "val", "testA", "testB")
# No, one and several targets: 15, 60 and 25 % over all scenes, 3 to 8 things being equally likely.
CLASS_SHARES = (0.15, 0.55, 0.30)
FEW_SHARES = (0.05, 0.95, 0.0)  # two targets and ALIKE others do not fit into three things
HELD_OUT_SHARE = 0.30  # of held-out phrasings outside train, where the form has one
FEWEST_WORDS, MOST_WORDS = 3, 14
MOST_STEP_WORDS = 24
MOST_TARGETS = 6
ALIKE = 2  # other things that share an attribute with a target, at least
DRAWS, ANY_DRAWS = 120, 400  # until the wanted class, and then the wanted form, is given up


@dataclass(frozen=True)
class Question:
    """A question over one scene."""

    kind: str
    form: str
    text: str
    targets: tuple[int, ...]  # sorted indices into the scene's things; empty: nothing matches
    thought: str
    phrasing: str  # id "form.group.number"


def ask(scene: Scene, rng: Random, *, split: str, kind: str | None = None) -> Question:
    """Draw one question about a scene.

    Args:
        scene: the picture, with things in reading order.
        rng: the only source of chance; equal states give equal questions.
        split: "train", "val", "testA" or "testB"; held-out phrasings are never used in train.
        kind: one of ``KINDS``; by default all are equally likely.

    Returns:
        The question with its exact targets and the oracle's thought.

    Raises:
        ValueError: for an unknown split or kind, or a scene about which no question can be asked.
    """
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; choose one of {', '.join(SPLITS)}")
    if kind is not None and kind not in FORMS:
        raise ValueError(f"no kind is called {kind!r}; choose one of {', '.join(KINDS)}")
    chosen = kind or rng.choice(KINDS)
    shares = CLASS_SHARES if len(scene.things) >= ALIKE + 2 else FEW_SHARES
    want = rng.choices((0, 1, 2), shares)[0]
    view = View.of(scene.things)
    names, weights = list(FORMS[chosen]), [weight for _, weight in FORMS[chosen].values()]
    for draw in range(DRAWS + ANY_DRAWS):
        if draw >= DRAWS:
            want = (1, 2, 0)[draw % 3]
        form = rng.choices(names, weights)[0]
        draft = FORMS[chosen][form][0](view, rng, want)
        if draft is None or min(len(draft.targets), 2) != want or not _sound(draft, view):
            continue
        worded = _word(draft, form, rng, split)
        if worded is not None:
            return Question(chosen, form, worded[0], draft.targets, _think(draft, scene), worded[1])
    raise ValueError(
        f"no {chosen} question fits a scene of {len(scene.things)} things; draw another scene"
    )


def _think(draft: Draft, scene: Scene) -> str:
    """The oracle's thought: one sentence after the other, each a small step from those before."""
    sentences = [f"I look for {draft.sought}.", describe(scene)]
    left: Sequence[int] = range(len(scene.things))
    looks = 0
    for step in (*draft.steps, draft.targets):
        if isinstance(step, str):
            sentences.append(step)
        elif left:
            sentences.append(pick([scene.things[i] for i in step], again=looks > 0))
            left, looks = step, looks + 1
    return " ".join((*sentences, closing(scene.things[i] for i in draft.targets)))


def _sound(draft: Draft, view: View) -> bool:
    """Whether a draft keeps the limits of length and number, and is not answered too easily."""
    if len(draft.targets) > MOST_TARGETS:
        return False
    if sum(_words(step) for step in draft.steps) > MOST_STEP_WORDS:
        return False
    if not draft.targets:
        return True
    targets = [view.things[i] for i in draft.targets]
    alike = 0
    for i, thing in enumerate(view.things):
        if i not in draft.targets:
            alike += any(
                thing.category == target.category
                or thing.colour == target.colour
                or thing.size == target.size
                or thing.texture == target.texture
                for target in targets
            )
    return alike >= ALIKE


def _words(step: Step) -> int:
    """How long a step is, things counted with their names."""
    if isinstance(step, str):
        return len(step.split())
    return 2 + 3 * len(step) + (len(step) > 1) if step else 3


def _word(draft: Draft, form: str, rng: Random, split: str) -> tuple[str, str] | None:
    """Put a draft into words: the text and the phrasing's id; None where it is too long."""
    trained: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for group in draft.groups:
        for number, template in enumerate(PHRASINGS[form][group]):
            phrasing = (template.removeprefix(HELD_OUT_MARK), f"{form}.{group}.{number}")
            (held_out if template.startswith(HELD_OUT_MARK) else trained).append(phrasing)
    kept_out = split != "train" and rng.random() < HELD_OUT_SHARE
    template, identity = rng.choice(held_out if kept_out and held_out else trained)
    text = template.format_map(draft.slots)
    return (text, identity) if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS else None
