"""What may come in as a picture, and what goes out as one?

In: `read_image` is the one way from strangers' bytes to pixels. It walks the container (PNG chunks, JPEG segments,
WebP chunks) itself, checks sizes there, and hands Pillow a new file of nothing but image data. So no library parses a
profile, text, EXIF block or second frame, nothing is inflated that is not pixels, and Pillow has nothing to warn about;
its global settings stay as they are, and threads may call everything here at once.

Out: PNGs that say how they came about, so that `read_request` can ask for them again; thumbnails, collages, archives.

It does not know models, jobs or HTTP, nor which values of a request are in range: `core.schemas` decides that. Colour
profiles are ignored: a picture in another colour space than sRGB keeps its numbers.

Long because the walk through PNG chunks serves reading pixels and reading requests alike, and because every cap stands
beside the decoder that it protects.

PNG: https://www.w3.org/TR/png-3/. JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf.
WebP: https://developers.google.com/speed/webp/docs/riff_container.
Digital source type: https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypedDict, TypeVar

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PICTURE_BYTES = 8 * 2**20
MAX_PICTURE_PIXELS = 50_000_000  # a phone's photograph
MAX_SCANS = 32  # of a JPEG; usual are 1 to 12. Each costs a pass over the whole picture and may be ten bytes long
MAX_TEXT_BYTES = 2**20  # of a PNG's text after inflation, latents included
MAX_SLIDERS = 40  # attributes that a request may name
MAX_INTEGER = 2**53 - 1  # the largest that JavaScript holds exactly
MAX_COLLAGE_ROWS, MAX_COLLAGE_COLUMNS, MAX_COLLAGE_SIDE = 64, 32, 8192
GUTTER = 2  # pixels between the pictures of a collage

REQUEST_CHUNK = "text_to_image"  # PNG text chunk that holds the request as JSON
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)
_XMP_CHUNK = "XML:com.adobe.xmp"
TEXT_FIELDS = ("prompt", "negative_prompt", "sampler", "model")
INTEGER_FIELDS = ("n_images", "n_inf_steps", "stream_freq", "seed", "variation_seed")
NUMBER_FIELDS = ("guidance_scale", "start_timestep", "strength", "variation_strength", "weight")
BASE64_FIELDS = ("latent", "init_image", "mask")
OBJECT_FIELDS = {"interpolate_to": frozenset(("prompt", "seed", "latent", "weight"))}
REQUEST_FIELDS = frozenset(
    (*TEXT_FIELDS, *INTEGER_FIELDS, *NUMBER_FIELDS, *BASE64_FIELDS, *OBJECT_FIELDS, "attributes")
) - {"weight"}
REQUIRED_FIELDS = ("prompt", "negative_prompt", "n_inf_steps", "sampler", "guidance_scale", "seed")

Item = TypeVar("Item")


class PictureError(ValueError):
    """A picture, or what is written in it, cannot be used. The message says what is wrong, the value and the limit."""


class NoRequestError(PictureError):
    """The PNG is sound, but nothing in it says how it was drawn: it was not made here, or a tool dropped the text."""


class DrawnBy(Protocol):
    """What a picture keeps about the model that drew it."""

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
    """PNG bytes; with a request, also the text chunks that say how the picture came about and that a machine drew it.

    `watermark` is the version of the mark that the pixels carry already. Shapes: pixels uint8 [H, W, 3].
    Raises PictureError for a request that `read_request` would not give back.
    """
    chunks = PngImagePlugin.PngInfo()
    if request is not None and info is not None:
        check_request(request)
        text = json.dumps({"request": dict(request), "model_hash": info.model_hash, "watermark": watermark})
        if len(text) > MAX_TEXT_BYTES:
            raise PictureError(f"the request is {len(text):,} bytes as JSON; a PNG may carry {MAX_TEXT_BYTES:,}")
        chunks.add_itxt("parameters", parameters_text(request, info))
        chunks.add_itxt(REQUEST_CHUNK, text, zip=True)
        chunks.add_itxt(_XMP_CHUNK, XMP)
    return _png(pixels, chunks, compress_level=6 if request else 1)


def _png(pixels: np.ndarray, chunks: PngImagePlugin.PngInfo, compress_level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=chunks, compress_level=compress_level)
    return buffer.getvalue()


def check_request(request: Mapping[str, Any]) -> None:
    """Known fields of the right types, and those without which nothing can be drawn again.

    Raises PictureError, naming the field and its value.
    """
    for name in REQUIRED_FIELDS:
        if name not in request:
            raise PictureError(f"the request lacks the field {name!r}")
    _check_fields(request, REQUEST_FIELDS)


def _check_fields(request: Mapping[str, Any], known: Set[str]) -> None:
    for name, value in request.items():
        if name not in known:
            raise PictureError(f"the request has a field {_shown(name)} that is not known here")
        if name in OBJECT_FIELDS:
            if not isinstance(value, dict) or not value:
                raise PictureError(f"{name} in the request must be an object; got {_shown(value)}")
            _check_fields(value, OBJECT_FIELDS[name])
            continue
        if name in INTEGER_FIELDS:
            sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER
            wanted = f"an integer from 0 to {MAX_INTEGER}"
        elif name in NUMBER_FIELDS:
            sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER
            wanted = f"a number of at most {MAX_INTEGER}"
        elif name in TEXT_FIELDS:
            sound, wanted = _is_text(value), "text"
        elif name == "attributes":
            sound, wanted = _is_sliders(value), f"up to {MAX_SLIDERS} names with finite numbers"
        else:
            texts = value if isinstance(value, list) else [value]
            sound, wanted = bool(texts) and all(map(_is_text, texts)), "base64 text or a list of it"
        if not sound:
            raise PictureError(f"{name} in the request must be {wanted}; got {_shown(value)}")


def _is_sliders(value: object) -> bool:
    """What `json.loads` would give back: names, and numbers that are no bool."""
    return isinstance(value, dict) and len(value) <= MAX_SLIDERS and all(
        _is_text(name) and isinstance(number, (int, float)) and not isinstance(number, bool)
        and abs(number) <= MAX_INTEGER
        for name, number in value.items()
    )


def _is_text(value: object) -> bool:
    """Text that has an UTF-8 form: half of a surrogate pair has none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _shown(value: object) -> str:
    """A value for a message, short whatever was sent."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- and can be asked again ------------------------------------------------------------------------------------------


def read_request(png: bytes, *, max_bytes: int = MAX_PICTURE_BYTES) -> Restored:
    """The request that a PNG was drawn by: the body of POST /text_to_image for this one picture.

    Prefers the JSON of `encode_png`, in whatever kind of text chunk another program kept it. If only A1111's
    `parameters` are left, restores what they tell. At most MAX_TEXT_BYTES of each text are ever inflated.

    Raises NoRequestError when neither is there, PictureError when the file or the text is damaged, said twice, too
    large, or not what `encode_png` writes.
    """
    _check_bytes(png, max_bytes)
    if not png.startswith(_PNG):
        raise PictureError(f"only PNG files carry a request; these bytes are {_kind_of(png) or _foreign(png)}")
    texts = _texts(png, (REQUEST_CHUNK, "parameters"))
    if REQUEST_CHUNK in texts:
        return _parse_json(texts[REQUEST_CHUNK])
    if "parameters" in texts:
        return _parse_parameters(texts["parameters"])
    raise NoRequestError(f"the PNG has neither a {REQUEST_CHUNK} nor a parameters text: nothing says how it was drawn")


def _texts(png: bytes, wanted: Sequence[str]) -> dict[str, str]:
    """The texts of these keywords; the others are not even inflated."""
    found: dict[str, str] = {}
    for chunk in _chunks(png):
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
    keys = set(found) - {"watermark"} if isinstance(found, dict) else set()  # the first pictures had none
    if keys != {"request", "model_hash"} or not isinstance(found["request"], dict):
        raise PictureError(f"{REQUEST_CHUNK} in the PNG must hold a request and a model_hash; got {_shown(found)}")
    version = found.get("watermark")
    if version is not None and (type(version) is not int or not 1 <= version <= 1000):
        raise PictureError(f"watermark in the PNG must be a version from 1 to 1000 or null; got {_shown(version)}")
    if not _is_text(found["model_hash"]) or len(found["model_hash"]) > 128:
        raise PictureError(f"model_hash in the PNG must be text of at most 128; got {_shown(found['model_hash'])}")
    check_request(found["request"])
    return {"request": found["request"], "model_hash": found["model_hash"], "watermark": version, "exact": True}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise PictureError(f"the request names a field twice: {_shown([name for name, _ in pairs])}")
    return found


def _small_integer(text: str) -> int:
    """Python's own conversion of a long number takes time that grows with its square."""
    if len(text) > 17:
        raise PictureError(f"the request holds an integer of {len(text)} characters; at most 17 are possible")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise PictureError(f"the request holds the number {_shown(text)}, which is not finite")
    return value


