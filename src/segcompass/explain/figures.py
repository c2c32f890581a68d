"""Draw what was measured: figures as SVG and PNG, their data as CSV beside them (extra ``viz``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segcompass.explain.correlation import Correlation
from segcompass.io.assets import MissingAssetError
from segcompass.io.files import bytes_of, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#23211d", "#6c675e", "#e9e5dc"
# Colours of the token types, kept apart in print and by colour-blind readers by marker and dash.
TYPES: dict[str, tuple[str, str, str]] = {
    "instance": ("#e8593c", "o", "-"),
    "thought": ("#2f7cd6", "s", "-"),
    "question": ("#1c9e6c", "^", "--"),
    "background": ("#8a857b", "D", ":"),
}
MAIN, CHANCE = "#e8593c", "#8a857b"
BARS = (("heatmap", "#2f7cd6"), ("mask", MAIN))  # drawn where there are such maps
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "semibold",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "segcompass",  # equal data, equal bytes
}

SAVED: dict[str, Any] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 200}}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys; numbers in full, None as nothing."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def check_drawing() -> None:
    """Find out before any work whether figures can be drawn.

    Raises:
        MissingAssetError: without the extra ``viz``.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingAssetError(
            f"figures need matplotlib ({error}); install it with: pip install 'segcompass[viz]'"
        ) from error


def draw_patterns(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Active concepts by token type over thresholds (Fig. 4)."""
    with _canvas(stem, (3.6, 2.7)) as axis:
        for name, (colour, marker, dash) in TYPES.items():
            own = [row for row in rows if row["tokens"] == name and row["threshold"] > 0]
            if not own:
                continue
            x = [row["threshold"] for row in own]
            axis.plot(
                x,
                [row["active"] for row in own],
                color=colour,
                linestyle=dash,
                marker=marker,
                markevery=(4, 8),
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.5,
                label=name,
            )
            low, high = [r["low"] for r in own], [r["high"] for r in own]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xlim(1e-3, _end(rows))
        axis.set_ylim(bottom=0)
        axis.set_xlabel("activation threshold τ")
        axis.set_ylabel("active concepts per token")
        axis.legend(loc="upper right")


def _end(rows: Sequence[Mapping[str, Any]]) -> float:
    """The first threshold at which nothing is left worth drawing."""
    return max((row["threshold"] for row in rows if row["active"] > 0.02), default=1.0) * 1.3


def draw_coverage(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Instance coverage by the top K % of the image tokens, against random (Fig. 5)."""
    with _canvas(stem, (3.6, 2.7)) as axis:
        x = [row["percent"] for row in rows]
        low, high = ([100 * row[f"coverage_{end}"] for row in rows] for end in ("low", "high"))
        axis.fill_between(x, low, high, color=MAIN, alpha=0.18, linewidth=0)
        found, chance = ([100 * row[name] for row in rows] for name in ("coverage", "random"))
        axis.plot(x, found, color=MAIN, linewidth=1.6, marker="o", markersize=3.5, label="top K %")
        axis.plot(x, chance, color=CHANCE, linewidth=1.4, linestyle="--", label="random K %")
        axis.set_xlim(0, 100)
        axis.set_ylim(0, 100)
        axis.set_xlabel("K, % of image tokens")
        axis.set_ylabel("instance pixels covered, %")
        axis.legend(loc="lower right")


def draw_correlation(found: Correlation, stem: Path) -> None:
    """Points, OLS line and the 95 % band of the mean (Fig. 8)."""
    with _canvas(stem, (3.4, 2.8)) as axis:
        _scatter(axis, found)
        axis.set_xlabel(found.x_label)
        axis.set_ylabel(found.y_label)


def _scatter(axis: Axes, found: Correlation) -> None:
    size, alpha = (14, 0.55) if len(found.x) < 300 else (7, 0.3)
    axis.scatter(found.x, found.y, s=size, color="#2f7cd6", alpha=alpha, linewidth=0)
    if found.line is None:
        axis.set_title(f"n = {len(found.x)}, no line fits", color=SOFT, fontweight="normal")
        return
    x = np.linspace(found.x.min(), found.x.max(), 100)
    low, high = found.line.band(x)
    axis.fill_between(x, low, high, color=MAIN, alpha=0.22, linewidth=0)
    axis.plot(x, found.line.intercept + found.line.slope * x, color=MAIN, linewidth=1.6)
    axis.margins(0.04)
    title = f"r = {found.line.r:.2f},  {p_value(found.line.p)},  n = {found.line.n}"
    axis.set_title(title, color=INK, fontweight="normal")


def p_value(p: float) -> str:
    """As papers print it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def draw_thoughts(ranges: Sequence[Mapping[str, Any]], found: Correlation, stem: Path) -> None:
    """Masks by chain-of-thought quality, and by range of how well it concludes (CoPRS)."""
    with _canvas(stem, (6.4, 2.8), columns=2) as (left, right):
        _scatter(left, found)
        left.set_xlabel(found.x_label)
        left.set_ylabel(found.y_label)
        places = np.arange(len(ranges))
        bars = [bar for bar in BARS if all(f"{bar[0]}_iou" in row for row in ranges)]
        for i, (name, colour) in enumerate(bars):
            shift = 0.38 * (i - (len(bars) - 1) / 2)
            means = np.array([row[f"{name}_iou"] for row in ranges])
            ends = np.array([row[f"{name}_iou_interval"] for row in ranges]).reshape(-1, 2).T
            right.bar(places + shift, means, 0.36, color=colour, alpha=0.85, label=f"{name} IoU")
            reach = np.clip([means - ends[0], ends[1] - means], 0, None) if len(means) else None
            right.errorbar(
                places + shift, means, reach, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2
            )
        labels = [f"{row['low']:.2f}–{row['high']:.2f}\nn = {row['samples']}" for row in ranges]
        right.set_xticks(places, labels)
        right.grid(visible=False, axis="x")
        right.set_ylim(0, 1)
        right.set_xlabel("F1 of the concluded things")
        right.set_ylabel("mean IoU")
        right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


@contextmanager
def _canvas(stem: Path, size: tuple[float, float], columns: int = 1) -> Iterator[Any]:
    """Axes to draw on (an array of them if there are several columns), saved on leaving."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(1, columns)
        save_figure(figure, stem)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write STEM.svg and STEM.png."""
    for kind, options in SAVED.items():
        save = partial(figure.savefig, format=kind, **options)
        write_whole(stem.with_suffix(f".{kind}"), bytes_of(save))
