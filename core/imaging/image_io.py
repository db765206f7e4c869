"""How do untrusted bytes become pixels, and pixels images?

In: `read_image` is the one way. `core/imaging/file_sanitizer.py` walks the file and checks sizes; Pillow decodes what
is left of it, nothing but image data. Pillow's global settings stay as they are, and threads may call everything here
at once.

Out: thumbnails, collages, archives. PNGs that say how they came about are written in `core/imaging/png_metadata.py`.

It does not know models, jobs or HTTP. Colour profiles are ignored: an image in another colour space than sRGB keeps
its numbers.
"""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from core.imaging.file_sanitizer import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, PictureError, Plain, plain_file, shown
from core.imaging.png_metadata import XMP, XMP_CHUNK, write_png

MAX_COLLAGE_ROWS, MAX_COLLAGE_COLUMNS, MAX_COLLAGE_SIDE = 64, 32, 8192
GUTTER = 2  # pixels between the images of a collage

Item = TypeVar("Item")


# ---- untrusted bytes become pixels -----------------------------------------------------------------------------------

_BAND = 2**20  # pixels that are converted at once
_DECODERS = {
    "PNG": PngImagePlugin.PngImageFile,  # not Image.open: it warns, and tries decoders by the global registry
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}


def read_image(
    data: bytes, *, max_bytes: int = MAX_PICTURE_BYTES, max_pixels: int = MAX_PICTURE_PIXELS
) -> np.ndarray:
    """A PNG, JPEG or WebP file as RGB, turned as its EXIF orientation says and laid on white where it is transparent.

    Bytes are capped before anything is read, pixels before anything is decoded. Sixteen bits are cut to eight, CMYK
    and palettes become RGB, of an animation the first image is taken. A file that is cut off, or has a wrong
    checksum, is refused as a whole. Memory: about 10 bytes a pixel, 16 for a WebP: 0.8 GB at the usual limit.

    Shapes: -> uint8 [H, W, 3].
    Raises PictureError, and nothing else, for whatever the bytes are.
    """
    plain = plain_file(data, max_bytes, max_pixels)
    with _decoded(plain) as image:
        pixels = _rgb_on_white(image, plain.transparent)
    return _upright(pixels, plain.orientation)


def read_alpha(
    data: bytes, *, max_bytes: int = MAX_PICTURE_BYTES, max_pixels: int = MAX_PICTURE_PIXELS
) -> np.ndarray | None:
    """How opaque the pixels of a file are that `read_image` reads, 0 to 255; None where nothing can be transparent.

    Shapes: -> uint8 [H, W]. Raises PictureError, and nothing else, for whatever the bytes are.
    """
    plain = plain_file(data, max_bytes, max_pixels)
    with _decoded(plain) as image:
        if image.mode not in ("LA", "RGBA") and "transparency" not in image.info:
            return None
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return _upright(alpha, plain.orientation)


@contextmanager
def _decoded(plain: Plain) -> Iterator[Image.Image]:
    """The image of a file, loaded. Whatever goes wrong with it until it is closed is a PictureError."""
    try:
        with _DECODERS[plain.kind](io.BytesIO(plain.data)) as image:
            if image.size != plain.size:
                raise ValueError(f"it says {plain.size} and holds {image.size} pixels")
            image.load()
            yield image
    except Exception as error:  # which one a decoder raises depends on where the damage is
        raise PictureError(f"the {plain.kind} is damaged: {error}") from error


