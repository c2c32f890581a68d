"""The health check: broken rewards are found, healthy runs are left alone.

The runs are real ones, of a policy small enough for seconds: the loop, the advantages and the GRPO
loss are those of joint training, and what is broken is the reward.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segcompass.learning.engine.loop import Loop, Losses
from segcompass.learning.engine.optimizer import OptimizerConfig
from segcompass.learning.grpo import GrpoConfig, advantages, grpo_loss
from segcompass.learning.watching.health import Health, HealthError
from segcompass.learning.watching.history import History, Level
from segcompass.learning.watching.symptoms import HealthConfig, symptoms

TOKENS, WORDS, QUESTIONS, GROUP, BATCH = 8, 10, 6, 6, 8
WEIGHTS = (0.3, 0.7)
WINDOW, STEPS = 24, 110
Rewards = Callable[[Tensor, Tensor], Tensor]  # form and quality of the answers -> mask score


class Toy(nn.Module):
    """A policy that is a table of logits: words for each place of the answer to each question.

    An answer is well-formed if it ends in word 0; its quality is the share of wanted words.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = 0.5 * torch.randn(QUESTIONS, TOKENS, WORDS, generator=generator)
        start[:, -1, 0] += 2.5  # the form is known, mostly
        self.table, self.reference = nn.Parameter(start.clone()), start
        self.wanted = torch.randint(0, WORDS, (QUESTIONS, TOKENS - 1), generator=generator)

    def losses(self, mask_score: Rewards, sign: float = 1.0) -> Callable[[int], Losses]:
        """One step of GRPO; ``sign`` turns the advantages around, as a bug would."""

        def step(_: int) -> Losses:
            asked = torch.randint(0, QUESTIONS, (BATCH,)).repeat_interleave(GROUP)
            logits = self.table[asked].log_softmax(-1)
            words = torch.distributions.Categorical(logits=logits.detach()).sample()
            form = (words[:, -1] == 0).float()
            quality = (words[:, :-1] == self.wanted[asked]).float().mean(1)
            score = mask_score(form, quality)
            reward = WEIGHTS[0] * form + WEIGHTS[1] * score
            groups = reward.unflatten(0, (-1, GROUP))
            new, old = (
                table[asked].log_softmax(-1).gather(-1, words[..., None]).squeeze(-1)
                for table in (self.table, self.reference)
            )
            everywhere = torch.ones_like(words, dtype=torch.bool)
            gains = sign * advantages(groups).flatten()
            loss, kl, clipped = grpo_loss(
                new, new.detach(), old, everywhere, gains, GrpoConfig(kl=0.1)
            )
            return {
                "loss": loss.mean(),
                "kl": kl.mean(),
                "clipped": clipped.mean(),
                "groups_that_teach": (groups.std(1, correction=0) > 1e-6).float().mean(),
                "reward": reward.mean(),
                "reward_format": form.mean(),
                "reward_mask": score.mean(),
                "iou": quality[form > 0].mean() + 0.04 * torch.randn(()),  # judged by other pixels
                "length": torch.tensor(float(TOKENS)),
                "well_formed": form.mean(),
            }

        return step


def train(
    folder: Path, losses: Callable[[Toy], Callable[[int], Losses]], seed: int = 0, **health: Any
) -> list[dict[str, Any]]:
    """A whole run under a health check; returns what it found."""
    toy = Toy(seed)
    plan = OptimizerConfig(steps=STEPS, learning_rate=0.05, warmup=0.0, save_every=STEPS)
    check = Health(folder, HealthConfig(window=WINDOW, **health), reward_weights=WEIGHTS)
    Loop(folder, "toy", {"toy": toy}, plan, seed, observers=[check]).run(losses(toy))
    return findings(folder)


def findings(folder: Path) -> list[dict[str, Any]]:
    path = folder / "health.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def honest(form: Tensor, quality: Tensor) -> Tensor:
    return form * quality


def noise(form: Tensor, _: Tensor) -> Tensor:
    return form * torch.rand(len(form))


