"""Is every bad request refused by a problem that says what was wrong, and does the server go on serving?

One table: what is sent, which status it gets, which words must be in the sentence, which fields must be named. Each row
travels as raw bytes over a real socket to the real web server, so nothing on the way can tidy it up; a second table
holds what is not even HTTP. The answers must have the one shape of all problems, and after every row /health answers.
Images that look bad but are not (turned by EXIF, CMYK, sixteen bits) must be taken. Bombs must cost no memory.

What stands in the fields of a good answer is asked in `tests/test_api.py` and `test_contract.py`.

Long because a table of some five hundred attacks is, and because hostile files are made here, byte by byte, by the
side of the rows that send them.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import re
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api import MAX_STREAMS, THREADS
from core.engine import JobError
from core.imaging.file_sanitizer import MAX_PICTURE_BYTES
from core.imaging.image_io import read_image
from core.text.lexicon import ATTRIBUTES
from core.web.routes import latents
from tests.support.drawing import LATENT_SHAPE, DrawingRun
from tests.support.loopback import PATIENCE_S, Answer, HurriedEngine, Live, serving

HOST = b"Host: 127.0.0.1\r\n"
JSON = {"Content-Type": "application/json"}
NPY = {"Content-Type": "application/x-npy"}
PNG, JPEG, WEBP = ({"Content-Type": f"image/{kind}"} for kind in ("png", "jpeg", "webp"))
SECRET = re.compile(rb"Traceback|<html|site-packages|line \d+, in|0x[0-9a-f]{8}", re.IGNORECASE)


@dataclass(frozen=True)
class Bad:
    """A request and the problem that it must get: its status, words in its sentence, the fields that it names."""

    name: str
    method: str
    path: str
    status: int
    words: tuple[str, ...] = ()
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    pointers: tuple[str, ...] | None = None


# ---- fields of a generated image
# ---------------------------------------------------------------------------------------------


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def latent_of(value: float, shape: tuple[int, ...] = LATENT_SHAPE) -> str:
    return text_of(np.full(shape, value, "<f4").tobytes())


LATENT = latent_of(0.5)
INTEGER_8, INTEGER_1000 = "must be an integer from 1 to 8; got ", "must be an integer from 1 to 1000; got "
SEED, GUIDANCE = "must be an integer from 0 to 9007199254740991; got ", "must be a number from 0 to 20; got "
PROMPT, START = "must be a string of 0 to 500 characters; got ", "must be a number from 0 to 1; got "
LATENT_BYTES = "must be base64 of 64 bytes: float32 of shape [4, 2, 2]"
FINITE = "must hold finite numbers between -1000 and 1000"

FIELDS: list[tuple[str, Any, str]] = [  # one wrong field, and what is said about it
    ("prompt", None, PROMPT + "null"),
    ("prompt", 5, PROMPT + "5"),
    ("prompt", True, PROMPT + "true"),
    ("prompt", ["a"], PROMPT),
    ("prompt", {"text": "a"}, PROMPT),
    ("prompt", "x" * 501, PROMPT),
    ("prompt", "\U0001f600" * 501, PROMPT),
    ("prompt", "a\0b", "must not contain control characters"),
    ("prompt", "\x1b[31mred", "must not contain control characters"),
    ("prompt", "half a pair \ud800", "must be"),
    ("n_images", 0, INTEGER_8 + "0"),
    ("n_images", 9, INTEGER_8 + "9"),
    ("n_images", -1, INTEGER_8 + "-1"),
    ("n_images", 10**30, INTEGER_8),
    ("n_images", "4", INTEGER_8 + '"4"'),
    ("n_images", 2.5, INTEGER_8 + "2.5"),
    ("n_images", True, INTEGER_8 + "true"),
    ("n_images", None, INTEGER_8 + "null"),
    ("n_images", [1], INTEGER_8),
    ("num_images", 99, INTEGER_8 + "99"),
    ("n_inf_steps", 0, INTEGER_1000 + "0"),
    ("n_inf_steps", 1001, INTEGER_1000 + "1001"),
    ("n_inf_steps", -(2**63), INTEGER_1000),
    ("steps", {"a": 1}, INTEGER_1000),
    ("num_inference_steps", "50", INTEGER_1000),
    ("stream_freq", 0, INTEGER_1000 + "0"),
    ("stream_freq", 1001, INTEGER_1000 + "1001"),
    ("stream_freq", 1.0000001, INTEGER_1000),
    ("seed", -1, SEED + "-1"),
    ("seed", 2**53, SEED + str(2**53)),
    ("seed", 1.5, SEED + "1.5"),
    ("seed", "random", SEED),
    ("seed", False, SEED + "false"),
    ("guidance_scale", -0.1, GUIDANCE + "-0.1"),
    ("guidance_scale", 20.000001, GUIDANCE),
    ("guidance_scale", "3", GUIDANCE + '"3"'),
    ("guidance_scale", False, GUIDANCE + "false"),
    ("cfg_scale", 1e308, GUIDANCE),
    ("negative_prompt", "x" * 501, PROMPT),
    ("negative_prompt", None, PROMPT + "null"),
    ("negative_prompt", "\x07", "must not contain control characters"),
    ("sampler", "Brush", 'must be one of Pencil, DPM++ 2M, Sketch; got "Brush"'),
    ("sampler", "", "must be one of Pencil, DPM++ 2M"),
    ("sampler", "__import__('os').system('id')", "must be one of Pencil, DPM++ 2M"),
    ("sampler", 1, "must be a string; got 1"),
    ("sampler_name", "../Pencil", "must be one of Pencil, DPM++ 2M"),
    ("model", "../../secrets", "must be one of drawing"),
    ("model", "/etc/passwd", "must be one of drawing"),
    ("model", "drawing\0.bin", "must be one of drawing"),
    ("model", "..\\..\\drawing", "must be one of drawing"),
    ("model", "%2e%2e/drawing", "must be one of drawing"),
    ("model", "https://evil.example/model.bin", "must be one of drawing"),
    ("latent", "not base64!", LATENT_BYTES),
    ("latent", LATENT[:-4], LATENT_BYTES + "; got 63 bytes"),
    ("latent", LATENT[:-1] + "\n", LATENT_BYTES),
    ("latent", text_of(b"\xfb" * 64).replace("+", "-"), LATENT_BYTES),
    ("latent", latent_of(1.0, (4, 2, 3)), LATENT_BYTES + "; got 96 bytes"),
    ("latent", "", LATENT_BYTES + "; got 0 bytes"),
    ("latent", text_of(pickle.dumps(np.zeros(4))), LATENT_BYTES),
    ("latent", latent_of(float("nan")), FINITE),
    ("latent", latent_of(float("-inf")), FINITE),
    ("latent", latent_of(1e9), FINITE),
    ("latent", [LATENT], "must be one latent or a list of n_images = 4; got 1"),
    ("latent", [], "must be one latent or a list of n_images = 4; got 0"),
    ("latent", [LATENT] * 9, "must be one latent or a list of"),
    ("latent", 7, "must be"),
    ("latent", {"shape": [4, 2, 2]}, "must be"),
    ("start_timestep", 1.5, START + "1.5"),
    ("start_timestep", -0.5, START + "-0.5"),
    ("start_timestep", 0.5, "needs a latent to start from"),
    ("start_timestep", "0", START + '"0"'),
    ("init_image", "aGk=", "an image must be PNG, JPEG or WebP"),
    ("init_image", "", "from 1 to 8,388,608 are accepted"),
    ("init_image", ["aGk="], "must be a string"),
    ("init_image", "https://evil.example/face.png", "must be base64"),
    ("mask", "aGk=", "needs an init_image to change"),
    ("mask", "?", "must be base64"),
    ("strength", 0.5, "needs an init_image to change"),
    ("denoising_strength", 0.5, "needs an init_image to change"),
    ("denoising_strength", -0.1, START + "-0.1"),
    ("strength", "1", START + '"1"'),
    ("variation_strength", 1.5, START + "1.5"),
    ("variation_strength", None, START + "null"),
    ("variation_seed", -1, SEED + "-1"),
    ("variation_seed", 2**53, SEED),
    ("attributes", 1, "must be an object; got 1"),
    ("attributes", [["Smiling", 1]], "must be an object"),
    ("attributes", {"Grinning": 1}, 'has no attribute "Grinning"; see attributes at /options'),
    ("attributes", {"Eye_glasses": 1}, 'has no attribute "Eye_glasses"; did you mean Eyeglasses?'),
    ("attributes", {"": 0}, 'has no attribute ""'),
    ("attributes", {"Young": 1, "young": 1}, "names Young twice"),
    ("attributes", dict.fromkeys(ATTRIBUTES[:9], 1), "must name at most 8 attributes; got 9"),
    ("candidates", 3, "must be at least n_images = 4; got 3"),
    ("candidates", 33, "must be an integer from 1 to 32; got 33"),
    ("candidates", 0, "must be an integer from 1 to 32; got 0"),
    ("candidates", True, "must be an integer from 1 to 32; got true"),
    *(("guidance_interval", value, "must be two numbers from 0 to 1, in order; got")
      for value in ([0.6, 0.3], [0, 1.1], [-0.1, 1], [0.5], [0, 0.5, 1], [True, 1], ["0", 1], [None, 1], 0.5, {})),
    ("keep", 9, INTEGER_8 + "9"),
    ("balance", "yes", 'must be a boolean; got "yes"'),
    ("balance", 1, "must be a boolean; got 1"),
    ("balance", None, "must be a boolean; got null"),
    ("n_image", 2, "unknown field; did you mean n_images?"),
    ("__class__", "x", "unknown field"),
    ("x" * 2000, 1, "unknown field"),
    ("ключ", 1, "unknown field"),
]
NAMES = [("a/b", "#/a~1b"), ("~", "#/~0"), ("", "#/"), ("%", "#/%25"), ("a b", "#/a%20b"), ("\0", "#/%00")]  # RFC 6901

DRAW = "/text_to_image"
DRAWINGS = [
    *(Bad(f"field {number}: {name[:20]} = {value!r:.30}", "POST", DRAW, 422, (text,), {"prompt": "a face", name: value})
      for number, (name, value, text) in enumerate(FIELDS)),
    *(Bad(f"a field called {name!r}", "POST", DRAW, 422, ("unknown field",), {"prompt": "a face", name: 1},
          pointers=(pointer,)) for name, pointer in NAMES),
    Bad("no prompt", "POST", DRAW, 422, ("prompt: is required: a string of 0 to 500",), {}, pointers=("#/prompt",)),
    *(Bad(f"a slider at {value!r}", "POST", DRAW, 422, ("must be a number from -2 to 2",),
          {"prompt": "a", "attributes": {"smiling": value}}, pointers=("#/attributes/smiling",))
      for value in (2.01, -3, 1e308, "1", True, None, [1])),
    Bad("a slider at NaN", "POST", DRAW, 400, ("not JSON",), b'{"prompt": "a", "attributes": {"Smiling": NaN}}', JSON),
    Bad("a slider at 1e999", "POST", DRAW, 422, ("must be a number from -2 to 2",),
        b'{"prompt": "a", "attributes": {"Smiling": 1e999}}', JSON, pointers=("#/attributes/Smiling",)),
    *(Bad(f"{name} with {other}", "POST", DRAW, 422, ("together with",),
          {"prompt": "a", "n_images": 2, name: value, other: given}, pointers=(f"#/{name}",))
      for name, value, other, given in (
          ("candidates", 4, "latent", [LATENT] * 2), ("candidates", 4, "interpolate_to", {"seed": 1}),
          ("balance", True, "interpolate_to", {"seed": 1}))),
    Bad("the third latent", "POST", DRAW, 422, (LATENT_BYTES,),
        {"prompt": "a", "latent": [LATENT, LATENT, "?", LATENT]}, pointers=("#/latent/2",)),
    Bad("two names of one field", "POST", DRAW, 422, ("num_images: is another name of n_images",),
        {"prompt": "a", "n_images": 2, "num_images": 3}, pointers=("#/num_images",)),
    Bad("everything wrong", "POST", DRAW, 422, ("from 1 to 8", "from 1 to 1000", "one of", "unknown"),
        {"steps": 0, "n_images": 9, "sampler": "x", "mask": "?", "z": 1},
        pointers=("#/steps", "#/n_images", "#/sampler", "#/mask", "#/z", "#/prompt")),
    Bad("half a pair as a name", "POST", DRAW, 422, (), b'{"prompt": "a", "\\ud800": 1}', JSON),
    Bad("a hundred thousand names", "POST", DRAW, 422, ("unknown field",),
        {"prompt": "a"} | {str(number): 1 for number in range(60_000)}),
    Bad("infinity by overflow", "POST", DRAW, 422, (GUIDANCE,), b'{"prompt": "a", "guidance_scale": 1e999}', JSON,
        pointers=("#/guidance_scale",)),
]


# ---- bodies that are no JSON -----------------------------------------------------------------------------------------

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BODIES = [
    Bad(name, "POST", DRAW, status, words, body, headers, pointers=pointers)
    for name, body, headers, status, words, pointers in [
        ("nothing", b"", JSON, 400, ("not JSON",), None),
        ("white space", b" \n ", JSON, 400, ("not JSON",), None),
        ("no JSON", b"prompt=a", JSON, 400, ("not JSON",), None),
        ("cut short", b'{"prompt": "a', JSON, 400, ("not JSON",), None),
        ("two documents", b'{"prompt": "a"}{"prompt": "b"}', JSON, 400, ("not JSON",), None),
        ("single quotes", b"{'prompt': 'a'}", JSON, 400, ("not JSON",), None),
        ("a comment", b'{"prompt": "a" /* sic */}', JSON, 400, ("not JSON",), None),
        ("a comma too many", b'{"prompt": "a",}', JSON, 400, ("not JSON",), None),
        ("NaN", b'{"prompt": "a", "guidance_scale": NaN}', JSON, 400, ("NaN",), None),
        ("Infinity", b'{"prompt": "a", "guidance_scale": Infinity}', JSON, 400, ("Infinity",), None),
        ("minus Infinity", b'{"prompt": "a", "seed": -Infinity}', JSON, 400, ("Infinity",), None),
        ("endless digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", JSON, 400, (), None),
        ("a name twice", b'{"prompt": "a", "seed": 1, "seed": 2}', JSON, 400, ("twice", "seed"), None),
        ("a name twice, deep inside", b'{"prompt": "a", "mask": {"a": 1, "a": 1}}', JSON, 400, ("twice",), None),
        ("the last of many names twice", b'{"prompt": "a", ' + b", ".join(
            b'"%d": 1' % number for number in (*range(70_000), 69_999)) + b"}", JSON, 400, ("twice", "69999"), None),
        ("deep lists", b"[" * 100_000, JSON, 400, (), None),
        ("deep objects", b'{"a":' * 100_000, JSON, 400, (), None),
        ("deep and closed", b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", JSON, 400, (), None),
        ("a raw control character", b'{"prompt": "a\nb"}', JSON, 400, ("not JSON", "tr -d '\\n'"), None),
        ("not UTF-8", b'{"prompt": "\xff\xfe"}', JSON, 400, (), None),
        ("overlong UTF-8", b'{"prompt": "\xc0\xaf"}', JSON, 400, (), None),
        ("UTF-16", '{"prompt": "a"}'.encode("utf-16"), JSON, 400, (), None),
        ("a byte order mark", b'\xef\xbb\xbf{"prompt": "a"}', JSON, 400, (), None),
        ("a pickle", pickle.dumps({"prompt": "a"}), JSON, 400, (), None),
        ("zipped", gzip.compress(b'{"prompt": "a"}'), JSON | {"Content-Encoding": "gzip"}, 415, ("Encoding",), None),
        ("a zipped bomb", gzip.compress(bytes(2**26)), JSON | {"Content-Encoding": "gzip"}, 415, ("Encoding",), None),
        ("a list", b"[]", JSON, 422, ("must be a JSON object; got []",), ("#",)),
        ("a string", b'"prompt"', JSON, 422, ("must be a JSON object",), ("#",)),
        ("a number", b"1", JSON, 422, ("must be a JSON object; got 1",), ("#",)),
        ("null", b"null", JSON, 422, ("must be a JSON object; got null",), ("#",)),
        ("a megabyte", b'{"prompt": "' + b"a" * 2**20 + b'"}', JSON, 413, ("1048576 bytes beside images",), None),
        ("ten megabytes", b" " * (10 * 2**20), JSON, 413, ("1048576 bytes beside images",), None),
        ("fourteen megabytes", b" " * (14 * 2**20), JSON, 413, ("bytes",), None),
        ("a million names", b'{"prompt": "a", "mask": "", ' + b", ".join(
            b'"%d": 1' % number for number in range(10**6)) + b"}", JSON, 413, ("beside images",), None),
        ("a form", b"prompt=a", FORM, 415, ("application/json", "x-www-form-urlencoded"), None),
        ("a form with files", b"--a\r\n\r\n--a--", {"Content-Type": "multipart/form-data; boundary=a"}, 415,
         ("application/json",), None),
        ("plain text, which needs no preflight", b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415,
         ("application/json", "text/plain"), None),
        ("JSON's cousin", b'{"prompt": "a"}', {"Content-Type": "application/vnd.api+json"}, 415, (), None),
        ("no type", b'{"prompt": "a"}', {}, 415, ("application/json", "none"), None),
        ("a type that is none", b'{"prompt": "a"}', {"Content-Type": "application/json/../../x;;="}, 415, (), None),
        ("a pickle by name", pickle.dumps({}), {"Content-Type": "application/octet-stream"}, 415, (), None),
    ]
]
ANALYZE = "/prompt/analyze"
BODIES += [
    Bad("analyze nothing", "POST", ANALYZE, 422, ("is required",), {}, pointers=("#/prompt",)),
    Bad("analyze a number", "POST", ANALYZE, 422, (PROMPT + "1",), {"prompt": 1}, pointers=("#/prompt",)),
    Bad("analyze a novel", "POST", ANALYZE, 422, (PROMPT,), {"prompt": "x" * 501}, pointers=("#/prompt",)),
    Bad("analyze more", "POST", ANALYZE, 422, ("unknown",), {"prompt": "a", "seed": 1}, pointers=("#/seed",)),
    Bad("analyze text", "POST", ANALYZE, 415, ("application/json",), b"a", {"Content-Type": "text/plain"}),
]


# ---- images --------------------------------------------------------------------------------------------------------


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 40), mode: str = "RGB", **options: Any) -> bytes:
    """A file that any viewer shows."""
    shades = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1]).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shades).convert(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), name) + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, data: bytes = b"", *more: bytes) -> bytes:
    """A grey PNG whose header says this size, whatever its data hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated(num_bytes: int) -> bytes:
    """So many zeros (whole megabytes), compressed a thousandfold: one block again and again. RFC 1950, RFC 1951."""
    squeezer = zlib.compressobj(9, wbits=-15)
    block = squeezer.compress(bytes(2**20)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    checksum = num_bytes % 65521 << 16 | 1
    return b"\x78\xda" + block * (num_bytes >> 20) + b"\x03\0" + struct.pack(">I", checksum)


def with_text(keyword: str, packed: bytes, *, zipped: bool = True) -> bytes:
    """A small PNG with one text chunk."""
    body = keyword.encode() + (b"\0\0" if zipped else b"\0") + packed
    return png(4, 4, zlib.compress(bytes(20)), chunk(b"zTXt" if zipped else b"tEXt", body))


def says(text: str) -> bytes:
    """A small PNG that claims to have been generated by this request."""
    return with_text("text_to_image", text.encode(), zipped=False)


GOOD_PNG, GOOD_JPEG, GOOD_WEBP = picture(), picture("JPEG"), picture("WEBP")
DAMAGED_PNG = bytearray(GOOD_PNG)
DAMAGED_PNG[len(DAMAGED_PNG) // 2] ^= 0xFF
HUGE_JPEG = GOOD_JPEG.replace(b"\xff\xc0\x00\x11\x08\x00\x28\x00\x28", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff")
HUGE_WEBP = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00" * 4 + b"\xff" * 6
SIZES = "50,000,000"
BOMBS = {
    "PNG of ten gigapixels": png(100_000, 100_000, deflated(2**20)),
    "PNG with the largest numbers": png(2**31 - 1, 2**31 - 1, b"x"),
    "PNG just too large": png(50_000_001, 1, deflated(2**26)),
    "JPEG of four gigapixels": HUGE_JPEG,
    "WebP of the largest size": HUGE_WEBP,
}
NO_PICTURES = {
    "nothing": b"",
    "text": b"hello",
    "HTML": b"<!doctype html><script>alert(1)</script>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "GIF": picture("GIF", mode="P"),
    "BMP": picture("BMP"),
    "TIFF": picture("TIFF"),
    "PDF": b"%PDF-1.7\n",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a pickle": pickle.dumps(np.zeros(4)),
    "a latent": np.zeros(LATENT_SHAPE, "<f4").tobytes(),
    "a signature alone": GOOD_PNG[:8],
    "PNG without data": png(4, 4),
    "PNG of no size": png(0, 4, zlib.compress(b"")),
    "PNG with too little data": png(40, 40, zlib.compress(bytes(100))),
    "PNG with a wrong checksum": bytes(DAMAGED_PNG),
    "PNG with a chunk of four gigabytes": GOOD_PNG[:33] + b"\xff\xff\xff\xffIDATx",
    "JPEG without an end": GOOD_JPEG[:-2],
    "JPEG of nothing": b"\xff\xd8\xff\xd9",
    "WebP of nothing": b"RIFF\x04\0\0\0WEBP",
    "RIFF that is a sound": b"RIFF\x24\0\0\0WAVEfmt ",
}
ENCODE, INSPECT, DECODE = "/encode", "/inspect", "/decode"
CUTS = (0.1, 0.5, 0.9, 0.99)
PICTURES = [
    *(Bad(f"a bomb: {name}", "POST", ENCODE, 422, (SIZES,), {"image": text_of(data)}, pointers=("#/image",))
      for name, data in BOMBS.items()),
    *(Bad(f"as a file: {name}", "POST", ENCODE, 422, (SIZES,), data, PNG, pointers=("#",))
      for name, data in BOMBS.items()),
    *(Bad(f"no image: {name}", "POST", ENCODE, 422, (), {"image": text_of(data)}, pointers=("#/image",))
      for name, data in NO_PICTURES.items()),
    *(Bad(f"{round(share * 100)} % of a {kind}", "POST", ENCODE, 422, (), data[: int(len(data) * share)], headers)
      for kind, data, headers in (("PNG", GOOD_PNG, PNG), ("JPEG", GOOD_JPEG, JPEG), ("WebP", GOOD_WEBP, WEBP))
      for share in CUTS),
    *(Bad(f"an image that is {name}", "POST", ENCODE, 422, (words,), {"image": value}, pointers=("#/image",))
      for name, words, value in (
          ("null", "must be a string", None), ("a number", "must be a string", 7),
          ("a list", "must be a string", ["a"]), ("no base64", "must be base64", "???"),
          ("cut short", "its end is missing", text_of(GOOD_PNG)[:-1]),
          ("two in one", "something follows its end", 2 * base64.b64encode(GOOD_PNG + bytes(-len(GOOD_PNG) % 3 + 1)
                                                                           ).decode()),
          ("for addresses", "write + for -", "ab-_" + text_of(GOOD_PNG)), ("no letter", 'character 2 is "?"', "a?b="),
          ("an address with data", "up to the comma", f"data:image/png;base64,{text_of(GOOD_PNG)}"),
          ("an address of the cloud", "not followed", "http://169.254.169.254/latest/meta-data/"),
          ("an address of a file", "must be base64", "file:///etc/passwd"), ("a path", "", "/etc/passwd"),
          ("a path upwards", "must be base64", "../../api.py"),
      )),
    Bad("no image", "POST", ENCODE, 422, ("is required",), {}, pointers=("#/image",)),
    Bad("an image and a size", "POST", ENCODE, 422, ("unknown",), {"image": text_of(GOOD_PNG), "size": 9},
        pointers=("#/size",)),
    Bad("too many bytes as a file", "POST", ENCODE, 413, (str(MAX_PICTURE_BYTES),), bytes(MAX_PICTURE_BYTES + 1), PNG),
    Bad("too many bytes in JSON", "POST", ENCODE, 413, ("bytes",), {"image": "A" * (12 * 2**20)}),
    Bad("a GIF by name", "POST", ENCODE, 415, ("image/png", "image/gif"), b"GIF89a", {"Content-Type": "image/gif"}),
    Bad("an SVG by name", "POST", ENCODE, 415, ("image/png",), b"<svg/>", {"Content-Type": "image/svg+xml"}),
    Bad("a picture without a type", "POST", ENCODE, 415, ("image/png", "none"), GOOD_PNG),
    Bad("a picture as a form", "POST", ENCODE, 415, ("image/png",), GOOD_PNG, FORM),
    Bad("a picture called JSON", "POST", ENCODE, 400, ("JSON",), GOOD_PNG, JSON),
    Bad("inspect half a JPEG", "POST", INSPECT, 422, ("cut off",), GOOD_JPEG[:-20], JPEG, pointers=("#",)),
    Bad("inspect a GIF", "POST", INSPECT, 422, ("GIF",), b"GIF89a" + bytes(20), PNG, pointers=("#",)),
    Bad("inspect a GIF by name", "POST", INSPECT, 415, ("image/png",), b"GIF89a", {"Content-Type": "image/gif"}),
    Bad("inspect half a PNG", "POST", INSPECT, 422, ("cut off",), GOOD_PNG[:-20], PNG),
    Bad("inspect nothing", "POST", INSPECT, 422, ("bytes",), b"", PNG),
    *(Bad(f"inspect {name}", "POST", INSPECT, 422, (words,), {"image": text_of(data)}, pointers=("#/image",))
      for name, words, data in (
          ("a text of a gigabyte", "longer than", with_text("text_to_image", deflated(2**30))),
          ("a text that is cut off", "cannot be read", with_text("text_to_image", zlib.compress(b"{}")[:-6])),
          ("no JSON", "not JSON", says("__import__('os')")),
          ("a list", "must hold a request", says("[]")),
          ("a request that is none", "must hold a request", says('{"request": 1, "model_hash": ""}')),
          ("a name twice", "twice", says('{"request": {}, "request": {}, "model_hash": ""}')),
          ("NaN", "finite", says('{"request": {"seed": NaN}, "model_hash": ""}')),
          ("endless digits", "characters", says('{"request": {"seed": ' + "9" * 5000 + '}, "model_hash": ""}')),
          ("deep nesting", "JSON", says("[" * 100_000)),
          ("an unknown field", "exec", says(
              '{"request": {"prompt": "", "negative_prompt": "", "n_inf_steps": 1, "sampler": "x", '
              '"guidance_scale": 1, "seed": 1, "exec": "id"}, "model_hash": ""}')),
      )),
]


# ---- latents ---------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_saying(header: str, data: bytes = bytes(64), version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file with any header."""
    text = header.encode("latin-1") + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def header(kind: str = "'<f4'", order: str = "False", shape: str = "(4, 2, 2)") -> str:
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}}}"


