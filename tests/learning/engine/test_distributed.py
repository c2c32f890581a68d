"""What ranks tell each other, and that the mean of their gradients is that of one process."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import launch
from torch import Tensor, nn

from segcompass.io.errors import ConfigError, SegCompassError
from segcompass.learning.engine import distributed
from segcompass.learning.engine.distributed import World, average_gradients, start

ALONE = World(0, 1, torch.device("cpu"))


@given(st.integers(0, 40), st.integers(1, 9))
def test_slices_are_a_fair_cut(count: int, size: int) -> None:
    items = list(range(count))
    parts = [World(rank, size, torch.device("cpu")).slice(items) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_a_world_of_its_own() -> None:
    assert "RANK" not in os.environ
    with start("cpu") as world:
        assert world == ALONE and world.is_main
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert ALONE.sum(3) == 3 and ALONE.gather_objects("a") == ["a"]
    assert torch.equal(ALONE.sum(values), values) and not ALONE.sum(values).requires_grad
    mean = ALONE.means({"values": values})["values"]
    assert mean.item() == 3.0 and mean.requires_grad
    assert ALONE.means({"none": torch.tensor([])}) == {}
    parts = [ALONE.shares({"a": part}, {"a": 3, "b": 2, "none": 0}) for part in values.split(2)]
    assert [{k: v.item() for k, v in p.items()} for p in parts] == [
        {"a": 1, "b": 0},
        {"a": 2, "b": 0},
    ]
    ALONE.barrier()
    ALONE.agree(None)
    with pytest.raises(SegCompassError, match="full"):
        ALONE.agree(SegCompassError("full"))


def test_more_ranks_than_gpus_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ConfigError, match=r"rank 3 .* has 2 GPUs; pass --nproc-per-node 2"),
        start("cuda"),
    ):
        pass


# Three ranks. What rank r holds is said by functions, so that the expected values below come from
# the whole, not from what the ranks sent.
RANKS = 3


def talk() -> dict[str, Any]:
    with start("cpu") as world:
        rank, told = world.rank, {}
        told["world"] = (world == World.current(), world.rank, world.size, world.device.type)
        told["sum"] = (world.sum(rank + 0.25), world.sum(torch.full((2, 3), rank).t()).tolist())
        told["objects"] = world.gather_objects({"rank": rank})
        copied = nn.Parameter(torch.full((2, 3), float(rank)).t())  # not contiguous
        world.copy_from_main([copied])
        told["copied"] = copied.tolist()
        world.agree(None)
        errors = []
        for broken in ({1}, {0, 2}):
            try:
                world.agree(SegCompassError(f"rank {rank}") if rank in broken else None)
            except SegCompassError as error:
                errors.append(str(error))
        told["errors"] = errors
        told["means"] = means(world)
        told["gradients"] = gradients(world)
        world.barrier()
    return {**told, "left": torch.distributed.is_initialized()}


def test_ranks_tell_each_other() -> None:
    found = launch(talk, RANKS)
    for rank, told in enumerate(found):
        assert told["world"] == (True, rank, RANKS, "cpu") and not told["left"]
        assert told["sum"] == (3.75, [[3, 3]] * 3)
        assert told["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert told["copied"] == [[0.0, 0.0]] * 3
        assert told["errors"] == ["rank 1", f"rank {rank}" if rank in {0, 2} else "rank 0"]
    check_means([told["means"] for told in found])
    check_gradients([told["gradients"] for told in found])


# Per name, the values of each rank.
SHARES: dict[str, list[list[float]]] = {
    "uneven": [[1.0, 2.0], [6.0], [4.0, 4.0, 1.0]],
    "one has none": [[], [2.0], [5.0]],
    "empty": [[], [], []],
}
ONLY_ON_1 = [3.0, 5.0]


def means(world: World) -> dict[str, tuple[float, float]]:
    """Of every name: this rank's share of the mean, and the gradient of a factor it has."""
    factor = nn.Parameter(torch.tensor(2.0))
    values = {name: factor * torch.tensor(shares[world.rank]) for name, shares in SHARES.items()}
    if world.rank == 1:
        values["one has it"] = factor * torch.tensor(ONLY_ON_1)
    result = {}
    for name, mean in world.means(values).items():
        slope = torch.autograd.grad(mean, factor)[0] if mean.requires_grad else torch.tensor(0.0)
        result[name] = (mean.item(), slope.item())
    return result


def check_means(found: list[dict[str, tuple[float, float]]]) -> None:
    """Averaged over ranks, values and gradients are those of all values in one process."""
    whole = {name: [*chain(*shares)] for name, shares in SHARES.items()} | {"one has it": ONLY_ON_1}
    for name, values in whole.items():
        if not values:
            assert all(name not in means for means in found)
            continue
        mean = sum(values) / len(values)
        assert sum(means[name][0] for means in found) / RANKS == pytest.approx(2 * mean)
        assert sum(means[name][1] for means in found) / RANKS == pytest.approx(mean)


PRESENT = [(0, 1, 2), (1,), (), (0, 2)]  # of four parameters, the ranks that have a gradient


def gradient_of(parameter: int, rank: int) -> Tensor:
    return torch.full((3, parameter + 1), 10.0 * parameter + rank)


def gradients(world: World) -> list[Any]:
    """After averaging: in one bucket and in many; the second parameter is transposed in memory."""
    result = []
    for bucket in (1 << 20, 5):
        distributed._BUCKET = bucket  # in this process only
        parameters = [nn.Parameter(torch.zeros(3, i + 1)) for i in range(len(PRESENT))]
        parameters[1] = nn.Parameter(torch.zeros(2, 3).t())
        parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
        for i, ranks in enumerate(PRESENT):
            if world.rank in ranks:
                parameters[i].grad = gradient_of(i, world.rank)
        parameters[-1].grad = torch.tensor([1e-12, 1.0], dtype=torch.float64) * world.rank
        average_gradients(parameters, world)
        result.append([None if p.grad is None else p.grad.tolist() for p in parameters])
    return result


def check_gradients(found: list[list[Any]]) -> None:
    expected: list[Any] = []
    for i, ranks in enumerate(PRESENT):
        total = sum((gradient_of(i, rank) for rank in ranks), torch.zeros(3, i + 1))
        expected.append((total / RANKS) if ranks else None)
    expected.append(torch.tensor([1e-12, 1.0], dtype=torch.float64))  # (0 + 1 + 2) / 3
    for of_rank in found:
        for of_bucket in of_rank:
            for mean, right in zip(of_bucket, expected, strict=True):
                assert (mean is None) == (right is None)
                if right is not None:
                    torch.testing.assert_close(torch.tensor(mean, dtype=right.dtype), right)
