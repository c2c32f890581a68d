"""Answers of random policies in the form that a trained one gives them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from segcompass.reasoning.forced_form import ForcedForm
from segcompass.reasoning.policy import Generation, Policy


@contextmanager
def answers_of(*lengths: int | None) -> Iterator[list[dict[str, Any]]]:
    """Answer r of every batch thinks for about ``lengths[r % n]`` tokens, well-formed.

    None stands for an answer that talks on until it is cut off. Yields the options of every call.
    """
    calls: list[dict[str, Any]] = []
    plain = Policy.generate

    class Uneven(ForcedForm):
        def _forced(self, row: int, answer: list[int], tail: str) -> list[int] | None:
            length = lengths[row % len(lengths)]
            if length is None:
                return None
            self.thought_limit = length
            return super()._forced(row, answer, tail)

    def generate(self: Policy, *arguments: Any, **options: Any) -> Generation:
        calls.append(options)
        return plain(self, *arguments, **{**options, "force_form": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segcompass.reasoning.policy.ForcedForm", Uneven)
        patch.setattr(Policy, "generate", generate)
        yield calls
