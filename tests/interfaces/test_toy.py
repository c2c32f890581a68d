"""The sixth interface of docs/interfaces.md: one file and one config, through all commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from recipes import STEPS
from typer.testing import CliRunner

import segcompass.interfaces
from segcompass.apps.cli import app
from segcompass.data.samples import read_dataset
from segcompass.interfaces.registry import INTERFACES
from segcompass.io.errors import ConfigError

PAGE = Path("docs/interfaces.md")


def block(language: str) -> str:
    """The page's one block in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.fixture
def cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file of the page in a folder that counts as the package's own."""
    (tmp_path / "interfaces").mkdir()
    (tmp_path / "interfaces/cosine.py").write_text(block("python"), encoding="utf-8")
    path = [*segcompass.interfaces.__path__, str(tmp_path / "interfaces")]
    monkeypatch.setattr(segcompass.interfaces, "__path__", path)
    yield
    INTERFACES.pop("cosine", None)
    sys.modules.pop("segcompass.interfaces.cosine", None)


def run(*words: str) -> str:
    """A command's output."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("cosine")
def test_the_page_makes_an_interface_that_goes_everywhere(
    warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    spec = {
        "config": str(warm_config),
        "from": str(warm_config.parent / "run"),
        "out": str(tmp_path / "out"),
        "common": {"train_joint": {"oracle_steps": STEPS}},
        "arms": yaml.safe_load(block("yaml")),
        "eval": {"data": str(scenes_root), "force_format": True, "limit": 2},
        "shown": 1,
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(spec))
    (row,) = json.loads(run("compare", str(tmp_path / "compare.yaml"), "--json"))
    assert (row["interface"], row["samples"], row["explanations"]) == ("cosine", 2, ["heatmaps"])
    model = tmp_path / "out/cosine-0/model"
    bound = json.loads((model / "segcompass.json").read_text())
    assert bound["config"]["head"] == {"sharpness": 12.0}
    assert bound["parts"] == ["policy", "segmenter", "head"]
    log = (tmp_path / "out/cosine-0/stages/joint/log.jsonl").read_text().splitlines()
    assert all("heatmap_dice" in json.loads(line) for line in log)
    sample = read_dataset(scenes_root, "val")[0]
    words = ("predict", str(sample.image_path), "-i", sample.instruction, "--model", str(model))
    record = json.loads(run(*words, "--json", "--out", str(tmp_path / "answers")))
    assert record["interface"] == "cosine"
    assert (tmp_path / "answers/report.html").is_file()


def test_a_name_that_no_file_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no interface 'cosine', there are"):
        segcompass.interfaces.registry.find("cosine")
