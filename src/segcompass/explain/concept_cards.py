"""One card for every live concept: where it fires, with what, and what it seems to stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from segcompass.explain.concept_counts import BINS, EDGES, ConceptCounts
from segcompass.explain.concept_labels import Label, Labeller
from segcompass.learning.activations.sae_report import SHARED
from segcompass.types import Sample

CLEAR = 0.6  # held-out F1 from which on a label is taken for the concept's meaning
LOOKS = ("category", "colour", "look", "colour anywhere", "category anywhere")
RELATED = 5  # neighbours listed
WORDS = 6
SEEN_TOGETHER = 3  # sampled tokens on which two concepts must fire together to be listed
_BLOCK = 512


@dataclass(frozen=True)
class Patch:
    """An image token on which the concept fires strongly."""

    image_id: int
    box: tuple[int, int, int, int]  # x0 y0 x1 y1 in thousandths of width and height
    activation: float


@dataclass(frozen=True)
class Mention:
    """A text token on which the concept fires strongly, with what stands around it."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class Card:
    """What there is to know about one concept."""

    concept: int
    reach: str  # text, image or shared
    density: float  # share of the tokens the SAE reads on which it fires
    fired: tuple[int, int]  # tokens, on text and on pictures
    largest: float
    histogram: tuple[int, ...]  # tokens by bin of activation
    label: Label | None
    words: tuple[tuple[str, float], ...]  # and their share of its activation on words
    patches: tuple[Patch, ...]
    mentions: tuple[Mention, ...]
    together: tuple[tuple[int, float], ...]  # concepts, and the Jaccard index of their tokens
    neighbours: tuple[tuple[int, float], ...]  # concepts, and the cosine of their decoder rows

    @property
    def f1(self) -> float:
        """Of the label on held-out pictures; 0 without one."""
        return 0.0 if self.label is None or self.label.held_out is None else self.label.held_out.f1


def make_cards(
    counts: ConceptCounts,
    decoder: Float[np.ndarray, "S D"],
    progress: Callable[[int, int], None] | None = None,
) -> list[Card]:
    """Cards of all live concepts, those that fire at least once, by number.

    Args:
        counts: of the whole set.
        decoder: the SAE's decoder rows.
        progress: called with (cards done, cards in all).
    """
    counts.finish()
    first, second = counts.halves
    live = np.flatnonzero(counts.fired.sum(axis=0))
    labeller = Labeller(counts.vocabulary, *counts.halves)
    together, neighbours = coactivation(counts.sample.codes, live), nearest(decoder, live)
    top_words = _Words(counts)
    cards = []
    for place, concept in enumerate(live.tolist()):
        if progress is not None and place % 64 == 0:
            progress(place, len(live))
        on_text, on_image = (int(n) for n in counts.fired[:, concept])
        cells = slice(concept * BINS, (concept + 1) * BINS)
        card = Card(
            concept=concept,
            reach=reach(counts.fired[:, concept] / np.maximum(counts.tokens, 1)),
            density=(on_text + on_image) / max(int(counts.tokens.sum()), 1),
            fired=(on_text, on_image),
            largest=float(counts.largest[concept]),
            histogram=tuple((first.histogram[cells] + second.histogram[cells]).tolist()),
            label=labeller.label(concept),
            words=top_words.of(concept),
            patches=tuple(_patches(counts, concept)),
            mentions=tuple(_mentions(counts, concept)),
            together=together[place],
            neighbours=neighbours[place],
        )
        cards.append(card)
    return cards


def reach(rates: Float[np.ndarray, " 2"]) -> str:
    """Text, image or shared, by firing rates on text and on pictures.

    Shared means what it means in the SAE's report: the weaker modality has at least
    :data:`~segcompass.learning.activations.sae_report.SHARED` of the stronger one's rate.
    """
    if rates.min() >= SHARED * rates.max():
        return "shared"
    return "text" if rates[0] > rates[1] else "image"


def coactivation(
    codes: csr_array, live: Int[np.ndarray, " m"]
) -> list[tuple[tuple[int, float], ...]]:
    """For each live concept the concepts that fire on the same tokens most.

    The measure is the Jaccard index, tokens with both over tokens with either, on sampled tokens.
    """
    fires = csr_array(
        (np.ones(codes.nnz, dtype=np.int32), codes.indices, codes.indptr), shape=codes.shape
    )[:, live].tocsc()
    own = np.diff(fires.indptr)
    found = []
    for start in range(0, len(live), _BLOCK):
        both = csr_array(fires[:, start : start + _BLOCK].T @ fires)
        for row in range(both.shape[0]):
            span = slice(both.indptr[row], both.indptr[row + 1])
            others, n = both.indices[span], both.data[span]
            kept = (others != start + row) & (n >= SEEN_TOGETHER)
            others, n = others[kept], n[kept]
            index = n / (own[start + row] + own[others] - n)
            best = np.lexsort((others, -index))[:RELATED]
            found.append(tuple((int(live[others[i]]), float(index[i])) for i in best))
    return found