ZEROS = np.zeros(LATENT_SHAPE, "<f4")
GOOD_NPY = npy(ZEROS)
BAD_NPY = {
    "nothing": b"",
    "an image": GOOD_PNG,
    "raw numbers": ZEROS.tobytes(),
    "a pickle": pickle.dumps(ZEROS),
    "objects, which are pickled": npy(np.array([{"a": 1}], object), allow_pickle=True),
    "a zip of arrays": b"PK\x03\x04" + bytes(100),
    "float64": npy(ZEROS.astype(np.float64)),
    "float16": npy(ZEROS.astype(np.float16)),
    "integers": npy(ZEROS.astype(np.int32)),
    "big-endian": npy(ZEROS.astype(">f4")),
    "Fortran order": npy(np.asfortranarray(np.ones((4, 2, 2), "<f4"))),
    "one axis too many": npy(ZEROS[None]),
    "one axis too few": npy(ZEROS[0]),
    "flat": npy(ZEROS.ravel()),
    "another size": npy(np.zeros((4, 2, 3), "<f4")),
    "a structure": npy(np.zeros(LATENT_SHAPE, [("a", "<f4")])),
    "cut off": GOOD_NPY[:-1],
    "too long": GOOD_NPY + b"\0",
    "a cut-off header": GOOD_NPY[:40],
    "a signature alone": GOOD_NPY[:6],
    "version 3": GOOD_NPY[:6] + b"\x03\0" + GOOD_NPY[8:],
    "version 255": GOOD_NPY[:6] + b"\xff\xff" + GOOD_NPY[8:],
    "a header of four gigabytes": b"\x93NUMPY\x02\0\xff\xff\xff\xff" + header().encode(),
    "a header of 64 kilobytes": npy_saying(header() + " " * 60_000),
    "terabytes by its header": npy_saying(header(shape="(1099511627776, 2, 2)")),
    "negative sizes": npy_saying(header(shape="(-4, -2, 2)")),
    "sizes that are no numbers": npy_saying(header(shape="('4', 2, 2)")),
    "sizes that are true": npy_saying(header(shape="(4, True, 2)")),
    "a call in its header": npy_saying(header(shape="__import__('os').system('id')")),
    "objects by its header": npy_saying(header("'|O'")),
    "a nested type": npy_saying(header("[('a', [('b', '<f4', (2, 2))])]")),
    "a type that is none": npy_saying(header("'<f5'")),
    "a type of terabytes": npy_saying(header("'|V2147483647'")),
    "types without end": npy_saying(header("[()]")),
    "deep brackets": npy_saying("(" * 900),
    "deep signs": npy_saying("-" * 900 + "1"),
    "no dictionary": npy_saying("[1, 2, 3]"),
    "an empty dictionary": npy_saying("{}"),
    "a member too many": npy_saying(header()[:-1] + ", 'x': 1}"),
    "an unhashable key": npy_saying("{[]: 1}"),
    "a NUL in its header": npy_saying("\0" + header()),
    "NaN": npy(np.full(LATENT_SHAPE, np.nan, "<f4")),
    "infinity": npy(np.full(LATENT_SHAPE, np.inf, "<f4")),
    "numbers too large": npy(np.full(LATENT_SHAPE, 1001, "<f4")),
}
LATENTS = [
    *(Bad(f"npy: {name}", "POST", DECODE, 422, ("must",), data, NPY, pointers=("#",))
      for name, data in BAD_NPY.items()),
    *(Bad(f"a latent that is {name}", "POST", DECODE, 422, (words,), {"latent": value}, pointers=("#/latent",))
      for name, words, value in (
          ("null", "must be a string", None), ("a number", "must be a string", 1),
          ("a list", "must be a string", [LATENT]), ("no base64", LATENT_BYTES, "?"),
          ("a .npy file", LATENT_BYTES, text_of(GOOD_NPY)),
          ("too short", LATENT_BYTES, LATENT[:-4]), ("NaN", FINITE, latent_of(float("nan"))),
          ("too large", FINITE, latent_of(-1e30)),
      )),
    Bad("no latent", "POST", DECODE, 422, ("is required",), {}, pointers=("#/latent",)),
    Bad("a latent and a model", "POST", DECODE, 422, ("unknown",), {"latent": LATENT, "model": "x"},
        pointers=("#/model",)),
    Bad("a latent of two megabytes", "POST", DECODE, 413, ("1048576",), bytes(2**21), NPY),
    Bad("a latent as bytes", "POST", DECODE, 415, ("application/x-npy",), ZEROS.tobytes(),
        {"Content-Type": "application/octet-stream"}),
    Bad("a latent as a picture", "POST", DECODE, 415, ("application/x-npy",), GOOD_PNG, PNG),
]


