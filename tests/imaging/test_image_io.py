"""Can no stranger's image hurt: rotated, bombed, cut off, damaged; and do images go out as they should?

What is expected is computed from the definitions of the formats, not by the code under test.
"""

from __future__ import annotations

import io
import itertools
import random
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from core.imaging.file_sanitizer import MAX_SCANS, PictureError
from core.imaging.image_io import (
    GUTTER,
    MAX_COLLAGE_COLUMNS,
    MAX_COLLAGE_ROWS,
    MAX_COLLAGE_SIDE,
    archive,
    collage,
    crop_square,
    evenly_spaced,
    read_image,
    thumbnail_webp,
)
from tests.support.files import (
    PNG,
    changed,
    chunk,
    exif,
    face,
    flat,
    itxt,
    png,
    riff,
    save,
    segment,
    with_chunks,
    with_riff,
    with_segments,
)

# ---- strangers' images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True, "optimize": True}])
def test_sound_pictures_are_read_as_pillow_reads_them(kind: str, options: dict[str, Any]) -> None:
    data = save(face()[:, :90], kind, **options)
    pixels = read_image(data)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert pixels.shape == (128, 90, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (1100, 1000)])
def test_all_shapes_are_read_whole(size: tuple[int, int]) -> None:
    """The largest takes more than one band."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(read_image(save(pixels, compress_level=1)), pixels)


# which side of the image the first stored row and the first stored column are: EXIF 2.3, tag 0x0112
SIDES = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
         5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_turned_picture_comes_upright(orientation: int, kind: str) -> None:
    upright = face(3)[:96]
    row, column = SIDES[orientation]
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = np.ascontiguousarray(stored[:, ::-1] if column in ("bottom", "right") else stored)
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for block in (exif(orientation), exif(orientation, "<"), exif(orientation, "<", kind=4)):
        data = save(stored, kind, **options)
        if kind == "PNG":
            data = with_chunks(data, chunk("eXIf", block))
        elif kind == "JPEG":
            data = with_segments(data, segment(0xE1, b"Exif\0\0" + block))
        else:
            data = with_riff(data, ("ICCP", b"x"), ("EXIF", block))
        difference = np.abs(read_image(data).astype(int) - upright)
        assert difference.max() <= (0 if kind != "JPEG" else 24) and difference.mean() < 1.5


@pytest.mark.parametrize(
    "block", [b"", b"II*\0", exif(0), exif(9), exif(6)[:20], exif(6).replace(b"\x01\x12", b"\x01\x13"), b"junk" * 9,
              b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(40)])
def test_a_broken_orientation_does_no_harm(block: bytes) -> None:
    data = save(face(), "JPEG")
    assert np.array_equal(read_image(with_segments(data, segment(0xE1, b"Exif\0\0" + block))), read_image(data))


def test_alpha_is_laid_on_white() -> None:
    pixels = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128], [10, 20, 30, 254]]], np.uint8)
    wanted = [[[255, 0, 0], [255, 255, 255], [127, 127, 127], [11, 21, 31]]]
    assert read_image(save(pixels)).tolist() == wanted
    assert np.abs(read_image(save(pixels, "WEBP", lossless=True, exact=True)).astype(int) - wanted).max() <= 1
    grey = save(Image.frombytes("LA", (3, 1), bytes([9, 255, 0, 0, 0, 128])))
    assert read_image(grey)[0, :, 0].tolist() == [9, 255, 127]
    deep = png(2, 1, 16, 4, b"\0" + struct.pack(">HHHH", 0x1234, 0xFFFF, 0, 0))
    assert read_image(deep).tolist() == [[[0x12] * 3, [255] * 3]]


def test_sixteen_bits_are_cut_to_eight() -> None:
    values = [0, 0x00FF, 0x0100, 0x8000, 0xFFFF]
    grey = read_image(save(Image.fromarray(np.array([values], np.uint16))))
    assert grey.tolist() == [[[value >> 8] * 3 for value in values]]
    colour = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *values, 0x1234))
    assert read_image(colour).tolist() == [[[0, 0, 1], [128, 255, 0x12]]]


def test_few_bits_are_spread_over_eight() -> None:
    assert read_image(png(4, 1, 2, 0, b"\0" + bytes([0b00011011])))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert read_image(png(2, 1, 4, 0, b"\0" + bytes([0x3F])))[0, :, 0].tolist() == [51, 255]
    assert read_image(save(Image.new("1", (3, 2), 1))).tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "wanted"),
    [(1, 0, bytes([0b01000000]), (0,), [255, 255]), (2, 0, bytes([0b01100000]), (1,), [255, 170]),
     (8, 0, bytes([7, 8]), (7,), [255, 8]), (8, 0, bytes([7, 8]), (0xFF07,), [255, 8]),
     (16, 0, struct.pack(">HH", 0x1234, 0x1235), (0x1234,), [255, 0x12]),
     (8, 2, bytes([1, 1, 1, 1, 1, 2]), (1, 1, 1), [255, 1]),
     (16, 2, struct.pack(">6H", *[0x01FF] * 3, *[0x0302] * 3), (0x01FF,) * 3, [255, 3]),
     (16, 2, struct.pack(">6H", *[0x80FF] * 3, *[0x0100] * 3), (0x0100,) * 3, [0x80, 255]),
     (8, 4, bytes([7, 255, 8, 255]), (7,), [7, 8])],
)
def test_a_transparent_value_without_alpha_is_white(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], wanted: list[int]
) -> None:
    data = png(2, 1, depth, colour, b"\0" + row, chunk("tRNS", struct.pack(f">{len(key)}H", *key)))
    assert read_image(data)[0, :, 0].tolist() == wanted


def test_palettes() -> None:
    palette = chunk("PLTE", bytes([200, 0, 0, 0, 100, 0, 0, 0, 50]))
    rows = b"\0" + bytes([0b00011000])
    assert read_image(png(3, 1, 2, 3, rows, palette)).tolist() == [[[200, 0, 0], [0, 100, 0], [0, 0, 50]]]
    one = png(3, 1, 2, 3, rows, palette, chunk("tRNS", b"\xff\x00"))
    assert read_image(one).tolist() == [[[200, 0, 0], [255, 255, 255], [0, 0, 50]]]
    many = png(3, 1, 2, 3, rows, palette, chunk("tRNS", b"\x80\x00\xff"))
    assert np.abs(read_image(many).astype(int) - [[[227, 127, 127], [255, 255, 255], [0, 0, 50]]]).max() <= 1
    adaptive = Image.fromarray(face()).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_image(save(adaptive)), np.asarray(adaptive.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_of_other_colours(mode: str) -> None:
    data = save(Image.fromarray(face()).convert(mode), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        assert np.array_equal(read_image(data), np.asarray(image.convert("RGB")))
    assert np.abs(read_image(data).astype(int).mean(-1) - face().mean(-1)).mean() < (30 if mode == "L" else 8)


def test_an_rgb_jpeg_keeps_its_colours() -> None:
    """Told by the Adobe marker: without it the numbers would be taken for YCbCr."""
    data = save(face(), "JPEG", quality=95, keep_rgb=True)
    assert np.abs(read_image(data).astype(int) - face()).mean() < 4


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(face(seed)) for seed in range(3)]
    return save(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)


def frame_control(number: int, width: int) -> bytes:
    return chunk("fcTL", struct.pack(">IIIIIHHBB", number, width, 8, 0, 0, 1, 10, 0, 0))


JPEG = save(face(), "JPEG")
WEBP = save(face(), "WEBP", lossless=True)
ODD = {  # name: (file, the same image without its oddity)
    "animated PNG": (animation("PNG"), save(face())),
    "animated WebP": (animation("WEBP"), WEBP),
    "APNG that says its length twice": (
        with_chunks(flat("red"), *[chunk("acTL", struct.pack(">II", 2, 0))] * 2), flat("red")),
    "APNG with a frame that is too wide": (
        with_chunks(flat("red"), chunk("acTL", struct.pack(">II", 1, 0)), frame_control(0, 9)), flat("red")),
    "MPO: several JPEGs in one": (
        save(Image.fromarray(face()), "MPO", save_all=True, append_images=[Image.fromarray(face(1))]), JPEG),
    "MPO whose index is broken": (with_segments(JPEG, segment(0xE2, b"MPF\0MM\0*\xff\xff")), JPEG),
    "JPEG and a film behind it": (JPEG + b"\0\0\0\x20ftypmp42" + b"\xff\xda\0\4" * 100, JPEG),
    "JPEG with junk and padding between segments": (
        changed(JPEG, b"\xff\xdb", b"junk\xff\xff\xff\xff\xdb"), JPEG),
    "JPEG with a thumbnail": (with_segments(JPEG, segment(0xE1, b"Exif\0\0" + exif(1) + JPEG)), JPEG),
    "JPEG with a broken profile": (with_segments(JPEG, segment(0xE2, b"ICC_PROFILE\0\1\1junk")), JPEG),
    "JPEG with many profiles": (with_segments(JPEG, *[segment(0xE2, bytes(65000))] * 60), JPEG),
    "JPEG with a comment of 64 kB": (with_segments(JPEG, segment(0xFE, b"\xff\xd9" * 32000)), JPEG),
    "PNG with a profile that inflates to 64 MB": (
        with_chunks(flat("red"), chunk("iCCP", b"icc\0\0" + zlib.compress(bytes(2**26)))), flat("red")),
    "PNG with a broken profile": (with_chunks(flat("red"), chunk("iCCP", b"icc")), flat("red")),
    "PNG with text that inflates to 64 MB": (
        with_chunks(flat("red"), itxt("Comment", bytes(2**26), packed=True)), flat("red")),
    "PNG with 4 MB of text": (with_chunks(flat("red"), chunk("tEXt", b"x\0" + b"y" * 2**22)), flat("red")),
    "PNG with a wrong checksum in its text": (
        with_chunks(flat("red"), chunk("tEXt", b"a\0b")[:-1] + b"?"), flat("red")),
    "PNG with broken physical size, time and gamma": (
        with_chunks(flat("red"), chunk("pHYs", b"1"), chunk("gAMA"), chunk("cHRM", b"123"), chunk("sRGB")),
        flat("red")),
    "PNG in many small pieces": (
        flat("red")[:33] + b"".join(chunk("IDAT", bytes([b])) + chunk("IDAT")
                                    for b in flat("red")[41:-16]) + chunk("IEND"), flat("red")),
    "PNG with bytes behind its end": (flat("red") + bytes(1000), flat("red")),
    "WebP with a broken profile and EXIF": (with_riff(WEBP, ("ICCP", b"junk"), ("EXIF", b"junk")), WEBP),
    "WebP with XMP, a strange chunk, and bytes behind it": (
        with_riff(WEBP, ("what", b"odd"), ("XMP ", b"<xmp")) + b"tail", WEBP),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_read_like_plain_ones(case: str) -> None:
    """Without a warning: pytest makes each an error."""
    odd, plain = ODD[case]
    assert np.array_equal(read_image(odd), read_image(plain))


def test_interlaced() -> None:
    """Adam7 of 2 x 2: one pixel in pass 1, one in pass 6, two in pass 7."""
    data = png(2, 2, 8, 0, b"\0\1" + b"\0\2" + b"\0\3\4", interlace=1)
    assert read_image(data)[..., 0].tolist() == [[1, 2], [3, 4]]


def huge_jpeg(width: int, height: int) -> bytes:
    position = JPEG.index(b"\xff\xc0")
    return JPEG[: position + 5] + struct.pack(">HH", height, width) + JPEG[position + 9 :]


def scan_bomb(num_scans: int) -> bytes:
    data = save(face(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * num_scans + data[-2:]


RED = flat("red")
PALETTE = chunk("PLTE", bytes(9))
BAD_IMAGES = {
    "nothing": (b"", "0 bytes; from 1 to 8,388,608"),
    "too many bytes": (RED + bytes(8 * 2**20), "has 8,38.,... bytes; from 1 to 8,388,608"),
    "text": (b"a face, please", r"PNG, JPEG or WebP; these bytes are not: b'a face, '"),
    "HTML": (b"<html><body>", "PNG, JPEG or WebP"),
    "GIF": (save(face(), "GIF"), "these bytes are GIF"),
    "BMP": (save(face(), "BMP"), "these bytes are BMP"),
    "TIFF": (save(face(), "TIFF"), "these bytes are TIFF"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "these bytes are HEIC"),
    "AVIF": (b"\0\0\0\x18ftypavif" + bytes(99), "these bytes are AVIF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "these bytes are SVG"),
    "PDF": (b"%PDF-1.7", "these bytes are PDF"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF", "PNG, JPEG or WebP"),
    "a signature alone, PNG": (PNG, "PNG is cut off after 8 bytes"),
    "a signature alone, JPEG": (b"\xff\xd8\xff", "JPEG is cut off after 3 bytes"),
    "a signature alone, WebP": (b"RIFF\4\0\0\0WEBP", "WebP is damaged: it holds no picture"),
    "PNG of no pixels": (png(0, 5, 8, 2, b""), "0 x 5 = 0 pixels; from 1 to 50,000,000"),
    "PNG of 50,000 x 50,000": (png(50_000, 50_000, 8, 2, b""), "50000 x 50000 = 2,500,000,000 pixels; .* 50,000,000"),
    "PNG of the largest numbers": (png(2**32 - 1, 2**32 - 1, 8, 2, b""), "4294967295 x 4294967295"),
    "PNG one pixel too large": (png(50_000_001, 1, 1, 0, b""), "50000001 x 1 = 50,000,001 pixels"),
    "JPEG of 65,535 x 65,535": (huge_jpeg(65535, 65535), "JPEG has 65535 x 65535 = 4,294,836,225 pixels"),
    "JPEG of no height": (huge_jpeg(128, 0), "128 x 0 = 0 pixels"),
    "WebP canvas of 2^24 x 2^24": (
        riff(("VP8X", bytes(4) + b"\xff" * 6), ("VP8L", WEBP[20:])), "16777216 x 16777216"),
    "lossless WebP of 16,384 x 16,384": (riff(("VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(99))), "16384 x 16384"),
    "lossy WebP of 16,383 x 16,383": (riff(("VP8 ", bytes(6) + b"\xff\x3f\xff\x3f" + bytes(99))), "16383 x 16383"),
    "PNG without IHDR": (PNG + chunk("IDAT") + chunk("IEND"), "must begin with one IHDR"),
    "PNG with two IHDR": (RED[:33] + RED[8:], "must begin with one IHDR"),
    "PNG with a short IHDR": (PNG + chunk("IHDR", bytes(9)) + chunk("IEND"), "header ends too soon"),
    "PNG with a wrong checksum in its header": (changed(RED, RED[29:33], b"oops"), "checksum of IHDR"),
    "PNG with a flipped bit in its data": (RED[:45] + bytes([RED[45] ^ 1]) + RED[46:], "checksum of IDAT"),
    "PNG with a chunk of 4 GB": (RED[:33] + b"\xff\xff\xff\xffIDAT" + RED[41:], "in IDAT, which says 4,294,967,295"),
    "PNG with a chunk that has no name": (with_chunks(RED, chunk("\x01\x02\x03\x04")), "is no chunk"),
    "PNG without data": (png(8, 8, 8, 2, b"")[:33] + chunk("IEND"), "the PNG is damaged"),
    "PNG whose data end in mid-stream": (
        RED[:33] + chunk("IDAT", zlib.compress(random.Random(0).randbytes(200))[:100]) + chunk("IEND"),
        "the PNG is damaged"),
    "PNG whose data are no zlib stream": (RED[:33] + chunk("IDAT", b"junk" * 9) + chunk("IEND"), "the PNG is damaged"),
    "PNG with an impossible depth": (png(8, 8, 7, 2, bytes(200)), "it says 7 bits a value"),
    "PNG of no bits and a transparent value": (png(8, 8, 0, 2, b"", chunk("tRNS", bytes(6))), "it says 0 bits a value"),
    "PNG with an impossible mix of depth and colour": (png(8, 8, 4, 2, bytes(200)), "the PNG is damaged"),
    "PNG with an impossible filter": (png(2, 1, 8, 0, b"\x09\1\2"), "the PNG is damaged"),
    "PNG without its palette": (png(2, 1, 8, 3, b"\0\1\2"), "lacks its palette"),
    "PNG with half a transparent value": (png(2, 1, 8, 2, bytes(7), chunk("tRNS", b"\0")), "header ends too soon"),
    "PNG with a palette of 999 alphas": (png(2, 1, 8, 3, b"\0\1\2", PALETTE, chunk("tRNS", bytes(999))), "is damaged"),
    "PNG cut off in its data": (save(face())[:-50], "PNG is cut off in IDAT"),
    "PNG without its end": (RED[:-12], "before its IEND"),
    "JPEG cut off in its data": (JPEG[:3000], "JPEG is cut off after 3,000 bytes"),
    "JPEG cut off in its header": (JPEG[:100], "cut off in segment FFDB"),
    "JPEG without data": (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", "holds no picture"),
    "JPEG without tables": (b"\xff\xd8" + JPEG[JPEG.index(b"\xff\xc0") :], "the JPEG is damaged"),
    "JPEG with a segment of no length": (with_segments(JPEG, b"\xff\xe5\0\1"), "segment FFE5 is wrong"),
    "JPEG that says its size twice": (with_segments(JPEG, segment(0xC0, bytes(15).replace(b"\0", b"\1"))), "twice"),
    "JPEG of twelve bits": (changed(JPEG, b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit"),
    "JPEG in a JPEG": (with_segments(JPEG, JPEG), "segment FFD8 is wrong"),
    "JPEG with a bomb of scans": (scan_bomb(MAX_SCANS), f"more than {MAX_SCANS} scans"),
    "WebP cut off": (WEBP[:500], f"WebP is cut off after 500 of {len(WEBP):,} bytes"),
    "WebP with a chunk that is too long": (WEBP[:16] + b"\xff\xff\xff\x7f" + WEBP[20:], "says 2,147,483,647 bytes"),
    "WebP with nothing but EXIF": (riff(("EXIF", exif(1))), "holds no picture"),
    "WebP with a header alone": (riff(("VP8X", bytes(10))), "the WebP is damaged"),
    "WebP whose data are junk": (WEBP[:30] + bytes(len(WEBP) - 30), "the WebP is damaged"),
    "WebP with a frame larger than its canvas": (
        riff(("VP8X", bytes(10)), ("VP8L", WEBP[20:])), "the WebP is damaged"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_refused_with_a_sentence(case: str) -> None:
    data, message = BAD_IMAGES[case]
    with pytest.raises(PictureError, match=message) as refused:
        read_image(data)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_limits_are_the_callers() -> None:
    data = save(face())
    assert read_image(data, max_bytes=len(data), max_pixels=128 * 128).shape == (128, 128, 3)
    with pytest.raises(PictureError, match=f"has {len(data):,} bytes; from 1 to {len(data) - 1:,}"):
        read_image(data, max_bytes=len(data) - 1)
    with pytest.raises(PictureError, match="128 x 128 = 16,384 pixels; from 1 to 16,383"):
        read_image(data, max_pixels=128 * 128 - 1)


@pytest.mark.parametrize("bomb", ["PNG of 50,000 x 50,000", "JPEG of 65,535 x 65,535", "WebP canvas of 2^24 x 2^24"])
def test_a_huge_header_costs_no_memory(bomb: str) -> None:
    """Measured for the whole process: decoders do not allocate by Python."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(PictureError):
        read_image(BAD_IMAGES[bomb][0])
    kilobyte = 1024 if sys.platform == "darwin" else 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 2**10 * kilobyte
    assert time.process_time() - start < 0.5


