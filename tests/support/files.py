"""How do tests make image files: whole, odd, and with anything added that a stranger could add?

Good files are written by Pillow or, where it cannot, chunk by chunk, by the definitions of the formats and not by the
code under test.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from core.training.synthetic_faces import draw_face, random_attributes

PNG = b"\x89PNG\r\n\x1a\n"


def face(seed: int = 0) -> np.ndarray:
    """An image with no symmetry. Shapes: -> uint8 [128, 128, 3]."""
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