# ---- queries, paths, methods, headers --------------------------------------------------------------------------------
# {done} is a job that succeeded, {failed} one without an image, {deleted} one that is gone

LIMIT = "must be an integer from 1 to 200; got "
STATES = "queued, running, succeeded, failed, cancelled"
QUERIES = [
    Bad(f"{path}?{query}", "GET", f"{path}?{query}", 422, (words,), pointers=(f"?{query.partition('=')[0]}",))
    for path, query, words in [
        *(("/jobs/", f"limit={value}", LIMIT) for value in
          ("0", "201", "-1", "x", "1.5", "", "1e2", "%2B5", "0x10", "9" * 40, "%D9%A3", "1&limit=2")),
        *(("/jobs/", f"cursor={value}", "cursor") for value in
          ("", "0", "x" * 12, "A" * 13, "../../etc", "%00", "A" * 5000, "AAAAAAAAAAA%3D", "1%20OR%201=1")),
        *(("/jobs/", f"status={value}", STATES) for value in ("done", "", "Running", "queued;drop", "%ff")),
        *(("/jobs/", f"q={value}", "") for value in ("", "x" * 201, "a%00b", "%1b", "a&q=b")),
        ("/jobs/", "page=2", "unknown"),
        ("/jobs/", "Limit=2", "unknown"),
        *(("/jobs/{done}/", f"include={value}", "none, preview, full") for value in
          ("all", "", "FULL", "none&include=full")),
        ("/jobs/{done}/", "format=xml", "unknown"),
        *(("/jobs/{done}/events", f"after={value}", "from 0 to 999999999") for value in
          ("-1", "x", "1.5", "9" * 10, "")),
        *(("/prompt/surprise", f"seed={value}", SEED) for value in ("-1", "x", str(2**53), "")),
        ("/session", "key=" + "x" * 501, "0 to 500 characters"),
        ("/session", "token=x", "unknown"),
    ]
]
ID = "a-face-" + "0" * 32
JOB_PATHS = ("", "events", "images/0.png", "images/0.webp", "collage.png", "archive.zip")
PATHS = [
    *(Bad(f"GET {path:.60}", "GET", path, 404) for path in (
        "/nothing", "/jobs/never-existed/", f"/jobs/{ID}/", "/jobs/../../etc/passwd", "/jobs/..%2f..%2fetc%2fpasswd/",
        "/jobs/%2e%2e/", "/jobs/%00/", f"/jobs/{ID}%00/", "/jobs/%2fetc%2fpasswd/", "/jobs/C:%5Cwindows/",
        f"/jobs/{'a' * 20_000}/", "/jobs/%ff%fe/", "/jobs/%D9%A3/", f"/jobs/{ID.upper()}/", "/jobs/'%20OR%201=1--/",
        "/jobs/{done}%20/", "/jobs/{done}/nothing", "/jobs/{done}/../../health",
        "/jobs/{done}/images/1.png", "/jobs/{done}/images/-1.png", "/jobs/{done}/images/x.png",
        "/jobs/{done}/images/0.jpg", "/jobs/{done}/images/0.f32", "/jobs/{done}/images/0.png.png",
        f"/jobs/{{done}}/images/{'9' * 400}.png", "/jobs/{done}/images/0%00.png", "/jobs/{done}/images/",
        "/jobs/{done}/images/..%2f..%2fjobs.sqlite", "/jobs/{failed}/images/0.png", "/jobs/{failed}/images/0.webp",
        "/static/", "/static/none.js", "/static/../api.py", "/static/..%2fapi.py", "/static/%2e%2e%2fapi.py",
        "/static/%2e%2e/api.py", "/static/....//api.py", "/static/api.py", "/static/..%5capi.js", "/static/.hidden.js",
        "/static/app.js%00.css", "/static/%00.js", "/static//etc/passwd", "/static/sub/app.js", "/static/app.JS",
        "/.git/config", "/data/", "/api.py", "//evil.example/", "/text_to_image/../health", "/%2e%2e/api.py",
        "/openapi.yaml", "/favicon.ico%00", "/%", "/%zz",
    )),
    *(Bad(f"{method} of no job: {path}", method, f"/jobs/{ID}/{path}", 404, ("There is no job",))
      for method, path in (("DELETE", ""), ("POST", "cancel"), *(("GET", path) for path in JOB_PATHS))),
    *(Bad(f"{method} of a deleted job: {path}", method, f"/jobs/{{deleted}}/{path}", 410, ("deleted",))
      for method, path in (("DELETE", ""), ("POST", "cancel"), *(("GET", path) for path in JOB_PATHS))),
    *(Bad(f"too early: {path}", "GET", f"/jobs/{{failed}}/{path}", 409, ("failed",))
      for path in ("collage.png", "archive.zip")),
    *(Bad(f"{method} {path}", method, path, 405, ("method",)) for method, path in (
        ("GET", DRAW), ("PUT", DRAW), ("DELETE", DRAW), ("PATCH", DRAW), ("POST", "/"), ("DELETE", "/"),
        ("POST", "/jobs/"), ("DELETE", "/jobs/"), ("PUT", "/jobs/{done}/"), ("POST", "/jobs/{done}/"),
        ("GET", "/jobs/{done}/cancel"), ("POST", "/jobs/{done}/events"), ("POST", "/health"), ("POST", "/options"),
        ("GET", DECODE), ("PUT", ENCODE), ("GET", INSPECT), ("POST", "/static/app.js"), ("TRACE", "/health"),
        ("CONNECT", "/health"), ("BREW", "/health"), ("QUERY", "/jobs/"),
    )),
]
FACE = {"prompt": "a face"}
HEADERS = [
    *(Bad(f"Origin: {origin}", "POST", DRAW, 403, ("web page",), FACE, {"Origin": origin}) for origin in (
        "https://evil.example", "null", "http://localhost:8000", "http://127.0.0.1", "http://[", "file://",
        "http://127.0.0.1.evil.example", "https://localhost.evil.example", "http://evil.example@127.0.0.1:1", "*",
        "javascript:alert(1)",
    )),
    *(Bad(f"Host: {host}", "POST", DRAW, 403, ("host",), FACE, {"Host": host}) for host in (
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "10.0.0.1", "0.0.0.0",
        "evil.example:5001", "localhost@evil.example", "2130706433", "0x7f.1", "[::ffff:10.0.0.1]", "x" * 3000,
    )),
    *(Bad(f"Last-Event-ID: {number!r:.30}", "GET", "/jobs/{done}/events", 400, ("Last-Event-ID",),
          headers={"Last-Event-ID": number})
      for number in ("-1", "one", "1.5", "1e3", "9" * 10, "0x1", "1 2", "\u0663", "../1", "%31", " ")),
    *(Bad(f"Idempotency-Key: {key!r:.30}", "POST", DRAW, 400, ("Idempotency-Key", "1 to 200"), FACE,
          {"Idempotency-Key": key}) for key in ("x" * 201, "two words", "schlüssel", "tab\there")),
    *(Bad(f"X-Client-Id: {name!r:.30}", "POST", DRAW, 400, ("X-Client-Id", "1 to 64"), FACE, {"X-Client-Id": name})
      for name in ("x" * 65, "two words", "ich bin ü")),
    Bad("a key for two requests", "POST", DRAW, 422, ("Idempotency-Key",), {"prompt": "another face"},
        {"Idempotency-Key": "used"}, pointers=("Idempotency-Key",)),
    Bad("a foreign page asks before it asks", "OPTIONS", DRAW, 403, ("web page",),
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}),
]

