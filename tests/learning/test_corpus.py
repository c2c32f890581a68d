"""What training reads: dense targets, coverage grids, and the memory of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import launch
from tiny import policy_config, tiny_qwen_policy
from torch import Tensor

from segcompass.data.samples import ImageRecord, read_dataset, read_images
from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES
from segcompass.io.masks import encode
from segcompass.learning.config import DataConfig
from segcompass.learning.corpus import (
    DENSE_TARGETS,
    IGNORED,
    BlockMemo,
    Memo,
    dense_targets,
    feature_memo,
    frame_memo,
    read_pictures,
    read_samples,
    stack_targets,
    target_grid,
    visual_memo,
)
from segcompass.learning.engine.distributed import World, start
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import load_policy
from segcompass.types import NamedObject

T = TypeVar("T")

NOTHING = len(CATEGORIES)
CATEGORY, COLOUR = list(CATEGORIES).index, list(COLOURS).index


def rectangle(rows: slice, columns: slice, hw: tuple[int, int] = (32, 32)) -> np.ndarray:
    mask = np.zeros(hw, dtype=bool)
    mask[rows, columns] = True
    return mask


def handmade() -> ImageRecord:
    """A mug that fills cell b3, and a hat whose middle is in f6 but that covers f5 and g5 more.

    The picture is 32 px a side, so a cell of the 8x8 map is 4 px.
    """
    mug = NamedObject(1, "mug", "red", "small", "striped", "b3")
    hat = NamedObject(2, "hat", "blue", "large", "dotted", "f6")
    masks = (
        rectangle(slice(4, 8), slice(8, 12)),
        # f5 (rows 20-23, columns 16-19) whole; f6 a quarter: one column of four; g5 a half
        rectangle(slice(20, 24), slice(16, 21)) | rectangle(slice(24, 26), slice(16, 20)),
    )
    return ImageRecord(
        Path("p.jpg"), 1, (32, 32), (mug, hat), tuple(encode(mask) for mask in masks), ""
    )


def only(**cells: int) -> dict[int, int]:
    """{"b3": 4} as {index in reading order: 4}."""
    return {"abcdefgh".index(c[0]) * 8 + int(c[1]) - 1: value for c, value in cells.items()}


def entries(targets: torch.Tensor, empty: int) -> dict[int, int]:
    return {i: int(t) for i, t in enumerate(targets) if t != empty}


def test_dense_targets_by_hand() -> None:
    found = dense_targets(handmade())
    assert found.keys() == DENSE_TARGETS.keys()
    middle = {name: entries(found[f"here_{name}"], IGNORED) for name in ("colour", "size")}
    assert middle["colour"] == only(b3=COLOUR("red"), f6=COLOUR("blue"))
    assert middle["size"] == only(b3=list(SIZES).index("small"), f6=list(SIZES).index("large"))
    texture = entries(found["here_texture"], IGNORED)
    assert texture == only(b3=TEXTURES.index("striped"), f6=TEXTURES.index("dotted"))
    mug, hat = CATEGORY("mug"), CATEGORY("hat")
    assert entries(found["here_category"], NOTHING) == only(b3=mug, f6=hat)
    assert entries(found["cover_category"], NOTHING) == only(b3=mug, f5=hat, g5=hat)
    covering = only(b3=COLOUR("red"), f5=COLOUR("blue"), g5=COLOUR("blue"))
    assert entries(found["cover_colour"], IGNORED) == covering
    assert found["row"].view(8, 8)[5].unique().tolist() == [5]
    assert found["column"].view(8, 8)[:, 2].unique().tolist() == [2]


def test_the_thing_that_covers_most_of_a_cell_has_it() -> None:
    masks = (rectangle(slice(0, 4), slice(0, 2)), rectangle(slice(0, 4), slice(1, 4)))
    record = replace(handmade(), masks=tuple(encode(mask) for mask in masks))
    assert dense_targets(record)["cover_category"][0] == CATEGORY("hat")


def test_dense_targets_of_real_scenes_fit_their_heads(scenes_root: Path) -> None:
    records = read_images(scenes_root, "train")
    stacked = stack_targets(dense_targets(record) for record in records)
    for name, classes in DENSE_TARGETS.items():
        values = stacked[name]
        assert values.shape == (64 * len(records),)
        assert values[values != IGNORED].min() >= 0 and values.max() < classes
    middles = (stacked["here_category"] < NOTHING).sum()
    assert middles == sum(len({t.cell for t in r.objects}) for r in records)


def test_target_grid_by_hand() -> None:
    """A picture twice as wide as high: the lower half of the frame is padding."""
    mask = rectangle(slice(0, 4), slice(0, 6), hw=(8, 16))
    grid = target_grid([encode(mask)], (8, 16), side=64, grid=4)  # a cell is 4 px of the picture
    assert grid.shape == (1, 4, 4)
    assert grid[0].tolist() == [[1, 0.5, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert target_grid([], (8, 16), 64, 4).shape == (0, 4, 4)


def test_coarse_and_fine_targets_are_of_one_mask(scenes_root: Path) -> None:
    record = read_images(scenes_root, "train")[0]
    coarse, fine = (target_grid(record.masks, record.image_hw, 64, grid) for grid in (8, 32))
    pooled = torch.nn.functional.avg_pool2d(fine, 4)
    torch.testing.assert_close(pooled, coarse)


def test_a_memo_asks_once_until_its_budget_is_spent() -> None:
    asked: list[Path] = []

    def make(path: Path) -> VisualInput:
        asked.append(path)
        return VisualInput(torch.zeros(10), (1, 1), np.zeros(15))  # 40 + 120 bytes

    memo = Memo(make, budget=330)
    paths = [Path(name) for name in "abc"]
    for path in paths * 2:
        assert memo(path).pixels.shape == (10,)
    assert asked == [*paths, Path("c")]  # a and b fit, c is made anew
    assert memo(paths[0]) is memo(paths[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 4))
def test_blocks_do_not_depend_on_the_order_of_asking(asked: list[int], block: int) -> None:
    """Or a resumed run, which asks in another order, would differ in the last bits."""
    paths = [Path(str(i)) for i in range(10)]
    made: list[list[Path]] = []

    def make(members: list[Path]) -> list[tuple[Tensor, list[Path]]]:
        made.append(members)
        return [(torch.zeros(1), members) for _ in members]

    memo = BlockMemo(make, [*paths, *paths], block=block)
    for i in asked:
        start = i // block * block
        assert memo(paths[i])[1] == paths[start : start + block]
    blocks = made[1:]  # the first picture alone tells the size
    assert len(blocks) == len({i // block for i in asked})  # each is made once


def shared(count: int, budget: int) -> tuple[list[int], list[int]]:
    """What a rank makes of so many pictures in blocks of two, and what it has without asking."""
    made: list[int] = []

    def make(members: list[Path]) -> list[Tensor]:
        made.extend(int(path.stem) for path in members)
        return [torch.full((3,), float(path.stem)) for path in members]

    with start("cpu") as world:
        memo = BlockMemo(make, [Path(str(i)) for i in range(count)], block=2, budget=budget)
        memo.share(world)
        return made, [int(value[0]) for value in memo.kept.values()]


def test_ranks_share_the_making() -> None:
    """Each block is made once, beside the first picture, which tells the size; all have all."""
    ranks = launch(shared, 2, 7, 1 << 10)
    assert sorted(ranks[0][0] + ranks[1][0]) == [0, 0, *range(7)]
    assert all(sorted(held) == list(range(7)) for _, held in ranks)
    assert all(len(own) > 1 for own, _ in ranks)


class OtherDevice(World):
    """Two ranks whose device is not the host; the other one has nothing to send."""

    def slice(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def gather_objects(self, value: T) -> list[T]:
        return [value]


def test_what_is_handed_round_arrives_on_the_ranks_own_device() -> None:
    """As it was sent, it would be on the GPU of the rank that sent it."""

    def make(members: list[Path]) -> list[tuple[VisualInput, Tensor]]:
        bare = VisualInput(torch.zeros(0), (2, 2), np.zeros((4, 4)))
        return [(bare, torch.zeros(3)) for _ in members]

    memo = BlockMemo(make, [Path("a"), Path("b")])
    assert memo.share(OtherDevice(0, 2, torch.device("meta")))
    for visual, features in memo.kept.values():
        assert visual.grid == (2, 2) and isinstance(visual, VisualInput)
        assert visual.pixels.device.type == features.device.type == "meta"
    assert len(memo.kept) == 2


def test_what_does_not_fit_is_not_shared() -> None:
    assert launch(shared, 2, 7, 7 * 3 * 4 - 1) == [([0], []), ([0], [])]


def test_what_does_not_fit_is_made_one_by_one() -> None:
    paths = [Path(name) for name in "abc"]
    made: list[list[Path]] = []

    def make(members: list[Path]) -> list[Tensor]:
        made.append(members)
        return [torch.zeros(10) for _ in members]

    memo = BlockMemo(make, paths, block=2, budget=119)
    for path in (paths[0], paths[2], paths[0]):
        assert memo(path).shape == (10,)
    assert made[1:] == [[paths[0]], [paths[2]], [paths[0]]]
    assert not memo.kept


def test_image_features_are_those_of_the_policy_and_can_be_let_go(
    scenes_root: Path, tmp_path: Path
) -> None:
    """Each picture's features have memory of their own, not a view into their block."""
    policy = load_policy(tiny_qwen_policy(tmp_path / "policy"), policy_config("qwen2_5_vl"))
    paths = [record.image_path for record in read_images(scenes_root, "train")]
    visuals = visual_memo(policy.backbone)
    memo = feature_memo(policy.backbone, visuals, paths)
    with torch.no_grad():
        alone = policy.backbone.embed_images([visuals(paths[1])])[0]
    found = memo(paths[1])
    torch.testing.assert_close(found, alone)
    assert not found.requires_grad
    assert found.untyped_storage().nbytes() == found.nbytes


def test_frames_are_padded_squares(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (9, 8, 7)).save(tmp_path / "wide.png")
    frame = frame_memo(16)(tmp_path / "wide.png")
    assert frame.shape == (16, 16, 3) and frame.dtype == np.uint8
    assert (frame[:8] == (9, 8, 7)).all() and (frame[8:] == 0).all()


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_limit_and_layout_of_the_config_count(limit: int | None, scenes_root: Path) -> None:
    data = DataConfig(root=scenes_root, layout="refcoco", limit=limit)
    assert read_samples(data) == read_dataset(scenes_root, "train", layout="refcoco")[:limit]
    assert read_pictures(data) == read_images(scenes_root, "train")[:limit]
