"""The page of a comparison: every interface's answers, each with what it has to show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import INTERFACES, make_prediction

from segcompass.apps import compare_page
from segcompass.apps.compare_page import write_compare_page
from segcompass.io import masks
from segcompass.io.outputs import save
from segcompass.learning.arms import Experiment
from segcompass.types import Sample, Status

HOSTILE = "</script><script>document.title='bad'</script><img src=//x.example/a> the mug"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two questions to all interfaces: one that they answer, and one that finds nothing."""
    full = make_prediction()
    targets = tuple(masks.encode(mask) for mask in full.slot_masks[[0, 2]])
    hw = full.image_rgb.shape[:2]
    samples = [
        Sample("a", Path("a.png"), 0, hw, full.instruction, targets, kind="commonsense"),
        Sample("b", Path("b.png"), 1, hw, HOSTILE, (), thought="There is none."),
    ]
    monkeypatch.setattr(compare_page, "shown_samples", lambda _: samples)
    experiment = Experiment.model_validate(
        {
            **{"config": "none.yaml", "out": tmp_path, "eval": {"data": "data"}},
            "arms": {name: {} for name in INTERFACES},
        }
    )
    for name in INTERFACES:
        answer = make_prediction(interface=name)
        none = np.zeros_like(answer.accepted)
        answers = [answer, replace(answer, accepted=none, status=Status.NO_TARGET)]
        (folder,) = experiment.runs(name)
        lines = []
        for sample, given in zip(samples, answers, strict=True):
            own = {"source": str(sample.image_path), "instruction": sample.instruction}
            save(replace(given, **own), folder / "shown")
            lines.append({"sample_id": sample.sample_id, "iou": 0.75, "reasoning_correct": True})
        (folder / "eval").mkdir()
        (folder / "eval/samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return write_compare_page(experiment, [row(name) for name in INTERFACES])


def row(name: str) -> dict[str, Any]:
    """Figures of one interface."""
    figures = dict.fromkeys(("giou", "ciou", "n_acc", "t_acc"), 0.5)
    return {
        **figures,
        **{
            "name": name,
            "interface": name,
            "seeds": 2,
            "samples": 500,
            "by_kind": {"spatial": {"giou": 0.25}},
        },
        **{"reasoning_target_accuracy": 0.7, "format_valid": 1.0, "giou_by_seed": [0.4, 0.6]},
        **{"seconds": 0.4, "memory": 41e6, "parameters": 1_234_567, "explanations": ["heatmaps"]},
        "intervals": {figure: [0.4, 0.6] for figure in figures},
    }


def columns(html: str) -> list[list[str]]:
    """The columns of every question, without the one that says what is right."""
    asked = html.split('<section class="asked"')[1:]
    return [part.split('<article class="column">')[2:] for part in asked]


def test_each_column_shows_what_its_interface_has(page: Path) -> None:
    shows = dict(zip(INTERFACES, columns(page.read_text(encoding="utf-8"))[0], strict=True))
    marks = {
        "Heatmaps of the masks": {"concept_slots", "concentration_token", "candidate_rerank"},
        "concepts <b>#": {"concept_slots", "candidate_rerank"},
        "box ": {"text_readout"},
        ", chosen": {"candidate_rerank"},
        "thought right": set(INTERFACES),
    }
    for mark, expected in marks.items():
        assert {name for name, html in shows.items() if mark in html} == expected, mark


def test_where_nothing_counts_no_heatmap_is_drawn(page: Path) -> None:
    first, *_ = columns(page.read_text(encoding="utf-8"))[1]
    assert "nothing matches" in first and "No heatmap counts" in first
    assert first.count("<img") == 1


def test_the_page_is_self_contained_and_nothing_in_it_acts(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert html.count("<script>") == 1
    assert not re.findall(r'src="(?!data:)', html)
    assert "&lt;/script&gt;&lt;script&gt;document.title" in html


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1360, 900), (390, 844)])
def test_it_fits_into_a_window(
    page: Path, size: tuple[int, int], open_page: Callable[..., Any]
) -> None:
    with open_page(page.as_uri(), size) as opened:
        assert opened.title() == "Interfaces side by side"
        assert opened.evaluate("document.documentElement.scrollWidth") == size[0]
        assert opened.locator(".column").count() == 2 * (1 + len(INTERFACES))
        last = opened.locator(".column").nth(len(INTERFACES))
        last.scroll_into_view_if_needed()
        assert last.locator(".chosen").is_visible()
