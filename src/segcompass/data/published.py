"""Sizes of the published data sets, to be compared with what was read."""

from __future__ import annotations

from pathlib import Path

# Sentences, by the usual name of the folder and by whose split of the references.
SENTENCES: dict[tuple[str, str], dict[str, int]] = {
    ("refcoco", "unc"): {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    ("refcoco+", "unc"): {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
    ("refcocog", "umd"): {"train": 80_512, "val": 4_896, "test": 9_602},
}
REASONSEG_IMAGES = {"train": 239, "val": 200, "test": 779}


def published_sentences(root: Path, author: str, split: str) -> int | None:
    """Sentences of a split of RefCOCO, RefCOCO+ or RefCOCOg; None where the size is not known."""
    return SENTENCES.get((root.name.lower(), author), {}).get(split)


def published_images(root: Path, split: str) -> int | None:
    """Pictures of a split of ReasonSeg; None for any other set."""
    return REASONSEG_IMAGES.get(split) if root.name == "ReasonSeg" else None
