"""The two losses of warm-up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_config
from tiny import policy_config, tiny_qwen_policy
from torch import Tensor

from segcompass.data.samples import read_dataset
from segcompass.io.images import load_image
from segcompass.learning import grpo, train, train_warmup
from segcompass.learning.config import load_config
from segcompass.learning.corpus import DENSE_TARGETS, IGNORED, repeated
from segcompass.learning.engine.distributed import World
from segcompass.learning.train_warmup import (
    DenseHeads,
    answer_losses,
    answer_tokens,
    train_vision,
)
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind

CELLS = 4
ALONE = World(0, 1, torch.device("cpu"))


def uniform_heads() -> DenseHeads:
    """Read-outs that find every class equally likely."""
    heads = DenseHeads(3)
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    return heads


def test_dense_loss_by_hand() -> None:
    targets = {name: torch.zeros(CELLS, dtype=torch.long) for name in DENSE_TARGETS}
    found = uniform_heads().losses(torch.randn(CELLS, 3), targets, 0.15, ALONE)
    assert found["loss"].item() == pytest.approx(sum(map(math.log, DENSE_TARGETS.values())))
    assert found["acc_here_colour"].item() == 1  # class 0 is the first of equals


def test_empty_cells_weigh_less() -> None:
    """Three empty cells of weight 0.1 against one with a thing of weight 1."""
    heads = uniform_heads()
    heads.heads["here_category"].bias.data[-1] = math.log(DENSE_TARGETS["here_category"] - 1)
    half = math.log(2)  # "nothing" now has probability 1/2, each thing 1/2 / (classes - 1)
    thing = math.log(2 * (DENSE_TARGETS["here_category"] - 1))
    targets = {name: torch.full((CELLS,), IGNORED) for name in DENSE_TARGETS}
    nothing = DENSE_TARGETS["here_category"] - 1
    targets["here_category"] = torch.tensor([0, nothing, nothing, nothing])
    found = heads.losses(torch.zeros(CELLS, 3), targets, 0.1, ALONE)
    assert found["loss"].item() == pytest.approx((thing + 0.3 * half) / 1.3)
    assert found["acc_here_category"].item() == 0  # judged where something is, and it said nothing


def test_a_batch_without_any_such_cell_has_a_loss() -> None:
    heads = uniform_heads()
    targets = {name: torch.full((CELLS,), IGNORED) for name in DENSE_TARGETS}
    loss = heads.losses(torch.randn(CELLS, 3), targets, 0.1, ALONE)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(tiny_qwen_policy(tmp_path / "policy"), policy_config("qwen2_5_vl"))


def test_answers_are_judged_token_by_token(policy: Policy, scenes_root: Path) -> None:
    """Thought, concentration tokens and end-of-text count; prompt and padding do not."""
    samples = read_dataset(scenes_root, "train")[:2]
    visuals = [policy.backbone.prepare(load_image(s.image_path)) for s in samples]
    instructions, thoughts = [s.instruction for s in samples], ["red", "the red mug at b3."]
    sequences = policy.encode(visuals, instructions, thoughts)
    _, hidden = policy(sequences, visuals)
    losses, right = answer_losses(policy, sequences, hidden)
    log_probabilities, hits = [], []
    for row, (thought, instruction) in enumerate(zip(thoughts, instructions, strict=True)):
        answer = policy.prompt.encode_answer(thought).ids
        prompt = policy.encode(visuals[row : row + 1], [instruction]).ids[0].tolist()
        ids = sequences.ids[row].tolist()
        assert ids[-len(answer) - len(prompt) :] == prompt + answer
        said = policy.language_logits(hidden[row]).double().log_softmax(-1)
        for at in range(len(ids) - len(answer), len(ids)):
            log_probabilities.append(said[at - 1, ids[at]].item())
            hits.append(said[at - 1].argmax().item() == ids[at])
    assert losses.tolist() == pytest.approx([-said for said in log_probabilities], rel=1e-4)
    assert right.tolist() == hits
    assert (sequences.kinds == TokenKind.PADDING).any()  # one of them is shorter


def test_answers_are_judged_in_chunks(
    policy: Policy, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, hits and gradients of all logits at once, which are gigabytes for a 7B policy."""
    samples = read_dataset(scenes_root, "train")[:2]
    visuals = [policy.backbone.prepare(load_image(s.image_path)) for s in samples]
    thoughts = ["red", "the red mug at b3."]
    sequences = policy.encode(visuals, [s.instruction for s in samples], thoughts)
    hidden = torch.randn(*sequences.ids.shape, policy.width, requires_grad=True)
    head = policy.model.get_output_embeddings().weight.requires_grad_()
    asked: list[int] = []
    plain = policy.language_logits
    monkeypatch.setattr(policy, "language_logits", lambda z: (asked.append(len(z)), plain(z))[1])
    monkeypatch.setattr(grpo, "_CHUNK", 5)

    losses, right = answer_losses(policy, sequences, hidden)
    found = torch.autograd.grad(losses.square().sum(), [hidden, head])
    assert max(asked) == 5 and sum(asked) == 2 * len(losses)  # once more for the backward pass

    at = answer_tokens(sequences)[:, 1:]
    logits, ids = plain(hidden[:, :-1][at]).float(), sequences.ids[:, 1:][at]
    wanted = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(losses, wanted)
    assert torch.equal(right, logits.argmax(-1) == ids)
    gradients = torch.autograd.grad(wanted.square().sum(), [hidden, head])
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_questions_that_nothing_matches_are_asked_as_often_as_told(scenes_root: Path) -> None:
    samples = read_dataset(scenes_root, "train")
    asked = [s.sample_id for s in repeated(samples, 3)]
    assert any(not s.targets for s in samples)
    for sample in samples:
        assert asked.count(sample.sample_id) == (1 if sample.targets else 3)


