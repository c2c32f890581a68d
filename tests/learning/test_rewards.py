"""Rewards: the form of an answer by hand-built token rows, its masks against brute force."""

from __future__ import annotations

import re
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import prompt_of
from torch import Tensor

from segcompass.learning.rewards import RewardConfig, format_score, mask_score
from segcompass.reasoning.prompts import Prompt
from segcompass.types import Status

KINDS = ("qwen", "llava", "nano")
K = 3
ON, OFF, HALF = 50.0, -50.0, 0.0  # logits of (almost) 1, (almost) 0, and 1/2


def row(prompt: Prompt, *parts: str | list[int]) -> list[int]:
    """Ids of an answer: marks and words as text, concentration tokens and end-of-text as ids."""
    ids: list[int] = []
    for part in parts:
        ids += ids_of(prompt, part) if isinstance(part, str) else part
    return ids


def ids_of(prompt: Prompt, text: str) -> list[int]:
    return prompt.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 6])
@given(
    thought=st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁<"), max_size=60
    )
)
def test_a_whole_answer_around_any_thought_is_clean(kind: str, slots: int, thought: str) -> None:
    prompt = prompt_of(kind, slots)
    ids = prompt.encode_answer(thought).ids
    said = prompt.decode(ids).partition("<think>")[2].partition("</think>")[0]
    assert format_score(prompt, ids) == (1.0 if said.strip() else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_five_cases(kind: str) -> None:
    prompt = prompt_of(kind, K)
    slots, end = prompt.slot_ids, [prompt.eos_token_id]
    block = "<think>a red mug at b3</think>"
    assert format_score(prompt, row(prompt, block, slots, end)) == 1.0
    assert format_score(prompt, row(prompt, " \n", block, "\n", slots, " \n", end)) == 1.0
    assert format_score(prompt, row(prompt, "Well.", block, slots, end)) == 0.9
    assert format_score(prompt, row(prompt, block, slots, "Done.", end)) == 0.9
    assert format_score(prompt, row(prompt, "Well.", block, slots, "Done.", end)) == 0.9
    assert format_score(prompt, row(prompt, block, "so", slots, end)) == 0.9
    for length, score in ((2048, 1.0), (2049, 0.9)):
        long = row(prompt, f"<think>{'a' * length}</think>")
        assert len(prompt.decode(long)) == length + len("<think></think>")
        assert format_score(prompt, [*long, *slots, *end]) == score, length
    assert format_score(prompt, row(prompt, block, end)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_invalid(kind: str) -> None:
    prompt = prompt_of(kind, K)
    (one, two, three), end = prompt.slot_ids, [prompt.eos_token_id]
    slots, block = prompt.slot_ids, "<think>a red mug</think>"
    wrong = {
        "nothing": [],
        "end alone": end,
        "cut off": row(prompt, block, slots),
        "cut off in the thought": row(prompt, "<think>a red"),
        "one too few": row(prompt, block, [one, two], end),
        "one too many": row(prompt, block, [*slots, three], end),
        "another one in front": row(prompt, block, [one, *slots], end),
        "twice the row": row(prompt, block, slots, slots, end),
        "one apart": row(prompt, block, slots, "and", [two], end),
        "interrupted": row(prompt, block, [one], "and", [two, three], end),
        "interrupted by a blank": row(prompt, block, [one, two], " ", [three], end),
        "backwards": row(prompt, block, slots[::-1], end),
        "one of them twice": row(prompt, block, [one, two, two], end),
        "in the thought": row(prompt, "<think>a red", slots, "mug</think>", end),
        "in the thought too": row(prompt, "<think>a", [one], "mug</think>", slots, end),
        "before the block": row(prompt, slots, block, end),
        "no block": row(prompt, "a red mug", slots, end),
        "never opened": row(prompt, "a red mug</think>", slots, end),
        "never closed": row(prompt, "<think>a red mug", slots, end),
        "closed, then opened": row(prompt, "</think>a red mug<think>", slots, end),
        "two blocks": row(prompt, block, block, slots, end),
        "opened twice": row(prompt, "<think>", block, slots, end),
        "closed twice": row(prompt, block, "</think>", slots, end),
        "another block behind": row(prompt, block, slots, block, end),
        "closed again behind": row(prompt, block, slots, "</think>", end),
        "empty thought": row(prompt, "<think></think>", slots, end),
        "blank thought": row(prompt, "<think> \n </think>", slots, end),
    }
    for name, ids in wrong.items():
        assert format_score(prompt, ids) == 0.0, name


PIECES = {"O": "<think>", "C": "</think>", "w": "mug", "b": " "}
VALID = re.compile(r"([wb]*)O([wb]*)C([wb]*)S([wb]*)")


@pytest.mark.parametrize("kind", KINDS)
@given(
    plan=st.one_of(
        st.text("OCSswb", max_size=9),
        st.tuples(*[st.text("wb", max_size=2)] * 4).map("{0[0]}O{0[1]}C{0[2]}S{0[3]}".format),
    ),
    ends=st.integers(0, 9).map(bool),
)
def test_any_row_of_pieces_earns_what_the_pattern_says(kind: str, plan: str, ends: bool) -> None:
    """S is the whole row of concentration tokens, s the first of them alone."""
    prompt = prompt_of(kind, K)
    ids = {"S": prompt.slot_ids, "s": prompt.slot_ids[:1]}
    answer = row(prompt, *(ids.get(piece) or PIECES[piece] for piece in plan))
    answer += [prompt.eos_token_id] if ends else []
    found = VALID.fullmatch(plan)
    if not ends or found is None or "w" not in found[2]:
        expected = 0.0
    else:
        expected = 0.9 if "w" in found[1] + found[3] + found[4] else 1.0
    score = format_score(prompt, answer)
    assert score == expected
    if score == 1.0:  # what is clean can be read
        assert prompt.parse(answer).status == Status.OK


def grids(*rows: str) -> Tensor:
    """Logits of 2x4 maps: # on, . off, ? undecided."""
    values = {"#": ON, ".": OFF, "?": HALF}
    return torch.tensor([[values[c] for c in row] for row in rows]).view(-1, 2, 4)


def wanted(*rows: str) -> Tensor:
    return torch.tensor([[float(c == "#") for c in row] for row in rows]).view(-1, 2, 4)


LEFT, RIGHT = "##..##..", "..##..##"
PAPER, COUNTED = RewardConfig(several="matched"), RewardConfig(several="size")


@pytest.mark.parametrize("config", [PAPER, COUNTED, RewardConfig(single="blend")])
def test_nothing_is_right_only_where_nothing_is_wanted(config: RewardConfig) -> None:
    none, some = torch.zeros(0, 2, 4), grids(LEFT)
    assert mask_score(none, none, config) == 1
    assert mask_score(none, wanted(LEFT), config) == 0
    assert mask_score(some, none, config) == 0
    assert mask_score(grids(LEFT, RIGHT), none, config) == 0
    assert mask_score(none, wanted(LEFT, RIGHT), config) == 0


@pytest.mark.parametrize("config", [PAPER, COUNTED])
@pytest.mark.parametrize(
    ("found", "score"),
    [
        ([LEFT], 1),
        ([RIGHT], 0),
        (["####...."], 2 / 6),
        (["????????"], 2 / (4 + 4 - 2)),  # soft: half of every cell
        (["??..??.."], 2 / 4),
        (["##......", "....##.."], 1),  # together they are the target
        ([LEFT, LEFT], 1),
        ([LEFT, "..#....."], 4 / 5),
        ([LEFT, RIGHT], 4 / 8),
        (["?#..##..", "#......."], 1),  # the surer of both counts
    ],
)
def test_masks_of_one_target_act_together(
    found: list[str], score: float, config: RewardConfig
) -> None:
    assert mask_score(grids(*found), wanted(LEFT), config) == pytest.approx(score)


@pytest.mark.parametrize(
    ("found", "targets", "matched", "size"),
    [
        ([LEFT, RIGHT], [LEFT, RIGHT], 1, 1),
        ([RIGHT, LEFT], [LEFT, RIGHT], 1, 1),
        ([LEFT], [LEFT, RIGHT], 1, 1 / 2),  # B.3 does not count what is missing
        (["##......", RIGHT, "..#....."], [LEFT, RIGHT], (2 / 4 + 1) / 2, (2 / 4 + 1) / 3),
        (["########"], [LEFT, RIGHT], 1 / 2, 1 / 4),
        ([LEFT, LEFT], [LEFT, RIGHT], 1 / 2, 1 / 2),
        ([".####...", "##......"], ["####....", "....#..."], 3 / 8, 3 / 8),
    ],
)
def test_several_targets_by_hand(
    found: list[str], targets: list[str], matched: float, size: float
) -> None:
    """In the last case the best pair, 3/5, leaves nothing for the other two: 1/4 + 1/2 is more."""
    logits, truth = grids(*found), wanted(*targets)
    assert mask_score(logits, truth, PAPER) == pytest.approx(matched)
    assert mask_score(logits, truth, COUNTED) == pytest.approx(size)


def test_the_blend_by_hand() -> None:
    """Three cells at probability 0.6, two of which are wanted."""
    logits = torch.full((1, 2, 4), OFF)
    logits[0, 0, :3] = float(torch.logit(torch.tensor(0.6)))
    truth = wanted(".##.....")
    overlap, found = 1.2, 1.8
    soft, dice, hard = overlap / (found + 2 - overlap), 2 * overlap / (found + 2), 2 / 3
    blend = RewardConfig(single="blend")
    by_hand = 0.5 * soft + 0.2 * dice + 0.3 * hard
    assert mask_score(logits, truth, blend) == pytest.approx(by_hand)
    assert mask_score(logits, truth, RewardConfig()) == pytest.approx(soft)
    two = wanted(".##.....", "....####")  # for several it is the plain assignment
    assert mask_score(logits, two, blend) == mask_score(logits, two, RewardConfig())


def pairs(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Soft IoU of every mask with every target, in float64."""
    found = 1 / (1 + np.exp(-logits.double().numpy()))
    result = np.zeros((len(logits), len(targets)))
    for m, mask in enumerate(found):
        for n, target in enumerate(targets.double().numpy()):
            both = (mask * target).sum()
            result[m, n] = both / (mask.sum() + target.sum() - both)
    return result


def best(ious: np.ndarray) -> float:
    """Largest sum over all ways to pair rows with columns."""
    if ious.shape[0] < ious.shape[1]:
        ious = ious.T
    rows, columns = ious.shape
    return max(
        sum(ious[row, column] for column, row in enumerate(order))
        for order in permutations(range(rows), columns)
    )


@given(
    seed=st.integers(0, 10_000),
    found=st.integers(0, 4),
    count=st.integers(0, 4),
    single=st.sampled_from(["soft_iou", "blend"]),
    several=st.sampled_from(["size", "matched"]),
)
def test_scores_are_bounded_free_of_order_and_the_best_assignment(
    seed: int, found: int, count: int, single: str, several: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(found, 4, 5, generator=draw)
    targets = (torch.rand(count, 4, 5, generator=draw) * 3 - 1).clamp(0, 1)
    config = RewardConfig.model_validate({"single": single, "several": several})
    score = mask_score(logits, targets, config)
    assert 0 <= score <= 1
    shuffled = logits[torch.randperm(found, generator=draw)]
    turned = targets[torch.randperm(count, generator=draw)]
    assert mask_score(shuffled, turned, config) == pytest.approx(score, abs=1e-6)
    if count > 1 and found:
        divisor = min(found, count) if several == "matched" else max(found, count)
        assert score == pytest.approx(best(pairs(logits, targets)) / divisor, rel=1e-4)
    if count == 1 and found and single == "soft_iou":
        together = logits.amax(0, keepdim=True)
        assert score == pytest.approx(pairs(together, targets)[0, 0], rel=1e-4)


def test_half_precision_is_scored_like_full() -> None:
    logits, truth = torch.randn(3, 16, 16).bfloat16(), (torch.rand(2, 16, 16) > 0.6).float()
    assert mask_score(logits, truth, COUNTED) == mask_score(logits.float(), truth, COUNTED)


@pytest.mark.parametrize("wrong", [{"format": -1}, {"threshold": 1.1}, {"single": "iou"}])
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate(wrong)


def test_the_papers_weights_are_the_default() -> None:
    config = RewardConfig()
    assert (config.format, config.mask, config.single, config.several) == (
        0.3, 0.7, "soft_iou", "size",
    )  # fmt: skip
