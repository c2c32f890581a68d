"""What the policy looks at in the picture while it reads its concentration tokens.

Read by hooks in the pass that happens anyway. Only eager attention returns its weights; with the
other implementations of transformers there is nothing to see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from segcompass.types import TokenKind


class AttentionTap:
    """Keeps, while armed, the newest token's attention to the prompt: mean over layers and heads.

    Source: Rea2Seg takes its segmentation token's attention to the image; which layers and heads
    it takes is not published.

    Args:
        width: tokens of the prompts, padding included.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.steps: list[Float[Tensor, "B width"]] = []  # t: of the token at width - 1 + t

    @contextmanager
    def armed(self, layers: Sequence[nn.Module]) -> Iterator[AttentionTap]:
        """Hook the self-attention of all layers for the duration of the block."""

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                weights = output[1]  # (B, H, queries, keys), or None
                if weights is None:
                    return
                newest = weights[:, :, -1, : self.width].float().mean(1) / len(layers)
                if layer == 0:
                    self.steps.append(newest)
                else:
                    self.steps[-1] += newest.to(self.steps[-1])

            return hook

        handles = [
            layer.get_submodule("self_attn").register_forward_hook(keep(number))
            for number, layer in enumerate(layers)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def to_image(self, kinds: Int[Tensor, "B L"]) -> list[Float[Tensor, "K n"]] | None:
        """Each row's attention from its concentration tokens to its n image tokens.

        Args:
            kinds: of prompts and answers (``TokenKind``).

        Returns:
            None where no weights were shown.
        """
        if not self.steps:
            return None
        steps = torch.stack(self.steps, 1)
        read = kinds[:, self.width - 1 :][:, : steps.shape[1]]
        is_slot, is_image = read == TokenKind.CONCENTRATION, kinds == TokenKind.IMAGE
        return [
            steps[row, : read.shape[1]][is_slot[row]][:, is_image[row, : self.width]]
            for row in range(len(kinds))
        ]
