"""Judging marked pictures: the expected digit, from the pass that wrote the judgement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from forced import answers_of
from tiny import policy_config

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.prompts import SCORE_TEMPLATES, PromptConfig
from segcompass.reasoning.scorer import PolicyScorer, asking_for_scores, expected
from segcompass.types import Status

ASKED = ["the mug", "everything one could drink from", "a red plate"]


@pytest.fixture(scope="module")
def judge(policy: Policy, family: str) -> Policy:
    prompt = PromptConfig(template=policy.config.prompt.template, form="score")
    config = policy_config(family, max_new_tokens=80).model_copy(update={"prompt": prompt})
    return Policy(policy.backbone, policy.tokenizer, config)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in ((40, 90), (64, 48), (33, 33))]


def test_the_expected_digit_by_hand() -> None:
    sure = torch.full((10,), -100.0)
    sure[7] = 0.0
    assert expected(sure) == pytest.approx(7 / 9)
    assert expected(torch.zeros(10)) == pytest.approx(0.5)  # 4.5 of 9
    torn = torch.full((10,), -100.0)
    torn[0], torn[9] = float(np.log(1.0)), float(np.log(3.0))
    assert expected(torn) == pytest.approx(0.75)


def test_scores_are_those_of_a_plain_pass_over_the_same_answer(
    judge: Policy, pictures: list[np.ndarray]
) -> None:
    with answers_of(4, 9, 6):
        found = PolicyScorer(judge).score(pictures, ASKED)
        visuals = [judge.backbone.prepare(picture) for picture in pictures]
        written = judge.generate(visuals, ASKED)
    with torch.no_grad():
        _, hidden = judge(written.sequences, visuals)
    digits = [judge.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    for row, score in enumerate(found):
        answer = written.answers[row]
        assert (score.status, score.thought) == (Status.OK, answer.thought)
        ids = written.sequences.ids[row].tolist()
        at = max(i for i, token in enumerate(ids) if token in digits)
        assert judge.prompt.decode([ids[at]]) == answer.conclusion
        logits = judge.language_logits(hidden[row, at - 1][None])[0, digits].detach()
        wanted = (logits.softmax(0) * torch.arange(10)).sum() / 9
        assert score.value == pytest.approx(float(wanted), abs=1e-4)


def test_batches_change_nothing(judge: Policy, pictures: list[np.ndarray]) -> None:
    with answers_of(6):
        alone = PolicyScorer(judge, together=1).score(pictures, ASKED)
        together = PolicyScorer(judge, together=3).score(pictures, ASKED)
    assert [s.value for s in alone] == pytest.approx([s.value for s in together], abs=1e-4)
    assert len({round(s.value, 6) for s in alone}) == 3


def test_a_malformed_judgement_scores_nothing_and_says_so(
    judge: Policy, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = judge.generate([judge.backbone.prepare(pictures[0])], ASKED[:1], force_form=False)
    with monkeypatch.context() as patch:
        patch.setattr(judge, "generate", lambda *_, **__: free)
        (found,) = PolicyScorer(judge).score(pictures[:1], ASKED[:1])
    assert found.value == 0
    assert found.status in (Status.MALFORMED, Status.TRUNCATED)
    assert PolicyScorer(judge).score([], []) == []


def test_another_policy_is_asked_for_scores_in_its_own_chat(
    policy_folder: Path, family: str
) -> None:
    like = policy_config("llava", max_instruction_tokens=123, max_new_tokens=77, sae_layer=2)
    asked = asking_for_scores(str(policy_folder), like)
    assert (asked.prompt.form, asked.prompt.template) == ("score", SCORE_TEMPLATES[family])
    assert (asked.prompt.max_instruction_tokens, asked.max_new_tokens) == (123, 77)
    assert (asked.pad_to_square, asked.sae_layer) == (family == "llava", 0)
    assert PolicyScorer(load_policy(policy_folder, asked)).policy.config == asked


def test_a_policy_that_cannot_judge_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"unsupported policy 'bert'; supported: qwen2_5_vl"):
        asking_for_scores(str(tmp_path), policy_config("llava"))
    with pytest.raises(CheckpointError, match="missing is no usable policy folder"):
        asking_for_scores(str(tmp_path / "missing"), policy_config("llava"))


def test_a_policy_that_gives_no_scores_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"prompt\.form: score"):
        PolicyScorer(policy)
