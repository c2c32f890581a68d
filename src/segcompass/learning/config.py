"""One YAML file is one run: what is built, from what, and how each stage trains."""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from segcompass.interfaces.registry import OfInterface, find
from segcompass.io.errors import ConfigError
from segcompass.io.settings import read_yaml
from segcompass.learning.recipes import with_recipe
from segcompass.learning.stages import (
    JointStage,
    LanguageStage,
    SaeStage,
    ScorerStage,
    SegmenterStage,
    VisionStage,
)
from segcompass.reasoning.from_scratch import ScratchConfig
from segcompass.reasoning.policy import PolicyConfig

_TOLD = 6  # problems that a message spells out
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass


class _Model(BaseModel, frozen=True, extra="forbid"):
    """Frozen, and unknown keys are errors."""


class ScenesConfig(_Model):
    """How many questions of the procedural world to write, if the data is not there yet."""

    train: int = Field(60_000, ge=1)
    val: int = Field(1_000, ge=0)
    testA: int = Field(1_000, ge=0)  # noqa: N815 - the published split names
    testB: int = Field(1_000, ge=0)  # noqa: N815
    seed: int = 7


class SetConfig(_Model):
    """One data set."""

    root: Path
    layout: str | None = None
    split: str = "train"
    limit: int | None = Field(None, ge=1)


class DataConfig(SetConfig, frozen=True):
    """Where the samples come from."""

    also: tuple[SetConfig, ...] = Field((), description="further sets, each trained on in full")
    scenes: ScenesConfig | None = Field(None, description="write this world to `root` first")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="what a sample that cannot be trained on does"
    )
    image_pixels: tuple[int, int] | None = Field(
        None, description="least and most pixels of a picture as a Qwen policy sees it"
    )
    features: Path | None = Field(
        None, description="folder of precomputed image features (segcompass data features)"
    )

    @model_validator(mode="after")
    def _pixels_in_order(self) -> DataConfig:
        if self.image_pixels is not None and not 1 <= self.image_pixels[0] <= self.image_pixels[1]:
            raise ValueError(f"image_pixels must be [least, most], got {list(self.image_pixels)}")
        return self

    @property
    def sets(self) -> tuple[SetConfig, ...]:
        """All sets, in the order in which samples are numbered."""
        return (self, *self.also)


class PolicySource(_Model):
    """The policy to start from."""

    source: str = Field("scratch", description="scratch, a folder, or a hub id")
    scratch: ScratchConfig = ScratchConfig()
    use: PolicyConfig = PolicyConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class RunConfig(OfInterface, frozen=True):
    """Everything about a run."""

    run: Path = Field(description="folder of logs, states and the finished model")
    seed: int = Field(0, ge=0)
    processes: int = Field(
        1, ge=1, description="that train side by side, where there is no GPU and no torchrun"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of all processes here together; by default all cores"
    )
    tensorboard: bool = Field(False, description="write figures there too (extra `track`)")
    data: DataConfig
    policy: PolicySource = PolicySource()
    segmenter: str = Field("nano", description="nano, vit-b, vit-l, vit-h, a folder or a hub id")
    train_segmenter: SegmenterStage | None = None
    train_vision: VisionStage | None = None
    train_language: LanguageStage | None = None
    train_sae: SaeStage | None = None  # only interfaces with concepts read an SAE
    train_joint: JointStage
    train_scorer: ScorerStage | None = None  # only candidate_rerank has a scorer

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: Any) -> Any:
        return with_recipe(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _a_scorer_where_one_is_needed(self) -> RunConfig:
        if (self.interface == "candidate_rerank") != (self.train_scorer is not None):
            raise ValueError(
                "candidate_rerank and train_scorer go together: the one trains its judge with the "
                f"other; got interface {self.interface}"
            )
        return self


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config and apply ``a.b=value`` overrides.

    Raises:
        ConfigError: naming the file, the key, what was found, and the nearest known key.
    """
    raw = read_settings(path, overrides)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_in(error, raw, RunConfig)}") from error


def read_settings(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file after ``a.b=value`` overrides; raises ConfigError."""
    raw = read_yaml(path)
    for override in overrides or []:
        _apply(raw, override)
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
    try:
        raw[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {value!r} is no valid YAML value") from error


def problems_in(error: ValidationError, raw: dict[str, Any], kind: type[BaseModel]) -> str:
    """What is wrong with settings, key by key, with the nearest known key; the first of many.

    Args:
        error: Of validating them.
        raw: The settings.
        kind: What they were to be.
    """
    told = [_explain(one, raw, kind) for one in error.errors()]
    more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
    return "; ".join(told[:_TOLD] + more)


def _explain(error: Any, raw: dict[str, Any], kind: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        # Of a whole section: the message names the settings, to print all of them would bury it.
        return ": ".join(filter(None, (where, str(error["ctx"]["error"]))))
    if error["type"] not in UNKNOWN_KEY:
        return f"{where}: {error['msg']}, got {reprlib.repr(error['input'])}"
    *section, key = error["loc"]
    known = {name.lower(): name for name in _known(section, raw, kind)}
    close = difflib.get_close_matches(str(key).lower(), known, n=1)
    hint = (
        f"did you mean {known[close[0]]!r}?" if close else f"known are {', '.join(known.values())}"
    )
    return f"{where}: unknown key; {hint}"


def _known(location: list[str | int], raw: Any, kind: Any) -> dict[str, Any]:
    """The keys that a section of settings may hold."""
    for name in location:
        if name == "head":  # of the interface that is named beside it
            kind = find(raw.get("interface", OfInterface.model_fields["interface"].default)).Config
        else:  # a number says which of several, all of one kind
            kind = _keys(kind).get(str(name), kind)
        raw = raw[name]
    return _keys(kind)


def _keys(annotation: Any) -> dict[str, Any]:
    """Keys of the section in an annotation such as ``X | None``, and what each of them holds."""
    if is_dataclass(annotation):
        return get_type_hints(annotation)
    if hasattr(annotation, "model_fields"):
        fields = annotation.model_fields
        return {field.alias or name: field.annotation for name, field in fields.items()}
    return {key: held for part in get_args(annotation) for key, held in _keys(part).items()}
