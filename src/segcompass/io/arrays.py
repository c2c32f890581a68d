"""The arrays of a prediction as an NPZ file holds them, both ways; see ``docs/outputs.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from segcompass.types import Prediction, SparseCodes

AS_NAMED = ("low_res_logits", "accepted", "token_boxes")  # fields saved under their own names
WHERE_KNOWN = (  # likewise, unless the interface has none
    "heatmap_logits",
    "head_scores",
    "concentration_states",
    "slot_queries",
    "concept_vectors",
    "slot_attention",
    "image_attention",
    "sae_errors",
)


def to_arrays(prediction: Prediction) -> dict[str, Any]:
    """The arrays by name; what the prediction does not have is left out."""
    arrays = {name: getattr(prediction, name) for name in (*AS_NAMED, *WHERE_KNOWN)}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    arrays |= {
        "scores": prediction.slot_scores,
        "image": prediction.image_rgb,
        "tokens": np.array(prediction.tokens),
        "token_kinds": prediction.token_kinds.astype(np.int8),
        "paths": np.array(prediction.paths),
    }
    if prediction.slot_heatmaps is not None:
        arrays["heatmaps"] = prediction.slot_heatmaps.astype(np.float16)
    codes = prediction.codes
    if codes is not None:
        arrays |= {
            "code_rows": codes.rows.cpu().numpy().astype(np.int32),
            "code_columns": codes.columns.cpu().numpy().astype(np.int32),
            "code_values": codes.values.detach().float().cpu().numpy(),
            "n_concepts": np.array(codes.n_columns),
        }
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of a `Prediction`, of the arrays that :func:`to_arrays` made.

    Raises:
        KeyError: if one is missing that every prediction has.
    """
    fields: dict[str, Any] = {name: arrays[name] for name in AS_NAMED}
    fields |= {name: arrays.get(name) for name in WHERE_KNOWN}
    heatmaps = arrays.get("heatmaps")
    return fields | {
        "slot_scores": arrays["scores"],
        "image_rgb": arrays["image"],
        "tokens": tuple(arrays["tokens"].tolist()),
        "token_kinds": arrays["token_kinds"].astype(np.int64),
        "paths": str(arrays["paths"]),
        "slot_heatmaps": None if heatmaps is None else heatmaps.astype(np.float32),
        "codes": _codes(arrays) if "n_concepts" in arrays else None,
    }


def _codes(arrays: Mapping[str, np.ndarray]) -> SparseCodes:
    return SparseCodes(
        rows=torch.from_numpy(arrays["code_rows"].astype(np.int64)),
        columns=torch.from_numpy(arrays["code_columns"].astype(np.int64)),
        values=torch.from_numpy(arrays["code_values"]),
        n_rows=len(arrays["tokens"]),
        n_columns=int(arrays["n_concepts"]),
    )
