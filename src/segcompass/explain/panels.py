"""Answers to look at: instruction, picture, activated tokens, heatmap, mask in a row (Fig. 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segcompass.explain.correlation import SHOWS, Quality, shows
from segcompass.explain.figures import INK, SOFT, STYLE, save_figure
from segcompass.explain.instance_coverage import magnitudes
from segcompass.io.outputs import overlay
from segcompass.io.sheets import plain
from segcompass.types import Prediction, given

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_TOKENS = 0.3  # share of the image tokens that are marked
_WRAP = 24  # characters


def draw_panels(answers: Sequence[tuple[Prediction, Quality]], stem: Path) -> None:
    """One row for each answer, without the columns that not every answer can fill.

    Activated tokens are the most activated ones, squares that are the stronger the more activated;
    the heatmap is the largest of the accepted slots, of all slots where none is accepted.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "axes.grid": False}):
        rows = max(len(answers), 1)
        columns = _columns([prediction for prediction, _ in answers])
        size = (1.44 * len(columns), 1.42 * rows + 0.25)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, len(columns), squeeze=False)
        for axes, (prediction, quality) in zip(grid[: len(answers)], answers, strict=True):
            for axis, title in zip(axes, columns, strict=True):
                axis.set_axis_off()
                axis.set_box_aspect(prediction.image_rgb.shape[0] / prediction.image_rgb.shape[1])
                COLUMNS[title](axis, prediction, quality)
        for axis, title in zip(grid[0], columns, strict=True):
            axis.set_title(title, loc="center", color=SOFT, fontweight="normal", fontsize=8)
        save_figure(figure, stem)


def _columns(predictions: Sequence[Prediction]) -> list[str]:
    """The titles of the columns that every answer can fill."""
    shown = {None, *SHOWS}.intersection(*({None, *shows(p)} for p in predictions))
    return [title for title in COLUMNS if _NEEDS.get(title) in shown]


def _words(axis: Axes, prediction: Prediction, quality: Quality) -> None:
    words = _wrap(plain(prediction.instruction))
    axis.text(0, 0.56, words, ha="left", va="center", fontsize=8, color=INK, parse_math=False)
    note = f"IoU {quality.mask_iou:.2f}"
    axis.text(0, 0.06, note, ha="left", va="bottom", fontsize=7, color=SOFT)


def _image(axis: Axes, prediction: Prediction, quality: Quality) -> None:
    axis.imshow(prediction.image_rgb)


def _heatmap(axis: Axes, prediction: Prediction, quality: Quality) -> None:
    every = given(prediction.slot_heatmaps, "heatmaps")
    accepted = every[prediction.accepted]
    warmth = (accepted if len(accepted) else every).max(axis=0)
    axis.imshow(_dimmed(prediction.image_rgb))
    axis.imshow(warmth, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.8 * warmth)


def _mask(axis: Axes, prediction: Prediction, quality: Quality) -> None:
    axis.imshow(overlay(prediction))


def _tokens(axis: Axes, prediction: Prediction, quality: Quality) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(_dimmed(prediction.image_rgb))
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


COLUMNS: dict[str, Callable[[Axes, Prediction, Quality], None]] = {
    "instruction": _words,
    "image": _image,
    "activated tokens": _tokens,
    "heatmap": _heatmap,
    "predicted mask": _mask,
}
_NEEDS = {"activated tokens": "concepts", "heatmap": "heatmaps"}
