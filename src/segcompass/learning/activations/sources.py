"""What the policy is shown while its states are collected: our data sets, and documents.

A source is a fixed, shuffled order of sequences. It tells what a sequence is without reading it
(for the cache), and makes token rows of it (for the policy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from segcompass.data.documents import Document, DocumentSet
from segcompass.io import archives
from segcompass.io.errors import DataError
from segcompass.io.images import UInt8Array, load_image
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.prompts import EncodedPrompt, Prompt
from segcompass.types import Sample, TokenKind

_LONGEST_TOKEN = 64  # characters; longer ones only make a cut document shorter


class Row(NamedTuple):
    """One sequence: its tokens, and the pictures that its image tokens stand for, in order."""

    encoded: EncodedPrompt
    visuals: list[VisualInput]


class Source(Protocol):
    """A shuffled order of sequences."""

    def __len__(self) -> int: ...

    def identity(self, position: int) -> str:
        """Changes with whatever the sequence is made of."""

    def rows(self, positions: Sequence[int]) -> list[Row]:
        """The sequences at these positions; those that cannot be used are left out."""


class SampleSource:
    """Prompt, picture and answer of a data set's samples.

    Args:
        policy: Whose prompt and picture processing are used.
        samples: At least one.
        seed: Of the order.
        answers: ``given`` reads the data set's own answers, and a prompt alone where there is
            none; ``generated`` lets the policy answer (greedy, in the form it is asked for).
    """

    def __init__(
        self,
        policy: Policy,
        samples: Sequence[Sample],
        seed: int,
        answers: Literal["given", "generated"] = "given",
    ) -> None:
        order = np.random.default_rng((seed, 1)).permutation(len(samples))
        self.policy, self.answers = policy, answers
        self.samples = [samples[i] for i in order]

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self, position: int) -> str:
        sample = self.samples[position]
        facts = archives.stat(sample.image_path)
        picture = f"{sample.image_path.name}:{facts.st_size}:{facts.st_mtime_ns}"
        answer = sample.thought if self.answers == "given" else "generated"
        return "\0".join((picture, sample.instruction, repr(answer), str(self.policy.config)))

    def rows(self, positions: Sequence[int]) -> list[Row]:
        chosen = [self.samples[p] for p in positions]
        visuals = [_visual(self.policy, load_image(s.image_path)) for s in chosen]
        if self.answers == "generated":
            return self._answered(chosen, visuals)
        return [
            Row(self._encode(sample, visual), [visual])
            for sample, visual in zip(chosen, visuals, strict=True)
        ]

    def _encode(self, sample: Sample, visual: VisualInput) -> EncodedPrompt:
        prompt = self.policy.prompt
        try:
            asked = prompt.encode(sample.instruction, visual.grid[0] * visual.grid[1])
            if sample.thought is None:
                return asked
            answer = prompt.encode_answer(sample.thought)
        except ValueError as error:  # empty, too long, or no valid Unicode
            raise DataError(f"sample {sample.sample_id} of {sample.image_path}: {error}") from error
        return EncodedPrompt(asked.ids + answer.ids, asked.kinds + answer.kinds)

    def _answered(self, samples: list[Sample], visuals: list[VisualInput]) -> list[Row]:
        questions = [s.instruction for s in samples]
        written = self.policy.generate(visuals, questions, force_form=True).sequences
        rows = []
        for ids, kinds, visual in zip(written.ids, written.kinds, visuals, strict=True):
            real = kinds != TokenKind.PADDING
            named = [TokenKind(kind) for kind in kinds[real].tolist()]
            encoded = EncodedPrompt(ids[real].tolist(), named)
            rows.append(Row(encoded, [visual]))
        return rows


class DocumentSource:
    """Interleaved documents, each cut after ``max_tokens``.

    Text counts as instruction, for it is what a person wrote. A document without a picture, or
    whose first picture does not fit, is left out.
    """

    def __init__(self, policy: Policy, documents: DocumentSet, max_tokens: int) -> None:
        self.policy, self.documents, self.max_tokens = policy, documents, max_tokens
        own = policy.prompt
        self.prompt = Prompt(  # texts of documents may be longer than instructions
            own.config.model_copy(update={"max_instruction_tokens": 1 << 30}),
            own.tokenizer,
            own.image_token_id,
            own.eos_token_id,
        )
        config = policy.model.config
        marks = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        self.before, self.after = ([] if mark is None else [int(mark)] for mark in marks)
        bos = policy.tokenizer.bos_token_id
        self.opening = [] if bos is None else [int(bos)]

    def __len__(self) -> int:
        return len(self.documents)

    def identity(self, position: int) -> str:
        facts = (self.documents.identity(position), self.max_tokens, self.policy.config)
        return "\0".join(map(str, facts))

    def rows(self, positions: Sequence[int]) -> list[Row]:
        found = [self.documents.at(position) for position in positions]
        rows = [self._row(document) for document in found if document is not None]
        return [row for row in rows if row.visuals]

    def _row(self, document: Document) -> Row:
        ids, kinds = list(self.opening), [TokenKind.TEMPLATE] * len(self.opening)
        visuals: list[VisualInput] = []
        for part in document.parts:
            room = self.max_tokens - len(ids)
            if room <= 0:
                break
            if isinstance(part, str):
                text = part[: _LONGEST_TOKEN * room]  # a book would be tokenised for its first page
                new = self.prompt.encode_instruction(text)[:room]
                ids, kinds = ids + new, kinds + [TokenKind.INSTRUCTION] * len(new)
                continue
            visual = _visual(self.policy, part)
            count = visual.grid[0] * visual.grid[1]
            if len(self.before) + count + len(self.after) > room:
                break
            visuals.append(visual)
            ids = [*ids, *self.before, *[self.prompt.image_token_id] * count, *self.after]
            kinds += [TokenKind.TEMPLATE] * len(self.before)
            kinds += [TokenKind.IMAGE] * count + [TokenKind.TEMPLATE] * len(self.after)
        return Row(EncodedPrompt(ids, kinds), visuals)


def _visual(policy: Policy, image: UInt8Array) -> VisualInput:
    """A picture as the policy takes it, in the policy's own precision."""
    visual = policy.backbone.prepare(image)
    return visual._replace(pixels=visual.pixels.to(policy.model.dtype))


def pixels_of(rows: Sequence[Row]) -> list[VisualInput]:
    """All pictures of a batch, in the order of their image tokens."""
    return [visual for row in rows for visual in row.visuals]
