"""Training input is looked through before anything is computed: pictures, masks, instructions.

Nothing is decoded: of pictures the header and the end are read, of masks the runs. What was found
is kept with the run, so that a resumed run does not look again at files that did not change.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from segcompass.io import archives
from segcompass.io.errors import DataError, ImageError, UnsafeFileError
from segcompass.io.files import write_whole
from segcompass.io.images import displayed_hw
from segcompass.io.masks import run_lengths
from segcompass.io.progress import progress
from segcompass.learning.config import DataConfig
from segcompass.learning.corpus import read_samples
from segcompass.reasoning.prompts import Prompt
from segcompass.types import Sample

FINDINGS, LEFT_OUT = "checked.json", "left_out.jsonl"  # in the run's folder
NAMED = 3  # problems that a message spells out
UNSAFE, EMPTY, OTHER_SIZE = "unsafe picture", "empty mask", "another size"
Found = tuple[str, str]  # kind and text of a problem

_VERSION = 1  # raise it when the checks change
_KEPT = 8  # looks that are remembered: stages differ in their prompt and samples
_THREADS = 8  # reading headers waits for the disk
logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """Why a sample cannot be trained on."""

    sample: str
    kind: str  # a few words, for counting
    text: str  # names the file and what was found


def training_samples(
    data: DataConfig, prompt: Prompt | None = None, run: Path | None = None
) -> list[Sample]:
    """Read and check the configured training samples.

    Args:
        data: Which samples, and what a bad one does.
        prompt: Knows how long an instruction may be; None leaves that check out.
        run: Folder in which the findings are kept for the next time.

    Raises:
        DataError: if a sample cannot be trained on and ``on_error`` is fail, or none is left.
        UnsafeFileError: likewise, if a picture must not be opened.
    """
    broken: list[Problem] = []

    def note(name: str, error: DataError) -> None:
        broken.append(Problem(name, "unreadable entry", str(error)))

    samples = read_samples(data, note if data.on_error == "skip" else None)
    path = None if run is None else run / FINDINGS
    return check_samples(samples, prompt, data.on_error, path, broken)


def check_samples(
    samples: Sequence[Sample],
    prompt: Prompt | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    path: Path | None = None,
    known: Sequence[Problem] = (),
) -> list[Sample]:
    """The samples that can be trained on.

    Args:
        samples: As read.
        prompt: Knows how long an instruction may be; None leaves that check out.
        on_error: fail, or leave bad samples out with one counted warning; left_out.jsonl beside
            ``path`` then names them all.
        path: File in which the findings are kept; used again while nothing has changed.
        known: Problems that were met while reading.

    Raises:
        DataError: if a sample is bad and ``on_error`` is fail, or none is left.
        UnsafeFileError: likewise, if a picture must not be opened.
    """
    found = [*known, *_remembered(samples, prompt, path)]
    if not found:
        return list(samples)
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(p.kind for p in found).most_common())
    first = "; ".join(f"{p.sample}: {p.text}" for p in found[:NAMED])
    told = f"{len(found):,} of {len(samples) + len(known):,} samples cannot be trained on ({kinds})"
    told = f"{told}: {first}{'; …' if len(found) > NAMED else ''}"
    bad = {p.sample for p in found}
    kept = [sample for sample in samples if sample.sample_id not in bad]
    if on_error == "fail" or not kept:
        error = UnsafeFileError if any(p.kind == UNSAFE for p in found) else DataError
        raise error(f"{told}. Mend them, or leave them out with data.on_error: skip")
    if path is not None:
        rows = (json.dumps(problem._asdict()) + "\n" for problem in found)
        _write(path.with_name(LEFT_OUT), "".join(rows))
    logger.warning("%s. They are left out", told)
    return kept


def find_problems(samples: Sequence[Sample], prompt: Prompt | None = None) -> list[Problem]:
    """What keeps samples from being trained on, the first thing found of each."""
    picture, mask, instruction = cache(_picture), cache(_mask), cache(_instruction)
    asked = list(dict.fromkeys((s.image_path, s.image_hw) for s in samples))
    with ThreadPoolExecutor(_THREADS) as pool, progress("looking through the data") as moved:
        for done, _ in enumerate(pool.map(lambda of: picture(*of), asked), start=1):
            moved(done, len(asked))
    problems = []
    for sample in samples:
        hw = sample.image_hw
        found = picture(sample.image_path, hw)
        for rle in sample.targets:
            found = found or mask(tuple(rle["size"]), rle["counts"], hw)
        if sample.ignore is not None:
            ignored = mask(tuple(sample.ignore["size"]), sample.ignore["counts"], hw)
            found = found or (None if ignored and ignored[0] == EMPTY else ignored)
        found = found or instruction(sample.instruction, prompt)
        if found is not None:
            problems.append(Problem(sample.sample_id, *found))
    return problems


def _picture(path: Path, hw: tuple[int, int]) -> Found | None:
    try:
        height, width = displayed_hw(path)
    except UnsafeFileError as error:
        return UNSAFE, str(error)
    except ImageError as error:
        return ("unreadable picture" if archives.is_file(path) else "missing picture"), str(error)
    if (height, width) == hw:
        return None
    wanted = f"{hw[1]}×{hw[0]}"
    return OTHER_SIZE, f"{path} is {width}×{height}, its masks are for a picture of {wanted}"


def _mask(size: tuple[int, ...], counts: str, hw: tuple[int, int]) -> Found | None:
    if size != hw:
        return OTHER_SIZE, f"a mask is of {size[1]}×{size[0]}, its picture of {hw[1]}×{hw[0]} px"
    try:
        runs = run_lengths(counts)
    except DataError as error:
        return "damaged mask", str(error)
    if min(runs, default=-1) < 0 or sum(runs) != hw[0] * hw[1]:
        return "damaged mask", f"the runs of a mask do not add up to {hw[1]}×{hw[0]} px"
    return None if any(runs[1::2]) else (EMPTY, "a target has no pixel in the picture")


def _instruction(text: str, prompt: Prompt | None) -> Found | None:
    if prompt is None:
        return None if text.split() else ("instruction", "the instruction is empty")
    try:
        prompt.encode_instruction(text)
    except ValueError as error:
        return "instruction", str(error)
    return None


def _remembered(
    samples: Sequence[Sample], prompt: Prompt | None, path: Path | None
) -> list[Problem]:
    """The problems, from the last time if nothing has changed since."""
    if path is None:
        return find_problems(samples, prompt)
    digest, known = _digest(samples, prompt), _read(path)
    if digest in known:
        return known[digest]
    problems = find_problems(samples, prompt)
    latest = dict(list({**known, digest: problems}.items())[-_KEPT:])
    _write(path, json.dumps({"version": _VERSION, "found": latest}))
    return problems


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _read(path: Path) -> dict[str, list[Problem]]:
    """What the file knows; nothing where it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return {}
        return {key: [Problem(*p) for p in rows] for key, rows in content["found"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _digest(samples: Sequence[Sample], prompt: Prompt | None) -> str:
    """Stands for all that the findings depend on: samples, files by size and time, the prompt."""
    state = hashlib.sha256()
    if prompt is not None:
        vocabulary = sorted(prompt.tokenizer.get_vocab().items())
        state.update(json.dumps([prompt.config.max_instruction_tokens, vocabulary]).encode())
    for path in dict.fromkeys(s.image_path for s in samples):
        try:
            facts = archives.stat(path)
            state.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        except OSError:
            state.update(f"{path}\0missing\n".encode())
    for s in samples:
        row = [s.sample_id, str(s.image_path), s.image_hw, s.instruction, s.targets, s.ignore]
        state.update(json.dumps(row).encode())
    return state.hexdigest()
