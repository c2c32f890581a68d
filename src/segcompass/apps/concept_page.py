"""The page of concept cards: one searchable HTML file for thousands of concepts, with no server.

Cards travel as compact JSON and are built by ``templates/concepts.js`` when they come into view.
Each picture stands once on one of a few sheets, from which all of its patches are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from segcompass.apps.pages import data_uri, render
from segcompass.apps.visible import visible
from segcompass.explain.concept_cards import CLEAR, Card
from segcompass.explain.concept_counts import EDGES
from segcompass.explain.vocabulary import FAMILIES
from segcompass.io.files import write_whole
from segcompass.io.images import load_image

CELL = 104  # px, the longer side of a picture on a sheet
SHEET = 12  # pictures along a side of a sheet
MENTIONS = 3


def write_concept_page(
    cards: Sequence[Card],
    pictures: Mapping[int, Path],
    path: Path,
    *,
    title: str,
    summary: Sequence[str],
) -> Path:
    """Write the page.

    Args:
        cards: one for each concept.
        pictures: files by image id.
        path: the file to write; its folder is made if it is not there.
        title: heading of the page.
        summary: short facts for the line under it.

    Raises:
        ImageError: a picture cannot be read.
    """
    used = dict.fromkeys(patch.image_id for card in cards for patch in card.patches)
    sheets, places = _sheets([pictures[image_id] for image_id in used])
    numbers = {image_id: number for number, image_id in enumerate(used)}
    held = {card.label.features[0].family for card in cards if card.label and card.f1 >= CLEAR}
    data = {
        "cards": [_row(card, numbers) for card in cards],
        "pictures": places,
        "cell": CELL,
        "clear": CLEAR,
        "edges": [round(float(edge), 4) for edge in EDGES],
        "families": [family for family in FAMILIES if family in held],
    }
    page = render(
        "concepts.html.j2",
        styles=["report.css", "concepts.css"],
        scripts=["concepts.js"],
        title=title,
        summary=list(summary),
        clear=CLEAR,
        sheets=sheets,
        data=data,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _sheets(paths: Sequence[Path]) -> tuple[list[str], list[list[int]]]:
    """Pictures on sheets, as data URIs; of each its sheet, column, row, width and height there."""
    sheets: list[str] = []
    places: list[list[int]] = []
    for start in range(0, len(paths), SHEET**2):
        group = paths[start : start + SHEET**2]
        rows = -(-len(group) // SHEET)
        sheet = Image.new("RGB", (min(len(group), SHEET) * CELL, rows * CELL))
        for number, path in enumerate(group):
            row, column = divmod(number, SHEET)
            picture = Image.fromarray(load_image(path))
            picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS, reducing_gap=2.0)
            sheet.paste(picture, (column * CELL, row * CELL))
            places.append([len(sheets), column, row, *picture.size])
        sheets.append(data_uri(sheet, "WEBP", quality=72))
    return sheets, places


def _row(card: Card, numbers: Mapping[int, int]) -> dict[str, Any]:
    """A card as the page's script reads it."""
    label = card.label
    score = label.held_out if label is not None else None
    return {
        "id": card.concept,
        "label": visible(_title(card)),
        "tested": visible(str(label)) if label is not None else "",
        "family": label.features[0].family if label is not None else "",
        "f1": -1 if score is None else round(score.f1, 3),
        "precision": 0 if score is None else round(score.precision, 3),
        "recall": 0 if score is None else round(score.recall, 3),
        "threshold": 0 if label is None else round(label.threshold, 4),
        "reach": card.reach,
        "density": float(f"{card.density:.3g}"),
        "fired": list(card.fired),
        "largest": round(card.largest, 2),
        "histogram": list(card.histogram),
        "words": [[visible(word), round(share, 2)] for word, share in card.words],
        "patches": [
            [numbers[patch.image_id], *patch.box, round(patch.activation, 2)]
            for patch in card.patches
        ],
        "mentions": [
            [*(visible(part) for part in (m.before, m.token, m.after)), round(m.activation, 2)]
            for m in card.mentions[:MENTIONS]
        ],
        "together": [[concept, round(value, 2)] for concept, value in card.together],
        "neighbours": [[concept, round(value, 2)] for concept, value in card.neighbours],
    }


def _title(card: Card) -> str:
    """The label where it holds; else the words that carry the concept, or the label as a guess."""
    if card.label is not None and (card.f1 >= CLEAR or card.reach == "image" or not card.words):
        return str(card.label)
    return ", ".join(f"“{word}”" for word, _ in card.words[:3]) or f"concept {card.concept}"
