"""The evaluation loop: perfect and wrong models, controls, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import HW, OBJECTS, Oracle, make_samples, reader, square
from PIL import Image
from ranks import launch

from segcompass.data.scenes.grammar import closing
from segcompass.evaluation import splits
from segcompass.evaluation.benchmark import evaluate
from segcompass.evaluation.controls import CONTROLS, pose
from segcompass.evaluation.scoring import PairScore
from segcompass.io import masks
from segcompass.io.errors import DataError, ImageError
from segcompass.learning.engine.distributed import start
from segcompass.types import Prediction, Sample, Status

PARTS = ["samples.rank0.jsonl", "samples.rank1.jsonl", "samples.rank12.jsonl"]


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """A data set in memory."""
    made = make_samples(tmp_path)
    monkeypatch.setattr(splits, "read_dataset", reader(made))
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


@pytest.mark.parametrize("control", CONTROLS)
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
    again = Oracle(samples)
    assert evaluate(again, tmp_path, "val", out=out, batch_size=2) == expected
    assert again.batches == [2]
    assert contents(out) == contents(whole)


@given(
    keepers=st.lists(st.sampled_from(["samples.jsonl", *PARTS, None]), min_size=6, max_size=6),
    twice=st.sampled_from(PARTS),  # killed after the merge, before the parts were deleted
    torn=st.sampled_from(PARTS),
    cut=st.integers(1, 40),
)
def test_whatever_rows_a_kill_left_none_is_lost_or_repeated(
    keepers: list[str | None],
    twice: str,
    torn: str,
    cut: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("resumed")
    made = make_samples(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "read_dataset", reader(made))
        whole, out = folder / "whole", folder / "out"
        expected = evaluate(Oracle(made), folder, "val", out=whole)
        out.mkdir()
        (out / "run.json").write_bytes((whole / "run.json").read_bytes())
        lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
        for line, keeper in zip(lines, keepers, strict=True):
            for name in {keeper, twice} if keeper is not None else ():
                with (out / name).open("a") as rows:
                    rows.write(line)
        with (out / torn).open("a") as rows:
            rows.write(lines[0][:cut])  # killed in the middle of a row
        again = Oracle(made)
        assert evaluate(again, folder, "val", out=out) == expected
    assert sum(again.batches) == keepers.count(None)
    assert contents(out) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def judge_on_ranks(folder: str, out: str, dies_at: int | None) -> dict[str, Any]:
    """What every rank runs; it may kill itself at its so many-eth batch."""
    made = make_samples(Path(folder))
    splits.read_dataset = reader(made)

    class Mortal(Oracle):
        def predict_batch(self, *given: Any, **options: Any) -> list[Prediction]:
            if len(self.batches) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().predict_batch(*given, **options)

    with start("cpu"):
        return evaluate(Mortal(made), Path(folder), "val", out=Path(out), batch_size=1)


def test_two_ranks_judge_as_one(samples: list[Sample], tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    expected = evaluate(Oracle(samples), tmp_path, "val", out=alone, batch_size=1)
    found = launch(judge_on_ranks, 2, str(tmp_path), str(together), None)
    for figures in found:
        assert figures.pop("environment")["processes"] == 2
    expected.pop("environment")
    assert found == [expected, expected]
    rows = "samples.jsonl"
    assert (together / rows).read_bytes() == (alone / rows).read_bytes()
    assert not list(together.glob("samples.rank*"))


def test_two_killed_ranks_leave_their_rows_to_three(samples: list[Sample], tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "killed"
    evaluate(Oracle(samples), tmp_path, "val", out=alone, batch_size=1)
    assert launch(judge_on_ranks, 2, str(tmp_path), str(out), 2) == [None, None]
    assert len(list(out.glob("samples.rank*"))) == 2  # two rows each
    # Of the two samples that are left, two of the three ranks take one each, none takes more.
    launch(judge_on_ranks, 3, str(tmp_path), str(out), 1)
    assert (out / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


def test_rows_hold_what_the_figures_are_made_of(samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(Oracle(samples), tmp_path, "val", out=out)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [s.sample_id for s in samples]
    assert masks.decode(rows[1]["masks"][0]).tolist() == square(1).tolist()
    assert masks.decode(rows[1]["truth"][0]).tolist() == square(1).tolist()
    assert (rows[1]["scores"], rows[1]["confidences"]) == ([0.875], [0.875] + [0.0625] * 5)
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
    assert model.options == [{"force_format": True, "threshold": 0.5} | given] * 2
    assert figures["paths"] == paths
    assert json.loads((out / "run.json").read_text())["paths"] == paths
    other = "concepts" if paths == "tokens" else "tokens"
    with pytest.raises(DataError, match="another paths"):
        evaluate(model, tmp_path, "val", out=out, force_format=True, paths=other)


def test_each_path_is_measured_alone_on_the_same_thoughts(
    samples: list[Sample], tmp_path: Path
) -> None:
    """The oracle's concepts do it all; its tokens find nothing, right for two of the six."""
    out = tmp_path / "out"
    figures = evaluate(Oracle(samples), tmp_path, "val", out=out)
    right = dict.fromkeys(("giou", "giou_target", "ciou", "n_acc", "t_acc"), 1.0)
    nothing = {"giou": 2 / 6, "giou_target": 0, "ciou": 0, "n_acc": 1, "t_acc": 0}
    assert figures["by_path"] == {"concepts": right, "tokens": nothing}
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert rows[0]["paths"] == {"concepts": [16, 16], "tokens": [0, 16]}
    assert rows[2]["paths"] == {"concepts": [0, 0], "tokens": [0, 0]}
    again = Oracle(samples)  # from the rows
    assert evaluate(again, tmp_path, "val", out=out)["by_path"] == figures["by_path"]
    assert not again.batches
    alone = evaluate(Oracle(samples), tmp_path, "val", paths="tokens")
    assert alone["by_path"] == {}


