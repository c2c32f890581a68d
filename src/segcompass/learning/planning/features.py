"""Image features and keys of the frozen encoders: computed once, on disk, checked when read.

    FOLDER/index-RANK.json                what the shards of this rank hold, with their hashes
    FOLDER/RANK-NUMBER.safetensors        bf16 tensors, named by content

A tensor's name is the SHA-256 of the picture's bytes followed by the fingerprint of the encoder
that made it: its weights, its sizes and its preprocessing. A changed picture or another encoder
therefore finds nothing instead of something wrong. Shards appear in one move, and the index tells
of them only afterwards, so a run that is cut off leaves whole shards, and the next one goes on.
`precompute.py` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from segcompass.grounding.image_encoder import PIXEL_MEAN, PIXEL_STD, ImageEncoder
from segcompass.io import archives
from segcompass.io.errors import ConfigError, DataError, ImageError
from segcompass.io.files import read_object
from segcompass.reasoning.backbones import Backbone

FORMAT = "segcompass.features/1"
REMEDY = "run `segcompass data features CONFIG` to make what is missing"


class Entry(NamedTuple):
    """Where a tensor lies, and the SHA-256 of its bytes."""

    shard: Path
    sha256: str


class ImageFeatures(NamedTuple):
    """Both encoders' results by the picture's path, to be called like `corpus.BlockMemo`."""

    features: StoredTensors  # (n, D), for `Backbone.cached_image_arguments`
    keys: StoredTensors  # (C, h, w)


# Fingerprints ----------------------------------------------------------------------------------


def feature_fingerprint(backbone: Backbone) -> str:
    """Names everything that the policy's image features depend on, apart from the picture."""
    config: Any = backbone.model.config
    settings = {
        "vision": _settings(config.vision_config),
        "layer": getattr(config, "vision_feature_layer", None),
        "processor": _settings(backbone.image_processor),
        "pad_square": backbone.pad_square,
        "stretch_to": backbone.stretch_to,
    }
    return _fingerprint("features", backbone.vision, settings)


def key_fingerprint(encoder: ImageEncoder) -> str:
    """Names everything that the image keys depend on, apart from the picture."""
    settings = {
        "vision": _settings(encoder.vision_encoder.config),
        "pixels": [encoder.side, PIXEL_MEAN, PIXEL_STD],
    }
    return _fingerprint("keys", encoder.vision_encoder, settings)


