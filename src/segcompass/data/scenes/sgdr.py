"""Scenes' questions sorted as in ReasonSeg-SGDR: four dimensions, something always to be found.

The benchmark asks for discriminative recognition and for spatial, geometric and multi-step
reasoning; commonsense, which can be answered without looking, is what it leaves out (Rea2Seg). The
files are in the layout that ``data.parquet`` assumes for it: OUT/sgdr/data/SPLIT-*.parquet.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from segcompass.data.parquet import KIND
from segcompass.data.refcoco import read_grefcoco
from segcompass.data.scenes.world import SPLITS
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Sample

DIMENSIONS = ("discriminative", "spatial", "geometric", "multi-step")
FOLDER = "sgdr"
_ROWS = 100  # in a row group, which is decoded as a whole


def write_sgdr(root: Path) -> dict[str, int]:
    """Write the SGDR-like set of a folder of scenes into its ``sgdr/``, equally many of each kind.

    Args:
        root: the folder of scenes.

    Returns:
        Questions of every split that has some of all four dimensions; its file is written anew.

    Raises:
        DataError: pyarrow is missing, or the scenes are incomplete.
    """
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("Parquet files need pyarrow; install segcompass[data]") from error
    out = root / FOLDER / "data"
    written: dict[str, int] = {}
    for split in SPLITS:
        samples = balanced(read_grefcoco(root / "grefcoco", split)) if _has(root, split) else []
        if samples:
            out.mkdir(parents=True, exist_ok=True)
            table = arrow.Table.from_pylist([_row(sample) for sample in samples])
            path = out / f"{split}-00000-of-00001.parquet"
            parquet.write_table(table, path, row_group_size=_ROWS)
            written[split] = len(samples)
    return written


def balanced(samples: Sequence[Sample]) -> list[Sample]:
    """Equally many samples of each dimension, the first ones of each, in their own order."""
    fitting = [s for s in samples if s.kind in DIMENSIONS and s.targets]
    most = min(sum(s.kind == dimension for s in fitting) for dimension in DIMENSIONS)
    room = dict.fromkeys(DIMENSIONS, most)
    chosen = []
    for sample in fitting:
        assert sample.kind is not None
        if room[sample.kind]:
            room[sample.kind] -= 1
            chosen.append(sample)
    return chosen


def _has(root: Path, split: str) -> bool:
    return any((root / "grefcoco" / "images").glob(f"{split}_*.jpg"))


def _row(sample: Sample) -> dict[str, Any]:
    image = {"bytes": sample.image_path.read_bytes(), "path": sample.image_path.name}
    mask = masks.encode(masks.union(sample.targets, sample.image_hw))
    return {"image": image, "text": sample.instruction, "mask": mask, KIND: sample.kind}
