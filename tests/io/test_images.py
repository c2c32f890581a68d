"""Every trap of untrusted pictures, with files made on the spot."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcompass.io.images import ImageError, UnsafeFileError, list_images, load_image


def ramp(height: int = 6, width: int = 9) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds almost nothing: a decompression bomb's outside."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str, tmp_path: Path) -> None:
    image = ramp()
    path = tmp_path / "picture"  # no suffix: the content decides
    path.write_bytes(encoded(Image.fromarray(image), kind))
    for source in (path, str(path), path.read_bytes(), Image.fromarray(image), image):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, image)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    image = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    loaded = load_image(encoded(Image.fromarray(image), kind, quality=95))
    assert np.abs(loaded.astype(int) - image).max() < 8


def test_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image(data) == (255, 0, 0)).all()


def test_one_pixel() -> None:
    data = encoded(Image.new("RGB", (1, 1), (3, 4, 5)), "PNG")
    np.testing.assert_array_equal(load_image(data), [[[3, 4, 5]]])


def test_arrays_are_copied() -> None:
    image = ramp()
    load_image(image)[:] = 0
    assert image.any()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    for kind in ("PNG", "TIFF"):
        path = tmp_path / f"deep.{kind.lower()}"
        Image.fromarray(values).save(path, kind)
        assert load_image(path)[0, :, 0].tolist() == expected
    assert load_image(values)[0, :, 2].tolist() == expected


def test_thirty_two_bit_and_float_grey() -> None:
    assert load_image(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))[0, 1, 0] == 255
    with pytest.raises(ImageError, match="outside 16 bits"):
        load_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert load_image(unit)[0, :, 0].tolist() == [0, 128, 255]
    for bad in (np.nan, -1.0, 1000.0):
        with pytest.raises(ImageError, match="floating-point"):
            load_image(Image.fromarray(np.array([[0.0, bad]], dtype=np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = np.zeros((4, 8, 3), dtype=np.uint8)
    upright[:2, :4] = 255  # white top left corner
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    stored = Image.fromarray(upright)
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = undo[orientation]
        buffer = io.BytesIO(encoded(stored, "PNG", exif=exif))
        stored = Image.fromarray(load_image(buffer.getvalue()))  # rotated the other way
        assert (stored.size == (4, 8)) == (orientation > 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encoded(stored, "PNG", exif=exif)), upright)


def test_exif_rotation_by_hand() -> None:
    """Orientation 6: the camera was turned, rows run downwards along the right-hand side."""
    stored = np.zeros((2, 3, 3), dtype=np.uint8)
    stored[0, 0] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert loaded.shape == (3, 2, 3)
    assert tuple(loaded[0, 1]) == (255, 0, 0)


def test_transparency_is_composited_on_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    for source in (rgba, encoded(Image.fromarray(rgba), "PNG"), Image.fromarray(rgba)):
        loaded = load_image(source)
        assert loaded[0, 0].tolist() == [255, 255, 255]  # the hidden red stays hidden
        assert loaded[0, 1].tolist() == [227, 127, 127]
        assert loaded[0, 2].tolist() == [200, 0, 0]


def test_grey_with_alpha() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 50), Image.new("L", (2, 1), 0)])
    assert (load_image(encoded(image, "PNG")) == 255).all()


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert load_image(encoded(image, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    keyed = load_image(encoded(image, "PNG", transparency=0))
    assert keyed.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparent_key_in_rgb_and_in_sixteen_bit_grey() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    keyed = load_image(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert keyed.tolist() == [[[255, 255, 255], [4, 5, 6]]]
    deep = Image.fromarray(np.array([[300, 514]], dtype=np.uint16))
    assert load_image(encoded(deep, "PNG", transparency=300))[0, :, 0].tolist() == [255, 2]


def test_cmyk_one_bit_and_grey() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    loaded = load_image(encoded(cyan, "JPEG", quality=95)).astype(int)
    assert np.abs(loaded - (0, 255, 255)).max() < 12
    assert load_image(encoded(Image.new("1", (3, 2), 1), "PNG")).tolist() == [[[255] * 3] * 3] * 2
    assert (load_image(encoded(Image.new("L", (3, 2), 77), "PNG")) == 77).all()
    assert (load_image(np.ones((2, 2), dtype=bool)) == 255).all()


def test_bombs_are_refused_before_decoding_whatever_the_warning_filter(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    for side in (12_000, 40_000):  # below and above Pillow's own limit
        path.write_bytes(png_header(side, side))
        for action in ("error", "ignore"):  # below its limit Pillow only warns
            with warnings.catch_warnings():
                warnings.simplefilter(action)  # type: ignore[arg-type]
                with pytest.raises(UnsafeFileError, match=r"bomb\.png.*pixels"):
                    load_image(path)


def test_the_pixel_cap_is_inclusive_and_holds_for_every_source() -> None:
    image = ramp(10, 10)
    for source in (image, Image.fromarray(image), encoded(Image.fromarray(image), "PNG")):
        assert load_image(source, max_pixels=100).shape == (10, 10, 3)
        with pytest.raises(UnsafeFileError, match="99 allowed"):
            load_image(source, max_pixels=99)


def test_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(ramp())
    for kind in ("EPS", "PPM", "PDF", "TGA", "ICO"):
        path = tmp_path / "innocent.png"
        path.write_bytes(encoded(image, kind))
        # TGA has no signature and may pass for another format
        expected = (ImageError, UnsafeFileError) if kind == "TGA" else UnsafeFileError
        with pytest.raises(expected, match="innocent"):
            load_image(path)
    opened = Image.open(io.BytesIO(encoded(image, "EPS")))
    with pytest.raises(UnsafeFileError, match="EPS"):
        load_image(opened)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_truncated_files_are_named_errors(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(ramp(64, 64)), kind)
    warnings.simplefilter("ignore")  # Pillow's remarks on the damage; pytest restores filters
    for keep in (len(data) * 2 // 3, 20):
        path = tmp_path / "cut.bin"
        path.write_bytes(data[:keep])
        with pytest.raises(ImageError, match=r"cut\.bin"):
            load_image(path)


def test_any_damage_is_an_image_error_or_a_picture() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"):
        data = encoded(Image.fromarray(ramp(24, 24)), kind)
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 200), 4):
                broken[at] = rng.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    loaded = load_image(bytes(broken), max_pixels=100_000)
                except (ImageError, UnsafeFileError):
                    continue
            assert loaded.ndim == 3
            assert loaded.dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x00" * 64])
def test_files_that_are_no_pictures(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"notes\.jpg"):
        load_image(path)


def test_missing_files_folders_and_devices(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="download"):
        load_image("https://example.org/cat.png")
    for name in ("x" * 5000, "nul\0.png"):
        with pytest.raises(ImageError):
            load_image(name)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(UnsafeFileError, match="pipe"):
        load_image(pipe)


def test_wrong_arrays_and_types() -> None:
    for wrong in (
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ImageError):
            load_image(wrong)
    with pytest.raises(ImageError, match="float"):
        load_image(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(ImageError, match="int"):
        load_image(3)  # type: ignore[arg-type]


def test_the_callers_pillow_image_stays_usable() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(ramp()), "PNG")))
    load_image(image)
    assert image.getpixel((0, 0)) == tuple(ramp()[0, 0])


def test_list_images_from_folders_patterns_and_files(tmp_path: Path) -> None:
    names = ["b.JPG", "a.png", "c.txt", ".hidden.png", "sub/d.webp", "odd[1].png", "plain"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    def found(*sources: str) -> list[str]:
        listed = list_images([str(tmp_path / source) for source in sources])
        return [path.relative_to(tmp_path).as_posix() for path in listed]

    assert found(".") == ["a.png", "b.JPG", "odd[1].png"]
    assert found("*.png") == ["a.png", "odd[1].png"]
    assert found("**/*") == ["a.png", "b.JPG", "odd[1].png", "sub/d.webp"]
    assert found("odd[1].png", "plain") == ["odd[1].png", "plain"]
    assert found("sub", "b.JPG", ".") == ["sub/d.webp", "b.JPG", "a.png", "odd[1].png"]


def test_list_images_names_what_cannot_be_a_file() -> None:
    with pytest.raises(ImageError, match="nnn: cannot be read"):
        list_images(["n" * 300])


def test_list_images_says_which_source_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match=r"none\*"):
        list_images([str(tmp_path), str(tmp_path / "none*")])
    with pytest.raises(ImageError, match="missing"):
        list_images([tmp_path / "missing.png"])