def nearest(
    decoder: Float[np.ndarray, "S D"], live: Int[np.ndarray, " m"]
) -> list[tuple[tuple[int, float], ...]]:
    """For each live concept those whose decoder rows have the largest cosine with its own."""
    rows = decoder[live].astype(np.float32)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, len(live), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ rows.T
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = -np.inf
        best = np.argsort(-cosines, axis=1, kind="stable")[:, : min(RELATED, len(live) - 1)]
        found += [
            tuple((int(live[i]), float(row[i])) for i in order)
            for row, order in zip(cosines, best, strict=True)
        ]
    return found


class _Words:
    """Which words carry a concept's activation on text, from the counts of both halves."""

    def __init__(self, counts: ConceptCounts) -> None:
        self._names, numbers = counts.vocabulary.family("word")
        first, second = (half.fired[numbers] for half in counts.halves)
        both = (first + second).tocoo()
        concepts, bins = np.divmod(both.col, BINS)
        middles = EDGES * 2**0.25  # the middle of a bin half an octave wide
        mass = both.data * middles[bins]
        shape = (counts.concepts, len(self._names))
        self._mass = csr_array((mass, (concepts, both.row)), shape=shape)

    def of(self, concept: int) -> tuple[tuple[str, float], ...]:
        """The words of largest share, largest first."""
        span = slice(self._mass.indptr[concept], self._mass.indptr[concept + 1])
        words, mass = self._mass.indices[span], self._mass.data[span]
        best = np.lexsort((words, -mass))[:WORDS]
        return tuple((self._names[words[i]], float(mass[i] / mass.sum())) for i in best)


def _patches(counts: ConceptCounts, concept: int) -> Iterator[Patch]:
    top = counts.patches
    for value, image, load in zip(
        top.values[concept], top.images[concept], top.payload[concept], strict=True
    ):
        if value > 0:
            x0, y0, x1, y1 = (int(v) for v in load[1:])
            yield Patch(int(image), (x0, y0, x1, y1), float(value))


def _mentions(counts: ConceptCounts, concept: int) -> Iterator[Mention]:
    top = counts.spoken
    for value, (sample, token) in zip(top.values[concept], top.payload[concept], strict=True):
        if value > 0:
            yield Mention(*counts.snippet(int(sample), int(token)), float(value))


def naming(cards: Sequence[Card]) -> Callable[[Sample], list[int]]:
    """Look up the concepts whose cards name what a sample looks for.

    A card names it if its label holds and is a colour or category of a target; where the data set
    does not tell what its targets are, no card does.
    """
    meaning: dict[str, list[int]] = {}
    for card in cards:
        if card.label is not None and card.f1 >= CLEAR:
            for family, value in card.label.features:
                if family in LOOKS:
                    meaning.setdefault(value, []).append(card.concept)

    def named(sample: Sample) -> list[int]:
        wanted = [thing for thing in sample.objects if thing.ann_id in sample.target_ids]
        values = {v for t in wanted for v in (t.category, t.colour, f"{t.colour} {t.category}")}
        return sorted({concept for value in values for concept in meaning.get(value, [])})

    return named


def card_rows(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """The cards as a table, one row each."""
    rows = []
    for card in cards:
        label = card.label
        score = label.held_out if label is not None else None
        rows.append(
            {
                "concept": card.concept,
                "reach": card.reach,
                "density": card.density,
                "fired_on_text": card.fired[0],
                "fired_on_pictures": card.fired[1],
                "largest": card.largest,
                "label": label and str(label),
                "family": label and label.features[0].family,
                "threshold": label and label.threshold,
                "chosen_f1": label and label.chosen.f1,
                "precision": score and score.precision,
                "recall": score and score.recall,
                "f1": score and score.f1,
                "words": " ".join(word for word, _ in card.words),
            }
        )
    return rows


def summarise(cards: Sequence[Card], concepts: int) -> dict[str, Any]:
    """How many concepts live, reach across modalities, and carry a label that holds."""
    tested = [card for card in cards if card.label is not None and card.label.held_out is not None]
    clear = [card for card in cards if card.f1 >= CLEAR]
    families: dict[str, int] = {}
    for card in clear:
        assert card.label is not None
        family = card.label.features[0].family
        families[family] = families.get(family, 0) + 1
    return {
        "concepts": concepts,
        "live": len(cards),
        "tested": len(tested),
        "labelled": len(clear),
        "labelled_share": len(clear) / len(cards) if cards else None,
        "labelled_share_of_tested": len(clear) / len(tested) if tested else None,
        "median_f1": float(np.median([card.f1 for card in tested])) if tested else None,
        "by_family": dict(sorted(families.items(), key=lambda item: -item[1])),
        **{kind: sum(card.reach == kind for card in cards) for kind in ("text", "image", "shared")},
    }
