"""Choice, oracle and sources of candidates, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factories import make_prediction

from segcompass.evaluation.candidates import Weighed, summary, weigh
from segcompass.io.masks import encode
from segcompass.types import Candidates, Prediction, Sample, Status

HW = (4, 10)


def strip(*columns: int) -> np.ndarray:
    mask = np.zeros(HW, dtype=bool)
    mask[:, list(columns)] = True
    return mask


def sample(*targets: np.ndarray) -> Sample:
    return Sample("s", Path("a.jpg"), 1, HW, "it", tuple(encode(target) for target in targets))


def answer(
    chosen: int | None, *candidates: tuple[str, np.ndarray], status: Status = Status.OK
) -> Prediction:
    masks = np.stack([mask for _, mask in candidates])
    return make_prediction(
        status=status,
        slot_masks=np.zeros((1, *HW), dtype=bool) if chosen is None else masks[chosen][None],
        accepted=np.array([chosen is not None]),
        candidates=Candidates(
            masks=masks,
            scores=np.zeros(len(masks), dtype=np.float32),
            sources=tuple(source for source, _ in candidates),
            thoughts=("",) * len(masks),
            chosen=chosen,
        ),
    )


def test_a_choice_beside_the_best_one_there_was() -> None:
    proposed = (
        ("direct, slot 1", strip(0, 1)),  # IoU with columns 0 1 2 3: 2 / 4
        ("slot 2", strip(2, 3, 4)),  # 2 / 5
        ("heatmap 2", strip(0, 1, 2, 3)),  # 1
        ("heatmap 1", strip(3)),  # 1 / 4
    )
    found = weigh(answer(1, *proposed), sample(strip(0, 1), strip(2, 3)))
    assert found == Weighed(0.4, 1.0, 0.0, {"direct": 0.5, "slot": 0.5, "heatmap": 0.25})


def test_where_nothing_matches_the_oracle_rejects_all() -> None:
    proposed = ("direct", strip(0))
    assert weigh(answer(None, proposed, status=Status.NO_TARGET), sample()) == Weighed(
        1.0, 1.0, 1.0, {"direct": 0.0}
    )
    assert weigh(answer(0, proposed), sample()) == Weighed(0.0, 1.0, 1.0, {"direct": 0.0})


def test_malformed_answers_and_those_without_a_choice() -> None:
    broken = make_prediction(
        status=Status.MALFORMED, slot_masks=strip(0)[None], accepted=np.array([True])
    )
    assert weigh(broken, sample()) == Weighed(0.0, 0.0, 0.0, {"direct": 0.0})
    plain = make_prediction(slot_masks=strip(0, 1)[None], accepted=np.array([True]))
    assert weigh(plain, sample(strip(0))) == Weighed(0.5, 0.5, 0.0, {"direct": 0.5})


def test_the_summary_counts_a_silent_source_as_nothing() -> None:
    rows = [
        Weighed(0.4, 1.0, 0.0, {"direct": 0.5, "heatmap": 0.75}),
        Weighed(1.0, 1.0, 1.0, {"direct": 0.0}),  # nothing to find; the heatmaps proposed nothing
    ]
    found = summary(rows)
    assert found == {
        "samples": 2,
        "giou": pytest.approx(0.7),
        "oracle": 1.0,
        "by_source": {"direct": 0.25, "heatmap": 0.875},
        "best_source": "heatmap",
    }
    assert summary([])["oracle"] is None and summary([])["best_source"] is None
