"""The loop: which samples a step sees, and that a run may be stopped anywhere."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segcompass.io.errors import CheckpointError, SegCompassError
from segcompass.learning.engine import states
from segcompass.learning.engine.loop import (
    DivergenceError,
    Loop,
    Losses,
    Step,
    batch_indices,
    grouped_indices,
)
from segcompass.learning.engine.optimizer import OptimizerConfig
from segcompass.learning.engine.states import StateError

STEPS = 9
Hook = Callable[[int], None]


def make(folder: Path, save_every: int = 4, steps: int = STEPS) -> tuple[nn.Module, Loop]:
    """A small bf16 model with a loop around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(torch.bfloat16)
    plan = OptimizerConfig(steps=steps, batch=3, learning_rate=0.02, save_every=save_every)
    return model, Loop(folder, "test", {"model": model}, plan, seed=5)


def losses_of(model: nn.Module, hook: Hook = lambda _: None) -> Callable[[int], Losses]:
    """A loss with random inputs; ``hook`` is called first."""

    def losses(step: int) -> Losses:
        hook(step)
        x = torch.randn(3, 4, dtype=torch.bfloat16)
        loss = (model(x).float() - x.float().sum(-1, keepdim=True)).square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}

    return losses


def straight(folder: Path) -> dict[str, torch.Tensor]:
    """What an uninterrupted run ends with."""
    model, loop = make(folder)
    loop.run(losses_of(model))
    return loop.weights.state()


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def raise_at(step: int, error: BaseException) -> Hook:
    def hook(now: int) -> None:
        if now == step:
            raise error

    return hook


def signal_at(step: int, *numbers: signal.Signals) -> Hook:
    def hook(now: int) -> None:
        if now == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return hook


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 9), st.integers(1, 4))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-count * epochs // batch)
    seen = [i for step in range(steps) for i in batch_indices(step, batch, count, seed)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    first, second = (batch_indices(step, 50, 50, seed=1) for step in (0, 1))
    assert first != second
    assert first != batch_indices(0, 50, 50, seed=2)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_grouping_only_reorders(lengths: list[int], batch: int, group: int, seed: int) -> None:
    for first in (0, group):
        steps = range(first, first + group)
        grouped = [grouped_indices(step, batch, lengths, group, seed) for step in steps]
        plain = [batch_indices(step, batch, len(lengths), seed) for step in steps]
        assert Counter(chain(*grouped)) == Counter(chain(*plain))
        spans = sorted((min(c), max(c)) for b in grouped for c in [[lengths[i] for i in b]])
        assert all(a[1] <= b[0] for a, b in pairwise(spans))  # no overlap


@settings(max_examples=8)
@given(st.integers(0, STEPS - 1), st.integers(1, STEPS))
def test_a_run_that_fails_anywhere_and_resumes_equals_one_that_did_not(
    tmp_path_factory: pytest.TempPathFactory, fails_at: int, save_every: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    model, loop = make(folder / "broken", save_every)
    with pytest.raises(RuntimeError, match="disk"):
        loop.run(losses_of(model, raise_at(fails_at, RuntimeError("disk"))))
    model, loop = make(folder / "broken", save_every)
    assert loop.resume() == (fails_at >= save_every)
    assert loop.step == fails_at - fails_at % save_every
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(folder / "straight"))
    told = [[r["step"], r["loss"], r["twice"]] for r in rows(folder / "broken")]
    assert told == [[r["step"], r["loss"], r["twice"]] for r in rows(folder / "straight")]
    assert [step for step, *_ in told] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    model, loop = make(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        loop.run(losses_of(model, signal_at(5, number)))
    assert signal.getsignal(number) is before
    model, loop = make(tmp_path / "stopped")
    assert loop.resume() and loop.step == 6
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(tmp_path / "straight"))


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    model, loop = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop.run(losses_of(model, signal_at(5, signal.SIGINT, signal.SIGINT)))
    model, loop = make(tmp_path)
    assert loop.resume() and loop.step == 4  # the last save that was due


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """A real SIGKILL, in the middle of a step."""
    script = (
        "import sys, signal; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_loop import make, losses_of, signal_at\n"
        "model, loop = make(Path(sys.argv[2]))\n"
        "loop.run(losses_of(model, signal_at(6, signal.SIGKILL)))"
    )
    here, folder = str(Path(__file__).parent), tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", script, here, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(rows(folder)) == 6
    model, loop = make(folder)
    assert loop.resume() and loop.step == 4
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(tmp_path / "straight"))
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


