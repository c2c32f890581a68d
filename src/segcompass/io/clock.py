"""Where the time goes."""

from __future__ import annotations

import time


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Note the time since the last lap."""
        now = time.perf_counter()
        self.laps[stage], self.last = now - self.last, now
