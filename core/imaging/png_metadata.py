"""What does a PNG say about how it came about, and how is it asked for again?

`encode_png` writes the request into text chunks beside the pixels, and that a machine generated them; `read_request`
gives it back, from files that anybody may have changed. Which requests are written is in
`core/imaging/generation_parameters.py`.

It does not know models, jobs or HTTP, nor which values of a request are in range: `core.web.requests` decides that.

Digital source type: https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol, TypedDict, cast, get_args, get_origin

import numpy as np
from PIL import Image, PngImagePlugin

from core.engine import OF_NO_IMAGE, GenerationRequest, field_types
from core.imaging.file_sanitizer import (
    MAX_PICTURE_BYTES,
    PictureError,
    check_bytes,
    foreign,
    is_png,
    kind_of,
    png_chunks,
    png_of,
    shown,
)

MAX_TEXT_BYTES = 2**21  # of a PNG's text after inflation, with latents or an image of 512 x 512 to begin with
MAX_SLIDERS = 40  # attributes that a request may name
MAX_INTEGER = 2**53 - 1  # the largest that JavaScript holds exactly

REQUEST_CHUNK = "text_to_image"  # PNG text chunk that holds the request as JSON
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)
XMP_CHUNK = "XML:com.adobe.xmp"
FIELD_TYPES = {name: kind for name, kind in field_types(GenerationRequest).items() if name not in OF_NO_IMAGE}
FIELD_TYPES |= {"stream_freq": int, "model": str}  # of the body alone
REQUEST_FIELDS = frozenset(FIELD_TYPES)
REQUIRED_FIELDS = ("prompt", "negative_prompt", "n_inf_steps", "sampler", "guidance_scale", "seed")


class NoRequestError(PictureError):
    """The PNG is sound, but nothing in it says how it was generated: it was not made here, or a tool dropped the
    text."""


class DrawnBy(Protocol):
    """What an image keeps about the model that generated it."""

    @property
    def name(self) -> str: ...
    @property
    def model_hash(self) -> str: ...
    @property
    def image_size(self) -> int: ...


class Restored(TypedDict):
    """What `read_request` finds in a PNG.

    `exact`: the request is the one that was written, to the last digit. Otherwise it was read from the `parameters`
    text, which any program may have written: it lacks latents and whatever could not be read, and `model_hash` is
    only the beginning of the hash. `watermark` is the version of the mark that was put into the pixels, None for none.
    """

    request: dict[str, Any]
    model_hash: str | None
    watermark: int | None
    exact: bool


# ---- a PNG says how it came about ------------------------------------------------------------------------------------


def parameters_text(request: Mapping[str, Any], info: DrawnBy) -> str:
    """The request in the wording that image viewers know from A1111's web UI (chunk `parameters`)."""
    negative = f"\nNegative prompt: {request['negative_prompt']}" if request["negative_prompt"] else ""
    told = (("Variation seed", "variation_seed"), ("Variation seed strength", "variation_strength"),
            ("Denoising strength", "strength"))
    more = "".join(f", {name}: {request[field]}" for name, field in told if field in request)
    return (
        f"{request['prompt']}{negative}\nSteps: {request['n_inf_steps']}, Sampler: {request['sampler']}, "
        f"CFG scale: {request['guidance_scale']:g}, Seed: {request['seed']}, "
        f"Size: {info.image_size}x{info.image_size}, Model hash: {info.model_hash[:10]}, Model: {info.name}{more}"
    )


def encode_png(
    pixels: np.ndarray,
    request: Mapping[str, Any] | None = None,
    info: DrawnBy | None = None,
    watermark: int | None = None,
) -> bytes:
    """PNG bytes; with a request, also the text chunks that say how the image came about and that a machine generated
    it.

    `watermark` is the version of the mark that the pixels carry already. Shapes: pixels uint8 [H, W, 3].
    Raises PictureError for a request that `read_request` would not give back.
    """
    texts = PngImagePlugin.PngInfo()
    if request is not None and info is not None:
        check_request(request)
        text = json.dumps({"request": dict(request), "model_hash": info.model_hash, "watermark": watermark})
        if len(text) > MAX_TEXT_BYTES:
            raise PictureError(f"the request is {len(text):,} bytes as JSON; a PNG may carry {MAX_TEXT_BYTES:,}")
        texts.add_itxt("parameters", parameters_text(request, info))
        texts.add_itxt(REQUEST_CHUNK, text, zip=True)
        texts.add_itxt(XMP_CHUNK, XMP)
    return write_png(pixels, texts, compress_level=3)  # 6: four times as long, 7 % smaller


def machine_png(pixels: np.ndarray, description: str = "") -> bytes:
    """PNG bytes that say a machine generated them, and of what words; no request, so that nothing can be asked again.

    Shapes: uint8 [H, W, 3].
    """
    texts = PngImagePlugin.PngInfo()
    if description:
        texts.add_itxt("Description", description)
    texts.add_itxt(XMP_CHUNK, XMP)
    return write_png(pixels, texts, compress_level=3)


