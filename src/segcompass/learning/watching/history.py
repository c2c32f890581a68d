"""The figures of a run's log, as blocks of steps that can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Series = npt.NDArray[np.float64]


def median(values: Series) -> float:
    """Median of the values that are there; NaN, which no comparison is true of, without any."""
    real = values[np.isfinite(values)]
    return float(np.median(real)) if len(real) else math.nan


class Level(NamedTuple):
    """Mean of a block and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Series) -> Level:
        """Values that are missing (NaN) do not count; a block without any has no level (NaN)."""
        real = values[np.isfinite(values)]
        if len(real) < 2:
            return cls(float(real[0]) if len(real) else math.nan, 0.0)
        return cls(float(real.mean()), float(real.std(ddof=1)) / math.sqrt(len(real)))

    def gain(self, later: Level) -> Level:
        """The change up to ``later``."""
        return Level(later.mean - self.mean, math.hypot(self.error, later.error))


class History:
    """The figures of one phase, row by row.

    Args:
        window: Steps that are judged together; a block is half of that.
        reward_weights: Weights of form and masks in the reward; None where it is a weighted mean.
    """

    def __init__(self, window: int, reward_weights: tuple[float, float] | None = None) -> None:
        self.window, self.block = window, window // 2
        self.reward_weights = reward_weights
        self.columns: dict[str, list[float]] = {}
        self.rows = 0

    def take(self, row: Mapping[str, Any]) -> None:
        """Add a row; figures that come and go are NaN where they are missing."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        for name in numbers.keys() - self.columns.keys():
            self.columns[name] = [math.nan] * self.rows
        for name, column in self.columns.items():
            column.append(float(numbers.get(name, math.nan)))
        self.rows += 1

    def all(self, name: str) -> Series:
        """A figure over the whole phase."""
        return np.asarray(self.columns.get(name, [math.nan] * self.rows))

    def now(self, name: str) -> Series:
        """The last half window of a figure."""
        return self.all(name)[-self.block :]

    def start(self, name: str) -> Series:
        """The first half window of a figure."""
        return self.all(name)[: self.block]

    def blocks(self, name: str) -> Series:
        """Half windows side by side, (n, block), without those that overlap *now*."""
        past = self.all(name)[: self.rows - self.block]
        count = len(past) // self.block
        return past[: count * self.block].reshape(count, self.block)

    def best(self, name: str) -> Level:
        """The highest level that any earlier half window had."""
        levels = [Level.of(block) for block in self.blocks(name)]
        known = [level for level in levels if math.isfinite(level.mean)]
        return max(known, key=lambda level: level.mean, default=Level(math.nan, 0.0))

    @property
    def top(self) -> float:
        """The highest reward there is."""
        return sum(self.reward_weights) if self.reward_weights else 1.0
