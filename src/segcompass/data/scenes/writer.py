"""Write scenes to disk in the RefCOCO, gRefCOCO and ReasonSeg layouts.

    OUT/manifest.json                    what was asked for; marks the folder as complete
    OUT/grefcoco/                        everything: images/, grefs(unc).json, instances.json and
                                         the side file scenes.json (kinds, thoughts, attributes)
    OUT/refcoco/                         the questions with one target: refs(unc).p, instances.json
    OUT/reasonseg/SPLIT/                 the questions with a target: one JPG and JSON each

Pictures are stored once and hard-linked. Scene i of a split depends on seed, split and i alone, so
any of them can be made again by itself, and the number of workers changes nothing.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segcompass.data.instances import SIDE_FILE
from segcompass.data.json_files import dump_json
from segcompass.data.reasonseg import write_note
from segcompass.data.refcoco import NO_TARGET
from segcompass.data.samples import MANIFEST
from segcompass.data.scenes.catalog import CATEGORIES, Scene
from segcompass.data.scenes.questions import Question, ask, describe
from segcompass.data.scenes.render import render
from segcompass.data.scenes.world import SPLITS, sample_scene
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.io.links import link_or_copy

WORLD_VERSION = 3  # raised whenever the same seed would give other bytes
IMAGES_PER_SPLIT = 1_000_000  # ids of pictures count from here on, split by split
IDS_PER_IMAGE = 100  # ids of annotations and references per picture
JPEG_QUALITY = 92
ATTRIBUTES = ("colour", "size", "texture", "cell")
SIDE_OF_QUESTIONS = ("kind", "form", "phrasing", "thought")
SCENE_TRIES, QUESTION_TRIES = 100, 10
CATEGORY_IDS = {name: number for number, name in enumerate(CATEGORIES, start=1)}


@dataclass(frozen=True)
class _Task:
    folder: Path
    split: str
    index: int
    questions: int
    seed: int
    size: int


@dataclass(frozen=True)
class _Made:
    """The records of one picture; the picture itself is on disk already."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    references: list[dict[str, Any]]
    side: dict[str, dict[int, dict[str, Any]]]  # table -> id -> what only scenes know


def write_scenes(
    out: Path,
    counts: dict[str, int],
    seed: int,
    workers: int | None = None,
    questions_per_image: int = 3,
    size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write a data set of scenes, all of it or nothing.

    Args:
        out: the folder to make; it may exist if it is empty.
        counts: number of questions per split (train, val, testA, testB); 0 leaves a split out.
        seed: equal seeds give equal bytes.
        workers: processes to use; None takes one per free core, where that is worth the start.
        questions_per_image: questions about each picture; the last one may get fewer.
        size: side of the pictures in px.
        progress: called with (pictures done, pictures in all) after each picture.

    Returns:
        True when written; False when ``out`` already holds exactly this data set.

    Raises:
        ValueError: a count or the number of questions makes no sense.
        DataError: ``out`` holds something else.
    """
    plan = _plan(counts, questions_per_image)
    manifest = {
        "format": "segcompass scenes",
        "version": WORLD_VERSION,
        "seed": seed,
        "counts": {split: counts.get(split, 0) for split in SPLITS},
        "questions_per_image": questions_per_image,
        "size": size,
    }
    if _already_there(out, manifest):
        return False
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _make_folders(partial, [split for split in SPLITS if counts.get(split, 0)])
        tasks = [_Task(partial, *which, seed=seed, size=size) for which in plan]
        made: list[_Made] = []
        for records in _run(tasks, workers):
            made.append(records)
            if progress is not None:
                progress(len(made), len(tasks))
        _write_tables(partial, made)
        dump_json(partial / MANIFEST, manifest)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _plan(counts: dict[str, int], questions_per_image: int) -> list[tuple[str, int, int]]:
    """Check what is asked for; every picture's split, number in it, and number of questions."""
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise ValueError(f"no split is called {unknown[0]!r}; choose among {', '.join(SPLITS)}")
    if not 1 <= questions_per_image < IDS_PER_IMAGE:
        raise ValueError(f"questions_per_image must be 1 to 99, received {questions_per_image}")
    most = IMAGES_PER_SPLIT * questions_per_image
    for split, count in counts.items():
        if not 0 <= count <= most:
            raise ValueError(f"{split}: a count lies between 0 and {most}, received {count}")
    if not any(counts.values()):
        raise ValueError("all counts are 0; ask for at least one question")
    return [
        (split, index, min(questions_per_image, counts[split] - start))
        for split in SPLITS
        for index, start in enumerate(range(0, counts.get(split, 0), questions_per_image))
    ]


def _already_there(out: Path, manifest: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"{out} exists and holds something other than scenes; choose another folder"
        ) from None
    if found != manifest:
        wanted = {k: v for k, v in manifest.items() if found.get(k) != v}
        there = {k: found.get(k) for k in wanted}
        raise DataError(
            f"{out} holds other scenes: {there} where {wanted} is asked for; "
            "remove it or choose another folder"
        )
    return True


def _make_folders(out: Path, splits: Iterable[str]) -> None:
    for name in ("grefcoco/images", "refcoco/images", *(f"reasonseg/{s}" for s in splits)):
        (out / name).mkdir(parents=True)


def _run(tasks: list[_Task], workers: int | None) -> Iterator[_Made]:
    """Make all pictures in order, here or in processes that start afresh ("spawn")."""
    if workers is None:
        free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        worth = len(tasks) // 200  # a process needs about two seconds to start
        workers = max(1, min(worth, free or 1))
    if workers <= 1:
        yield from map(_make, tasks)
        return
    chunk = max(1, min(32, math.ceil(len(tasks) / workers)))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_make, tasks, chunksize=chunk)