def quick_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of an image that is shown for a moment: not compressed, which takes a tenth of the time.

    Shapes: uint8 [H, W, 3]. Filter type 0 before each row: https://www.w3.org/TR/png-3/ (9.2).
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return png_of({"IHDR": header, "IDAT": zlib.compress(rows.tobytes(), 0)})


def write_png(pixels: np.ndarray, texts: PngImagePlugin.PngInfo | None = None, *, compress_level: int = 6) -> bytes:
    """Shapes: uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=texts, compress_level=compress_level)
    return buffer.getvalue()


def check_request(request: Mapping[str, Any]) -> None:
    """Known fields of the right types, and those without which nothing can be generated again.

    Raises PictureError, naming the field and its value.
    """
    for name in REQUIRED_FIELDS:
        if name not in request:
            raise PictureError(f"the request lacks the field {name!r}")
    _check_fields(request, FIELD_TYPES)


def _check_fields(request: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name, value in request.items():
        if name not in known:
            raise PictureError(f"the request has a field {shown(name)} that is not known here")
        kind = known[name]
        if is_dataclass(kind):
            if not isinstance(value, dict) or not value:
                raise PictureError(f"{name} in the request must be an object; got {shown(value)}")
            _check_fields(value, field_types(cast(type, kind)))
            continue
        if kind is int:
            sound = isinstance(value, int) and _is_number(value) and value >= 0
            wanted = f"an integer from 0 to {MAX_INTEGER}"
        elif kind is float:
            sound, wanted = _is_number(value), f"a number of at most {MAX_INTEGER}"
        elif kind is str:
            sound, wanted = _is_text(value), "text"
        elif kind is bool:
            sound, wanted = isinstance(value, bool), "true or false"
        elif get_origin(kind) is tuple:
            count = len(get_args(kind))
            sound = isinstance(value, (list, tuple)) and len(value) == count and all(map(_is_number, value))
            wanted = f"{count} numbers of at most {MAX_INTEGER}"
        elif get_origin(kind) is Mapping:
            sound, wanted = _is_sliders(value), f"up to {MAX_SLIDERS} names with finite numbers"
        else:
            texts = value if isinstance(value, list) else [value]
            sound, wanted = bool(texts) and all(map(_is_text, texts)), "base64 text or a list of it"
        if not sound:
            raise PictureError(f"{name} in the request must be {wanted}; got {shown(value)}")


def _is_number(value: object) -> bool:
    """A number that `json.loads` would give back, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER


def _is_sliders(value: object) -> bool:
    """What `json.loads` would give back: names, and numbers that are no bool."""
    return isinstance(value, dict) and len(value) <= MAX_SLIDERS and all(
        _is_text(name) and _is_number(number) for name, number in value.items()
    )


def _is_text(value: object) -> bool:
    """Text that has an UTF-8 form: half of a surrogate pair has none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# ---- and can be asked again ------------------------------------------------------------------------------------------


def read_request(png: bytes, *, max_bytes: int = MAX_PICTURE_BYTES) -> Restored:
    """The request that a PNG was generated by: the body of POST /text_to_image for this one image.

    Prefers the JSON of `encode_png`, in whatever kind of text chunk another program kept it. If only A1111's
    `parameters` are left, restores what they tell. At most MAX_TEXT_BYTES of each text are ever inflated.

    Raises NoRequestError when neither is there, PictureError when the file or the text is damaged, said twice, too
    large, or not what `encode_png` writes.
    """
    check_bytes(png, max_bytes)
    if not is_png(png):
        raise PictureError(f"only PNG files carry a request; these bytes are {kind_of(png) or foreign(png)}")
    texts = _texts(png, (REQUEST_CHUNK, "parameters"))
    if REQUEST_CHUNK in texts:
        return _parse_json(texts[REQUEST_CHUNK])
    if "parameters" in texts:
        return _parse_parameters(texts["parameters"])
    raise NoRequestError(
        f"the PNG has neither a {REQUEST_CHUNK} nor a parameters text: nothing says how it was generated"
    )


def read_parameters(png: bytes, *, max_bytes: int = MAX_PICTURE_BYTES) -> str:
    """A1111's text `parameters` of a PNG as it stands there, "" where there is none. Raises PictureError."""
    check_bytes(png, max_bytes)
    if not is_png(png):
        raise PictureError(f"only PNG files carry parameters; these bytes are {kind_of(png) or foreign(png)}")
    return _texts(png, ("parameters",)).get("parameters", "")


def _texts(png: bytes, wanted: Sequence[str]) -> dict[str, str]:
    """The texts of these keywords; the others are not even inflated."""
    found: dict[str, str] = {}
    for chunk in png_chunks(png):
        chunk.verify()  # each: with one bit flipped, the request would look like a stranger's chunk
        if chunk.name not in ("tEXt", "zTXt", "iTXt"):
            continue
        keyword = bytes(chunk.body[:80]).partition(b"\0")[0]  # at most 79 bytes and a zero
        key = keyword.decode("latin-1")
        if key not in wanted:
            continue
        if key in found:
            raise PictureError(f"the PNG has two texts {key!r}; which is meant cannot be known")
        try:
            found[key] = _text_of(chunk.name, bytes(chunk.body[len(keyword) + 1 :]))
        except (IndexError, ValueError, zlib.error) as error:
            raise PictureError(f"the text {key!r} in the PNG cannot be read: {error}") from error
    return found


