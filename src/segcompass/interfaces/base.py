"""What every way of aligning language with pixels implements: states or text in, masks out.

An interface reads what the policy wrote (:meth:`Interface.align`), and turns that into masks with
the segmenter (:meth:`Interface.decode`). Loading, generation, training and judging are shared; what
a paradigm has nothing to show for stays None, which is itself the comparison.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor, nn

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.geometry import Frame
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.prompted_decoder import PromptedDecoder
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import Form, ParsedAnswer
from segcompass.types import BoxPrompts, Prediction, ReasoningBatch, Score, Slots, SparseCodes


class Alignment(NamedTuple):
    """From reasoning to slots, with everything in between; None where an interface has nothing."""

    confidence_logits: Float[Tensor, "B K"]
    slots: Slots | None = None  # heatmaps
    queries: Float[Tensor, "B K Q"] | None = None  # Eq. 2
    concept_vectors: Float[Tensor, "B K C"] | None = None  # Fig. 3
    codes: SparseCodes | None = None  # row b*L + l is token l of sequence b
    slot_attention: Float[Tensor, "B K L"] | None = None  # which tokens each slot reads
    sae_errors: Float[Tensor, "B L"] | None = None  # ‖z - ẑ‖² / D; NaN for tokens not read
    prompts: list[BoxPrompts] | None = None  # per picture
    low_res: Float[Tensor, "B K 4h 4w"] | None = None  # masks, where confidences come with them


# What the paths from language to queries are scaled with: (concentration tokens, concepts).
PATHS: dict[str, tuple[float, float]] = {"both": (1, 1), "tokens": (1, 0), "concepts": (0, 1)}


class InterfaceConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of an interface; the section ``head`` of a config."""


Judge = Callable[[PolicyConfig], Policy]  # loads a policy for the way in which it is to be asked


class Material(NamedTuple):
    """What an interface may be made of."""

    prompted: PromptedDecoder
    policy_width: int  # D
    slots: int  # K
    sae: SparseAutoencoder | None = None
    policy: Policy | None = None
    judge: Judge | None = None  # where a second MLLM is to judge candidates

    @property
    def decoder(self) -> MaskDecoder:
        """What also takes heatmaps and queries; raises ValueError where the segmenter is SAM 2."""
        if not isinstance(self.prompted, MaskDecoder):
            raise ValueError("SAM 2 takes points and boxes only; this interface needs a SAM")
        return self.prompted


class Scorer(Protocol):
    """Judges marked regions."""

    def score(self, pictures: Sequence[np.ndarray], instructions: Sequence[str]) -> list[Score]:
        """How well the region that each picture (uint8 RGB) marks fits its instruction."""


class Interface(nn.Module, ABC):
    """A way of aligning.

    Class attributes say what it needs: ``form`` is how an answer ends, ``has_concepts`` whether it
    reads an SAE (then ``sae`` is there), ``decoupled`` whether its masks give no gradient,
    ``reads_attention`` whether it wants to know what the policy looks at in the picture;
    ``threshold`` is the confidence above which a mask counts in models that are trained.
    """

    name: ClassVar[str]
    Config: ClassVar[type[InterfaceConfig]]
    form: Form = "slots"
    has_concepts: ClassVar[bool] = False
    decoupled: ClassVar[bool] = False
    reads_attention: bool = False
    threshold: ClassVar[float] = 0.5
    query_width: int | None = None  # Q, where it is not the policy's width
    config: Any
    decoder: PromptedDecoder
    sae: SparseAutoencoder | None
    judge: Policy | None  # a second MLLM, saved as the part "scorer"

    def __init__(self) -> None:
        super().__init__()
        self.sae = self.judge = None  # class attributes would hide modules of these names

    @classmethod
    @abstractmethod
    def build(cls, config: Any, material: Material) -> Interface:
        """Make one of the configured sizes; raises ValueError if the parts do not fit."""

    @property
    def head(self) -> nn.ModuleDict:
        """What ``head.safetensors`` holds: all that is neither policy, segmenter nor SAE."""
        return nn.ModuleDict()

    def trained(self) -> dict[str, nn.Module]:
        """The parts that joint training trains, beside the policy, by their rate's name."""
        return {"head": self.head, "decoder": self.decoder}

    @property
    def has_paths(self) -> bool:
        """Whether queries are made of tokens and concepts, so that ``gates`` can cut off either."""
        return self.has_concepts

    @abstractmethod
    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        answers: Sequence[ParsedAnswer] | None = None,
        need_attention: bool = False,
        gates: Float[Tensor, "#B 2"] | None = None,
    ) -> Alignment:
        """From what the policy wrote to slots; what an interface does not read goes to ``**_``.

        Args:
            states: Of whole answers.
            keys: Image keys from the segmenter's encoder.
            frames: Where each picture lies in the segmenter's square frame.
            answers: As text; while training on states they are not needed.
            need_attention: Also tell all that costs extra, such as which tokens each slot reads.
            gates: How much of the concentration tokens and of the concepts reaches the queries.
        """

    @abstractmethod
    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        alignment: Alignment,
        *,
        frames: Sequence[Frame],
        select: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Mask logits over the square frame, of all slots or of ``select``."""

    def conclude(
        self,
        predictions: list[Prediction],
        keys: Float[Tensor, "B C h w"],
        frames: Sequence[Frame],
    ) -> list[Prediction]:
        """The last word on a batch of answers; most have nothing to add."""
        return predictions
