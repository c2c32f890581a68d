"""Training samples ready for the models, kept in memory where they fit.

Pictures are decoded and resized once per run; on two cores that is what keeps data from being
what training waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from segcompass.data.samples import ImageRecord, read_dataset, read_images
from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, MAP_SIDE, SIZES, TEXTURES
from segcompass.geometry import Frame, masks_to_grid, to_frame
from segcompass.io.errors import DataError
from segcompass.io.images import load_image
from segcompass.io.masks import decode
from segcompass.io.progress import progress
from segcompass.learning.config import DataConfig
from segcompass.learning.engine.distributed import World, local_ranks
from segcompass.reasoning.backbones import Backbone, VisualInput
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import NamedObject, Rle, Sample

T = TypeVar("T")
_ROUND = 8  # blocks of a rank that are handed round together
IGNORED = -100  # target value that cross-entropy skips


def read_samples(
    data: DataConfig, on_broken: Callable[[str, DataError], None] | None = None
) -> list[Sample]:
    """The configured training samples, of all sets; see `read_dataset` for ``on_broken``.

    What two sets call the same must not be taken for one: further sets' samples get longer names.
    """
    found: list[Sample] = []
    for part in data.sets:
        samples = read_dataset(
            part.root, part.split, layout=part.layout, limit=part.limit, on_broken=on_broken
        )
        if part is not data:
            place = f"{part.root}:{part.split}"
            samples = [replace(s, sample_id=f"{place}/{s.sample_id}") for s in samples]
        found += samples
    return found


def repeated(samples: Iterable[Sample], no_target: int) -> list[Sample]:
    """What an epoch asks: every question once, one that nothing matches ``no_target`` times."""
    return [s for s in samples for _ in range(1 if s.targets else no_target)]


def has_thought(sample: Sample) -> bool:
    """Whether the data set says how the sample's answer is reasoned; only some data sets do."""
    return bool((sample.thought or "").strip())


def read_pictures(data: DataConfig) -> list[ImageRecord]:
    """The configured training pictures with all their things (scenes only)."""
    return read_images(data.root, data.split)[: data.limit]


class Memo(Generic[T]):
    """Remembers what a function made of a picture, by its path.

    Args:
        make: Reads and prepares one picture.
        budget: Bytes that this machine's ranks together may keep; once they are full, later
            pictures are made anew.
    """

    def __init__(self, make: Callable[[Path], T], budget: int = 4 << 30) -> None:
        self.make, self.room = make, budget // local_ranks()
        self.kept: dict[Path, T] = {}

    def __call__(self, path: Path) -> T:
        if path in self.kept:
            return self.kept[path]
        value = self.make(path)
        size = _bytes(value)
        if size <= self.room:
            self.room -= size
            self.kept[path] = value
        return value


class BlockMemo(Generic[T]):
    """Remembers what a network made of pictures, which it is shown in fixed blocks.

    Blocks are faster than single pictures, and fixed: what comes of a picture must not depend on
    the batch it is first met in, or a resumed run would differ in the last bits.

    Args:
        make: Turns a block of pictures into one value each.
        paths: All pictures that will be asked for.
        block: Pictures in a block.
        budget: Bytes that this machine's ranks together may keep; if all pictures need more, each
            is made anew every time.
    """

    def __init__(
        self,
        make: Callable[[list[Path]], Sequence[T]],
        paths: Iterable[Path],
        block: int = 32,
        budget: int = 6 << 30,
    ) -> None:
        self.make, self.block, self.budget = make, block, budget // local_ranks()
        self.order = list(dict.fromkeys(paths))
        self.position = {path: i for i, path in enumerate(self.order)}
        self.kept: dict[Path, T] = {}
        self.keeps: bool | None = None  # settled with the first picture

    def __call__(self, path: Path) -> T:
        if path in self.kept:
            return self.kept[path]
        if not self._keeps():
            return self.make([path])[0]
        start = self.position[path] // self.block * self.block
        self.kept.update(self._made(start))
        return self.kept[path]

    def share(self, world: World) -> bool:
        """Make everything now, each rank some of the blocks, and hand them round.

        Else every rank makes nearly all of them in time. One rank alone makes them when asked.

        Returns:
            Whether all ranks have everything; False where it does not fit the budget.
        """
        if world.size == 1 or not self._keeps():
            return world.size == 1
        starts = range(0, len(self.order), self.block)
        with progress("pictures") as update:
            for first in range(0, len(starts), _ROUND * world.size):
                blocks = world.slice(starts[first : first + _ROUND * world.size])
                made = {path: value for start in blocks for path, value in self._made(start)}
                # Over the host: a tensor would come out on the GPU of the rank that sent it.
                for part in world.gather_objects(_moved(made, torch.device("cpu"))):
                    self.kept.update(_moved(part, world.device))
                update(len(self.kept), len(self.order))
        return True

    def _keeps(self) -> bool:
        """Whether all pictures fit the budget, judged by the first."""
        if self.keeps is None and self.order:
            first = self.make(self.order[:1])[0]
            self.keeps = _bytes(first) * len(self.order) <= self.budget
        return bool(self.keeps)

    def _made(self, start: int) -> Iterator[tuple[Path, T]]:
        members = self.order[start : start + self.block]
        return zip(members, self.make(members), strict=True)


