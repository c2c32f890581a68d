"""A grammar for generation: a think block, then the K concentration tokens, then end-of-text.

With it every checkpoint, even an untrained one, gives a well-formed answer; see promise 5 of the
design. It is off in rollouts and in evaluation, where the form has to be earned.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from segcompass.reasoning.prompts import THINK_CLOSE, THINK_OPEN, Prompt

_TAIL = 12  # tokens that surely hold a closing mark however it is cut up


class ForcedForm(LogitsProcessor):
    """Force the form of an answer while leaving the thought free.

    Args:
        prompt: Knows the marks and the concentration tokens.
        prompt_length: Tokens before the answer.
        max_new_tokens: Longest answer; the thought is closed in time for the rest to fit.
    """

    def __init__(self, prompt: Prompt, prompt_length: int, max_new_tokens: int) -> None:
        self.prompt = prompt
        self.start = prompt_length
        self.ending = prompt.ending
        self.thought_limit = max_new_tokens - len(self.ending) - 1
        if self.thought_limit < len(prompt.open_ids):
            needed = len(prompt.open_ids) + len(self.ending) + 1
            raise ValueError(
                f"max_new_tokens {max_new_tokens} leaves no room for an answer; "
                f"give at least {needed}"
            )
        self.never = sorted({*prompt.control_ids, *prompt.slot_ids, prompt.eos_token_id})
        if len(prompt.close_ids) == 1:
            self.never = [token for token in self.never if token != prompt.close_ids[0]]
        self.queues: list[list[int]] = []  # what each row still has to say
        self.closing: list[bool] = []  # whether its thought is over

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Mask the logits of the next token."""
        if not self.queues:
            self.queues = [list(self.prompt.open_ids) for _ in input_ids]
            self.closing = [False for _ in input_ids]
        scores = scores.clone()
        scores[:, self.prompt.vocabulary :] = -torch.inf
        scores[:, self.never] = -torch.inf
        for row, answer in enumerate(input_ids[:, self.start :].tolist()):
            tail = self.prompt.decode(answer[-_TAIL:])
            token = self._forced(row, answer, tail)
            if token is None:
                scores[row, self._misplaced(tail)] = -torch.inf
            else:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def _forced(self, row: int, answer: list[int], tail: str) -> int | None:
        """The only token allowed next, or None inside the thought."""
        if not self.closing[row] and not self.queues[row]:
            # The tail alone may read stray bytes as a mark that the whole text does not hold.
            closed = THINK_CLOSE in tail and THINK_CLOSE in self.prompt.decode(answer)
            if closed or len(answer) >= self.thought_limit:
                self.closing[row] = True
                skip = len(self.prompt.close_ids) if closed else 0
                self.queues[row] = self.ending[skip:]
        if self.queues[row]:
            return self.queues[row].pop(0)
        return self.prompt.eos_token_id if self.closing[row] else None

    def _misplaced(self, tail: str) -> list[int]:
        """Tokens that would open a second thought, or close this one and go on talking."""
        banned = []
        for mark in (THINK_OPEN, THINK_CLOSE):
            begun = max(n for n in range(len(mark)) if tail.endswith(mark[:n]))
            if begun:
                rest = mark[begun:]
                banned += [
                    token
                    for token, text in self.prompt.mark_endings
                    if text.startswith(rest) and (mark == THINK_OPEN or text != rest)
                ]
        return banned
