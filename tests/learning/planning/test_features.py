"""Stored image features: right, found by content, whole after a kill, checked when read."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from recipes import write_llava_config
from safetensors import safe_open
from tiny import policy_config, tiny_sam, write_policy
from torch import Tensor

from segcompass.data.samples import read_dataset
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.io.errors import ConfigError, DataError, ImageError
from segcompass.io.images import load_image
from segcompass.learning.engine.distributed import World
from segcompass.learning.planning.features import (
    ImageFeatures,
    feature_fingerprint,
    limit_pixels,
    open_features,
    read_index,
)
from segcompass.learning.planning.precompute import run_features, write_features
from segcompass.reasoning.backbones import Backbone
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy


class Encoders(NamedTuple):
    """What makes features, and pictures to make them of."""

    policy: Policy
    encoder: ImageEncoder
    paths: list[Path]

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone


@pytest.fixture
def made(family: str, policy_folder: Path, scenes_root: Path, tmp_path: Path) -> Encoders:
    """Encoders of either family, and four pictures that a test may change."""
    policy = load_policy(policy_folder, policy_config(family))
    found = dict.fromkeys(s.image_path for s in read_dataset(scenes_root, "train"))
    found |= dict.fromkeys(s.image_path for s in read_dataset(scenes_root, "val"))
    copies = [tmp_path / f"{i}.jpg" for i in range(4)]
    for source, copy in zip(found, copies, strict=False):
        shutil.copy(source, copy)
    return Encoders(policy, ImageEncoder(tiny_sam()), copies)


def write(made: Encoders, folder: Path, *, rank: int = 0, size: int = 1, shard: int = 1) -> Path:
    """As a rank of a world would; by default every tensor fills a shard."""
    world = World(rank, size, torch.device("cpu"))
    args = folder, made.backbone, made.encoder, made.paths
    return write_features(*args, world=world, shard_bytes=shard)


def opened(made: Encoders, folder: Path) -> ImageFeatures:
    return open_features(folder, made.backbone, made.encoder, made.paths)


@torch.no_grad()
def directly(made: Encoders, path: Path) -> tuple[Tensor, Tensor]:
    """What the networks make of a picture, without any store."""
    image = load_image(path)
    features = made.backbone.embed_images([made.backbone.prepare(image)])[0]
    return features, made.encoder(made.encoder.preprocess([image])[0])[0]


class Counted:
    """Counts what a method is called for, and stops a run before call number ``stop``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, made: Encoders, stop: int = 0) -> None:
        self.calls, self.stop = 0, stop
        self.embed: Callable[..., list[Tensor]] = made.backbone.embed_images
        monkeypatch.setattr(made.backbone, "embed_images", self)

    def __call__(self, visuals: list[object]) -> list[Tensor]:
        if self.calls + 1 == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.embed(visuals)


def test_what_is_read_is_what_the_encoders_make_in_bf16(made: Encoders, tmp_path: Path) -> None:
    stored = opened(made, write(made, tmp_path / "store", shard=5_000))
    for path in made.paths:
        features, keys = directly(made, path)
        for found, expected in ((stored.features(path), features), (stored.keys(path), keys)):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, expected.bfloat16())
    assert len(list((tmp_path / "store").glob("*.safetensors"))) > 1


def test_the_policy_takes_them_like_those_of_a_memo(made: Encoders, tmp_path: Path) -> None:
    stored = opened(made, write(made, tmp_path / "store"))
    path = made.paths[0]
    visual = made.backbone.prepare(load_image(path))
    sequences = made.policy.encode([visual], ["the red mug"], ["There is a mug."])
    with torch.no_grad():
        rounded = [directly(made, path)[0].bfloat16().float()]
        _, expected = made.policy(sequences, [visual], rounded)
        _, found = made.policy(sequences, [visual], [stored.features(path)])
        _, whole = made.policy(sequences, [visual])
    torch.testing.assert_close(found, expected)
    assert (found - whole).abs().max() < 0.05 * whole.abs().max()  # bf16 has 8 bits


