"""Hidden states of the frozen policy as a stream of shuffled tokens, within a bounded buffer.

    group    some sequences that go through the policy together: one pass, states by its own tap
    chunk    some groups, about half a buffer of tokens
    block    the second half of a shuffled chunk and the first half of the next one, shuffled again;
             serves a fixed number of steps

So tokens of some thousand sequences mix in every batch, each token is served once an epoch, and
what step s gets is a pure function of (seed, rank, s): a resumed run recomputes two chunks and goes
on. Nothing else is kept, unless all states fit into the buffer anyway, or a cache folder is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.interfaces.concept_slots import read_by_sae
from segcompass.io.errors import DataError
from segcompass.io.progress import Update
from segcompass.learning.activations.cache import (
    ActivationCache,
    Tokens,
    join,
    shard_key,
    weights_identity,
)
from segcompass.learning.activations.sources import Row, Source, pixels_of
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import ReasoningBatch, TokenKind


class Group(NamedTuple):
    """Sequences of one source that go through the policy together."""

    source: int
    positions: tuple[int, ...]


class Groups:
    """The order in which groups are read, again and again, and the held-out ones.

    Args:
        counts: Sequences of each source, one or two of them.
        share: How often the second source's turn comes, in [0, 1].
        size: Sequences in a group.
        held_out: Sequences to hold out, by shares; of a small source no more than a third.
    """

    def __init__(self, counts: Sequence[int], share: float, size: int, held_out: int) -> None:
        self.share = share
        self.training: list[list[Group]] = []
        self.held_out: list[Group] = []
        for source, count in enumerate(counts):
            part = (1 - share, share)[source] if len(counts) > 1 else 1.0
            wanted = math.ceil(held_out * part)
            cut = count - min(wanted, max(1, count // 3), count - 1)
            self.training.append(_cut(source, 0, cut, size))
            self.held_out += _cut(source, cut, count, size)
        if not self.held_out:  # a single sequence, or none is wanted
            self.held_out = self.training[-1][:1]

    def __len__(self) -> int:
        """Groups of one epoch."""
        return sum(map(len, self.training))

    def at(self, number: int) -> Group:
        """The training group at any place of the endless order."""
        if len(self.training) == 1:
            return self.training[0][number % len(self.training[0])]
        seconds, after = (math.floor(self.share * n) for n in (number, number + 1))
        source, turn = (1, seconds) if after > seconds else (0, number - seconds)
        return self.training[source][turn % len(self.training[source])]


def _cut(source: int, start: int, end: int, size: int) -> list[Group]:
    return [
        Group(source, tuple(range(first, min(first + size, end))))
        for first in range(start, end, size)
    ]


class StateReader:
    """States of groups, from memory, from the cache, or by an ordinary policy pass.

    Args:
        policy: Frozen.
        sources: What the groups' positions refer to.
        cache: Shards of an earlier epoch or run. With a cache, states are rounded to bf16 always,
            so that a run that fills it equals one that reads it.
        memory: Tokens that may be remembered.
        mask_control: Leave out the states of control tokens.
    """

    def __init__(
        self,
        policy: Policy,
        sources: Sequence[Source],
        cache: ActivationCache | None = None,
        memory: int = 0,
        *,
        mask_control: bool = True,
    ) -> None:
        self.policy, self.sources, self.cache = policy, sources, cache
        self.room, self.mask_control = memory, mask_control
        self._kept: dict[Group, Tokens] = {}
        self._policy_identity = ""
        if cache is not None:
            processor = str(policy.backbone.image_processor.to_dict())
            self._policy_identity = weights_identity(policy) + processor

    def read(self, group: Group) -> Tokens:
        """The tokens that the SAE reads, on the host, outliers included."""
        if group in self._kept:
            return self._kept[group]
        tokens = self._cached(group) if self.cache is not None else self._computed(group)
        if len(tokens.kinds) <= self.room:
            self.room -= len(tokens.kinds)
            self._kept[group] = tokens
        return tokens

    def forget(self) -> None:
        """Give the memory back, and remember nothing from now on."""
        self._kept.clear()
        self.room = 0

    def readable(self, sequences: Sequences, states: ReasoningBatch) -> Bool[Tensor, "B L"]:
        """The tokens whose states the SAE learns from, and is judged by.

        Control tokens stand in every prompt, in the same places: what the SAE spent on them would
        tell nothing of a picture or a question. Image tokens share an id and are no such tokens.
        In use the SAE reads all of :func:`read_by_sae`.
        """
        readable = read_by_sae(states)
        if not self.mask_control:
            return readable
        control = torch.tensor(self.policy.prompt.control_ids, device=sequences.ids.device)
        is_image = states.token_kinds == TokenKind.IMAGE
        return readable & (is_image | ~torch.isin(sequences.ids, control))

    def batch(self, group: Group) -> tuple[Sequences, list[Row]]:
        """The group's sequences; no rows where none can be used."""
        rows = self.sources[group.source].rows(group.positions)
        return self.policy.pad([row.encoded for row in rows]) if rows else _NOTHING, rows

    def _cached(self, group: Group) -> Tokens:
        assert self.cache is not None
        source = self.sources[group.source]
        facts = [source.identity(position) for position in group.positions]
        read = f"layer {self.policy.config.sae_layer}, control masked: {self.mask_control}"
        key = shard_key(self._policy_identity, read, *facts)
        tokens = self.cache.read(key, self.policy.width)
        if tokens is None:
            tokens = self._computed(group)
            tokens = tokens._replace(states=tokens.states.to(torch.bfloat16))
            self.cache.write(key, tokens)
        return tokens

    @torch.no_grad()
    def _computed(self, group: Group) -> Tokens:
        sequences, rows = self.batch(group)
        if not rows:
            nothing = torch.empty(0, self.policy.width, dtype=self.policy.model.dtype)
            return Tokens(nothing, torch.empty(0, dtype=torch.uint8))
        states, _ = self.policy(sequences, pixels_of(rows))
        readable = self.readable(sequences, states)
        kinds = states.token_kinds[readable].to(torch.uint8)
        return Tokens(states.sae_states[readable].cpu(), kinds.cpu())


