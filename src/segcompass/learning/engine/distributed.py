"""One process or many: the same code, data-parallel over the processes that torchrun starts.

The policy is sharded with FSDP2, everything else is replicated. Every rank computes the losses of
its slice of the batch as ``local sum / global count * number of ranks`` (:meth:`World.means`), so
that the mean of all ranks' gradients, which both FSDP2 and :func:`average_gradients` take, is the
gradient of one process over the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from segcompass.io.errors import ConfigError, SegCompassError

T = TypeVar("T")
_BUCKET = 1 << 25  # elements of one all-reduce; 128 MiB in fp32
_PATIENCE = timedelta(hours=6)  # while one rank writes data, the others wait


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> World:
        """The world that :func:`start` joined; without it, this process alone."""
        if not dist.is_initialized():
            return cls(0, 1, _device_of(None))
        cuda = "nccl" in dist.get_backend_config()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once: logs, models, reports."""
        return self.rank == 0

    @overload
    def sum(self, value: Tensor) -> Tensor: ...
    @overload
    def sum(self, value: float) -> float: ...
    def sum(self, value: Tensor | float) -> Tensor | float:
        """The sum over all ranks, the same on each; no gradient flows through it."""
        if not isinstance(value, Tensor):
            if self.size == 1:
                return value
            total = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(total)
            return float(total)
        result = value.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            dist.all_reduce(result)
        return result

    def gather_objects(self, value: T) -> list[T]:
        """One small Python object of each rank, in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def slice(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a global batch: contiguous, of equal size up to one."""
        return split(items, self.size)[self.rank]

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means over all ranks' values, as this rank's shares of a loss; keep the gradient.

        A share is ``size`` times this rank's part of the global mean: averaged over ranks it is
        that mean. A rank may lack names or values that others have: a name that has values nowhere
        is left out, and one that lacks them here is 0 here.
        """
        if self.size == 1:
            return {name: value.mean() for name, value in values.items() if value.numel()}
        return self.shares(values, self.totals({name: v.numel() for name, v in values.items()}))

    def totals(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sums of counts over all ranks, by name; a rank may lack names that others have."""
        found: dict[str, int] = {}
        for row in self.gather_objects(dict(counts)):
            for name, count in row.items():
                found[name] = found.get(name, 0) + count
        return found

    def shares(self, values: Mapping[str, Tensor], totals: Mapping[str, int]) -> dict[str, Tensor]:
        """What these values add to means over ``totals`` values; keeps the gradient.

        Over all parts of a rank's values they add up to :meth:`means`. Like there, a name of which
        there is nothing anywhere is left out.
        """
        nothing = torch.zeros((), device=self.device)
        return {
            name: values[name].sum() / total * self.size if name in values else nothing
            for name, total in totals.items()
            if total
        }

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def agree(self, error: SegCompassError | None) -> None:
        """Raise on every rank if any has an error: its own, or else the first of the others'."""
        errors = [found for found in self.gather_objects(error) if found is not None]
        if errors:
            raise error or errors[0]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite replicas with rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                tensor.detach().copy_(whole)


def local_ranks() -> int:
    """How many processes share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def start(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, for the duration of the block; alone without it.

    Args:
        device: cpu or cuda; by default CUDA where there is any. Ranks talk over gloo on CPUs, and
            over NCCL on GPUs, one GPU a rank.

    Raises:
        ConfigError: if there are fewer GPUs than ranks on this machine.
    """
    place = _device_of(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(0, 1, place)
        return
    if place.type == "cuda":
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise ConfigError(
                f"torchrun started rank {local} on this machine, which has {found} GPUs; "
                f"pass --nproc-per-node {found}, or train on the CPU"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place, timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    yield World.current()
    # Not after an error: the other ranks may be waiting for this one, which has to end to say so.
    dist.destroy_process_group()


def split(items: Sequence[T], parts: int) -> list[list[T]]:
    """Contiguous parts in order, of equal size up to one."""
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(ends)]


def _device_of(device: str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def average_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Replace the gradients of replicated parameters by their mean over all ranks.

    A parameter that got a gradient on some ranks only has 0 on the others; one that got none
    anywhere keeps none.
    """
    if world.size == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        buckets.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for bucket in buckets.values():
        held, elements = [bucket[0]], bucket[0].numel()
        for parameter in bucket[1:]:
            if elements + parameter.numel() > _BUCKET:
                _average(held, world)
                held, elements = [], 0
            held.append(parameter)
            elements += parameter.numel()
        _average(held, world)


@torch.no_grad()
def _average(parameters: list[Tensor], world: World) -> None:
    """One all-reduce of all gradients, with a count of the ranks that have each behind them."""
    present = torch.tensor([p.grad is not None for p in parameters])
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), present.to(gradients[0])])
    dist.all_reduce(flat)
    *sums, counts = torch.split(flat, [*(g.numel() for g in gradients), len(gradients)])
    rows = zip(parameters, gradients, sums, counts.tolist(), strict=True)
    for parameter, gradient, total, count in rows:
        gradient.copy_(total.view(gradient.shape) / world.size)
        parameter.grad = gradient if count else None
