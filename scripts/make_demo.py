"""Make the demo's pictures: one question of every kind, one with several targets, one with none.

    python scripts/make_demo.py

The scenes come from the validation split of a seed that no data set uses. They are the first ones
that fit the wanted kind and number of targets: not chosen by how well a model does on them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from segcompass.data.scenes.questions import ask
from segcompass.data.scenes.render import render
from segcompass.data.scenes.world import sample_scene
from segcompass.io.assets import ASSETS

SEED = "demo"
WANTED = [
    ("discriminative", 1),
    ("spatial", 1),
    ("geometric", 2),
    ("multi-step", 1),
    ("commonsense", 2),
    ("commonsense", 1),
    ("multi-step", 3),
    ("discriminative", 0),
]
SIZE = 384  # px; larger than in training, as a user's pictures are


def main() -> None:
    """Write assets/demo/*.jpg and demo.json."""
    folder = ASSETS / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (kind, targets) in enumerate(WANTED, start=1):
        name = f"{number:02d}-{kind}.jpg"
        rows.append({"image": name, "instruction": draw(folder / name, number, kind, targets)})
    (folder / "demo.json").write_text(json.dumps(rows, indent=2) + "\n")


def draw(path: Path, number: int, kind: str, targets: int) -> str:
    """Draw the first fitting scene of a picture's own series; returns its question."""
    for attempt in range(1000):
        rng = random.Random(f"{SEED}/{number}/{attempt}")
        scene = sample_scene(rng, split="val")
        if len(scene.things) < 5:
            continue
        question = ask(scene, rng, split="val", kind=kind)
        if len(question.targets) == targets:
            Image.fromarray(render(scene, SIZE).image).save(path, quality=90)
            return question.text
    raise RuntimeError(f"no scene fits {kind} with {targets} targets")


if __name__ == "__main__":
    main()
