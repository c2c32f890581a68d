"""Rollouts of another program: read once by the policy, they are those of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forced import answers_of
from tiny import policy_config, write_policy
from torch import Tensor, nn

from segcompass.io.errors import ConfigError
from segcompass.learning.engine.lora import LoraSettings, add_lora
from segcompass.learning.engine.vllm_rollouts import (
    Limits,
    Question,
    VllmSampler,
    open_engine,
    questions_of,
)
from segcompass.learning.rollouts import RolloutConfig, Rollouts, sample_answers, score_answers
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy

SIZES = ((40, 90), (64, 48), (33, 33), (64, 64))
ASKED = ("the mug", "all that one could drink from, left of the plate", "a red plate", "the mug")
LENGTHS = (20, 33, 9, None)
CONFIG = RolloutConfig(max_new_tokens=52, temperature=0.8)


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return write_policy(tmp_path / family, family)


@pytest.fixture
def policy(folder: Path, family: str) -> Policy:
    return load_policy(folder, policy_config(family))


@pytest.fixture
def visuals(policy: Policy) -> list[VisualInput]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [policy.backbone.prepare(picture) for picture in pictures]


def assert_same(found: Rollouts, right: Rollouts) -> None:
    assert found.ids == right.ids and found.texts == right.texts
    for ours, theirs in zip(found.sequences, right.sequences, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.is_answer, right.is_answer)
    assert torch.equal(found.well_formed, right.well_formed)
    torch.testing.assert_close(found.log_probs, right.log_probs, atol=1e-4, rtol=1e-3)
    assert torch.equal(found.states.token_kinds, right.states.token_kinds)
    ours, theirs = found.states, right.states
    torch.testing.assert_close(
        ours.concentration_states, theirs.concentration_states, atol=1e-5, rtol=1e-4
    )
    real = right.sequences.attention[:, : theirs.sae_states.shape[1]].bool()
    torch.testing.assert_close(ours.sae_states[real], theirs.sae_states[real], atol=1e-5, rtol=1e-4)


def test_read_answers_are_the_rollouts_they_were(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    """States, log-probabilities, kinds and verdicts, whole answers and one that is cut off."""
    torch.manual_seed(3)
    with answers_of(*LENGTHS):
        right = sample_answers(policy, visuals, ASKED, CONFIG)
    assert right.well_formed.tolist() == [True, True, True, False]
    policy.train()
    found = score_answers(policy, visuals, ASKED, right.ids, CONFIG)
    assert policy.training and not found.log_probs.requires_grad
    assert_same(found, right)


class Fake:
    """An engine that generates through transformers, from its own copy of the weights."""

    def __init__(self, policy: Policy, visuals: Sequence[VisualInput]) -> None:
        self.policy, self.visuals = policy, visuals
        self.loaded: list[str] = []
        self.asked: list[Question] = []

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.model.named_parameters())
        for name, weight in weights:
            self.loaded.append(name)
            own[name].data.copy_(weight)

    def write(self, questions: Sequence[Question], limits: Limits) -> list[list[int]]:
        self.asked += questions
        features = [q.features for q in questions]
        with answers_of(*LENGTHS):
            written = sample_answers(
                self.policy,
                self.visuals,
                ASKED,
                RolloutConfig(temperature=limits.temperature, max_new_tokens=limits.tokens),
                features,
            )
        return written.ids


@pytest.mark.parametrize("lora", [False, True])
def test_an_engine_writes_with_the_weights_of_the_policy(
    lora: bool, policy: Policy, folder: Path, family: str, visuals: list[VisualInput]
) -> None:
    engine = Fake(load_policy(folder, policy_config(family)), visuals)
    upper = nn.ModuleList(policy.backbone.layers[2:])
    policy.requires_grad_(False)
    if lora:
        pytest.importorskip("peft")
        add_lora(policy, LoraSettings(rank=2))
    else:
        upper.requires_grad_(True)
    with torch.no_grad():
        for parameter in upper.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    torch.manual_seed(3)
    with answers_of(*LENGTHS):
        right = sample_answers(policy, visuals, ASKED, CONFIG)
    torch.manual_seed(3)
    found = VllmSampler(engine)(policy, visuals, ASKED, CONFIG)
    assert_same(found, right)
    assert engine.loaded and all(".layers.2." in name for name in engine.loaded)
    torch.manual_seed(3)
    before = VllmSampler(Fake(load_policy(folder, policy_config(family)), visuals))
    before.engine.load = lambda weights: None  # type: ignore[method-assign]
    assert before(policy, visuals, ASKED, CONFIG).ids != right.ids  # it did matter


def test_prompts_hold_one_token_for_a_picture(
    policy: Policy, visuals: list[VisualInput], family: str
) -> None:
    features = policy.backbone.embed_images(visuals)
    image = policy.backbone.image_token_id
    ids, _ = policy.encode(visuals, ASKED)
    for row, question in enumerate(questions_of(policy, visuals, ASKED, features)):
        at = question.ids.index(image)
        assert question.ids.count(image) == 1
        count = visuals[row].grid[0] * visuals[row].grid[1]
        repeated = [*question.ids[:at], *[image] * count, *question.ids[at + 1 :]]
        assert ids[row].tolist()[-len(repeated) :] == repeated
        assert torch.equal(question.features, features[row]) and len(question.features) == count
        assert (question.grid is None) == (family == "llava")


def test_a_forced_form_is_written_by_transformers(
    policy: Policy, visuals: list[VisualInput]
) -> None:
    engine = Fake(policy, visuals)
    found = VllmSampler(engine)(policy, visuals, ASKED, CONFIG, force_form=True)
    assert found.well_formed.all() and not engine.asked


def test_what_vllm_is_asked_for(
    policy: Policy, visuals: list[VisualInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in with the documented calls; vLLM itself does not run in the tests."""
    end, told = policy.prompt.eos_token_id, SimpleNamespace(model=None, weights=[], calls=[])

    class Llm:
        def __init__(self, **options: Any) -> None:
            told.model = options

        def apply_model(self, change: Any) -> None:
            change(SimpleNamespace(load_weights=lambda rows: told.weights.extend(rows)))

        def reset_prefix_cache(self) -> None:
            told.calls.append("reset")

        def generate(self, prompts: list[Any], how: dict[str, Any], *, use_tqdm: bool) -> list[Any]:
            told.calls += [(prompts, how, use_tqdm)]
            answer = SimpleNamespace(token_ids=(7, end))
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=dict))
    policy.requires_grad_(False)
    policy.backbone.final_norm.requires_grad_(True)
    engine = open_engine(policy, RolloutConfig(vllm_memory=0.4), tmp_path / "vllm", seed=5)
    assert told.model["gpu_memory_utilization"] == 0.4 and told.model["seed"] == 5
    again = load_policy(Path(told.model["model"]), policy.config)  # a plain, whole folder
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)
    found = VllmSampler(engine)(policy, visuals, ASKED, CONFIG)
    assert found.ids == [[7, end]] * 4
    assert [name.rpartition(".")[0][-4:] for name, _ in told.weights] == ["norm"]
    reset, (prompts, how, _) = told.calls
    assert reset == "reset" and len(prompts) == 4
    assert (how["temperature"], how["max_tokens"], how["stop_token_ids"]) == (0.8, 52, [end])
    assert how["logit_bias"].keys() == set(policy.backbone.placeholder_ids)
    assert all(bias == -100 for bias in how["logit_bias"].values())


def test_without_vllm_the_way_out_is_named(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"segcompass\[vllm\]"):
        open_engine(policy, RolloutConfig(), tmp_path / "vllm", seed=0)
    assert not (tmp_path / "vllm").exists()  # nothing is written for nothing