def test_a_malformed_answer_is_wrong_along_every_path() -> None:
    broken = PairScore("x", 0, 9, 0.0, False, False, Status.MALFORMED, paths={"tokens": (0, 9)})
    assert not broken.along("tokens").presence_correct
    assert broken.along("tokens").iou == 0


def test_another_threshold_is_another_answer(samples: list[Sample], tmp_path: Path) -> None:
    """The oracle's one mask has confidence 0.875: above it, nothing counts."""
    figures = evaluate(Oracle(samples), tmp_path, "val", threshold=0.9, out=tmp_path / "out")
    assert (figures["threshold"], figures["giou_target"], figures["t_acc"]) == (0.9, 0, 0)
    assert figures["n_acc"] == 1
    with pytest.raises(DataError, match="another threshold"):
        evaluate(Oracle(samples), tmp_path, "val", threshold=0.8, out=tmp_path / "out")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_broken_samples_are_named_and_the_rest_is_judged(
    batch_size: int, samples: list[Sample], tmp_path: Path
) -> None:
    samples[1].image_path.unlink()
    samples[4].image_path.write_bytes(b"no picture")
    out, model = tmp_path / "out", Oracle(samples)
    options: dict[str, Any] = {"out": out, "batch_size": batch_size, "skip_broken": True}
    figures = evaluate(model, tmp_path, "val", **options)
    assert [item["name"] for item in figures["broken"]] == ["s1", "s4"]
    assert "1.png: no such file" in figures["broken"][0]["problem"]
    assert (figures["samples"], figures["giou"]) == (4, 1)
    Image.new("RGB", HW[::-1], (4, 0, 0)).save(samples[4].image_path)
    mended = Oracle(samples)
    figures = evaluate(mended, tmp_path, "val", **options)
    assert mended.batches == [1]  # the others' rows are there
    assert (figures["samples"], len(figures["broken"])) == (5, 1)


def test_without_leave_the_first_broken_sample_ends_the_run(
    samples: list[Sample], tmp_path: Path
) -> None:
    samples[1].image_path.unlink()
    with pytest.raises(ImageError, match=r"1\.png: no such file"):
        evaluate(Oracle(samples), tmp_path, "val")


def test_where_all_is_broken_there_are_no_figures(samples: list[Sample], tmp_path: Path) -> None:
    for sample in samples:
        sample.image_path.unlink()
    with pytest.raises(DataError, match="no sample could be judged; the first of 6: s0"):
        evaluate(Oracle(samples), tmp_path, "val", skip_broken=True)


def test_two_samples_of_one_id_are_an_error(samples: list[Sample], tmp_path: Path) -> None:
    samples[5] = replace(samples[5], sample_id="s0")
    with pytest.raises(DataError, match="'s0' occurs twice"):
        evaluate(Oracle(samples), tmp_path, "val")
    figures = evaluate(Oracle(samples), tmp_path, "val", skip_broken=True)
    assert (figures["samples"], figures["broken"][0]["name"]) == (5, "s0")


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
