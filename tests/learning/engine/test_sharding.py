"""A policy sharded over two processes computes what one process does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import launch
from tiny import WIDTH, policy_config, write_policy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segcompass.learning.engine.distributed import World, average_gradients, start
from segcompass.learning.engine.sharding import (
    anchor,
    enable_checkpointing,
    full_state,
    gathered,
    shard,
)
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Generation, Policy
from segcompass.types import TokenKind

ROWS = 5  # of a batch; two ranks get 2 and 3
LIMITS = (9, 4)  # answers' tokens by rank: the second waits for the first


class Case(NamedTuple):
    """One policy in one set-up."""

    family: str
    tied: bool = False
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    trained_from: int = 0  # first decoder layer that trains; those below and the vision are frozen
    last_rows: bool = False  # only rank 1's rows reach the layers after the SAE's

    def policy(self, folder: Path) -> Policy:
        """Read anew, so that no case sees another's."""
        policy = load_policy(folder / self.family, policy_config(self.family), dtype=self.dtype)
        if self.tied:
            policy.model.lm_head.weight = policy.model.get_input_embeddings().weight
        if self.trained_from:
            policy.requires_grad_(False)
            policy.backbone.layers[self.trained_from :].requires_grad_(True)
        return policy


CASES = {
    "untied": Case("qwen2_5_vl"),
    "tied": Case("qwen2_5_vl", tied=True, checkpointing=True),
    "llava": Case("llava"),
    "uneven": Case("qwen2_5_vl", last_rows=True),
    "half": Case("qwen2_5_vl", dtype=torch.bfloat16, trained_from=2),
}


def answered(policy: Policy) -> tuple[list[VisualInput], list[str], list[str]]:
    """Pictures of several sizes, questions and answers of several lengths."""
    rng = np.random.default_rng(0)
    sizes = [(64, 48 + 8 * i, 3) for i in range(ROWS)]
    visuals = [policy.backbone.prepare(rng.integers(0, 255, s, dtype=np.uint8)) for s in sizes]
    questions = ["the red mug, " * (i + 1) for i in range(ROWS)]
    return visuals, questions, [f"There is a mug at b{'3' * i}." for i in range(ROWS)]


def losses(case: Case, policy: Policy, head: nn.Module, world: World) -> Tensor:
    """Language, and a head on what the taps and the last layer show."""
    visuals, questions, thoughts = map(world.slice, answered(policy))
    sequences = policy.encode(visuals, questions, thoughts)
    states, hidden = policy(sequences, visuals)
    is_answer = sequences.kinds >= TokenKind.THOUGHT
    terms = {"concepts": head(states.sae_states[is_answer].float()).cos()}
    seen = [i for i, row in enumerate(world.slice(range(ROWS))) if row >= 2 or not case.last_rows]
    if seen:
        is_answer = is_answer[seen]
        targets = sequences.ids[seen, 1:][is_answer[:, 1:]]
        logits = policy.language_logits(hidden[seen, :-1][is_answer[:, 1:]]).float()
        terms["language"] = F.cross_entropy(logits, targets, reduction="none")
        terms["slots"] = head(states.concentration_states[seen].float()).square()
    return torch.stack(list(world.means(terms).values())).sum() + anchor(hidden)


