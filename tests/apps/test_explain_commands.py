"""`segcompass intervene` and `provenance`, on a picture and on a saved answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.reasoning.policy import Policy

run = CliRunner().invoke


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "kitchen.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


@pytest.fixture(scope="module")
def saved(picture: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    asked = ["predict", picture, "-i", "the mug", "--threshold", "0", "--model", str(tiny_model)]
    assert run(app, [*asked, "--out", str(out)]).exit_code == 0
    return next(path for path in out.glob("kitchen-*.json"))


def test_intervene_on_a_picture(picture: str, tiny_model: Path, tmp_path: Path) -> None:
    asked = ["intervene", picture, "-i", "the mug", "--threshold", "0", "--model", str(tiny_model)]
    edits = ["--ablate", "12", "--scale", "7=0.5", "--steer", "9=+30"]
    result = run(app, [*asked, *edits, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["edits"] == [
        {"concept": 12, "factor": 0.0, "shift": 0.0},
        {"concept": 7, "factor": 0.5, "shift": 0.0},
        {"concept": 9, "factor": 1.0, "shift": 30.0},
    ]
    (written,) = tmp_path.glob("*.intervention.json")
    assert json.loads(written.read_text()) == record
    with Image.open(written.with_suffix(".png")) as image:
        image.verify()
    with written.with_suffix(".csv").open(newline="") as lines:
        assert [row["slot"] for row in csv.DictReader(lines)] == list("012345")


def test_links_in_the_folder_are_replaced_not_followed(
    saved: Path, tiny_model: Path, tmp_path: Path
) -> None:
    outside, out, model = tmp_path / "precious.txt", tmp_path / "out", str(tiny_model)
    commands = (["intervene", "--ablate", "12"], ["provenance", "--slot", "0"])

    def write() -> None:
        for name, *more in commands:
            line = [name, str(saved), *more, "--model", model, "--out", str(out)]
            assert run(app, line).exit_code == 0

    write()
    written = sorted(out.iterdir())
    assert [path.suffix for path in written] == [".csv", ".json", ".png", ".dot", ".json"]
    for path in written:
        path.unlink()
        path.symlink_to(outside)
    outside.write_text("keep me")
    write()
    assert outside.read_text() == "keep me"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_saved_answer_needs_no_policy(
    saved: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the policy was run")

    monkeypatch.setattr(Policy, "generate", refuse)
    monkeypatch.setattr(Policy, "forward", refuse)
    result = run(app, ["intervene", str(saved), "--ablate", "12", "--model", str(tiny_model)])
    assert result.exit_code == 0, result.output
    assert "IoU of the answer before and after" in result.stdout
    traced = run(
        app, ["provenance", str(saved), "--slot", "2", "--model", str(tiny_model), "--json"]
    )
    assert traced.exit_code == 0, traced.output
    record = json.loads(traced.stdout)
    assert [slot["slot"] for slot in record["slots"]] == [2]
    assert record["graph"]["nodes"][0]["id"] == "slot-2"


def test_provenance_writes_its_graph(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    asked = ["provenance", str(saved), "--slot", "0", "--top", "3", "--model", str(tiny_model)]
    result = run(app, [*asked, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1 + 3
    (dot,) = tmp_path.glob("*.provenance.dot")
    assert dot.read_text().startswith("digraph provenance {")
    assert json.loads(dot.with_suffix(".json").read_text())["schema"] == "segcompass.provenance/1"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-i", "the mug"], "say what to change"),
        (["--ablate", "1"], "say what to find"),
        (["-i", "the mug", "--scale", "7"], "expected CONCEPT=NUMBER"),
        (["-i", "the mug", "--scale", "7=-1"], "finite factor"),
        (["-i", "the mug", "--steer", "7=nan"], "finite shift"),
    ],
)
def test_usage_errors(picture: str, tiny_model: Path, arguments: list[str], problem: str) -> None:
    result = run(app, ["intervene", picture, *arguments, "--model", str(tiny_model)])
    assert result.exit_code == 2
    assert problem in " ".join(result.output.replace("│", " ").split())


def test_a_concept_that_is_not_there(saved: Path, tiny_model: Path) -> None:
    result = run(app, ["intervene", str(saved), "--ablate", "64", "--model", str(tiny_model)])
    assert result.exit_code == 1
    assert "no concept 64" in result.output


@pytest.mark.parametrize("command", [["intervene", "--ablate", "1"], ["provenance"]])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    command: list[str], picture: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("keep me")
    asked = [*command, picture, "-i", "x", "--model", str(tmp_path), "--out"]
    result = run(app, [*asked, str(tmp_path / "taken")])
    assert result.exit_code == 1 and "taken cannot be a folder" in result.stderr
