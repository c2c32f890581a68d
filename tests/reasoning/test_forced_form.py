"""The grammar of forced answers, on random logits and on scripted ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import prompt_of

from segcompass.reasoning.forced_form import ForcedForm
from segcompass.reasoning.prompts import Prompt
from segcompass.types import Status

KINDS = ("qwen", "llava", "nano")
START = 3  # tokens of a made-up prompt
Choose = Callable[[int, torch.Tensor], torch.Tensor]


def answer(prompt: Prompt, limit: int, rows: int, choose: Choose, spare: int = 7) -> torch.Tensor:
    """Decode by hand, as ``generate`` does; finished rows go on with end-of-text."""
    form = ForcedForm(prompt, START, limit)
    ids = torch.zeros(rows, START, dtype=torch.long)
    ended = torch.zeros(rows, dtype=torch.bool)
    for step in range(limit):
        free = torch.zeros(rows, prompt.vocabulary + spare)
        chosen = choose(step, form(ids, free))
        chosen[ended] = prompt.eos_token_id
        ended |= chosen == prompt.eos_token_id
        ids = torch.cat([ids, chosen[:, None]], 1)
        if ended.all():
            break
    return ids[:, START:]


def parse(prompt: Prompt, ids: torch.Tensor) -> Status:
    row = ids.tolist()
    return prompt.parse(row[: row.index(prompt.eos_token_id) + 1]).status


def at_random(seed: int) -> Choose:
    generator = torch.Generator().manual_seed(seed)
    return lambda _, scores: torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def scripted(prompt: Prompt, text: str) -> Choose:
    """Say ``text`` after the opening mark, each token if it is allowed, else the best one."""
    wanted = prompt.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def choose(step: int, scores: torch.Tensor) -> torch.Tensor:
        at = step - len(prompt.open_ids)
        if 0 <= at < len(wanted) and scores[0, wanted[at]] > -torch.inf:
            return torch.tensor([wanted[at]])
        return scores.argmax(-1)

    return choose


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), spare_room=st.integers(0, 25), slots=st.integers(1, 7))
def test_random_answers_are_well_formed_within_the_limit(
    kind: str, seed: int, spare_room: int, slots: int
) -> None:
    prompt = prompt_of(kind, slots)
    limit = len(prompt.open_ids) + len(prompt.close_ids) + slots + 2 + spare_room
    ids = answer(prompt, limit, 3, at_random(seed))
    assert ids.shape[1] <= limit
    assert [parse(prompt, row) for row in ids] == [Status.OK] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_without_room_is_refused_with_the_smallest_that_has(kind: str) -> None:
    prompt = prompt_of(kind)
    needed = len(prompt.open_ids) + len(prompt.close_ids) + 6 + 2
    with pytest.raises(ValueError, match=f"give at least {needed}$"):
        ForcedForm(prompt, START, needed - 1)
    assert answer(prompt, needed, 1, at_random(0)).shape[1] <= needed


@pytest.mark.parametrize("kind", KINDS)
def test_a_thought_that_closes_itself_is_left_alone(kind: str) -> None:
    prompt = prompt_of(kind)
    (ids,) = answer(prompt, 60, 1, scripted(prompt, "a red mug</think>"))
    parsed = prompt.parse(ids.tolist())
    assert (parsed.status, parsed.thought) == (Status.OK, "a red mug")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["a <think> b", "<think>", "</think>. So", "a</think>!", "< /think>"]
)
def test_marks_in_the_thought_do_not_break_the_form(kind: str, text: str) -> None:
    """Neither a second opening mark, however it is spelled, nor text after the closing one."""
    prompt = prompt_of(kind)
    (ids,) = answer(prompt, 60, 1, scripted(prompt, text))
    assert parse(prompt, ids) == Status.OK


def test_a_mark_spelled_in_bytes_is_no_way_around_the_form() -> None:
    prompt = prompt_of("llava")
    wanted = [prompt.tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in b"<think>"]

    def choose(step: int, scores: torch.Tensor) -> torch.Tensor:
        at = step - len(prompt.open_ids)
        if 0 <= at < len(wanted) and scores[0, wanted[at]] > -torch.inf:
            return torch.tensor([wanted[at]])
        return scores.argmax(-1)

    (ids,) = answer(prompt, 60, 1, choose)
    assert parse(prompt, ids) == Status.OK


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_token_and_no_spare_row_is_ever_chosen_freely(kind: str) -> None:
    prompt = prompt_of(kind)
    form = ForcedForm(prompt, START, 60)
    ids = torch.zeros(1, START, dtype=torch.long)
    for token in prompt.open_ids:
        form(ids, torch.zeros(1, prompt.vocabulary + 7))
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    scores = form(ids, torch.zeros(1, prompt.vocabulary + 7))[0]
    assert scores[prompt.vocabulary :].eq(-torch.inf).all()
    closing = set(prompt.close_ids if len(prompt.close_ids) == 1 else [])
    assert scores[sorted(set(prompt.control_ids) - closing)].eq(-torch.inf).all()
    assert scores.gt(-torch.inf).sum() > 256  # the thought stays free


def test_rows_end_on_their_own() -> None:
    """One row closes at once, the other thinks on; each forced token is alone possible."""
    prompt = prompt_of("nano")
    close = prompt.close_ids[0]
    letter = prompt.tokenizer.get_vocab()["x"]

    def choose(step: int, scores: torch.Tensor) -> torch.Tensor:
        picks = scores.argmax(-1)
        if step == 1:
            picks[0], picks[1] = close, letter
        elif scores[1, letter] > -torch.inf:
            picks[1] = letter
        return picks

    ids = answer(prompt, 20, 2, choose)
    assert ids[0].tolist().index(prompt.eos_token_id) == 8
    assert ids[1].tolist().index(prompt.eos_token_id) > 15
    assert [parse(prompt, row) for row in ids] == [Status.OK] * 2