def compute(folder: Path, name: str, world: World) -> dict[str, Any]:
    """Everything that is compared between one process and two."""
    case = CASES[name]
    policy = case.policy(folder)
    if case.checkpointing:
        enable_checkpointing(policy)
    shard(policy, world)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 3)
    visuals, questions, _ = map(world.slice, answered(policy))
    with torch.no_grad():  # before any pass of the whole policy
        features = policy.backbone.embed_images(visuals)
    loss = losses(case, policy, head, world)
    loss.backward()
    average_gradients(head.parameters(), world)
    told = {
        "loss": world.sum(float(loss.detach())) / world.size,
        "features": world.gather_objects([f.float().numpy() for f in features]),
        "gradients": {n: whole(p.grad) for n, p in policy.model.named_parameters()},
        "head": {n: whole(p.grad) for n, p in head.named_parameters()},
        "kinds": {n: kind(p) for n, p in policy.model.named_parameters()},
    }
    limit = LIMITS[world.rank]
    written = policy.generate(visuals, questions, max_new_tokens=limit)
    between = [sharded_blocks(policy)]
    with gathered(policy):
        again = policy.generate(visuals, questions, max_new_tokens=limit)
        between.append(sharded_blocks(policy))
    told["sharded"] = [*between, sharded_blocks(policy)]
    told["same"] = torch.equal(again.states.sae_states, written.states.sae_states)
    told["answers"] = world.gather_objects(answers(policy, written))
    state = full_state(policy, world, case.dtype)
    told["state"] = {n: t.float().numpy() for n, t in state.items()}
    told["state_kinds"] = {str(t.dtype) for t in state.values()}
    return told


def whole(gradient: Tensor | None) -> np.ndarray | None:
    if gradient is None:
        return None
    full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return full.float().numpy()


def kind(parameter: nn.Parameter) -> tuple[bool, str, bool]:
    data = parameter.data
    return isinstance(data, DTensor), str(data.dtype), parameter.requires_grad


