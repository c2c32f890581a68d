"""Which parts the joint stage trains, and the policy as it was before."""

from __future__ import annotations

import copy

from torch import nn

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.learning.engine.lora import adapted, add_lora, upper_layers
from segcompass.learning.engine.token_rows import TokenRows
from segcompass.learning.stages import JointStage
from segcompass.reasoning.policy import Policy


def freeze(
    policy: Policy,
    encoder: ImageEncoder,
    interface: Interface,
    stage: JointStage,
    seed: int = 0,
) -> dict[str, nn.Module]:
    """Freeze what this stage leaves alone; returns the trained parts by name.

    With ``stage.lora`` the policy's part is adapters, which are put in here. The concentration
    tokens' rows train with the policy, as a part of their own; those of the embedding with the
    lower layers only, which read them.
    """
    policy.requires_grad_(False)
    encoder.requires_grad_(False)
    parts = interface.trained()
    if interface.decoupled:
        interface.requires_grad_(False)
    if stage.lora is not None:
        add_lora(policy, stage.lora, seed)
        for layer in adapted(policy):
            layer.train()  # their dropout; all else stays as it is judged
        parts["policy"] = upper_layers(policy)
    elif stage.train_upper_layers:
        layers = policy.backbone.layers if stage.train_lower_layers else upper_layers(policy)
        trained = nn.ModuleList([layers, policy.backbone.final_norm])
        parts["policy"] = trained.requires_grad_(True)
    if "policy" in parts and policy.slots:
        parts["tokens"] = TokenRows(policy, embedded=stage.train_lower_layers)
    return parts


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for good, without dropout; what is frozen anyway is shared."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()
