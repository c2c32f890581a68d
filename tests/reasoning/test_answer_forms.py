"""Answers whose conclusion is text: objects and scores, for all tokenizers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_texts import ONE, VARIANTS, WRONG
from pydantic import ValidationError
from tiny import prompt_of

from segcompass.grounding.marking import OUTLINE
from segcompass.reasoning.object_answers import read_objects
from segcompass.reasoning.prompts import (
    NANO_TEMPLATE,
    SCORE_TEMPLATES,
    Prompt,
    PromptConfig,
    read_score,
    score_template,
    split_text,
)
from segcompass.types import Status, TokenKind

KINDS = ("qwen", "llava", "nano")
THOUGHT = "<think>a red mug at b3</think>"
OBJECTS = f"[{ONE}]"
CONCLUSIONS = {"objects": OBJECTS, "score": "7"}


def ids_of(prompt: Prompt, text: str, *, ended: bool = True) -> list[int]:
    """Text as an answer would hold it, marks as control text."""
    return [*prompt.encode_control(text), *([prompt.eos_token_id] if ended else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", CONCLUSIONS)
@pytest.mark.parametrize("thought", ["", "a red mug", "<answer> and </think> are typed"])
def test_what_is_written_is_read_back(kind: str, form: str, thought: str) -> None:
    prompt = prompt_of(kind, form=form)
    answer = prompt.encode_answer(thought, CONCLUSIONS[form])
    parsed = prompt.parse(answer.ids)
    if "</think>" in thought:  # decoded, it cannot be told from the mark
        assert parsed.status == Status.MALFORMED
        return
    assert (parsed.status, parsed.thought, parsed.slots_at) == (Status.OK, thought, None)
    assert parsed.conclusion == CONCLUSIONS[form]
    assert prompt.parse(answer.ids[:-1]).status == Status.TRUNCATED
    assert answer.ids[-len(prompt.ending) :] == prompt.ending


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", CONCLUSIONS)
def test_text_has_no_concentration_tokens(kind: str, form: str) -> None:
    prompt = prompt_of(kind, form=form)
    answer = prompt.encode_answer("a", CONCLUSIONS[form])
    assert prompt.slot_ids == []
    assert answer.kinds == [*[TokenKind.THOUGHT] * (len(answer.ids) - 1), TokenKind.TEMPLATE]
    assert prompt.answer_kinds(answer.ids)[:-1] == answer.kinds[:-1]
    assert prompt.answer_kinds(answer.ids)[-1] == TokenKind.PADDING
    assert "<|slot_" not in prompt.decode(prompt.encode("the mug", 2).ids)


@pytest.mark.parametrize(("kind", "family"), [("qwen", "qwen2_5_vl"), ("llava", "llava")])
def test_a_judge_is_told_of_the_outline_and_the_score(kind: str, family: str) -> None:
    source = prompt_of(kind)
    template = score_template(source.config.template)
    assert template == SCORE_TEMPLATES[family]
    assert template.partition("{image}")[0] == source.config.template.partition("{image}")[0]
    assert template.endswith(source.config.template.rpartition(".")[2])
    config = PromptConfig(template=template, form="score")
    prompt = Prompt(config, source.tokenizer, source.image_token_id, source.eos_token_id)
    asked = prompt.decode(prompt.encode("the mug on the left", 2).ids)
    assert "the mug on the left" in asked and "outlined in magenta" in asked
    assert OUTLINE == (255, 0, 255) and "from 0 to 9" in asked
    assert not any(word in asked for word in ("JSON", "tokens", "<|slot_", "{"))
    example = re.search(r"<answer>(\d)</answer>", asked)
    assert example is not None and 0 <= read_score(example[1]) <= 9


def test_a_score_is_not_asked_for_in_an_unknown_chat() -> None:
    assert score_template(NANO_TEMPLATE) == NANO_TEMPLATE
    with pytest.raises(ValueError, match="is not known"):
        score_template("{image}{instruction}")


def test_a_tokenizer_without_concentration_tokens_will_do() -> None:
    assert PromptConfig(form="objects").tokens == []
    assert PromptConfig(slots=2).tokens == ["<|slot_1|>", "<|slot_2|>"]


MALFORMED = {
    **{f"objects: {name}": f"{THOUGHT}<answer>{WRONG[name][0]}</answer>" for name in WRONG},
    "no answer": THOUGHT,
    "empty": "",
    "answer alone": f"<answer>{OBJECTS}</answer>",
    "no marks": f"{THOUGHT}{OBJECTS}",
    "answer not opened": f"{THOUGHT}{OBJECTS}</answer>",
    "answer not closed": f"{THOUGHT}<answer>{OBJECTS}",
    "closed before opened": f"{THOUGHT}</answer>{OBJECTS}<answer>",
    "two answers": f"{THOUGHT}<answer>{OBJECTS}</answer><answer>{OBJECTS}</answer>",
    "answer in the thought": f"<think><answer>{OBJECTS}</answer></think>",
    "text before the thought": f"Well. {THOUGHT}<answer>{OBJECTS}</answer>",
    "text between": f"{THOUGHT} so <answer>{OBJECTS}</answer>",
    "text after": f"{THOUGHT}<answer>{OBJECTS}</answer> there",
    "two thoughts": f"{THOUGHT}{THOUGHT}<answer>{OBJECTS}</answer>",
    "thought not opened": f"a mug</think><answer>{OBJECTS}</answer>",
    "thought not closed": f"<think>a mug<answer>{OBJECTS}</answer>",
    "thought closed twice": f"{THOUGHT}</think><answer>{OBJECTS}</answer>",
    "answer first": f"<answer>{OBJECTS}</answer>{THOUGHT}",
    "a score": f"{THOUGHT}<answer>7</answer>",
}  # fmt: skip


@pytest.mark.parametrize("case", list(MALFORMED))
def test_what_is_malformed(case: str) -> None:
    prompt = prompt_of("nano", form="objects")
    ids = ids_of(prompt, MALFORMED[case])
    parsed = prompt.parse(ids)
    assert (parsed.status, parsed.slots_at, parsed.conclusion) == (Status.MALFORMED, None, "")
    assert prompt.parse(ids[:-1]).status == Status.TRUNCATED


def test_the_table_holds_fifty_kinds() -> None:
    assert len(MALFORMED) >= 50


@pytest.mark.parametrize("kind", ["qwen", "llava"])
@pytest.mark.parametrize("case", ["no answer", "two thoughts", "text after", "objects: not closed"])
def test_what_is_malformed_for_other_tokenizers(kind: str, case: str) -> None:
    prompt = prompt_of(kind, form="objects")
    assert prompt.parse(ids_of(prompt, MALFORMED[case])).status == Status.MALFORMED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", list(VARIANTS))
def test_published_spellings_are_well_formed(kind: str, case: str) -> None:
    text, objects = VARIANTS[case]
    prompt = prompt_of(kind, form="objects")
    parsed = prompt.parse(ids_of(prompt, f"{THOUGHT}\n<answer>\n{text}\n</answer>"))
    assert (parsed.status, parsed.thought) == (Status.OK, "a red mug at b3")
    assert read_objects(parsed.conclusion) == objects


@pytest.mark.parametrize("conclusion", ["", "10", "-1", "7.5", "seven", "[]", "٧", "7 7"])
def test_a_score_is_one_digit(conclusion: str) -> None:
    with pytest.raises(ValueError, match="one digit"):
        read_score(conclusion)
    prompt = prompt_of("nano", form="score")
    parsed = prompt.parse(ids_of(prompt, f"{THOUGHT}<answer>{conclusion}</answer>"))
    assert parsed.status == Status.MALFORMED


def test_every_digit_is_a_score() -> None:
    assert [read_score(digit) for digit in "0123456789"] == list(range(10))


@pytest.mark.parametrize("form", ["slots", "objects", "score"])
def test_a_conclusion_of_another_form_is_refused(form: str) -> None:
    prompt = prompt_of("nano", form=form)
    for conclusion in ("maybe", '[{"bbox_2d":[1,2]}]'):
        with pytest.raises(ValueError):
            prompt.encode_answer("a", conclusion)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValidationError):
        PromptConfig.model_validate({"form": "boxes"})


MARKS = ["<think>", "</think>", "<answer>", "</answer>", "[", "]", "{", "}", "7", ONE, " ", "mug"]


@given(
    text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(MARKS), max_size=9).map("".join)),
    form=st.sampled_from(["objects", "score"]),
)
def test_any_text_can_be_parsed(text: str, form: str) -> None:
    prompt = prompt_of("nano", form=form)
    parsed = prompt.parse([*prompt.encode_data(text), prompt.eos_token_id])
    parts = split_text(prompt.decode(prompt.encode_data(text)))
    if parsed.status == Status.OK:
        assert parts == (parsed.thought, parsed.conclusion)
    else:
        assert (parsed.status, parsed.conclusion) == (Status.MALFORMED, "")