def test_a_half_written_state_is_not_taken_up(tmp_path: Path) -> None:
    model, loop = make(tmp_path)
    (tmp_path / "state.partial").write_bytes(b"half")
    assert not loop.resume()
    loop.run(losses_of(model))
    assert make(tmp_path)[1].resume()


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    straight(tmp_path)
    before = (tmp_path / "state.safetensors").stat().st_mtime_ns
    model, loop = make(tmp_path)
    assert loop.resume() and loop.step == STEPS
    loop.run(losses_of(model, raise_at(STEPS, AssertionError("a step was taken"))))
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == before
    assert len(rows(tmp_path)) == STEPS


def test_rows_of_steps_that_were_lost_are_dropped(tmp_path: Path) -> None:
    model, loop = make(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 99}\n{"step": 2, "lo')  # killed before the first save
    loop.run(losses_of(model))
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    assert rows(tmp_path)[0]["loss"] != 99


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path: Path) -> None:
    model, loop = make(tmp_path)
    healthy = losses_of(model)
    with pytest.raises(DivergenceError, match=r"test: the loss became nan at step 6.*state\.safe"):
        loop.run(lambda step: {"loss": healthy(step)["loss"] * (torch.nan if step == 6 else 1)})
    model, loop = make(tmp_path)
    assert loop.resume() and loop.step == 4
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(tmp_path / "straight"))


def in_micro_batches(model: nn.Module, hook: Hook = lambda _: None) -> Step:
    """The same losses as shares of single samples; ``hook`` is called before the last one."""

    def losses(step: int) -> Iterator[Losses]:
        x = torch.randn(3, 4, dtype=torch.bfloat16)
        for row in range(3):
            if row == 2:
                hook(step)
            own = x[row : row + 1]
            loss = (model(own).float() - own.float().sum(-1, keepdim=True)).square().sum() / 3
            yield {"loss": loss, "twice": 2 * loss.detach()}

    return losses


def test_micro_batches_add_up_to_the_step(tmp_path: Path) -> None:
    """Losses, figures and the first step's gradient; each sample's graph is gone before the next's.

    Weights are bf16: sums of their gradients are as good as fp32 masters make them.
    """
    model, loop = make(tmp_path / "parts")
    loop.run(in_micro_batches(model))
    straight(tmp_path / "whole")
    parts, whole = rows(tmp_path / "parts"), rows(tmp_path / "whole")
    assert [row["step"] for row in parts] == [row["step"] for row in whole]
    for name in ("loss", "twice"):
        assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-2)
        assert parts[-1][name] == pytest.approx(whole[-1][name], rel=0.1)
    assert parts[0]["norm"] == pytest.approx(whole[0]["norm"], rel=1e-2)


def test_small_gradients_of_micro_batches_are_not_lost(tmp_path: Path) -> None:
    """256 gradients of 1 and one of 256: in bf16, which has 8 bits, the sum would stay at 256."""
    weight = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    plan = OptimizerConfig(steps=1, batch=1, learning_rate=0.1, clip=1e6)
    loop = Loop(tmp_path, "test", {"model": weight}, plan, seed=0)
    loop.run(lambda _step: ({"loss": g * weight.weight.sum()} for g in (256.0, *[1.0] * 256)))
    assert rows(tmp_path)[0]["norm"] == 512


