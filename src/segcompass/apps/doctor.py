"""What this machine and this installation have: the first thing to read when something is off."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from segcompass.io.assets import MissingAssetError, bundled

PACKAGES = ("segcompass", "torch", "transformers", "tokenizers", "safetensors", "numpy", "Pillow")


def examine() -> dict[str, str]:
    """Versions, devices, threads, and whether the bundled assets are there."""
    import torch

    facts = {"Python": f"{platform.python_version()} on {platform.platform()}"}
    facts |= {name: metadata.version(name) for name in PACKAGES}
    facts["device"] = (
        ", ".join(
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        )
        or "cpu"
    )
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    facts["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "online"
    facts |= {f"bundled {name}": _bundled(name) for name in ("nano", "demo")}
    return facts


def _bundled(name: str) -> str:
    try:
        folder = bundled(name)
    except MissingAssetError:
        return "missing: install the package again"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder} ({size / 1e6:.1f} MB)"