def _rgb_on_white(image: Image.Image, transparent: tuple[int, ...] | None) -> np.ndarray:
    """Band by band, so that a large image is not held four times. Shapes: -> uint8 [H, W, 3]."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        out = pixels[top : top + rows]
        if band.mode == "I;16":
            grey = np.asarray(band)[..., None]
            out[:] = grey >> 8
            is_clear = grey == transparent if transparent else None
        else:
            if band.mode in ("LA", "RGBA") or "transparency" in image.info:
                band = band.convert("RGBA")
                ground = Image.new("RGB", band.size, "white")
                ground.paste(band, mask=band)
                band = ground
            out[:] = np.asarray(band.convert("RGB"))
            is_clear = out == np.array(transparent, np.uint8) if transparent else None
        if is_clear is not None:
            out[is_clear.all(-1)] = 255
    return pixels


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Orientations of EXIF 2.3: 2 to 4 mirror or turn by 180 degrees, 5 to 8 also swap the sides."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# ---- pixels and images go out --------------------------------------------------------------------------------------


def crop_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The largest square in the middle, at `size` pixels a side. Shapes: uint8 [H, W, 3] -> [size, size, 3]."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resized(pixels[top : top + side, left : left + side], (size, size))


def base64_text(content: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(content).decode()


def as_text(pixels: np.ndarray) -> str:
    """A PNG of these pixels as base64: how a request carries an image or a mask. Equal pixels give equal text."""
    return base64_text(write_png(pixels))


def is_white(pixels: np.ndarray) -> np.ndarray:
    """Which pixels of a mask are meant: those of at least 128 of 255 grey levels. Shapes: [H, W, 3] -> bool [H, W]."""
    return np.asarray(Image.fromarray(pixels).convert("L")) >= 128


def mask_picture(mask: np.ndarray) -> np.ndarray:
    """A mask as an image that `is_white` reads back. Shapes: bool [H, W] -> uint8 [H, W], 0 or 255."""
    return np.where(mask, 255, 0).astype(np.uint8)


def thumbnail_webp(png: bytes, size: int) -> bytes:
    """A small copy as WebP, its longer side `size` pixels, or as it is where that is smaller.

    Raises PictureError as `read_image`.
    """
    pixels = read_image(png)
    buffer = io.BytesIO()
    small = _resized(pixels, _fitting(pixels.shape[1::-1], (size, size)))
    Image.fromarray(small).save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def evenly_spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (at least 2) of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def collage(rows: Sequence[Sequence[bytes]]) -> bytes:
    """Images side by side, one row an image, one column a step, as a PNG: how each image came about.

    A row of more than MAX_COLLAGE_COLUMNS shows that many of them, `evenly_spaced`; shorter rows leave the rest white.
    Every image is brought to the size of the largest, or less where MAX_COLLAGE_SIDE demands it.

    Raises PictureError as `read_image`, and without any image or with more than MAX_COLLAGE_ROWS rows.
    """
    shown = [evenly_spaced(row, MAX_COLLAGE_COLUMNS) for row in rows]
    columns = max(map(len, shown), default=0)
    if not columns or len(shown) > MAX_COLLAGE_ROWS:
        wanted = f"from 1 to {MAX_COLLAGE_ROWS} rows with at least one picture"
        raise PictureError(f"a collage needs {wanted}; got {len(shown)} rows with {sum(map(len, shown))} images")
    sizes = [plain_file(picture, MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS).size for row in shown for picture in row]
    room_x, room_y = ((MAX_COLLAGE_SIDE + GUTTER) // count - GUTTER for count in (columns, len(shown)))
    width, height = _fitting((max(w for w, _ in sizes), max(h for _, h in sizes)), (room_x, room_y))
    step_x, step_y = width + GUTTER, height + GUTTER
    canvas = np.full((len(shown) * step_y - GUTTER, columns * step_x - GUTTER, 3), 255, np.uint8)
    for y, row in enumerate(shown):
        for x, picture in enumerate(row):
            pixels = _resized(read_image(picture), (width, height))
            canvas[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = pixels
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt(XMP_CHUNK, XMP)
    return write_png(canvas, texts)


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of these files, not compressed again; equal content gives equal bytes, whatever the order or the hour.

    Raises PictureError for a name that could leave the folder it is unpacked in, or that a file system refuses.
    """
    if len({name.lower() for name in files}) < len(files):
        raise PictureError(f"two names in the archive differ only in case: {shown(sorted(files))}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as zipped:
        for name, data in sorted(files.items()):
            if not _FILE_NAME.fullmatch(name):
                raise PictureError(f"a file in the archive needs a plain name, such as face-0.png; got {shown(name)}")
            entry = zipfile.ZipInfo(name)  # of 1980: the day that zip's calendar begins
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # the same on Windows: a file, not executable
            zipped.writestr(entry, data)
    return buffer.getvalue()


_FILE_NAME = re.compile(
    r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[a-z0-9](?:[a-z0-9._ -]{0,98}[a-z0-9])?", re.IGNORECASE | re.ASCII
)


def _fitting(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Width and height shrunk into the room, in proportion."""
    scale = min(1.0, room[0] / size[0], room[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shapes: uint8 [H, W, 3] -> [height, width, 3]."""
    if pixels.shape[1::-1] == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
