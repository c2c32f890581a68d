"""Objects as text: every published spelling is read, everything else is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_texts import ONE, VARIANTS, WRONG

from segcompass.reasoning.object_answers import (
    ObjectsError,
    TextObject,
    read_objects,
    write_objects,
)


@pytest.mark.parametrize("case", list(VARIANTS))
def test_every_published_spelling_is_read(case: str) -> None:
    text, expected = VARIANTS[case]
    assert read_objects(text) == expected


@pytest.mark.parametrize("case", list(WRONG))
def test_everything_else_is_refused_by_name(case: str) -> None:
    text, reason = WRONG[case]
    with pytest.raises(ObjectsError, match=reason):
        read_objects(text)


def test_an_answer_as_it_is_written() -> None:
    """Rounded, within the canvas, without blanks."""
    objects = [TextObject((-3, 0.4, 99.6, 250), ((12.6, 7.2), (1, 1))), TextObject((1, 2, 3, 4))]
    assert write_objects(objects, 100) == (
        '[{"bbox_2d":[0,0,99,99],"point_2d":[13,7]},{"bbox_2d":[1,2,3,4]}]'
    )


COORDINATE = st.integers(0, 839)
POINT = st.tuples(COORDINATE, COORDINATE)
OBJECT = st.builds(
    lambda corners, points: TextObject(
        (
            min(corners[0::2]),
            min(corners[1::2]),
            max(corners[0::2]),
            max(corners[1::2]),
        ),
        tuple(points),
    ),
    st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE),
    st.lists(POINT, max_size=1),
)


@given(st.lists(OBJECT, max_size=5))
def test_what_is_written_is_read_back(objects: list[TextObject]) -> None:
    assert read_objects(write_objects(objects, 840)) == objects


PIECES = st.sampled_from(
    [*"[]{},:\"' 0123-.eE\\n", "bbox_2d", '"bbox_2d":', '"point_2d":', "NaN", ONE, "null", "é"]
)


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        objects = read_objects(text)
    except ObjectsError:
        return
    for found in objects:
        x0, y0, x1, y1 = found.box
        assert x0 <= x1 and y0 <= y1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "bbox", "x"]), inner, max_size=3)
    ),
)


@given(JSON)
def test_any_json_is_read_or_refused(value: object) -> None:
    try:
        assert isinstance(read_objects(json.dumps(value)), list)
    except ObjectsError:
        return
