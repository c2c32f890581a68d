"""What an answer costs, and what it has to show: seconds, memory, and which explanations exist."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Sample

# What a person may be shown beside text and masks, and the field that holds it.
EXPLANATIONS = {
    "heatmaps": "heatmap_logits",
    "concepts": "codes",
    "tokens read": "slot_attention",
    "policy's attention": "image_attention",
    "boxes and points": "prompts",
    "candidates": "candidates",
}


class Footprint(NamedTuple):
    """Of answers to one picture at a time."""

    interface: str
    seconds: float  # for one picture, mean
    memory: int  # bytes: the weights, and the most that was held beside them
    explanations: list[str]  # keys of EXPLANATIONS


def measure_footprint(
    model: SegCompass, samples: Sequence[Sample], **options: Any
) -> tuple[Footprint, list[Prediction]]:
    """Answer some samples one by one, greedily.

    Args:
        model: loaded.
        samples: at least one; the first is answered once more before, which warms up and tells
            the memory.
        **options: handed to ``SegCompass.predict``.

    Returns:
        What it cost, and the answers.
    """

    def answer(sample: Sample) -> Prediction:
        return model.predict(sample.image_path, sample.instruction, **options)

    memory = peak_bytes(model, lambda: answer(samples[0]))
    start = time.perf_counter()
    predictions = [answer(sample) for sample in samples]
    seconds = (time.perf_counter() - start) / len(samples)
    shown = explanations_of(predictions)
    return Footprint(model.interface.name, seconds, memory, shown), predictions


def explanations_of(predictions: Iterable[Prediction]) -> list[str]:
    """What at least one of them has to show."""
    shown = list(predictions)
    return [
        name
        for name, field in EXPLANATIONS.items()
        if any(getattr(prediction, field) is not None for prediction in shown)
    ]


def peak_bytes(model: SegCompass, run: Callable[[], object]) -> int:
    """The weights of a model, and the most memory that its tensors take beside them in a call."""
    device = model.policy.model.device
    held = {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    weights = sum(held.values())
    if device.type != "cuda":
        return weights + transient_bytes(run)
    before = torch.cuda.memory_allocated(device)  # perhaps not by this model alone
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return weights + torch.cuda.max_memory_allocated(device) - before


def transient_bytes(run: Callable[[], object]) -> int:
    """Peak of the memory that is allocated on the CPU during a call and free again after it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report to stderr
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = run()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del kept  # the output counts as remaining
    changes = [event for event in events if event["name"] == "[memory]"]
    return peak_of_freed([(e["args"]["Addr"], e["args"]["Bytes"]) for e in changes])


def peak_of_freed(changes: Sequence[tuple[int, int]]) -> int:
    """Highest sum of blocks alive at once, among blocks both taken and given back.

    Args:
        changes: (address, bytes) in order of time; negative bytes give a block back.
    """
    opened: dict[int, int] = {}  # address -> position of the event that took the block
    transient = [0] * len(changes)
    for position, (address, size) in enumerate(changes):
        if size > 0:
            opened[address] = position
        elif address in opened:  # otherwise it is older than the call
            transient[opened.pop(address)] = -size
            transient[position] = size
    peak = alive = 0
    for change in transient:
        alive += change
        peak = max(peak, alive)
    return peak
