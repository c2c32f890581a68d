"""Everything that concept cards need to count, in one pass over answers and in bounded memory.

For S concepts: a histogram of activations, the strongest patches and words, how often each concept
fires together with each feature of a token, and a uniform sample of tokens from which co-activation
is read. Nothing grows with the number of answers but about a kilobyte of text each.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from segcompass.data.samples import ImageRecord
from segcompass.explain.token_features import token_features
from segcompass.explain.vocabulary import VOCABULARY, Vocabulary
from segcompass.explain.words import SPOKEN
from segcompass.interfaces.concept_slots import READ_BY_SAE
from segcompass.io.readings import code_matrix
from segcompass.types import Prediction, Sample, TokenKind

EDGES = 2.0 ** (np.arange(25) / 2 - 4)  # lower edges of the bins of activations; the first is open
BINS = len(EDGES)
EXAMPLES = 6  # patches and words kept for a concept
TOKEN_SAMPLE = 20_000  # tokens from which co-activation is estimated
PAIRS = 8_000_000  # (feature, concept, bin) counts kept; rarer ones are dropped beyond
ANSWERS_AT_ONCE = 32


class Strongest:
    """For each concept its largest activations, at most one for each picture."""

    def __init__(self, concepts: int, payload: int) -> None:
        self.values = np.zeros((concepts, EXAMPLES), dtype=np.float32)
        self.images = np.full((concepts, EXAMPLES), -1, dtype=np.int64)
        self.payload = np.zeros((concepts, EXAMPLES, payload), dtype=np.int32)

    def add(self, codes: csr_array, image: int, payload: Int[np.ndarray, "n p"]) -> None:
        """Take in one picture's tokens; row r of ``codes`` has ``payload[r]``."""
        if codes.nnz == 0:
            return
        by_concept = codes.tocoo()
        order = np.lexsort((by_concept.row, -by_concept.data, by_concept.col))
        columns, first = np.unique(by_concept.col[order], return_index=True)
        best, row = by_concept.data[order][first], by_concept.row[order][first]
        same = self.images[columns] == image
        beaten = np.where(same, self.values[columns], 0).max(axis=1) >= best
        better = ~beaten & (best > np.where(same, 0, self.values[columns]).min(axis=1))
        columns, best, row, same = columns[better], best[better], row[better], same[better]
        values = np.where(same, 0, self.values[columns])  # its own older entry makes room
        values = np.column_stack([values, best])
        images = np.column_stack([self.images[columns], np.full(len(columns), image)])
        loads = np.concatenate([self.payload[columns], payload[row][:, None]], axis=1)
        keep = np.argsort(-values, axis=1, kind="stable")[:, :EXAMPLES]
        self.values[columns] = np.take_along_axis(values, keep, axis=1)
        self.images[columns] = np.take_along_axis(images, keep, axis=1)
        self.payload[columns] = np.take_along_axis(loads, keep[..., None], axis=1)


class TokenSample:
    """A uniform sample of tokens: those with the smallest random keys, whatever their order."""

    def __init__(self, concepts: int) -> None:
        self.codes: Any = csr_array((0, concepts), dtype=np.float32)
        self._keys = np.zeros(0)

    def add(self, sample_id: str, codes: csr_array) -> None:
        """Offer the tokens of one answer."""
        keys = np.random.default_rng(zlib.crc32(sample_id.encode())).random(codes.shape[0])
        cut = self._keys.max() if len(self._keys) == TOKEN_SAMPLE else 1.0
        kept = keys < cut
        if not kept.any():
            return
        self._keys = np.concatenate([self._keys, keys[kept]])
        self.codes = vstack([self.codes, codes[kept]], format="csr")
        if len(self._keys) > TOKEN_SAMPLE:
            smallest = np.sort(np.argpartition(self._keys, TOKEN_SAMPLE)[:TOKEN_SAMPLE])
            self._keys, self.codes = self._keys[smallest], self.codes[smallest]


