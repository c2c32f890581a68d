"""A policy as judge: how well does the marked region of a picture fit what was asked for?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.backbones import family_of
from segcompass.reasoning.policy import Generation, Policy, PolicyConfig
from segcompass.reasoning.prompts import ANSWER_CLOSE, SCORE_TEMPLATES
from segcompass.types import Score, Status

TOP = 9  # the best of the ten scores


def asking_for_scores(policy: str, like: PolicyConfig) -> PolicyConfig:
    """How a published policy is asked for scores, in the chat of its family.

    Args:
        policy: A folder or hub id.
        like: How another policy is used, for the limits.

    Raises:
        CheckpointError: if it cannot be read, or its family is not known.
    """
    try:
        family = family_of(AutoConfig.from_pretrained(policy, trust_remote_code=False).model_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{policy} is no usable policy folder or hub id ({type(error).__name__}: {error})"
        ) from error
    changes = {"template": SCORE_TEMPLATES[family], "form": "score"}
    return PolicyConfig(
        prompt=like.prompt.model_copy(update=changes),
        sae_layer=0,  # no SAE reads a judge
        pad_to_square=family == "llava",
        max_new_tokens=like.max_new_tokens,
    )


class PolicyScorer:
    """Asks a policy whose answers are scores.

    Source: Rea2Seg's second stage, which reads the score off the answer. Here it is the expected
    digit under the policy's probabilities where it writes its own, so that ties are rare.

    Args:
        policy: Its prompt's form is ``score``.
        together: Pictures that are judged at once.
    """

    def __init__(self, policy: Policy, *, together: int = 16) -> None:
        if policy.config.prompt.form != "score":
            raise ValueError(
                f"a scorer's answers are scores, this policy's are {policy.config.prompt.form}; "
                "set prompt.form: score"
            )
        digits = [policy.prompt.encode_inner(str(digit)) for digit in range(TOP + 1)]
        if any(len(tokens) != 1 for tokens in digits):
            raise ValueError("a scorer's tokenizer must have a token for every digit")
        self.digits = [tokens[0] for tokens in digits]
        self.policy, self.together = policy, together

    @torch.no_grad()
    def score(self, pictures: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Score]:
        """Judge the region that each picture marks (``grounding.marking``), greedily.

        Judgements are held to their form; one that cannot be read all the same scores 0.

        Args:
            pictures: uint8 (height, width, 3), with the mark.
            instructions: What was asked for, one for each picture.
        """
        scores: list[Score] = []
        for start in range(0, len(pictures), self.together):
            batch = slice(start, start + self.together)
            visuals = [self.policy.backbone.prepare(picture) for picture in pictures[batch]]
            written = self.policy.generate(visuals, instructions[batch], force_form=True)
            scores += [self._read(written, row) for row in range(len(visuals))]
        return scores

    def _read(self, written: Generation, row: int) -> Score:
        """The judgement of one row."""
        answer = written.answers[row]
        at = self._digit_at(written.sequences.ids[row], written.is_answer[row])
        if answer.status != Status.OK:
            return Score(0.0, answer.thought, answer.status)
        if at is None:  # the digit is part of a longer token: nothing to read probabilities from
            return Score(0.0, answer.thought, Status.MALFORMED)
        logits = self.policy.language_logits(written.hidden[row, at - 1][None])[0]
        return Score(expected(logits[self.digits]), answer.thought, Status.OK)

    def _digit_at(self, ids: Int[Tensor, "M"], is_answer: Tensor) -> int | None:
        """Where in the sequence the score stands: the last digit, right before the mark."""
        places = [int(i) for i in is_answer.nonzero() if int(ids[i]) in self.digits]
        if not places:
            return None
        behind = ids[places[-1] + 1 :][is_answer[places[-1] + 1 :]].tolist()
        text = self.policy.prompt.decode(
            [t for t in behind if t != self.policy.prompt.eos_token_id]
        )
        return places[-1] if text.strip() == ANSWER_CLOSE else None


def expected(logits: Float[Tensor, "10"]) -> float:
    """The expected digit, as a share of the best one, in [0, 1]."""
    digits = torch.arange(TOP + 1, device=logits.device)
    return float((logits.float().softmax(0) * digits).sum() / TOP)
