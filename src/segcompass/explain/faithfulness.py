"""Do the attributions tell the truth? Delete what they name, and see what the masks lose.

A ranking of concepts is faithful where deleting its first concepts costs much, and inserting them
brings much, compared with concepts drawn at random or ranked by activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from segcompass.explain.deletion import COUNTS, CURVES, MEASURES, ORDERS, SHARES, Trial, try_out
from segcompass.explain.intervals import bootstrap
from segcompass.explain.thought_consistency import ThoughtConsistency
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Sample, Status

TENTH = SHARES.index(0.1)
IOU, AGREEMENT, _ = range(len(MEASURES))


def faithfulness(
    model: SegCompass,
    answered: Iterable[tuple[Sample, Prediction]],
    *,
    seed: int = 0,
    draws: int = 3,
    named: Callable[[Sample], Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measure how faithful attributions and chains of thought are.

    Curves are taken of answers with a mask to questions with a target: where nothing was found,
    nothing can be deleted.

    Args:
        model: the model that answered.
        answered: samples with their answers, live or read back.
        seed: of the random orders, the corruptions and the bootstrap.
        draws: random orders for each answer; their curves are averaged.
        named: the concepts whose cards name what a sample looks for; None leaves that figure out.

    Returns:
        Figures ready for JSON, described in ``docs/interpretability.md``; ``rows`` and the rows of
        ``thoughts`` are flat. Intervals are 95 % bootstraps over pictures.

    Raises:
        ValueError: there is no answer to measure.
    """
    rng, trials, skipped = np.random.default_rng(seed), list[Trial](), 0
    thoughts = ThoughtConsistency(model, seed)
    for sample, prediction in answered:
        thoughts.add(sample, prediction)
        if prediction.status != Status.OK or not sample.targets:
            skipped += 1
            continue
        wanted = None if named is None else named(sample)
        trials.append(try_out(model, sample, prediction, rng, draws=draws, named=wanted))
    if not trials:
        raise ValueError(
            f"none of {skipped} answers has both a mask and a target; give more samples, or a "
            "model that finds something"
        )
    return {
        "samples": len(trials),
        "skipped": skipped,
        "rows": _rows(trials, seed),
        "areas": _areas(trials, seed),
        "top_tenth": {MEASURES[m]: _top_tenth(trials, seed, m) for m in (IOU, AGREEMENT)},
        "sufficiency": _sufficiency(trials, seed),
        "single_concept": _single_concept([flag for t in trials for flag in t.slot_changed]),
        "named_concepts": _named_concepts(
            [t.named_changed for t in trials if t.named_changed is not None]
        ),
        "residual": _residual(np.concatenate([trial.residuals for trial in trials])),
        "thoughts": thoughts.result(seed),
    }


def _rows(trials: Sequence[Trial], seed: int) -> list[dict[str, Any]]:
    """The curves: one row for every curve, order and share."""
    curves = np.stack([trial.curves for trial in trials])
    mean, low, high = _interval(curves, trials, seed)
    return [
        {
            "curve": CURVES[c],
            "order": ORDERS[o],
            "share": SHARES[s],
            **{
                f"{measure}{end}": float(values[c, o, s, m])
                for m, measure in enumerate(MEASURES)
                for end, values in (("", mean), ("_low", low), ("_high", high))
            },
        }
        for c, o, s in np.ndindex(mean.shape[:3])
    ]


def _areas(trials: Sequence[Trial], seed: int) -> dict[str, dict[str, Any]]:
    """Areas under the IoU curves, and how far attribution's differs from the other orders'."""
    curves = np.stack([trial.curves[..., IOU] for trial in trials])  # (n, curves, orders, shares)
    areas = np.trapezoid(curves, SHARES, axis=-1)
    found = {}
    for c, curve in enumerate(CURVES):
        mean, low, high = _interval(areas[:, c], trials, seed)
        ahead = areas[:, c, :1] - areas[:, c, 1:]
        gap, gap_low, gap_high = _interval(ahead, trials, seed)
        found[curve] = {
            order: {"area": float(mean[o]), "interval": [float(low[o]), float(high[o])]}
            for o, order in enumerate(ORDERS)
        } | {
            f"attribution_less_{order}": {
                "area": float(gap[o]),
                "interval": [float(gap_low[o]), float(gap_high[o])],
            }
            for o, order in enumerate(ORDERS[1:])
        }
    return found


def _top_tenth(trials: Sequence[Trial], seed: int, measure: int) -> dict[str, Any]:
    """What deleting the first tenth of the concepts costs in one measure, by order."""
    curves = np.stack([trial.curves[CURVES.index("deletion"), ..., measure] for trial in trials])
    cost = curves[..., 0] - curves[..., TENTH]  # (n, orders)
    mean, low, high = _interval(cost, trials, seed)
    random = float(mean[ORDERS.index("random")])
    return {
        order: {"cost": float(mean[o]), "interval": [float(low[o]), float(high[o])]}
        for o, order in enumerate(ORDERS)
    } | {"times_random": float(mean[0]) / random if random > 0 else None}


def _sufficiency(trials: Sequence[Trial], seed: int) -> list[dict[str, Any]]:
    """How much of the answer the first few concepts make alone."""
    mean, low, high = _interval(np.stack([trial.alone for trial in trials]), trials, seed)
    return [
        {
            "concepts": count,
            **{measure: float(mean[i, m]) for m, measure in enumerate(MEASURES)},
            "agreement_interval": [float(low[i, AGREEMENT]), float(high[i, AGREEMENT])],
        }
        for i, count in enumerate(COUNTS)
    ]


def _single_concept(flags: Sequence[bool]) -> dict[str, Any]:
    """How many masks change without the one concept that their slot's attribution puts first."""
    return {"judged": len(flags), "changed": float(np.mean(flags))}


def _named_concepts(flags: Sequence[tuple[bool, bool]]) -> dict[str, Any] | None:
    """How many answers change without the concepts that name their target, or random ones."""
    if not flags:
        return None
    changed, at_random = np.mean(flags, axis=0).tolist()
    return {"judged": len(flags), "changed": changed, "changed_at_random": at_random}


def _residual(shares: Float[np.ndarray, "slots 2"]) -> dict[str, dict[str, Any]]:
    """What the attributions do not add up to, as a share of the change, over all slots."""
    return {
        scalar: {"slots": len(own), "mean": float(own.mean()), "largest": float(own.max())}
        for scalar, own in zip(("confidence", "mask"), shares.T, strict=True)
    }


def _interval(
    values: Float[np.ndarray, "n *rest"], trials: Sequence[Trial], seed: int
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over answers, and the ends of its 95 % interval."""
    flat = values.reshape(len(values), -1)
    columns = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
    clusters = [trial.image_id for trial in trials]
    low, high = bootstrap(columns, lambda sums: sums[:, :-1] / sums[:, -1:], clusters, seed=seed)
    rest = values.shape[1:]
    return values.mean(0), low.reshape(rest), high.reshape(rest)
