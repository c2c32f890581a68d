"""The curves of a joint stage: what is drawn is what was logged."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import training_curves
from PIL import Image


def test_means_are_over_the_steps_around_that_have_a_value() -> None:
    found = training_curves.smoothed([None, 1.0, 4.0, None, 2.0, 3.0], 3)
    # 1 and 4 have one neighbour with a value each, 2 has 3, and 3 has 2.
    assert found[[1, 2, 4, 5]].tolist() == [2.5, 2.5, 2.5, 2.5]
    assert np.isnan(found[[0, 3]]).all()
    assert training_curves.smoothed([1.0, 2.0], 10).shape == (2,)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_picture_and_its_data(runs: int, tmp_path: Path) -> None:
    folders = []
    for number in range(runs):
        folder = tmp_path / f"run{number}/stages/joint"
        folder.mkdir(parents=True)
        told = {"step": 1, "iou": 0.25}  # on the data set's own answers
        sampled = {"step": 2, "iou": 0.5, "reward": 0.6, "kl": 0.01, "reward_mask": 0.4}
        rows = [told, {**sampled, "reward_format": 1.0, "loss": 3.0}]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(str(tmp_path / f"run{number}"))
    out = tmp_path / "images/training"
    training_curves.main([*folders, "--out", str(out)])
    with Image.open(out.with_suffix(".png")) as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    with out.with_suffix(".csv").open(newline="") as file:
        data = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in data] == [
        (f"run{n}", step) for n in range(runs) for step in ("1", "2")
    ]
    assert (data[0]["reward"], data[0]["iou"]) == ("", "0.25")
    assert (data[1]["reward"], data[1]["kl"]) == ("0.6", "0.01") and "loss" not in data[1]
