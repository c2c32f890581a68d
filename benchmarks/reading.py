"""Reading a data set of RefCOCO's size: pickle, COCO tables and masks, down to samples.

The set is made up: annotations alone, beside empty files that stand for the pictures, which no
reader opens. As in RefCOCO, four in five annotations are never asked about. Each side reads it in a
process of its own, so that its peak of memory is its own:

    ours      read_dataset: restricted unpickler, checks, masks of what is asked, each made once
    baseline  pickle.load and json.load, and pycocotools for the mask of every sentence

Both give the same instructions and run lengths, or nothing is reported. Processor seconds do not
count what other programs do meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

HEIGHT, WIDTH = 480, 640
CORNERS = 30  # of a polygon
WORDS = ("left", "right", "front", "red", "blue", "small", "large", "person", "cup", "dog", "near")
Told = tuple[str, dict[str, Any]]  # instruction and run lengths


def write_annotations(
    root: Path, images: int, sentences: int, per_image: int = 4, seed: int = 0
) -> None:
    """Write ``refs(unc).p``, ``instances.json`` and empty pictures; one reference each picture."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    described, annotations, references = [], [], []
    for image_id in range(images):
        name = f"{image_id:012d}.jpg"
        (root / "images" / name).touch()
        described.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for number, polygon in enumerate(_polygons(rng, per_image)):
            annotations.append(
                {
                    "id": image_id * per_image + number,
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": [polygon],
                    "iscrowd": 0,
                }
            )
        first, last = (sentences * n // images for n in (image_id, image_id + 1))
        references.append(
            {
                "ref_id": image_id,
                "ann_id": image_id * per_image,
                "image_id": image_id,
                "category_id": 1,
                "file_name": name,
                "split": "train",
                "sent_ids": list(range(first, last)),
                "sentences": [_sentence(rng, sent_id) for sent_id in range(first, last)],
            }
        )
    tables = {"images": described, "annotations": annotations}
    tables["categories"] = [{"id": 1, "name": "thing"}]
    (root / "instances.json").write_text(json.dumps(tables))
    (root / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))


def _polygons(rng: np.random.Generator, count: int) -> list[list[float]]:
    """Star-shaped outlines that stay on the picture."""
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = rng.uniform(10, 60, (count, 1)) * rng.uniform(0.6, 1, (count, CORNERS))
    x = rng.uniform(60, WIDTH - 60, (count, 1)) + radius * np.cos(angles)
    y = rng.uniform(60, HEIGHT - 60, (count, 1)) + radius * np.sin(angles)
    flat: list[list[float]] = np.stack([x, y], -1).reshape(count, -1).round(2).tolist()
    return flat


def _sentence(rng: np.random.Generator, sent_id: int) -> dict[str, Any]:
    words = [WORDS[i] for i in rng.integers(len(WORDS), size=4)]
    text = f"{' '.join(words)} {sent_id}"
    return {"raw": text, "sent": text, "sent_id": sent_id, "tokens": text.split()}


def ours(root: Path) -> Iterator[Told]:
    """The readers of the package."""
    from segcompass.data.samples import read_dataset

    samples = read_dataset(root, "train")
    for sample in samples:
        (rle,) = sample.targets
        yield sample.instruction, dict(rle)


def baseline(root: Path) -> Iterator[Told]:
    """What a script would do; only safe for a file of our own making."""
    references = pickle.loads((root / "refs(unc).p").read_bytes())
    tables = json.loads((root / "instances.json").read_text())
    images = {image["id"]: image for image in tables["images"]}
    annotations = {item["id"]: item for item in tables["annotations"]}
    samples = []
    for reference in references:
        image = images[reference["image_id"]]
        polygons = annotations[reference["ann_id"]]["segmentation"]
        for sentence in reference["sentences"]:
            rle = coco.merge(coco.frPyObjects(polygons, image["height"], image["width"]))
            samples.append((sentence["sent"], rle))
    for text, rle in samples:
        yield text, {"size": list(rle["size"]), "counts": rle["counts"].decode()}


SIDES: dict[str, Callable[[Path], Iterator[Told]]] = {"ours": ours, "baseline": baseline}


def read(side: str, root: Path) -> dict[str, Any]:
    """Read once in this process; figures, and a digest of what was read."""
    import segcompass.data.samples  # noqa: F401 - importing is not what is measured

    start, busy = time.perf_counter(), time.process_time()
    told = SIDES[side](root)
    state, count = hashlib.sha256(), 0
    first = next(told)  # both sides have read everything by now
    facts = {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy}
    peak = _peak_bytes()
    for text, rle in [first, *told]:
        state.update(f"{text} {rle['size']} {rle['counts']}\n".encode())
        count += 1
    return {**facts, "memory": peak, "samples": count, "digest": state.hexdigest()}


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # the other figure also counts the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _in_process(side: str, root: Path) -> dict[str, Any]:
    code = "import json, sys; from pathlib import Path; from reading import read; "
    code += "print(json.dumps(read(sys.argv[1], Path(sys.argv[2]))))"
    line = [sys.executable, "-c", code, side, str(root)]
    done = subprocess.run(
        line, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides and return the figures in the format of all benchmarks."""
    from measuring import machine, row

    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "refcoco"
        write_annotations(root, options.images, options.sentences)
        found = {side: _in_process(side, root) for side in SIDES}
    if found["ours"]["digest"] != found["baseline"]["digest"]:
        sys.exit("the sides read different things; nothing is reported")
    measures = (("seconds", "s"), ("processor", "s"), ("memory", "bytes"))
    rows = [row(m, unit, *(found[side][m] for side in SIDES)) for m, unit in measures]
    return {
        "name": "reading",
        "machine": machine(),
        "settings": {"images": options.images, "sentences": options.sentences},
        "rows": rows,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; the default sizes are those of a whole RefCOCO."""
    from measuring import new_parser  # brings torch, which would count as memory of the sides

    parser = new_parser(__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--sentences", type=int, default=120_000)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from measuring import report

    report(measure, parse())
