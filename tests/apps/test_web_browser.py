"""The web page in a real browser: load, ask, click through, change, download."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from segcompass.apps.web import serve  # noqa: E402
from segcompass.apps.web_desk import Desk  # noqa: E402
from segcompass.pipeline import SegCompass  # noqa: E402

pytestmark = pytest.mark.browser
WAIT = 120_000  # ms; a busy machine is slow, a broken page never ends
SIZES = {"desktop": (1280, 2200), "phone": (390, 3600)}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    """A tiny model of which every slot counts."""
    loaded = SegCompass.from_pretrained(tiny_model, device="cpu")
    loaded.threshold = 0.0
    return loaded


@pytest.fixture(scope="module")
def url(model: SegCompass, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page."""
    page = serve(Desk(model, tmp_path_factory.mktemp("desk")), upload_mb=1, block=False)
    yield page.local_url
    page.close()


@pytest.fixture(params=SIZES)
def page(
    request: pytest.FixtureRequest, open_page: Callable[..., Any], url: str, tmp_path: Path
) -> Iterator[playwright.Page]:
    """The page at one width; an error in it or a request to elsewhere fails the test."""
    with open_page(url, SIZES[request.param]) as opened:
        opened.get_by_role("button", name="Find it").wait_for(timeout=WAIT)
        yield opened
        opened.screenshot(path=tmp_path / "last.png")


def ask(page: playwright.Page) -> playwright.FrameLocator:
    """Ask, and wait until the answer is traced and its files are there."""
    page.get_by_role("button", name="Find it").click()
    page.locator("a[download='report.html']").wait_for(timeout=WAIT)
    answer = page.frame_locator("iframe").first
    answer.get_by_role("columnheader", name="Adds to confidence").first.wait_for(timeout=WAIT)
    return answer


def test_ask_click_through_change_and_download(page: playwright.Page, tmp_path: Path) -> None:
    page.screenshot(path=tmp_path / "loaded.png")
    page.get_by_role("textbox", name="Instruction").fill("<b>the</b> red mug")
    answer = ask(page)
    heading = answer.get_by_role("heading", level=2)
    assert heading.inner_text() == "<b>the</b> red mug"
    page.screenshot(path=tmp_path / "answered.png")

    # A word filters the concepts, and "Show all" brings them back.
    rows = answer.locator("table.concepts:not([hidden]) tbody tr:visible")
    listed = rows.count()
    answer.locator("h2 .w[role=button]").first.click()
    answer.get_by_text("heaviest concepts").wait_for()
    followed = answer.locator(".now b").inner_text()
    assert followed.startswith("Concept ")
    page.screenshot(path=tmp_path / "filtered.png")
    answer.get_by_role("button", name="Show all").click()
    assert rows.count() == listed

    # A patch does, by keyboard.
    stage = answer.get_by_role("application")
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        stage.press(key)
    answer.get_by_text("on patch 6 of 16").wait_for()  # the picture is a grid of 4 × 4
    stage.press("Escape")

    # A slot shows its own concepts; one is switched off, one turned up; the head runs again.
    answer.get_by_role("button", name="Slot 1").click()
    table = answer.locator("table.concepts[data-slot='1']")
    table.get_by_role("checkbox").first.uncheck()
    table.get_by_role("slider").nth(1).press("ArrowRight")
    answer.get_by_text("2 changed.").wait_for()
    answer.get_by_role("button", name="Run the head again").click()
    compared = page.frame_locator("iframe").nth(1)
    compared.get_by_role("heading", name="Before and after").wait_for(timeout=WAIT)
    told = compared.locator(".now").inner_text()
    assert " off, Concept " in told
    assert "×1.25" in told
    assert compared.locator("tbody tr").count() == 6
    page.screenshot(path=tmp_path / "changed.png")

    # Every file is there, and one of each sort is downloaded: Chromium stops at ten in a row.
    links = page.locator("a[download]")
    files = {}
    for link in links.all():
        name, address = link.get_attribute("download"), link.get_attribute("href")
        assert name and address and page.request.get(address).ok
        if name != "coco.json" and Path(name).suffix in {p.suffix for p in files.values()}:
            continue
        with page.expect_download() as loading:
            link.click()
        target = tmp_path / loading.value.suggested_filename
        loading.value.save_as(target)
        files[target.name] = target
    assert {path.suffix for path in files.values()} == {".html", ".json", ".png", ".npz"}
    (record,) = (p for p in files.values() if p.suffix == ".json" and p.name != "coco.json")
    assert json.loads(record.read_text(encoding="utf-8"))["instruction"] == "<b>the</b> red mug"
    assert len(json.loads(files["coco.json"].read_text())) == 6


def test_an_example_is_taken_and_mistakes_are_told(page: playwright.Page, tmp_path: Path) -> None:
    page.get_by_text("My legs are tired.").click()
    box = page.get_by_role("textbox", name="Instruction")
    playwright.expect(box).to_have_value("My legs are tired.", timeout=WAIT)
    box.fill("   ")
    page.get_by_role("button", name="Find it").click()
    alert = page.get_by_role("alert")
    alert.wait_for(timeout=WAIT)
    assert "the instruction is empty" in alert.inner_text()
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"%PDF-1.7 <img src=x>")
    page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.locator("input[type=file]").first.set_input_files(fake)
    page.wait_for_timeout(500)
    box.fill("the mug")
    page.get_by_role("button", name="Find it").click()
    page.get_by_text("is PDF, which is not read").wait_for(timeout=WAIT)


def test_stop_ends_the_work_behind_the_page(
    page: playwright.Page, model: SegCompass, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def think_for_ever(*_: Any, on_text: Callable[[list[str]], None], **__: Any) -> None:
        try:
            for number in count():
                on_text([f"<think>I see {number} things"])
                time.sleep(0.05)
        finally:
            ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(model, "predict", think_for_ever)
        page.get_by_role("button", name="Find it").click()
        page.get_by_text("I see").wait_for(timeout=WAIT)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for(timeout=WAIT)
        assert ended.wait(WAIT / 1000)
    page.wait_for_timeout(500)
    assert not page.get_by_text("I see").count()  # nothing that came late took its place
    ask(page)  # and the next question is answered


def test_the_server_hands_out_nothing_else(url: str, tiny_model: Path, tmp_path: Path) -> None:
    def status(path: str, **headers: str) -> int:
        asked = urllib.request.Request(url + path, headers=headers)
        try:
            with urllib.request.urlopen(asked) as answer:
                assert "default-src 'self'" in answer.headers["content-security-policy"]
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("") == 200
    assert status("", Host="elsewhere.example") == 400
    for path in (tiny_model / "segcompass.json", Path(__file__), Path("/etc/passwd")):
        assert status(f"gradio_api/file={path}") == 403
    for path in ("monitoring", "docs", "openapi.json"):
        assert status(path) in (403, 404)
