"""What text readout is taught: targets as text by hand, and rewards of sampled texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from joint import micro_batches, reached, stage
from tiny import tiny_sam

from segcompass.geometry import Canvas
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.interfaces.concept_slots import HeadConfig
from segcompass.interfaces.text_readout import TextReadoutConfig
from segcompass.io.masks import encode
from segcompass.learning.config import RunConfig
from segcompass.learning.corpus import encode_answers, read_samples, visual_memo
from segcompass.learning.engine.freezing import freeze
from segcompass.learning.object_teacher import oracle_conclusion, target_objects
from segcompass.learning.rollouts import Rollouts
from segcompass.learning.train_joint import JointStep
from segcompass.model_folder import ModelConfig, build_interface
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.object_answers import TextObject, read_objects
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import QWEN_TEMPLATE, PromptConfig
from segcompass.types import Sample, Status, TokenKind

HW = (40, 80)
OBJECTS = PromptConfig(form="objects", slots=2, canvas_side=100)
READOUT = TextReadoutConfig(canvas=Canvas(100))


def mask(rows: slice, columns: slice) -> np.ndarray:
    shape = np.zeros(HW, dtype=bool)
    shape[rows, columns] = True
    return shape


def sample(*masks: np.ndarray) -> Sample:
    return Sample("s", Path("p.png"), 1, HW, "the mug", tuple(encode(m) for m in masks))


BAR = mask(slice(10, 20), slice(30, 41))  # 11 columns, 10 rows


def test_box_and_deepest_point_by_hand() -> None:
    """Rows 14 and 15 are deepest, 5 px, from column 34 on; the first of them is meant."""
    (found,) = target_objects(sample(BAR), Canvas(80, "square"))
    assert found == TextObject((30, 30, 41, 40), ((34.5, 34.5),))  # 20 rows of padding above
    (stretched,) = target_objects(sample(BAR), Canvas(100))
    assert stretched.box == pytest.approx((37.5, 25, 51.25, 50))
    assert stretched.points[0] == pytest.approx((34.5 * 1.25, 14.5 * 2.5))


def test_the_point_lies_in_a_mask_with_a_hole_and_off_the_rim() -> None:
    ring = mask(slice(0, 30), slice(0, 30)) & ~mask(slice(8, 26), slice(8, 26))
    ((x, y),) = target_objects(sample(ring), Canvas(80, "square"))[0].points
    row, column = int(y) - 20, int(x)
    assert ring[row, column]
    assert ring[row - 3 : row + 4, column - 3 : column + 4].all()


def test_empty_masks_are_left_out() -> None:
    nothing = mask(slice(0, 0), slice(0, 0))
    assert target_objects(sample(nothing), Canvas(100)) == []
    assert len(target_objects(sample(nothing, BAR), Canvas(100))) == 1


def test_the_oracles_conclusion_names_the_first_targets_in_few_digits() -> None:
    conclude = oracle_conclusion(OBJECTS, READOUT)
    assert conclude is not None
    whole = mask(slice(0, 40), slice(0, 80))
    text = conclude(sample(BAR, whole, BAR))
    assert json.loads(text) == [
        {"bbox_2d": [38, 25, 51, 50], "point_2d": [43, 36]},
        {"bbox_2d": [0, 0, 99, 99], "point_2d": [24, 49]},
    ]
    assert conclude(sample()) == "[]"


def test_other_models_conclude_nothing() -> None:
    assert oracle_conclusion(PromptConfig(), READOUT) is None
    assert oracle_conclusion(PromptConfig(), HeadConfig()) is None


class Parts(NamedTuple):
    policy: Policy
    encoder: ImageEncoder
    interface: Interface
    config: RunConfig


@pytest.fixture
def parts(plain_policies: dict[str, Path], scenes_root: Path, tmp_path: Path) -> Parts:
    """A tiny model whose answers name at most two objects on a canvas of 100 px."""
    prompt = {"template": QWEN_TEMPLATE, **OBJECTS.model_dump(exclude={"template"})}
    use = PolicyConfig.model_validate({"prompt": prompt, "sae_layer": 1, "max_new_tokens": 100})
    policy = load_policy(plain_policies["qwen2_5_vl"], use)
    sam = tiny_sam()
    model = ModelConfig(policy=use, interface="text_readout", head=READOUT)
    once = {"steps": 1, "learning_rate": 0.01}
    run = {"run": tmp_path, "data": {"root": scenes_root}, "train_joint": once}
    head = {"interface": "text_readout", "head": READOUT.model_dump()}
    config = RunConfig.model_validate({**run, **head})
    return Parts(policy, ImageEncoder(sam), build_interface(model, policy, sam, None), config)


def joint_step(parts: Parts, **changes: Any) -> JointStep:
    settings = stage(rollout={"max_new_tokens": 100}, **changes)
    freeze(parts.policy, parts.encoder, parts.interface, settings)
    torch.manual_seed(0)
    return JointStep(*parts, settings)


def test_whole_answers_are_taught_with_their_objects(parts: Parts) -> None:
    policy, samples = parts.policy, read_samples(parts.config.data)[:3]
    conclude = oracle_conclusion(policy.config.prompt, parts.interface.config)
    assert conclude is not None
    _, sequences = encode_answers(policy, samples, visual_memo(policy.backbone), conclude)
    for ids, kinds, asked in zip(sequences.ids, sequences.kinds, samples, strict=True):
        answer = [*ids[kinds == TokenKind.THOUGHT].tolist(), policy.prompt.eos_token_id]
        parsed = policy.prompt.parse(answer)
        assert parsed.status == Status.OK
        assert parsed.conclusion == conclude(asked)
        assert len(read_objects(parsed.conclusion)) == min(2, len(asked.targets))


def test_the_oracles_words_alone_are_supervised(parts: Parts) -> None:
    step = joint_step(parts, oracle_steps=1, language_weight=1.0)
    (values,) = step(0)
    assert values["loss"] == values["language"] > 0
    values["loss"].backward()
    assert any(reached(parts.policy).values())
    assert not any(reached(parts.interface).values())


def test_sampled_texts_are_rewarded(parts: Parts) -> None:
    """Forced into their form, random answers are well-formed, and hardly right."""
    step = joint_step(parts)
    (values,) = micro_batches(step, 0, (4, 7, 5, 9))
    assert values["well_formed"] == 1
    assert values["reward_answer"] == 1 and values["reward_think"] > 0
    assert 0 <= values["reward_accuracy"] < 1
    scores = [values[f"reward_{name}"] for name in ("think", "answer", "accuracy", "repetition")]
    mean = sum(w * score for w, score in zip((1, 2, 3, 1), scores, strict=True)) / 7
    torch.testing.assert_close(values["reward"], mean)
    values["loss"].backward()
    assert not any(reached(parts.interface).values())


def test_the_right_words_earn_everything(parts: Parts) -> None:
    step = joint_step(parts)
    samples = [s for s in step.samples if 0 < len(s.targets) < 3][:2]
    assert step.teacher.conclude is not None
    texts = [f"<think>a</think><answer>{step.teacher.conclude(s)}</answer>" for s in samples]
    texts += ["<think>a</think>", *texts[:1]]
    questions = step.questions([*samples, samples[0], samples[1]])
    rollouts = Rollouts(*[None] * len(Rollouts._fields))._replace(
        texts=texts, well_formed=torch.ones(4, dtype=torch.bool)
    )
    earned = step.teacher.rewards(rollouts, questions)
    assert earned["reward"][:2].tolist() == [1, 1]
    assert earned["reward"][2] == pytest.approx(1 / 7)  # it does not repeat itself
    assert earned["reward"][3] < 1  # right for another picture
