"""Training states on disk: safetensors, one file a rank, never half written.

    state.safetensors                        one process
    state-00000200/rank-00000-of-00002.safetensors, …       several, after step 200

Every rank's file holds its rows of what is sharded, rank 0's also what is replicated. Any number
of ranks can take up what any other number wrote, as long as all see the folder. The header tells
where rows belong as `torch.distributed.checkpoint` does, whose `HuggingFaceStorageReader` opens
these folders too. It does not write them: it keeps a second copy of a state in memory meanwhile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segcompass.io.errors import CheckpointError, SegCompassError
from segcompass.learning.engine.distributed import World

_FILE = "state.safetensors"
_PARTIAL = ".partial"
_PLACES = "DCP_SHARDING_INFO"  # header entry: the first index of every tensor that is a part


class StateError(SegCompassError, OSError):
    """A training state or a log that could not be written."""


def saved_states(folder: Path) -> list[Path]:
    """All whole states in a stage's folder: the last one, and what a cut-off save left over."""
    several = [p for p in folder.glob("state-*") if p.name.removeprefix("state-").isdigit()]
    return sorted(several) + [p for p in [folder / _FILE] if p.exists()]


def latest_state(folder: Path) -> Path | None:
    """The newest state in a stage's folder; raises CheckpointError if it cannot be told."""
    return max(saved_states(folder), key=_step, default=None)


def saved_step(folder: Path) -> int:
    """Steps that the newest state in a stage's folder has taken; 0 where there is none."""
    path = latest_state(folder)
    return 0 if path is None else _step(path)


def _step(path: Path) -> int:
    if path.is_dir():
        return int(path.name.removeprefix("state-"))
    with SavedState(path) as state:
        return state.step


def write_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], starts: Mapping[str, int], world: World
) -> None:
    """Write a state in one move, then remove older ones; all ranks call it.

    Args:
        folder: Of the stage.
        step: Steps that were taken.
        tensors: This rank's; what is not sharded is alike on all ranks.
        starts: First row of this rank, for the tensors that are sharded.
        world: All ranks.

    Raises:
        StateError: on every rank, if one of them cannot write; the last state is kept.
    """
    alone = world.size == 1
    final = folder / (_FILE if alone else f"state-{step:08d}")
    partial = final.with_suffix(_PARTIAL)
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    own = {k: t.contiguous() for k, t in tensors.items() if world.is_main or k in starts}
    header = {"step": str(step), "ranks": str(world.size)}
    if not alone:
        places = {k: {"saved_offsets": _place(t, starts.get(k, 0))} for k, t in own.items()}
        header[_PLACES] = json.dumps(places)

    def prepare() -> None:
        if world.is_main and not alone:
            _remove(partial)
            partial.mkdir()

    def write() -> None:
        save_file(own, partial if alone else partial / name, metadata=header)

    def publish() -> None:
        if world.is_main:
            if not alone:
                _remove(final)  # of a run that took other steps to the same number
            partial.replace(final)
            for old in saved_states(folder):
                if old != final:
                    _remove(old)

    for action in (prepare, write, publish):
        error = None
        try:
            action()
        except (OSError, SafetensorError) as caught:
            kept = kept_state(folder)
            error = StateError(
                f"{final} cannot be written ({caught}); {kept}; make room and go on with --resume"
            )
        try:
            world.agree(error)  # also makes each rank wait for the others
        except StateError:
            if world.is_main:
                _remove(partial)
            raise


def kept_state(folder: Path) -> str:
    """What an error says about the state that is left."""
    states = saved_states(folder)
    return f"the last good state is {states[-1]}" if states else "no state was saved yet"


def _place(tensor: Tensor, start: int) -> list[int]:
    return [start, *[0] * (tensor.ndim - 1)] if tensor.ndim else []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


class SavedState:
    """An open state, whoever wrote it.

    Raises:
        CheckpointError: if it is damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = ExitStack()
        self._parts: dict[str, list[tuple[int, Any]]] = {}  # first row, and the file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.step, ranks = 0, 1
        files = sorted(path.glob("rank-*.safetensors")) if path.is_dir() else [path]
        try:
            for name in files:
                file = self._open.enter_context(safe_open(name, framework="pt"))
                header = file.metadata() or {}
                self.step, ranks = int(header["step"]), int(header.get("ranks", 1))
                places = json.loads(header.get(_PLACES, "{}"))
                for key in file.keys():  # noqa: SIM118
                    place = places.get(key, {}).get("saved_offsets", [])
                    self._add(key, place[0] if place else 0, file)
            if len(files) != ranks:
                raise ValueError(f"{len(files)} of {ranks} files are there")
        except Exception as error:
            self._open.close()
            raise self._damaged(error) from error

    def _add(self, key: str, start: int, file: Any) -> None:
        rows, *rest = file.get_slice(key).get_shape() or [None]
        self._parts.setdefault(key, []).append((start, file))
        known = self.shapes.get(key, (0,))[0]
        self.shapes[key] = () if rows is None else (max(known, start + rows), *rest)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows from the first of ``rows`` up to the second."""
        try:
            if not self.shapes[key]:
                tensor = self._parts[key][0][1].get_tensor(key)
                assert isinstance(tensor, Tensor)
                return tensor
            first, last = rows or (0, self.shapes[key][0])
            found = []
            for start, file in sorted(self._parts[key], key=lambda part: part[0]):
                piece = file.get_slice(key)
                end = start + piece.get_shape()[0]
                low, high = max(first, start), min(last, end)
                if low < high:
                    found.append(piece[low - start : high - start])
            return torch.cat(found) if found else torch.empty(0, *self.shapes[key][1:])
        except (SafetensorError, OSError, KeyError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no training state or damaged ({error}); delete it to start anew"
        )

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.close()