def _parse_parameters(text: str) -> Restored:
    """A1111's wording: prompt, negative prompt, and a last line `Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1`.

    A prompt that itself holds a line `Negative prompt:` cannot be told apart. Settings that are not numbers are left
    out, as are those that have no counterpart here.
    """
    head, _, last = text.rstrip().rpartition("\n")
    if not last.startswith("Steps: "):
        raise NoRequestError(f"the last line of parameters in the PNG must begin with 'Steps: '; got {_shown(last)}")
    prompt, _, negative = f"\n{head}".partition("\nNegative prompt: ")
    settings: dict[str, str] = {}
    for part in last.split(", "):
        name, _, value = part.partition(": ")
        settings.setdefault(name, value)
    request: dict[str, Any] = {"prompt": prompt[1:], "negative_prompt": negative, "n_images": 1}
    for field, name in (("n_inf_steps", "Steps"), ("seed", "Seed")):
        value = settings.get(name, "")
        if re.fullmatch("[0-9]{1,16}", value) and int(value) <= MAX_INTEGER:
            request[field] = int(value)
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?(e-[0-9]{1,3})?", settings.get("CFG scale", "")):
        request["guidance_scale"] = float(settings["CFG scale"])
    if settings.get("Sampler"):
        request["sampler"] = settings["Sampler"]
    return {"request": request, "model_hash": settings.get("Model hash"), "watermark": None, "exact": False}


