"""Several predictions on one picture, to be looked at: image, truth, masks, heatmaps, thought."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from segcompass.io.outputs import mask_outline, overlay, slot_colour
from segcompass.types import Prediction, Status

PAPER, CARD, INK, SOFT = (240, 242, 245), (255, 255, 255), (32, 34, 40), (112, 117, 128)
GOOD, BAD = (24, 122, 78), (184, 58, 36)
GLOW = (255, 244, 214)  # a heatmap's colour at 1
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", *FONTS)
CJK = "\u2e80"  # from here on: Chinese, Japanese, Korean
TILE, SMALL_TILE, GAP, PAD = 224, 101, 14, 20  # px; two rows of small ones are as high as one
TEXT_WIDTH, TEXT, LINE, MAX_LINES = 420, 15, 20, 24
CAPTION, SMALL, TITLE, BIG = 20, 13, 34, 19
BADGES = {
    Status.NO_TARGET: "nothing matches",
    Status.MALFORMED: "malformed answer",
    Status.TRUNCATED: "answer cut off",
}


class Entry(NamedTuple):
    """One prediction, what was wanted where it is known, and what tells it from the others."""

    prediction: Prediction
    targets: Bool[np.ndarray, "N height width"] | None = None
    label: str = ""


class _Tile(NamedTuple):
    """A small picture with a line under it."""

    image: Image.Image
    caption: str
    colour: tuple[int, int, int] | None = None  # of the square before the caption
    framed: bool = False


def sheet(entries: Sequence[Entry], title: str) -> Image.Image:
    """One card for every entry, below one another.

    A card shows the picture, the wanted masks if they are known, the masks that count with their
    confidences, what else there is (the heatmap of every slot, those that count framed; candidates,
    the chosen one framed) and the chain of thought.
    """
    cards = [_card(entry) for entry in entries]
    width = max((card.width for card in cards), default=TILE) + 2 * PAD
    page = Image.new("RGB", (width, PAD + TITLE + sum(c.height + PAD for c in cards)), PAPER)
    draw, heading = ImageDraw.Draw(page), plain(title)
    font = font_for(heading, BIG)
    draw.text((PAD, PAD - 4), wrap(heading, font, width - 2 * PAD, 1)[0], SOFT, font)
    top = PAD + TITLE
    for card in cards:
        draw.rectangle((PAD, top, width - PAD - 1, top + card.height - 1), CARD)
        page.paste(card, (PAD, top))
        top += card.height + PAD
    return page


def plain(text: str) -> str:
    """One line of text in which nothing acts unseen: controls and reordering marks are dropped."""
    kept = [c for c in " ".join(text.split()) if unicodedata.category(c)[0] != "C"]
    return "".join(kept)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break text into at most ``lines`` lines of ``width`` px; the rest becomes an ellipsis."""
    measure = font.getlength
    rows: list[str] = []
    for word in text.split():
        joined = f"{rows[-1]} {word}" if rows else word
        if measure(joined) <= width:
            rows[-1:] = [joined]
        else:
            rows += _pieces(word, font, width)
        if len(rows) > lines:  # a long thought need not be measured to its end
            break
    if len(rows) > lines:
        last = rows[lines - 1]
        while last and measure(f"{last} …") > width:
            last = last[:-1]
        rows = [*rows[: lines - 1], f"{last} …"]
    return rows or [""]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word, cut where it is wider than a line (scripts without blanks, runs of letters)."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _card(entry: Entry) -> Image.Image:
    prediction, targets, _ = entry
    tiles = _tiles(prediction, targets)
    small = [*_heats(prediction), *_candidates(prediction)]
    columns = -(-len(small) // 2)
    small_left = PAD + len(tiles) * (TILE + GAP)
    text_left = small_left + columns * (SMALL_TILE + GAP) + GAP
    thought = plain(prediction.reasoning) or "(no text)"
    lines = wrap(thought, font_for(thought, TEXT), TEXT_WIDTH, MAX_LINES)
    step = small[0].image.height + CAPTION + 2 if small else 0
    height = max(tiles[0].image.height + CAPTION, 2 * step, CAPTION + len(lines) * LINE)
    card = Image.new("RGB", (text_left + TEXT_WIDTH + PAD, TITLE + height + 2 * PAD), CARD)
    _head(card, entry)
    top = PAD + TITLE
    for i, tile in enumerate(tiles):
        _place(card, tile, PAD + i * (TILE + GAP), top, TILE)
    for i, tile in enumerate(small):
        row, column = divmod(i, columns)
        left = small_left + column * (SMALL_TILE + GAP)
        _place(card, tile, left, top + row * step, SMALL_TILE)
    draw = ImageDraw.Draw(card)
    draw.text((text_left, top), "chain of thought", SOFT, font_for("", SMALL))
    for i, line in enumerate(lines):
        place = (text_left, top + CAPTION + i * LINE)
        draw.text(place, line, INK, font_for(thought, TEXT))
    return card


def _head(card: Image.Image, entry: Entry) -> None:
    """The instruction, and on the right how the answer ended and how good it is."""
    prediction, targets, label = entry
    badge, colour = BADGES.get(prediction.status, ""), BAD
    if targets is not None:
        answered = prediction.status.well_formed
        iou = _iou(prediction.masks, targets) if answered else 0.0
        badge = f"{badge} · IoU {iou:.2f}".removeprefix(" · ")
        colour = GOOD if iou >= 0.5 else BAD
    draw, small = ImageDraw.Draw(card), font_for("", TEXT)
    room = card.width - 3 * PAD - round(small.getlength(badge))
    instruction = plain(f"{label}: {prediction.instruction}" if label else prediction.instruction)
    font = font_for(instruction, BIG)
    draw.text((PAD, PAD - 4), wrap(instruction, font, room, 1)[0], INK, font)
    draw.text((card.width - PAD, PAD), badge, colour, small, anchor="ra")


def _place(card: Image.Image, tile: _Tile, left: int, top: int, side: int) -> None:
    draw, font = ImageDraw.Draw(card), font_for("", SMALL)
    width, height = tile.image.size
    card.paste(tile.image, (left, top))
    if tile.framed and tile.colour is not None:
        box = (left - 3, top - 3, left + width + 2, top + height + 2)
        draw.rectangle(box, None, tile.colour, 3)
    under, indent = top + height + 4, 0
    if tile.colour is not None:
        draw.rectangle((left, under + 3, left + 8, under + 11), tile.colour)
        indent = 14
    text = wrap(tile.caption, font, side - indent, 1)[0]
    draw.text((left + indent, under), text, INK if tile.framed else SOFT, font)


def _tiles(prediction: Prediction, targets: np.ndarray | None) -> list[_Tile]:
    scores = " ".join(f"{score:.2f}" for score in prediction.scores) or "none"
    tiles = [_Tile(_fit(prediction.image_rgb, TILE), "picture")]
    if targets is not None:
        wanted = _fit(spotlight(prediction.image_rgb, targets), TILE)
        tiles.append(_Tile(wanted, f"wanted: {len(targets) or 'nothing'}"))
    return [*tiles, _Tile(_fit(overlay(prediction), TILE), f"masks: {scores}")]


def _heats(prediction: Prediction) -> list[_Tile]:
    if prediction.slot_heatmaps is None:
        return []
    rows = zip(prediction.slot_heatmaps, prediction.slot_scores, prediction.accepted, strict=True)
    picture = _fit(prediction.image_rgb, SMALL_TILE)
    return [
        _Tile(_glow(picture, heat, k), f"{score:.2f}", slot_colour(k), bool(accepted))
        for k, (heat, score, accepted) in enumerate(rows)
    ]


def _candidates(prediction: Prediction) -> list[_Tile]:
    if prediction.candidates is None:
        return []
    masks, scores, sources, _, chosen = prediction.candidates
    return [
        _Tile(
            _fit(spotlight(prediction.image_rgb, mask[None]), SMALL_TILE),
            f"{score:.2f} {source}",
            slot_colour(0) if i == chosen else None,
            i == chosen,
        )
        for i, (mask, score, source) in enumerate(zip(masks, scores, sources, strict=True))
    ]


def _fit(pixels: UInt8[np.ndarray, "height width 3"], side: int) -> Image.Image:
    """The whole picture, its longer side ``side`` px."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def spotlight(
    pixels: UInt8[np.ndarray, "height width 3"], targets: Bool[np.ndarray, "N height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The targets in colour and outlined, all else pale."""
    grey = pixels.mean(axis=-1, keepdims=True)
    canvas = np.repeat(0.3 * grey + 165, 3, axis=-1)
    width = max(1, round(max(pixels.shape[:2]) / 150))
    for k, mask in enumerate(targets):
        canvas[mask] = pixels[mask]
        canvas[mask_outline(mask, width)] = slot_colour(k)
    return np.asarray(np.rint(canvas).clip(0, 255), dtype=np.uint8)


def _glow(picture: Image.Image, heat: Float[np.ndarray, "height width"], slot: int) -> Image.Image:
    """A heatmap in its slot's colour over a dim picture."""
    grown = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(grown), 0, 1)[..., None]
    dim = 0.45 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None] + 20
    colour = np.array(slot_colour(slot), dtype=np.float32)
    lit = colour + (np.array(GLOW) - colour) * np.clip(2 * values - 1, 0, 1) * 0.8
    alpha = 0.92 * values**0.8
    return Image.fromarray(np.rint(dim * (1 - alpha) + lit * alpha).clip(0, 255).astype(np.uint8))


def _iou(found: Bool[np.ndarray, "n h w"], wanted: Bool[np.ndarray, "N h w"]) -> float:
    """Of the unions; 1 where nothing is wanted and nothing found."""
    ours, theirs = np.asarray(found.any(axis=0)), np.asarray(wanted.any(axis=0))
    either = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / either if either else 1.0


@cache
def _font(size: int, names: tuple[str, ...]) -> ImageFont.FreeTypeFont:
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this machine
            continue
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels all have FreeType
    return font


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or for text that it has no letters for one of this machine's."""
    if text.isascii():
        return _font(size, ())
    return _font(size, WIDE_FONTS if max(text) >= CJK else FONTS)