def test_names_are_hashes_of_picture_and_encoder(made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store")
    mark = feature_fingerprint(made.backbone)
    expected = hashlib.sha256(made.paths[0].read_bytes() + mark.encode()).hexdigest()
    entry = read_index(folder)[expected]
    with safe_open(entry.shard, framework="pt") as file:
        assert expected in file.keys()  # noqa: SIM118
        content = file.get_tensor(expected).view(torch.uint8).numpy().tobytes()
    assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_equal_pictures_are_computed_once(
    made: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(made.paths[0], made.paths[3])
    counted = Counted(monkeypatch, made)
    stored = opened(made, write(made, tmp_path / "store"))
    assert counted.calls == 3
    assert torch.equal(stored.keys(made.paths[0]), stored.keys(made.paths[3]))


def test_a_changed_picture_is_not_found(made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store")
    shutil.copy(made.paths[0], made.paths[2])
    opened(made, folder)  # its new content is known from elsewhere
    made.paths[1].write_bytes(made.paths[1].read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"features of 1 of 4 pictures, first \S+1\.jpg.*features"):
        opened(made, folder)


@pytest.mark.parametrize("part", ["policy", "segmenter", "processor"])
def test_other_encoders_find_nothing(part: str, made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store")
    with torch.no_grad():
        if part == "policy":
            next(made.backbone.vision.parameters()).flatten()[0] += 1
        elif part == "segmenter":
            next(made.encoder.vision_encoder.parameters()).flatten()[0] += 1
        else:
            made.backbone.image_processor.image_mean = [0.4, 0.5, 0.5]
    what = "keys" if part == "segmenter" else "features"
    with pytest.raises(DataError, match=f"image {what} of 4 of 4"):
        opened(made, folder)


def test_the_language_model_does_not_matter(made: Encoders, tmp_path: Path) -> None:
    """Or features would have to be made anew for every stage of training."""
    folder = write(made, tmp_path / "store")
    with torch.no_grad():
        made.backbone.final_norm.weight.add_(1)
    stored, path = opened(made, folder), made.paths[0]
    assert torch.equal(stored.features(path), directly(made, path)[0].bfloat16())


def test_an_interrupted_run_goes_on_where_it_stopped(
    made: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Counted(patch, made, stop=3)
        write(made, folder, shard=1 << 30)
    assert len(read_index(folder)) == 4  # two pictures, whole
    counted = Counted(monkeypatch, made)
    stored = opened(made, write(made, folder))
    assert counted.calls == 2
    for path in made.paths:
        assert torch.equal(stored.features(path), directly(made, path)[0].bfloat16())
    write(made, folder)
    assert counted.calls == 2 + len(made.paths)  # by `directly`; nothing is left to do


def test_a_half_written_shard_is_never_read(
    made: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a shard is written, and cut off by a full disk after the index knew it."""
    folder = write(made, tmp_path / "store")
    shards = sorted(folder.glob("*.safetensors"))
    (folder / "00000-00099.partial").write_bytes(shards[0].read_bytes()[:50])
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    with pytest.raises(DataError, match="1 of 4 pictures"):
        opened(made, folder)
    counted = Counted(monkeypatch, made)
    stored = opened(made, write(made, folder))
    assert counted.calls == 1
    assert not list(folder.glob("*.partial"))
    assert torch.equal(stored.keys(made.paths[0]), directly(made, made.paths[0])[1].bfloat16())


def test_the_index_never_tells_of_a_shard_before_it_is_there(
    made: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    replaced: list[str] = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        told = json.loads(self.read_text())["shards"] if target.suffix == ".json" else {}
        assert all((folder / shard).is_file() for shard in told)
        replaced.append(target.suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    write(made, folder)
    assert replaced == [".safetensors", ".json"] * 8


def test_a_changed_byte_is_noticed(made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store", shard=1 << 30)
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    stored = opened(made, folder)
    with pytest.raises(DataError, match=rf"{shard.name}.*not what was written; delete"):
        for path in made.paths:
            stored.features(path), stored.keys(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "segcompass.features/9"}'])
def test_a_damaged_index_is_named(content: str, made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store")
    (folder / "index-00000.json").write_text(content)
    with pytest.raises(DataError, match=r"index-00000\.json"):
        opened(made, folder)


def test_ranks_share_the_work_and_another_number_goes_on(
    made: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch, made)
    folder = write(made, tmp_path / "store", rank=1, size=2)
    assert counted.calls == 2
    (folder / "00000-00000.partial").touch()  # of rank 0, which may be at work
    write(made, folder, rank=1, size=3)
    assert counted.calls == 2  # of three, rank 1 has picture 1 only, which is there
    assert (folder / "00000-00000.partial").exists()
    for rank in range(3):
        write(made, folder, rank=rank, size=3)
    assert counted.calls == 4
    stored = opened(made, folder)
    for path in made.paths:
        assert torch.equal(stored.keys(path), directly(made, path)[1].bfloat16())


def test_an_unreadable_picture_is_named_and_the_work_before_it_kept(
    made: Encoders, tmp_path: Path
) -> None:
    made.paths[2].write_text("no picture")
    with pytest.raises(ImageError, match=r"2\.jpg"):
        write(made, tmp_path / "store", shard=1 << 30)
    assert len(read_index(tmp_path / "store")) == 4


def test_pictures_in_an_archive_need_not_be_extracted(made: Encoders, tmp_path: Path) -> None:
    archive = tmp_path / "train2014.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in made.paths:
            file.write(path, f"train2014/{path.name}")
    packed = made._replace(paths=[archive / "train2014" / path.name for path in made.paths])
    stored = opened(packed, write(packed, tmp_path / "store"))
    for inside, outside in zip(packed.paths, made.paths, strict=True):
        assert torch.equal(stored.features(inside), directly(made, outside)[0].bfloat16())
        assert torch.equal(stored.keys(outside), stored.keys(inside))  # named by content


def test_a_missing_picture_is_named(made: Encoders, tmp_path: Path) -> None:
    folder = write(made, tmp_path / "store")
    made.paths[1].unlink()
    with pytest.raises(ImageError, match=r"1\.jpg: cannot be opened"):
        opened(made, folder)
    with pytest.raises(ImageError, match=r"1\.jpg: cannot be opened"):
        write(made, folder)


def test_a_policy_that_stretches_pictures_has_features_of_its_own(made: Encoders) -> None:
    plain = feature_fingerprint(made.backbone)
    made.backbone.stretch_to = 56
    stretched = feature_fingerprint(made.backbone)
    made.backbone.stretch_to = 84
    assert len({plain, stretched, feature_fingerprint(made.backbone)}) == 3


def test_an_empty_folder_says_what_to_do(made: Encoders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data features CONFIG"):
        opened(made, tmp_path / "nothing")


def test_pixel_limits_are_kept_with_the_policy(tmp_path: Path) -> None:
    policy = load_policy(write_policy(tmp_path / "p", "qwen2_5_vl"), policy_config("qwen2_5_vl"))
    limit_pixels(policy.backbone, None)
    large = policy.backbone.prepare(load_image(_picture(tmp_path)))
    limit_pixels(policy.backbone, (16**2, 32**2))
    small = policy.backbone.prepare(load_image(_picture(tmp_path)))
    assert (large.grid, small.grid) == ((4, 4), (2, 2))  # of 64² and 32² px, 16 px a token
    policy.backbone.image_processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 256, "longest_edge": 1024}
    llava = load_policy(write_policy(tmp_path / "l", "llava"), policy_config("llava"))
    with pytest.raises(ConfigError, match="one size"):
        limit_pixels(llava.backbone, (1, 2))


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (300, 300)).save(folder / "grey.png")
    return folder / "grey.png"


def test_the_command_writes_what_the_joint_stage_reads(scenes_root: Path, tmp_path: Path) -> None:
    config = write_llava_config(tmp_path, scenes_root)
    with pytest.raises(ConfigError, match=r"data\.features"):
        run_features(config, [])
    content = yaml.safe_load(config.read_text())
    content["data"]["features"] = str(tmp_path / "store")
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="train segmenter"):
        run_features(config, [])
    tiny_sam().save_pretrained(tmp_path / "run/segmenter")
    assert run_features(config, [], device="cpu") == tmp_path / "store"
    policy = load_policy(tmp_path / "llava", policy_config("llava"))
    paths = [s.image_path for s in read_dataset(scenes_root, "train")]
    stored = open_features(tmp_path / "store", policy.backbone, ImageEncoder(tiny_sam()), paths)
    assert stored.features(paths[0]).shape == (16, 32)


def test_the_command_leaves_out_what_the_config_leaves_out(
    scenes_root: Path, tmp_path: Path
) -> None:
    """As the joint stage does: a picture that is damaged is no reason to go without features."""
    data = tmp_path / "scenes"
    shutil.copytree(scenes_root, data)
    bad, *good = dict.fromkeys(s.image_path for s in read_dataset(data, "train"))
    bad.write_text("no picture")
    config = write_llava_config(tmp_path, data)
    tiny_sam().save_pretrained(tmp_path / "run/segmenter")
    settings = [f"data.features={tmp_path / 'store'}"]
    with pytest.raises(DataError, match="unreadable picture"):
        run_features(config, settings, device="cpu")
    run_features(config, [*settings, "data.on_error=skip"], device="cpu")
    policy = load_policy(tmp_path / "llava", policy_config("llava"))
    open_features(tmp_path / "store", policy.backbone, ImageEncoder(tiny_sam()), good)


def test_the_command_takes_no_other_limits_on_pictures_than_training(
    scenes_root: Path, tmp_path: Path
) -> None:
    """The warm policy's own: features at others would never be found."""
    config = write_llava_config(tmp_path, scenes_root)
    tiny_sam().save_pretrained(tmp_path / "run/segmenter")
    folder = write_policy(tmp_path / "run/policy", "qwen2_5_vl")
    content = yaml.safe_load(config.read_text())
    content["policy"] |= {
        "source": str(folder),
        "use": policy_config("qwen2_5_vl").model_dump(),
    }
    content["data"] |= {"features": str(tmp_path / "store"), "image_pixels": [1024, 16384]}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"is \[1024, 16384\], but .* with \[1024, 4096\]"):
        run_features(config, [], device="cpu")
    assert not (tmp_path / "store").exists()
