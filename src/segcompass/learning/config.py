"""One YAML file is one run: what is built, from what, and how each stage trains."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from segcompass.interfaces.concept_slots import HeadConfig
from segcompass.io.errors import ConfigError
from segcompass.learning.optimizer import OptimizerConfig
from segcompass.reasoning.from_scratch import ScratchConfig
from segcompass.reasoning.policy import PolicyConfig


class _Model(BaseModel, frozen=True, extra="forbid"):
    """Frozen, and unknown keys are errors."""


class ScenesConfig(_Model):
    """How many questions of the procedural world to write, if the data is not there yet."""

    train: int = Field(60_000, ge=1)
    val: int = Field(1_000, ge=0)
    testA: int = Field(1_000, ge=0)  # noqa: N815 - the published split names
    testB: int = Field(1_000, ge=0)  # noqa: N815
    seed: int = 7


class DataConfig(_Model):
    """Where the samples come from."""

    root: Path
    layout: str | None = None
    split: str = "train"
    limit: int | None = Field(None, ge=1)
    scenes: ScenesConfig | None = Field(None, description="write this world to `root` first")


class PolicySource(_Model):
    """The policy to start from."""

    source: str = Field("scratch", description="scratch, a folder, or a hub id")
    scratch: ScratchConfig = ScratchConfig()
    use: PolicyConfig = PolicyConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class SegmenterStage(OptimizerConfig, frozen=True):
    """Promptable pretraining: points, boxes or coarse masks in, masks out."""

    prompts: int = Field(4, ge=1, description="prompted objects per picture")


class VisionStage(OptimizerConfig, frozen=True):
    """Dense pretraining of the vision tower on what stands where."""

    background_weight: float = Field(0.15, ge=0, description="of empty cells in the loss")


class LanguageStage(OptimizerConfig, frozen=True):
    """Questions and oracle answers, by cross-entropy over the answer."""

    train_vision: bool = Field(False, description="else image features are computed once")
    group: int = Field(16, ge=1, description="batches that are sorted by length together")


class SaeStage(OptimizerConfig, frozen=True):
    """Reconstruct the states of the frozen policy under an L1 penalty (Eq. 7)."""

    latents: int = Field(2048, ge=1, description="S")
    l1: float = Field(3.0, ge=0, description="weight of the sparsity term at its full height")
    threshold: float = Field(0.0, ge=0, description="activations up to this count as zero")
    l1_warmup: float = Field(0.05, ge=0, le=1)
    samples: int = Field(2_000, ge=1, description="sequences whose tokens fill the buffer")


class Multipliers(_Model):
    """Factors of the learning rate, by trained part."""

    policy: float = Field(1.0, ge=0)
    codebook: float = Field(1.0, ge=0)
    head: float = Field(1.0, ge=0)
    decoder: float = Field(1.0, ge=0)


class JointStage(OptimizerConfig, frozen=True):
    """Segmentation and confidence losses of Eq. 6."""

    seg_weight: float = Field(1.0, description="lambda_s")
    conf_weight: float = Field(0.2, description="lambda_c")
    dice_weight: float = Field(0.6, description="lambda_d")
    heatmap_dice_weight: float = Field(0.0, description="dice on the heatmaps; not in Eq. 6")
    group: int = Field(16, ge=1, description="batches that are sorted by length together")
    samples: int | None = Field(None, ge=1, description="only the first so many samples")
    order_weight: float = Field(0.0, ge=0, description="see learning/matching.py")
    place_weight: float = Field(
        0.0, ge=0, description="row and column of its target, read off a slot's query"
    )
    language_weight: float = Field(0.0, description="cross-entropy of the oracle's answer")
    train_upper_layers: bool = Field(True, description="the policy's layers after the SAE layer")
    multipliers: Multipliers = Multipliers()


class RunConfig(_Model):
    """Everything about a run."""

    run: Path = Field(description="folder of logs, states and the finished model")
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores by default")
    data: DataConfig
    policy: PolicySource = PolicySource()
    segmenter: str = Field("nano", description="nano, vit-b, vit-l, vit-h, a folder or a hub id")
    head: HeadConfig = HeadConfig()
    train_segmenter: SegmenterStage | None = None
    train_vision: VisionStage | None = None
    train_language: LanguageStage | None = None
    train_sae: SaeStage
    train_joint: JointStage


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config and apply ``a.b=value`` overrides.

    Raises:
        ConfigError: naming the file, the key, what was found, and the nearest known key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML config") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected a mapping of settings")
    for override in overrides or []:
        _apply(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_explain(e) for e in error.errors())}") from error


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


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}, got {error['input']!r}"
    *section, key = error["loc"]
    known = {name.lower(): name for name in _section(section).model_fields}
    close = difflib.get_close_matches(str(key).lower(), known, n=1)
    hint = (
        f"did you mean {known[close[0]]!r}?" if close else f"known are {', '.join(known.values())}"
    )
    return f"{where}: unknown key; {hint}"


def _section(location: list[str | int]) -> type[BaseModel]:
    """The model that describes a section of the config."""
    model: type[BaseModel] = RunConfig
    for name in location:
        annotation = model.model_fields[str(name)].annotation
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return model
