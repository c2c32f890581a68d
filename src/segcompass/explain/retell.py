"""Put another chain of thought into the model's mouth, and see whether the masks follow.

Unlike a replay this runs the policy, once and without generating: its states depend on the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import torch
from scipy.ndimage import center_of_mass

from segcompass.data.scenes.catalog import cell_of
from segcompass.data.scenes.grammar import REACH, closing, distance, resolve
from segcompass.interfaces.base import PATHS
from segcompass.interfaces.readout import read_out, read_tokens, to_numpy
from segcompass.pipeline import SegCompass
from segcompass.types import NamedObject, Prediction, Sample, Status, TokenKind


@torch.inference_mode()
def retell(model: SegCompass, prediction: Prediction, thought: str) -> Prediction:
    """What the model finds when it has thought ``thought``; the rest of the question stays.

    Raises:
        ValueError: the thought cannot be tokenised, or is too long for the policy.
    """
    visual = model.policy.backbone.prepare(prediction.image_rgb)
    sequences = model.policy.encode([visual], [prediction.instruction], [thought])
    states, _ = model.policy.forward(sequences, [visual])
    pixels, frames = model.encoder.preprocess([prediction.image_rgb])
    keys = model.encoder(pixels)
    alignment = model.interface.align(
        states,
        keys,
        frames=frames,
        need_attention=True,
        gates=keys.new_tensor([PATHS[prediction.paths]]),
    )
    low_res = model.interface.decode(keys, alignment, frames=frames)
    real = states.token_kinds[0] != TokenKind.PADDING
    said = sequences.ids[0][sequences.kinds[0] >= TokenKind.THOUGHT]
    return replace(
        prediction,
        **read_out(
            alignment,
            low_res,
            0,
            frame=frames[0],
            status=Status.OK,
            threshold=prediction.threshold,
        ),
        **read_tokens(alignment, states.token_kinds, 0),
        text=model.policy.prompt.decode(said.tolist()),
        reasoning=thought,
        concentration_states=to_numpy(states.concentration_states[0]),
        tokens=tuple(model.policy.token_texts(states.token_ids[0][real].tolist())),
        token_kinds=to_numpy(states.token_kinds[0][real]),
        timings={},
    )


def corruptions(sample: Sample, prediction: Prediction, rng: Random) -> dict[str, str]:
    """Other thoughts for one answer, by the name of what was done to its own.

    Args:
        sample: what was asked.
        prediction: what was answered.
        rng: draws the order of shuffled words, and the thing that is named instead.

    Returns:
        ``same`` (its own thought, the control), ``shuffled`` (its words in another order),
        ``empty``, and on scenes, where the closing sentence can be resolved and something else is
        there to be named, ``renamed``: it closes on another thing.
    """
    thought = prediction.reasoning
    words = thought.split()
    rng.shuffle(words)
    told = {"same": thought, "shuffled": " ".join(words), "empty": ""}
    other = _something_else(sample, thought, rng)
    if other is not None:
        told["renamed"] = f"{thought[: thought.rindex('So ')]}{closing([other])}"
    return told


def _something_else(sample: Sample, thought: str, rng: Random) -> NamedObject | None:
    """A thing in the picture that the closing sentence does not name."""
    named = resolve(thought, sample.objects) if sample.objects else None
    if not named:
        return None
    others = [thing for i, thing in enumerate(sample.objects) if i not in named]
    return rng.choice(others) if others else None


def points_at(prediction: Prediction, objects: Sequence[NamedObject]) -> bool | None:
    """Whether the masks lie where the closing sentence says; None where it says nothing clear.

    Every accepted mask must have its centre at most one map cell from a named thing, and every
    named thing must have such a mask. "Nothing matches" agrees with having no mask.
    """
    named = resolve(prediction.reasoning, objects) if objects else None
    if named is None:
        return None
    told = [objects[i].cell for i in named]
    shown = [_cell(mask) for mask in prediction.masks if mask.any()]
    return all(any(distance(s, t) <= REACH for t in told) for s in shown) and all(
        any(distance(s, t) <= REACH for s in shown) for t in told
    )


def _cell(mask: np.ndarray) -> str:
    """The map cell of a mask's centre."""
    y, x = center_of_mass(mask)
    return cell_of((x + 0.5) / mask.shape[1], (y + 0.5) / mask.shape[0])
