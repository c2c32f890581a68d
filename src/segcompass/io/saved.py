"""Predictions read back from the files that `segcompass.io.outputs.save` wrote."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segcompass.io import masks as mask_io
from segcompass.io.errors import DataError
from segcompass.io.outputs import SCHEMA
from segcompass.types import Prediction, SparseCodes, Status

_AS_SAVED = (
    "accepted",
    "heatmap_logits",
    "head_scores",
    "low_res_logits",
    "concentration_states",
    "slot_queries",
    "concept_vectors",
    "slot_attention",
    "token_boxes",
)


def load_prediction(path: str | Path) -> Prediction:
    """Read a saved prediction; it can be analysed and replayed as a live one can.

    Args:
        path: its ``STEM.json``; the ``STEM.npz`` beside it is read too.

    Returns:
        The prediction as it was saved: heatmaps went through half precision, everything that a
        replay reads is exact.

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
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: is no saved prediction, or {arrays_path.name} is not its own ({error!r}); "
            "run predict --out again"
        ) from error


def _prediction(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Prediction:
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema {record['schema']!r} instead of {SCHEMA!r}")
    tokens = tuple(arrays["tokens"].tolist())
    codes = SparseCodes(
        rows=torch.from_numpy(arrays["code_rows"].astype(np.int64)),
        columns=torch.from_numpy(arrays["code_columns"].astype(np.int64)),
        values=torch.from_numpy(arrays["code_values"]),
        n_rows=len(tokens),
        n_columns=int(arrays["n_concepts"]),
    )
    return Prediction(
        **{name: arrays[name] for name in _AS_SAVED},
        instruction=record["instruction"],
        status=Status(record["status"]),
        text=record["text"],
        reasoning=record["reasoning"],
        image_rgb=arrays["image"],
        slot_masks=np.stack([mask_io.decode(slot["mask"]) for slot in record["slots"]]),
        slot_scores=arrays["scores"],
        slot_heatmaps=arrays["heatmaps"].astype(np.float32),
        codes=codes,
        tokens=tokens,
        token_kinds=arrays["token_kinds"].astype(np.int64),
        threshold=record["threshold"],
        model=record["model"],
        timings=record["timings"],
        source=record["source"],
        sae_errors=arrays.get("sae_errors"),
        paths=str(arrays["paths"]),
    )