# ---- strangers' bytes become pixels ----------------------------------------------------------------------------------

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
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
    and palettes become RGB, of an animation the first picture is taken. A file that is cut off, or has a wrong
    checksum, is refused as a whole. Memory: about 10 bytes a pixel, 16 for a WebP: 0.8 GB at the usual limit.

    Shapes: -> uint8 [H, W, 3].
    Raises PictureError, and nothing else, for whatever the bytes are.
    """
    plain = _plain(data, max_bytes, max_pixels)
    try:
        with _DECODERS[plain.kind](io.BytesIO(plain.data)) as image:
            if image.size != plain.size:
                raise ValueError(f"it says {plain.size} and holds {image.size} pixels")
            image.load()
            pixels = _rgb_on_white(image, plain.transparent)
    except Exception as error:  # which one a decoder raises depends on where the damage is
        raise PictureError(f"the {plain.kind} is damaged: {error}") from error
    return _upright(pixels, plain.orientation)


@dataclass(frozen=True)
class _Plain:
    """A file with nothing but image data, and what its container said about it.

    `transparent` is the value that a PNG without alpha declares transparent, in the units of the decoded image.
    """

    kind: str
    data: bytes
    size: tuple[int, int]  # width, height before turning
    orientation: int = 1
    transparent: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Chunk:
    """One chunk of a PNG."""

    name: str
    body: memoryview
    crc: int

    def verify(self) -> None:
        if zlib.crc32(self.body, zlib.crc32(self.name.encode())) != self.crc:
            _damaged("PNG", f"the checksum of {self.name} is wrong")


def _plain(data: bytes, max_bytes: int, max_pixels: int) -> _Plain:
    """Everything that is checked before a decoder runs."""
    _check_bytes(data, max_bytes)
    kind = _kind_of(data)
    if kind is None:
        raise PictureError(f"a picture must be PNG, JPEG or WebP; these bytes are {_foreign(data)}")
    try:
        plain = {"PNG": _plain_png, "JPEG": _plain_jpeg, "WebP": _plain_webp}[kind](data)
    except (IndexError, struct.error) as error:
        raise PictureError(f"the {kind} is damaged: its header ends too soon") from error
    width, height = plain.size
    if not 0 < width * height <= max_pixels:
        area = f"{width} x {height} = {width * height:,} pixels"
        raise PictureError(f"the {kind} has {area}; from 1 to {max_pixels:,} are accepted")
    return plain


def _check_bytes(data: bytes, max_bytes: int) -> None:
    if not 0 < len(data) <= max_bytes:
        raise PictureError(f"the picture has {len(data):,} bytes; from 1 to {max_bytes:,} are accepted")


def _kind_of(data: bytes) -> str | None:
    """Only the content counts, whatever name or type came with it."""
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(_JPEG):
        return "JPEG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def is_png(data: bytes) -> bool:
    return data.startswith(_PNG)


def _foreign(data: bytes) -> str:
    """A word for formats that people send by mistake."""
    brands = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}
    if data[4:8] == b"ftyp" and data[8:12] in brands:
        return brands[data[8:12]]
    names = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG"}
    return next((name for start, name in names.items() if data.startswith(start)), f"not: {_shown(data[:8])}")


def _damaged(kind: str, why: str) -> NoReturn:
    raise PictureError(f"the {kind} is damaged: {why}")


def _cut_off(kind: str, where: str) -> NoReturn:
    raise PictureError(f"the {kind} is cut off {where}")


def _chunks(png: bytes) -> Iterator[_Chunk]:
    """The chunks of a PNG up to IEND, which must be there; what follows it is nobody's."""
    view, position, name = memoryview(png), len(_PNG), ""
    while name != "IEND":
        if position + 12 > len(png):
            _cut_off("PNG", f"after {len(png):,} bytes, before its IEND")
        length, kind = struct.unpack_from(">I4s", png, position)
        name = kind.decode("latin-1")
        if not (kind.isalpha() and name.isascii()):
            _damaged("PNG", f"{_shown(kind)} is no chunk")
        end = position + 8 + length
        if end + 4 > len(png):
            _cut_off("PNG", f"in {name}, which says {length:,} bytes; {len(png) - position - 8:,} are left")
        yield _Chunk(name, view[position + 8 : end], struct.unpack_from(">I", png, end)[0])
        position = end + 4


