"""What becomes of predictions as they arrive, whatever interface made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import INSTRUCTION, INTERFACES, make_prediction, malformed

from segcompass.apps.collect import Collector


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_interface_is_collected(
    interface: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collector = Collector(out=tmp_path, as_json=True)
    for prediction in (make_prediction(interface=interface), malformed(interface=interface)):
        collector.take(prediction)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["interface"] for line in lines] == [interface] * 2
    row, empty = collector.rows
    assert (row["masks"], row["confidence"]) == ("2", "0.94 0.81")
    concepts = interface in ("concept_slots", "candidate_rerank")
    assert row["top concepts"].startswith("#") == concepts
    assert (empty["masks"], empty["top concepts"]) == ("0", "–")
    collector.write_coco(tmp_path / "coco.json")
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["annotations"]) == 2 and coco["categories"][0]["name"] == INSTRUCTION
    report = collector.write_report(tmp_path, "A run").read_text(encoding="utf-8")
    assert report.count("<article") == 2


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "precious.txt", tmp_path / "out"
    outside.write_text("keep me")
    out.mkdir()
    for name in ("coco.json", "report.html"):
        (out / name).symlink_to(outside)
    collector = Collector(out=out)
    collector.take(make_prediction())
    collector.write_coco(out / "coco.json")
    collector.write_report(out, "A run")
    assert outside.read_text() == "keep me"
    assert not (out / "coco.json").is_symlink() and not (out / "report.html").is_symlink()
