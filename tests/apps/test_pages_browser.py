"""The report and the page of concept cards in a real browser: load, look around, search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_prediction, malformed, no_target
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")

from segcompass.apps.concept_page import write_concept_page  # noqa: E402
from segcompass.apps.report import write_report  # noqa: E402
from segcompass.explain.concept_cards import Card, Mention, Patch  # noqa: E402
from segcompass.explain.concept_counts import BINS  # noqa: E402
from segcompass.explain.concept_labels import Label, Score  # noqa: E402
from segcompass.explain.token_features import Feature  # noqa: E402

pytestmark = pytest.mark.browser
SIZES = {"desktop": (1360, 900), "phone": (390, 844)}
HOSTILE = "</script><script>document.title='bad'</script><img src=//x.example/a> the mug"
CARDS, PICTURES = 120, 30


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Of the window, in px."""
    return SIZES[request.param]


@pytest.fixture
def report(open_page: Callable[..., Any], size: tuple[int, int], tmp_path: Path) -> Iterator[Any]:
    """A report on four answers, one of each kind and one with hostile text."""
    answers = [make_prediction(), no_target(), malformed(), make_prediction(instruction=HOSTILE)]
    path = write_report(answers, tmp_path / "report.html", title="Kitchen")
    with open_page(path.as_uri(), size) as page:
        yield page


@pytest.fixture
def concepts(open_page: Callable[..., Any], size: tuple[int, int], tmp_path: Path) -> Iterator[Any]:
    """A page of made-up concept cards."""
    path = write_concept_page(
        [make_card(number) for number in range(CARDS)],
        make_pictures(tmp_path),
        tmp_path / "concepts.html",
        title="Concepts",
        summary=[f"{CARDS} live concepts"],
    )
    with open_page(path.as_uri(), size) as page:
        yield page


def make_card(number: int) -> Card:
    """Every third fires on pictures alone, the next on text, the last on both."""
    kind = number % 3
    word = f"w{number // 12}"
    features = [Feature("colour", "red"), Feature("word", word), Feature("colour anywhere", "red")]
    score = Score(0.9, 0.8) if number % 2 else Score(0.3, 0.2)
    patches = tuple(
        Patch((number + i) % PICTURES, (125 * i, 250, 125 * i + 125, 375), 9.0 - i)
        for i in range(6)
    )
    histogram = np.rint(900 * np.exp(-(((np.arange(BINS) - 8) / 3) ** 2))).astype(int)
    return Card(
        concept=number,
        reach=("image", "text", "shared")[kind],
        density=0.001 * (number + 1),
        fired=(40 * number, 1200),
        largest=9.0 + number,
        histogram=tuple(histogram.tolist()),
        label=Label((features[kind],), 1.0, score, score),
        words=((word, 0.7), ("the", 0.2), (HOSTILE, 0.1)),
        patches=() if kind == 1 else patches,
        mentions=() if kind == 0 else (Mention("So the ", word, " at b3 is what I look for.", 8),),
        together=(((number + 1) % CARDS, 0.31),),
        neighbours=(((number + 2) % CARDS, 0.87),),
    )


def make_pictures(folder: Path) -> dict[int, Path]:
    """Discs of different colours."""
    yy, xx = np.mgrid[:96, :128]
    files = {}
    for number in range(PICTURES):
        image = np.full((96, 128, 3), 225, dtype=np.uint8)
        disc = (xx - 20 - 3 * number) ** 2 + (yy - 40) ** 2 < 300
        image[disc] = (200, 7 * number, 60)
        files[number] = folder / f"{number}.png"
        Image.fromarray(image).save(files[number])
    return files


def fits(page: Any) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def shown(card: Any, layer: str) -> list[str]:
    """Slots of which the main picture shows a layer."""
    found = card.locator(f".stage[data-main] .{layer}:not([hidden])")
    return [image.get_attribute("data-slot") for image in found.all()]


def test_the_report_loads_whole(report: Any, tmp_path: Path) -> None:
    report.screenshot(path=tmp_path / "report.png")
    report.screenshot(path=tmp_path / "report-all.png", full_page=True)
    assert report.title() == "Kitchen"
    assert fits(report)
    assert report.locator("article").count() == 4
    assert report.get_by_role("heading", level=2).last.inner_text() == HOSTILE
    report.locator(".contents a").nth(3).click()
    playwright.expect(report.locator(".contents [aria-current]")).to_have_attribute("href", "#p3")


