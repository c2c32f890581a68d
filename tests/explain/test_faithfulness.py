"""Curves, areas and costs of deletion against hand-made trials; corrupted thoughts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from factories import make_prediction
from synthetic_answers import answer, sample, square

from segcompass.data.samples import read_dataset
from segcompass.data.scenes.grammar import resolve
from segcompass.explain import deletion
from segcompass.explain import faithfulness as module
from segcompass.explain.concept_cards import Card, naming
from segcompass.explain.concept_labels import Label, Score
from segcompass.explain.deletion import COUNTS, ORDERS, SHARES, Surgery, Trial
from segcompass.explain.faithfulness import TENTH, faithfulness
from segcompass.explain.integrated_gradients import Attribution
from segcompass.explain.intervene import answer_mask, overlap
from segcompass.explain.provenance import SlotProvenance
from segcompass.explain.retell import corruptions, points_at, retell
from segcompass.explain.vocabulary import Feature
from segcompass.io.outputs import dump_json
from segcompass.pipeline import SegCompass
from segcompass.types import NamedObject, Prediction, Sample, SparseCodes, Status

MUG = NamedObject(1, "mug", "red", "medium", "plain", "b3")
PLATE = NamedObject(2, "book", "blue", "medium", "plain", "g7")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def samples(scenes_root: Path) -> list[Sample]:
    return read_dataset(scenes_root, "train")


@pytest.fixture(scope="module")
def answered(model: SegCompass, samples: list[Sample]) -> tuple[Sample, Prediction]:
    sample = next(s for s in samples if s.targets)
    return sample, model.predict(sample.image_path, sample.instruction, threshold=0.0)


def trial(image: int, tenth: tuple[float, float, float]) -> Trial:
    """IoU 1 that falls straight to 0 in every order, but for the value at a tenth."""
    deletion = np.tile(1 - np.array(SHARES), (3, 1))
    deletion[:, TENTH] = tenth
    curves = np.stack([deletion, np.tile(SHARES, (3, 1))])
    return Trial(
        image_id=image,
        curves=np.repeat(curves[..., None], 3, axis=-1),
        alone=np.full((len(COUNTS), 3), 0.5),
        residuals=np.zeros((2, 2)),
        slot_changed=(True, False),
        named_changed=None,
    )


def test_costs_of_the_first_tenth_by_hand() -> None:
    trials = [trial(1, (0.2, 0.8, 0.9)), trial(2, (0.4, 1.0, 0.7))]
    found = module._top_tenth(trials, seed=0, measure=module.IOU)
    assert found["attribution"]["cost"] == pytest.approx((0.8 + 0.6) / 2)
    assert found["activation"]["cost"] == pytest.approx((0.2 + 0.0) / 2)
    assert found["random"]["cost"] == pytest.approx((0.1 + 0.3) / 2)
    assert found["times_random"] == pytest.approx(0.7 / 0.2)
    assert found["attribution"]["interval"] == pytest.approx([0.6, 0.8])


def test_areas_by_hand() -> None:
    trials = [trial(1, (0.9, 0.9, 0.9)), trial(2, (0.5, 0.9, 0.9))]
    areas = module._areas(trials, seed=0)
    # A straight fall has area 1/2; a dip of 0.4 at a tenth takes the triangle from 0.05 to 0.2.
    assert areas["deletion"]["random"]["area"] == pytest.approx(0.5)
    assert areas["deletion"]["attribution"]["area"] == pytest.approx(0.5 - 0.5 * 0.4 * 0.15 / 2)
    gap = areas["deletion"]["attribution_less_random"]
    assert gap["area"] == pytest.approx(-0.5 * 0.4 * 0.15 / 2)
    assert gap["interval"] == pytest.approx([-0.4 * 0.15 / 2, 0])
    assert areas["insertion"]["attribution_less_activation"]["interval"] == [0, 0]


def test_curves_begin_and_end_where_they_must(
    model: SegCompass, answered: tuple[Sample, Prediction]
) -> None:
    sample, prediction = answered
    surgery = Surgery(model, sample, prediction)
    deleted, inserted = surgery.curves(surgery.active)
    whole = surgery.measures(prediction)
    nothing = surgery.measures(surgery.keep([surgery.active[:0]])[0])
    np.testing.assert_allclose([deleted[0], inserted[-1]], [whole, whole], atol=1e-5)
    np.testing.assert_allclose([deleted[-1], inserted[0]], [nothing, nothing], atol=1e-5)
    assert whole[1] == 1.0
    half = surgery.active[::2]
    (kept,), (dropped,) = surgery.keep([half]), surgery.drop([half])
    assert set(kept.codes.columns.tolist()) == set(half.tolist())
    assert set(dropped.codes.columns.tolist()) == set(surgery.active.tolist()) - set(half.tolist())


def test_a_report_on_one_answer(model: SegCompass, answered: tuple[Sample, Prediction]) -> None:
    sample, prediction = answered
    concept = int(prediction.codes.columns[0])
    malformed = replace(prediction, status=Status.MALFORMED)
    report = faithfulness(
        model, [(sample, prediction), (sample, malformed)], draws=1, named=lambda _: [concept]
    )
    dump_json(report)
    assert (report["samples"], report["skipped"]) == (1, 1)
    assert len(report["rows"]) == 2 * len(ORDERS) * len(SHARES)
    untouched = [
        row["agreement"]
        for row in report["rows"]
        if (row["curve"], row["share"]) in {("deletion", 0.0), ("insertion", 1.0)}
    ]
    assert untouched == [1.0] * 2 * len(ORDERS)
    assert report["single_concept"]["judged"] == int(prediction.accepted.sum())
    assert report["named_concepts"]["judged"] == 1
    assert [row["corruption"] for row in report["thoughts"]["rows"]][:3] == [
        "same", "shuffled", "empty",
    ]  # fmt: skip


RED, HAT, FAINT, OTHERS = 0, 1, 2, range(3, 103)
SHARE = {0: 0.01, 1: 0.03, 2: 0.0, 3: 0.0}  # residual of the confidence, by picture


def card(concept: int, family: str, value: str, f1: float) -> Card:
    """A card that names one look."""
    score = Score(f1, f1)
    label = Label((Feature(family, value),), 0.0, score, score)
    nothing: Any = ()
    return Card(concept, "image", 0.1, (0, 1), 1.0, *[nothing, label], *[nothing] * 5)


def asked(number: int, thing: NamedObject) -> Sample:
    """A question about the red mug or the blue book, whose mask is the first patch."""
    found = sample(number, square(0, 0, 10, 10))
    return replace(found, objects=(MUG, PLATE), target_ids=(thing.ann_id,))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose masks hang on one concept, RED, in questions about the red thing alone."""

    def replay(_: Any, prediction: Prediction, variants: list[SparseCodes], *__: Any) -> Any:
        for codes in variants:
            hangs = "red" in prediction.instruction
            there = not hangs or RED in codes.columns
            yield replace(prediction, codes=codes, slot_masks=prediction.slot_masks & there)

    def provenance(_: Any, prediction: Prediction) -> list[SlotProvenance]:
        weights = np.zeros(len(prediction.codes.values))
        weights[0] = 1 - float(prediction.slot_scores[0])  # of a change of 1
        confidence, mask = Attribution(weights, 3.0, 2.0), Attribution(weights, 5.0, 6.0)
        return [SlotProvenance(prediction, 0, confidence, mask, weights)]

    silent = SimpleNamespace(add=lambda *_: None, result=lambda _: {})
    monkeypatch.setattr(deletion, "head_inputs", lambda *_: None)
    monkeypatch.setattr(deletion, "replay", replay)
    monkeypatch.setattr(deletion, "provenance", provenance)
    monkeypatch.setattr(module, "ThoughtConsistency", lambda *_: silent)


