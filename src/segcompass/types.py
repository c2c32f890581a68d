"""What the stages hand to each other: small frozen records, every intermediate visible.

Dimension legend, used in every shape annotation of the package:
    B batch, L tokens, D policy width, S SAE latents, C codebook width, K slots,
    H attention heads, h×w feature grid, G GRPO group, N target instances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:  # data sets are read and written without torch
    from torch import Tensor

T = TypeVar("T")


class Rle(TypedDict):
    """A mask in COCO's compressed run-length encoding; ``size`` is (height, width)."""

    size: list[int]
    counts: str


class Status(StrEnum):
    """How an answer ended. Only ``OK`` and ``NO_TARGET`` are well-formed answers."""

    OK = "ok"
    NO_TARGET = "no_target"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"

    @property
    def well_formed(self) -> bool:
        """Whether the answer had the form that was asked for, so that masks may be read from it."""
        return self in (Status.OK, Status.NO_TARGET)


class TokenKind(IntEnum):
    """Where a token of the sequence comes from."""

    PADDING = 0
    TEMPLATE = 1
    IMAGE = 2
    INSTRUCTION = 3
    THOUGHT = 4
    CONCENTRATION = 5


@dataclass(frozen=True)
class NamedObject:
    """An annotated object as the chain of thought may name it (scenes only)."""

    ann_id: int
    category: str
    colour: str
    size: str  # small | medium | large
    texture: str  # plain | striped | dotted
    cell: str  # place on the 8x8 map: row letter and column number, "b4"


@dataclass(frozen=True)
class Sample:
    """One (image, instruction) pair with its target instances, as read from a data set."""

    sample_id: str
    image_path: Path
    image_id: int
    image_hw: tuple[int, int]
    instruction: str
    targets: tuple[Rle, ...]  # one per target instance; empty means "nothing matches"
    target_ids: tuple[int, ...] = ()  # annotation ids of the targets, where the layout has them
    ignore: Rle | None = None  # pixels left out of prediction and target (ReasonSeg)
    kind: str | None = None  # question kind (scenes)
    thought: str | None = None  # oracle chain of thought (scenes)
    objects: tuple[NamedObject, ...] = ()  # everything in the picture (scenes)


class SparseCodes(NamedTuple):
    """Non-zero SAE activations as triplets (Eq. 4), sorted by row; row r is token r of n_rows."""

    rows: Int[Tensor, "nnz"]
    columns: Int[Tensor, "nnz"]  # latent (concept) index in [0, n_columns)
    values: Float[Tensor, "nnz"]  # activation > threshold
    n_rows: int
    n_columns: int


class Slots(NamedTuple):
    """What the slot mapper reads off the image (Eq. 5)."""

    scores: Float[Tensor, "B K H h w"]  # raw scaled dot products, one map per head
    heatmap_logits: Float[Tensor, "B K h w"]
    confidence_logits: Float[Tensor, "B K"]


class ReasoningBatch(NamedTuple):
    """States of B sequences, left-padded to L tokens, read in a pass that happened anyway."""

    token_ids: Int[Tensor, "B L"]
    token_kinds: Int[Tensor, "B L"]  # TokenKind
    sae_states: Float[Tensor, "B L D"]  # output of the SAE layer
    concentration_states: Float[
        Tensor, "B K D"
    ]  # last layer, post-norm; zeros where not well-formed
    well_formed: Bool[Tensor, "B"]


class BoxPrompts(NamedTuple):
    """What an answer says in numbers, one row per slot, in px of the image."""

    boxes: np.ndarray  # float32 (K, 4), x0 y0 x1 y1; NaN in slots that the answer does not name
    points: np.ndarray  # float32 (K, n, 2), x y; NaN where an object has fewer points


class Candidates(NamedTuple):
    """Masks that were weighed against each other before one of them became the answer."""

    masks: np.ndarray  # bool (M, height, width)
    scores: np.ndarray  # float32 (M,) in [0, 1], as the scorer rated them
    sources: tuple[str, ...]  # where each one comes from: "direct, slot 1", with the rank there
    thoughts: tuple[str, ...]  # why it was rated so
    chosen: int | None  # index of the answer; None where it is none of them


class Score(NamedTuple):
    """How well a marked region fits what was asked for, in a model's judgement."""

    value: float  # in [0, 1]; 0 unless the judgement is well-formed
    thought: str
    status: Status


def given(value: T | None, what: str) -> T:
    """A field of a prediction that not every interface fills.

    Raises:
        ValueError: if this prediction has none.
    """
    if value is None:
        raise ValueError(
            f"this answer has no {what}: the interface that made it shows none; "
            "use a model of the interface concept_slots"
        )
    return value