def test_a_run_that_fails_between_micro_batches_resumes_to_the_bit(tmp_path: Path) -> None:
    model, loop = make(tmp_path / "cut")
    with pytest.raises(RuntimeError, match="in the middle"):
        loop.run(in_micro_batches(model, raise_at(6, RuntimeError("in the middle"))))
    model, loop = make(tmp_path / "cut")
    assert loop.resume() and loop.step == 4
    loop.run(in_micro_batches(model))
    found = loop.weights.state()
    model, loop = make(tmp_path / "straight")
    loop.run(in_micro_batches(model))
    assert_equal(found, loop.weights.state())


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    """The loss alone would tell one step too late, when the weights are gone."""
    model, loop = make(tmp_path, save_every=1)

    def losses(step: int) -> Losses:
        square = model(torch.zeros(1, 4, dtype=torch.bfloat16)).float().square().sum()
        root = (square * 0).sqrt() if step == 3 else square  # the slope of sqrt at 0 is infinite
        return {"loss": root}

    with pytest.raises(SegCompassError, match="the gradient norm became nan at step 3"):
        loop.run(losses)
    assert all(p.isfinite().all() for p in model.parameters())
    model, loop = make(tmp_path)
    assert loop.resume() and loop.step == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_divergence_before_the_first_save_says_so(tmp_path: Path) -> None:
    model, loop = make(tmp_path)
    healthy = losses_of(model)
    with pytest.raises(DivergenceError, match="no state was saved yet"):
        loop.run(lambda step: {"loss": healthy(step)["loss"] * torch.inf})


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_state_is_named(content: bytes | None, tmp_path: Path) -> None:
    straight(tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(CheckpointError, match=r"state\.safetensors is no training state"):
        make(tmp_path)[1].resume()


def test_the_state_of_another_model_is_named(tmp_path: Path) -> None:
    straight(tmp_path)
    plan = OptimizerConfig(steps=3, learning_rate=0.1)
    other = Loop(tmp_path, "test", {"model": nn.Linear(4, 6)}, plan, seed=0)
    with pytest.raises(CheckpointError, match=r"state\.safetensors belongs to another run"):
        other.resume()


def test_an_observer_sees_what_is_logged_and_may_stop_the_run(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, object]]] = []

    def watch(step: int, row: dict[str, object]) -> None:
        seen.append((step, dict(row)))
        if len(seen) == 6:
            raise SegCompassError("rewards have collapsed")

    model, loop = make(tmp_path / "stopped")
    loop.observers = [watch]
    with pytest.raises(SegCompassError, match="rewards have collapsed"):
        loop.run(losses_of(model))
    assert seen == [(row["step"], row) for row in rows(tmp_path / "stopped")]
    model, loop = make(tmp_path / "stopped")
    assert loop.resume() and loop.step == 6
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(tmp_path / "straight"))


def test_a_full_disk_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loop = make(tmp_path / "full")

    def fill(step: int) -> None:
        if step == 5:
            error = OSError(errno.ENOSPC, "No space left on device")
            monkeypatch.setattr(states, "save_file", Mock(side_effect=error))

    with pytest.raises(StateError, match=r"No space left.*last good state is .*state\.safetensors"):
        loop.run(losses_of(model, fill))
    monkeypatch.undo()
    model, loop = make(tmp_path / "full")
    assert loop.resume() and loop.step == 4
    loop.run(losses_of(model))
    assert_equal(loop.weights.state(), straight(tmp_path / "straight"))


def test_a_number_without_a_value_is_null_in_the_log(tmp_path: Path) -> None:
    model, loop = make(tmp_path, steps=1)
    healthy = losses_of(model)
    loop.run(lambda step: {**healthy(step), "accuracy": torch.tensor([]).mean()})
    assert rows(tmp_path)[0]["accuracy"] is None


def test_runs_outside_the_main_thread(tmp_path: Path) -> None:
    """Only the main thread may handle signals."""
    ended: list[dict[str, torch.Tensor]] = []
    thread = threading.Thread(target=lambda: ended.append(straight(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert_equal(ended[0], straight(tmp_path / "main"))


def test_nothing_is_printed_when_nobody_watches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    straight(tmp_path)
    assert capfd.readouterr() == ("", "")
