"""Bad training input: each kind is named before anything is computed, or left out and counted."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import prompt_of

from segcompass.data.samples import read_dataset
from segcompass.io import images
from segcompass.io.errors import DataError, UnsafeFileError
from segcompass.io.images import load_image
from segcompass.io.masks import encode, run_lengths
from segcompass.learning import checks
from segcompass.learning.checks import (
    check_samples,
    find_problems,
    training_samples,
)
from segcompass.learning.config import DataConfig
from segcompass.types import Sample

HW = (24, 32)
SQUARE = np.zeros(HW, dtype=bool)
SQUARE[4:10, 6:20] = True


def picture(path: Path, hw: tuple[int, int] = HW, **options: Any) -> Path:
    """Noise, so that the file has a middle that can be missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def good(tmp_path: Path) -> list[Sample]:
    """Three samples without fault: a target, two targets, and nothing that matches."""
    found = []
    for name, targets in (("a", 1), ("b", 2), ("c", 0)):
        path = picture(tmp_path / f"{name}.jpg")
        rles = tuple(encode(np.roll(SQUARE, k, axis=0)) for k in range(targets))
        found.append(Sample(name, path, 1, HW, "the red mug", rles))
    return found


def fault(sample: Sample, kind: str) -> Sample:
    """The sample with one thing wrong."""
    path = sample.image_path
    if kind == "missing":
        path.unlink()
    elif kind == "no picture":
        path.write_text("not a picture")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "cut in the header":
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "unsafe":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0")
    elif kind == "smaller":
        picture(path, (12, 32))
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(path, exif=exif)
    elif kind == "mask smaller":
        return replace(sample, targets=(encode(SQUARE[:, 1:]),))
    elif kind == "mask empty":
        return replace(sample, targets=(*sample.targets, encode(np.zeros(HW, dtype=bool))))
    elif kind == "mask damaged":
        return replace(sample, targets=({"size": list(HW), "counts": "0"},))
    elif kind == "mask unfinished":
        return replace(sample, targets=({"size": list(HW), "counts": "`"},))
    elif kind == "ignore smaller":
        return replace(sample, ignore=encode(SQUARE[1:]))
    elif kind == "too long":
        return replace(sample, instruction="mug " * 300)
    elif kind == "blank":
        return replace(sample, instruction=" \n ")
    elif kind == "half a character":
        return replace(sample, instruction="the \ud83d mug")
    return sample


