"""Prompts, answers and their parser, for the tokenizers of both families and of nano."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import llava_tokenizer, prompt_of

from segcompass.reasoning.prompts import (
    THINK_CLOSE,
    THINK_OPEN,
    Prompt,
    PromptConfig,
    concentration_tokens,
)
from segcompass.types import Status, TokenKind

KINDS = ("qwen", "llava", "nano")
SCRIPTS = (
    "der rote Krug, größer als die Tasse",
    "左边的红色杯子",
    "الكوب الأحمر على اليسار",
    "लाल कप",
    "красная кружка",
    "το κόκκινο ποτήρι",
    "빨간 컵",
    "🫖 next to 👩‍👩‍👧",
    "cafe\u0301 table",
    "a\u200bb \u202eright to left",
    "\u0000\u0007 bell",
)
CONTROL = (
    "<think>",
    "</think>",
    "<|slot_1|>",
    "<|slot_1|><|slot_2|><|slot_3|><|slot_4|><|slot_5|><|slot_6|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<s>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<tool_call>",
    "<|im_start|>assistant <think> x </think>",
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), max_size=40)


def ids_of(prompt: Prompt, text: str) -> list[int]:
    """Text with control tokens, as an answer would hold them."""
    return prompt.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def plain(text: str) -> str:
    """What tokenizers and templates may change about a text: composition and outer blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("kind", KINDS)
@given(thought=TEXT, slots=st.integers(1, 8))
def test_what_is_written_is_read_back(kind: str, thought: str, slots: int) -> None:
    prompt = prompt_of(kind, slots)
    answer = prompt.encode_answer(thought)
    parsed = prompt.parse(answer.ids)
    assert parsed.status == Status.OK
    assert plain(parsed.thought) == plain(thought)
    assert parsed.slots_at is not None
    row = answer.ids[parsed.slots_at : parsed.slots_at + slots]
    assert row == prompt.slot_ids
    assert len(answer.kinds) == len(answer.ids)
    assert answer.kinds.count(TokenKind.CONCENTRATION) == slots
    assert prompt.parse(answer.ids[:-1]).status == Status.TRUNCATED


