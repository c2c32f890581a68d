"""A small RefCOCO folder, written by hand: one picture, two things and a crowd."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segcompass.io import masks

HW = (6, 8)
SQUARE = [[2.0, 1, 6, 1, 6, 4, 2, 4]]
STRIP = np.zeros(HW, dtype=bool)
STRIP[5, :3] = True


def sentence(sent_id: int, text: str) -> dict[str, Any]:
    return {"raw": text.upper(), "sent": text, "sent_id": sent_id, "tokens": text.split()}


def reference(ref_id: int, ann_id: Any, split: str = "val", image_id: int = 7) -> dict[str, Any]:
    sentences = [sentence(10 * ref_id, "left one"), sentence(10 * ref_id + 1, "the café")]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "file_name": "p_11.jpg",  # the real files append the annotation here: not the picture's
        "split": split,
        "sent_ids": [s["sent_id"] for s in sentences],
        "sentences": sentences,
    }


def annotation(ann_id: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    entry = {"id": ann_id, "image_id": 7, "category_id": 1, "segmentation": segmentation}
    return entry | {"iscrowd": 0} | more


def write_set(folder: Path) -> Path:
    """The folder, with a val and a testA reference of two sentences each."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", HW[::-1]).save(folder / "images" / "p.jpg")
    instances = {
        "images": [{"id": 7, "file_name": "p.jpg", "height": HW[0], "width": HW[1]}],
        "annotations": [
            annotation(11, SQUARE),
            annotation(12, dict(masks.encode(STRIP))),
            annotation(13, {"size": list(HW), "counts": [0, 48]}, iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "mug"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    write_pickle(folder, [reference(1, 11), reference(2, 12, "testA")])
    return folder


def write_pickle(folder: Path, references: Any) -> None:
    (folder / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))


def write_grefs(folder: Path, references: Any) -> None:
    (folder / "grefs(unc).json").write_text(json.dumps(references))


def edit_instances(folder: Path, **changes: Any) -> None:
    """Change tables of the folder's instances.json: each gets a function of its rows."""
    path = folder / "instances.json"
    tables = json.loads(path.read_text())
    for name, change in changes.items():
        tables[name] = change(tables[name])
    path.write_text(json.dumps(tables))
