from __future__ import annotations

import random

import numpy as np
import pytest

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES, Scene, Thing
from segcompass.data.scenes.render import render
from segcompass.data.scenes.world import BACKGROUNDS, sample_scene


def scenes(count: int, split: str = "train") -> list[Scene]:
    return [sample_scene(random.Random(f"1/{split}/{i}"), split=split) for i in range(count)]


def alone(category: str, *, size: str = "large", angle: float = 0.0) -> Scene:
    return Scene(7, "wall", (Thing(category, "red", size, "plain", 0.5, 0.5, angle, 0),))


@pytest.mark.parametrize("size", [64, 129, 256])
def test_shapes_and_types(size: int) -> None:
    scene = scenes(1)[0]
    rendered = render(scene, size)
    assert rendered.image.shape == (size, size, 3)
    assert rendered.image.dtype == np.uint8
    assert rendered.visible.shape == (len(scene.things), size, size)
    assert rendered.visible.dtype == np.bool_


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_one_scene_always_gives_the_same_bytes(background: str) -> None:
    scene = Scene(11, background, scenes(1)[0].things)
    first, again = render(scene, 128), render(scene, 128)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.visible.tobytes() == again.visible.tobytes()
    assert first.image.tobytes() != render(Scene(12, background, scene.things), 128).image.tobytes()


def test_masks_are_exclusive_and_every_thing_stays_mostly_visible() -> None:
    hidden = 0
    for scene in scenes(40):
        visible = render(scene).visible
        assert visible.sum(axis=0).max() == 1
        shares = [
            mask.sum() / render(Scene(scene.seed, scene.background, (thing,))).visible.sum()
            for thing, mask in zip(scene.things, visible, strict=True)
        ]
        assert min(shares) >= 0.55
        hidden += min(shares) < 0.97
    assert 0.15 < hidden / 40 < 0.6  # occlusion happens, but not everywhere


def test_the_higher_thing_covers_the_lower_one() -> None:
    low = Thing("ball", "red", "large", "plain", 0.45, 0.5, 0, 1)
    high = Thing("ball", "blue", "large", "plain", 0.55, 0.5, 0, 2)
    above, below = render(Scene(3, "wall", (low, high))).visible[::-1]
    assert np.array_equal(above, render(Scene(3, "wall", (high,))).visible[0])
    alone_below = render(Scene(3, "wall", (low,))).visible[0]
    expected = alone_below & ~above
    assert not (below & ~expected).any()
    assert (expected & ~below).sum() < 12  # pixels that background, low and high thing share


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("size", SIZES)
def test_the_longest_side_is_what_the_size_says(category: str, size: str) -> None:
    mask = render(alone(category, size=size)).visible[0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    longest = max(np.ptp(rows), np.ptp(columns)) + 1
    assert abs(longest - SIZES[size] * 256) <= 1.5
    assert abs((rows[0] + rows[-1] + 1) / 2 - 128) <= 1
    assert abs((columns[0] + columns[-1] + 1) / 2 - 128) <= 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_colour_of_a_thing_is_unambiguous(category: str) -> None:
    table = np.array(list(COLOURS.values()), dtype=float)
    places = [(0.17 + 0.33 * (i % 3), 0.17 + 0.33 * (i // 3)) for i in range(len(COLOURS))]
    for texture in TEXTURES:
        things = tuple(
            Thing(category, colour, "large", texture, *place, 0, i)
            for i, (colour, place) in enumerate(zip(COLOURS, places, strict=True))
        )
        rendered = render(Scene(5, "wall", things), 192)
        for i, mask in enumerate(rendered.visible):
            pixels = rendered.image[mask].astype(float)
            nearest = np.linalg.norm(pixels[:, None] - table, axis=2).argmin(axis=1)
            assert np.bincount(nearest, minlength=len(table)).argmax() == i


def test_a_mask_covers_what_changed_in_the_picture() -> None:
    scene = alone("mug", angle=20)
    with_mug, without = render(scene), render(Scene(scene.seed, scene.background, ()))
    changed = np.abs(with_mug.image.astype(int) - without.image).max(axis=2) > 60
    mask = with_mug.visible[0]
    assert (changed & mask).sum() / mask.sum() > 0.97
    assert (changed & ~mask).sum() / mask.sum() < 0.03


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        render(alone("mug"), 8)
    with pytest.raises(ValueError, match="meadow"):
        render(Scene(1, "moon", ()))


def test_a_thing_across_the_border_is_cut_off() -> None:
    thing = Thing("ball", "blue", "large", "plain", 0.0, 0.5, 0, 0)
    mask = render(Scene(1, "wall", (thing,))).visible[0]
    assert mask[:, 0].any()
    assert not mask[:, 128:].any()
