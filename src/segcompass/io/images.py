"""The one way in for pictures: checked before decoding, decoded fully, upright, 8-bit RGB."""

from __future__ import annotations

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from segcompass.io import archives
from segcompass.io.errors import ImageError, SegCompassError, UnsafeFileError

UInt8Array = npt.NDArray[np.uint8]
ImageSource = str | Path | bytes | Image.Image | np.ndarray

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 64_000_000
_DECODED_AS = frozenset({*FORMATS, "MPO", "DIB"})  # MPO: a JPEG with further pictures behind it
_MAGIC = {b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "XML", b"%!PS": "PostScript"}
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the picture by a quarter
_MARKS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))  # of whole JPEGs and PNGs
_TAIL = 64  # bytes in which the end mark is looked for; some writers pad
_WHITE = 255


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Read a picture from anywhere into upright 8-bit RGB.

    Formats are limited to JPEG, PNG, WebP, BMP, TIFF and GIF (first frame); the number of pixels
    is checked before anything is decoded; the picture is decoded to its end; EXIF rotation is
    applied; 16-bit values are scaled; transparency is composited on white.

    Args:
        source: path (it may lead into a zip archive), encoded bytes, a Pillow image, or an array:
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of uint8, uint16 (full range) or bool.
        max_pixels: refuse pictures with more pixels than this. Pillow's own limit (about 179
            million) holds besides.

    Returns:
        uint8 (height, width, 3), freshly allocated, as displayed.

    Raises:
        UnsafeFileError: If the file must not be read.
        ImageError: If there is no such file, or it is no complete picture.
    """
    if isinstance(source, np.ndarray):
        _check_size(source.shape[1::-1], "array", max_pixels)
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source, "Pillow image", max_pixels)
    if isinstance(source, bytes):
        return _from_encoded(io.BytesIO(source), f"{len(source)} bytes", max_pixels)
    if isinstance(source, str | Path):
        path = _plain_file(source)
        try:
            with _open(path) as file:
                return _from_encoded(file, str(path), max_pixels)
        except OSError as error:
            raise ImageError(f"{path}: cannot be opened ({error})") from error
    raise ImageError(
        f"cannot read an image from {type(source).__name__}; "
        "pass a path, bytes, a Pillow image or a numpy array"
    )


def displayed_hw(path: Path) -> tuple[int, int]:
    """Height and width of a picture as displayed, mostly without decoding it.

    Of a JPEG or PNG the header and the end are read. A file whose end is missing, or of a format
    whose end says nothing, is decoded after all.

    Raises:
        UnsafeFileError, ImageError: as for ``load_image``.
    """
    try:
        with _open(_plain_file(path)) as file:
            if _is_whole(file):
                with Image.open(file, formats=FORMATS) as image:
                    width, height = image.size
                    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                if width * height <= MAX_PIXELS:
                    return (width, height) if turned else (height, width)
    except Exception:  # a parser of untrusted bytes may raise anything; named by the next line
        pass
    height, width, _ = load_image(path).shape
    return height, width


def list_images(sources: Sequence[str | Path]) -> list[Path]:
    """Find the pictures that folders, glob patterns and file names stand for.

    A folder gives the pictures directly in it, a pattern (``**`` reaches into sub-folders) the
    pictures among its matches; both go by suffix and skip hidden files. A file named outright is
    taken whatever its suffix.

    Returns:
        Paths, sorted within each source, in the order of the sources, each one once.

    Raises:
        ImageError: If a source gives nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        try:
            matches = _expand(source)
        except OSError as error:  # a name too long, a folder of another's
            raise ImageError(f"{str(source)[:80]}: cannot be read ({error.strerror})") from error
        if not matches:
            raise ImageError(
                f"{source}: no images found; looked for {', '.join(sorted(SUFFIXES))} files"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _expand(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_file():  # before globbing: brackets and stars may stand in file names
        return [path]
    if path.is_dir():
        candidates = list(path.iterdir())
    else:
        candidates = [Path(match) for match in glob.glob(str(source), recursive=True)]  # noqa: PTH207 (absolute patterns)
    return sorted(
        candidate
        for candidate in candidates
        if candidate.suffix.lower() in SUFFIXES
        and not candidate.name.startswith(".")
        and candidate.is_file()
    )


def _plain_file(source: str | Path) -> Path:
    text = str(source)
    if text.startswith(("http://", "https://")):
        raise ImageError(
            f"{text}: addresses are not fetched; download the picture and pass its path"
        )
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a folder; name a picture in it, or list the folder")
        if archives.in_archive(path):
            return path
        if not path.exists():
            raise ImageError(f"{path}: no such file")
        if not path.is_file():
            raise UnsafeFileError(f"{path}: is a device, pipe or socket; only plain files are read")
    except (OSError, ValueError) as error:  # name too long, NUL inside
        if isinstance(error, SegCompassError):
            raise
        raise ImageError(f"{text[:80]!r}: cannot be a file name ({error})") from error
    return path


def _open(path: Path) -> IO[bytes]:
    if archives.in_archive(path):
        return io.BytesIO(archives.read_bytes(path))
    return path.open("rb")


def _is_whole(file: IO[bytes]) -> bool:
    head = file.read(8)
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _TAIL))
    tail = file.read()
    file.seek(0)
    return any(head.startswith(start) and end in tail for start, end in _MARKS)


