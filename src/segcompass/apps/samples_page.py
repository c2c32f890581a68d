"""``samples.html`` of a run: browse the worst, the best and the most doubtful answers.

One self-contained file, see ``pages.py``; filters and sorting are in ``templates/samples.js``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from scipy import ndimage

from segcompass.apps.pages import data_uri, render
from segcompass.evaluation.picks import GROUPS, Pick, pick
from segcompass.evaluation.run_log import ROWS, read_figures
from segcompass.io import masks
from segcompass.io.errors import SegCompassError
from segcompass.io.files import write_whole
from segcompass.io.images import load_image
from segcompass.types import Rle

PAGE = "samples.html"
SIDE = 360  # px, longest side of a picture
LINE = 3  # px
PREDICTED, TRUE, CASING = (242, 176, 17), (255, 255, 255), (24, 22, 18)
TITLES = {"worst": "Worst", "best": "Best", "doubtful": "Most doubtful", "random": "Random"}
STATUSES = {
    "ok": "masks",
    "no_target": "nothing matches",
    "malformed": "malformed",
    "truncated": "truncated",
}
HEADLINE = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "format_valid": "well-formed",
}


def write_samples_page(run: Path) -> Path:
    """Write the page of a finished run into its folder.

    Args:
        run: folder that holds ``samples.jsonl`` and ``metrics.json``.

    Returns:
        The path of the page.

    Raises:
        DataError: the folder holds no finished run.
    """
    figures = read_figures(run)
    picks = pick(run / ROWS, figures["threshold"])
    page = render(
        "samples.html.j2",
        styles=["report.css", "samples.css"],
        scripts=["samples.js"],
        title=f"{PurePath(figures['model']).name} on {figures['split']}",
        data=figures["data"],
        samples=figures["samples"],
        headline=[(name, figures[key]) for key, name in HEADLINE.items()],
        groups=[(name, TITLES[name], sum(name in p.groups for p in picks)) for name in GROUPS],
        kinds=[(kind, kind) for kind in _values(picks, "kind")],
        statuses=[(status, STATUSES[status]) for status in _values(picks, "status")],
        targets=[(number, number) for number in _values(picks, "targets")],
        cards=[_card(number, chosen, figures["threshold"]) for number, chosen in enumerate(picks)],
    )
    path = run / PAGE
    write_whole(path, page)
    return path


def _values(picks: Sequence[Pick], key: str) -> list[Any]:
    """What a filter offers."""
    return sorted({p.row[key] for p in picks if p.row[key] is not None})


def _card(number: int, chosen: Pick, threshold: float) -> dict[str, Any]:
    row = chosen.row
    return row | {
        "number": number,
        "groups": " ".join(chosen.groups),
        "margin": chosen.margin,
        "threshold": threshold,
        "status_name": STATUSES[row["status"]],
        "name": PurePath(row["image"].replace("\\", "/")).name,
        "picture": _picture(row),
    }


def _picture(row: dict[str, Any]) -> str | None:
    """The picture with the true outline and, inside it, the predicted one; None if it is gone."""
    try:
        image = Image.fromarray(load_image(row["image"]))
    except SegCompassError:
        return None
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    true, predicted = (_shape(row[key], size) for key in ("truth", "masks"))
    canvas = np.array(image.resize(size, Image.Resampling.LANCZOS))
    rings = (
        (ndimage.binary_dilation(true, iterations=LINE) & ~true, TRUE),
        (predicted & ~ndimage.binary_erosion(predicted, iterations=LINE), PREDICTED),
    )
    canvas[ndimage.binary_dilation(rings[0][0] | rings[1][0])] = CASING
    for ring, colour in rings:
        canvas[ring] = colour
    return data_uri(Image.fromarray(canvas), "WEBP", quality=75)


def _shape(rles: Sequence[Rle], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The union of masks at the size of the picture on the page."""
    if not rles:
        return np.zeros(size[::-1], dtype=bool)
    height, width = rles[0]["size"]
    grey = Image.fromarray(masks.union(rles, (height, width)).astype(np.uint8) * 255)
    smooth: np.ndarray = np.asarray(grey.resize(size, Image.Resampling.BICUBIC)) > 127
    return smooth
