"""Prompts for pretraining the segmenter."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import stage, write_config
from tiny import tiny_sam

from segcompass.data.samples import ImageRecord, read_images
from segcompass.geometry import Frame, boxes_to_image, points_to_image
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.io.masks import box, decode
from segcompass.learning import train_segmenter as train_segmenter_module
from segcompass.learning.config import load_config
from segcompass.learning.engine.distributed import World
from segcompass.learning.train_segmenter import _prompts, train_segmenter
from segcompass.learning.watching.watch import TensorBoard


@pytest.fixture(scope="module")
def records(scenes_root: Path) -> list[ImageRecord]:
    return read_images(scenes_root, "train")[:2]


def rngs() -> list[random.Random]:
    """One for each of the two pictures."""
    return [random.Random(0), random.Random(1)]


def test_a_picture_is_prompted_alike_in_any_batch(records: list[ImageRecord]) -> None:
    """What lets several processes take the steps of one."""
    decoder = MaskDecoder(tiny_sam())
    _, together, targets = _prompts(records, decoder, 3, rngs(), side=64)
    _, alone, target = _prompts(records[1:], decoder, 3, rngs()[1:], side=64)
    assert torch.equal(targets[3:], target)
    for kind, prompts in alone.items():
        torch.testing.assert_close(together[kind][3:], prompts)


def test_prompts_are_about_their_targets(records: list[ImageRecord]) -> None:
    decoder = MaskDecoder(tiny_sam())
    rows, prompts, targets = _prompts(records, decoder, 3, rngs(), side=64)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert targets.shape == prompts["masks"].shape == (6, 32, 32)
    for m, row in enumerate(rows.tolist()):
        frame = Frame.fit(records[row].image_hw, 64)
        x, y = points_to_image(prompts["points"][m].numpy(), frame)[0]
        hit = [i for i, rle in enumerate(records[row].masks) if decode(rle)[int(y), int(x)]]
        assert len(hit) == 1  # masks exclude each other
        mask = torch.from_numpy(decode(records[row].masks[hit[0]]))
        share = targets[m].sum() / (32 * 32)
        assert share.item() == pytest.approx(mask.float().mean().item(), abs=1e-4)
        x0, y0, x1, y1 = boxes_to_image(prompts["boxes"][m].numpy(), frame)
        left, top, width, height = box(records[row].masks[hit[0]])
        assert abs(x0 - left) <= width / 10 + 1e-3 and abs(x1 - left - width) <= width / 10 + 1e-3
        assert abs(y0 - top) <= height / 10 + 1e-3 and abs(y1 - top - height) <= height / 10 + 1e-3


def test_pictures_with_few_things_give_what_they_have(records: list[ImageRecord]) -> None:
    decoder = MaskDecoder(tiny_sam())
    rows, _, targets = _prompts(records, decoder, 99, rngs(), side=64)
    wanted = [row for row, record in enumerate(records) for _ in record.masks]
    assert rows.tolist() == wanted and len(targets) == len(wanted)


class MetaLoop:
    """Takes a step of each kind on the meta device, where tensors of the CPU are an error."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.world = World(0, 1, torch.device("meta"))

    def resume(self) -> None: ...

    def run(self, losses: Callable[[int], dict[str, torch.Tensor]]) -> None:
        for step in range(3):  # points, boxes, masks
            assert {value.device.type for value in losses(step).values()} == {"meta"}


def test_pictures_prompts_and_targets_go_where_the_segmenter_is(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_segmenter_module, "Loop", MetaLoop)
    config = load_config(write_config(tmp_path, scenes_root))
    assert config.train_segmenter is not None
    train_segmenter(tiny_sam().to("meta"), config, config.train_segmenter, tmp_path)


def test_figures_go_to_tensorboard_where_that_is_wanted(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(TensorBoard, "__call__", lambda _self, step, _row: seen.append(step))
    path = write_config(tmp_path, scenes_root, train_segmenter=stage(2, prompts=1))
    for wanted in ("false", "true"):
        config = load_config(path, [f"tensorboard={wanted}"])
        assert config.train_segmenter is not None
        train_segmenter(tiny_sam(), config, config.train_segmenter, tmp_path / wanted)
    assert seen == [1, 2]
