"""``segcompass bench``: run the measurements in benchmarks/ and write down what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from segcompass.apps import console
from segcompass.apps.options import AsJson
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import ConfigError, DataError
from segcompass.io.files import write_whole
from segcompass.io.progress import progress

app = typer.Typer()
HELPER = "measuring"  # what the benchmarks share is none itself
COLUMNS = ("measure", "unit", "ours", "baseline", "ratio")
HEAD = """# Benchmarks

Written by `segcompass bench`: each script in `benchmarks/` measures ours and a plain formulation in
one run. A ratio above 1 says how many times better ours is.
"""


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="Some of them; default: all.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the scripts lie.")] = Path("benchmarks"),
    out: Annotated[
        Path | None, typer.Option(help="Markdown page to write, such as docs/benchmarks.md.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the benchmarks of a checkout, one after another."""
    scripts = _scripts(folder, names or [])
    results, failed = [], False
    with progress("benchmarks") as moved:
        for done, script in enumerate(scripts):
            moved(done, len(scripts))
            try:
                results.append(_run(script))
            except MissingAssetError as error:
                print(f"skipped: {script}: {error}", file=sys.stderr)
            except DataError as error:
                console.complain(error, str(script))
                failed = True
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, HEAD + "".join(map(_section, results)))
    for result in results:
        if as_json:
            print(json.dumps(result))
        else:
            print(f"{result['name']} on {result['machine']}")
            console.print_table([_cells(row) for row in result["rows"]])
    if failed:
        raise typer.Exit(console.SOME_FAILED)


def _scripts(folder: Path, names: list[str]) -> list[Path]:
    known = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != HELPER}
    if not known:
        raise ConfigError(
            f"{folder} holds no benchmarks; they come with the source: run this in a checkout"
        )
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no benchmark {unknown[0]!r}, there are {', '.join(known)}")
    return [known[name] for name in names or known]


def _run(script: Path) -> dict[str, Any]:
    """One script's result, in a process of its own.

    Raises:
        MissingAssetError: it lacks an optional package, and says so by its exit code.
        DataError: it failed.
    """
    command = [sys.executable, str(script), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no result"]
        if done.returncode == console.ASSET_MISSING:
            raise MissingAssetError(said[-1]) from None
        raise DataError(f"the benchmark failed: {said[-1]}") from None
    return result


def _section(result: dict[str, Any]) -> str:
    rows = [_cells(row) for row in result["rows"]]
    lines = [f"\n## {result['name']}\n", f"On {result['machine']}.\n"]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {c: row[c] if isinstance(row[c], str) else f"{row[c]:.4g}" for c in COLUMNS}
