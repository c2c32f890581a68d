"""What happens behind the web page, with a tiny model: text while it is written, frames, files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import INTERFACES, make_prediction, malformed
from PIL import Image

from segcompass.apps import web_frames as frames
from segcompass.apps.web_desk import Desk
from segcompass.explain.intervene import Edit, Intervention
from segcompass.interfaces.registry import find
from segcompass.io.errors import ImageError, UnsafeFileError
from segcompass.io.saved import load_prediction
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction

EVIL = "</script><img src=x onerror=alert(1)>\"' srcdoc"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


@pytest.fixture
def desk(model: SegCompass, tmp_path: Path) -> Desk:
    return Desk(model, tmp_path, timeout=60)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "kitchen.png"
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def prediction(desk: Desk, picture: Path) -> Prediction:
    *_, answer = desk.ask(picture, "the red mug")
    assert isinstance(answer, Prediction)
    return answer


def page_of(frame: str) -> str:
    """The page that a frame holds, as the browser unpacks it."""
    (page,) = re.findall(r'srcdoc="([^"]*)"', frame)
    return unescape(page)


def test_text_is_told_while_it_is_written(desk: Desk, picture: Path, model: SegCompass) -> None:
    *texts, answer = desk.ask(picture, "the red mug")
    assert isinstance(answer, Prediction)
    plain = model.predict(picture, "the red mug")
    assert len(texts) > model.policy.slots
    assert all(len(a) <= len(b) for a, b in pairwise(texts))
    assert texts[-1] == answer.text == plain.text  # streaming changes nothing
    np.testing.assert_array_equal(answer.slot_scores, plain.slot_scores)
    assert answer.source == "kitchen.png"


def test_every_row_of_a_batch_is_told(model: SegCompass, picture: Path) -> None:
    told: list[list[str]] = []
    answers = model.predict_batch(
        [picture, picture], ["the red mug", "everything one could drink from"], on_text=told.append
    )
    assert told[-1] == [answer.text for answer in answers]
    assert not model.policy.sae_layer._forward_hooks


def test_who_leaves_ends_the_generation(desk: Desk, picture: Path) -> None:
    words = desk.ask(picture, "the red mug")
    next(words)
    words.close()
    began = time.monotonic()
    while desk._busy.locked():
        assert time.monotonic() - began < 60, "the model still works for somebody who has left"
        time.sleep(0.01)
    assert not desk.model.policy.sae_layer._forward_hooks
    assert isinstance([*desk.ask(picture, "the red mug")][-1], Prediction)


def test_what_takes_too_long_is_given_up(
    desk: Desk, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.timeout = 0.05
    monkeypatch.setattr(desk.model, "predict", lambda *_, **__: time.sleep(0.5))
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
        list(desk.ask(picture, "the red mug"))


def test_bad_pictures_and_instructions_are_told(desk: Desk, tmp_path: Path, picture: Path) -> None:
    wrong: dict[str, tuple[bytes, type[Exception]]] = {
        "note.png": (b"no picture at all", ImageError),
        "paper.png": (b"%PDF-1.7 ...", UnsafeFileError),
    }
    for name, (content, kind) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind) as told:
            next(desk.ask(tmp_path / name, "the red mug"))
        assert str(tmp_path) not in str(told.value)
    with pytest.raises(ValueError, match="instruction is empty"):
        list(desk.ask(picture, "  "))


def test_only_uploads_are_read(desk: Desk, picture: Path) -> None:
    desk.uploads.mkdir()
    inside = desk.uploads / "mug.png"
    inside.write_bytes(picture.read_bytes())
    (desk.uploads / "link.png").symlink_to(picture)
    assert desk.uploaded(str(inside)) == inside
    for path in (picture, desk.uploads / ".." / picture.name, desk.uploads / "link.png"):
        with pytest.raises(ValueError, match="no longer kept"):
            desk.uploaded(str(path))
    for wrong in (None, 3, str(desk.uploads), "http://127.0.0.1/mug.png", "\0"):
        with pytest.raises(ValueError, match="no longer kept"):
            desk.uploaded(wrong)


def test_files_can_be_read_back(desk: Desk, prediction: Prediction) -> None:
    shown = replace(prediction, accepted=np.ones_like(prediction.accepted))
    answer = desk.keep(shown)
    names = {path.name: path for path in answer.files}
    suffixes = {path.suffix for path in answer.files}
    assert suffixes == {".html", ".json", ".png", ".npz"}
    (record,) = (p for p in names.values() if p.suffix == ".json" and p.name != "coco.json")
    again = load_prediction(record)
    np.testing.assert_array_equal(again.slot_masks, shown.slot_masks)
    coco = json.loads(names["coco.json"].read_text())
    assert [entry["score"] for entry in coco] == pytest.approx(shown.slot_scores.tolist())
    assert "kitchen.png" in names["report.html"].read_text(encoding="utf-8")


def test_a_change_reaches_the_head_and_not_the_policy(
    desk: Desk, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the policy is run again")

    monkeypatch.setattr(desk.model.policy, "generate", refuse)
    concepts = prediction.codes.columns.unique().tolist()
    found = desk.change(prediction, {str(concept): 0.0 for concept in concepts[:30]})
    assert np.abs(found.confidence_change).max() > 0
    page = page_of(frames.comparison_frame(found))
    assert f"Concept {concepts[0]} off" in page


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"1": float("nan")},
        {"1": -1.0},
        {"x": 1.0},
        {"9999": 2.0},
        {str(i): 0.5 for i in range(65)},
    ],
)
def test_changes_that_are_refused(
    desk: Desk, prediction: Prediction, factors: dict[str, float]
) -> None:
    with pytest.raises(ValueError):
        desk.change(prediction, factors)


def test_traced_concepts_add_up_per_slot_and_in_all(desk: Desk, prediction: Prediction) -> None:
    accepted = np.zeros_like(prediction.accepted)
    accepted[:2] = True
    traced = desk.trace(replace(prediction, accepted=accepted))
    lists = {listing.slot: listing for listing in frames.listings(prediction, traced)}
    assert lists["all"].traced
    assert lists[0].traced
    assert not lists[2].traced
    total = traced[0].concept_weights[:, 0] + traced[1].concept_weights[:, 0]
    for row in lists["all"].rows:
        assert row.weight == pytest.approx(total[row.concept], rel=1e-5, abs=1e-9)
    heaviest = np.sort(np.abs(total))[::-1][: len(lists["all"].rows)]
    np.testing.assert_allclose([abs(r.weight) for r in lists["all"].rows], heaviest, rtol=1e-5)


def test_untraced_answers_list_what_was_read() -> None:
    made = make_prediction()
    first = frames.listings(made)[1]
    assert (first.slot, first.traced) == (0, False)
    codes, attention = made.codes, made.slot_attention[0]
    best = first.rows[0]
    own = (codes.columns == best.concept).nonzero().flatten()
    expected = sum(float(codes.values[i]) * float(attention[codes.rows[i]]) for i in own)
    assert best.weight == pytest.approx(expected, rel=1e-5)
    assert best.share == 1


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_interface_has_its_answer_and_its_files(desk: Desk, interface: str) -> None:
    made = make_prediction(interface=interface)
    page = page_of(frames.answer_frame(made))
    own = interface == "concept_slots"  # the only one whose head can be run again
    assert ('class="workbench"' in page) == ('class="rerun"' in page) == own
    if not own:
        assert desk.trace(made) == []
    assert ('class="candidates"' in page) == (interface == "candidate_rerank")
    names = {path.name for path in desk.keep(made).files}
    assert {"report.html", "coco.json"} <= names
    assert frames.verdict(made) == "Found 2 masks in 1.5 s."


def test_what_can_be_changed_is_for_the_interface_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_prediction(interface="latent_query")
    assert not frames.can_be_changed(made)
    monkeypatch.setattr(find("latent_query"), "has_concepts", True)
    assert frames.can_be_changed(made)


@pytest.mark.parametrize("make", [make_prediction, malformed])
def test_frames_hold_no_foreign_markup(make: Callable[..., Prediction]) -> None:
    made = replace(make(), instruction=EVIL, reasoning=EVIL, text=EVIL, source=EVIL, model=EVIL)
    made = replace(made, tokens=(EVIL,) * len(made.tokens))
    frame = frames.answer_frame(made)
    assert frame.count("<") == 2  # the iframe's own two tags: all else is inside the attribute
    assert 'sandbox="allow-scripts"' in frame
    page = page_of(frame)
    assert "<img src=x" not in page
    assert page.count("</script>") == 2  # the card's data and the page's script
    policy = unescape(re.findall(r'Security-Policy" content="([^"]*)"', page)[0])
    assert "default-src 'none'" in policy
    for line in (
        frames.thinking(f"<think>{EVIL}"),
        frames.note(EVIL),
        frames.problem(OSError(EVIL)),
    ):
        assert "<img" not in line


def test_thinking_shows_the_thought_alone() -> None:
    shown = frames.thinking("<think> a red mug</think><|slot_1|>")
    assert ">a red mug<" in shown
    assert "slot_1" not in shown


def test_the_comparison_says_what_changed() -> None:
    before = make_prediction()
    scores = before.slot_scores.copy()
    scores[2] = 0.2
    after = replace(before, slot_scores=scores, accepted=scores > 0.5)
    edits = (Edit.ablate(100), Edit.scale(7, 1.5))
    page = page_of(frames.comparison_frame(Intervention(edits, before, after)))
    assert "Concept 100 off, Concept 7 ×1.5" in page
    assert "Before: 2 masks" in page
    assert "After: 1 mask" in page
    assert re.search(r"0\.81 → 0\.20\s*<b>-0\.61</b>", page)
    first, second = before.slot_masks[0], before.slot_masks[2]
    assert f"IoU of <b>{first.sum() / (first | second).sum():.2f}</b>" in page
