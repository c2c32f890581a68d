"""A step in micro-batches is the step at once: its loss, figures and gradients, on any ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import answers_of
from joint import HALF_WHOLE, LENGTHS, Parts, answered, build_parts, micro_batches, stage, take
from ranks import launch

from segcompass.learning import teachers
from segcompass.learning.answers import Answers
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.train_joint import JointStep, train_joint
from segcompass.types import TokenKind

ARMS: dict[str, dict[str, Any]] = {
    "rollouts": {},
    "every term": {"place_weight": 0.3, "heatmap_dice_weight": 0.2, "focal_weight": 2.0},
    "forced": {"rollout": {"forced_steps": 1}},
    "oracle": {"oracle_steps": 1, "language_weight": 0.5},
    "one path at a time": {"drop_tokens": 0.5, "drop_concepts": 0.5},
    "kl": {"grpo": {"kl": 0.5}},
}


def paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of random policies earn alike; here every group has something to teach."""
    monkeypatch.setattr(teachers, "format_score", lambda _prompt, ids: len(ids) % 3 / 2)


def result(step: JointStep, lengths: tuple[int | None, ...]) -> tuple[dict[str, float], Any, int]:
    """Sums of what the micro-batches tell, and the gradients that they leave."""
    figures: dict[str, float] = {}
    count = 0
    for part in micro_batches(step, 0, lengths):
        count += 1
        part["loss"].backward()  # type: ignore[no-untyped-call]
        for name, value in part.items():
            figures[name] = figures.get(name, 0.0) + float(value.detach())
    parts = {"policy": step.policy, "interface": step.interface, "place": step.place}
    named = ((f"{n}.{m}", p) for n, part in parts.items() for m, p in part.named_parameters())
    return figures, {n: p.grad for n, p in named if p.grad is not None}, count