GROUPS = {"drawings": DRAWINGS, "bodies": BODIES, "pictures": PICTURES, "latents": LATENTS, "queries": QUERIES,
          "paths": PATHS, "headers": HEADERS}
TABLE = [row for group in GROUPS.values() for row in group]


# ---- the server ------------------------------------------------------------------------------------------------------


class MoodyEngine(HurriedEngine):
    """Cannot generate what is called impossible."""

    def step(self, runs: Sequence[DrawingRun]) -> None:
        super().step(runs)
        for run in runs:
            if run.asked.prompt == "impossible":
                run.error = JobError("not_finite", "No image came out.", "Ask for something else.")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(MoodyEngine()) as found:
        yield found


@pytest.fixture(scope="module")
def jobs(live: Live) -> dict[str, str]:
    """One job of each kind that paths speak of, and one whose key is used."""
    found = {"done": live.draw(), "failed": live.draw(prompt="impossible"), "deleted": live.draw()}
    assert [job["status"] for job in found.values()] == ["succeeded", "failed", "succeeded"]
    assert live.ask("DELETE", f"/jobs/{found['deleted']['job_id']}/").status == 204
    assert live.ask("POST", DRAW, FACE, {"Idempotency-Key": "used"}).status == 200
    return {name: job["job_id"] for name, job in found.items()}


