"""What draws masks from points and boxes, whichever segmenter it is part of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn


class PromptedDecoder(nn.Module, ABC):
    """Decodes prompts, given in px of the segmenter's frame, into masks over that frame."""

    @property
    @abstractmethod
    def mask_side(self) -> int:
        """Side of the decoded low-resolution masks, 4h."""

    @abstractmethod
    def rated_prompts(
        self,
        keys: Any,
        rows: Int[Tensor, " M"],
        *,
        points: Float[Tensor, "M n 2"] | None = None,
        labels: Int[Tensor, "M n"] | None = None,
        boxes: Float[Tensor, "M 4"] | None = None,
        best_of_three: bool = False,
    ) -> tuple[Float[Tensor, "M 4h 4w"], Float[Tensor, " M"]]:
        """Masks of M prompts, and the IoU that the segmenter expects each of them to have.

        Args:
            keys: image keys of the segmenter's own encoder.
            rows: which image of the batch each of the M prompts is for.
            points: (x, y) in px of the frame.
            labels: 1 object, 0 background, -10 ignored; all 1 where omitted.
            boxes: x0 y0 x1 y1 in px of the frame.
            best_of_three: decode the segmenter's three alternatives and keep the one it rates
                best, which suits ambiguous prompts such as a single point.

        Raises:
            ValueError: When no prompt is given or sizes disagree.
        """

    def decode_prompts(
        self, keys: Any, rows: Int[Tensor, " M"], **prompts: Any
    ) -> Float[Tensor, "M 4h 4w"]:
        """The masks of :meth:`rated_prompts` alone."""
        return self.rated_prompts(keys, rows, **prompts)[0]


def check_prompts(rows: Int[Tensor, " M"], **prompts: Tensor | None) -> None:
    """Raises ValueError when there is no prompt, labels stand alone, or one is not of M rows."""
    given = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    if not given.keys() - {"labels"}:
        names = ", ".join(name for name in prompts if name != "labels")
        raise ValueError(f"no prompt given; pass any of {names}")
    wrong = {name: tuple(p.shape) for name, p in given.items() if len(p) != len(rows)}
    if wrong or ("labels" in given and "points" not in given):
        raise ValueError(f"{len(rows)} prompts are announced by rows, got {wrong or 'labels only'}")