_NOTHING = Sequences(torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0, dtype=torch.long))


class Statistics(NamedTuple):
    """What is measured of the states before training."""

    mean: Float[Tensor, "D"]
    spread: float  # mean distance from the mean
    norm: float  # mean norm
    median_norm: float  # of all tokens, outliers included
    tokens: float  # of a group, outliers left out

    def is_usual(self, states: Tensor, outliers: float | None) -> Tensor:
        """Which states are no outliers: norm within ``outliers`` times the median."""
        norms = states.float().norm(dim=-1)
        limit = float("inf") if outliers is None else outliers * self.median_norm
        usual: Tensor = norms <= limit
        return usual


def measure(reader: StateReader, groups: Groups, outliers: float | None, tokens: int) -> Statistics:
    """Mean, scale and density of the states, from the first groups with at least ``tokens``.

    Raises:
        DataError: if there is no token to be read.
    """
    parts: list[Tokens] = []
    found = 0
    while len(parts) < len(groups) and found < tokens:
        parts.append(reader.read(groups.at(len(parts))))
        found += len(parts[-1].kinds)
    if not found:
        raise DataError("no sequence could be read; see the warnings above, and check the data")
    states = join(parts).states.float()
    norms = states.norm(dim=-1)
    rough = Statistics(states[0], 0.0, 0.0, float(norms.median()), 0.0)
    usual = rough.is_usual(states, outliers)
    states = states[usual]
    mean = states.double().mean(0).float()
    return rough._replace(
        mean=mean,
        spread=float((states - mean).norm(dim=-1).mean()),
        norm=float(norms[usual].mean()),
        tokens=len(states) / len(parts),
    )


class StreamPlan(NamedTuple):
    """Sizes of a stream; see the top of this file."""

    groups: int  # in a chunk
    steps: int  # that a block serves
    batch: int  # tokens of a step, on this rank
    limit: int  # tokens of a chunk; more are dropped
    shuffle: bool


