"""What leaves the program: JSON, COCO results and files on disk.

A `Prediction` holds everything; this file only re-expresses it, and leaves out what the
prediction's interface has nothing to show for. The JSON schema is described in ``docs/outputs.md``
and carries its version in the field ``schema``.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from segcompass.io import masks as mask_io
from segcompass.io.arrays import to_arrays
from segcompass.io.files import bytes_of, write_whole
from segcompass.io.readings import active_concepts, slot_concepts
from segcompass.types import BoxPrompts, Candidates, Prediction

SCHEMA = "segcompass.prediction/1"

# Distinct on light and dark pictures, and told apart by the common forms of colour blindness.
SLOT_COLOURS: tuple[tuple[int, int, int], ...] = (
    (232, 89, 60),
    (47, 124, 214),
    (28, 158, 108),
    (196, 72, 156),
    (20, 165, 188),
    (122, 92, 214),
)
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def to_json(prediction: Prediction) -> dict[str, Any]:
    """The prediction as plain data, schema ``segcompass.prediction/1`` (``docs/outputs.md``)."""
    height, width = prediction.image_rgb.shape[:2]
    record = {
        "schema": SCHEMA,
        "model": prediction.model,
        "interface": prediction.interface,
        "fingerprint": prediction.fingerprint,
        "source": _unicode(prediction.source) if prediction.source is not None else None,
        "image": {"width": width, "height": height},
        "instruction": _unicode(prediction.instruction),
        "status": prediction.status.value,
        "reasoning": _unicode(prediction.reasoning),
        "text": _unicode(prediction.text),
        "threshold": float(prediction.threshold),
        "slots": _slots(prediction),
        "timings": {stage: float(seconds) for stage, seconds in prediction.timings.items()},
    }
    if prediction.codes is not None:
        record["active_concepts"] = active_concepts(prediction)
    if prediction.candidates is not None:
        record["candidates"] = _candidates(prediction.candidates)
    return record


def _slots(prediction: Prediction) -> list[dict[str, Any]]:
    """One entry per slot, accepted or not."""
    boxes = mask_io.boxes(prediction.slot_masks).astype(int).tolist()
    slots: list[dict[str, Any]] = [
        {
            "index": k,
            "accepted": bool(prediction.accepted[k]),
            "confidence": float(prediction.slot_scores[k]),
            "box": boxes[k] if mask.any() else None,
            "area": int(mask.sum()),
            "mask": mask_io.encode(mask),
        }
        for k, mask in enumerate(prediction.slot_masks)
    ]
    if prediction.codes is not None:
        for slot, concepts in zip(slots, slot_concepts(prediction), strict=True):
            slot["concepts"] = [concept._asdict() for concept in concepts]
    if prediction.prompts is not None:
        for slot, prompt in zip(slots, slot_prompts(prediction.prompts), strict=True):
            slot["prompt"] = prompt
    return slots


def slot_prompts(prompts: BoxPrompts) -> list[dict[str, Any] | None]:
    """For every slot the box and the points that the answer names, None where it names nothing."""
    return [
        {"box": box.tolist(), "points": points[~np.isnan(points).any(axis=-1)].tolist()}
        if np.isfinite(box).all()
        else None
        for box, points in zip(prompts.boxes, prompts.points, strict=True)
    ]


def _candidates(candidates: Candidates) -> list[dict[str, Any]]:
    rows = zip(
        candidates.sources, candidates.scores, candidates.thoughts, candidates.masks, strict=True
    )
    return [
        {
            "source": source,
            "score": float(score),
            "thought": _unicode(thought),
            "chosen": i == candidates.chosen,
            "mask": mask_io.encode(mask),
        }
        for i, (source, score, thought, mask) in enumerate(rows)
    ]


def dump_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Standard JSON (no NaN), readable in any script; one line unless ``indent`` is given."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)


def _unicode(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates (from undecodable file names) become '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_coco(
    predictions: Sequence[Prediction], image_ids: Sequence[int], category_id: int = 1
) -> list[dict[str, Any]]:
    """Accepted slots as a COCO results list, as ``COCO.loadRes`` reads it.

    Args:
        predictions: one per image.
        image_ids: the data set's ids of these images, in the same order.
        category_id: written into every entry; instructions have no category of their own.

    Raises:
        ValueError: if the two sequences differ in length.
    """
    if len(predictions) != len(image_ids):
        raise ValueError(f"{len(predictions)} predictions but {len(image_ids)} image ids")
    results = []
    for prediction, image_id in zip(predictions, image_ids, strict=True):
        for k in np.flatnonzero(prediction.accepted):
            rle = mask_io.encode(prediction.slot_masks[k])
            results.append(
                {
                    "image_id": int(image_id),
                    "category_id": category_id,
                    "segmentation": rle,
                    "bbox": list(mask_io.box(rle)),
                    "score": float(prediction.slot_scores[k]),
                }
            )
    return results


def slot_colour(slot: int) -> tuple[int, int, int]:
    """The slot's colour wherever it is drawn, as RGB in 0..255."""
    if slot < len(SLOT_COLOURS):
        return SLOT_COLOURS[slot]
    r, g, b = colorsys.hls_to_rgb(slot * 0.618034 % 1, 0.52, 0.6)  # golden angle: never repeats
    return round(r * 255), round(g * 255), round(b * 255)


