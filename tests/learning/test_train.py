"""Whole runs on a tiny config: from nothing to a model, killed and resumed, and from a LLaVA."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from recipes import STEPS, stage, write_config, write_llava_config
from safetensors.torch import load_file

from segcompass import SegCompass
from segcompass.data.samples import read_dataset
from segcompass.io.errors import ConfigError
from segcompass.learning import train
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.loop import Loop
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.types import Status

LOOPS = ("segmenter", "warmup-vision", "warmup-language", "sae", "joint")
MODEL_PARTS = (
    "policy/model.safetensors",
    "segmenter/model.safetensors",
    "sae/sae_weights.safetensors",
    "head.safetensors",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path) -> Path:
    """The config of a run that was never interrupted; do not write to its folder."""
    path = write_config(tmp_path_factory.mktemp("finished"), scenes_root)
    train.run("all", path, [], resume=False)
    return path


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {part: load_file(folder / part) for part in MODEL_PARTS}


def assert_same_weights(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    for part in MODEL_PARTS:
        assert a[part].keys() == b[part].keys()
        differing = [name for name in a[part] if not torch.equal(a[part][name], b[part][name])]
        assert not differing, f"{part}: {differing[:3]}"


def log_of(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "stages" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_from_nothing_ends_with_a_model_that_predicts(
    finished: Path, scenes_root: Path
) -> None:
    model = SegCompass.from_pretrained(finished.parent / "run/model", device="cpu")
    sample = read_dataset(scenes_root, "val")[0]
    result = model.predict(sample.image_path, sample.instruction)
    assert result.status in {Status.OK, Status.NO_TARGET}  # the answer's form is forced
    assert result.slot_masks.shape == (6, *sample.image_hw)
    assert model.name == "run"


def test_every_stage_logs_every_step_once_and_the_config_is_kept(finished: Path) -> None:
    run = finished.parent / "run"
    for name in LOOPS:
        assert [row["step"] for row in log_of(run, name)] == list(range(1, STEPS + 1)), name
    config = json.loads((run / "config.json").read_text())
    assert config["train_joint"]["conf_weight"] == 0.2  # defaults are resolved
    assert config["policy"]["scratch"]["width"] == 32


def test_a_run_killed_in_every_stage_equals_one_that_was_not(
    finished: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, scenes_root)
    take_step = Loop._one_step

    def killer(name: str) -> Any:
        def one_step(loop: Loop, losses: Any) -> Any:
            if loop.folder.name == name and loop.step == STEPS - 1:
                raise RuntimeError(f"killed in {name}")
            return take_step(loop, losses)

        return one_step

    for number, name in enumerate(LOOPS):
        monkeypatch.setattr(Loop, "_one_step", killer(name))
        with pytest.raises(RuntimeError, match=f"killed in {name}"):
            train.run("all", path, [], resume=number > 0)
    monkeypatch.setattr(Loop, "_one_step", take_step)
    train.run("all", path, [], resume=True)
    assert_same_weights(tmp_path / "run/model", finished.parent / "run/model")
    for name in LOOPS:
        assert [row["step"] for row in log_of(tmp_path / "run", name)] == [*range(1, STEPS + 1)]
        alone = [row["loss"] for row in log_of(finished.parent / "run", name)]
        assert [row["loss"] for row in log_of(tmp_path / "run", name)] == alone


def test_what_a_kill_left_half_written_does_not_reach_the_model(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.parent / "run", run)
    for name in ("segmenter", "policy", "sae"):  # killed before they were moved to their places
        partial = (run / name).rename(run / f".{name}.partial")
        (partial / "left-over.safetensors").write_bytes(b"half")
    train.run("all", finished, [f"run={run}"], resume=True)
    assert_same_weights(run / "model", finished.parent / "run/model")
    assert not list(run.rglob("left-over.safetensors"))


def test_a_finished_stage_is_not_begun_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begun: list[str] = []
    shutil.copytree(finished.parent / "run", run)

    def noted(name: str, begin: Callable[[RunConfig], Path]) -> Callable[[RunConfig], Path]:
        def run_it(config: RunConfig) -> Path:
            begun.append(name)
            return begin(config)

        return run_it

    for name, run_stage in train.STAGES.items():
        monkeypatch.setitem(train.STAGES, name, noted(name, run_stage))
    train.run("all", finished, [f"run={run}"], resume=True)
    assert begun == []
    shutil.rmtree(run / "sae")  # its steps were taken, what it hands on was not written
    train.run("all", finished, [f"run={run}", f"train_joint.steps={STEPS + 1}"], resume=True)
    assert begun == ["sae", "joint"]


def test_an_earlier_run_is_not_overwritten(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "stages/joint").mkdir(parents=True)
    shutil.copy(finished.parent / "run/stages/joint/state.safetensors", run / "stages/joint")
    (run / "config.json").write_text("the earlier run's")
    monkeypatch.setitem(train.STAGES, "segmenter", lambda _: pytest.fail("a stage was begun"))
    with pytest.raises(
        ConfigError, match=r"joint.state\.safetensors is from an earlier run.*--res"
    ):
        train.run("all", finished, [f"run={run}"], resume=False)
    assert (run / "config.json").read_text() == "the earlier run's"


@pytest.mark.parametrize(
    ("asked", "missing"), [("sae", "warmup"), ("joint", "warmup"), ("nonsense", None)]
)
def test_a_stage_names_the_one_it_needs(
    asked: str, missing: str | None, finished: Path, tmp_path: Path
) -> None:
    way_out = f"train {missing}" if missing else "segmenter, warmup, sae, joint, scorer, all"
    with pytest.raises(ConfigError, match=way_out):
        train.run(asked, finished, [f"run={tmp_path / 'new'}"], resume=False)


def test_the_vision_stage_refuses_a_policy_with_another_map(
    scenes_root: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, scenes_root)
    with pytest.raises(ConfigError, match=r"8x8 map .* makes 4x4"):
        train.run("warmup", path, ["policy.scratch.patch=8"], resume=False)


def test_a_llava_goes_the_same_way(scenes_root: Path, tmp_path: Path) -> None:
    """One joint step moves what comes after the SAE layer, and nothing before it."""
    joint = stage(1, oracle_steps=1, language_weight=0.5)
    path = write_llava_config(tmp_path, scenes_root, train_joint=joint)
    train.run("all", path, [], resume=False)
    run = tmp_path / "run"
    after = weights(run / "model")
    before = {part: load_file(run / part) for part in MODEL_PARTS if part != "head.safetensors"}
    moved = {
        name
        for part in before
        for name in before[part]
        if not torch.equal(before[part][name], after[part][name])
    }
    assert before["policy/model.safetensors"].keys() == after["policy/model.safetensors"].keys()
    trained = ("model.layers.2.", "model.norm.", "prompt_encoder.mask_embed.")
    tables = {n for n in moved if n.endswith("lm_head.weight")}
    assert {n for n in moved - tables if not n.startswith("mask_decoder.")} == {
        name for part in before for name in before[part] if any(t in name for t in trained)
    }
    assert any(n.startswith("mask_decoder.transformer") for n in moved)
    policy = "policy/model.safetensors"
    slots = 6
    for name in tables:  # the concentration tokens' rows alone
        rows = (before[policy][name] != after[policy][name]).any(1)
        assert rows.sum() == slots and rows[-slots:].all()
    assert tables


def test_a_llava_learns_to_answer(scenes_root: Path, tmp_path: Path) -> None:
    path = write_llava_config(tmp_path, scenes_root, train_language=stage(1))
    train.run("warmup", path, [], resume=False)
    before = load_file(tmp_path / "llava/model.safetensors")
    after = load_file(tmp_path / "run/policy/model.safetensors")
    moved = {n for n in before if n in after and before[n].shape == after[n].shape}
    moved = {n for n in moved if not torch.equal(before[n], after[n])}
    assert any("language_model" in n for n in moved)
    assert not any("vision_tower" in n or "projector" in n for n in moved)


def test_a_small_policy_file_loads_in_any_precision(finished: Path, scenes_root: Path) -> None:
    folder = finished.parent / "run/model"
    dtypes = {
        part: {str(tensor.dtype) for tensor in tensors.values()}
        for part, tensors in weights(folder).items()
    }
    assert dtypes.pop("policy/model.safetensors") == {"torch.bfloat16"}
    assert set().union(*dtypes.values()) == {"torch.float32"}
    full, half = (
        SegCompass.from_pretrained(folder, device="cpu", dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    pairs = zip(full.policy.parameters(), half.policy.parameters(), strict=True)
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in pairs)
    assert next(half.policy.parameters()).dtype == torch.bfloat16
    sample = read_dataset(scenes_root, "val")[0]
    results = [m.predict(sample.image_path, sample.instruction) for m in (full, half)]
    assert results[0].slot_scores == pytest.approx(results[1].slot_scores, abs=0.05)


def test_saving_in_half_precision_writes_tied_weights_once(finished: Path, tmp_path: Path) -> None:
    folder = finished.parent / "run/policy"  # joint training parts the two tables
    policy = load_policy(folder, train.load_config(finished).policy.use)  # in float32
    save_policy(policy, tmp_path / "half", torch.bfloat16)
    again, once = (load_file(f / "model.safetensors") for f in (tmp_path / "half", folder))
    assert again.keys() == once.keys()
    assert not any("lm_head" in name for name in again)
    assert all(torch.equal(again[name], once[name].bfloat16()) for name in once)


def run_stage(stage: str, config: str, run: str) -> None:
    torch.set_num_threads(1)
    settings = [f"run={run}", "policy.dtype=float32", "threads=null"]
    train.run(stage, Path(config), settings, resume=False)


@pytest.mark.parametrize(
    ("stage", "loops"),
    [("segmenter", ["segmenter"]), ("warmup", ["warmup-vision", "warmup-language"])],
)
def test_two_ranks_take_the_first_stages_steps_of_one(
    stage: str, loops: list[str], finished: Path, tmp_path: Path
) -> None:
    """Losses and gradient norms; Adam would blow up the rounding of gradients that are zero."""
    alone, together = tmp_path / "1", tmp_path / "2"
    run_stage(stage, str(finished), str(alone))
    launch(run_stage, 2, stage, str(finished), str(together))
    for loop in loops:
        steps = list(zip(log_of(alone, loop), log_of(together, loop), strict=True))
        assert len(steps) == STEPS
        for one, two in steps:
            for name in one.keys() - {"s"}:
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (loop, name)


@pytest.mark.parametrize("way", ["torchrun", "processes"])
def test_two_processes_take_the_steps_of_one(way: str, finished: Path, tmp_path: Path) -> None:
    """The whole joint command, in float32 on the oracle's answers: same losses, same model."""
    settings = ["policy.dtype=float32", "train_joint.batch=4", f"train_joint.oracle_steps={STEPS}"]
    settings += ["train_joint.place_weight=0.3", "train_joint.language_weight=0.5"]
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        for part in ("policy", "sae", "segmenter"):
            shutil.copytree(finished.parent / "run" / part, run / part)
        command = [sys.executable, "-m", "segcompass", "train", "joint", str(finished)]
        if way == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command[1:1] = torchrun
        for setting in (f"run={run}", f"processes={ranks}", *settings):
            command += ["--set", setting]
        subprocess.run(command, check=True, timeout=240, capture_output=True)
    alone, together = (log_of(tmp_path / ranks, "joint") for ranks in "12")
    assert len(alone) == STEPS
    for one, two in zip(alone, together, strict=True):
        for name in one.keys() - {"s"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    one, two = (weights(tmp_path / ranks / "model") for ranks in "12")
    for part in MODEL_PARTS:
        for name, tensor in one[part].items():
            # A key's bias adds the same to all logits of a query: softmax does not see it, its
            # gradient is rounding alone, and Adam makes whole steps of that.
            if not re.fullmatch(r"mask_decoder\..*\.k_proj\.bias", name):
                torch.testing.assert_close(two[part][name], tensor, rtol=1e-3, atol=1e-4)
