"""`segcompass data features`: run the frozen encoders of a config over its pictures, once.

The files are described in `features.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SamModel

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.grounding.segmenters import as_sam, load_segmenter
from segcompass.io.errors import ConfigError
from segcompass.io.files import write_whole
from segcompass.io.images import load_image
from segcompass.io.progress import progress
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.fit import check_start
from segcompass.learning.planning.features import (
    FORMAT,
    feature_fingerprint,
    is_whole,
    key_fingerprint,
    name_of,
    picture_bytes,
    raw_bytes,
    read_index,
    read_shards,
)
from segcompass.learning.train import warm_policy
from segcompass.learning.train_scorer import source_of
from segcompass.model_folder import load_parts
from segcompass.reasoning.backbones import Backbone
from segcompass.reasoning.policy import Policy

SHARD_BYTES = 256 << 20


def run_features(config_path: Path, overrides: list[str], device: str | None = None) -> Path:
    """Write the image features that a config's joint stage reads; goes on where it was cut off.

    Under torchrun each rank does its part.

    Returns:
        The folder, ``data.features``.

    Raises:
        ConfigError: if the config names no folder, or an earlier stage is missing.
        DataError: if the data is missing or broken.
    """
    config = load_config(config_path, overrides)
    folder = config.data.features
    if folder is None:
        raise ConfigError(
            f"{config_path} names no folder for image features; set data.features: FOLDER, or "
            "pass --set data.features=FOLDER"
        )
    paths = [s.image_path for s in training_samples(config.data, run=config.run)]
    with start(device) as world:
        policy, sam = _encoders(config)
        policy.to(world.device)
        encoder = ImageEncoder(sam).to(world.device)
        return write_features(folder, policy.backbone, encoder, paths, world=world)


def _encoders(config: RunConfig) -> tuple[Policy, SamModel]:
    """The policy and the segmenter that the joint stage begins with; see `train.start_model`."""
    if config.train_joint.start is not None:
        check_start(source_of(config))
        parts = load_parts(config.train_joint.start, dtype=config.policy.dtype)
        return parts.policy, as_sam(parts.sam, config.train_joint.start)
    folder = config.run / "segmenter"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing; run `segcompass train segmenter` first")
    return warm_policy(config), as_sam(load_segmenter(folder), folder)


@torch.no_grad()
def write_features(
    folder: Path,
    backbone: Backbone,
    encoder: ImageEncoder,
    paths: Iterable[Path],
    *,
    world: World | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Compute features and keys of every picture that the folder does not hold yet.

    Pictures go through the encoders one at a time, so that what comes of one does not depend on
    the others. Each rank takes its part of all pictures and writes shards of its own; a run on
    another number of ranks goes on where this one stopped.

    Args:
        folder: Made if it is not there.
        backbone: The policy's, whole (before it is sharded).
        encoder: Of the segmenter.
        paths: Pictures; the same ones on every rank.
        world: The processes that work together; this one's by default.
        shard_bytes: A shard is written when it holds this much.

    Raises:
        ImageError: if a picture cannot be read.
        DataError: if an index is damaged.
    """
    world = world or World.current()
    marks = {"features": feature_fingerprint(backbone), "keys": key_fingerprint(encoder)}
    mine = list(dict.fromkeys(paths))[world.rank :: world.size]
    folder.mkdir(parents=True, exist_ok=True)
    there = set(read_index(folder))
    writer = _Writer(folder, world.rank, shard_bytes)
    try:
        with progress("image features") as update:
            for done, path in enumerate(mine, start=1):
                there.update(_encode(path, there, marks, backbone, encoder, writer))
                update(done, len(mine))
    finally:  # also what was made before Ctrl-C, or before a picture that cannot be read
        writer.flush()
    return folder


def _encode(
    path: Path,
    there: set[str],
    marks: Mapping[str, str],
    backbone: Backbone,
    encoder: ImageEncoder,
    writer: _Writer,
) -> Iterable[str]:
    """Make what is missing of one picture; returns the names of both tensors."""
    picture = picture_bytes(path)
    names = {kind: name_of(picture, mark) for kind, mark in marks.items()}
    if not there.issuperset(names.values()):
        image = load_image(path)
        if names["features"] not in there:
            made = backbone.embed_images([backbone.prepare(image)])
            writer.add(names["features"], made[0])
        if names["keys"] not in there:
            pixels, _ = encoder.preprocess([image])
            writer.add(names["keys"], encoder(pixels)[0])
    return names.values()


class _Writer:
    """Collects tensors, and writes them as shards that are there whole or not at all."""

    def __init__(self, folder: Path, rank: int, shard_bytes: int) -> None:
        self.folder, self.rank, self.shard_bytes = folder, rank, shard_bytes
        self.index = folder / f"index-{rank:05d}.json"
        self.shards: dict[str, Any] = {}
        self.number = 0
        for partial in folder.glob(f"{rank:05d}-*.partial"):  # of a run that was cut off
            partial.unlink()
        if self.index.exists():
            told = read_shards(self.index)
            self.shards = {n: told[n] for n in told if is_whole(folder / n, told[n])}
            self.number = 1 + max((int(n[6:11]) for n in told), default=-1)
        self.held: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; writes a shard when it is full."""
        self.held[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous().clone()
        if sum(t.nbytes for t in self.held.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held: the shard first, then the index that tells of it."""
        if not self.held:
            return
        shard = self.folder / f"{self.rank:05d}-{self.number:05d}.safetensors"
        self.number += 1
        partial = shard.with_suffix(".partial")
        save_file(self.held, partial)
        partial.replace(shard)
        self.shards[shard.name] = {
            "bytes": shard.stat().st_size,
            "tensors": {n: hashlib.sha256(raw_bytes(t)).hexdigest() for n, t in self.held.items()},
        }
        told = {"format": FORMAT, "shards": self.shards}
        write_whole(self.index, json.dumps(told, indent=1) + "\n")
        self.held = {}
