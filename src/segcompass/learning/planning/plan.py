"""Before a GPU is rented: memory and work of a joint step, computed without any weights.

Everything is read off the config and off the model on the meta device. Memory is the most that a
GPU holds at once: what always lies there, and the hungriest of three phases (sampling the answers,
the policy pass with its backward pass, the optimizer step). Prompts and answers count at their
limits, so real steps are below this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from segcompass.learning.config import RunConfig
from segcompass.learning.engine.lora import LoraSettings
from segcompass.learning.planning.budget import (
    PHASES,
    Hardware,
    Part,
    flops_of,
    memory_of,
    peak,
    step_seconds,
    total,
)
from segcompass.learning.planning.workload import Workload, workload_of

GB = 1e9
USABLE = 0.92  # of a GPU's memory; the rest is CUDA's own, NCCL's, and what fragmentation wastes


@dataclass(frozen=True)
class Plan:
    """What a joint step takes, and whether it fits."""

    gpus: int
    memory_gb: float
    memory: tuple[Part, ...]  # of one GPU
    flops: dict[str, float]  # of one step, all GPUs together
    steps: int
    hours: float  # estimate for all steps; see `step_seconds`
    workload: Workload
    advice: tuple[str, ...]  # changes that would make it fit; empty if it fits

    @property
    def peak_bytes(self) -> float:
        """What always lies on a GPU, and the hungriest phase."""
        return peak(self.memory)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the usable share of the memory."""
        return self.peak_bytes <= USABLE * self.memory_gb * GB

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: GB and TFLOP."""
        return {
            "gpus": self.gpus,
            "memory_gb": self.memory_gb,
            "usable_gb": round(USABLE * self.memory_gb, 6),
            "peak_gb": round(self.peak_bytes / GB, 6),
            "fits": self.fits,
            "advice": list(self.advice),
            "memory": [
                {"part": p.name, "phase": p.phase or "always", "gb": round(p.bytes / GB, 6)}
                for p in self.memory
            ],
            "tflop": {name: round(flops / 1e12, 6) for name, flops in self.flops.items()},
            "tflop_per_step": round(sum(self.flops.values()) / 1e12, 6),
            "steps": self.steps,
            "hours_estimate": round(self.hours, 1),
            "tokens": {
                "prompt": self.workload.prompt,
                "of them image": self.workload.image,
                "answer": self.workload.answer,
            },
            "answers_per_gpu": self.workload.rows,
        }

    def verdict(self) -> dict[str, str]:
        """For a table: what is assumed, how long it takes, whether it fits, and what would help."""
        work = self.workload
        facts = {
            "fits": "yes" if self.fits else "no",
            "answers a GPU": f"{work.rows}, of {work.batch} questions x {work.group}",
            "tokens": f"{work.prompt} of prompt ({work.image} of picture), {work.answer} of answer",
            "hours, estimated": f"{self.hours:,.0f} for {self.steps:,} steps",
        }
        return facts | {f"advice {i}": advice for i, advice in enumerate(self.advice, start=1)}

    def memory_rows(self) -> list[dict[str, str]]:
        """For a table: every part, each phase's sum, and the peak."""
        rows = [_row(p.name, p.phase or "always", p.bytes) for p in self.memory]
        rows += [_row(f"sum of {phase}", phase, total(self.memory, phase)) for phase in PHASES]
        verdict = "fits" if self.fits else "does not fit"
        note = f"{verdict} {self.memory_gb:g} GB × {USABLE:g}"
        return [*rows, _row("peak", note, self.peak_bytes)]

    def flops_rows(self) -> list[dict[str, str]]:
        """For a table: operations of a step by part, and their share."""
        every = sum(self.flops.values())
        rows = [
            {"part": name, "TFLOP/step": f"{flops / 1e12:,.1f}", "share": f"{flops / every:.1%}"}
            for name, flops in self.flops.items()
        ]
        return [*rows, {"part": "all", "TFLOP/step": f"{every / 1e12:,.1f}", "share": ""}]