def _text_of(name: str, body: bytes) -> str:
    """What stands behind the keyword of a text chunk. Raises ValueError, IndexError or zlib.error for damage."""
    encoding, packed = "latin-1", name == "zTXt"
    if name == "iTXt":
        encoding, packed, body = "utf-8", body[0] != 0, body[1:]
    if name != "tEXt":
        method, body = body[0], body[1:]
        if packed and method != 0:
            raise ValueError(f"compression method {method} is unknown")
    if name == "iTXt":
        _, _, body = body.split(b"\0", 2)  # language and translated keyword
    if packed:
        inflater = zlib.decompressobj()
        body = inflater.decompress(body, MAX_TEXT_BYTES + 1)
        if len(body) <= MAX_TEXT_BYTES and not inflater.eof:
            raise ValueError("its compressed data end too soon")
    if len(body) > MAX_TEXT_BYTES:
        raise ValueError(f"it is longer than {MAX_TEXT_BYTES:,} bytes")
    if encoding == "latin-1":  # what the standard says; many tools write UTF-8 all the same, which is hardly ever both
        with contextlib.suppress(UnicodeDecodeError):
            return body.decode("utf-8")
    return body.decode(encoding)


def _parse_json(text: str) -> Restored:
    """The JSON of `encode_png`; anything else is refused."""
    try:
        found = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_small_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except PictureError:
        raise
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{REQUEST_CHUNK} in the PNG is not JSON that can be read: {error}") from error
    keys = set(found) - {"watermark"} if isinstance(found, dict) else set()  # the first images had none
    if keys != {"request", "model_hash"} or not isinstance(found["request"], dict):
        raise PictureError(f"{REQUEST_CHUNK} in the PNG must hold a request and a model_hash; got {shown(found)}")
    version = found.get("watermark")
    if version is not None and (type(version) is not int or not 1 <= version <= 1000):
        raise PictureError(f"watermark in the PNG must be a version from 1 to 1000 or null; got {shown(version)}")
    if not _is_text(found["model_hash"]) or len(found["model_hash"]) > 128:
        raise PictureError(f"model_hash in the PNG must be text of at most 128; got {shown(found['model_hash'])}")
    check_request(found["request"])
    return {"request": found["request"], "model_hash": found["model_hash"], "watermark": version, "exact": True}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise PictureError(f"the request names a field twice: {shown([name for name, _ in pairs])}")
    return found


def _small_integer(text: str) -> int:
    """Python's own conversion of a long number takes time that grows with its square."""
    if len(text) > 17:
        raise PictureError(f"the request holds an integer of {len(text)} characters; at most 17 are possible")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise PictureError(f"the request holds the number {shown(text)}, which is not finite")
    return value


STEPS = re.compile("^Steps: ", re.MULTILINE)
NEGATIVE = re.compile("^Negative prompt: ?", re.MULTILINE)
SETTING = re.compile(r'([\w /-]{1,60}): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')  # a value in quotes may hold commas
MAX_SETTINGS = 50_000  # characters of that line that are looked at


def _parse_parameters(text: str) -> Restored:
    """A1111's wording: prompt, negative prompt, and a line `Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1`.

    That line is the last one that begins with `Steps: `; what extensions write behind it (templates, hashes of what
    they loaded) belongs to no prompt. A prompt that itself holds a line `Negative prompt:` cannot be told apart.
    Settings that are not numbers are left out, as are those that have no counterpart here.
    """
    *_, line = [None, *STEPS.finditer(text)]
    if line is None:
        shown_last = shown(text.rstrip().rpartition("\n")[2])
        raise NoRequestError(f"a line of parameters in the PNG must begin with 'Steps: '; the last is {shown_last}")
    head = text[: line.start()].removesuffix("\n")
    prompt, *negatives = NEGATIVE.split(head, maxsplit=1)
    if negatives:
        prompt = prompt.removesuffix("\n")
    settings: dict[str, str] = {}
    for name, value in SETTING.findall(text[line.start() :].partition("\n")[0][:MAX_SETTINGS]):
        settings.setdefault(name.strip(), value.strip())
    request: dict[str, Any] = {"prompt": prompt, "negative_prompt": "".join(negatives), "n_images": 1}
    for field, name in (("n_inf_steps", "Steps"), ("seed", "Seed")):
        value = settings.get(name, "")
        if re.fullmatch("[0-9]{1,16}", value) and int(value) <= MAX_INTEGER:
            request[field] = int(value)
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?(e-[0-9]{1,3})?", settings.get("CFG scale", "")):
        request["guidance_scale"] = float(settings["CFG scale"])
    if settings.get("Sampler"):
        request["sampler"] = settings["Sampler"]
    return {"request": request, "model_hash": settings.get("Model hash"), "watermark": None, "exact": False}
