"""What a form of question hands over, and the wording that forms share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from segcompass.data.scenes.nouns import Noun, Step, View, article


@dataclass(frozen=True)
class Draft:
    """A question before it is put into words."""

    targets: tuple[int, ...]  # sorted indices into the scene's things
    sought: str  # the canonical meaning: "I look for <sought>."
    steps: tuple[Step, ...]
    groups: tuple[str, ...]  # of the form's phrasings
    slots: dict[str, str]


Form = Callable[[View, Random, int], Draft | None]
"""Draws one question of its meaning; the wanted class is 0 none, 1 one or 2 several targets.

It may return None, or a draft of another class: then ``questions.ask`` draws again.
"""

SIMPLE = ((), ("category",), ("category",), ("colour",))  # patterns of attributes for ``pick_noun``


def plural(rng: Random, want: int) -> bool:
    """Whether to ask in the plural, which says nothing certain about the number of targets."""
    return want == 2 or rng.random() < (0.25 if want else 0.5)


def present(rng: Random, want: int, share: float = 0.75) -> bool:
    """Whether the noun shall occur in the picture, though nothing may match the whole."""
    return want > 0 or rng.random() < share


def groups(many: bool, bare: bool = False) -> tuple[str, ...]:
    """The groups of phrasings for a number; ``bare`` admits "What is …?"."""
    return (("many", "thing") if bare else ("many",)) if many else ("one",)


def words(noun: Noun) -> dict[str, str]:
    """The slots every noun fills."""
    return {"one": noun.one, "many": noun.many, "a": article(noun.one)}


def that(many: bool) -> str:
    return "that are" if many else "that is"


def maybe(index: int | None) -> tuple[int, ...]:
    return () if index is None else (index,)


def without(members: Iterable[int], *excluded: int) -> tuple[int, ...]:
    return tuple(i for i in members if i not in excluded)


def everything(view: View) -> Noun:
    return Noun("thing", "things", tuple(range(len(view.things))))
