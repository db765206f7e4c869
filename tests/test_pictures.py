"""Do pictures carry their request without loss, and can no stranger's bytes hurt: rotated, bombed, cut off, forged?

Good files are written by Pillow or, where it cannot, chunk by chunk here; what is expected is computed from the
definitions of the formats, not by the code under test. Long because the tables of bad files are.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import re
import shutil
import struct
import sys
import time
import tracemalloc
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from core import pictures
from core.cartoons import draw_face, random_attributes
from core.pictures import (
    GUTTER,
    MAX_COLLAGE_COLUMNS,
    MAX_COLLAGE_ROWS,
    MAX_COLLAGE_SIDE,
    MAX_SCANS,
    MAX_TEXT_BYTES,
    REQUEST_CHUNK,
    NoRequestError,
    PictureError,
    archive,
    collage,
    crop_square,
    encode_png,
    parameters_text,
    read_image,
    read_request,
    spread,
    thumbnail_webp,
)
from core.schemas import TextToImage

PNG = b"\x89PNG\r\n\x1a\n"
REQUEST: dict[str, Any] = {
    "prompt": "a wömän,\nsmiling", "n_images": 1, "n_inf_steps": 40, "sampler": "DPM++ 2M", "guidance_scale": 4.5,
    "negative_prompt": "béard", "start_timestep": 0.0, "seed": 2**53 - 1,
}


@dataclass(frozen=True)
class Model:
    name: str = "celeba128"
    model_hash: str = "0123456789abcdef" * 4
    image_size: int = 128


def face(seed: int = 0) -> np.ndarray:
    """A picture with no symmetry. Shapes: -> uint8 [128, 128, 3]."""
    rng = random.Random(seed)
    return draw_face(random_attributes(rng), rng)


def save(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour: str, size: tuple[int, int] = (8, 8)) -> bytes:
    return save(Image.new("RGB", size, colour))


def chunk(name: str, body: bytes = b"") -> bytes:
    kind = name.encode()
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes, interlace: int = 0) -> bytes:
    """A PNG by hand; `rows` with the filter byte that begins each."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"".join((PNG, chunk("IHDR", header), *extra, chunk("IDAT", zlib.compress(rows)), chunk("IEND")))


def with_chunks(data: bytes, *extra: bytes) -> bytes:
    """The PNG with more chunks behind its IHDR."""
    return data[:33] + b"".join(extra) + data[33:]


def itxt(keyword: str, body: bytes, *, packed: bool = False, flag: int | None = None, method: int = 0) -> bytes:
    head = keyword.encode() + b"\0" + bytes([int(packed) if flag is None else flag, method]) + b"\0\0"
    return chunk("iTXt", head + (zlib.compress(body) if packed else body))


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """A TIFF block of two entries: another one, then the orientation."""
    magic = {">": b"MM\0*", "<": b"II*\0"}[order]
    value = struct.pack(f"{order}HH", orientation, 0) if kind == 3 else struct.pack(f"{order}I", orientation)
    entries = struct.pack(f"{order}HHII", 0x010F, 2, 1, 0) + struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return magic + struct.pack(f"{order}IH", 8, 2) + entries + struct.pack(f"{order}I", 0)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg: bytes, *extra: bytes) -> bytes:
    return jpeg[:2] + b"".join(extra) + jpeg[2:]


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def riff(*parts: tuple[str, bytes]) -> bytes:
    body = b"WEBP"
    for name, part in parts:
        body += name.encode() + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_riff(webp: bytes, *extra: tuple[str, bytes], flags: int = 0b101100) -> bytes:
    """The simple WebP in the extended form, with more chunks around its image."""
    width, height = Image.open(io.BytesIO(webp)).size
    kind, length = webp[12:16].decode(), struct.unpack("<I", webp[16:20])[0]
    header = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff(("VP8X", header), *extra[:1], (kind, webp[20 : 20 + length]), *extra[1:])