@pytest.mark.usefixtures("world")
def test_figures_of_a_world_that_is_known() -> None:
    cards = [
        card(RED, "colour", "red", 1.0),
        card(HAT, "category", "book", 0.7),
        card(FAINT, "category", "mug", 0.5),  # does not hold: names nothing
    ]
    fires = dict.fromkeys((FAINT, *OTHERS), 1.0)
    answers = [
        (asked(0, MUG), "red", {RED: 1.0} | fires),  # judged; RED was all that mattered
        (asked(1, MUG), "red", fires),  # nothing that names the mug fires
        (asked(2, PLATE), "blue", {HAT: 1.0, RED: 1.0} | fires),  # judged; HAT does not matter
        (asked(3, PLATE), "blue", fires),
    ]
    answered = [
        (
            question,
            replace(
                answer({(0, c): v for c, v in active.items()}, concepts=103, question=colour),
                slot_scores=np.array([SHARE[question.image_id]]),
            ),
        )
        for question, colour, active in answers
    ]
    found = faithfulness(cast(Any, None), answered, draws=1, named=naming(cards))
    # One concept of 102 drawn at random is not RED, and would have to be to change anything.
    assert found["named_concepts"] == {"judged": 2, "changed": 0.5, "changed_at_random": 0.0}
    confidence, mask = found["residual"]["confidence"], found["residual"]["mask"]
    assert confidence == {
        "slots": 4, "mean": pytest.approx(0.01), "largest": pytest.approx(0.03)
    }  # fmt: skip
    # The mask's change is -1, its weights add up to 1 - share: the residual is 2 - share.
    assert (mask["mean"], mask["largest"]) == pytest.approx((2 - 0.01, 2))