def _fingerprint(kind: str, module: nn.Module, settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {kind} {json.dumps(settings, sort_keys=True)}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def _settings(described: Any) -> dict[str, Any]:
    """A config of transformers, less what tells of its file and not of the encoder."""
    beside = {"dtype", "transformers_version", "architectures", "_name_or_path"}
    return {k: v for k, v in json.loads(described.to_json_string()).items() if k not in beside}


def raw_bytes(tensor: Tensor) -> Any:
    """The tensor's memory, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def picture_bytes(path: Path) -> bytes:
    """A picture file as it is, on disk or in an archive; raises ImageError if it cannot be read."""
    try:
        return archives.read_bytes(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error})") from error


def name_of(picture: bytes, fingerprint: str) -> str:
    """The name of what an encoder makes of a picture file."""
    return hashlib.sha256(picture + fingerprint.encode()).hexdigest()


# Reading ---------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Entry]:
    """Every tensor of the shards that are there whole, by name.

    Raises:
        DataError: if an index is damaged, or of another format.
    """
    return {
        name: Entry(folder / shard, sha256)
        for index in sorted(folder.glob("index-*.json"))
        for shard, told in read_shards(index).items()
        if is_whole(folder / shard, told)
        for name, sha256 in told["tensors"].items()
    }


def read_shards(index: Path) -> dict[str, Any]:
    """What an index tells of its shards: bytes, and the SHA-256 of every tensor."""
    way_out = f"delete it, and {REMEDY}"
    content = read_object(index, way_out)
    if content.get("format") != FORMAT:
        raise DataError(
            f"{index} has format {content.get('format')!r}, this reads {FORMAT!r}; {way_out}"
        )
    try:
        shards: dict[str, Any] = content["shards"]
        for told in shards.values():
            told["bytes"], told["tensors"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({error!r}); {way_out}") from error
    return shards


def is_whole(shard: Path, told: Mapping[str, Any]) -> bool:
    """Whether a shard is there, as long as it was written."""
    return shard.is_file() and shard.stat().st_size == told["bytes"]


class StoredTensors:
    """Reads one encoder's tensors, memory-mapped; a tensor's hash is checked when first read.

    Args:
        index: From :func:`read_index`.
        fingerprint: Of the encoder.
        device: Where the tensors are wanted.
    """

    def __init__(
        self, index: Mapping[str, Entry], fingerprint: str, device: torch.device | str = "cpu"
    ) -> None:
        self.index, self.fingerprint, self.device = index, fingerprint, device
        self.names: dict[Path, str] = {}
        self.open: dict[Path, Any] = {}
        self.checked: set[str] = set()

    def __call__(self, path: Path) -> Tensor:
        """The picture's tensor in bf16.

        Raises:
            DataError: if it was never computed with this encoder, or the shard is damaged.
        """
        name = self.name(path)
        if name not in self.index:
            raise DataError(f"{path} has no features of this encoder, or has changed; {REMEDY}")
        entry = self.index[name]
        try:
            if entry.shard not in self.open:
                self.open[entry.shard] = safe_open(entry.shard, framework="pt")
            tensor: Tensor = self.open[entry.shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{entry.shard} is damaged ({error}); delete it, and {REMEDY}"
            ) from error
        if name not in self.checked:
            if hashlib.sha256(raw_bytes(tensor)).hexdigest() != entry.sha256:
                raise DataError(
                    f"{entry.shard}: the tensor of {path} is not what was written; "
                    f"delete the file, and {REMEDY}"
                )
            self.checked.add(name)
        return tensor.to(self.device)

    def name(self, path: Path) -> str:
        """The name of a picture's tensor; the file is read once."""
        if path not in self.names:
            self.names[path] = name_of(picture_bytes(path), self.fingerprint)
        return self.names[path]

    def missing(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Pictures whose tensor is not there."""
        return (path for path in dict.fromkeys(paths) if self.name(path) not in self.index)


def open_features(
    folder: Path,
    backbone: Backbone,
    encoder: ImageEncoder,
    paths: Iterable[Path],
    device: torch.device | str = "cpu",
) -> ImageFeatures:
    """Open what `write_features` wrote with these very encoders, before the policy is sharded.

    Args:
        folder: ``data.features``.
        backbone: The policy's, whole.
        encoder: Of the segmenter.
        paths: Pictures that will be asked for.
        device: Where the tensors are wanted.

    Raises:
        ConfigError: if the folder holds nothing.
        DataError: if a picture is not in it, naming the first.
    """
    index = read_index(folder)
    if not index:
        raise ConfigError(f"{folder} holds no image features; {REMEDY}, or take data.features out")
    made = feature_fingerprint(backbone), key_fingerprint(encoder)
    stored = ImageFeatures(*(StoredTensors(index, mark, device) for mark in made))
    wanted = list(paths)
    for what, tensors in zip(("features", "keys"), stored, strict=True):
        lacking = list(tensors.missing(wanted))
        if lacking:
            raise DataError(
                f"{folder} lacks the image {what} of {len(lacking)} of {len(set(wanted))} "
                f"pictures, first {lacking[0]}: never made, or with other weights, or the picture "
                f"has changed; {REMEDY}"
            )
    return stored


def limit_pixels(backbone: Backbone, limits: tuple[int, int] | None) -> None:
    """Set the least and most pixels of a picture as the policy sees it (``data.image_pixels``).

    The image processor is saved with the policy, so a finished model keeps them.

    Raises:
        ConfigError: if the policy sees every picture at one size.
    """
    if limits is None:
        return
    processor: Any = backbone.image_processor
    if not hasattr(processor, "merge_size"):
        raise ConfigError(
            "data.image_pixels is for Qwen policies; this one sees every picture at one size"
        )
    processor.size = type(processor.size)(shortest_edge=limits[0], longest_edge=limits[1])
