"""The margin that a judge earns, on questions with hand-made candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcompass.interfaces.candidate_rerank import favourite
from segcompass.io.masks import encode
from segcompass.learning.candidate_questions import Question, deserved
from segcompass.learning.margin import Verdict, best_margin, figures, rate, weigh
from segcompass.types import Sample, Score, Status

HW = (3, 10)


def strip(*columns: int) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[:, list(columns)] = True
    return mask


def question(target: Sequence[int], *found: Sequence[int], direct: bool = True) -> Question:
    targets = (encode(strip(*target)),) if target else ()
    sample = Sample("s", Path("a.png"), 1, HW, "it", targets)
    masks = [encode(strip(*columns)) for columns in found]
    return Question(sample, masks, deserved(sample, masks), direct)


def scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_a_verdict_by_hand() -> None:
    asked = question([0, 1, 2, 3], [0, 1], [2, 3, 4], [0, 1, 2, 3])  # 2 / 4, 2 / 5, 1
    found = weigh(asked, scores(0.5, 0.75, 0.25), threshold=0.5)
    assert found == Verdict(lead=0.25, source=0.5, favourite=0.4, oracle=1.0)
    assert weigh(asked, scores(0.5, 0.5, 0.5), 0.5) == Verdict(0.0, 0.5, 0.5, 1.0)


def test_nothing_to_find_counts_one_and_is_rated_at_the_threshold() -> None:
    right = question([], [0], direct=False)
    assert weigh(right, scores(0.75), threshold=0.5) == Verdict(0.25, 1.0, 0.0, 1.0)
    assert weigh(right, scores(0.25), threshold=0.5).lead == -0.25
    missed = question([0, 1], [0], direct=False)
    assert weigh(missed, scores(0.75), threshold=0.5) == Verdict(0.25, 0.0, 0.5, 0.5)
    silent = question([], direct=False)
    assert weigh(silent, scores(), threshold=0.5) == Verdict(0.0, 1.0, 1.0, 1.0)
    assert favourite(scores(), has_direct=False, threshold=0.5) == (None, 0.0)


def test_the_best_margin_parts_the_helpful_from_the_harmful() -> None:
    helpful = [Verdict(0.305, 0.2, 0.7, 0.9)] * 30
    harmful = [Verdict(0.2, 0.8, 0.1, 0.8)] * 20
    assert best_margin(helpful + harmful) == 0.3  # the largest that lets all of the former through
    told = figures(helpful + harmful, 0.3)
    assert told == {
        "questions": 50,
        "source": pytest.approx((30 * 0.2 + 20 * 0.8) / 50),
        "chosen": pytest.approx((30 * 0.7 + 20 * 0.8) / 50),
        "best_candidate": pytest.approx((30 * 0.9 + 20 * 0.8) / 50),
        "margin": 0.3,
    }
    assert best_margin(harmful) == 1.0
    # Changes that change nothing are none: of equals the larger margin.
    assert best_margin([*helpful, Verdict(0.1, 0.5, 0.5, 0.5)]) == 0.3


def judged(judge: Callable[[Question], np.ndarray], count: int = 200) -> list[Verdict]:
    """Verdicts on random questions, every fourth of them without a target."""
    draw = np.random.default_rng(1)
    found = []
    for i in range(count):
        target = draw.permutation(10)[: 0 if i % 4 == 0 else 4].tolist()
        guesses = [draw.permutation(10)[:4].tolist() for _ in range(5)]
        asked = question(target, *guesses, direct=i % 8 != 0)
        found.append(weigh(asked, judge(asked), threshold=0.0))
    return found


def test_a_perfect_judge_has_its_way_and_finds_the_best_candidates() -> None:
    def perfect(asked: Question) -> np.ndarray:
        return scores(*(score / 9 for score in asked.scores))

    found = judged(perfect)
    told = figures(found, best_margin(found))
    better = [max(one.source, one.favourite) for one in found]
    assert told["chosen"] == pytest.approx(np.mean(better))
    with_target = [one for one in found if one.source != 1.0 and one.oracle < 1.0]
    assert all(one.favourite == one.oracle for one in with_target) and len(with_target) > 100
    assert told["chosen"] > told["source"] + 0.1


@pytest.mark.parametrize("seed", range(8))
def test_a_judge_by_chance_leaves_the_source_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    found = judged(lambda asked: draw.random(len(asked.masks), dtype=np.float32))
    assert best_margin(found) == 1.0
    told = figures(found, 1.0)
    assert told["chosen"] == told["source"] < told["best_candidate"]


def test_too_few_questions_tell_nothing() -> None:
    assert best_margin([]) == best_margin([Verdict(0.9, 0.0, 1.0, 1.0)]) == 1.0
    assert figures([], 1.0)["source"] is None


def test_every_candidate_is_shown_with_its_question(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((*HW, 3), 200, dtype=np.uint8)).save(path)
    asked = [question([0, 1], [0, 1], [5]), question([], direct=False), question([4], [3], [4])]
    there = [one._replace(sample=replace(one.sample, image_path=path)) for one in asked]
    seen: list[int] = []

    class Judge:
        def score(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[Score]:
            assert list(words) == ["it"] * len(pictures)
            seen.append(len(pictures))
            return [Score(float(i), "", Status.OK) for i in range(len(pictures))]

    found = rate(there, Judge(), threshold=0.5)
    assert seen == [2, 0, 2]
    assert found == [Verdict(1, 1, 0, 1), Verdict(0, 1, 1, 1), Verdict(1, 0, 1, 1)]
