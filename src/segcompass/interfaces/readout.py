"""What an alignment and its masks say about one picture, as the fields of a `Prediction`."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from segcompass.geometry import Frame, masks_to_image
from segcompass.interfaces.base import Alignment
from segcompass.types import Status


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
    slots = alignment.slots
    scores = slots.confidence_logits[row].sigmoid()
    accepted = (scores > threshold) & (status == Status.OK)
    masks = masks_to_image(low_res[row], frame) > 0
    heatmaps = masks_to_image(slots.heatmap_logits[row].sigmoid(), frame)
    nothing = status == Status.OK and not accepted.any()
    return {
        "status": Status.NO_TARGET if nothing else status,
        "threshold": threshold,
        "slot_masks": to_numpy(masks),
        "slot_scores": to_numpy(scores),
        "accepted": to_numpy(accepted),
        "slot_heatmaps": to_numpy(heatmaps),
        "heatmap_logits": to_numpy(slots.heatmap_logits[row]),
        "head_scores": to_numpy(slots.scores[row]),
        "low_res_logits": to_numpy(low_res[row]),
        "slot_queries": to_numpy(alignment.queries[row]),
        "concept_vectors": to_numpy(alignment.concept_vectors[row]),
    }


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array on the host; half precision becomes fp32."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
