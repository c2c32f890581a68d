"""One progress bar for everything that takes long, and the line of figures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

# What a person wants to see of a log row, most telling first: a narrow terminal cuts the end off.
_FIGURES: tuple[tuple[str, str], ...] = (
    ("loss", "loss {:.4f}"),
    ("reward", "reward {:.3f}"),
    ("reward_format", "form {:.2f}"),
    ("reward_mask", "masks {:.2f}"),
    ("iou", "IoU {:.3f}"),
    ("accuracy", "accuracy {:.3f}"),
    ("explained_variance", "explained {:.3f}"),
    ("l0", "L0 {:.1f}"),
    ("dead", "dead {:.1%}"),
    ("kl", "KL {:.3g}"),
    ("length", "{:.0f} tokens"),
)


class Update(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def summary(row: Mapping[str, Any]) -> str:
    """The figures of a log row that belong beside the bar, in one short line.

    Rows of any stage will do: what a row lacks, or has no value for, is left out. The rate counts
    ``answers`` (all ranks' sampled answers of the step) where the row has them, else steps.
    """
    shown = [text.format(row[name]) for name, text in _FIGURES if row.get(name) is not None]
    seconds = row.get("s")
    if seconds:
        done, unit = (row["answers"], "answers") if row.get("answers") else (1, "steps")
        shown.append(f"{done / seconds:.3g} {unit}/s")
    return " · ".join(shown)


@contextmanager
def progress(what: str) -> Iterator[Update]:
    """A bar on stderr, moved by calling ``(done, total)``; silent when stderr is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = Console(stderr=True)
    note_column = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # never a second line
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=note_column),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=escape(note))

        yield update