def contrary(form: Tensor, quality: Tensor) -> Tensor:
    return form * (1 - quality)


def constant(form: Tensor, _: Tensor) -> Tensor:
    return 0.7 - form * WEIGHTS[0] / WEIGHTS[1]  # every answer earns the same


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_no_warning(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, lambda toy: toy.losses(honest), seed, action="stop") == []
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:10], rows[-10:]))
    assert last > first + 0.15  # else nothing would be shown
    assert not caplog.records


@pytest.mark.parametrize(
    ("broken", "causes"),
    [
        (lambda toy: toy.losses(noise), {"reward_ignores_masks"}),
        (lambda toy: toy.losses(contrary), {"reward_ignores_masks", "reward_is_hacked"}),
        (lambda toy: toy.losses(honest, sign=-1.0), {"reward_falls"}),
    ],
    ids=["noise", "minus the true one", "minus the advantages"],
)
def test_a_broken_reward_is_found(
    broken: Callable[[Toy], Callable[[int], Losses]],
    causes: set[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = train(tmp_path, broken)
    severe = [row for row in found if row["event"] == "began" and row["severe"]]
    assert causes & {row["cause"] for row in severe}
    assert {row["cause"] for row in severe} <= causes | {"form_collapses", "reward_stalls"}
    row = next(row for row in severe if row["cause"] in causes)
    assert row["window"] == WINDOW and row["step"] < STEPS and row["figures"]
    told = [r.getMessage() for r in caplog.records if row["found"] in r.getMessage()]
    assert len(told) == 1
    assert f"step {row['step']}, over {WINDOW} steps" in told[0]
    assert row["way_out"] in told[0] and str(tmp_path / "health.jsonl") in told[0]


def test_a_constant_reward_is_found(tmp_path: Path) -> None:
    found = train(tmp_path, lambda toy: toy.losses(constant))
    assert "no_group_teaches" in {row["cause"] for row in found}


def test_stop_ends_the_run_and_a_resumed_one_is_not_stopped_again(tmp_path: Path) -> None:
    """Whoever resumes has been told; the state of the last step was kept."""
    with pytest.raises(HealthError, match=r"minus, step \d+, over 24 steps: rewards fell from"):
        train(tmp_path / "minus", lambda toy: toy.losses(honest, sign=-1.0), action="stop")
    (onset,) = findings(tmp_path / "minus")
    toy = Toy(0)
    plan = OptimizerConfig(steps=onset["step"] + 2, learning_rate=0.05, warmup=0.0)
    check = Health(
        tmp_path / "minus",
        HealthConfig(window=WINDOW, action="stop"),
        reward_weights=WEIGHTS,
    )
    loop = Loop(tmp_path / "minus", "toy", {"toy": toy}, plan, 0, observers=[check])
    assert loop.resume() and loop.step == onset["step"]
    loop.run(toy.losses(honest, sign=-1.0))
    assert findings(tmp_path / "minus") == [onset]


# From here on: rows made by hand.


def row(step: int, **figures: float | None) -> dict[str, Any]:
    """A row of a run in which nothing happens."""
    usual = {"loss": 0.5, "kl": 0.01, "groups_that_teach": 0.8, "reward": 0.65}
    usual |= {"reward_format": 1.0, "reward_mask": 0.5, "iou": 0.6, "length": 90.0}
    return {"step": step, **usual, "well_formed": 1.0, "norm": 1.0, "s": 1.0, **figures}


def noisy(count: int, seed: int, **figures: Callable[[float], float]) -> list[dict[str, Any]]:
    """Rows with the noise of real ones; ``figures`` say how some move as the run goes by."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, count + 1):
        luck, form = rng.normal(0, 0.08), 0.96 + rng.normal(0, 0.02)
        values = {name: move(step / count) for name, move in figures.items()}
        quality = values.get("quality", 0.5) + luck
        form = float(np.clip(values.get("form", form), 0, 1))
        mask = float(np.clip(quality * form + rng.normal(0, 0.03), 0, 1))
        made = {"iou": quality + 0.1 + rng.normal(0, 0.04), "reward_mask": mask}
        made |= {"reward_format": form, "well_formed": form, "reward": 0.3 * form + 0.7 * mask}
        made |= {"kl": abs(rng.normal(0.01, 0.003)), "length": 90 + rng.normal(0, 12)}
        made |= {"norm": float(np.exp(rng.normal(0, 0.5))), "loss": rng.normal(0.5, 0.2)}
        rest = {k: v for k, v in values.items() if k not in ("quality", "form")}
        rows.append(row(step, **{**made, **rest}))
    return rows


def judge(folder: Path, rows: Sequence[dict[str, Any]], **config: Any) -> list[dict[str, Any]]:
    """What a health check finds in a log."""
    check = Health(folder, HealthConfig(**config), reward_weights=WEIGHTS)
    for entry in rows:
        check(entry["step"], entry)
    return findings(folder)


def causes(found: Sequence[dict[str, Any]]) -> set[str]:
    return {entry["cause"] for entry in found if entry["event"] == "began"}


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.floats(0.2, 0.8), st.floats(0.0, 0.15), st.floats(0.0, 0.2))
def test_noise_alone_and_rising_rewards_are_healthy(
    tmp_path_factory: pytest.TempPathFactory, seed: int, level: float, rise: float, kl: float
) -> None:
    """A longer KL is fine as long as rewards rise with it."""
    rows = noisy(
        300,
        seed,
        quality=lambda t: level + (rise + kl) * t,
        kl=lambda t: 0.01 + kl * t,
    )
    assert judge(tmp_path_factory.mktemp("healthy"), rows) == []


@pytest.mark.parametrize(
    ("cause", "figures"),
    [
        ("reward_falls", {"quality": lambda t: 0.6 - 0.4 * t}),
        ("reward_stalls", {"kl": lambda t: 0.01 + 0.2 * t}),
        ("reward_is_hacked", {"form": lambda t: 0.4 + 0.5 * t, "iou": lambda t: 0.6 - 0.3 * t}),
        ("kl_out_of_bounds", {"kl": lambda t: 3 * t, "quality": lambda t: 0.2 + 0.6 * t}),
        ("form_collapses", {"form": lambda t: 1.0 if t < 0.5 else 0.3}),
        ("form_is_missing", {"form": lambda t: 0.0}),
        ("no_group_teaches", {"groups_that_teach": lambda t: 0.0 if t > 0.5 else 0.8}),
        ("length_runs_away", {"length": lambda t: 90 + 300 * t}),
        ("length_runs_away", {"length": lambda t: 90 - 80 * t}),
        ("gradients_explode", {"norm": lambda t: 1.0 if t < 0.5 else 50.0}),
    ],
)
def test_each_symptom_is_told_by_its_name(
    cause: str, figures: dict[str, Callable[[float], float]], tmp_path: Path
) -> None:
    found = judge(tmp_path, noisy(200, 1, **figures))
    if cause == "reward_is_hacked":  # masks that earn nothing are another symptom of it
        assert causes(found) & {cause, "reward_ignores_masks"}
    else:
        assert cause in causes(found)


def test_outliers_of_the_kl_are_no_symptom(tmp_path: Path) -> None:
    """One rare token makes the k3 estimate of a step jump."""
    rows = noisy(120, 2)
    for entry in rows[30::10]:
        entry["kl"] = 40.0
    assert judge(tmp_path, rows) == []


def test_a_solved_task_is_no_symptom(tmp_path: Path) -> None:
    rows = noisy(120, 3, quality=lambda _: 1.5, form=lambda _: 1.0)
    rows = [{**entry, "groups_that_teach": 0.0, "iou": 0.99} for entry in rows]
    assert judge(tmp_path, rows) == []


def test_a_reward_that_does_not_add_up_is_told_at_once(tmp_path: Path) -> None:
    (found,) = judge(tmp_path, [row(1, reward=-0.65)])
    assert found["cause"] == "reward_is_wrong" and found["severe"]
    assert "-0.650" in found["found"] and "0.650" in found["found"]
    (tmp_path / "health.jsonl").unlink()
    (found,) = judge(tmp_path, [row(1, reward_mask=-0.5, reward=-0.05)])
    assert "outside [0, 1]" in found["found"]


def test_answers_without_any_mask_have_no_iou(tmp_path: Path) -> None:
    rows = [{**entry, "iou": None} for entry in noisy(100, 4)]
    assert judge(tmp_path, rows) == []


def test_a_cause_that_is_over_is_told_of_and_may_come_again(tmp_path: Path) -> None:
    """Three times 60 steps: nothing teaches in the first and the last."""
    rows = noisy(240, 5, groups_that_teach=lambda t: 0.8 if 0.25 < t < 0.75 else 0.0)
    found = [r for r in judge(tmp_path, rows, window=16) if r["cause"] == "no_group_teaches"]
    assert [r["event"] for r in found] == ["began", "over", "began"]
    assert 60 < found[1]["step"] < 120 and 180 < found[2]["step"] < 200


@pytest.mark.parametrize("cut", [1, 17, 60, 100, 119])
def test_an_interruption_hides_nothing(cut: int, tmp_path: Path) -> None:
    """Stopped after ``cut`` steps, with ten more in the log that will be taken again."""
    rows = noisy(120, 6, kl=lambda t: 0.01 + 0.3 * t, length=lambda t: 90 + 400 * t)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = judge(whole, rows, window=24)
    assert {r["cause"] for r in expected} >= {"reward_stalls", "length_runs_away"}
    judge(broken, rows[: cut + 10], window=24)
    lines = [json.dumps(entry) + "\n" for entry in rows[:cut]]
    (broken / "log.jsonl").write_text("".join(lines) + '{"step": 1')  # and a row that was cut off
    assert judge(broken, rows[cut:], window=24) == expected


def test_rows_of_another_phase_judge_nothing(tmp_path: Path) -> None:
    """Oracle steps have larger gradients than rollouts, and no rewards."""
    oracle = [{"step": i, "loss": 3.0, "norm": 0.02, "s": 1.0} for i in range(1, 101)]
    rollouts = [{**entry, "step": entry["step"] + 100} for entry in noisy(100, 7)]
    assert judge(tmp_path, [*oracle, *rollouts]) == []


def test_rewards_that_train_nothing_are_not_judged(tmp_path: Path) -> None:
    check = Health(tmp_path, HealthConfig(action="stop"), reward_weights=WEIGHTS, learns=False)
    for entry in noisy(100, 8, quality=lambda t: 0.6 - 0.5 * t):
        check(entry["step"], entry)
    assert findings(tmp_path) == []


def test_off_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = noisy(100, 9, quality=lambda t: 0.6 - 0.5 * t)
    assert judge(tmp_path, rows, action="off") == []
    assert not caplog.records


def test_a_warning_is_given_once_for_each_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge(tmp_path, noisy(300, 10, form=lambda t: 1.0 if t < 0.2 else 0.1))
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("well-formed answers went from 100% to" in text for text in told) == 1


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.integers(0, 3))
def test_levels_are_means_with_their_standard_errors(values: list[float], missing: int) -> None:
    level = Level.of(np.array([*values, *[np.nan] * missing]))
    assert level.mean == pytest.approx(np.mean(values))
    assert level.error == pytest.approx(np.sqrt(np.var(values, ddof=1) / len(values)))


def test_figures_that_come_later_keep_their_place() -> None:
    history = History(window=16)
    for step in range(40):
        history.take({"step": step, "loss": step, **({"iou": step} if step >= 20 else {})})
    assert np.isnan(history.start("iou")).all()
    assert history.now("iou").tolist() == [*range(32, 40)] == history.now("loss").tolist()
    assert history.blocks("loss").tolist() == [[*range(i, i + 8)] for i in (0, 8, 16, 24)]
    assert history.best("loss").mean == 27.5  # of steps 24 to 31: the last block is "now"
    assert symptoms(history, HealthConfig()) == []
