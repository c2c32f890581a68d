"""Edits of concepts, against the dense formulation, and what they do to an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segcompass.concepts.sparse_codes import from_dense, to_dense
from segcompass.explain.intervene import Edit, edit_codes, intervene, overlap
from segcompass.io.outputs import dump_json
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction

TOKENS, CONCEPTS = 6, 9


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def prediction(model: SegCompass) -> Prediction:
    image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return model.predict(image, "the red mug", threshold=0.0)


edits = st.builds(
    Edit,
    st.integers(0, CONCEPTS - 1),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.0, -0.5, 3.0]),
)


@given(seed=st.integers(0, 2**16), chosen=st.lists(edits, max_size=4))
def test_edits_are_those_of_the_dense_codes(seed: int, chosen: list[Edit]) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.randn(TOKENS, CONCEPTS, generator=generator)).clamp(min=0)
    readable = torch.rand(TOKENS, generator=generator) > 0.3
    dense[~readable] = 0
    codes = from_dense(dense)
    edited = edit_codes(codes, chosen, readable)
    for edit in chosen:
        column = edit.factor * dense[:, edit.concept] + edit.shift * readable
        dense[:, edit.concept] = column.clamp(min=0)
    assert torch.equal(to_dense(edited), dense)
    assert (edited.rows.diff() >= 0).all()
    assert (edited.values > 0).all()


def test_the_named_edits() -> None:
    codes = from_dense(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    read = torch.ones(2, dtype=torch.bool)
    assert to_dense(edit_codes(codes, [Edit.ablate(0)], read)).tolist() == [[0, 0], [0, 1]]
    assert to_dense(edit_codes(codes, [Edit.scale(0, 0.5)], read)).tolist() == [[1, 0], [0, 1]]
    assert to_dense(edit_codes(codes, [Edit.steer(0, 3)], read)).tolist() == [[5, 0], [3, 1]]
    assert to_dense(edit_codes(codes, [Edit.steer(0, -3)], read)).tolist() == [[0, 0], [0, 1]]
    assert to_dense(codes).tolist() == [[2, 0], [0, 1]]


@pytest.mark.parametrize(
    "wrong",
    [(-1, 1.0, 0.0), (3, -0.5, 0.0), (3, float("nan"), 0.0), (3, 1.0, float("inf"))],
)
def test_edits_that_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="want a concept"):
        Edit(*wrong)


def test_no_edit_changes_nothing(model: SegCompass, prediction: Prediction) -> None:
    found = intervene(model, prediction, [])
    np.testing.assert_allclose(found.confidence_change, 0, atol=1e-6)
    assert found.answer_iou == 1
    assert (found.mask_iou == 1).all()


def test_switching_concepts_off_changes_this_call_alone(
    model: SegCompass, prediction: Prediction
) -> None:
    active = sorted(set(prediction.codes.columns.tolist()))
    found = intervene(model, prediction, [Edit.ablate(j) for j in active])
    assert len(found.after.codes.values) == 0
    assert not np.allclose(found.after.concept_vectors, found.before.concept_vectors)
    # All concepts off is the codebook reading zeros, whatever the concepts were.
    empty = torch.zeros(1, len(prediction.tokens), model.interface.config.codebook_width)
    readable = torch.tensor((prediction.token_kinds > 0) & (prediction.token_kinds < 5))[None]
    expected = model.interface.codebook.aggregate(empty, readable).vectors[0]
    np.testing.assert_allclose(
        found.after.concept_vectors, expected.detach().numpy(), atol=1e-5, rtol=1e-5
    )
    again = intervene(model, prediction, [])
    np.testing.assert_allclose(again.after.slot_scores, prediction.slot_scores, atol=1e-6)


def test_both_sides_are_told(model: SegCompass, prediction: Prediction) -> None:
    concept = int(prediction.codes.columns[0])
    found = intervene(model, prediction, [Edit.steer(concept, 50.0)])
    record = found.to_json()
    dump_json(record)
    assert record["edits"] == [{"concept": concept, "factor": 1.0, "shift": 50.0}]
    for row in record["slots"]:
        k = row["slot"]
        assert row["confidence_change"] == pytest.approx(
            row["confidence_after"] - row["confidence_before"], abs=1e-6
        )
        both = found.before.slot_masks[k] & found.after.slot_masks[k]
        either = found.before.slot_masks[k] | found.after.slot_masks[k]
        assert row["mask_iou"] == (both.sum() / either.sum() if either.any() else 1.0)
    assert (found.confidence_change != 0).any()


def test_a_concept_that_does_not_exist(model: SegCompass, prediction: Prediction) -> None:
    with pytest.raises(ValueError, match=r"no concept 64; the model has 0 to 63"):
        intervene(model, prediction, [Edit.ablate(64)])


def test_overlap_by_hand() -> None:
    first = np.array([[True, True], [False, False]])
    second = np.array([[True, False], [True, True]])
    assert overlap(first, second) == 1 / 4
    assert overlap(first & False, second & False) == 1.0
    assert overlap(first, second & False) == 0.0


def test_edits_in_words() -> None:
    edits = [Edit.ablate(7), Edit.scale(7, 0.5), Edit.steer(9, -3), Edit(1, 2.0, 1.5), Edit(1)]
    said = ["7 off", "7 ×0.5", "9 -3", "1 ×2 +1.5", "1 +0"]
    assert [str(edit) for edit in edits] == [f"Concept {words}" for words in said]
