"""Frames, padding and coordinates: round trips and independent area averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcompass.geometry import (
    Canvas,
    Fit,
    Frame,
    boxes_to_frame,
    boxes_to_image,
    masks_to_grid,
    masks_to_image,
    pad_to_square,
    padding_mask,
    points_to_frame,
    points_to_image,
    shrink,
    to_frame,
    token_boxes,
)

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400))
SIDES = st.sampled_from([16, 160, 1024])


def test_frame_matches_sam_longest_side_rounding() -> None:
    frame = Frame.fit((480, 640), 1024)
    assert frame.scaled_hw == (768, 1024)
    assert Frame.fit((427, 640), 1024).scaled_hw == (683, 1024)  # 683.2
    assert Frame.fit((640, 427), 160).scaled_hw == (160, 107)  # 106.75


def test_a_hair_thin_image_keeps_one_pixel() -> None:
    assert Frame.fit((1, 5000), 160).scaled_hw == (1, 160)


@pytest.mark.parametrize(("hw", "side"), [((0, 5), 10), ((5, -1), 10), ((5, 5), 0)])
def test_frame_refuses_empty_sizes(hw: tuple[int, int], side: int) -> None:
    with pytest.raises(ValueError, match="at least 1 px"):
        Frame.fit(hw, side)


@settings(deadline=None, max_examples=50)
@given(hw=SIZES, side=SIDES, seed=st.integers(0, 999))
def test_unpad_after_pad_is_identity_for_points_and_boxes(
    hw: tuple[int, int], side: int, seed: int
) -> None:
    frame = Frame.fit(hw, side)
    points = np.random.default_rng(seed).uniform(0, 1, (7, 2)) * (hw[1], hw[0])
    inside = points_to_frame(points, frame)
    assert (inside >= 0).all()
    assert (inside <= (frame.scaled_hw[1], frame.scaled_hw[0])).all()
    np.testing.assert_allclose(points_to_image(inside, frame), points, rtol=1e-9)
    boxes = np.concatenate([points[:3], points[3:6]], axis=-1)
    np.testing.assert_allclose(boxes_to_image(boxes_to_frame(boxes, frame), frame), boxes)
    np.testing.assert_allclose(boxes_to_frame(boxes, frame)[:, 2:], inside[3:6])


def test_points_are_x_then_y_and_integers_are_not_truncated() -> None:
    frame = Frame.fit((300, 100), 150)  # scale 1/2
    np.testing.assert_array_equal(points_to_frame(np.array([[99, 31]]), frame), [[49.5, 15.5]])
    with pytest.raises(ValueError, match="2 coordinates"):
        points_to_frame(np.zeros((3, 4)), frame)


@settings(deadline=None, max_examples=30)
@given(hw=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 999))
def test_to_frame_pads_right_and_below_with_zeros(hw: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(1, 256, (*hw, 3), dtype=np.uint8)
    frame = Frame.fit(hw, 48)
    framed = to_frame(image, frame)
    height, width = frame.scaled_hw
    assert framed.shape == (48, 48, 3)
    assert (framed[:height, :width] > 0).all()
    assert not framed[height:].any()
    assert not framed[:, width:].any()


def test_to_frame_without_scaling_keeps_every_pixel() -> None:
    image = np.arange(20 * 32 * 3, dtype=np.uint32).reshape(20, 32, 3).astype(np.uint8)
    np.testing.assert_array_equal(to_frame(image, Frame.fit((20, 32), 32))[:20], image)


def test_to_frame_refuses_wrong_images() -> None:
    frame = Frame.fit((8, 8), 16)
    with pytest.raises(ValueError, match="expected uint8"):
        to_frame(np.zeros((8, 8, 3), dtype=np.float32), frame)
    with pytest.raises(ValueError, match="fitted to"):
        to_frame(np.zeros((8, 9, 3), dtype=np.uint8), frame)


@pytest.mark.parametrize("hw", [(60, 160), (160, 60), (97, 131), (333, 50)])
def test_masks_survive_the_way_to_the_grid_and_back(hw: tuple[int, int]) -> None:
    frame = Frame.fit(hw, 160)
    mask = torch.zeros(1, *hw, dtype=torch.bool)
    mask[:, hw[0] // 4 : 3 * hw[0] // 4, hw[1] // 3 :] = True
    coverage = masks_to_grid(mask, frame, 80)
    back = masks_to_image(coverage - 0.5, frame) > 0
    assert back.shape == mask.shape
    overlap = (back & mask).sum() / (back | mask).sum()
    assert overlap > 0.93


@settings(deadline=None, max_examples=30)
@given(
    hw=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    grid=st.sampled_from([1, 4, 10]),
    seed=st.integers(0, 999),
)
def test_grid_coverage_keeps_the_area(hw: tuple[int, int], grid: int, seed: int) -> None:
    frame = Frame.fit(hw, 40)
    mask = torch.from_numpy(np.random.default_rng(seed).random((2, *hw)) < 0.4)
    coverage = masks_to_grid(mask, frame, grid)
    assert coverage.shape == (2, grid, grid)
    pixel_area = frame.scale_xy[0] * frame.scale_xy[1]
    expected = mask.sum((1, 2)) * pixel_area / 40**2
    torch.testing.assert_close(coverage.mean((1, 2)), expected.float(), rtol=1e-4, atol=1e-6)


def test_grid_coverage_is_the_area_average() -> None:
    frame = Frame.fit((32, 64), 64)  # no scaling: the frame's pixels are the image's
    mask = torch.from_numpy(np.random.default_rng(0).random((3, 32, 64)) < 0.5)
    framed = torch.zeros(3, 64, 64)
    framed[:, :32] = mask.float()
    expected = torch.nn.functional.avg_pool2d(framed[:, None], 8)[:, 0]
    torch.testing.assert_close(masks_to_grid(mask, frame, 8), expected)


def test_no_masks_give_no_maps() -> None:
    frame = Frame.fit((30, 50), 64)
    assert masks_to_grid(torch.zeros(0, 30, 50, dtype=torch.bool), frame, 8).shape == (0, 8, 8)
    assert masks_to_image(torch.zeros(0, 8, 8), frame).shape == (0, 30, 50)
    with pytest.raises(ValueError, match="the image is"):
        masks_to_grid(torch.zeros(1, 50, 30, dtype=torch.bool), frame, 8)


def test_masks_to_image_matches_transformers_postprocessing() -> None:
    processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    low = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    frame = Frame.fit((97, 131), 160)
    processor = processing.SamImageProcessorPil(
        pad_size={"height": 160, "width": 160}, size={"longest_edge": 160}
    )
    expected = processor.post_process_masks(
        low[None], [frame.image_hw], [frame.scaled_hw], binarize=False
    )[0]
    torch.testing.assert_close(masks_to_image(low, frame), expected)


def test_masks_to_image_keeps_leading_dimensions_and_refuses_cropped_maps() -> None:
    frame = Frame.fit((30, 50), 64)
    assert masks_to_image(torch.zeros(2, 3, 8, 8), frame).shape == (2, 3, 30, 50)
    assert masks_to_image(torch.zeros(8, 8), frame).shape == (30, 50)
    with pytest.raises(ValueError, match="square"):
        masks_to_image(torch.zeros(2, 5, 8), frame)


def test_padding_mask_marks_what_lies_outside_the_image() -> None:
    frames = [Frame.fit((32, 64), 64), Frame.fit((64, 32), 64), Frame.fit((64, 64), 64)]
    padding = padding_mask(frames, 8)
    assert padding.shape == (3, 8, 8)
    assert padding[0, 4:].all()
    assert not padding[0, :4].any()
    assert torch.equal(padding[1], padding[0].T)
    assert not padding[2].any()


@settings(deadline=None, max_examples=40)
@given(hw=SIZES, grid=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_token_boxes_tile_the_image(hw: tuple[int, int], grid: tuple[int, int]) -> None:
    for boxes in (token_boxes(grid, hw), token_boxes(grid, hw, fit="square")):
        assert boxes.shape == (grid[0] * grid[1], 4)
        assert boxes.dtype == np.float32
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (hw[1], hw[0])).all()
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
        np.testing.assert_allclose(area, hw[0] * hw[1], rtol=1e-4)


def test_token_boxes_by_hand() -> None:
    np.testing.assert_array_equal(
        token_boxes((2, 2), (40, 60)),
        [[0, 0, 30, 20], [30, 0, 60, 20], [0, 20, 30, 40], [30, 20, 60, 40]],
    )
    np.testing.assert_array_equal(  # 60×60 square, the image in rows 20…40
        token_boxes((3, 1), (20, 60), fit="square"),
        [[0, 0, 60, 0], [0, 0, 60, 20], [0, 20, 60, 20]],
    )
    with pytest.raises(ValueError, match="fit must be"):
        token_boxes((2, 2), (4, 4), fit="crop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        token_boxes((0, 2), (4, 4))


def test_token_boxes_find_the_pixels_of_a_padded_square() -> None:
    image = np.full((20, 60, 3), 200, dtype=np.uint8)
    image[:, 40:] = 10
    square = pad_to_square(image, (1, 2, 3))
    assert square.shape == (60, 60, 3)
    assert tuple(square[0, 0]) == (1, 2, 3)
    np.testing.assert_array_equal(square[20:40], image)
    x0, y0, x1, y1 = token_boxes((3, 3), (20, 60), fit="square")[5].astype(int)
    assert (image[y0:y1, x0:x1] == 10).all()
    assert (square[20:40, 40:60] == image[y0:y1, x0:x1]).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((3, 5), (3, 5)), ((8, 4), (8, 4)), ((20, 40), (4, 8)), ((1, 99), (1, 8))],
)
def test_shrinking_keeps_proportions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = np.full((*size, 3), 7, np.uint8)
    small = shrink(image, 8)
    assert small.shape == (*expected, 3)
    assert (small == 7).all()
    assert (small is image) == (size == expected)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 900), (1, 1)])
@pytest.mark.parametrize("grid", [8, 20, 64])
def test_even_the_thinnest_image_is_not_all_padding(size: tuple[int, int], grid: int) -> None:
    mask = padding_mask([Frame.fit(size, 160)], grid)
    assert not mask[0, 0, 0]
    assert (~mask).sum() >= grid


@settings(deadline=None, max_examples=200)
@given(
    hw=st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    side=st.sampled_from([100, 840, 1000]),
    fit=st.sampled_from(["stretch", "square"]),
    seed=st.integers(0, 999),
)
def test_coordinates_go_to_the_canvas_and_back(
    hw: tuple[int, int], side: int, fit: Fit, seed: int
) -> None:
    canvas, wh = Canvas(side, fit), np.array(hw[::-1])
    points = np.random.default_rng(seed).uniform(0, 1, (7, 2)) * wh
    written = canvas.points_to_canvas(points, hw)
    assert (written >= 0).all()
    assert (written <= side + 1e-9).all()
    np.testing.assert_allclose(canvas.points_to_image(written, hw), points, atol=1e-3, rtol=0)
    boxes = np.concatenate([points[:3], points[3:6]], axis=-1)
    back = canvas.boxes_to_image(canvas.boxes_to_canvas(boxes, hw), hw)
    np.testing.assert_allclose(back, boxes, atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=200)
@given(
    hw=st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    fit=st.sampled_from(["stretch", "square"]),
    seed=st.integers(0, 999),
)
def test_whole_numbers_on_the_canvas_cost_half_a_cell(
    hw: tuple[int, int], fit: Fit, seed: int
) -> None:
    canvas, wh = Canvas(840, fit), np.array(hw[::-1])
    cell = (np.full(2, max(hw)) if fit == "square" else wh) / 840
    points = np.random.default_rng(seed).uniform(0, 1, (6, 2)) * wh
    written = canvas.points_to_canvas(points, hw).round().astype(int)
    apart = np.abs(canvas.points_to_image(written, hw) - points)
    assert (apart <= np.maximum(1, cell / 2) + 1e-3).all()
    boxes = np.concatenate([points[:3], points[3:]], axis=-1)
    back = canvas.boxes_to_image(canvas.boxes_to_canvas(boxes, hw).round().astype(int), hw)
    assert (np.abs(back - boxes) <= np.tile(np.maximum(1, cell / 2), 2) + 1e-3).all()


def test_canvas_by_hand() -> None:
    hw = (20, 60)
    np.testing.assert_allclose(Canvas(30).points_to_canvas(np.array([[6, 10]]), hw), [[3, 15]])
    square = Canvas(30, "square")  # the 60×60 square has the image in its rows 20…40
    np.testing.assert_allclose(square.points_to_canvas(np.array([[6, 10]]), hw), [[3, 15]])
    np.testing.assert_allclose(square.points_to_canvas(np.array([[6, 0]]), hw), [[3, 10]])
    np.testing.assert_allclose(
        square.boxes_to_image(np.array([[-5, 0, 15, 15], [10, 12, 40, 30]]), hw),
        [[0, 0, 30, 10], [20, 4, 60, 20]],
    )
    assert square.points_to_image(np.zeros((0, 2)), hw).shape == (0, 2)
    with pytest.raises(ValueError, match="4 coordinates"):
        square.boxes_to_image(np.zeros((1, 2)), hw)
    with pytest.raises(ValueError, match="at least 1 px"):
        Canvas(0).points_to_canvas(np.zeros((1, 2)), hw)


def test_a_stretched_frame_has_no_padding() -> None:
    frame = Frame.stretch((30, 60), 120)
    assert frame.scaled_hw == (120, 120)
    assert not padding_mask([frame], 8).any()
    np.testing.assert_array_equal(points_to_frame(np.array([[15, 15]]), frame), [[30, 60]])
    assert to_frame(np.full((30, 60, 3), 9, np.uint8), frame).min() == 9
    with pytest.raises(ValueError, match="at least 1 px"):
        Frame.stretch((0, 4), 8)


@settings(deadline=None, max_examples=15)
@given(
    hw=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 99),
)
def test_maps_of_a_stretched_frame_are_resized_once(hw: tuple[int, int], seed: int) -> None:
    low = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(seed))
    expected = torch.nn.functional.interpolate(low[None], hw, mode="bilinear")[0]
    torch.testing.assert_close(masks_to_image(low, Frame.stretch(hw, 48)), expected)
