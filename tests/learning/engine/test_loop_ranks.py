"""The loop on two processes: the steps of one, stopped and failed together, killed and resumed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import launch
from tiny import WIDTH, policy_config, tiny_qwen_policy
from torch import Tensor, nn

from segcompass.io.errors import SegCompassError
from segcompass.learning.engine import states
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.engine.loop import Loop, Losses, Row
from segcompass.learning.engine.optimizer import OptimizerConfig
from segcompass.learning.engine.sharding import shard
from segcompass.learning.engine.states import latest_state
from segcompass.reasoning.loading import load_policy
from segcompass.types import TokenKind

ALONE = World(0, 1, torch.device("cpu"))
STEPS, EVERY, BATCH = 6, 2, 5
Hook = Callable[[int], None]
Rows = list[dict[str, float]]


def config(batch: int = BATCH) -> OptimizerConfig:
    return OptimizerConfig(
        steps=STEPS, batch=batch, learning_rate=0.01, save_every=EVERY, weight_decay=0.1, clip=0.5
    )


def rows_of(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def nothing(_step: int) -> None:
    pass


# --- A small replicated model: what happens when one rank stops, fails or differs. ---


def small(folder: Path, world: World, batch: int = BATCH, **options: Any) -> tuple[Loop, nn.Module]:
    torch.manual_seed(world.rank)  # replicas start alike all the same
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    # Half of it is in low precision, with masters.
    model[0].to(torch.bfloat16)
    return Loop(folder, "small", {"model": model}, config(batch), 5, world=world, **options), model


def small_losses(model: nn.Module, world: World, hook: Hook = nothing) -> Callable[[int], Losses]:
    def losses(step: int) -> Losses:
        hook(step)
        noise = torch.rand(())
        batch = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step))
        x = batch[world.slice(range(BATCH))]
        y = model[2](model[1](model[0](x.bfloat16()).float()))
        loss = world.means({"loss": (y - x.sum(1, keepdim=True)).square()})["loss"]
        extra = {"mine": torch.tensor(1.0)} if world.is_main else {}
        return {
            "loss": loss,
            "samples": torch.tensor(len(x)),
            "rank": torch.tensor(float(world.rank)),
            "noise": noise,
            "none": torch.tensor(math.nan),
            **extra,
        }

    return losses


def outcome(loop: Loop, losses: Callable[[int], Losses]) -> str:
    try:
        loop.run(losses)
    except (SegCompassError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def at(step: int, action: Callable[[], object]) -> Hook:
    return lambda now: action() if now == step else None  # type: ignore[func-returns-value]


def events(folder: Path) -> dict[str, Any]:
    """Each of them on a run of its own; ``hooks`` are of the rank that is struck."""
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    seen: list[tuple[int, Row]] = []
    with start("cpu") as world:

        def train(event: str, rank: int, hook: Hook, **options: Any) -> nn.Module:
            loop, model = small(folder / event, world, **options)
            hook = hook if world.rank == rank else nothing
            told[event] = outcome(loop, small_losses(model, world, hook))
            told[f"{event} weights"] = {k: t.numpy() for k, t in loop.weights.state().items()}
            return model

        train("straight", 0, nothing)
        train("nan", 1, at(3, spoil_the_loss))
        mend()
        train("slope", 1, at(3, spoil_the_gradient))
        train("stop", 1, at(2, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]))
        train("full", 1, at(3, fill_the_disk))
        mend()
        observers = [lambda step, row: seen.append((step, row)), stop_after(3)]
        train("observed", 0, nothing, observers=observers)
        train("log", 0, at(4, lambda: fill_the_disk_of(folder / "log/log.jsonl")))
        for event, attempt in (
            ("damaged", lambda: small(folder / "damaged", world)[0].resume()),
            ("few", lambda: small(folder / "few", world, batch=1)),
        ):
            try:
                attempt()
            except SegCompassError as error:
                told[event] = str(error)
    return {**told, "seen": seen}


_SAVE, _MEANS = states.save_file, World.means


def mend() -> None:
    states.save_file, World.means = _SAVE, _MEANS  # type: ignore[method-assign]


def spoil_the_loss() -> None:
    def broken(self: World, values: Losses) -> Losses:
        return {name: mean * math.nan for name, mean in _MEANS(self, values).items()}

    World.means = broken  # type: ignore[method-assign]


def spoil_the_gradient() -> None:
    def broken(self: World, values: Losses) -> Losses:
        mend()
        means = _MEANS(self, values)
        for mean in means.values():
            mean.register_hook(lambda slope: slope * math.inf)
        return means

    World.means = broken  # type: ignore[method-assign]


def fill_the_disk_of(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/full")


def fill_the_disk() -> None:
    def failing(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    states.save_file = failing


def stop_after(step: int) -> Callable[[int, Row], None]:
    def observer(now: int, _row: Row) -> None:
        if now == step:
            raise SegCompassError("rewards have collapsed")

    return observer


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("events")
    loop, model = small(folder / "damaged", ALONE)
    loop.run(small_losses(model, ALONE))
    path = folder / "damaged/state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return folder, launch(events, 2, folder)


def both(happened: tuple[Path, list[dict[str, Any]]], event: str) -> str:
    """What either rank said of it; they say the same."""
    first, second = (told[event] for told in happened[1])
    assert first == second
    return str(first)


def test_two_ranks_take_the_steps_of_one(
    happened: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, told = happened
    loop, model = small(tmp_path, ALONE)
    loop.run(small_losses(model, ALONE))
    assert both(happened, "straight") == "done"
    for of_rank in told:
        for key, tensor in loop.weights.state().items():
            np.testing.assert_allclose(of_rank["straight weights"][key], tensor.numpy(), rtol=2e-2)
    for ours, right in zip(rows_of(folder / "straight"), rows_of(tmp_path), strict=True):
        assert ours["loss"] == pytest.approx(right["loss"], rel=1e-2)  # bf16 in the middle
        assert ours["norm"] == pytest.approx(right["norm"], rel=1e-2)
        assert ours["samples"] == right["samples"] == BATCH  # summed
        assert (ours["rank"], right["rank"]) == (0.5, 0.0)  # averaged
        assert ours["mine"] == 1.0 and ours["none"] is None  # over the ranks that have it
        assert ours["noise"] != right["noise"]  # ranks draw differently
        assert ours["s"] > 0


def test_ranks_diverge_together(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    for event, name in (("nan", "loss became nan"), ("slope", "gradient norm became")):
        text = both(happened, event)
        assert text.startswith("DivergenceError") and name in text and "at step 3" in text
        state = latest_state(happened[0] / event)
        assert state is not None and state.name == "state-00000002" and str(state) in text


def test_ranks_stop_together(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    """One rank is told to, twice: torchrun passes on what the terminal has told already."""
    assert both(happened, "stop").startswith("KeyboardInterrupt")
    assert [path.name for path in (happened[0] / "stop").glob("state*")] == ["state-00000003"]


def test_a_full_disk_of_one_rank_stops_all(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    text = both(happened, "full")
    assert text.startswith("StateError") and "No space left" in text
    assert [path.name for path in (happened[0] / "full").glob("state*")] == ["state-00000002"]
    assert "state-00000002" in text


def test_observers_are_called_on_rank_0_and_can_stop_the_run(
    happened: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, told = happened
    assert both(happened, "observed") == "SegCompassError: rewards have collapsed"
    assert [path.name for path in (folder / "observed").glob("state*")] == ["state-00000003"]
    assert told[1]["seen"] == []
    logged = rows_of(folder / "observed")
    assert told[0]["seen"] == [(row["step"], row) for row in logged]
    assert [row["step"] for row in logged] == [1, 2, 3]


def test_a_log_that_cannot_be_written_stops_the_run(
    happened: tuple[Path, list[dict[str, Any]]],
) -> None:
    text = both(happened, "log")
    assert text.startswith("StateError") and "log.jsonl" in text and "No space left" in text
    assert [path.name for path in (happened[0] / "log").glob("state*")] == ["state-00000005"]


def test_what_is_wrong_at_the_start_is_said_by_all(
    happened: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert "state.safetensors is no training state or damaged" in both(happened, "damaged")
    assert "a batch of 1 cannot be spread over 2 processes" in both(happened, "few")


# --- A sharded policy with a replicated head: killed, and resumed by as many ranks or others. ---


def train(policies: Path, folder: Path, world: World, hook: Hook = nothing) -> dict[str, Any]:
    """Tied embeddings; resumes where there is a state. Returns this rank's tensors."""
    policy = load_policy(policies, policy_config("qwen2_5_vl"))
    policy.model.lm_head.weight = policy.model.get_input_embeddings().weight
    policy.backbone.vision.requires_grad_(False)
    shard(policy, world)
    torch.manual_seed(1)
    parts = {"policy": policy.model, "head": nn.Linear(WIDTH, 3)}
    loop = Loop(folder, "both", parts, config(), 3, {"head": 2.0}, world=world)
    loop.resume()
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    visual = policy.backbone.prepare(picture)

    def losses(step: int) -> Losses:
        rows = world.slice(range(BATCH))
        questions = [f"the {'red ' * i}mug of step {step}" for i in rows]
        thoughts = [f"There is a mug at b{i}." for i in rows]
        sequences = policy.encode([visual] * len(rows), questions, thoughts)
        states, hidden = policy(sequences, [visual] * len(rows))
        is_answer = sequences.kinds >= TokenKind.THOUGHT
        logits = policy.language_logits(hidden[:, :-1][is_answer[:, 1:]])
        targets = sequences.ids[:, 1:][is_answer[:, 1:]]
        language = F.cross_entropy(logits, targets, reduction="none")
        slots: Tensor = parts["head"](states.concentration_states).square()
        means = world.means({"language": language, "slots": slots})
        hook(step)
        return {"loss": means["language"] + means["slots"], "language": means["language"]}

    loop.run(losses)
    return {key: tensor.numpy() for key, tensor in loop.weights.state().items()}


