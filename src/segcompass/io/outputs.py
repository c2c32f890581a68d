"""What leaves the program: JSON, COCO results, files on disk, and readings of the concepts.

A `Prediction` holds everything; this file only re-expresses it. The JSON schema is described in
``docs/outputs.md`` and carries its version in the field ``schema``.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse import csr_array

from segcompass.io import masks as mask_io
from segcompass.types import Prediction, TokenKind

SCHEMA = "segcompass.prediction/1"
TOP_CONCEPTS = 8

# Distinct on light and dark pictures, and told apart by the common forms of colour blindness.
SLOT_COLOURS: tuple[tuple[int, int, int], ...] = (
    (232, 89, 60),
    (47, 124, 214),
    (28, 158, 108),
    (196, 72, 156),
    (20, 165, 188),
    (122, 92, 214),
)
_TEXT_KINDS = (TokenKind.INSTRUCTION, TokenKind.THOUGHT)
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


class ConceptWeight(NamedTuple):
    """One SAE latent and how much it counts in some reading."""

    concept: int  # latent index in [0, S)
    weight: float  # > 0


class TokenActivation(NamedTuple):
    """What the concepts do on one text token."""

    position: int  # row in the sequence of L tokens
    text: str
    kind: TokenKind
    total: float  # sum of the token's activations
    concepts: tuple[ConceptWeight, ...]  # strongest first; weight is the activation


def code_matrix(prediction: Prediction) -> csr_array:
    """Return the activations as a sparse (L, S) matrix on the host.

    Raises:
        ValueError: if the codes do not describe the prediction's own tokens.
    """
    codes = prediction.codes
    if codes.n_rows != len(prediction.tokens):
        raise ValueError(
            f"codes describe {codes.n_rows} tokens, the prediction has {len(prediction.tokens)}; "
            "both must come from the same pass"
        )
    values = codes.values.detach().float().cpu().numpy()
    rows, columns = codes.rows.cpu().numpy(), codes.columns.cpu().numpy()
    return csr_array((values, (rows, columns)), shape=(codes.n_rows, codes.n_columns))


def _strongest(weights: np.ndarray, top: int) -> tuple[ConceptWeight, ...]:
    """The ``top`` largest positive entries, largest first, ties by index."""
    order = np.argsort(-weights, kind="stable")[: max(top, 0)]
    return tuple(ConceptWeight(int(j), float(weights[j])) for j in order if weights[j] > 0)


def slot_concepts(
    prediction: Prediction, top: int = TOP_CONCEPTS
) -> list[tuple[ConceptWeight, ...]]:
    """For every slot, the concepts it reads most.

    The weight of concept j for slot k is Σ_t slot_attention[k, t] · activation[t, j]: the
    activation, weighted by where the slot attends. It says what was read, not what caused the
    mask; for causes, switch a concept off and look again.

    Returns:
        One tuple per slot, strongest first, at most ``top`` entries each.
    """
    weights = np.asarray(code_matrix(prediction).T @ prediction.slot_attention.T).T  # (K, S)
    return [_strongest(row, top) for row in weights]


def active_concepts(prediction: Prediction) -> int:
    """How many different concepts fire anywhere in the sequence."""
    return len(np.unique(prediction.codes.columns.cpu().numpy()))


def word_activations(prediction: Prediction, top: int = 3) -> list[TokenActivation]:
    """For every token of the instruction and the thought, its activation and top concepts."""
    codes = code_matrix(prediction)
    readings = []
    for index in np.flatnonzero(np.isin(prediction.token_kinds, _TEXT_KINDS)):
        span = slice(codes.indptr[index], codes.indptr[index + 1])
        columns, values = codes.indices[span], codes.data[span]
        best = _strongest(values, top)
        readings.append(
            TokenActivation(
                position=int(index),
                text=prediction.tokens[index],
                kind=TokenKind(int(prediction.token_kinds[index])),
                total=float(values.sum()),
                concepts=tuple(ConceptWeight(int(columns[i]), weight) for i, weight in best),
            )
        )
    return readings


def token_heat(prediction: Prediction, top: int = TOP_CONCEPTS) -> np.ndarray:
    """For every slot and image token, how strongly the slot's top concepts fire there.

    It is the mean of their activations, weighted as in `slot_concepts`.

    Returns:
        float32 (K, n_image_tokens), in the order of ``prediction.token_boxes``.
    """
    image_codes = code_matrix(prediction)[prediction.token_kinds == TokenKind.IMAGE]
    heat = np.zeros((len(prediction.slot_scores), image_codes.shape[0]), dtype=np.float32)
    for row, concepts in zip(heat, slot_concepts(prediction, top), strict=True):
        if concepts:
            weights = np.array([c.weight for c in concepts])
            row[:] = image_codes[:, [c.concept for c in concepts]] @ (weights / weights.sum())
    return heat


def to_json(prediction: Prediction) -> dict[str, Any]:
    """The prediction as plain data, schema ``segcompass.prediction/1`` (``docs/outputs.md``)."""
    height, width = prediction.image_rgb.shape[:2]
    boxes = mask_io.boxes(prediction.slot_masks).astype(int).tolist()
    concepts = slot_concepts(prediction)
    slots = [
        {
            "index": k,
            "accepted": bool(prediction.accepted[k]),
            "confidence": float(prediction.slot_scores[k]),
            "box": boxes[k] if mask.any() else None,
            "area": int(mask.sum()),
            "mask": mask_io.encode(mask),
            "concepts": [concept._asdict() for concept in concepts[k]],
        }
        for k, mask in enumerate(prediction.slot_masks)
    ]
    return {
        "schema": SCHEMA,
        "model": prediction.model,
        "source": _unicode(prediction.source) if prediction.source is not None else None,
        "image": {"width": width, "height": height},
        "instruction": _unicode(prediction.instruction),
        "status": prediction.status.value,
        "reasoning": _unicode(prediction.reasoning),
        "text": _unicode(prediction.text),
        "threshold": float(prediction.threshold),
        "slots": slots,
        "active_concepts": active_concepts(prediction),
        "timings": {stage: float(seconds) for stage, seconds in prediction.timings.items()},
    }


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
    """The picture with every accepted mask tinted and outlined, uint8 (height, width, 3)."""
    canvas = prediction.image_rgb.astype(np.float32)
    width = max(1, round(max(canvas.shape[:2]) / 300))
    for k in np.flatnonzero(prediction.accepted):
        colour, mask = np.array(slot_colour(int(k)), dtype=np.float32), prediction.slot_masks[k]
        canvas[mask] = 0.55 * canvas[mask] + 0.45 * colour
        canvas[mask_outline(mask, width)] = colour
    return np.rint(canvas).astype(np.uint8)


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
    for k, mask in enumerate(prediction.slot_masks):
        if prediction.accepted[k]:
            pictures[f"slot-{k}"] = mask
        else:
            (root / f"{stem}.slot-{k}.png").unlink(missing_ok=True)
    paths = {what: root / f"{stem}.{what}.png" for what in sorted(pictures)}
    for what, path in paths.items():
        _write(path, _png_bytes(pictures[what]))
    paths["arrays"] = root / f"{stem}.npz"
    _write(paths["arrays"], _bytes_of(lambda out: np.savez_compressed(out, **_arrays(prediction))))
    record = to_json(prediction) | {"files": {what: path.name for what, path in paths.items()}}
    paths["json"] = root / f"{stem}.json"
    _write(paths["json"], (dump_json(record, indent=2) + "\n").encode())
    return paths


def _union(prediction: Prediction) -> np.ndarray:
    """All accepted masks together, bool (height, width)."""
    return np.asarray(prediction.slot_masks[prediction.accepted].any(axis=0))


def _arrays(prediction: Prediction) -> dict[str, Any]:
    """What the NPZ holds; shapes and ranges are in ``docs/outputs.md``."""
    codes, errors = prediction.codes, prediction.sae_errors
    return {
        **({} if errors is None else {"sae_errors": errors.astype(np.float32)}),
        "heatmaps": prediction.slot_heatmaps.astype(np.float16),
        "heatmap_logits": prediction.heatmap_logits.astype(np.float32),
        "head_scores": prediction.head_scores.astype(np.float32),
        "low_res_logits": prediction.low_res_logits.astype(np.float32),
        "scores": prediction.slot_scores.astype(np.float32),
        "accepted": prediction.accepted.astype(bool),
        "slot_attention": prediction.slot_attention.astype(np.float32),
        "token_kinds": prediction.token_kinds.astype(np.int8),
        "code_rows": codes.rows.cpu().numpy().astype(np.int32),
        "code_columns": codes.columns.cpu().numpy().astype(np.int32),
        "code_values": codes.values.detach().float().cpu().numpy(),
        # What a replay needs beside the codes; see segcompass.io.saved.
        "image": prediction.image_rgb,
        "concentration_states": prediction.concentration_states.astype(np.float32),
        "slot_queries": prediction.slot_queries.astype(np.float32),
        "concept_vectors": prediction.concept_vectors.astype(np.float32),
        "tokens": np.array(prediction.tokens),
        "token_boxes": prediction.token_boxes.astype(np.float32),
        "n_concepts": np.array(codes.n_columns),
        "paths": np.array(prediction.paths),
    }


def _png_bytes(pixels: np.ndarray) -> bytes:
    """A colour picture as it is, a mask as 0 and 255."""
    image = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8) * 255)
    return _bytes_of(lambda out: image.save(out, format="PNG", optimize=True))


def _bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step; a link lying there is replaced, not followed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # left by a killed run of the same process id
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
