"""A joint step over stored rollouts is the same on one process and on two, sharded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from joint import build_parts, sharpen, stage
from ranks import launch
from tiny import write_policy
from torch import Tensor
from torch.distributed.tensor import DTensor

from segcompass.learning import teachers
from segcompass.learning.engine import reference
from segcompass.learning.engine.distributed import World, average_gradients, start
from segcompass.learning.engine.freezing import freeze
from segcompass.learning.engine.loop import Loop, Losses
from segcompass.learning.engine.sharding import shard
from segcompass.learning.rollouts import RolloutConfig, Rollouts, score_answers
from segcompass.learning.stages import JointStage
from segcompass.learning.train_joint import JointStep
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Policy

CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "lora": {"lora": {"rank": 2}},
    "lora after supervision": {"lora": {"rank": 2}, "oracle_steps": 1},
}
QUESTIONS, GROUP, TAKEN = 3, 4, 2  # ranks get one question and two; steps before the resume


class Stored(NamedTuple):
    """Stands in for sampling: the same answers whatever rank a question is on."""

    answers: dict[str, list[list[int]]]  # G to each instruction, with end-of-text or cut off

    def __call__(
        self,
        policy: Policy,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        config: RolloutConfig,
        features: Sequence[Tensor] | None = None,
        *,
        force_form: bool = False,
    ) -> Rollouts:
        said = [self.answers[text][i % GROUP] for i, text in enumerate(instructions)]
        read = score_answers(policy, visuals, instructions, said, config, features)
        # As an older policy would have it, so that ratios are not 1 and some are clipped.
        drift = 0.4 * torch.cos(read.sequences.ids.float()) * read.is_answer
        return read._replace(log_probs=read.log_probs + drift)


def stored(step: JointStep) -> Stored:
    """Thoughts of several lengths; every fourth answer is cut off."""
    prompt, answers = step.policy.prompt, {}
    for sample in step.samples[:QUESTIONS]:
        said = [list(prompt.encode_answer(f"red mug {'b3 ' * i}").ids) for i in range(GROUP)]
        answers[sample.instruction] = [*said[:-1], said[-1][:-3]]
    return Stored(answers)


def settings(name: str) -> JointStage:
    return stage(
        batch=QUESTIONS,
        steps=TAKEN + 1,
        group=1,
        rollout={"group": GROUP},
        grpo={"kl": 0.3},
        place_weight=0.3,
        heatmap_dice_weight=0.2,
        focal_weight=0.5,
        learning_rate=1e-3,
        **{key: value for key, value in CASES[name].items() if key != "tied"},
    )


class Prepared(NamedTuple):
    step: JointStep
    parts: dict[str, torch.nn.Module]
    stage: JointStage


def prepare(folder: Path, name: str, run: str, world: World) -> Prepared:
    """A step whose policy has moved away from its reference."""
    parts = build_parts("qwen2_5_vl", folder / "policy", folder / "scenes", folder / run)
    policy = parts.policy
    if CASES[name].get("tied"):
        policy.model.lm_head.weight = policy.model.get_input_embeddings().weight
    chosen = settings(name)
    trained = freeze(*parts[:3], chosen)
    torch.manual_seed(0)
    step = JointStep(*parts, chosen)
    trained["place"] = step.place
    distinct = {s.instruction: s for s in step.samples if s.targets}
    step.samples = list(distinct.values())[:QUESTIONS]
    step.lengths = [len(s.instruction) for s in step.samples]
    assert len(step.samples) == QUESTIONS
    step.sampler = stored(step)
    sharpen(step)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in ("policy", "tokens"):
            for parameter in trained[part].parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    for sharded in filter(None, (policy, step.reference)):
        shard(sharded, world)
    return Prepared(step, trained, chosen)


def figures(losses: Losses, world: World) -> dict[str, float]:
    rows = world.gather_objects({n: float(v.detach()) for n, v in losses.items()})
    return {n: sum(row[n] for row in rows) / world.size for n in rows[0]}


def whole(tensor: Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().float().numpy()


def compute(folder: Path, name: str, world: World) -> dict[str, Any]:
    """Loss, figures and gradients of a first step, and the loss after a few more."""
    teachers.format_score = lambda _prompt, ids: len(ids) % 3 / 2  # so that every group teaches
    step, parts, _ = prepare(folder, name, f"run-{world.size}", world)
    (losses,) = step(step.stage.oracle_steps)
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    named = {f"{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    average_gradients([p for p in trained.values() if not isinstance(p.data, DTensor)], world)
    return {
        "figures": figures(losses, world),
        "gradients": {n: whole(p.grad) for n, p in trained.items() if p.grad is not None},
    }


def advance(folder: Path, name: str, world: World, resume: bool) -> dict[str, float]:
    """Figures of the step after TAKEN ones: those of this world, or those that it finds."""
    teachers.format_score = lambda _prompt, ids: len(ids) % 3 / 2
    step, parts, chosen = prepare(folder, name, "later", world)
    limit = chosen.model_copy(update={"steps": TAKEN})
    loop = Loop(folder / f"state-{name}", name, parts, limit, 0, world=world)
    policy, stage_folder = step.policy, folder / f"state-{name}"
    if resume:
        assert loop.resume() and loop.step == TAKEN
        if step.reference is not None:
            reference.restore(step.reference, policy, stage_folder)
    else:
        if step.reference is not None:
            reference.renew(step.reference, policy, stage_folder, 0, world)
        loop.run(step)
    (losses,) = step(TAKEN)
    return figures(losses, world)


def on_two(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with start("cpu") as world:
        told = {name: compute(folder, name, world) for name in CASES}
        later = {name: advance(folder, name, world, resume=False) for name in CASES}
        return {"first": told, "later": later} if world.is_main else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    write_policy(root / "policy", "qwen2_5_vl")
    (root / "scenes").symlink_to(scenes_root)
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """All cases on two ranks, from one launch."""
    return launch(on_two, 2, folder)[0]


ALONE = World(0, 1, torch.device("cpu"))


@cache
def alone(folder: Path, name: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "format_score", teachers.format_score)  # put back afterwards
        return compute(folder, name, ALONE)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_and_gradients_of_one(
    name: str, folder: Path, two: dict[str, Any]
) -> None:
    found, right = two["first"][name], alone(folder, name)
    assert World(0, 2, torch.device("cpu")).slice(range(QUESTIONS)) == [0]  # the other has two
    assert right["figures"]["kl"] > 1e-4 and right["figures"]["clipped"] > 0.01
    assert right["figures"]["groups_that_teach"] > 0
    assert right["figures"]["well_formed"] == 1 - 1 / GROUP
    for figure in ("loss", "policy", "kl", "confidence", "dice", "place", "reward", "length"):
        assert found["figures"][figure] == pytest.approx(right["figures"][figure], rel=1e-6)
    assert found["gradients"].keys() == right["gradients"].keys()
    for part in ("policy", "tokens", "codebook", "head", "decoder", "place"):
        names = [n for n in right["gradients"] if n.startswith(f"{part}.")]
        ours, wanted = (
            np.concatenate([told["gradients"][n].ravel() for n in names]) for told in (found, right)
        )
        assert np.linalg.norm(wanted) > 1e-3
        bound = 2e-5 if name.startswith("lora") else 1e-5  # two more fp32 products in every layer
        assert np.linalg.norm(ours - wanted) <= bound * np.linalg.norm(wanted), part


@pytest.mark.parametrize("name", CASES)
def test_resumed_on_another_number_of_ranks_the_loss_is_the_same(
    name: str, folder: Path, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "format_score", teachers.format_score)  # put back afterwards
    found, right = advance(folder, name, ALONE, resume=True), two["later"][name]
    first = two["first"][name]["figures"]
    assert abs(right["loss"] - first["loss"]) > 1e-3  # the steps in between moved something
    assert found["loss"] == pytest.approx(right["loss"], rel=1e-5)
    assert found["kl"] == pytest.approx(right["kl"], rel=1e-4)
    if name != "lora":  # measured from where reinforcement began, not from the start
        assert right["kl"] < 0.5 * first["kl"]
