"""Do the parts that a run begins with belong to its config? Told from configs, before loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from segcompass.concepts.sae_files import CONFIG_NAME
from segcompass.io.checkpoints import BINDING
from segcompass.io.errors import CheckpointError, ConfigError, DataError
from segcompass.io.files import read_object
from segcompass.learning.config import PolicySource, RunConfig
from segcompass.model_folder import ModelConfig, find_model
from segcompass.published import find_published


class Backbone(NamedTuple):
    """What tells one language model from another."""

    family: str
    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.family} of width {self.width} with {self.layers} layers"


def check_policy(source: PolicySource, warm: Path | None = None) -> None:
    """Compare a policy that an earlier run left with the one that the config asks for.

    Args:
        source: What the config says.
        warm: The policy folder of the run, if there is one.

    Raises:
        CheckpointError: if the folder holds another backbone.
        ConfigError: if the SAE is to read a layer that the policy does not have.
    """
    asked = _asked(source)
    found = None if warm is None else _backbone(warm)
    if asked is not None and found is not None and asked != found:
        raise CheckpointError(
            f"{warm} holds a {found}, but policy.source {source.source!r} is a {asked}; "
            "set another `run` folder, or delete it and warm up again"
        )
    known, layer = found or asked, source.use.sae_layer
    if known is not None and layer >= known.layers:
        raise ConfigError(
            f"policy.use.sae_layer is {layer}, but the policy is a {known}; "
            f"choose a layer from 0 to {known.layers - 1}"
        )


def check_pixels(config: RunConfig, warm: Path | None = None) -> None:
    """Refuse `data.image_pixels` where it would change nothing.

    A warm policy keeps the limits that it was trained with, and one from scratch sees every
    picture at one size. A model to start from is the matter of :func:`check_start`.

    Args:
        config: Of the run.
        warm: The policy folder of the run, if that is what is read.

    Raises:
        ConfigError: naming what the config asks for, and what the policy has.
        CheckpointError: if the settings of the warm policy's image processor are damaged.
    """
    limits = config.data.image_pixels
    if limits is None:
        return
    asked = f"data.image_pixels is {list(limits)}"
    if config.policy.source == "scratch":
        side = config.policy.scratch.image_side
        raise ConfigError(
            f"{asked}, but policy.source: scratch sees every picture at {side}x{side} px; take "
            "data.image_pixels out, or set policy.scratch.image_side"
        )
    if warm is not None and (there := picture_limits(warm)) != limits:
        raise ConfigError(
            f"{asked}, but {warm} was trained with {_limits(there)}; set that, or take it out. To "
            "have others, set another `run` folder, or delete this one, and warm up again"
        )


def _limits(there: tuple[int, int] | None) -> str:
    return str(list(there)) if there else "one size for all"


def check_sae(folder: Path, width: int, layer: int) -> None:
    """Compare an SAE's description with the policy whose states it is to read.

    Args:
        folder: In SAELens's layout; what is damaged is left to the reader.
        width: Of the policy's states.
        layer: Whose output it is to read, counted from 0.

    Raises:
        CheckpointError: if it was trained on another width or layer.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found, read = config["d_in"], config.get("metadata", {}).get("hook_layer", layer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if found != width:
        what = f"reads states of width {found}, the policy's are {width} wide"
    elif read != layer:
        what = f"reads layer {read}, the config's policy.use.sae_layer is {layer}"
    else:
        return
    raise CheckpointError(
        f"{path} is of another policy: it {what}; train the SAE again (segcompass train sae)"
    )


def start_config(start: Path) -> tuple[Path, ModelConfig]:
    """The policy folder and the config of a model to start from, without reading its weights.

    Raises:
        CheckpointError: if it is no model folder.
        MissingAssetError: if it is not there.
    """
    preset, raw = find_published(start), None
    if preset is not None:
        policy = find_model(preset.source(preset.policy))
        path, raw = preset.path, preset.settings(policy)
    else:
        folder = find_model(start)
        policy, path = folder / "policy", folder / BINDING
        try:
            raw = read_object(path, "give a model folder").get("config")
        except DataError as error:
            raise CheckpointError(f"{folder} is no complete model folder: {error}") from error
    try:
        return policy, ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path} does not fit this version: {error}") from error