def check_problem(answer: Answer, status: int) -> dict[str, Any]:
    """The answer is this problem, in the one shape that all problems have, and gives nothing away."""
    assert answer.status == status, (answer.status, answer.body[:500])
    headers = {name.lower(): text for name, text in answer.headers.items()}
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert (status != 405) or headers["allow"]
    assert SECRET.search(answer.body) is None, answer.body
    body: dict[str, Any] = json.loads(answer.body.decode())
    assert set(body) - {"errors", "state"} == {"type", "title", "status", "detail", "error"}
    assert (body["type"], body["status"], body["title"]) == ("about:blank", status, HTTPStatus(status).phrase)
    assert isinstance(body["detail"], str) and body["detail"] == body["error"] != ""
    assert len(answer.body) < 10_000
    for error in body.get("errors", ()):
        assert set(error) == {"pointer", "message"} and error["message"] in body["detail"]
    return body


def still_serves(live: Live) -> None:
    answer = live.ask("GET", "/health")
    assert (answer.status, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_a_bad_request_gets_its_problem(live: Live, jobs: dict[str, str], row: Bad) -> None:
    path = re.sub(r"\{(\w+)\}", lambda found: jobs[found[1]], row.path)
    body = check_problem(live.ask(row.method, path, row.body, row.headers), row.status)
    for words in row.words:
        assert words in body["detail"], body["detail"]
    named = tuple(error["pointer"] for error in body.get("errors", ()))
    if row.pointers is not None:
        assert sorted(named) == sorted(row.pointers)
    assert (row.status == 422) == bool(named)
    still_serves(live)


def test_the_table_is_long_and_its_rows_differ() -> None:
    assert len(TABLE) >= 300
    names = [row.name for row in TABLE]
    assert sorted(names) == sorted(set(names))
    assert {row.status for row in TABLE} == {400, 403, 404, 405, 409, 410, 413, 415, 422}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_after_all_that_a_job_is_drawn(live: Live, jobs: dict[str, str], group: list[Bad]) -> None:
    """Each group once more, all at once; then a job, and nothing of what was refused has become one."""
    before = live.ask("GET", "/ready").json()["jobs"]
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(
            lambda row: live.ask(
                row.method, re.sub(r"\{(\w+)\}", lambda found: jobs[found[1]], row.path), row.body, row.headers
            ).status,
            group,
        ))
    assert statuses == [row.status for row in group]
    assert live.draw()["status"] == "succeeded"
    assert live.ask("GET", "/ready").json()["jobs"] == {**before, "finished": before["finished"] + 1}


