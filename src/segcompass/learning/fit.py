"""Do the parts in a run's folder belong to its config? Told from their configs, before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from segcompass.concepts.sae_files import CONFIG_NAME
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.config import PolicySource


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
