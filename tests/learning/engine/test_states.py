"""States of one process and of several: whole or not there, and readable by any number of ranks."""

from __future__ import annotations

import errno
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import launch
from torch import Tensor

from segcompass.io.errors import CheckpointError
from segcompass.learning.engine import states
from segcompass.learning.engine.distributed import World, start
from segcompass.learning.engine.states import (
    SavedState,
    StateError,
    latest_state,
    saved_states,
    write_state,
)

ALONE = World(0, 1, torch.device("cpu"))
RANKS = 3
STARTS = {"long": (0, 3, 6), "one row": (0, 1, 1)}  # rows 3, 3, 1 and 1, 0, 0: as FSDP2 cuts them


def full() -> dict[str, Tensor]:
    """What all ranks hold together."""
    return {
        "long": torch.arange(14.0).view(7, 2),
        "one row": torch.tensor([[1.5, 2.5]]),
        "replica": torch.arange(6).view(2, 3).t(),
        "scalar": torch.tensor(7.0),
    }


def local(rank: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's part, and where it starts."""
    tensors = full()
    for name, starts in STARTS.items():
        ends = (*starts[1:], len(tensors[name]))
        tensors[name] = tensors[name][starts[rank] : ends[rank]]
    return tensors, {name: starts[rank] for name, starts in STARTS.items()}


def failing(*_args: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_twice(folder: Path) -> list[str]:
    """Step 4 is saved; at step 8 the last rank's disk is full, at step 12 rank 0 cannot begin."""
    told = []
    with start("cpu") as world:
        tensors, starts = local(world.rank)
        write_state(folder, 4, tensors, starts, world)
        save, mkdir = states.save_file, Path.mkdir
        for step, rank, owner, name in (
            (8, RANKS - 1, states, "save_file"),
            (12, 0, Path, "mkdir"),
        ):
            if world.rank == rank:
                setattr(owner, name, failing)
            try:
                write_state(folder, step, tensors, starts, world)
            except StateError as error:
                told.append(str(error))
            states.save_file, Path.mkdir = save, mkdir  # type: ignore[method-assign]
    return told


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("several")
    write_state(folder, 1, full(), {}, ALONE)  # of an earlier run
    return folder, launch(save_twice, RANKS, folder)


def test_ranks_save_together_or_not_at_all(several: tuple[Path, list[list[str]]]) -> None:
    folder, told = several
    state = folder / "state-00000004"
    assert [path.name for path in folder.iterdir()] == [state.name]  # nothing old, nothing half
    assert sorted(path.name for path in state.iterdir()) == [
        f"rank-0000{rank}-of-00003.safetensors" for rank in range(RANKS)
    ]
    for of_rank in told:
        for error, step in zip(of_rank, (8, 12), strict=True):
            assert f"state-{step:08d} cannot be written" in error and "No space left" in error
            assert f"the last good state is {state}" in error


def test_a_state_of_several_ranks_is_one_state(several: tuple[Path, list[list[str]]]) -> None:
    path = latest_state(several[0])
    assert path is not None
    with SavedState(path) as state:
        assert state.step == 4
        assert state.shapes == {key: tuple(tensor.shape) for key, tensor in full().items()}
        for key, tensor in full().items():
            assert torch.equal(state.read(key), tensor)
            assert state.read(key).dtype == tensor.dtype


@given(st.data())
def test_any_rows_can_be_read(several: tuple[Path, list[list[str]]], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 7))
    last = data.draw(st.integers(first, 7))
    with SavedState(several[0] / "state-00000004") as state:
        assert torch.equal(state.read("long", (first, last)), full()["long"][first:last])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_reads_our_folders(several: tuple[Path, list[list[str]]]) -> None:
    import torch.distributed.checkpoint as dcp

    found = {key: torch.zeros_like(tensor).contiguous() for key, tensor in full().items()}
    reader = dcp.HuggingFaceStorageReader(str(several[0] / "state-00000004"))
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in full().items())


def test_one_process_replaces_what_several_wrote(
    several: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    shutil.copytree(several[0], tmp_path, dirs_exist_ok=True)
    write_state(tmp_path, 9, full(), {}, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    path = latest_state(tmp_path)
    assert path is not None
    with SavedState(path) as state:
        assert state.step == 9
        assert torch.equal(state.read("long", (2, 5)), full()["long"][2:5])


def test_the_newest_counts_when_a_kill_left_two(
    several: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    shutil.copytree(several[0], tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "state-00000004", tmp_path / "state-00000006.partial")
    newest = {3: tmp_path / "state-00000004", 5: tmp_path / "state.safetensors"}
    for step, path in newest.items():
        (tmp_path / "other").mkdir(exist_ok=True)
        write_state(tmp_path / "other", step, full(), {}, ALONE)
        (tmp_path / "other/state.safetensors").replace(tmp_path / "state.safetensors")
        assert latest_state(tmp_path) == path
        assert len(saved_states(tmp_path)) == 2


def test_what_is_missing_or_cut_is_named(
    several: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    shutil.copytree(several[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "state-00000004"
    last = folder / "rank-00002-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"state-00000004 is .* damaged .*delete it"):
        SavedState(folder)
    last.unlink()
    with pytest.raises(CheckpointError, match="2 of 3 files are there"):
        SavedState(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="0 of 1 files are there"):
        SavedState(folder)
    assert latest_state(tmp_path / "nowhere") is None


def test_a_full_disk_keeps_the_last_state(tmp_path: Path) -> None:
    """With a limit that the operating system enforces."""
    write_state(tmp_path, 2, full(), {}, ALONE)
    kept = (tmp_path / "state.safetensors").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit((len(kept) // 2, hard))
        with pytest.raises(StateError, match=r"cannot be written \(.*; the last good state is"):
            write_state(tmp_path, 4, full(), {}, ALONE)
    finally:
        limit((soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    assert (tmp_path / "state.safetensors").read_bytes() == kept
