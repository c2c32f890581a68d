"""Answers to look at: instruction, picture, activated tokens, heatmap, mask in a row (Fig. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segcompass.explain.correlation import Quality
from segcompass.explain.figures import INK, SOFT, STYLE, save_figure
from segcompass.explain.instance_coverage import magnitudes
from segcompass.io.outputs import overlay
from segcompass.io.sheets import plain
from segcompass.types import Prediction, given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = ("instruction", "image", "activated tokens", "heatmap", "predicted mask")
SHOWN_TOKENS = 0.3  # share of the image tokens that are marked
_WRAP = 24  # characters


def draw_panels(answers: Sequence[tuple[Prediction, Quality]], stem: Path) -> None:
    """One row for each answer.

    Activated tokens are the most activated ones, squares that are the stronger the more activated;
    the heatmap is the largest of the accepted slots, of all slots where none is accepted.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(answers), 1)
        figure = Figure(figsize=(7.2, 1.42 * rows + 0.25), layout="constrained")
        grid = figure.subplots(rows, 5, squeeze=False)
        for axes, (prediction, quality) in zip(grid[: len(answers)], answers, strict=True):
            _row(axes, prediction, quality)
        for axis, title in zip(grid[0], TITLES, strict=True):
            axis.set_title(title, loc="center", color=SOFT, fontweight="normal", fontsize=8)
        save_figure(figure, stem)


def _row(axes: Sequence[Axes], prediction: Prediction, quality: Quality) -> None:
    for axis in axes:
        axis.set_axis_off()
        axis.set_box_aspect(prediction.image_rgb.shape[0] / prediction.image_rgb.shape[1])
    text, image, tokens, heat, mask = axes
    words = _wrap(plain(prediction.instruction))
    text.text(0, 0.56, words, ha="left", va="center", fontsize=8, color=INK, parse_math=False)
    note = f"IoU {quality.mask_iou:.2f}"
    text.text(0, 0.06, note, ha="left", va="bottom", fontsize=7, color=SOFT)
    image.imshow(prediction.image_rgb)
    dim = _dimmed(prediction.image_rgb)
    tokens.imshow(dim)
    _mark(tokens, prediction)
    every = given(prediction.slot_heatmaps, "heatmaps")
    accepted = every[prediction.accepted]
    warmth = (accepted if len(accepted) else every).max(axis=0)
    heat.imshow(dim)
    heat.imshow(warmth, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.8 * warmth)
    mask.imshow(overlay(prediction))


def _mark(axis: Axes, prediction: Prediction) -> None:
    from matplotlib.patches import Rectangle

    strength = magnitudes(prediction)
    shown = np.argsort(-strength, kind="stable")[: max(1, round(SHOWN_TOKENS * len(strength)))]
    most = float(strength.max()) or 1.0
    for token in shown:
        x0, y0, x1, y1 = prediction.token_boxes[token]
        level = float(strength[token]) / most
        box: dict[str, Any] = {"facecolor": "#f2b011", "edgecolor": "white", "linewidth": 0.3}
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, alpha=0.2 + 0.6 * level, **box))


def _dimmed(image: np.ndarray) -> np.ndarray:
    grey = image.mean(axis=-1, keepdims=True)
    return np.asarray(np.rint(0.5 * np.repeat(grey, 3, axis=-1) + 0.12 * image).astype(np.uint8))


def _wrap(text: str, lines: int = 6) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, _WRAP, max_lines=lines, placeholder=" …"))
