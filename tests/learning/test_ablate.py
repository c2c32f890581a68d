"""The ablation script: arms share what they do not change, are run once, and side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ablate
import pytest
import yaml
from recipes import stage, write_llava_config

from segcompass.evaluation.benchmark import METRICS
from segcompass.io.errors import SegCompassError
from segcompass.learning import train
from segcompass.learning.arms import Experiment
from segcompass.learning.config import RunConfig, read_settings

FILES = sorted([*Path("configs/ablations").glob("*.yaml"), *Path("configs/compare").glob("*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_of_every_file_is_a_config(path: Path) -> None:
    experiment = Experiment.model_validate(read_settings(path))
    seen = set()
    for name, arm in experiment.arms.items():
        config = RunConfig.model_validate(experiment.settings(name, 0) | {"run": "run"})
        assert set(arm.stages or experiment.stages) <= {*train.STAGES}
        seen.add(json.dumps([config.model_dump(mode="json"), arm.eval], sort_keys=True))
    assert len(seen) == len(experiment.arms) > 1  # arms differ


def write_spec(tmp_path: Path, data: Path) -> Path:
    settings = stage(2, batch=64, latents=48, samples=4, held_out=2)
    config = write_llava_config(tmp_path, data, train_sae=settings)
    for made in ("segmenter", "warmup", "sae"):
        train.run(made, config, [], resume=False)
    spec = {
        "config": str(config),
        "from": str(tmp_path / "run"),
        "out": str(tmp_path / "out"),
        "seeds": [0],
        "common": {"train_joint": {"steps": 4, "oracle_steps": 3}},
        "arms": {"base": {}, "S=24": {"stages": ["sae", "joint"], "train_sae": {"latents": 24}}},
        "eval": {"data": str(data), "split": "val", "limit": 2},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def test_options_change_the_file_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("out: o\ncommon: {train_joint: {steps: 30, oracle_steps: 9}}\narms: {a: {}}\n")
    options = argparse.Namespace(
        file=path, seeds=[4, 5], steps=3, limit=None, model=Path("models/best")
    )
    assert ablate.shortened(options) == [
        "seeds=[4, 5]",
        "common.train_joint.steps=3",
        "common.train_joint.oracle_steps=1",
        "common.train_joint.start=models/best",
        "out=o-steps3-best",
    ]
    arms = "{early: {train_joint: {oracle_steps: 10}}, long: {train_joint: {steps: 80}}, all: {}}"
    path.write_text(f"out: o\ncommon: {{train_joint: {{steps: 40}}}}\narms: {arms}\n")
    options = argparse.Namespace(file=path, seeds=None, steps=20, limit=None, model=None)
    assert ablate.shortened(options) == [
        "common.train_joint.steps=20",
        "arms.early.train_joint.oracle_steps=5",
        "arms.long.train_joint.steps=20",
        "out=o-steps20",
    ]
    path.write_text("out: o\nfrom: runs/nano\n")
    options = argparse.Namespace(file=path, seeds=None, steps=None, limit=7, model=Path("best"))
    assert ablate.shortened(options) == ["eval.limit=7", "from=best", "out=o-limit7-best"]


def write_log(path: Path, rewards: list[float | None], answers: int = 48) -> Path:
    rows = [{"step": i, "answers": answers, "reward": r} for i, r in enumerate(rewards)]
    told = [{k: v for k, v in row.items() if v is not None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


def test_answers_are_counted_until_rewards_have_converged(tmp_path: Path) -> None:
    """A ramp from 0 to 1 over 100 steps behind 20 flat ones: its mean of 20 follows it."""
    ramp = [0.0] * 20 + [(i + 1) / 100 for i in range(100)] + [1.0] * 60
    log = write_log(tmp_path / "log.jsonl", ramp)
    # Where the ramp has just ended, the mean of the last 20 is 0.905. After five more steps it is
    # higher by (19 + 18 + 17 + 16 + 15) / 2000 = 0.0425, after the sixth by 0.0495: past 0.95.
    assert ablate.answers_to_converge(log) == 48 * (20 + 100 + 6)
    told = write_log(tmp_path / "oracle.jsonl", [None] * 30 + ramp)  # steps without rollouts
    assert ablate.answers_to_converge(told) == 48 * (20 + 100 + 6)


def test_rewards_that_never_rose_have_not_converged(tmp_path: Path) -> None:
    falling = write_log(tmp_path / "falling.jsonl", [1 - i / 100 for i in range(90)])
    short = write_log(tmp_path / "short.jsonl", [i / 10 for i in range(10)])
    for log in (falling, short, tmp_path / "missing.jsonl"):
        assert ablate.answers_to_converge(log) is None
    figures = dict.fromkeys(ablate.FIGURES, 0.5)
    runs = [{**figures, ablate.CONVERGED: count} for count in (4000, 6000, None)]
    assert ablate.row("G=4", runs).endswith("| 5,000 ± 1,414 |")
    assert ablate.row("G=4", runs[2:]).endswith("| 0.500 | – |")


def test_arms_share_what_they_do_not_make_and_are_run_once(
    scenes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_spec(tmp_path, scenes_root)
    arguments = [str(path), "--steps", "1", "--limit", "1"]
    ablate.main(arguments)
    out = tmp_path / "out-steps1-limit1"
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| base", "| S=24"]
    assert (out / "table.md").read_text().splitlines() == table
    assert (out / "base-0/sae").resolve() == tmp_path / "run/sae"
    assert (out / "S=24-0/policy").resolve() == tmp_path / "run/policy"
    assert not (out / "S=24-0/sae").is_symlink()
    widths = [
        json.loads((out / f"{a}-0/sae/cfg.json").read_text())["d_sae"] for a in ("base", "S=24")
    ]
    assert widths == [48, 24]
    for arm in ("base", "S=24"):
        config: dict[str, Any] = json.loads((out / f"{arm}-0/config.json").read_text())
        assert (config["train_joint"]["steps"], config["train_joint"]["oracle_steps"]) == (1, 1)
        assert json.loads((out / f"{arm}-0/eval" / METRICS).read_text())["samples"] == 1

    def never(*_: object, **__: object) -> None:
        raise SegCompassError("trained again")

    monkeypatch.setattr(train, "run", never)
    ablate.main(arguments)
    assert capsys.readouterr().out.splitlines() == table
