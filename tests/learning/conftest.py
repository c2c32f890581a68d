"""What tests of training stages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # heavy; most tests here do without
    from joint import Parts

    from segcompass.learning.train_joint import JointStep


@pytest.fixture(scope="session")
def plain_policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain Hugging Face folders of both families; do not write to them."""
    from tiny import write_policy

    base = tmp_path_factory.mktemp("plain")
    return {family: write_policy(base / family, family) for family in ("qwen2_5_vl", "llava")}


@pytest.fixture
def assemble(
    plain_policies: dict[str, Path], scenes_root: Path, tmp_path: Path
) -> Callable[..., Parts]:
    """Builds the parts of a model before its joint stage."""
    from joint import build_parts

    def build(family: str = "qwen2_5_vl", latents: int = 64) -> Parts:
        return build_parts(family, plain_policies[family], scenes_root, tmp_path / "run", latents)

    return build


@pytest.fixture
def joint(assemble: Callable[..., Parts]) -> Callable[..., JointStep]:
    """Builds a joint step over the questions that have a target, what is frozen frozen."""
    import torch
    from joint import stage

    from segcompass.learning.train_joint import JointStep, freeze

    def build(
        family: str = "qwen2_5_vl", latents: int = 64, every: bool = False, **changes: Any
    ) -> JointStep:
        parts, settings = assemble(family, latents), stage(**changes)
        freeze(*parts[:3], settings)
        torch.manual_seed(0)
        step = JointStep(*parts, settings)
        step.samples = [s for s in step.samples if every or s.targets]
        step.lengths = [len(s.instruction) for s in step.samples]
        return step

    return build
