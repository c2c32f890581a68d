"""Arms trained with every seed and judged alike: resumed, refused, and put into one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import STEPS
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.evaluation.run_log import ROWS, read_scores
from segcompass.io.errors import ConfigError, DataError
from segcompass.learning import arms, train
from segcompass.learning.arms import load_experiment
from segcompass.learning.compare import compare, varied
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Loop
from segcompass.learning.engine.states import write_state
from segcompass.model_folder import load_parts
from segcompass.pipeline import SegCompass
from segcompass.types import Sample

ARMS: dict[str, Any] = {
    "concept_slots": {},
    "concentration_token": {
        "interface": "concentration_token",
        "head": {"mapper": {"heads": 2, "head_width": 8}},
        "policy": {"use": {"prompt": {"slots": 1}}},
        "train_joint": {"late": {"from_step": 2}},
    },
}


def write_experiment(folder: Path, warm_config: Path, data: Path, **changes: Any) -> Path:
    """Two interfaces and two seeds."""
    spec = {
        "config": str(warm_config),
        "out": str(folder / "out"),
        "seeds": [0, 1],
        "from": str(warm_config.parent / "run"),
        "common": {"train_joint": {"oracle_steps": STEPS}},
        "arms": ARMS,
        "eval": {"data": str(data), "force_format": True},
        "shown": 2,
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, warm_config: Path, scenes_root: Path) -> Path:
    """The folder of a comparison that was killed while training, and while judging."""
    path = write_experiment(tmp_path_factory.mktemp("compare"), warm_config, scenes_root)
    steps: list[int] = []
    plain = Loop._one_step

    def dies(self: Loop, *arguments: Any) -> Any:
        if len(steps) == STEPS + 3:  # in the second run, after its state at step 2
            raise KeyboardInterrupt
        steps.append(self.step)
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_one_step", dies)
        result = CliRunner().invoke(app, ["compare", str(path)])
        assert result.exit_code == 130, result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "evaluate", _interrupted)
        assert CliRunner().invoke(app, ["compare", str(path)]).exit_code == 130
    result = CliRunner().invoke(app, ["compare", str(path), "--json"])
    assert result.exit_code == 0, result.output
    (path.parent / "out/stdout.json").write_text(result.stdout)
    return path.parent / "out"


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_every_run_is_trained_once_from_the_same_parts(done: Path, warm_config: Path) -> None:
    for name in ARMS:
        for seed in (0, 1):
            run = done / f"{name}-{seed}"
            rows = [json.loads(line) for line in (run / "stages/joint/log.jsonl").open()]
            assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
            assert (run / "policy").resolve() == (warm_config.parent / "run/policy").resolve()
            parts = load_parts(run / "model")
            assert (parts.config.interface, parts.interface.name) == (name, name)
    seeds = [(done / f"concept_slots-{s}/model/head.safetensors").read_bytes() for s in (0, 1)]
    assert seeds[0] != seeds[1]
    assert yaml.safe_load((done / "concept_slots-1.yaml").read_text())["seed"] == 1


def test_the_table_is_that_of_the_rows(done: Path) -> None:
    rows = json.loads((done / "stdout.json").read_text())
    assert json.loads((done / "comparison.json").read_text()) == rows
    assert [row["name"] for row in rows] == list(ARMS)
    for row in rows:
        own = [list(read_scores(done / f"{row['name']}-{s}/eval" / ROWS)) for s in (0, 1)]
        means = [sum(score.iou for score in scores) / len(scores) for scores in own]
        assert row["giou_by_seed"] == pytest.approx(means)
        assert row["giou"] == pytest.approx(sum(means) / 2)
        assert row["intervals"]["giou"][0] <= row["giou"] <= row["intervals"]["giou"][1]
        assert (row["seeds"], row["samples"]) == (2, 4)
        assert row["seconds"] > 0 and row["memory"] > 0
    concepts, token = rows
    assert concepts["explanations"] == ["heatmaps", "concepts", "tokens read"]
    assert token["explanations"] == ["heatmaps"]
    policy = concepts["parameters"] - _own(done / "concept_slots-0/model")
    assert policy == token["parameters"] - _own(done / "concentration_token-0/model")
    assert (done / "comparison.csv").read_text().count("\n") == 3
    assert (done / "comparison.md").read_text().startswith("|  | concept_slots | concentration_")


def _own(folder: Path) -> int:
    """What differs between interfaces on the same policy: the head, a row for each new token."""
    parts = load_parts(folder)
    rows = parts.policy.slots * parts.policy.width
    return rows + sum(p.numel() for p in parts.interface.head.parameters())


def test_the_page_shows_every_answer(done: Path) -> None:
    page = (done / "comparison.html").read_text()
    assert page.count('class="asked"') == 2
    assert page.count('class="column"') == 2 * (1 + len(ARMS))
    assert "http" not in page.replace('http-equiv="', "")


def test_what_is_done_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegCompass, "predict_batch", _interrupted)
    monkeypatch.setattr(train, "run", _interrupted)
    rows = compare(load_experiment(done.parent / "compare.yaml"))
    assert rows == json.loads((done / "comparison.json").read_text())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("footprint.json", "{"),
        ("footprint.json", '{"answered": ANSWERED, "speed": 1}'),
        ("trained.json", "{"),
        ("trained.json", "{}"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    name: str, text: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = done / "concept_slots-0" / name
    kept = path.read_text()
    same = json.dumps(json.loads(kept).get("answered"))
    monkeypatch.setattr(SegCompass, "predict_batch", _interrupted)
    path.write_text(text.replace("ANSWERED", same))
    try:
        with pytest.raises(DataError, match=rf"{path} .*delete it"):
            compare(load_experiment(done.parent / "compare.yaml"))
    finally:
        path.write_text(kept)


@pytest.mark.parametrize("change", ["common.train_joint.steps=9", "from=elsewhere", "stages=[sae]"])
def test_a_run_that_began_otherwise_is_refused(change: str, done: Path) -> None:
    with pytest.raises(ConfigError, match=r"concept_slots-0 began with other settings"):
        load_experiment(done.parent / "compare.yaml", [change])


def test_a_run_that_began_with_other_parts_is_refused(
    warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    """The folder is the same, what lies there is not: the rest would begin with other weights."""
    parts = tmp_path / "parts"
    shutil.copytree(warm_config.parent / "run/policy", parts / "policy")
    path, lent = write_experiment(tmp_path, warm_config, scenes_root), [f"from={parts}"]
    load_experiment(path, lent)
    (tmp_path / "out/concept_slots-0").mkdir()
    load_experiment(path, lent)
    (parts / "policy/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"concept_slots-0 began with .* other parts"):
        load_experiment(path, lent)


def test_a_part_that_two_stages_trained_counts_once(tmp_path: Path) -> None:
    wide, narrow = torch.zeros(4, 5), torch.zeros(3)
    for name, parts in {
        "language": {"policy.lower": wide, "policy.upper": narrow},
        "vision": {"tower.a": narrow, "heads.a": wide},
        "joint": {"policy.upper": narrow, "head.a": narrow, "place.a": wide},
    }.items():
        (tmp_path / name).mkdir()
        masters = {f"master/{key}": tensor.clone() for key, tensor in parts.items()}
        write_state(tmp_path / name, 1, masters, {}, World.current())
    assert arms.trained_parameters(tmp_path.iterdir()) == 23 + 3 + 3  # policy, tower, head


def test_all_runs_are_checked_before_any_begins(
    warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    wrong = {**ARMS, "last": {"interface": "latent_query", "train_joint": {"dice": 1}}}
    path = write_experiment(tmp_path, warm_config, scenes_root, arms=wrong)
    result = CliRunner().invoke(app, ["compare", str(path)])
    assert result.exit_code == 1
    assert "last-0.yaml: train_joint.dice: unknown key" in result.stderr
    assert not [folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("form=runs/nano", r"form: unknown key; did you mean 'from'\?"),
        ("eval.limt=3", r"eval\.limt: unknown key; did you mean 'limit'\?"),
        ("arms.concept_slots.eval.limt=3", r"arms\.concept_slots\.eval: limt: .* 'limit'\?"),
        ("seeds=[]", r"seeds: Tuple should have at least 1 item .*, got \[\]"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_one(
    change: str, told: str, warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, warm_config, scenes_root)
    with pytest.raises(ConfigError, match=told):
        load_experiment(path, [change])


def test_a_run_config_is_no_comparison(warm_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"config is missing; out is missing") as caught:
        load_experiment(warm_config)
    assert len(str(caught.value)) < 600  # not the whole file, key by key


def test_an_arm_lies_over_what_is_common_and_that_over_the_config(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("head: {codebook_width: 8}\nthreads: 1\ntrain_joint: {steps: 1, batch: 4}\n")
    arm = {
        "train_joint": {"batch": 5, "start": "{out}/other-{seed}/model"},
        "policy": {"source": "{from}/policy"},
    }
    experiment = arms.Experiment.model_validate(
        {
            **{"config": base, "out": "runs/x", "from": "warm", "seeds": [0, 7]},
            "eval": {"data": "data"},
            "common": {"train_joint": {"steps": 2}},
            "arms": {"own": {**arm, "eval": {"limit": 3}}, "else": {"interface": "latent_query"}},
        }
    )
    joint = {"steps": 2, "batch": 5, "start": "runs/x/other-7/model"}
    assert experiment.settings("own", 7) == {
        **{"head": {"codebook_width": 8}, "threads": 1, "train_joint": joint},
        **{"policy": {"source": "warm/policy"}, "run": "runs/x/own-7", "seed": 7},
    }
    assert "head" not in experiment.settings("else", 0)
    assert (experiment.judge("own").limit, experiment.judge("else").limit) == (3, None)
    with pytest.raises(ConfigError, match=r"arms\.own\.eval: all arms .* have the same samples"):
        compare(experiment)


def test_a_finished_model_is_judged_as_it_is(
    tiny_model: Path, warm_config: Path, scenes_root: Path, tmp_path: Path
) -> None:
    given = {"given": {"model": str(tiny_model), "eval": {"threshold": 0.0}}}
    path = write_experiment(tmp_path, warm_config, scenes_root, arms=given)
    (row,) = compare(load_experiment(path))
    assert (row["seeds"], row["parameters"]) == (1, None)
    folder = tmp_path / "out/given"
    figures = json.loads((folder / "eval/metrics.json").read_text())
    assert figures["threshold"] == 0.0
    with pytest.raises(DataError, match="made with another threshold"):
        compare(load_experiment(path, ["arms.given.eval.threshold=null"]))
    shutil.rmtree(folder / "eval")
    compare(load_experiment(path, ["arms.given.eval.threshold=null"]))
    for shown in (folder / "shown").glob("*.json"):  # are given anew as well
        assert json.loads(shown.read_text())["threshold"] == 0.5
    with pytest.raises(ConfigError, match=r"given began with other settings"):
        load_experiment(path, ["arms.given.model=another"])


def test_shown_samples_are_of_all_kinds() -> None:
    kinds = ["a", "a", "a", "b", "b", "c"]
    samples = [Sample(str(i), Path(), i, (1, 1), "", (), kind=kind) for i, kind in enumerate(kinds)]
    assert [s.sample_id for s in varied(samples)] == ["0", "3", "5", "1", "4", "2"]
