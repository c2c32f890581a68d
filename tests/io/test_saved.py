"""What `save` wrote comes back; anything else is refused with its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_prediction

from segcompass.io.errors import DataError
from segcompass.io.outputs import save
from segcompass.io.saved import load_prediction
from segcompass.types import Prediction


@pytest.mark.parametrize("errors", [None, np.array([0.25, np.nan], dtype=np.float32)])
def test_a_prediction_comes_back(tmp_path: Path, errors: np.ndarray | None) -> None:
    saved = make_prediction(paths="concepts", sae_errors=errors)
    back = load_prediction(save(saved, tmp_path)["json"])
    for field in dataclasses.fields(Prediction):
        before, after = getattr(saved, field.name), getattr(back, field.name)
        if field.name == "slot_heatmaps":
            np.testing.assert_allclose(after, before, atol=5e-4)  # half precision
        elif field.name == "codes":
            assert (after.n_rows, after.n_columns) == (before.n_rows, before.n_columns)
            assert all(torch.equal(a, b) for a, b in zip(after[:3], before[:3], strict=True))
        elif isinstance(before, np.ndarray):
            np.testing.assert_array_equal(after, before, err_msg=field.name)
            assert after.dtype.kind == before.dtype.kind, field.name
        else:
            assert after == before, field.name


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load_prediction(tmp_path / "nowhere.json")
    paths = save(make_prediction(), tmp_path)
    paths["arrays"].unlink()
    with pytest.raises(DataError, match=rf"{paths['arrays'].name}: no such file"):
        load_prediction(paths["json"])


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"schema": "other/1"}'])
def test_json_of_another_kind(tmp_path: Path, content: str) -> None:
    path = save(make_prediction(), tmp_path)["json"]
    path.write_text(content)
    with pytest.raises(DataError, match="no saved prediction"):
        load_prediction(path)


def test_arrays_that_are_damaged(tmp_path: Path) -> None:
    paths = save(make_prediction(), tmp_path)
    paths["arrays"].write_bytes(paths["arrays"].read_bytes()[:500])
    with pytest.raises(DataError, match="no saved prediction"):
        load_prediction(paths["json"])
    np.savez(paths["arrays"], scores=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="no saved prediction"):
        load_prediction(paths["json"])


def test_a_schema_of_the_future(tmp_path: Path) -> None:
    path = save(make_prediction(), tmp_path)["json"]
    record = json.loads(path.read_text()) | {"schema": "segcompass.prediction/9"}
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="prediction/9"):
        load_prediction(path)
