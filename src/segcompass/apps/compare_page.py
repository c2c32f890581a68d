"""``comparison.html``: the same samples side by side, a column for every interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segcompass.apps import report_layers as layers
from segcompass.apps.pages import data_uri, render
from segcompass.apps.samples_page import STATUSES
from segcompass.evaluation.comparison import shown
from segcompass.evaluation.run_log import ROWS, read_rows
from segcompass.io import masks
from segcompass.io.files import write_whole
from segcompass.io.outputs import overlay, slot_colour
from segcompass.io.readings import slot_concepts
from segcompass.io.saved import load_prediction
from segcompass.learning.arms import Experiment
from segcompass.learning.compare import shown_file, shown_samples
from segcompass.types import Prediction, Sample

PAGE = "comparison.html"
SIDE = 420  # px, longest side of a picture
CONCEPTS = 5  # listed for a slot


def write_compare_page(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page of a finished comparison into its folder.

    Args:
        experiment: whose runs are done; the answers shown are those of the first seed.
        rows: of ``learning.compare.compare``.

    Returns:
        The path of the page.

    Raises:
        DataError: an answer that should be shown is missing or damaged.
    """
    folders = {name: experiment.runs(name)[0] for name in experiment.arms}
    judged = {
        name: {row["sample_id"]: row for row in read_rows(folder / "eval" / ROWS)}
        for name, folder in folders.items()
    }
    samples = []
    for sample in shown_samples(experiment):
        answers = {n: load_prediction(shown_file(f, sample)) for n, f in folders.items()}
        columns = [_column(n, p, judged[n][sample.sample_id]) for n, p in answers.items()]
        samples.append(_sample(sample, next(iter(answers.values()))) | {"columns": columns})
    page = render(
        "compare.html.j2",
        styles=["report.css", "compare.css"],
        scripts=[],
        title="Interfaces side by side",
        data=str(experiment.eval.data),
        split=experiment.eval.split,
        table=shown(rows),
        samples=samples,
    )
    path = experiment.out / PAGE
    write_whole(path, page)
    return path


def _sample(sample: Sample, answer: Prediction) -> dict[str, Any]:
    """What was asked, and the picture with what is right."""
    targets = [masks.decode(rle) for rle in sample.targets]
    height, width = sample.image_hw
    truth = replace(
        answer,
        slot_masks=np.array(targets, dtype=bool).reshape(-1, height, width),
        accepted=np.ones(len(targets), dtype=bool),
        prompts=None,
    )
    return {
        "instruction": sample.instruction,
        "kind": sample.kind,
        "targets": len(targets),
        "thought": sample.thought,
        "photo": _picture(answer.image_rgb),
        "truth": _picture(overlay(truth)),
        "ratio": f"{width}/{height}",
    }


def _column(name: str, prediction: Prediction, row: Mapping[str, Any]) -> dict[str, Any]:
    """One interface's answer, with whatever it has to show for it."""
    accepted = np.flatnonzero(prediction.accepted).tolist()
    heated = prediction.slot_heatmaps is not None
    return {
        "name": name,
        "iou": row["iou"],
        "thought_right": row["reasoning_correct"],
        "status": prediction.status.value,
        "status_name": STATUSES[prediction.status.value],
        "reasoning": prediction.reasoning,
        "picture": _picture(overlay(prediction)),
        "heat": [layers.heat_layer(prediction, k) for k in accepted] if heated else None,
        "concepts": _concepts(prediction, accepted),
        "boxes": _boxes(prediction, accepted),
        "candidates": _candidates(prediction),
    }


def _concepts(prediction: Prediction, accepted: list[int]) -> list[dict[str, Any]] | None:
    """The strongest concepts of every mask that counts; None without an SAE."""
    if prediction.codes is None:
        return None
    read = slot_concepts(prediction, CONCEPTS)
    return [{"colour": _colour(k), "read": read[k]} for k in accepted]


def _boxes(prediction: Prediction, accepted: list[int]) -> list[dict[str, Any]] | None:
    """The boxes that the answer names, in px; None where answers name none."""
    if prediction.prompts is None:
        return None
    rounded = np.rint(prediction.prompts.boxes[accepted]).astype(int).tolist()
    return [{"colour": _colour(k), "box": b} for k, b in zip(accepted, rounded, strict=True)]


def _candidates(prediction: Prediction) -> list[dict[str, Any]] | None:
    """What was weighed, the best first; None where nothing was."""
    weighed = prediction.candidates
    if weighed is None:
        return None
    return [
        {
            "picture": layers.candidate(prediction, weighed.masks[i]),
            "score": float(weighed.scores[i]),
            "source": weighed.sources[i],
            "thought": weighed.thoughts[i],
            "chosen": i == weighed.chosen,
        }
        for i in np.argsort(-weighed.scores, kind="stable").tolist()
    ]


def _colour(slot: int) -> str:
    return "rgb({}, {}, {})".format(*slot_colour(slot))


def _picture(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "WEBP", quality=80)