def mask_outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask's inner border, ``width`` px wide, as a bool mask."""
    if not mask.any():
        return np.zeros_like(mask)
    return mask & ~np.asarray(ndimage.binary_erosion(mask, iterations=width))


def overlay(prediction: Prediction) -> np.ndarray:
    """The picture with every accepted mask tinted and outlined, uint8 (height, width, 3).

    Boxes and points that the answer names for these masks are drawn over them.
    """
    canvas = prediction.image_rgb.astype(np.float32)
    width = max(1, round(max(canvas.shape[:2]) / 300))
    accepted = np.flatnonzero(prediction.accepted).tolist()
    for k in accepted:
        colour, mask = np.array(slot_colour(k), dtype=np.float32), prediction.slot_masks[k]
        canvas[mask] = 0.55 * canvas[mask] + 0.45 * colour
        canvas[mask_outline(mask, width)] = colour
    image = Image.fromarray(np.rint(canvas).astype(np.uint8))
    if prediction.prompts is not None:
        _draw_prompts(image, prediction.prompts, accepted, width)
    return np.array(image)


def _draw_prompts(image: Image.Image, prompts: BoxPrompts, slots: list[int], width: int) -> None:
    """Boxes and points in their slots' colours, cased in white to stand out from any picture."""
    draw, prompt_of = ImageDraw.Draw(image), slot_prompts(prompts)
    for k in slots:
        if (prompt := prompt_of[k]) is None:
            continue
        x0, y0, x1, y1 = prompt["box"]
        draw.rectangle((x0, y0, x1, y1), outline="white", width=3 * width)
        left, top = x0 + width, y0 + width  # a box may be narrower than its outline
        inner = (left, top, max(left, x1 - width), max(top, y1 - width))
        draw.rectangle(inner, outline=slot_colour(k), width=width)
        for point in prompt["points"]:
            draw.circle(point, 4 * width, fill="white")
            draw.circle(point, 3 * width, fill=slot_colour(k))


def file_stem(prediction: Prediction) -> str:
    """A name for the prediction's files, see :func:`stem_of`."""
    return stem_of(prediction.source, prediction.instruction)


def stem_of(source: str | None, instruction: str) -> str:
    """A name for the files of an answer: safe on every system, the same on every run.

    It is made of what is harmless in the source's name and of a digest of source and instruction,
    so that pictures of one name, or two questions about one picture, never share files.
    """
    name = (source or "image").replace("\\", "/").rsplit("/", 1)[-1]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name.rsplit(".", 1)[0]).strip("-_")[:48] or "image"
    if _RESERVED.fullmatch(plain):
        plain = f"image-{plain}"
    key = json.dumps([source, instruction])
    return f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def save(prediction: Prediction, folder: str | Path) -> dict[str, Path]:
    """Write the prediction into ``folder``, which is made if it is not there.

    Written are ``STEM.json``, ``STEM.slot-K.png`` for every accepted slot, ``STEM.union.png``,
    ``STEM.overlay.png`` and ``STEM.npz``. Each file is replaced as a whole, links are never
    followed, and masks of slots that an earlier run accepted and this one does not are removed.

    Returns:
        The paths by what they hold: ``json``, ``slot-0``, …, ``union``, ``overlay``, ``arrays``.
    """
    root, stem = Path(folder), file_stem(prediction)
    root.mkdir(parents=True, exist_ok=True)
    pictures = {"overlay": overlay(prediction), "union": _union(prediction)}
    for k in np.flatnonzero(prediction.accepted).tolist():
        pictures[f"slot-{k}"] = prediction.slot_masks[k]
    paths = {what: root / f"{stem}.{what}.png" for what in sorted(pictures)}
    for stale in {*root.glob(f"{stem}.slot-*.png")} - {*paths.values()}:  # answers differ in slots
        stale.unlink(missing_ok=True)
    for what, path in paths.items():
        write_whole(path, _png_bytes(pictures[what]))
    paths["arrays"], arrays = root / f"{stem}.npz", to_arrays(prediction)
    write_whole(paths["arrays"], bytes_of(lambda out: np.savez_compressed(out, **arrays)))
    record = to_json(prediction) | {"files": {what: path.name for what, path in paths.items()}}
    paths["json"] = root / f"{stem}.json"
    write_whole(paths["json"], dump_json(record, indent=2) + "\n")
    return paths


def _union(prediction: Prediction) -> np.ndarray:
    """All accepted masks together, bool (height, width)."""
    return np.asarray(prediction.slot_masks[prediction.accepted].any(axis=0))


def _png_bytes(pixels: np.ndarray) -> bytes:
    """A colour picture as it is, a mask as 0 and 255."""
    image = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8) * 255)
    return bytes_of(lambda out: image.save(out, format="PNG", optimize=True))
