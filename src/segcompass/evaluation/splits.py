"""One split of a data set, as far as it can be read, and what of it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from segcompass.data.samples import read_dataset
from segcompass.io.errors import DataError
from segcompass.types import Sample


class Broken(NamedTuple):
    """An input that could not be judged."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}"


@dataclass(frozen=True)
class Split:
    """One split of a data set, as far as it could be read."""

    settings: dict[str, Any]  # which split of which data set
    samples: list[Sample]
    limit: int | None
    skip_broken: bool
    broken: list[Broken]

    @classmethod
    def read(
        cls,
        data: Path,
        split: str,
        *,
        layout: str | None = None,
        limit: int | None = None,
        skip_broken: bool = False,
    ) -> Split:
        """Read a split.

        Args:
            data: folder of the data set.
            split: train, val, test, testA or testB.
            layout: how the data lies on disk; None finds out.
            limit: only the first so many samples; None takes all.
            skip_broken: note what cannot be read or judged, and judge the rest.

        Raises:
            DataError: no samples, or something broken that is not to be skipped.
        """
        broken: list[Broken] = []

        def note(name: str, error: DataError) -> None:
            broken.append(Broken(name, str(error)))

        on_broken = note if skip_broken else None
        read = read_dataset(data, split, layout=layout, limit=limit, on_broken=on_broken)
        samples = _unique(read, on_broken)
        if not samples and broken:
            raise DataError(f"{data}: nothing in the split {split!r} could be read: {broken[0]}")
        if not samples:
            raise DataError(f"{data}: the split {split!r} holds no samples; choose another")
        settings = {"data": str(data), "split": split, "layout": layout}
        return cls(settings, samples, limit, skip_broken, broken)


def _unique(
    samples: Sequence[Sample], on_broken: Callable[[str, DataError], None] | None
) -> list[Sample]:
    """Samples whose id no earlier one has: rows are told apart by it."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if found.setdefault(sample.sample_id, sample) is sample:
            continue
        error = DataError(f"the sample id {sample.sample_id!r} occurs twice; mend the data set")
        if on_broken is None:
            raise error
        on_broken(sample.sample_id, error)
    return list(found.values())
