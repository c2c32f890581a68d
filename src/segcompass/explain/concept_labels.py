"""Name concepts by what is known about the tokens they fire on; test names on other pictures.

A label says that a concept fires, above some activation, on the tokens of one to four values of one
family ("mug or glass patches"). It is chosen on one half of the pictures, as the label of largest
F1 after :data:`PRIOR`, and judged on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from segcompass.explain.concept_counts import BINS, EDGES, FeatureCounts
from segcompass.explain.vocabulary import FAMILIES, QUOTED, VALUES, Feature, Vocabulary

MOST_VALUES = 4
PRIOR = 4  # tokens without firing that every value is taken to have had besides: rare ones mislead
WORTH = 0.02  # a further value must raise F1 by at least this much


@dataclass(frozen=True)
class Score:
    """How well "it fires above the threshold" and "the label holds" agree over tokens."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Their harmonic mean."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True)
class Label:
    """What a concept seems to stand for."""

    features: tuple[Feature, ...]  # of one family
    threshold: float  # activation from which on it counts as firing
    chosen: Score  # on the half it was chosen on: flattering
    held_out: Score | None  # on the other half; None where the concept never fires there

    def __str__(self) -> str:
        family = self.features[0].family
        values = [f"“{f.value}”" if family in QUOTED else f.value for f in self.features]
        return FAMILIES[family].format(" or ".join(values))


class _Table(NamedTuple):
    """One concept in one half; level b counts activations in bin b or above."""

    fires: Int[np.ndarray, " bins"]  # tokens it fires on
    features: Int[np.ndarray, " f"]  # numbers of the features of these
    hits: Int[np.ndarray, "f bins"]  # tokens of each feature it fires on


class Labeller:
    """Finds labels, concept by concept.

    Args:
        vocabulary: whose features the counts number.
        chosen: counts of the half to choose on.
        held_out: counts of the half to judge on.
    """

    def __init__(
        self, vocabulary: Vocabulary, chosen: FeatureCounts, held_out: FeatureCounts
    ) -> None:
        self._vocabulary = vocabulary
        self._halves = [(half, _by_concept(half)) for half in (chosen, held_out)]

    def label(self, concept: int) -> Label | None:
        """The best label; None for a concept that does not fire on the first half."""
        tables = [self._counts(half, concept) for half in range(2)]
        (fires, features, hits), half = tables[0], self._halves[0][0]
        if not fires[0] or not len(features):
            return None
        best: tuple[float, int, list[int]] | None = None
        families = features // VALUES
        for family in np.unique(families):
            own = families == family
            found = _best(hits[own], half.tokens[features[own]], fires)
            if best is None or found[0] > best[0] + 1e-9:
                best = found[0], found[1], features[own][found[2]].tolist()
        assert best is not None
        _, level, picked = best
        chosen, held_out = (self._score(i, tables[i], level, picked) for i in range(2))
        assert chosen is not None
        threshold = 0.0 if level == 0 else float(EDGES[level])
        return Label(tuple(map(self._vocabulary.feature, picked)), threshold, chosen, held_out)

    def _counts(self, half: int, concept: int) -> _Table:
        counts, table = self._halves[half]
        fires = _tail(counts.histogram[concept * BINS : (concept + 1) * BINS][None])[0]
        span = slice(table.indptr[concept], table.indptr[concept + 1])
        features, bins = np.divmod(table.indices[span], BINS)
        present, place = np.unique(features, return_inverse=True)
        hits = np.zeros((len(present), BINS), dtype=np.int64)
        hits[place, bins] = table.data[span]
        return _Table(fires, present, _tail(hits))

    def _score(self, half: int, table: _Table, level: int, picked: list[int]) -> Score | None:
        fires, features, hits = table
        if not fires[level]:
            return None if not fires[0] else Score(0.0, 0.0)
        both = hits[np.isin(features, picked), level].sum()
        wanted = self._halves[half][0].tokens[picked].sum()
        return Score(float(both / fires[level]), float(both / wanted) if wanted else 0.0)


def _by_concept(half: FeatureCounts) -> csr_array:
    """The counts as (concepts, features x bins), so that one concept is one row."""
    table = half.fired.tocoo()
    concepts, bins = np.divmod(table.col, BINS)
    columns = table.row.astype(np.int64) * BINS + bins
    shape = (half.concepts, half.fired.shape[0] * BINS)
    return csr_array((table.data, (concepts, columns)), shape=shape)


def _tail(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts[:, ::-1].cumsum(axis=1)[:, ::-1])


def _best(
    hits: Float[np.ndarray, "f bins"], tokens: Float[np.ndarray, " f"], fires: np.ndarray
) -> tuple[float, int, list[int]]:
    """Values of one family, taken greedily: their F1, level and places.

    Args:
        hits: tokens of each value on which the concept fires, by level.
        tokens: all tokens of each value.
        fires: all tokens on which the concept fires, by level.
    """
    levels = np.arange(hits.shape[1])
    both, size, f1 = (np.zeros(hits.shape[1]) for _ in range(3))
    free = np.ones(hits.shape, dtype=bool)
    picked: list[np.ndarray] = []
    for _ in range(min(MOST_VALUES, len(hits))):
        trial = 2 * (both + hits) / (fires + size + tokens[:, None] + PRIOR)
        trial = np.where(free, trial, -1.0)
        row = trial.argmax(axis=0)
        better = trial[row, levels] >= f1 + (WORTH if picked else 0.0)
        both = both + np.where(better, hits[row, levels], 0)
        size = size + np.where(better, tokens[row] + PRIOR, 0)
        f1 = np.where(better, trial[row, levels], f1)
        free[row, levels] = False
        picked.append(np.where(better, row, -1))
    level = int(f1.argmax())
    return float(f1[level]), level, [int(p[level]) for p in picked if p[level] >= 0]
