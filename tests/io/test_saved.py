"""What `save` wrote comes back; anything else is refused with its name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import INTERFACES, make_prediction, malformed

from segcompass.io.errors import DataError
from segcompass.io.outputs import save
from segcompass.io.saved import load_prediction
from segcompass.types import BoxPrompts, Candidates, Prediction, SparseCodes


def assert_same(field: str, before: Any, after: Any) -> None:
    """What was saved and what was read, of whatever kind."""
    if field == "slot_heatmaps" and before is not None:
        np.testing.assert_allclose(after, before, atol=5e-4)  # half precision
    elif isinstance(before, torch.Tensor):
        assert torch.equal(after, before), field
    elif isinstance(before, np.ndarray):
        np.testing.assert_array_equal(after, before, err_msg=field)
        assert after.dtype.kind == before.dtype.kind, field
    elif isinstance(before, SparseCodes | BoxPrompts | Candidates):
        assert type(after) is type(before)
        for name, one, other in zip(before._fields, before, after, strict=True):
            assert_same(f"{field}.{name}", one, other)
    else:
        assert after == before, field


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("make", [make_prediction, malformed])
def test_a_prediction_comes_back(
    tmp_path: Path, interface: str, make: Callable[..., Prediction]
) -> None:
    saved = dataclasses.replace(
        make(interface=interface),
        paths="concepts",
        fingerprint="f00",
        sae_errors=np.array([0.25, np.nan], dtype=np.float32) if make is malformed else None,
    )
    back = load_prediction(save(saved, tmp_path)["json"])
    for field in dataclasses.fields(Prediction):
        assert_same(field.name, getattr(saved, field.name), getattr(back, field.name))


def test_an_answer_for_which_there_was_no_candidate_comes_back(tmp_path: Path) -> None:
    none = Candidates(np.zeros((0, 256, 256), dtype=bool), np.zeros(0, np.float32), (), (), None)
    saved = make_prediction(interface="candidate_rerank", candidates=none)
    assert_same("candidates", none, load_prediction(save(saved, tmp_path)["json"]).candidates)


def test_files_from_before_there_were_interfaces(tmp_path: Path) -> None:
    path = save(make_prediction(fingerprint="f00"), tmp_path)["json"]
    record = json.loads(path.read_text())
    del record["interface"], record["fingerprint"]
    path.write_text(json.dumps(record))
    back = load_prediction(path)
    assert (back.interface, back.fingerprint) == ("concept_slots", "")


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load_prediction(tmp_path / "nowhere.json")
    paths = save(make_prediction(), tmp_path)
    paths["arrays"].unlink()
    with pytest.raises(DataError, match=rf"{paths['arrays'].name}: no such file"):
        load_prediction(paths["json"])


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"schema": "other/1"}', "[" * 100_000])
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


@pytest.mark.parametrize(
    "mask",
    [
        None,
        {"size": [256, 256], "counts": [65536]},
        {"size": [8, 8], "counts": "P2"},
        {"size": [10**6, 10**6], "counts": "PPP[jm"},  # 10**12 pixels, all of them outside
        {"size": [256, 256], "counts": "\ud800"},
    ],
)
def test_masks_that_are_none(tmp_path: Path, mask: object) -> None:
    path = save(make_prediction(), tmp_path)["json"]
    record = json.loads(path.read_text())
    record["slots"][0]["mask"] = mask
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="no saved prediction"):
        load_prediction(path)


def test_every_damaged_byte_of_the_arrays_is_refused_by_name(tmp_path: Path) -> None:
    paths = save(make_prediction(), tmp_path)
    whole = paths["arrays"].read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(whole), size=60):
        paths["arrays"].write_bytes(whole[:place] + b"\x81\x7f" + whole[place + 2 :])
        try:
            load_prediction(paths["json"])
        except DataError:
            refused += 1
    assert refused > 45  # a few bytes are names and times that nobody reads


def test_slots_of_another_answer(tmp_path: Path) -> None:
    path = save(make_prediction(), tmp_path)["json"]
    record = json.loads(path.read_text())
    record["slots"].pop()
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="slots beside"):
        load_prediction(path)


def test_a_folder_of_that_name(tmp_path: Path) -> None:
    paths = save(make_prediction(), tmp_path)
    paths["json"].unlink()
    paths["json"].mkdir()
    with pytest.raises(DataError, match="no saved prediction"):
        load_prediction(paths["json"])