def _check_size(size: tuple[int, ...], name: str, max_pixels: int) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ImageError(f"{name}: is not a picture with height and width (size {size})")
    width, height = size
    if width * height > max_pixels:
        raise UnsafeFileError(
            f"{name}: {width}×{height} is {width * height:,} pixels, more than the {max_pixels:,} "
            "allowed; make it smaller, or raise max_pixels if you trust it"
        )


def _from_encoded(file: IO[bytes], name: str, max_pixels: int) -> UInt8Array:
    head = file.read(16)
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnsafeFileError(f"{name}: {error}; make the picture smaller") from error
    except UnidentifiedImageError as error:
        raise _unidentified(head, name) from error
    except Exception as error:  # a parser of untrusted bytes may raise anything; named here
        raise ImageError(f"{name}: broken header ({error}); save the picture again") from error
    with image:
        return _from_pillow(image, name, max_pixels)


def _unidentified(head: bytes, name: str) -> ImageError | UnsafeFileError:
    """Tell a format that is not allowed from a file that is no picture, by its first bytes."""
    allowed = f"allowed are {', '.join(FORMATS)}"
    if not head:
        return ImageError(f"{name}: is empty")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return UnsafeFileError(f"{name}: is {kind}, which is not read; {allowed}")
    Image.init()
    for kind, (_, accept) in Image.OPEN.items():
        if kind not in _DECODED_AS and accept is not None and accept(head) is True:
            return UnsafeFileError(f"{name}: is {kind}, which is not read; {allowed}")
    return ImageError(f"{name}: is not a picture, or its header is broken; {allowed}")


def _from_pillow(image: Image.Image, name: str, max_pixels: int) -> UInt8Array:
    if image.format is not None and image.format not in _DECODED_AS:
        raise UnsafeFileError(
            f"{name}: is {image.format}, which is not read; allowed are {', '.join(FORMATS)}"
        )
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except SegCompassError:
        raise
    except Exception as error:  # decoders of untrusted bytes may raise anything; named here
        raise ImageError(
            f"{name}: broken or truncated {image.format or 'picture'} ({error}); "
            "fetch or save it again"
        ) from error


def _to_rgb(image: Image.Image, name: str) -> UInt8Array:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, name)
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _deep_grey(image: Image.Image, name: str) -> UInt8Array:
    """Scale grey pictures of more than 8 bits; Pillow's own conversion clips them to white."""
    values = np.asarray(image)
    if image.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
            raise ImageError(
                f"{name}: floating-point grey outside [0, 255]; save it with 8 or 16 bits"
            )
        grey = np.rint(values * (255.0 / top)).astype(np.uint8)
    else:
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: grey outside 16 bits; save it with 8 or 16 bits")
        grey = _to_8_bits(values.astype(np.uint16))
    key = image.info.get("transparency")  # one grey value that stands for "transparent"
    if isinstance(key, int):
        grey = np.where(values == key, np.uint8(_WHITE), grey)
    return np.repeat(grey[..., None], 3, axis=-1)


def _from_array(array: npt.NDArray[np.generic]) -> UInt8Array:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(f"array of shape {array.shape}; expected (H, W), or (H, W, 1 | 3 | 4)")
    if array.dtype == np.uint8:
        values: UInt8Array = array.astype(np.uint8)
    elif array.dtype == np.uint16:
        values = _to_8_bits(array.astype(np.uint16))
    elif array.dtype == np.bool_:
        values = array.astype(np.uint8) * np.uint8(255)
    else:
        raise ImageError(
            f"array of {array.dtype}; expected uint8, uint16 or bool "
            "(scale floats in [0, 1] by 255 and convert them to uint8)"
        )
    if values.shape[2] == 4:
        return _on_white(values)
    return np.repeat(values, 3, axis=-1) if values.shape[2] == 1 else np.ascontiguousarray(values)


def _to_8_bits(values: npt.NDArray[np.uint16]) -> UInt8Array:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _on_white(rgba: UInt8Array) -> UInt8Array:
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + _WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)