def test_slots_layers_and_concepts_of_the_report(report: Any, tmp_path: Path) -> None:
    card = report.locator("article").first
    said = card.locator(".now")
    assert shown(card, "mask") == ["0", "2"]
    card.get_by_role("button", name="Slot 2").click()
    assert shown(card, "mask") == ["2"]
    assert said.inner_text() == "Slot 2 has confidence 0.81, accepted."
    card.get_by_role("button", name="Heatmap").click()
    card.get_by_role("button", name="Masks").click()
    assert (shown(card, "heat"), shown(card, "mask")) == (["2"], [])
    report.screenshot(path=tmp_path / "heatmap.png")

    chip = card.locator("ul.concepts:not([hidden]) .chip").first
    concept = chip.locator(".id").inner_text()
    chip.click()
    assert said.inner_text().startswith(f"Concept {concept} fires on ")
    assert card.locator("[data-main] .tokens").is_visible()
    report.screenshot(path=tmp_path / "concept.png")
    for _ in range(2):  # the concept first, then the slot
        chip.press("Escape")
    assert said.inner_text().startswith("Pick a slot")


def test_words_and_patches_of_the_report(report: Any, tmp_path: Path) -> None:
    card = report.locator("article").first
    tip = report.get_by_role("tooltip")
    word = card.locator(".thought .w", has_text="red").first
    word.hover()
    tip.wait_for()
    followed = [row.split()[0] for row in tip.locator("div").all_inner_texts()]
    assert "100" in followed  # the concept of red mugs
    box = tip.bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= report.viewport_size["width"]
    report.screenshot(path=tmp_path / "word.png")
    for concept in followed:  # one pick after the other, then none
        word.click()
        assert card.locator(".now").inner_text().startswith(f"Concept {concept} ")
    word.click()
    assert card.locator(".now").inner_text().startswith("Pick a slot")

    picture = card.locator("[data-main]")
    box = picture.bounding_box()
    assert box
    picture.click(position={"x": box["width"] * 88 / 256, "y": box["height"] * 84 / 256})
    assert card.locator(".now").inner_text().startswith("Concept 100 fires on ")


def test_the_concept_page_finds_and_opens_cards(concepts: Any, tmp_path: Path) -> None:
    concepts.screenshot(path=tmp_path / "concepts.png")
    assert fits(concepts)
    count = concepts.locator("#count")
    cards = concepts.locator("li.concept")
    assert count.inner_text() == "120 concepts"
    assert cards.count() < CARDS  # the others wait until they are wanted
    search = concepts.get_by_role("searchbox")
    search.fill("w3")
    assert count.inner_text() == "12 concepts"
    concepts.get_by_label("Fires on").select_option("text")
    assert count.inner_text() == "4 concepts"
    concepts.locator("#family").select_option("word")
    assert count.inner_text() == "2 concepts"  # of 36 to 47 those that hold, on text: 37 and 43
    concepts.screenshot(path=tmp_path / "found.png")
    search.fill("")
    concepts.get_by_label("Fires on").select_option("")
    concepts.locator("#family").select_option("")
    concepts.get_by_label("Order").select_option("id")
    cards.first.get_by_role("button", name="#2").click()
    assert cards.count() == 1
    assert cards.first.locator(".kicker a").inner_text() == "#2"
    assert concepts.url.endswith("#c2")
    assert cards.first.locator(".patch").count() == 6
    assert cards.first.locator(".word").last.inner_text() == HOSTILE
    concepts.screenshot(path=tmp_path / "one.png")
    concepts.go_back()
    playwright.expect(count).to_have_text("120 concepts")


def test_the_concept_page_grows_as_it_is_read(concepts: Any) -> None:
    cards = concepts.locator("li.concept")
    until = time.monotonic() + 60
    while cards.count() < CARDS and time.monotonic() < until:
        concepts.mouse.wheel(0, 4000)
        concepts.wait_for_timeout(50)
    assert cards.count() == CARDS
    assert not concepts.get_by_role("button", name="Show more").is_visible()