# ---- the request in the picture --------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.sampled_from(
    ["", '{"request": 1}', "a\r\n\tb", "\\\"'{}[]\\n\\u0000", "Steps: 9, Seed: 1", "\N{GRINNING FACE} \u202e", "\0\x7f"]
)
NUMBERS = st.floats(0, 20, allow_nan=False) | st.sampled_from([0.1 + 0.2, 1e-300, 7, 0])
LATENTS = st.binary(min_size=4, max_size=4096).map(lambda raw: base64.b64encode(raw).decode())
REQUESTS = st.fixed_dictionaries(
    {"prompt": TEXTS, "negative_prompt": TEXTS, "sampler": st.sampled_from(["DDIM", "Euler a", "DPM++ 2M"]),
     "n_inf_steps": st.integers(1, 1000), "seed": st.integers(0, 2**53 - 1), "guidance_scale": NUMBERS},
    optional={"n_images": st.integers(1, 8), "stream_freq": st.integers(1, 1000), "start_timestep": st.floats(0, 1),
              "model": TEXTS, "latent": LATENTS | st.lists(LATENTS, min_size=1, max_size=3)},
)
TINY = np.zeros((2, 3, 3), np.uint8)


def with_request(text: str) -> bytes:
    """A PNG whose request chunk says this."""
    return with_chunks(flat("red"), itxt(REQUEST_CHUNK, text.encode("utf-8", "surrogatepass"), packed=True))


def as_json(**changes: Any) -> str:
    return json.dumps({"request": {**REQUEST, **changes}, "model_hash": "ab"})


@given(REQUESTS)
@settings(deadline=None, max_examples=100)
def test_a_request_comes_back_exactly(request: dict[str, Any]) -> None:
    restored = read_request(encode_png(TINY, request, Model()))
    assert restored["exact"] and restored["model_hash"] == Model.model_hash
    assert repr(restored["request"]) == repr(request)  # types and signs too, which == forgives


@given(REQUESTS, st.sampled_from(["tEXt", "zTXt", "iTXt", "packed iTXt"]))
@settings(deadline=None, max_examples=60)
def test_a_tool_may_keep_the_text_in_another_kind_of_chunk(request: dict[str, Any], kind: str) -> None:
    text = json.dumps({"request": request, "model_hash": "ab"}).encode()
    key = REQUEST_CHUNK.encode()
    kept = {"tEXt": chunk("tEXt", key + b"\0" + text), "zTXt": chunk("zTXt", key + b"\0\0" + zlib.compress(text)),
            "iTXt": itxt(REQUEST_CHUNK, text), "packed iTXt": itxt(REQUEST_CHUNK, text, packed=True)}[kind]
    assert read_request(with_chunks(flat("red"), kept))["request"] == request


def test_the_text_says_which_mark_the_pixels_carry() -> None:
    """None, and so do pictures from before there was one; anything but a version is refused."""
    for version in (None, 1, 1000):
        assert read_request(encode_png(TINY, REQUEST, Model(), version))["watermark"] == version
    assert read_request(with_request(as_json()))["watermark"] is None
    for wrong in ("0", "1001", "1.0", "true", '"1"', "[]"):
        with pytest.raises(PictureError, match="watermark in the PNG must be a version from 1 to 1000"):
            read_request(with_request(f'{as_json()[:-1]}, "watermark": {wrong}}}'))


def test_the_text_survives_copies_and_saving_again(tmp_path: Path) -> None:
    data = encode_png(face(), REQUEST, Model(), 1)
    (tmp_path / "face.png").write_bytes(data)
    copy = Path(shutil.copy(tmp_path / "face.png", tmp_path / "copy"))
    assert read_request(copy.read_bytes())["request"] == REQUEST
    with Image.open(copy) as image:
        image.load()
        chunks = PngImagePlugin.PngInfo()
        for key, value in image.text.items():  # type: ignore[attr-defined]
            chunks.add_text(key, str(value))
        again = save(image.resize((50, 50)), pnginfo=chunks)
    wanted = {"request": REQUEST, "model_hash": Model.model_hash, "watermark": 1, "exact": True}
    assert read_request(again) == wanted
    behind = data[:-12] + itxt("unrelated", b"x") + data[-12:] + b"appended"
    assert read_request(behind)["request"] == REQUEST
    assert np.array_equal(read_image(behind), face())