class FeatureCounts:
    """On how many tokens of a feature each concept fires, by activation; of one half of the set."""

    def __init__(self, concepts: int) -> None:
        self.concepts = concepts
        self.histogram = np.zeros(concepts * BINS, dtype=np.int64)
        self.tokens = np.zeros(VOCABULARY, dtype=np.int64)
        self.fired = csr_array((VOCABULARY, concepts * BINS), dtype=np.int32)
        self.dropped = 0  # largest count that may be missing from ``fired``
        self._waiting: list[tuple[csr_array, csr_array]] = []

    def add(self, features: csr_array, codes: csr_array) -> None:
        """Count one answer."""
        bins = np.clip(np.searchsorted(EDGES, codes.data, side="right") - 1, 0, None)
        cells = codes.indices.astype(np.int64) * BINS + bins
        ones = np.ones(len(cells), dtype=np.int32)
        shape = (codes.shape[0], self.concepts * BINS)
        self.histogram += np.bincount(cells, minlength=len(self.histogram))
        self.tokens += features.sum(axis=0)
        self._waiting.append((features, csr_array((ones, cells, codes.indptr), shape=shape)))
        if len(self._waiting) == ANSWERS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Bring the counts up to date."""
        if not self._waiting:
            return
        features, binned = (
            vstack(parts, format="csr") for parts in zip(*self._waiting, strict=True)
        )
        self._waiting = []
        self.fired = csr_array(self.fired + features.T @ binned)
        while self.fired.nnz > PAIRS:
            self.dropped += 1
            self.fired.data[self.fired.data <= self.dropped] = 0
            self.fired.eliminate_zeros()


class ConceptCounts:
    """Takes in answers one by one.

    Args:
        concepts: S.
        scenes: pictures of which everything is known, by image id.
    """

    def __init__(self, concepts: int, scenes: Mapping[int, ImageRecord] | None = None) -> None:
        self.concepts, self.scenes = concepts, {} if scenes is None else scenes
        self.vocabulary = Vocabulary()
        self.halves = (FeatureCounts(concepts), FeatureCounts(concepts))
        self.fired = np.zeros((2, concepts), dtype=np.int64)  # on text, on pictures
        self.tokens = np.zeros(2, dtype=np.int64)
        self.largest = np.zeros(concepts, dtype=np.float32)
        self.patches = Strongest(concepts, payload=5)  # sample, and box in thousandths
        self.spoken = Strongest(concepts, payload=2)  # sample, and number of the text token
        self.sample = TokenSample(concepts)
        self.texts: list[tuple[str, np.ndarray]] = []  # of each answer, and where tokens begin
        self.pictures: dict[int, tuple[int, Path]] = {}  # by image id: place in the set, and file

    def add(self, sample: Sample, prediction: Prediction) -> None:
        """Count one answer.

        Pictures are dealt to the two halves in turn, so that all questions about one picture are
        in the same half.
        """
        codes, number = code_matrix(prediction), len(self.texts)
        codes.sort_indices()
        half = self.halves[self._half(sample)]
        found = token_features(sample, prediction, self.scenes)
        half.add(self.vocabulary.table(found, codes.shape[0]), codes)
        on_image = prediction.token_kinds == TokenKind.IMAGE
        on_text = np.isin(prediction.token_kinds, SPOKEN)
        read = np.isin(prediction.token_kinds, READ_BY_SAE)
        for modality, chosen in enumerate((~on_image & read, on_image & read)):
            self.fired[modality] += np.bincount(codes[chosen].indices, minlength=self.concepts)
            self.tokens[modality] += int(chosen.sum())
        np.maximum.at(self.largest, codes.indices, codes.data)
        boxes = _thousandths(prediction.token_boxes, sample.image_hw)
        load = np.column_stack([np.full(len(boxes), number), boxes])
        self.patches.add(codes[on_image], sample.image_id, load)
        spoken = np.arange(int(on_text.sum()))
        load = np.column_stack([np.full(len(spoken), number), spoken])
        self.spoken.add(codes[on_text], sample.image_id, load)
        self.sample.add(sample.sample_id, codes)
        self.texts.append(_text(prediction, on_text))

    def finish(self) -> None:
        """Bring all counts up to date."""
        for half in self.halves:
            half.flush()

    def snippet(self, number: int, token: int, reach: int = 28) -> tuple[str, str, str]:
        """Whole words before a text token of an answer, the token, and words that follow."""
        text, starts = self.texts[number]
        begin, end = int(starts[token]), int(starts[token + 1])
        before, after = text[max(0, begin - reach) : begin], text[end : end + reach]
        if begin > reach:
            before = f"… {before.partition(' ')[2] or before}"
        if end + reach < len(text):
            after = f"{after.rpartition(' ')[0] or after} …"
        return before, text[begin:end], after

    def _half(self, sample: Sample) -> int:
        known = self.pictures.setdefault(sample.image_id, (len(self.pictures), sample.image_path))
        return known[0] % 2


def _thousandths(
    boxes: Float[np.ndarray, "T 4"], image_hw: tuple[int, int]
) -> Int[np.ndarray, "T 4"]:
    height, width = image_hw
    return np.asarray(np.rint(boxes / (width, height, width, height) * 1000).astype(np.int32))


def _text(prediction: Prediction, on_text: np.ndarray) -> tuple[str, np.ndarray]:
    parts = [
        prediction.tokens[i].replace("Ġ", " ").replace("▁", " ") for i in np.flatnonzero(on_text)
    ]
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return "".join(parts), starts
