"""``segcompass eval``, ``calibrate``, ``tables``: judge, choose a threshold, lay side by side."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from segcompass.apps import console
from segcompass.apps.options import (
    AsJson,
    BatchSize,
    DataFolder,
    DataLayout,
    Device,
    Dtype,
    Limit,
    Model,
    Paths,
    Revision,
    Split,
    Threshold,
    load,
)
from segcompass.io.progress import Update, progress

app = typer.Typer()
NAMED = 10  # broken or missing inputs listed on the terminal; metrics.json has them all
DIAGRAMS = {
    "slots": "A slot's confidence, and matching a target",
    "presence": "The highest confidence, and there being a target",
}
MODEL_ONLY = (
    *("model", "dtype", "revision", "limit"),
    *("batch_size", "control", "force_format", "paths"),
)


class Control(StrEnum):
    """A control input: a model that really looks and reads must fail on it."""

    QUESTIONS = "shuffle-questions"
    IMAGES = "shuffle-images"


class OnError(StrEnum):
    """What to do about an input that cannot be judged."""

    STOP = "stop"
    SKIP = "skip"


class Benchmark(StrEnum):
    """Whose published results to show."""

    REFCOCO = "refcoco"
    GREFCOCO = "grefcoco"
    REASONSEG = "reasonseg"


@app.command("eval")
def evaluate(
    context: typer.Context,
    data: DataFolder,
    split: Split,
    model: Model = "nano",
    predictions: Annotated[
        Path | None,
        typer.Option(help="Judge this file instead: JSONL of ours, or COCO results."),
    ] = None,
    layout: DataLayout = None,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows, figures and samples.html; a later run goes on there."),
    ] = None,
    batch_size: BatchSize = 32,
    control: Annotated[
        Control | None, typer.Option(help="Give another picture's question, or another picture.")
    ] = None,
    force_format: Annotated[
        bool, typer.Option("--force-format", help="Hold the answer to its form.")
    ] = False,
    paths: Annotated[
        Paths, typer.Option(help="Make the slot queries of tokens alone, concepts alone, or both.")
    ] = Paths.BOTH,
    threshold: Threshold = None,
    on_error: Annotated[
        OnError, typer.Option(help="skip: name broken samples, judge the rest, exit with 3.")
    ] = OnError.STOP,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Measure a model, or a file of predictions, on a data set; torchrun shares the work out."""
    from segcompass.learning.engine.distributed import start

    shared: dict[str, Any] = {
        "layout": layout and layout.value,
        "out": out,
        "skip_broken": on_error is OnError.SKIP,
    }
    if predictions is not None:
        _refuse(context, MODEL_ONLY)
    with start(device) as world, _bar(world.is_main) as moved:
        shared["progress"] = moved
        if predictions is not None:
            from segcompass.evaluation.predictions import judge_predictions

            figures = judge_predictions(
                predictions, data, split, threshold=threshold or 0.0, **shared
            )
        else:
            from segcompass.evaluation.benchmark import evaluate

            figures = evaluate(
                load(model, str(world.device), dtype, revision),
                data,
                split,
                limit=limit,
                batch_size=batch_size,
                control=control and control.value,
                force_format=force_format,
                paths=paths.value,
                threshold=threshold,
                **shared,
            )
    if world.is_main:
        _report(figures, out, as_json)


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder that eval --out wrote, on train or val.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for calibration.json, slots.svg and presence.svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the confidence threshold of highest gIoU, and say how far confidences hold."""
    from segcompass.evaluation.calibration import calibrate
    from segcompass.evaluation.diagram import reliability_svg
    from segcompass.evaluation.run_log import ROWS, read_figures, read_scores
    from segcompass.io.files import write_whole

    figures = read_figures(run)
    found = calibrate(read_scores(run / ROWS), figures["split"], figures.get("control"))
    result = found.result()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "calibration.json", json.dumps(result, indent=2) + "\n")
        for name, title in DIAGRAMS.items():
            write_whole(out / f"{name}.svg", reliability_svg(getattr(found, name), title))
    if as_json:
        print(json.dumps(result))
    else:
        console.print_table(console.listing(_brief(result)))


@app.command()
def tables(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders that eval --out wrote.")
    ],
    benchmark: Annotated[
        Benchmark | None, typer.Option(help="Published results to show; default: all.")
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.")
    ] = False,
) -> None:
    """Lay runs beside one another and beside published results, in percent."""
    from segcompass.evaluation.tables import markdown, shown, table

    rows = table(runs, benchmark and benchmark.value)
    if as_json:
        print(json.dumps(rows))
    elif as_markdown:
        print(markdown(rows))
    else:
        console.print_table(shown(rows))
        console.note("published rows were not measured here; compare on the same data and split")


def _bar(shown: bool) -> AbstractContextManager[Update | None]:
    """The progress bar, of one process alone."""
    return progress("eval") if shown else nullcontext()


def _refuse(context: typer.Context, names: tuple[str, ...]) -> None:
    """Options of a model make no sense for a file."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise typer.BadParameter(f"--predictions are judged as they are: drop --{option}")


def _report(figures: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Print the figures, write the page, and say what was left out."""
    if out is not None:
        from segcompass.apps.samples_page import write_samples_page

        console.note(f"wrote {write_samples_page(out)} and the files beside it")
    if as_json:
        print(json.dumps(figures))
    else:
        counts = {name: len(figures[name]) for name in ("broken", "missing") if name in figures}
        console.print_table(console.listing(figures | counts))
    if missing := figures.get("missing"):
        listed = ", ".join(missing[:NAMED]) + (", …" if len(missing) > NAMED else "")
        print(f"{len(missing)} samples have no prediction: {listed}", file=sys.stderr)
    broken = figures["broken"]
    for item in broken[:NAMED]:
        print(f"error: {item['name']}: {item['problem']}", file=sys.stderr)
    if broken:
        print(f"error: {len(broken)} inputs could not be judged", file=sys.stderr)
        raise typer.Exit(console.SOME_FAILED)


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    """A calibration without its bins."""
    return {
        name: {k: v for k, v in value.items() if k != "bins"} if isinstance(value, dict) else value
        for name, value in result.items()
    }
