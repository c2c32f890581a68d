"""The prompt template and the parser of its answer, side by side so that they cannot drift apart.

An answer is well-formed when it reads ``<think> chain of thought </think>``, then a conclusion in
the form that was asked for, then end-of-text:

    slots      <|slot_1|><|slot_2|>…<|slot_K|>
    objects    <answer>[{"bbox_2d":[x0,y0,x1,y1],"point_2d":[x,y]},…]</answer>
    score      <answer>7</answer>

Slots are exactly K concentration tokens in a row, found by id in the generated part only; the other
forms are text and have none. The user's instruction is data: it is tokenised apart and spliced in;
a control token typed in it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from segcompass.reasoning.object_answers import read_objects
from segcompass.reasoning.text_codec import TextCodec, Tokenizer
from segcompass.types import Status, TokenKind

Form = Literal["slots", "objects", "score"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
IMAGE_SLOT, INSTRUCTION_SLOT = "{image}", "{instruction}"

NANO_TEMPLATE = "<|im_start|>{image}{instruction}<|im_end|>"
_ASK = (
    "\nFirst reason step by step inside <think> and </think>, "
    "then write the tokens {concentration} and nothing else."
)
OBJECT_QUESTION = (
    "Which objects in the picture are meant by this: {instruction}\n"
    "First reason step by step inside <think> and </think>. Then list every object that is meant "
    "inside <answer> and </answer>, as JSON with its box and a point on it in whole pixels: "
    '[{"bbox_2d":[12,34,256,320],"point_2d":[120,180]}]. Write [] if there is none.'
)
SCORE_QUESTION = (
    "One region of the picture is outlined in magenta. How well does exactly this region answer "
    "the following? {instruction}\n"
    "First reason step by step inside <think> and </think>: what is meant, and what the outline "
    "encloses. Then write one digit from 0 to 9 inside <answer> and </answer>, such as "
    "<answer>7</answer>: 9 if the region is all that is meant and nothing else, 0 if it has "
    "nothing to do with it, in between as far as the two overlap."
)


def qwen_template(question: str) -> str:
    """Qwen's chat around a question; both places of a template are to be in it together."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>"
        + question
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


def llava_template(question: str) -> str:
    """LLaVA's chat around a question, as above."""
    return "<s>USER: {image}\n" + question + " ASSISTANT:"


QWEN_TEMPLATE = qwen_template("{instruction}" + _ASK)
LLAVA_TEMPLATE = llava_template("{instruction}" + _ASK)
SCORE_TEMPLATES = {  # by the model's type
    "qwen2_5_vl": qwen_template(SCORE_QUESTION),
    "llava": llava_template(SCORE_QUESTION),
}
_PICTURES = {"qwen2_5_vl": "<|vision_start|>{image}<|vision_end|>", "llava": "USER: {image}\n"}


def score_template(template: str) -> str:
    """The question for a score, in the same chat as a template; nano's has no words to change.

    Raises:
        ValueError: if the template is of no known chat.
    """
    if template == NANO_TEMPLATE:
        return template
    for family, picture in _PICTURES.items():
        if picture in template:
            return SCORE_TEMPLATES[family]
    raise ValueError(
        f"the chat of the prompt template {template!r} is not known, so nobody can be asked for a "
        "score in it"
    )


class PromptConfig(BaseModel, frozen=True, extra="forbid"):
    """How an image and an instruction become a prompt."""

    template: str = Field(NANO_TEMPLATE, description="control text with {image} and {instruction}")
    form: Form = Field("slots", description="how an answer ends: K tokens, objects, or a score")
    slots: int = Field(
        6, ge=1, le=64, description="K, concentration tokens to ask for, or most objects to name"
    )
    canvas_side: int = Field(
        840, ge=2, le=100_000, description="px of the square that coordinates in answers refer to"
    )
    max_instruction_tokens: int = Field(1024, ge=1)

    @field_validator("template")
    @classmethod
    def _has_both_places(cls, value: str) -> str:
        if value.count(IMAGE_SLOT) != 1 or value.count(INSTRUCTION_SLOT) != 1:
            raise ValueError(
                f"the prompt template must hold {IMAGE_SLOT} and {INSTRUCTION_SLOT} once each, "
                f"got {value!r}"
            )
        return value

    @property
    def tokens(self) -> list[str]:
        """The concentration tokens of an answer; only slots have them."""
        return concentration_tokens(self.slots if self.form == "slots" else 0)


