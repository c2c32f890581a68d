"""Several data sets in one config: read in order, told apart, and checked together."""

from __future__ import annotations

from pathlib import Path

import pytest

from segcompass.io.errors import ConfigError
from segcompass.learning.checks import training_samples
from segcompass.learning.config import DataConfig, load_config
from segcompass.learning.corpus import read_samples


def test_samples_of_all_sets_follow_each_other(scenes_root: Path, tmp_path: Path) -> None:
    """Also where two sets call their samples the same."""
    alone = read_samples(DataConfig(root=scenes_root))
    more = [{"root": scenes_root, "split": "val", "limit": 2}, {"root": scenes_root, "limit": 1}]
    data = DataConfig.model_validate({"root": scenes_root, "also": more})
    found = read_samples(data)
    assert found[: len(alone)] == alone  # the first set keeps its names
    val = read_samples(DataConfig(root=scenes_root, split="val", limit=2))
    assert [s.image_path for s in found[len(alone) :]] == [s.image_path for s in (*val, alone[0])]
    assert len({s.sample_id for s in found}) == len(found) == len(alone) + 3
    assert training_samples(data, run=tmp_path) == found
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data


def test_a_typo_in_a_further_set_is_named(scenes_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {tmp_path / 'run'}\n"
        f"data: {{root: {scenes_root}, also: [{{root: {scenes_root}, spit: val}}]}}\n"
        "train_joint: {steps: 1, learning_rate: 0.1}\n"
    )
    with pytest.raises(ConfigError, match=r"data\.also\.0\.spit.*did you mean 'split'"):
        load_config(path)