# ---- what only looks bad ---------------------------------------------------------------------------------------------


def turned(orientation: int) -> bytes:
    """A photograph as a phone stores it: the sensor's pixels, and how to turn them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    upright = Image.open(io.BytesIO(picture("PNG", (48, 32))))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright.transpose(back[orientation]).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


LOOKS_BAD = {
    "turned left": turned(6),
    "turned right": turned(8),
    "upside down": turned(3),
    "CMYK": picture("JPEG", mode="CMYK"),
    "progressive": picture("JPEG", progressive=True),
    "grey": picture("JPEG", mode="L"),
    "a palette": picture(mode="P"),
    "one bit": picture(mode="1"),
    "sixteen bits": picture(mode="I;16"),
    "transparent": picture(mode="RGBA"),
    "grey and transparent": picture(mode="LA"),
    "one pixel": picture(size=(1, 1)),
    "a thread": picture(size=(1, 3000)),
    "lossless": picture("WEBP", lossless=True),
    "a film": animated("WEBP"),
    "a film in PNG": animated("PNG"),
    "a text of a gigabyte": with_text("Comment", deflated(2**30)),
    "more data than pixels": png(16, 16, deflated(2**28)),
}


@pytest.mark.parametrize("name", LOOKS_BAD)
@pytest.mark.parametrize("wrapped", [False, True], ids=["file", "JSON"])
def test_pictures_that_only_look_bad_are_taken(live: Live, name: str, wrapped: bool) -> None:
    """As a file they all say to be PNG: their content counts."""
    data = LOOKS_BAD[name]
    answer = live.ask("POST", ENCODE, {"image": text_of(data)}) if wrapped else live.ask("POST", ENCODE, data, PNG)
    assert answer.status == 200, answer
    body = answer.json()
    latent = np.frombuffer(base64.b64decode(body["latent"]), "<f4")
    assert (body["shape"], latent.size) == (list(LATENT_SHAPE), np.prod(LATENT_SHAPE)) and np.isfinite(latent).all()


def test_a_turned_photograph_is_turned_back(live: Live) -> None:
    def encoded(data: bytes) -> np.ndarray:
        return np.frombuffer(base64.b64decode(live.ask("POST", ENCODE, data, JPEG).json()["latent"]), "<f4")

    upright = encoded(picture("PNG", (48, 32)))
    for orientation in (3, 6, 8):
        assert np.abs(encoded(turned(orientation)) - upright).max() < 0.03
    assert np.abs(upright - upright[::-1]).max() > 0.5, "turning it would be seen"


def test_a_whole_number_with_a_point_is_an_integer(live: Live) -> None:
    """JSON Schema says so, and in some languages all numbers have one."""
    answer = live.ask("POST", DRAW, b'{"prompt": "a", "n_images": 2.0, "seed": 9007199254740991.0, "steps": 1e1}', JSON)
    assert answer.status == 200, answer
    found = answer.json()["parameters"]
    assert [json.dumps(found[name]) for name in ("n_images", "seed", "n_inf_steps")] == ["2", "9007199254740991", "10"]


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_mb() -> float:
    """The most memory this process has used since it was last asked, in MB; Linux alone can tell."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells the peak of a while")