FAULTS = {
    "missing": (DataError, r"1 missing picture\): b: .*b\.jpg: no such file"),
    "no picture": (DataError, r"1 unreadable picture\): b: .*b\.jpg: is not a picture"),
    "cut off": (DataError, r"1 unreadable picture\): b: .*b\.jpg: broken or truncated JPEG"),
    "cut in the header": (DataError, r"1 unreadable picture\): b: .*b\.jpg: "),
    "unsafe": (UnsafeFileError, r"1 unsafe picture\): b: .*b\.jpg: is "),
    "smaller": (DataError, r"1 another size\): b: .*b\.jpg is 32×12, .* for a picture of 32×24"),
    "turned": (DataError, r"1 another size\): b: .*b\.jpg is 24×32, .* for a picture of 32×24"),
    "mask smaller": (DataError, r"1 another size\): b: a mask is of 31×24, its picture of 32×24"),
    "mask empty": (DataError, r"1 empty mask\): b: a target has no pixel"),
    "mask damaged": (DataError, r"1 damaged mask\): b: the runs of a mask do not add up to 32×24"),
    "mask unfinished": (DataError, r"1 damaged mask\): b: run lengths hold a number that does not"),
    "ignore smaller": (DataError, r"1 another size\): b: a mask is of 32×23"),
    "too long": (DataError, r"1 instruction\): b: the instruction has \d+ tokens, the limit is 40"),
    "blank": (DataError, r"1 instruction\): b: the instruction is empty"),
    "half a character": (DataError, r"1 instruction\): b: the text holds half a character"),
}
PROMPT = prompt_of("nano", limit=40)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_or_left_out(
    kind: str, good: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [good[0], fault(good[1], kind), good[2]]
    error, text = FAULTS[kind]
    with pytest.raises(error, match=rf"1 of 3 samples cannot be trained on \({text}") as caught:
        check_samples(samples, PROMPT)
    assert type(caught.value) is error and "data.on_error: skip" in str(caught.value)
    assert not caplog.records
    kept = check_samples(samples, PROMPT, "skip", tmp_path / "run/checked.json")
    assert kept == [good[0], good[2]]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("1 of 3 samples") and "left out" in told
    (row,) = (tmp_path / "run/left_out.jsonl").read_text().splitlines()
    assert json.loads(row)["sample"] == "b"


def test_samples_without_fault_pass_in_silence(
    good: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ignored = replace(good[0], ignore=encode(np.zeros(HW, dtype=bool)))  # nothing to ignore
    assert check_samples([*good, ignored], PROMPT) == [*good, ignored]
    assert check_samples(good) == good
    assert not caplog.records


def test_real_scenes_pass_in_every_layout(scenes_root: Path) -> None:
    for layout in ("refcoco", "grefcoco", "reasonseg"):
        samples = read_dataset(scenes_root, "train", layout=layout)
        assert find_problems(samples, prompt_of("nano")) == []


def test_several_faults_are_counted_and_the_first_are_spelt_out(good: list[Sample]) -> None:
    bad = [replace(fault(good[0], "mask empty"), sample_id=f"m{i}") for i in range(5)]
    bad.append(replace(good[1], instruction="", sample_id="i"))
    with pytest.raises(DataError) as caught:
        check_samples([*good, *bad])
    text = str(caught.value)
    assert "6 of 9 samples cannot be trained on (5 empty mask, 1 instruction): m0: " in text
    assert "m2: " in text and "m3" not in text


def test_nothing_left_is_an_error_even_where_samples_are_skipped(good: list[Sample]) -> None:
    with pytest.raises(DataError, match="1 of 1 samples"):
        check_samples([fault(good[1], "missing")], None, "skip")


@settings(max_examples=15)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"]),
    share=st.floats(0.0, 1.0),
    junk=st.binary(max_size=8),
)
def test_a_picture_passes_exactly_if_it_can_be_loaded(
    kind: str, share: float, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However much of it is there, and with whatever behind it."""
    path = tmp_path_factory.mktemp("cut") / "p"
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*HW, 3), np.uint8)).save(
        buffer, kind
    )
    whole = buffer.getvalue()
    path.write_bytes(whole[: round(share * len(whole))] + junk)
    try:
        loads = load_image(path).shape[:2] == HW
    except ValueError:
        loads = False
    sample = Sample("p", path, 1, HW, "mug", ())
    assert (find_problems([sample]) == []) == loads


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16), st.floats(0, 1))
def test_runs_are_those_of_the_mask(height: int, width: int, seed: int, share: float) -> None:
    """Column by column, beginning outside, as COCO counts them; long and falling ones too."""
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[:, width // 2 :] = True
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    expected = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    assert run_lengths(encode(mask)["counts"]) == expected


def test_whole_pictures_are_not_decoded(
    good: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or looking through a large set would take as long as an epoch."""
    png = picture(tmp_path / "d.png")
    monkeypatch.setattr(images, "load_image", lambda _: pytest.fail("a picture was decoded"))
    assert find_problems([*good, replace(good[0], image_path=png)]) == []


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples were looked at, look by look."""
    seen: list[int] = []
    find = checks.find_problems

    def counted(samples: list[Sample], prompt: Any = None) -> Any:
        seen.append(len(samples))
        return find(samples, prompt)

    monkeypatch.setattr(checks, "find_problems", counted)
    return seen


def test_a_resumed_run_does_not_look_again(
    good: list[Sample], tmp_path: Path, looks: list[int]
) -> None:
    file = tmp_path / "run/checked.json"
    samples = [good[0], fault(good[1], "mask empty"), good[2]]
    for prompt in (PROMPT, None, PROMPT, None):  # stages with and without one take turns
        assert check_samples(samples, prompt, "skip", file) == [good[0], good[2]]
    assert looks == [3, 3]
    with pytest.raises(DataError, match="1 empty mask"):
        check_samples(samples, PROMPT, "fail", file)
    assert looks == [3, 3]
    assert sorted(p.name for p in file.parent.iterdir()) == ["checked.json", "left_out.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [*s[:1], fault(s[1], "cut off"), *s[2:]],
        lambda s: [os.utime(s[0].image_path, ns=(1, 1)), s][1],
        lambda s: [*s[:2], replace(s[2], instruction="another")],
        lambda s: [*s[:2], replace(s[2], targets=(encode(SQUARE),))],
        lambda s: s[:2],
    ],
    ids=["file cut off", "file touched", "instruction", "mask", "fewer"],
)
def test_what_has_changed_is_looked_at_again(
    change: Callable[[list[Sample]], list[Sample]],
    good: list[Sample],
    tmp_path: Path,
    looks: list[int],
) -> None:
    file = tmp_path / "checked.json"
    check_samples(good, PROMPT, "skip", file)
    check_samples(change(good), PROMPT, "skip", file)
    assert len(looks) == 2


def test_another_limit_is_another_look(good: list[Sample], tmp_path: Path) -> None:
    file = tmp_path / "checked.json"
    long = [replace(good[0], instruction="mug " * 60)]
    assert check_samples(long, prompt_of("nano", limit=600), "fail", file) == long
    with pytest.raises(DataError, match="the limit is 40"):
        check_samples(long, PROMPT, "fail", file)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 0}', '{"version": 1, "found": [1]}'])
def test_damaged_findings_are_made_anew(
    content: str, good: list[Sample], tmp_path: Path, looks: list[int]
) -> None:
    file = tmp_path / "checked.json"
    file.write_text(content)
    assert check_samples(good, None, "fail", file) == good
    assert check_samples(good, None, "fail", file) == good
    assert looks == [3]


def break_refcoco(root: Path) -> None:
    """A picture is gone, and a mask is of another size, both told of by the reader."""
    instances = json.loads((root / "instances.json").read_text())
    first, second, *_ = {a["image_id"]: a for a in instances["annotations"]}.values()
    first["segmentation"] = {"size": [3, 3], "counts": "9"}
    name = next(i["file_name"] for i in instances["images"] if i["id"] == second["image_id"])
    (root / "images" / name).unlink()
    (root / "instances.json").write_text(json.dumps(instances))


def break_reasonseg(root: Path) -> None:
    """A note is no JSON, a picture is gone, and another has no note."""
    first, second, third, *_ = sorted((root / "train").glob("*.json"))
    first.write_text("{")
    second.with_suffix(".jpg").unlink()
    third.unlink()


@pytest.mark.parametrize("layout", ["grefcoco", "reasonseg"])
def test_entries_that_cannot_be_read_are_left_out_too(
    layout: str, scenes_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, run = tmp_path / layout, tmp_path / "run"
    shutil.copytree(scenes_root / layout, root)
    if not (root / "images").exists() and layout == "grefcoco":
        shutil.copytree(scenes_root / "images", root / "images")
    whole = read_dataset(root, "train")
    (break_refcoco if layout == "grefcoco" else break_reasonseg)(root)
    with pytest.raises(DataError):
        training_samples(DataConfig(root=root))
    kept = training_samples(DataConfig(root=root, on_error="skip"), run=run)
    names = {s.sample_id for s in kept}
    assert 0 < len(names) < len(whole) and names < {s.sample_id for s in whole}
    assert "unreadable entry" in caplog.text and "left out" in caplog.text
    rows = [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"unreadable entry"} and len(rows) >= 2
