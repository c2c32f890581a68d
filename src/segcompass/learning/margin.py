"""How far a judge is to be trusted: the margin that serves best on questions kept apart.

    questions apart -> the judge's scores -> lead of its favourite over the source's answer
                    -> mean IoU of the answers at every margin -> the best margin

A judge that cannot tell candidates apart gets a margin of 1: the source's answers stand. Questions
are apart from the judge's own stage, not from all training: see `candidate_questions.set_apart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from segcompass.grounding.marking import mark
from segcompass.interfaces.base import Scorer
from segcompass.interfaces.candidate_rerank import favourite
from segcompass.io import masks
from segcompass.io.images import load_image
from segcompass.io.progress import progress
from segcompass.learning.candidate_questions import Question, overlaps
from segcompass.learning.engine.distributed import World

MARGINS = np.arange(101) / 100
SURE = 2.0  # standard errors by which a gain must stand out


class Verdict(NamedTuple):
    """What a judge would do to the answer to a question; IoU by the gRefCOCO rules."""

    lead: float  # of its favourite over the source's answer
    source: float  # IoU of the source's answer
    favourite: float
    oracle: float  # of the best candidate, or of rejecting them all


def rate(questions: Sequence[Question], scorer: Scorer, threshold: float) -> list[Verdict]:
    """Have a judge score all candidates; all ranks share the questions out among them.

    Args:
        questions: That it was not trained to judge, about other pictures.
        scorer: The judge.
        threshold: Confidence above which a mask of the model counts.

    Returns:
        One for each question, the same on every rank.
    """
    world = World.current()
    mine, found = world.slice(questions), list[Verdict]()
    with progress("margin") as update:
        for question in mine:
            image = load_image(question.sample.image_path)
            marked = [mark(image, masks.decode(rle)) for rle in question.masks]
            scores = scorer.score(marked, [question.sample.instruction] * len(marked))
            values = np.array([score.value for score in scores], dtype=np.float32)
            found.append(weigh(question, values, threshold))
            update(len(found), len(mine))
    return [one for part in world.gather_objects(found) for one in part]


def weigh(question: Question, scores: Float[np.ndarray, "M"], threshold: float) -> Verdict:
    """The source's answer to a question beside what a judge's scores make of it."""
    nothing = overlaps(question.sample, [masks.encode(np.zeros(question.sample.image_hw, bool))])[0]
    each = overlaps(question.sample, question.masks)
    source = each[0] if question.has_direct else nothing
    best, lead = favourite(scores, question.has_direct, threshold)
    return Verdict(lead, source, source if best is None else each[best], max([nothing, *each]))


def best_margin(verdicts: Sequence[Verdict]) -> float:
    """The margin with the highest mean IoU, the larger one of equals.

    It is 1, at which the source's answer always stands, unless the gain over the source is more
    than twice its standard error: of many margins, one looks good by chance.
    """
    if len(verdicts) < 2:
        return 1.0
    gains = _gains(verdicts)
    best = int(np.flatnonzero(gains.mean(0) == gains.mean(0).max())[-1])
    noise = gains[:, best].std(ddof=1) / len(verdicts) ** 0.5
    return float(MARGINS[best]) if gains[:, best].mean() > SURE * noise else 1.0


def _gains(verdicts: Sequence[Verdict]) -> Float[np.ndarray, "questions margins"]:
    """IoU that the judge adds to each answer at every margin."""
    leads = np.array([one.lead for one in verdicts])
    changes = np.array([one.favourite - one.source for one in verdicts])
    return np.where(leads[:, None] > MARGINS, changes[:, None], 0.0)


def figures(verdicts: Sequence[Verdict], margin: float) -> dict[str, Any]:
    """Mean IoU of the source's answers, of those at a margin, and of the best candidates.

    Returns:
        Ready for JSON; figures are None where there are no questions.
    """
    chosen = [one.favourite if one.lead > margin else one.source for one in verdicts]
    means = {
        "source": [one.source for one in verdicts],
        "chosen": chosen,
        "best_candidate": [one.oracle for one in verdicts],
    }
    told = {name: float(np.mean(values)) if values else None for name, values in means.items()}
    return {"questions": len(verdicts), **told, "margin": margin}
