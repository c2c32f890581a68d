"""The report: one file, nothing outside it, and text from outside never acts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import GRID, INTERFACES, SLOTS, THOUGHT, make_prediction, malformed, no_target
from PIL import Image

from segcompass.apps.pages import duration
from segcompass.apps.report import render_report, write_report
from segcompass.apps.visible import visible
from segcompass.types import Candidates, Prediction, Status

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


def switches(page: Page) -> list[str | None]:
    return [a["data-layer"] for a in page.all("button") if "data-layer" in a]


@pytest.mark.parametrize(
    ("interface", "offered"),
    [
        ("concept_slots", ["tokens", "heat", "masks"]),
        ("concentration_token", ["heat", "masks"]),
        ("latent_query", ["masks"]),
        ("text_readout", ["prompt", "masks"]),
        ("candidate_rerank", ["tokens", "heat", "masks"]),
    ],
)
def test_only_what_an_interface_shows_is_offered(interface: str, offered: list[str]) -> None:
    page = Page(render_report([make_prediction(interface=interface)]))
    data = card_data(page, 0)
    assert switches(page) == offered
    assert bool(page.all("img", "heat")) == ("heat" in offered)
    assert bool(page.all("svg", "prompt")) == ("prompt" in offered)
    assert bool(page.all("canvas")) == bool(page.all("span", "w")) == ("tokens" in offered)
    assert bool(page.all("ul", "concepts")) == bool(data["concepts"]) == ("tokens" in offered)
    assert bool(page.all("section", "candidates")) == (interface == "candidate_rerank")
    assert interface in page.text and THOUGHT in page.text
    guide = {"tokens": "Tokens.", "heat": "Heatmap.", "prompt": "Boxes.", "masks": "Masks."}
    assert {layer for layer, title in guide.items() if title in page.text} == set(offered)


@pytest.mark.parametrize("interface", INTERFACES)
def test_malformed_answers_of_every_interface_offer_no_empty_switch(interface: str) -> None:
    page = Page(render_report([malformed(interface=interface)]))
    assert "masks" not in switches(page) and "prompt" not in switches(page)
    assert "does not have the form" in page.text


def test_boxes_and_points_are_drawn_where_the_answer_names_them() -> None:
    prediction = make_prediction(interface="text_readout")
    page = Page(render_report([prediction]))
    assert [a["data-slot"] for a in page.all("svg", "prompt")] == ["0", "2"]
    assert [a["data-slot"] for a in page.all("button", "slot")] == ["0", "2"]
    assert page.all("svg", "prompt")[0]["viewbox"] == "0 0 256 256"
    (box, _), points = page.all("path", "line")[::3], page.all("path", "point")
    corners = [float(number) for number in re.findall(r"[\d.]+", box["d"] or "")]
    assert corners == pytest.approx([41.5, 40, 132, 131.2, 41.5])  # M x0 y0 H x1 V y1 H x0
    assert [a["class"] for a in points] == ["casing point"] * 2 + ["line point"] * 2
    assert re.findall(r"[\d.]+", points[1]["d"] or "") == ["70.0", "88.5", "0"]
    assert '"bbox_2d":[41,40,132,131]' in page.text
    assert "names no object" in Page(render_report([malformed(interface="text_readout")])).text


def test_candidates_stand_in_order_and_the_chosen_one_is_marked() -> None:
    thoughts = ("", HOSTILE, "the best", "")
    made = make_prediction(interface="candidate_rerank")
    assert made.candidates is not None
    changed = replace(made, candidates=made.candidates._replace(thoughts=thoughts, chosen=0))
    page = Page(render_report([changed]))
    assert re.findall(r"0\.\d\d(?=\s*(?:slot|direct|attention) ?\d?)", page.text) == [
        "0.90", "0.60", "0.40", "0.10",
    ]  # fmt: skip
    assert [a.get("class") for a in page.all("li") if a.get("class") == "chosen"] == ["chosen"]
    assert page.text.index("0.60") < page.text.index("chosen") < page.text.index("0.40")
    assert len(page.all("p", "why")) == 2
    assert "</script><script>alert(1)</script>" in page.text
    none = Candidates(np.zeros((0, 256, 256), dtype=bool), np.zeros(0, np.float32), (), (), None)
    assert "Candidates" not in Page(render_report([replace(made, candidates=none)])).text


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


def test_the_contents_tell_pictures_apart() -> None:
    pair = [replace(make_prediction(), source=f"kitchen/<{i}>.jpg") for i in range(2)]
    contents = render_report(pair).partition("<nav")[2].partition("</nav>")[0]
    assert [f"&lt;{i}&gt;.jpg" in contents for i in range(2)] == [True, True]
