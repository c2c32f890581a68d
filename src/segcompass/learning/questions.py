"""The rows of a batch with all that is computed once for a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.io.errors import ConfigError
from segcompass.io.images import load_image
from segcompass.learning.corpus import BlockMemo, feature_memo, visual_memo
from segcompass.learning.engine.distributed import World
from segcompass.learning.planning.features import open_features
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Policy
from segcompass.types import Sample


class Questions(NamedTuple):
    """B rows of a batch, with all that is computed once for a picture."""

    samples: list[Sample]
    visuals: list[VisualInput]
    features: list[Float[Tensor, "n D"]]
    keys: Float[Tensor, "B C h w"]
    frames: list[Frame]

    def take(self, rows: Iterable[int]) -> Questions:
        """Some rows, each as often as it is named."""
        chosen = list(rows)
        lists = [[column[i] for i in chosen] for column in (self.samples, self.visuals)]
        features, frames = [self.features[i] for i in chosen], [self.frames[i] for i in chosen]
        return Questions(lists[0], lists[1], features, self.keys[chosen], frames)  # type: ignore[arg-type]


class PictureMemo:
    """What frozen encoders say of pictures: read from ``data.features``, or computed once.

    Args:
        policy: Whole, not sharded yet.
        encoder: Of the segmenter.
        paths: All pictures that will be asked for.
        stored: Folder of precomputed features.
    """

    def __init__(
        self, policy: Policy, encoder: ImageEncoder, paths: list[Path], stored: Path | None
    ) -> None:
        self.side = encoder.side
        self.visuals = visual_memo(policy.backbone)
        self.features: Callable[[Path], Tensor]
        self.keys: Callable[[Path], Tensor]
        if stored is not None:
            found = open_features(stored, policy.backbone, encoder, paths, policy.model.device)
            self.features, self.keys = found.features, found.keys
        else:
            features, keys = (
                feature_memo(policy.backbone, self.visuals, paths),
                key_memo(encoder, paths),
            )
            # Not later: the sharded tower runs on all ranks or none, and they meet other pictures.
            if not features.share(World.current()):
                raise ConfigError(
                    f"the image features of {len(features.order)} pictures do not fit in memory on "
                    "every rank; write them once with `segcompass data features`, and set "
                    "data.features"
                )
            keys.share(World.current())
            self.features, self.keys = features, keys

    def questions(self, samples: list[Sample]) -> Questions:
        """Everything about the pictures of some samples."""
        paths = [s.image_path for s in samples]
        return Questions(
            samples,
            [self.visuals(path) for path in paths],
            [self.features(path) for path in paths],
            torch.stack([self.keys(path).float() for path in paths]),
            [Frame.fit(s.image_hw, self.side) for s in samples],
        )


def key_memo(encoder: ImageEncoder, paths: Iterable[Path]) -> BlockMemo[Tensor]:
    """Image keys of the frozen encoder, (C, h, w) for every picture, in half precision.

    The encoder is shown one picture at a time: of ViT-H, the attention maps of one take 2 GB.
    """

    @torch.no_grad()
    def one(path: Path) -> Tensor:
        pixels, _ = encoder.preprocess([load_image(path)])
        keys: Tensor = encoder(pixels)[0]
        return keys.bfloat16()

    return BlockMemo(lambda block: [one(path) for path in block], paths)
