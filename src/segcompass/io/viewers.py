"""Predictions in other tools' forms: `supervision` and matplotlib, both from the extra ``viz``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from segcompass.io.outputs import overlay

if TYPE_CHECKING:
    from segcompass.types import Prediction


def to_supervision(prediction: Prediction) -> Any:
    """A ``supervision.Detections`` of the masks that count; slot numbers as ``class_id``.

    Raises:
        ImportError: without the extra ``viz``.
    """
    import supervision

    if len(prediction.masks) == 0:
        return supervision.Detections.empty()
    return supervision.Detections(
        xyxy=prediction.boxes,
        mask=prediction.masks,
        confidence=prediction.scores,
        class_id=np.flatnonzero(prediction.accepted),
    )


def plot(prediction: Prediction) -> Any:
    """A matplotlib figure: picture, masks over it, and the heatmaps (if any) of those that count.

    Raises:
        ImportError: without the extra ``viz``.
    """
    from matplotlib.figure import Figure

    panels = [("", prediction.image_rgb), ("masks", overlay(prediction))]
    if prediction.heatmaps is not None:
        looks = zip(prediction.scores, prediction.heatmaps, strict=True)
        panels += [(f"heatmap {score:.2f}", heatmap) for score, heatmap in looks]
    figure = Figure(figsize=(3 * len(panels), 3.4), layout="constrained")
    for axis, (title, picture) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        scale = {"cmap": "magma", "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
        axis.imshow(picture, **scale)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(prediction.instruction, fontsize=10)
    return figure
