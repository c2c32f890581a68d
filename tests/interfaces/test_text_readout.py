"""Text readout: what an answer says in numbers, and what the segmenter draws there."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, tiny_sam
from torch import Tensor

from segcompass.geometry import Canvas, Fit, Frame, pad_to_square
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.base import Material
from segcompass.interfaces.readout import read_out
from segcompass.interfaces.registry import find
from segcompass.interfaces.text_readout import TextReadout, TextReadoutConfig
from segcompass.reasoning.backbones import QwenBackbone
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import ParsedAnswer, PromptConfig
from segcompass.types import ReasoningBatch, Status

SIDE = 64  # of the segmenter's frame
# 40 rows and 80 columns: 0.8 px of the frame a pixel, and 1.25 or 2.5 px of the canvas
FRAME = Frame.fit((40, 80), SIDE)
TWO = '[{"bbox_2d":[10,20,50,60],"point_2d":[30,40]},{"bbox_2d":[50,10,100,90],"point_2d":[75,50]}]'
BARE = '[{"bbox_2d":[10,20,50,60]}]'
TWO_POINTS = '{"bbox":[10,20,50,60],"points_1":[30,40],"points_2":[20,30]}'


@pytest.fixture(scope="module")
def readout() -> TextReadout:
    config = TextReadoutConfig(canvas=Canvas(100))
    return TextReadout.build(config, Material(MaskDecoder(tiny_sam()).eval(), WIDTH, 0))


def keys(count: int) -> Tensor:
    return torch.randn(count, 32, 8, 8, generator=torch.Generator().manual_seed(9))


def states(count: int) -> ReasoningBatch:
    return ReasoningBatch(
        torch.zeros(count, 3, dtype=torch.long),
        torch.ones(count, 3, dtype=torch.long),
        torch.zeros(count, 3, WIDTH),
        torch.zeros(count, 0, WIDTH),
        torch.ones(count, dtype=torch.bool),
    )


def answer(conclusion: str, status: Status = Status.OK) -> ParsedAnswer:
    return ParsedAnswer(status, "a mug", None, conclusion)


def test_it_is_found_by_name_and_has_nothing_to_train_or_to_store() -> None:
    kind = find("text_readout")
    assert kind is TextReadout
    made = kind.build(kind.Config(), Material(MaskDecoder(tiny_sam()), WIDTH, 0))
    assert made.trained() == {} and len(made.head) == 0
    assert (kind.form, kind.has_concepts, kind.decoupled) == ("objects", False, True)


def test_boxes_and_points_by_hand(readout: TextReadout) -> None:
    """Stretched: 100 px of the canvas are 80 columns and 40 rows."""
    (prompts,) = readout.read([answer(TWO)], [FRAME])
    np.testing.assert_allclose(prompts.boxes, [[8, 8, 40, 24], [40, 4, 80, 36]])
    np.testing.assert_allclose(prompts.points, [[[24, 16]], [[60, 20]]])


def test_a_centred_canvas_by_hand() -> None:
    """Square: 0.8 px of the image for each of the canvas, 20 rows of padding above."""
    square = TextReadout(TextReadoutConfig(canvas=Canvas(100, "square")), MaskDecoder(tiny_sam()))
    (prompts,) = square.read([answer('[{"bbox_2d":[10,30,50,60],"point_2d":[30,0]}]')], [FRAME])
    np.testing.assert_allclose(prompts.boxes, [[8, 4, 40, 28]])
    np.testing.assert_allclose(prompts.points, [[[24, 0]]])  # it lay in the padding


SQUARE = TextReadout(TextReadoutConfig(canvas=Canvas(840, "square")), MaskDecoder(tiny_sam()))


@settings(deadline=None, max_examples=100)
@given(
    hw=st.tuples(st.integers(1, 840), st.integers(1, 840)),
    seed=st.integers(0, 999),
)
def test_what_is_seen_in_a_centred_picture_comes_back_to_it(hw: tuple[int, int], seed: int) -> None:
    """A mark is looked up where the policy sees it, and written down in whole numbers."""
    draw = np.random.default_rng(seed)
    (y0, x0), image = (draw.integers(side) for side in hw), np.zeros((*hw, 3), np.uint8)
    y1, x1 = (draw.integers(low + 1, side + 1) for low, side in zip((y0, x0), hw, strict=True))
    image[y0:y1, x0:x1] = 255
    seen = pad_to_square(image, (0, 0, 0))[..., 0]
    rows, columns = np.nonzero(seen)
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    box = edges * 840 / len(seen)
    point = (box[:2] + box[2:]) / 2
    written = {"bbox_2d": box.round().tolist(), "point_2d": point.round().tolist()}
    (prompts,) = SQUARE.read([answer(json.dumps([written]))], [Frame.fit(hw, SIDE)])
    assert np.abs(prompts.boxes[0] - [x0, y0, x1, y1]).max() < 1
    assert np.abs(prompts.points[0, 0] - [(x0 + x1) / 2, (y0 + y1) / 2]).max() < 1


@pytest.mark.parametrize(
    ("pad", "stretch_to", "fit"),
    [
        (True, None, "square"),
        (True, 840, "square"),
        (False, 840, "stretch"),
        (False, None, "stretch"),
    ],
)
def test_the_canvas_is_what_the_policy_sees(pad: bool, stretch_to: int | None, fit: Fit) -> None:
    model: Any = None
    backbone = QwenBackbone(model, None, pad, stretch_to)
    assert backbone._fit(np.zeros((40, 80, 3), np.uint8)) == fit
    prompt = PromptConfig(form="objects", canvas_side=100)
    use = PolicyConfig(prompt=prompt, pad_to_square=pad, stretch_to=stretch_to)
    policy: Any = SimpleNamespace(config=use)
    material = Material(MaskDecoder(tiny_sam()), WIDTH, 0, policy=policy)
    TextReadout.build(TextReadoutConfig(canvas=Canvas(100, fit)), material)
    other: Fit = "stretch" if fit == "square" else "square"
    with pytest.raises(ValueError, match=f"of fit {fit}, and head.canvas.fit reads .* {other}"):
        TextReadout.build(TextReadoutConfig(canvas=Canvas(100, other)), material)
    with pytest.raises(ValueError, match=r"canvas of 100 px .* read on one of 90 px"):
        TextReadout.build(TextReadoutConfig(canvas=Canvas(90, fit)), material)


def test_missing_objects_and_points_are_nan(readout: TextReadout) -> None:
    texts = (TWO, "[]", BARE, TWO_POINTS)
    two, none, bare, points = readout.read([answer(t) for t in texts], [FRAME] * 4)
    assert two.boxes.shape == none.boxes.shape == (2, 4)
    assert two.points.shape == points.points.shape == (2, 2, 2)
    assert np.isnan(none.boxes).all() and np.isnan(none.points).all()
    assert np.isfinite(bare.boxes[0]).all() and np.isnan(bare.boxes[1]).all()
    assert np.isnan(bare.points).all() and np.isnan(two.points[:, 1]).all()
    np.testing.assert_allclose(points.points[0], [[24, 16], [16, 12]])


def test_masks_are_the_segmenters_best_for_box_and_points(readout: TextReadout) -> None:
    """Each object as if it were alone, in coordinates of the frame."""
    texts = (TWO, BARE, TWO_POINTS)
    frames, features = [FRAME] * 3, keys(3)
    with torch.no_grad():
        alignment = readout.align(
            states(3), features, frames=frames, answers=[answer(t) for t in texts]
        )
        logits = readout.decode(features, alignment, frames=frames)
    # px of the image times 0.8
    expected = {
        (0, 0): ([6.4, 6.4, 32, 19.2], [[19.2, 12.8]]),
        (0, 1): ([32, 3.2, 64, 28.8], [[48, 16]]),
        (1, 0): ([6.4, 6.4, 32, 19.2], None),
        (2, 0): ([6.4, 6.4, 32, 19.2], [[19.2, 12.8], [12.8, 9.6]]),
    }
    for (row, slot), (box, points) in expected.items():
        with torch.no_grad():
            masks, scores = readout.decoder.rated_prompts(
                features,
                torch.tensor([row]),
                boxes=torch.tensor([box], dtype=torch.float32),
                points=None if points is None else torch.tensor([points], dtype=torch.float32),
                best_of_three=True,
            )
        torch.testing.assert_close(logits[row, slot], masks[0], rtol=1e-4, atol=1e-4)
        confidence = alignment.confidence_logits[row, slot].sigmoid()
        torch.testing.assert_close(confidence, scores[0].clamp(1e-4, 1 - 1e-4))
    assert alignment.confidence_logits.sigmoid()[1:, 1].eq(0).all()
    assert (logits[1:, 1] < 0).all()
    assert alignment.slots is None and alignment.codes is None and alignment.queries is None


def test_selected_slots_equal_the_rows_of_a_full_decode(readout: TextReadout) -> None:
    frames, features = [FRAME] * 2, keys(2)
    answers = [answer(TWO), answer(BARE)]
    with torch.no_grad():
        alignment = readout.align(states(2), features, frames=frames, answers=answers)
        full = readout.decode(features, alignment, frames=frames)
        select = (torch.tensor([1, 0]), torch.tensor([0, 1]))
        chosen = readout.decode(features, alignment, frames=frames, select=select)
    torch.testing.assert_close(chosen, full[select])


@pytest.mark.parametrize(
    ("conclusion", "status", "after", "accepted"),
    [
        (TWO, Status.OK, Status.OK, 2),
        ("[]", Status.OK, Status.NO_TARGET, 0),
        ("", Status.MALFORMED, Status.MALFORMED, 0),
        ("", Status.TRUNCATED, Status.TRUNCATED, 0),
    ],
)
def test_an_empty_list_is_no_target_and_a_malformed_answer_is_none(
    readout: TextReadout, conclusion: str, status: Status, after: Status, accepted: int
) -> None:
    """Without a threshold all objects that were named count, and no others."""
    with torch.no_grad():
        alignment = readout.align(
            states(1), keys(1), frames=[FRAME], answers=[answer(conclusion, status)]
        )
        logits = readout.decode(keys(1), alignment, frames=[FRAME])
    fields = read_out(alignment, logits, 0, frame=FRAME, status=status, threshold=0.0)
    assert (fields["status"], fields["accepted"].sum()) == (after, accepted)
    assert fields["slot_masks"].shape[1:] == (40, 80)
    assert fields["slot_heatmaps"] is None


def test_boxes_and_the_first_mask_alone(readout: TextReadout) -> None:
    """For segmenters that were trained with one prompt and one mask at a time."""
    config = TextReadoutConfig(canvas=Canvas(100), points=False, best_of_three=False)
    plain = TextReadout(config, readout.decoder)
    with torch.no_grad():
        alignment = plain.align(states(1), keys(1), frames=[FRAME], answers=[answer(TWO_POINTS)])
        logits = plain.decode(keys(1), alignment, frames=[FRAME])
        expected = readout.decoder.decode_prompts(
            keys(1), torch.tensor([0]), boxes=torch.tensor([[6.4, 6.4, 32, 19.2]])
        )
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_answers_have_to_be_given(readout: TextReadout) -> None:
    with pytest.raises(ValueError, match="answers"):
        readout.align(states(1), keys(1), frames=[FRAME])
