"""Low-rank adapters on the policy's upper layers: a 7B policy trains on one GPU.

The adapters go into the layers in place (peft), so every path into the model stays: hooks,
`policy.backbone.layers[i]`, generation. The reference policy is the same model with its adapters
switched off; there is no second copy. Before saving they are merged into the weights, and the
model folder is a plain Hugging Face folder again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segcompass.io.errors import ConfigError
from segcompass.reasoning.policy import Policy

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LoraSettings(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the adapters. Update: weight + (alpha / rank) · B A."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of the adapters' inputs, while training; answers are sampled without it",
    )
    targets: tuple[str, ...] = Field(
        _ATTENTION + _FEED_FORWARD, min_length=1, description="matrices of a layer, by name"
    )


def add_lora(policy: Policy, settings: LoraSettings, seed: int = 0) -> None:
    """Put adapters into the policy's layers after the SAE layer, in place; they start at zero.

    Afterwards nothing of these layers trains but the adapters, which have the layers' precision;
    the final norm keeps whatever it was set to. Freeze it too where `reference` has to be the
    policy as it was. The same seed gives the same adapters.

    Raises:
        ConfigError: if peft is missing, or a target is not to be found in the layers.
        ValueError: if the policy has adapters already.
    """
    peft = _peft()
    if adapted(policy):
        raise ValueError("the policy has adapters already; merge them first (merge_lora)")
    upper = upper_layers(policy)
    known = {
        name.rsplit(".", 1)[-1] for name, m in upper.named_modules() if isinstance(m, nn.Linear)
    }
    unknown = sorted(set(settings.targets) - known)
    if unknown:
        raise ConfigError(
            f"lora.targets: the policy's layers have no {', '.join(unknown)}; "
            f"choose of {', '.join(sorted(known)) or 'none'}"
        )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.targets),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # on every rank the same
        peft.inject_adapter_in_model(config, upper)
    for layer in adapted(policy):  # one precision in a layer, or it could not be sharded as one
        for name in layer.adapter_layer_names:
            getattr(layer, name).to(layer.get_base_layer().weight.dtype)
        layer.train(policy.training)  # new modules are in training mode


@contextmanager
def reference(policy: Policy) -> Iterator[None]:
    """The policy as it was before training: its adapters are off inside the block.

    Raises:
        ValueError: if the policy has no adapters.
    """
    layers = adapted(policy)
    if not layers:
        raise ValueError("the policy has no adapters, so it holds no reference; call add_lora")
    _switch(layers, on=False)
    try:
        yield
    finally:
        _switch(layers, on=True)


def _switch(layers: list[Any], *, on: bool) -> None:
    """peft would also decide what trains; but a sharded layer asks that once, so it stays."""
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(on)
    for parameter, trains in trained:
        parameter.requires_grad_(trains)


def merge_lora(policy: Policy) -> None:
    """Add the adapters to the weights and take them out; nothing is done if there are none.

    For a policy in one process; see `merged_state` for a sharded one.
    """
    for parent, name, layer in _places(policy):
        base: Any = layer.get_base_layer()
        halves = [(layer.lora_A[a].weight, layer.lora_B[a].weight) for a in layer.active_adapters]
        for adapter, (down, up) in zip(layer.active_adapters, halves, strict=True):
            base.weight.data = _sum(base.weight.data, down, up, layer.scaling[adapter])
        setattr(parent, name, base)


def merged_state(policy: Policy, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights of an adapted policy as those of a plain one: merged, and with plain names.

    Args:
        policy: Adapted; it may be sharded, and stays as it is.
        state: Of ``policy.model``, from `sharding.full_state`; empty on all ranks but one.
    """
    merged = dict(state)
    if not merged:
        return merged
    for path, layer in policy.model.named_modules():
        if not (hasattr(layer, "get_base_layer") and hasattr(layer, "lora_A")):
            continue
        for name, _ in layer.get_base_layer().named_parameters():
            merged[f"{path}.{name}"] = merged.pop(f"{path}.base_layer.{name}")
        for adapter in layer.active_adapters:
            down, up = (merged.pop(f"{path}.lora_{half}.{adapter}.weight") for half in "AB")
            weight = merged[f"{path}.weight"]
            merged[f"{path}.weight"] = _sum(weight, down, up, layer.scaling[adapter])
    return merged


def trained_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Every weight that training moves, whole, under its plain name; adapters merged.

    For a program that has the frozen weights already. Sharded ones are gathered one by one, so all
    ranks have to go through all of them.
    """
    dtype = policy.model.dtype
    merged = {
        path: layer
        for path, layer in policy.model.named_modules()
        if hasattr(layer, "get_base_layer") and hasattr(layer, "lora_A")
    }
    for path, layer in merged.items():
        weight = _whole(layer.get_base_layer().weight)
        for adapter in layer.active_adapters:
            halves = (_whole(layer.lora_A[adapter].weight), _whole(layer.lora_B[adapter].weight))
            weight = _sum(weight, *halves, layer.scaling[adapter])
        yield f"{path}.weight", weight.to(dtype)
    if policy.token_rows is not None:
        for name, table, rows in policy.token_rows.tables(policy):
            yield name, policy.token_rows.into(table, rows).to(dtype)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad and not any(name.startswith(f"{path}.") for path in merged):
            yield name, _whole(parameter).to(dtype)


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _sum(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Made in fp32 and rounded once to the weight's precision."""
    return (weight.float() + scale * (up.detach().float() @ down.detach().float())).to(weight.dtype)


def upper_layers(policy: Policy) -> nn.ModuleList:
    """The layers that read the SAE layer's output: what adapters go into."""
    return nn.ModuleList(policy.backbone.layers[policy.config.sae_layer + 1 :])


def adapted(policy: Policy) -> list[Any]:
    """The matrices that have adapters."""
    return [layer for _, _, layer in _places(policy)]


def _places(policy: Policy) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, matrix with adapters), found without importing peft."""
    return [
        (parent, name, child)
        for parent in upper_layers(policy).modules()
        for name, child in parent.named_children()
        if hasattr(child, "get_base_layer") and hasattr(child, "lora_A")
    ]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "train_joint.lora needs peft, which is not installed: pip install 'segcompass[lora]'"
        ) from error
    return peft
