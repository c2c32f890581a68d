"""Models that others have published, by preset: which policy and segmenter, and how they are used.

A preset is a YAML file; those in ``assets/presets`` are known by name.

    policy: Ricky06662/Seg-Zero-7B          # hub id, or a folder, relative to the file
    segmenter: facebook/sam2-hiera-large
    question: Where is {instruction}? …     # what is asked; ours where omitted
    model: {interface: text_readout, …}     # as in a model folder's segcompass.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from segcompass.io.assets import ASSETS
from segcompass.io.errors import ConfigError
from segcompass.io.settings import read_yaml
from segcompass.reasoning.chat import chat_template
from segcompass.reasoning.prompts import OBJECT_QUESTION


class Published(BaseModel, frozen=True, extra="forbid"):
    """A preset, as read from its file."""

    path: Path
    policy: str = Field(description="hub id, or a folder, relative to the file")
    segmenter: str = Field(description="hub id, or a folder, relative to the file")
    dtype: str = Field("bfloat16", description="of the policy")
    question: str = Field(OBJECT_QUESTION, description="what is asked, with {instruction}")
    model: dict[str, Any] = Field(description="settings of the model, as in a model folder")

    def source(self, part: str) -> str:
        """The folder or hub id of the policy or of the segmenter."""
        folder = self.path.parent / part
        return str(folder) if folder.is_dir() else part

    def settings(self, policy: Path) -> dict[str, Any]:
        """The model's settings, its prompt template filled in.

        A template that the preset gives goes first, then the chat template of the policy's folder
        around the question, then Qwen's.
        """
        use: Mapping[str, Any] = self.model.get("policy", {})
        prompt: Mapping[str, Any] = use.get("prompt", {})
        if "template" in prompt:
            return self.model
        prompt = {**prompt, "template": chat_template(policy, self.question)}
        return {**self.model, "policy": {**use, "prompt": prompt}}


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in (ASSETS / "presets").glob("*.yaml"))


def find_published(name: str | Path) -> Published | None:
    """The preset of this name, or in this YAML file; None if it is neither.

    Raises:
        ConfigError: If the file cannot be read, naming it and the setting that is wrong.
    """
    if str(name) in preset_names():
        path = ASSETS / "presets" / f"{name}.yaml"
    elif Path(name).suffix in {".yaml", ".yml"}:
        path = Path(name)
    else:
        return None
    try:
        return Published.model_validate({**read_yaml(path), "path": path})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"{path} is no preset of a published model: {'; '.join(problems)}"
        ) from error