def train_ranks(policies: Path, folders: list[Path], dies_at: int | None) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with start("cpu") as world:
        hook = nothing
        if dies_at is not None:
            hook = at(dies_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return [train(policies, folder, world, hook) for folder in folders]


class KilledError(Exception):
    """Ends one process's run as a kill would, for the state's purposes."""


def test_killed_and_resumed_on_as_many_ranks_or_others(tmp_path: Path) -> None:
    policies = tiny_qwen_policy(tmp_path / "policy")
    straight, killed, fewer, more = (tmp_path / n for n in ("straight", "killed", "fewer", "more"))
    right = launch(train_ranks, 2, policies, [straight], None)
    assert launch(train_ranks, 2, policies, [killed], 3) == [None, None]
    assert [path.name for path in killed.glob("state*")] == ["state-00000002"]
    assert len(rows_of(killed)) == 3  # what was logged after it is taken again
    shutil.copytree(killed, fewer)

    def kill(step: int) -> None:
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train(policies, more, ALONE, kill)
    assert [path.name for path in more.glob("state*")] == ["state.safetensors"]

    resumed = launch(train_ranks, 2, policies, [killed, more], None)
    for ours, expected in zip(resumed, right, strict=True):
        assert ours[0].keys() == expected[0].keys()
        odd = [k for k, v in ours[0].items() if not np.array_equal(v, expected[0][k])]
        assert odd == []  # to the bit
    figures = [[row["step"], row["loss"], row["norm"]] for row in rows_of(straight)]
    assert [[row["step"], row["loss"], row["norm"]] for row in rows_of(killed)] == figures

    train(policies, fewer, ALONE)
    for folder in (fewer, more):
        found = [[row["step"], row["loss"], row["norm"]] for row in rows_of(folder)]
        np.testing.assert_allclose(found, figures, rtol=0, atol=1.1e-4)  # a digit of the log
        assert min(row[2] for row in figures) > 1  # all of them are clipped
    assert [path.name for path in fewer.glob("state*")] == ["state.safetensors"]
    assert [path.name for path in more.glob("state*")] == ["state-00000006"]
