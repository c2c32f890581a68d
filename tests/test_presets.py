"""The real configurations, without their memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from segcompass.io.errors import ConfigError
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.planning.plan import plan
from segcompass.presets import PRESETS, SEGMENTERS, describe, find_preset

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


CONFIGS = Path(__file__).parents[1] / "configs"
SCALE = (Path(__file__).parents[1] / "docs/scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_configs_have_the_settings_of_the_paper(name: str) -> None:
    """Section 4.1 and A.2, and the sizes of the preset."""
    config, preset = load_config(CONFIGS / f"{name}.yaml"), PRESETS[name]
    use, stage = config.policy.use, config.train_joint
    assert config.policy.source == preset.hub_id
    assert (use.sae_layer, use.pad_to_square) == (preset.use.sae_layer, preset.use.pad_to_square)
    assert use.prompt.template == preset.use.prompt.template
    assert config.head == preset.head and config.train_sae.latents == preset.latents
    assert SEGMENTERS[config.segmenter] == preset.segmenter == "vit-h"
    assert use.max_new_tokens == 2000 and stage.rollout.max_new_tokens is None
    assert (stage.batch, stage.rollout.group, stage.steps) == (16, 8, 24_252)
    assert (stage.learning_rate, stage.warmup, stage.final_division) == (2e-6, 0, 6.7)
    assert (stage.weight_decay, stage.betas, stage.clip) == (0.01, (0.9, 0.999), 1.0)
    factors = stage.multipliers
    assert (factors.policy, factors.codebook, factors.head, factors.decoder) == (1, 25, 80, 10)
    assert factors.tokens == 25  # new parameters, like the codebook's
    assert (stage.grpo.clip, stage.grpo.kl) == (0.2, 0.2)
    assert (stage.rewards.format, stage.rewards.mask) == (0.3, 0.7)
    assert (stage.seg_weight, stage.conf_weight, stage.dice_weight) == (1.0, 0.2, 0.6)
    assert stage.gradient_checkpointing
    assert (config.train_sae.learning_rate, config.train_sae.sequences) == (5e-5, 64)
    if "qwen" in name:
        assert config.data.image_pixels == (3_136, 705_600)


WHOLE = ["train_joint.micro_batch=null", "train_joint.rollout.batch=null"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_headers_tell_what_the_plan_says(name: str) -> None:
    """Prompts stay within 1,400 tokens; hours and hardware are the planner's."""
    path = CONFIGS / f"{name}.yaml"
    header = path.read_text().split("\nrun:")[0]
    said = re.search(r"hardware  (\d+) GPUs of 80 GB", header)
    hours = re.search(r"hours     about ([\d,]+) for the joint stage", header)
    assert said and hours and "estimate" in header and "not reproduced" in header
    made = plan(load_config(path), int(said[1]), 80.0)
    assert made.fits
    assert made.workload.prompt <= 1_400 and made.workload.answer == 2_000
    assert float(hours[1].replace(",", "")) == pytest.approx(made.hours, rel=0.02)
    if int(said[1]) > 8:
        eight = re.search(r"8 in micro-batches \(([\d.]+) GB each\)", header)
        longer = re.search(r"\(([\d,]+) on 8 GPUs\)", header)
        assert eight and longer
        small = plan(load_config(path), 8, 80.0)
        assert small.fits and small.peak_bytes / 1e9 == pytest.approx(float(eight[1]), abs=0.05)
        assert small.hours == pytest.approx(float(longer[1].replace(",", "")), rel=0.02)
        assert not plan(load_config(path, WHOLE), 8, 80.0).fits
    row = f"| `{name}` | {said[1]} | {made.peak_bytes / 1e9:.1f} GB | {hours[1]} |"
    assert row in SCALE


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_page_on_lora_tells_what_the_plan_says(name: str) -> None:
    row = next(r for r in SCALE.splitlines() if r.lower().startswith(f"| {name} |"))
    told = [float(cell.split()[0]) for cell in row.strip("| ").split("|")[1:]]
    cases = [(tokens, batch) for tokens in (2000, 500) for batch in ("null", "1")]
    for (tokens, batch), peak in zip(cases, told, strict=True):
        settings = ["lora={rank: 16}", "batch=1", f"rollout.max_new_tokens={tokens}"]
        settings += [f"micro_batch={batch}", f"rollout.batch={batch}"]
        overrides = [f"train_joint.{setting}" for setting in settings]
        made = plan(load_config(CONFIGS / f"{name}.yaml", overrides), 1, 80.0)
        assert made.fits and made.peak_bytes / 1e9 == pytest.approx(peak, abs=0.05)
