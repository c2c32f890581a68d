"""Candidates of training questions: what they deserve, which are kept apart, collected by ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import launch

from segcompass.data.samples import read_dataset
from segcompass.interfaces.candidate_rerank import CandidateRerankConfig
from segcompass.interfaces.candidates import CandidateConfig
from segcompass.io.errors import ConfigError
from segcompass.io.masks import encode
from segcompass.learning.candidate_questions import (
    CANDIDATES,
    Question,
    collect,
    deserved,
    overlaps,
    set_apart,
)
from segcompass.learning.engine.distributed import World, start
from segcompass.model_folder import load_parts
from segcompass.pipeline import SegCompass
from segcompass.types import Rle, Sample


def columns(*numbers: int) -> Rle:
    mask = np.zeros((3, 9), dtype=bool)
    mask[:, list(numbers)] = True
    return encode(mask)


def test_what_candidates_deserve_by_hand() -> None:
    sample = Sample("s", Path("a.jpg"), 1, (3, 9), "it", (columns(0, 1), columns(2, 3)))
    found = [columns(0, 1, 2, 3), columns(0, 1, 2), columns(3), columns(3, 4, 5), columns(8)]
    # 9 x 1, 3/4 (6.75), 1/4 (2.25), 1/6 (1.5 is rounded up), 0
    assert deserved(sample, found) == [9, 7, 2, 2, 0]
    nothing = Sample("s", Path("a.jpg"), 1, (3, 9), "it", ())
    assert deserved(nothing, found[:1]) == [0] and overlaps(nothing, [columns()]) == [1.0]
    ignoring = Sample("s", Path("a.jpg"), 1, (3, 9), "it", sample.targets, ignore=columns(3, 4, 5))
    assert deserved(ignoring, [columns(0, 1, 2, 4)]) == [9]


def about(pictures: Sequence[int]) -> list[Sample]:
    """Samples about these pictures."""
    return [
        Sample(str(i), Path(f"{picture}.jpg"), i, (3, 9), "it", ())
        for i, picture in enumerate(pictures)
    ]


def test_the_last_samples_are_kept_apart() -> None:
    samples = about(range(30))
    assert set_apart(samples, 10, 0.2) == (samples[:8], samples[28:])
    assert set_apart(samples, 10, 0.0) == (samples[:10], [])
    for count in (None, 30, 99):
        assert set_apart(samples, count, 0.2) == (samples[:24], samples[24:])


@given(
    pictures=st.lists(st.integers(0, 12), max_size=40),
    count=st.none() | st.integers(1, 60),
    share=st.floats(0, 0.99),
)
def test_the_last_samples_are_about_other_pictures(
    pictures: list[int], count: int | None, share: float
) -> None:
    samples = about(pictures)
    training, apart = set_apart(samples, count, share)
    wanted = len(samples) if count is None else min(count, len(samples))
    assert len(apart) == round(share * wanted) and samples[len(samples) - len(apart) :] == apart
    seen = {one.image_path for one in apart}
    kept = [one for one in samples[: wanted - len(apart)] if one.image_path not in seen]
    assert training == kept


def find(model: Path, data: Path, folder: Path, apart: int = 0) -> list[Question]:
    """The candidates of five questions, of which the last ones are kept apart."""
    parts = load_parts(model)
    sources = ("direct", "slot", "heatmap")
    head = CandidateRerankConfig(
        head=parts.config.head, candidates=CandidateConfig(sources=sources, best_of_three=False)
    )
    samples = read_dataset(data, "train")[:5]
    training, held = collect(parts, head, samples[: 5 - apart], samples[5 - apart :], folder, 1)
    assert [len(training), len(held)] == [5 - apart, apart]
    return [*training, *held]


def find_on_ranks(model: Path, data: Path, folder: Path) -> list[Question]:
    torch.set_num_threads(1)
    with start("cpu"):
        return find(model, data, folder)


def test_ranks_share_the_questions_out_and_end_with_the_same(
    tiny_model: Path, scenes_root: Path, tmp_path: Path
) -> None:
    alone = find(tiny_model, scenes_root, tmp_path / "alone")
    first, second = launch(find_on_ranks, 2, tiny_model, scenes_root, tmp_path / "two")
    assert first == second == alone
    assert [one.sample for one in alone] == read_dataset(scenes_root, "train")[:5]
    assert sum(len(one.masks) for one in alone) > 5
    assert [path.name for path in (tmp_path / "two").iterdir()] == [CANDIDATES]
    files = [(tmp_path / name / CANDIDATES).read_text() for name in ("alone", "two")]
    assert files[0] == files[1]


def test_one_rank_goes_on_where_two_were_killed(
    tiny_model: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, asked = read_dataset(scenes_root, "train")[:5], list[str]()
    plain = SegCompass.predict_batch

    def noted(self: SegCompass, images: Sequence[Path], instructions: Sequence[str]) -> Any:
        asked.extend(instructions)
        return plain(self, images, instructions)

    monkeypatch.setattr(SegCompass, "predict_batch", noted)

    class Second(World):
        """One of two ranks that never meets the other."""

        def barrier(self) -> None: ...
        def gather_objects(self, value: Any) -> list[Any]:
            return [value]

    with monkeypatch.context() as patch:
        second = Second(1, 2, torch.device("cpu"))
        patch.setattr(World, "current", classmethod(lambda _: second))
        with pytest.raises(KeyError):  # of what the first one should have found
            find(tiny_model, scenes_root, tmp_path)
    assert asked == [samples[i].instruction for i in (1, 3)]
    with (tmp_path / "candidates.rank1.jsonl").open("a") as file:
        file.write('{"index": 4, "sam')
    asked.clear()
    found = find(tiny_model, scenes_root, tmp_path)
    assert asked == [samples[i].instruction for i in (0, 2, 4)]
    assert [one.sample for one in found] == samples
    rows = [json.loads(line) for line in (tmp_path / CANDIDATES).read_text().splitlines()[1:]]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]

    asked.clear()
    assert find(tiny_model, scenes_root, tmp_path) == found and not asked
    with pytest.raises(ConfigError, match=f"another model or choice .* delete {tmp_path}, or"):
        find(tiny_model, scenes_root, tmp_path, apart=2)  # a judge there may know these two
    path = tmp_path / CANDIDATES
    path.write_text(path.read_text().replace(samples[2].sample_id, "another"))
    with pytest.raises(ConfigError, match="of other samples"):
        find(tiny_model, scenes_root, tmp_path)
    whole = path.read_text()
    for damage, problem in (('{"index": 7', "delimiter"), ("[7]", "without has_direct, index")):
        path.write_text(whole + damage + "\n")
        with pytest.raises(ConfigError, match=f"{path} holds a line that is .*{problem}.*delete"):
            find(tiny_model, scenes_root, tmp_path)
