"""``segcompass compare``: several interfaces under one budget, in one table and on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from segcompass.apps import console
from segcompass.apps.options import AsJson

app = typer.Typer()


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one value of the file; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, judge and measure every arm of CONFIG.yaml with every seed; a later call goes on."""
    from segcompass.apps.compare_page import write_compare_page
    from segcompass.evaluation.comparison import flat, shown
    from segcompass.evaluation.tables import as_csv, as_markdown
    from segcompass.io.files import write_whole
    from segcompass.learning.arms import load_experiment
    from segcompass.learning.compare import compare

    experiment = load_experiment(config, overrides)
    rows = compare(experiment, console.note)
    cells = shown(rows)
    texts = {
        "json": json.dumps(rows, indent=2) + "\n",
        "md": as_markdown(cells) + "\n",
        "csv": as_csv([flat(row) for row in rows]),
    }
    for kind, text in texts.items():
        write_whole(experiment.out / f"comparison.{kind}", text)
    page = write_compare_page(experiment, rows)
    if as_json:
        print(json.dumps(rows))
    else:
        console.print_table(cells)
    console.note(f"wrote {page} and the files beside it")