def test_bombs_cost_no_memory(live: Live) -> None:
    """What is refused is refused before it is unpacked; what is taken is not unpacked further than it says."""
    bombs = [*BOMBS.values(), with_text("text_to_image", deflated(2**30)), with_text("Comment", deflated(2**30)),
             png(16, 16, deflated(2**28))]
    deep = [b"[" * 10**6, b'{"a":' * 200_000, gzip.compress(bytes(2**26))]
    peak_mb()
    before = peak_mb()
    for data in bombs:
        for path in (ENCODE, INSPECT):
            assert live.ask("POST", path, data, PNG).status in (200, 422)
            assert live.ask("POST", path, {"image": text_of(data)}).status in (200, 422)
    for data in deep:
        assert live.ask("POST", DRAW, data, JSON).status == 400
    for data in BAD_NPY.values():
        assert live.ask("POST", DECODE, data, NPY).status == 422
    assert peak_mb() - before < 100
    still_serves(live)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells the peak of a while")
def test_the_largest_pictures_take_turns(live: Live) -> None:
    """Twenty-five million pixels in 25 kilobytes are allowed; many at once must not need many times the memory."""
    data = png(5000, 5000, deflated(25 * 2**20))
    peak_mb()
    before = peak_mb()
    assert live.ask("POST", ENCODE, data, PNG).status == 200
    alone = peak_mb() - before
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: live.ask("POST", ENCODE, data, PNG).status, range(4)))
    assert set(statuses) <= {200, 429, 503} and 200 in statuses
    together = peak_mb() - before
    assert together < 2 * alone + 50, f"{alone:.0f} MB alone, {together:.0f} MB together"


# ---- many at once ----------------------------------------------------------------------------------------------------


@dataclass
class HeldEngine(HurriedEngine):
    """Takes no step until `gate` opens, so that everything that needs the model has to wait."""

    gate: threading.Event = field(default_factory=threading.Event)

    def step(self, runs: Sequence[DrawingRun]) -> None:
        self.gate.wait(PATIENCE_S)
        super().step(runs)


