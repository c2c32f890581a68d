"""Predictions read back from the files that `segcompass.io.outputs.save` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segcompass.io import masks as mask_io
from segcompass.io.arrays import from_arrays
from segcompass.io.errors import DataError
from segcompass.io.outputs import SCHEMA
from segcompass.types import BoxPrompts, Candidates, Prediction, Status


def load_prediction(path: str | Path) -> Prediction:
    """Read a saved prediction; it can be analysed and replayed as a live one can.

    Args:
        path: its ``STEM.json``; the ``STEM.npz`` beside it is read too.

    Returns:
        The prediction as it was saved: heatmaps went through half precision, everything that a
        replay reads is exact, and what was not there is None.

    Raises:
        DataError: a file is missing, damaged, or no saved prediction.
    """
    path = Path(path)
    arrays_path = path.with_suffix(".npz")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        with np.load(arrays_path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _prediction(record, arrays)
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename}: no such file; a saved prediction is a JSON file and an NPZ file of "
            "the same name, as predict --out writes them"
        ) from error
    except Exception as error:  # parsers of untrusted bytes may raise anything; named here
        raise DataError(
            f"{path}: is no saved prediction, or {arrays_path.name} is not its own ({error!r}); "
            "run predict --out again"
        ) from error


def _prediction(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Prediction:
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema {record['schema']!r} instead of {SCHEMA!r}")
    slots, hw = record["slots"], arrays["image"].shape[:2]
    as_written = ("instruction", "text", "reasoning", "threshold", "model", "timings", "source")
    if len(slots) != len(arrays["scores"]):
        raise ValueError(f"{len(slots)} slots beside {len(arrays['scores'])} scores")
    added = ("interface", "fingerprint")  # to the schema; older files have them not
    return Prediction(
        **from_arrays(arrays),
        **{name: record[name] for name in as_written},
        **{name: record[name] for name in added if name in record},
        status=Status(record["status"]),
        slot_masks=np.stack(_masks(slots, hw)),
        prompts=_prompts(slots) if "prompt" in slots[0] else None,
        candidates=_candidates(record["candidates"], hw) if "candidates" in record else None,
    )


def _masks(rows: Sequence[Mapping[str, Any]], hw: tuple[int, ...]) -> list[np.ndarray]:
    """The masks, each as large as the picture; of another size none is unpacked."""
    sizes = [row["mask"]["size"] for row in rows]
    if odd := [size for size in sizes if size != list(hw)]:
        raise ValueError(f"a mask of size {odd[0]} on a picture of size {list(hw)}")
    return [mask_io.decode(row["mask"]) for row in rows]


def _prompts(slots: Sequence[Mapping[str, Any]]) -> BoxPrompts:
    named = [slot["prompt"] or {"box": [np.nan] * 4, "points": []} for slot in slots]
    most = max([1, *(len(prompt["points"]) for prompt in named)])
    points = np.full((len(named), most, 2), np.nan, dtype=np.float32)
    for row, prompt in zip(points, named, strict=True):
        row[: len(prompt["points"])] = np.reshape(prompt["points"], (-1, 2))
    boxes = np.array([prompt["box"] for prompt in named], dtype=np.float32)
    return BoxPrompts(boxes, points)


def _candidates(rows: Sequence[Mapping[str, Any]], hw: tuple[int, ...]) -> Candidates:
    chosen = [row["chosen"] for row in rows]
    masks = _masks(rows, hw)
    return Candidates(
        masks=np.stack(masks) if masks else np.zeros((0, *hw), dtype=bool),
        scores=np.array([row["score"] for row in rows], dtype=np.float32),
        sources=tuple(row["source"] for row in rows),
        thoughts=tuple(row["thought"] for row in rows),
        chosen=chosen.index(True) if any(chosen) else None,
    )
