"""Which parts the joint stage trains, and the policy as it was before."""

from __future__ import annotations

import copy

from torch import nn

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.learning.engine.lora import add_lora, upper_layers
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

    With ``stage.lora`` the policy's part is adapters, which are put in here.
    """
    policy.requires_grad_(False)
    encoder.requires_grad_(False)
    parts = interface.trained()
    if interface.decoupled:
        interface.requires_grad_(False)
    if stage.lora is not None:
        add_lora(policy, stage.lora, seed)
        parts["policy"] = upper_layers(policy)
    elif stage.train_upper_layers:
        trained = nn.ModuleList([upper_layers(policy), policy.backbone.final_norm])
        parts["policy"] = trained.requires_grad_(True)
    return parts


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for good; what is frozen anyway is shared, not copied."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)
