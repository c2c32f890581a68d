"""A grammar for generation: a think block, then a conclusion of the form asked for, then the end.

With it every checkpoint, even an untrained one, gives a well-formed answer; see promise 5 of the
design. It is off in rollouts and in evaluation, where the form has to be earned.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from segcompass.reasoning.grammars import Grammar, Writer, conclude, least_room
from segcompass.reasoning.prompts import THINK_CLOSE, THINK_OPEN, Prompt

_TAIL = 12  # tokens that surely hold a closing mark however it is cut up


class ForcedForm(LogitsProcessor):
    """Force the form of an answer while leaving the thought free.

    Args:
        prompt: Knows the marks and the form.
        prompt_length: Tokens before the answer.
        max_new_tokens: Longest answer; the thought is closed in time for the rest to fit.
    """

    def __init__(self, prompt: Prompt, prompt_length: int, max_new_tokens: int) -> None:
        self.prompt = prompt
        self.start, self.limit = prompt_length, max_new_tokens
        ending = len(prompt.close_ids) + least_room(prompt) + 1
        self.thought_limit = max_new_tokens - ending - 1
        if self.thought_limit < len(prompt.open_ids):
            raise ValueError(
                f"max_new_tokens {max_new_tokens} leaves no room for an answer; "
                f"give at least {len(prompt.open_ids) + ending + 1}"
            )
        self.never = sorted({*prompt.control_ids, *prompt.slot_ids, prompt.eos_token_id})
        if len(prompt.close_ids) == 1:
            self.never = [token for token in self.never if token != prompt.close_ids[0]]
        self.writers: dict[int, Writer] = {}  # of the rows whose thought is over

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Mask the logits of the next token."""
        free, scores = scores, scores.clone()
        scores[:, self.prompt.vocabulary :] = -torch.inf
        scores[:, self.never] = -torch.inf
        for row, answer in enumerate(input_ids[:, self.start :].tolist()):
            tail = self.prompt.decode(answer[-_TAIL:])
            allowed = self._forced(row, answer, tail)
            if allowed is None:
                scores[row, self._misplaced(tail)] = -torch.inf
                continue
            scores[row] = -torch.inf
            scores[row, allowed] = free[row, allowed] if len(allowed) > 1 else 0.0
        return scores

    def _forced(self, row: int, answer: list[int], tail: str) -> list[int] | None:
        """The tokens of which one must come next, or None inside the thought."""
        if len(answer) < len(self.prompt.open_ids):
            return [self.prompt.open_ids[len(answer)]]
        writer = self.writers.get(row)
        if writer is None:
            # The tail alone may read stray bytes as a mark that the whole text does not hold.
            closed = THINK_CLOSE in tail and THINK_CLOSE in self.prompt.decode(answer)
            if not closed and len(answer) < self.thought_limit:
                return None
            writer = self.writers[row] = Writer(self._ending(closed, self.limit - len(answer)))
        elif not writer.done:
            writer.take(answer[-1])
        return [self.prompt.eos_token_id] if writer.done else writer.allowed()

    def _ending(self, closed: bool, room: int) -> Grammar:
        """What follows a thought in ``room`` tokens, up to end-of-text."""
        if not closed:
            yield [self.prompt.close_ids]
            room -= len(self.prompt.close_ids)
        yield from conclude(self.prompt, room - 1)
        yield [[self.prompt.eos_token_id]]

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
