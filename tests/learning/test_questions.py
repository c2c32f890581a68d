"""What several processes know of pictures before a policy is sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import launch
from tiny import policy_config, tiny_qwen_policy, tiny_sam

from segcompass.data.samples import read_images
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.io.errors import ConfigError
from segcompass.learning import questions
from segcompass.learning.corpus import BlockMemo
from segcompass.learning.engine.distributed import start
from segcompass.learning.questions import PictureMemo
from segcompass.reasoning.loading import load_policy


def known(folder: str, data: str) -> tuple[int, int, int]:
    """Pictures, and how many have features and keys before anyone asks."""
    torch.set_num_threads(1)
    with start("cpu"):
        paths = [record.image_path for record in read_images(Path(data), "train")]
        policy = load_policy(Path(folder), policy_config("qwen2_5_vl"))
        memo = PictureMemo(policy, ImageEncoder(tiny_sam()), paths, None)
        assert isinstance(memo.features, BlockMemo) and isinstance(memo.keys, BlockMemo)
        return len(set(paths)), len(memo.features.kept), len(memo.keys.kept)


def test_ranks_have_all_features_before_the_tower_is_sharded(
    tmp_path: Path, scenes_root: Path
) -> None:
    """A sharded tower runs on all ranks or on none, and each would miss other pictures."""
    folder = tiny_qwen_policy(tmp_path / "policy")
    for pictures, features, keys in launch(known, 2, str(folder), str(scenes_root)):
        assert pictures == features == keys > 1


def test_what_does_not_fit_is_refused(
    tmp_path: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockMemo, "share", lambda self, world: False)
    policy = load_policy(tiny_qwen_policy(tmp_path / "policy"), policy_config("qwen2_5_vl"))
    paths = [record.image_path for record in read_images(scenes_root, "train")]
    with pytest.raises(ConfigError, match="segcompass data features"):
        questions.PictureMemo(policy, ImageEncoder(tiny_sam()), paths, None)