@given(REQUESTS)
@settings(deadline=None, max_examples=100)
def test_the_parameters_text_alone_restores_what_it_tells(request: dict[str, Any]) -> None:
    if "\nNegative prompt: " in "\n" + request["prompt"]:
        return
    text = parameters_text(request, Model())
    restored = read_request(with_chunks(flat("red"), itxt("parameters", text.encode())))
    wanted = {name: request[name] for name in ("prompt", "negative_prompt", "n_inf_steps", "seed", "sampler")}
    scale = float(f"{request['guidance_scale']:g}")
    assert restored["request"] == {**wanted, "n_images": 1, "guidance_scale": scale}
    assert not restored["exact"] and restored["model_hash"] == "0123456789"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('portrait, <lora:x:1>\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, '
         'CFG scale: 7, Seed: 1, Size: 512x768, Model hash: abc, TI: "a, Seed: 5", Version: v1.9',
         {"prompt": "portrait, <lora:x:1>", "negative_prompt": "blurry", "n_images": 1, "n_inf_steps": 20, "seed": 1,
          "sampler": "DPM++ 2M", "guidance_scale": 7.0}),
        ("Steps: 3, Sampler: DDIM", {"prompt": "", "negative_prompt": "", "n_images": 1, "n_inf_steps": 3,
                                     "sampler": "DDIM"}),
        ("x\nSteps: ten, CFG scale: nan, Seed: 99999999999999999, Sampler: ",
         {"prompt": "x", "negative_prompt": "", "n_images": 1}),
        ("x\nSteps: 5, CFG scale: 1e-05, Seed: -1", {"prompt": "x", "negative_prompt": "", "n_images": 1,
                                                    "n_inf_steps": 5, "guidance_scale": 1e-5}),
    ],
)
def test_parameters_that_another_program_wrote(text: str, wanted: dict[str, Any]) -> None:
    found = read_request(with_chunks(flat("red"), chunk("tEXt", b"parameters\0" + text.encode())))
    assert found["request"] == wanted and not found["exact"]


def test_a_latin_1_text_keeps_its_umlauts() -> None:
    body = b"parameters\0" + "wömän\nSteps: 3".encode("latin-1")
    assert read_request(with_chunks(flat("red"), chunk("tEXt", body)))["request"]["prompt"] == "wömän"


@pytest.mark.parametrize("data", [flat("red"), with_chunks(flat("red"), itxt("parameters", b"my holidays")),
                                  with_chunks(flat("red"), chunk("tEXt", b"Comment\0Steps: 3"))])
def test_a_picture_from_elsewhere_is_told_apart_from_a_damaged_one(data: bytes) -> None:
    with pytest.raises(NoRequestError):
        read_request(data)


