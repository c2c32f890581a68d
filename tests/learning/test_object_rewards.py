"""Rewards of answers that name objects, by hand: every limit from both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from segcompass.learning.object_rewards import ObjectRewardConfig, box_iou, object_scores
from segcompass.reasoning.object_answers import TextObject

CONFIG = ObjectRewardConfig()
MUG = TextObject((100, 100, 200, 200), ((150, 150),))
HAT = TextObject((400, 400, 600, 500), ((500, 450),))
SAID_MUG = '{"bbox_2d":[100,100,200,200],"point_2d":[150,150]}'
SAID_HAT = '{"bbox_2d":[400,400,600,500],"point_2d":[500,450]}'


def text(*objects: str, thought: str = "a mug") -> str:
    return f"<think>{thought}</think><answer>[{','.join(objects)}]</answer>"


def said(box: list[float], point: list[float]) -> str:
    return f'{{"bbox_2d":{box},"point_2d":{point}}}'


def accuracy(answer: str, *wanted: TextObject, side: int = 840) -> float:
    return object_scores(answer, wanted, side, CONFIG).accuracy


def test_a_perfect_answer_earns_everything() -> None:
    scores = object_scores(text(SAID_MUG), [MUG], 840, CONFIG)
    assert scores == (1, 1, 1, 1)
    assert scores.reward(CONFIG) == 1


def test_the_reward_weighs_the_scores_as_published() -> None:
    """7 points: 1 for the thought, 2 for the form, 3 for being right, 1 for no repetition."""
    scores = object_scores(text(SAID_MUG), [HAT], 840, CONFIG)
    assert scores == (1, 1, 0, 1)
    assert scores.reward(CONFIG) == pytest.approx((1 + 2 + 1) / 7)
    only = ObjectRewardConfig(think=0, answer=0, repetition=0)
    assert scores.reward(only) == 0
    assert scores.reward(ObjectRewardConfig(think=0, answer=0, accuracy=0, repetition=0)) == 0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (text(SAID_MUG), 1),
        (text(), 1),
        (f"  {text(SAID_MUG)}\n", 1),
        (text("what?"), 1),  # what stands in the answer is another score
        (text(SAID_MUG, thought=" "), 0),
        (f"<answer>[{SAID_MUG}]</answer>", 0),
        (f"Well. {text(SAID_MUG)}", 0),
        (f"{text(SAID_MUG)} Done.", 0),
        (text(SAID_MUG).removesuffix("</answer>"), 0),
        (text(SAID_MUG) * 2, 0),
    ],
)
def test_the_form_of_thought_and_answer(answer: str, score: float) -> None:
    assert object_scores(answer, [MUG], 840, CONFIG).think == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (text(SAID_MUG), 1),
        (text(), 1),
        (f"<answer>[{SAID_MUG}]</answer>", 1),  # the thought is another score
        (text('{"bbox_2d":[1,2,3,4]}'), 1 / 2),
        (text('{"point_2d":[1,2]}'), 1 / 2),
        (text('{"bbox_2d":[1,2,3],"point_2d":[1,2]}'), 1 / 2),
        (text('{"bbox_2d":[1,2,3,4],"point_2d":[1]}'), 1 / 2),
        (text("{}"), 0),
        (text(SAID_MUG, "{}"), 2 / 4),
        (text(SAID_MUG, '{"bbox_2d":[1,2,3,4]}'), 3 / 4),
        (text("mug"), 0),
        (text(SAID_MUG).replace("]}", "]"), 0),
        ("<think>a</think>", 0),
        (text(SAID_MUG) * 2, 0),
        (text(SAID_MUG, thought="<answer>[]</answer> is wrong"), 1),
    ],
)
def test_the_form_of_the_objects(answer: str, score: float) -> None:
    assert object_scores(answer, [MUG], 840, CONFIG).answer == score


@pytest.mark.parametrize(
    ("box", "point", "right"),
    [
        ([100, 100, 200, 200], [150, 150], 3),
        ([100, 100, 200, 160], [150, 150], 2 + 0),  # IoU 0.6, edges 10 px off: not under 10
        ([100, 100, 200, 161], [150, 150], 3),  # 9.75 px
        ([100, 100, 200, 150], [150, 150], 1),  # IoU exactly 0.5 is not over it; 12.5 px
        ([95, 95, 205, 205], [150, 150], 3),
        ([100, 100, 200, 200], [150, 180], 2),  # 30 px away is not under 30
        ([100, 100, 200, 200], [150, 179], 3),
        ([100, 100, 200, 170], [150, 171], 2),  # near, but not in the box that was named
        ([100, 100, 200, 170], [150, 170], 3),
        ([0, 0, 50, 50], [150, 150], 0),  # a point outside its own box
        ([0, 0, 300, 300], [150, 150], 1),  # the point alone
    ],
)
def test_one_object_by_hand(box: list[float], point: list[float], right: int) -> None:
    assert accuracy(text(said(box, point)), MUG) == pytest.approx(right / 3)


def test_distances_are_scaled_to_the_canvas() -> None:
    """On 84 px, a tenth: edges within 1 px on average, points within 3."""
    small = TextObject((10, 10, 20, 20), ((15, 15),))
    for edge, point, right in ((24, 15, 2), (23.9, 15, 3), (20, 18, 2), (20, 17.9, 3)):
        answer = text(said([10, 10, 20, edge], [15, point]))
        assert accuracy(answer, small, side=84) == pytest.approx(right / 3), (edge, point)


@pytest.mark.parametrize(
    ("objects", "wanted", "score"),
    [
        ([], [], 1),
        ([SAID_MUG], [], 0),
        ([], [MUG], 0),
        ([SAID_MUG, SAID_HAT], [MUG, HAT], 1),
        ([SAID_HAT, SAID_MUG], [MUG, HAT], 1),
        ([SAID_MUG], [MUG, HAT], 1 / 2),
        ([SAID_MUG, SAID_HAT], [MUG], 1 / 2),
        ([SAID_MUG, SAID_MUG], [MUG], 1 / 2),  # each target counts once
        ([SAID_MUG, "{}"], [MUG, HAT], 1 / 2),  # an unreadable one is a wrong one
        ([SAID_MUG, said([400, 400, 600, 500], [0, 0])], [MUG, HAT], 5 / 6),
    ],
)
def test_several_objects_by_hand(
    objects: list[str], wanted: list[TextObject], score: float
) -> None:
    assert accuracy(text(*objects), *wanted) == pytest.approx(score)


def test_the_best_pairs_count() -> None:
    """Both boxes fit both targets; the points tell which is whose."""
    one, two = TextObject((0, 0, 100, 100), ((90, 90),)), TextObject((0, 0, 100, 104), ((5, 5),))
    both = text(said([0, 0, 100, 102], [90, 90]), said([0, 0, 100, 102], [5, 5]))
    assert accuracy(both, two, one) == 1
    assert accuracy(both, one, two) == 1


@pytest.mark.parametrize(
    ("thought", "score"),
    [
        ("A mug. A hat. A cup", 1),
        ("A mug. A mug. A hat", 1),
        ("A mug. A hat. A mug. A hat.", 0),
        ("A mug. A mug. A mug", 0),
        ("...", 1),
        ("1.5 and 1.5", 1),
    ],
)
def test_sentences_may_be_repeated_once(thought: str, score: float) -> None:
    assert object_scores(text(SAID_MUG, thought=thought), [MUG], 840, CONFIG).repetition == score


def test_what_the_answer_says_is_no_repetition() -> None:
    answer = text(*[said([100.5, 100.5, 200.5, 200.5], [150.5, 150.5])] * 4)
    assert object_scores(answer, [MUG], 840, CONFIG).repetition == 1


def test_iou_of_boxes_by_hand() -> None:
    def iou(*corners: float) -> float:
        return box_iou(np.array([0.0, 0, 10, 10]), np.array(corners))

    assert iou(0, 0, 10, 10) == 1
    assert iou(5, 5, 15, 15) == pytest.approx(25 / 175)
    assert iou(10, 0, 20, 10) == iou(20, 20, 30, 30) == iou(3, 3, 3, 3) == 0
    assert box_iou(np.zeros(4), np.zeros(4)) == 0


@given(answer=st.text(max_size=60), around=st.booleans())
def test_any_text_earns_something_between_nothing_and_all(answer: str, around: bool) -> None:
    whole = f"<think>a</think><answer>{answer}</answer>" if around else answer
    scores = object_scores(whole, [MUG], 840, CONFIG)
    assert all(0 <= score <= 1 for score in scores)
    assert 0 <= scores.reward(CONFIG) <= 1


@pytest.mark.parametrize("wrong", [{"think": -1}, {"iou": 2}, {"box_px": 0}, {"points": 1}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ObjectRewardConfig.model_validate(wrong)
