"""The evaluation loop: perfect and wrong models, controls, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_prediction
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segcompass.data.scenes.grammar import closing
from segcompass.evaluation import benchmark
from segcompass.evaluation.benchmark import evaluate, pose
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import NamedObject, Prediction, Sample, Status

HW = (20, 30)
OBJECTS = (
    NamedObject(11, "mug", "red", "small", "plain", "b4"),
    NamedObject(12, "hat", "blue", "large", "plain", "f7"),
)


def square(index: int) -> np.ndarray:
    """A 4x4 mask, somewhere else for every index."""
    mask = np.zeros(HW, dtype=bool)
    mask[index : index + 4, 2 * index : 2 * index + 4] = True
    return mask


def make_samples(folder: Path, number: int = 6) -> list[Sample]:
    """Every third sample has no target; the others one square and the red mug."""
    samples = []
    for i in range(number):
        path = folder / f"{i}.png"
        Image.new("RGB", HW[::-1], (i, 0, 0)).save(path)
        found = i % 3 != 2
        samples.append(
            Sample(
                sample_id=f"s{i}",
                image_path=path,
                image_id=i,
                image_hw=HW,
                instruction=f"question {i}",
                targets=(masks.encode(square(i)),) if found else (),
                target_ids=(11,) if found else (),
                kind="spatial" if i < 3 else "geometric",
                objects=OBJECTS,
            )
        )
    return samples


class Oracle:
    """Answers rightly for the pair it is shown: red value and question must name one sample."""

    name = "oracle"
    fingerprint = "0" * 16

    def __init__(self, samples: Sequence[Sample], die_after: int | None = None) -> None:
        self.samples = samples
        self.die_after = die_after
        self.batches: list[int] = []
        self.options: list[dict[str, Any]] = []

    def predict_batch(
        self, images: Sequence[Any], instructions: Sequence[str], **options: Any
    ) -> list[Prediction]:
        self.options.append(options)
        if self.die_after is not None and len(self.batches) >= self.die_after:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        return [self.answer(*pair) for pair in zip(images, instructions, strict=True)]

    def answer(self, image: np.ndarray, instruction: str) -> Prediction:
        index = int(image[0, 0, 0])
        found = bool(self.samples[index].targets) and instruction == f"question {index}"
        return prediction(square(index) if found else None, instruction)


def prediction(mask: np.ndarray | None, instruction: str, **changes: Any) -> Prediction:
    """One accepted slot with ``mask``, or none; the thought says the same."""
    slots = np.zeros((6, *HW), dtype=bool)
    if mask is not None:
        slots[0] = mask
    answer = replace(
        make_prediction(),
        instruction=instruction,
        status=Status.NO_TARGET if mask is None else Status.OK,
        reasoning=closing([] if mask is None else OBJECTS[:1]),
        slot_masks=slots,
        accepted=np.array([mask is not None] + [False] * 5),
    )
    return replace(answer, **changes)


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """A data set in memory."""
    made = make_samples(tmp_path)

    def read(root: Path, split: str, *, layout: str | None, limit: int | None) -> list[Sample]:
        return made[:limit]

    monkeypatch.setattr(benchmark, "read_dataset", read)
    return made


def test_a_model_that_is_always_right(samples: list[Sample], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    figures = evaluate(
        Oracle(samples),
        tmp_path,
        "val",
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    for name in ("giou", "ciou", "giou_target", "n_acc", "t_acc", "format_valid"):
        assert figures[name] == 1, name
    assert figures["reasoning_target_accuracy"] == 1
    assert figures["by_kind"] == {"geometric": 1, "spatial": 1}
    assert figures["samples"] == 6
    assert seen == [(0, 6), (4, 6), (6, 6)]
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("control", benchmark.CONTROLS)
def test_an_honest_model_fails_under_control(
    control: str, samples: list[Sample], tmp_path: Path
) -> None:
    figures = evaluate(Oracle(samples), tmp_path, "val", control=control)
    assert figures["giou_target"] == 0
    assert figures["control"] == control


def test_a_malformed_answer_is_never_right(samples: list[Sample], tmp_path: Path) -> None:
    class Babbler(Oracle):
        def answer(self, image: np.ndarray, instruction: str) -> Prediction:
            right = super().answer(image, instruction)
            return replace(right, status=Status.MALFORMED)

    figures = evaluate(Babbler(samples), tmp_path, "val")
    for name in ("giou", "n_acc", "t_acc", "format_valid", "reasoning_target_accuracy"):
        assert figures[name] == 0, name


def test_naming_the_wrong_thing_is_wrong_reasoning(samples: list[Sample], tmp_path: Path) -> None:
    class Mistaken(Oracle):
        def answer(self, image: np.ndarray, instruction: str) -> Prediction:
            return replace(super().answer(image, instruction), reasoning=closing(OBJECTS[1:]))

    figures = evaluate(Mistaken(samples), tmp_path, "val")
    assert figures["giou"] == 1
    assert figures["reasoning_target_accuracy"] == 0


def test_a_killed_run_goes_on_and_ends_the_same(samples: list[Sample], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    expected = evaluate(Oracle(samples), tmp_path, "val", out=whole, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Oracle(samples, die_after=2), tmp_path, "val", out=out, batch_size=2)
    with (out / "samples.jsonl").open("a") as rows:
        rows.write('{"sample_id": "s4", "inter')  # killed in the middle of a line
    again = Oracle(samples)
    assert evaluate(again, tmp_path, "val", out=out, batch_size=2) == expected
    assert again.batches == [2]
    for name in ("samples.jsonl", "metrics.json", "run.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_rows_hold_what_the_figures_are_made_of(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(Oracle(samples), tmp_path, "val", out=out)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [s.sample_id for s in samples]
    assert masks.decode(rows[1]["masks"][0]).tolist() == square(1).tolist()
    assert (rows[1]["intersection"], rows[1]["union"], rows[1]["iou"]) == (16, 16, 1)
    assert (rows[2]["masks"], rows[2]["status"]) == ([], "no_target")


def test_rows_of_another_run_are_not_mixed_in(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(Oracle(samples), tmp_path, "val", out=out)
    retrained = Oracle(samples)
    retrained.fingerprint = "1" * 16
    with pytest.raises(DataError, match="another fingerprint"):
        evaluate(retrained, tmp_path, "val", out=out)
    with pytest.raises(DataError, match="another control"):
        evaluate(Oracle(samples), tmp_path, "val", out=out, control="shuffle-images")


@pytest.mark.parametrize("paths", ["both", "tokens", "concepts"])
def test_the_model_is_told_which_paths_to_take(
    paths: str, samples: list[Sample], tmp_path: Path
) -> None:
    model, out = Oracle(samples), tmp_path / "out"
    given = {} if paths == "both" else {"paths": paths}
    figures = evaluate(model, tmp_path, "val", out=out, batch_size=4, force_format=True, **given)
    assert model.options == [{"force_format": True, "paths": paths}] * 2
    assert figures["paths"] == paths
    assert json.loads((out / "run.json").read_text())["paths"] == paths
    other = "concepts" if paths == "tokens" else "tokens"
    with pytest.raises(DataError, match="another paths"):
        evaluate(model, tmp_path, "val", out=out, force_format=True, paths=other)


def test_a_foreign_file_is_refused(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(Oracle(samples), tmp_path, "val", out=out, limit=2)
    (out / "samples.jsonl").write_text('{"sample_id": "s0"}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:1"):
        evaluate(Oracle(samples), tmp_path, "val", out=out)


def test_a_higher_limit_goes_on(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(Oracle(samples), tmp_path, "val", out=out, limit=4)
    more = Oracle(samples)
    assert evaluate(more, tmp_path, "val", out=out)["samples"] == 6
    assert more.batches == [2]


def test_a_picture_of_another_size_is_an_error(samples: list[Sample], tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(samples[0].image_path)
    with pytest.raises(DataError, match=r"0\.png: is 9x9 px, the data set says 30x20"):
        evaluate(Oracle(samples), tmp_path, "val")


def test_an_empty_split_is_an_error(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        evaluate(Oracle(samples), tmp_path, "val", limit=0)


def test_controls_need_two_pictures(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="two pictures"):
        pose(samples[:1], "shuffle-images")
    with pytest.raises(DataError, match="shuffle-questions"):
        pose(samples, "shuffle")


@given(images=st.lists(st.integers(0, 5), min_size=2, max_size=20))
def test_under_control_nothing_keeps_its_own(images: list[int]) -> None:
    if len(set(images)) < 2:
        images = [*images, max(images) + 1]
    samples = [
        Sample(f"s{i}", Path(f"{image}.png"), image, HW, f"of {image}", ())
        for i, image in enumerate(images)
    ]
    for question in pose(samples, "shuffle-questions"):
        assert question.image_path == question.sample.image_path
        assert question.instruction != question.sample.instruction
    shown = pose(samples, "shuffle-images")
    for question in shown:
        assert question.image_path != question.sample.image_path
        assert question.instruction == question.sample.instruction
    pairing = {(q.sample.image_path, q.image_path) for q in shown}
    assert len({b for _, b in pairing}) == len(pairing) == len(set(images))  # one to one
