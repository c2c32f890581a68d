"""Promptable pretraining of a small segmenter, as SAM was trained: prompts in, masks out.

Only for segmenters without public weights, such as nano.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import SamModel

from segcompass.data.samples import ImageRecord
from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.io.masks import box, decode
from segcompass.learning.config import RunConfig
from segcompass.learning.corpus import frame_memo, read_pictures, target_grid
from segcompass.learning.engine.loop import Loop, Losses, batch_indices
from segcompass.learning.losses import dice_loss, map_bce, soft_iou
from segcompass.learning.stages import SegmenterStage
from segcompass.learning.watching.watch import stage_observers

# Which picture each prompt is for, the prompts by kind, and the masks (M, 4h, 4w) they ask for.
Prompts = tuple[Tensor, dict[str, Tensor], Float[Tensor, "M 4h 4w"]]


def train_segmenter(sam: SamModel, config: RunConfig, stage: SegmenterStage, folder: Path) -> None:
    """Teach the segmenter to complete points, boxes and coarse maps into masks."""
    records = read_pictures(config.data)
    encoder, decoder = ImageEncoder(sam).to(sam.device), MaskDecoder(sam)
    frames = frame_memo(encoder.side)
    observers = stage_observers(config, folder)
    loop = Loop(folder, "segmenter", {"sam": sam}, stage, config.seed, observers=observers)
    loop.resume()

    def losses(step: int) -> Losses:
        drawn = batch_indices(step, stage.batch, len(records), config.seed)
        chosen = loop.world.slice(drawn)
        batch = [records[i] for i in chosen]
        framed = np.stack([frames(r.image_path) for r in batch])
        pixels = encoder.normalise(framed, [Frame.fit(r.image_hw, encoder.side) for r in batch])
        rngs = [random.Random(f"{config.seed}/{step}/{i}") for i in chosen]
        keys = encoder(pixels)
        made = _prompts(batch, decoder, stage.prompts, rngs, encoder.side)
        rows, prompts, targets = moved(made, keys.device)
        kind = ("points", "boxes", "masks")[step % 3]
        shown = {name: value if name == kind else None for name, value in prompts.items()}
        logits = decoder.decode_prompts(
            keys, rows, points=shown["points"], boxes=shown["boxes"], masks=shown["masks"]
        )
        dice, bce = dice_loss(logits, targets), map_bce(logits, targets)
        iou = soft_iou((logits > 0).float() * 40 - 20, (targets > 0.5).float())
        return loop.world.means({"loss": dice + 5 * bce, "dice": dice, "iou": iou})

    loop.run(losses)


def moved(made: Prompts, device: torch.device) -> Prompts:
    """Everything on the device of the segmenter: prompts are made beside it."""
    rows, prompts, targets = made
    there = {kind: prompt.to(device) for kind, prompt in prompts.items()}
    return rows.to(device), there, targets.to(device)


def _prompts(
    batch: list[ImageRecord],
    decoder: MaskDecoder,
    count: int,
    rngs: list[random.Random],
    side: int,
) -> Prompts:
    """Pick things to prompt for, and every kind of prompt for each; a picture has its own rng."""
    rows, points, boxes, coverage, noise = [], [], [], [], []
    for row, (record, rng) in enumerate(zip(batch, rngs, strict=True)):
        scale = side / max(record.image_hw)
        picked = rng.sample(range(len(record.masks)), min(count, len(record.masks)))
        for i in picked:
            ys, xs = decode(record.masks[i]).nonzero()
            at = rng.randrange(len(ys))
            rows.append(row)
            points.append([[(xs[at] + 0.5) * scale, (ys[at] + 0.5) * scale]])
            x, y, width, height = box(record.masks[i])
            boxes.append([c * scale for c in _jitter((x, y, x + width, y + height), rng)])
        rles = [record.masks[i] for i in picked]
        coverage.append(target_grid(rles, record.image_hw, side, decoder.mask_side))
        draws = torch.Generator().manual_seed(rng.getrandbits(32))
        noise.append(torch.randn(len(picked), decoder.grid, decoder.grid, generator=draws))
    targets = torch.cat(coverage)
    prompts = {
        "points": torch.tensor(points, dtype=torch.float32),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "masks": decoder.mask_prompts(_coarse(targets, decoder.grid) + torch.cat(noise)),
    }
    return torch.tensor(rows), prompts, targets


def _jitter(
    corners: tuple[float, float, float, float], rng: random.Random
) -> tuple[float, float, float, float]:
    """Move the sides of a box by up to a tenth of its size."""
    x0, y0, x1, y1 = corners
    dx, dy = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
    return (
        x0 + rng.uniform(-dx, dx),
        y0 + rng.uniform(-dy, dy),
        x1 + rng.uniform(-dx, dx),
        y1 + rng.uniform(-dy, dy),
    )


def _coarse(targets: Float[Tensor, "M 4h 4w"], grid: int) -> Float[Tensor, "M h w"]:
    """A map at the heatmaps' resolution; with noise, what the slot mapper will deliver."""
    cells = torch.nn.functional.adaptive_avg_pool2d(targets[:, None], grid)[:, 0]
    return 8 * (cells - 0.4)
