"""What has been published, to be laid beside runs: never measured here."""

from __future__ import annotations

from typing import NamedTuple

PAPER = "SegCompass, tables 1-3"
REPORTED = "as its authors report"


class Published(NamedTuple):
    """Figures of one model on one split, in percent as printed; None where none is printed."""

    benchmark: str  # refcoco, grefcoco or reasonseg
    dataset: str
    split: str
    model: str
    giou: float | None
    ciou: float | None
    source: str


_REFERRING: dict[str, tuple[float, ...]] = {
    "SegCompass-7B (LLaVA-1.5)": (80.0, 82.9, 79.2, 77.2, 83.9, 71.8, 79.4, 77.6),
    "SegCompass-7B (Qwen2.5-VL)": (85.3, 87.5, 83.6, 78.3, 84.7, 76.6, 82.8, 81.0),
    "SegCompass-13B (LLaVA-1.5)": (86.3, 87.3, 84.1, 80.5, 84.6, 76.9, 84.0, 81.3),
}
_REFERRING_SPLITS = (
    ("RefCOCO", "val"),
    ("RefCOCO", "testA"),
    ("RefCOCO", "testB"),
    ("RefCOCO+", "val"),
    ("RefCOCO+", "testA"),
    ("RefCOCO+", "testB"),
    ("RefCOCOg", "val"),
    ("RefCOCOg", "test"),
)
# (gIoU, cIoU) of each split
_GENERALISED: dict[str, tuple[tuple[float, float], ...]] = {
    "SegCompass-7B (LLaVA-1.5)": ((75.0, 70.6), (76.1, 72.6), (68.2, 66.7)),
    "SegCompass-7B (Qwen2.5-VL)": ((76.1, 72.2), (76.8, 76.5), (70.0, 72.8)),
    "SegCompass-13B (LLaVA-1.5)": ((76.8, 72.2), (77.7, 77.3), (71.9, 72.4)),
}
_REASONING: dict[str, tuple[tuple[float, float], ...]] = {
    "SegCompass-7B (LLaVA-1.5)": ((66.3, 65.6), (61.0, 63.0)),
    "SegCompass-7B (Qwen2.5-VL)": ((66.6, 66.3), (64.0, 64.8)),
    "SegCompass-13B (LLaVA-1.5)": ((67.4, 67.2), (64.2, 66.5)),
}

PUBLISHED: tuple[Published, ...] = (
    *(
        Published("refcoco", dataset, split, model, None, ciou, PAPER)
        for model, figures in _REFERRING.items()
        for (dataset, split), ciou in zip(_REFERRING_SPLITS, figures, strict=True)
    ),
    Published("refcoco", "average of all splits", "–", "LENS-3B", None, 81.2, REPORTED),
    *(
        Published("grefcoco", "gRefCOCO", split, model, giou, ciou, PAPER)
        for model, figures in _GENERALISED.items()
        for split, (giou, ciou) in zip(("val", "testA", "testB"), figures, strict=True)
    ),
    *(
        Published("reasonseg", "ReasonSeg", split, model, giou, ciou, PAPER)
        for model, figures in _REASONING.items()
        for split, (giou, ciou) in zip(("val", "test"), figures, strict=True)
    ),
    Published("reasonseg", "ReasonSeg", "val", "EVOL-SAM3", 70.7, None, REPORTED),
)
