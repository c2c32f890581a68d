"""``segcompass data``: make data sets, look them through, bring them into our layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from segcompass.apps import console
from segcompass.apps.options import AsJson, Layout
from segcompass.apps.visible import visible
from segcompass.io.progress import progress

app = typer.Typer(no_args_is_help=True, help="Make, check and convert data sets.")


@app.command()
def features(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one value of the config; repeatable."),
    ] = None,
) -> None:
    """Compute what the joint stage's frozen image encoders say, once; goes on where it stopped."""
    from segcompass.learning.planning.precompute import run_features

    print(run_features(config, overrides or []))


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write; made if it is not there.")],
    train: Annotated[
        int, typer.Option("--train", min=0, help="Questions to train on; three about each picture.")
    ] = 0,
    val: Annotated[int, typer.Option("--val", min=0, help="Questions to judge progress on.")] = 0,
    test_a: Annotated[int, typer.Option("--testA", min=0, help="Questions to test on.")] = 0,
    test_b: Annotated[
        int, typer.Option("--testB", min=0, help="Questions about combinations never trained on.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one for each core.")
    ] = None,
    sgdr: Annotated[
        bool,
        typer.Option(
            "--sgdr", help="Also sort questions by ReasonSeg-SGDR's four dimensions (Parquet)."
        ),
    ] = False,
) -> None:
    """Draw the procedural world, in the RefCOCO, gRefCOCO and ReasonSeg layouts."""
    from segcompass.data.scenes.sgdr import write_sgdr
    from segcompass.data.scenes.writer import write_scenes

    counts = {"train": train, "val": val, "testA": test_a, "testB": test_b}
    if not any(counts.values()):
        raise typer.BadParameter(
            "nothing to draw: give at least one of --train/--val/--testA/--testB"
        )
    with progress("pictures") as update:
        write_scenes(out, counts, seed, workers=workers, progress=update)
    if sgdr:
        write_sgdr(out)
    print(out)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data set.")],
    layout: Annotated[
        Layout | None, typer.Option(help="Default: found out from the files.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look a whole data set through, and list every problem; exit code 3 where there are some."""
    from segcompass.data.check import check_dataset
    from segcompass.data.findings import Sort

    with progress("pictures") as moved:
        found = check_dataset(folder, layout and layout.value, moved)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        console.print_table([console.row(split._asdict()) for split in found.splits])
        for problem in found.problems:
            told = f"{problem.sort.value}: {problem.file}: {problem.entry}: {problem.text}"
            print(visible(told))
        console.print_table([{"problem": k, "count": str(n)} for k, n in found.counts.items()])
    if Sort.UNSAFE.value in found.counts:
        raise typer.Exit(console.UNSAFE)
    if found.problems:
        raise typer.Exit(console.SOME_FAILED)


@app.command("import")
def bring_in(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="COCO file, LabelMe folder, pictures and masks.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    form: Annotated[
        str | None, typer.Option(help="coco, labelme or masks; default: found out from the files.")
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(
            help="CSV or JSON of image, instruction, targets, split; default: ask for every name."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of a COCO file's pictures, where it is elsewhere.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of questions that name none.")] = "train",
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the pictures instead of copying them.")
    ] = False,
) -> None:
    """Convert a data set of another tool into the gRefCOCO layout, which all commands read."""
    from segcompass.data.importing import import_dataset

    broken: list[str] = []

    def left_out(name: str, error: Exception) -> None:
        broken.append(name)
        console.complain(error, name)

    made = import_dataset(
        source,
        out,
        on_broken=left_out,
        form=form,
        instructions=instructions,
        images=images,
        split=split,
        link=link,
    )
    console.print_table([console.row(count._asdict()) for count in made])
    if broken:
        raise typer.Exit(console.SOME_FAILED)