@dataclass(frozen=True)
class Prediction:
    """Masks, and the whole way to them. All arrays are numpy, on the host.

    The answer is in ``masks``, ``scores``, ``boxes`` and ``heatmaps``: the accepted slots alone.
    The fields beside them keep all K slots; ``accepted`` says which ones count. ``*_logits`` and
    ``head_scores`` lie on the segmenter's padded square frame, the rest on the image as displayed.
    What an interface has nothing to show for is None (:func:`given`).
    """

    instruction: str
    status: Status
    text: str
    reasoning: str
    image_rgb: np.ndarray  # uint8 (height, width, 3), as displayed
    slot_masks: np.ndarray  # bool (K, height, width), one per slot
    slot_scores: np.ndarray  # float32 (K,), confidence in [0, 1]
    accepted: np.ndarray  # bool (K,), score above the threshold
    low_res_logits: np.ndarray  # float32 (K, 4h, 4w), the decoder's output
    slot_heatmaps: np.ndarray | None  # float32 (K, height, width) in [0, 1], resized to the image
    heatmap_logits: np.ndarray | None  # float32 (K, h, w)
    head_scores: np.ndarray | None  # float32 (K, H, h, w), Eq. 5
    concentration_states: np.ndarray | None  # float32 (K, D), Eq. 1
    slot_queries: np.ndarray | None  # float32 (K, Q), Eq. 2
    concept_vectors: np.ndarray | None  # float32 (K, C), Fig. 3
    slot_attention: np.ndarray | None  # float32 (K, L), how much each slot reads from each token
    codes: SparseCodes | None  # (token, concept, activation) of the L tokens
    tokens: tuple[str, ...]  # the L tokens of prompt and answer, as text
    token_kinds: np.ndarray  # int (L,), TokenKind
    token_boxes: np.ndarray  # float32 (n_image_tokens, 4), x0 y0 x1 y1 in px of the image
    threshold: float
    model: str
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    source: str | None = None  # file the image came from
    sae_errors: np.ndarray | None = None  # float32 (L,), ‖z - ẑ‖² / D; NaN where the SAE reads not
    paths: str = "both"  # what the slot queries are made of: tokens, concepts, or both
    interface: str = "concept_slots"
    fingerprint: str = ""  # of the model's weights
    prompts: BoxPrompts | None = None  # boxes and points that the answer names
    # float32 (K, rows, columns): what the concentration tokens look at, on the grid of image tokens
    image_attention: np.ndarray | None = None
    candidates: Candidates | None = None  # what the answer was chosen from

    @property
    def masks(self) -> np.ndarray:
        """bool (n, height, width): the masks that count; n = 0 when nothing matches."""
        return np.asarray(self.slot_masks[self.accepted])

    @property
    def scores(self) -> np.ndarray:
        """float32 (n,): their confidences."""
        return np.asarray(self.slot_scores[self.accepted])

    @property
    def heatmaps(self) -> np.ndarray | None:
        """float32 (n, height, width) in [0, 1]: where their slots looked."""
        return None if self.slot_heatmaps is None else np.asarray(self.slot_heatmaps[self.accepted])

    @property
    def boxes(self) -> np.ndarray:
        """float32 (n, 4): x0 y0 x1 y1 around the masks, in px."""
        from segcompass.io.masks import boxes

        return boxes(self.masks)

    @property
    def concepts(self) -> list[dict[int, float]] | None:
        """For each mask that counts: how much its slot reads from its strongest concepts."""
        from segcompass.io.readings import slot_concepts

        if self.codes is None:
            return None
        read = slot_concepts(self)
        return [{c.concept: c.weight for c in read[k]} for k in np.flatnonzero(self.accepted)]

    def to_json(self) -> dict[str, Any]:
        """The versioned record of docs/outputs.md."""
        from segcompass.io.outputs import to_json

        return to_json(self)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO results, one for each mask that counts."""
        from segcompass.io.outputs import to_coco

        return to_coco([self], [image_id])

    def to_supervision(self) -> Any:
        """A ``supervision.Detections`` (extra ``viz``)."""
        from segcompass.io.viewers import to_supervision

        return to_supervision(self)

    def plot(self) -> Any:
        """A matplotlib figure: picture, masks and heatmaps (extra ``viz``)."""
        from segcompass.io.viewers import plot

        return plot(self)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write JSON, masks, heatmaps and an overlay; returns the files by name."""
        from segcompass.io.outputs import save

        return save(self, Path(folder))
