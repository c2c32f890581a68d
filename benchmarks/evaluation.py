"""Metrics on run lengths, one sample at a time, against plain numpy over stacked masks.

    python benchmarks/evaluation.py [--json] [--samples 10000] [--stacked 100] [--repeats 3]

Every answer has six slots and none to three targets of 640x480; 100 answers are drawn and used in
turn, with other confidences each time. Both sides give the same figures, which are compared first:

    ours        score_sample for each answer, then Metrics.result
    stacked     decode everything into arrays (n, K, H, W) and (n, N, H, W), then numpy over all n

They start from run lengths, as a results file holds them (``from_runs``), or from the model's own
arrays, which ours encodes first and the other side only stacks (``from_masks``; the targets are run
lengths in both). Time and memory are compared at ``--stacked`` answers, without intervals. How they
grow is told by ``memory_per_sample``: the peak at twice as many answers, less the peak at
``--stacked``, for each answer more. ``seconds_in_all`` in the settings is ours for ``--samples``
answers with intervals, in seconds of one core (processor time, so that other programs do not
matter); the other side would need ``stacked_bytes_in_all`` there for its arrays alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import machine, median_seconds, new_parser, report, row

from segcompass.evaluation.detection import average_precision, match_targets, pool_detections
from segcompass.evaluation.metrics import RESAMPLES, Metrics
from segcompass.evaluation.scoring import PairScore, score_sample
from segcompass.io import masks
from segcompass.types import Rle, Sample

HW = (480, 640)
DRAWN, SLOTS, TARGETS = 100, 6, 3
THRESHOLD = 0.5


class Answer(NamedTuple):
    """One answer: its slots in both forms."""

    sample: Sample
    slots: list[Rle]
    slot_masks: np.ndarray  # bool (K, H, W)
    confidences: np.ndarray  # (K,)


def draw_answers(rng: np.random.Generator) -> list[Answer]:
    """Half of the slots resemble a target, where there is one."""
    answers = []
    for index in range(DRAWN):
        shapes = [draw_shape(rng) for _ in range(rng.integers(0, TARGETS + 1))]
        near = [shapes[k % len(shapes)] for k in range(SLOTS // 2)] if shapes else []
        drawn = [blob(shape + rng.normal(0, 4, size=4)) for shape in near]
        drawn += [blob(draw_shape(rng)) for _ in range(SLOTS - len(near))]
        targets = tuple(masks.encode(blob(shape)) for shape in shapes)
        sample = Sample(str(index), Path(), index, HW, "the red mug", targets)
        slots = [masks.encode(mask) for mask in drawn]
        answers.append(Answer(sample, slots, np.stack(drawn), np.empty(0)))
    return answers


def draw_shape(rng: np.random.Generator) -> np.ndarray:
    """Centre and radii of a blob, in px."""
    return np.concatenate([rng.uniform(60, 420, size=2), rng.uniform(20, 120, size=2)])


def blob(shape: np.ndarray) -> np.ndarray:
    """An ellipse with a wavy edge."""
    y, x = np.ogrid[: HW[0], : HW[1]]
    centre_y, centre_x, radius_y, radius_x = shape
    waves = 0.1 * np.sin(x / 7) * np.sin(y / 5)
    inside = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 + waves < 1
    return np.asarray(inside)


def take(drawn: Sequence[Answer], number: int) -> Iterator[Answer]:
    """So many answers, each with confidences of its own, as they would come from a file."""
    rng = np.random.default_rng(1)
    for answer in islice(cycle(drawn), number):
        yield answer._replace(confidences=rng.random(SLOTS))


def score(answer: Answer, *, from_masks: bool) -> PairScore:
    """Judge one answer."""
    slots = [masks.encode(mask) for mask in answer.slot_masks] if from_masks else answer.slots
    return score_sample(answer.sample, slots, answer.confidences.tolist(), threshold=THRESHOLD)


def ours(answers: Iterable[Answer], *, from_masks: bool, resamples: int = 0) -> dict[str, Any]:
    """All figures, an answer at a time."""
    scores = (score(answer, from_masks=from_masks) for answer in answers)
    return Metrics(scores).result(resamples=resamples)


def stacked(answers: Iterable[Answer], *, from_masks: bool) -> dict[str, float]:
    """gIoU, cIoU and AP, by numpy over everything at once."""
    kept = list(answers)
    slots = np.stack(
        [a.slot_masks if from_masks else np.stack([masks.decode(s) for s in a.slots]) for a in kept]
    )
    targets = np.zeros((len(kept), TARGETS, *HW), dtype=bool)
    for row_, answer in zip(targets, kept, strict=True):
        for mask, target in zip(row_, answer.sample.targets, strict=False):
            mask[:] = masks.decode(target)
    confidences = np.stack([answer.confidences for answer in kept])
    predicted = (slots & (confidences > THRESHOLD)[:, :, None, None]).any(axis=1)
    wanted = targets.any(axis=1)
    intersection = (predicted & wanted).sum(axis=(1, 2))
    union = (predicted | wanted).sum(axis=(1, 2))
    iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    return {
        "giou": float(iou.mean()),
        "ciou": float(intersection.sum() / union.sum()),
        "ap": stacked_precision(slots, targets, confidences),
    }


def stacked_precision(slots: np.ndarray, targets: np.ndarray, confidences: np.ndarray) -> float:
    """AP from stacked masks; matching and curve are the same code as ours."""
    slot_areas, target_areas = slots.sum(axis=(2, 3)), targets.sum(axis=(2, 3))
    ious = np.zeros((len(slots), SLOTS, TARGETS))
    for k in range(SLOTS):
        for j in range(TARGETS):
            both = (slots[:, k] & targets[:, j]).sum(axis=(1, 2))
            either = slot_areas[:, k] + target_areas[:, j] - both
            ious[:, k, j] = both / np.maximum(either, 1)
    order = np.argsort(-confidences, axis=1, kind="stable")
    numbers = (target_areas > 0).sum(axis=1)
    pool = pool_detections(
        np.take_along_axis(confidences, order, axis=1).tolist(),
        [
            match_targets(of_one[ranks, :n]) if n else (0,) * SLOTS
            for of_one, ranks, n in zip(ious, order, numbers, strict=True)
        ],
        numbers.tolist(),
    )
    return float(average_precision(pool, np.ones((1, len(slots)), dtype=np.int64)).mean())


def check_equal(drawn: Sequence[Answer], number: int) -> float:
    """Largest difference between the figures of both sides.

    Raises:
        SystemExit: it is more than 1e-9.
    """
    expected = stacked(take(drawn, number), from_masks=False)
    errors = [
        abs(found[name] - value)
        for found in (ours(take(drawn, number), from_masks=form) for form in (False, True))
        for name, value in expected.items()
    ]
    if not max(errors) <= 1e-9:
        sys.exit(f"the figures of both sides differ by {errors}; nothing is timed")
    return max(errors)


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of what Python and numpy allocate during a call."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures in the format of all benchmarks."""
    drawn = draw_answers(np.random.default_rng(0))
    n = options.stacked
    error = check_equal(drawn, n)
    sides: dict[str, Callable[[], object]] = {
        "ours, runs": lambda: ours(take(drawn, n), from_masks=False),
        "ours, masks": lambda: ours(take(drawn, n), from_masks=True),
        "stacked, runs": lambda: stacked(take(drawn, n), from_masks=False),
        "stacked, masks": lambda: stacked(take(drawn, n), from_masks=True),
    }
    seconds = median_seconds(sides, lambda: None, options.repeats)
    once = {name: peak_bytes(sides[name]) for name in ("ours, runs", "stacked, runs")}
    twice = {
        "ours": peak_bytes(lambda: ours(take(drawn, 2 * n), from_masks=False)),
        "stacked": peak_bytes(lambda: stacked(take(drawn, 2 * n), from_masks=False)),
    }
    in_all = {}
    for form in ("runs", "masks"):
        start = time.process_time()
        ours(take(drawn, options.samples), from_masks=form == "masks", resamples=RESAMPLES)
        in_all[form] = time.process_time() - start
    rows = [
        row("time_from_runs", "s", seconds["ours, runs"], seconds["stacked, runs"]),
        row("time_from_masks", "s", seconds["ours, masks"], seconds["stacked, masks"]),
        row("memory", "bytes", once["ours, runs"], once["stacked, runs"]),
        row(
            "memory_per_sample",
            "bytes",
            (twice["ours"] - once["ours, runs"]) / n,
            (twice["stacked"] - once["stacked, runs"]) / n,
        ),
    ]
    settings = {
        "samples": options.samples,
        "stacked": n,
        "repeats": options.repeats,
        "error": error,
        "seconds_in_all": in_all,
        "stacked_bytes_in_all": options.samples * (SLOTS + TARGETS) * HW[0] * HW[1],
    }
    return {"name": "evaluation", "machine": machine(), "settings": settings, "rows": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000, help="answers in all")
    parser.add_argument("--stacked", type=int, default=100, help="answers where both are compared")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    report(measure, parse())
