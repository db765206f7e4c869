"""Do images carry their request without loss, and is no forged or damaged one believed?"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import time
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from core.imaging.file_sanitizer import PictureError, png_chunks
from core.imaging.image_io import read_image
from core.imaging.png_metadata import (
    MAX_TEXT_BYTES,
    REQUEST_CHUNK,
    REQUEST_FIELDS,
    NoRequestError,
    encode_png,
    parameters_text,
    quick_png,
    read_request,
)
from core.web.requests import TextToImage
from tests.support.files import chunk, face, flat, itxt, save, with_chunks

REQUEST: dict[str, Any] = {
    "prompt": "a wömän,\nsmiling", "n_images": 1, "n_inf_steps": 40, "sampler": "DPM++ 2M", "guidance_scale": 4.5,
    "negative_prompt": "béard", "start_timestep": 0.0, "seed": 2**53 - 1,
}


@dataclass(frozen=True)
class Model:
    name: str = "celeba128"
    model_hash: str = "0123456789abcdef" * 4
    image_size: int = 128


# ---- the request in the image --------------------------------------------------------------------------------------

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
    """None, and so do images from before there was one; anything but a version is refused."""
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
        ('two\nlines\nNegative prompt: three\nfour\nSteps: 20, Seed: 4, TI hashes: "a, b: c, Sampler: no", '
         "Sampler: Euler a\n"
         "Template: a {big|small} face\nNegative Template: {a|b}\n\n",
         {"prompt": "two\nlines", "negative_prompt": "three\nfour", "n_images": 1, "n_inf_steps": 20, "seed": 4,
          "sampler": "Euler a"}),
        ("Negative prompt:\nSteps: 9\nTime taken: 1.2s", {"prompt": "", "negative_prompt": "", "n_images": 1,
                                                         "n_inf_steps": 9}),
        ("Steps: in the prompt\nSteps: 8, Seed: 2\nSteps and more", {"prompt": "Steps: in the prompt", "n_images": 1,
                                                                   "negative_prompt": "", "n_inf_steps": 8, "seed": 2}),
    ],
)
def test_parameters_that_another_program_wrote(text: str, wanted: dict[str, Any]) -> None:
    found = read_request(with_chunks(flat("red"), chunk("tEXt", b"parameters\0" + text.encode())))
    assert found["request"] == wanted and not found["exact"]


@pytest.mark.parametrize("kind", ["tEXt", "zTXt"])
@pytest.mark.parametrize(("prompt", "encoding"), [("wömän", "latin-1"), ("wömän, 笑顔 ☺", "utf-8"), ("œuvre", "utf-8")])
def test_a_text_keeps_its_letters_in_the_encoding_of_the_standard_and_in_that_of_many_tools(
    prompt: str, encoding: str, kind: str
) -> None:
    text = f"{prompt}\nSteps: 3".encode(encoding)
    body = b"parameters\0" + (text if kind == "tEXt" else b"\0" + zlib.compress(text))
    assert read_request(with_chunks(flat("red"), chunk(kind, body)))["request"]["prompt"] == prompt


@pytest.mark.parametrize("filler", ["a", " ", "a: ", 'a: "', "a: \\\"", "\nSteps: ", "\nNegative prompt: ", ", "])
def test_a_long_foreign_text_is_read_in_no_time(filler: str) -> None:
    text = "x\nSteps: 3" + filler * (MAX_TEXT_BYTES // 2 // len(filler))
    began = time.process_time()
    with contextlib.suppress(PictureError):
        read_request(with_chunks(flat("red"), chunk("tEXt", b"parameters\0" + text.encode())))
    assert time.process_time() - began < 2


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
    "too long": (as_json(latent="a" * MAX_TEXT_BYTES), "longer than 2,097,152 bytes"),
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
    assert set(TextToImage.model_fields) >= REQUEST_FIELDS


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


@pytest.mark.parametrize("shape", [(128, 128, 3), (1, 1, 3), (5, 300, 3)])
def test_a_quick_png_shows_the_same_pixels(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(quick_png(pixels))) as image:
        image.load()
        assert (image.format, image.mode) == ("PNG", "RGB") and np.array_equal(np.asarray(image), pixels)
    assert [piece.name for piece in png_chunks(quick_png(pixels))] == ["IHDR", "IDAT", "IEND"]


def test_messages_name_the_field_and_stay_printable() -> None:
    with pytest.raises(PictureError, match="prompt") as refused:
        read_request(with_request(as_json(prompt="\ud800\x1b" * 999)))
    assert re.fullmatch("[ -~]{10,200}", str(refused.value))
