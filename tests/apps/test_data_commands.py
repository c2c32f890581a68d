"""`segcompass data`: what is printed, and the exit codes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from coco_sets import annotation, edit_instances, write_set
from typer.testing import CliRunner

from segcompass.apps.cli import app

run = CliRunner()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_set(tmp_path / "refcoco")


def test_check_prints_counts_beside_the_published_ones(root: Path) -> None:
    result = run.invoke(app, ["data", "check", str(root)])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["split", "images", "samples", "published"]
    assert rows[1] == ["val", "1", "2", "10,834"]


def test_check_lists_every_problem(root: Path) -> None:
    odd = [annotation(11, [[1, 1, 5, 1, 5]]), annotation(12, [[1, 1, 5, 1, 5]])]
    edit_instances(root, annotations=lambda rows: odd)
    result = run.invoke(app, ["data", "check", str(root)])
    assert result.exit_code == 3
    for ann_id in (11, 12):
        assert f"broken mask: {root}/instances.json: annotation {ann_id}: " in result.stdout
    assert result.stdout.splitlines()[-1].split() == ["broken", "mask", "2"]
    result = run.invoke(app, ["data", "check", str(root), "--layout", "refcoco", "--json"])
    assert result.exit_code == 3
    facts = json.loads(result.stdout)
    assert facts["counts"] == {"broken mask": 2}
    assert [problem["entry"] for problem in facts["problems"]] == ["annotation 11", "annotation 12"]


def test_check_refuses_a_pickle_that_would_run_code(root: Path) -> None:
    (root / "refs(unc).p").write_bytes(pickle.dumps([print], protocol=2))
    result = run.invoke(app, ["data", "check", str(root)])
    assert result.exit_code == 5
    assert "unsafe file" in result.stdout and "refs(unc).p asks for" in result.stdout


def test_check_of_nothing(tmp_path: Path) -> None:
    result = run.invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1 and "no known layout" in result.stderr


def test_import_then_check(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run.invoke(app, ["data", "import", str(root), "--out", str(out), "--split", "val"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[:3] == ["val", "1", "1"]
    assert run.invoke(app, ["data", "check", str(out)]).exit_code == 0
    again = run.invoke(app, ["data", "import", str(root), "--out", str(out)])
    assert again.exit_code == 1 and "exists" in again.stderr


def test_import_names_what_it_leaves_out(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("image,instruction\np.jpg,all of it\nq.jpg,lost\n")
    line = ["data", "import", str(root), "--out", str(tmp_path / "out"), "--form", "coco"]
    result = run.invoke(app, [*line, "--instructions", str(table)])
    assert result.exit_code == 3
    assert "row 2" in result.stderr and "q.jpg" in result.stderr
    assert result.stdout.splitlines()[1].split()[:3] == ["train", "1", "1"]
