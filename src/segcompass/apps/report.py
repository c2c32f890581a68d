"""The static report: one HTML file per run that explains every prediction, with no server.

The page's behaviour is in ``templates/report.js``; what keeps it self-contained in ``pages.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from segcompass.apps import report_layers as layers
from segcompass.apps.pages import render
from segcompass.apps.report_concepts import NO_DATA, read_concepts
from segcompass.apps.report_words import Segment
from segcompass.io.files import write_whole
from segcompass.io.outputs import slot_colour, slot_prompts
from segcompass.types import Prediction, Status

LAYERS = {"tokens": "Tokens", "prompt": "Boxes", "heat": "Heatmap", "masks": "Masks"}

_BADGES = {
    Status.NO_TARGET: "nothing matches",
    Status.MALFORMED: "malformed answer",
    Status.TRUNCATED: "truncated answer",
}
_NOTES = {
    Status.NO_TARGET: "The answer is well-formed, and nothing in it reached the threshold: the "
    "model says that nothing in the picture matches.",
    Status.MALFORMED: "The answer does not have the form that was asked for, so no mask was read "
    "from it. The whole text stands here as it was generated.",
    Status.TRUNCATED: "The answer was cut off before it was complete, so no mask was read from it.",
}


def write_report(
    predictions: Sequence[Prediction], path: str | Path, *, title: str = "SegCompass"
) -> Path:
    """Write one self-contained HTML page about all ``predictions``.

    Args:
        predictions: in the order in which they are to appear.
        path: the file to write; its folder is made if it is not there.
        title: heading of the page.

    Returns:
        The path of the page.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, render_report(predictions, title=title))
    return target


def render_report(predictions: Sequence[Prediction], *, title: str = "SegCompass") -> str:
    """The page of ``write_report`` as text."""
    cards = [card(i, prediction) for i, prediction in enumerate(predictions)]
    return render(
        "report.html.j2",
        styles=["report.css"],
        scripts=["report.js"],
        title=title,
        cards=cards,
        layers={name for each in cards for name in each["layers"]},
        weighed=any(each["candidates"] for each in cards),
        summary=_summary(predictions),
    )


def _summary(predictions: Sequence[Prediction]) -> list[str]:
    """Short counts for the head of the page."""
    counts = {status: sum(p.status is status for p in predictions) for status in Status}
    words = {Status.OK: "with masks"} | _BADGES
    number = len(predictions)
    return [f"{number} {'picture' if number == 1 else 'pictures'}"] + [
        f"{count} {words[status]}" for status, count in counts.items() if count and number > 1
    ]


def card(index: int, prediction: Prediction, also: Iterable[int] = ()) -> dict[str, Any]:
    """Everything that ``card.html.j2`` says about one prediction.

    Args:
        index: tells the cards of one page apart.
        prediction: what to show.
        also: concepts to follow beside those that the card lists itself.
    """
    height, width = prediction.image_rgb.shape[:2]
    concepts = None if prediction.codes is None else read_concepts(prediction, also)
    slots, candidates = _slots(prediction), _candidates(prediction)
    return {
        "id": f"p{index}",
        "name": PurePath(prediction.source.replace("\\", "/")).name if prediction.source else None,
        "width": width,
        "height": height,
        "prediction": prediction,
        "badge": _BADGES.get(prediction.status) or _count(int(prediction.accepted.sum()), "mask"),
        "note": _NOTES.get(prediction.status),
        "instruction": concepts.instruction if concepts else [Segment(prediction.instruction)],
        "thought": concepts.thought if concepts else [Segment(prediction.reasoning)],
        "conclusion": _conclusion(prediction),
        "slots": slots,
        "layers": _layers(prediction, slots),
        "concepts": concepts,
        "candidates": candidates,
        "picture": layers.picture(prediction),
        "thumbnail": layers.thumbnail(prediction),
        "seconds": sum(prediction.timings.values()),
        "data": {"width": width, "height": height, **(concepts.data if concepts else NO_DATA)},
    }


def _layers(prediction: Prediction, slots: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What can be shown over the picture, by name: the switches and their labels."""
    there = {
        "tokens": prediction.codes is not None,
        "prompt": any(slot["prompt"] for slot in slots),
        "heat": prediction.slot_heatmaps is not None,
        "masks": bool(prediction.accepted.any()),
    }
    return {name: label for name, label in LAYERS.items() if there[name]}


def _conclusion(prediction: Prediction) -> str | None:
    """What follows the thought, where it is more than the slots' own tokens."""
    if prediction.prompts is None or not prediction.status.well_formed:
        return None
    return prediction.text.rpartition("</think>")[2].strip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _slots(prediction: Prediction) -> list[dict[str, Any]]:
    """All slots; of an answer in numbers those that it names."""
    number, named = len(prediction.slot_scores), prediction.prompts
    prompts = [None] * number if named is None else slot_prompts(named)
    heatmaps = prediction.slot_heatmaps is not None
    return [
        {
            "index": k,
            "accepted": bool(prediction.accepted[k]),
            "score": float(prediction.slot_scores[k]),
            "colour": "rgb({}, {}, {})".format(*slot_colour(k)),
            "share": float(prediction.slot_masks[k].mean()),
            "mask": layers.mask_layer(prediction, k) if prediction.accepted[k] else None,
            "heat": layers.heat_layer(prediction, k) if heatmaps else None,
            "prompt": prompts[k],
        }
        for k in range(number)
        if named is None or prompts[k]
    ]


def _candidates(prediction: Prediction) -> list[dict[str, Any]]:
    """What the answer was chosen from, the best first."""
    if prediction.candidates is None:
        return []
    masks, scores, sources, thoughts, chosen = prediction.candidates
    return [
        {
            "picture": layers.candidate(prediction, masks[i]),
            "source": sources[i],
            "score": float(scores[i]),
            "thought": thoughts[i],
            "chosen": i == chosen,
            "share": float(masks[i].mean()),
        }
        for i in np.argsort(-scores, kind="stable").tolist()
    ]
