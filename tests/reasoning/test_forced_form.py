"""The grammar of forced answers, on random logits and on scripted ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import prompt_of

from segcompass.reasoning.forced_form import ForcedForm
from segcompass.reasoning.object_answers import read_items, read_objects, write_objects
from segcompass.reasoning.prompts import Prompt, read_score
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


def concluded(prompt: Prompt, ids: torch.Tensor) -> str:
    """The conclusion of one answer, which has to be well-formed."""
    row = ids.tolist()
    parsed = prompt.parse(row[: row.index(prompt.eos_token_id) + 1])
    assert parsed.status == Status.OK
    return parsed.conclusion


def unevenly(seed: int, likes: list[int]) -> Choose:
    """Uneven random logits, so that answers differ in kind; some tokens are liked better."""
    generator = torch.Generator().manual_seed(seed)

    def choose(_: int, scores: torch.Tensor) -> torch.Tensor:
        noise = 4 * torch.randn(scores.shape, generator=generator)
        noise[:, likes] += 3
        return (scores + noise).argmax(-1)

    return choose


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 10_000),
    spare_room=st.integers(0, 90),
    most=st.integers(1, 3),
    side=st.sampled_from([2, 10, 57, 100, 840]),
    more=st.booleans(),
)
def test_random_objects_are_well_formed_within_the_limit(
    kind: str, seed: int, spare_room: int, most: int, side: int, more: bool
) -> None:
    prompt = prompt_of(kind, most, form="objects", canvas_side=side)
    limit = smallest(prompt) + spare_room
    likes = prompt.encode_inner(']},{"bbox_2d":[') if more else []
    ids = answer(prompt, limit, 2, unevenly(seed, likes))
    assert ids.shape[1] <= limit
    for row in ids:
        text = concluded(prompt, row)
        objects = read_objects(text)
        assert len(objects) <= most
        for found in objects:
            values = [*found.box, *found.points[0]]
            assert all(0 <= v < side and v == int(v) for v in values)
        written = [item["bbox_2d"] for item in read_items(text)]
        if written == [[*found.box] for found in objects]:
            assert text == write_objects(objects, side)  # else its corners were swapped


def smallest(prompt: Prompt) -> int:
    """The smallest limit that is not refused, found by trying."""
    for limit in range(200):
        try:
            ForcedForm(prompt, START, limit)
        except ValueError:
            continue
        return limit
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_limit_has_room_for_one_object(kind: str) -> None:
    prompt = prompt_of(kind, form="objects", canvas_side=100)
    box = '[{"bbox_2d":[10,20,30,40],"point_2d":[15,25]}]'
    whole = len(prompt.encode_answer("", box).ids)
    assert smallest(prompt) <= whole + 3  # one token is spare, and some marks may merge
    (ids,) = answer(prompt, smallest(prompt), 1, wanting(prompt, f"<answer>{box}</answer>"))
    assert concluded(prompt, ids) == box


def wanting(prompt: Prompt, text: str) -> Choose:
    """Close the thought at once, then say ``text``."""
    wanted = [*prompt.close_ids, *prompt.encode_inner(text), prompt.eos_token_id]

    def choose(step: int, scores: torch.Tensor) -> torch.Tensor:
        at = step - len(prompt.open_ids)
        if 0 <= at < len(wanted) and scores[0, wanted[at]] > -torch.inf:
            return torch.tensor([wanted[at]])
        return scores.argmax(-1)

    return choose


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '[{"bbox_2d":[0,1,99,100],"point_2d":[7,839]}]',
        '[{"bbox_2d":[1,2,3,4],"point_2d":[5,6]},{"bbox_2d":[7,8,9,10],"point_2d":[11,12]}]',
    ],
)
def test_what_a_policy_wants_to_say_in_the_form_it_may_say(kind: str, text: str) -> None:
    """Token by token as :meth:`Prompt.encode_answer` teaches it."""
    prompt = prompt_of(kind, 2, form="objects")
    taught = prompt.encode_answer("", text).ids
    (ids,) = answer(prompt, 400, 1, wanting(prompt, f"<answer>{text}</answer>"))
    assert ids.tolist() == taught


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), spare_room=st.integers(0, 25))
def test_random_scores_are_well_formed_within_the_limit(
    kind: str, seed: int, spare_room: int
) -> None:
    prompt = prompt_of(kind, form="score")
    limit = smallest(prompt) + spare_room
    ids = answer(prompt, limit, 3, at_random(seed))
    assert ids.shape[1] <= limit
    assert all(0 <= read_score(concluded(prompt, row)) <= 9 for row in ids)


def test_every_score_can_be_said() -> None:
    prompt = prompt_of("qwen", form="score")
    said = [
        concluded(prompt, answer(prompt, 60, 1, wanting(prompt, f"<answer>{digit}</answer>"))[0])
        for digit in "0123456789"
    ]
    assert "".join(said) == "0123456789"