def _plain_png(data: bytes) -> _Plain:
    """Keeps IHDR, palette and image data: of an animation, the picture for viewers that show no animations."""
    kept: dict[str, bytes] = {}
    image: list[memoryview] = []
    for chunk in _chunks(data):
        if not kept and chunk.name != "IHDR" or kept and chunk.name == "IHDR":
            _damaged("PNG", "it must begin with one IHDR")
        if chunk.name in ("IHDR", "PLTE", "tRNS", "IDAT"):
            chunk.verify()
        if chunk.name == "IDAT":
            image.append(chunk.body)
        elif chunk.name in ("IHDR", "PLTE", "tRNS", "eXIf"):
            kept.setdefault(chunk.name, bytes(chunk.body))
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", kept["IHDR"])
    if depth not in (1, 2, 4, 8, 16):
        _damaged("PNG", f"it says {depth} bits a value; 1, 2, 4, 8 and 16 are possible")
    if colour == 3 and not kept.get("PLTE"):
        _damaged("PNG", "it lacks its palette")
    transparent = None
    if colour != 3 and (key := kept.pop("tRNS", None)):  # Pillow forgets to scale it from fewer or more bits to eight
        values = struct.unpack_from({0: ">H", 2: ">HHH"}.get(colour, ">"), key)
        if depth == 16:
            transparent = values if colour == 0 else tuple(value >> 8 for value in values)
        else:
            most = (1 << depth) - 1
            transparent = tuple((value & most) * 255 // most for value in values) * (3 if colour == 0 else 1)
    parts = [_PNG]
    for name in ("IHDR", "PLTE", "tRNS", "IDAT", "IEND"):
        body = b"".join(image) if name == "IDAT" else kept.get(name, b"")
        if body or name == "IEND":
            crc = zlib.crc32(body, zlib.crc32(name.encode()))
            parts += [struct.pack(">I4s", len(body), name.encode()), body, struct.pack(">I", crc)]
    return _Plain("PNG", b"".join(parts), (width, height), _orientation(kept.get("eXIf", b"")), transparent)


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # the others are data, padding, or carry nothing
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: the size of the picture
_SCAN, _END = 0xDA, 0xD9


def _plain_jpeg(data: bytes) -> _Plain:
    """Keeps the tables, JFIF and Adobe markers (they tell the colour space) and the scans up to the end marker.

    What cameras append, such as further pictures or a film, stays behind.
    """
    kept, size, orientation, first_scan, scans, position = [b"\xff\xd8"], (0, 0), 0, 0, 0, 2
    while True:
        found = _MARKER.search(data, position)
        if found is None:
            _cut_off("JPEG", f"after {len(data):,} bytes, before its end marker")
        code, start = found[1][0], found.end()
        if code == _END:
            break
        length = int.from_bytes(data[start : start + 2], "big")
        position = start + length
        if length < 2 or code == 0xD8:
            _damaged("JPEG", f"segment FF{code:02X} is wrong")
        if position > len(data):
            _cut_off("JPEG", f"in segment FF{code:02X}, which says {length:,} bytes; {len(data) - start:,} are left")
        body = data[start + 2 : position]
        if code in _FRAMES:
            if size != (0, 0):
                _damaged("JPEG", "it says its size twice")
            size = struct.unpack_from(">HH", body, 1)[::-1]
        elif code == _SCAN:
            scans, first_scan = scans + 1, first_scan or found.start()
            if scans > MAX_SCANS:
                raise PictureError(f"the JPEG has more than {MAX_SCANS} scans")
        elif code == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = orientation or _orientation(body[6:])
        is_wanted = not 0xE0 <= code <= 0xFE or (code, body[:5]) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe"))
        if is_wanted and not first_scan:
            kept.append(data[found.start() : position])
    if not first_scan:
        _damaged("JPEG", "it holds no picture")
    return _Plain("JPEG", b"".join((*kept, data[first_scan:start])), size, orientation or 1)


def _plain_webp(data: bytes) -> _Plain:
    """Keeps the image data, of an animation the first frame."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        _cut_off("WebP", f"after {len(data):,} of {end:,} bytes")
    kept: dict[str, bytes] = {}
    position = 12
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8 + length + length % 2
        if position > end + length % 2:  # some writers leave out the last padding
            _damaged("WebP", f"chunk {_shown(kind)} says {length:,} bytes, more than are left")
        kept.setdefault(kind.decode("latin-1"), data[position - length - length % 2 : position - length % 2])
    first = next(iter(kept), "")
    if first == "VP8X":
        header = kept["VP8X"]
        size = (1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little"))
        kept["VP8X"] = bytes([header[0] & 0b10010]) + header[1:10]  # alpha and animation; no profile, EXIF, XMP
    elif first == "VP8 ":
        size = tuple(side & 0x3FFF for side in struct.unpack_from("<HH", kept[first], 6))
    elif first == "VP8L":
        (bits,) = struct.unpack_from("<I", kept[first], 1)
        size = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    else:
        _damaged("WebP", "it holds no picture")
    names = ("VP8X", "ANIM", "ANMF", "ALPH", "VP8 ", "VP8L") if first == "VP8X" else (first,)
    body = b"WEBP"
    for name in names:
        if name in kept:
            part = kept[name]
            body += struct.pack("<4sI", name.encode(), len(part)) + part + b"\0" * (len(part) % 2)
    riff = struct.pack("<4sI", b"RIFF", len(body)) + body
    return _Plain("WebP", riff, size, _orientation(kept.get("EXIF", b"")))


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block: 1 to 8, and 1 where there is none that can be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for position in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, position)
            if tag == 0x0112:
                (value,) = struct.unpack_from(f"{order}I" if kind == 4 else f"{order}H", tiff, position + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the block ends too soon, which does no harm to the picture
        return 1
    return 1


def _rgb_on_white(image: Image.Image, transparent: tuple[int, ...] | None) -> np.ndarray:
    """Band by band, so that a large picture is not held four times. Shapes: -> uint8 [H, W, 3]."""
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


# ---- pixels and pictures go out --------------------------------------------------------------------------------------


def crop_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The largest square in the middle, at `size` pixels a side. Shapes: uint8 [H, W, 3] -> [size, size, 3]."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resized(pixels[top : top + side, left : left + side], (size, size))


def as_text(pixels: np.ndarray) -> str:
    """A PNG of these pixels as base64: how a request carries a picture or a mask. Equal pixels give equal text."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return base64.b64encode(buffer.getvalue()).decode()


def is_white(pixels: np.ndarray) -> np.ndarray:
    """Which pixels of a mask are meant: those of at least 128 of 255 grey levels. Shapes: [H, W, 3] -> bool [H, W]."""
    return np.asarray(Image.fromarray(pixels).convert("L")) >= 128


def mask_picture(mask: np.ndarray) -> np.ndarray:
    """A mask as a picture that `is_white` reads back. Shapes: bool [H, W] -> uint8 [H, W], 0 or 255."""
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


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` (at least 2) of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def collage(rows: Sequence[Sequence[bytes]]) -> bytes:
    """Pictures side by side, one row an image, one column a step, as a PNG: how each image came about.

    A row of more than MAX_COLLAGE_COLUMNS shows that many of them, evenly `spread`; shorter rows leave the rest white.
    Every picture is brought to the size of the largest, or less where MAX_COLLAGE_SIDE demands it.

    Raises PictureError as `read_image`, and without any picture or with more than MAX_COLLAGE_ROWS rows.
    """
    shown = [spread(row, MAX_COLLAGE_COLUMNS) for row in rows]
    columns = max(map(len, shown), default=0)
    if not columns or len(shown) > MAX_COLLAGE_ROWS:
        wanted = f"from 1 to {MAX_COLLAGE_ROWS} rows with at least one picture"
        raise PictureError(f"a collage needs {wanted}; got {len(shown)} rows with {sum(map(len, shown))} pictures")
    sizes = [_plain(picture, MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS).size for row in shown for picture in row]
    room_x, room_y = ((MAX_COLLAGE_SIDE + GUTTER) // count - GUTTER for count in (columns, len(shown)))
    width, height = _fitting((max(w for w, _ in sizes), max(h for _, h in sizes)), (room_x, room_y))
    step_x, step_y = width + GUTTER, height + GUTTER
    canvas = np.full((len(shown) * step_y - GUTTER, columns * step_x - GUTTER, 3), 255, np.uint8)
    for y, row in enumerate(shown):
        for x, picture in enumerate(row):
            pixels = _resized(read_image(picture), (width, height))
            canvas[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = pixels
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(_XMP_CHUNK, XMP)
    return _png(canvas, chunks, compress_level=6)


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of these files, not compressed again; equal content gives equal bytes, whatever the order or the hour.

    Raises PictureError for a name that could leave the folder it is unpacked in, or that a file system refuses.
    """
    if len({name.lower() for name in files}) < len(files):
        raise PictureError(f"two names in the archive differ only in case: {_shown(sorted(files))}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as zipped:
        for name, data in sorted(files.items()):
            if not _FILE_NAME.fullmatch(name):
                raise PictureError(f"a file in the archive needs a plain name, such as face-0.png; got {_shown(name)}")
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
