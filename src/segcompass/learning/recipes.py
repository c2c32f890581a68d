"""What `recipe: release` stands for: the settings in which the release departs from the paper."""

from __future__ import annotations

from typing import Any

from segcompass.interfaces.registry import OfInterface
from segcompass.io.settings import merged

# Loss weights are of the release's first phase, `late` has those of its second.
RELEASE: dict[str, Any] = {
    "policy": {"use": {"prompt": {"slots": 4}}},
    "head": {"mapper": {"confidence": "query"}},
    "train_sae": {"threshold": 2.0},
    "train_joint": {
        "learning_rate": 1.6e-6,
        "seg_weight": 0.3,
        "dice_weight": 0.8,
        "heatmap_dice_weight": 0.8,
        "focal_weight": 0.0,
        "late": {"dice_weight": 2.0, "heatmap_dice_weight": 2.0, "focal_weight": 5.0},
        "rewards": {"single": "blend", "several": "size"},
    },
}


def with_recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run over those of the recipe that they name; the settings go first.

    The second phase begins half-way, unless ``late.from_step`` says when: the release's own step
    is not known. A model to start from keeps its parts, so only the joint stage is changed then,
    and a stage that a run does without is not put in.

    Raises:
        ValueError: if the recipe is of another interface.
    """
    joint = settings.get("train_joint")
    if not isinstance(joint, dict) or joint.get("recipe") != "release":
        return settings
    interface = settings.get("interface", OfInterface.model_fields["interface"].default)
    if interface != "concept_slots":
        raise ValueError(
            f"train_joint.recipe: release is that of concept_slots, the config has {interface}; "
            "take it out, or set what you want of it by hand"
        )
    sections = {"train_joint"} if joint.get("start") is not None else set(RELEASE)
    if settings.get("train_sae") is None:
        sections.discard("train_sae")
    steps = joint.get("steps")
    begins = {"late": {"from_step": steps // 2}} if isinstance(steps, int) else {}
    release = merged(RELEASE, {"train_joint": begins})
    return merged({name: release[name] for name in sorted(sections)}, settings)