def plan(config: RunConfig, gpus: int, memory_gb: float, hardware: Hardware | None = None) -> Plan:
    """Whether ``config``'s joint stage fits on so many GPUs, and how much work a step is.

    Args:
        config: As `load_config` returns it; no data and no weights are read.
        gpus: Number of GPUs, each one rank.
        memory_gb: Of one GPU, in 10⁹ bytes.
        hardware: What hours are estimated for; an A100 80 GB by default.

    Raises:
        ConfigError: if a number is not positive.
        CheckpointError: if the policy's or the segmenter's config cannot be found offline.
    """
    work = workload_of(config, gpus, memory_gb)
    memory, flops = memory_of(work), flops_of(work)
    steps = config.train_joint.steps
    hours = steps * step_seconds(work, flops, hardware or Hardware()) / 3600
    result = Plan(gpus, memory_gb, memory, flops, steps, hours, work, ())
    return result if result.fits else replace(result, advice=tuple(_advice(work, memory_gb)))


Change = Callable[[Workload], Workload]


def _knobs(work: Workload) -> list[tuple[str, Change]]:
    """What can be turned without changing the method, the cheapest first."""
    knobs: list[tuple[str, bool, Change]] = [
        (
            "train_joint.gradient_checkpointing=true",
            not work.checkpointing,
            lambda w: replace(w, checkpointing=True),
        ),
        (
            "data.features=FOLDER (segcompass data features)",
            not work.precomputed,
            lambda w: replace(w, precomputed=True),
        ),
        (
            "train_joint.lora={rank: 16}",
            work.lora is None and work.trained > 0,
            lambda w: w.with_lora(LoraSettings(rank=16)),
        ),
    ]
    knobs += [
        (f"{key}={n}", n < rows, partial(replace, **{field: n}))
        for key, field, rows in (
            ("train_joint.micro_batch", "micro", work.micro_rows),
            ("train_joint.rollout.batch", "sampled", work.sampled_rows if work.samples else 0),
        )
        for n in dict.fromkeys((rows // 2, rows // 4, 1))
        if n > 0
    ]
    knobs += [
        (f"train_joint.batch={n}", work.gpus <= n < work.batch, partial(replace, batch=n))
        for n in dict.fromkeys((work.batch // 2, work.batch // 4, 1))  # every rank needs one
    ]
    knobs += [
        (
            f"train_joint.rollout.max_new_tokens={n}",
            work.samples and n > 0,
            partial(Workload.with_answers, tokens=n),
        )
        for n in (work.answer // 2, work.answer // 4)
    ]
    return [(name, change) for name, useful, change in knobs if useful]


def _advice(work: Workload, memory_gb: float) -> Iterator[str]:
    """Single changes that suffice; else the first few together that do; else how far it is."""
    limit = USABLE * memory_gb * GB
    knobs = _knobs(work)
    single: dict[str, str] = {}  # by key: the gentlest value that suffices
    for name, change in knobs:
        if (most := _peak_of(change(work))) <= limit:
            single.setdefault(name.split("=")[0], f"{name} would fit: {most / GB:.1f} GB")
    yield from single.values()
    if not single:
        yield from _together(work, knobs, limit)
    for gpus in (work.gpus * 2**i for i in range(1, 7)):
        if (most := _peak_of(replace(work, gpus=gpus))) <= limit:
            yield f"{gpus} GPUs would fit: {most / GB:.1f} GB each"
            return


def _together(work: Workload, knobs: list[tuple[str, Change]], limit: float) -> Iterator[str]:
    names: list[str] = []
    for name, change in knobs:
        changed = change(work)
        if _peak_of(changed) < _peak_of(work):
            names = [n for n in names if n.split("=")[0] != name.split("=")[0]] + [name]
            work = changed
        if _peak_of(work) <= limit:
            yield f"together they would fit: {'; '.join(names)}: {_peak_of(work) / GB:.1f} GB"
            return
    yield (
        f"not even {'; '.join(names) or 'the cheapest setting'} would fit: it takes "
        f"{_peak_of(work) / GB:.1f} GB; take larger GPUs, or a smaller policy"
    )


def _peak_of(work: Workload) -> float:
    return peak(memory_of(work))


def _row(name: str, phase: str, count: float) -> dict[str, str]:
    return {"part": name, "when": phase, "GB": f"{count / GB:,.2f}"}
