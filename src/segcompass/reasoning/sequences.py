"""Token sequences of unequal length in one batch: prompts, and answers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from segcompass.reasoning.prompts import EncodedPrompt
from segcompass.types import TokenKind


class Sequences(NamedTuple):
    """B left-padded sequences; ``kinds`` tells padding and everything else apart."""

    ids: Int[Tensor, "B L"]
    kinds: Int[Tensor, "B L"]

    @property
    def attention(self) -> Int[Tensor, "B L"]:
        """1 on tokens, 0 on padding."""
        return (self.kinds != TokenKind.PADDING).long()


def pad_left(rows: Sequence[EncodedPrompt], pad_id: int) -> Sequences:
    """Stack sequences of unequal length, padding on the left."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    kinds = torch.full_like(ids, int(TokenKind.PADDING))
    for i, row in enumerate(rows):
        ids[i, longest - len(row.ids) :] = torch.tensor(row.ids)
        kinds[i, longest - len(row.ids) :] = torch.tensor(row.kinds)
    return Sequences(ids, kinds)


def append(
    prompts: Sequences, answers: Sequence[EncodedPrompt], pad_id: int
) -> tuple[Sequences, Bool[Tensor, "B M"]]:
    """Answers behind their prompts, padded on the right; and where they stand."""
    width, (rows, device) = prompts.ids.shape[1], (len(answers), prompts.ids.device)
    longest = width + max(len(answer.ids) for answer in answers)
    ids = torch.full((rows, longest), pad_id, device=device)
    kinds = torch.full_like(ids, int(TokenKind.PADDING))
    ids[:, :width], kinds[:, :width] = prompts
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        place = slice(width, width + len(answer.ids))
        ids[row, place] = torch.tensor(answer.ids, device=device)
        kinds[row, place] = torch.tensor(answer.kinds, device=device)
        is_answer[row, place] = True
    return Sequences(ids, kinds), is_answer