def concentration_tokens(slots: int) -> list[str]:
    """The K special tokens, one for every slot."""
    return [f"<|slot_{k + 1}|>" for k in range(slots)]


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt and where each comes from; one image token stands for each feature."""

    ids: list[int]
    kinds: list[TokenKind]


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer taken apart."""

    status: Status  # OK, MALFORMED or TRUNCATED; NO_TARGET is decided by the confidences
    thought: str  # of a malformed answer, all of its text
    slots_at: int | None  # index of the first concentration token
    conclusion: str = ""  # the text between the answer's marks; slots have none


def read_score(conclusion: str) -> int:
    """The score that a conclusion of that form gives; raises ValueError if it is no digit 0-9."""
    if re.fullmatch(r"[0-9]", conclusion) is None:
        raise ValueError(f"a score is one digit from 0 to 9, got {conclusion[:40]!r}")
    return int(conclusion)


def split_text(text: str) -> tuple[str, str] | None:
    """Thought and conclusion of an answer that is text, if it is these two and nothing else."""
    parts = _split_thought(text)
    if parts is None or parts[1].count(ANSWER_OPEN) != 1 or parts[1].count(ANSWER_CLOSE) != 1:
        return None
    before, _, rest = parts[1].partition(ANSWER_OPEN)
    conclusion, _, after = rest.partition(ANSWER_CLOSE)
    return None if before or after else (parts[0], conclusion.strip())


_READERS: dict[Form, Callable[[str], object]] = {"objects": read_objects, "score": read_score}


