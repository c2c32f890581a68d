"""Scenes on disk: three layouts that read back what was drawn, whoever drew it, all or nothing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcompass.data.samples import read_dataset, read_images
from segcompass.data.scenes import writer
from segcompass.data.scenes.questions import KINDS, describe, resolve
from segcompass.data.scenes.render import render
from segcompass.data.scenes.world import SPLITS, sample_scene
from segcompass.data.scenes.writer import write_scenes
from segcompass.interfaces.candidates import iou
from segcompass.io import masks
from segcompass.io.errors import DataError

COUNTS = {"train": 20, "val": 6, "testA": 0, "testB": 4}
SEED, SIZE = 11, 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    assert write_scenes(out, COUNTS, SEED, workers=1, size=SIZE)
    return out


def fingerprints(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("split", [s for s in SPLITS if COUNTS[s]])
def test_the_complete_layout_reads_back_what_was_drawn(root: Path, split: str) -> None:
    samples = read_dataset(root, split)
    assert len(samples) == COUNTS[split]
    for number, sample in enumerate(samples):
        scene = sample_scene(random.Random(f"{SEED}/{split}/{number // 3}"), split=split)
        drawn = render(scene, SIZE)
        assert sample.kind in KINDS
        assert sample.thought is not None
        chosen = resolve(sample.thought, sample.objects)
        assert chosen is not None
        assert tuple(sample.objects[i].ann_id for i in chosen) == sample.target_ids
        for index, rle in zip(chosen, sample.targets, strict=True):
            np.testing.assert_array_equal(masks.decode(rle), drawn.visible[index])
        assert [(o.category, o.colour, o.size, o.texture, o.cell) for o in sample.objects] == [
            (t.category, t.colour, t.size, t.texture, t.cell) for t in scene.things
        ]
        with Image.open(sample.image_path) as image:
            assert (image.format, image.size) == ("JPEG", (SIZE, SIZE))
            error = np.abs(np.asarray(image).astype(int) - drawn.image)
        assert error.mean() < 6
    assert sum(not s.targets for s in read_dataset(root, "train")) > 0  # no-target is written too


def test_whole_pictures_read_back(root: Path) -> None:
    records = read_images(root, "train")
    assert len(records) == 7
    for number, record in enumerate(records):
        scene = sample_scene(random.Random(f"{SEED}/train/{number}"), split="train")
        assert record.description == describe(scene)
        assert record.image_hw == (SIZE, SIZE)
        visible = render(scene, SIZE).visible
        assert len(record.objects) == len(record.masks) == len(visible)
        for rle, mask in zip(record.masks, visible, strict=True):
            np.testing.assert_array_equal(masks.decode(rle), mask)


def test_refcoco_holds_the_questions_with_one_target(root: Path) -> None:
    complete = [s for s in read_dataset(root, "train") if len(s.targets) == 1]
    single = read_dataset(root, "train", layout="refcoco")
    assert [(s.sample_id, s.instruction, s.targets) for s in single] == [
        (s.sample_id, s.instruction, s.targets) for s in complete
    ]


def test_reasonseg_holds_the_questions_with_targets(root: Path) -> None:
    complete = [s for s in read_dataset(root, "val") if s.targets]
    asked = read_dataset(root, "val", layout="reasonseg")
    assert [s.instruction for s in asked] == [s.instruction for s in complete]
    for ours, original in zip(asked, complete, strict=True):
        expected = masks.encode(masks.union(original.targets, original.image_hw))
        assert iou(masks.decode(ours.targets[0]), masks.decode(expected)) >= 0.98
        assert ours.image_path.samefile(original.image_path)  # stored once


def test_workers_change_nothing(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "again", COUNTS, SEED, workers=2, size=SIZE)
    assert fingerprints(tmp_path / "again") == fingerprints(root)


def test_links_may_be_copies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(writer.os, "link", refuse)
    write_scenes(tmp_path / "copied", COUNTS, SEED, workers=1, size=SIZE)
    assert fingerprints(tmp_path / "copied") == fingerprints(root)


def test_a_scene_depends_on_seed_split_and_number_alone(root: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_scenes(
        tmp_path / "few",
        {"train": 4},
        SEED,
        workers=1,
        size=SIZE,
        progress=lambda *p: seen.append(p),
    )
    few, many = (fingerprints(r / "grefcoco" / "images") for r in (tmp_path / "few", root))
    assert few == {name: many[name] for name in few}
    assert seen == [(1, 2), (2, 2)]
    first = read_dataset(tmp_path / "few", "train", limit=3)
    assert [(s.sample_id, s.instruction, s.targets) for s in first] == [
        (s.sample_id, s.instruction, s.targets) for s in read_dataset(root, "train", limit=3)
    ]


def test_another_seed_gives_other_scenes(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "other", {"val": 3}, SEED + 1, workers=1, size=SIZE)
    (name,) = fingerprints(tmp_path / "other" / "grefcoco" / "images")
    images = (r / "grefcoco" / "images" / name for r in (root, tmp_path / "other"))
    assert len({p.read_bytes() for p in images}) == 2


def test_what_is_there_is_kept_or_refused(root: Path, tmp_path: Path) -> None:
    before = fingerprints(root)
    assert not write_scenes(root, COUNTS, SEED, workers=1, size=SIZE)
    with pytest.raises(DataError, match=r"holds other scenes: \{'seed': 11\}"):
        write_scenes(root, COUNTS, SEED + 1, workers=1, size=SIZE)
    assert fingerprints(root) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than scenes"):
        write_scenes(tmp_path, COUNTS, SEED)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_scenes(empty, {"val": 1}, SEED, workers=1, size=SIZE)
    assert json.loads((empty / "manifest.json").read_text())["counts"]["val"] == 1


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", COUNTS, SEED, workers=1, size=SIZE, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_world_without_questions_is_an_error_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mute(*_: object, **__: object) -> None:
        raise ValueError("no question fits")

    monkeypatch.setattr(writer, "ask", mute)
    with pytest.raises(ValueError, match="scenes of train in a row: no question fits"):
        write_scenes(tmp_path / "out", {"train": 1}, SEED, workers=1, size=SIZE)


@pytest.mark.parametrize(
    ("counts", "per_image", "match"),
    [
        ({"test": 1}, 3, "no split is called 'test'"),
        ({"train": -1}, 3, "between 0 and"),
        ({"train": 0}, 3, "at least one question"),
        ({"train": 1}, 0, "questions_per_image"),
        ({"train": 3_000_001}, 3, "between 0 and 3000000"),
    ],
)
def test_senseless_wishes_are_refused(
    tmp_path: Path, counts: dict[str, int], per_image: int, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        write_scenes(tmp_path / "out", counts, SEED, questions_per_image=per_image)
    assert list(tmp_path.iterdir()) == []