BAD_REQUESTS = {
    "not JSON": ("{'request': 1}", "not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[]", "must hold a request and a model_hash; got \\[\\]"),
    "an empty object": ("{}", "must hold"),
    "no hash": (json.dumps({"request": REQUEST}), "must hold"),
    "one key more": (json.dumps({"request": REQUEST, "model_hash": "ab", "code": "x"}), "must hold"),
    "request is a list": (json.dumps({"request": [], "model_hash": "ab"}), "must hold"),
    "request is text": (json.dumps({"request": "x", "model_hash": "ab"}), "must hold"),
    "hash is a number": (json.dumps({"request": REQUEST, "model_hash": 7}), "model_hash .* got 7"),
    "hash is huge": (json.dumps({"request": REQUEST, "model_hash": "a" * 129}), "at most 128"),
    "unknown field": (as_json(weight=0.5), "field 'weight' that is not known"),
    "strength is text": (as_json(strength="0.5"), "strength .* must be a number"),
    "picture is a number": (as_json(init_image=7), "init_image .* must be base64 text"),
    "variation seed below zero": (as_json(variation_seed=-1), "variation_seed .* must be an integer"),
    "target is a list": (as_json(interpolate_to=[1]), "interpolate_to .* must be an object"),
    "target is empty": (as_json(interpolate_to={}), "interpolate_to .* must be an object"),
    "target in a target": (as_json(interpolate_to={"interpolate_to": {"seed": 1}}), "'interpolate_to' that is not"),
    "target of no seed": (as_json(interpolate_to={"seed": "x"}), "seed .* must be an integer"),
    "field with a control character": (as_json(**{"\x1b[2J": 1}), r"'\\x1b\[2J'"),
    "prompt is a number": (as_json(prompt=7), "prompt .* must be text; got 7"),
    "prompt is null": (as_json(prompt=None), "prompt .* got None"),
    "prompt is a list": (as_json(prompt=["a"]), "prompt .* must be text"),
    "half a surrogate pair": (as_json(prompt="\ud800"), "prompt .* must be text"),
    "sampler is an object": (as_json(sampler={}), "sampler .* must be text"),
    "model is a number": (as_json(model=1), "model .* must be text"),
    "steps is text": (as_json(n_inf_steps="40"), "n_inf_steps .* must be an integer .*'40'"),
    "steps is a float": (as_json(n_inf_steps=40.0), "must be an integer .* got 40.0"),
    "steps is true": (as_json(n_inf_steps=True), "must be an integer .* got True"),
    "seed is negative": (as_json(seed=-1), "seed .* from 0 to 9007199254740991; got -1"),
    "seed is one too large": (as_json(seed=2**53), "seed .* got 9007199254740992"),
    "seed has a million digits": (as_json().replace(str(2**53 - 1), "1" * 10**6), "integer of 1000000 characters"),
    "scale is text": (as_json(guidance_scale="4"), "guidance_scale .* must be a number"),
    "scale is false": (as_json(guidance_scale=False), "guidance_scale .* got False"),
    "scale is NaN": (as_json(guidance_scale=float("nan")), "'NaN', which is not finite"),
    "scale is infinite": (as_json(guidance_scale=float("-inf")), "'-Infinity'"),
    "scale overflows": (as_json().replace("4.5", "1e999"), "'1e999'"),
    "scale is beyond all use": (as_json(guidance_scale=1e300), "guidance_scale .* must be a number of at most"),
    "latent is a number": (as_json(latent=1), "latent .* must be base64"),
    "latent is an empty list": (as_json(latent=[]), "latent .* got \\[\\]"),
    "latents are numbers": (as_json(latent=["a", 1]), "latent .* must be base64"),
    "latent is nested": (as_json(latent=[["a"]]), "latent .* must be base64"),
    "a field twice": (as_json().replace('"seed"', '"seed": 1, "seed"'), "a field twice"),
    "deep": (as_json(latent=0).replace('"latent": 0', '"latent": ' + "[" * 200_000 + "]" * 200_000), "not JSON"),
    "too long": (as_json(latent="a" * MAX_TEXT_BYTES), "longer than 1,048,576 bytes"),
    **{f"no {name}": (json.dumps({"request": {k: v for k, v in REQUEST.items() if k != name}, "model_hash": "ab"}),
                      f"lacks the field '{name}'") for name in ("prompt", "seed", "n_inf_steps", "guidance_scale")},
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_forged_request_is_refused(case: str) -> None:
    text, message = BAD_REQUESTS[case]
    start = time.process_time()
    with pytest.raises(PictureError, match=message) as refused:
        read_request(with_request(text))
    assert not isinstance(refused.value, NoRequestError)
    assert len(str(refused.value)) < 300 and time.process_time() - start < 2


GOOD = as_json().encode()
KEY = REQUEST_CHUNK.encode()
BAD_CHUNKS = {
    "twice": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD), itxt(REQUEST_CHUNK, GOOD)), "two texts"),
    "twice, in two kinds": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD), chunk("tEXt", KEY + b"\0" + GOOD)),
                            "two texts"),
    "parameters twice": (with_chunks(flat("red"), *[itxt("parameters", b"x\nSteps: 1")] * 2), "two texts"),
    "wrong checksum": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD)[:-1] + b"?"), "checksum of iTXt"),
    "unknown compression": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD, packed=True, method=9)), "method 9"),
    "unknown compression in zTXt": (with_chunks(flat("red"), chunk("zTXt", KEY + b"\0\1" + GOOD)), "method 1"),
    "not compressed though it says so": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD, flag=1)), "cannot be read"),
    "compression cut off": (
        with_chunks(flat("red"), chunk("iTXt", KEY + b"\0\1\0\0\0" + zlib.compress(GOOD)[:-9])), "end too soon"),
    "nothing behind the keyword": (with_chunks(flat("red"), chunk("iTXt", KEY + b"\0")), "cannot be read"),
    "no language": (with_chunks(flat("red"), chunk("iTXt", KEY + b"\0\0\0")), "cannot be read"),
    "not UTF-8": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, b"\xff\xfe")), "cannot be read.*utf-8"),
    "cut off in the chunk": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD))[:90], "cut off in iTXt"),
    "cut off behind the chunk": (with_chunks(flat("red"), itxt(REQUEST_CHUNK, GOOD))[:-12], "before its IEND"),
    "a JPEG": (save(face(), "JPEG"), "only PNG files carry a request; these bytes are JPEG"),
    "nothing": (b"", "0 bytes; from 1 to"),
    "text": (b"hello", "not: b'hello'"),
    "too many bytes": (flat("red") + b"\0" * (8 * 2**20), "from 1 to 8,388,608"),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_a_damaged_text_is_refused(case: str) -> None:
    data, message = BAD_CHUNKS[case]
    with pytest.raises(PictureError, match=message):
        read_request(data)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_damaged_file_gives_the_request_or_an_error_that_says_so(data: st.DataObject) -> None:
    sound = encode_png(TINY, REQUEST, Model())
    position = data.draw(st.integers(0, len(sound) - 1))
    broken = sound[:position] + data.draw(st.binary(max_size=4)) + sound[position + data.draw(st.integers(0, 4)) :]
    try:
        assert read_request(broken)["request"] == REQUEST
    except PictureError as error:
        assert len(str(error)) < 300


