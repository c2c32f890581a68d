"""Every interface through the same commands: train, resume, eval, predict with report, the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import stage
from typer.testing import CliRunner

from segcompass import SegCompass
from segcompass.apps.cli import app
from segcompass.apps.web_frames import answer_frame
from segcompass.data.samples import read_dataset
from segcompass.evaluation.footprint import explanations_of
from segcompass.learning.arms import Experiment
from segcompass.learning.engine.loop import Loop

ONE = {"policy": {"use": {"prompt": {"slots": 1}}}}
MAPPER = {"mapper": {"heads": 2, "head_width": 8}}
SOURCE = {"interface": "concentration_token", "head": MAPPER}
ARMS: dict[str, dict[str, Any]] = {
    "concentration_token": {"head": MAPPER, **ONE},
    "latent_query": {"train_joint": {"mask_bce_weight": 2.0}, **ONE},
    "text_readout": {
        "head": {"canvas": {"side": 100, "fit": "square"}},
        "policy": {
            "use": {
                "max_new_tokens": 120,
                "prompt": {"form": "objects", "canvas_side": 100, "slots": 2},
            }
        },
    },
    "candidate_rerank": {
        "head": {
            **SOURCE,
            "candidates": {"best_of_three": False, "each": 1},
            "scorer": {
                **{"sae_layer": 0, "pad_to_square": True, "max_new_tokens": 40},
                "prompt": {"form": "score"},
            },
        },
        "train_scorer": stage(1, samples=2, together=2),
        **ONE,
    },
}
SHOWS = {
    "concentration_token": {"heatmaps"},
    "latent_query": set(),
    "text_readout": {"boxes and points"},
    "candidate_rerank": {"heatmaps", "policy's attention", "candidates"},
}


def run(*words: str) -> str:
    """A command's output."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def write_config(name: str, warm_config: Path, folder: Path) -> Path:
    """A run of one interface, which begins with the warm parts: told answers, then rollouts."""
    joint = {
        "steps": 2,
        "save_every": 1,
        "oracle_steps": 1,
        "rollout": {"group": 2, "forced_steps": 1},
    }
    experiment = Experiment.model_validate(
        {
            "config": str(warm_config),
            "out": str(folder),
            "common": {"train_joint": joint},
            "arms": {name: {"interface": name, **ARMS[name]}},
            "eval": {"data": "unused"},
        }
    )
    settings = experiment.settings(name, 0)
    for part in ("policy", "segmenter"):
        place = Path(settings["run"]) / part
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(warm_config.parent / "run" / part, target_is_directory=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("name", ARMS)
def test_the_same_commands_serve(
    name: str, warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    path = write_config(name, warm_config, tmp_path)
    stages = ["joint", "scorer"] if name == "candidate_rerank" else ["joint"]
    for word in stages:
        run("train", word, str(path))
    folder = tmp_path / f"{name}-0"
    log = (folder / "stages/joint/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    assert "reward" in json.loads(log[1])

    model = ("--model", str(folder / "model"))
    words = ("eval", *model, "--data", str(scenes_root), "--split", "val", "--limit", "2")
    figures = json.loads(run(*words, "--force-format", "--json", "--out", str(tmp_path / "eval")))
    assert (figures["samples"], figures["format_valid"]) == (2, 1.0)

    sample = read_dataset(scenes_root, "val")[0]
    words = ("predict", str(sample.image_path), "-i", sample.instruction, *model, "--json")
    record = json.loads(run(*words, "--out", str(tmp_path / "answers")))
    assert record["interface"] == name
    assert (tmp_path / "answers/report.html").is_file()

    loaded = SegCompass.from_pretrained(folder / "model", device="cpu")
    assert loaded.threshold == (0.0 if name == "text_readout" else 0.5)
    answer = loaded.predict(sample.image_path, sample.instruction, threshold=0.0)
    assert {*explanations_of([answer])} == SHOWS[name]
    assert sample.instruction.split()[0] in answer_frame(replace(answer, source="a.png"))


@pytest.mark.parametrize("name", [name for name in ARMS if name != "candidate_rerank"])
def test_killed_and_resumed_equals_uninterrupted(
    name: str, warm_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's stage has a test of its own; its source is one of these."""
    straight, cut = (write_config(name, warm_config, tmp_path / at) for at in ("straight", "cut"))
    run("train", "joint", str(straight))
    plain = Loop._one_step

    def dies(self: Loop, *arguments: Any) -> Any:
        if self.step == 1:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_one_step", dies)
        killed = CliRunner().invoke(app, ["train", "joint", str(cut)])
    assert killed.exit_code == 130, killed.stderr
    assert not (cut.parent / f"{name}-0/model").exists()
    run("train", "joint", str(cut), "--resume")
    one, other = (path.parent / f"{name}-0/model" for path in (straight, cut))
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert Path("policy/model.safetensors") in files
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
