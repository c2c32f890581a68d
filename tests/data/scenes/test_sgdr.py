"""The SGDR-like set: four dimensions in equal shares, read back by the Parquet reader."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.data.samples import read_dataset
from segcompass.data.scenes.sgdr import DIMENSIONS, balanced, write_sgdr
from segcompass.data.scenes.writer import write_scenes
from segcompass.io.images import load_image
from segcompass.io.masks import area, decode, union
from segcompass.types import Rle, Sample

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sgdr") / "scenes"
    write_scenes(folder, {"val": 45}, seed=3, workers=1, size=64)
    return folder


def test_the_written_set_reads_back_balanced_and_exact(scenes: Path) -> None:
    before = {p.relative_to(scenes) for p in scenes.rglob("*")}
    asked = {(s.instruction, s.kind): s for s in read_dataset(scenes, "val")}
    written = write_sgdr(scenes)
    found = read_dataset(scenes, "val", layout="parquet")
    assert written == {"val": len(found)}
    shares = Counter(s.kind for s in found)
    assert set(shares) == set(DIMENSIONS) and len(set(shares.values())) == 1
    for sample in found:
        original = asked[sample.instruction, sample.kind]
        wanted = union(original.targets, original.image_hw)
        assert np.array_equal(decode(sample.targets[0]), wanted) and wanted.any()
        assert np.array_equal(load_image(sample.image_path), load_image(original.image_path))
    # the other layouts stay as they were, and a folder of scenes is still read as one
    new = {p.relative_to(scenes) for p in scenes.rglob("*")} - before
    assert {path.parts[0] for path in new} == {"sgdr"}
    assert len(read_dataset(scenes, "val")) == 45


def test_the_command_writes_it_where_it_is_asked_for(tmp_path: Path) -> None:
    asked = ["data", "scenes", "--out", str(tmp_path / "scenes"), "--val", "24", "--seed", "3"]
    for option, there in (((), False), (("--sgdr",), True)):  # the second time the scenes are kept
        result = CliRunner().invoke(app, [*asked, *option])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "scenes/sgdr/data/val-00000-of-00001.parquet").is_file() == there


def test_the_rarest_dimension_sets_the_number_of_each() -> None:
    target: Rle = {"size": [1, 1], "counts": "01"}  # the one pixel of the picture
    assert area(target) == 1
    plain = Sample("", Path("a.jpg"), 1, (1, 1), "it", (target,))
    kinds = [*("spatial",) * 3, "commonsense", "geometric", "discriminative", "multi-step"]
    samples = [replace(plain, sample_id=str(i), kind=kind) for i, kind in enumerate(kinds)]
    samples.insert(0, replace(plain, sample_id="nothing", kind="spatial", targets=()))
    assert [s.sample_id for s in balanced(samples)] == ["0", "4", "5", "6"]
    assert balanced(samples[:3]) == []
