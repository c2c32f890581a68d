"""Arms of an experiment: each trained with every seed under one budget, and judged by one judge.

OUT/ARM-SEED.yaml    the resolved config of a run, for `segcompass train` as well
OUT/ARM-SEED/        the run: states, model/, trained.json, and eval/ with rows and figures

What is done is not done again; what was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from segcompass.evaluation.benchmark import evaluate
from segcompass.io.checkpoints import folder_hashes
from segcompass.io.errors import ConfigError
from segcompass.io.files import write_whole
from segcompass.io.progress import progress
from segcompass.io.settings import merged
from segcompass.learning import train
from segcompass.learning.config import load_config, problems_in, read_settings
from segcompass.learning.engine.states import SavedState, latest_state
from segcompass.pipeline import SegCompass

PARTS = {"segmenter": "segmenter", "warmup": "policy", "sae": "sae"}  # by the stage that makes them
MASTER = "master/"  # before the names of trained weights in a state
THROWN_AWAY = {"place", "heads"}  # parts that only training needs
TRAINED = "trained.json"


class JudgeConfig(BaseModel, frozen=True, extra="forbid"):
    """How models are judged; see ``evaluation.benchmark.evaluate``."""

    data: Path
    split: str = "val"
    layout: str | None = None
    limit: int | None = Field(None, ge=1, description="only the first so many samples")
    batch_size: int = Field(32, ge=1)
    force_format: bool = False
    paths: str = "both"
    threshold: float | None = Field(None, ge=0, le=1, description="null: the model's own")


class Arm(BaseModel, frozen=True, extra="allow"):
    """One way to train: all keys but these are settings of a run, over those of all arms.

    In texts, ``{out}``, ``{from}`` and ``{seed}`` stand for the experiment's folder, the folder of
    the shared parts and the run's seed, so that an arm can begin with what another one made.
    """

    model: str | None = Field(None, description="judge this finished model instead of training")
    stages: tuple[str, ...] | None = Field(None, description="instead of those of all arms")
    eval: dict[str, Any] = Field({}, description="over how all arms are judged")


class Experiment(BaseModel, frozen=True, extra="forbid"):
    """What is varied, what is shared, and how it is judged."""

    config: Path = Field(description="the run config that all arms go out from")
    out: Path = Field(description="folder of all runs")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    source: Path | None = Field(
        None, alias="from", description="run or model folder whose parts all runs begin with"
    )
    stages: tuple[str, ...] = Field(("joint",), description="of `segcompass train`, in order")
    common: dict[str, Any] = Field({}, description="settings of all arms, over the config's")
    arms: dict[str, Arm] = Field(min_length=1)
    eval: JudgeConfig
    shown: int = Field(8, ge=1, description="samples that are timed, and shown side by side")

    @field_validator("arms")
    @classmethod
    def _names_are_folders(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if re.fullmatch(r"\w[\w =+.-]*", name) is None:
                raise ValueError(f"an arm's name is that of a folder, got {name!r}")
        return arms

    def runs(self, name: str) -> list[Path]:
        """The folders of an arm, one for every seed; a finished model has no seeds."""
        if self.arms[name].model is not None:
            return [self.out / name]
        return [self.out / f"{name}-{seed}" for seed in self.seeds]

    def judge(self, name: str) -> JudgeConfig:
        """How an arm is judged."""
        return JudgeConfig.model_validate(self.eval.model_dump() | self.arms[name].eval)

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """A run's settings: the base config's, those of all arms, and its own."""
        texts = {"{out}": str(self.out), "{from}": str(self.source), "{seed}": str(seed)}
        own = {**_filled(self.arms[name].model_extra or {}, texts), "seed": seed}
        shared = merged(read_settings(self.config), self.common)
        if "interface" in own:  # whose head has settings of its own
            shared.pop("head", None)
        return merged(shared, {**own, "run": str(self.out / f"{name}-{seed}")})


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment, and write and check the config of every run before any begins.

    Raises:
        ConfigError: naming the file, the key and what was found; or a run of that name has begun
            with other settings.
    """
    raw = read_settings(path, overrides)
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_in(error, raw, Experiment)}") from error
    for name, arm in experiment.arms.items():
        try:
            experiment.judge(name)
        except ValidationError as error:
            problems = problems_in(error, arm.eval, JudgeConfig)
            raise ConfigError(f"{path}: arms.{name}.eval: {problems}") from error
    parts = "nothing" if experiment.source is None else _parts(experiment.source)
    for name, arm in experiment.arms.items():
        if arm.model is not None:
            (folder,) = experiment.runs(name)
            _claim(folder, yaml.safe_dump({"model": arm.model}))
            continue
        origin = f"# from {parts}, stages {', '.join(arm.stages or experiment.stages)}\n"
        for folder, seed in zip(experiment.runs(name), experiment.seeds, strict=True):
            settings = yaml.safe_dump(experiment.settings(name, seed), sort_keys=False)
            _claim(folder, origin + settings)
            load_config(config_of(folder))
    return experiment


