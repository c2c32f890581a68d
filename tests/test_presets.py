"""The real configurations, without their memory."""

from __future__ import annotations

import pytest

from segcompass.io.errors import ConfigError
from segcompass.presets import PRESETS, describe, find_preset

# Parameters of the released architectures, counted by hand from their config.json, and width.
PUBLISHED = {
    "qwen2.5-vl-7b": (8_292_166_656, 3584),
    "llava-1.5-7b": (7_063_427_072, 4096),
    "llava-1.5-13b": (13_351_494_656, 5120),
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_sizes_and_shapes(name: str) -> None:
    facts = describe(name)
    parameters, width = PUBLISHED[name]
    counts = facts["parameters"]
    assert sum(c["total"] for part, c in counts.items() if part.startswith("policy")) == parameters
    assert counts["sparse autoencoder"] == {
        "total": 2 * 65_536 * width + 65_536 + width,
        "trainable": 0,
    }
    assert counts["query codebook"]["total"] >= 65_536 * 512
    assert counts["segmenter, image encoder"]["trainable"] == 0
    sam = sum(c["total"] for part, c in counts.items() if part.startswith("segmenter"))
    assert sam == pytest.approx(641.1e6, rel=1e-3)
    for kind in ("total", "trainable"):
        assert counts["all"][kind] == sum(c[kind] for p, c in counts.items() if p != "all")
    assert 0 < counts["all"]["trainable"] < counts["all"]["total"]
    shapes = facts["shapes"]
    assert shapes["SAE states (B L D)"].endswith(f"×{width}")
    assert shapes["slot queries (B K Q)"] == f"1×6×{width}"
    assert shapes["concept vectors (B K C)"] == "1×6×512"
    assert shapes["head scores (B K H h w)"] == "1×6×4×64×64"
    assert shapes["masks (B K 4h 4w)"] == "1×6×256×256"


def test_the_hook_layers_of_the_paper() -> None:
    """The 13th of 28 layers, the 16th of 32 and 40."""
    assert {name: p.use.sae_layer for name, p in PRESETS.items()} == {
        "qwen2.5-vl-7b": 12,
        "llava-1.5-7b": 15,
        "llava-1.5-13b": 15,
    }


def test_an_unknown_preset_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"llava-1\.5-13b; did you mean qwen2\.5-vl-7b"):
        find_preset("qwen2.5-vl-8b")
