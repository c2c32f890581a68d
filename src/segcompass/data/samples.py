"""Read any supported data set: find out its layout, hand back its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from segcompass.data import parquet, reasonseg, refcoco
from segcompass.data.instances import ImageRecord
from segcompass.data.refcoco import Broken
from segcompass.io import archives
from segcompass.io.errors import DataError
from segcompass.types import Sample

__all__ = ["LAYOUTS", "MANIFEST", "Broken", "ImageRecord", "locate", "read_dataset", "read_images"]

MANIFEST = "manifest.json"  # marks a folder of scenes, which holds every layout
LAYOUTS: dict[str, str] = {
    "refcoco": "refs(unc).p (or umd, google) and instances.json",
    "grefcoco": "grefs(unc).json and instances.json",
    "reasonseg": "train/, val/ or test/ (or train.zip …) with one JSON beside each JPG",
    "parquet": "SPLIT-*.parquet with image, text and mask",
}
_READERS: dict[str, Callable[..., list[Sample]]] = {
    "refcoco": refcoco.read_refcoco,
    "grefcoco": refcoco.read_grefcoco,
    "reasonseg": reasonseg.read_reasonseg,
    "parquet": parquet.read_parquet,
}


def read_dataset(
    root: Path,
    split: str,
    *,
    layout: str | None = None,
    limit: int | None = None,
    on_broken: Broken | None = None,
) -> list[Sample]:
    """Read one split of a data set in any of the layouts, in the order of its files.

    Args:
        root: the data set's folder, or one that holds a single data set; of a folder of scenes,
            which holds all layouts, the complete one (grefcoco) is read.
        split: train, val, test, testA or testB; of references by several authors, "google:val".
        layout: one of ``LAYOUTS``; None finds out.
        limit: keep only the first so many samples; None keeps all.
        on_broken: is told of every entry that cannot be read, by name; the others are read. Without
            it the first such entry is an error.

    Raises:
        DataError: no layout fits, several do, or the data set is incomplete.
        UnsafeFileError: a file could run code.
    """
    if limit is not None and limit < 0:
        raise DataError(f"limit must be 0 or more, received {limit}")
    name, folder = locate(Path(root), layout)
    return _READERS[name](folder, split, limit=limit, on_broken=on_broken)


def read_images(root: Path, split: str) -> list[ImageRecord]:
    """Read the pictures of a split of scenes with all their things.

    Args:
        root: a folder of scenes, or the grefcoco folder in it.
        split: train, val, testA or testB.

    Raises:
        DataError: the folder holds no scenes, or they are incomplete.
    """
    return refcoco.read_images(locate(Path(root), "grefcoco")[1], split)


def locate(root: Path, layout: str | None = None) -> tuple[str, Path]:
    """Layout and folder of the data set in or under ``root``.

    Raises:
        DataError: the folder does not exist, the layout is unknown, none fits, or several do.
    """
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"no layout is called {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder of a data set")
    found = [f for f in _fitting(root) if layout in (None, f[0])]
    if not found:
        children = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [f for child in children for f in _fitting(child) if layout in (None, f[0])]
    if layout is None and (root / MANIFEST).is_file():
        found = [f for f in found if f[0] == "grefcoco"]
    if len(found) == 1:
        return found[0]
    if not found:
        wanted = [layout] if layout else list(LAYOUTS)
        expected = "; ".join(f"{name}: {LAYOUTS[name]}" for name in wanted)
        raise DataError(f"{root} holds no known layout. Expected one of: {expected}")
    listed = ", ".join(f"{name} in {folder}" for name, folder in found)
    raise DataError(f"{root} holds several data sets: {listed}. Give one folder, or --layout")


def _fitting(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every layout that this very folder has."""
    if any(folder.glob("refs(*).p")):
        yield "refcoco", folder
    if any(folder.glob("grefs(*).json")):
        yield "grefcoco", folder
    splits = (archives.find_folder(folder / split) for split in reasonseg.SPLITS)
    if any(name.endswith(".json") for s in splits if s for name in archives.list_files(s)):
        yield "reasonseg", folder
    if parquet.split_files(folder):
        yield "parquet", folder
