"""eval, calibrate and tables on the command line: what goes where, exit codes, and the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from oracle import Oracle, make_samples, reader, square
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.evaluation import splits
from segcompass.io import masks
from segcompass.types import Sample

run = CliRunner()
EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"'>& {{ 7*7 }} \u202e"


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Six samples, a model that answers them rightly, and this folder to work in."""
    made = make_samples(tmp_path)
    monkeypatch.setattr(splits, "read_dataset", reader(made))
    fake: Any = ModuleType("segcompass.pipeline")
    fake.SegCompass = SimpleNamespace(from_pretrained=lambda name, **_: Oracle(made))
    monkeypatch.setitem(sys.modules, "segcompass.pipeline", fake)
    monkeypatch.chdir(tmp_path)
    return made


def evaluate(*options: str) -> Any:
    """`segcompass eval` on the samples."""
    return run.invoke(app, ["eval", "--data", ".", "--split", "val", *options])


def test_figures_as_json_and_as_a_table(samples: list[Sample]) -> None:
    figures = json.loads(evaluate("--json", "--limit", "3").stdout)
    assert (figures["samples"], figures["giou"], figures["limit"]) == (3, 1, 3)
    assert (figures["threshold"], figures["broken"]) == (0.5, [])
    table = evaluate("--control", "shuffle-images").stdout
    assert "by_kind.spatial" in table
    assert "shuffle-images" in table


def test_a_threshold_is_handed_on(samples: list[Sample]) -> None:
    """The oracle's masks have confidence 0.875."""
    assert json.loads(evaluate("--json", "--threshold", "0.9").stdout)["t_acc"] == 0
    assert json.loads(evaluate("--json", "--threshold", "0.8").stdout)["t_acc"] == 1


def test_broken_samples_end_in_exit_code_3(samples: list[Sample]) -> None:
    samples[1].image_path.unlink()
    result = evaluate("--json")
    assert (result.exit_code, result.stdout) == (1, "")
    result = evaluate("--json", "--on-error", "skip", "--out", "out")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["samples"] == 5
    assert re.search(r"error: s1: .*1\.png: no such file", result.stderr)
    assert "1 inputs could not be judged" in result.stderr
    assert Path("out/samples.html").is_file()


def test_a_file_of_predictions(samples: list[Sample]) -> None:
    rle = masks.encode(square(0))
    Path("p.jsonl").write_text(json.dumps({"id": "s0", "masks": [rle], "scores": [0.6]}) + "\n")
    result = evaluate("--predictions", "p.jsonl", "--json")
    assert json.loads(result.stdout)["t_acc"] == 0.25
    assert "5 samples have no prediction: s1, s2, s3, s4, s5" in result.stderr
    strict = evaluate("--predictions", "p.jsonl", "--json", "--threshold", "0.7")
    assert json.loads(strict.stdout)["t_acc"] == 0
    for option, value in (("--batch-size", "4"), ("--dtype", "bfloat16"), ("--revision", "main")):
        refused = evaluate("--predictions", "p.jsonl", option, value)
        assert refused.exit_code == 2
        assert option in refused.stderr


def test_calibration_of_a_run(samples: list[Sample]) -> None:
    """Right masks at 0.875, all else at 0.125 or less: any threshold between is the best one."""
    evaluate("--out", "out")
    result = run.invoke(app, ["calibrate", "out", "--out", "chosen", "--json"])
    found = json.loads(result.stdout)
    assert 0.125 <= found["threshold"] < 0.875
    assert found["calibrated"]["giou"] == 1
    assert json.loads(Path("chosen/calibration.json").read_text()) == found
    assert Path("chosen/slots.svg").read_text().startswith("<svg")
    assert Path("chosen/presence.svg").is_file()
    assert "threshold" in run.invoke(app, ["calibrate", "out"]).stdout


def test_no_threshold_is_chosen_on_a_test_split(samples: list[Sample]) -> None:
    line = ["eval", "--data", ".", "--split", "testA", "--out", "out"]
    assert run.invoke(app, line).exit_code == 0
    result = run.invoke(app, ["calibrate", "out"])
    assert result.exit_code == 1
    assert "testA" in result.stderr


def test_tables_of_runs(samples: list[Sample]) -> None:
    evaluate("--out", "out")
    line = ["tables", "out", "--benchmark", "reasonseg"]
    rows = json.loads(run.invoke(app, [*line, "--json"]).stdout)
    assert [row["origin"] for row in rows] == ["measured"] + ["published"] * 7
    assert run.invoke(app, [*line, "--markdown"]).stdout.startswith("| origin | name |")
    assert "published" in run.invoke(app, line).stdout
    assert run.invoke(app, ["tables", "nowhere"]).exit_code == 1


class Reader(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_nothing_in_it_acts(samples: list[Sample]) -> None:
    samples[0] = replace(samples[0], instruction=EVIL, kind=EVIL, sample_id=EVIL)
    evaluate("--out", "out")
    html = Path("out/samples.html").read_text(encoding="utf-8")
    page = Reader(html)
    cards = [attrs for tag, attrs in page.tags if attrs.get("class") == "sample"]
    assert len(cards) == 6
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    pictures = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 6
    assert all(source.startswith("data:image/webp;base64,") for source in pictures)
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["data:,"]
    assert "http" not in re.sub(r'http-equiv="', "", html)
    assert EVIL.replace("\u202e", "⟨U+202E⟩") in page.text
    assert "\u202e" not in html
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:")


def test_cards_carry_what_filters_and_sorting_need(samples: list[Sample]) -> None:
    samples[3].image_path.unlink()
    evaluate("--out", "out", "--on-error", "skip")
    page = Reader(Path("out/samples.html").read_text(encoding="utf-8"))
    cards = {a["data-number"]: a for _, a in page.tags if a.get("class") == "sample"}
    assert len(cards) == 5
    first, nothing = cards["0"], cards["2"]
    assert (first["data-iou"], first["data-union"], first["data-targets"]) == ("1.0", "16", "1")
    assert (first["data-kind"], first["data-status"]) == ("spatial", "ok")
    assert (nothing["data-status"], nothing["data-targets"]) == ("no_target", "0")
    assert first["data-margin"] == "0.375"
    assert all("worst" in (card["data-groups"] or "") for card in cards.values())


def test_a_picture_that_is_gone_leaves_its_card(samples: list[Sample]) -> None:
    evaluate("--out", "out")
    samples[0].image_path.unlink()
    evaluate("--out", "out")
    page = Reader(Path("out/samples.html").read_text(encoding="utf-8"))
    assert "The picture is no longer there." in page.text
    assert [tag for tag, _ in page.tags].count("img") == 5


@pytest.mark.browser
def test_the_page_shows_the_worst_first_in_a_browser(samples: list[Sample], tmp_path: Path) -> None:
    """Samples 0 and 3 swap their targets: two answers of IoU 0 among six."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs Chromium: apt-get install chromium"
    right = list(samples)
    samples[0] = replace(right[0], targets=right[3].targets, instruction=EVIL)
    samples[3] = replace(right[3], targets=right[0].targets)
    assert evaluate("--out", "out").exit_code == 0
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [*command, (tmp_path / "out" / "samples.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    page = Reader(dom)
    ious = [a["data-iou"] for _, a in page.tags if a.get("class") == "sample"]
    assert ious == ["0.0", "0.0", "1.0", "1.0", "1.0", "1.0"]
    assert "6 of 6 samples on this page" in page.text
    assert [a["data-group"] for _, a in page.tags if a.get("aria-pressed") == "true"] == ["worst"]
