"""How the commands speak: results on stdout, everything else on stderr, one table of exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from segcompass.apps.visible import visible
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import SegCompassError, UnsafeFileError

FAILED, USAGE, SOME_FAILED, ASSET_MISSING, UNSAFE, INTERRUPTED = 1, 2, 3, 4, 5, 130
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, INTERRUPTED),
    (UnsafeFileError, UNSAFE),
    (MissingAssetError, ASSET_MISSING),
    (SegCompassError, FAILED),
    (OSError, FAILED),
    (ValueError, FAILED),
)


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is a person's to mend, or None for a bug of ours."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)


def complain(error: BaseException, source: str | None = None) -> None:
    """Say on stderr what was wrong, what was found, and the way out.

    Args:
        error: what happened.
        source: the input it happened to, where the message does not name it itself.
    """
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted; what was finished is kept"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    if source is not None and source not in text:
        text = f"{source}: {text}"
    print(f"error: {visible(text)}", file=sys.stderr)


class CommandGroup(TyperGroup):
    """Commands whose known errors end in one line and an exit code; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see EXIT_CODES for what its errors become."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            code = exit_code(error)
            if code is None or getattr(error, "errno", None) == errno.EPIPE:
                raise
            if os.environ.get("SEGCOMPASS_DEBUG"):
                traceback.print_exc()
            complain(error)
            raise typer.Exit(code) from error


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of equal keys on stdout; wide enough to stay whole in a file or a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text: brackets are no markup
        table.add_row(*(Text(visible(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def listing(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Nested facts as rows of name and value, names joined by dots."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            inner = listing(value)
            rows += [{"name": f"{name}.{row['name']}", "value": row["value"]} for row in inner]
        else:
            rows.append({"name": str(name), "value": _shown(value)})
    return rows


def row(facts: Mapping[str, Any]) -> dict[str, str]:
    """Flat facts as one row of a table."""
    return {name: _shown(value) for name, value in facts.items()}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return " – ".join(map(_shown, value)) if len(value) == 2 else ", ".join(map(_shown, value))
    return str(value)


def note(text: str) -> None:
    """Tell a person at a terminal; silent otherwise."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
