"""A model of one method: judged as ours is, told what it got wrong, and documented by example."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import HW, Oracle, make_samples, reader, square

from segcompass.evaluation import judge, splits
from segcompass.evaluation.benchmark import evaluate
from segcompass.io.errors import DataError
from segcompass.types import Sample

PAGE = Path(__file__).parents[2] / "docs" / "adapter.md"


class Returns:
    """Returns the same about every picture, or what a function says about its number."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.shown: list[tuple[int, str]] = []

    def segment(self, image: np.ndarray, instruction: str) -> Any:
        assert (image.dtype, image.shape) == (np.uint8, (*HW, 3))
        number = int(image[0, 0, 0])
        self.shown.append((number, instruction))
        return self.answer(number) if callable(self.answer) else self.answer


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Six samples; the third and the last have no target."""
    made = make_samples(tmp_path)
    monkeypatch.setattr(splits, "read_dataset", reader(made))
    return made


def test_it_is_judged_as_our_models_are(samples: list[Sample], tmp_path: Path) -> None:
    model = Returns(lambda i: [square(i)] if i % 3 != 2 else [])
    found = judge(model, tmp_path, "val")
    expected = evaluate(Oracle(samples), tmp_path, "val")
    for name in ("samples", "giou", "ciou", "n_acc", "t_acc", "by_kind", "intervals"):
        assert found[name] == expected[name], name
    assert found["reasoning_target_accuracy"] is None  # there is no thought to judge
    assert model.shown == [(i, f"question {i}") for i in range(6)]
    assert found["model"] == "Returns"


def test_confidences_rank_and_gate(samples: list[Sample], tmp_path: Path) -> None:
    """The right mask at 0.75, a wrong one at 0.25: the union of both has IoU 16/32."""
    model = Returns(lambda i: (np.stack([square(i + 8), square(i)]).astype(np.uint8), [0.25, 0.75]))
    assert judge(model, tmp_path, "val")["giou_target"] == 0.5
    assert judge(model, str(tmp_path), "val", threshold=0.5)["giou_target"] == 1


def test_rows_are_taken_over_by_name(samples: list[Sample], tmp_path: Path) -> None:
    out, again = tmp_path / "out", Returns([])
    judge(Returns([]), tmp_path, "val", out=out, name="first", limit=4)
    judge(again, tmp_path, "val", out=str(out), name="first")
    assert [number for number, _ in again.shown] == [4, 5]
    with pytest.raises(DataError, match="another model"):
        judge(again, tmp_path, "val", out=out, name="second")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([np.zeros((3, 3), dtype=bool)], r"\(height, width\) \(20, 30\), found \(3, 3\)"),
        (square(0), r"found \(30,\)"),  # one mask that is not in a list
        ([np.full(HW, 0.5)], "a mask is bool, or 0 and 1"),
        (([square(0)], [0.5, 0.5]), "1 masks, but 2 confidences"),
        (([square(0)], [7]), r"a confidence lies in \[0, 1\]"),
        (None, "not iterable"),
        (([], [], []), "unpack"),
    ],
)
def test_what_is_no_answer_is_told(
    answer: Any, said: str, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"Returns\.segment, sample s0: .*{said}"):
        judge(Returns(answer), tmp_path, "val")


def test_the_example_of_the_documentation(
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert len(found[1].strip().splitlines()) <= 20
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes_root)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(found[1], encoding="utf-8")
    names = runpy.run_path("example.py")
    assert names["figures"]["samples"] > 0
    assert str(names["figures"]["giou"]) in capsys.readouterr().out
    assert (tmp_path / "runs" / "brightest" / "metrics.json").is_file()