def _parts(source: Path) -> str:
    """A folder of shared parts, and which parts exactly it holds now."""
    hashes = {
        part: folder_hashes(source / part) for part in PARTS.values() if (source / part).is_dir()
    }
    return f"{source} ({hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]})"


def config_of(folder: Path) -> Path:
    """The config of a run."""
    return folder.with_name(f"{folder.name}.yaml")


def _claim(folder: Path, text: str) -> None:
    """Write down what a run is made of, unless it began as something else."""
    path = config_of(folder)
    if folder.exists() and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{folder} began with other settings or other parts than {path} would have now; set "
            "another `out`, or delete both"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def run_arm(experiment: Experiment, name: str, folder: Path) -> dict[str, Any]:
    """Train and judge one run of an arm, unless that is done; returns the figures.

    Answers that were judged are not given again, and are refused where they are of another model,
    threshold or way to answer.

    Raises:
        ConfigError, DataError, CheckpointError: as of training and judging.
    """
    model = SegCompass.from_pretrained(model_of(experiment, name, folder))
    asked = experiment.judge(name).model_dump()
    with progress(f"eval {folder.name}") as moved:
        return evaluate(model, **asked, out=folder / "eval", progress=moved)


def model_of(experiment: Experiment, name: str, folder: Path) -> str | Path:
    """The model of a run, trained if it is not there yet."""
    arm = experiment.arms[name]
    if arm.model is not None:
        return arm.model
    if not (folder / TRAINED).exists():
        stages = arm.stages or experiment.stages
        if experiment.source is not None:
            _begin_with(experiment.source, folder, stages)
        for stage in stages:
            train.run(stage, config_of(folder), [], resume=True)
        count = trained_parameters([f for s in stages for f in folder.glob(f"stages/{s}*")])
        write_whole(folder / TRAINED, json.dumps({"parameters": count}) + "\n")
    return folder / "model"


def _begin_with(source: Path, folder: Path, stages: Sequence[str]) -> None:
    """Lend a run the parts that it does not make itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, part in PARTS.items():
        there, here = source / part, folder / part
        if stage not in stages and there.is_dir() and not here.exists():
            here.symlink_to(there.resolve(), target_is_directory=True)


def trained_parameters(stages: Iterable[Path]) -> int:
    """How many parameters stages have trained, from the last states in their folders.

    A part that several stages trained counts once: as much of it as one of them moved.
    """
    most: Counter[str] = Counter()
    for path in filter(None, map(latest_state, stages)):
        with SavedState(path) as state:
            shapes = {key: s for key, s in state.shapes.items() if key.startswith(MASTER)}
        moved: Counter[str] = Counter()
        for key, shape in shapes.items():
            moved[key.removeprefix(MASTER).partition(".")[0]] += math.prod(shape)
        most |= moved  # the larger of both, part by part
    return sum(count for part, count in most.items() if part not in THROWN_AWAY)


def _filled(value: Any, texts: Mapping[str, str]) -> Any:
    """Nested settings with the marks in their texts replaced."""
    if isinstance(value, dict):
        return {key: _filled(inner, texts) for key, inner in value.items()}
    if isinstance(value, str):
        for mark, text in texts.items():
            value = value.replace(mark, text)
    return value