def _make(task: _Task) -> _Made:
    """Sample, draw, ask; write the picture and its ReasonSeg files; return the records."""
    rng = random.Random(f"{task.seed}/{task.split}/{task.index}")
    scene, questions = _scene_and_questions(rng, task.split, task.questions)
    drawn = render(scene, task.size)
    image_id = SPLITS.index(task.split) * IMAGES_PER_SPLIT + task.index + 1
    name = f"{task.split}_{task.index:06d}.jpg"
    picture = task.folder / "grefcoco" / "images" / name
    Image.fromarray(drawn.image).save(picture, quality=JPEG_QUALITY, subsampling=0)
    link_or_copy(picture, task.folder / "refcoco" / "images" / name)
    _write_reasonseg(picture, task.folder / "reasonseg" / task.split, questions, drawn.visible)
    height, width = drawn.image.shape[:2]
    annotations = _annotations(scene, drawn.visible, image_id)
    references = [
        _reference(question, annotations, task.split, name, image_id * IDS_PER_IMAGE + number)
        for number, question in enumerate(questions)
    ]
    return _Made(
        image={"id": image_id, "file_name": name, "height": height, "width": width},
        annotations=annotations,
        references=references,
        side={
            "images": {image_id: {"description": describe(scene)}},
            "annotations": {
                item["id"]: {name: getattr(thing, name) for name in ATTRIBUTES}
                for item, thing in zip(annotations, scene.things, strict=True)
            },
            "refs": {
                item["ref_id"]: {name: getattr(question, name) for name in SIDE_OF_QUESTIONS}
                for item, question in zip(references, questions, strict=True)
            },
        },
    )


def _scene_and_questions(
    rng: random.Random, split: str, count: int
) -> tuple[Scene, list[Question]]:
    """A scene about which so many questions can be asked, and the questions, no two alike.

    Raises:
        ValueError: scene after scene, there were too few questions; names the last reason.
    """
    for _ in range(SCENE_TRIES):
        scene = sample_scene(rng, split=split)
        questions: dict[str, Question] = {}
        try:
            for _ in range(QUESTION_TRIES * count):
                question = ask(scene, rng, split=split)
                questions.setdefault(question.text, question)
                if len(questions) == count:
                    return scene, list(questions.values())
        except ValueError as error:
            refused = error
            continue
        refused = ValueError(f"only {len(questions)} different questions about one scene")
    raise ValueError(f"{SCENE_TRIES} scenes of {split} in a row: {refused}") from refused


def _annotations(scene: Scene, visible: np.ndarray, image_id: int) -> list[dict[str, Any]]:
    rles = [masks.encode(mask) for mask in visible]
    return [
        {
            "id": image_id * IDS_PER_IMAGE + number,
            "image_id": image_id,
            "category_id": CATEGORY_IDS[thing.category],
            "segmentation": rle,
            "area": masks.area(rle),
            "bbox": list(masks.box(rle)),
            "iscrowd": 0,
        }
        for number, (thing, rle) in enumerate(zip(scene.things, rles, strict=True))
    ]


def _reference(
    question: Question, annotations: list[dict[str, Any]], split: str, name: str, ref_id: int
) -> dict[str, Any]:
    """A gRefCOCO reference with one sentence, which has the reference's id."""
    targets = [annotations[t] for t in sorted(question.targets)]
    words = {"raw": question.text, "sent": question.text, "tokens": question.text.split()}
    return {
        "ref_id": ref_id,
        "ann_id": [item["id"] for item in targets] or [NO_TARGET],
        "image_id": annotations[0]["image_id"],
        "category_id": [item["category_id"] for item in targets] or [NO_TARGET],
        "file_name": name,
        "split": split,
        "sent_ids": [ref_id],
        "sentences": [words | {"sent_id": ref_id}],
    }


def _write_reasonseg(
    picture: Path, folder: Path, questions: list[Question], visible: np.ndarray
) -> None:
    """One picture and note per question; ReasonSeg always has something to find."""
    asked_for = {target for question in questions for target in question.targets}
    polygons = {target: masks.outlines(visible[target]) for target in asked_for}
    for number, question in enumerate(questions):
        if question.targets:
            path = folder / f"{picture.stem}_{number}.json"
            shapes = [p for target in sorted(question.targets) for p in polygons[target]]
            write_note(path, question.text, shapes)
            link_or_copy(picture, path.with_suffix(".jpg"))


def _write_tables(out: Path, made: list[_Made]) -> None:
    references = [reference for m in made for reference in m.references]
    instances = {
        "info": {"description": "segcompass scenes", "version": WORLD_VERSION},
        "images": [m.image for m in made],
        "annotations": [item for m in made for item in m.annotations],
        "categories": [{"id": number, "name": name} for name, number in CATEGORY_IDS.items()],
    }
    side = {
        table: {key: entry for m in made for key, entry in m.side[table].items()}
        for table in ("images", "annotations", "refs")
    }
    dump_json(out / "grefcoco" / "instances.json", instances)
    link_or_copy(out / "grefcoco" / "instances.json", out / "refcoco" / "instances.json")
    dump_json(out / "grefcoco" / "grefs(unc).json", references)
    dump_json(out / "grefcoco" / SIDE_FILE, side)
    single = [
        r | {"ann_id": r["ann_id"][0], "category_id": r["category_id"][0]}
        for r in references
        if len(r["ann_id"]) == 1 and r["ann_id"] != [NO_TARGET]
    ]
    # through JSON: a pickle also stores which equal texts are one object, and that depends on
    # how many processes the records came through
    plain = json.loads(json.dumps(single))
    (out / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(plain, protocol=2))