def plan_stream(
    groups: int, tokens: float, *, buffer: int, batch: int, shuffle: bool
) -> StreamPlan:
    """Chunks of half a buffer, or of the whole set where that is smaller.

    Args:
        groups: of one epoch.
        tokens: of a group, on average.
        buffer: most tokens held at once.
        batch: tokens of a step, on this rank.
        shuffle: mix the tokens of different sequences.
    """
    chunk = max(1, min(groups, int(buffer // 2 // tokens)))
    steps = max(1, int(chunk * tokens) // batch)
    return StreamPlan(chunk, steps, batch, buffer // 2, shuffle)


class TokenStream:
    """Batches of tokens by step number.

    Args:
        read: Tokens of the n-th group of the endless order, outliers left out.
        plan: Sizes.
        seed: Of the shuffling.
        rank, size: Which slice of the groups is this process's, and of how many.
    """

    def __init__(
        self,
        read: Callable[[int], Tokens],
        plan: StreamPlan,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.read, self.plan, self.seed, self.rank, self.size = read, plan, seed, rank, size
        self._block = -1
        self._pool: Tokens | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._late: tuple[int, Tokens] | None = None  # second half of a chunk, with its number
        self._tell: Update = lambda done, total, note="": None

    def batch(self, step: int) -> Tokens:
        """The tokens of a step; cheapest when steps are asked for in order.

        Raises:
            DataError: if the sequences of this part of the stream gave no token at all.
        """
        block, turn = divmod(step, self.plan.steps)
        if block != self._block or self._pool is None:
            self._load(block)
        assert self._pool is not None
        first = turn * self.plan.batch
        return self._pool.select(torch.from_numpy(self._order[first : first + self.plan.batch]))

    def fill(self, step: int, tell: Update) -> None:
        """Make what a step needs ready beforehand, and tell how far that is."""
        self._tell, silent = tell, self._tell
        self.batch(step)
        self._tell = silent

    def _load(self, block: int) -> None:
        self._pool = None  # before the next one takes its room
        if self.plan.shuffle:
            late = self._late[1] if self._late and self._late[0] == block else None
            self._late = None
            late = self._halves(block)[1] if late is None else late
            early, following = self._halves(block + 1)
            pool = join([late, early])
            self._late = (block + 1, following)
        else:
            pool = self._chunk(block)
        count = len(pool.kinds)
        if not count:
            raise DataError(
                "a whole part of the data gave no token; see the warnings above, "
                "and check that pictures and texts are there"
            )
        self._block, self._pool = block, pool
        self._order = np.concatenate(list(self._orders(block, count)))

    def _orders(self, block: int, count: int) -> Iterator[np.ndarray]:
        """Permutations of the pool until the block's steps are served."""
        wanted = self.plan.steps * self.plan.batch
        for turn in range(-(-wanted // count)):
            if self.plan.shuffle:
                random = np.random.default_rng((self.seed, self.rank, block, turn))
                yield random.permutation(count)
            else:
                yield np.arange(count)

    def _halves(self, chunk: int) -> tuple[Tokens, Tokens]:
        tokens = self._chunk(chunk)
        count = len(tokens.kinds)
        random = np.random.default_rng((self.seed, self.rank, chunk))
        order = torch.from_numpy(random.permutation(count))
        return tokens.select(order[: count // 2]), tokens.select(order[count // 2 :])

    def _chunk(self, number: int) -> Tokens:
        first = (number * self.size + self.rank) * self.plan.groups
        parts = []
        for i in range(self.plan.groups):
            parts.append(self.read(first + i))
            self._tell(i + 1, self.plan.groups)
        tokens = join(parts)
        excess = len(tokens.kinds) - self.plan.limit
        if excess <= 0:
            return tokens
        random = np.random.default_rng((self.seed, self.rank, number, 0, 0))
        kept = random.permutation(len(tokens.kinds))[: self.plan.limit]
        return tokens.select(torch.from_numpy(np.sort(kept)))
