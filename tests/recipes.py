"""Configs of runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny import policy_config, tiny_head, tiny_llava_policy, tiny_sam

STEPS = 4  # of every stage; the state is saved after every second


def stage(steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """Settings of one stage."""
    return {"steps": steps, "batch": 2, "learning_rate": 5e-3, "save_every": 2, **settings}


def write_config(folder: Path, data: Path, **changes: Any) -> Path:
    """A YAML of all stages for the smallest policy from scratch; RUN is FOLDER/run."""
    sam = folder / "sam"
    tiny_sam().save_pretrained(sam)
    config = {
        "run": str(folder / "run"),
        "seed": 3,
        "threads": 1,
        "data": {"root": str(data)},
        "policy": {
            "source": "scratch",
            "dtype": "bfloat16",
            "scratch": {
                **{"width": 32, "layers": 2, "heads": 2, "ffn": 48, "vocabulary": 512},
                **{"vision_width": 32, "vision_layers": 1, "vision_heads": 2, "vision_ffn": 48},
                **{"image_side": 64, "patch": 4},
            },
            "use": {"sae_layer": 0, "pad_to_square": True, "max_new_tokens": 24},
        },
        "segmenter": str(sam),
        "head": tiny_head().model_dump(),
        "train_segmenter": stage(prompts=2),
        "train_vision": stage(),
        "train_language": stage(group=2),
        "train_sae": stage(batch=64, latents=48, samples=6),
        "train_joint": stage(group=2, oracle_steps=STEPS // 2, rollout={"group": 2}),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_llava_config(folder: Path, data: Path, **changes: Any) -> Path:
    """As above for a LLaVA folder, which needs neither a segmenter stage nor a vision stage."""
    policy = {
        "source": str(tiny_llava_policy(folder / "llava")),
        "dtype": "float32",
        "use": policy_config("llava").model_dump(),
    }
    stages = {"train_segmenter": None, "train_vision": None, "train_language": None}
    once = {
        "train_sae": stage(1, batch=64, latents=48, samples=4),
        "train_joint": stage(1, oracle_steps=1),
    }
    return write_config(folder, data, **{"policy": policy, **stages, **once, **changes})
