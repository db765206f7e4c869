"""What is in a PNG, JPEG or WebP file beside its pixels, and what does it claim before anybody decodes it?

Walks the containers (PNG chunks, JPEG segments, WebP chunks) of untrusted files, checks sizes there, and makes from
each a new file of nothing but image data: what a library is handed then holds no profile, text, EXIF block or second
frame, nothing is inflated that is not pixels, and Pillow has nothing to warn about.

It does not know pixels: `core/imaging/image_io.py` decodes; nor what a PNG's texts say: `core/imaging/png_metadata.py`
reads them.

PNG: https://www.w3.org/TR/png-3/. JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf.
WebP: https://developers.google.com/speed/webp/docs/riff_container.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

MAX_PICTURE_BYTES = 8 * 2**20
MAX_PICTURE_PIXELS = 50_000_000  # a phone's photograph
MAX_SCANS = 32  # of a JPEG; usual are 1 to 12. Each costs a pass over the whole image and may be ten bytes long

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


class PictureError(ValueError):
    """An image, or what is written in it, cannot be used. The message says what is wrong, the value and the limit."""


def shown(value: object) -> str:
    """A value for a message, short whatever was sent."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Plain:
    """A file with nothing but image data, and what its container said about it.

    `transparent` is the value that a PNG without alpha declares transparent, in the units of the decoded image.
    """

    kind: str
    data: bytes
    size: tuple[int, int]  # width, height before turning
    orientation: int = 1
    transparent: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Chunk:
    """One chunk of a PNG."""

    name: str
    body: memoryview
    crc: int

    def verify(self) -> None:
        if zlib.crc32(self.body, zlib.crc32(self.name.encode())) != self.crc:
            _damaged("PNG", f"the checksum of {self.name} is wrong")


def plain_file(data: bytes, max_bytes: int, max_pixels: int) -> Plain:
    """Everything that is checked before a decoder runs."""
    check_bytes(data, max_bytes)
    kind = kind_of(data)
    if kind is None:
        raise PictureError(f"an image must be PNG, JPEG or WebP; these bytes are {foreign(data)}")
    try:
        plain = {"PNG": _plain_png, "JPEG": _plain_jpeg, "WebP": _plain_webp}[kind](data)
    except (IndexError, struct.error) as error:
        raise PictureError(f"the {kind} is damaged: its header ends too soon") from error
    width, height = plain.size
    if not 0 < width * height <= max_pixels:
        area = f"{width} x {height} = {width * height:,} pixels"
        raise PictureError(f"the {kind} has {area}; from 1 to {max_pixels:,} are accepted")
    return plain


def check_bytes(data: bytes, max_bytes: int) -> None:
    if not 0 < len(data) <= max_bytes:
        raise PictureError(f"the image has {len(data):,} bytes; from 1 to {max_bytes:,} are accepted")


def kind_of(data: bytes) -> str | None:
    """Only the content counts, whatever name or type came with it."""
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(_JPEG):
        return "JPEG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def is_png(data: bytes) -> bool:
    return data.startswith(_PNG)


def foreign(data: bytes) -> str:
    """A word for formats that people send by mistake."""
    brands = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}
    if data[4:8] == b"ftyp" and data[8:12] in brands:
        return brands[data[8:12]]
    names = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG"}
    return next((name for start, name in names.items() if data.startswith(start)), f"not: {shown(data[:8])}")


def _damaged(kind: str, why: str) -> NoReturn:
    raise PictureError(f"the {kind} is damaged: {why}")


def _cut_off(kind: str, where: str) -> NoReturn:
    raise PictureError(f"the {kind} is cut off {where}")


def png_of(chunks: Mapping[str, bytes]) -> bytes:
    """The file of these chunks, in their order, and IEND (https://www.w3.org/TR/png-3/, 5.3)."""
    parts = [_PNG]
    for name, body in (*chunks.items(), ("IEND", b"")):
        crc = zlib.crc32(body, zlib.crc32(name.encode()))
        parts += [struct.pack(">I4s", len(body), name.encode()), body, struct.pack(">I", crc)]
    return b"".join(parts)


def png_chunks(png: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG up to IEND, which must be there; what follows it is nobody's."""
    view, position, name = memoryview(png), len(_PNG), ""
    while name != "IEND":
        if position + 12 > len(png):
            _cut_off("PNG", f"after {len(png):,} bytes, before its IEND")
        length, kind = struct.unpack_from(">I4s", png, position)
        name = kind.decode("latin-1")
        if not (kind.isalpha() and name.isascii()):
            _damaged("PNG", f"{shown(kind)} is no chunk")
        end = position + 8 + length
        if end + 4 > len(png):
            _cut_off("PNG", f"in {name}, which says {length:,} bytes; {len(png) - position - 8:,} are left")
        yield Chunk(name, view[position + 8 : end], struct.unpack_from(">I", png, end)[0])
        position = end + 4


def _plain_png(data: bytes) -> Plain:
    """Keeps IHDR, palette and image data: of an animation, the image for viewers that show no animations."""
    kept: dict[str, bytes] = {}
    image: list[memoryview] = []
    for chunk in png_chunks(data):
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
    bodies = {**kept, "IDAT": b"".join(image)}
    plain = png_of({name: bodies[name] for name in ("IHDR", "PLTE", "tRNS", "IDAT") if bodies.get(name)})
    return Plain("PNG", plain, (width, height), _orientation(kept.get("eXIf", b"")), transparent)


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # the others are data, padding, or carry nothing
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: the size of the image
_SCAN, _END = 0xDA, 0xD9


def _plain_jpeg(data: bytes) -> Plain:
    """Keeps the tables, JFIF and Adobe markers (they tell the colour space) and the scans up to the end marker.

    What cameras append, such as further images or an animation, stays behind.
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
    return Plain("JPEG", b"".join((*kept, data[first_scan:start])), size, orientation or 1)


def _plain_webp(data: bytes) -> Plain:
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
            _damaged("WebP", f"chunk {shown(kind)} says {length:,} bytes, more than are left")
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
    return Plain("WebP", riff, size, _orientation(kept.get("EXIF", b"")))


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
    except struct.error:  # the block ends too soon, which does no harm to the image
        return 1
    return 1