WHOLE = {"PNG": save(face()), "palette": save(Image.fromarray(face()).convert("P")), "JPEG": JPEG,
         "progressive": save(face(), "JPEG", progressive=True), "lossless": WEBP, "lossy": save(face(), "WEBP"),
         "animated": animation("WEBP")}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_cut_off_anywhere_is_refused(data: bytes) -> None:
    for end in (*range(1, 60), *range(60, len(data), max(1, len(data) // 60)), len(data) - 2, len(data) - 1):
        with pytest.raises(PictureError):
            read_image(data[:end])


SAMPLES = (save(face()[:20, :30]), save(face()[:20, :30], "JPEG"), save(face()[:20, :30], "JPEG", progressive=True),
           save(face()[:20, :30], "WEBP"), with_riff(save(face()[:20, :30], "WEBP", lossless=True), ("ICCP", b"x")))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_anywhere_is_a_picture_or_a_picture_error(data: st.DataObject) -> None:
    sound = data.draw(st.sampled_from(SAMPLES))
    broken = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(broken) - 1))
        broken[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        pixels = read_image(bytes(broken), max_pixels=10**6)
    except PictureError as error:
        assert len(str(error)) < 300
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@given(st.sampled_from([PNG, b"\xff\xd8\xff", b"RIFF\x60\0\0\0WEBPVP8X", b"RIFF\x60\0\0\0WEBPVP8L", b""]), st.binary())
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_a_picture_error(start: bytes, rest: bytes) -> None:
    with pytest.raises(PictureError):
        read_image(start + rest)


def test_threads_do_not_disturb_each_other_nor_pillow() -> None:
    def state() -> tuple[object, ...]:
        return (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters),
                PngImagePlugin.MAX_TEXT_CHUNK)

    def read(data: bytes) -> bytes | str:
        try:
            return read_image(data).tobytes()
        except PictureError as error:
            return str(error)

    before = state()
    files = [data for data, *_ in (*ODD.values(), *BAD_IMAGES.values())]
    alone = [read(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(read, files * 2))
    assert together == alone * 2 and state() == before


# ---- what goes out ---------------------------------------------------------------------------------------------------


def test_the_square_is_cut_from_the_middle() -> None:
    pixels = np.zeros((10, 31, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert np.array_equal(crop_square(pixels, 10), pixels[:, 10:20])
    assert np.array_equal(crop_square(pixels.swapaxes(0, 1), 10), pixels[:, 10:20])
    assert crop_square(face()[:100], 64).shape == (64, 64, 3)
    assert crop_square(np.full((1, 900, 3), 7, np.uint8), 128).tolist() == [[[7] * 3] * 128] * 128
    smooth = crop_square(face(), 32).astype(int) - face().reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(smooth).mean() < 6
    assert crop_square(face(), 64).flags.writeable


def test_thumbnails() -> None:
    small = thumbnail_webp(save(face()[:64]), 32)
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == ("WEBP", (32, 16))
        wanted = np.asarray(Image.fromarray(face()[:64]).resize((32, 16), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(image.convert("RGB")) - wanted).mean() < 12
    with Image.open(io.BytesIO(thumbnail_webp(flat("red"), 32))) as image:
        assert image.size == (8, 8)  # never enlarged
    with Image.open(io.BytesIO(thumbnail_webp(flat("red", (500, 1)), 32))) as image:
        assert image.size == (32, 1)
    assert thumbnail_webp(save(face()), 64) == thumbnail_webp(save(face()), 64)
    with pytest.raises(PictureError):
        thumbnail_webp(b"junk", 32)


@given(st.integers(0, 300), st.integers(2, 40))
def test_evenly_spaced_keeps_order_and_both_ends(num_items: int, most: int) -> None:
    items = range(num_items)
    kept = evenly_spaced(items, most)
    assert kept == sorted(set(kept)) and len(kept) == min(most, num_items)
    if num_items:
        gaps = {b - a for a, b in itertools.pairwise(kept)}
        assert kept[0] == 0 and kept[-1] == num_items - 1 and max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_collage_shows_rows_of_steps() -> None:
    data = collage([[flat("red"), flat("green"), flat("blue")], [], [flat("black", (4, 4)), flat("yellow")]])
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG" and image.size == (3 * 8 + 2 * GUTTER, 3 * 8 + 2 * GUTTER)
        assert "trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]  # type: ignore[attr-defined]
    white, wanted = (255, 255, 255), np.full((28, 28, 3), 255)
    colours = {(0, 0): (255, 0, 0), (0, 1): (0, 128, 0), (0, 2): (0, 0, 255), (1, 0): white, (1, 1): white,
               (1, 2): white, (2, 0): (0, 0, 0), (2, 1): (255, 255, 0), (2, 2): white}
    for (y, x), colour in colours.items():
        wanted[y * 10 : y * 10 + 8, x * 10 : x * 10 + 8] = colour
    assert np.array_equal(read_image(data), wanted)


def test_a_collage_of_one_picture_is_that_picture() -> None:
    assert np.array_equal(read_image(collage([[save(face())]])), face())


def test_a_collage_has_limits() -> None:
    colours = [(i, 0, 0) for i in range(100)]
    row = [save(Image.new("RGB", (4, 4), colour)) for colour in colours]
    many = read_image(collage([row, row[:2]]))
    assert many.shape == (4 * 2 + GUTTER, MAX_COLLAGE_COLUMNS * (4 + GUTTER) - GUTTER, 3)
    shown = many[0, :: 4 + GUTTER, 0].tolist()
    assert shown[0] == 0 and shown[-1] == 99 and shown == sorted(set(shown))
    assert many[4 + GUTTER, :: 4 + GUTTER, 0].tolist() == [0, 1, *[255] * (MAX_COLLAGE_COLUMNS - 2)]
    wide = read_image(collage([[flat("red", (600, 300))] * MAX_COLLAGE_COLUMNS]))
    width = (wide.shape[1] + GUTTER) // MAX_COLLAGE_COLUMNS - GUTTER
    assert MAX_COLLAGE_SIDE - MAX_COLLAGE_COLUMNS < wide.shape[1] <= MAX_COLLAGE_SIDE and wide.shape[0] == width / 2
    assert wide[5, 5].tolist() == [255, 0, 0] and wide[5, width].tolist() == [255, 255, 255]
    for rows in ([], [[]], [[], []], [row[:1]] * (MAX_COLLAGE_ROWS + 1)):
        with pytest.raises(PictureError, match=f"a collage needs from 1 to {MAX_COLLAGE_ROWS} rows"):
            collage(rows)
    with pytest.raises(PictureError, match="PNG, JPEG or WebP"):
        collage([[flat("red"), b"junk"]])


def test_equal_files_give_equal_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"face-10.png": flat("red"), "face-2.png": flat("blue"), "request.json": b'{"a": "' + b"x" * 500 + b'"}'}
    first = archive(files)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert archive(dict(reversed(files.items()))) == first
    assert archive({**files, "face-2.png": flat("green")}) != first
    with zipfile.ZipFile(io.BytesIO(first)) as zipped:
        assert zipped.testzip() is None
        assert {entry.filename: zipped.read(entry) for entry in zipped.infolist()} == files
        for entry in zipped.infolist():
            assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
            assert entry.external_attr >> 16 == 0o100644
    with zipfile.ZipFile(io.BytesIO(archive({}))) as zipped:
        assert zipped.namelist() == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.png", "a/b.png", "a\\b.png", "/a.png", "C:a.png", "c:\\a.png", ".png", "a.", "a ",
             " a", "a\0.png", "a\n.png", "a\x1b.png", "CON", "con.png", "Lpt1.txt", "é.png", "a\u202egnp.exe", "~",
             "-rf", "a" * 101, "a*b", "a?b", "a|b", "$x"])
def test_unsafe_names_do_not_enter_an_archive(name: str) -> None:
    with pytest.raises(PictureError, match="plain name"):
        archive({"fine.png": b"1", name: b"2"})


@pytest.mark.parametrize("name", ["a", "face-0.png", "A smiling woman - 3.png", "console.png", "a..b", "0", "a" * 100])
def test_safe_names_do(name: str) -> None:
    with zipfile.ZipFile(io.BytesIO(archive({name: b"1"}))) as zipped:
        assert zipped.namelist() == [name]


def test_names_that_some_systems_take_for_one_are_refused() -> None:
    with pytest.raises(PictureError, match="differ only in case"):
        archive({"a.png": b"1", "A.PNG": b"2"})


def test_messages_stay_printable() -> None:
    bad: list[Callable[[], object]] = [
        lambda: archive({"\x1b[2J" * 99: b""}),
        lambda: read_image(b"\x1b[2J\n\n\r\x07"),
    ]
    for call in bad:
        with pytest.raises(PictureError) as refused:
            call()
        assert re.fullmatch("[ -~]{10,200}", str(refused.value))
