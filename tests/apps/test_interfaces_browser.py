"""Reports of every interface in a real browser: what can be switched, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import INTERFACES, make_prediction, malformed

from segcompass.apps.report import write_report

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", [(1360, 900), (390, 844)], ids=["desktop", "phone"])
def test_answers_of_all_interfaces_come_alive(
    open_page: Callable[..., Any], size: tuple[int, int], tmp_path: Path
) -> None:
    answers = [make(interface=name) for make in (make_prediction, malformed) for name in INTERFACES]
    with open_page(write_report(answers, tmp_path / "report.html").as_uri(), size) as page:
        cards = page.locator("article")
        assert cards.count() == len(answers)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for card in cards.all():
            hint = card.locator(".now").inner_text()
            concepts = card.locator("canvas").count() > 0
            assert ("a concept" in hint) == concepts
            slots = card.get_by_role("button", name="Slot ")
            if slots.count():
                slots.first.click()
                assert card.locator(".now").inner_text().startswith("Slot 0 has confidence")
            for switch in card.locator("[data-layer]").all():
                before = switch.get_attribute("aria-pressed")
                switch.click()
                assert switch.get_attribute("aria-pressed") != before
        page.screenshot(path=tmp_path / "report.png", full_page=True)


def test_boxes_follow_their_switch_and_their_slot(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_report([make_prediction(interface="text_readout")], tmp_path / "report.html")
    with open_page(path.as_uri(), (1360, 900)) as page:
        boxes = page.locator("[data-main] .prompt:not([hidden])")
        assert boxes.count() == 2  # shown unasked
        page.get_by_role("button", name="Slot 2").click()
        assert [box.get_attribute("data-slot") for box in boxes.all()] == ["2"]
        drawn, photo = boxes.locator(".line").first, page.locator("[data-main]")
        place, frame = drawn.bounding_box(), photo.bounding_box()
        assert place and frame
        scale = frame["width"] / 256
        assert place["x"] - frame["x"] == pytest.approx((180 - 28 - 2.5) * scale, abs=4)
        assert place["y"] - frame["y"] == pytest.approx((172 - 28) * scale, abs=4)
        page.get_by_role("button", name="Boxes").click()
        assert boxes.count() == 0
        assert page.locator("[data-main] .mask:not([hidden])").count() == 1
