"""The report: one file, nothing outside it, and text from outside never acts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import GRID, SLOTS, THOUGHT, make_prediction, malformed, no_target
from PIL import Image

from segcompass.apps.pages import duration, visible
from segcompass.apps.report import render_report, write_report
from segcompass.types import Prediction, Status

HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"'>& {{ 7*7 }} "
    "\x00\x07\x1b[31m أين الكوب؟ 🫖 杯子 \u202egnp.exe \ud83d"
)


class Page(HTMLParser):
    """The page as a browser would take it apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text += data

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and css_class in [*(attributes.get("class") or "").split(), ""]
        ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report([make_prediction(), no_target(), malformed()], title="A run"))


def card_data(page: Page, index: int) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(page.scripts[index])
    return loaded


def test_everything_is_inside_the_file(tmp_path: Path) -> None:
    path = write_report([make_prediction()], tmp_path / "new" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|url\(|@import", html)
    for tag, attributes in Page(html).tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:40]}>"
    assert len(html) < 200_000


def test_the_policy_allows_no_request_and_only_our_script(page: Page) -> None:
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("field", ["instruction", "reasoning", "source", "model"])
def test_text_from_outside_stays_text(field: str) -> None:
    page = Page(render_report([make_prediction(**{field: HOSTILE})], title=HOSTILE))
    assert len(page.scripts) == 2  # the card's data and our own
    assert card_data(page, 0)["width"] == 256
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not any(attributes.get("src") == "x" for attributes in page.all("img"))
    shown = re.sub(r"\s+", " ", page.text)
    if field in ("instruction", "reasoning", "model"):  # of a source only the name is shown
        assert "</script><script>alert(1)</script> <img src=x" in shown
        assert "{{ 7*7 }} ␀␇␛[31m أين الكوب؟ 🫖 杯子 ⟨U+202E⟩gnp.exe" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.text)


def test_hostile_token_texts_stay_out(page: Page) -> None:
    prediction = make_prediction()
    html = render_report([make_prediction(tokens=("</script><b>",) * len(prediction.tokens))])
    assert "</script><b>" not in html


def test_every_slot_and_layer_is_there(page: Page) -> None:
    assert len(page.all("article")) == 3
    assert len(page.all("img", "heat")) == 3 * SLOTS
    assert [a["data-slot"] for a in page.all("img", "mask")] == ["0", "2"]
    assert len(page.all("button", "slot")) == 3 * SLOTS
    assert len(page.all("button", "rejected")) == 3 * SLOTS - 2
    assert len(page.all("nav")) == 1
    assert not Page(render_report([make_prediction()])).all("nav")


def test_answers_without_masks_say_so(page: Page) -> None:
    assert "nothing in the picture matches" in page.text
    assert "does not have the form" in page.text
    assert "No concept was active." in page.text
    assert "3 pictures · 1 with masks · 1 nothing matches · 1 malformed answer" in page.text


def test_truncated_answers_and_empty_runs_render() -> None:
    html = render_report([make_prediction(status=Status.TRUNCATED, reasoning="", source=None)])
    assert "truncated answer" in html
    assert "0 pictures" in render_report([])


def test_words_are_shaded_by_their_activation(page: Page) -> None:
    data = card_data(page, 0)
    shades = {
        int(a["data-word"] or 0): float((a["style"] or "").removeprefix("--a:"))
        for a in page.all("span", "w")[: len(data["words"])]
    }
    assert sorted(shades) == list(range(len(data["words"])))
    assert max(shades.values()) == 1.0
    assert THOUGHT in page.text


def test_data_says_where_a_concept_fires(page: Page) -> None:
    data = card_data(page, 0)
    scale, on_image, on_words = data["concepts"]["101"]  # the blue disc: right and low
    codes = make_prediction().codes
    assert scale == pytest.approx(float(codes.values[codes.columns == 101].max()), abs=0.01)
    for token in on_image[::2]:
        x0, y0, x1, y1 = data["boxes"][token]
        assert np.hypot((x0 + x1) / 2 - 180, (y0 + y1) / 2 - 172) < 1.25 * 28
    assert max(on_image[1::2] + on_words[1::2]) == 99
    assert len(data["boxes"]) == GRID**2
    assert all(len(row) == GRID**2 and max(row) == 99 for row in data["heat"])
    listed = {a["data-concept"] for a in page.all("button", "chip")}
    assert listed <= set().union(*(card_data(page, i)["concepts"] for i in range(3)))


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_layers_lie_where_masks_and_heatmaps_do(page: Page) -> None:
    mask = np.asarray(decoded(page.all("img", "mask")[0]["src"]).convert("RGBA"))
    tint = mask[..., 3] == mask[mask.shape[0] * 84 // 256, mask.shape[1] * 88 // 256, 3]
    truth = make_prediction().slot_masks[0]
    small = tint[:: tint.shape[0] // 256, :: tint.shape[1] // 256]
    assert (small & truth).sum() / (small | truth).sum() > 0.85  # less by the outline's width
    heat = np.asarray(decoded(page.all("img", "heat")[0]["src"]).convert("RGBA"))[..., 3]
    assert heat[42, 44] > 200 > 20 > heat[120, 8]


def test_large_pictures_are_sent_small() -> None:
    large = _enlarged(make_prediction(), 8)
    picture = decoded(Page(render_report([large])).all("img", "photo")[0]["src"])
    assert max(picture.size) == 1024


def _enlarged(prediction: Prediction, times: int) -> Prediction:
    def grow(array: np.ndarray) -> np.ndarray:
        return array.repeat(times, axis=-1).repeat(times, axis=-2)

    return make_prediction(
        image_rgb=prediction.image_rgb.repeat(times, axis=0).repeat(times, axis=1),
        slot_masks=grow(prediction.slot_masks[:1]),
        slot_heatmaps=grow(prediction.slot_heatmaps[:1]),
        slot_scores=prediction.slot_scores[:1],
        accepted=prediction.accepted[:1],
        slot_attention=prediction.slot_attention[:1],
    )


def test_same_predictions_same_page() -> None:
    assert render_report([make_prediction()]) == render_report([make_prediction()])


def test_what_a_reader_could_not_see_becomes_a_symbol() -> None:
    assert visible("a\x00b\u202ec\x9fd\ud800") == "a␀b⟨U+202E⟩c\ufffdd\ufffd"
    assert visible("line\n\ttab é 🫖 \u200f") == "line\n\ttab é 🫖 \u200f"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0123, "12 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (12.3, "12 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.browser
def test_the_page_comes_alive_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs Chromium: apt-get install chromium"
    hostile = make_prediction(instruction=HOSTILE.replace("alert(1)", "document.title='bad'"))
    path = write_report([make_prediction(), hostile], tmp_path / "report.html", title="Good")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert dom.count('aria-live="polite">Pick a slot') == 2
    assert "<title>Good</title>" in dom