@pytest.mark.parametrize("held", ["model", "decoder"])
def test_the_server_serves_while_pictures_wait(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many streams as there may be, and more images than there are threads: nobody else has to wait for them."""
    engine = HeldEngine()
    if held == "decoder":
        monkeypatch.setattr(latents, "read_image", lambda data: engine.gate.wait(PATIENCE_S) and read_image(data))
    with serving(engine) as live, ThreadPoolExecutor(2 * THREADS) as pool, ExitStack() as streams:
        try:
            job = f"/jobs/{live.ask('POST', DRAW, FACE).json()['job_id']}"
            for _ in range(MAX_STREAMS):
                stream = streams.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S))
                stream.sendall(f"GET {job}/events HTTP/1.1\r\n".encode() + HOST + b"\r\n")
                heard = b""
                while b'"running"' not in heard:
                    heard += stream.recv(4096)
            pictures = [pool.submit(live.ask, "POST", ENCODE, GOOD_PNG, PNG) for _ in range(2 * THREADS)]
            first, _ = wait(pictures, PATIENCE_S / 4, FIRST_COMPLETED)
            assert first, "every thread waits"
            check_problem(first.pop().result(), 429)
            still_serves(live)
            assert live.ask("GET", f"{job}/?include=none").json()["status"] == "running"
            assert live.ask("POST", f"{job}/cancel").json()["cancel_requested"] is True
        finally:
            engine.gate.set()
        assert {picture.result().status for picture in pictures} == {200, 429}
        assert live.draw()["status"] == "succeeded"


# ---- what is not even HTTP -------------------------------------------------------------------------------------------

POST = b"POST /text_to_image HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSED = 0  # a close without a word is an answer too, where there was no request to answer
WIRE: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("nothing", b"", (CLOSED,)),
    ("empty lines", b"\r\n" * 50, (CLOSED, 400)),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n", (CLOSED, 400)),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (CLOSED, 400, 403, 404, 505)),
    ("one word", b"GET\r\n\r\n", (400,)),
    ("no version", b"GET /health\r\n\r\n", (400, 403)),
    ("a future version", b"GET /health HTTP/9.9\r\n" + HOST + b"\r\n", (200, 400, 505)),
    ("no version that exists", b"GET /health HTTP/banana\r\n" + HOST + b"\r\n", (400,)),
    ("four words", b"GET /health now HTTP/1.1\r\n" + HOST + b"\r\n", (400,)),
    ("a NUL in the path", b"GET /hea\0lth HTTP/1.1\r\n" + HOST + b"\r\n", (400, 404)),
    ("raw bytes in the path", b"GET /\xff\xfe\x80 HTTP/1.1\r\n" + HOST + b"\r\n", (400, 404)),
    ("another server's address", b"GET http://evil.example/health HTTP/1.1\r\n" + HOST + b"\r\n", (200, 400, 403, 404)),
    ("an address that is none", b"GET http://[::1/health HTTP/1.1\r\n" + HOST + b"\r\n", (CLOSED, 400)),
    ("no host", b"GET /health HTTP/1.1\r\n\r\n", (400, 403)),
    ("two hosts", b"GET /health HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n\r\n", (400, 403)),
    ("a header without a colon", b"GET /health HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", (400,)),
    ("a space before the colon", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A : b\r\n\r\n", (400,)),
    ("a NUL in a header", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: a\0b\r\n\r\n", (400,)),
    ("a bare return in a header", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: a\rX-B: b\r\n\r\n", (400,)),
    ("a folded header", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: a\r\n b\r\n\r\n", (200, 400)),
    ("headers without end", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: b\r\n" * 60_000 + b"\r\n", (400, 431)),
    ("one endless header", b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: " + b"a" * 400_000 + b"\r\n\r\n", (400, 431)),
    ("an endless address", b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", (400, 414, 431)),
    ("a length that is no number", POST + b"Content-Length: abc\r\n\r\n{}", (400,)),
    ("a negative length", POST + b"Content-Length: -1\r\n\r\n{}", (400,)),
    ("a signed length", POST + b"Content-Length: +2\r\n\r\n{}", (400,)),
    ("two lengths", POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", (400,)),
    ("a list of lengths", POST + b"Content-Length: 2, 2\r\n\r\n{}", (400,)),
    ("ten gigabytes by its length", POST + b"Content-Length: 10000000000\r\n\r\n{", (413,)),
    ("more digits than fit", POST + b"Content-Length: " + b"9" * 100 + b"\r\n\r\n{", (400, 413)),
    ("ten gigabytes, after asking",
     POST + b"Expect: 100-continue\r\nContent-Length: 10000000000\r\n\r\n" + b" " * (16 * 2**20), (413,)),
    ("a length and chunks", POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    ("an unknown transfer coding", POST + b"Transfer-Encoding: gzip\r\n\r\n{}", (400, 501)),
    ("chunks twice", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ("a chunk of no size", CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", (400,)),
    ("a chunk of a negative size", CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", (400,)),
    ("a chunk of exabytes", CHUNKED + b"FFFFFFFFFFFFFFFF\r\n{}", (CLOSED, 400, 413)),
    ("a chunk that goes on", CHUNKED + b"2\r\n{}{}{}\r\n0\r\n\r\n", (400,)),
    ("chunks beyond the cap", CHUNKED + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 16 + b"0\r\n\r\n", (413,)),
    ("chunks without JSON", CHUNKED + b"2\r\n{]\r\n0\r\n\r\n", (400,)),
    ("no body at all", POST + b"\r\n", (400,)),
]


def problem_or_close(answer: Answer, statuses: tuple[int, ...]) -> None:
    assert answer.status in statuses, answer
    if answer.status >= 400:
        check_problem(answer, answer.status)


@pytest.mark.parametrize(("sent", "statuses"), [row[1:] for row in WIRE], ids=[row[0] for row in WIRE])
def test_what_is_not_even_http(live: Live, sent: bytes, statuses: tuple[int, ...]) -> None:
    problem_or_close(live.send(sent, hang_up=CLOSED in statuses), statuses)
    still_serves(live)


def test_a_refused_request_does_not_smuggle_a_second_one(live: Live) -> None:
    """Where a request ends must never be in doubt: after two lengths, what follows is not taken for another request."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
        connection.sendall(POST + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}")
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        heard = b"".join(iter(lambda: connection.recv(65536), b""))
    assert heard.startswith(b"HTTP/1.1 400 ") and heard.count(b"HTTP/1.1 ") == 1
    still_serves(live)


def test_half_a_request_holds_nobody_up(live: Live) -> None:
    """Many connections that stop in the middle of a header, of a body, of a chunk; the others are served meanwhile."""
    halves = [POST[:20], POST, POST + b"Content-Length: 1000\r\n\r\n{", CHUNKED + b"FF\r\n{", b"G"] * 8
    waiting = [socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) for _ in halves]
    try:
        for connection, half in zip(waiting, halves, strict=True):
            connection.sendall(half)
        assert live.draw()["status"] == "succeeded"
    finally:
        for connection in waiting:
            connection.close()
    still_serves(live)


def test_readers_who_hang_up_early_leave_no_trace(live: Live, jobs: dict[str, str]) -> None:
    """A close before the answer, for every kind of answer, some with unread data on the way."""
    paths = ("/health", "/", f"/jobs/{jobs['done']}/", f"/jobs/{jobs['done']}/events", "/vocabulary", "/metrics")

    def hang_up(path: str) -> None:
        with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
            linger = struct.pack("ii", 1, 0)  # closing resets
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")

    threads = [threading.Thread(target=hang_up, args=(path,)) for path in paths * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert live.draw()["status"] == "succeeded"
    still_serves(live)