@torch.no_grad()
def answers(policy: Policy, written: Generation) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, the states they were written with, and what the language head says of the last."""
    logits = policy.language_logits(written.states.sae_states[:, -1])
    return written.texts, written.states.sae_states.float().numpy(), logits.float().numpy()


def sharded_blocks(policy: Policy) -> set[bool]:
    """Whether the decoder layers hold shards just now."""
    return {isinstance(p.data, DTensor) for p in policy.backbone.layers.parameters()}


def compute_all(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with start("cpu") as world:
        told = {name: compute(folder, name, world) for name in CASES}
        return told if world.is_main else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policies")
    for family in {case.family for case in CASES.values()}:
        write_policy(root / family, family)
    return root


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[str, Any]:
    """All cases on two ranks, from one launch."""
    return launch(compute_all, 2, folder)[0]


@cache
def _alone(folder: Path, name: str) -> dict[str, Any]:
    return compute(folder, name, World(0, 1, torch.device("cpu")))


def distance(found: np.ndarray, right: np.ndarray, floor: float = 0.0) -> float:
    return float(np.linalg.norm(found - right) / max(np.linalg.norm(right), floor, 1e-30))


@pytest.mark.parametrize("name", ["untied", "tied", "llava", "uneven"])
def test_losses_and_gradients_are_those_of_one_process(
    name: str, folder: Path, sharded: dict[str, Any]
) -> None:
    ours, right = sharded[name], _alone(folder, name)
    assert ours["loss"] == pytest.approx(right["loss"], rel=1e-6)
    assert ours["gradients"].keys() == right["gradients"].keys()
    assert ("lm_head.weight" in ours["gradients"]) == (name != "tied")
    if name == "uneven":
        assert World(0, 2, torch.device("cpu")).slice(range(ROWS)) == [0, 1]
    total = np.sqrt(sum(np.square(g).sum() for g in right["gradients"].values() if g is not None))
    for part in ("gradients", "head"):
        for parameter, gradient in right[part].items():
            found = ours[part][parameter]
            if gradient is None:  # no loss reaches it: FSDP says 0
                assert found is None or not found.any()
                continue
            # A key's bias moves no softmax: its gradient is 0 but for rounding.
            floor = 1e-3 * total if parameter.endswith("k_proj.bias") else 0.0
            assert distance(found, gradient, floor) < 1e-5, parameter


@pytest.mark.parametrize("name", list(CASES))
def test_every_weight_is_sharded_and_comes_back_whole(
    name: str, folder: Path, sharded: dict[str, Any]
) -> None:
    policy = CASES[name].policy(folder)
    kinds, original = sharded[name]["kinds"], policy.model.state_dict()
    assert all(is_sharded for is_sharded, _, _ in kinds.values())
    for parameter, (_, dtype, trains) in kinds.items():
        assert trains == policy.model.get_parameter(parameter).requires_grad
        # What trains has fp32 masters; what is frozen keeps its size.
        assert dtype == ("torch.float32" if trains else str(CASES[name].dtype))
    found = sharded[name]["state"]
    assert found.keys() == original.keys()
    assert all(np.array_equal(found[n], t.float().numpy()) for n, t in original.items())
    floats = {str(CASES[name].dtype)}
    assert sharded[name]["state_kinds"] == floats


@pytest.mark.parametrize("name", ["untied", "tied", "llava"])
def test_answers_and_states_are_those_of_one_process(
    name: str, folder: Path, sharded: dict[str, Any]
) -> None:
    """Also where one rank's answers are longer than the other's."""
    policy = CASES[name].policy(folder)
    visuals, questions, _ = answered(policy)
    with torch.no_grad():
        features = policy.backbone.embed_images(visuals)
    found = [feature for part in sharded[name]["features"] for feature in part]
    for ours, right in zip(found, features, strict=True):
        np.testing.assert_allclose(ours, right.numpy(), atol=1e-5)
    for rank, (texts, states, logits) in enumerate(sharded[name]["answers"]):
        part = World(rank, 2, torch.device("cpu")).slice(list(range(ROWS)))
        rows = slice(part[0], part[-1] + 1)
        written = policy.generate(visuals[rows], questions[rows], max_new_tokens=LIMITS[rank])
        right = answers(policy, written)
        assert texts == right[0]
        np.testing.assert_allclose(states, right[1], atol=1e-5)
        np.testing.assert_allclose(logits, right[2], atol=1e-5)


def test_gathered_weights_stay_until_the_end_of_the_block(sharded: dict[str, Any]) -> None:
    for told in sharded.values():
        assert told["sharded"] == [{True}, {False}, {True}]
        assert told["same"]


def test_half_precision_computes_as_one_process_does(folder: Path, sharded: dict[str, Any]) -> None:
    ours, right = sharded["half"], _alone(folder, "half")
    assert ours["loss"] == pytest.approx(right["loss"], rel=1e-2)
    trained = [n for n, g in right["gradients"].items() if g is not None]
    assert trained and all("layers.2." in n for n in trained)
    for name in trained:
        assert distance(ours["gradients"][name], right["gradients"][name]) < 0.05


def test_checkpointing_changes_no_gradient_and_computes_twice(folder: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    found = []
    for checkpointing in (False, True):
        case = CASES["untied"]
        policy = case.policy(folder)
        if checkpointing:
            enable_checkpointing(policy)
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, 3)
        passes = {"hook": 0, "inside": 0}
        layer = policy.backbone.layers[0]
        layer.register_forward_hook(lambda *_, p=passes: p.update(hook=p["hook"] + 1))
        layer.mlp.register_forward_pre_hook(lambda *_, p=passes: p.update(inside=p["inside"] + 1))
        losses(case, policy, head, world).backward()
        assert passes == {"hook": 1, "inside": 2 if checkpointing else 1}
        visuals, questions, _ = answered(policy)
        texts = policy.generate(visuals[:1], questions[:1], max_new_tokens=3).texts
        assert passes["inside"] == (2 if checkpointing else 1) + 3  # the cache is on
        found.append(([p.grad for p in policy.parameters()], texts))
    (plain, answer), (again, same) = found
    assert answer == same
    for left, right in zip(plain, again, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.equal(left, right)


def test_one_process_is_left_as_it_is(folder: Path) -> None:
    policy = CASES["untied"].policy(folder)
    before = list(policy.parameters())
    shard(policy, World(0, 1, torch.device("cpu")))
    assert all(a is b for a, b in zip(before, policy.parameters(), strict=True))
    with gathered(policy):
        pass
