"""The command line: each command parses, calls one function, and prints.

Heavy packages are imported inside the commands, so that ``segcompass --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segcompass import __version__
from segcompass.apps import (
    bench_commands,
    compare_commands,
    console,
    data_commands,
    eval_commands,
    explain_commands,
    serve_commands,
)
from segcompass.apps.console import CommandGroup
from segcompass.apps.options import AsJson, Device, Dtype, Model, Revision, Threshold, load
from segcompass.io.files import make_folder

if TYPE_CHECKING:
    from segcompass.apps.runs import Failure, Job

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Masks for an instruction, and the way the model got there.",
    epilog="Exit codes: 0 done (also when nothing matches), 1 failed, 2 usage, 3 some inputs "
    "failed, 4 an asset is missing offline, 5 an unsafe file was refused, 130 interrupted.",
)
app.add_typer(data_commands.app, name="data")
app.add_typer(eval_commands.app)
app.add_typer(compare_commands.app)
app.add_typer(explain_commands.app)
app.add_typer(serve_commands.app)
app.add_typer(bench_commands.app)


class Stage(StrEnum):
    """What `train` can run; `all` runs what is needed in order, `plan` runs nothing."""

    SEGMENTER = "segmenter"
    WARMUP = "warmup"
    SAE = "sae"
    JOINT = "joint"
    SCORER = "scorer"
    ALL = "all"
    PLAN = "plan"


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def start(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SEGCOMPASS_DEBUG", help="Show tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_version, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Settle what holds for every command."""
    # Said by Pillow of pictures that are refused, or taken, by our own limit.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    if debug:
        os.environ["SEGCOMPASS_DEBUG"] = "1"
    if not sys.stderr.isatty():
        logging.getLogger("segcompass").addHandler(logging.NullHandler())
        # The libraries underneath keep the same silence.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path(),
    device: Device = None,
) -> None:
    """Run the bundled model on bundled pictures: a table and report.html."""
    from segcompass.apps import runs
    from segcompass.apps.collect import Collector

    make_folder(out)
    jobs = runs.demo_jobs()
    collector = Collector()
    runs.work_off(load("nano", device, None, None), jobs, collector.take, batch_size=4)
    console.print_table(collector.rows)
    if collector.rows:
        print(collector.write_report(out, "SegCompass demo"))
    collector.finish()


@app.command()
def predict(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE…", help="Pictures, folders, patterns.")
    ] = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option("--instruction", "-i", help="What to find; repeat to ask several things."),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(help="CSV or JSONL of image and instruction, instead of SOURCE and -i."),
    ] = None,
    model: Model = "nano",
    out: Annotated[
        Path | None, typer.Option(help="Folder for masks, heatmaps, JSON and report.html.")
    ] = None,
    as_json: AsJson = False,
    threshold: Threshold = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: the model's.")
    ] = None,
    force_format: Annotated[
        bool, typer.Option(help="Hold the answer to its form: thought, then K tokens.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Find what the instruction names, and show the way there."""
    from segcompass.apps import runs
    from segcompass.apps.collect import Collector

    jobs, missing = _jobs(sources or [], instruction or [], instructions)
    collector = Collector(out=out and make_folder(out), as_json=as_json)
    for failure in missing:
        collector.take(failure)
    try:
        if jobs:
            runs.work_off(
                load(model, device, dtype, revision),
                jobs,
                collector.take,
                batch_size=batch_size,
                threshold=threshold,
                max_new_tokens=max_new_tokens,
                force_format=force_format,
            )
    finally:  # an interrupted run shows what it has
        collector.conclude()
    collector.finish()


def _jobs(
    sources: list[str], instructions: list[str], listing: Path | None
) -> tuple[list[Job], list[Failure]]:
    """The work that the arguments of `predict` stand for."""
    from segcompass.apps import runs

    if listing is not None:
        if sources or instructions:
            raise typer.BadParameter("--instructions names pictures itself: drop SOURCE and -i")
        return runs.read_jobs(listing), []
    if not sources or not instructions:
        raise typer.BadParameter('say where to look and what for: predict SOURCE… -i "the red mug"')
    return runs.pair_up(sources, instructions)


@app.command()
def train(
    stage: Annotated[
        Stage,
        typer.Argument(
            help="What to train; all: all that CONFIG has; plan: what joint would take."
        ),
    ],
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one value of the config; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="plan: how many GPUs.")] = 1,
    memory: Annotated[float, typer.Option(min=0, help="plan: GB of each GPU.")] = 80.0,
    as_json: AsJson = False,
) -> None:
    """Train one stage, or all of them, of what CONFIG.yaml describes."""
    if stage is Stage.PLAN:
        _show_plan(config, overrides or [], gpus, memory, as_json)
        return
    from segcompass.learning.engine.launch import RanksError
    from segcompass.learning.train import run

    try:
        run(stage.value, config, overrides or [], resume)
    except RanksError as failed:  # they have said why
        raise typer.Exit(failed.code) from failed


def _show_plan(config: Path, overrides: list[str], gpus: int, memory: float, as_json: bool) -> None:
    """Memory and work of the joint stage, computed on the meta device."""
    from segcompass.learning.config import load_config
    from segcompass.learning.planning.plan import plan

    made = plan(load_config(config, overrides), gpus, memory)
    if as_json:
        print(json.dumps(made.as_dict()))
        return
    for rows in (made.memory_rows(), made.flops_rows(), console.listing(made.verdict())):
        console.print_table(rows)


@app.command()
def doctor(
    preset: Annotated[
        str | None, typer.Option(help="Describe the real parts of a preset: qwen2.5-vl-7b …")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine and this installation have."""
    if preset is None:
        from segcompass.apps.doctor import examine

        facts: dict[str, Any] = dict(examine())
    else:
        from segcompass.presets import describe

        facts = describe(preset)
    if as_json:
        print(json.dumps(facts))
        return
    parts = facts.pop("parameters", {})
    console.print_table(console.listing(facts))
    console.print_table([{"part": part, **console.row(count)} for part, count in parts.items()])


def main() -> None:
    """The ``segcompass`` command."""
    app(prog_name="segcompass")
