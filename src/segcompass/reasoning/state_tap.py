"""Hidden states, read in the pass that happens anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class StateTap:
    """Collects the outputs of the SAE layer and of the final norm while armed.

    With ``keep_final=False`` only the SAE layer's are kept.
    """

    def __init__(self) -> None:
        self.sae: list[Float[Tensor, "B l D"]] = []
        self.final: list[Float[Tensor, "B l D"]] = []

    @contextmanager
    def armed(self, sae_layer: nn.Module, final_norm: nn.Module) -> Iterator[StateTap]:
        """Hook both modules for the duration of the block."""

        def keep(store: list[Tensor]) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                store.append(output[0] if isinstance(output, tuple) else output)

            return hook

        handles = [
            sae_layer.register_forward_hook(keep(self.sae)),
            final_norm.register_forward_hook(keep(self.final)),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