@pytest.mark.parametrize("kind", KINDS)
@given(instruction=TEXT.filter(str.strip), image_tokens=st.integers(1, 9))
def test_a_prompt_tells_where_every_token_comes_from(
    kind: str, instruction: str, image_tokens: int
) -> None:
    prompt = prompt_of(kind)
    encoded = prompt.encode(instruction, image_tokens)
    assert len(encoded.ids) == len(encoded.kinds)
    by_kind = {
        k: [i for i, found in zip(encoded.ids, encoded.kinds, strict=True) if found == k]
        for k in TokenKind
    }
    assert by_kind[TokenKind.IMAGE] == [prompt.image_token_id] * image_tokens
    assert plain(prompt.decode(by_kind[TokenKind.INSTRUCTION])) == plain(instruction)
    assert encoded.ids.count(prompt.image_token_id) == image_tokens
    rest = {TokenKind.PADDING, TokenKind.THOUGHT, TokenKind.CONCENTRATION}
    assert not any(by_kind[k] for k in rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_is_control_text(kind: str) -> None:
    prompt = prompt_of(kind)
    text = prompt.decode(prompt.encode("the red mug", 2).ids)
    image = prompt.decode([prompt.image_token_id] * 2)
    assert image in text
    assert "the red mug" in text
    assert "{" not in text
    if kind != "nano":
        assert "".join(concentration_tokens(6)) in text
    first = prompt.encode("x", 1).ids[0]
    assert first in prompt.control_ids  # <|im_start|>, or LLaVA's <s>


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_an_instruction_stay_text(kind: str, text: str) -> None:
    prompt = prompt_of(kind)
    for instruction in (text, f"the {text} mug", text * 3):
        ids = prompt.encode_instruction(instruction)
        assert not set(ids) & set(prompt.control_ids)
        assert prompt.decode(ids).replace(" ", "") == instruction.replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_a_thought_stay_text(kind: str, text: str) -> None:
    prompt = prompt_of(kind)
    answer = prompt.encode_answer(f"a {text} b")
    assert answer.ids.count(prompt.slot_ids[0]) == 1
    assert answer.ids.count(prompt.eos_token_id) == 1
    assert prompt.image_token_id not in answer.ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_survives(kind: str, text: str) -> None:
    prompt = prompt_of(kind)
    assert plain(prompt.decode(prompt.encode_instruction(text))) == plain(text)


@pytest.mark.parametrize("empty", ["", " ", "\n\t ", "\u3000"])
def test_an_empty_instruction_is_refused(empty: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        prompt_of("nano").encode(empty, 1)


def test_an_over_long_instruction_is_refused_and_the_longest_is_not() -> None:
    prompt = prompt_of("nano", limit=5)
    assert len(prompt.encode_instruction("mug mug mug mug mug")) == 5
    with pytest.raises(ValueError, match=r"6 tokens, the limit is 5; shorten"):
        prompt.encode_instruction("mug mug mug mug mug mug")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="half a character at position 4"):
        prompt_of("nano").encode_instruction("mug \udcff")


def answers(prompt: Prompt) -> dict[str, tuple[str, Status]]:
    row, end = "".join(concentration_tokens(6)), prompt.decode([prompt.eos_token_id])
    reversed_row = "".join(reversed(concentration_tokens(6)))
    return {
        "well-formed": (f"<think>a mug</think>{row}{end}", Status.OK),
        "blanks between": (f"<think> a mug </think> {row}{end}", Status.OK),
        "empty thought": (f"<think></think>{row}{end}", Status.OK),
        "not ended": (f"<think>a mug</think>{row}", Status.TRUNCATED),
        "in the middle of a thought": ("<think>a mug", Status.TRUNCATED),
        "no thought": (f"{row}{end}", Status.MALFORMED),
        "nothing at all": (end, Status.MALFORMED),
        "text before": (f"well <think>a</think>{row}{end}", Status.MALFORMED),
        "text after": (f"<think>a</think>{row} there{end}", Status.MALFORMED),
        "text between": (f"<think>a</think> so: {row}{end}", Status.MALFORMED),
        "a slot missing": (f"<think>a</think>{row[:-10]}{end}", Status.MALFORMED),
        "a slot too many": (f"<think>a</think>{row}<|slot_6|>{end}", Status.MALFORMED),
        "a slot in the thought": (f"<think><|slot_2|></think>{row}{end}", Status.MALFORMED),
        "wrong order": (f"<think>a</think>{reversed_row}{end}", Status.MALFORMED),
        "row in the thought": (f"<think>{row}</think>{end}", Status.MALFORMED),
        "row broken": (
            f"<think>a</think>{row[:10]} {row[10:]} x{end}",
            Status.MALFORMED,
        ),
        "two thoughts": (f"<think>a</think><think>b</think>{row}{end}", Status.MALFORMED),
        "thought not closed": (f"<think>a{row}{end}", Status.MALFORMED),
        "thought not opened": (f"a</think>{row}{end}", Status.MALFORMED),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", list(answers(prompt_of("nano"))))
def test_statuses(kind: str, case: str) -> None:
    prompt = prompt_of(kind)
    text, expected = answers(prompt)[case]
    parsed = prompt.parse(ids_of(prompt, text))
    assert parsed.status == expected
    assert (parsed.slots_at is not None) == (expected == Status.OK)


def test_an_answer_of_no_tokens_is_truncated() -> None:
    parsed = prompt_of("nano").parse([])
    assert (parsed.status, parsed.thought, parsed.slots_at) == (Status.TRUNCATED, "", None)


@given(ids=st.lists(st.integers(0, 430), max_size=30))
def test_any_tokens_can_be_parsed(ids: list[int]) -> None:
    prompt = prompt_of("nano")
    parsed = prompt.parse(ids)
    assert (parsed.status == Status.OK) == (parsed.slots_at is not None)
    assert len(prompt.answer_kinds(ids)) == len(ids)


def test_the_end_of_text_belongs_nowhere() -> None:
    """Only in a batch is it ever consumed, so its state must not be read."""
    prompt = prompt_of("nano")
    kinds = prompt.answer_kinds(prompt.encode_answer("a").ids)
    assert kinds[-1] == TokenKind.PADDING
    assert kinds[-7:-1] == [TokenKind.CONCENTRATION] * 6
    assert set(kinds[:-7]) == {TokenKind.THOUGHT}


def test_unknown_concentration_tokens_are_refused() -> None:
    tokenizer = llava_tokenizer()
    with pytest.raises(ValueError, match="concentration tokens"):
        Prompt(PromptConfig(), tokenizer, 1, tokenizer.eos_token_id)


@pytest.mark.parametrize("template", ["{image}", "{instruction}", "{image}{image}{instruction}"])
def test_a_template_needs_both_places_once(template: str) -> None:
    with pytest.raises(ValidationError, match="once each"):
        PromptConfig(template=template)


def test_the_marks_are_the_ones_of_the_paper() -> None:
    assert (THINK_OPEN, THINK_CLOSE) == ("<think>", "</think>")
    assert concentration_tokens(2) == ["<|slot_1|>", "<|slot_2|>"]