class Prompt(TextCodec):
    """Writes prompts and answers, and reads answers back.

    Args:
        config: Template and form of the answers.
        tokenizer: Knows the concentration tokens; see :func:`concentration_tokens`.
        image_token_id: The placeholder that image features replace.
        eos_token_id: Ends an answer.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, image_token_id: int, eos_token_id: int
    ) -> None:
        super().__init__(tokenizer)
        self.config = config
        self.image_token_id = image_token_id
        self.eos_token_id = eos_token_id
        known = tokenizer.get_vocab()
        missing = [token for token in config.tokens if token not in known]
        if missing:
            raise ValueError(
                f"the tokenizer does not know the concentration tokens {missing}; "
                "add them before building prompts"
            )
        self.slot_ids = [known[token] for token in config.tokens]
        template = config.template.replace("{concentration}", "".join(config.tokens))
        self._parts = _split_template(template)
        self.open_ids = self.encode_control(THINK_OPEN)
        self.close_ids = self.encode_control(THINK_CLOSE)

    @property
    def ending(self) -> list[int]:
        """What every answer of this form ends with: the thought's close and K tokens, or a mark."""
        if self.config.form == "slots":
            return [*self.close_ids, *self.slot_ids, self.eos_token_id]
        return [*self.encode_inner(ANSWER_CLOSE), self.eos_token_id]

    def encode(self, instruction: str, image_tokens: int) -> EncodedPrompt:
        """Tokenise a prompt.

        Args:
            instruction: The user's text, any script; control tokens in it stay plain text.
            image_tokens: Number of image features.

        Raises:
            ValueError: If the instruction is empty or longer than the limit.
        """
        ids: list[int] = []
        kinds: list[TokenKind] = []
        for part in self._parts:
            if part == IMAGE_SLOT:
                new, kind = [self.image_token_id] * image_tokens, TokenKind.IMAGE
            elif part == INSTRUCTION_SLOT:
                new, kind = self.encode_instruction(instruction), TokenKind.INSTRUCTION
            else:
                new, kind = self.encode_control(part), TokenKind.TEMPLATE
            ids += new
            kinds += [kind] * len(new)
        return EncodedPrompt(ids, kinds)

    def encode_instruction(self, instruction: str) -> list[int]:
        """Tokenise user text as data; raises ValueError when it is empty or too long."""
        text = " ".join(instruction.split())
        if not text:
            raise ValueError("the instruction is empty; say what to segment")
        ids = self.encode_data(text)
        if len(ids) > self.config.max_instruction_tokens:
            raise ValueError(
                f"the instruction has {len(ids)} tokens, the limit is "
                f"{self.config.max_instruction_tokens}; shorten it"
            )
        return ids

    def encode_answer(self, thought: str, conclusion: str = "") -> EncodedPrompt:
        """Tokenise a whole well-formed answer, end-of-text included.

        Args:
            thought: The chain of thought, any text.
            conclusion: What stands between the answer's marks; slots have none.

        Raises:
            ValueError: If the conclusion is not of the form that was configured.
        """
        thinking = [*self.open_ids, *self.encode_data(thought), *self.close_ids]
        if self.config.form != "slots":
            _READERS[self.config.form](conclusion)
            thinking += self.encode_inner(f"{ANSWER_OPEN}{conclusion}{ANSWER_CLOSE}")
        elif conclusion:
            raise ValueError(f"an answer of {len(self.slot_ids)} tokens has no {conclusion[:40]!r}")
        kinds = [TokenKind.THOUGHT] * len(thinking)
        kinds += [TokenKind.CONCENTRATION] * len(self.slot_ids) + [TokenKind.TEMPLATE]
        return EncodedPrompt([*thinking, *self.slot_ids, self.eos_token_id], kinds)

    def parse(self, generated: Sequence[int]) -> ParsedAnswer:
        """Read a generated answer, without padding; end-of-text may be missing."""
        ids = list(generated)
        ended = bool(ids) and ids[-1] == self.eos_token_id
        body = ids[:-1] if ended else ids
        read = self._read_slots if self.config.form == "slots" else self._read_text
        answer = read(body) if ended else None
        status = Status.MALFORMED if ended else Status.TRUNCATED
        return answer or ParsedAnswer(status, self.decode(body).strip(), None)

    def _read_slots(self, body: list[int]) -> ParsedAnswer | None:
        at = self.find_slots(body)
        if at is None or len(body) != at + len(self.slot_ids):
            return None
        thought = _split_thought(self.decode(body[:at]))
        return ParsedAnswer(Status.OK, thought[0], at) if thought and not thought[1] else None

    def _read_text(self, body: list[int]) -> ParsedAnswer | None:
        parts = split_text(self.decode(body))
        if parts is None:
            return None
        thought, conclusion = parts
        try:
            _READERS[self.config.form](conclusion)
        except ValueError:
            return None
        return ParsedAnswer(Status.OK, thought, None, conclusion)

    def find_slots(self, ids: Sequence[int]) -> int | None:
        """Where the K concentration tokens stand in a row, provided they occur nowhere else."""
        return _find_row(list(ids), self.slot_ids) if self.slot_ids else None

    def answer_kinds(self, generated: Sequence[int]) -> list[TokenKind]:
        """Where each generated token belongs: thought, concentration, or nowhere (end-of-text).

        Whether the model ever consumes an end-of-text depends on the other rows of the batch, so
        nobody may read its state.
        """
        special = dict.fromkeys(self.slot_ids, TokenKind.CONCENTRATION)
        special[self.eos_token_id] = TokenKind.PADDING
        return [special.get(token, TokenKind.THOUGHT) for token in generated]


def _split_template(template: str) -> list[str]:
    """Cut a template at its two places, keeping them."""
    parts: list[str] = []
    for chunk in template.split(IMAGE_SLOT):
        before, *after = chunk.split(INSTRUCTION_SLOT)
        parts += [before, *(p for a in after for p in (INSTRUCTION_SLOT, a)), IMAGE_SLOT]
    return [p for p in parts[:-1] if p]


def _split_thought(text: str) -> tuple[str, str] | None:
    """The thought and what follows it, provided that one think block stands first."""
    text = text.strip()
    if not text.startswith(THINK_OPEN) or text.count(THINK_OPEN) > 1 or text.count(THINK_CLOSE) > 1:
        return None
    thought, closed, rest = text[len(THINK_OPEN) :].partition(THINK_CLOSE)
    return (thought.strip(), rest.strip()) if closed else None


def _find_row(ids: list[int], row: list[int]) -> int | None:
    """Index where ``row`` stands, provided that its members occur nowhere else in ``ids``."""
    hits = [i for i, t in enumerate(ids) if t in set(row)]
    if len(hits) != len(row) or [ids[i] for i in hits] != row:
        return None
    return hits[0] if hits[-1] - hits[0] == len(row) - 1 else None
