"""The answers of a step, and parts of them: what a pass with gradient is made over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.learning.questions import Questions
from segcompass.reasoning.sequences import Sequences
from segcompass.types import TokenKind


class Answers(NamedTuple):
    """B whole answers, with all that is known of them before the pass with gradient."""

    questions: Questions  # one row for each answer
    sequences: Sequences  # prompts and answers
    is_answer: Bool[Tensor, "B L"]  # their tokens, end-of-text included
    well_formed: Bool[Tensor, "B"]
    log_probs: Float[Tensor, "B L"] | None = None  # of rollouts, under the policy that wrote them
    advantages: Float[Tensor, "B"] | None = None  # of rollouts, in their groups
    forced: bool = False  # into their form

    def take(self, rows: Sequence[int]) -> Answers:
        """Some rows, without the columns that are padding in all of them."""
        chosen = list(rows)
        ids, kinds, is_answer = (part[chosen] for part in (*self.sequences, self.is_answer))
        used = (is_answer | (kinds != TokenKind.PADDING)).any(0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return Answers(
            self.questions.take(chosen),
            Sequences(ids[:, columns], kinds[:, columns]),
            is_answer[:, columns],
            self.well_formed[chosen],
            None if self.log_probs is None else self.log_probs[chosen][:, columns],
            None if self.advantages is None else self.advantages[chosen],
            self.forced,
        )
