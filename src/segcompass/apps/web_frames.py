"""What the web page shows of an answer: whole pages in sandboxed frames, built as the report is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from segcompass.apps import report_layers as layers
from segcompass.apps.pages import render
from segcompass.apps.report import card
from segcompass.apps.visible import visible
from segcompass.explain.intervene import Intervention
from segcompass.explain.provenance import SlotProvenance, token_label
from segcompass.interfaces.registry import find
from segcompass.io.outputs import slot_colour
from segcompass.io.readings import code_matrix
from segcompass.types import Prediction, Status, given

LISTED = 40  # concepts of a slot that a word or patch is looked up in
SHOWN = 10  # of these, concepts listed unasked
STYLES = ("report.css", "frame.css")


class Row(NamedTuple):
    """One concept of a list."""

    concept: int
    weight: float
    share: float  # |weight|, relative to the heaviest of the list
    mostly_on: str  # the token that counts most


class Listing(NamedTuple):
    """The heaviest concepts of a slot, or of all slots that count."""

    slot: int | str  # "all"
    traced: bool  # weights are what the concepts add to the confidence, not what the slot read
    rows: list[Row]


def can_be_changed(prediction: Prediction) -> bool:
    """Whether the answer's concepts can be traced, and the head run again without some of them."""
    return find(prediction.interface).has_concepts


def answer_frame(prediction: Prediction, traced: Sequence[SlotProvenance] = ()) -> str:
    """An answer to explore: picture, slots, words, and concepts that can be turned up or down.

    Of other interfaces it is what the report shows.

    Args:
        prediction: what was found.
        traced: provenance of some of its slots; of others, what they read is listed.
    """
    lists = listings(prediction, traced) if can_be_changed(prediction) else []
    page = render(
        "answer.html.j2",
        styles=STYLES,
        scripts=["report.js", "answer.js", "frame.js"],
        card=card(0, prediction, {row.concept for listing in lists for row in listing.rows}),
        lists=lists,
        shown=SHOWN,
    )
    return _frame(page, "The answer: picture, chain of thought, slots and all that led to them")


def listings(prediction: Prediction, traced: Sequence[SlotProvenance] = ()) -> list[Listing]:
    """Concepts of all slots that count together, then of each slot."""
    codes = code_matrix(prediction).tocoo()
    tokens, concepts = codes.row, codes.col
    attention = given(prediction.slot_attention, "slot attention")
    read = attention[:, tokens] * codes.data  # (K, nnz)
    pairs = dict(enumerate(read))
    causes = {slot.slot: slot.confidence.weights for slot in traced}
    counted = np.flatnonzero(prediction.accepted).tolist() or list(pairs)
    whole = causes if causes else {slot: pairs[slot] for slot in counted}
    lists: dict[int | str, tuple[bool, np.ndarray]] = {
        "all": (bool(causes), np.sum([*whole.values()], axis=0))
    }
    lists |= {slot: (slot in causes, causes.get(slot, pairs[slot])) for slot in pairs}
    return [
        Listing(slot, is_cause, _rows(prediction, tokens, concepts, weights))
        for slot, (is_cause, weights) in lists.items()
    ]


def _rows(
    prediction: Prediction, tokens: np.ndarray, concepts: np.ndarray, weights: np.ndarray
) -> list[Row]:
    totals = np.bincount(concepts, weights)
    order = np.argsort(-np.abs(totals), kind="stable")[:LISTED]
    rows = []
    for concept in order[totals[order] != 0].tolist():
        own = np.flatnonzero(concepts == concept)
        token = int(tokens[own[np.abs(weights[own]).argmax()]])
        share = abs(totals[concept] / totals[order[0]])
        rows.append(
            Row(concept, float(totals[concept]), float(share), token_label(prediction, token))
        )
    return rows


def comparison_frame(found: Intervention) -> str:
    """Masks, heatmaps and confidences before and after."""
    height, width = found.before.image_rgb.shape[:2]
    sides = {"Before": found.before, "After": found.after}
    page = render(
        "comparison.html.j2",
        styles=STYLES,
        scripts=["frame.js"],
        photo=layers.picture(found.before),
        ratio=f"{width} / {height}",
        edits=", ".join(map(str, found.edits)),
        answer_iou=found.answer_iou,
        sides=[_side(name, prediction) for name, prediction in sides.items()],
        slots=[_slot(found, row) for row in found.slot_rows()],
    )
    return _frame(page, "Before and after the change")


def _side(name: str, prediction: Prediction) -> dict[str, Any]:
    accepted = np.flatnonzero(prediction.accepted).tolist()
    verdict = counted(len(accepted))
    return {
        "name": name,
        "verdict": verdict,
        "masks": [layers.mask_layer(prediction, slot) for slot in accepted],
        "alt": f"{name}: the picture with {verdict}"
        + "".join(f", slot {k} at {100 * prediction.slot_masks[k].mean():.1f} %" for k in accepted),
    }


def _slot(found: Intervention, row: dict[str, Any]) -> dict[str, Any]:
    pixels = found.before.slot_masks[0].size
    return row | {
        "confidence_change": round(row["confidence_change"], 2) + 0.0,  # no "-0.00"
        "colour": "rgb({}, {}, {})".format(*slot_colour(row["slot"])),
        "heat": [layers.heat_layer(side, row["slot"]) for side in (found.before, found.after)],
        "areas": [100 * row[f"area_{when}"] / pixels for when in ("before", "after")],
    }


def thinking(text: str) -> str:
    """The chain of thought while it is written."""
    thought = text.partition("<think>")[2].partition("</think>")[0].strip()
    return _live("Thinking", f'<p class="thinking" dir="auto">{escape(visible(thought))}</p>')


def note(text: str, *, busy: bool = False) -> str:
    """One line on where things stand."""
    return _live(text) if busy else f'<p class="note">{escape(visible(text))}</p>'


def problem(error: BaseException) -> str:
    """What went wrong, for whoever asked."""
    return f'<p class="note problem" role="alert">{escape(visible(str(error)))}</p>'


def _live(text: str, more: str = "") -> str:
    return f'<p class="note busy" role="status">{escape(text)}</p>{more}'


def verdict(prediction: Prediction) -> str:
    """What was found, in a few words."""
    if prediction.status in (Status.MALFORMED, Status.TRUNCATED):
        return f"The answer came out {prediction.status.value}, so there is no mask."
    seconds = sum(prediction.timings.values())
    return f"Found {counted(int(prediction.accepted.sum()))} in {seconds:.1f} s."


def counted(masks: int) -> str:
    """A number of masks in words."""
    return {0: "nothing that matches", 1: "1 mask"}.get(masks, f"{masks} masks")


def _frame(page: str, title: str) -> str:
    """A page of its own: it runs its one script, and reaches neither this page nor any other."""
    return f'<iframe sandbox="allow-scripts" title="{title}" srcdoc="{escape(page)}"></iframe>'
