"""Sheets of predictions: what stands where, and text of any kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from factories import DISCS, INTERFACES, SIZE, make_prediction, malformed, no_target
from hypothesis import given
from hypothesis import strategies as st

from segcompass.io.outputs import slot_colour
from segcompass.io.sheets import (
    BAD,
    BIG,
    GAP,
    GOOD,
    PAD,
    PAPER,
    SMALL_TILE,
    TILE,
    TITLE,
    Entry,
    font_for,
    plain,
    sheet,
    wrap,
)


def wanted(count: int = 2) -> np.ndarray:
    """The true masks of the first discs."""
    yy, xx = np.mgrid[:SIZE, :SIZE]
    discs = [(xx - x) ** 2 + (yy - y) ** 2 <= r**2 for (x, y), r, _ in DISCS[:count]]
    return np.stack(discs) if discs else np.zeros((0, SIZE, SIZE), dtype=bool)


def colours(entry: Entry) -> set[tuple[int, ...]]:
    page = sheet([entry], "step 200")
    return {colour for _, colour in page.getcolors(page.width * page.height)}  # type: ignore[union-attr, misc]


def test_cards_stand_below_one_another() -> None:
    entries = [
        Entry(make_prediction(), wanted()),
        Entry(no_target(), wanted(0)),
        Entry(malformed()),
    ]
    one, three = sheet(entries[:1], "step 200"), sheet(entries, "step 200")
    assert three.width == one.width and three.height > 2.5 * one.height
    assert three.getpixel((0, three.height - 1)) == PAPER
    assert sheet([], "step 0").size > (0, 0)


def test_the_judgement_is_seen_in_its_colour() -> None:
    """IoU 1 is good, IoU 0 is bad, and a malformed answer is bad whatever it has."""
    assert GOOD in colours(Entry(make_prediction(), wanted()))
    wrong = colours(Entry(make_prediction(), ~wanted(1)))
    assert BAD in wrong and GOOD not in wrong
    assert GOOD in colours(Entry(no_target(), wanted(0)))  # rightly nothing
    cut_off = colours(Entry(malformed(), wanted(0)))  # nothing wanted, but this is no answer
    assert BAD in cut_off and GOOD not in cut_off
    unknown = colours(Entry(make_prediction()))
    assert GOOD not in unknown and BAD not in unknown


def test_every_slot_has_its_heatmap_and_those_that_count_a_frame() -> None:
    prediction = make_prediction()
    page = np.asarray(sheet([Entry(prediction, wanted())], "step 200"))
    areas = {k: int((page == slot_colour(k)).all(-1).sum()) for k in range(6)}
    frame = 4 * 3 * SMALL_TILE  # px: four sides, three wide
    assert all((area > frame) == prediction.accepted[k] for k, area in areas.items())
    assert all(areas.values())  # the small square by the confidence


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_interface_has_a_card_of_what_it_shows(interface: str) -> None:
    """Two small tiles a column: six heatmaps, four candidates, or none at all."""
    bare = sheet([Entry(make_prediction(interface="latent_query"))], "x").width
    page = sheet([Entry(make_prediction(interface=interface))], "x")
    columns = {"concept_slots": 3, "concentration_token": 3, "candidate_rerank": 5}
    assert page.width == bare + columns.get(interface, 0) * (SMALL_TILE + GAP)
    assert sheet([Entry(malformed(interface=interface))], "x").height > TILE


def test_long_pictures_keep_their_proportions() -> None:
    thin = replace(
        make_prediction(),
        image_rgb=np.zeros((40, 400, 3), dtype=np.uint8),
        slot_masks=np.zeros((6, 40, 400), dtype=bool),
        slot_heatmaps=np.zeros((6, 40, 400), dtype=np.float32),
    )
    page = np.asarray(sheet([Entry(thin)], "x"))
    black = (page == 0).all(-1)
    rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
    assert len(rows) == round(TILE / 10) and columns[TILE - 1] - columns[0] == TILE - 1


WIDTH = 120
FONT = font_for("", 15)
width_of = FONT.getlength


@given(st.text(st.sampled_from("aWi杯é. "), max_size=60))
def test_wrapping_loses_nothing_and_fits(text: str) -> None:
    rows = wrap(text, FONT, WIDTH, lines=10**6)
    assert "".join(rows).replace(" ", "") == "".join(text.split())
    assert all(width_of(row) <= WIDTH for row in rows if len(row) > 1)


@given(st.integers(1, 60), st.integers(1, 5))
def test_what_does_not_fit_ends_in_an_ellipsis(words: int, lines: int) -> None:
    text = " ".join(f"word{i}" for i in range(words))
    whole, cut = wrap(text, FONT, WIDTH, 10**6), wrap(text, FONT, WIDTH, lines)
    assert len(cut) <= lines
    if len(whole) <= lines:
        assert cut == whole
    else:
        assert cut[-1].endswith(" …") and width_of(cut[-1]) <= WIDTH
        assert cut[:-1] == whole[: lines - 1]


def test_text_that_acts_unseen_is_dropped() -> None:
    assert plain("a\x07b\u202ec\n\td\ud800") == "abc d"


@pytest.mark.parametrize("text", ["", "杯" * 400, "x" * 4000, "\x00\u202e"])
def test_any_text_can_be_drawn(text: str) -> None:
    prediction = replace(make_prediction(), instruction=text, reasoning=text)
    assert sheet([Entry(prediction, wanted())], text).height < 1200


def test_a_label_tells_two_cards_of_one_question_apart() -> None:
    plain, before = (
        sheet([Entry(make_prediction(), label=label)], "x") for label in ("", "Before")
    )
    head = (0, 0, before.width, 2 * PAD + TITLE + BIG)
    below = (0, head[3], before.width, before.height)
    assert before.crop(head).tobytes() != plain.crop(head).tobytes()
    assert before.crop(below).tobytes() == plain.crop(below).tobytes()


def test_a_long_title_ends_within_the_page() -> None:
    """Instead of being cut off at the edge."""
    page = sheet([Entry(make_prediction())], "Concept 1234 off, " * 40)
    edge = page.crop((page.width - PAD, 0, page.width, PAD + TITLE - 4))
    assert [colour for _, colour in edge.getcolors() or []] == [PAPER]
