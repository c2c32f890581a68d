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
from segcompass.io.images import load_image
from segcompass.learning import questions
from segcompass.learning.corpus import BlockMemo
from segcompass.learning.engine.distributed import start
from segcompass.learning.questions import PictureMemo, key_memo
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


def test_keys_are_made_of_one_picture_at_a_time(scenes_root: Path) -> None:
    """What `train plan` counts, and what comes of a picture does not depend on the others."""
    encoder = ImageEncoder(tiny_sam())
    paths = list(dict.fromkeys(r.image_path for r in read_images(scenes_root, "train")))
    shown: list[int] = []
    hook = encoder.register_forward_pre_hook(lambda _, pixels: shown.append(len(pixels[0])))
    memo = key_memo(encoder, paths)
    found = [memo(path) for path in paths]
    hook.remove()
    assert len(paths) > 1 and set(shown) == {1}
    with torch.no_grad():
        for path, keys in zip(paths, found, strict=True):
            alone = encoder(encoder.preprocess([load_image(path)])[0])[0]
            torch.testing.assert_close(keys, alone.bfloat16(), rtol=0, atol=0)
