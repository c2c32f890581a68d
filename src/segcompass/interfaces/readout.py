"""What an alignment and its masks say about one picture, as the fields of a `Prediction`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from segcompass.concepts.sparse_codes import select_rows, to_host
from segcompass.geometry import Frame, masks_to_image
from segcompass.interfaces.base import Alignment
from segcompass.types import Status, TokenKind


def read_out(
    alignment: Alignment,
    low_res: Float[Tensor, "B K 4h 4w"],
    row: int,
    *,
    frame: Frame,
    status: Status,
    threshold: float,
) -> dict[str, Any]:
    """Everything that the head and the decoder decide about row ``row`` of a batch, on the host.

    Args:
        alignment: of the whole batch.
        low_res: mask logits over the square frame.
        row: which picture.
        frame: its place in the square frame.
        status: how its answer ended; only the slots of a well-formed answer can be accepted.
        threshold: confidence above which a slot's mask counts.

    Returns:
        Fields of :class:`segcompass.types.Prediction` by name; the status becomes ``NO_TARGET``
        where a well-formed answer has no accepted slot.
    """
    scores = alignment.confidence_logits[row].sigmoid()
    accepted = (scores > threshold) & (status == Status.OK)
    masks = masks_to_image(low_res[row], frame) > 0
    nothing = status == Status.OK and not accepted.any()
    slots = alignment.slots
    heatmaps = None if slots is None else masks_to_image(slots.heatmap_logits[row].sigmoid(), frame)
    return {
        "status": Status.NO_TARGET if nothing else status,
        "threshold": threshold,
        "slot_masks": to_numpy(masks),
        "slot_scores": to_numpy(scores),
        "accepted": to_numpy(accepted),
        "low_res_logits": to_numpy(low_res[row]),
        "slot_heatmaps": None if heatmaps is None else to_numpy(heatmaps),
        "heatmap_logits": None if slots is None else to_numpy(slots.heatmap_logits[row]),
        "head_scores": None if slots is None else to_numpy(slots.scores[row]),
        "slot_queries": _row(alignment.queries, row),
        "concept_vectors": _row(alignment.concept_vectors, row),
        "prompts": None if alignment.prompts is None else alignment.prompts[row],
    }


def read_tokens(alignment: Alignment, kinds: Int[Tensor, "B L"], row: int) -> dict[str, Any]:
    """What an alignment says about the tokens of row ``row``: its codes, and who reads them.

    Args:
        alignment: of the whole batch.
        kinds: of the batch's tokens (``TokenKind``); padding is left out.
        row: which answer.

    Returns:
        Fields of :class:`segcompass.types.Prediction` by name.
    """
    real = kinds[row] != TokenKind.PADDING
    fields: dict[str, Any] = dict.fromkeys(("codes", "slot_attention", "sae_errors"))
    if alignment.codes is not None:
        rows = torch.zeros_like(kinds, dtype=torch.bool)
        rows[row] = real
        fields["codes"] = to_host(select_rows(alignment.codes, rows.flatten()))
    if alignment.slot_attention is not None:
        fields["slot_attention"] = to_numpy(alignment.slot_attention[row][:, real])
    if alignment.sae_errors is not None:
        fields["sae_errors"] = to_numpy(alignment.sae_errors[row][real])
    return fields


def _row(part: Tensor | None, row: int) -> np.ndarray | None:
    return None if part is None else to_numpy(part[row])


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array on the host; half precision becomes fp32."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
