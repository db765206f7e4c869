"""Which values can travel in a request: text, base64, latents, images?

How each is read, and what is said of one that cannot be. This file does not know which fields there are
(`core/web/requests.py`), and never imports torch.

Latents as files: https://numpy.org/neps/nep-0001-npy-format.html
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo

from core.imaging.file_sanitizer import MAX_PICTURE_BYTES
from core.text.attribute_sliders import BY_ANY_CASE, FURTHEST, MOST
from core.web.errors import shown
from core.web.validation import bad_field

MAX_IMAGE_TEXT = 4 * -(-MAX_PICTURE_BYTES // 3)  # characters of the largest image in base64
MAX_MASK_BYTES = 2**20  # two colours need little
MAX_MASK_TEXT = 4 * -(-MAX_MASK_BYTES // 3)
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly
MAX_LATENT_VALUE = 1e3
PRINTABLE = r"^[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F]*$"


def no_control_characters(value: str | None, info: ValidationInfo) -> str | None:
    if value is not None and not re.fullmatch(PRINTABLE, value):
        raise bad_field(info.field_name, "must not contain control characters")
    return value


def unwrapped(value: Any) -> Any:
    """Base64 in one piece: what `base64` prints has lines of 76 characters and ends with one (RFC 2045)."""
    return re.sub(r"[ \t\r\n]+", "", value) if isinstance(value, str) else value


def decode_base64(text: str, field: str, wanted: str = "must be base64") -> bytes:
    """Strict base64, in lines or not. Raises a validation error that begins with `wanted` and ends with the cause."""
    text = unwrapped(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_field(field, f"{wanted}; got {shown(text)}: {why_no_base64(text)}") from error


def why_no_base64(text: str) -> str:
    """What is wrong with text that cannot be decoded."""
    if re.match("data:[^,]{0,100},", text):
        return "leave out everything up to the comma"
    if re.match("[a-z]{2,10}:", text):
        return "addresses are not followed"
    strange = re.search("[^A-Za-z0-9+/=]", text)
    if strange is None:
        inner = "=" in text.rstrip("=")
        return "something follows its end" if inner else f"its end is missing, or one character of its {len(text)}"
    if strange[0] in "-_":
        plain = "+" if strange[0] == "-" else "/"
        return f"that is the URL-safe alphabet, write {plain} for {strange[0]}"
    return f"character {strange.start() + 1} is {shown(strange[0])}"


def check_latent(latent: np.ndarray, field: str) -> np.ndarray:
    if not np.isfinite(latent).all() or float(np.abs(latent).max()) > MAX_LATENT_VALUE:
        raise bad_field(field, "must hold finite numbers between -1000 and 1000")
    return latent


def decode_latent(text: str, shape: tuple[int, ...], field: str) -> np.ndarray:
    """Base64 of little-endian float32 -> array of `shape`."""
    num_bytes = 4 * int(np.prod(shape))
    wanted = f"must be base64 of {num_bytes} bytes: float32 of shape {list(shape)}"
    raw = decode_base64(text, field, wanted)
    if len(raw) != num_bytes:
        raise bad_field(field, f"{wanted}; got {len(raw)} bytes")
    return check_latent(np.frombuffer(raw, "<f4").reshape(shape), field)


def read_npy(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a .npy file that must hold float32 of exactly `shape`.

    The header is read first and alone: `np.load` would make room for whatever size it claims.
    Raises ValueError with a sentence for anything else, pickled objects included.
    """
    file = io.BytesIO(content)
    wanted = f"must be a .npy file with float32 of shape {list(shape)}"
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        read_header = readers[np.lib.format.read_magic(file)]
        found, fortran, kind = read_header(file, max_header_size=1024)  # type: ignore[call-arg]
    except Exception as error:  # numpy's parser was not made for untrusted input and raises whatever comes up
        raise ValueError(f"{wanted}; got {len(content)} bytes that are none") from error
    if found != shape or fortran or kind != np.dtype("<f4"):
        raise ValueError(f"{wanted}, C order; got {kind} of shape {list(found)}{', Fortran order' * fortran}")
    data = file.read()
    if len(data) != 4 * int(np.prod(shape)):
        raise ValueError(f"{wanted}; its header is followed by {len(data)} bytes")
    latent = np.frombuffer(data, "<f4").reshape(shape)
    if not np.isfinite(latent).all() or float(np.abs(latent).max()) > MAX_LATENT_VALUE:
        raise ValueError("must hold finite numbers between -1000 and 1000")
    return latent


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Unwrapped = BeforeValidator(unwrapped)  # outermost: lengths count without line breaks
Base64Latent = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64", "format": "latent"}), Unwrapped]
Latents = Annotated[list[Base64Latent], Field(json_schema_extra={"minItems": 1, "maxItems": 8})]
Base64Image = Annotated[
    str, Field(max_length=MAX_IMAGE_TEXT, json_schema_extra={"contentEncoding": "base64", "format": "image"}), Unwrapped
]
Base64Mask = Annotated[
    str, Field(max_length=MAX_MASK_TEXT, json_schema_extra={"contentEncoding": "base64", "format": "mask"}), Unwrapped
]
Prompt = Annotated[str, Field(max_length=500, json_schema_extra={"pattern": PRINTABLE})]
Sliders = Annotated[dict[str, float], Field(json_schema_extra={
    "properties": {name: {"type": "number", "minimum": -FURTHEST, "maximum": FURTHEST}
                   for name in BY_ANY_CASE.values()},
    "additionalProperties": False, "maxProperties": MOST})]
