"""Concept cards at size: counting in one pass and bounded memory, against keeping every code.

    python benchmarks/concept_cards.py [--json] [--concepts 4000] [--answers 2000] [--compared 100]

Answers are made up: a picture with eight things, a question and a thought that lists them, 256
image tokens and about 60 words, on each token some 32 active concepts, of which each stands for a
value (a colour, a category, a cell, a word) and fires on four of five of its tokens. Both sides
count the same, which is compared first:

    ours        ConceptCounts.add for each answer, then finish
    plain       keep the codes and features of all answers, then go from concept to concept

``time`` and ``memory`` (peak) are those of ``--compared`` answers, where ours is not yet at its
bounds. ``seconds_in_all`` in the settings is processor time of one core for counting, cards and
page of ``--answers`` answers, each about a picture of its own, without the time to make them up;
``peak_bytes_in_all`` is the most memory of the process, ``plain_bytes_in_all`` what the other side
would hold. With Playwright and Chromium the page is opened: ``page_seconds`` (median of three fresh
browsers) are from the request until everything is loaded and the first cards are painted.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from measuring import machine, median_seconds, new_parser, report, row
from PIL import Image
from scipy.sparse import csr_array, vstack

from segcompass.apps.concept_page import write_concept_page
from segcompass.data.samples import ImageRecord
from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES, cell_of
from segcompass.explain.concept_cards import Card, make_cards
from segcompass.explain.concept_counts import BINS, EDGES, EXAMPLES, ConceptCounts
from segcompass.explain.token_features import token_features
from segcompass.explain.vocabulary import VOCABULARY, Vocabulary
from segcompass.io import masks
from segcompass.io.readings import code_matrix
from segcompass.types import NamedObject, Prediction, Sample, SparseCodes, Status, TokenKind

SIDE, GRID, THINGS, ACTIVE = 320, 16, 8, 32  # px, image tokens a side, per picture, per token
WIDTH = 64  # of the decoder's rows
FIRES = 0.8  # of the tokens that a concept stands for


class Answer(NamedTuple):
    """A made-up answer, and everything about its picture."""

    sample: Sample
    prediction: Prediction
    scene: ImageRecord


class World:
    """Makes up answers; what each concept stands for is fixed.

    Args:
        concepts: S.
        folder: pictures are written there; None writes none.
    """

    def __init__(self, concepts: int, folder: Path | None = None) -> None:
        self.concepts, self.folder = concepts, folder
        cells = [f"{letter}{column}" for letter in "abcdefgh" for column in range(1, 9)]
        values = [*COLOURS, *CATEGORIES, *cells, "find", "see", "so", "the"]
        rng = np.random.default_rng(0)
        self._concepts_of: dict[str, np.ndarray] = {}
        meant = rng.integers(len(values), size=concepts)
        for number, value in enumerate(values):
            self._concepts_of[value] = np.flatnonzero(meant == number)

    def answers(self, number: int) -> Iterator[Answer]:
        """The first so many answers, each about a picture of its own; the same every time."""
        return map(self._answer, range(number))

    def _answer(self, index: int) -> Answer:
        rng = np.random.default_rng([1, index])
        objects, shapes, picture = [], np.zeros((THINGS, SIDE, SIDE), dtype=bool), _ground(rng)
        for k in range(THINGS):
            colour, size = str(rng.choice([*COLOURS])), str(rng.choice([*SIZES]))
            category, texture = str(rng.choice([*CATEGORIES])), str(rng.choice([*TEXTURES]))
            half = round(SIDE * SIZES[size] / 2)
            x, y = rng.integers(half, SIDE - half, size=2)
            shapes[k, y - half : y + half, x - half : x + half] = True
            picture[shapes[k]] = COLOURS[colour]
            cell = cell_of(x / SIDE, y / SIDE)
            objects.append(NamedObject(k, category, colour, size, texture, cell))
        path = Path(f"{index}.jpg") if self.folder is None else self.folder / f"{index}.jpg"
        if self.folder is not None:
            Image.fromarray(picture).save(path, quality=80)
        coded = tuple(masks.encode(shape) for shape in shapes)
        question = f"find the {objects[0].colour} {objects[0].category}"
        thought = "I see " + ", ".join(
            f"{o.size} {o.colour} {o.category} {o.cell}" for o in objects
        )
        thought += (
            f". So the answer is {objects[0].colour} {objects[0].category} {objects[0].cell}."
        )
        prediction = self._predict(rng, objects, shapes, question, thought)
        sample = Sample(str(index), path, index, (SIDE, SIDE), question, coded[:1], (0,))
        scene = ImageRecord(path, index, (SIDE, SIDE), tuple(objects), coded, "")
        return Answer(sample, prediction, scene)

    def _predict(
        self,
        rng: np.random.Generator,
        objects: Sequence[NamedObject],
        shapes: np.ndarray,
        question: str,
        thought: str,
    ) -> Prediction:
        step = SIDE / GRID
        middles = ((np.arange(GRID) + 0.5) * step).astype(int)
        meanings: list[list[str]] = []
        for y in middles:
            for x in middles:
                things = [o for o, shape in zip(objects, shapes, strict=True) if shape[y, x]][:1]
                looks = [value for o in things for value in (o.colour, o.category)]
                meanings.append([*looks, cell_of(x / SIDE, y / SIDE)])
        said = [(word, TokenKind.INSTRUCTION) for word in question.split()]
        said += [(word, TokenKind.THOUGHT) for word in thought.split()]
        meanings += [[word.strip(".,").lower()] for word, _ in said]
        kinds = [TokenKind.IMAGE] * GRID**2 + [kind for _, kind in said]
        tokens = ["<image>"] * GRID**2 + [f" {word}" for word, _ in said]
        corners = np.array([(x * step, y * step) for y in range(GRID) for x in range(GRID)])
        nothing = np.zeros(0, dtype=np.float32)
        return Prediction(
            instruction=question,
            status=Status.OK,
            text=thought,
            reasoning=thought,
            image_rgb=nothing,
            slot_masks=nothing,
            slot_scores=nothing,
            accepted=nothing,
            slot_heatmaps=nothing,
            heatmap_logits=nothing,
            head_scores=nothing,
            low_res_logits=nothing,
            concentration_states=nothing,
            slot_queries=nothing,
            concept_vectors=nothing,
            slot_attention=nothing,
            codes=self._codes(rng, meanings),
            tokens=tuple(tokens),
            token_kinds=np.array(kinds),
            token_boxes=np.concatenate([corners, corners + step], axis=1).astype(np.float32),
            threshold=0.5,
            model="made up",
        )

    def _codes(self, rng: np.random.Generator, meanings: Sequence[Sequence[str]]) -> SparseCodes:
        """Concepts of a token's meanings, most of them strong, and others at random, weak."""
        rows, columns, values = [], [], []
        for token, meaning in enumerate(meanings):
            own = np.concatenate(
                [np.zeros(0, dtype=int), *(self._concepts_of.get(v, []) for v in meaning)]
            ).astype(int)
            own = own[rng.random(len(own)) < FIRES][: ACTIVE // 2]
            others = np.setdiff1d(rng.integers(self.concepts, size=ACTIVE - len(own)), own)
            columns.append(np.concatenate([own, others]))
            values.append(rng.gamma(8, 0.4, len(own)))
            values.append(rng.gamma(1.5, 0.25, len(others)))
            rows.append(np.full(len(columns[-1]), token))
        n_rows, strengths = len(meanings), torch.from_numpy(np.concatenate(values)).float()
        places = (torch.from_numpy(np.concatenate(part)) for part in (rows, columns))
        return SparseCodes(*places, strengths, n_rows, self.concepts)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A noisy background, which no codec packs away."""
    return np.asarray(rng.normal(205, 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8))


class Counted(NamedTuple):
    """What both sides are compared by."""

    histogram: Int[np.ndarray, "S bins"]
    strongest: Float[np.ndarray, "S examples"]  # on pictures, one of each
    hits: csr_array  # (features, S·bins), tokens of a feature on which a concept fires


def count(world: World, answers: Iterable[Answer]) -> ConceptCounts:
    """Ours: one answer at a time."""
    scenes: dict[int, ImageRecord] = {}
    counts = ConceptCounts(world.concepts, scenes)
    for answer in answers:
        scenes[answer.sample.image_id] = answer.scene
        counts.add(answer.sample, answer.prediction)
    counts.finish()
    return counts


def ours(world: World, answers: Iterable[Answer]) -> Counted:
    """Ours, in the form that is compared."""
    counts = count(world, answers)
    histogram = sum(part.histogram for part in counts.halves)
    hits = sum(
        (part.fired for part in counts.halves), csr_array((VOCABULARY, BINS * world.concepts))
    )
    return Counted(histogram.reshape(-1, BINS), counts.patches.values, hits)


def plain(world: World, answers: Iterable[Answer]) -> Counted:
    """Everything kept, then every concept looked at on its own."""
    vocabulary, codes, features, images = Vocabulary(), [], [], []
    for sample, prediction, scene in answers:
        codes.append(code_matrix(prediction))
        found = token_features(sample, prediction, {sample.image_id: scene})
        features.append(vocabulary.table(found, codes[-1].shape[0]))
        on_image = prediction.token_kinds == TokenKind.IMAGE
        images.append(np.where(on_image, sample.image_id, -1))
    fires, known = vstack(codes, format="csc"), vstack(features, format="csr")
    image = np.concatenate(images)
    histogram = np.zeros((world.concepts, BINS), dtype=np.int64)
    strongest = np.zeros((world.concepts, EXAMPLES), dtype=np.float32)
    hits = []
    for concept in range(world.concepts):
        span = slice(fires.indptr[concept], fires.indptr[concept + 1])
        tokens, values = fires.indices[span], fires.data[span]
        bins = np.clip(np.searchsorted(EDGES, values, side="right") - 1, 0, None)
        histogram[concept] = np.bincount(bins, minlength=BINS)
        best: dict[int, float] = {}
        for of_image, value in zip(image[tokens].tolist(), values.tolist(), strict=True):
            if of_image >= 0:
                best[of_image] = max(value, best.get(of_image, 0.0))
        top = sorted(best.values(), reverse=True)[:EXAMPLES]
        strongest[concept, : len(top)] = top
        ones, shape = np.ones(len(bins), dtype=np.int32), (len(bins), BINS)
        level = csr_array((ones, (np.arange(len(bins)), bins)), shape=shape)
        hits.append((known[tokens].T @ level).tocsc())
    joined = csr_array(_side_by_side(hits))
    return Counted(histogram, strongest, joined)


def _side_by_side(parts: Sequence[Any]) -> csr_array:
    data = np.concatenate([part.data for part in parts])
    rows = np.concatenate([part.indices for part in parts])
    columns = np.concatenate(
        [np.repeat(np.arange(BINS) + i * BINS, np.diff(p.indptr)) for i, p in enumerate(parts)]
    )
    return csr_array((data, (rows, columns)), shape=(VOCABULARY, BINS * len(parts)))


def check_equal(world: World, number: int) -> None:
    """Compare both sides.

    Raises:
        SystemExit: they count differently.
    """
    found, expected = (side(world, world.answers(number)) for side in (ours, plain))
    same = {
        "histogram": np.array_equal(found.histogram, expected.histogram),
        "strongest": np.allclose(found.strongest, expected.strongest),
        "hits": abs(found.hits - expected.hits).sum() == 0,
    }
    if not all(same.values()):
        sys.exit(f"both sides count differently ({same}); nothing is timed")


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of what Python and numpy allocate during a call."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


class Whole(NamedTuple):
    """Cards from first to last."""

    cards: list[Card]
    page: Path
    seconds: dict[str, float]  # of the processor, by step


def build(world: World, number: int, folder: Path) -> Whole:
    """Count, make cards, write the page."""
    spent = {"counting": 0.0}

    def timed() -> Iterator[Answer]:
        for answer in world.answers(number):
            start = time.process_time()
            yield answer  # the time until the next one is asked for
            spent["counting"] += time.process_time() - start

    counts = count(world, timed())
    start = time.process_time()
    decoder = np.random.default_rng(2).normal(size=(world.concepts, WIDTH))
    cards = make_cards(counts, decoder)
    spent["cards"] = time.process_time() - start
    start = time.process_time()
    files = {image_id: path for image_id, (_, path) in counts.pictures.items()}
    title = "Made-up concepts"
    page = write_concept_page(cards, files, folder / "concepts.html", title=title, summary=[])
    spent["page"] = time.process_time() - start
    return Whole(cards, page, spent)


def page_seconds(page: Path, repeats: int = 3) -> float | None:
    """Seconds until the page is loaded and painted; None without Chromium or Playwright."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as driver:
        for _ in range(repeats):
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            opened = browser.new_page(viewport={"width": 1360, "height": 900})
            start = time.perf_counter()
            opened.goto(page.as_uri())
            opened.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            seconds.append(time.perf_counter() - start)
            browser.close()
    return statistics.median(seconds)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures in the format of all benchmarks."""
    world, n = World(options.concepts), options.compared
    check_equal(world, n)
    kept = list(world.answers(2 * n))
    first = list(islice(kept, n))
    seconds = median_seconds(
        {"ours": partial(ours, world, first), "plain": partial(plain, world, first)},
        lambda: None,
        options.repeats,
    )
    once = {side.__name__: peak_bytes(partial(side, world, first)) for side in (ours, plain)}
    plain_more = (peak_bytes(partial(plain, world, kept)) - once["plain"]) / n
    del kept, first
    with tempfile.TemporaryDirectory() as folder:
        whole = build(World(options.concepts, Path(folder)), options.answers, Path(folder))
        settings = {
            "concepts": options.concepts,
            "answers": options.answers,
            "compared": n,
            "repeats": options.repeats,
            "cards": len(whole.cards),
            "labelled": sum(card.f1 >= 0.6 for card in whole.cards),
            "seconds_in_all": whole.seconds,
            "peak_bytes_in_all": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "plain_bytes_in_all": round(plain_more * options.answers),
            "page_bytes": whole.page.stat().st_size,
            "page_seconds": page_seconds(whole.page),
        }
    rows = [
        row("time", "s", seconds["ours"], seconds["plain"]),
        row("memory", "bytes", once["ours"], once["plain"]),
    ]
    return {"name": "concept_cards", "machine": machine(), "settings": settings, "rows": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = new_parser(__doc__)
    parser.add_argument("--concepts", type=int, default=4000, help="S")
    parser.add_argument("--answers", type=int, default=2000, help="answers, and pictures, in all")
    parser.add_argument("--compared", type=int, default=100, help="answers where both are compared")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    report(measure, parse())
