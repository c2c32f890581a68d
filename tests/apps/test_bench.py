"""`segcompass bench` on made-up benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import joint_step
import language_step
import measuring
import pytest
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.apps.console import ASSET_MISSING

RESULT = {
    "name": "counting",
    "machine": "an abacus",
    "rows": [{"measure": "time", "unit": "s", "ours": 0.5, "baseline": 1.25, "ratio": 2.5}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark, one that breaks down, and what they share."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "counting.py").write_text(
        "import sys\nassert sys.argv[1:] == ['--json']\nprint('warm')\n"
        f"print({json.dumps(json.dumps(RESULT))})"
    )
    (folder / "broken.py").write_text("raise SystemExit('out of beads')")
    (folder / "measuring.py").write_text("raise SystemExit('not to be run')")
    return folder


def bench(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_results_are_printed_and_written(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    code, said, _ = bench("counting", "--folder", folder, "--out", page, "--json")
    assert code == 0 and json.loads(said) == RESULT
    assert "## counting\n\nOn an abacus.\n" in page.read_text()
    assert "| time | s | 0.5 | 1.25 | 2.5 |" in page.read_text()


def test_one_that_fails_is_named_and_the_rest_go_on(folder: Path) -> None:
    code, said, complaints = bench("--folder", folder)
    assert code == 3
    assert "counting on an abacus" in said and "1.25" in said
    assert "broken.py" in complaints and "out of beads" in complaints
    assert "not to be run" not in complaints


def test_one_without_its_package_is_skipped_and_none_has_failed(folder: Path) -> None:
    (folder / "broken.py").unlink()
    shared = Path(measuring.__file__).parent
    needy = f"import sys\nsys.path.insert(0, {str(shared)!r})\n"
    (folder / "needy.py").write_text(f"{needy}from measuring import needs\nneeds('no_such_thing')")
    code, said, complaints = bench("--folder", folder)
    assert code == 0 and "counting on an abacus" in said
    assert "skipped: " in complaints and "needy.py" in complaints
    assert "pip install no_such_thing" in complaints


def test_the_comparison_with_trl_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # installed or not
    with pytest.raises(SystemExit) as left:
        language_step.measure(joint_step.parse([]))
    assert left.value.code == ASSET_MISSING
    assert "pip install trl" in capsys.readouterr().err


def test_what_cannot_be_run(folder: Path, tmp_path: Path) -> None:
    code, _, complaints = bench("sorting", "--folder", folder)
    assert code == 2 and "there are broken, counting" in complaints
    code, _, complaints = bench("--folder", tmp_path / "nowhere")
    assert code == 1 and "checkout" in complaints
