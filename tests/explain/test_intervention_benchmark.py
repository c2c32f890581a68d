"""The benchmark of interventions runs, and would notice the policy."""

from __future__ import annotations

from pathlib import Path

import intervention
import numpy as np
import pytest

from segcompass.pipeline import SegCompass


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


def test_both_sides_are_timed(model: SegCompass) -> None:
    result = intervention.measure(model, repeats=1)
    (row,) = result["rows"]
    assert row["measure"] == "intervene_vs_predict"
    assert row["ratio"] == row["baseline"] / row["ours"] > 0


def test_a_policy_that_runs_is_noticed(model: SegCompass) -> None:
    picture = np.zeros((40, 40, 3), dtype=np.uint8)
    with intervention.silenced(model.policy), pytest.raises(AssertionError, match="was run"):
        model.predict(picture, "the mug")
    model.predict(picture, "the mug")  # and nothing stays behind