@pytest.fixture(scope="module")
def text_bomb() -> bytes:
    """64 MB of zeros in 64 kB."""
    bomb = zlib.compress(bytes(2**26), 9)
    assert len(bomb) < 2**17
    return bomb


@pytest.mark.parametrize("keyword", [REQUEST_CHUNK, "parameters", "Comment"])
def test_a_compressed_bomb_of_text_stays_small(keyword: str, text_bomb: bytes) -> None:
    data = with_chunks(encode_png(TINY), chunk("iTXt", keyword.encode() + b"\0\1\0\0\0" + text_bomb),
                       chunk("iCCP", b"icc\0\0" + text_bomb), chunk("zTXt", b"x\0\0" + text_bomb))
    tracemalloc.start()
    try:
        with pytest.raises(PictureError):
            read_request(data)
        assert np.array_equal(read_image(data), TINY)  # the texts do not matter here
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_back_is_not_written() -> None:
    for wrong in ({**REQUEST, "colour": "red"}, {**REQUEST, "seed": 2**53}, {**REQUEST, "latent": None},
                  {**REQUEST, "latent": "a" * MAX_TEXT_BYTES}, {"prompt": "x"}, {**REQUEST, "prompt": "\ud800"},
                  *({**REQUEST, "attributes": wrong} for wrong in (
                      None, [], {"Bald": True}, {"Bald": "1"}, {"Bald": float("nan")}, {"\ud800": 1.0},
                      {str(i): 1.0 for i in range(41)}))):
        with pytest.raises(PictureError):
            encode_png(TINY, wrong, Model())


def test_sliders_come_back_exactly() -> None:
    sliders = {"Smiling": -1.25, "5_o_Clock_Shadow": 2.0, "Young": 0.1}
    png = encode_png(TINY, {**REQUEST, "attributes": sliders}, Model())
    assert read_request(png)["request"] == {**REQUEST, "attributes": sliders}


def test_every_restored_field_can_be_posted() -> None:
    assert set(TextToImage.model_fields) >= pictures.REQUEST_FIELDS


def test_the_png_says_that_a_machine_drew_it() -> None:
    data = encode_png(face(), REQUEST, Model())
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), face())
        text = image.text  # type: ignore[attr-defined]
    assert text["parameters"] == (
        "a wömän,\nsmiling\nNegative prompt: béard\nSteps: 40, Sampler: DPM++ 2M, CFG scale: 4.5, "
        "Seed: 9007199254740991, Size: 128x128, Model hash: 0123456789, Model: celeba128"
    )
    (description,) = ElementTree.fromstring(text["XML:com.adobe.xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    source = description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
    assert source == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert encode_png(face(), REQUEST, Model()) == data
    with Image.open(io.BytesIO(encode_png(face()))) as image:
        image.load()
        assert image.text == {}  # type: ignore[attr-defined]


# ---- strangers' pictures ---------------------------------------------------------------------------------------------


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


# which side of the picture the first stored row and the first stored column are: EXIF 2.3, tag 0x0112
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
ODD = {  # name: (file, the same picture without its oddity)
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
def test_spread_keeps_order_and_both_ends(num_items: int, most: int) -> None:
    items = range(num_items)
    kept = spread(items, most)
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


def test_messages_name_the_field_and_stay_printable() -> None:
    bad: list[Callable[[], object]] = [
        lambda: read_request(with_request(as_json(prompt="\ud800\x1b" * 999))),
        lambda: archive({"\x1b[2J" * 99: b""}),
        lambda: read_image(b"\x1b[2J\n\n\r\x07"),
    ]
    for call in bad:
        with pytest.raises(PictureError) as refused:
            call()
        assert re.fullmatch("[ -~]{10,200}", str(refused.value))