class _SeenError(Exception):
    """Ends a stage where its tensors were looked at."""


def test_targets_and_weights_go_where_the_features_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(logits: Tensor, target: Tensor, weight: Tensor, **_: object) -> None:
        assert {t.device.type for t in (logits, target, weight)} == {"meta"}
        raise _SeenError

    monkeypatch.setattr(train_warmup.F, "cross_entropy", seen)
    targets = {name: torch.zeros(CELLS, dtype=torch.long) for name in DENSE_TARGETS}
    heads = DenseHeads(3).to("meta")
    with pytest.raises(_SeenError):
        heads.losses(torch.zeros(CELLS, 3, device="meta"), targets, 0.15, ALONE)


def test_what_is_trained_beside_the_policy_is_on_its_device(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loop(
        _folder: Path, _title: str, parts: dict[str, torch.nn.Module], *_: Any, **__: Any
    ) -> None:
        assert {p.device.type for part in parts.values() for p in part.parameters()} == {"meta"}
        raise _SeenError

    monkeypatch.setattr(train_warmup, "Loop", loop)
    config = load_config(write_config(tmp_path, scenes_root))
    policy = load_policy(tiny_qwen_policy(tmp_path / "policy"), policy_config("qwen2_5_vl"))
    assert config.train_vision is not None
    with pytest.raises(_SeenError):
        train_vision(policy.to("meta"), config, config.train_vision, tmp_path)


@pytest.mark.parametrize("stage", ["segmenter", "warmup"])
def test_the_first_stages_train_on_the_worlds_device(
    stage: str, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is a GPU where there is one; meta stands in for it."""

    def seen(model: torch.nn.Module, *_: object) -> None:
        assert next(model.parameters()).device.type == "meta"
        raise _SeenError

    there = World(0, 1, torch.device("meta"))
    monkeypatch.setattr(World, "current", classmethod(lambda _cls: there))
    monkeypatch.setattr(train, "train_segmenter", seen)
    monkeypatch.setattr(train, "train_vision", seen)
    config = load_config(write_config(tmp_path, scenes_root))
    with pytest.raises(_SeenError):
        train.STAGES[stage](config)