def _moved(made: Mapping[Path, T], device: torch.device) -> dict[Path, T]:
    """The same values, with their tensors on another device."""
    return {path: _on(value, device) for path, value in made.items()}


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [_on(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _bytes(value: object) -> int:
    """Memory of the tensors and arrays in a value."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0


def visual_memo(backbone: Backbone) -> Memo[VisualInput]:
    """Pictures as the policy takes them, in the policy's own precision."""

    def make(path: Path) -> VisualInput:
        visual = backbone.prepare(load_image(path))
        return visual._replace(pixels=visual.pixels.to(backbone.model.dtype))

    return Memo(make)


def encode_answers(
    policy: Policy,
    batch: Sequence[Sample],
    visuals: Callable[[Path], VisualInput],
    conclude: Callable[[Sample], str] | None = None,
) -> tuple[list[VisualInput], Sequences]:
    """A batch's pictures, and its prompts with the oracle's whole answers.

    ``conclude`` says how the answer to a sample ends, where its form is a text.
    """
    pictures = [visuals(s.image_path) for s in batch]
    thoughts = [s.thought or "" for s in batch]
    conclusions = None if conclude is None else [conclude(s) for s in batch]
    asked = [s.instruction for s in batch]
    return pictures, policy.encode(pictures, asked, thoughts, conclusions)


def feature_memo(
    backbone: Backbone, visuals: Memo[VisualInput], paths: Iterable[Path]
) -> BlockMemo[Tensor]:
    """Image features of a frozen vision tower, (n, D) for every picture."""

    @torch.no_grad()
    def make(block: list[Path]) -> list[Tensor]:
        made = backbone.embed_images([visuals(path) for path in block])
        return [features.clone() for features in made]  # views would keep the block alive

    return BlockMemo(make, paths)


def seen_memo(backbone: Backbone, paths: Iterable[Path]) -> BlockMemo[tuple[VisualInput, Tensor]]:
    """Pictures without their pixels, with what a frozen vision tower made of them, (n, D).

    Where nothing else needs the pixels: they are several times larger than the features.
    """

    @torch.no_grad()
    def make(block: list[Path]) -> list[tuple[VisualInput, Tensor]]:
        visuals = [backbone.prepare(load_image(path)) for path in block]
        features = backbone.embed_images(visuals)
        bare = [v._replace(pixels=v.pixels.new_empty(0)) for v in visuals]
        return [(v, made.clone()) for v, made in zip(bare, features, strict=True)]

    return BlockMemo(make, paths)


def frame_memo(side: int) -> Memo[np.ndarray]:
    """Pictures in the segmenter's frame, uint8 (side, side, 3)."""

    def make(path: Path) -> np.ndarray:
        image = load_image(path)
        return to_frame(image, Frame.fit((image.shape[0], image.shape[1]), side))

    return Memo(make)


def target_grid(
    rles: Sequence[Rle], hw: tuple[int, int], side: int, grid: int
) -> Float[Tensor, "N grid grid"]:
    """Share of every grid cell that each target covers, in the segmenter's frame."""
    if not rles:
        return torch.zeros(0, grid, grid)
    stack = torch.from_numpy(np.stack([decode(rle) for rle in rles]))
    return masks_to_grid(stack, Frame.fit(hw, side), grid)


DENSE_TARGETS: dict[str, int] = {  # what the vision tower learns to tell of every map cell
    "here_category": len(CATEGORIES) + 1,  # of the thing whose middle lies in the cell
    "here_colour": len(COLOURS),
    "here_size": len(SIZES),
    "here_texture": len(TEXTURES),
    "cover_category": len(CATEGORIES) + 1,  # of the thing that covers most of the cell
    "cover_colour": len(COLOURS),
    "row": MAP_SIDE,  # of the cell itself: the tower has only relative positions of its own
    "column": MAP_SIDE,
}


def dense_targets(record: ImageRecord) -> dict[str, Int[Tensor, "cells"]]:
    """Targets of :data:`DENSE_TARGETS` for the 8x8 map of one picture, in reading order.

    Attributes of cells without a thing are left out of the loss.
    """
    cells = MAP_SIDE * MAP_SIDE
    targets = {name: torch.full((cells,), IGNORED) for name in DENSE_TARGETS}
    targets["row"] = torch.arange(cells) // MAP_SIDE
    targets["column"] = torch.arange(cells) % MAP_SIDE
    targets["here_category"] = torch.full((cells,), len(CATEGORIES))
    targets["cover_category"] = torch.full((cells,), len(CATEGORIES))
    for thing in record.objects:
        cell = "abcdefgh".index(thing.cell[0]) * MAP_SIDE + int(thing.cell[1]) - 1
        for name, value in _attributes(thing).items():
            targets[f"here_{name}"][cell] = value
    side = max(record.image_hw)
    coverage = target_grid(record.masks, record.image_hw, side, MAP_SIDE).flatten(1)
    strongest, which = coverage.max(0)
    for cell in (strongest > 0.3).nonzero().flatten().tolist():
        attributes = _attributes(record.objects[int(which[cell])])
        targets["cover_category"][cell] = attributes["category"]
        targets["cover_colour"][cell] = attributes["colour"]
    return targets


def _attributes(thing: NamedObject) -> dict[str, int]:
    return {
        "category": list(CATEGORIES).index(thing.category),
        "colour": list(COLOURS).index(thing.colour),
        "size": list(SIZES).index(thing.size),
        "texture": TEXTURES.index(thing.texture),
    }


def stack_targets(
    targets: Iterable[dict[str, Int[Tensor, "cells"]]],
) -> dict[str, Int[Tensor, "n"]]:
    """One flat row of targets per name for a whole batch."""
    rows = list(targets)
    return {name: torch.cat([row[name] for row in rows]) for name in DENSE_TARGETS}
