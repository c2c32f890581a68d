"""The prompt template and the parser of its answer, side by side so that they cannot drift apart.

An answer is well-formed when it reads

    <think> chain of thought </think> <|slot_1|><|slot_2|>…<|slot_K|> end-of-text

with exactly K concentration tokens in a row, found by id in the generated part only. The user's
instruction is data: it is tokenised apart and spliced in; a control token typed in it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

from pydantic import BaseModel, Field, field_validator

from segcompass.types import Status, TokenKind

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_BLANKS = " \t\r\nĠĊĉč▁"  # white space as text and as tokenizers write it
IMAGE_SLOT, INSTRUCTION_SLOT = "{image}", "{instruction}"

NANO_TEMPLATE = "<|im_start|>{image}{instruction}<|im_end|>"
_ASK = (
    "\nFirst reason step by step inside <think> and </think>, "
    "then write the tokens {concentration} and nothing else."
)
QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{instruction}"
    + _ASK
    + "<|im_end|>\n<|im_start|>assistant\n"
)
LLAVA_TEMPLATE = "<s>USER: {image}\n{instruction}" + _ASK + " ASSISTANT:"


class PromptConfig(BaseModel, frozen=True, extra="forbid"):
    """How an image and an instruction become a prompt."""

    template: str = Field(NANO_TEMPLATE, description="control text with {image} and {instruction}")
    slots: int = Field(6, ge=1, le=64, description="K, concentration tokens to ask for")
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


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # id -> AddedToken

    def get_vocab(self) -> dict[str, int]: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool | None = ...
    ) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


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
    """An answer taken apart. ``slots_at`` is the index of the first concentration token."""

    status: Status  # OK, MALFORMED or TRUNCATED; NO_TARGET is decided by the confidences
    thought: str
    slots_at: int | None


class Prompt:
    """Writes prompts and answers, and reads answers back.

    Args:
        config: Template and number of slots.
        tokenizer: Knows the concentration tokens; see :func:`concentration_tokens`.
        image_token_id: The placeholder that image features replace.
        eos_token_id: Ends an answer.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, image_token_id: int, eos_token_id: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.eos_token_id = eos_token_id
        known = tokenizer.get_vocab()
        missing = [t for t in concentration_tokens(config.slots) if t not in known]
        if missing:
            raise ValueError(
                f"the tokenizer does not know the concentration tokens {missing}; "
                "add them before building prompts"
            )
        self.slot_ids = [known[token] for token in concentration_tokens(config.slots)]
        template = config.template.replace(
            "{concentration}", "".join(concentration_tokens(config.slots))
        )
        self._parts = _split_template(template)
        added = tokenizer.added_tokens_decoder
        self.control_ids = sorted(added)
        plain = sorted((t.content for t in added.values() if not t.special), key=len, reverse=True)
        self._unsplit = re.compile("|".join(map(re.escape, plain)) or r"(?!)")
        self.open_ids = self._control(THINK_OPEN)
        self.close_ids = self._control(THINK_CLOSE)

    @property
    def ending(self) -> list[int]:
        """What every well-formed answer ends with: the thought's close, the K tokens, the end."""
        return [*self.close_ids, *self.slot_ids, self.eos_token_id]

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
                new, kind = self._control(part), TokenKind.TEMPLATE
            ids += new
            kinds += [kind] * len(new)
        return EncodedPrompt(ids, kinds)

    def encode_instruction(self, instruction: str) -> list[int]:
        """Tokenise user text as data; raises ValueError when it is empty or too long."""
        text = " ".join(instruction.split())
        if not text:
            raise ValueError("the instruction is empty; say what to segment")
        ids = self._data(text)
        if len(ids) > self.config.max_instruction_tokens:
            raise ValueError(
                f"the instruction has {len(ids)} tokens, the limit is "
                f"{self.config.max_instruction_tokens}; shorten it"
            )
        return ids

    def encode_answer(self, thought: str) -> EncodedPrompt:
        """Tokenise a whole well-formed answer around a chain of thought, end-of-text included."""
        thinking = [*self.open_ids, *self._data(thought), *self.close_ids]
        kinds = [TokenKind.THOUGHT] * len(thinking)
        kinds += [TokenKind.CONCENTRATION] * len(self.slot_ids) + [TokenKind.TEMPLATE]
        return EncodedPrompt([*thinking, *self.slot_ids, self.eos_token_id], kinds)

    def parse(self, generated: Sequence[int]) -> ParsedAnswer:
        """Read a generated answer, without padding; end-of-text may be missing."""
        ids = list(generated)
        ended = bool(ids) and ids[-1] == self.eos_token_id
        body = ids[:-1] if ended else ids
        text = self.decode(body)
        at = self.find_slots(body)
        before = self.decode(body if at is None else body[:at]).strip()
        well_formed = (
            at is not None
            and before.startswith(THINK_OPEN)
            and before.endswith(THINK_CLOSE)
            and before.count(THINK_OPEN) == before.count(THINK_CLOSE) == 1
            and len(body) == at + len(self.slot_ids)
        )
        if well_formed and ended:
            return ParsedAnswer(Status.OK, before[len(THINK_OPEN) : -len(THINK_CLOSE)].strip(), at)
        status = Status.MALFORMED if ended else Status.TRUNCATED
        return ParsedAnswer(status, text.strip(), None)

    def find_slots(self, ids: Sequence[int]) -> int | None:
        """Where the K concentration tokens stand in a row, provided they occur nowhere else."""
        return _find_row(list(ids), self.slot_ids)

    def answer_kinds(self, generated: Sequence[int]) -> list[TokenKind]:
        """Where each generated token belongs: thought, concentration, or nowhere (end-of-text).

        Whether the model ever consumes an end-of-text depends on the other rows of the batch, so
        nobody may read its state.
        """
        special = dict.fromkeys(self.slot_ids, TokenKind.CONCENTRATION)
        special[self.eos_token_id] = TokenKind.PADDING
        return [special.get(token, TokenKind.THOUGHT) for token in generated]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens to text, control tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def vocabulary(self) -> int:
        """Ids from here on mean nothing; models may have spare rows."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def mark_endings(self) -> list[tuple[int, str]]:
        """Tokens that can complete a think mark, with their text: all that hold a ``>``."""
        texts = {i: t.replace("<0x3E>", ">") for t, i in self.tokenizer.get_vocab().items()}
        return [(i, text.rstrip(_BLANKS)) for i, text in texts.items() if ">" in text]

    def _data(self, text: str) -> list[int]:
        """Tokenise text in which nothing is control, whatever it looks like.

        Raises:
            ValueError: If it is no valid Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a character at position {error.start} "
                f"({text[error.start : error.end]!r}); pass valid Unicode"
            ) from None
        # Tokenizers split special tokens on demand; other added tokens have to be cut in two.
        cuts = [0, *(m.start() + 1 for m in self._unsplit.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        return [
            token
            for piece in pieces
            for token in self.tokenizer.encode(
                piece, add_special_tokens=False, split_special_tokens=True
            )
        ]

    def _control(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def _split_template(template: str) -> list[str]:
    """Cut a template at its two places, keeping them."""
    parts: list[str] = []
    for chunk in template.split(IMAGE_SLOT):
        before, *after = chunk.split(INSTRUCTION_SLOT)
        parts += [before, *(p for a in after for p in (INSTRUCTION_SLOT, a)), IMAGE_SLOT]
    return [p for p in parts[:-1] if p]


def _find_row(ids: list[int], row: list[int]) -> int | None:
    """Index where ``row`` stands, provided that its members occur nowhere else in ``ids``."""
    hits = [i for i, t in enumerate(ids) if t in set(row)]
    if len(hits) != len(row) or [ids[i] for i in hits] != row:
        return None
    return hits[0] if hits[-1] - hits[0] == len(row) - 1 else None