def test_nothing_to_measure(model: SegCompass, answered: tuple[Sample, Prediction]) -> None:
    sample, prediction = answered
    with pytest.raises(ValueError, match="none of 1 answers"):
        faithfulness(model, [(sample, replace(prediction, status=Status.TRUNCATED))])


def test_a_thought_told_again(model: SegCompass, answered: tuple[Sample, Prediction]) -> None:
    _, prediction = answered
    told = retell(model, prediction, "There is a red mug at b3.")
    assert told.reasoning == "There is a red mug at b3."
    assert "red mug at b3.</think>" in told.text
    again = retell(model, told, told.reasoning)
    assert again.tokens == told.tokens
    np.testing.assert_array_equal(again.slot_scores, told.slot_scores)
    assert overlap(answer_mask(again), answer_mask(told)) == 1
    other = retell(model, prediction, "There is nothing here.")
    assert not np.allclose(other.concentration_states, told.concentration_states)


def test_corrupted_thoughts() -> None:
    thought = "I see red mug b3 and blue book g7. So the answer is red mug b3."
    prediction = make_prediction(reasoning=thought)
    sample = Sample("1", Path(), 1, (256, 256), "the mug", (), objects=(MUG, PLATE))
    told = corruptions(sample, prediction, Random(0))
    assert told["same"] == thought
    assert sorted(told["shuffled"].split()) == sorted(thought.split())
    assert told["shuffled"] != thought
    assert told["empty"] == ""
    assert told["renamed"].startswith("I see red mug b3 and blue book g7. ")
    assert resolve(told["renamed"], sample.objects) == (1,)
    assert "renamed" not in corruptions(replace(sample, objects=()), prediction, Random(0))


@pytest.mark.parametrize(
    ("thought", "centre", "expected"),
    [
        ("So the answer is red mug b3.", (48, 80), True),  # y, x in px of 256: b3
        ("So the answer is red mug b3.", (80, 112), True),  # c4, one cell away
        ("So the answer is red mug b3.", (208, 208), False),  # g7, where the book is
        ("So nothing matches.", (48, 80), False),
        ("I am not sure.", (48, 80), None),
    ],
)
def test_masks_lie_where_the_text_says(
    thought: str, centre: tuple[int, int], expected: bool | None
) -> None:
    masks = np.zeros((6, 256, 256), dtype=bool)
    y, x = centre
    masks[0, y - 5 : y + 5, x - 5 : x + 5] = True
    accepted = np.arange(6) == 0
    prediction = make_prediction(reasoning=thought, slot_masks=masks, accepted=accepted)
    assert points_at(prediction, [MUG, PLATE]) is expected
    silent = make_prediction(
        reasoning="So nothing matches.", slot_masks=masks, accepted=np.zeros(6, dtype=bool)
    )
    assert points_at(silent, [MUG, PLATE]) is True
