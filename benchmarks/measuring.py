"""What the benchmarks share: timing side by side, transient memory, and the form of a result."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from segcompass.evaluation.footprint import peak_of_freed as peak_of_freed
from segcompass.evaluation.footprint import transient_bytes as transient_bytes

MISSING = 4  # exit code: a package is not installed; `segcompass bench` skips the benchmark


def needs(package: str) -> None:
    """Leave, and say how to install the package, where it is not there."""
    if importlib.util.find_spec(package) is None:
        print(f"needs {package}; install it with: pip install {package}", file=sys.stderr)
        raise SystemExit(MISSING)


def median_seconds(
    sides: dict[str, Callable[[], object]], clear: Callable[[], None], repeats: int
) -> dict[str, float]:
    """Time the sides in turn, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, run in sides.items():
            clear()
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(
    measure: str, unit: str, ours: float, baseline: float, *, more: bool = False
) -> dict[str, Any]:
    """One measure of both sides; ``ratio`` says how many times better ours is.

    ``more`` is better for rates; of seconds and bytes less is.
    """
    good, bad = (ours, baseline) if more else (baseline, ours)
    ratio = good / bad if bad else math.inf
    return {"measure": measure, "unit": unit, "ours": ours, "baseline": baseline, "ratio": ratio}


def machine() -> str:
    """The processor, torch's threads and its version."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def present(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a result: one JSON object, or a line for each row."""
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['name']} on {result['machine']}")
    if "settings" in result:
        print(result["settings"])
    for one in result["rows"]:
        print(
            f"{one['measure']:32} ours {one['ours']:12.4g}  baseline {one['baseline']:12.4g} "
            f"{one['unit']:9}  {one['ratio']:6.2f} times better"
        )


def report(
    measure: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> None:
    """Measure and print."""
    present(measure(options), as_json=options.json)
