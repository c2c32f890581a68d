"""Tokens of the SAE layer on disk, in bf16, so that a second epoch or run needs no policy pass.

One safetensors shard holds what one policy pass gave. Its name is a hash of all that the states
depend on: weights, layer, and the sequences' content. So nothing stale is ever read, an interrupted
run leaves whole shards only, and several runs may share a folder. fp16 would overflow at 65504,
which the outliers of large models exceed; bf16 has the range of fp32.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "segcompass.activations/1"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SAMPLED = 4096  # entries of every parameter that are hashed in their places
logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """States of n tokens that the SAE reads, and where each comes from."""

    states: Float[Tensor, "n D"]
    kinds: Int[Tensor, "n"]  # TokenKind, uint8

    def select(self, index: Tensor) -> Tokens:
        """Some of them, by number or by mask."""
        return Tokens(self.states[index], self.kinds[index])


def join(parts: Iterable[Tokens]) -> Tokens:
    """All tokens in order; at least one part."""
    states, kinds = zip(*parts, strict=True)
    return Tokens(torch.cat(states), torch.cat(kinds))


class ActivationCache:
    """A folder of shards.

    Args:
        folder: Made if missing.
        budget: Bytes that all shards together may take; beyond them nothing more is written.
        writers: Processes that fill the folder at the same time. Each may write an equal part of
            what is left: none of them sees what the others write.
    """

    def __init__(self, folder: Path, budget: int, writers: int = 1) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self.room = (budget - there) // writers

    def read(self, key: str, width: int) -> Tokens | None:
        """The tokens of a shard; None where there is none, or it is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tokens = Tokens(file.get_tensor("states"), file.get_tensor("kinds"))
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); its states are computed again", path, error)
            return None
        right = tokens.states.shape == (len(tokens.kinds), width)
        if not right or facts != self._facts(tokens):
            logger.warning("%s was changed; its states are computed again", path)
            return None
        return tokens

    def write(self, key: str, tokens: Tokens) -> None:
        """Store tokens in bf16, in one move; a full disk only ends the caching."""
        kept = Tokens(tokens.states.to(torch.bfloat16).contiguous(), tokens.kinds.contiguous())
        path = self._path(key)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # of this rank alone
        size = kept.states.nbytes + kept.kinds.nbytes
        if size > self.room:
            return
        try:
            save_file(dict(kept._asdict()), partial, metadata=self._facts(kept))
            partial.replace(path)
            self.room -= size
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            self.room = 0
            logger.warning("%s takes no more states (%s); going on without", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    @staticmethod
    def _facts(tokens: Tokens) -> dict[str, str]:
        buffers: list[Any] = [tokens.states.view(torch.uint8).numpy(), tokens.kinds.numpy()]
        check = zlib.crc32(buffers[1], zlib.crc32(buffers[0]))
        return {"format": FORMAT, "crc32": f"{check:08x}"}


def shard_key(*facts: str) -> str:
    """A name for exactly these facts."""
    return hashlib.sha256("\0".join((FORMAT, *facts)).encode()).hexdigest()[:40]


@torch.no_grad()
def weights_identity(module: nn.Module) -> str:
    """Changes whenever a weight does; quick enough for billions of them.

    Every parameter counts with the sum of its bit patterns, which needs one pass and no order of
    additions, and with the bytes of evenly spread entries, which a permutation would change.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().contiguous().flatten()
        words = flat.view(_WORDS[flat.element_size()])
        total = int(words.sum(dtype=torch.int64)) if len(words) else 0
        spread = words[:: max(1, len(words) // _SAMPLED)].cpu().numpy().tobytes()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {total} ".encode() + spread)
    return digest.hexdigest()