def assert_same(found: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    assert found[0] == pytest.approx(right[0], rel=1e-5, abs=1e-6)
    assert found[1].keys() == right[1].keys()
    for name, gradient in right[1].items():
        # A key's bias moves no softmax: its gradient is 0 but for rounding.
        if not name.endswith("k_proj.bias"):
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[1][name], gradient, atol=1e-4 * scale + 1e-8, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_are_the_batch(
    arm: str, size: int, joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a group is cut apart, and where answers are malformed and masks are few."""
    paid(monkeypatch)
    settings = {**ARMS[arm], "rl_weight": 3.0}
    right = result(joint(every=True, **settings), HALF_WHOLE)
    found = result(joint(every=True, **settings, micro_batch=size), HALF_WHOLE)
    assert (right[2], found[2]) == (1, 4 // size + bool(4 % size))
    assert_same(found, right)
    assert right[0]["answers"] == 4
    if arm != "oracle":
        assert right[0]["well_formed"] == 0.5
        assert right[0]["groups_that_teach"] == 1


def test_a_part_of_the_answers_is_what_it_was_without_the_padding(
    joint: Callable[..., JointStep],
) -> None:
    step = joint()
    rollouts, questions, _, _ = answered(step)
    sequences, is_answer, log_probs, _, good, *_ = rollouts
    gains = torch.arange(4.0)
    whole = Answers(questions, sequences, is_answer, good, log_probs, gains)
    for row in range(4):
        part = whole.take([row])
        kept = is_answer[row] | (sequences.kinds[row] != TokenKind.PADDING)
        assert part.sequences.ids[0].tolist() == sequences.ids[row][kept].tolist()
        assert part.sequences.kinds[0].tolist() == sequences.kinds[row][kept].tolist()
        said = part.sequences.ids[part.is_answer].tolist()
        assert said == rollouts.ids[row]
        assert part.log_probs is not None and part.advantages is not None
        assert torch.equal(part.log_probs[part.is_answer], log_probs[row][is_answer[row]])
        assert part.advantages.tolist() == [row]
        assert part.questions.samples == [questions.samples[row]]
    lengths = {whole.take([row]).sequences.ids.shape[1] for row in range(4)}
    assert max(lengths) <= sequences.ids.shape[1] and len(lengths) > 1


def test_answers_are_sampled_in_parts_where_asked(joint: Callable[..., JointStep]) -> None:
    """Groups stay whole when their answers are sampled apart."""
    step = joint(rollout={"batch": 3})
    torch.manual_seed(5)
    with answers_of(*LENGTHS) as calls:
        answers, figures = step.written(step.questions(step.samples[:2]), forced=False)
    assert len(calls) == 2 and [len(a.well_formed) for a in answers] == [2, 2]
    assert len(figures["reward"]) == 4 and len(figures["groups_that_teach"]) == 2
    gains = torch.cat([a.advantages for a in answers if a.advantages is not None])
    rewards = figures["reward"].view(2, 2)
    centred = rewards - rewards.mean(1, keepdim=True)
    assert torch.equal(gains.sign(), centred.flatten().sign())


def test_a_term_that_was_not_announced_is_noticed(joint: Callable[..., JointStep]) -> None:
    """Means over a wrong number of values would train, and nobody would see it."""
    step = joint(every=True)
    plain = step.teacher.counts
    step.teacher.counts = lambda samples: {**plain(samples), "dice": 99}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="announced"):
        take(step)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_in_half_precision_sums_gradients_in_full(
    assemble: Callable[..., Parts], tmp_path: Path
) -> None:
    """Masters are fp32: gradients of bf16 weights are summed there, not where they arise."""
    logs = []
    for name, size in (("whole", None), ("parts", 1)):
        parts = assemble()
        parts.policy.model.to(torch.bfloat16)
        with answers_of(*LENGTHS):
            settings = stage(steps=2, micro_batch=size, oracle_steps=2, language_weight=1.0)
            train_joint(*parts, settings, tmp_path / name)
        logs.append(rows_of(tmp_path / name))
    for whole, parts_ in zip(*logs, strict=True):
        assert parts_["norm"] == pytest.approx(whole["norm"], rel=0.02)
        assert parts_["answers"] == whole["answers"] == 4


def two_runs(policy: Path, data: Path, base: Path) -> dict[str, Any]:
    """The same two steps, at once and in micro-batches, as one of several ranks."""
    torch.set_num_threads(1)
    found = {}
    with start("cpu") as world:
        for name, size in (("whole", None), ("parts", 1)):
            parts = build_parts("qwen2_5_vl", policy, data, base / f"run-{world.size}-{name}")
            settings = stage(steps=2, batch=3, micro_batch=size, oracle_steps=1)
            folder = base / f"stage-{world.size}-{name}"
            train_joint(*parts, settings, folder)
            found[name] = rows_of(folder)
    return found


def test_ranks_take_as_many_micro_batches_and_the_same_steps(
    plain_policies: dict[str, Path], scenes_root: Path, tmp_path: Path
) -> None:
    """Two ranks share three questions: one has more answers than the other."""
    arguments = (plain_policies["qwen2_5_vl"], scenes_root, tmp_path)
    alone = two_runs(*arguments)
    together = launch(two_runs, 2, *arguments)[0]
    for runs in (alone, together):
        for whole, parts in zip(runs["whole"], runs["parts"], strict=True):
            same = whole.keys() - {"s"}
            assert {k: parts[k] for k in same} == pytest.approx(
                {k: whole[k] for k in same}, rel=2e-3, abs=2e-4
            )
    first = alone["parts"][0]  # the oracle's answers: nothing is sampled
    for name in ("loss", "language", "dice", "norm"):
        assert together["parts"][0][name] == pytest.approx(first[name], rel=1e-3), name


def test_parts_are_as_many_on_every_rank_and_never_empty(
    joint: Callable[..., JointStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = joint()
    for ours, theirs, limit, sizes in [
        (4, 4, None, [4]),
        (4, 4, 3, [2, 2]),
        (2, 4, 1, [1, 1]),
        (4, 2, 1, [2, 2]),
        (8, 16, 4, [2, 2, 2, 2]),
    ]:
        monkeypatch.setattr(World, "gather_objects", lambda _, n, t=theirs: [n, t])
        assert [len(part) for part in step.parts(range(ours), limit)] == sizes
