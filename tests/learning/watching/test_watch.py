"""Observers of a run: TensorBoard, and which observers a stage gets."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from segcompass import SegCompass
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World
from segcompass.learning.watching import watch
from segcompass.learning.watching.health import Health
from segcompass.learning.watching.watch import (
    TensorBoard,
    joint_observers,
    joint_panels,
    stage_observers,
)


def run_config(folder: Path, data: Path, **changes: Any) -> RunConfig:
    joint = {"steps": 4, "learning_rate": 0.01, **changes.pop("train_joint", {})}
    sae = {"steps": 1, "learning_rate": 0.01}
    rest = {"run": folder, "data": {"root": data}, "train_sae": sae, "train_joint": joint}
    return RunConfig.model_validate({**rest, **changes})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a folder of events."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {n: [(e.step, pytest.approx(e.value)) for e in events.Scalars(n)] for n in names}


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board(1, {"step": 1, "loss": 0.5, "iou": None, "answers": 32})
    board(2, {"step": 2, "loss": 0.25, "iou": 0.75, "answers": 32})
    del board
    gc.collect()  # what is still in memory is written
    found = scalars(tmp_path / "tensorboard")
    assert found == {
        "loss": [(1, 0.5), (2, 0.25)],
        "iou": [(2, 0.75)],
        "answers": [(1, 32), (2, 32)],
    }


def test_steps_taken_again_replace_the_lost_ones(tmp_path: Path) -> None:
    for first in (1, 3):  # saved after step 2, killed after step 4
        board = TensorBoard(tmp_path)
        for step in range(first, first + 4):
            board(step, {"step": step, "loss": float(10 * first + step)})
        del board
        gc.collect()
    losses = scalars(tmp_path / "tensorboard")["loss"]
    assert losses == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35), (6, 36)]


def test_without_tensorboard_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    watch._say_missing.cache_clear()
    for stage in ("sae", "joint"):
        board = TensorBoard(tmp_path / stage)
        board(1, {"step": 1, "loss": 0.5})
        board(2, {"step": 2, "loss": 0.5})
    (told,) = [record.getMessage() for record in caplog.records]
    assert "segcompass[track]" in told
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way")
    board = TensorBoard(tmp_path)
    pytest.importorskip("tensorboard")
    board(1, {"step": 1, "loss": 0.5})
    board(2, {"step": 2, "loss": 0.5})
    assert len(caplog.records) == 1 and "log.jsonl alone" in caplog.text


def test_a_stage_gets_what_its_config_asks_for(tmp_path: Path, scenes_root: Path) -> None:
    plain = run_config(tmp_path, scenes_root)
    assert stage_observers(plain, tmp_path) == []
    (health,) = joint_observers(plain, plain.train_joint, tmp_path)
    assert isinstance(health, Health) and health.config.action == "warn"
    assert health.reward_weights == (0.3, 0.7) and health.learns

    joint = {"rl_weight": 0.0, "health": {"action": "stop", "window": 20}}
    full = run_config(tmp_path, scenes_root, tensorboard=True, train_joint=joint)
    board, health = joint_observers(full, full.train_joint, tmp_path)
    assert isinstance(board, TensorBoard) and isinstance(health, Health)
    assert health.config.action == "stop" and health.config.window == 20 and not health.learns


def test_answers_that_name_objects_earn_up_to_one(tmp_path: Path, scenes_root: Path) -> None:
    """Their reward is a mean; what masks would earn has nothing to do with it."""
    joint = {"rewards": {"format": 1.0, "mask": 3.0}, "object_rewards": {"accuracy": 9.0}}
    masks = run_config(tmp_path, scenes_root, train_joint=joint)
    own = {"interface": "text_readout", "head": {}}
    readout = run_config(tmp_path, scenes_root, train_joint=joint, **own)
    judge = {"train_scorer": {"steps": 1, "learning_rate": 1.0}}
    inner = {"interface": "candidate_rerank", "head": own, **judge}
    rerank = run_config(tmp_path, scenes_root, train_joint=joint, **inner)
    tops = []
    for config in (masks, readout, rerank):
        (health,) = joint_observers(config, config.train_joint, tmp_path)
        assert isinstance(health, Health)
        tops.append(health.history.top)
    assert tops == [4.0, 1.0, 1.0]


def test_panels_are_drawn_only_if_asked_for(
    tiny_model: Path, scenes_root: Path, tmp_path: Path
) -> None:
    model = SegCompass.from_pretrained(tiny_model, device="cpu")
    world = World.current()
    plain = run_config(tmp_path, scenes_root)
    assert joint_panels(plain, plain.train_joint, tmp_path, model, world) is None
    every = run_config(tmp_path, scenes_root, train_joint={"panel_every": 2})
    panels = joint_panels(every, every.train_joint, tmp_path, model, world)
    assert panels is not None and panels.every == 2 and panels.writes and panels.samples
    other = World(1, 2, world.device)
    panels = joint_panels(every, every.train_joint, tmp_path, model, other)
    assert panels is not None and not panels.writes
