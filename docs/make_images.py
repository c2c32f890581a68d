"""Make the picture of docs/scenes.md: eighteen scenes, one question under each.

    python docs/make_images.py

The scenes come from a seed that no data set uses. Each is the first of its own series that fits the
wanted kind, number of targets and background; the same code draws the same picture every time.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from segcompass.data.scenes.questions import KINDS, Question, ask
from segcompass.data.scenes.render import render
from segcompass.data.scenes.world import BACKGROUNDS, sample_scene

SEED = "gallery"
TARGETS = (1, 2, 1, 1, 0, 1, 1, 1, 2, 1, 1, 3, 0, 1, 2, 1, 1, 0)  # of each picture, row by row
COLUMNS = 6
PICTURE, GAP, CAPTION = 256, 20, 62  # px; the caption holds the kind and two lines of question
PAPER, INK, SOFT = (255, 255, 255), (32, 34, 40), (118, 122, 132)
KIND_SIZE, TEXT_SIZE, LINE = 12, 15, 18  # px


def main() -> None:
    """Write docs/images/scenes.png."""
    rows = len(TARGETS) // COLUMNS
    step_x, step_y = PICTURE + GAP, PICTURE + CAPTION + GAP
    sheet = Image.new("RGB", (GAP + COLUMNS * step_x, GAP + rows * step_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, targets in enumerate(TARGETS):
        x = GAP + number % COLUMNS * step_x
        y = GAP + number // COLUMNS * step_y
        picture, question = find(number, targets)
        sheet.paste(picture, (x, y))
        write(draw, x, y + PICTURE + 7, question)
    path = Path(__file__).parent / "images" / "scenes.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, optimize=True)


def find(number: int, targets: int) -> tuple[Image.Image, Question]:
    """The first scene of a picture's series that fits, drawn, and its question."""
    kind, background = KINDS[number % len(KINDS)], BACKGROUNDS[number % len(BACKGROUNDS)]
    for attempt in range(2000):
        rng = random.Random(f"{SEED}/{number}/{attempt}")
        scene = sample_scene(rng, split="val")
        if len(scene.things) < 5 or scene.background != background:
            continue
        question = ask(scene, rng, split="val", kind=kind)
        if len(question.targets) == targets:
            return Image.fromarray(render(scene, PICTURE).image), question
    raise RuntimeError(f"no scene fits {kind} with {targets} targets on {background}")


def write(draw: ImageDraw.ImageDraw, x: int, y: int, question: Question) -> None:
    """Kind, number of targets, and the question in at most two lines."""
    count = len(question.targets)
    many = "no target" if count == 0 else f"{count} target{'s' if count > 1 else ''}"
    draw.text((x, y), f"{question.kind} · {many}", SOFT, ImageFont.load_default(KIND_SIZE))
    font = ImageFont.load_default(TEXT_SIZE)
    lines = [""]
    for word in question.text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= PICTURE:
            lines[-1] = longer
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        draw.text((x, y + 17 + number * LINE), line, INK, font)


if __name__ == "__main__":
    main()