def check_start(config: RunConfig) -> None:
    """Compare the model that the joint stage starts from with what the config says of its parts.

    The model keeps its own parts, so a setting that asks for others would change nothing. What
    the config's file does not set is the model's, and so is everything with `source: scratch`.

    Raises:
        ConfigError: naming each setting that differs, and both values.
        CheckpointError, MissingAssetError: as of :func:`start_config`.
    """
    start = config.train_joint.start
    if start is None:
        return
    folder, model = start_config(start)
    if model.interface != config.interface:
        raise ConfigError(
            f"{start} is a model of the interface {model.interface}, "
            f"the config says {config.interface}; set `interface: {model.interface}`"
        )
    found = list(_differences(config, folder, model))
    if found:
        told = "; ".join(
            f"{key} is {there} there, {asked} in the config" for key, asked, there in found
        )
        raise ConfigError(
            f"train_joint.start: {start} keeps its own parts, but {told}. Take these settings out "
            "of the config, or start from another model"
        )


_Difference = tuple[str, Any, Any]  # key, what the config asks for, what the model has


def _differences(config: RunConfig, folder: Path, model: ModelConfig) -> Iterator[_Difference]:
    """What the file sets and the model has otherwise."""
    if "head" in config.model_fields_set:
        yield from _unlike("head", config.head, model.head)
    if "policy" in config.model_fields_set:
        yield from _unlike_policy(config.policy, folder, model)
    limits = config.data.image_pixels
    if limits is not None and (there := picture_limits(folder)) != limits:
        yield "data.image_pixels", list(limits), _limits(there)


def _unlike_policy(asked: PolicySource, folder: Path, model: ModelConfig) -> Iterator[_Difference]:
    if "source" in asked.model_fields_set and asked.source != "scratch":
        wanted, there = _backbone(asked.source), _backbone(folder)
        if wanted is None and Path(asked.source).exists():
            yield "policy.source", f"{asked.source} (no policy)", f"a {there}"
        if wanted is not None and there is not None and wanted != there:
            yield "policy.source", f"{asked.source} ({wanted})", f"a {there}"
    if "use" in asked.model_fields_set:
        yield from _unlike("policy.use", asked.use, model.policy)


def _unlike(where: str, asked: BaseModel, found: BaseModel) -> Iterator[_Difference]:
    """Settings of a section that were made, and are otherwise in another one of its kind."""
    for name in sorted(asked.model_fields_set):
        wanted, there = getattr(asked, name), getattr(found, name, None)
        if isinstance(wanted, BaseModel) and isinstance(there, BaseModel):
            yield from _unlike(f"{where}.{name}", wanted, there)
        elif wanted != there:
            yield f"{where}.{name}", repr(wanted), repr(there)


def picture_limits(folder: Path) -> tuple[int, int] | None:
    """Least and most pixels of a picture for a policy on disk; None where it has no such limits.

    Raises:
        CheckpointError: if the settings of its image processor are damaged.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        found = read_object(path, "get a complete copy of the policy")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    size = found.get("size")
    size = size if isinstance(size, dict) else {}
    least = size.get("shortest_edge", found.get("min_pixels"))
    most = size.get("longest_edge", found.get("max_pixels"))
    return (least, most) if isinstance(least, int) and isinstance(most, int) else None


def _asked(source: PolicySource) -> Backbone | None:
    """What the config asks for; None where only the network could tell."""
    if source.source == "scratch":
        return Backbone("qwen2_5_vl", source.scratch.width, source.scratch.layers)
    return _backbone(source.source)


def _backbone(source: str | Path) -> Backbone | None:
    """From a folder's or a cached hub id's config; None where that is not to be had."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        return Backbone(config.model_type, text.hidden_size, text.num_hidden_layers)
    except Exception:  # missing or damaged: loading will say so, with the way out
        return None
