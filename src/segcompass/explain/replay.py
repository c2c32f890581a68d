"""From a finished prediction back into the head: other concepts, the same thought.

What the policy wrote and read is in the `Prediction`; only the image keys are computed anew. The
policy is never run, so that a change at the codebook costs one pass of the head and the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.concepts.sparse_codes import concat, to_host
from segcompass.geometry import Frame
from segcompass.interfaces.base import PATHS
from segcompass.interfaces.concept_slots import READ_BY_SAE, with_concepts
from segcompass.interfaces.readout import read_out, to_numpy
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, SparseCodes, Status, given

VARIANTS_AT_ONCE = 8  # rows of one pass: each decodes K masks


class HeadInputs(NamedTuple):
    """What the head and the decoder read of one picture, on the model's device."""

    codes: SparseCodes  # row l is token l
    readable: Bool[Tensor, "1 L"]
    tokens: Float[Tensor, "1 K D"]  # states at the concentration tokens
    keys: Float[Tensor, "1 C h w"]
    gates: Float[Tensor, "1 2"]
    frame: Frame


@torch.no_grad()
def head_inputs(model: SegCompass, prediction: Prediction) -> HeadInputs:
    """Lay out a prediction for the head; the picture goes through the image encoder once.

    Args:
        model: the model that made the prediction.
        prediction: live, or read back by :func:`segcompass.io.saved.load_prediction`.

    Raises:
        ValueError: the answer is not well-formed and has no slots to explain, or the prediction is
            another model's.
    """
    if not prediction.status.well_formed:
        raise ValueError(
            f"the answer is {prediction.status.value}: without its {model.policy.slots} "
            "concentration tokens there are no slots to explain; predict with force_format"
        )
    _same_model(model, prediction)
    pixels, frames = model.encoder.preprocess([prediction.image_rgb])
    keys = model.encoder(pixels)
    kinds = torch.from_numpy(prediction.token_kinds)
    return HeadInputs(
        codes=_to_device(given(prediction.codes, "concepts"), keys.device),
        readable=torch.isin(kinds, torch.tensor(READ_BY_SAE)).to(keys.device)[None],
        tokens=torch.from_numpy(given(prediction.concentration_states, "states")).to(keys.device)[
            None
        ],
        keys=keys,
        gates=keys.new_tensor([PATHS[prediction.paths]]),
        frame=frames[0],
    )


def replay(
    model: SegCompass,
    prediction: Prediction,
    variants: Sequence[SparseCodes],
    inputs: HeadInputs | None = None,
) -> Iterator[Prediction]:
    """What the model would have found, had these concepts fired instead.

    Args:
        model: the model that made the prediction.
        prediction: what is replayed.
        variants: codes of the same tokens over the same concepts, on any device.
        inputs: from :func:`head_inputs`, where it is at hand.

    Yields:
        One prediction for each variant, in order: text, tokens and picture are the original's.

    Raises:
        ValueError: see :func:`head_inputs`; or a variant is over other concepts or tokens.
    """
    inputs = head_inputs(model, prediction) if inputs is None else inputs
    for start in range(0, len(variants), VARIANTS_AT_ONCE):
        yield from _replay(model, prediction, variants[start : start + VARIANTS_AT_ONCE], inputs)


@torch.no_grad()
def _replay(
    model: SegCompass, prediction: Prediction, variants: Sequence[SparseCodes], inputs: HeadInputs
) -> list[Prediction]:
    rows = len(variants)
    keys = inputs.keys.expand(rows, -1, -1, -1)
    interface = with_concepts(model.interface)
    alignment = interface.align_codes(
        concat([_to_device(codes, keys.device) for codes in variants]),
        inputs.readable.expand(rows, -1),
        inputs.tokens.expand(rows, -1, -1),
        keys,
        frames=[inputs.frame] * rows,
        need_attention=True,
        gates=inputs.gates,
    )
    low_res = interface.decode(keys, alignment, frames=[inputs.frame] * rows)
    attention = given(alignment.slot_attention, "slot attention")
    return [
        replace(
            prediction,
            **read_out(
                alignment,
                low_res,
                row,
                frame=inputs.frame,
                status=Status.OK,
                threshold=prediction.threshold,
            ),
            codes=to_host(codes),
            slot_attention=to_numpy(attention[row]),
            timings={},
        )
        for row, codes in enumerate(variants)
    ]


def _to_device(codes: SparseCodes, device: torch.device) -> SparseCodes:
    """A copy on the device: a live prediction holds inference tensors, which autograd refuses."""
    return codes._replace(
        rows=codes.rows.to(device, copy=True),
        columns=codes.columns.to(device, copy=True),
        values=codes.values.to(device, copy=True),
    )


def _same_model(model: SegCompass, prediction: Prediction) -> None:
    concepts = with_concepts(model.interface).codebook.config.d_sae
    expected = (model.policy.slots, model.policy.width)
    found = given(prediction.concentration_states, "states").shape
    over = given(prediction.codes, "concepts").n_columns
    if over != concepts or found != expected:
        raise ValueError(
            f"the prediction is of model {prediction.model!r}, with {over} concepts and "
            f"concentration states {found}; {model.name!r} has {concepts} and "
            f"{expected}: explain it with the model that made it"
        )
    made, loaded = prediction.fingerprint, model.fingerprint
    if made and loaded and made != loaded:
        raise ValueError(
            f"the prediction is of model {prediction.model!r} with fingerprint {made}; "
            f"{model.name!r} has {loaded}: explain it with the model that made it"
        )
